package cluster

import (
	"os"
	"slices"
	"testing"
)

func TestCalls(t *testing.T) {
	c := &Cluster{Dir: t.TempDir(), State: State{Audit: true}}
	line := func(user, verb, stage, resource, subresource string) string {
		return `{"kind":"Event","stage":"` + stage + `","verb":"` + verb + `","user":{"username":"` + user + `"},"objectRef":{"resource":"` + resource +
			`","subresource":"` + subresource + `","namespace":"default","name":"a"},"responseStatus":{"code":200},"requestReceivedTimestamp":"2026-01-02T03:04:05.678901Z"}` + "\n"
	}
	if calls, offset, err := c.Calls(0); err != nil || len(calls) != 0 || offset != 0 {
		t.Fatalf("before the first request: %v %d %v", calls, offset, err)
	}
	first := line("system:node:node-1", "patch", "ResponseComplete", "pods", "status") +
		line("system:node:node-1", "watch", "ResponseStarted", "pods", "") +
		line("system:node:node-1", "watch", "ResponseComplete", "pods", "") +
		line("kubernetes-admin", "get", "ResponseComplete", "pods", "")
	half := `{"kind":"Event","stage":"Resp`
	if err := os.WriteFile(c.AuditLog(), []byte(first+half), 0o644); err != nil {
		t.Fatal(err)
	}
	calls, offset, err := c.Calls(0)
	if err != nil || offset != int64(len(first)) {
		t.Fatalf("offset %d, not %d: %v", offset, len(first), err)
	}
	var got []string
	for _, call := range calls {
		got = append(got, call.Node+" "+call.Verb+" "+call.Resource)
	}
	if want := []string{"node-1 patch pods/status", "node-1 watch pods"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
