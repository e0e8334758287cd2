// Command conformance runs upstream's end-to-end tests against a test cluster.
// hack/conformance runs it.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/cluster"
	"gantry.local/e2e/internal/conformance"
	"gantry.local/e2e/internal/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "hack/conformance:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	suite, focus, skip, shard string
	procs, nodes              int
	timeout                   time.Duration
	name, cluster, node       string
	agentArgs                 []string
	resume, keep, addons      bool
	retry                     bool
	dryRun, writeDocs         bool
	missingImages             bool
}

// environment is the value of a variable, which Make passes on, or a default.
func environment(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

func command() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:           "hack/conformance",
		Short:         "Run upstream's tests against a cluster of Gantry nodes",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	var suites []string
	for _, s := range conformance.Suites {
		suites = append(suites, fmt.Sprintf("  %-12s %s", s.Name, s.Description))
	}
	c.Long = c.Short + ".\n\nSuites:\n" + strings.Join(suites, "\n") + "\n\nThe variables SUITE, FOCUS, SKIP, PROCS and NODE are defaults of the flags of these names."
	procs, err := strconv.Atoi(environment("PROCS", "12"))
	if err != nil {
		procs = 0 // refused below, with the other impossible numbers
	}
	flags := c.Flags()
	flags.StringVar(&o.suite, "suite", environment("SUITE", "node"), "which part of upstream's tests")
	flags.StringVar(&o.focus, "focus", os.Getenv("FOCUS"), "only specs whose name this regular expression matches")
	flags.StringVar(&o.skip, "skip", os.Getenv("SKIP"), "not the specs whose name this regular expression matches")
	flags.StringVar(&o.shard, "shard", "", "only part I of N, written I/N")
	flags.IntVar(&o.procs, "procs", procs, "specs at a time")
	flags.IntVar(&o.nodes, "nodes", 2, "nodes of the cluster")
	flags.DurationVar(&o.timeout, "timeout", 3*time.Hour, "interrupt the tests after this time")
	flags.StringVar(&o.name, "name", "conformance", "name of the cluster that is made and removed")
	flags.StringVar(&o.cluster, "cluster", "", "use this running cluster instead")
	flags.StringVar(&o.node, "node", environment("NODE", "gantry"), "what the nodes are: gantry, or kubelet for the stock node (kubelet, containerd, runc)")
	flags.StringArrayVar(&o.agentArgs, "agent-arg", nil, "further argument of every agent (repeatable)")
	flags.BoolVar(&o.resume, "resume", false, "do not run again what passed before, with this commit and program")
	flags.BoolVar(&o.retry, "retry", false, "run up to eight failed specs once more, one at a time; those that pass then are reported as flakes")
	flags.BoolVar(&o.keep, "keep", false, "do not remove the cluster")
	flags.BoolVar(&o.addons, "addons", true, "install kube-proxy and CoreDNS")
	flags.BoolVar(&o.dryRun, "dry-run", false, "only list the chosen specs")
	flags.BoolVar(&o.writeDocs, "write-docs", false, "only write the results of the last whole runs into docs/conformance.md")
	flags.BoolVar(&o.missingImages, "missing-images", false, "only list the images of upstream's tests that are not built here")
	return c
}

func (o *options) run(ctx context.Context) error {
	h, err := cluster.HomeFromEnvironment()
	if err != nil {
		return err
	}
	repository := os.Getenv("GANTRY_REPOSITORY")
	base := filepath.Join(repository, "build/conformance")
	if o.missingImages {
		return printMissing(h)
	}
	listed := filepath.Join(repository, "e2e/expectations.txt")
	expectations, err := conformance.ReadExpectations(listed, conformance.MachineHas)
	if err != nil {
		return err
	}
	if o.writeDocs {
		return writeDocs(repository, base, expectations)
	}
	selection, err := o.selection()
	if err != nil {
		return err
	}
	specs, err := conformance.List(ctx, filepath.Join(h.Bin, "e2e.test"))
	if err != nil {
		return err
	}
	chosen, err := selection.Select(specs)
	if err != nil {
		return err
	}
	if len(chosen) == 0 {
		return fmt.Errorf("no spec of suite %s matches --focus %q without --skip %q", o.suite, o.focus, o.skip)
	}
	if o.dryRun {
		for _, s := range chosen {
			fmt.Printf("%s\t%s\n", s.Location, s.Name)
		}
		fmt.Fprintf(os.Stderr, "%d of %d specs\n", len(chosen), len(specs))
		return nil
	}
	if unknown := expectations.Unknown(specs); len(unknown) > 0 {
		return fmt.Errorf("e2e/expectations.txt: %s", strings.Join(unknown, "\n"))
	}
	guests, err := o.adopt(&h)
	if err != nil {
		return err
	}
	if guests {
		if expectations, err = conformance.ReadExpectations(listed, conformance.GuestsHave); err != nil {
			return err
		}
	}
	program := h.Gantry
	if o.node == "kubelet" {
		program = h.StockNode
	}
	subject, err := identify(ctx, repository, o.node, program)
	if err != nil {
		return err
	}
	t := &test{options: o, home: h, repository: repository, base: base, selection: selection, subject: subject}
	run, err := t.execute(ctx, chosen)
	if err != nil && (run == nil || len(run.Results) == 0) {
		return err
	}
	run.Problems = expectations.Compare(run.Results)
	if err != nil {
		run.Problems = append([]string{err.Error()}, run.Problems...)
	}
	return t.conclude(run)
}

