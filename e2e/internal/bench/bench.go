// Package bench measures what nodes cost: Gantry beside a stock node of
// kubelet, containerd and runc, on the same control plane, in the same run.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"gantry.local/e2e/internal/cluster"
)

// Names of the stacks.
const (
	Gantry = "gantry"
	Stock  = "kubelet"
)

// Options are what a run can be told.
type Options struct {
	// Scenarios are names or patterns of those to run; all that run by default if empty.
	Scenarios []string
	// Pods are the numbers of Pods for `burst` and `idle`, ascending.
	Pods []int
	// Churn is the number of Pods that come and go in `churn`.
	Churn int
	// Quick makes rounds fewer and shorter: good for trying, not for claims.
	Quick    bool
	Progress io.Writer
}

// Bench is a run on a cluster with one node for each stack.
type Bench struct {
	Options
	home   cluster.Home
	name   string
	config *rest.Config
	client kubernetes.Interface
	// registry is host:port.
	registry string
	pods     *pods
	stacks   []*Stack
	serial   atomic.Int64
}

// Stack is one of the two kinds of node.
type Stack struct {
	Name string
	// index is the number of the node.
	index int
	bench *Bench
}

// StackOf is the name of a node's stack.
func StackOf(n cluster.Node) string {
	if n.Stock {
		return Stock
	}
	return Gantry
}

// Node is the name of the stack's Node object.
func (s *Stack) Node() string { return cluster.Node{Index: s.index}.Name() }

// Open prepares a run on a cluster that has been made. It measures the stacks
// that the cluster has nodes of; the first of each.
func Open(ctx context.Context, home cluster.Home, name string, options Options) (*Bench, error) {
	b := &Bench{Options: options, home: home, name: name}
	var kubeconfig string
	if err := b.with(func(c *cluster.Cluster) error {
		kubeconfig, b.registry = c.Kubeconfig(), c.Registry()
		for _, n := range c.Nodes {
			stack := StackOf(n)
			known := slices.ContainsFunc(b.stacks, func(s *Stack) bool { return s.Name == stack })
			if !known && !n.Guest {
				b.stacks = append(b.stacks, &Stack{Name: stack, index: n.Index, bench: b})
			}
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if len(b.stacks) == 0 {
		return nil, fmt.Errorf("cluster %s has no node to measure", name)
	}
	var err error
	if b.config, err = clientcmd.BuildConfigFromFlags("", kubeconfig); err != nil {
		return nil, err
	}
	// The client shall not be what is measured.
	b.config.QPS, b.config.Burst = 5000, 5000
	b.config.ContentType, b.config.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf,application/json"
	if b.client, err = kubernetes.NewForConfig(b.config); err != nil {
		return nil, err
	}
	if err := b.makeNamespace(ctx); err != nil {
		return nil, err
	}
	if b.pods, err = watchPods(ctx, b); err != nil {
		return nil, err
	}
	return b, nil
}

// with runs work on the locked cluster with its present state.
func (b *Bench) with(work func(*cluster.Cluster) error) error {
	c, err := b.home.Open(b.name)
	if err != nil {
		return err
	}
	defer c.Close()
	return work(c)
}

// image is the full name of an image of the cluster's registry.
func (b *Bench) image(name string) string { return b.registry + "/" + name }

// Names of what Pods of the namespace mount.
const (
	configMapName = "settings"
	secretName    = "credentials"
)

// makeNamespace makes the namespace and what the Pods in it need.
func (b *Bench) makeNamespace(ctx context.Context) error {
	core := b.client.CoreV1()
	object := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Name: name} }
	_, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: object(Namespace)}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	content := map[string]string{"one": "1", "two": strings.Repeat("2", 1000), "three": "3"}
	_, err = core.ConfigMaps(Namespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: object(configMapName), Data: content}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	_, err = core.Secrets(Namespace).Create(ctx, &corev1.Secret{ObjectMeta: object(secretName), StringData: content}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	// Controllers make these soon after; Pods wait for them otherwise.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		_, err1 := core.ServiceAccounts(Namespace).Get(ctx, "default", metav1.GetOptions{})
		_, err2 := core.ConfigMaps(Namespace).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		if err = errors.Join(err1, err2); err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("namespace %s is not ready for Pods: %w", Namespace, err)
		}
	}
}

// Scenario is something that is done to both stacks in turn.
type Scenario struct {
	Name string
	// What is done, in one sentence.
	What    string
	Metrics []Metric
	// Rounds is how often each stack has its turn; QuickRounds with --quick.
	Rounds, QuickRounds int
	// OnDemand says that it runs only when it is named.
	OnDemand bool
	// Turn is one stack's turn. It leaves no Pods behind.
	Turn func(ctx context.Context, s *Stack, r *Recorder) error
}

// Metric is one row of the table. Less is better for every metric.
type Metric struct {
	// Name is unique; it begins with the scenario's name and a slash.
	Name, Title, Unit string
	// Bar is the part of what the stock node needs that Gantry may need; 0: none is set.
	Bar float64
}

// Recorder takes the samples of one turn.
type Recorder struct {
	values map[string][]float64
	notes  map[string]any
}

// add records samples of a metric, which is named without its scenario's name.
func (r *Recorder) add(metric string, values ...float64) {
	r.values[metric] = append(r.values[metric], values...)
}

// note keeps further facts about the turn, for the JSON.
func (r *Recorder) note(name string, fact any) { r.notes[name] = fact }

