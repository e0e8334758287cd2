package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"gantry.local/e2e/internal/cluster"
)

const mib = 1 << 20

// holdings are what the processes of a node's programs hold together; its Pods'
// own processes are left out.
type holdings struct {
	RSS, PSS, Private float64 // MiB
	Threads, Files    int
	Processes         int
	// PSSByRole is in MiB.
	PSSByRole map[cluster.Role]float64
	processes []cluster.Process
}

func (s *Stack) holdings() (holdings, error) {
	h := holdings{PSSByRole: map[cluster.Role]float64{}}
	err := s.bench.with(func(c *cluster.Cluster) error {
		processes, err := c.Usage(s.index)
		h.processes = slices.DeleteFunc(processes, func(p cluster.Process) bool { return p.Role == cluster.RolePod })
		return err
	})
	for _, p := range h.processes {
		h.RSS += float64(p.RSS) / mib
		h.PSS += float64(p.PSS) / mib
		h.Private += float64(p.Private) / mib
		h.Threads += p.Threads
		h.Files += p.Files
		h.Processes++
		h.PSSByRole[p.Role] += float64(p.PSS) / mib
	}
	return h, err
}

// of are the processes with a role.
func (h holdings) of(role cluster.Role) []cluster.Process {
	return slices.DeleteFunc(slices.Clone(h.processes), func(p cluster.Process) bool { return p.Role != role })
}

func (b *Bench) idle() Scenario {
	window, rest := time.Minute, 30*time.Second
	if b.Quick {
		window, rest = 15*time.Second, 5*time.Second
	}
	counts := append([]int{0}, slices.DeleteFunc(slices.Clone(b.Pods), func(n int) bool { return n <= 0 })...)
	scenario := Scenario{
		Name: "idle", What: fmt.Sprintf("memory and CPU of the node's programs with %v Pods that do nothing", counts),
		Rounds: 1, QuickRounds: 1,
	}
	memoryBar := map[int]float64{0: 1. / 6, 100: 1. / 10}
	cpuBar := map[int]float64{100: 1. / 15}
	for _, n := range counts {
		metric := func(what, title, unit string, bar float64) {
			scenario.Metrics = append(scenario.Metrics, Metric{
				Name: fmt.Sprintf("idle/%s-%d", what, n), Title: fmt.Sprintf(title, n), Unit: unit, Bar: bar,
			})
		}
		metric("pss", "memory of the node, PSS, %d Pods", "MiB", memoryBar[n])
		metric("private", "memory of the node, private, %d Pods", "MiB", 0)
		metric("rss", "memory of the node, RSS, %d Pods", "MiB", 0)
		metric("threads", "threads of the node, %d Pods", "", 0)
		metric("cpu", "idle CPU a minute, %d Pods", "s", cpuBar[n])
		if n > 0 {
			// The bar of the issue is absolute: 0.4 MiB.
			metric("pod-pss", "memory each of %d idle Pods adds, PSS", "MiB", 0)
		}
	}
	scenario.Turn = func(ctx context.Context, s *Stack, r *Recorder) error {
		var names []string
		var empty float64
		for _, n := range counts {
			more := s.names("idle", n-len(names))
			if _, err := s.startAll(ctx, more, s.pod); err != nil {
				return err
			}
			names = append(names, more...)
			if err := pause(ctx, rest); err != nil {
				return err
			}
			h, err := s.holdings()
			if err != nil {
				return err
			}
			add := func(what string, value float64) { r.add(fmt.Sprintf("%s-%d", what, n), value) }
			add("pss", h.PSS)
			add("private", h.Private)
			add("rss", h.RSS)
			add("threads", float64(h.Threads))
			if n == 0 {
				empty = h.PSS
			} else {
				add("pod-pss", (h.PSS-empty)/float64(n))
			}
			r.note(fmt.Sprintf("pss-by-role-%d", n), h.PSSByRole)
			used, err := s.cpuAMinute(ctx, window)
			if err != nil {
				return err
			}
			add("cpu", used)
		}
		if _, err := s.stopAll(ctx, names); err != nil {
			return err
		}
		return s.settle(ctx)
	}
	return scenario
}

// statsFile makes hack/stock-node give containerd another period for its
// collection of statistics.
const statsFile = "data/stats-collect-period"

func (b *Bench) idleQuiet() Scenario {
	count, window := 100, time.Minute
	if b.Quick {
		count, window = 20, 15*time.Second
	}
	return Scenario{
		Name: "idle-quiet", What: "idle Pods again, and containerd told to collect statistics once a minute instead of once a second",
		Metrics: []Metric{{Name: "idle-quiet/cpu", Title: "idle CPU a minute, 100 Pods, containerd's statistics once a minute", Unit: "s", Bar: 1. / 5}},
		Rounds:  1, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			var file string
			if err := b.with(func(c *cluster.Cluster) error {
				dir, err := c.NodeDir(s.index)
				file = filepath.Join(dir, statsFile)
				return err
			}); err != nil {
				return err
			}
			if s.Name == Stock {
				if err := os.WriteFile(file, []byte("1m"), 0o644); err != nil {
					return err
				}
				defer os.Remove(file)
			}
			if err := s.restartStack(ctx); err != nil {
				return err
			}
			names := s.names("idle", count)
			if _, err := s.startAll(ctx, names, s.pod); err != nil {
				return err
			}
			if err := pause(ctx, 20*time.Second); err != nil {
				return err
			}
			used, err := s.cpuAMinute(ctx, window)
			if err != nil {
				return err
			}
			r.add("cpu", used)
			if _, err := s.stopAll(ctx, names); err != nil {
				return err
			}
			os.Remove(file)
			return s.restartStack(ctx)
		},
	}
}

// restartStack starts all of the node's programs anew; there are no Pods.
func (s *Stack) restartStack(ctx context.Context) error {
	if err := s.bench.with(func(c *cluster.Cluster) error { return c.StopStack(s.index) }); err != nil {
		return err
	}
	if err := s.markUnknown(ctx); err != nil {
		return err
	}
	if _, err := s.startAgent(); err != nil {
		return err
	}
	if _, err := s.untilNodeReady(ctx); err != nil {
		return err
	}
	return s.settle(ctx)
}
