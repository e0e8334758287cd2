package firstlight

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"gantry.local/e2e/internal/kit"
)

// Certificates of the other cluster's node live so long. The controller
// backdates by five minutes, so they are renewed 8 to 96 s after their issue.
const signingDuration = 140 * time.Second

// Bounds of a container's log, and of a Pod's processes, in the other cluster.
const (
	logMaxSize  = 128 << 10
	logMaxFiles = 3
	maxPIDs     = 48
)

// A second cluster beside the first, with another configuration: certificates
// that live for two minutes, serving certificates of the cluster's authority,
// small log files. Neither disturbs the other; nothing of it stays.
func TestOtherCluster(t *testing.T) {
	t.Parallel()
	first := kit.New(t)
	node := quietNode(first)
	share(t, node)
	first.Create(first.Pod("bystander", "busybox:1.37", kit.Forever, kit.On(node)))
	bystander := first.WaitReady(60*time.Second, "bystander")[0]
	record := first.Record(node, "bystander")

	config := filepath.Join(t.TempDir(), "kubelet.yaml")
	fields := fmt.Sprintf("serverTLSBootstrap: true\ncontainerLogMaxSize: \"%d\"\ncontainerLogMaxFiles: %d\npodPidsLimit: %d\n", logMaxSize, logMaxFiles, maxPIDs)
	if err := os.WriteFile(config, []byte(fields), 0o644); err != nil {
		t.Fatal(err)
	}
	other := kit.Up(t, "e2e-o", "--kubelet-config", config, "--cluster-signing-duration", signingDuration.String(),
		"--agent-arg=--container-runtime-endpoint=unix:///run/none.sock")
	if other.Registry == first.Registry || other.Dir() == first.Dir() {
		t.Fatalf("both clusters have the registry %s and the directory %s", other.Registry, other.Dir())
	}
	if warning := string(other.Command(t, "logs", "agent-1")); !strings.Contains(warning, "container-runtime-endpoint") {
		t.Errorf("a flag without meaning is not warned about:\n%.2000s", warning)
	}
	e := other.New(t)
	approve(t, e)
	e.Create(
		e.Pod("worker", "busybox:1.37", kit.Forever, kit.On("node-1")),
		// The same name, node and perhaps address as in the first cluster.
		e.Pod("bystander", "app-a:1", nil, kit.On("node-1")),
	)
	e.WaitReady(60*time.Second, "worker", "bystander")

	// Both wait most of the time, so they wait together.
	t.Run("group", func(t *testing.T) {
		t.Run("certificates are renewed", func(t *testing.T) {
			t.Parallel()
			certificatesAreRenewed(t, e.In(t))
		})
		t.Run("logs are rotated", func(t *testing.T) {
			t.Parallel()
			logsAreRotated(t, e.In(t))
		})
	})

	t.Run("processes are limited", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("many", "busybox:1.37", []string{"sh", "-c",
			fmt.Sprintf("for i in $(seq %d); do sleep 1000 & done; echo all of them", 2*maxPIDs)}, kit.On("node-1"), kit.Never))
		_, end := terminated(t, e, "many", 60*time.Second)
		if logs := e.Logs("many", "main"); end.ExitCode == 0 || strings.Contains(logs, "all of them") || !strings.Contains(logs, "fork") {
			t.Errorf("%d processes in a Pod that may have %d: exit code %d, log %q", 2*maxPIDs, maxPIDs, end.ExitCode, logs)
		}
	})
	t.Run("side by side", func(t *testing.T) {
		share(t, victimName) // nobody has stopped its agent
		for _, cluster := range []*kit.Cluster{first.Cluster, other} {
			cluster.Command(t, "status") // fails when something is not healthy
		}
		if got := e.Exec("bystander", "main", "hostname"); got != "bystander\n" {
			t.Errorf("hostname %q", got)
		}
		if got := e.Logs("bystander", "main"); !strings.Contains(got, "app-a: ") {
			t.Errorf("the log of the other cluster's Pod: %q", got)
		}
		if got := first.In(t).Logs("bystander", "main"); got != "" {
			t.Errorf("the log of the first cluster's Pod, which is silent: %q", got)
		}
	})
	t.Run("down after a crash", func(t *testing.T) {
		// The supervisor and one agent die; Pods and their shims go on.
		killProcess(t, other, "supervise")
		other.Command(t, "kill-agent", "--node", "1")
		if found := traces(t, other); len(found) < 20 {
			t.Fatalf("only %d traces of a running cluster are found, the check below would prove nothing:\n%s", len(found), strings.Join(found, "\n"))
		}
		other.Down(t)
		if left := traces(t, other); len(left) > 0 {
			t.Errorf("%d traces are left:\n%s", len(left), strings.Join(left[:min(len(left), 40)], "\n"))
		}
	})
	if got := first.Exec("bystander", "main", "hostname"); got != "bystander\n" {
		t.Errorf("hostname %q in the first cluster", got)
	}
	for _, note := range record.Stop() {
		t.Errorf("the first cluster felt the second: %s", note)
	}
	after := first.Get("bystander")
	if was, is := kit.Status(bystander, "main"), kit.Status(after, "main"); was.ContainerID != is.ContainerID {
		t.Errorf("the first cluster's container is %s, before %s", is.ContainerID, was.ContainerID)
	}
}

