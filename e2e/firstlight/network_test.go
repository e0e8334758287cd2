package firstlight

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/kit"
)

// Names inside a Pod, host ports, and Pods that have no network of their own.
func TestPodNetwork(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)

	named := e.Pod("named", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
		p.Spec.Hostname, p.Spec.Subdomain = "box", "boxes"
		p.Spec.HostAliases = []corev1.HostAlias{{IP: "192.0.2.7", Hostnames: []string{"seven", "seven.example.org"}}}
		ndots := "3"
		p.Spec.DNSConfig = &corev1.PodDNSConfig{Searches: []string{"example.org"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &ndots}}}
	})
	own := e.Pod("own-dns", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
		p.Spec.DNSPolicy = corev1.DNSNone
		p.Spec.DNSConfig = &corev1.PodDNSConfig{Nameservers: []string{"192.0.2.53"}}
	})
	host := e.Pod("host", "app-a:1", nil, kit.On(node), func(p *corev1.Pod) {
		p.Spec.HostNetwork = true
		p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "PORT", Value: "3055"}}
	})
	exposed := e.Pod("exposed", "app-a:1", nil, kit.On(node), func(p *corev1.Pod) {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 3000, HostPort: 3056}}
	})
	e.Create(named, own, host, exposed)
	pods := e.WaitReady(60*time.Second, "named", "host", "exposed", "own-dns")

	if got := e.Exec("named", "main", "hostname"); got != "box\n" {
		t.Errorf("hostname %q", got)
	}
	if got := e.Exec("named", "main", "hostname", "-f"); got != "box.boxes."+e.Namespace+".svc.cluster.local\n" {
		t.Errorf("full name %q", got)
	}
	hosts := e.Exec("named", "main", "cat", "/etc/hosts")
	for _, line := range []string{
		"127.0.0.1\tlocalhost", pods[0].Status.PodIP + "\tbox.boxes." + e.Namespace + ".svc.cluster.local\tbox", "192.0.2.7\tseven\tseven.example.org",
	} {
		if !strings.Contains(hosts, line+"\n") {
			t.Errorf("/etc/hosts lacks %q:\n%s", line, hosts)
		}
	}
	resolv := e.Exec("named", "main", "cat", "/etc/resolv.conf")
	for _, line := range []string{
		"nameserver 10.96.0.10", fmt.Sprintf("search %s.svc.cluster.local svc.cluster.local cluster.local example.org", e.Namespace), "options ndots:3",
	} {
		if !strings.Contains(resolv, line+"\n") {
			t.Errorf("/etc/resolv.conf lacks %q:\n%s", line, resolv)
		}
	}
	if got := e.Exec("own-dns", "main", "cat", "/etc/resolv.conf"); strings.TrimSpace(got) != "nameserver 192.0.2.53" {
		t.Errorf("dnsPolicy None: %q", got)
	}

	if ip := pods[1].Status.PodIP; ip != pods[1].Status.HostIP || ip == "" {
		t.Errorf("a Pod of the host's network has the IP %q, its node %q", ip, pods[1].Status.HostIP)
	}
	// Nodes of a test cluster are called as they like; the machine has one name.
	machine, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{"hostname"}, {"cat", "/etc/hostname"}, {"printenv", "HOSTNAME"}} {
		if got := e.Exec("host", "main", command...); got != machine+"\n" {
			t.Errorf("%v in a Pod of the host's network: %q, want %q", command, got, machine)
		}
	}
	fetch := func(pod, url, want string) {
		t.Helper()
		if got := e.Exec(pod, "main", "wget", "-q", "-T", "10", "-O", "-", url); got != want {
			t.Errorf("%s fetches %s: %q, want %q", pod, url, got, want)
		}
	}
	// Pods reach their node, the node reaches Pods, and host ports lead into them.
	fetch("named", "http://"+pods[1].Status.HostIP+":3055/", "app-a on "+machine+"\n")
	fetch("host", "http://"+pods[2].Status.PodIP+":3000/", "app-a on exposed\n")
	fetch("named", "http://"+pods[2].Status.HostIP+":3056/", "app-a on exposed\n")
	fetch("host", "http://"+pods[2].Status.HostIP+":3056/", "app-a on exposed\n")
	// Outwards, beyond the node: the registry's host.
	fetch("named", "http://"+e.Registry+"/v2/", e.Exec("host", "main", "wget", "-q", "-T", "10", "-O", "-", "http://"+e.Registry+"/v2/"))

	t.Run("a host port is given once", func(t *testing.T) {
		e := e.In(t)
		second := e.Pod("second", "app-a:1", nil, kit.On(node))
		second.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 3000, HostPort: 3056}}
		e.Create(second)
		rejected := e.WaitPod("second", 30*time.Second, "rejected", func(p *corev1.Pod) (bool, string) {
			return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
		})
		if rejected.Status.Reason != "NodePorts" {
			t.Errorf("reason %q, message %q", rejected.Status.Reason, rejected.Status.Message)
		}
		e.Delete("exposed")
		e.WaitGone("exposed", 30*time.Second)
		third := e.Pod("third", "app-a:1", nil, kit.On(node))
		third.Spec.Containers[0].Ports = second.Spec.Containers[0].Ports
		e.Create(third)
		e.WaitReady(30*time.Second, "third")
		if got := e.Exec("named", "main", "wget", "-q", "-T", "10", "-O", "-", "http://"+pods[2].Status.HostIP+":3056/"); got != "app-a on third\n" {
			t.Errorf("the port leads to %q", got)
		}
	})
}