// Run measures the chosen scenarios that the result does not have yet. It saves
// the result after each, so what ends a run of an hour costs one scenario.
func (b *Bench) Run(ctx context.Context, result *Result, file string) error {
	chosen, err := b.choose()
	if err != nil {
		return err
	}
	if err := b.sweep(ctx); err != nil {
		return err
	}
	result.began = time.Now()
	if err := b.warm(ctx); err != nil {
		return err
	}
	return b.measure(ctx, chosen, result, file)
}

// measure ends with the first scenario that fails, and what it measured of that
// is not in the result.
func (b *Bench) measure(ctx context.Context, scenarios []Scenario, result *Result, file string) error {
	for _, scenario := range scenarios {
		if result.has(scenario.Name) {
			b.say("%s: %s has it", scenario.Name, file)
			continue
		}
		if err := b.run(ctx, scenario, result); err != nil {
			result.dropIncomplete()
			b.say("FAILED %s: %v", scenario.Name, err)
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted in scenario %s: %w", scenario.Name, err)
			}
			return fmt.Errorf("scenario %s failed: %w", scenario.Name, err)
		}
		result.Complete = append(result.Complete, scenario.Name)
		result.finish()
		if err := result.Save(file); err != nil {
			// The file does not have it.
			result.Complete = result.Complete[:len(result.Complete)-1]
			result.dropIncomplete()
			return fmt.Errorf("save scenario %s: %w", scenario.Name, err)
		}
	}
	return nil
}

// Names are those of the chosen scenarios, each of them once.
func (o Options) Names() ([]string, error) {
	chosen, err := (&Bench{Options: o}).choose()
	var names []string
	for _, s := range chosen {
		if !slices.Contains(names, s.Name) {
			names = append(names, s.Name)
		}
	}
	return names, err
}

func (b *Bench) choose() ([]Scenario, error) {
	all := b.scenarios()
	if len(b.Scenarios) == 0 {
		return slices.DeleteFunc(all, func(s Scenario) bool { return s.OnDemand }), nil
	}
	var chosen []Scenario
	for _, pattern := range b.Scenarios {
		found := false
		for _, s := range all {
			matches, err := path.Match(pattern, s.Name)
			if err != nil {
				return nil, fmt.Errorf("--scenarios %q: %w", pattern, err)
			}
			if matches {
				found = true
				chosen = append(chosen, s)
			}
		}
		if !found {
			var names []string
			for _, s := range all {
				names = append(names, s.Name)
			}
			return nil, fmt.Errorf("--scenarios %q: there are %s", pattern, strings.Join(names, " "))
		}
	}
	return chosen, nil
}

// run gives each stack its turns, in an order that changes from round to round,
// so that neither always has the warmer caches or the quieter machine.
func (b *Bench) run(ctx context.Context, scenario Scenario, result *Result) error {
	rounds := scenario.Rounds
	if b.Quick {
		rounds = scenario.QuickRounds
	}
	b.say("%s: %s", scenario.Name, scenario.What)
	for round := range rounds {
		stacks := slices.Clone(b.stacks)
		if round%2 == 1 {
			slices.Reverse(stacks)
		}
		for _, s := range stacks {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			r := &Recorder{values: map[string][]float64{}, notes: map[string]any{}}
			began := time.Now()
			if err := scenario.Turn(ctx, s, r); err != nil {
				return fmt.Errorf("%s, round %d: %w", s.Name, round+1, err)
			}
			result.add(scenario, s.Name, r)
			b.say("  round %d/%d  %-8s %6.1f s  %s", round+1, rounds, s.Name, time.Since(began).Seconds(), r.brief(scenario))
		}
	}
	return nil
}

// brief is the turn's medians in one line.
func (r *Recorder) brief(scenario Scenario) string {
	var parts []string
	for _, m := range scenario.Metrics {
		short := strings.TrimPrefix(m.Name, scenario.Name+"/")
		if values := r.values[short]; len(values) > 0 {
			parts = append(parts, fmt.Sprintf("%s %s %s", short, number(summarize(values).Median), m.Unit))
		}
	}
	return strings.Join(parts, ", ")
}

// warm lets each node pull the image that most Pods are made of, and run one.
func (b *Bench) warm(ctx context.Context) error {
	for _, s := range b.stacks {
		for range 2 {
			name := s.name("warm")
			if _, err := s.start(ctx, s.pod(name)); err != nil {
				return err
			}
			if _, err := s.stop(ctx, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep removes the Pods that an interrupted run has left on a cluster that was kept.
func (b *Bench) sweep(ctx context.Context) error {
	for _, s := range b.stacks {
		// It may have ended while the agent was stopped.
		if err := b.with(func(c *cluster.Cluster) error { return c.StartAgent(s.index) }); err != nil {
			return err
		}
	}
	list, err := b.client.CoreV1().Pods(Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, pod := range list.Items {
		if err := b.delete(ctx, pod.Name); err != nil {
			return err
		}
	}
	for _, pod := range list.Items {
		if _, err := b.pods.untilGone(ctx, pod.Name); err != nil {
			return err
		}
		b.pods.forget(pod.Name)
	}
	return nil
}

func (b *Bench) say(format string, args ...any) {
	fmt.Fprintf(b.Progress, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// pause waits, unless the run is ended.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func ms(d time.Duration) float64      { return d.Seconds() * 1000 }
func seconds(d time.Duration) float64 { return d.Seconds() }