// approve signs what a cluster does not sign by itself: serving certificates of
// nodes, for which an administrator has to vouch.
func approve(t *testing.T, e *kit.Env) {
	ctx, cancel := context.WithCancel(e.Ctx)
	requests := e.Client.CertificatesV1().CertificateSigningRequests()
	var wait sync.WaitGroup
	wait.Go(func() {
		for ctx.Err() == nil {
			list, err := requests.List(ctx, metav1.ListOptions{FieldSelector: "spec.signerName=" + certificatesv1.KubeletServingSignerName})
			if err == nil {
				for _, request := range list.Items {
					if len(request.Status.Conditions) > 0 {
						continue
					}
					request.Status.Conditions = append(request.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
						Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test", Message: "It is our node.",
					})
					if _, err := requests.UpdateApproval(ctx, request.Name, &request, metav1.UpdateOptions{}); err != nil && ctx.Err() == nil {
						t.Logf("approve %s: %v", request.Name, err)
					}
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(500 * time.Millisecond):
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		wait.Wait()
	})
}

// The node gets new certificates in time, uses them at once, and nobody notices.
func certificatesAreRenewed(t *testing.T, e *kit.Env) {
	record := e.Record("node-1", "worker")
	client := func() *x509.Certificate {
		t.Helper()
		raw, err := os.ReadFile(filepath.Join(e.NodeDir(1), "kubelet/pki/kubelet-client-current.pem"))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(raw)
		if block == nil {
			t.Fatal("the client certificate's file holds no PEM")
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return certificate
	}
	serving := func() (*x509.Certificate, error) { return servingCertificate(e) }

	// Before its first request is approved the node serves with one of its own.
	var firstServing *x509.Certificate
	e.Eventually(30*time.Second, "a serving certificate of the cluster's authority", func() (bool, string) {
		var err error
		firstServing, err = serving()
		return err == nil, fmt.Sprint(err)
	})
	firstClient := client()
	if life := time.Until(firstClient.NotAfter); life > signingDuration {
		t.Fatalf("the client certificate is valid for %s: the cluster does not sign as it was told", life)
	}
	for what, changed := range map[string]func() (bool, string){
		"another client certificate": func() (bool, string) {
			now := client()
			return now.SerialNumber.Cmp(firstClient.SerialNumber) != 0, now.NotAfter.String()
		},
		"another serving certificate": func() (bool, string) {
			now, err := serving()
			return err == nil && now.SerialNumber.Cmp(firstServing.SerialNumber) != 0, fmt.Sprint(err)
		},
	} {
		e.Eventually(signingDuration, what, changed)
	}
	// What is written now was authenticated by another certificate than the first.
	time.Sleep(time.Until(firstClient.NotAfter) + time.Second)
	expired := time.Now()
	e.Eventually(20*time.Second, "the node's Lease is renewed after the first certificate's end", func() (bool, string) {
		lease, err := e.Client.CoordinationV1().Leases("kube-node-lease").Get(e.Ctx, "node-1", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return lease.Spec.RenewTime.After(expired), lease.Spec.RenewTime.String()
	})
	e.Create(e.Pod("late", "busybox:1.37", kit.Forever, kit.On("node-1")))
	e.WaitReady(30*time.Second, "late")
	for _, pod := range []string{"worker", "late"} {
		if got := e.Exec(pod, "main", "hostname"); got != pod+"\n" {
			t.Errorf("kubectl exec in %s: %q", pod, got)
		}
	}
	for _, note := range record.Stop() {
		t.Errorf("the renewal was felt: %s", note)
	}
}

// servingCertificate connects to the node and checks who it is, as an API server
// with --kubelet-certificate-authority would.
func servingCertificate(e *kit.Env) (*x509.Certificate, error) {
	node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, "node-1", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	config, err := rest.TLSConfigFor(e.Config)
	if err != nil {
		return nil, err
	}
	dialer := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: config}
	for _, address := range node.Status.Addresses {
		if address.Type != corev1.NodeInternalIP {
			continue
		}
		connection, err := dialer.DialContext(e.Ctx, "tcp", net.JoinHostPort(address.Address, "10250"))
		if err != nil {
			return nil, err
		}
		defer connection.Close()
		return connection.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
	}
	return nil, fmt.Errorf("no InternalIP in %v", node.Status.Addresses)
}

// A container writes many times what a log file may hold: kubectl logs -f shows
// each line once and in order, and the files stay small and few.
func logsAreRotated(t *testing.T, e *kit.Env) {
	// 8 KB each tenth of a second, ten times what a file may hold.
	const lines, pause = 16000, 100
	e.Create(e.Pod("chatty", "busybox:1.37", []string{"sh", "-c", fmt.Sprintf(`
trap 'exit 0' TERM
echo ready; until [ -e /tmp/go ]; do sleep 0.1; done
i=0; while [ $i -lt %d ]; do
  i=$((i + 1)); echo "line $i of a log that is longer than its file may become, by a good deal"
  [ $((i %% %d)) != 0 ] || sleep 0.1
done
echo done; while :; do sleep 3600 & wait; done`, lines, pause)}, kit.On("node-1")))
	e.WaitReady(60*time.Second, "chatty")
	ctx, cancel := context.WithTimeout(e.Ctx, 3*time.Minute)
	defer cancel()
	// Collectors find a container's log by this name.
	links, err := filepath.Glob(filepath.Join(e.NodeDir(1), "log/containers", "chatty_"+e.Namespace+"_main-*.log"))
	if err != nil || len(links) != 1 {
		t.Fatalf("links to the log: %v %v", links, err)
	}
	follow := e.KubectlCommand(ctx, "logs", "-f", "-n", e.Namespace, "chatty")
	var followed lockedBuffer
	follow.Stdout = &followed
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	e.Eventually(30*time.Second, "the first line", func() (bool, string) { return followed.String() == "ready\n", followed.String() })
	e.Exec("chatty", "main", "touch", "/tmp/go")
	pattern := filepath.Join(e.NodeDir(1), "log/pods", e.Namespace+"_chatty_*", "main", "*")
	rotated := map[string]bool{}
	e.Eventually(2*time.Minute, "the last line", func() (bool, string) {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			// One that is being compressed has its result beside it for a moment.
			info, err := os.Stat(file)
			if err == nil && info.Size() > 2*logMaxSize {
				t.Errorf("%s has %d bytes, a file may have %d", filepath.Base(file), info.Size(), logMaxSize)
			}
			if name := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(file), ".gz"), ".tmp"); name != "0.log" {
				rotated[name] = true
			}
		}
		shown := followed.String()
		return strings.HasSuffix(shown, "done\n"), fmt.Sprintf("%d bytes, at the end %q", len(shown), shown[max(0, len(shown)-100):])
	})
	if len(rotated) < 5 {
		t.Errorf("the log was rotated %d times only: nothing is proved", len(rotated))
	}
	e.Eventually(20*time.Second, "no more files than configured", func() (bool, string) {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		total := int64(0)
		for _, file := range files {
			if info, err := os.Stat(file); err == nil {
				total += info.Size()
			}
		}
		return len(files) <= logMaxFiles && total <= logMaxFiles*logMaxSize*5/4, fmt.Sprintf("%d bytes in %v", total, files)
	})
	got := strings.Split(strings.TrimSuffix(strings.TrimPrefix(followed.String(), "ready\n"), "\n"), "\n")
	for i, line := range got {
		want := fmt.Sprintf("line %d of a log that is longer than its file may become, by a good deal", i+1)
		if i == lines {
			want = "done"
		}
		if line != want {
			t.Fatalf("line %d of kubectl logs -f is %q, want %q", i+1, line, want)
		}
	}
	if len(got) != lines+1 {
		t.Errorf("kubectl logs -f showed %d lines, want %d", len(got), lines+1)
	}
	// In the CRI's format: time, stream, whole line or part of one.
	raw, err := os.ReadFile(links[0])
	if err != nil {
		t.Fatal(err)
	}
	last := strings.Split(strings.TrimSuffix(string(raw), "\n"), "\n")
	fields := strings.SplitN(last[len(last)-1], " ", 4)
	if at, err := time.Parse(time.RFC3339Nano, fields[0]); err != nil || len(fields) != 4 || fields[1] != "stdout" || fields[2] != "F" || fields[3] != "done" || time.Since(at) > 3*time.Minute {
		t.Errorf("the last line on disk is %q", last[len(last)-1])
	}
	if tail := e.Logs("chatty", "main", "--tail=2"); !strings.HasSuffix(tail, "\ndone\n") || !strings.HasPrefix(tail, fmt.Sprintf("line %d ", lines)) {
		t.Errorf("--tail=2 of a rotated log: %q", tail)
	}
	e.Delete("chatty")
	if err := follow.Wait(); err != nil {
		t.Errorf("kubectl logs -f: %v", err)
	}
	e.WaitGone("chatty", 30*time.Second)
	e.Eventually(10*time.Second, "the Pod's logs and the link are gone", func() (bool, string) {
		files, err := filepath.Glob(filepath.Dir(filepath.Dir(pattern)))
		_, linked := os.Lstat(links[0])
		return err == nil && len(files) == 0 && os.IsNotExist(linked), fmt.Sprint(files, err, linked)
	})
}

