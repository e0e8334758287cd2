package firstlight

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"gantry.local/e2e/internal/kit"
)

// shared gives the Pod a volume "work" at /data in all its containers.
func shared(p *corev1.Pod) {
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "work", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	mount := corev1.VolumeMount{Name: "work", MountPath: "/data"}
	for i := range p.Spec.InitContainers {
		p.Spec.InitContainers[i].VolumeMounts = append(p.Spec.InitContainers[i].VolumeMounts, mount)
	}
	for i := range p.Spec.Containers {
		p.Spec.Containers[i].VolumeMounts = append(p.Spec.Containers[i].VolumeMounts, mount)
	}
}

func container(e *kit.Env, name, script string) corev1.Container {
	return corev1.Container{Name: name, Image: e.Image("busybox:1.37"), Command: []string{"sh", "-c", script}}
}

func sidecar(e *kit.Env, name, script string) corev1.Container {
	c, always := container(e, name, script), corev1.ContainerRestartPolicyAlways
	c.RestartPolicy = &always
	return c
}

const forever = "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"

func condition(p *corev1.Pod, kind corev1.PodConditionType) corev1.PodCondition {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return corev1.PodCondition{Type: kind}
}

// allStatuses are the statuses of all containers but ephemeral ones, by name.
func allStatuses(p *corev1.Pod) map[string]corev1.ContainerStatus {
	statuses := map[string]corev1.ContainerStatus{}
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, s := range list {
			statuses[s.Name] = s
		}
	}
	return statuses
}

// One container's exit restarts all of its Pod in the sandbox that it has.
func TestRestartAllContainers(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	never := corev1.ContainerRestartPolicyNever
	e.Create(e.Pod("again", "busybox:1.37", nil, kit.On(node), kit.Never, func(p *corev1.Pod) {
		p.Spec.InitContainers = []corev1.Container{
			container(e, "init", "echo init >> /data/log"),
			sidecar(e, "helper", "echo helper >> /data/log; "+forever),
		}
		source := container(e, "source", "echo source >> /data/log; if [ -f /data/done ]; then "+forever+"; fi; touch /data/done; sleep 3; exit 42")
		source.RestartPolicy = &never
		source.RestartPolicyRules = []corev1.ContainerRestartRule{{
			Action:    corev1.ContainerRestartRuleActionRestartAllContainers,
			ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
		}}
		p.Spec.Containers = []corev1.Container{source, container(e, "main", "echo main >> /data/log; "+forever)}
		shared(p)
	}))
	first := e.WaitReady(60*time.Second, "again")[0]
	began := false
	last := e.WaitPod("again", 60*time.Second, "all containers restarted", func(p *corev1.Pod) (bool, string) {
		c := condition(p, corev1.AllContainersRestarting)
		began = began || c.Status == corev1.ConditionTrue && c.Reason == "RestartAllContainersStarted"
		if i := condition(p, corev1.PodInitialized); i.Status != corev1.ConditionTrue {
			t.Errorf("Initialized is %s: %s", i.Status, i.Message)
		}
		ready, seen := kit.Ready(p)
		return ready && kit.Status(p, "source").RestartCount == 1 && kit.Status(p, "main").RestartCount == 1, seen
	})
	if !began {
		t.Error("AllContainersRestarting was never True")
	}
	if c := condition(last, corev1.AllContainersRestarting); c.Status != corev1.ConditionFalse {
		t.Errorf("AllContainersRestarting is %s after the restart", c.Status)
	}
	for name, s := range allStatuses(last) {
		if s.RestartCount != 1 || s.LastTerminationState.Terminated == nil {
			t.Errorf("%s: %d restarts, last state %+v", name, s.RestartCount, s.LastTerminationState)
		}
	}
	if end := kit.Status(last, "source").LastTerminationState.Terminated; end != nil && end.ExitCode != 42 {
		t.Errorf("source ended with %d", end.ExitCode)
	}
	if end := kit.Status(last, "main").LastTerminationState.Terminated; end != nil && end.Reason != "RestartingAllContainers" {
		t.Errorf("main ended for %s", end.Reason)
	}
	if last.Status.PodIP != first.Status.PodIP {
		t.Errorf("the Pod's IP was %s and is %s", first.Status.PodIP, last.Status.PodIP)
	}
	lines := strings.Fields(e.Exec("again", "main", "cat", "/data/log"))
	if want := "init helper source main init helper source main"; strings.Join(lines, " ") != want {
		t.Errorf("started: %s", strings.Join(lines, " "))
	}
}

