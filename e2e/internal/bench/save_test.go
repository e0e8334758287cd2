package bench

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakes are a bench without a cluster, and scenarios of two rounds that write
// down their turns.
type fakes struct {
	bench     *Bench
	scenarios []Scenario
	turns     map[string]int
	// during is called in each turn.
	during func(scenario string, turn int) error
}

func newFakes(names ...string) *fakes {
	f := &fakes{turns: map[string]int{}, during: func(string, int) error { return nil }}
	f.bench = &Bench{Options: Options{Progress: io.Discard}, stacks: []*Stack{{Name: Stock}, {Name: Gantry}}}
	for _, name := range names {
		f.scenarios = append(f.scenarios, Scenario{
			Name: name, Rounds: 2, Metrics: []Metric{{Name: name + "/time", Title: name, Unit: "s"}},
			Turn: func(_ context.Context, _ *Stack, r *Recorder) error {
				f.turns[name]++
				r.add("time", float64(f.turns[name]))
				r.note("turn", f.turns[name])
				return f.during(name, f.turns[name])
			},
		})
	}
	return f
}

// names are those of the scenarios.
func (f *fakes) names() (names []string) {
	for _, s := range f.scenarios {
		names = append(names, s.Name)
	}
	return names
}

// fresh is a result without any scenario.
func (f *fakes) fresh() *Result {
	r := NewResult(sample().Origin, f.bench.Options, []string{Gantry, Stock}, f.names())
	r.began = time.Now()
	return r
}

// load reads a file that must be whole, and no other file must lie beside it.
func load(t *testing.T, file string) *Result {
	t.Helper()
	r, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if beside, err := os.ReadDir(filepath.Dir(file)); err != nil || len(beside) != 1 {
		t.Errorf("beside the result: %v %v", beside, err)
	}
	return r
}

// check looks whether exactly these scenarios are in a result, with all rounds of both stacks.
func check(t *testing.T, r *Result, scenarios ...string) {
	t.Helper()
	if !slices.Equal(r.Complete, scenarios) || len(r.Rows) != len(scenarios) || len(r.Notes) != len(scenarios) {
		t.Fatalf("complete %v, %d rows, %d notes, not %v", r.Complete, len(r.Rows), len(r.Notes), scenarios)
	}
	for i, name := range scenarios {
		row := r.Rows[i]
		if row.Name != name+"/time" || row.Ratio == nil || row.Stacks[Gantry].Samples != 2 || row.Stacks[Stock].Samples != 2 || len(r.Notes[name][Gantry]) != 2 {
			t.Errorf("%s: %+v, notes %v", name, row, r.Notes[name])
		}
	}
}

func TestSavedAfterEachScenario(t *testing.T) {
	f, file := newFakes("one", "two", "three"), filepath.Join(t.TempDir(), "r.json")
	f.during = func(scenario string, turn int) error {
		switch scenario {
		case "one":
			if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("there is a file before a scenario is complete: %v", err)
			}
		case "two":
			check(t, load(t, file), "one")
		case "three":
			check(t, load(t, file), "one", "two")
		}
		return nil
	}
	if err := f.bench.measure(t.Context(), f.scenarios, f.fresh(), file); err != nil {
		t.Fatal(err)
	}
	r := load(t, file)
	check(t, r, "one", "two", "three")
	if r.Commit != sample().Commit || len(r.Lacks(r.Planned)) != 0 {
		t.Errorf("commit %q, lacks %v", r.Commit, r.Lacks(r.Planned))
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("%v %v", info, err)
	}
}

func TestFailedScenario(t *testing.T) {
	f, file := newFakes("one", "two", "three"), filepath.Join(t.TempDir(), "r.json")
	broken := errors.New("broken")
	f.during = func(scenario string, turn int) error {
		if scenario == "two" && turn == 3 {
			return broken
		}
		return nil
	}
	r := f.fresh()
	err := f.bench.measure(t.Context(), f.scenarios, r, file)
	if !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "scenario two failed: gantry, round 2: ") {
		t.Error(err)
	}
	check(t, r, "one")
	check(t, load(t, file), "one")
	if f.turns["three"] != 0 {
		t.Error("it went on")
	}
}

func TestInterrupted(t *testing.T) {
	f, file := newFakes("one", "two"), filepath.Join(t.TempDir(), "r.json")
	ctx, interrupt := context.WithCancel(t.Context())
	f.during = func(scenario string, turn int) error {
		if scenario == "two" {
			interrupt() // the turn does not notice
		}
		return nil
	}
	err := f.bench.measure(ctx, f.scenarios, f.fresh(), file)
	if !errors.Is(err, context.Canceled) || !strings.HasPrefix(err.Error(), "interrupted in scenario two: ") || f.turns["two"] != 1 {
		t.Errorf("%v after %d turns", err, f.turns["two"])
	}
	check(t, load(t, file), "one")
}

