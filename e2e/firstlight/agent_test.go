package firstlight

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// The node whose agent is killed. Nodes of hack/cluster are called node-I.
const victim = 1

var victimName = fmt.Sprintf("node-%d", victim)

// countedStarts notes each start of the container in a volume of the Pod, so
// that one that runs twice is seen even if no status tells.
func countedStarts(p *corev1.Pod) {
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "starts", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	c := &p.Spec.Containers[0]
	c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "starts", MountPath: "/starts"})
	c.Command = []string{"sh", "-c", "echo started >> /starts/log; trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"}
}

// waitServing waits until the node answers on its port again. Pods that were
// Ready before the agent was killed say nothing of that.
func waitServing(e *kit.Env, node string) {
	e.Eventually(20*time.Second, node+" serves", func() (bool, string) {
		answer, err := e.Client.CoreV1().RESTClient().Get().Resource("nodes").Name(node).SubResource("proxy").Suffix("healthz").DoRaw(e.Ctx)
		return err == nil, fmt.Sprintf("%s %v", answer, err)
	})
}

func checkStartedOnce(t *testing.T, e *kit.Env, pods ...string) {
	t.Helper()
	waitServing(e, victimName)
	for _, pod := range pods {
		if starts := e.Exec(pod, "main", "cat", "/starts/log"); starts != "started\n" {
			t.Errorf("Pod %s was started %d times", pod, strings.Count(starts, "\n"))
		}
	}
}

// The agent may be killed at any moment: no container notices, and what was
// half-made is finished or undone.
func TestAgentKilled(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	var steady []string
	for i := range 10 {
		name := fmt.Sprintf("steady-%d", i)
		e.Create(e.Pod(name, "busybox:1.37", nil, kit.On(victimName), countedStarts))
		steady = append(steady, name)
	}
	e.WaitReady(2*time.Minute, steady...)
	record := e.Record(victimName, steady...)

	// restart kills the agent now, and starts it again a moment later.
	restart := func(t *testing.T) {
		t.Helper()
		e.Command(t, "kill-agent", "--node", strconv.Itoa(victim))
		time.Sleep(time.Second)
		e.Command(t, "start-agent", "--node", strconv.Itoa(victim))
	}
	node := strconv.Itoa(victim)
	t.Cleanup(func() { e.Command(t, "start-agent", "--node", node) }) // if a step failed in between

	t.Run("at rest", func(t *testing.T) {
		e := e.In(t)
		restart(t)
		// It works again: a new Pod starts, and an old one can be entered.
		e.Create(e.Pod("after", "busybox:1.37", nil, kit.On(victimName), countedStarts))
		e.WaitReady(60*time.Second, "after")
		checkStartedOnce(t, e, "after", steady[0])
	})
	t.Run("in a pull", func(t *testing.T) {
		e := e.In(t)
		image := e.SlowImage("killed", 8*time.Second)
		e.Create(e.Pod("pulling", image, nil, kit.On(victimName), countedStarts))
		e.WaitEvent("pulling", "Pulling: ", 30*time.Second)
		time.Sleep(2 * time.Second)
		restart(t)
		e.WaitReady(90*time.Second, "pulling")
		checkStartedOnce(t, e, "pulling")
	})
	t.Run("in a create", func(t *testing.T) {
		e := e.In(t)
		var created []string
		for i, delay := range []time.Duration{5, 20, 60, 120, 250, 500} {
			name := fmt.Sprintf("created-%d", i)
			created = append(created, name)
			e.Create(e.Pod(name, "busybox:1.37", nil, kit.On(victimName), countedStarts))
			time.Sleep(delay * time.Millisecond)
			restart(t)
		}
		e.WaitReady(90*time.Second, created...)
		checkStartedOnce(t, e, created...)
		for _, name := range created {
			if n := kit.Status(e.Get(name), "main").RestartCount; n != 0 {
				t.Errorf("Pod %s: restartCount %d", name, n)
			}
		}
	})
	t.Run("in a delete", func(t *testing.T) {
		e := e.In(t)
		var deleted []string
		for i, delay := range []time.Duration{10, 100, 500, 1500} {
			name := fmt.Sprintf("deleted-%d", i)
			deleted = append(deleted, name)
			// It ignores SIGTERM, so that the grace of 4 s is in use.
			e.Create(e.Pod(name, "busybox:1.37", []string{"sh", "-c", "trap '' TERM; while :; do sleep 1; done"}, kit.On(victimName), kit.Grace(4)))
			e.WaitReady(60*time.Second, name)
			e.Delete(name)
			time.Sleep(delay * time.Millisecond)
			restart(t)
		}
		for _, name := range deleted {
			e.WaitGone(name, 60*time.Second)
		}
	})

	checkStartedOnce(t, e, steady...)
	for _, note := range record.Stop() {
		t.Errorf("%s", note)
	}
}

// A node without agent is NotReady after the grace period, and Ready again as
// soon as the agent is back; its Pods run on all the while.
func TestAgentStopped(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	node := strconv.Itoa(victim)
	e.Create(e.Pod("running", "busybox:1.37", nil, kit.On(victimName), countedStarts))
	before := e.WaitReady(60*time.Second, "running")[0]

	ready := func() corev1.NodeCondition {
		object, err := e.Client.CoreV1().Nodes().Get(e.Ctx, victimName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return kit.NodeReady(object)
	}
	t.Cleanup(func() { e.Command(t, "start-agent", "--node", node) })
	e.Command(t, "stop-agent", "--node", node)
	// 50 s is the default grace period; the package's own cluster has 20 s.
	e.Eventually(80*time.Second, "node Ready is Unknown", func() (bool, string) {
		c := ready()
		return c.Status == corev1.ConditionUnknown, fmt.Sprintf("%s %s", c.Status, c.Message)
	})
	e.Command(t, "start-agent", "--node", node)
	e.Eventually(10*time.Second, "node Ready", func() (bool, string) {
		c := ready()
		return c.Status == corev1.ConditionTrue, fmt.Sprintf("%s %s", c.Status, c.Message)
	})
	// The controller manager marked the Pod not Ready; the agent sets that right.
	after := e.WaitReady(30*time.Second, "running")[0]
	was, is := kit.Status(before, "main"), kit.Status(after, "main")
	if was.ContainerID != is.ContainerID || is.RestartCount != 0 {
		t.Errorf("container %s with %d restarts, before %s", is.ContainerID, is.RestartCount, was.ContainerID)
	}
	checkStartedOnce(t, e, "running")
}
