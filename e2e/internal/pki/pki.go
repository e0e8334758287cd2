// Package pki makes the certificates, keys and kubeconfigs of a test cluster,
// with the names, groups and key usages that kubeadm gives them.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const validity = 10 * 365 * 24 * time.Hour

// Authority is a certificate authority whose files lie in a directory.
type Authority struct {
	dir, name string
	cert      *x509.Certificate
	key       crypto.Signer
}

// NewAuthority makes dir/NAME.crt and dir/NAME.key.
func NewAuthority(dir, name, commonName string) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := newTemplate(pkix.Name{CommonName: commonName})
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	a := &Authority{dir: dir, name: name, cert: cert, key: key}
	return a, a.write(name, der, key)
}

// CertificateFile is the path of the authority's own certificate.
func (a *Authority) CertificateFile() string { return filepath.Join(a.dir, a.name+".crt") }

// KeyFile is the path of the authority's private key.
func (a *Authority) KeyFile() string { return filepath.Join(a.dir, a.name+".key") }

// Subject is who a certificate is for and what it may be used for.
type Subject struct {
	CommonName    string
	Organizations []string
	// Server adds the server usage and these names; without it the certificate is a client's.
	Server    bool
	DNSNames  []string
	Addresses []net.IP
}

// Issue makes dir/NAME.crt and dir/NAME.key and returns both paths.
func (a *Authority) Issue(name string, subject Subject) (certFile, keyFile string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template, err := newTemplate(pkix.Name{CommonName: subject.CommonName, Organization: subject.Organizations})
	if err != nil {
		return "", "", err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if subject.Server {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		template.DNSNames, template.IPAddresses = subject.DNSNames, subject.Addresses
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return "", "", fmt.Errorf("certificate %s: %w", name, err)
	}
	base := filepath.Join(a.dir, name)
	return base + ".crt", base + ".key", a.write(name, der, key)
}

func (a *Authority) write(name string, der []byte, key crypto.Signer) error {
	if err := writePEM(filepath.Join(a.dir, name+".crt"), "CERTIFICATE", der, 0o644); err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(filepath.Join(a.dir, name+".key"), "PRIVATE KEY", pkcs8, 0o600)
}

// ServiceAccountKeys makes dir/sa.key and dir/sa.pub.
func ServiceAccountKeys(dir string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.key"), "PRIVATE KEY", private, 0o600); err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", public, 0o644)
}

// User is how a kubeconfig proves who its holder is: a certificate or a token.
type User struct {
	CertFile, KeyFile string
	Token             string
}

// Kubeconfig writes a kubeconfig with everything embedded.
func (a *Authority) Kubeconfig(file, server, cluster, userName string, user User) error {
	config := clientcmdapi.NewConfig()
	ca, err := os.ReadFile(a.CertificateFile())
	if err != nil {
		return err
	}
	config.Clusters[cluster] = &clientcmdapi.Cluster{Server: server, CertificateAuthorityData: ca}
	info := &clientcmdapi.AuthInfo{Token: user.Token}
	if user.CertFile != "" {
		if info.ClientCertificateData, err = os.ReadFile(user.CertFile); err != nil {
			return err
		}
		if info.ClientKeyData, err = os.ReadFile(user.KeyFile); err != nil {
			return err
		}
	}
	config.AuthInfos[userName] = info
	name := userName + "@" + cluster
	config.Contexts[name] = &clientcmdapi.Context{Cluster: cluster, AuthInfo: userName}
	config.CurrentContext = name
	return clientcmd.WriteToFile(*config, file)
}

func newTemplate(subject pkix.Name) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	// An hour back: a node whose clock is a little behind must not refuse it.
	start := time.Now().Add(-time.Hour)
	return &x509.Certificate{SerialNumber: serial, Subject: subject, NotBefore: start, NotAfter: start.Add(validity)}, nil
}

func writePEM(file, kind string, der []byte, mode os.FileMode) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}
