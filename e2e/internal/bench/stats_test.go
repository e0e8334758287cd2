package bench

import (
	"math"
	"testing"
)

func TestSummary(t *testing.T) {
	s := summarize([]float64{5, 1, 3, 2, 4})
	if s.Median != 3 || s.Min != 1 || s.Max != 5 || s.Samples != 5 || math.Abs(s.P90-4.6) > 1e-9 {
		t.Errorf("%+v", s)
	}
	if s := summarize([]float64{7}); s.Median != 7 || s.P90 != 7 {
		t.Errorf("of one value: %+v", s)
	}
}

func TestRatio(t *testing.T) {
	r, ok := ratio([][]float64{{1, 1}, {2}, {}}, [][]float64{{10, 10}, {10}, {5}})
	if !ok || r.Low != 0.1 || r.High != 0.2 || r.Median != 0.1 {
		t.Errorf("%+v %v", r, ok)
	}
	if r, ok := ratio([][]float64{{1}}, [][]float64{{0}}); ok {
		t.Errorf("nothing to compare with, and yet %+v", r)
	}
}
