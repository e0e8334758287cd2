package firstlight

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"gantry.local/e2e/internal/conformance"
	"gantry.local/e2e/internal/kit"
)

func sized(cpu, memory string) corev1.ResourceRequirements {
	list := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	return corev1.ResourceRequirements{Requests: list, Limits: list}
}

// Resources of the first container.
func with(cpu, memory string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.Containers[0].Resources = sized(cpu, memory) }
}

func resize(t *testing.T, e *kit.Env, pod, container, cpu, memory string) {
	t.Helper()
	list := fmt.Sprintf(`{"cpu":%q,"memory":%q}`, cpu, memory)
	patch := fmt.Sprintf(`{"spec":{"containers":[{"name":%q,"resources":{"requests":%s,"limits":%s}}]}}`, container, list, list)
	_, err := e.Client.CoreV1().Pods(e.Namespace).Patch(e.Ctx, pod, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "resize")
	if err != nil {
		t.Fatalf("resize Pod %s: %v", pod, err)
	}
}

func resizeConditions(p *corev1.Pod) string {
	var list []string
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress {
			list = append(list, fmt.Sprintf("%s=%s (generation %d): %s", c.Type, c.Reason, c.ObservedGeneration, c.Message))
		}
	}
	return strings.Join(list, "; ")
}

// waitResized waits until the status has an answer to the newest generation and no resize is under way.
func waitResized(e *kit.Env, pod string) *corev1.Pod {
	return e.WaitPod(pod, 60*time.Second, "resized", func(p *corev1.Pod) (bool, string) {
		conditions := resizeConditions(p)
		ready, seen := kit.Ready(p)
		done := ready && conditions == "" && p.Status.ObservedGeneration == p.Generation
		return done, fmt.Sprintf("generation %d of %d, %s %s", p.Status.ObservedGeneration, p.Generation, conditions, seen)
	})
}

