package bench

import (
	"math"
	"slices"
)

// Summary describes the samples that one stack gave for one metric.
type Summary struct {
	Samples int     `json:"samples"`
	Median  float64 `json:"median"`
	P90     float64 `json:"p90"`
	Min     float64 `json:"min"`
	Max     float64 `json:"max"`
}

// summarize needs at least one value.
func summarize(values []float64) Summary {
	sorted := slices.Sorted(slices.Values(values))
	return Summary{
		Samples: len(sorted), Median: quantile(sorted, 0.5), P90: quantile(sorted, 0.9),
		Min: sorted[0], Max: sorted[len(sorted)-1],
	}
}

// quantile of sorted values, interpolated between the two nearest.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	low := int(math.Floor(at))
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (sorted[high]-sorted[low])*(at-float64(low))
}

// Ratio is what Gantry needs as a part of what the stock node needs.
type Ratio struct {
	// Median is the ratio of the medians of all samples.
	Median float64 `json:"median"`
	// Low and High are the extremes over the rounds, each of which measured
	// both stacks shortly after each other.
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

// ratio compares two stacks' samples, by round. It is false if the peer needs
// nothing that could be measured.
func ratio(ours, peers [][]float64) (Ratio, bool) {
	median := func(values []float64) float64 { return summarize(values).Median }
	all := median(slices.Concat(peers...))
	if all <= 0 {
		return Ratio{}, false
	}
	r := Ratio{Median: median(slices.Concat(ours...)) / all}
	r.Low, r.High = r.Median, r.Median
	for i := range min(len(ours), len(peers)) {
		if len(ours[i]) == 0 || len(peers[i]) == 0 {
			continue
		}
		if peer := median(peers[i]); peer > 0 {
			one := median(ours[i]) / peer
			r.Low, r.High = min(r.Low, one), max(r.High, one)
		}
	}
	return r, true
}
