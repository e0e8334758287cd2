package firstlight

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/kit"
)

// quietNode is a node that no test stops or drains.
func quietNode(e *kit.Env) string {
	nodes := e.Nodes()
	return nodes[len(nodes)-1]
}

// exitCode is that of a program that ran, -1 if it did not.
func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	default:
		return -1
	}
}

// Commands in containers: output, input, exit code, and a terminal that is
// resized.
func TestExec(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	pod := e.Pod("shell", "busybox:1.37", kit.Forever, kit.On(node))
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "other", Image: e.Image("busybox:1.37"), Command: kit.Forever})
	e.Create(pod)
	e.WaitReady(60*time.Second, "shell")
	kubectl := func(t *testing.T, input string, args ...string) (stdout, stderr string, code int) {
		ctx, cancel := context.WithTimeout(e.Ctx, 30*time.Second)
		defer cancel()
		cmd := e.KubectlCommand(ctx, append([]string{"exec", "-n", e.Namespace, "shell"}, args...)...)
		var out, errOut strings.Builder
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errOut
		err := cmd.Run()
		if code = exitCode(err); code < 0 {
			t.Fatalf("kubectl exec %v: %v", args, err)
		}
		return out.String(), errOut.String(), code
	}

	t.Run("streams and exit code", func(t *testing.T) {
		out, errOut, code := kubectl(t, "", "-c", "main", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
		if out != "out\n" || !strings.HasPrefix(errOut, "err\n") || code != 7 {
			t.Errorf("stdout %q, stderr %q, exit code %d; want out, err and 7", out, errOut, code)
		}
		if out, errOut, code := kubectl(t, "", "-c", "main", "--", "true"); out+errOut != "" || code != 0 {
			t.Errorf("true: %q %q, exit code %d", out, errOut, code)
		}
		if _, errOut, code := kubectl(t, "", "-c", "main", "--", "/no/such/program"); code == 0 || !strings.Contains(errOut, "/no/such/program") {
			t.Errorf("a missing program: exit code %d, %q", code, errOut)
		}
		if _, errOut, code := kubectl(t, "", "-c", "third", "--", "true"); code == 0 || !strings.Contains(errOut, "third") {
			t.Errorf("a missing container: exit code %d, %q", code, errOut)
		}
	})
	t.Run("input", func(t *testing.T) {
		// More than one window of SPDY's flow control.
		input := strings.Repeat("0123456789abcde\n", 64<<10)
		if out, errOut, code := kubectl(t, input, "-i", "-c", "other", "--", "cat"); out != input || code != 0 {
			t.Errorf("cat gives %d of %d bytes back, exit code %d: %s", len(out), len(input), code, errOut)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		e := e.In(t)
		terminal := e.OnTerminal(40, 101, "exec", "-it", "-n", e.Namespace, "shell", "-c", "main", "--", "sh")
		// What is typed is shown too: the answer is spelt differently.
		terminal.Type("tty; stty size | sed 's/ /-by-/'\n")
		terminal.Await("/dev/pts/")
		terminal.Await("40-by-101")
		terminal.Resize(33, 97)
		// The size travels on a channel of its own.
		e.Eventually(20*time.Second, "the new size in the container", func() (bool, string) {
			terminal.Type("stty size | sed 's/ /-by-/'\n")
			time.Sleep(300 * time.Millisecond)
			shown := terminal.Shown()
			return strings.Contains(shown, "33-by-97"), shown
		})
		// Ctrl-C reaches the process in front, and not kubectl.
		terminal.Type("sleep 1000\n")
		terminal.Await("sleep 1000")
		time.Sleep(500 * time.Millisecond)
		terminal.Type("\x03")
		terminal.Type("echo inter''rupted\n")
		terminal.Await("interrupted")
		terminal.Type("exit 5\n")
		if code := terminal.Wait(); code != 5 {
			t.Errorf("exit code %d, want 5; the terminal shows: %q", code, terminal.Shown())
		}
	})
	t.Run("nothing is left", func(t *testing.T) {
		e := e.In(t)
		for _, container := range []string{"main", "other"} {
			e.Eventually(10*time.Second, "only the container's own processes", func() (bool, string) {
				processes := e.Exec("shell", container, "ps", "-o", "args")
				for _, line := range strings.Split(processes, "\n") {
					if slices.Contains([]string{"cat", "sh", "sleep 1000"}, strings.TrimSpace(line)) {
						return false, processes
					}
				}
				return true, processes
			})
		}
	})
}

func TestLogs(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	pod := e.Pod("talker", "busybox:1.37", []string{"sh", "-c", `
for i in $(seq 1 20); do echo "line $i"; done; sleep 1; echo complaint >&2
sleep 6; echo late; trap 'echo bye; exit 0' TERM; while :; do sleep 3600 & wait; done`}, kit.On(node))
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
		Name: "other", Image: e.Image("busybox:1.37"), Command: []string{"sh", "-c", "echo from the other; exec sleep 3600"},
	})
	// Its first run fails, its second stays.
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
		Name: "phoenix", Image: e.Image("busybox:1.37"),
		Command:      []string{"sh", "-c", "if [ -e /x/ran ]; then echo second run; exec sleep 3600; fi; touch /x/ran; echo first run; exit 1"},
		VolumeMounts: []corev1.VolumeMount{{Name: "x", MountPath: "/x"}},
	})
	pod.Spec.Volumes = []corev1.Volume{{Name: "x", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	e.Create(pod)
	e.WaitPod("talker", 60*time.Second, "the second run of phoenix", func(p *corev1.Pod) (bool, string) {
		s := kit.Status(p, "phoenix")
		return s.RestartCount == 1 && s.State.Running != nil, kit.Describe(p)
	})

	ctx, cancel := context.WithTimeout(e.Ctx, time.Minute)
	defer cancel()
	follow := e.KubectlCommand(ctx, "logs", "-f", "-n", e.Namespace, "talker", "-c", "main")
	var followed lockedBuffer
	follow.Stdout = &followed
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	if got := e.Logs("talker", "other"); got != "from the other\n" {
		t.Errorf("-c other: %q", got)
	}
	if got := e.Logs("talker", "phoenix"); got != "second run\n" {
		t.Errorf("-c phoenix: %q", got)
	}
	if got := e.Logs("talker", "phoenix", "--previous"); got != "first run\n" {
		t.Errorf("-c phoenix --previous: %q", got)
	}
	if got := e.Logs("talker", "main", "--limit-bytes=11"); got != "line 1\nline" {
		t.Errorf("--limit-bytes=11: %q", got)
	}
	e.Eventually(30*time.Second, "the late line", func() (bool, string) {
		return strings.Contains(followed.String(), "late\n"), followed.String()
	})
	if got := e.Logs("talker", "main", "--tail=3"); got != "line 20\ncomplaint\nlate\n" {
		t.Errorf("--tail=3: %q", got)
	}
	if got := e.Logs("talker", "main", "--tail=0"); got != "" {
		t.Errorf("--tail=0: %q", got)
	}
	stamped := strings.Split(strings.TrimSpace(e.Logs("talker", "main", "--timestamps", "--tail=1")), " ")
	at, err := time.Parse(time.RFC3339Nano, stamped[0])
	if err != nil || len(stamped) != 2 || stamped[1] != "late" {
		t.Fatalf("--timestamps: %q %v", stamped, err)
	}
	// Six seconds lie between the last two lines, and kubectl takes a moment.
	since := fmt.Sprintf("--since=%ds", int(time.Since(at).Seconds())+3)
	if got := e.Logs("talker", "main", since); got != "late\n" {
		t.Errorf("%s: %q", since, got)
	}
	// The API has whole seconds.
	if got := e.Logs("talker", "main", "--since-time="+at.Add(-2*time.Second).Format(time.RFC3339)); got != "late\n" {
		t.Errorf("--since-time: %q", got)
	}
	all, errOut, err := e.Kubectl(e.Ctx, "logs", "-n", e.Namespace, "talker", "--all-containers", "--prefix", "--tail=1")
	if err != nil {
		t.Errorf("--all-containers: %v %s", err, errOut)
	}
	for _, line := range []string{"[pod/talker/main] late\n", "[pod/talker/other] from the other\n", "[pod/talker/phoenix] second run\n"} {
		if !strings.Contains(all, line) {
			t.Errorf("--all-containers --prefix lacks %q:\n%s", line, all)
		}
	}
	if _, errOut, err := e.Kubectl(e.Ctx, "logs", "-n", e.Namespace, "talker", "-c", "third"); err == nil || !strings.Contains(errOut, "third") {
		t.Errorf("logs of a container that does not exist: %v %q", err, errOut)
	}
	if _, errOut, err := e.Kubectl(e.Ctx, "logs", "-n", e.Namespace, "talker", "-c", "main", "--previous"); err == nil ||
		!strings.Contains(errOut, `previous terminated container "main" in pod "talker" not found`) {
		t.Errorf("--previous of a first run: %v %q", err, errOut)
	}
	e.Delete("talker")
	if err := follow.Wait(); err != nil {
		t.Errorf("kubectl logs -f: %v", err)
	}
	var want strings.Builder
	for i := range 20 {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	want.WriteString("complaint\nlate\nbye\n")
	if followed.String() != want.String() {
		t.Errorf("kubectl logs -f shows %q", followed.String())
	}
}

// The node's own commands show a Pod of the API server, and enter it.
func TestLocalCommands(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	var number int
	if _, err := fmt.Sscanf(node, "node-%d", &number); err != nil {
		t.Fatal(err)
	}
	e.Create(e.Pod("visible", "busybox:1.37", []string{"sh", "-c", "echo hello; exec sleep 3600"}, kit.On(node)))
	e.WaitReady(60*time.Second, "visible")
	gantry := func(args ...string) (string, string, int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(e.Ctx, 30*time.Second)
		defer cancel()
		out, errOut, err := e.Gantry(ctx, number, args...)
		code := exitCode(err)
		if code < 0 {
			t.Fatalf("gantry %v: %v", args, err)
		}
		return out, errOut, code
	}
	out, errOut, _ := gantry("ps")
	found := false
	for _, line := range strings.Split(out, "\n") {
		fields := strings.Fields(line)
		if len(fields) > 4 && fields[0] == e.Namespace && fields[1] == "visible" {
			found = fields[2] == "1/1" && fields[3] == "Running"
		}
	}
	if !found {
		t.Errorf("gantry ps does not show the Pod as running:\n%s%s", out, errOut)
	}
	pod := e.Namespace + "/visible"
	if out, errOut, code := gantry("logs", pod); out != "hello\n" || code != 0 {
		t.Errorf("gantry logs: %q %q, exit code %d", out, errOut, code)
	}
	if out, errOut, code := gantry("exec", pod, "--", "sh", "-c", "hostname; exit 6"); out != "visible\n" || code != 6 {
		t.Errorf("gantry exec: %q %q, exit code %d", out, errOut, code)
	}
	if out, errOut, _ := gantry("images"); !strings.Contains(out, e.Image("busybox:1.37")) {
		t.Errorf("gantry images: %s%s", out, errOut)
	}
	if _, errOut, code := gantry("logs", e.Namespace+"/nobody"); code == 0 || !strings.Contains(errOut, "nobody") {
		t.Errorf("gantry logs of no Pod: exit code %d, %q", code, errOut)
	}
}

// kubectl describe tells a Pod's story from the scheduler to its end.
func TestDescribe(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	image := e.SlowImage("described", time.Second)
	pod := e.Pod("told", image, kit.Forever, func(p *corev1.Pod) {
		p.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": node}
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"sh", "-c", "test -e /tmp/up || { echo not up yet; exit 1; }"}}},
			PeriodSeconds: 1,
		}
	})
	e.Create(pod)
	e.WaitEvent("told", "Unhealthy: Readiness probe failed: not up yet", 60*time.Second)
	e.Exec("told", "main", "touch", "/tmp/up")
	e.WaitReady(30*time.Second, "told")
	name := e.Image(image)
	described := func() string {
		t.Helper()
		out, errOut, err := e.Kubectl(e.Ctx, "describe", "pod", "-n", e.Namespace, "told")
		if err != nil {
			t.Fatalf("kubectl describe: %v %s", err, errOut)
		}
		return out
	}
	wanted := []string{
		"Scheduled", "Successfully assigned " + e.Namespace + "/told to " + node,
		"Pulling image \"" + name + "\"", "Successfully pulled image \"" + name + "\" in ", "Container created", "Container started",
		"Readiness probe failed: not up yet",
		"Node:             " + node + "/", "Status:           Running", "Container ID:  gantry://", "Image ID:      " + e.Registry + "/slow/described@sha256:",
		"QoS Class:                   BestEffort", "ContainersReady             True",
	}
	e.Eventually(20*time.Second, "describe has all of it", func() (bool, string) {
		out := described()
		var missing []string
		for _, text := range wanted {
			if !strings.Contains(out, text) {
				missing = append(missing, text)
			}
		}
		return len(missing) == 0, fmt.Sprintf("lacks %q:\n%s", missing, out)
	})
	if out := described(); !strings.Contains(out, "kubelet") {
		t.Errorf("events are not those of a kubelet:\n%s", out)
	}
	e.Delete("told")
	e.WaitGone("told", 30*time.Second)
	e.WaitEvent("told", "Killing: Stopping container main", 10*time.Second)
}
