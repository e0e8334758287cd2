package kind

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestKind is one cluster's life; each part builds on those before it.
func TestKind(t *testing.T) {
	t.Cleanup(func() {
		if _, err := output(kindCommand("delete", "cluster", "--name", cluster)); err != nil {
			t.Error(err)
		}
	})
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Create", create}, {"Nodes", nodes}, {"LoadImages", loadImages}, {"Service", service}, {"LogsAndExec", logsAndExec},
		{"Names", names}, {"RestartOfTheAgent", restartOfTheAgent}, {"Join", join}, {"JoinWithPlugins", joinWithPlugins}, {"Delete", deleteCluster},
	} {
		if !t.Run(part.name, part.run) {
			for _, cmd := range []*exec.Cmd{kubectl("get", "nodes,pods", "-A", "-o", "wide"), kubectl("get", "events", "-A"), docker("ps", "--all")} {
				out, err := output(cmd)
				t.Logf("%s\n%v", out, err)
			}
			return
		}
	}
}

const configuration = `kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes:
- role: control-plane
- role: worker
- role: worker
`

func create(t *testing.T) {
	cmd := kindCommand("create", "cluster", "--name", cluster, "--image", nodeImage, "--config", "-", "--wait", "3m", "--retain")
	cmd.Stdin = strings.NewReader(configuration)
	if _, err := output(cmd); err != nil {
		for _, cmd := range []*exec.Cmd{docker("logs", "--tail=50", cluster+"-control-plane"), docker("exec", cluster+"-control-plane", "journalctl", "--no-pager", "--lines=100", "--unit=kubelet")} {
			out, failure := output(cmd)
			t.Logf("%s\n%v", out, failure)
		}
		t.Fatal(err)
	}
}

// nodes are three, all Gantry's, and the Pods of kubeadm and of the network run
// on them.
func nodes(t *testing.T) {
	do(t, kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s"))
	runtimes := strings.Fields(do(t, kubectl("get", "nodes", "-o", "jsonpath={.items[*].status.nodeInfo.containerRuntimeVersion}")))
	if len(runtimes) != 3 {
		t.Errorf("%d nodes, expected 3", len(runtimes))
	}
	for _, runtime := range runtimes {
		if !strings.HasPrefix(runtime, "gantry://") {
			t.Errorf("a node runs %s", runtime)
		}
	}
	for _, workload := range []string{"daemonset/kube-proxy", "daemonset/gantry-node-routes", "deployment/coredns"} {
		do(t, kubectl("-n", "kube-system", "rollout", "status", workload, "--timeout=90s"))
	}
	do(t, kubectl("-n", "kube-system", "wait", "--for=condition=Ready", "pods", "--selector=tier=control-plane", "--timeout=60s"))
}

// loadImages brings the application to all nodes, once by `docker save` from the
// engine, once more by a name alone, and as a packed archive.
func loadImages(t *testing.T) {
	do(t, kindCommand("load", "docker-image", "--name", cluster, application))
	second := "example.test/app:v2"
	do(t, docker("tag", application, second))
	for _, expected := range []string{"missing the tag", "already present on all nodes"} {
		cmd := kindCommand("load", "docker-image", "--name", cluster, second)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), expected) {
			t.Errorf("%v, expected %q:\n%s", err, expected, out)
		}
	}
	archive := t.TempDir() + "/third.tar"
	third := "example.test/app:v3"
	do(t, docker("tag", application, third))
	do(t, docker("save", "--output", archive, third))
	do(t, exec.Command("gzip", "-1", archive))
	do(t, kindCommand("load", "image-archive", "--name", cluster, archive+".gz"))
	for _, node := range []string{"control-plane", "worker", "worker2"} {
		listed := do(t, docker("exec", cluster+"-"+node, "gantry", "images"))
		for _, name := range []string{application, second, third} {
			if !strings.Contains(listed, name) {
				t.Errorf("%s has no %s:\n%s", node, name, listed)
			}
		}
	}
	out, err := docker("exec", cluster+"-worker", "crictl", "ps").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "understands only what kind asks for") {
		t.Errorf("crictl ps: %v\n%s", err, out)
	}
}

