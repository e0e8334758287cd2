package bench

import (
	_ "embed"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"strings"
)

//go:embed chart.svg.tmpl
var chartText string

var chartTemplate = template.Must(template.New("chart").Parse(chartText))

// chart is a picture of horizontal bars in pairs.
type chart struct {
	file, title, note string
	// rows are names of metrics. With common, all bars have one scale; otherwise
	// the longer bar of each pair has the full length.
	rows   []string
	common bool
}

var charts = []chart{
	{
		file: "times.svg", title: "How long it takes", note: "median; shorter is better; each pair has a scale of its own",
		rows: []string{
			"create/ready", "create-volumes/ready", "create/gone", "burst-50/last-ready", "burst-100/last-ready", "exec/client",
			"pull-gzip/pulled", "pull-zstd/pulled", "pull-five/pulled", "log-write/time", "log-read/time", "cold-start/ready", "restart/serving",
		},
	},
	{
		file: "memory.svg", title: "Memory of the node's programs", note: "proportional set size; shims included, containers not",
		rows: []string{"idle/pss-0", "idle/pss-50", "idle/pss-100", "idle/pss-250"}, common: true,
	},
	{
		file: "cpu.svg", title: "CPU time", note: "of the whole node, containers included; each pair has a scale of its own",
		rows: []string{"burst-50/cpu", "create/cpu", "exec/cpu", "exec-probes/cpu", "idle/cpu-100", "idle-quiet/cpu", "log-write/cpu", "pull-gzip/cpu"},
	},
}

// Sizes of a chart, in pixels.
const (
	chartWidth  = 860
	labelWidth  = 330
	rowHeight   = 46
	headHeight  = 78
	barHeight   = 15
	valueWidth  = 90
	fullBar     = chartWidth - labelWidth - valueWidth
	shortestBar = 2
)

// picture is what the template draws.
type picture struct {
	Title, Note, Run string
	Width, Height    int
	Legend           int
	Rows             []pair
}

type pair struct {
	Label, Ratio    string
	LabelY, Label2Y int
	Bars            []bar
}

type bar struct {
	Class, Text         string
	X, Y, Width, Height int
	TextX, TextY        int
}

// draw makes a chart of a result; false if the run has none of its metrics for both stacks.
func (c chart) draw(r *Result) (string, bool, error) {
	var rows []*Row
	longest := 0.0
	for _, name := range c.rows {
		for _, row := range r.Rows {
			if row.Name == name && row.Ratio != nil {
				rows = append(rows, row)
				longest = max(longest, row.Stacks[Gantry].Median, row.Stacks[Stock].Median)
			}
		}
	}
	if len(rows) == 0 {
		return "", false, nil
	}
	p := picture{Title: c.title, Note: c.note, Width: chartWidth, Height: headHeight + rowHeight*len(rows) + 10, Legend: labelWidth, Run: r.label()}
	for i, row := range rows {
		top := headHeight + i*rowHeight
		scale := longest
		if !c.common {
			scale = max(row.Stacks[Gantry].Median, row.Stacks[Stock].Median)
		}
		one := pair{Label: row.Title, Ratio: fraction(row.Ratio.Median), LabelY: top + 14, Label2Y: top + 31}
		for j, stack := range []string{Gantry, Stock} {
			value := row.Stacks[stack].Median
			width := max(int(value/scale*fullBar), shortestBar)
			y := top + j*(barHeight+2)
			one.Bars = append(one.Bars, bar{
				Class: stack, Text: strings.TrimSpace(number(value) + " " + row.Unit),
				X: labelWidth, Y: y, Width: width, Height: barHeight, TextX: labelWidth + width + 6, TextY: y + 12,
			})
		}
		p.Rows = append(p.Rows, one)
	}
	var out strings.Builder
	err := chartTemplate.Execute(&out, p)
	return out.String(), true, err
}

// drawAll writes the charts for which the run has something to show and returns their names.
func (r *Result) drawAll(dir string) ([]chart, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var drawn []chart
	for _, c := range charts {
		picture, ok, err := c.draw(r)
		if err != nil {
			return nil, fmt.Errorf("chart %s: %w", c.file, err)
		}
		if !ok {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(picture), 0o644); err != nil {
			return nil, err
		}
		drawn = append(drawn, c)
	}
	return drawn, nil
}
