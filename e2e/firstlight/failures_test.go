package firstlight

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"gantry.local/e2e/internal/kit"
)

func portOf(port int) intstr.IntOrString { return intstr.FromInt32(int32(port)) }

// waiting waits until the container "main" waits for a reason, and checks that
// the message names the thing.
func waiting(t *testing.T, e *kit.Env, pod string, timeout time.Duration, reason string, names ...string) {
	t.Helper()
	last := e.WaitPod(pod, timeout, "waiting with "+reason, func(p *corev1.Pod) (bool, string) {
		w := kit.Status(p, "main").State.Waiting
		return w != nil && w.Reason == reason, kit.Describe(p)
	})
	message := kit.Status(last, "main").State.Waiting.Message
	for _, name := range names {
		if !strings.Contains(message, name) {
			t.Errorf("%s: the message does not name %q: %s", reason, name, message)
		}
	}
}

// terminated waits for the end of the container "main".
func terminated(t *testing.T, e *kit.Env, pod string, timeout time.Duration) (*corev1.Pod, *corev1.ContainerStateTerminated) {
	t.Helper()
	last := e.WaitPod(pod, timeout, "terminated", func(p *corev1.Pod) (bool, string) {
		finished := p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded
		return finished && kit.Status(p, "main").State.Terminated != nil, kit.Describe(p)
	})
	return last, kit.Status(last, "main").State.Terminated
}

// Whatever is wrong with a Pod, its status names it; the node is not impressed.
func TestFailures(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	healthy := kit.On(node)
	e.Create(e.Pod("bystander", "busybox:1.37", kit.Forever, healthy))
	e.WaitReady(60*time.Second, "bystander")
	record := e.Record(node, "bystander")

	t.Run("missing image", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("no-image", "no/such-image:7", nil, kit.On(node)))
		image := e.Image("no/such-image:7")
		waiting(t, e, "no-image", 30*time.Second, "ErrImagePull", image)
		waiting(t, e, "no-image", 60*time.Second, "ImagePullBackOff", image)
		e.WaitEvent("no-image", "Failed: Failed to pull image \""+image+"\"", 10*time.Second)
		e.WaitEvent("no-image", "BackOff: Back-off pulling image \""+image+"\"", 10*time.Second)
	})
	t.Run("missing command", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("no-command", "busybox:1.37", []string{"/no/such/program"}, kit.On(node), kit.Never))
		_, end := terminated(t, e, "no-command", 60*time.Second)
		if end.Reason != "StartError" || end.ExitCode != 128 || !strings.Contains(end.Message, "/no/such/program") {
			t.Errorf("reason %q, exit code %d, message %q; want StartError, 128 and the path", end.Reason, end.ExitCode, end.Message)
		}
	})
	t.Run("missing command is retried", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("no-command-again", "busybox:1.37", []string{"/no/such/program"}, kit.On(node)))
		e.WaitPod("no-command-again", 60*time.Second, "RunContainerError or CrashLoopBackOff, with the path", func(p *corev1.Pod) (bool, string) {
			s := kit.Status(p, "main")
			w, end := s.State.Waiting, s.LastTerminationState.Terminated
			named := w != nil && w.Reason == "RunContainerError" && strings.Contains(w.Message, "/no/such/program") ||
				w != nil && w.Reason == "CrashLoopBackOff" && end != nil && end.Reason == "StartError" && strings.Contains(end.Message, "/no/such/program")
			return named, kit.Describe(p)
		})
		e.WaitEvent("no-command-again", "/no/such/program", 10*time.Second)
	})
	t.Run("exit codes", func(t *testing.T) {
		e := e.In(t)
		for _, c := range []struct {
			name, script, reason string
			code                 int32
			phase                corev1.PodPhase
		}{
			{"exit-0", "exit 0", "Completed", 0, corev1.PodSucceeded},
			{"exit-7", "exit 7", "Error", 7, corev1.PodFailed},
			{"exit-255", "exit 255", "Error", 255, corev1.PodFailed},
		} {
			e.Create(e.Pod(c.name, "busybox:1.37", []string{"sh", "-c", c.script}, kit.On(node), kit.Never))
			pod, end := terminated(t, e, c.name, 60*time.Second)
			if end.ExitCode != c.code || end.Reason != c.reason || pod.Status.Phase != c.phase {
				t.Errorf("%s: exit code %d, reason %s, phase %s", c.script, end.ExitCode, end.Reason, pod.Status.Phase)
			}
		}
	})
	t.Run("termination message", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("last-words", "busybox:1.37", []string{"sh", "-c", "echo -n 'the disk is on fire' > /dev/termination-log; exit 3"}, kit.On(node), kit.Never))
		if _, end := terminated(t, e, "last-words", 60*time.Second); end.Message != "the disk is on fire" {
			t.Errorf("message %q", end.Message)
		}
	})
	t.Run("OOM", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("greedy", "busybox:1.37", []string{"dd", "if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"},
			kit.On(node), kit.Never, kit.Limit(corev1.ResourceMemory, "32Mi")))
		if _, end := terminated(t, e, "greedy", 60*time.Second); end.Reason != "OOMKilled" || end.ExitCode != 137 {
			t.Errorf("reason %q, exit code %d", end.Reason, end.ExitCode)
		}
	})
	t.Run("missing ConfigMap", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("no-config", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{
				LocalObjectReference: corev1.LocalObjectReference{Name: "settings"},
			}}}
		}))
		waiting(t, e, "no-config", 60*time.Second, "CreateContainerConfigError", `configmap "settings" not found`)
		// The remedy works without touching the Pod.
		if _, err := e.Client.CoreV1().ConfigMaps(e.Namespace).Create(e.Ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: "settings"}, Data: map[string]string{"data-1": "value"},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		e.WaitReady(3*time.Minute, "no-config")
		if got := e.Exec("no-config", "main", "printenv", "data-1"); got != "value\n" {
			t.Errorf("data-1 is %q", got)
		}
	})
	t.Run("too big", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("too-big", "busybox:1.37", kit.Forever, kit.On(node), kit.Limit(corev1.ResourceCPU, "1000")))
		pod := e.WaitPod("too-big", 30*time.Second, "rejected", func(p *corev1.Pod) (bool, string) {
			return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
		})
		if pod.Status.Reason != "OutOfcpu" || !strings.Contains(pod.Status.Message, "cpu, requested: 1000000") {
			t.Errorf("reason %q, message %q", pod.Status.Reason, pod.Status.Message)
		}
	})
	t.Run("wrong node", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("misplaced", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			p.Spec.NodeSelector = map[string]string{"example.org/planet": "mars"}
		}))
		pod := e.WaitPod("misplaced", 30*time.Second, "rejected", func(p *corev1.Pod) (bool, string) {
			return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
		})
		if pod.Status.Reason != "NodeAffinity" {
			t.Errorf("reason %q, message %q", pod.Status.Reason, pod.Status.Message)
		}
	})

	for _, note := range record.Stop() {
		t.Errorf("the failures of others were felt: %s", note)
	}
}
