package firstlight

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// Init containers run one after the other, are repeated until they succeed, and
// hold back the others meanwhile.
func TestInitContainers(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	pod := e.Pod("prepared", "busybox:1.37", []string{"sh", "-c", "echo main >> /x/log; exec sleep 3600"}, kit.On(node))
	for _, c := range []struct{ name, script string }{
		{"first", "echo first >> /x/log; test -e /x/again || { touch /x/again; echo failing; exit 3; }"},
		{"second", "echo second >> /x/log"},
	} {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{
			Name: c.name, Image: e.Image("busybox:1.37"), Command: []string{"sh", "-c", c.script},
			VolumeMounts: []corev1.VolumeMount{{Name: "x", MountPath: "/x"}},
		})
	}
	mounted(pod, "x", "/x", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
	e.Create(pod)
	ready := e.WaitReady(90*time.Second, "prepared")[0]
	if got := e.Exec("prepared", "main", "cat", "/x/log"); got != "first\nfirst\nsecond\nmain\n" {
		t.Errorf("the containers ran in the order %q", got)
	}
	if first := ready.Status.InitContainerStatuses[0]; first.RestartCount != 1 || first.State.Terminated == nil || first.State.Terminated.ExitCode != 0 {
		t.Errorf("first: %+v", first)
	}

	failing := e.Pod("unprepared", "busybox:1.37", kit.Forever, kit.On(node), kit.Never)
	failing.Spec.InitContainers = []corev1.Container{{Name: "first", Image: e.Image("busybox:1.37"), Command: []string{"sh", "-c", "exit 4"}}}
	e.Create(failing)
	failed := e.WaitPod("unprepared", 60*time.Second, "failed", func(p *corev1.Pod) (bool, string) {
		return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
	})
	if main := kit.Status(failed, "main"); main.State.Waiting == nil || main.State.Waiting.Reason != "PodInitializing" {
		t.Errorf("main, which was never started: %+v", main.State)
	}
}

// Limits are the kernel's: of a container, of its Pod, and of all Pods together.
func TestLimits(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	limited := func(name string, limits, requests corev1.ResourceList) *corev1.Pod {
		return e.Pod(name, "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Limits: limits, Requests: requests}
		})
	}
	amounts := func(cpu, memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	}
	e.Create(
		limited("guaranteed", amounts("500m", "64Mi"), nil),
		limited("burstable", corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("96Mi")}, amounts("100m", "32Mi")),
		limited("best-effort", nil, nil),
		e.Pod("reader", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			mounted(p, "cgroup", "/cgroup", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/sys/fs/cgroup"}})
		}),
	)
	pods := e.WaitReady(60*time.Second, "guaranteed", "burstable", "best-effort", "reader")
	for i, class := range []corev1.PodQOSClass{corev1.PodQOSGuaranteed, corev1.PodQOSBurstable, corev1.PodQOSBestEffort} {
		if got := pods[i].Status.QOSClass; got != class {
			t.Errorf("Pod %s is %s", pods[i].Name, got)
		}
	}
	// A container sees its own cgroup; on version 1 each controller has one.
	limits := func(pod string) string {
		t.Helper()
		return strings.TrimSpace(e.Exec(pod, "main", "sh", "-c", `cd /sys/fs/cgroup
if [ -e cgroup.controllers ]; then echo $(cat memory.max) $(cat cpu.max)
else echo $(cat memory/memory.limit_in_bytes) $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); fi`))
	}
	if got := limits("guaranteed"); got != fmt.Sprintf("%d 50000 100000", 64<<20) {
		t.Errorf("guaranteed: %s", got)
	}
	if got := limits("burstable"); got != fmt.Sprintf("%d -1 100000", 96<<20) && got != fmt.Sprintf("%d max 100000", 96<<20) {
		t.Errorf("burstable: %s", got)
	}
	// All Pods together have what is allocatable, and the Burstable ones weigh
	// what they request.
	// A Pod looks at the node's side, which may be a guest's.
	kubepods := func(controller, file string) string {
		t.Helper()
		below := "gantry-" + e.Name + "-*-" + node + "/kubepods/" + file
		return strings.TrimSpace(e.Exec("reader", "main", "sh", "-c", "cat /cgroup/"+below+" /cgroup/"+controller+"/"+below+" 2>/dev/null; true"))
	}
	object, err := e.Client.CoreV1().Nodes().Get(e.Ctx, node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	capacity := fmt.Sprint(object.Status.Capacity.Memory().Value())
	if v1, v2 := kubepods("memory", "memory.limit_in_bytes"), kubepods("memory", "memory.max"); v1 != capacity && v2 != capacity {
		t.Errorf("all Pods together may use %q%q bytes of memory, the node has %s and reserves none", v1, v2, capacity)
	}
	e.Eventually(10*time.Second, "the Burstable Pods weigh what they request", func() (bool, string) {
		v1, v2 := kubepods("cpu", "burstable/cpu.shares"), kubepods("cpu", "burstable/cpu.weight")
		var weight int
		if _, err := fmt.Sscan(v1+v2, &weight); err != nil {
			return false, err.Error()
		}
		// 100m are 102 shares, or a weight of 4; other tests may have Pods here as well.
		return v1 != "" && weight >= 102 && weight != 1024 || v2 != "" && weight >= 4, v1 + v2
	})
	for pod, want := range map[string]func(int) bool{
		"guaranteed":  func(score int) bool { return score < 0 || score == agentScore },
		"burstable":   func(score int) bool { return score > 2 && score < 1000 },
		"best-effort": func(score int) bool { return score == 1000 },
	} {
		var score int
		if _, err := fmt.Sscan(e.Exec(pod, "main", "cat", "/proc/1/oom_score_adj"), &score); err != nil || !want(score) {
			t.Errorf("%s: oom_score_adj %d %v", pod, score, err)
		}
	}
}

// The lowest score that a node without CAP_SYS_RESOURCE can give: its own.
const agentScore = 0
