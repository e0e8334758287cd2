package main

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
)

// authorizeTunnel is authorizer of pkg/daemons/control/tunnel.go.
func (s *Server) authorizeTunnel(r *http.Request) (clientKey string, authed bool, err error) {
	found, err := s.authenticate(r)
	if err != nil || found == nil {
		return "", false, err
	}
	name, ok := strings.CutPrefix(found.name, "system:node:")
	return name, ok, nil
}

type nodeList struct {
	Items []struct {
		Metadata struct {
			Name string `json:"name"`
		} `json:"metadata"`
		Status struct {
			Addresses []struct {
				Type    string `json:"type"`
				Address string `json:"address"`
			} `json:"addresses"`
			DaemonEndpoints struct {
				KubeletEndpoint struct {
					Port int `json:"Port"`
				} `json:"kubeletEndpoint"`
			} `json:"daemonEndpoints"`
		} `json:"status"`
	} `json:"items"`
}

// nodeOf is the node whose kubelet listens there; empty for anything else.
func (s *Server) nodeOf(host, port string) (string, error) {
	var nodes nodeList
	if err := s.api.do(http.MethodGet, "/api/v1/nodes", nil, &nodes); err != nil {
		return "", err
	}
	for _, node := range nodes.Items {
		if strconv.Itoa(node.Status.DaemonEndpoints.KubeletEndpoint.Port) != port {
			continue
		}
		for _, address := range node.Status.Addresses {
			if address.Address == host && (address.Type == "InternalIP" || address.Type == "ExternalIP") {
				return node.Metadata.Name, nil
			}
		}
	}
	return "", nil
}

// dialBackend is dialBackend of tunnel.go in the mode "agent": kubelets are
// reached through their tunnel and in no other way.
func (s *Server) dialBackend(ctx context.Context, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	node, err := s.nodeOf(host, port)
	if err != nil {
		return nil, err
	}
	if node == "" {
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}
	connection, err := s.tunnel.Dialer(node)(ctx, "tcp", net.JoinHostPort("127.0.0.1", port))
	if err == nil {
		log.Printf("tunnel: %s for %s", node, address)
	}
	return connection, err
}

// serveConnect is what the API server asks for, by its egress selector.
func (s *Server) serveConnect(w http.ResponseWriter, r *http.Request) {
	backend, err := s.dialBackend(r.Context(), r.Host)
	if err != nil {
		log.Printf("tunnel: %s: %v", r.Host, err)
		sendError(w, http.StatusBadGateway, err)
		return
	}
	defer backend.Close()
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		sendError(w, http.StatusInternalServerError, errors.New("hijacking not supported"))
		return
	}
	w.WriteHeader(http.StatusOK)
	client, buffered, err := hijacker.Hijack()
	if err != nil {
		return
	}
	defer client.Close()
	var once sync.Once
	over := make(chan struct{})
	done := func() { once.Do(func() { close(over) }) }
	go func() { io.Copy(backend, buffered); done() }()
	go func() { io.Copy(client, backend); done() }()
	<-over
}
