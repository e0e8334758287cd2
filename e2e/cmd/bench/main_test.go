package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gantry.local/e2e/internal/bench"
)

// repository makes a repository with one commit and an agent in it.
func repository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	git(t, dir, "init", "--quiet")
	write(t, filepath.Join(dir, "gantry"), "program")
	git(t, dir, "add", "gantry")
	commit(t, dir)
	return dir
}

func commit(t *testing.T, dir string) {
	t.Helper()
	git(t, dir, "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false", "commit", "--quiet", "--allow-empty", "--message=test")
}

func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	if out, err := exec.Command("git", append([]string{"-C", dir}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("git %v: %v: %s", args, err, out)
	}
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// inRepository are options of a run that measures Gantry alone.
func inRepository(dir string) *options {
	o := &options{repository: dir, stacks: []string{bench.Gantry}}
	o.home.Gantry = filepath.Join(dir, "gantry")
	o.Pods, o.Churn, o.Scenarios = []int{50}, 10, []string{"create*", "churn", "create"}
	return o
}

func given(flags ...string) func(string) bool {
	return func(flag string) bool { return slices.Contains(flags, flag) }
}

func TestBegin(t *testing.T) {
	dir := repository(t)
	o := inRepository(dir)
	result, err := o.begin(t.Context(), given())
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Commit) != 40 || len(result.Program) != 12 || !slices.Equal(result.Planned, []string{"create", "create-volumes", "churn"}) {
		t.Errorf("%+v", result)
	}
	if !strings.HasPrefix(o.json, filepath.Join(dir, "build/bench/")) {
		t.Errorf("result in %s", o.json)
	}
	result.Complete = []string{"create"}
	if err := result.Save(o.json); err != nil {
		t.Fatal(err)
	}

	again := &options{repository: dir, resume: o.json, home: o.home, stacks: []string{bench.Gantry, bench.Stock}}
	again.Churn, again.Pods = 2000, []int{50}
	if _, err := again.begin(t.Context(), given("pods", "churn")); err == nil || !strings.Contains(err.Error(), "churn: it was 10 and --churn says 2000") {
		t.Errorf("a flag that contradicts: %v", err)
	}
	resumed, err := again.begin(t.Context(), given("pods"))
	if err != nil {
		t.Fatal(err)
	}
	if lacks := resumed.Lacks(again.Scenarios); !slices.Equal(lacks, []string{"create-volumes", "churn"}) {
		t.Errorf("lacks %v", lacks)
	}
	if again.Churn != 10 || !slices.Equal(again.stacks, o.stacks) || again.json != o.json {
		t.Errorf("options of the earlier run: %+v", again)
	}

	refused := func(field string) {
		t.Helper()
		_, err := again.begin(t.Context(), given())
		if err == nil || !strings.HasPrefix(err.Error(), "--resume "+o.json+": "+field+": it was ") {
			t.Errorf("another %s: %v", field, err)
		}
	}
	write(t, filepath.Join(dir, "gantry"), "edited")
	refused("commit")
	git(t, dir, "update-index", "--assume-unchanged", "gantry")
	refused("program")
	write(t, filepath.Join(dir, "gantry"), "program")
	commit(t, dir)
	refused("commit")
}

func TestUnfinished(t *testing.T) {
	o, failure := &options{json: "r.json"}, errors.New("scenario two failed")
	result := &bench.Result{Planned: []string{"one", "two", "three"}}
	if err := o.unfinished(result, failure); !errors.Is(err, failure) || !strings.Contains(err.Error(), "no result was written") {
		t.Error(err)
	}
	result.Complete = []string{"one"}
	err := o.unfinished(result, failure)
	for _, part := range []string{"r.json has what is complete: one\n", "lacks: two three\n", "`hack/bench --resume r.json`"} {
		if !errors.Is(err, failure) || !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in %v", part, err)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, other := range []string{"--from=x", "--ci", "--json=x"} {
		c := command()
		c.SetArgs([]string{"--resume=x", other})
		if err := c.Execute(); err == nil || !strings.Contains(err.Error(), "none of the others") {
			t.Errorf("--resume with %s: %v", other, err)
		}
	}
}
