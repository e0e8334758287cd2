package conformance

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const listing = `The following spec names can be used with 'ginkgo run --focus/skip':
    k8s.io/kubernetes@v1.37.2/test/e2e/node/b.go:2: [sig-node] B (a|b) does it [Conformance] [NodeConformance]
    k8s.io/kubernetes@v1.37.2/test/e2e/node/a.go:1: [sig-node] A is slow [NodeConformance] [Slow] 
    k8s.io/kubernetes@v1.37.2/test/e2e/apps/c.go:3: [sig-apps] C counts [Conformance]

`

func names(specs []Spec) []string {
	var found []string
	for _, s := range specs {
		found = append(found, s.Name)
	}
	return found
}

func TestSelect(t *testing.T) {
	specs, err := parseList([]byte(listing))
	if err != nil {
		t.Fatal(err)
	}
	if want := (Spec{"[sig-node] A is slow [NodeConformance] [Slow]", "test/e2e/node/a.go:1"}); specs[1] != want {
		t.Errorf("got %q, want %q", specs[1], want)
	}
	const a, b, c = "[sig-node] A is slow [NodeConformance] [Slow]", "[sig-node] B (a|b) does it [Conformance] [NodeConformance]", "[sig-apps] C counts [Conformance]"
	for _, test := range []struct {
		suite, focus, skip string
		part, parts        int
		want               []string
	}{
		{suite: "node", want: []string{b}},
		{suite: "node-serial", want: []string{a}},
		{suite: "conformance", want: []string{c, b}},
		{suite: "all", focus: "sig-node", want: []string{a, b}},
		{suite: "all", focus: "sig-node", skip: `\[Slow\]`, want: []string{b}},
		{suite: "all", part: 1, parts: 2, want: []string{c, b}},
		{suite: "all", part: 2, parts: 2, want: []string{a}},
	} {
		suite, err := FindSuite(test.suite)
		if err != nil {
			t.Fatal(err)
		}
		chosen, err := Selection{suite, test.focus, test.skip, test.part, test.parts}.Select(specs)
		if err != nil {
			t.Fatal(err)
		}
		if got := names(chosen); !slices.Equal(got, test.want) {
			t.Errorf("%+v: got %q", test, got)
		}
	}
	if _, err := (Selection{Suite: Suites[0], Part: 3, Parts: 2}).Select(specs); err == nil {
		t.Error("shard 3/2 was accepted")
	}
	if _, err := parseList([]byte("nothing")); err == nil {
		t.Error("a list without specs was accepted")
	}
}

func TestPatternMatchesOneSpec(t *testing.T) {
	const description = "Kubernetes e2e suite "
	re := regexp.MustCompile(pattern("[sig-node] B (a|b) [Conformance]"))
	if !re.MatchString(description + "[sig-node] B (a|b) [Conformance] ") {
		t.Error("a blank at the end is in the way")
	}
	for _, other := range []string{"[sig-node] B (a|b) [Conformance] more", "x [sig-node] B (a|b) [Conformance]", "s B a C"} {
		if re.MatchString(description + other) {
			t.Errorf("%q matches too", other)
		}
	}
}