// adopt finds out what the nodes are: of a running cluster, it is not what the
// command line says. It returns whether all are virtual machines.
func (o *options) adopt(h *cluster.Home) (guests bool, err error) {
	if o.cluster == "" {
		return false, nil
	}
	c, err := h.Open(o.cluster)
	if err != nil {
		return false, err
	}
	defer c.Close()
	o.nodes, o.node, h.Gantry = len(c.Nodes), "gantry", c.GantryBinary
	if slices.ContainsFunc(c.Nodes, func(n cluster.Node) bool { return n.Stock }) {
		o.node = "kubelet"
	}
	return !slices.ContainsFunc(c.Nodes, func(n cluster.Node) bool { return !n.Guest }), nil
}

func (o *options) selection() (conformance.Selection, error) {
	suite, err := conformance.FindSuite(o.suite)
	if err != nil {
		return conformance.Selection{}, err
	}
	if o.procs < 1 || o.procs > 100 {
		return conformance.Selection{}, fmt.Errorf("--procs (PROCS) %d: use 1 to 100", o.procs)
	}
	if o.node != "gantry" && o.node != "kubelet" {
		return conformance.Selection{}, fmt.Errorf("--node (NODE) %q: use gantry or kubelet", o.node)
	}
	s := conformance.Selection{Suite: suite, Focus: o.focus, Skip: o.skip}
	if o.shard != "" {
		if n, err := fmt.Sscanf(o.shard, "%d/%d", &s.Part, &s.Parts); n != 2 || err != nil || s.Parts < 1 {
			return s, fmt.Errorf("--shard %q: write I/N, for example 1/4", o.shard)
		}
	}
	return s, nil
}

// identify names what is tested.
func identify(ctx context.Context, repository, node, program string) (conformance.Subject, error) {
	s := conformance.Subject{Node: node, Kubernetes: kubernetesVersion()}
	git := func(args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, "git", append([]string{"-C", repository}, args...)...).Output()
		return strings.TrimSpace(string(out)), err
	}
	var err error
	if s.Commit, err = git("rev-parse", "HEAD"); err != nil {
		return s, fmt.Errorf("git rev-parse HEAD: %w", err)
	}
	changes, err := git("status", "--porcelain")
	if err != nil {
		return s, fmt.Errorf("git status: %w", err)
	}
	if changes != "" {
		s.Commit += "-dirty"
	}
	f, err := os.Open(program)
	if err != nil {
		return s, fmt.Errorf("no node program: %w; build it (cargo build --release) or name one by GANTRY_BIN", err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return s, err
	}
	s.Binary = hex.EncodeToString(sum.Sum(nil))[:12]
	return s, nil
}

func kubernetesVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dependency := range info.Deps {
			if dependency.Path == "k8s.io/kubernetes" {
				return dependency.Version
			}
		}
	}
	return "unknown"
}

func printMissing(h cluster.Home) error {
	missing, err := images.Missing(h.Images)
	if err != nil {
		return err
	}
	for _, image := range missing {
		fmt.Println(image)
	}
	return nil
}

func writeDocs(repository, base string, expectations conformance.Expectations) error {
	runs, err := conformance.LatestRuns(filepath.Join(base, "runs"))
	if err != nil {
		return err
	}
	return conformance.WriteDocs(filepath.Join(repository, "docs/conformance.md"), runs, expectations)
}

var errNotAsExpected = errors.New("the results are not as expected")
