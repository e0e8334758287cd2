// Package memory holds what only the memory controller of cgroup v2 can do:
// throttling and protection by request (KEP-2570), swap (KEP-2400), and killing
// one process instead of a container; and what a node says of controllers that
// it was not given.
//
//	go test ./memory     on this machine if it has pure cgroup v2, otherwise in a guest (hack/guest)
package memory

import (
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

const node = "node-1"

// throttling is memoryThrottlingFactor in kubelet-config.yaml.
const throttling = 0.8

func TestMain(m *testing.M) {
	nodes := []string{"--nodes=0", "--guest-nodes=1", "--guest-swap=1024", "--timeout=5m"}
	if native() {
		nodes = []string{"--nodes=1"}
	}
	kit.Main(m, append(nodes, "--kubelet-config=kubelet-config.yaml")...)
}

func sized(request, limit string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources = corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(request)},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(limit)},
		}
	}
}

// check compares files of the container's cgroup, as it sees it.
func check(t *testing.T, e *kit.Env, pod string, want map[string]int64) {
	t.Helper()
	for file, value := range want {
		got := strings.TrimSpace(e.Exec(pod, "main", "cat", "/sys/fs/cgroup/memory."+file))
		if got != strconv.FormatInt(value, 10) {
			t.Errorf("Pod %s: memory.%s is %s instead of %d", pod, file, got, value)
		}
	}
}

func count(t *testing.T, e *kit.Env, pod, file, key string) int64 {
	t.Helper()
	for line := range strings.Lines(e.Exec(pod, "main", "cat", "/sys/fs/cgroup/memory."+file)) {
		fields := strings.Fields(line)
		if len(fields) == 2 && fields[0] == key || len(fields) == 1 && key == "" {
			n, err := strconv.ParseInt(fields[len(fields)-1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("memory.%s has no %s", file, key)
	return 0
}

const mebi = 1 << 20

// Requests are protected, what is above them is throttled, and the rest goes to swap in proportion to the request.
func TestBurstable(t *testing.T) {
	e := kit.New(t)
	e.Create(e.Pod("bursting", "busybox:1.37", kit.Forever, kit.On(node), sized("64Mi", "160Mi")))
	e.WaitReady(2*time.Minute, "bursting")
	object, err := e.Client.CoreV1().Nodes().Get(e.Ctx, node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var swap int64
	if info := object.Status.NodeInfo.Swap; info != nil && info.Capacity != nil {
		swap = *info.Capacity
	}
	share := int64(float64(64*mebi) * float64(swap) / float64(object.Status.Capacity.Memory().Value()))
	between := 96.0 * mebi
	high := int64(64*mebi+throttling*between) / 4096 * 4096
	if got := count(t, e, "bursting", "swap.max", ""); got < share-4096 || got > share {
		t.Errorf("memory.swap.max is %d instead of %d: %d of swap", got, share, swap)
	}
	check(t, e, "bursting", map[string]int64{"low": 64 * mebi, "min": 0, "high": high, "max": 160 * mebi, "oom.group": 0})
	if swap == 0 {
		return
	}
	// A shell that holds more than is allowed without throttling: part of it is swapped out, and it is not killed.
	held := strconv.Itoa(int(high + 4*mebi))
	e.Exec("bursting", "main", "sh", "-c", "dd if=/dev/zero of=/dev/null bs="+held+" count=2 2>/dev/null")
	if count(t, e, "bursting", "events", "high") == 0 {
		t.Error("it was never throttled")
	}
	if count(t, e, "bursting", "events", "oom_kill") != 0 {
		t.Error("it was killed")
	}
	if count(t, e, "bursting", "swap.peak", "") == 0 {
		t.Error("nothing was swapped out")
	}
}

// All of a Guaranteed Pod is protected; nothing of it is throttled or swapped.
func TestGuaranteed(t *testing.T) {
	e := kit.New(t)
	e.Create(e.Pod("steady", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
		list := corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("32Mi"), corev1.ResourceCPU: resource.MustParse("500m")}
		p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: list, Limits: list}
	}))
	e.WaitReady(2*time.Minute, "steady")
	check(t, e, "steady", map[string]int64{"min": 32 * mebi, "low": 0, "max": 32 * mebi, "swap.max": 0})
	if got := strings.TrimSpace(e.Exec("steady", "main", "cat", "/sys/fs/cgroup/memory.high")); got != "max" {
		t.Errorf("memory.high is %s", got)
	}
}

// With singleProcessOOMKill the process that asks for too much dies alone.
func TestSingleProcessOOMKill(t *testing.T) {
	e := kit.New(t)
	command := []string{"sh", "-c", "dd if=/dev/zero of=/dev/null bs=256M count=1; echo it died of $?; " + kit.Forever[2]}
	e.Create(e.Pod("surviving", "busybox:1.37", command, kit.On(node), kit.Limit(corev1.ResourceMemory, "32Mi")))
	e.WaitReady(2*time.Minute, "surviving")
	e.Eventually(time.Minute, "the process dies", func() (bool, string) {
		log := e.Logs("surviving", "main")
		return strings.Contains(log, "it died of 137"), log
	})
	if status := kit.Status(e.Get("surviving"), "main"); status.State.Running == nil || status.RestartCount != 0 {
		t.Errorf("%s", kit.Describe(e.Get("surviving")))
	}
}
