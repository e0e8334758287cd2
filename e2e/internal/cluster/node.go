package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

// makeNode makes a node's network, directories, cgroups and configuration.
func (c *Cluster) makeNode(n Node, overlay map[string]any) error {
	sw, err := netns.Open(c.namespaceFile(switchNamespace))
	if err != nil {
		return err
	}
	defer sw.Close()
	ns, err := netns.Create(c.namespaceFile(n.Name()))
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ns.Plug(sw, bridgeName, n.Name(), c.nodeAddress(n), c.address(hostRouter).IP); err != nil {
		return err
	}

	return c.makeNodeFiles(n, overlay)
}

// makeNodeFiles makes a node's directories, configuration and cgroups.
func (c *Cluster) makeNodeFiles(n Node, overlay map[string]any) error {
	dir := c.nodeDir(n)
	for _, sub := range []string{"kubelet/pki", "data", "run", "log/pods", "log/containers", "manifests", "cni/net.d"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	// On a machine of its own the node's sockets and records lie in /run, which
	// is a tmpfs: fast, and empty after a reboot.
	if err := unix.Mount("tmpfs", filepath.Join(dir, "run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s/run: %w", dir, err)
	}
	// Nothing serves DNS on that address: queries are refused at once instead of
	// running into time-outs in the machine's own network.
	resolv := fmt.Sprintf("nameserver %s\n", c.address(hostControlPlane).IP)
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(resolv), 0o644); err != nil {
		return err
	}
	config := c.kubeletConfiguration(n)
	if c.K3s {
		leaveToK3s(config)
	}
	merge(config, overlay)
	raw, err := yaml.Marshal(config)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), raw, 0o644); err != nil {
		return err
	}
	return makeCgroups(c.cgroupRoot(n), c.cgroupRoot(n)+"/agent")
}

func (c *Cluster) kubeletConfiguration(n Node) map[string]any {
	dir := c.nodeDir(n)
	return map[string]any{
		"apiVersion":   "kubelet.config.k8s.io/v1beta1",
		"kind":         "KubeletConfiguration",
		"failCgroupV1": false,
		"cgroupDriver": "cgroupfs",
		"cgroupRoot":   c.cgroupRoot(n),
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": c.pkiPath("ca.crt")},
		},
		"authorization":      map[string]any{"mode": "Webhook"},
		"rotateCertificates": true,
		"clusterDNS":         []any{"10.96.0.10"},
		"clusterDomain":      "cluster.local",
		"resolvConf":         filepath.Join(dir, "resolv.conf"),
		"podLogsDir":         filepath.Join(dir, "log/pods"),
		"staticPodPath":      filepath.Join(dir, "manifests"),
		// A developer's disk may be nearly full; that is not what is tested.
		"evictionHard": map[string]any{
			"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%",
		},
		"imageGCHighThresholdPercent": 99,
		"imageGCLowThresholdPercent":  98,
	}
}

// merge lays overlay over base; maps are merged, anything else is replaced.
func merge(base, overlay map[string]any) {
	for key, value := range overlay {
		below, ok1 := base[key].(map[string]any)
		above, ok2 := value.(map[string]any)
		if ok1 && ok2 {
			merge(below, above)
		} else {
			base[key] = value
		}
	}
}

func (c *Cluster) agentArgs(n Node) []string {
	dir := c.nodeDir(n)
	program := c.GantryBinary
	if n.Stock {
		program = c.Home.StockNode
	}
	args := []string{
		program, "agent",
		"--config=" + filepath.Join(dir, "config.yaml"),
		"--kubeconfig=" + filepath.Join(dir, "kubelet/kubeconfig"),
		"--hostname-override=" + n.Name(),
		"--node-ip=" + c.nodeAddress(n).IP.String(),
		"--root-dir=" + filepath.Join(dir, "kubelet"),
		"--cert-dir=" + filepath.Join(dir, "kubelet/pki"),
		"--data-dir=" + filepath.Join(dir, "data"),
		"--state-dir=" + filepath.Join(dir, "run"),
		"--container-logs-dir=" + filepath.Join(dir, "log/containers"),
		"--insecure-registry=" + c.Registry(),
		// The machine's own are none of a test's business.
		"--cni-conf-dir=" + filepath.Join(dir, "cni/net.d"),
		"--cni-bin-dir=" + filepath.Join(c.Home.Bin, "cni"),
	}
	if c.K3s {
		args = append(args, c.k3sAgentArgs(n)...)
	} else {
		args = append(args, "--bootstrap-kubeconfig="+c.path("bootstrap.conf"))
	}
	return append(args, c.AgentArgs...)
}

// StartAgent starts a node's agent, if it does not run already.
func (c *Cluster) StartAgent(index int) error {
	n, err := c.node(index)
	if err != nil {
		return err
	}
	if n.Guest {
		_, err := c.inGuest(n, "start-agent")
		return err
	}
	if c.Processes[agentProcess(n)].Alive() {
		return nil
	}
	if n.Stock {
		if err := c.preserveSettings(); err != nil {
			return err
		}
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.nodeDir(n), "RUST_BACKTRACE=1"}
	if filter := os.Getenv("RUST_LOG"); filter != "" {
		env = append(env, "RUST_LOG="+filter)
	}
	dirs, err := cgroupDirs(c.cgroupRoot(n) + "/agent")
	if err != nil {
		return err
	}
	return c.startProcess(agentProcess(n), proc.Spec{
		Args: c.agentArgs(n), Env: env,
		NetworkNamespace: c.namespaceFile(n.Name()), Cgroups: dirs,
	})
}

// StopAgent ends a node's agent: at once by SIGKILL, or by SIGTERM. Its Pods stay.
func (c *Cluster) StopAgent(index int, kill bool) error {
	n, err := c.node(index)
	if err != nil {
		return err
	}
	if n.Guest {
		command := "stop-agent"
		if kill {
			command = "kill-agent"
		}
		_, err := c.inGuest(n, command)
		return err
	}
	id := c.Processes[agentProcess(n)]
	if !id.Alive() {
		return fmt.Errorf("the agent of %s does not run", n.Name())
	}
	if kill {
		return id.Kill()
	}
	return id.Stop(30 * time.Second)
}

// Exec replaces this process by a command in the node's network namespace.
func (c *Cluster) Exec(index int, args []string) error {
	n, err := c.node(index)
	if err != nil {
		return err
	}
	if n.Guest {
		out, err := c.inGuest(n, append([]string{"node-exec", "--"}, args...)...)
		os.Stdout.Write(out)
		return err
	}
	return proc.Exec(c.namespaceFile(n.Name()), args, os.Environ())
}

func (c *Cluster) waitNode(ctx context.Context, client *kubernetes.Clientset, n Node) error {
	return c.poll(ctx, nodeProcess(n), func(ctx context.Context) error {
		node, err := client.CoreV1().Nodes().Get(ctx, n.Name(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		ready, why := nodeReady(node)
		if !ready {
			return fmt.Errorf("%s is not Ready: %s", n.Name(), why)
		}
		return nil
	})
}

func nodeReady(node *corev1.Node) (bool, string) {
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			return condition.Status == corev1.ConditionTrue, strings.TrimSpace(condition.Reason + " " + condition.Message)
		}
	}
	return false, "no Ready condition yet"
}
