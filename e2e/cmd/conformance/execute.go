package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"gantry.local/e2e/internal/cluster"
	"gantry.local/e2e/internal/conformance"
	"gantry.local/e2e/internal/images"
)

// test is one run in the making.
type test struct {
	*options
	home             cluster.Home
	repository, base string
	selection        conformance.Selection
	subject          conformance.Subject
	dir              string
}

// execute makes the cluster, runs what has to be run, and removes the cluster.
func (t *test) execute(ctx context.Context, chosen []conformance.Spec) (*conformance.Run, error) {
	started := time.Now()
	t.dir = filepath.Join(t.base, "runs", started.UTC().Format("20060102-150405")+"-"+t.suite)
	if err := os.MkdirAll(t.dir, 0o755); err != nil {
		return nil, err
	}
	journal, err := conformance.OpenJournal(filepath.Join(t.base, "journal"), t.subject)
	if err != nil {
		return nil, err
	}
	defer journal.Close()
	run := &conformance.Run{
		Subject: t.subject, Suite: t.suite, Focus: t.focus, Skip: t.skip, Shard: t.shard,
		Nodes: t.nodes, Procs: t.procs, Started: started,
	}
	var todo []conformance.Spec
	known := map[string]conformance.Result{}
	for _, spec := range chosen {
		if last, ok := journal.Last(spec.Name); t.resume && ok && last.Outcome == conformance.Passed {
			known[spec.Name] = last
			continue
		}
		todo = append(todo, spec)
	}
	run.Resumed = len(known)
	var failure error
	if len(todo) > 0 {
		say("%d specs to run, %d passed before", len(todo), len(known))
		var results []conformance.Result
		results, failure = t.onCluster(ctx, todo, journal)
		for _, r := range results {
			if r.Outcome != conformance.NotRun {
				if err := journal.Add(r); err != nil {
					return nil, err
				}
			}
			known[r.Spec] = r
		}
		if results == nil {
			return run, failure
		}
	}
	for _, spec := range chosen {
		r := known[spec.Name]
		r.Location = spec.Location
		run.Results = append(run.Results, r)
	}
	run.Seconds = time.Since(started).Round(time.Second).Seconds()
	return run, failure
}

// onCluster runs specs on the cluster that the command line asks for.
func (t *test) onCluster(ctx context.Context, todo []conformance.Spec, journal *conformance.Journal) (results []conformance.Result, err error) {
	name := t.cluster
	if name == "" {
		name = t.name
		if err := t.buildImages(ctx); err != nil {
			return nil, err
		}
		if !t.keep {
			// Also when ctx has ended.
			defer func() {
				err = errors.Join(err, t.hackCluster(context.WithoutCancel(ctx), "down", "--name", name))
			}()
		}
		up := []string{"up", "--name", name, "--nodes", fmt.Sprint(t.nodes)}
		if t.node == "kubelet" {
			up = []string{"up", "--name", name, "--nodes", "0", "--stock-nodes", fmt.Sprint(t.nodes)}
		}
		for _, arg := range t.agentArgs {
			up = append(up, "--agent-arg="+arg)
		}
		if err := t.hackCluster(ctx, up...); err != nil {
			return nil, err
		}
	}
	c, err := t.home.Open(name)
	if err != nil {
		return nil, err
	}
	c.Close() // give up the lock: the cluster must stay usable while the tests run
	if err := t.checkRegistry(ctx, c); err != nil {
		return nil, err
	}
	if t.addons {
		say("installing kube-proxy and CoreDNS")
		if err := conformance.Addons(ctx, c, time.Minute); err != nil {
			return nil, fmt.Errorf("%w\n(--addons=false runs the tests without; the suite node does not need them)", err)
		}
	}
	list, err := images.RepoList(c.Registry())
	if err != nil {
		return nil, err
	}
	repoList := filepath.Join(t.dir, "repositories.yaml")
	if err := os.WriteFile(repoList, list, 0o644); err != nil {
		return nil, err
	}
	began, ended, failed := time.Now(), 0, 0
	runner := conformance.Runner{
		Bin: t.home.Bin, Dir: t.dir, NetworkNamespace: c.ControlPlaneNamespace(), Kubeconfig: c.Kubeconfig(),
		RepoList: repoList, Procs: min(t.procs, len(todo)), Timeout: t.timeout,
		Done: func(r conformance.Result) {
			ended++
			if r.Outcome == conformance.Failed {
				failed++
			}
			fmt.Fprintf(os.Stderr, "[%4d/%d %6s, %d failed] %s  %s\n", ended, len(todo), time.Since(began).Round(time.Second), failed, r.Outcome, r.Spec)
			if err := journal.Add(r); err != nil {
				fmt.Fprintln(os.Stderr, "cannot record the result:", err)
			}
		},
	}
	say("running; the log is %s", filepath.Join(t.dir, conformance.LogFile))
	results, err = runner.Run(ctx, todo)
	if err != nil || !t.retry {
		return results, err
	}
	return results, t.again(ctx, runner, todo, results)
}

