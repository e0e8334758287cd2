package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	latestBegin  = "<!-- latest: written by hack/bench --write-docs -->\n"
	latestEnd    = "<!-- end of latest -->\n"
	historyBegin = "<!-- history: hack/bench --write-docs adds a line -->\n"
)

// historyRows are the metrics that the history keeps.
var historyRows = []string{
	"create/ready", "create/gone", "burst-50/last-ready", "burst-50/cpu", "exec/client", "exec-probes/cpu", "idle/pss-100", "idle/cpu-100",
	"pull-gzip/pulled", "log-write/time", "restart/serving", "api/calls", "syscalls/calls", "disk/programs",
}

// WriteDocs draws the charts into docs/bench, replaces the latest table in
// docs/benchmarks.md, and adds a line to its history.
func (r *Result) WriteDocs(docs string) error {
	drawn, err := r.drawAll(filepath.Join(docs, "bench"))
	if err != nil {
		return err
	}
	file := filepath.Join(docs, "benchmarks.md")
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok1 := strings.Cut(string(raw), latestBegin)
	_, rest, ok2 := strings.Cut(rest, latestEnd)
	between, history, ok3 := strings.Cut(rest, historyBegin)
	if !ok1 || !ok2 || !ok3 {
		return fmt.Errorf("%s: the lines %q, %q and %q are not there in this order", file,
			strings.TrimSpace(latestBegin), strings.TrimSpace(latestEnd), strings.TrimSpace(historyBegin))
	}
	if !strings.Contains(history, r.id()) { // or the same run is written again
		history = r.entry() + history
	}
	return os.WriteFile(file, []byte(before+latestBegin+r.latest(drawn)+latestEnd+between+historyBegin+history), 0o644)
}

// id tells one run from another.
func (r *Result) id() string { return r.Started.UTC().Format("2006-01-02 15:04") }

// label says in one line what was measured where.
func (r *Result) label() string {
	text := fmt.Sprintf("%s, commit %s, %d CPUs (%s), %d GiB, Linux %s, cgroup %s", r.Started.UTC().Format(time.DateOnly), r.shortCommit(),
		r.Machine.CPUs, r.Machine.CPU, (r.Machine.MemoryMiB+512)/1024, r.Machine.Kernel, r.Machine.Cgroups)
	if r.Quick {
		text += "; a quick run"
	}
	return text
}

func (r *Result) shortCommit() string {
	commit, dirty := strings.CutSuffix(r.Commit, "-dirty")
	if len(commit) > 10 {
		commit = commit[:10]
	}
	if dirty {
		commit += " and changes"
	}
	return commit
}

// latest is the run as charts and a table.
func (r *Result) latest(drawn []chart) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s. Beside it: %s. Load average before the run: %s. The run took %s%s.\n\n",
		r.label(), r.Peer, r.Machine.Load, time.Duration(r.Seconds)*time.Second, r.interruptions())
	for _, c := range drawn {
		fmt.Fprintf(&b, "![%s](bench/%s)\n\n", c.title, c.file)
	}
	line := func(cells []string) {
		for i, cell := range cells {
			cells[i] = strings.NewReplacer("|", `\|`).Replace(cell)
		}
		fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | "))
	}
	line(append([]string{}, tableHead...))
	b.WriteString(strings.Repeat("|---", len(tableHead)) + "|\n")
	for _, row := range r.Rows {
		line(row.cells())
	}
	b.WriteString("\n")
	return b.String()
}

// interruptions says when the run was resumed, and how quiet the machine was then.
func (r *Result) interruptions() string {
	var b strings.Builder
	for _, one := range r.Resumed {
		fmt.Fprintf(&b, "; it was resumed at %s, load average %s", one.Started.UTC().Format("2006-01-02 15:04"), one.Load)
	}
	return b.String()
}

// entry is the run as a part of the history, the newest first.
func (r *Result) entry() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n**%s**, commit %s, program sha256:%s:", r.id(), r.shortCommit(), r.Program)
	for _, name := range historyRows {
		for _, row := range r.Rows {
			if row.Name != name {
				continue
			}
			ours, ok := row.Stacks[Gantry]
			if !ok {
				continue
			}
			fmt.Fprintf(&b, " %s %s", name, strings.TrimSpace(number(ours.Median)+" "+row.Unit))
			if row.Ratio != nil {
				fmt.Fprintf(&b, " (%s)", fraction(row.Ratio.Median))
			}
			b.WriteString(";")
		}
	}
	return strings.TrimSuffix(b.String(), ";") + ".\n"
}
