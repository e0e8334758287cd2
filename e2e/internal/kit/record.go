package kit

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// Recorder watches Pods and nodes and notes every change that a user of a
// healthy Pod must not see: Ready lost, a container restarted or replaced, the
// Pod gone. Changes between two looks are not missed: the watch delivers each.
type Recorder struct {
	lock  sync.Mutex
	notes []string
	stop  context.CancelFunc
	pods  map[string]bool
}

// Record starts recording the given Pods, and the given node (if any), all of
// which are Ready now.
func (e *Env) Record(node string, pods ...string) *Recorder {
	e.t.Helper()
	ctx, cancel := context.WithCancel(e.Ctx)
	r := &Recorder{stop: cancel, pods: map[string]bool{}}
	for _, name := range pods {
		r.pods[name] = true
	}
	e.t.Cleanup(cancel)
	podFactory := informers.NewSharedInformerFactoryWithOptions(e.Client, 0, informers.WithNamespace(e.Namespace))
	podInformer := podFactory.Core().V1().Pods().Informer()
	nodeFactory := informers.NewSharedInformerFactoryWithOptions(e.Client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("metadata.name", node).String()
	}))
	nodeInformer := nodeFactory.Core().V1().Nodes().Informer()
	handlers := []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandlerFuncs
	}{
		{podInformer, cache.ResourceEventHandlerFuncs{UpdateFunc: r.podChanged, DeleteFunc: r.podGone}},
		{nodeInformer, cache.ResourceEventHandlerFuncs{UpdateFunc: r.nodeChanged}},
	}
	for _, h := range handlers {
		if _, err := h.informer.AddEventHandler(h.handler); err != nil {
			e.t.Fatal(err)
		}
	}
	podFactory.Start(ctx.Done())
	nodeFactory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), podInformer.HasSynced, nodeInformer.HasSynced) {
		e.t.Fatal("recorder: the watch did not start")
	}
	return r
}

// Stop ends the recording and returns what was noted.
func (r *Recorder) Stop() []string {
	r.stop()
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.notes
}

func (r *Recorder) note(format string, args ...any) {
	r.lock.Lock()
	defer r.lock.Unlock()
	r.notes = append(r.notes, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (r *Recorder) podChanged(before, after any) {
	old, now := before.(*corev1.Pod), after.(*corev1.Pod)
	if !r.pods[now.Name] || now.DeletionTimestamp != nil {
		return
	}
	if was, _ := Ready(old); was {
		if is, state := Ready(now); !is {
			r.note("Pod %s lost Ready: %s", now.Name, state)
		}
	}
	if old.Status.PodIP != now.Status.PodIP {
		r.note("Pod %s changed its IP from %q to %q", now.Name, old.Status.PodIP, now.Status.PodIP)
	}
	for _, s := range now.Status.ContainerStatuses {
		was := Status(old, s.Name)
		if was.ContainerID != s.ContainerID {
			r.note("Pod %s: container %s was replaced: %q, before %q", now.Name, s.Name, s.ContainerID, was.ContainerID)
		}
		if was.RestartCount != s.RestartCount {
			r.note("Pod %s: container %s: restartCount %d, before %d", now.Name, s.Name, s.RestartCount, was.RestartCount)
		}
	}
}

func (r *Recorder) podGone(object any) {
	if pod, ok := object.(*corev1.Pod); ok && r.pods[pod.Name] {
		r.note("Pod %s is gone", pod.Name)
	}
}

func (r *Recorder) nodeChanged(before, after any) {
	old, now := NodeReady(before.(*corev1.Node)), NodeReady(after.(*corev1.Node))
	if old.Status != now.Status {
		r.note("node %s: Ready is %s, before %s: %s", after.(*corev1.Node).Name, now.Status, old.Status, now.Message)
	}
}

// NodeReady is a node's Ready condition.
func NodeReady(node *corev1.Node) corev1.NodeCondition {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c
		}
	}
	return corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Message: "no such condition"}
}
