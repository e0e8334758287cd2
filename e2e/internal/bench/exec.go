package bench

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
)

func (b *Bench) execs() Scenario {
	return Scenario{
		Name: "exec", What: "`true` in a running container, by kubectl and by a client that runs already",
		Metrics: []Metric{
			{Name: "exec/kubectl", Title: "kubectl exec POD -- true", Unit: "ms"},
			{Name: "exec/client", Title: "exec by a running client", Unit: "ms", Bar: 1. / 3},
			{Name: "exec/cpu", Title: "node CPU of an exec", Unit: "ms", Bar: 1. / 4},
			{Name: "exec/session", Title: "a command and its answer in an open shell", Unit: "ms"},
		},
		Rounds: 5, QuickRounds: 2,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			const commands = 20
			name := s.name("exec")
			if _, err := s.start(ctx, s.pod(name)); err != nil {
				return err
			}
			for range commands / 4 {
				began := time.Now()
				if out, err := b.kubectl(ctx, "exec", name, "--", "true").CombinedOutput(); err != nil {
					return fmt.Errorf("kubectl exec: %w: %s", err, out)
				}
				r.add("kubectl", ms(time.Since(began)))
			}
			cpu, err := s.costOf(ctx, func() error {
				for range commands {
					began := time.Now()
					if err := b.exec(ctx, name, remotecommand.StreamOptions{Stdout: &bytes.Buffer{}, Stderr: &bytes.Buffer{}}, "true"); err != nil {
						return err
					}
					r.add("client", ms(time.Since(began)))
				}
				return nil
			})
			if err != nil {
				return err
			}
			r.add("cpu", ms(cpu)/commands)
			if err := b.session(ctx, name, commands, r); err != nil {
				return err
			}
			_, err = s.stop(ctx, name)
			return err
		},
	}
}

// exec runs a command in a Pod's container over a WebSocket, as kubectl does.
func (b *Bench) exec(ctx context.Context, pod string, streams remotecommand.StreamOptions, command ...string) error {
	request := b.client.CoreV1().RESTClient().Post().Resource("pods").Name(pod).Namespace(Namespace).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Command: command, Stdin: streams.Stdin != nil, Stdout: streams.Stdout != nil, Stderr: streams.Stderr != nil,
		}, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(rest.CopyConfig(b.config), "GET", request.URL().String())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return executor.StreamWithContext(ctx, streams)
}

// session measures commands in one shell whose streams stay open.
func (b *Bench) session(ctx context.Context, pod string, commands int, r *Recorder) error {
	ask, answer := newConversation()
	ended := make(chan error, 1)
	go func() {
		err := b.exec(ctx, pod, remotecommand.StreamOptions{Stdin: ask, Stdout: answer}, "sh")
		answer.end(err)
		ended <- err
	}()
	for i := range commands {
		began := time.Now()
		ask.say("echo done\n")
		if err := answer.line(ctx); err != nil {
			return fmt.Errorf("command %d in an open shell: %w", i+1, err)
		}
		if i > 0 { // the first also waits for the connection
			r.add("session", ms(time.Since(began)))
		}
	}
	ask.hangUp()
	return <-ended
}

// kubectl is a command with the cluster's kubectl, in the namespace.
func (b *Bench) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	args = append([]string{"--kubeconfig=" + filepath.Join(b.home.Clusters, b.name, "admin.conf"), "--namespace=" + Namespace}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(b.home.Bin, "kubectl"), args...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (b *Bench) execProbes() Scenario {
	const count = 50
	window := time.Minute
	if b.Quick {
		window = 15 * time.Second
	}
	return Scenario{
		Name: "exec-probes", What: "50 Pods with an exec readiness probe every 5 s",
		Metrics: []Metric{
			{Name: "exec-probes/cpu", Title: "50 exec probes every 5 s, node CPU a minute", Unit: "s", Bar: 1. / 6},
		},
		Rounds: 2, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			names := s.names("probed", count)
			_, err := s.startAll(ctx, names, func(name string) *corev1.Pod {
				pod := s.pod(name)
				pod.Spec.Containers[0].ReadinessProbe = execProbe(5, "true")
				return pod
			})
			if err != nil {
				return err
			}
			if err := pause(ctx, 10*time.Second); err != nil {
				return err
			}
			used, err := s.cpuAMinute(ctx, window)
			if err != nil {
				return err
			}
			r.add("cpu", used)
			_, err = s.stopAll(ctx, names)
			return err
		},
	}
}

// cpuAMinute watches the node for a while and returns how many seconds of CPU it uses a minute.
func (s *Stack) cpuAMinute(ctx context.Context, window time.Duration) (float64, error) {
	before, err := s.usedCPU()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := pause(ctx, window); err != nil {
		return 0, err
	}
	after, err := s.usedCPU()
	return seconds(after-before) / time.Since(began).Minutes(), err
}