func TestNotSaved(t *testing.T) {
	f := newFakes("one")
	r := f.fresh()
	if err := f.bench.measure(t.Context(), f.scenarios, r, filepath.Join(t.TempDir(), "missing/r.json")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if len(r.Complete) != 0 {
		t.Errorf("said to be in the file: %v", r.Complete)
	}
	// A rename onto a directory fails after the temporary file was written.
	file := filepath.Join(t.TempDir(), "r.json")
	if err := os.MkdirAll(filepath.Join(file, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := r.Save(file); err == nil {
		t.Error("a directory was replaced")
	}
	if beside, err := os.ReadDir(filepath.Dir(file)); err != nil || len(beside) != 1 {
		t.Errorf("beside the result: %v %v", beside, err)
	}
	if err := Savable(file); err == nil {
		t.Error("a directory is no place for a result")
	}
}

func TestResume(t *testing.T) {
	f, file := newFakes("one", "two", "three"), filepath.Join(t.TempDir(), "r.json")
	r := f.fresh()
	if err := f.bench.measure(t.Context(), f.scenarios[:1], r, file); err != nil {
		t.Fatal(err)
	}
	r.Seconds = 1000
	// A round of two, as whoever wrote the file without the care for it would leave.
	r.add(f.scenarios[1], Gantry, &Recorder{values: map[string][]float64{"time": {99}}, notes: map[string]any{"turn": 99}})
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}

	r, err := LoadUnfinished(file)
	if err != nil {
		t.Fatal(err)
	}
	now := r.Origin
	now.Machine.Load = "1.50" // is none of the machine's description
	if err := r.Resume(now, f.names()); err != nil {
		t.Fatal(err)
	}
	check(t, r, "one")
	if lacks := r.Lacks(f.names()); !slices.Equal(lacks, []string{"two", "three"}) {
		t.Errorf("lacks %v", lacks)
	}
	r.began = time.Now()
	if err := f.bench.measure(t.Context(), f.scenarios, r, file); err != nil {
		t.Fatal(err)
	}
	r = load(t, file)
	check(t, r, "one", "two", "three")
	if f.turns["one"] != 4 || f.turns["two"] != 4 || f.turns["three"] != 4 {
		t.Errorf("turns: %v", f.turns)
	}
	if r.Rows[1].Stacks[Gantry].Max == 99 {
		t.Error("a round of before is among those of now")
	}
	if r.Seconds < 1000 || r.Seconds > 1060 || len(r.Resumed) != 1 || !strings.Contains(r.latest(nil), "resumed at") || !strings.Contains(r.latest(nil), "load average 1.50") {
		t.Errorf("%v s, resumed %v", r.Seconds, r.Resumed)
	}
	// What lacks nothing is not resumed.
	if err := r.Resume(now, f.names()); err != nil || len(r.Resumed) != 1 {
		t.Errorf("%v %v", err, r.Resumed)
	}
}

func TestResumeRefused(t *testing.T) {
	for field, change := range map[string]func(*Origin){
		"commit":            func(o *Origin) { o.Commit += "-dirty" },
		"program":           func(o *Origin) { o.Program = "cba987654321" },
		"peer":              func(o *Origin) { o.Peer = "kubelet 1.0" },
		"machine.cpus":      func(o *Origin) { o.Machine.CPUs = 64 },
		"machine.cpu":       func(o *Origin) { o.Machine.CPU = "another" },
		"machine.memoryMiB": func(o *Origin) { o.Machine.MemoryMiB = 8192 },
		"machine.kernel":    func(o *Origin) { o.Machine.Kernel = "6.2" },
		"machine.cgroups":   func(o *Origin) { o.Machine.Cgroups = "v1" },
	} {
		r := sample()
		now := r.Origin
		change(&now)
		err := r.Resume(now, []string{"create"})
		if err == nil || !strings.HasPrefix(err.Error(), field+": it was ") || !strings.HasSuffix(err.Error(), ", or begin anew without --resume") {
			t.Errorf("%s: %v", field, err)
		}
	}
	r := sample()
	now := r.Origin
	now.Commit = strings.Repeat("b", 40)
	err := r.Resume(now, nil)
	if want := `commit: it was "` + r.Commit + `" and is now "` + now.Commit + `": check out what was measured, or begin anew without --resume`; err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}

	file := filepath.Join(t.TempDir(), "old.json")
	if err := sample().Save(file); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadUnfinished(file); err == nil || !strings.Contains(err.Error(), "complete: ") {
		t.Errorf("a file that does not say what is complete: %v", err)
	}
}
