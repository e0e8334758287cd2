package conformance

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Outcome of a spec.
type Outcome string

// Outcomes. A spec that was cut off or never began was not run.
const (
	Passed  Outcome = "pass"
	Failed  Outcome = "fail"
	Skipped Outcome = "skip"
	NotRun  Outcome = "notrun"
)

// Result is how a spec ended.
type Result struct {
	Spec    string  `json:"spec"`
	Outcome Outcome `json:"outcome"`
	Seconds float64 `json:"seconds,omitempty"`
	// Flaky: it failed first, with Reason, and passed when it was run again.
	Flaky bool `json:"flaky,omitempty"`
	// Reason is the beginning of the failure's message.
	Reason string `json:"reason,omitempty"`
	// Location is file:line of the spec in the Kubernetes source.
	Location string `json:"location,omitempty"`
}

// Subject is what is tested.
type Subject struct {
	// Node is "gantry" or the peer's name.
	Node string `json:"node"`
	// Commit of the repository; with -dirty when something is not committed.
	Commit string `json:"commit"`
	// Binary is the beginning of the SHA-256 digest of the node's program.
	Binary     string `json:"binary"`
	Kubernetes string `json:"kubernetes"`
}

func (s Subject) key() string { return strings.Join([]string{s.Node, s.Commit, s.Binary}, "-") }

// Run is the record of one run, which is kept as summary.json.
type Run struct {
	Subject
	Suite    string    `json:"suite"`
	Focus    string    `json:"focus,omitempty"`
	Skip     string    `json:"skip,omitempty"`
	Shard    string    `json:"shard,omitempty"`
	Nodes    int       `json:"nodes"`
	Procs    int       `json:"procs"`
	Started  time.Time `json:"started"`
	Seconds  float64   `json:"seconds"`
	Resumed  int       `json:"resumed,omitempty"`
	Results  []Result  `json:"results"`
	Problems []string  `json:"problems,omitempty"`
}

// Whole reports whether the run was of a whole suite, to its end.
func (r *Run) Whole() bool {
	return r.Focus == "" && r.Skip == "" && r.Shard == "" && r.Count(NotRun) == 0
}

// Count counts the results with an outcome.
func (r *Run) Count(o Outcome) int {
	n := 0
	for _, result := range r.Results {
		if result.Outcome == o {
			n++
		}
	}
	return n
}

// MergeRetry puts the second results of specs in the place of the first ones.
func MergeRetry(first, second []Result) {
	for _, again := range second {
		for i := range first {
			if first[i].Spec == again.Spec && again.Outcome == Passed {
				first[i].Outcome, first[i].Flaky = Passed, true
			}
		}
	}
}

// Flakes counts the specs that passed only when they were run again.
func (r *Run) Flakes() int {
	n := 0
	for _, result := range r.Results {
		if result.Flaky {
			n++
		}
	}
	return n
}

// Save writes the record into a directory as summary.json.
func (r *Run) Save(dir string) error { return writeJSON(filepath.Join(dir, "summary.json"), r) }

func writeJSON(file string, value any) error {
	raw, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Journal remembers the results of one subject over runs. A result is written
// as it comes, so an interrupted run can be resumed.
type Journal struct {
	mu   sync.Mutex
	file *os.File
	last map[string]Result
}

// OpenJournal opens the journal of a subject below a directory.
func OpenJournal(dir string, subject Subject) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, subject.key()+".jsonl")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	j := &Journal{file: f, last: map[string]Result{}}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r Result
		// The last line may have been cut off by a crash.
		if json.Unmarshal(lines.Bytes(), &r) == nil && r.Spec != "" {
			j.last[r.Spec] = r
		}
	}
	if err := lines.Err(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return j, nil
}

// Add records a result. It may be told the same one twice.
func (j *Journal) Add(r Result) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last[r.Spec] == r {
		return nil
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	// A line of its own even after one that was cut off.
	if _, err := j.file.Write(append([]byte("\n"), raw...)); err != nil {
		return err
	}
	j.last[r.Spec] = r
	return nil
}

// Last is the newest result of a spec.
func (j *Journal) Last(spec string) (Result, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	r, ok := j.last[spec]
	return r, ok
}

// Close closes the file.
func (j *Journal) Close() error { return j.file.Close() }

// LatestRuns returns for each suite the newest record of a run of all of it.
func LatestRuns(dir string) (map[string]*Run, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", "summary.json"))
	if err != nil {
		return nil, err
	}
	latest := map[string]*Run{}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		run := &Run{}
		if err := json.Unmarshal(raw, run); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		key := run.Node + " " + run.Suite
		if run.Whole() && (latest[key] == nil || run.Started.After(latest[key].Started)) {
			latest[key] = run
		}
	}
	return latest, nil
}