// The image of a running Pod may change, also while the one before cannot be
// pulled: then the new one is pulled at once.
func TestImageChange(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	e.Create(e.Pod("changing", "no/such-image:7", kit.Forever, kit.On(node)))
	waiting(t, e, "changing", 60*time.Second, "ImagePullBackOff")
	change := func(image string) {
		t.Helper()
		patch := fmt.Sprintf(`{"spec":{"containers":[{"name":"main","image":%q}]}}`, e.Image(image))
		if _, err := e.Client.CoreV1().Pods(e.Namespace).Patch(e.Ctx, "changing", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	change("busybox:1.37")
	e.WaitReady(8*time.Second, "changing")
	change("nginx:1.28")
	e.WaitPod("changing", 60*time.Second, "restarted with the new image", func(p *corev1.Pod) (bool, string) {
		s := kit.Status(p, "main")
		return s.RestartCount == 1 && s.State.Running != nil && strings.Contains(s.Image, "nginx"), kit.Describe(p)
	})
	e.WaitEvent("changing", "Killing: Container main definition changed, will be restarted", 10*time.Second)
}

// A critical Pod gets the room of others that are not.
func TestPreemption(t *testing.T) {
	t.Parallel()
	own(t, victimName) // others would be ended
	e := kit.New(t)
	e.WaitAlone(victimName)
	name := victimName
	node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cpus := node.Status.Allocatable.Cpu().MilliValue()
	most := strconv.FormatInt(cpus*7/10, 10) + "m"
	e.Create(e.Pod("ordinary", "busybox:1.37", kit.Forever, kit.On(name), kit.Limit(corev1.ResourceCPU, most)),
		e.Pod("bystander", "busybox:1.37", kit.Forever, kit.On(name)))
	e.WaitReady(60*time.Second, "ordinary", "bystander")
	// an ordinary Pod is refused
	e.Create(e.Pod("late", "busybox:1.37", kit.Forever, kit.On(name), kit.Limit(corev1.ResourceCPU, most)))
	e.WaitPod("late", 30*time.Second, "OutOfcpu", func(p *corev1.Pod) (bool, string) {
		return p.Status.Phase == corev1.PodFailed && p.Status.Reason == "OutOfcpu", kit.Describe(p)
	})
	e.Create(e.Pod("critical", "busybox:1.37", kit.Forever, kit.On(name), kit.Limit(corev1.ResourceCPU, most), func(p *corev1.Pod) {
		p.Spec.PriorityClassName = "system-node-critical"
	}))
	ended := e.WaitPod("ordinary", 30*time.Second, "preempted", func(p *corev1.Pod) (bool, string) {
		return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
	})
	if ended.Status.Reason != "Preempting" || ended.Status.Message != "Preempted in order to admit critical pod" {
		t.Errorf("reason %q, message %q", ended.Status.Reason, ended.Status.Message)
	}
	if c := condition(ended, corev1.DisruptionTarget); c.Status != corev1.ConditionTrue || c.Reason != corev1.PodReasonTerminationByKubelet {
		t.Errorf("DisruptionTarget is %q for %q", c.Status, c.Reason)
	}
	e.WaitReady(60*time.Second, "critical")
	e.WaitEvent("ordinary", "Preempting: Preempted in order to admit critical pod", 10*time.Second)
	if ready, seen := kit.Ready(e.Get("bystander")); !ready {
		t.Errorf("bystander: %s", seen)
	}
	// a resize makes room for itself as well
	e.Create(e.Pod("second", "busybox:1.37", kit.Forever, kit.On(name), kit.Limit(corev1.ResourceCPU, strconv.FormatInt(cpus*2/10, 10)+"m")))
	e.WaitReady(60*time.Second, "second")
	more := strconv.FormatInt(cpus*9/10, 10) + "m"
	patch := fmt.Sprintf(`{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":%q},"limits":{"cpu":%q}}}]}}`, more, more)
	if _, err := e.Client.CoreV1().Pods(e.Namespace).Patch(e.Ctx, "critical", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "resize"); err != nil {
		t.Fatal(err)
	}
	e.WaitPod("second", 30*time.Second, "preempted", func(p *corev1.Pod) (bool, string) {
		return p.Status.Phase == corev1.PodFailed && p.Status.Reason == "Preempting", kit.Describe(p)
	})
	resized := waitResized(e, "critical")
	if got := kit.Status(resized, "main").Resources.Limits.Cpu(); got.Cmp(resource.MustParse(more)) != 0 {
		t.Errorf("the critical Pod has %s cpu instead of %s", got, more)
	}
	e.Delete("critical")
	e.WaitGone("critical", 30*time.Second)
}

// What the node cannot do is said by name, and the Pod waits.
func TestUnsupportedFields(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{GenerateName: "safe-"}, Handler: "kata"}
	class, err := e.Client.NodeV1().RuntimeClasses().Create(e.Ctx, class, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Client.NodeV1().RuntimeClasses().Delete(e.Ctx, class.Name, metav1.DeleteOptions{}) })
	users, claim := false, "none"
	e.Create(
		e.Pod("class", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) { p.Spec.RuntimeClassName = &class.Name }),
		e.Pod("claims", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			p.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "gpu", ResourceClaimName: &claim}}
		}),
		e.Pod("users", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) { p.Spec.HostUsers = &users }),
		e.Pod("claim", "busybox:1.37", kit.Forever, kit.On(node), func(p *corev1.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
				NFS: &corev1.NFSVolumeSource{Server: "192.0.2.1", Path: "/"},
			}}}
			p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
		}),
	)
	e.WaitEvent("class", `FailedCreatePodSandBox: Failed to create pod sandbox: failed to get sandbox runtime: no runtime for "kata" is configured`, 30*time.Second)
	e.WaitEvent("claims", "FailedPrepareDynamicResources: Failed to prepare dynamic resources: spec.resourceClaims: gpu", 30*time.Second)
	waiting(t, e, "users", 60*time.Second, "CreateContainerConfigError", "spec.hostUsers")
	e.WaitEvent("claim", "cannot mount volumes of kind nfs", 30*time.Second)
	for _, name := range []string{"class", "claims", "users", "claim"} {
		if phase := e.Get(name).Status.Phase; phase != corev1.PodPending {
			t.Errorf("%s is %s", name, phase)
		}
	}
}

