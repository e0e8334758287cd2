package kind

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const dualStack = `kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking:
  ipFamily: dual
  kubeProxyMode: nftables
  podSubnet: 10.200.0.0/16,fd00:10:200::/56
  serviceSubnet: 10.97.0.0/16,fd00:10:97::/112
`

// A Pod on each node, and a Service of both families for the one on the joined
// node.
const bothFamilies = `apiVersion: v1
kind: Pod
metadata: {name: here}
spec:
  nodeName: %[1]s-control-plane
  terminationGracePeriodSeconds: 2
  tolerations: [{operator: Exists}]
  containers: [{name: main, image: ` + application + `}]
---
apiVersion: v1
kind: Pod
metadata: {name: there, labels: {app: there}}
spec:
  nodeName: %[1]s-gantry
  terminationGracePeriodSeconds: 2
  containers: [{name: main, image: ` + application + `}]
---
apiVersion: v1
kind: Service
metadata: {name: there}
spec: {ipFamilyPolicy: RequireDualStack, selector: {app: there}, ports: [{port: 80, targetPort: 8080}]}
`

// TestDualStack is a cluster with both families, networks of its own and
// kube-proxy in its other mode: one node, which also runs Pods, and one that joins.
func TestDualStack(t *testing.T) {
	name := cluster + "-dual"
	t.Cleanup(func() {
		if _, err := output(kindCommand("delete", "cluster", "--name", name)); err != nil {
			t.Error(err)
		}
	})
	create := kindCommand("create", "cluster", "--name", name, "--image", nodeImage, "--config", "-", "--wait", "3m")
	create.Stdin = strings.NewReader(dualStack)
	do(t, create)
	do(t, hack("join", name, "--image", nodeImage))
	do(t, kindCommand("load", "docker-image", "--name", name, application))
	apply(t, fmt.Sprintf(bothFamilies, name))
	do(t, kubectl("wait", "--for=condition=Ready", "pod/here", "pod/there", "--timeout=60s"))
	targets := []string{"there:80"}
	for _, path := range []string{"pod/there {.status.podIPs[*].ip} 8080", "service/there {.spec.clusterIPs[*]} 80"} {
		fields := strings.Fields(path)
		addresses := strings.Fields(do(t, kubectl("get", fields[0], "-o", "jsonpath="+fields[1])))
		if len(addresses) != 2 {
			t.Fatalf("%s has addresses %v, expected two", fields[0], addresses)
		}
		targets = append(targets, addresses[0]+":"+fields[2], "["+addresses[1]+"]:"+fields[2])
	}
	for _, target := range targets {
		eventually(t, 60*time.Second, "a Pod reaches "+target, func() *exec.Cmd {
			return kubectl("exec", "here", "--", "/agnhost", "connect", "--timeout=3s", target)
		}, func(string) bool { return true })
	}
}
