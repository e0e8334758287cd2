package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

const (
	switchNamespace = "switch"
	bridgeName      = "br0"
	uplinkPort      = "outside"
)

// Options are what `up` can be told.
type Options struct {
	Name  string
	Nodes int
	// StockNodes is the number of nodes that run kubelet, containerd and runc;
	// their numbers follow those of the others.
	StockNodes int
	// GuestNodes is the number of nodes that are virtual machines with pure
	// cgroup v2; their numbers come last.
	GuestNodes int
	// GuestSwap is the size of each guest's swap, MiB.
	GuestSwap int64
	// K3s puts a stand-in for a k3s server in front of the API server, which then
	// reaches nodes through its tunnel alone; Gantry nodes join by its protocol.
	K3s bool
	// K3sCertificateDuration is how long the certificates are valid that it issues.
	K3sCertificateDuration time.Duration
	// Audit makes the API server record what nodes ask of it.
	Audit bool
	// NodeMonitorGracePeriod is the controller manager's flag of that name.
	NodeMonitorGracePeriod time.Duration
	// ClusterSigningDuration is the controller manager's flag of that name. Nodes
	// ask for a new certificate when 70 to 90 percent of the old one's life are
	// over, and the controller backdates by five minutes what it signs: with less
	// than 130 s a new certificate is already due.
	ClusterSigningDuration time.Duration
	// KubeletConfig is laid over the generated KubeletConfiguration of every node.
	KubeletConfig map[string]any
	// AgentArgs are appended to every agent's command line.
	AgentArgs []string
	Timeout   time.Duration
	// Self is the path of this program, which is also the supervisor.
	Self     string
	Progress io.Writer
}

// all is the number of nodes of every kind.
func (o Options) all() int { return o.Nodes + o.StockNodes + o.GuestNodes }

// Up makes a cluster and returns when its nodes are Ready. What was made stays
// when it fails, so that it can be looked at; `down` removes it.
func (h Home) Up(ctx context.Context, options Options) (*Cluster, error) {
	if options.Nodes < 0 || options.StockNodes < 0 || options.GuestNodes < 0 || options.all() > MaxNodes {
		return nil, fmt.Errorf("--nodes %d --stock-nodes %d --guest-nodes %d: use 0 to %d together", options.Nodes, options.StockNodes, options.GuestNodes, MaxNodes)
	}
	if options.GuestSwap < 0 || options.GuestSwap > 0 && options.GuestNodes == 0 {
		return nil, fmt.Errorf("--guest-swap %d: use 0 or more, with --guest-nodes", options.GuestSwap)
	}
	if options.Nodes+options.GuestNodes > 0 {
		if _, err := os.Stat(h.Gantry); err != nil {
			return nil, fmt.Errorf("no agent binary at %s: build it (cargo build --release), name one by GANTRY_BIN, or use --nodes 0", h.Gantry)
		}
	}
	if options.K3s && options.StockNodes+options.GuestNodes > 0 {
		return nil, errors.New("--k3s: only Gantry nodes on this machine join a k3s server; leave out --stock-nodes and --guest-nodes")
	}
	started := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(options.Progress, "[%5.1fs] %s\n", time.Since(started).Seconds(), fmt.Sprintf(format, args...))
	}
	c, err := h.create(options.Name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, options.Timeout)
	defer cancel()

	c.NodeMonitorGracePeriod, c.ClusterSigningDuration = options.NodeMonitorGracePeriod, options.ClusterSigningDuration
	c.AgentArgs, c.GantryBinary, c.Audit = options.AgentArgs, h.Gantry, options.Audit
	c.K3s, c.K3sCertificateDuration = options.K3s, options.K3sCertificateDuration
	if err := c.makeNetwork(); err != nil {
		return c, err
	}
	if err := c.makePKI(); err != nil {
		return c, err
	}
	if c.Audit {
		if err := c.writeAuditPolicy(); err != nil {
			return c, err
		}
	}
	if err := c.startComponent(c.etcd()); err != nil {
		return c, err
	}
	if err := c.startComponent(c.apiServer()); err != nil {
		return c, err
	}
	say("network %s, certificates, etcd and kube-apiserver started", c.address(0))
	// What the nodes need is made while the API server starts.
	for i := 1; i <= options.all(); i++ {
		guest := i > options.Nodes+options.StockNodes
		n := Node{Index: i, Stock: i > options.Nodes && !guest, Guest: guest}
		c.Nodes = append(c.Nodes, n)
		if err := c.save(); err != nil {
			return c, err
		}
		if n.Guest {
			err = c.makeGuest(n, options)
		} else {
			err = c.makeNode(n, options.KubeletConfig)
		}
		if err != nil {
			return c, fmt.Errorf("%s: %w", n.Name(), err)
		}
	}
	client, err := c.Client()
	if err != nil {
		return c, err
	}
	if err := c.waitAPIServer(ctx, client); err != nil {
		return c, err
	}
	say("kube-apiserver ready at %s", c.ServerURL())
	if err := c.startSupervisor(options.Self); err != nil {
		return c, err
	}
	if err := c.startComponent(c.controllerManager()); err != nil {
		return c, err
	}
	if err := c.startComponent(c.scheduler()); err != nil {
		return c, err
	}
	if err := c.makeJoinable(ctx, client); err != nil {
		return c, err
	}
	if err := c.waitRegistry(ctx); err != nil {
		return c, err
	}
	say("registry ready at %s", c.Registry())
	if c.K3s {
		if err := c.StartK3s(ctx); err != nil {
			return c, err
		}
		say("stand-in for a k3s server ready at %s", c.k3sURL())
	}
	for _, n := range c.Nodes {
		if n.Guest {
			if err := c.bootGuest(ctx, n); err != nil {
				return c, err
			}
			say("guest of %s booted", n.Name())
		}
		if err := c.StartAgent(n.Index); err != nil {
			return c, err
		}
	}
	if err := c.waitDefaults(ctx, client); err != nil {
		return c, err
	}
	say("controllers ready")
	for _, n := range c.Nodes {
		if err := c.waitNode(ctx, client, n); err != nil {
			return c, err
		}
		say("%s Ready", n.Name())
	}
	return c, nil
}

