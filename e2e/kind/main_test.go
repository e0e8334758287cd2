// Package kind tests clusters of kind on nodes that are Gantry's: the node image
// of hack/kind/node-image, kind's own commands, and hack/kind/join.
//
//	go test ./kind -timeout 20m        needs root and Debian's docker.io
//
// Everything runs beside a Docker engine in namespaces of its own
// (hack/kind/engine), which is started and ended here.
package kind

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/kit"
)

const (
	cluster = "gantry-e2e"
	// application runs agnhost's web server. No registry has it.
	application = "example.test/app:v1"
)

// nodeImage is what hack/kind/node-image makes; it is set by TestMain.
var nodeImage string

func TestMain(m *testing.M) {
	// A test that is ended by a signal still has to end its engine.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	go func() {
		<-signals
		fmt.Fprintln(os.Stderr, "ended by a signal:", script("engine", "down"))
		os.Exit(1)
	}()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if err := kit.BuildToolsNow("kind", "kubectl", "agnhost"); err != nil {
		return 1, err
	}
	before, err := machine()
	if err != nil {
		return 1, err
	}
	defer func() {
		err = errors.Join(err, script("engine", "down"))
		after, failure := machine()
		if failure == nil && after != before {
			failure = fmt.Errorf("the machine has changed; before:\n%s\nafter:\n%s", before, after)
		}
		err = errors.Join(err, failure)
	}()
	if err := script("engine", "up"); err != nil {
		return 1, err
	}
	began := time.Now()
	if nodeImage, err = output(hack("node-image")); err != nil {
		return 1, err
	}
	fmt.Fprintf(os.Stderr, "node image %s: %s\n", nodeImage, time.Since(began).Round(time.Second))
	if err := makeApplication(); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// enginesOwn are a Docker engine's bridges, rules, mounts and directories.
var enginesOwn = regexp.MustCompile(`docker|DOCKER|^br-[0-9a-f]{12}|build/kind/engine|gantry-kind-`)

// machine is what an engine must leave as it was.
func machine() (string, error) {
	var all strings.Builder
	for _, args := range [][]string{
		{"ip", "-brief", "link"}, {"nft", "--stateless", "list", "ruleset"}, {"findmnt", "--list", "--noheadings", "--output", "TARGET"},
		{"find", "/sys/fs/cgroup", "/run", "-maxdepth", "2", "-name", "gantry-kind-*"},
	} {
		out, err := output(exec.Command(args[0], args[1:]...))
		if err != nil {
			return "", err
		}
		for _, line := range strings.Split(out, "\n") {
			// Only what an engine makes counts: other clusters come and go meanwhile.
			if enginesOwn.MatchString(line) {
				fmt.Fprintln(&all, line)
			}
		}
	}
	return all.String(), nil
}

// environment lets docker find the engine, and kind and kubectl the cluster.
func environment() []string {
	out, err := exec.Command(filepath.Join(kit.Repository(), "hack/kind/engine"), "env").Output()
	if err != nil {
		panic(err)
	}
	host := strings.TrimPrefix(strings.TrimSpace(string(out)), "export ")
	return append(os.Environ(), host, "KUBECONFIG="+filepath.Join(kit.Repository(), "build/kind/kubeconfig"))
}

// hack is one of the scripts in hack/kind.
func hack(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(kit.Repository(), "hack/kind", name), args...)
	cmd.Env = environment()
	return cmd
}

// script runs one of the scripts in hack/kind.
func script(name string, args ...string) error {
	_, err := output(hack(name, args...))
	return err
}

// beside is a command on the engine's side of the network.
func beside(args ...string) *exec.Cmd {
	return hack("engine", append([]string{"run", "--"}, args...)...)
}

func program(name string) string { return filepath.Join(kit.Repository(), "build/bin", name) }

// output runs a command; an error has all that it said.
func output(cmd *exec.Cmd) (string, error) {
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, out.Bytes(), errOut.Bytes())
	}
	return strings.TrimSpace(out.String()), nil
}

// do runs a command that must succeed.
func do(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := output(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func kubectl(args ...string) *exec.Cmd {
	return beside(append([]string{program("kubectl")}, args...)...)
}

func kindCommand(args ...string) *exec.Cmd {
	return beside(append([]string{program("kind")}, args...)...)
}

func docker(args ...string) *exec.Cmd {
	cmd := exec.Command("docker", args...)
	cmd.Env = environment()
	return cmd
}

// apply gives objects to the API server.
func apply(t *testing.T, manifest string) {
	t.Helper()
	cmd := kubectl("apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	do(t, cmd)
}

// eventually waits for a command to succeed and its output to be right.
func eventually(t *testing.T, timeout time.Duration, what string, cmd func() *exec.Cmd, right func(string) bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		out, err := output(cmd())
		if err == nil && right(out) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v\n%s", what, timeout, err, out)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// makeApplication imports the test application into the engine, as if it had
// been built there.
func makeApplication() error {
	archive := exec.Command("tar", "-c", "-C", filepath.Join(kit.Repository(), "build/bin"), "agnhost")
	content, err := archive.StdoutPipe()
	if err != nil {
		return err
	}
	if err := archive.Start(); err != nil {
		return err
	}
	load := docker("import", "--change", `ENTRYPOINT ["/agnhost"]`, "--change", `CMD ["netexec"]`, "-", application)
	load.Stdin = io.Reader(content)
	_, err = output(load)
	return errors.Join(err, archive.Wait())
}
