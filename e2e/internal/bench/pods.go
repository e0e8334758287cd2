package bench

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// Namespace holds everything that is measured.
const Namespace = "bench"

// patience is how long one Pod may take for what is expected of it.
const patience = 5 * time.Minute

// sight is what a watch has shown of one Pod.
type sight struct {
	pod *corev1.Pod
	// ready and gone are when the watch told it for the first time.
	ready, gone time.Time
	// flaps is how often the Pod lost Ready while nobody had deleted it.
	flaps int
}

func (s sight) isReady() bool { return !s.ready.IsZero() }
func (s sight) isGone() bool  { return !s.gone.IsZero() }
func (s sight) hasEnded() bool {
	return s.pod != nil && (s.pod.Status.Phase == corev1.PodSucceeded || s.pod.Status.Phase == corev1.PodFailed)
}

// pods follows all Pods of the namespace with one watch.
type pods struct {
	lock    sync.Mutex
	seen    map[string]*sight
	changed chan struct{} // closed and replaced at every change
}

func watchPods(ctx context.Context, b *Bench) (*pods, error) {
	p := &pods{seen: map[string]*sight{}, changed: make(chan struct{})}
	factory := informers.NewSharedInformerFactoryWithOptions(b.client, 0, informers.WithNamespace(Namespace))
	informer := factory.Core().V1().Pods().Informer()
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { p.note(object, false) },
		UpdateFunc: func(_, object any) { p.note(object, false) },
		DeleteFunc: func(object any) { p.note(object, true) },
	}); err != nil {
		return nil, err
	}
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil, fmt.Errorf("the watch of Pods did not start: %w", context.Cause(ctx))
	}
	return p, nil
}

func (p *pods) note(object any, deleted bool) {
	now := time.Now()
	if unknown, ok := object.(cache.DeletedFinalStateUnknown); ok {
		object = unknown.Obj
	}
	pod, ok := object.(*corev1.Pod)
	if !ok {
		return
	}
	p.lock.Lock()
	defer p.lock.Unlock()
	s := p.seen[pod.Name]
	if s == nil {
		s = &sight{}
		p.seen[pod.Name] = s
	}
	if ready(pod) {
		if s.ready.IsZero() {
			s.ready = now
		}
	} else if s.pod != nil && ready(s.pod) && pod.DeletionTimestamp == nil {
		s.flaps++
	}
	s.pod = pod
	if deleted {
		s.gone = now
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

func ready(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// until waits for a Pod to be as wanted and returns how the watch showed it.
func (p *pods) until(ctx context.Context, name, what string, wanted func(sight) bool) (sight, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		p.lock.Lock()
		s := p.seen[name]
		changed := p.changed
		var now sight
		if s != nil {
			now = *s
		}
		p.lock.Unlock()
		if s != nil && wanted(now) {
			return now, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return now, fmt.Errorf("Pod %s is not %s: %w: %s", name, what, context.Cause(ctx), state(now.pod))
		}
	}
}

func (p *pods) untilReady(ctx context.Context, name string) (sight, error) {
	return p.until(ctx, name, "Ready", sight.isReady)
}

func (p *pods) untilGone(ctx context.Context, name string) (sight, error) {
	return p.until(ctx, name, "gone", sight.isGone)
}

// forget lets a later Pod have the name of one that is gone.
func (p *pods) forget(name string) {
	p.lock.Lock()
	defer p.lock.Unlock()
	delete(p.seen, name)
}

// state says in one line where a Pod stands.
func state(pod *corev1.Pod) string {
	if pod == nil {
		return "the watch has not shown it"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "phase %s %s %s", pod.Status.Phase, pod.Status.Reason, pod.Status.Message)
	for _, c := range pod.Status.ContainerStatuses {
		switch {
		case c.State.Waiting != nil:
			fmt.Fprintf(&b, "; container %s waits: %s %s", c.Name, c.State.Waiting.Reason, c.State.Waiting.Message)
		case c.State.Terminated != nil:
			fmt.Fprintf(&b, "; container %s ended: %d %s %s", c.Name, c.State.Terminated.ExitCode, c.State.Terminated.Reason, c.State.Terminated.Message)
		}
	}
	return b.String()
}

// pod is a Pod bound to the stack's node with one container that waits, and ends
// at once when it is asked to.
func (s *Stack) pod(name string) *corev1.Pod {
	grace := int64(30)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"stack": s.Name}},
		Spec: corev1.PodSpec{
			NodeName:                      s.Node(),
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "main", Image: s.bench.image("busybox:1.37"),
				Command: []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"},
			}},
		},
	}
}