// makeNetwork claims a free 172.29.N.0/24 and makes the switch and the control
// plane's namespace. The switch is also the nodes' default router: it knows no
// way out of the cluster, and says so at once.
func (c *Cluster) makeNetwork() error {
	taken, err := hostNetworks()
	if err != nil {
		return err
	}
	for n := 1; n < 255; n++ {
		c.Network, c.Interface = n, fmt.Sprintf("gantry%d", n)
		if overlaps(taken, c.address(0)) {
			continue
		}
		if err := c.save(); err != nil {
			return err
		}
		err := c.makeSwitch()
		if errors.Is(err, netns.ErrTaken) {
			if err := c.removeNamespace(switchNamespace); err != nil {
				return err
			}
			continue
		} else if err != nil {
			return err
		}
		return c.makeControlPlaneNamespace()
	}
	c.Network, c.Interface = -1, ""
	return errors.New("no 172.29.N.0/24 is free: every N from 1 to 254 is in use on this machine (hack/cluster down --all removes this project's)")
}

func (c *Cluster) makeSwitch() error {
	sw, err := netns.Create(c.namespaceFile(switchNamespace))
	if err != nil {
		return err
	}
	defer sw.Close()
	if err := sw.Sysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if err := sw.Bridge(bridgeName, c.address(hostRouter)); err != nil {
		return err
	}
	return netns.Uplink(sw, bridgeName, uplinkPort, c.Interface, c.address(hostOutside))
}

func (c *Cluster) makeControlPlaneNamespace() error {
	sw, err := netns.Open(c.namespaceFile(switchNamespace))
	if err != nil {
		return err
	}
	defer sw.Close()
	ns, err := netns.Create(c.namespaceFile("control-plane"))
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Plug(sw, bridgeName, "control-plane", c.address(hostControlPlane), c.address(hostRouter).IP)
}

func hostNetworks() ([]*net.IPNet, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var networks []*net.IPNet
	for _, address := range addresses {
		if network, ok := address.(*net.IPNet); ok && network.IP.To4() != nil {
			networks = append(networks, network)
		}
	}
	return networks, nil
}

func overlaps(networks []*net.IPNet, wanted *net.IPNet) bool {
	for _, n := range networks {
		if n.Contains(wanted.IP) || wanted.Contains(n.IP) {
			return true
		}
	}
	return false
}

func (c *Cluster) startSupervisor(self string) error {
	return c.startProcess("supervisor", proc.Spec{
		Args: []string{
			self, "supervise",
			"--kubeconfig=" + c.Kubeconfig(), "--namespaces=" + c.path("netns"),
			"--listen=" + c.Registry(), "--images=" + c.Home.Images, "--pushes=" + c.path("registry"),
		},
		Env:              []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.Dir},
		NetworkNamespace: c.namespaceFile("control-plane"),
	})
}

// tail returns the last lines of a file.
func tail(file string, lines int) string {
	const window = 64 << 10
	f, err := os.Open(file)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > window {
		f.Seek(-window, io.SeekEnd)
	}
	raw, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimRight(raw, "\n"), []byte("\n"))
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return string(bytes.Join(all, []byte("\n")))
}

// Environment is what a shell needs to use the cluster, as export lines.
func (c *Cluster) Environment() string {
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	var b strings.Builder
	fmt.Fprintf(&b, "export KUBECONFIG=%s\n", quote(c.Kubeconfig()))
	fmt.Fprintf(&b, "export PATH=%s:\"$PATH\"\n", quote(filepath.Clean(c.Home.Bin)))
	fmt.Fprintf(&b, "export GANTRY_REGISTRY=%s\n", quote(c.Registry()))
	fmt.Fprintf(&b, "export GANTRY_CLUSTER=%s\n", quote(c.Name))
	return b.String()
}
