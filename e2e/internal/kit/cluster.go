// Package kit is what the end-to-end tests are written with: a cluster made by
// hack/cluster, its clients, waiting by watch, and kubectl.
package kit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// Cluster is the cluster under test.
type Cluster struct {
	Name       string
	Kubeconfig string
	// Registry is host:port, for nodes and from here alike.
	Registry string
	Client   *kubernetes.Clientset
	env      []string
}

// The cluster of this test process.
var current *Cluster

// Main is the body of TestMain: it brings up a cluster of its own, runs the
// tests and takes it down again, however they end. With GANTRY_E2E_CLUSTER=NAME
// the tests use that cluster and leave it alone.
func Main(m *testing.M, upArgs ...string) {
	code, err := run(m, upArgs)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M, upArgs []string) (code int, err error) {
	name := os.Getenv("GANTRY_E2E_CLUSTER")
	if name == "" {
		name = fmt.Sprintf("e2e-%d", os.Getpid())
		down, err := downAtExit(name)
		if err != nil {
			return 1, err
		}
		defer func() {
			if failure := down(); failure != nil {
				code, err = 1, failure
			}
		}()
		up := hackCluster(append([]string{"up", "--name", name}, upArgs...)...)
		up.Stdout, up.Stderr = os.Stderr, os.Stderr
		if err := up.Run(); err != nil {
			return 1, fmt.Errorf("hack/cluster up: %w", err)
		}
	}
	if current, err = connect(name); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// downAtExit arranges that the cluster is removed even if this process panics
// at a test's time limit or is killed: a shell waits for the end of its input,
// which the kernel closes with this process.
func downAtExit(name string) (func() error, error) {
	input, output, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("bash", "-c", `cat >/dev/null; exec "$0" down --name "$1"`, script(), name)
	cmd.Stdin, cmd.Stderr = input, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for the tests
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	input.Close()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		output.Close()
		cmd.Wait()
		os.Exit(130)
	}()
	return func() error {
		output.Close()
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("hack/cluster down --name %s: %w", name, err)
		}
		return nil
	}, nil
}

// script is the path of hack/cluster, found from this source file. Tests run
// with the sources in place.
func script() string {
	_, file, _, ok := runtime.Caller(0)
	if !ok || !filepath.IsAbs(file) {
		// -trimpath: `go test` still runs in the directory of the package.
		dir, err := os.Getwd()
		if err != nil {
			panic(err)
		}
		for ; dir != "/"; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "hack/cluster")); err == nil {
				return filepath.Join(dir, "hack/cluster")
			}
		}
		panic("hack/cluster is in no parent directory")
	}
	return filepath.Join(filepath.Dir(file), "../../../hack/cluster")
}

func hackCluster(args ...string) *exec.Cmd { return exec.Command(script(), args...) }

func connect(name string) (*Cluster, error) {
	out, err := exec.Command("bash", "-c", `set -e; settings=$("$0" env --name "$1"); eval "$settings"; env -0`, script(), name).Output()
	if err != nil {
		return nil, fmt.Errorf("hack/cluster env --name %s: %w", name, err)
	}
	c := &Cluster{Name: name}
	for _, variable := range strings.Split(strings.TrimRight(string(out), "\x00"), "\x00") {
		c.env = append(c.env, variable)
		switch key, value, _ := strings.Cut(variable, "="); key {
		case "KUBECONFIG":
			c.Kubeconfig = value
		case "GANTRY_REGISTRY":
			c.Registry = value
		case "PATH":
			// kubectl is looked up in this process's path.
			os.Setenv("PATH", value)
		}
	}
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 100, 200
	c.Client, err = kubernetes.NewForConfig(config)
	return c, err
}

// Command runs hack/cluster on this cluster and fails the test if it fails.
func (c *Cluster) Command(t testing.TB, command string, args ...string) []byte {
	t.Helper()
	cmd := hackCluster(append([]string{command, "--name", c.Name}, args...)...)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("hack/cluster %s %s: %v\n%s", command, strings.Join(args, " "), err, errOut.String())
	}
	return out
}

// Snapshot lists what a node holds of the machine (hack/cluster snapshot).
func (c *Cluster) Snapshot(t testing.TB, node int) map[string][]string {
	t.Helper()
	var s map[string][]string
	if err := json.Unmarshal(c.Command(t, "snapshot", "--node", fmt.Sprint(node)), &s); err != nil {
		t.Fatalf("hack/cluster snapshot: %v", err)
	}
	return s
}

// Kubectl runs kubectl as a user would and returns what it prints and its error.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	cmd := c.KubectlCommand(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// KubectlCommand is kubectl with the cluster's environment, not yet started.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "kubectl", args...)
	cmd.Env = c.env
	cmd.WaitDelay = 5 * time.Second
	return cmd
}
