package bench

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/images"
)

// lineLength is that of written lines, the line feed included.
const lineLength = 100

func (b *Bench) writeLog() Scenario {
	size := 200_000_000
	if b.Quick {
		size /= 10
	}
	return Scenario{
		Name: "log-write", What: fmt.Sprintf("a container writes %d MB in lines of %d bytes, each by a write of its own", size/1_000_000, lineLength),
		Metrics: []Metric{
			{Name: "log-write/time", Title: "200 MB of log lines, as the writer sees it", Unit: "s", Bar: 1. / 6},
			{Name: "log-write/cpu", Title: "200 MB of log lines, node CPU, the writer included", Unit: "s", Bar: 1. / 8},
			{Name: "log-write/rest", Title: "200 MB of log lines, node CPU, without the writer's own", Unit: "s"},
			{Name: "log-write/alone-time", Title: "the writes alone, into an empty pipe, time", Unit: "s"},
			{Name: "log-write/alone-cpu", Title: "the writes alone, into an empty pipe, CPU", Unit: "s"},
		},
		Rounds: 4, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			// Both stacks' writers have the same to do: what they take is the
			// least that time and CPU can be.
			alone, err := s.warmLogWriter(ctx, "--alone", strconv.Itoa(size))
			if err != nil {
				return err
			}
			r.add("alone-time", alone.took)
			r.add("alone-cpu", alone.cpu)
			name := s.name("log")
			var writer written
			cpu, err := s.costOf(ctx, func() (err error) {
				writer, err = s.writeLines(ctx, name, strconv.Itoa(size))
				return err
			})
			if err != nil {
				return err
			}
			r.add("time", writer.took)
			r.add("cpu", seconds(cpu))
			r.add("rest", seconds(cpu)-writer.cpu)
			_, err = s.stop(ctx, name)
			return err
		},
	}
}

// written is what a writer says of itself, in seconds.
type written struct{ took, cpu float64 }

// warmLogWriter runs the writer and removes it: the image is on the node then.
func (s *Stack) warmLogWriter(ctx context.Context, args ...string) (written, error) {
	name := s.name("log")
	writer, err := s.writeLines(ctx, name, args...)
	if err != nil {
		return written{}, err
	}
	_, err = s.stop(ctx, name)
	return writer, err
}

// writeLines runs a Pod that writes so many bytes.
func (s *Stack) writeLines(ctx context.Context, name string, args ...string) (written, error) {
	pod := s.pod(name)
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	main := &pod.Spec.Containers[0]
	main.Image = s.bench.image(images.LogWriter)
	main.Command = slices.Concat([]string{"/logwriter"}, args, []string{strconv.Itoa(lineLength)})
	if err := s.bench.create(ctx, pod); err != nil {
		return written{}, err
	}
	seen, err := s.bench.pods.until(ctx, name, "at its end", sight.hasEnded)
	if err != nil {
		return written{}, err
	}
	if seen.pod.Status.Phase != corev1.PodSucceeded || len(seen.pod.Status.ContainerStatuses) == 0 || seen.pod.Status.ContainerStatuses[0].State.Terminated == nil {
		return written{}, fmt.Errorf("Pod %s: %s", name, state(seen.pod))
	}
	message := seen.pod.Status.ContainerStatuses[0].State.Terminated.Message
	var writer written
	if _, err := fmt.Sscan(message, &writer.took, &writer.cpu); err != nil {
		return written{}, fmt.Errorf("Pod %s: termination message %q: %w", name, message, err)
	}
	return writer, nil
}

func (b *Bench) readLog() Scenario {
	size := 1_000_000_000
	if b.Quick {
		size /= 20
	}
	return Scenario{
		Name: "log-read", What: fmt.Sprintf("kubectl logs of %d MB", size/1_000_000),
		Metrics: []Metric{
			{Name: "log-read/time", Title: "kubectl logs of 1 GB", Unit: "s"},
			{Name: "log-read/cpu", Title: "kubectl logs of 1 GB, node CPU", Unit: "s"},
		},
		// A stock node needs two and a half minutes for each reading. Three are the
		// fewest with a median that is one of them, and each is of another log: a
		// second reading of the same one would tell little that the first did not.
		Rounds: 3, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			name := s.name("log")
			if _, err := s.writeLines(ctx, name, strconv.Itoa(size)); err != nil {
				return err
			}
			var took time.Duration
			cpu, err := s.costOf(ctx, func() error {
				began := time.Now()
				defer func() { took = time.Since(began) }()
				return b.readLogs(ctx, name, size)
			})
			if err != nil {
				return err
			}
			r.add("time", seconds(took))
			r.add("cpu", seconds(cpu))
			_, err = s.stop(ctx, name)
			return err
		},
	}
}

// readLogs reads a Pod's log with kubectl and counts that it is all there.
func (b *Bench) readLogs(ctx context.Context, pod string, size int) error {
	cmd := b.kubectl(ctx, "logs", pod)
	count := &counter{}
	var complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = count, &complaints
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("kubectl logs: %w: %s", err, complaints.String())
	}
	if want := (size + lineLength - 1) / lineLength * lineLength; count.bytes != want {
		return fmt.Errorf("kubectl logs gave %d of %d bytes", count.bytes, want)
	}
	return nil
}

type counter struct{ bytes int }

var _ io.Writer = (*counter)(nil)

func (c *counter) Write(p []byte) (int, error) {
	c.bytes += len(p)
	return len(p), nil
}
