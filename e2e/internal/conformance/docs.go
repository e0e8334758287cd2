package conformance

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	docsBegin = "<!-- results: written by hack/conformance --write-docs -->\n"
	docsEnd   = "<!-- end of results -->\n"
)

// WriteDocs replaces the results in a document by those of the last whole runs.
func WriteDocs(file string, runs map[string]*Run, expectations Expectations) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok1 := strings.Cut(string(raw), docsBegin)
	_, after, ok2 := strings.Cut(rest, docsEnd)
	if !ok1 || !ok2 {
		return fmt.Errorf("%s has no lines %q and %q", file, strings.TrimSpace(docsBegin), strings.TrimSpace(docsEnd))
	}
	return os.WriteFile(file, []byte(before+docsBegin+results(runs, expectations)+docsEnd+after), 0o644)
}

func results(runs map[string]*Run, expectations Expectations) string {
	if len(runs) == 0 {
		return "\nNo whole suite has been run yet.\n\n"
	}
	var keys []string
	for key := range runs {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var b strings.Builder
	b.WriteString("\n| suite | node | Kubernetes | commit, program | date | nodes × processes | specs | pass | fail | skip | flakes | time |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, key := range keys {
		r := runs[key]
		commit, dirty := strings.CutSuffix(r.Commit, "-dirty")
		if len(commit) > 12 {
			commit = commit[:12]
		}
		if dirty {
			commit += " and changes"
		}
		// A program may have been built from another commit than the runner's.
		commit += ", sha256:" + r.Binary
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %d × %d | %d | %d | %d | %d | %d | %s |\n",
			r.Suite, r.Node, r.Kubernetes, commit, r.Started.UTC().Format(time.DateOnly), r.Nodes, r.Procs,
			len(r.Results), r.Count(Passed), r.Count(Failed), r.Count(Skipped), r.Flakes(), time.Duration(r.Seconds)*time.Second)
	}
	for _, key := range keys {
		r := runs[key]
		if r.Count(Passed) == len(r.Results) {
			continue
		}
		fmt.Fprintf(&b, "\nNot passed in `%s` (%s):\n\n| spec | outcome | first error | expected because |\n|---|---|---|---|\n", r.Suite, r.Node)
		for _, result := range r.Results {
			if result.Outcome == Passed {
				continue
			}
			why := "**not expected**"
			if e, ok := expectations[result.Spec]; ok {
				why = e.Reason
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", cell(result.Spec), result.Outcome, cell(result.Reason), cell(why))
		}
	}
	b.WriteString("\n")
	return b.String()
}

// cell is text that cannot break a Markdown table.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "\n", " ").Replace(text)
}
