// Package cluster runs real Kubernetes control planes with Gantry nodes on one
// machine. A cluster is a directory, a small network of its own and some
// processes; state.json in the directory says which. Every command reads it
// anew, so no process has to stay for a cluster to be managed.
package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/proc"
)

// Home is where clusters and what they are made of lie.
type Home struct {
	// Clusters holds a directory for each cluster.
	Clusters string
	// Bin holds the programs of the control plane.
	Bin string
	// Images is the OCI layout that the registries serve.
	Images string
	// Gantry is the node's binary.
	Gantry string
	// StockNode is what stock nodes run instead (hack/stock-node).
	StockNode string
	// Guest holds the system of guest nodes (hack/guest).
	Guest string
}

// State is what state.json says. It is written before what it announces is
// made, so that `down` after a crash knows at least as much as exists.
type State struct {
	Name string `json:"name"`
	// Network is N of 172.29.N.0/24; it is unique on the machine. -1: none yet.
	Network int `json:"network"`
	// Interface is the cluster's interface in the host's network namespace.
	Interface string             `json:"interface,omitempty"`
	Created   time.Time          `json:"created"`
	Nodes     []Node             `json:"nodes"`
	Processes map[string]proc.ID `json:"processes"`
	// NodeMonitorGracePeriod is how long a silent node stays Ready.
	NodeMonitorGracePeriod time.Duration `json:"nodeMonitorGracePeriod"`
	// ClusterSigningDuration is how long certificates of nodes are valid.
	ClusterSigningDuration time.Duration `json:"clusterSigningDuration"`
	AgentArgs              []string      `json:"agentArgs,omitempty"`
	GantryBinary           string        `json:"gantryBinary,omitempty"`
	// Audit says that the API server records what nodes ask of it (AuditLog).
	Audit bool `json:"audit,omitempty"`
	// K3s says that nodes join a stand-in for a k3s server.
	K3s bool `json:"k3s,omitempty"`
	// K3sCertificateDuration is how long the certificates are valid that it issues.
	K3sCertificateDuration time.Duration `json:"k3sCertificateDuration,omitempty"`
	// Settings are those of the machine as they were before a kubelet changed them.
	Settings map[string]string `json:"settings,omitempty"`
}

// Node is one node.
type Node struct {
	Index int `json:"index"`
	// Stock says that the node runs kubelet, containerd and runc.
	Stock bool `json:"stock,omitempty"`
	// Guest says that the node is a virtual machine with pure cgroup v2.
	Guest bool `json:"guest,omitempty"`
}

// Cluster is a cluster's directory with its state, locked.
type Cluster struct {
	Home Home
	Dir  string
	State
	lock *os.File
}

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("--name %q: use 1 to 20 lower-case letters, digits and dashes", name)
	}
	return nil
}

// ErrNoCluster means that there is no cluster of that name.
var ErrNoCluster = errors.New("no such cluster")

// Open locks an existing cluster and reads its state. A directory without
// state.json (a crash in its first moment) is opened with an empty state.
func (h Home) Open(name string) (*Cluster, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.Clusters, 0o755); err != nil {
		return nil, err
	}
	lock, err := lockFile(h.lockPath(name), 3*time.Minute)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", name, err)
	}
	c := &Cluster{Home: h, Dir: filepath.Join(h.Clusters, name), lock: lock}
	c.State = State{Name: name, Network: -1, Processes: map[string]proc.ID{}}
	if _, err := os.Stat(c.Dir); err != nil {
		c.Close()
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %q (hack/cluster up --name %s makes it)", ErrNoCluster, name, name)
		}
		return nil, err
	}
	raw, err := os.ReadFile(c.stateFile())
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	} else if err != nil {
		c.Close()
		return nil, err
	}
	if err := json.Unmarshal(raw, &c.State); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", c.stateFile(), err)
	}
	return c, nil
}

// create locks a new cluster and makes its directory.
func (h Home) create(name string) (*Cluster, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.Clusters, 0o755); err != nil {
		return nil, err
	}
	lock, err := lockFile(h.lockPath(name), 3*time.Minute)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", name, err)
	}
	c := &Cluster{Home: h, Dir: filepath.Join(h.Clusters, name), lock: lock}
	c.State = State{Name: name, Network: -1, Created: time.Now().UTC(), Processes: map[string]proc.ID{}}
	if err := os.Mkdir(c.Dir, 0o755); err != nil {
		defer c.lock.Close()
		if errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("cluster %q exists; hack/cluster status --name %s shows it, hack/cluster down --name %s removes it", name, name, name)
		}
		return nil, err
	}
	return c, c.save()
}

