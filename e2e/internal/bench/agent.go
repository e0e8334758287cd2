package bench

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"gantry.local/e2e/internal/cluster"
)

// startAgent starts the stack's agent and returns when its program runs, which
// on a stock node a script starts.
func (s *Stack) startAgent() (time.Time, error) {
	var pid int
	err := s.bench.with(func(c *cluster.Cluster) (err error) {
		if err := c.StartAgent(s.index); err != nil {
			return err
		}
		pid, err = c.AgentPID(s.index)
		return err
	})
	if err != nil {
		return time.Time{}, err
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			return time.Time{}, fmt.Errorf("the agent has ended: %w", err)
		}
		if filepath.Base(program) != "bash" {
			return time.Now(), nil
		}
	}
	return time.Time{}, errors.New("the agent's script does not come to an end")
}

func (s *Stack) killAgent() error {
	return s.bench.with(func(c *cluster.Cluster) error { return c.StopAgent(s.index, true) })
}

func (b *Bench) coldStart() Scenario {
	return Scenario{
		Name: "cold-start", What: "everything of the node is started, with its certificate and images, and becomes Ready",
		Metrics: []Metric{{Name: "cold-start/ready", Title: "node started until it is Ready", Unit: "s"}},
		Rounds:  6, QuickRounds: 2,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			if err := b.with(func(c *cluster.Cluster) error { return c.StopStack(s.index) }); err != nil {
				return err
			}
			if err := s.markUnknown(ctx); err != nil {
				return err
			}
			began := time.Now()
			if _, err := s.startAgent(); err != nil {
				return err
			}
			at, err := s.untilNodeReady(ctx)
			r.add("ready", seconds(at.Sub(began)))
			if err != nil {
				return err
			}
			return s.settle(ctx)
		},
	}
}

// markUnknown sets the node's Ready condition as the control plane does for a
// node that has been silent for long.
func (s *Stack) markUnknown(ctx context.Context) error {
	now := metav1.Now()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: "NodeStatusUnknown", Message: "Kubelet stopped posting node status.",
		LastHeartbeatTime: now, LastTransitionTime: now,
	}}}})
	if err != nil {
		return err
	}
	_, err = s.bench.client.CoreV1().Nodes().Patch(ctx, s.Node(), types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// untilNodeReady returns when a watch told that the node is Ready.
func (s *Stack) untilNodeReady(ctx context.Context) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w, err := s.bench.client.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + s.Node()})
	if err != nil {
		return time.Time{}, err
	}
	defer w.Stop()
	for change := range w.ResultChan() {
		node, ok := change.Object.(*corev1.Node)
		if !ok || change.Type == watch.Deleted {
			continue
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				return time.Now(), nil
			}
		}
	}
	return time.Time{}, fmt.Errorf("node %s does not become Ready", s.Node())
}

func (b *Bench) restart() Scenario {
	count, kills := 100, 5
	if b.Quick {
		count, kills = 20, 2
	}
	return Scenario{
		Name: "restart", What: fmt.Sprintf("the agent is killed and started with %d Pods running", count),
		Metrics: []Metric{
			{Name: "restart/serving", Title: "agent started with 100 Pods until it answers", Unit: "s", Bar: 1},
			{Name: "restart/new-pod", Title: "agent started with 100 Pods until a new Pod is Ready", Unit: "s"},
			{Name: "restart/flaps", Title: "Ready conditions lost and containers restarted by a kill", Unit: ""},
		},
		Rounds: 2, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			names := s.names("kept", count)
			if _, err := s.startAll(ctx, names, s.pod); err != nil {
				return err
			}
			if err := s.settle(ctx); err != nil {
				return err
			}
			for range kills {
				if err := s.restartOnce(ctx, names, r); err != nil {
					return err
				}
			}
			if _, err := s.stopAll(ctx, names); err != nil {
				return err
			}
			return s.settle(ctx)
		},
	}
}

func (s *Stack) restartOnce(ctx context.Context, kept []string, r *Recorder) error {
	if err := s.killAgent(); err != nil {
		return err
	}
	before := s.bench.pods.disturbances(kept)
	began, err := s.startAgent()
	if err != nil {
		return err
	}
	answered := make(chan error, 1)
	go func() {
		at, err := s.untilServing(ctx)
		r.add("serving", seconds(at.Sub(began)))
		answered <- err
	}()
	fresh := s.name("fresh")
	if err := s.bench.create(ctx, s.pod(fresh)); err != nil {
		return err
	}
	if err := <-answered; err != nil {
		return err
	}
	seen, err := s.bench.pods.untilReady(ctx, fresh)
	if err != nil {
		return err
	}
	r.add("new-pod", seconds(seen.ready.Sub(began)))
	if err := pause(ctx, 5*time.Second); err != nil {
		return err
	}
	r.add("flaps", float64(s.bench.pods.disturbances(kept)-before))
	_, err = s.stop(ctx, fresh)
	return err
}

// disturbances counts what a user of these Pods must not see: Ready lost, containers restarted.
func (p *pods) disturbances(names []string) (count int) {
	p.lock.Lock()
	defer p.lock.Unlock()
	for _, name := range names {
		s := p.seen[name]
		if s == nil || s.pod == nil {
			continue
		}
		count += s.flaps
		for _, c := range s.pod.Status.ContainerStatuses {
			count += int(c.RestartCount)
		}
	}
	return count
}

// untilServing asks the node's HTTPS endpoint until it says that it is well.
func (s *Stack) untilServing(ctx context.Context) (time.Time, error) {
	var address string
	if err := s.bench.with(func(c *cluster.Cluster) (err error) {
		address, err = c.NodeAddress(s.index)
		return err
	}); err != nil {
		return time.Time{}, err
	}
	config, err := rest.TLSConfigFor(s.bench.config)
	if err != nil {
		return time.Time{}, err
	}
	// The node's serving certificate may be one that it made itself.
	config = &tls.Config{InsecureSkipVerify: true, Certificates: slices.Clone(config.Certificates), GetClientCertificate: config.GetClientCertificate}
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := get(ctx, client, "https://"+address+":10250/healthz")
		if err == nil {
			return time.Now(), nil
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("node %s does not answer: %w", s.Node(), err)
		}
	}
}

func get(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 4<<10))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return err
}
