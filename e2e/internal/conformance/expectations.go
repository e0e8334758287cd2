package conformance

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// Expectation is a spec that is known not to pass.
type Expectation struct {
	Outcome Outcome
	Spec    string
	Reason  string
}

// Expectations are the lines of e2e/expectations.txt, by spec.
type Expectations map[string]Expectation

// ReadExpectations reads the file. Lines are outcome, name and reason,
// separated by tabs; # begins a comment. "fail without FEATURE" holds only on
// machines that lack the feature: on all others the spec has to pass.
func ReadExpectations(file string, has func(feature string) (bool, error)) (Expectations, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	found, err := parseExpectations(f, has)
	if err != nil {
		return nil, fmt.Errorf("%s:%w", file, err)
	}
	return found, nil
}

func parseExpectations(r io.Reader, has func(feature string) (bool, error)) (Expectations, error) {
	found := Expectations{}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Split(line, "\t")
		if len(fields) != 3 {
			return nil, fmt.Errorf("%d: %d fields; write outcome, name and reason with one tab between them", n, len(fields))
		}
		outcome, feature, conditional := strings.Cut(fields[0], " without ")
		if conditional {
			there, err := has(feature)
			if err != nil {
				return nil, fmt.Errorf("%d: %w", n, err)
			}
			if there {
				continue
			}
		}
		e := Expectation{Outcome(outcome), strings.TrimSpace(fields[1]), strings.TrimSpace(fields[2])}
		if e.Outcome != Failed && e.Outcome != Skipped {
			return nil, fmt.Errorf("%d: outcome %q; write %s or %s", n, e.Outcome, Failed, Skipped)
		}
		if e.Reason == "" {
			return nil, fmt.Errorf("%d: no reason given for %q", n, e.Spec)
		}
		if _, twice := found[e.Spec]; twice {
			return nil, fmt.Errorf("%d: %q is listed twice", n, e.Spec)
		}
		found[e.Spec] = e
	}
	return found, lines.Err()
}

// Unknown lists expectations about specs that do not exist (any more).
func (e Expectations) Unknown(specs []Spec) []string {
	exists := map[string]bool{}
	for _, s := range specs {
		exists[s.Name] = true
	}
	var problems []string
	for name := range e {
		if !exists[name] {
			problems = append(problems, fmt.Sprintf("no such spec, remove the expectation: %s", name))
		}
	}
	return problems
}

// Compare returns what differs from the expectations: regressions, and
// expectations that are no longer true. Both make a run fail.
func (e Expectations) Compare(results []Result) []string {
	var problems []string
	for _, r := range results {
		expected, listed := e[r.Spec]
		switch {
		case r.Outcome == NotRun:
			problems = append(problems, "not run: "+r.Spec)
		case !listed && r.Outcome != Passed:
			problems = append(problems, fmt.Sprintf("%s, expected pass: %s", r.Outcome, r.Spec))
		case listed && r.Outcome == Passed:
			problems = append(problems, "pass, remove the expectation: "+r.Spec)
		case listed && r.Outcome != expected.Outcome:
			problems = append(problems, fmt.Sprintf("%s, expected %s: %s", r.Outcome, expected.Outcome, r.Spec))
		}
	}
	return problems
}
