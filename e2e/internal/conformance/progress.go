package conformance

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
)

// progress reads the output of `ginkgo -v` as it comes, to tell which spec has
// ended. The results proper are those of the report, which is written at the
// end. (Upstream's --progress-report-url does not report single specs.)
type progress struct {
	done   func(Result)
	wanted map[string]bool
	line   []byte
	// after is the number of lines since a delimiter; -1: none of interest.
	after  int
	result Result
}

func newProgress(specs []Spec, done func(Result)) *progress {
	p := &progress{done: done, wanted: map[string]bool{}, after: -1}
	for _, s := range specs {
		p.wanted[s.Name] = true
	}
	return p
}

// Write implements io.Writer.
func (p *progress) Write(data []byte) (int, error) {
	const longest = 64 << 10 // of a line that matters
	for rest := data; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte("\n"))
		if len(p.line)+len(part) <= longest {
			p.line = append(p.line, part...)
		}
		if ended {
			p.read(string(p.line))
			p.line = p.line[:0]
		}
		rest = after
	}
	return len(data), nil
}

const delimiter = "------------------------------"

var (
	heading = regexp.MustCompile(`^(•|S) (?:\[([A-Z! ]+)\] )?\[([0-9.]+) seconds\]$`)
	leaf    = regexp.MustCompile(` ?\[It\]`)
)

// A spec that has ended is a delimiter, a heading, and the name with [It]
// before its last part and the labels at the end.
func (p *progress) read(line string) {
	if line == delimiter {
		p.after = 0
		return
	}
	switch p.after {
	case 0:
		p.after = -1
		// What was interrupted has not failed.
		if m := heading.FindStringSubmatch(line); m != nil && m[2] != "INTERRUPTED" && m[2] != "ABORTED" {
			p.after, p.result = 1, Result{Outcome: Failed}
			if m[1] == "S" {
				p.result.Outcome = Skipped
			} else if m[2] == "" {
				p.result.Outcome = Passed
			}
			if seconds, err := strconv.ParseFloat(m[3], 64); err == nil {
				p.result.Seconds = float64(int(seconds*10+0.5)) / 10
			}
		}
	case 1:
		p.after = -1
		text := leaf.ReplaceAllString(line, "")
		best := ""
		for name := range p.wanted {
			if len(name) > len(best) && (text == name || strings.HasPrefix(text, name+" ")) {
				best = name
			}
		}
		if best != "" {
			delete(p.wanted, best)
			p.result.Spec = best
			p.done(p.result)
		}
	}
}
