// Command k3s-server stands in for a k3s server in front of a test cluster's
// kube-apiserver: the endpoints that k3s' agents use, with the statuses and
// formats of its source, and the tunnel with the library that k3s uses. What is
// not the supervisor's goes to the API server, as in k3s, where both share a port.
//
// It is a module of its own so that what the library requires does not decide
// what Kubernetes is built from.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rancher/remotedialer"
)

// Server is one k3s server.
type Server struct {
	address     string
	password    string
	clientCA    *authority
	serverCA    *authority
	duration    time.Duration
	config      map[string]any
	api         *apiClient
	tunnel      *remotedialer.Server
	proxy       http.Handler
	asNode      http.RoundTripper
	asStranger  http.RoundTripper
	apiServerOf *url.URL
}

func main() {
	log.SetFlags(log.LstdFlags | log.Lmicroseconds | log.LUTC)
	listen := flag.String("listen", "", "address and port of supervisor and API server")
	apiServer := flag.String("api-server", "", "URL of the real API server")
	pki := flag.String("pki", "", "directory of the cluster's certificates and keys")
	password := flag.String("password-file", "", "file with the password of agents")
	dns := flag.String("cluster-dns", "", "address of the cluster's DNS")
	domain := flag.String("cluster-domain", "", "DNS domain of the cluster")
	duration := flag.Duration("certificate-duration", 365*24*time.Hour, "how long nodes' certificates are valid")
	flag.Parse()
	if err := run(*listen, *apiServer, *pki, *password, *dns, *domain, *duration); err != nil {
		log.Fatal(err)
	}
}

func run(listen, apiServer, pki, passwordFile, dns, domain string, duration time.Duration) error {
	raw, err := os.ReadFile(passwordFile)
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return err
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		return err
	}
	s := &Server{address: listen, password: strings.TrimSpace(string(raw)), duration: duration}
	// Of the many fields of k3s' config.Control those that agents read, as Go writes them.
	s.config = map[string]any{
		"ClusterDNS": net.ParseIP(dns), "ClusterDNSs": []net.IP{net.ParseIP(dns)}, "ClusterDomain": domain,
		"HTTPSPort": number, "SupervisorPort": number, "EgressSelectorMode": "agent", "FlannelBackend": "none",
		"DisableKubeProxy": true, "DisableCCM": true, "ClusterIPRange": nil,
	}
	if s.clientCA, err = loadAuthority(filepath.Join(pki, "ca")); err != nil {
		return err
	}
	if s.serverCA, err = loadAuthority(filepath.Join(pki, "k3s-server-ca")); err != nil {
		return err
	}
	if s.apiServerOf, err = url.Parse(apiServer); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.clientCA.cert)
	admin, err := tls.LoadX509KeyPair(filepath.Join(pki, "admin.crt"), filepath.Join(pki, "admin.key"))
	if err != nil {
		return err
	}
	frontProxy, err := tls.LoadX509KeyPair(filepath.Join(pki, "front-proxy-client.crt"), filepath.Join(pki, "front-proxy-client.key"))
	if err != nil {
		return err
	}
	s.api = &apiClient{url: apiServer, client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{admin}},
	}}}
	s.asNode = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{frontProxy}}, ForceAttemptHTTP2: true}
	s.asStranger = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	s.proxy = &httputil.ReverseProxy{Rewrite: s.rewrite, Transport: s, FlushInterval: -1}
	s.tunnel = remotedialer.New(s.authorizeTunnel, func(w http.ResponseWriter, r *http.Request, code int, err error) {
		sendError(w, code, err)
	})

	key, certificate, err := s.serverCA.selfIssue(host)
	if err != nil {
		return err
	}
	server := &http.Server{
		Addr: listen, Handler: s, ReadHeaderTimeout: 10 * time.Second,
		TLSConfig: &tls.Config{
			// Asked for, and verified where it counts.
			ClientAuth:   tls.RequestClientCert,
			Certificates: []tls.Certificate{{Certificate: [][]byte{certificate, s.serverCA.cert.Raw}, PrivateKey: key}},
		},
	}
	return server.ListenAndServeTLS("", "")
}

// ServeHTTP is the router of pkg/server/handlers/router.go.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		s.withRole(s.serveConnect, "system:masters")(w, r)
		return
	}
	agents := []string{"k3s:agent", "system:nodes", "system:bootstrappers"}
	switch r.URL.Path {
	case "/cacerts":
		w.Header().Set("Content-Type", "text/plain")
		w.Write(s.serverCA.pem)
	case "/ping":
		w.Write([]byte("pong"))
	case "/v1-k3s/connect":
		s.withRole(s.tunnel.ServeHTTP, "system:nodes")(w, r)
	case "/v1-k3s/serving-kubelet.crt":
		s.withRole(s.servingKubelet, agents...)(w, r)
	case "/v1-k3s/client-kubelet.crt":
		s.withRole(s.clientKubelet, agents...)(w, r)
	case "/v1-k3s/client-ca.crt":
		s.withRole(file(s.clientCA.pem), agents...)(w, r)
	case "/v1-k3s/server-ca.crt":
		s.withRole(file(s.serverCA.pem), agents...)(w, r)
	case "/v1-k3s/apiservers":
		s.withRole(encode([]string{s.address}), agents...)(w, r)
	case "/v1-k3s/config":
		s.withRole(encode(s.config), agents...)(w, r)
	case "/v1-k3s/readyz":
		s.withRole(file([]byte("ok")), agents...)(w, r)
	default:
		s.proxy.ServeHTTP(w, r)
	}
}

func file(content []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.Write(content)
	}
}

func encode(value any) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(value)
	}
}

// sendError is util.SendError: a Status object.
func sendError(w http.ResponseWriter, code int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]any{
		"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": err.Error(), "code": code,
	})
}

// rewrite hands a request on. In k3s the API server sees the client's
// certificate itself; here it is told who showed one, as by any front proxy.
func (s *Server) rewrite(r *httputil.ProxyRequest) {
	r.SetURL(s.apiServerOf)
	for name := range r.Out.Header {
		if strings.HasPrefix(name, "X-Remote-") {
			r.Out.Header.Del(name)
		}
	}
	if user, err := s.byCertificate(r.In); err == nil && user != nil {
		r.Out.Header.Del("Authorization")
		r.Out.Header.Set("X-Remote-User", user.name)
		for _, group := range append(user.groups, "system:authenticated") {
			r.Out.Header.Add("X-Remote-Group", group)
		}
	}
}

// RoundTrip is the way to the API server, with or without a word about who asks.
func (s *Server) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Header.Get("X-Remote-User") != "" {
		return s.asNode.RoundTrip(r)
	}
	return s.asStranger.RoundTrip(r)
}

// apiClient is what little of the API is needed here, as an administrator.
type apiClient struct {
	url    string
	client *http.Client
}

var errNotFound = errors.New("not found")

func (a *apiClient) do(method, path string, body, into any) error {
	var content bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&content).Encode(body); err != nil {
			return err
		}
	}
	request, err := http.NewRequest(method, a.url+path, &content)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := a.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusNotFound {
		return errNotFound
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s", method, path, response.Status)
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(response.Body).Decode(into)
}
