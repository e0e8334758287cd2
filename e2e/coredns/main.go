// Command coredns is upstream's DNS server with the plug-ins that a cluster
// needs. It is a module of its own: what it requires must not decide what
// Kubernetes is built from.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/ready"
)

// The order is that in which a query passes the plug-ins.
func init() {
	dnsserver.Directives = []string{
		"health", "ready", "prometheus", "errors", "log", "cache", "loadbalance", "kubernetes", "forward",
	}
}

func main() { coremain.Run() }
