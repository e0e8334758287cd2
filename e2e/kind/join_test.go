package kind

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const podOn = `apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %[1]s}}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 2
  containers:
  - {name: main, image: ` + application + `, imagePullPolicy: Never}
`

// runOn starts the application on a node and checks that it reaches the
// cluster's Service, and that the first Pod of the Deployment reaches it.
func runOn(t *testing.T, pod, node string) {
	do(t, kindCommand("load", "docker-image", "--name", cluster, application))
	apply(t, fmt.Sprintf(podOn, pod, node))
	do(t, kubectl("wait", "--for=condition=Ready", "pod/"+pod, "--timeout=60s"))
	ip := do(t, kubectl("get", "pod", pod, "-o", "jsonpath={.status.podIP}"))
	if cidr := podCIDR(t, node); !strings.HasPrefix(ip, cidr[:strings.LastIndexByte(cidr, '.')+1]) {
		t.Errorf("the Pod has %s, which is not of the node's %s", ip, cidr)
	}
	for from, to := range map[string]string{pod: "app:80", "deployment/app": ip + ":8080"} {
		eventually(t, 30*time.Second, from+" reaches "+to, func() *exec.Cmd {
			return kubectl("exec", from, "--", "/agnhost", "connect", "--timeout=3s", to)
		}, func(string) bool { return true })
	}
}

func podCIDR(t *testing.T, node string) string {
	t.Helper()
	return do(t, kubectl("get", "node", node, "-o", "jsonpath={.spec.podCIDR}"))
}

// join adds a node to the running cluster and takes it away again.
func join(t *testing.T) {
	node := cluster + "-gantry"
	do(t, hack("join", cluster, "--image", nodeImage))
	if known := do(t, kindCommand("get", "nodes", "--name", cluster)); !strings.Contains(known, node) {
		t.Errorf("kind knows only %s", known)
	}
	if id := do(t, kubectl("get", "node", node, "-o", "jsonpath={.spec.providerID}")); id != "kind://docker/"+cluster+"/"+node {
		t.Errorf("providerID %s", id)
	}
	runOn(t, "joined", node)
	if _, err := output(hack("join", cluster, "--name", cluster+"-worker", "--delete")); err == nil || !strings.Contains(err.Error(), "no node that hack/kind/join has added") {
		t.Errorf("one of kind's own nodes: %v", err)
	}
	do(t, hack("join", cluster, "--delete"))
	if out := do(t, kubectl("get", "nodes", "-o", "name")); strings.Contains(out, node) {
		t.Errorf("the Node is still there: %s", out)
	}
	if out := do(t, docker("ps", "--all", "--format", "{{.Names}}")); strings.Contains(out, node) {
		t.Errorf("the container is still there: %s", out)
	}
}

// What kindnet writes on a node of kind.
const kindnet = `{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [
  {"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
   "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "%s"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
`

// joinWithPlugins is a node of a cluster whose network is not Gantry's: it waits
// for a configuration and then uses the plugins. This test does what kindnet does.
func joinWithPlugins(t *testing.T) {
	node := cluster + "-plugins"
	do(t, kubectl("-n", "kube-system", "delete", "daemonset", "gantry-node-routes"))
	joined := make(chan error, 1)
	go func() { joined <- script("join", cluster, "--name", node, "--image", nodeImage) }()
	eventually(t, 60*time.Second, "the node waits for a network", func() *exec.Cmd {
		return kubectl("get", "node", node, "-o", `jsonpath={.spec.podCIDR} {.status.conditions[?(@.type=="Ready")].message}`)
	}, func(out string) bool {
		return strings.HasPrefix(out, "10.") && strings.Contains(out, "cni plugin not initialized")
	})
	configure := docker("exec", "--interactive", node, "sh", "-c",
		"mkdir -p /etc/cni/net.d && cat > /etc/cni/net.d/new && mv /etc/cni/net.d/new /etc/cni/net.d/10-kindnet.conflist")
	configure.Stdin = strings.NewReader(fmt.Sprintf(kindnet, podCIDR(t, node)))
	do(t, configure)
	if err := <-joined; err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{"control-plane", "worker", "worker2"} {
		other = cluster + "-" + other
		do(t, docker("exec", other, "ip", "route", "add", podCIDR(t, node), "via", address(t, node)))
		do(t, docker("exec", node, "ip", "route", "add", podCIDR(t, other), "via", address(t, other)))
	}
	runOn(t, "plugged", node)
}

// deleteCluster leaves no container: the joined node goes as well.
func deleteCluster(t *testing.T) {
	do(t, kindCommand("delete", "cluster", "--name", cluster))
	if out := do(t, docker("ps", "--all", "--quiet")); out != "" {
		t.Errorf("containers are left: %s", out)
	}
}
