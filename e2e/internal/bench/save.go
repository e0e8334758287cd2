package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Resumption is when a run went on that had been interrupted.
type Resumption struct {
	Started time.Time `json:"started"`
	// Load is as in Machine.
	Load string `json:"load"`
}

// Savable is an error if Save could not write there: better before an hour of
// measuring than after.
func Savable(file string) error {
	// What is no file, as /dev/stdout, must not be replaced by one.
	if info, err := os.Lstat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file: choose another name", file)
	}
	f, err := os.CreateTemp(filepath.Dir(file), temporary(file))
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// temporary is what the files are called beside a file that is written.
func temporary(file string) string { return "." + filepath.Base(file) + ".*" }

// Save writes the result as JSON. The file is replaced as a whole, so whatever
// ends the run leaves the one before or the new one.
func (r *Result) Save(file string) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return replace(file, append(raw, '\n'))
}

// replace writes a file beside the old one and renames it.
func replace(file string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), temporary(file))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

// Load reads what Save wrote.
func Load(file string) (*Result, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &Result{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// LoadUnfinished reads a result to which scenarios can be added.
func LoadUnfinished(file string) (*Result, error) {
	r, err := Load(file)
	if err != nil {
		return nil, err
	}
	if len(r.Complete) == 0 {
		return nil, fmt.Errorf("%s: complete: it names no scenario (an older hack/bench wrote none): begin anew without --resume", file)
	}
	return r, nil
}

// Resume makes ready an earlier run's result for what it lacks of its plan and of
// these scenarios. It refuses if they would be measured of something else, or on
// another machine.
func (r *Result) Resume(now Origin, planned []string) error {
	if err := r.Origin.same(now); err != nil {
		return err
	}
	for _, name := range planned {
		if !slices.Contains(r.Planned, name) {
			r.Planned = append(r.Planned, name)
		}
	}
	r.dropIncomplete()
	r.earlier = r.Seconds
	if len(r.Lacks(planned)) > 0 {
		r.Resumed = append(r.Resumed, Resumption{Started: time.Now().UTC(), Load: now.Machine.Load})
	}
	return nil
}

// Lacks are those of the scenarios that are not complete.
func (r *Result) Lacks(scenarios []string) []string {
	return slices.DeleteFunc(slices.Clone(scenarios), r.has)
}

// has says whether a scenario was measured to its end.
func (r *Result) has(scenario string) bool { return slices.Contains(r.Complete, scenario) }

// dropIncomplete removes the rounds of scenarios that did not come to their end:
// stacks would have a different number of turns, and a later run's rounds would
// not have been measured shortly after these.
func (r *Result) dropIncomplete() {
	r.Rows = slices.DeleteFunc(r.Rows, func(row *Row) bool {
		scenario, _, _ := strings.Cut(row.Name, "/")
		return !r.has(scenario)
	})
	maps.DeleteFunc(r.Notes, func(scenario string, _ map[string][]map[string]any) bool { return !r.has(scenario) })
	if r.Notes == nil {
		r.Notes = map[string]map[string][]map[string]any{}
	}
}
