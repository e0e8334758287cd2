package conformance

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// ginkgoReport is the part of ginkgo's JSON report that is used here.
type ginkgoReport struct {
	SpecialSuiteFailureReasons []string
	SpecReports                []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		RunTime                 time.Duration
		Failure                 struct {
			Message        string
			ForwardedPanic string
		}
	}
}

// parseReport returns a result for each spec, and an error when something else
// than a spec failed.
func parseReport(raw []byte, specs []Spec) ([]Result, error) {
	var reports []ginkgoReport
	if err := json.Unmarshal(raw, &reports); err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	found := map[string]Result{}
	var problem error
	for _, report := range reports {
		for _, s := range report.SpecReports {
			message := s.Failure.Message
			if s.Failure.ForwardedPanic != "" {
				message += " " + s.Failure.ForwardedPanic
			}
			if s.LeafNodeType != "It" {
				if s.State != "passed" && s.State != "skipped" && problem == nil {
					problem = fmt.Errorf("%s %s: %s", s.LeafNodeType, s.State, summary(message))
				}
				continue
			}
			r := Result{
				Spec:    normal(strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")),
				Seconds: s.RunTime.Round(100 * time.Millisecond).Seconds(), Reason: summary(message),
			}
			switch s.State {
			case "passed":
				r.Outcome, r.Reason = Passed, ""
			case "skipped":
				r.Outcome = Skipped
				if message == "" {
					continue // not selected, or not reached
				}
			case "pending", "interrupted", "aborted":
				r.Outcome = NotRun
			default:
				r.Outcome = Failed
			}
			found[r.Spec] = r
		}
		if problem == nil {
			for _, reason := range report.SpecialSuiteFailureReasons {
				if !strings.Contains(reason, "Interrupted by User") {
					problem = fmt.Errorf("%s", reason)
				}
			}
		}
	}
	results := make([]Result, len(specs))
	for i, spec := range specs {
		r, ok := found[spec.Name]
		if !ok {
			r = Result{Spec: spec.Name, Outcome: NotRun}
		}
		r.Location = spec.Location
		results[i] = r
	}
	return results, problem
}

// summary is what a failure's message begins with. Matchers put the interesting
// part into the second or third line.
func summary(message string) string {
	const lines, length = 4, 300
	var parts []string
	for _, line := range strings.Split(message, "\n") {
		if line = strings.Join(strings.Fields(line), " "); line != "" {
			parts = append(parts, line)
		}
		if len(parts) == lines {
			break
		}
	}
	text := strings.Join(parts, " ")
	if runes := []rune(text); len(runes) > length {
		text = string(runes[:length]) + "…"
	}
	return text
}

// Print prints what is to be said about a run: what did not pass, then counts.
func (r *Run) Print(w io.Writer) error {
	var bad []Result
	for _, result := range r.Results {
		if result.Outcome != Passed || result.Flaky {
			bad = append(bad, result)
		}
	}
	for _, result := range bad {
		word := strings.ToUpper(string(result.Outcome))
		if result.Flaky {
			word = "FLAKE"
		}
		fmt.Fprintf(w, "%-6s %s\n       %s\n", word, result.Spec, result.Location)
		if result.Reason != "" {
			fmt.Fprintf(w, "       %s\n", result.Reason)
		}
	}
	if len(bad) > 0 {
		fmt.Fprintln(w)
	}
	table := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(table, "SUITE\tSPECS\tPASS\tFAIL\tSKIP\tNOT RUN\tFLAKES\tTIME")
	fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", r.Suite, len(r.Results), r.Count(Passed), r.Count(Failed), r.Count(Skipped), r.Count(NotRun), r.Flakes(),
		(time.Duration(r.Seconds) * time.Second).String())
	return table.Flush()
}