// kubectl debug --target sees the processes of the container it looks at.
func TestDebugTarget(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	e.Create(e.Pod("suspect", "busybox:1.37", []string{"sh", "-c", "sleep 31415; true"}, kit.On(node)))
	e.WaitReady(60*time.Second, "suspect")
	for _, c := range []struct{ name, target string }{{"inside", "main"}, {"beside", ""}} {
		args := []string{"debug", "-n", e.Namespace, "suspect", "--image=" + e.Image("busybox:1.37"), "--container=" + c.name, "--profile=general"}
		if c.target != "" {
			args = append(args, "--target="+c.target)
		}
		if out, errOut, err := e.Kubectl(e.Ctx, append(args, "--", "sh", "-c", "ps; sleep 3600")...); err != nil {
			t.Fatalf("kubectl debug: %v %s%s", err, out, errOut)
		}
		e.WaitPod("suspect", 60*time.Second, c.name+" runs", func(p *corev1.Pod) (bool, string) {
			for _, s := range p.Status.EphemeralContainerStatuses {
				if s.Name == c.name && s.State.Running != nil {
					return true, ""
				}
			}
			return false, fmt.Sprintf("%+v", p.Status.EphemeralContainerStatuses)
		})
		e.Eventually(10*time.Second, "the output of ps", func() (bool, string) {
			logs := e.Logs("suspect", c.name)
			return strings.Contains(logs, "ps"), logs
		})
		if sees := strings.Contains(e.Logs("suspect", c.name), "sleep 31415"); sees != (c.target != "") {
			t.Errorf("%s sees the container's process: %t", c.name, sees)
		}
	}
	if n := kit.Status(e.Get("suspect"), "main").RestartCount; n != 0 {
		t.Errorf("main was restarted %d times", n)
	}
}

