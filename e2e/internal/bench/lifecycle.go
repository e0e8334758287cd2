package bench

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/cluster"
)

// scenarios are all there are, in the order in which they run.
func (b *Bench) scenarios() []Scenario {
	all := []Scenario{b.onDisk(), b.createOne(), b.createWithVolumes()}
	for _, count := range b.Pods {
		if count > 0 && count <= mostAtOnce {
			all = append(all, b.burst(count))
		}
	}
	return append(all, b.execs(), b.execProbes(), b.pull("gzip"), b.pull("zstd"), b.pullFive(), b.writeLog(), b.readLog(),
		b.apiCalls(), b.systemCalls(), b.coldStart(), b.restart(), b.idle(), b.idleQuiet(), b.churn())
}

// mostAtOnce is the largest burst: kubelet's default of Pods a node is 110.
const mostAtOnce = 100

// usedCPU is the CPU time that the node has used so far.
func (s *Stack) usedCPU() (used time.Duration, err error) {
	err = s.bench.with(func(c *cluster.Cluster) error {
		used, err = c.CPU(s.index)
		return err
	})
	return used, err
}

// costOf is the CPU time that the node uses while something is done to it, and
// in the second after it, in which nodes tidy up.
func (s *Stack) costOf(ctx context.Context, do func() error) (time.Duration, error) {
	before, err := s.usedCPU()
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	if err := pause(ctx, time.Second); err != nil {
		return 0, err
	}
	after, err := s.usedCPU()
	return after - before, err
}

func (b *Bench) createOne() Scenario {
	return Scenario{
		Name: "create", What: "Pods come and go one at a time; the image is there",
		Metrics: []Metric{
			{Name: "create/ready", Title: "Pod create to Ready", Unit: "ms", Bar: 1. / 7},
			{Name: "create/gone", Title: "delete to gone, TERM honoured", Unit: "ms", Bar: 1. / 10},
			{Name: "create/cpu", Title: "node CPU of a Pod's start and end", Unit: "ms"},
		},
		Rounds: 8, QuickRounds: 2,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			const count = 5
			cpu, err := s.costOf(ctx, func() error {
				for range count {
					if err := s.oneLife(ctx, s.pod(s.name("one")), r); err != nil {
						return err
					}
				}
				return nil
			})
			r.add("cpu", ms(cpu)/count)
			return err
		},
	}
}

// oneLife starts a Pod and ends it half a second later.
func (s *Stack) oneLife(ctx context.Context, pod *corev1.Pod, r *Recorder) error {
	up, err := s.start(ctx, pod)
	if err != nil {
		return err
	}
	if err := pause(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	down, err := s.stop(ctx, pod.Name)
	if err != nil {
		return err
	}
	r.add("ready", ms(up))
	r.add("gone", ms(down))
	return pause(ctx, 500*time.Millisecond)
}

func (b *Bench) createWithVolumes() Scenario {
	return Scenario{
		Name: "create-volumes", What: "the same with a ConfigMap, a Secret, a token and a readiness probe",
		Metrics: []Metric{
			{Name: "create-volumes/ready", Title: "Pod with volumes and probe, create to Ready", Unit: "ms", Bar: 1. / 7},
			{Name: "create-volumes/gone", Title: "Pod with volumes, delete to gone", Unit: "ms", Bar: 1. / 10},
		},
		Rounds: 6, QuickRounds: 2,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			for range 5 {
				pod := s.pod(s.name("volumes"))
				mountVolumes(pod)
				if err := s.oneLife(ctx, pod, r); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// mountVolumes gives a Pod a ConfigMap and a Secret (a token it has anyway) and
// a probe that finds them there.
func mountVolumes(pod *corev1.Pod) {
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "settings", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: configMapName}}}},
		{Name: "credentials", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: secretName}}},
		{Name: "scratch", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
	}
	main := &pod.Spec.Containers[0]
	main.VolumeMounts = []corev1.VolumeMount{
		{Name: "settings", MountPath: "/settings"}, {Name: "credentials", MountPath: "/credentials"}, {Name: "scratch", MountPath: "/scratch"},
	}
	main.ReadinessProbe = execProbe(10, "sh", "-c",
		"test -f /settings/two && test -f /credentials/two && test -f /var/run/secrets/kubernetes.io/serviceaccount/token")
}

func execProbe(period int32, command ...string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: command}},
		PeriodSeconds: period, TimeoutSeconds: 10,
	}
}

func (b *Bench) burst(count int) Scenario {
	name := fmt.Sprintf("burst-%d", count)
	return Scenario{
		Name: name, What: fmt.Sprintf("%d Pods at once, with token volumes; the image is there", count),
		Metrics: []Metric{
			{Name: name + "/last-ready", Title: fmt.Sprintf("%d Pods at once, last one Ready", count), Unit: "s", Bar: 1. / 6},
			{Name: name + "/middle-ready", Title: fmt.Sprintf("%d Pods at once, half of them Ready", count), Unit: "s"},
			{Name: name + "/cpu", Title: fmt.Sprintf("node CPU per Pod started, %d at once", count), Unit: "ms", Bar: 1. / 7},
			{Name: name + "/last-gone", Title: fmt.Sprintf("%d Pods deleted at once, last one gone", count), Unit: "s"},
		},
		Rounds: 3, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			names := s.names("many", count)
			var up []time.Duration
			cpu, err := s.costOf(ctx, func() (err error) {
				up, err = s.startAll(ctx, names, s.pod)
				return err
			})
			if err != nil {
				return err
			}
			times := toSeconds(up)
			r.add("last-ready", summarize(times).Max)
			r.add("middle-ready", summarize(times).Median)
			r.add("cpu", ms(cpu)/float64(count))
			down, err := s.stopAll(ctx, names)
			if err != nil {
				return err
			}
			r.add("last-gone", summarize(toSeconds(down)).Max)
			return s.settle(ctx)
		},
	}
}

func toSeconds(times []time.Duration) []float64 {
	values := make([]float64, len(times))
	for i, d := range times {
		values[i] = seconds(d)
	}
	return values
}

// settle waits until the node has stopped tidying up: until it uses less than a
// twentieth of a CPU, but no longer than half a minute.
func (s *Stack) settle(ctx context.Context) error {
	const step, most = time.Second, 30
	last, err := s.usedCPU()
	if err != nil {
		return err
	}
	for range most {
		if err := pause(ctx, step); err != nil {
			return err
		}
		now, err := s.usedCPU()
		if err != nil {
			return err
		}
		if now-last < step/20 {
			return nil
		}
		last = now
	}
	return nil
}
