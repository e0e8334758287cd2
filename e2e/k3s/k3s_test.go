// Package k3s shows a node that joins a k3s server by its own protocol: here a
// stand-in (e2e/k3s-server) that speaks it as k3s' source does, with the library
// that k3s uses for its tunnel. The API server reaches the node through the
// tunnel alone, and believes no certificate but the stand-in's.
//
//	go test ./k3s        with a cluster of its own
package k3s

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// Certificates live so long. They are renewed when 70 to 90 percent are over.
const certificateDuration = 45 * time.Second

func TestMain(m *testing.M) {
	if err := kit.BuildToolsNow("k3s-server"); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	kit.Main(m, "--k3s", "--k3s-certificate-duration="+certificateDuration.String(), "--node-monitor-grace-period=30s")
}

func TestK3s(t *testing.T) {
	e := kit.New(t)
	e.Create(e.Pod("worker", "busybox:1.37", []string{"sh", "-c", "echo hello from k3s; exec sleep 1000000"}, kit.On("node-1")))
	e.WaitReady(time.Minute, "worker")

	t.Run("what the server tells is used", func(t *testing.T) {
		e := e.In(t)
		if resolv := e.Exec("worker", "main", "cat", "/etc/resolv.conf"); !strings.Contains(resolv, "nameserver 10.96.0.10\n") ||
			!strings.Contains(resolv, e.Namespace+".svc.k3s.local") {
			t.Errorf("resolv.conf does not have the cluster's DNS:\n%s", resolv)
		}
		password, err := os.ReadFile(filepath.Join(e.NodeDir(1), "node-password"))
		if err != nil || !regexp.MustCompile(`^[0-9a-f]{32}\n$`).Match(password) {
			t.Errorf("node password: %v", err)
		}
		if info, err := os.Stat(filepath.Join(e.NodeDir(1), "node-password")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("node password: %v %v", info.Mode(), err)
		}
		if _, err := e.Client.CoreV1().Secrets("kube-system").Get(e.Ctx, "node-1.node-password.k3s", metav1.GetOptions{}); err != nil {
			t.Errorf("the server knows no password of the node: %v", err)
		}
		log := string(e.Command(t, "logs", "agent-1"))
		token, err := os.ReadFile(filepath.Join(e.Dir(), "k3s-password"))
		if err != nil || strings.Contains(log, string(token)) || strings.Contains(log, strings.TrimSpace(string(password))) {
			t.Error("a secret is in the agent's log")
		}
	})
	t.Run("logs and exec come through the tunnel", func(t *testing.T) {
		e := e.In(t)
		if logs := e.Logs("worker", "main"); logs != "hello from k3s\n" {
			t.Errorf("logs: %q", logs)
		}
		through := strings.Count(string(e.Command(t, "logs", "k3s-server")), "tunnel: node-1 for ")
		if out := e.Exec("worker", "main", "echo", "executed"); out != "executed\n" {
			t.Errorf("exec: %q", out)
		}
		if after := strings.Count(string(e.Command(t, "logs", "k3s-server")), "tunnel: node-1 for "); after == 0 || after < through {
			t.Errorf("%d connections through the tunnel, %d before", after, through)
		}
		// More than what is buffered before a pause, both ways.
		const size = 12 << 20
		cmd := e.KubectlCommand(e.Ctx, "exec", "-i", "-n", e.Namespace, "worker", "--", "sh", "-c", "tee /tmp/much | wc -c; cat /tmp/much")
		cmd.Stdin = strings.NewReader(strings.Repeat("0123456789abcde\n", size/16))
		out, err := cmd.Output()
		if err != nil || len(out) < size || !strings.Contains(string(out), fmt.Sprintf("%d\n", size)) {
			t.Errorf("%d bytes came back of %d: %v", len(out), size, err)
		}
	})
	t.Run("the server is killed and comes back", func(t *testing.T) {
		e := e.In(t)
		e.Command(t, "kill-k3s")
		if out, errOut, err := e.Kubectl(e.Ctx, "logs", "-n", e.Namespace, "worker"); err == nil {
			t.Errorf("logs without a tunnel: %s%s", out, errOut)
		}
		// The agent comes back without a server too, with what it knows.
		e.Command(t, "kill-agent")
		e.Command(t, "start-agent")
		e.Command(t, "start-k3s")
		e.Eventually(30*time.Second, "logs through the new tunnel", func() (bool, string) {
			out, errOut, err := e.Kubectl(e.Ctx, "logs", "-n", e.Namespace, "worker")
			return err == nil && out == "hello from k3s\n", fmt.Sprint(out, errOut, err)
		})
		if out := e.Exec("worker", "main", "echo", "again"); out != "again\n" {
			t.Errorf("exec: %q", out)
		}
	})
	t.Run("certificates are renewed", func(t *testing.T) {
		e := e.In(t)
		was := map[string]string{}
		for _, name := range []string{"client", "server"} {
			was[name] = serial(t, e, name)
		}
		e.Eventually(certificateDuration+10*time.Second, "other certificates", func() (bool, string) {
			client, server := serial(t, e, "client"), serial(t, e, "server")
			return client != was["client"] && server != was["server"], client + " " + server
		})
		if out := e.Exec("worker", "main", "echo", "renewed"); out != "renewed\n" {
			t.Errorf("exec: %q", out)
		}
	})
	t.Run("another machine with the name is refused", func(t *testing.T) {
		e := e.In(t)
		e.Command(t, "kill-agent")
		file := filepath.Join(e.NodeDir(1), "node-password")
		password, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("0123456789abcdef0123456789abcdef\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// Without certificates it has to ask.
		pki := filepath.Join(e.NodeDir(1), "kubelet/pki")
		if err := os.Rename(pki, pki+".kept"); err != nil {
			t.Fatal(err)
		}
		e.Command(t, "start-agent")
		e.Eventually(20*time.Second, "a refusal that names the remedy", func() (bool, string) {
			log := string(e.Command(t, "logs", "agent-1"))
			return strings.Contains(log, "node-1.node-password.k3s") && strings.Contains(log, "--hostname-override"), log[max(0, len(log)-2000):]
		})
		if err := os.WriteFile(file, password, 0o600); err != nil {
			t.Fatal(err)
		}
		e.Eventually(40*time.Second, "logs, once the password is right", func() (bool, string) {
			out, errOut, err := e.Kubectl(e.Ctx, "logs", "-n", e.Namespace, "worker")
			return err == nil && out == "hello from k3s\n", fmt.Sprint(out, errOut, err)
		})
	})
}

// serial is that of one of the node's certificates.
func serial(t *testing.T, e *kit.Env, name string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(e.NodeDir(1), "kubelet/pki/kubelet-"+name+"-current.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		t.Fatalf("%s: no PEM", name)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return certificate.SerialNumber.String()
}
