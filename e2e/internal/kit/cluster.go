// Package kit is what the end-to-end tests are written with: a cluster made by
// hack/cluster, its clients, waiting by watch, and kubectl.
package kit

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Cluster is the cluster under test.
type Cluster struct {
	Name       string
	Kubeconfig string
	// Registry is host:port, for nodes and from here alike.
	Registry string
	Client   *kubernetes.Clientset
	// Config is an administrator's way to the API server.
	Config *rest.Config
	env    []string
	down   func() error
	// removed says that Down was called.
	removed bool
}

// Dir is the directory of the cluster, which holds those of its nodes.
func (c *Cluster) Dir() string { return filepath.Dir(c.Kubeconfig) }

// NodeDir is the directory of a node that is no guest.
func (c *Cluster) NodeDir(node int) string { return filepath.Join(c.Dir(), fmt.Sprintf("n%d", node)) }

// The cluster of this test process.
var current *Cluster

// Parallel tests mostly wait: more of them than processors may run at once,
// unless -parallel says otherwise.
const parallel = "12"

// Main is the body of TestMain: it brings up a cluster of its own, runs the
// tests and takes it down again, however they end. With GANTRY_E2E_CLUSTER=NAME
// the tests use that cluster and leave it alone.
func Main(m *testing.M, upArgs ...string) {
	if err := flag.Set("test.parallel", parallel); err != nil {
		panic(err)
	}
	code, err := run(m, upArgs)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M, upArgs []string) (code int, err error) {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		removeAll()
		os.Exit(130)
	}()
	name := os.Getenv("GANTRY_E2E_CLUSTER")
	if name == "" {
		name = fmt.Sprintf("e2e-%d", os.Getpid())
		down, err := up(name, os.Stderr, upArgs...)
		defer func() {
			if failure := down(); failure != nil {
				code, err = 1, failure
			}
		}()
		if err != nil {
			return 1, err
		}
	}
	if current, err = connect(name); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// What removes the clusters of this process.
var made struct {
	sync.Mutex
	downs []func() error
}

func removeAll() {
	made.Lock()
	defer made.Unlock()
	var wait sync.WaitGroup
	for _, down := range made.downs {
		wait.Go(func() {
			if err := down(); err != nil {
				fmt.Fprintln(os.Stderr, "e2e:", err)
			}
		})
	}
	wait.Wait()
}

// up makes a cluster. The function that it returns removes it, and has to be
// called also after an error; it may be called again.
func up(name string, progress io.Writer, args ...string) (down func() error, err error) {
	down, err = downAtExit(name)
	if err != nil {
		return func() error { return nil }, err
	}
	made.Lock()
	made.downs = append(made.downs, down)
	made.Unlock()
	command := hackCluster(append([]string{"up", "--name", name}, args...)...)
	command.Stdout, command.Stderr = progress, progress
	if err := command.Run(); err != nil {
		return down, fmt.Errorf("hack/cluster up: %w", err)
	}
	return down, nil
}

// Up makes a further cluster for one test, with a name that starts with prefix.
// It is removed at the test's end, or before that by Down.
func Up(t testing.TB, prefix string, args ...string) *Cluster {
	t.Helper()
	name := fmt.Sprintf("%s-%d", prefix, os.Getpid())
	var progress bytes.Buffer
	down, err := up(name, &progress, args...)
	t.Cleanup(func() {
		if err := down(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	c, err := connect(name)
	if err != nil {
		t.Fatal(err)
	}
	c.down = down
	return c
}

// Down removes a cluster that was made by Up.
func (c *Cluster) Down(t testing.TB) {
	t.Helper()
	c.removed = true
	if err := c.down(); err != nil {
		t.Fatal(err)
	}
}

// downAtExit arranges that the cluster is removed even if this process panics
// at a test's time limit, is interrupted or is killed: a shell waits for the end
// of its input, which the kernel closes with this process.
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
	return sync.OnceValue(func() error {
		output.Close()
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("hack/cluster down --name %s: %w", name, err)
		}
		return nil
	}), nil
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
	c.Config = config
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

// Gantry runs a command of the node's own program on the node's socket, as its
// administrator does.
func (c *Cluster) Gantry(ctx context.Context, node int, args ...string) (stdout, stderr string, err error) {
	return c.GantryIn(ctx, filepath.Join(c.NodeDir(node), "run"), args...)
}

// Program is the file that the nodes run.
func (c *Cluster) Program() (string, error) {
	raw, err := os.ReadFile(filepath.Join(c.Dir(), "state.json"))
	if err != nil {
		return "", err
	}
	var state struct {
		GantryBinary string `json:"gantryBinary"`
	}
	err = json.Unmarshal(raw, &state)
	return state.GantryBinary, err
}

// GantryIn is Gantry with a state directory that no node of the cluster has.
func (c *Cluster) GantryIn(ctx context.Context, stateDir string, args ...string) (stdout, stderr string, err error) {
	program, err := c.Program()
	if err != nil {
		return "", "", err
	}
	args = append([]string{args[0], "--state-dir=" + stateDir}, args[1:]...)
	cmd := exec.CommandContext(ctx, program, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// NodeExec runs a command in a node's network namespace; in the guest, if the
// node is one.
func (c *Cluster) NodeExec(ctx context.Context, node int, args ...string) (stdout, stderr string, err error) {
	cmd := exec.CommandContext(ctx, script(), append([]string{"node-exec", "--name", c.Name, "--node", fmt.Sprint(node), "--"}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// BuildTools builds programs that a test needs besides those of the cluster.
func (c *Cluster) BuildTools(t testing.TB, names ...string) {
	t.Helper()
	if err := BuildToolsNow(names...); err != nil {
		t.Fatal(err)
	}
}

// BuildToolsNow is hack/build-tools, for where there is no test yet.
func BuildToolsNow(names ...string) error {
	out, err := exec.Command(filepath.Join(Repository(), "hack/build-tools"), names...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("hack/build-tools %s: %w\n%s", strings.Join(names, " "), err, out)
	}
	return nil
}

// Repository is the top of the working copy.
func Repository() string { return filepath.Dir(filepath.Dir(script())) }

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