// processes are those whose command line or cgroup names the cluster.
func processes(t *testing.T, c *kit.Cluster) map[int]string {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]string{}
	for _, entry := range entries {
		var pid int
		if _, err := fmt.Sscan(filepath.Base(entry), &pid); err != nil || pid == os.Getpid() {
			continue
		}
		command, err := os.ReadFile(entry + "/cmdline")
		if err != nil {
			continue // it has ended
		}
		if len(command) == 0 {
			continue // a kernel thread, or ended and not yet waited for by the machine's init
		}
		line := strings.ReplaceAll(string(command), "\x00", " ")
		cgroup, _ := os.ReadFile(entry + "/cgroup")
		if strings.Contains(line, c.Dir()+"/") || strings.Contains(string(cgroup), "/gantry-"+c.Name+"-") {
			found[pid] = line
		}
	}
	return found
}

// killProcess kills the cluster's process that has a word in its command line.
func killProcess(t *testing.T, c *kit.Cluster, word string) {
	t.Helper()
	for pid, line := range processes(t, c) {
		if strings.Contains(line, " "+word+" ") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatalf("kill %d (%s): %v", pid, line, err)
			}
			return
		}
	}
	t.Fatalf("no process of cluster %s has %q in its command line", c.Name, word)
}

// traces are what of a cluster is on this machine, found without its own help:
// processes, mounts, cgroups, network interfaces and files.
func traces(t *testing.T, c *kit.Cluster) []string {
	t.Helper()
	var found []string
	for pid, line := range processes(t, c) {
		found = append(found, fmt.Sprintf("process %d %s", pid, line))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(mounts), "\n") {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], c.Dir()+"/") {
			found = append(found, "mount "+fields[4])
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/gantry-" + c.Name + "-*", "/sys/fs/cgroup/*/gantry-" + c.Name + "-*", c.Dir()} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, paths...)
	}
	interfaces, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	registry, _, err := net.SplitHostPort(c.Registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range interfaces {
		if network, ok := address.(*net.IPNet); ok && network.Contains(net.ParseIP(registry)) {
			found = append(found, "address "+address.String())
		}
	}
	return found
}

// Two clusters that are made at the same moment choose different networks, and
// each is whole.
func TestClustersMadeAtOnce(t *testing.T) {
	t.Parallel()
	var made sync.WaitGroup
	var lock sync.Mutex
	seen := map[string]string{}
	t.Run("group", func(t *testing.T) {
		for _, prefix := range []string{"e2e-p", "e2e-q"} {
			made.Add(1)
			t.Run(prefix, func(t *testing.T) {
				t.Parallel()
				arrived := sync.OnceFunc(made.Done)
				t.Cleanup(arrived) // the other one does not wait for ever
				c := kit.Up(t, prefix, "--nodes", "0")
				arrived()
				made.Wait()
				c.Command(t, "status")
				namespace, err := c.Client.CoreV1().Namespaces().Get(t.Context(), "kube-system", metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				lock.Lock()
				defer lock.Unlock()
				for _, mark := range []string{c.Registry, c.Dir(), c.Config.Host, string(namespace.UID)} {
					if seen[mark] != "" {
						t.Errorf("%s belongs to %s as well", mark, seen[mark])
					}
					seen[mark] = c.Name
				}
			})
		}
	})
	if len(seen) != 8 {
		t.Errorf("two clusters should have 8 marks of their own: %v", seen)
	}
}