// Names lists the clusters that have a directory.
func (h Home) Names() ([]string, error) {
	entries, err := os.ReadDir(h.Clusters)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && validName.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

// The lock lies beside the directory, because `down` removes the directory.
func (h Home) lockPath(name string) string { return filepath.Join(h.Clusters, "."+name+".lock") }

// Close gives up the lock.
func (c *Cluster) Close() {
	// Without a cluster the lock file would be a left-over.
	if _, err := os.Stat(c.Dir); errors.Is(err, os.ErrNotExist) {
		os.Remove(c.lock.Name())
	}
	c.lock.Close()
}

// lockFile takes an exclusive flock, and makes sure that the file it locked is
// still the one that the path names (the holder before may have removed it).
func lockFile(path string, patience time.Duration) (*os.File, error) {
	deadline := time.Now().Add(patience)
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			held, err1 := f.Stat()
			named, err2 := os.Stat(path)
			if err1 == nil && err2 == nil && os.SameFile(held, named) {
				return f, nil
			}
			f.Close()
			continue
		}
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("another command has held %s for %s", path, patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (c *Cluster) stateFile() string { return filepath.Join(c.Dir, "state.json") }

func (c *Cluster) save() error {
	raw, err := json.MarshalIndent(c.State, "", "  ")
	if err != nil {
		return err
	}
	temporary := c.stateFile() + ".new"
	if err := os.WriteFile(temporary, append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, c.stateFile())
}

// --- Names and addresses, all derived from the state.

func (c *Cluster) path(elements ...string) string {
	return filepath.Join(append([]string{c.Dir}, elements...)...)
}

func (c *Cluster) namespaceFile(name string) string { return c.path("netns", name) }

// address is host number n of the cluster's network.
func (c *Cluster) address(n int) *net.IPNet {
	return &net.IPNet{IP: net.IPv4(172, 29, byte(c.Network), byte(n)).To4(), Mask: net.CIDRMask(24, 32)}
}

const (
	hostControlPlane = 1
	hostFirstNode    = 11
	hostOutside      = 253
	hostRouter       = 254

	// MaxNodes is how many nodes fit between the fixed addresses.
	MaxNodes = 100

	apiServerPort = 6443
	registryPort  = 5000
	k3sPort       = 6444

	serviceCIDR = "10.96.0.0/16"
	podCIDR     = "10.244.0.0/16"
)

// ServerURL is the API server's address, for nodes and from outside alike.
func (c *Cluster) ServerURL() string {
	return fmt.Sprintf("https://%s:%d", c.address(hostControlPlane).IP, apiServerPort)
}

// Registry is host:port of the registry, for nodes and from outside alike.
func (c *Cluster) Registry() string {
	return fmt.Sprintf("%s:%d", c.address(hostControlPlane).IP, registryPort)
}

// Kubeconfig is the administrator's.
func (c *Cluster) Kubeconfig() string { return c.path("admin.conf") }

// Name of the Node object and of everything that belongs to the node.
func (n Node) Name() string { return fmt.Sprintf("node-%d", n.Index) }

func (c *Cluster) nodeAddress(n Node) *net.IPNet { return c.address(hostFirstNode + n.Index - 1) }

// nodeDir is short on purpose: sockets of the node lie below it, and the path
// of a unix socket has 107 bytes at most.
func (c *Cluster) nodeDir(n Node) string { return c.path(fmt.Sprintf("n%d", n.Index)) }

// cgroupRoot is the node's cgroup. The network number makes it unique on the
// machine: another directory of clusters may use the same names.
func (c *Cluster) cgroupRoot(n Node) string {
	return fmt.Sprintf("/gantry-%s-%d-%s", c.Name, c.Network, n.Name())
}

func (c *Cluster) node(index int) (Node, error) {
	for _, n := range c.Nodes {
		if n.Index == index {
			return n, nil
		}
	}
	var known []string
	for _, n := range c.Nodes {
		known = append(known, fmt.Sprint(n.Index))
	}
	return Node{}, fmt.Errorf("--node %d: cluster %s has the nodes [%s]", index, c.Name, strings.Join(known, " "))
}

func agentProcess(n Node) string { return fmt.Sprintf("agent-%d", n.Index) }

// processLog is the log file of a process in the state.
func (c *Cluster) processLog(name string) string { return c.path("log", name+".log") }
