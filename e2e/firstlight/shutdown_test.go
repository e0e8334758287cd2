package firstlight

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// Where there is no systemd, SIGTERM ends a node with shutdown periods: its
// Pods end in the order of their priority, and no new one is let in. Without
// periods it ends the agent alone (TestAgentStopped).
func TestNodeShutdown(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		t.Skip("systemd is the init here: logind tells of a shutdown, which would be that of this machine")
	}
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	index, name := strconv.Itoa(victim), victimName
	file := filepath.Join(e.NodeDir(victim), "config.yaml")
	config, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	restart := func(config []byte) {
		t.Helper()
		if err := os.WriteFile(file, config, 0o644); err != nil {
			t.Fatal(err)
		}
		e.Command(t, "kill-agent", "--node", index)
		e.Command(t, "start-agent", "--node", index)
	}
	manifest := filepath.Join(e.NodeDir(victim), "manifests", e.Namespace+".yaml")
	t.Cleanup(func() {
		_ = os.Remove(manifest)
		e.Command(t, "start-agent", "--node", index) // if a step failed in between
		restart(config)
		e.Eventually(30*time.Second, "the node is Ready again", func() (bool, string) {
			node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, name, metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			c := kit.NodeReady(node)
			return c.Status == corev1.ConditionTrue, c.Message
		})
	})
	restart([]byte(strings.TrimSpace(string(config)) + "\nshutdownGracePeriod: 20s\nshutdownGracePeriodCriticalPods: 8s\n"))

	critical := func(p *corev1.Pod) { p.Spec.PriorityClassName = "system-node-critical" }
	slow := []string{"sh", "-c", "trap 'sleep 3; exit 0' TERM; while :; do sleep 3600 & wait; done"}
	e.Create(e.Pod("ordinary", "busybox:1.37", slow, kit.On(name), kit.Grace(10)),
		e.Pod("critical", "busybox:1.37", kit.Forever, kit.On(name), critical))
	text := fmt.Sprintf("{apiVersion: v1, kind: Pod, metadata: {name: static, namespace: %s}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %s, command: [sleep, '3600']}]}}",
		e.Namespace, e.Image("busybox:1.37"))
	if err := os.WriteFile(manifest, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	static := "static-" + name
	e.WaitReady(60*time.Second, "ordinary", "critical", static)
	ran := kit.Status(e.Get(static), "main").ContainerID

	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		e.Command(t, "stop-agent", "--node", index)
	}()
	e.Eventually(10*time.Second, "the node says that it shuts down", func() (bool, string) {
		node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		c := kit.NodeReady(node)
		return c.Status == corev1.ConditionFalse && strings.Contains(c.Message, "node is shutting down"), fmt.Sprintf("%s %s", c.Status, c.Message)
	})
	e.Create(e.Pod("late", "busybox:1.37", kit.Forever, kit.On(name)))
	late := e.WaitPod("late", 10*time.Second, "rejected", func(p *corev1.Pod) (bool, string) {
		return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
	})
	if late.Status.Reason != "NodeShutdown" || !strings.HasSuffix(late.Status.Message, "Pod was rejected as the node is shutting down.") {
		t.Errorf("late: %s", kit.Describe(late))
	}
	finished := map[string]time.Time{}
	for _, pod := range []string{"ordinary", "critical"} {
		p := e.WaitPod(pod, 20*time.Second, "terminated", func(p *corev1.Pod) (bool, string) {
			return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
		})
		if p.Status.Reason != "Terminated" || p.Status.Message != "Pod was terminated in response to imminent node shutdown." {
			t.Errorf("%s: reason %q, message %q", pod, p.Status.Reason, p.Status.Message)
		}
		if c := condition(p, corev1.DisruptionTarget); c.Status != corev1.ConditionTrue || c.Reason != corev1.PodReasonTerminationByKubelet || c.Message != p.Status.Message {
			t.Errorf("%s: DisruptionTarget is %q for %q: %s", pod, c.Status, c.Reason, c.Message)
		}
		if end := kit.Status(p, "main").State.Terminated; end == nil {
			t.Errorf("%s: %s", pod, kit.Describe(p))
		} else {
			finished[pod] = end.FinishedAt.Time
		}
	}
	if finished["critical"].Before(finished["ordinary"]) {
		t.Errorf("the critical Pod ended at %s, the ordinary one at %s", finished["critical"], finished["ordinary"])
	}
	<-stopped

	// The node comes back: what ended has ended, and static Pods begin anew.
	e.Command(t, "start-agent", "--node", index)
	e.WaitPod(static, 60*time.Second, "started anew", func(p *corev1.Pod) (bool, string) {
		ready, seen := kit.Ready(p)
		return ready && kit.Status(p, "main").ContainerID != ran, seen
	})
	if p := e.Get("ordinary"); p.Status.Phase != corev1.PodFailed || p.Status.Reason != "Terminated" {
		t.Errorf("ordinary: %s", kit.Describe(p))
	}
}
