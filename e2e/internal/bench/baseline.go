package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/remotecommand"

	"gantry.local/e2e/internal/cluster"
)

// Figure is something about Gantry that does not depend on the machine's speed.
type Figure struct {
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"`
}

// Tolerance is how much larger than its baseline a figure may be.
const Tolerance = 1.25

// Figures measures everything of the baseline. What cannot be measured here is
// in the second map, with the reason.
func (b *Bench) Figures(ctx context.Context) (figures map[string]Figure, missing map[string]error, err error) {
	const count = 20
	s := b.stacks[0]
	if s.Name != Gantry {
		return nil, nil, errors.New("the first node of the cluster is no Gantry node")
	}
	figures, missing = map[string]Figure{}, map[string]error{}
	var program string
	if err := b.with(func(c *cluster.Cluster) error {
		program = c.GantryBinary
		return nil
	}); err != nil {
		return nil, nil, err
	}
	info, err := os.Stat(program)
	if err != nil {
		return nil, nil, err
	}
	figures["binary"] = Figure{math.Round(float64(info.Size()) / 1e4 / 100), "MB"}
	if err := b.warm(ctx); err != nil {
		return nil, nil, err
	}
	if err := b.memoryFigures(ctx, s, figures); err != nil {
		return nil, nil, err
	}
	calls, err := s.callsOf(ctx, func() error { return s.lives(ctx, count) })
	if err != nil {
		return nil, nil, err
	}
	figures["pod/api-calls"] = Figure{Value: float64(len(calls)) / count}
	counts, err := s.kernelCounts(func() error {
		if err := s.lives(ctx, count); err != nil {
			return err
		}
		return s.settle(ctx)
	})
	if errors.Is(err, errNotCounted) {
		for _, name := range []string{"pod/syscalls", "pod/faults", "probe/syscalls", "exec/syscalls"} {
			missing[name] = err
		}
		return figures, missing, nil
	} else if err != nil {
		return nil, nil, err
	}
	figures["pod/syscalls"] = Figure{Value: math.Round(float64(counts["calls"]) / count)}
	figures["pod/faults"] = Figure{Value: math.Round(float64(counts["faults"]) / count)}
	return figures, missing, b.execFigures(ctx, s, figures)
}

// quiet is how long the agent needs to let go of threads that it keeps for a
// while: tokio's for blocking work wait ten seconds for more.
const quiet = 12 * time.Second

// memoryFigures measures shims, what each Pod adds to the agent, and the agent
// after all those Pods.
func (b *Bench) memoryFigures(ctx context.Context, s *Stack, figures map[string]Figure) error {
	const count = 20
	names := s.names("held", count)
	if _, err := s.startAll(ctx, names, s.pod); err != nil {
		return err
	}
	with, err := s.agentAfter(ctx, quiet)
	if err != nil {
		return err
	}
	h, err := s.holdings()
	if err != nil {
		return err
	}
	shims := h.of(cluster.RoleShim)
	if len(shims) != count {
		return fmt.Errorf("%d shims for %d Pods", len(shims), count)
	}
	each := func(of func(cluster.Process) int64) float64 {
		total := int64(0)
		for _, shim := range shims {
			total += of(shim)
		}
		return float64(total) / count
	}
	figures["shim/private"] = Figure{math.Round(each(func(p cluster.Process) int64 { return p.Private }) / 1024), "KiB"}
	figures["shim/pss"] = Figure{math.Round(each(func(p cluster.Process) int64 { return p.PSS }) / 1024), "KiB"}
	figures["shim/threads"] = Figure{Value: each(func(p cluster.Process) int64 { return int64(p.Threads) })}
	figures["shim/files"] = Figure{Value: each(func(p cluster.Process) int64 { return int64(p.Files) })}
	if _, err := s.stopAll(ctx, names); err != nil {
		return err
	}
	without, err := s.agentAfter(ctx, quiet)
	if err != nil {
		return err
	}
	figures["agent/private"] = Figure{kib(without.Private), "KiB"}
	figures["agent/threads"] = Figure{Value: float64(without.Threads)}
	figures["agent/files"] = Figure{Value: float64(without.Files - without.Connections)}
	held := with.Files - with.Connections - without.Files + without.Connections
	figures["pod/agent-files"] = Figure{Value: math.Round(10*float64(held)/count) / 10}
	return nil
}