const deployment = `apiVersion: apps/v1
kind: Deployment
metadata: {name: app}
spec:
  replicas: 2
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      terminationGracePeriodSeconds: 2
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {matchLabels: {app: app}}
      containers:
      - name: app
        image: ` + application + `
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: app}
spec: {type: NodePort, selector: {app: app}, ports: [{port: 80, targetPort: 8080}]}
`

// service is reached by its port on each node, and both Pods answer: those on
// other nodes too.
func service(t *testing.T) {
	apply(t, deployment)
	do(t, kubectl("rollout", "status", "deployment/app", "--timeout=60s"))
	port := do(t, kubectl("get", "service", "app", "-o", "jsonpath={.spec.ports[0].nodePort}"))
	for _, node := range []string{"control-plane", "worker", "worker2"} {
		answers := map[string]bool{}
		address := address(t, cluster+"-"+node)
		eventually(t, 30*time.Second, "both Pods answer at "+node, func() *exec.Cmd {
			return beside("curl", "--silent", "--fail", "--max-time", "3", fmt.Sprintf("http://%s:%s/hostname", address, port))
		}, func(name string) bool { answers[name] = true; return len(answers) == 2 })
	}
	// By the Service's name and address, from a Pod.
	eventually(t, 30*time.Second, "a Pod reaches the Service", func() *exec.Cmd {
		return kubectl("exec", "deployment/app", "--", "/agnhost", "connect", "--timeout=3s", "app:80")
	}, func(string) bool { return true })
}

func address(t *testing.T, node string) string {
	t.Helper()
	return do(t, docker("inspect", "--format", "{{.NetworkSettings.Networks.kind.IPAddress}}", node))
}

func logsAndExec(t *testing.T) {
	if out := do(t, kubectl("logs", "deployment/app")); !strings.Contains(out, "Started HTTP server") {
		t.Errorf("logs: %s", out)
	}
	if out := do(t, kubectl("logs", "-n", "kube-system", "kube-apiserver-"+cluster+"-control-plane", "--tail=3")); out == "" {
		t.Error("the API server has said nothing")
	}
	if out := do(t, kubectl("exec", "deployment/app", "--", "/agnhost", "--help")); !strings.Contains(out, "netexec") {
		t.Errorf("exec: %s", out)
	}
	directory := t.TempDir()
	do(t, kindCommand("export", "logs", "--name", cluster, directory))
	if out := do(t, exec.Command("find", directory, "-name", "kubelet.log", "-size", "+0")); strings.Count(out, "kubelet.log") != 3 {
		t.Errorf("logs of kubelet: %s", out)
	}
}

// names of Docker's network are resolved in Pods: through CoreDNS and the node.
func names(t *testing.T) {
	do(t, kubectl("exec", "deployment/app", "--", "/agnhost", "connect", "--timeout=5s", cluster+"-control-plane:6443"))
}

func restartOfTheAgent(t *testing.T) {
	pods := func() string {
		return do(t, kubectl("get", "pods", "-A", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[*].containerID}{"\n"}{end}`))
	}
	before := pods()
	do(t, docker("exec", cluster+"-worker", "systemctl", "restart", "kubelet"))
	do(t, docker("exec", cluster+"-control-plane", "systemctl", "restart", "kubelet"))
	for _, node := range []string{"worker", "control-plane"} {
		eventually(t, 30*time.Second, "the agent answers on "+node, func() *exec.Cmd {
			return docker("exec", cluster+"-"+node, "gantry", "ps")
		}, func(out string) bool { return strings.Contains(out, "kube-proxy") })
	}
	if after := pods(); after != before {
		t.Errorf("containers have changed; before:\n%s\nafter:\n%s", before, after)
	}
}
