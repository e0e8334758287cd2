package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

type authority struct {
	pem  []byte
	cert *x509.Certificate
	key  crypto.Signer
}

func loadAuthority(base string) (*authority, error) {
	certificate, err := os.ReadFile(base + ".crt")
	if err != nil {
		return nil, err
	}
	key, err := os.ReadFile(base + ".key")
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(certificate)
	keyBlock, _ := pem.Decode(key)
	if block == nil || keyBlock == nil {
		return nil, fmt.Errorf("%s: no PEM", base)
	}
	a := &authority{pem: certificate}
	if a.cert, err = x509.ParseCertificate(block.Bytes); err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, err
	}
	a.key = parsed.(crypto.Signer)
	return a, nil
}

// sign is certutil.NewSignedCert of dynamiclistener, which dates back to the
// birth of the authority.
func (a *authority) sign(template *x509.Certificate, key crypto.PublicKey, duration time.Duration) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = a.cert.NotBefore, time.Now().Add(duration)
	template.KeyUsage = x509.KeyUsageKeyEncipherment | x509.KeyUsageDigitalSignature
	return x509.CreateCertificate(rand.Reader, template, a.cert, key, a.key)
}

func (a *authority) selfIssue(host string) (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	certificate, err := a.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "k3s", Organization: []string{"k3s"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"},
		IPAddresses: []net.IP{net.ParseIP(host), net.IPv4(127, 0, 0, 1)},
	}, key.Public(), 365*24*time.Hour)
	return key, certificate, err
}

// servingKubelet is handlers.ServingKubeletCert.
func (s *Server) servingKubelet(w http.ResponseWriter, r *http.Request) {
	name, code, err := s.node(r)
	if err != nil {
		sendError(w, code, err)
		return
	}
	ips := []net.IP{net.IPv4(127, 0, 0, 1)}
	if list := r.Header.Get("k3s-Node-IP"); list != "" {
		for _, text := range strings.Split(list, ",") {
			ip := net.ParseIP(text)
			if ip == nil {
				sendError(w, http.StatusInternalServerError, fmt.Errorf("invalid node IP address %s", text))
				return
			}
			ips = append(ips, ip)
		}
	}
	s.signAndSend(w, r, s.serverCA, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{name, "localhost"}, IPAddresses: ips,
	})
}

// clientKubelet is handlers.ClientKubeletCert.
func (s *Server) clientKubelet(w http.ResponseWriter, r *http.Request) {
	name, code, err := s.node(r)
	if err != nil {
		sendError(w, code, err)
		return
	}
	s.signAndSend(w, r, s.clientCA, &x509.Certificate{
		Subject:     pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// signAndSend answers a request (DER) with certificates; without one, as to
// agents of old, with a key too.
func (s *Server) signAndSend(w http.ResponseWriter, r *http.Request, ca *authority, template *x509.Certificate) {
	public, keyPEM, err := requestedKey(r)
	if err != nil {
		sendError(w, http.StatusInternalServerError, err)
		return
	}
	certificate, err := ca.sign(template, public, s.duration)
	if err != nil {
		sendError(w, http.StatusInternalServerError, err)
		return
	}
	pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	w.Write(ca.pem)
	w.Write(keyPEM)
}

func requestedKey(r *http.Request) (crypto.PublicKey, []byte, error) {
	if r.Method == http.MethodPost {
		raw, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return nil, nil, err
		}
		if request, err := x509.ParseCertificateRequest(raw); err == nil {
			// k3s does not look at it; here a damaged one is to be noticed.
			if err := request.CheckSignature(); err != nil || len(request.Subject.Names) > 0 {
				return nil, nil, errors.Join(errors.New("the request is not signed by its key, or has a subject"), err)
			}
			return request.PublicKey, nil, nil
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key.Public(), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}
