package main

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"log"
	"net/http"
	"slices"
	"strings"
)

type user struct {
	name   string
	groups []string
}

// byCertificate is who showed a certificate of the client authority.
func (s *Server) byCertificate(r *http.Request) (*user, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil, nil
	}
	leaf := r.TLS.PeerCertificates[0]
	roots := x509.NewCertPool()
	roots.AddCert(s.clientCA.cert)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, err
	}
	return &user{leaf.Subject.CommonName, leaf.Subject.Organization}, nil
}

// authenticate is the union of k3s' authenticators: certificates, then passwords.
func (s *Server) authenticate(r *http.Request) (*user, error) {
	byCertificate, failure := s.byCertificate(r)
	if byCertificate != nil {
		return byCertificate, nil
	}
	if name, password, ok := r.BasicAuth(); ok {
		if name != "node" || subtle.ConstantTimeCompare([]byte(password), []byte(s.password)) != 1 {
			return nil, errors.New("invalid username/password combination")
		}
		// As in the union: a certificate that is no good is no obstacle to a password.
		return &user{"node", []string{"k3s:agent"}}, nil
	}
	return nil, failure
}

// withRole is auth.HasRole: 401 for credentials that are wrong, 403 for none or
// the wrong ones.
func (s *Server) withRole(next func(http.ResponseWriter, *http.Request), roles ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		found, err := s.authenticate(r)
		if err != nil {
			log.Printf("%s %s: %v", r.Method, r.URL.Path, err)
			sendError(w, http.StatusUnauthorized, errors.New("not authorized"))
			return
		}
		if found == nil || !slices.ContainsFunc(found.groups, func(group string) bool { return slices.Contains(roles, group) }) {
			sendError(w, http.StatusForbidden, errors.New("forbidden"))
			return
		}
		next(w, r)
	}
}

// node is nodepassword.GetNodeAuthValidator: whose certificate it may be.
func (s *Server) node(r *http.Request) (string, int, error) {
	name, password := strings.ToLower(r.Header.Get("k3s-Node-Name")), r.Header.Get("k3s-Node-Password")
	if name == "" {
		return "", http.StatusBadRequest, errors.New("node name not set")
	}
	if password == "" {
		return "", http.StatusBadRequest, errors.New("node password not set")
	}
	asker, err := s.authenticate(r)
	if err != nil {
		return "", http.StatusUnauthorized, err
	}
	if identity, ok := strings.CutPrefix(asker.name, "system:node:"); ok {
		if identity != name {
			return "", http.StatusBadRequest, errors.New("header node name does not match auth node name")
		}
		if err := s.api.do(http.MethodGet, "/api/v1/nodes/"+name, nil, nil); err != nil {
			return "", http.StatusUnauthorized, errors.New("unable to verify node identity: " + err.Error())
		}
	}
	if err := s.ensurePassword(name, password); err != nil {
		if errors.Is(err, errWrongPassword) {
			return "", http.StatusForbidden, err
		}
		return "", http.StatusServiceUnavailable, err
	}
	return name, http.StatusOK, nil
}

var errWrongPassword = errors.New("unable to verify hash for node: hash does not match")

type secret struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   map[string]string `json:"metadata"`
	StringData map[string]string `json:"stringData,omitempty"`
	Data       map[string][]byte `json:"data,omitempty"`
	Immutable  bool              `json:"immutable"`
}

// ensurePassword is nodepassword.Ensure: the first password of a name counts.
func (s *Server) ensurePassword(node, password string) error {
	const secrets = "/api/v1/namespaces/kube-system/secrets"
	name := node + ".node-password.k3s"
	var found struct {
		Data map[string][]byte `json:"data"`
	}
	err := s.api.do(http.MethodGet, secrets+"/"+name, nil, &found)
	if errors.Is(err, errNotFound) {
		salt := make([]byte, 8)
		if _, err := rand.Read(salt); err != nil {
			return err
		}
		return s.api.do(http.MethodPost, secrets, secret{
			APIVersion: "v1", Kind: "Secret", Metadata: map[string]string{"name": name},
			StringData: map[string]string{"hash": hash(hex.EncodeToString(salt), password)}, Immutable: true,
		}, nil)
	} else if err != nil {
		return err
	}
	kept := string(found.Data["hash"])
	salt, _, _ := strings.Cut(kept, ":")
	if subtle.ConstantTimeCompare([]byte(kept), []byte(hash(salt, password))) != 1 {
		return errWrongPassword
	}
	return nil
}

func hash(salt, password string) string {
	sum := sha256.Sum256([]byte(salt + password))
	return salt + ":" + hex.EncodeToString(sum[:])
}
