package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"gantry.local/e2e/internal/cluster"
)

// lives lets Pods come and go one after the other.
func (s *Stack) lives(ctx context.Context, count int) error {
	for range count {
		name := s.name("life")
		if _, err := s.start(ctx, s.pod(name)); err != nil {
			return err
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
		if _, err := s.stop(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func (b *Bench) apiCalls() Scenario {
	const count = 10
	return Scenario{
		Name: "api", What: "requests that the node makes for a Pod's life, counted by the API server's audit log",
		Metrics: []Metric{{Name: "api/calls", Title: "API requests for a Pod's life", Unit: ""}},
		Rounds:  2, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			calls, err := s.callsOf(ctx, func() error { return s.lives(ctx, count) })
			if err != nil {
				return err
			}
			kinds := map[string]float64{}
			for _, call := range calls {
				kinds[call.Verb+" "+call.Resource] += 1. / count
			}
			r.add("calls", float64(len(calls))/count)
			r.note("per-pod", kinds)
			return nil
		},
	}
}

// callsOf are the node's requests about the namespace while something is done
// to it, and for a moment after: events are sent when there is time.
func (s *Stack) callsOf(ctx context.Context, do func() error) ([]cluster.Call, error) {
	var offset int64
	read := func() (calls []cluster.Call, err error) {
		err = s.bench.with(func(c *cluster.Cluster) error {
			calls, offset, err = c.Calls(offset)
			return err
		})
		return calls, err
	}
	if _, err := read(); err != nil {
		return nil, err
	}
	if err := do(); err != nil {
		return nil, err
	}
	if err := pause(ctx, 3*time.Second); err != nil {
		return nil, err
	}
	all, err := read()
	var calls []cluster.Call
	for _, call := range all {
		if call.Node == s.Node() && call.Namespace == Namespace {
			calls = append(calls, call)
		}
	}
	return calls, err
}

func (b *Bench) systemCalls() Scenario {
	const count = 10
	return Scenario{
		Name: "syscalls", What: "system calls, page faults and context switches of a Pod's life, the Pod's own included, counted by the kernel",
		Metrics: []Metric{
			{Name: "syscalls/calls", Title: "system calls for a Pod's life", Unit: ""},
			{Name: "syscalls/faults", Title: "page faults for a Pod's life", Unit: ""},
			{Name: "syscalls/switches", Title: "context switches for a Pod's life", Unit: ""},
		},
		Rounds: 2, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			counted, err := s.kernelCounts(func() error {
				if err := s.lives(ctx, count); err != nil {
					return err
				}
				return s.settle(ctx)
			})
			for what, n := range counted {
				r.add(what, float64(n)/count)
			}
			return err
		},
	}
}

func (b *Bench) onDisk() Scenario {
	return Scenario{
		Name: "disk", What: "sizes of the programs that a node consists of",
		Metrics: []Metric{{Name: "disk/programs", Title: "everything on disk", Unit: "MB", Bar: 1. / 5}},
		Rounds:  1, QuickRounds: 1,
		Turn: func(_ context.Context, s *Stack, r *Recorder) error {
			var programs []string
			if err := b.with(func(c *cluster.Cluster) error {
				programs = []string{c.GantryBinary}
				return nil
			}); err != nil {
				return err
			}
			if s.Name == Stock {
				programs = nil
				for _, name := range StockPrograms {
					programs = append(programs, filepath.Join(b.home.Bin, name))
				}
			}
			total, sizes := int64(0), map[string]int64{}
			for _, program := range programs {
				info, err := os.Stat(program)
				if err != nil {
					return fmt.Errorf("size of a program: %w", err)
				}
				total += info.Size()
				sizes[filepath.Base(program)] = info.Size()
			}
			r.add("programs", float64(total)/1e6)
			r.note("bytes", sizes)
			return nil
		},
	}
}

// StockPrograms are what a stock node consists of.
var StockPrograms = []string{"kubelet", "containerd", "containerd-shim-runc-v2", "runc", "cni/bridge", "cni/host-local", "cni/loopback"}
