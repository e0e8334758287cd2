package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"gantry.local/e2e/internal/pki"
	"gantry.local/e2e/internal/proc"
)

// A cluster may have a stand-in for a k3s server (e2e/k3s-server) in front of
// its API server. Its nodes join by k3s' protocol, and the API server reaches
// them through its tunnel alone, as k3s' does.

const (
	k3sProcess = "k3s-server"
	k3sDomain  = "k3s.local"
)

func (c *Cluster) k3sAddress() string {
	return fmt.Sprintf("%s:%d", c.address(hostControlPlane).IP, k3sPort)
}

func (c *Cluster) k3sURL() string { return "https://" + c.k3sAddress() }

// makeK3s writes what the stand-in, the API server and the nodes need of each
// other: an authority of servers apart from that of clients, a token, and the
// API server's way to nodes.
func (c *Cluster) makeK3s(clients *pki.Authority) error {
	ca, err := pki.NewAuthority(c.path("pki"), "k3s-server-ca", "k3s-server-ca")
	if err != nil {
		return err
	}
	if _, _, err := clients.Issue("k3s-client-kube-apiserver", pki.Subject{CommonName: "system:apiserver", Organizations: []string{"system:masters"}}); err != nil {
		return err
	}
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		return err
	}
	password := hex.EncodeToString(random)
	raw, err := os.ReadFile(ca.CertificateFile())
	if err != nil {
		return err
	}
	// FormatToken of k3s: the hash of a file with one certificate is the file's.
	sum := sha256.Sum256(raw)
	token := fmt.Sprintf("K10%s::server:%s\n", hex.EncodeToString(sum[:]), password)
	// As genEgressSelectorConfig of k3s in its default mode "agent".
	egress := fmt.Sprintf(`apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
  - name: cluster
    connection:
      proxyProtocol: HTTPConnect
      transport:
        tcp:
          url: %s
          tlsConfig: {caBundle: %s, clientCert: %s, clientKey: %s}
`, c.k3sURL(), c.pkiPath("k3s-server-ca.crt"), c.pkiPath("k3s-client-kube-apiserver.crt"), c.pkiPath("k3s-client-kube-apiserver.key"))
	for name, content := range map[string]string{"k3s-password": password, "k3s-token": token, "egress.yaml": egress} {
		if err := os.WriteFile(c.path(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// k3sAPIServerArgs make the API server trust and reach nodes as k3s' does.
func (c *Cluster) k3sAPIServerArgs() []string {
	return []string{
		"--egress-selector-config-file=" + c.path("egress.yaml"),
		"--kubelet-certificate-authority=" + c.pkiPath("k3s-server-ca.crt"),
	}
}

func (c *Cluster) k3sAgentArgs(n Node) []string {
	return []string{
		"--k3s-server=" + c.k3sURL(),
		"--k3s-token-file=" + c.path("k3s-token"),
		"--k3s-node-password-file=" + filepath.Join(c.nodeDir(n), "node-password"),
	}
}

// leaveToK3s takes out of a KubeletConfiguration what a k3s server tells.
func leaveToK3s(config map[string]any) {
	delete(config, "clusterDNS")
	delete(config, "clusterDomain")
	if authentication, ok := config["authentication"].(map[string]any); ok {
		delete(authentication, "x509")
	}
}

// k3sClient believes the stand-in.
func (c *Cluster) k3sClient() (*http.Client, error) {
	raw, err := os.ReadFile(c.pkiPath("k3s-server-ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(raw)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}, nil
}

// StartK3s starts the stand-in and waits until it answers.
func (c *Cluster) StartK3s(ctx context.Context) error {
	if !c.K3s {
		return errors.New("this cluster was made without --k3s")
	}
	if c.Processes[k3sProcess].Alive() {
		return nil
	}
	if err := c.startProcess(k3sProcess, proc.Spec{
		Args: []string{
			filepath.Join(c.Home.Bin, k3sProcess),
			"--listen=" + c.k3sAddress(), "--api-server=" + c.ServerURL(), "--pki=" + c.path("pki"),
			"--password-file=" + c.path("k3s-password"), "--cluster-dns=" + ServiceDNS, "--cluster-domain=" + k3sDomain,
			"--certificate-duration=" + c.K3sCertificateDuration.String(),
		},
		Env:              []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.Dir},
		NetworkNamespace: c.namespaceFile("control-plane"),
	}); err != nil {
		return err
	}
	client, err := c.k3sClient()
	if err != nil {
		return err
	}
	return c.poll(ctx, k3sProcess, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.k3sURL()+"/ping", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New("/ping: " + response.Status)
		}
		return nil
	})
}

// KillK3s kills the stand-in.
func (c *Cluster) KillK3s() error {
	id := c.Processes[k3sProcess]
	if !id.Alive() {
		return errors.New("the stand-in for a k3s server does not run")
	}
	return id.Kill()
}