// mostRetries is how many failures a busy machine may explain.
const mostRetries = 8

// again runs the failed specs once more, one at a time. One that passes now is a
// flake: it is called so in the results, and its first failure stays in the log.
func (t *test) again(ctx context.Context, runner conformance.Runner, todo []conformance.Spec, results []conformance.Result) error {
	var failed []conformance.Spec
	for i, r := range results {
		if r.Outcome == conformance.Failed {
			failed = append(failed, todo[i])
		}
	}
	if len(failed) == 0 || len(failed) > mostRetries {
		return nil
	}
	say("%d specs failed and are run once more", len(failed))
	runner.Dir, runner.Procs = filepath.Join(t.dir, "retry"), 1
	if err := os.MkdirAll(runner.Dir, 0o755); err != nil {
		return err
	}
	second, err := runner.Run(ctx, failed)
	if err != nil {
		return err
	}
	conformance.MergeRetry(results, second)
	return nil
}

func (t *test) hackCluster(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(t.repository, "hack/cluster"), args...)
	cmd.Env = append(os.Environ(), "GANTRY_BIN="+t.home.Gantry)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("hack/cluster %s: %w", args[0], err)
	}
	return nil
}

func (t *test) buildImages(ctx context.Context) error {
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	list.Dir, list.Stderr = filepath.Join(t.repository, "e2e"), os.Stderr
	source, err := list.Output()
	if err != nil {
		return fmt.Errorf("go list k8s.io/kubernetes: %w", err)
	}
	if err := images.BuildUpstream(ctx, t.home.Bin, filepath.Dir(t.home.Images), strings.TrimSpace(string(source)), os.Stderr); err != nil {
		return fmt.Errorf("images: %w", err)
	}
	return nil
}

// checkRegistry makes sure that the cluster's registry has the images: one that
// was started before they were built has not.
func (t *test) checkRegistry(ctx context.Context, c *cluster.Cluster) error {
	url := "http://" + c.Registry() + "/v2/" + strings.Replace(images.KubeProxy, ":", "/manifests/", 1)
	request, err := http.NewRequestWithContext(ctx, http.MethodHead, url, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("registry of cluster %s: %w", c.Name, err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the registry of cluster %s does not have the images of upstream's tests; make the cluster anew by `hack/conformance --keep --name %s`", c.Name, c.Name)
	}
	return nil
}

// conclude writes and prints the results of a run.
func (t *test) conclude(run *conformance.Run) error {
	if err := run.Save(t.dir); err != nil {
		return err
	}
	fmt.Println()
	if err := run.Print(os.Stdout); err != nil {
		return err
	}
	fmt.Printf("\nreports: %s\n", t.dir)
	if len(run.Problems) == 0 {
		fmt.Println("all as expected (e2e/expectations.txt)")
		return nil
	}
	fmt.Printf("\nnot as expected (e2e/expectations.txt):\n")
	for _, problem := range run.Problems {
		fmt.Println("  " + problem)
	}
	return errNotAsExpected
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