// A Pod of the same name and another UID starts while the first one still
// ends; a finalizer keeps the object and brings nothing back to life.
func TestIdentity(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	stubborn := []string{"sh", "-c", "trap '' TERM; while :; do sleep 1; done"}
	create := func(changes ...func(*corev1.Pod)) types.UID {
		e.Create(e.Pod("same", "busybox:1.37", stubborn, append(changes, kit.On(node), kit.Grace(8))...))
		return e.WaitReady(60*time.Second, "same")[0].UID
	}
	first := create()
	zero := int64(0)
	// forced: the object is gone at once, the container has its grace
	if err := e.Client.CoreV1().Pods(e.Namespace).Delete(e.Ctx, "same", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	second := create()
	if first == second {
		t.Fatal("the API server gave a UID twice")
	}
	e.Delete("same")
	e.WaitGone("same", 60*time.Second)

	third := create(func(p *corev1.Pod) { p.Finalizers = []string{"example.com/keep"} })
	e.Delete("same")
	ended := e.WaitPod("same", 60*time.Second, "ended, and kept by its finalizer", func(p *corev1.Pod) (bool, string) {
		return p.UID == third && p.Status.Phase == corev1.PodFailed && p.DeletionTimestamp != nil, kit.Describe(p)
	})
	time.Sleep(3 * time.Second)
	if now := e.Get("same"); now.ResourceVersion != ended.ResourceVersion && now.Status.Phase != corev1.PodFailed {
		t.Errorf("it went on: %s", kit.Describe(now))
	}
	if _, err := e.Client.CoreV1().Pods(e.Namespace).Patch(e.Ctx, "same", types.JSONPatchType, []byte(`[{"op":"remove","path":"/metadata/finalizers"}]`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	e.WaitGone("same", 60*time.Second)
}

// A Node that is deleted under its agent comes back with another UID; its Pods
// do not notice.
func TestNodeDeleted(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	name := victimName
	e.Create(e.Pod("steady", "busybox:1.37", nil, kit.On(name), countedStarts))
	before := e.WaitReady(60*time.Second, "steady")[0]
	nodes := e.Client.CoreV1().Nodes()
	old, err := nodes.Get(e.Ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := nodes.Delete(e.Ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.Eventually(90*time.Second, "a new Node, and Ready", func() (bool, string) {
		node, err := nodes.Get(e.Ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		c := kit.NodeReady(node)
		return node.UID != old.UID && c.Status == corev1.ConditionTrue, fmt.Sprintf("%s %s", c.Status, c.Message)
	})
	e.Create(e.Pod("new", "busybox:1.37", kit.Forever, kit.On(name)))
	e.WaitReady(60*time.Second, "new")
	after := e.WaitReady(30*time.Second, "steady")[0]
	if was, is := kit.Status(before, "main"), kit.Status(after, "main"); was.ContainerID != is.ContainerID {
		t.Errorf("container %s, before %s", is.ContainerID, was.ContainerID)
	}
	checkStartedOnce(t, e, "steady")
}

// A Pod with init container, sidecar, ephemeral container, probes, hooks and other
// resources on the way lives through 20 kills of the agent at any moment, as if
// there had been none.
func TestThroughKills(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	seed := time.Now().UnixNano()
	if text := os.Getenv("GANTRY_KILLS_SEED"); text != "" {
		seed, _ = strconv.ParseInt(text, 10, 64)
	}
	t.Logf("GANTRY_KILLS_SEED=%d", seed)
	random := rand.New(rand.NewSource(seed))
	node := strconv.Itoa(victim)
	t.Cleanup(func() { e.Command(t, "start-agent", "--node", node) })

	dir := t.TempDir()
	exec := func(script string) corev1.ProbeHandler {
		return corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"sh", "-c", script}}}
	}
	e.Create(e.Pod("full", "busybox:1.37", nil, kit.On(victimName), kit.Grace(20), func(p *corev1.Pod) {
		init := container(e, "init", "echo init >> /data/log; sleep 4; echo init done >> /data/log")
		helper := sidecar(e, "helper", "echo helper >> /data/log; trap 'echo helper ends >> /data/log; exit 0' TERM; while :; do sleep 3600 & wait; done")
		helper.StartupProbe = &corev1.Probe{ProbeHandler: exec("test -f /data/log"), PeriodSeconds: 1, FailureThreshold: 60}
		main := container(e, "main", "echo main >> /data/log; trap 'echo main ends >> /data/log; exit 0' TERM; while :; do sleep 3600 & wait; done")
		main.Lifecycle = &corev1.Lifecycle{
			PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"sh", "-c", "touch /data/post"}}},
			PreStop:   &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 2}},
		}
		main.Resources = sized("200m", "32Mi")
		main.ReadinessProbe = &corev1.Probe{ProbeHandler: exec("test -f /data/post"), PeriodSeconds: 1}
		main.LivenessProbe = &corev1.Probe{ProbeHandler: exec("test -f /data/log"), PeriodSeconds: 1, FailureThreshold: 5}
		p.Spec.InitContainers = []corev1.Container{init, helper}
		p.Spec.Containers = []corev1.Container{main}
		shared(p)
		p.Spec.Volumes[0].VolumeSource = corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: dir}}
	}))
	kill := func(most time.Duration) {
		t.Helper()
		time.Sleep(time.Duration(random.Int63n(int64(most))))
		e.Command(t, "kill-agent", "--node", node)
		time.Sleep(time.Duration(random.Int63n(int64(700 * time.Millisecond))))
		e.Command(t, "start-agent", "--node", node)
	}
	for range 8 { // while it starts
		kill(1500 * time.Millisecond)
	}
	before := e.WaitReady(90*time.Second, "full")[0]
	record := e.Record(victimName, "full")
	for i := range 8 { // while it runs
		switch i {
		case 2:
			debug(t, e, "full", "echo debugger >> /data/log; trap 'exit 0' TERM; while :; do sleep 3600 & wait; done")
		case 5:
			resize(t, e, "full", "main", "300m", "48Mi")
		}
		kill(3 * time.Second)
	}
	e.WaitReady(30*time.Second, "full")
	for _, note := range record.Stop() {
		t.Errorf("while it ran: %s", note)
	}
	after := waitResized(e, "full")
	e.Eventually(20*time.Second, "exec", func() (bool, string) {
		_, errOut, err := e.Kubectl(e.Ctx, "-n", e.Namespace, "exec", "full", "-c", "main", "--", "true")
		return err == nil, errOut
	})
	checkSize(t, e, after, "main", "300m", "48Mi")
	if list := after.Status.EphemeralContainerStatuses; len(list) != 1 || list[0].State.Running == nil || list[0].RestartCount != 0 {
		t.Errorf("ephemeral containers: %+v", list)
	}
	for name, s := range allStatuses(after) {
		if s.RestartCount != 0 || s.ContainerID != allStatuses(before)[name].ContainerID {
			t.Errorf("%s: %d restarts, container %s, before %s", name, s.RestartCount, s.ContainerID, allStatuses(before)[name].ContainerID)
		}
	}
	// What the containers did is read on the machine: the agent may not listen yet.
	check := func(when, want string) {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, "log"))
		if err != nil || strings.TrimSpace(string(text)) != want {
			t.Errorf("%s: %q, want %q (%v)", when, text, want, err)
		}
	}
	check("before its end", "init\ninit done\nhelper\nmain\ndebugger")
	e.Delete("full")
	for range 4 { // while it ends
		kill(1200 * time.Millisecond)
	}
	e.WaitGone("full", 60*time.Second)
	check("in the end", "init\ninit done\nhelper\nmain\ndebugger\nmain ends\nhelper ends")
}

// debug adds an ephemeral container that has the volume of shared.
func debug(t *testing.T, e *kit.Env, pod, script string) {
	t.Helper()
	p := e.Get(pod)
	p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
		Name: "debugger", Image: e.Image("busybox:1.37"), Command: []string{"sh", "-c", script},
		VolumeMounts: []corev1.VolumeMount{{Name: "work", MountPath: "/data"}},
	}})
	if _, err := e.Client.CoreV1().Pods(e.Namespace).UpdateEphemeralContainers(e.Ctx, pod, p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}