// name is a name that no Pod has had before.
func (s *Stack) name(purpose string) string {
	return fmt.Sprintf("%s-%s-%d", purpose, s.Name, s.bench.serial.Add(1))
}

func (s *Stack) names(purpose string, count int) []string {
	names := make([]string, count)
	for i := range names {
		names[i] = s.name(purpose)
	}
	return names
}

func (b *Bench) create(ctx context.Context, pod *corev1.Pod) error {
	_, err := b.client.CoreV1().Pods(Namespace).Create(ctx, pod, metav1.CreateOptions{})
	return err
}

func (b *Bench) delete(ctx context.Context, name string) error {
	err := b.client.CoreV1().Pods(Namespace).Delete(ctx, name, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// start creates a Pod and returns how long it took to be Ready.
func (s *Stack) start(ctx context.Context, pod *corev1.Pod) (time.Duration, error) {
	began := time.Now()
	if err := s.bench.create(ctx, pod); err != nil {
		return 0, err
	}
	seen, err := s.bench.pods.untilReady(ctx, pod.Name)
	return seen.ready.Sub(began), err
}

// stop deletes a Pod and returns how long it took to be gone.
func (s *Stack) stop(ctx context.Context, name string) (time.Duration, error) {
	began := time.Now()
	if err := s.bench.delete(ctx, name); err != nil {
		return 0, err
	}
	seen, err := s.bench.pods.untilGone(ctx, name)
	return seen.gone.Sub(began), err
}

// clients is how many requests are on their way at once when many Pods are
// created or deleted.
const clients = 16

// startAll creates Pods at once and returns how long it took each to be Ready
// since the first was created.
func (s *Stack) startAll(ctx context.Context, names []string, podNamed func(name string) *corev1.Pod) ([]time.Duration, error) {
	return s.all(names, func(name string) error { return s.bench.create(ctx, podNamed(name)) }, func(name string) (time.Time, error) {
		seen, err := s.bench.pods.untilReady(ctx, name)
		return seen.ready, err
	})
}

// stopAll deletes Pods at once and returns how long it took each to be gone.
func (s *Stack) stopAll(ctx context.Context, names []string) ([]time.Duration, error) {
	return s.all(names, func(name string) error { return s.bench.delete(ctx, name) }, func(name string) (time.Time, error) {
		seen, err := s.bench.pods.untilGone(ctx, name)
		return seen.gone, err
	})
}

func (s *Stack) all(names []string, act func(string) error, wait func(string) (time.Time, error)) ([]time.Duration, error) {
	began := time.Now()
	queue, failures := make(chan string), make(chan error, clients)
	for range clients {
		go func() {
			var failure error
			for name := range queue {
				if failure == nil {
					failure = act(name)
				}
			}
			failures <- failure
		}()
	}
	for _, name := range names {
		queue <- name
	}
	close(queue)
	for range clients {
		if err := <-failures; err != nil {
			return nil, err
		}
	}
	took := make([]time.Duration, 0, len(names))
	for _, name := range names {
		at, err := wait(name)
		if err != nil {
			return nil, err
		}
		took = append(took, at.Sub(began))
	}
	return took, nil
}