func TestExpectations(t *testing.T) {
	has := func(feature string) (bool, error) {
		if feature != "wheels" && feature != "wings" {
			return false, errors.New("unknown")
		}
		return feature == "wheels", nil
	}
	e, err := parseExpectations(strings.NewReader("# comment\n\nfail without wings\tA\tno device\nskip\tB\tneeds a cloud\nfail\tC\tplanned\nfail without wheels\tD\tcannot roll\n"), has)
	if err != nil {
		t.Fatal(err)
	}
	got := e.Compare([]Result{
		{Spec: "A", Outcome: Failed}, {Spec: "B", Outcome: Failed}, {Spec: "C", Outcome: Passed},
		{Spec: "D", Outcome: Failed}, {Spec: "E", Outcome: Skipped}, {Spec: "F", Outcome: NotRun}, {Spec: "G", Outcome: Passed},
	})
	want := []string{
		"fail, expected skip: B", "pass, remove the expectation: C", "fail, expected pass: D", "skip, expected pass: E", "not run: F",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if unknown := e.Unknown([]Spec{{Name: "A"}, {Name: "B"}}); len(unknown) != 1 || !strings.HasSuffix(unknown[0], ": C") {
		t.Errorf("unknown: %q", unknown)
	}
	for _, bad := range []string{"fail\tA", "fail\tA\t ", "pass\tA\twhy", "fail\tA\twhy\nskip\tA\twhy", "fail without fins\tA\twhy"} {
		if _, err := parseExpectations(strings.NewReader(bad), has); err == nil {
			t.Errorf("accepted: %q", bad)
		}
	}
}

const report = `[{"SpecialSuiteFailureReasons": %s, "SpecReports": [
 {"LeafNodeType": "SynchronizedBeforeSuite", "State": "%s", "Failure": {"Message": "no nodes"}},
 {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig-node] A"], "LeafNodeText": "passes", "State": "passed", "RunTime": 1540000000},
 {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig-node] A"], "LeafNodeText": "fails ", "State": "failed",
  "Failure": {"Message": "\nTimed out after 300s.\n  Expected\n\n   Pod\n to run\n and more\n"}},
 {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig-node] A"], "LeafNodeText": "needs a cloud", "State": "skipped", "Failure": {"Message": "only on a cloud"}},
 {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig-node] A"], "LeafNodeText": "was not chosen", "State": "skipped"},
 {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig-node] A"], "LeafNodeText": "was cut off", "State": "interrupted", "Failure": {"Message": "SIGINT"}}
]}]`

func TestParseReport(t *testing.T) {
	raw := func(reasons, state string) []byte {
		text := strings.Replace(report, "%s", reasons, 1)
		return []byte(strings.Replace(text, "%s", state, 1))
	}
	var specs []Spec
	for _, name := range []string{"passes", "fails", "needs a cloud", "was cut off", "was not chosen"} {
		specs = append(specs, Spec{"[sig-node] A " + name, "a.go:1"})
	}
	results, err := parseReport(raw("[]", "passed"), specs)
	if err != nil {
		t.Fatal(err)
	}
	want := []Result{
		{specs[0].Name, Passed, 1.5, false, "", "a.go:1"},
		{specs[1].Name, Failed, 0, false, "Timed out after 300s. Expected Pod to run", "a.go:1"},
		{specs[2].Name, Skipped, 0, false, "only on a cloud", "a.go:1"},
		{specs[3].Name, NotRun, 0, false, "SIGINT", "a.go:1"},
		{specs[4].Name, NotRun, 0, false, "", "a.go:1"},
	}
	if !slices.Equal(results, want) {
		t.Errorf("got %+v", results)
	}
	if _, err := parseReport(raw("[]", "failed"), specs); err == nil || !strings.Contains(err.Error(), "no nodes") {
		t.Errorf("failed set-up: %v", err)
	}
	if _, err := parseReport(raw(`["Suite timeout"]`, "passed"), specs); err == nil {
		t.Error("a suite that timed out is no error")
	}
}

func TestMachineHas(t *testing.T) {
	for _, feature := range []string{"CAP_SYS_RESOURCE", "dummy-links"} {
		if _, err := MachineHas(feature); err != nil {
			t.Errorf("%s: %v", feature, err)
		}
	}
	if can, err := GuestsHave("CAP_SYS_RESOURCE"); err != nil || !can {
		t.Errorf("guests: %t, %v", can, err)
	}
	if _, err := MachineHas("wings"); err == nil {
		t.Error("wings are unknown")
	}
	// The kernel knows no such one.
	if there, err := hasCapability(63); there || err != nil {
		t.Errorf("capability 63: %v, %v", there, err)
	}
}

func TestMergeRetry(t *testing.T) {
	first := []Result{{Spec: "a", Outcome: Passed}, {Spec: "b", Outcome: Failed, Reason: "timed out"}, {Spec: "c", Outcome: Failed, Reason: "wrong"}}
	MergeRetry(first, []Result{{Spec: "b", Outcome: Passed}, {Spec: "c", Outcome: Failed, Reason: "wrong again"}})
	want := []Result{{Spec: "a", Outcome: Passed}, {Spec: "b", Outcome: Passed, Flaky: true, Reason: "timed out"}, {Spec: "c", Outcome: Failed, Reason: "wrong"}}
	if !slices.Equal(first, want) {
		t.Errorf("%+v", first)
	}
	run := Run{Results: first}
	if run.Flakes() != 1 || run.Count(Passed) != 2 {
		t.Errorf("%d flakes, %d passed", run.Flakes(), run.Count(Passed))
	}
}

func TestProgress(t *testing.T) {
	const output = `Will run 4 of 3206 specs
------------------------------
• [4.207 seconds]
[sig-node] A [Feature:X] should [It] work [Conformance] [sig-node, Conformance]
a.go:1

  Timeline >>
  STEP: ---- @ 11/22/26
  << Timeline
------------------------------
• [FAILED] [2.500 seconds]
[sig-node] A [It] should work [Conformance] more [sig-node]
a.go:2
------------------------------
S [SKIPPED] [0.100 seconds]
[sig-node] B [It] needs a cloud [sig-node]
------------------------------
• [0.001 seconds]
[sig-node] unknown [It] spec
------------------------------
• [INTERRUPTED] [7.000 seconds]
[sig-node] A [It] should work [Conformance] [sig-node]
------------------------------
[SynchronizedBeforeSuite] PASSED [1.203 seconds]
[SynchronizedBeforeSuite]
a.go:3
`
	var specs []Spec
	for _, name := range []string{
		"[sig-node] A [Feature:X] should work [Conformance]", "[sig-node] A should work [Conformance]",
		"[sig-node] A should work [Conformance] more", "[sig-node] B needs a cloud",
	} {
		specs = append(specs, Spec{Name: name})
	}
	want := []Result{
		{Spec: specs[0].Name, Outcome: Passed, Seconds: 4.2}, {Spec: specs[2].Name, Outcome: Failed, Seconds: 2.5},
		{Spec: specs[3].Name, Outcome: Skipped, Seconds: 0.1},
	}
	for _, size := range []int{1, 7, len(output)} { // however the output is cut into pieces
		var got []Result
		p := newProgress(specs, func(r Result) { got = append(got, r) })
		for piece := range slices.Chunk([]byte(output), size) {
			if n, err := p.Write(piece); n != len(piece) || err != nil {
				t.Fatal(n, err)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("pieces of %d: %+v", size, got)
		}
	}
}

func TestJournalSurvivesACrash(t *testing.T) {
	dir, subject := t.TempDir(), Subject{Node: "gantry", Commit: "c", Binary: "b"}
	j, err := OpenJournal(dir, subject)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []Result{{Spec: "A", Outcome: Failed}, {Spec: "A", Outcome: Passed}, {Spec: "B", Outcome: Passed}} {
		if err := j.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	j.Close()
	// The last line is cut off in the middle.
	path := filepath.Join(dir, "gantry-c-b.jsonl")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw[:len(raw)-5], 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what is added after the cut-off line is readable too
		j, err = OpenJournal(dir, subject)
		if err != nil {
			t.Fatal(err)
		}
		if r, ok := j.Last("A"); !ok || r.Outcome != Passed {
			t.Errorf("A: %+v %v", r, ok)
		}
		if _, ok := j.Last("B"); ok {
			t.Error("half a line was read")
		}
		if err := j.Add(Result{Spec: "C", Outcome: Passed}); err != nil {
			t.Fatal(err)
		}
		j.Close()
	}
	j, err = OpenJournal(dir, subject)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if _, ok := j.Last("C"); !ok {
		t.Error("C is forgotten")
	}
}

func TestWriteDocs(t *testing.T) {
	runs := t.TempDir()
	save := func(name string, r *Run) {
		t.Helper()
		dir := filepath.Join(runs, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := r.Save(dir); err != nil {
			t.Fatal(err)
		}
	}
	subject := Subject{Node: "gantry", Commit: "0123456789abcdef", Binary: "b1", Kubernetes: "v1.37.2"}
	save("1", &Run{Subject: subject, Suite: "node", Nodes: 2, Procs: 12, Seconds: 61, Results: []Result{
		{Spec: "A", Outcome: Passed}, {Spec: "B", Outcome: Failed, Reason: "a | b"}, {Spec: "C", Outcome: Failed},
	}})
	// Neither of these is a run of the whole suite.
	save("2", &Run{Subject: subject, Suite: "node", Focus: "A", Results: []Result{{Spec: "A", Outcome: Passed}}})
	save("3", &Run{Subject: subject, Suite: "node", Results: []Result{{Spec: "A", Outcome: NotRun}}})
	latest, err := LatestRuns(runs)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "conformance.md")
	if err := os.WriteFile(file, []byte("before\n"+docsBegin+"old\n"+docsEnd+"after\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time changes nothing
		if err := WriteDocs(file, latest, Expectations{"C": {Failed, "C", "known"}}); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"before\n", "| node | gantry | v1.37.2 | 0123456789ab, sha256:b1 |", "| 2 × 12 | 3 | 1 | 2 | 0 | 0 | 1m1s |",
		`| B | fail | a \| b | **not expected** |`, "| C | fail |  | known |", docsEnd + "after\n",
	} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("%q is missing in\n%s", want, raw)
		}
	}
	if strings.Contains(string(raw), "old") {
		t.Errorf("the old results are still there:\n%s", raw)
	}
}
