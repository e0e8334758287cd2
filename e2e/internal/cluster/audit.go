package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

// auditPolicy records every request of a node, once, when it is answered. A
// watch is recorded when it begins, for it may never end.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  userGroups: [system:nodes]
- level: None
`

// AuditLog is the file in which the API server of a cluster with Audit records what nodes ask of it.
func (c *Cluster) AuditLog() string { return c.path("audit.log") }

func (c *Cluster) writeAuditPolicy() error {
	return os.WriteFile(c.path("audit-policy.yaml"), []byte(auditPolicy), 0o644)
}

// Call is one request that a node made.
type Call struct {
	// Node is the node's name.
	Node string
	Verb string
	// Resource is its plural, with the subresource after a slash ("pods/status").
	Resource        string
	Namespace, Name string
	// Code is the status of the answer.
	Code int
	At   time.Time
}

// event is the part of an audit event that is used here.
type event struct {
	Stage string `json:"stage"`
	Verb  string `json:"verb"`
	User  struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef struct {
		Resource    string `json:"resource"`
		Subresource string `json:"subresource"`
		Namespace   string `json:"namespace"`
		Name        string `json:"name"`
	} `json:"objectRef"`
	ResponseStatus struct {
		Code int `json:"code"`
	} `json:"responseStatus"`
	RequestReceivedTimestamp time.Time `json:"requestReceivedTimestamp"`
}

// Calls reads what nodes asked of the API server from an offset of the audit
// log on, and returns the offset to go on from. The API server writes an
// event before it answers.
func (c *Cluster) Calls(offset int64) ([]Call, int64, error) {
	if !c.Audit {
		return nil, 0, fmt.Errorf("cluster %s does not record what nodes ask: make it by hack/cluster up --audit", c.Name)
	}
	f, err := os.Open(c.AuditLog())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, offset, nil
	} else if err != nil {
		return nil, offset, err
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, offset, err
	}
	var calls []Call
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return calls, offset, nil // a line without its end is read next time
		} else if err != nil {
			return calls, offset, err
		}
		offset += int64(len(line))
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			return calls, offset, fmt.Errorf("%s: %w", c.AuditLog(), err)
		}
		if call, ok := e.call(); ok {
			calls = append(calls, call)
		}
	}
}

// call is what the event tells; false if the same request has another event that tells it.
func (e event) call() (Call, bool) {
	node, isNode := strings.CutPrefix(e.User.Username, "system:node:")
	if !isNode || (e.Verb == "watch") != (e.Stage == "ResponseStarted") {
		return Call{}, false
	}
	resource := e.ObjectRef.Resource
	if e.ObjectRef.Subresource != "" {
		resource += "/" + e.ObjectRef.Subresource
	}
	return Call{
		Node: node, Verb: e.Verb, Resource: resource, Namespace: e.ObjectRef.Namespace, Name: e.ObjectRef.Name,
		Code: e.ResponseStatus.Code, At: e.RequestReceivedTimestamp,
	}, true
}
