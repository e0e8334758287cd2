package bench

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
)

// Result is what a run measured; it is what is written as JSON.
type Result struct {
	Started time.Time `json:"started"`
	// Seconds is how long measuring took, the cluster's making left out.
	Seconds float64 `json:"seconds"`
	Origin
	Quick bool `json:"quick"`
	// Pods, Churn and Stacks are the options with which everything was measured.
	Pods   []int    `json:"pods,omitempty"`
	Churn  int      `json:"churn,omitempty"`
	Stacks []string `json:"stacks,omitempty"`
	// Planned are the names of the scenarios that the run is to measure; Complete
	// are those of which all rounds are in Rows.
	Planned  []string     `json:"planned,omitempty"`
	Complete []string     `json:"complete,omitempty"`
	Resumed  []Resumption `json:"resumed,omitempty"`
	Rows     []*Row       `json:"rows"`
	// Notes are further facts, by scenario and stack, one for each round.
	Notes map[string]map[string][]map[string]any `json:"notes,omitempty"`
	// began is when measuring did, and earlier the seconds of the run that is resumed.
	began   time.Time
	earlier float64
}

// Row is one metric.
type Row struct {
	Name  string  `json:"name"`
	Title string  `json:"title"`
	Unit  string  `json:"unit"`
	Bar   float64 `json:"bar,omitempty"`
	// Stacks has the summaries and Rounds all samples, by the stack's name.
	Stacks map[string]Summary     `json:"stacks"`
	Rounds map[string][][]float64 `json:"rounds"`
	Ratio  *Ratio                 `json:"ratio,omitempty"`
}

// NewResult is the result of a run that begins, and has measured nothing yet.
func NewResult(origin Origin, options Options, stacks, planned []string) *Result {
	return &Result{
		Started: time.Now().UTC(), Origin: origin,
		Quick: options.Quick, Pods: options.Pods, Churn: options.Churn, Stacks: stacks, Planned: planned,
		Notes: map[string]map[string][]map[string]any{},
	}
}

// add takes what a stack's turn gave.
func (r *Result) add(scenario Scenario, stack string, recorder *Recorder) {
	for _, m := range scenario.Metrics {
		values := recorder.values[m.Name[len(scenario.Name)+1:]]
		if len(values) == 0 {
			continue
		}
		i := slices.IndexFunc(r.Rows, func(row *Row) bool { return row.Name == m.Name })
		if i < 0 {
			i = len(r.Rows)
			r.Rows = append(r.Rows, &Row{
				Name: m.Name, Title: m.Title, Unit: m.Unit, Bar: m.Bar,
				Stacks: map[string]Summary{}, Rounds: map[string][][]float64{},
			})
		}
		r.Rows[i].Rounds[stack] = append(r.Rows[i].Rounds[stack], values)
	}
	if len(recorder.notes) > 0 {
		if r.Notes[scenario.Name] == nil {
			r.Notes[scenario.Name] = map[string][]map[string]any{}
		}
		r.Notes[scenario.Name][stack] = append(r.Notes[scenario.Name][stack], recorder.notes)
	}
}

// finish computes what follows from the samples.
func (r *Result) finish() {
	r.Seconds = r.earlier + math.Round(time.Since(r.began).Seconds())
	for _, row := range r.Rows {
		for stack, rounds := range row.Rounds {
			row.Stacks[stack] = summarize(slices.Concat(rounds...))
		}
		if len(row.Rounds[Gantry]) > 0 && len(row.Rounds[Stock]) > 0 {
			if ratio, ok := ratio(row.Rounds[Gantry], row.Rounds[Stock]); ok {
				row.Ratio = &ratio
			}
		}
	}
}

// Missed are the rows whose bar was not reached.
func (r *Result) Missed() (missed []*Row) {
	for _, row := range r.Rows {
		if row.Bar > 0 && row.Ratio != nil && row.Ratio.Median > row.Bar {
			missed = append(missed, row)
		}
	}
	return missed
}

// cells are a row as the tables show it: title, unit, median and 90th percentile
// of both stacks, ratio, its extremes over the rounds, bar, verdict.
func (row *Row) cells() []string {
	shown := func(stack string) (median, p90 string) {
		s, ok := row.Stacks[stack]
		if !ok {
			return "", ""
		}
		if s.Samples == 1 {
			return number(s.Median), ""
		}
		return number(s.Median), number(s.P90)
	}
	ours, ours90 := shown(Gantry)
	peer, peer90 := shown(Stock)
	cells := []string{row.Title, row.Unit, ours, ours90, peer, peer90, "", "", "", ""}
	if row.Ratio != nil {
		cells[6] = fraction(row.Ratio.Median)
		if row.Ratio.Low != row.Ratio.High {
			cells[7] = fraction(row.Ratio.Low) + " … " + fraction(row.Ratio.High)
		}
	}
	if row.Bar > 0 {
		cells[8] = fraction(row.Bar)
		if row.Ratio != nil {
			cells[9] = "reached"
			if row.Ratio.Median > row.Bar {
				cells[9] = "missed"
			}
		}
	}
	return cells
}

var tableHead = []string{"", "", "Gantry", "p90", "stock", "p90", "ratio", "rounds", "bar", ""}

// Print writes the table for people.
func (r *Result) Print(w io.Writer) error {
	table := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	line := func(cells []string) {
		for _, cell := range cells {
			fmt.Fprint(table, cell, "\t")
		}
		fmt.Fprintln(table)
	}
	line(tableHead)
	for _, row := range r.Rows {
		line(row.cells())
	}
	return table.Flush()
}

// number shows three digits that count.
func number(v float64) string {
	switch size := math.Abs(v); {
	case size >= 100 || v == math.Trunc(v):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case size >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case size >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	default:
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
}

// fraction shows a small ratio as a part of one, which is how the bars are stated.
func fraction(v float64) string {
	if v > 0 && v < 0.45 {
		return "1/" + strconv.FormatFloat(math.Round(10/v)/10, 'f', -1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
