package firstlight

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"gantry.local/e2e/internal/kit"
	"gantry.local/e2e/internal/pki"
)

// What goes wrong when a machine joins: `gantry doctor` names it, and the mend.
func TestMistakes(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	expired := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-0ld0ld", Namespace: "kube-system"},
		Type:       corev1.SecretTypeBootstrapToken,
		StringData: map[string]string{
			"token-id": "0ld0ld", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true",
			"expiration": time.Now().Add(-time.Hour).UTC().Format(time.RFC3339),
		},
	}
	// The token cleaner may be faster: to a node that is the same.
	if _, err := e.Client.CoreV1().Secrets("kube-system").Create(e.Ctx, expired, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = e.Client.CoreV1().Secrets("kube-system").Delete(e.Ctx, expired.Name, metav1.DeleteOptions{})
	})

	other, err := pki.NewAuthority(t.TempDir(), "ca", "another cluster")
	if err != nil {
		t.Fatal(err)
	}
	otherCA, err := os.ReadFile(other.CertificateFile())
	if err != nil {
		t.Fatal(err)
	}
	// An API server from whose hour ours is far away.
	wrong := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(2*time.Hour).UTC().Format(http.TimeFormat))
		fmt.Fprint(w, `{"major": "1", "minor": "37", "gitVersion": "v1.37.2"}`)
	}))
	file, key, err := other.Issue("server", pki.Subject{CommonName: "kube-apiserver", Server: true, Addresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.LoadX509KeyPair(file, key)
	if err != nil {
		t.Fatal(err)
	}
	wrong.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	wrong.StartTLS()
	t.Cleanup(wrong.Close)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	port := taken.Addr().(*net.TCPAddr).Port

	for _, c := range []struct {
		name, server string
		authority    []byte
		args         []string
		wants        []string
	}{
		{"expired token", e.Config.Host, e.Config.CAData, nil, []string{"FATAL API server", "does not know the bootstrap token: it has expired or is wrong", "-> make a new bootstrap token (kubeadm token create)"}},
		{"wrong CA", e.Config.Host, otherCA, nil, []string{"FATAL API server", "its certificate is not signed by the authority in the kubeconfig", "-> the CA is that of another cluster: copy /etc/kubernetes/pki/ca.crt from a control plane node"}},
		{"wrong clock", wrong.URL, otherCA, nil, []string{"FATAL clock", "s behind the API server's: certificates and tokens will not be accepted", "-> synchronize both: timedatectl set-ntp true"}},
		{"clash of ports", e.Config.Host, e.Config.CAData, []string{"--address=127.0.0.1", fmt.Sprintf("--port=%d", port)}, []string{"FATAL port", fmt.Sprintf("%d is in use by process %d", port, os.Getpid()), "-> "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			config := clientcmdapi.NewConfig()
			config.Clusters["c"] = &clientcmdapi.Cluster{Server: c.server, CertificateAuthorityData: c.authority}
			config.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: "0ld0ld.0123456789abcdef"}
			config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
			config.CurrentContext = "x"
			bootstrap := filepath.Join(dir, "bootstrap.conf")
			if err := clientcmd.WriteToFile(*config, bootstrap); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"doctor", "--bootstrap-kubeconfig=" + bootstrap, "--kubeconfig=" + filepath.Join(dir, "kubelet.conf"),
				"--root-dir=" + filepath.Join(dir, "root"), "--cert-dir=" + filepath.Join(dir, "pki")}, c.args...)
			out, errOut, err := e.GantryIn(e.Ctx, filepath.Join(dir, "run"), args...)
			if err == nil {
				t.Errorf("gantry doctor finds nothing fatal")
			}
			seen := strings.Join(strings.Fields(out), " ")
			for _, want := range c.wants {
				if !strings.Contains(seen, want) {
					t.Errorf("gantry doctor does not say %q:\n%s%s", want, out, errOut)
				}
			}
		})
	}

	quiet, err := strconv.Atoi(strings.TrimPrefix(quietNode(e), "node-"))
	if err != nil {
		t.Fatal(err)
	}
	// Not by the agent whose node is looked at, and not told as if it were.
	t.Run("clash of ports beside an agent", func(t *testing.T) {
		out, errOut, err := e.Gantry(e.Ctx, quiet, "doctor", "--address=127.0.0.1", fmt.Sprintf("--port=%d", port))
		if err == nil {
			t.Errorf("gantry doctor finds nothing fatal")
		}
		seen := strings.Join(strings.Fields(out), " ")
		for _, want := range []string{
			fmt.Sprintf("FATAL port 127.0.0.1:%d is in use by process %d (firstlight.test), not by the agent that runs here", port, os.Getpid()),
			"-> stop it (a kubelet: systemctl disable --now kubelet), or give this node another --port",
		} {
			if !strings.Contains(seen, want) {
				t.Errorf("gantry doctor does not say %q:\n%s%s", want, out, errOut)
			}
		}
	})
	t.Run("the agent's own port", func(t *testing.T) {
		program, err := e.Program()
		if err != nil {
			t.Fatal(err)
		}
		dir := e.NodeDir(quiet)
		// whether the node is fit otherwise is not asked
		out, errOut, _ := e.NodeExec(e.Ctx, quiet, program, "doctor", "--config="+filepath.Join(dir, "config.yaml"), "--state-dir="+filepath.Join(dir, "run"))
		seen := strings.Join(strings.Fields(out), " ")
		if want := "ok port 0.0.0.0:10250 is served by the agent that runs here, process "; !strings.Contains(seen, want) {
			t.Errorf("gantry doctor does not say %q:\n%s%s", want, out, errOut)
		}
	})
}
