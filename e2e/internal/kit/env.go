package kit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
)

// Env is one test's part of the cluster: a namespace of its own.
type Env struct {
	*Cluster
	t         testing.TB
	Namespace string
	Ctx       context.Context
}

// New makes a namespace, which is removed at the end. If the test has failed,
// its Pods and events are printed first.
func New(t testing.TB) *Env {
	t.Helper()
	if current == nil {
		t.Fatal("kit.Main has not run: the package needs a TestMain")
	}
	return current.New(t)
}

// New is [New] on a cluster made by [Up].
func (c *Cluster) New(t testing.TB) *Env {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	e := &Env{Cluster: c, t: t, Ctx: ctx}
	ns, err := e.Client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create namespace: %v", err)
	}
	e.Namespace = ns.Name
	t.Cleanup(func() {
		defer cancel()
		if c.removed {
			return
		}
		if t.Failed() {
			e.Dump()
		}
		if err := e.Client.CoreV1().Namespaces().Delete(ctx, e.Namespace, metav1.DeleteOptions{}); err != nil {
			t.Errorf("delete namespace: %v", err)
		}
	})
	// Pods are refused until their ServiceAccount is there.
	e.Eventually(30*time.Second, "the default ServiceAccount", func() (bool, string) {
		_, err := e.Client.CoreV1().ServiceAccounts(e.Namespace).Get(ctx, "default", metav1.GetOptions{})
		return err == nil, fmt.Sprint(err)
	})
	return e
}

// In is the same namespace in a subtest, which is then the one that fails.
func (e *Env) In(t testing.TB) *Env {
	sub := *e
	sub.t = t
	return &sub
}

// Dump prints what explains a failure.
func (e *Env) Dump() {
	// kubectl wants a selector for the logs of all Pods: none has this label.
	logsOfAll := []string{"logs", "--selector", "!gantry.local/none", "--all-containers", "--prefix", "--tail", "20"}
	for _, args := range [][]string{{"get", "nodes,pods", "-o", "wide"}, {"describe", "pods"}, logsOfAll} {
		out, errOut, err := e.Kubectl(e.Ctx, append([]string{"-n", e.Namespace}, args...)...)
		if err != nil {
			out += fmt.Sprintf("%v %s", err, errOut)
		}
		e.t.Logf("kubectl %s:\n%s", strings.Join(args, " "), out)
	}
	logs, err := filepath.Glob(filepath.Join(e.Dir(), "log", "agent-*.log"))
	if err != nil {
		e.t.Errorf("the agents' logs: %v", err)
	}
	for _, log := range logs {
		e.t.Logf("%s:\n%s", filepath.Base(log), e.telling(log))
	}
}

// telling are the newest lines of an agent's log that warn, or name the test's namespace.
func (e *Env) telling(log string) string {
	const most = 60
	content, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	var lines []string
	for line := range strings.Lines(string(content)) {
		if strings.Contains(line, " WARN ") || strings.Contains(line, "ERROR ") || strings.Contains(line, e.Namespace) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-most):], "")
}

// Image is the full name of one of the registry's images.
func (e *Env) Image(name string) string { return e.Registry + "/" + name }

// Pod is a Pod with one container "main"; changes are applied to it.
func (e *Env) Pod(name, image string, command []string, changes ...func(*corev1.Pod)) *corev1.Pod {
	grace := int64(2)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: e.Namespace, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers:                    []corev1.Container{{Name: "main", Image: e.Image(image), Command: command}},
		},
	}
	for _, change := range changes {
		change(pod)
	}
	return pod
}

// On binds a Pod to a node without asking the scheduler.
func On(node string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.NodeName = node }
}

// Never sets restartPolicy: Never.
func Never(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }

// Grace sets terminationGracePeriodSeconds.
func Grace(seconds int64) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = &seconds }
}

// Limit sets a resource limit (and so the request) of the first container.
func Limit(name corev1.ResourceName, quantity string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{name: resource.MustParse(quantity)}
	}
}

// Forever is a command that does nothing and ends at once on SIGTERM.
var Forever = []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"}

// Create creates Pods.
func (e *Env) Create(pods ...*corev1.Pod) {
	e.t.Helper()
	for _, pod := range pods {
		if _, err := e.Client.CoreV1().Pods(e.Namespace).Create(e.Ctx, pod, metav1.CreateOptions{}); err != nil {
			e.t.Fatalf("create Pod %s: %v", pod.Name, err)
		}
	}
}

