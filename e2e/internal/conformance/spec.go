// Package conformance runs upstream's end-to-end tests against a cluster and
// judges the results by what is expected.
package conformance

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// Spec is one test of upstream's suite.
type Spec struct {
	// Name is the full text, which is unique.
	Name string
	// Location is file:line in the Kubernetes source.
	Location string
}

// Suite is a named part of all specs.
type Suite struct {
	Name, Description string
	// focus and skip match names; an empty one matches all, or none.
	focus, skip string
}

// Suites are what --suite can name.
var Suites = []Suite{
	{"node", "what every node must do: [NodeConformance] without [Slow], [Serial] and [Flaky]", `\[NodeConformance\]`, `\[Slow\]|\[Serial\]|\[Flaky\]`},
	{"node-serial", "the other [NodeConformance] specs: slow ones and those that must run alone", "", ""},
	{"conformance", "what every cluster must do: [Conformance]", `\[Conformance\]`, ""},
	{"all", "every spec there is; only of use with --focus", "", ""},
}

// FindSuite returns the suite of a name.
func FindSuite(name string) (Suite, error) {
	var names []string
	for _, s := range Suites {
		if s.Name == name {
			return s, nil
		}
		names = append(names, s.Name)
	}
	return Suite{}, fmt.Errorf("--suite %q: use one of %s", name, strings.Join(names, ", "))
}

func (s Suite) contains(spec Spec) bool {
	if s.Name == "node-serial" {
		node := Suites[0]
		return regexp.MustCompile(node.focus).MatchString(spec.Name) && !node.contains(spec)
	}
	return regexp.MustCompile(s.focus).MatchString(spec.Name) &&
		(s.skip == "" || !regexp.MustCompile(s.skip).MatchString(spec.Name))
}

// Selection says which specs to run.
type Selection struct {
	Suite Suite
	// Focus and Skip are regular expressions on top of the suite; empty ones do nothing.
	Focus, Skip string
	// Part of Parts: every Parts-th spec, starting with number Part (from 1).
	Part, Parts int
}

// Whole reports whether nothing of the suite is left out.
func (s Selection) Whole() bool { return s.Focus == "" && s.Skip == "" && s.Parts <= 1 }

// Select returns the chosen specs.
func (s Selection) Select(specs []Spec) ([]Spec, error) {
	focus, err := regexp.Compile(s.Focus)
	if err != nil {
		return nil, fmt.Errorf("--focus: %w", err)
	}
	skip, err := regexp.Compile(s.Skip)
	if err != nil {
		return nil, fmt.Errorf("--skip: %w", err)
	}
	var chosen []Spec
	for _, spec := range specs {
		if s.Suite.contains(spec) && focus.MatchString(spec.Name) && (s.Skip == "" || !skip.MatchString(spec.Name)) {
			chosen = append(chosen, spec)
		}
	}
	if s.Parts > 1 {
		if s.Part < 1 || s.Part > s.Parts {
			return nil, fmt.Errorf("--shard %d/%d: the first number counts from 1 to the second", s.Part, s.Parts)
		}
		var part []Spec
		for i := s.Part - 1; i < len(chosen); i += s.Parts {
			part = append(part, chosen[i])
		}
		chosen = part
	}
	return chosen, nil
}

// List asks the test program which specs it has.
func List(ctx context.Context, program string) ([]Spec, error) {
	out, err := exec.CommandContext(ctx, program, "--list-tests").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list-tests: %w", program, err)
	}
	return parseList(out)
}

var listLine = regexp.MustCompile(`^    (\S+\.go:\d+): (.*)$`)

func parseList(out []byte) ([]Spec, error) {
	var specs []Spec
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m := listLine.FindStringSubmatch(lines.Text()); m != nil {
			_, location, found := strings.Cut(m[1], "/test/e2e/")
			if !found {
				location = m[1]
			} else {
				location = "test/e2e/" + location
			}
			specs = append(specs, Spec{Name: normal(m[2]), Location: location})
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(specs) == 0 {
		return nil, fmt.Errorf("no spec among %d bytes of output", len(out))
	}
	slices.SortFunc(specs, func(a, b Spec) int { return strings.Compare(a.Name, b.Name) })
	return specs, nil
}

// normal is a name without blanks at its ends, which some specs have.
func normal(name string) string { return strings.TrimSpace(name) }

// pattern is a regular expression for exactly one spec, as ginkgo matches it:
// against the suite's description, a blank and the name.
func pattern(name string) string { return `^Kubernetes e2e suite\s+` + regexp.QuoteMeta(name) + `\s*$` }