// checkSize compares status and cgroup of a container with what it is to have.
func checkSize(t *testing.T, e *kit.Env, pod *corev1.Pod, container, cpu, memory string) {
	t.Helper()
	want := sized(cpu, memory)
	status := kit.Status(pod, container)
	for name, list := range map[string]corev1.ResourceList{"requests": status.Resources.Requests, "limits": status.Resources.Limits, "allocatedResources": status.AllocatedResources} {
		for _, r := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			if got, want := list[r], want.Requests[r]; got.Cmp(want) != 0 {
				t.Errorf("Pod %s: %s.%s of %s is %s instead of %s", pod.Name, name, r, container, got.String(), want.String())
			}
		}
	}
	read := func(files string) string {
		return strings.TrimSpace(e.Exec(pod.Name, container, "sh", "-c", "cat "+files+" 2>/dev/null | head -n 1"))
	}
	quota := strings.Fields(read("/sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
	if wanted := strconv.FormatInt(want.Limits.Cpu().MilliValue()*100, 10); len(quota) == 0 || quota[0] != wanted {
		t.Errorf("Pod %s: quota of %s is %q instead of %s", pod.Name, container, quota, wanted)
	}
	limit := read("/sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes")
	if wanted := strconv.FormatInt(want.Limits.Memory().Value(), 10); limit != wanted {
		t.Errorf("Pod %s: memory limit of %s is %q instead of %s", pod.Name, container, limit, wanted)
	}
}

// lowersScores: a node can lower oom_score_adj. Guests always can.
func lowersScores(t *testing.T, e *kit.Env, name string) bool {
	t.Helper()
	node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var here unix.Utsname
	if err := unix.Uname(&here); err != nil {
		t.Fatal(err)
	}
	can, err := conformance.MachineHas("CAP_SYS_RESOURCE")
	if err != nil {
		t.Fatal(err)
	}
	return can || node.Status.NodeInfo.KernelVersion != unix.ByteSliceToString(here.Release[:])
}

// A running Pod gets other resources in place; a container whose policy asks for it is started anew. The quotas are
// large enough for a slow machine: what prepares a container counts too.
func TestResize(t *testing.T) {
	e := kit.New(t)
	restart := corev1.Container{
		Name: "restarting", Image: e.Image("busybox:1.37"), Command: kit.Forever, Resources: sized("200m", "32Mi"),
		ResizePolicy: []corev1.ContainerResizePolicy{{ResourceName: corev1.ResourceMemory, RestartPolicy: corev1.RestartContainer}},
	}
	e.Create(e.Pod("resized", "busybox:1.37", nil, countedStarts, with("200m", "32Mi"), func(p *corev1.Pod) {
		p.Spec.Containers = append(p.Spec.Containers, restart)
	}))
	before := e.WaitReady(60*time.Second, "resized")[0]
	checkSize(t, e, before, "main", "200m", "32Mi")

	resize(t, e, "resized", "main", "400m", "64Mi")
	grown := waitResized(e, "resized")
	checkSize(t, e, grown, "main", "400m", "64Mi")
	e.WaitEvent("resized", "ResizeCompleted: ", 30*time.Second)

	resize(t, e, "resized", "restarting", "150m", "48Mi")
	restarted := waitResized(e, "resized")
	checkSize(t, e, restarted, "restarting", "150m", "48Mi")
	if n := kit.Status(restarted, "restarting").RestartCount; n != 1 {
		t.Errorf("restarting has restartCount %d", n)
	}
	want := "-997" // of every container of a Guaranteed Pod
	if !lowersScores(t, e, restarted.Spec.NodeName) {
		want = strconv.Itoa(agentScore)
	}
	if got := strings.TrimSpace(e.Exec("resized", "restarting", "cat", "/proc/1/oom_score_adj")); got != want {
		t.Errorf("the restarted container has oom_score_adj %s instead of %s", got, want)
	}

	// Less than is in use: the kernel would kill. It is refused and said so, and can be taken back.
	resize(t, e, "resized", "main", "400m", "16Ki")
	e.WaitPod("resized", 30*time.Second, "an error", func(p *corev1.Pod) (bool, string) {
		conditions := resizeConditions(p)
		return strings.Contains(conditions, "below current usage"), conditions
	})
	resize(t, e, "resized", "main", "200m", "32Mi")
	back := waitResized(e, "resized")
	checkSize(t, e, back, "main", "200m", "32Mi")
	if n := kit.Status(back, "main").RestartCount; n != 0 {
		t.Errorf("main has restartCount %d", n)
	}
	checkStartedOnce(t, e, "resized")
}

// What does not fit waits until another Pod makes room, and the Pod runs on with what it has.
func TestResizeDeferred(t *testing.T) {
	e := kit.New(t)
	node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, victimName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	part := func(of int64) string { return fmt.Sprintf("%dm", node.Status.Allocatable.Cpu().MilliValue()*of/8) }
	e.Create(
		e.Pod("big", "busybox:1.37", kit.Forever, kit.On(victimName), with(part(4), "32Mi")),
		e.Pod("small", "busybox:1.37", kit.Forever, kit.On(victimName), with(part(1), "32Mi")),
	)
	e.WaitReady(60*time.Second, "big", "small")
	resize(t, e, "small", "main", part(6), "32Mi")
	e.WaitPod("small", 30*time.Second, "deferred", func(p *corev1.Pod) (bool, string) {
		conditions := resizeConditions(p)
		return strings.Contains(conditions, "PodResizePending=Deferred") && strings.Contains(conditions, "didn't have enough resource: cpu"), conditions
	})
	checkSize(t, e, e.Get("small"), "main", part(1), "32Mi")
	e.Delete("big")
	checkSize(t, e, waitResized(e, "small"), "main", part(6), "32Mi")
}

// The agent may be killed at any moment of a resize: it comes about all the same, and no container notices.
func TestResizeAgentKilled(t *testing.T) {
	e := kit.New(t)
	node := strconv.Itoa(victim)
	e.Create(e.Pod("resized", "busybox:1.37", nil, kit.On(victimName), countedStarts, with("50m", "32Mi")))
	before := e.WaitReady(60*time.Second, "resized")[0]
	t.Cleanup(func() { e.Command(t, "start-agent", "--node", node) })
	for i, delay := range []time.Duration{0, 5, 15, 40, 100} {
		cpu, memory := fmt.Sprintf("%dm", 60+10*i), fmt.Sprintf("%dMi", 40+8*(i%2))
		resize(t, e, "resized", "main", cpu, memory)
		time.Sleep(delay * time.Millisecond)
		e.Command(t, "kill-agent", "--node", node)
		e.Command(t, "start-agent", "--node", node)
		// the status may be from before the kill: the new agent has to serve first
		e.Eventually(20*time.Second, "exec", func() (bool, string) {
			_, errOut, err := e.Kubectl(e.Ctx, "-n", e.Namespace, "exec", "resized", "-c", "main", "--", "true")
			return err == nil, errOut
		})
		checkSize(t, e, waitResized(e, "resized"), "main", cpu, memory)
	}
	was, is := kit.Status(before, "main"), kit.Status(e.Get("resized"), "main")
	if was.ContainerID != is.ContainerID || is.RestartCount != 0 {
		t.Errorf("container %s with %d restarts, before %s", is.ContainerID, is.RestartCount, was.ContainerID)
	}
	checkStartedOnce(t, e, "resized")
}