// Get returns a Pod.
func (e *Env) Get(name string) *corev1.Pod {
	e.t.Helper()
	pod, err := e.Client.CoreV1().Pods(e.Namespace).Get(e.Ctx, name, metav1.GetOptions{})
	if err != nil {
		e.t.Fatalf("get Pod %s: %v", name, err)
	}
	return pod
}

// Delete deletes a Pod with its own grace.
func (e *Env) Delete(name string) {
	e.t.Helper()
	if err := e.Client.CoreV1().Pods(e.Namespace).Delete(e.Ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		e.t.Fatalf("delete Pod %s: %v", name, err)
	}
}

// DeleteAll deletes all Pods of the namespace and waits until they are gone.
func (e *Env) DeleteAll(timeout time.Duration) {
	e.t.Helper()
	if err := e.Client.CoreV1().Pods(e.Namespace).DeleteCollection(e.Ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		e.t.Fatalf("delete all Pods: %v", err)
	}
	e.Eventually(timeout, "all Pods are gone", func() (bool, string) {
		list, err := e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{})
		if err != nil {
			return false, err.Error()
		}
		return len(list.Items) == 0, fmt.Sprintf("%d are left", len(list.Items))
	})
}

// WaitAlone waits until the Pods of earlier tests have left a node: their
// namespaces are removed without waiting for it, and until then they take room.
func (e *Env) WaitAlone(node string) {
	e.t.Helper()
	e.Eventually(time.Minute, "no Pods of other tests on "+node, func() (bool, string) {
		list, err := e.Client.CoreV1().Pods("").List(e.Ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		if err != nil {
			return false, err.Error()
		}
		var others []string
		for _, pod := range list.Items {
			if strings.HasPrefix(pod.Namespace, "e2e-") && pod.Namespace != e.Namespace {
				others = append(others, pod.Namespace+"/"+pod.Name)
			}
		}
		return len(others) == 0, strings.Join(others, " ")
	})
}

// WaitPod watches a Pod until check holds; check also says what it sees.
func (e *Env) WaitPod(name string, timeout time.Duration, what string, check func(*corev1.Pod) (bool, string)) *corev1.Pod {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.Ctx, timeout)
	defer cancel()
	seen := "nothing"
	var last *corev1.Pod
	_, err := watchtools.UntilWithSync(ctx, e.podWatch(name), &corev1.Pod{}, nil, func(event watch.Event) (bool, error) {
		pod, ok := event.Object.(*corev1.Pod)
		if !ok {
			return false, fmt.Errorf("watch: %s %v", event.Type, event.Object)
		}
		if event.Type == watch.Deleted {
			return false, fmt.Errorf("Pod %s was deleted", name)
		}
		var done bool
		done, seen = check(pod)
		last = pod
		return done, nil
	})
	if err != nil {
		e.t.Fatalf("Pod %s: waited %s for: %s; seen: %s (%v)", name, timeout, what, seen, err)
	}
	return last
}

// WaitGone waits until a Pod's object is gone and returns how long that took.
func (e *Env) WaitGone(name string, timeout time.Duration) time.Duration {
	e.t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(e.Ctx, timeout)
	defer cancel()
	gone := func(store cache.Store) (bool, error) {
		_, exists, err := store.GetByKey(e.Namespace + "/" + name)
		return !exists, err
	}
	_, err := watchtools.UntilWithSync(ctx, e.podWatch(name), &corev1.Pod{}, gone, func(event watch.Event) (bool, error) {
		return event.Type == watch.Deleted, nil
	})
	if err != nil {
		e.t.Fatalf("Pod %s is not gone after %s: %v", name, timeout, err)
	}
	return time.Since(start)
}

func (e *Env) podWatch(name string) *cache.ListWatch {
	pods := e.Client.CoreV1().Pods(e.Namespace)
	selector := fields.Everything()
	if name != "" {
		selector = fields.OneTermEqualSelector("metadata.name", name)
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			options.FieldSelector = selector.String()
			return pods.List(ctx, options)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.FieldSelector = selector.String()
			return pods.Watch(ctx, options)
		},
	}
}

// Ready reports whether a Pod is Ready.
func Ready(pod *corev1.Pod) (bool, string) {
	if i := slices.IndexFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady }); i >= 0 {
		c := pod.Status.Conditions[i]
		return c.Status == corev1.ConditionTrue, Describe(pod)
	}
	return false, Describe(pod)
}

