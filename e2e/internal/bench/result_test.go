package bench

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sample is a run with two rows: one whose bar is reached and one whose bar is missed.
func sample() *Result {
	r := &Result{
		Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Origin: Origin{
			Commit: strings.Repeat("a", 40), Program: "123456789abc",
			Machine: Machine{CPUs: 2, CPU: "A <fast> & small one", MemoryMiB: 4096, Kernel: "6.1", Cgroups: "v2", Load: "0.10"},
		},
		began: time.Now(),
	}
	scenario := Scenario{Name: "create", Metrics: []Metric{
		{Name: "create/ready", Title: "Pod create to Ready", Unit: "ms", Bar: 1. / 7},
		{Name: "create/gone", Title: "delete to gone", Unit: "ms", Bar: 1. / 10},
	}}
	for _, turn := range []struct {
		stack       string
		ready, gone []float64
	}{{Gantry, []float64{50, 60}, []float64{40}}, {Stock, []float64{600}, []float64{200}}, {Gantry, []float64{55}, []float64{40}}, {Stock, []float64{550}, []float64{100}}} {
		r.add(scenario, turn.stack, &Recorder{values: map[string][]float64{"ready": turn.ready, "gone": turn.gone}})
	}
	r.finish()
	return r
}

func TestTable(t *testing.T) {
	r := sample()
	if missed := r.Missed(); len(missed) != 1 || missed[0].Name != "create/gone" {
		t.Errorf("missed bars: %+v", missed)
	}
	got := strings.Join(r.Rows[0].cells(), "|")
	if want := "Pod create to Ready|ms|55|59|575|595|1/10.5|1/10.9 … 1/10|1/7|reached"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	file := filepath.Join(t.TempDir(), "r.json")
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}
	again, err := Load(file)
	if err != nil || strings.Join(again.Rows[0].cells(), "|") != got {
		t.Errorf("read again: %v %v", again, err)
	}
}

func TestChart(t *testing.T) {
	picture, ok, err := charts[0].draw(sample())
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	decoder, rectangles := xml.NewDecoder(strings.NewReader(picture)), 0
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v in %s", err, picture)
		}
		if start, ok := token.(xml.StartElement); ok && start.Name.Local == "rect" {
			rectangles++
		}
	}
	if rectangles != 2+2*2 { // legend, and two pairs
		t.Errorf("%d rectangles", rectangles)
	}
	if _, ok, _ := charts[1].draw(sample()); ok {
		t.Error("a chart of nothing")
	}
}

func TestDocs(t *testing.T) {
	docs := t.TempDir()
	file := filepath.Join(docs, "benchmarks.md")
	before := "top\n" + latestBegin + "old\n" + latestEnd + "middle\n" + historyBegin + "\nearlier\n"
	if err := os.WriteFile(file, []byte(before), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time adds nothing
		if err := sample().WriteDocs(docs); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	for part, count := range map[string]int{"top\n": 1, "old\n": 0, "middle\n": 1, "\nearlier\n": 1, "**2026-01-02 03:04**": 1, "| Pod create to Ready | ms |": 1, "](bench/times.svg)": 1} {
		if strings.Count(text, part) != count {
			t.Errorf("%q is there %d times, not %d:\n%s", part, strings.Count(text, part), count, text)
		}
	}
	if _, err := os.Stat(filepath.Join(docs, "bench/times.svg")); err != nil {
		t.Error(err)
	}
}

func TestCompare(t *testing.T) {
	baseline := map[string]Figure{"calls": {Value: 10}, "memory": {Value: 100, Unit: "KiB"}}
	for _, c := range []struct {
		name    string
		figures map[string]Figure
		missing map[string]error
		well    bool
		says    string
	}{
		{"equal", map[string]Figure{"calls": {Value: 10}, "memory": {Value: 100}}, nil, true, "--- PASS: calls"},
		{"within the tolerance", map[string]Figure{"calls": {Value: 12.5}, "memory": {Value: 80}}, nil, true, "--- PASS: calls"},
		{"worse", map[string]Figure{"calls": {Value: 12.6}, "memory": {Value: 100}}, nil, false, "--- FAIL: calls"},
		{"not measured", map[string]Figure{"memory": {Value: 100}}, nil, false, "--- FAIL: calls"},
		{"cannot be measured", map[string]Figure{"memory": {Value: 100}}, map[string]error{"calls": errNotCounted}, true, "--- SKIP: calls"},
		{"new", map[string]Figure{"calls": {Value: 10}, "memory": {Value: 100}, "files": {Value: 1}}, nil, false, "--- FAIL: files"},
	} {
		var out strings.Builder
		if well := Compare(&out, c.figures, c.missing, baseline); well != c.well || !strings.Contains(out.String(), c.says) {
			t.Errorf("%s: %v\n%s", c.name, well, out.String())
		}
	}
}
