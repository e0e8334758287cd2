package bench

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"gantry.local/e2e/internal/cluster"
	"gantry.local/e2e/internal/images"
)

func (b *Bench) pull(packing string) Scenario {
	image := map[string]string{"gzip": images.BigGzip, "zstd": images.BigZstd}[packing]
	name := "pull-" + packing
	return Scenario{
		Name: name, What: "an image of six layers and 200 MB, " + packing + ", from the cluster's registry onto a node that has none of it",
		Metrics: []Metric{
			{Name: name + "/pulled", Title: "cold pull of 200 MB, " + packing, Unit: "s", Bar: 0.5},
			{Name: name + "/cpu", Title: "node CPU of a cold pull of 200 MB, " + packing, Unit: "s"},
		},
		Rounds: 5, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			took, cpu, err := s.pull(ctx, image)
			r.add("pulled", took)
			r.add("cpu", cpu)
			return err
		},
	}
}

func (b *Bench) pullFive() Scenario {
	return Scenario{
		Name: "pull-five", What: "five images of 43 MB for five Pods at once",
		Metrics: []Metric{
			{Name: "pull-five/pulled", Title: "five images of 43 MB at once, last one pulled", Unit: "s", Bar: 0.5},
			{Name: "pull-five/cpu", Title: "node CPU of five images at once", Unit: "s"},
		},
		Rounds: 4, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			took, cpu, err := s.pull(ctx, images.Parts...)
			r.add("pulled", took)
			r.add("cpu", cpu)
			return err
		},
	}
}

// pull lets a Pod for each image have it pulled, and returns how long the longest
// took by the nodes' own word, and the CPU seconds of the node. When an event
// arrives says less: Gantry sends those that warn of nothing a little later.
func (s *Stack) pull(ctx context.Context, wanted ...string) (took, cpu float64, err error) {
	for _, image := range wanted {
		if err := s.forget(ctx, image); err != nil {
			return 0, 0, err
		}
	}
	if err := s.settle(ctx); err != nil {
		return 0, 0, err
	}
	names := s.names("pull", len(wanted))
	byName := map[string]string{}
	for i, name := range names {
		byName[name] = wanted[i]
	}
	events, err := s.bench.watchEvents(ctx, "Pulled")
	if err != nil {
		return 0, 0, err
	}
	defer events.stop()
	used, err := s.costOf(ctx, func() error {
		if _, err := s.startAll(ctx, names, func(name string) *corev1.Pod {
			pod := s.pod(name)
			pod.Spec.Containers[0].Image = s.bench.image(byName[name])
			return pod
		}); err != nil {
			return err
		}
		for _, name := range names {
			event, err := events.of(ctx, name)
			if err != nil {
				return err
			}
			// Both stacks use kubelet's words; the others are "already present on machine".
			if !strings.HasPrefix(event.message, "Successfully pulled image") {
				return fmt.Errorf("image %s was not pulled: %s", byName[name], event.message)
			}
			pulled, err := pullTime(event.message)
			if err != nil {
				return err
			}
			took = max(took, seconds(pulled))
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	_, err = s.stopAll(ctx, names)
	return took, seconds(used), err
}

// pullTime is what kubelet's message says: `Successfully pulled image "…" in 1.2s
// (1.3s including waiting). Image size: …`.
func pullTime(message string) (time.Duration, error) {
	_, rest, _ := strings.Cut(message, " (")
	text, _, found := strings.Cut(rest, " including waiting)")
	if !found {
		return 0, fmt.Errorf("event %q says not how long it took", message)
	}
	took, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("event %q: %w", message, err)
	}
	return took, nil
}

// forget removes an image with its layers from the node, as far as no other image has them.
func (s *Stack) forget(ctx context.Context, image string) error {
	var dir, gantry string
	if err := s.bench.with(func(c *cluster.Cluster) (err error) {
		gantry = c.GantryBinary
		dir, err = c.NodeDir(s.index)
		return err
	}); err != nil {
		return err
	}
	full := s.bench.image(image)
	if s.Name == Stock {
		return forgetByCRI(ctx, filepath.Join(dir, "run/containerd.sock"), full)
	}
	out, err := exec.CommandContext(ctx, gantry, "images", "--state-dir="+filepath.Join(dir, "run"), "--rm="+full).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "is not here") {
		return fmt.Errorf("gantry images --rm %s: %w: %s", full, err, out)
	}
	return nil
}

// forgetByCRI also removes what a kubelet keeps of ended Pods for a while:
// their containers hold on to the image's snapshots.
func forgetByCRI(ctx context.Context, socket, image string) error {
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	runtime := runtimeapi.NewRuntimeServiceClient(connection)
	exited := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED}
	containers, err := runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{State: exited}})
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, container := range containers.Containers {
		for {
			_, err := runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: container.Id})
			if err == nil {
				break
			}
			// kubelet may be at it as well; once that is done, removing it again is no error
			if !strings.Contains(err.Error(), "already in removing state") {
				return fmt.Errorf("remove container %s: %w", container.Id, err)
			}
			if err := pause(ctx, 50*time.Millisecond); err != nil {
				return fmt.Errorf("remove container %s, which kubelet removes: %w", container.Id, err)
			}
		}
	}
	if _, err := runtimeapi.NewImageServiceClient(connection).RemoveImage(ctx, &runtimeapi.RemoveImageRequest{
		Image: &runtimeapi.ImageSpec{Image: image},
	}); err != nil {
		return fmt.Errorf("remove image %s: %w", image, err)
	}
	return nil
}

// events are the events of one reason in the namespace.
type events struct {
	seen chan event
	stop func()
	last map[string]event
}

type event struct {
	pod, message string
}

func (b *Bench) watchEvents(ctx context.Context, reason string) (*events, error) {
	list, err := b.client.CoreV1().Events(Namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return nil, err
	}
	w, err := b.client.CoreV1().Events(Namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: "reason=" + reason, ResourceVersion: list.ResourceVersion,
	})
	if err != nil {
		return nil, err
	}
	e := &events{seen: make(chan event, 1024), stop: w.Stop, last: map[string]event{}}
	go func() {
		for change := range w.ResultChan() {
			if object, ok := change.Object.(*corev1.Event); ok {
				e.seen <- event{object.InvolvedObject.Name, object.Message}
			}
		}
	}()
	return e, nil
}

// of waits for a Pod's event.
func (e *events) of(ctx context.Context, pod string) (event, error) {
	for {
		if event, ok := e.last[pod]; ok {
			return event, nil
		}
		select {
		case event := <-e.seen:
			if _, ok := e.last[event.pod]; !ok {
				e.last[event.pod] = event
			}
		case <-time.After(patience):
			return event{}, fmt.Errorf("Pod %s has no such event", pod)
		case <-ctx.Done():
			return event{}, context.Cause(ctx)
		}
	}
}