// agentAfter is the agent's process when it had nothing to do for a while.
func (s *Stack) agentAfter(ctx context.Context, wait time.Duration) (cluster.Process, error) {
	if err := pause(ctx, wait); err != nil {
		return cluster.Process{}, err
	}
	h, err := s.holdings()
	if err != nil {
		return cluster.Process{}, err
	}
	agents := h.of(cluster.RoleAgent)
	if len(agents) != 1 {
		return cluster.Process{}, fmt.Errorf("%d agents run for the node", len(agents))
	}
	return agents[0], nil
}

// execFigures counts what a probe by exec and an exec by a client cost.
func (b *Bench) execFigures(ctx context.Context, s *Stack, figures map[string]Figure) error {
	const count, seconds, execs = 10, 10, 20
	names := s.names("probed", count)
	if _, err := s.startAll(ctx, names, func(name string) *corev1.Pod {
		pod := s.pod(name)
		pod.Spec.Containers[0].ReadinessProbe = execProbe(1, "true")
		return pod
	}); err != nil {
		return err
	}
	probes, err := s.kernelCounts(func() error { return pause(ctx, seconds*time.Second) })
	if err != nil {
		return err
	}
	figures["probe/syscalls"] = Figure{Value: math.Round(float64(probes["calls"]) / count / seconds)}
	if _, err := s.stopAll(ctx, names); err != nil {
		return err
	}
	name := s.name("exec")
	if _, err := s.start(ctx, s.pod(name)); err != nil {
		return err
	}
	counts, err := s.kernelCounts(func() error {
		for range execs {
			if err := b.exec(ctx, name, remotecommand.StreamOptions{Stdout: io.Discard}, "true"); err != nil {
				return err
			}
		}
		return s.settle(ctx)
	})
	if err != nil {
		return err
	}
	figures["exec/syscalls"] = Figure{Value: math.Round(float64(counts["calls"]) / execs)}
	_, err = s.stop(ctx, name)
	return err
}

func kib(bytes int64) float64 { return math.Round(float64(bytes) / 1024) }

// Compare prints a line for each figure in the way that Go's tests do, and says
// whether none is worse than its baseline allows.
func Compare(w io.Writer, figures map[string]Figure, missing map[string]error, baseline map[string]Figure) bool {
	well := true
	for _, name := range slices.Sorted(maps.Keys(baseline)) {
		was := baseline[name]
		is, ok := figures[name]
		switch {
		case ok && is.Value > was.Value*Tolerance:
			well = false
			fmt.Fprintf(w, "--- FAIL: %s: %s %s, at most %s are allowed (baseline %s)\n", name, number(is.Value), is.Unit, number(was.Value*Tolerance), number(was.Value))
		case ok:
			fmt.Fprintf(w, "--- PASS: %s: %s %s (baseline %s)\n", name, number(is.Value), is.Unit, number(was.Value))
		case missing[name] != nil:
			fmt.Fprintf(w, "--- SKIP: %s: %v\n", name, missing[name])
		default:
			well = false
			fmt.Fprintf(w, "--- FAIL: %s: it is in the baseline and was not measured\n", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(figures)) {
		if _, ok := baseline[name]; !ok {
			well = false
			fmt.Fprintf(w, "--- FAIL: %s: %s %s is not in the baseline: hack/bench --ci --write-baseline adds it\n", name, number(figures[name].Value), figures[name].Unit)
		}
	}
	return well
}

// ReadBaseline reads a file of figures.
func ReadBaseline(file string) (map[string]Figure, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	figures := map[string]Figure{}
	if err := json.Unmarshal(raw, &figures); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return figures, nil
}

// WriteBaseline writes a file of figures.
func WriteBaseline(file string, figures map[string]Figure) error {
	raw, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(raw, '\n'), 0o644)
}
