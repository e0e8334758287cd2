package firstlight

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// The network of plugins that a cluster brings along: bridge, host-local and
// portmap, in the newest version of the specification. Its addresses are not
// the Node's podCIDR, which Pods of the built-in bridge still use.
const conflist = `{
  "cniVersion": "1.1.0",
  "name": "e2e",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
      "ipam": {
        "type": "host-local", "dataDir": %q, "routes": [{"dst": "0.0.0.0/0"}],
        "ranges": [[{"subnet": "10.99.0.0/24"}]]
      }
    },
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}
  ]
}
`

// A configuration that appears moves a running node from the built-in bridge
// to plugins; Pods that were there stay, new ones come through kill -9, and
// when it goes again, the node says why it is not ready.
func TestCNI(t *testing.T) {
	e := kit.New(t)
	const index, name = 2, "node-2"
	node := strconv.Itoa(index)
	e.BuildTools(t, "cni/bridge", "cni/host-local", "cni/portmap")
	dir := filepath.Join(e.NodeDir(index), "cni")
	leases := filepath.Join(dir, "leases")
	file := filepath.Join(dir, "net.d/10-e2e.conflist")
	write := func(text string) {
		t.Helper()
		// As daemons do it: nobody sees half a file.
		temporary := file + ".tmp"
		if err := os.WriteFile(temporary, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(temporary, file); err != nil {
			t.Fatal(err)
		}
	}
	ready := func(status corev1.ConditionStatus, text string) {
		t.Helper()
		e.Eventually(20*time.Second, fmt.Sprintf("node Ready is %s: %q", status, text), func() (bool, string) {
			object, err := e.Client.CoreV1().Nodes().Get(e.Ctx, name, metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			c := kit.NodeReady(object)
			return c.Status == status && strings.Contains(c.Message, text), fmt.Sprintf("%s %s", c.Status, c.Message)
		})
	}
	leased := func() []string {
		var found []string
		entries, _ := os.ReadDir(filepath.Join(leases, "e2e"))
		for _, entry := range entries {
			if _, err := netip.ParseAddr(entry.Name()); err == nil {
				found = append(found, entry.Name())
			}
		}
		return found
	}

	e.Create(e.Pod("before", "busybox:1.37", nil, kit.On(name), countedStarts))
	before := e.WaitReady(60*time.Second, "before")[0]

	t.Cleanup(func() {
		os.Remove(file)
		e.Command(t, "stop-agent", "--node", node)
		e.Command(t, "start-agent", "--node", node)
		ready(corev1.ConditionTrue, "")
	})
	write("{ half a file")
	ready(corev1.ConditionFalse, "10-e2e.conflist")
	write(fmt.Sprintf(conflist, leases))
	ready(corev1.ConditionTrue, "")

	serve := []string{"sh", "-c", "mkdir /www && echo plugins > /www/index.html && exec httpd -f -p 80 -h /www"}
	e.Create(e.Pod("attached", "busybox:1.37", serve, kit.On(name), func(p *corev1.Pod) {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 80, HostPort: 18080}}
	}))
	e.Create(e.Pod("neighbour", "busybox:1.37", kit.Forever, kit.On(name)))
	e.Create(e.Pod("client", "busybox:1.37", kit.Forever, kit.On("node-1")))
	pods := e.WaitReady(60*time.Second, "attached", "neighbour", "client")
	attached := pods[0]
	if held := leased(); len(held) != 2 || !slices.Contains(held, attached.Status.PodIP) {
		t.Errorf("host-local has leased %v, the Pod has %s", held, attached.Status.PodIP)
	}
	for from, url := range map[string]string{"neighbour": attached.Status.PodIP, "client": attached.Status.HostIP + ":18080"} {
		e.Eventually(20*time.Second, "an answer from "+url, func() (bool, string) {
			answer, errOut, err := e.Kubectl(e.Ctx, "exec", "-n", e.Namespace, from, "--", "wget", "-qO-", "-T2", "http://"+url+"/")
			return err == nil && answer == "plugins\n", fmt.Sprint(answer, errOut, err)
		})
	}

	// A plugin's own error reaches the user.
	write(strings.Replace(fmt.Sprintf(conflist, leases), `"bridge": "cni0"`, `"bridge": "lo"`, 1))
	time.Sleep(time.Second)
	e.Create(e.Pod("failed", "busybox:1.37", kit.Forever, kit.On(name)))
	e.WaitEvent("failed", `FailedCreatePodSandBox: Failed to create pod sandbox: set up the network: plugin type="bridge" failed (ADD): `, 30*time.Second)
	write(fmt.Sprintf(conflist, leases))
	e.WaitReady(90*time.Second, "failed")

	// Killed in the middle of ADD and DEL, nothing is leased twice or for ever.
	var killed []string
	for i, delay := range []time.Duration{10, 40, 80, 160} {
		pod := fmt.Sprintf("killed-%d", i)
		killed = append(killed, pod)
		e.Create(e.Pod(pod, "busybox:1.37", nil, kit.On(name), countedStarts))
		time.Sleep(delay * time.Millisecond)
		e.Command(t, "kill-agent", "--node", node)
		e.Command(t, "start-agent", "--node", node)
	}
	e.WaitReady(90*time.Second, killed...)
	checkStartedOnce(t, e, append(killed, "before")...)
	all := append([]string{"attached", "neighbour", "failed"}, killed...)
	addresses := map[string]bool{}
	for _, pod := range all {
		addresses[e.Get(pod).Status.PodIP] = true
	}
	if held := leased(); len(held) != len(all) || len(addresses) != len(held) {
		t.Errorf("host-local has leased %v, Pods have %v", held, addresses)
	}
	for i, delay := range []time.Duration{10, 80} {
		e.Delete(killed[i])
		time.Sleep(delay * time.Millisecond)
		e.Command(t, "kill-agent", "--node", node)
		e.Command(t, "start-agent", "--node", node)
	}

	// DEL works from memory when the configuration is gone.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	ready(corev1.ConditionFalse, "cni plugin not initialized")
	for _, pod := range all {
		e.Client.CoreV1().Pods(e.Namespace).Delete(e.Ctx, pod, metav1.DeleteOptions{})
	}
	for _, pod := range all {
		e.WaitGone(pod, 60*time.Second)
	}
	if held := leased(); len(held) != 0 {
		t.Errorf("host-local still has %v", held)
	}
	after := e.Get("before")
	if was, is := kit.Status(before, "main"), kit.Status(after, "main"); was.ContainerID != is.ContainerID || after.Status.PodIP != before.Status.PodIP {
		t.Errorf("the Pod of the bridge felt it: %s, before %s", kit.Describe(after), kit.Describe(before))
	}
	e.Command(t, "node-exec", "--node", node, "--", "ip", "link", "delete", "cni0")
}