// Describe is a Pod's state in one line.
func Describe(pod *corev1.Pod) string {
	var b strings.Builder
	fmt.Fprintf(&b, "phase %s %s %s", pod.Status.Phase, pod.Status.Reason, pod.Status.Message)
	for _, s := range append(slices.Clone(pod.Status.InitContainerStatuses), pod.Status.ContainerStatuses...) {
		fmt.Fprintf(&b, "; %s: ready %t, restarts %d", s.Name, s.Ready, s.RestartCount)
		switch {
		case s.State.Waiting != nil:
			fmt.Fprintf(&b, ", waiting: %s: %s", s.State.Waiting.Reason, s.State.Waiting.Message)
		case s.State.Terminated != nil:
			fmt.Fprintf(&b, ", terminated: %s: exit code %d: %s", s.State.Terminated.Reason, s.State.Terminated.ExitCode, s.State.Terminated.Message)
		case s.State.Running != nil:
			fmt.Fprint(&b, ", running")
		}
	}
	return b.String()
}

// WaitReady waits until Pods are Ready and returns them.
func (e *Env) WaitReady(timeout time.Duration, names ...string) []*corev1.Pod {
	e.t.Helper()
	deadline := time.Now().Add(timeout)
	var pods []*corev1.Pod
	for _, name := range names {
		pods = append(pods, e.WaitPod(name, max(time.Until(deadline), time.Second), "Ready", Ready))
	}
	return pods
}

// Status is the status of one container of a Pod.
func Status(pod *corev1.Pod, container string) corev1.ContainerStatus {
	for _, s := range pod.Status.ContainerStatuses {
		if s.Name == container {
			return s
		}
	}
	return corev1.ContainerStatus{Name: container}
}

// Eventually repeats check, for what cannot be watched.
func (e *Env) Eventually(timeout time.Duration, what string, check func() (bool, string)) {
	e.t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		done, seen := check()
		if done {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("waited %s for: %s; seen: %s", timeout, what, seen)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// Exec runs a command in a container with kubectl exec and returns its output.
func (e *Env) Exec(pod, container string, command ...string) string {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.Ctx, 30*time.Second)
	defer cancel()
	out, errOut, err := e.Kubectl(ctx, append([]string{"exec", "-n", e.Namespace, pod, "-c", container, "--"}, command...)...)
	if err != nil {
		e.t.Fatalf("kubectl exec %s -c %s -- %s: %v\n%s%s", pod, container, strings.Join(command, " "), err, out, errOut)
	}
	return out
}

// Logs is what a container has written so far, by kubectl logs.
func (e *Env) Logs(pod, container string, args ...string) string {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.Ctx, 30*time.Second)
	defer cancel()
	out, errOut, err := e.Kubectl(ctx, append([]string{"logs", "-n", e.Namespace, pod, "-c", container}, args...)...)
	if err != nil {
		e.t.Fatalf("kubectl logs %s -c %s: %v\n%s", pod, container, err, errOut)
	}
	return out
}

// Events are the events about a Pod, as "Reason: message".
func (e *Env) Events(pod string) []string {
	e.t.Helper()
	list, err := e.Client.CoreV1().Events(e.Namespace).List(e.Ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod})
	if err != nil {
		e.t.Fatalf("list events: %v", err)
	}
	var events []string
	for _, event := range list.Items {
		events = append(events, event.Reason+": "+event.Message)
	}
	return events
}

// WaitEvent waits for an event about a Pod that contains a text.
func (e *Env) WaitEvent(pod, text string, timeout time.Duration) {
	e.t.Helper()
	e.Eventually(timeout, fmt.Sprintf("an event of Pod %s with %q", pod, text), func() (bool, string) {
		events := e.Events(pod)
		return slices.ContainsFunc(events, func(s string) bool { return strings.Contains(s, text) }), strings.Join(events, "\n")
	})
}

// Nodes are the names of all nodes, sorted.
func (e *Env) Nodes() []string {
	e.t.Helper()
	list, err := e.Client.CoreV1().Nodes().List(e.Ctx, metav1.ListOptions{})
	if err != nil {
		e.t.Fatalf("list nodes: %v", err)
	}
	var names []string
	for _, node := range list.Items {
		names = append(names, node.Name)
	}
	slices.Sort(names)
	if len(names) == 0 {
		e.t.Fatal("the cluster has no nodes")
	}
	return names
}
