// Command bench measures Gantry beside a stock node. hack/bench runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/bench"
	"gantry.local/e2e/internal/cluster"
	"gantry.local/e2e/internal/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "hack/bench:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	bench.Options
	cluster, name string
	stacks        []string
	keep          bool
	strict        bool
	json, from    string
	resume        string
	writeDocs     bool
	ci            bool
	baseline      string
	writeBaseline bool
	repository    string
	home          cluster.Home
}

func command() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:           "hack/bench",
		Short:         "Measure Gantry beside kubelet, containerd and runc, on one control plane, in one run",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context(), cmd.Flags().Changed) },
	}
	flags := c.Flags()
	flags.StringSliceVar(&o.Scenarios, "scenarios", nil, "only these, by name or pattern (burst-*); an unknown one lists all")
	flags.IntSliceVar(&o.Pods, "pods", []int{50, 100, 250}, "numbers of Pods for burst (up to 100) and idle")
	flags.IntVar(&o.Churn, "churn", 2000, "number of Pods that come and go in churn")
	flags.BoolVar(&o.Quick, "quick", false, "fewer and shorter rounds: to try something, not for claims")
	flags.StringSliceVar(&o.stacks, "stacks", []string{bench.Gantry, bench.Stock}, "which nodes to measure")
	flags.StringVar(&o.cluster, "cluster", "", "use this running cluster (up --nodes 1 --stock-nodes 1 --audit), started after the images were built")
	flags.StringVar(&o.name, "name", "bench", "name of the cluster that is made and removed")
	flags.BoolVar(&o.keep, "keep", false, "do not remove the cluster")
	flags.BoolVar(&o.strict, "strict", false, "fail if a bar is missed")
	flags.StringVar(&o.json, "json", "", "write the result there, after each scenario (default build/bench/TIME.json)")
	flags.StringVar(&o.from, "from", "", "measure nothing: take the result of an earlier run from its JSON")
	flags.StringVar(&o.resume, "resume", "", "go on with the run that wrote this JSON: measure what it lacks, with its options, and add it")
	flags.BoolVar(&o.writeDocs, "write-docs", false, "write charts, table and history into docs")
	flags.BoolVar(&o.ci, "ci", false, "Gantry alone: fail if a figure that does not depend on the machine is more than 25 % above e2e/bench-baseline.json")
	flags.BoolVar(&o.writeBaseline, "write-baseline", false, "with --ci: write the figures as the new baseline")
	for _, other := range []string{"from", "ci", "json"} {
		c.MarkFlagsMutuallyExclusive("resume", other)
	}
	return c
}

// run does what the command line asks for; given says whether it has a flag.
func (o *options) run(ctx context.Context, given func(flag string) bool) error {
	var err error
	if o.home, err = cluster.HomeFromEnvironment(); err != nil {
		return err
	}
	o.repository, o.Progress = os.Getenv("GANTRY_REPOSITORY"), os.Stderr
	o.baseline = filepath.Join(o.repository, "e2e/bench-baseline.json")
	if err := o.check(); err != nil {
		return err
	}
	if o.from != "" {
		result, err := bench.Load(o.from)
		if err != nil {
			return err
		}
		return o.conclude(result)
	}
	if o.ci {
		return o.onCluster(ctx, o.compare)
	}
	result, err := o.begin(ctx, given)
	if err != nil {
		return err
	}
	if len(result.Lacks(o.Scenarios)) == 0 {
		fmt.Fprintf(os.Stderr, "%s has all of it\n\n", o.json)
		return o.conclude(result)
	}
	if err := o.buildImages(ctx); err != nil {
		return err
	}
	return o.onCluster(ctx, func(ctx context.Context, b *bench.Bench) error { return o.measure(ctx, b, result) })
}

// begin is the result to which scenarios will be added: an empty one, or that of
// the run that is resumed. What can be refused is, before minutes are spent.
func (o *options) begin(ctx context.Context, given func(flag string) bool) (result *bench.Result, err error) {
	if err := o.useCluster(); err != nil {
		return nil, err
	}
	if o.resume != "" {
		if result, err = bench.LoadUnfinished(o.resume); err != nil {
			return nil, err
		}
		if err := o.follow(result, given); err != nil {
			return nil, fmt.Errorf("--resume %s: %w", o.resume, err)
		}
	}
	if o.Scenarios, err = o.Names(); err != nil {
		return nil, err
	}
	origin, err := o.origin(ctx)
	if err != nil {
		return nil, err
	}
	if o.resume == "" {
		result = bench.NewResult(origin, o.Options, o.stacks, o.Scenarios)
	} else if err := result.Resume(origin, o.Scenarios); err != nil {
		return nil, fmt.Errorf("--resume %s: %w", o.resume, err)
	}
	return result, o.chooseFile(result.Started)
}

// useCluster finds out what a running cluster has, if one is to be used: that is
// measured, whatever the command line and the environment say.
func (o *options) useCluster() error {
	if o.cluster == "" {
		return nil
	}
	c, err := o.home.Open(o.cluster)
	if err != nil {
		return err
	}
	defer c.Close()
	o.stacks, o.home.Gantry = nil, c.GantryBinary
	for _, n := range c.Nodes {
		if !n.Guest {
			o.stacks = append(o.stacks, bench.StackOf(n))
		}
	}
	slices.Sort(o.stacks)
	o.stacks = slices.Compact(o.stacks)
	return nil
}

// follow takes over the options of the run that is resumed. A flag that
// contradicts one is refused: rows would stand beside each other that do not compare.
func (o *options) follow(r *bench.Result, given func(flag string) bool) error {
	for _, option := range []struct {
		flag    string
		was, is any
	}{{"quick", r.Quick, o.Quick}, {"pods", r.Pods, o.Pods}, {"churn", r.Churn, o.Churn}, {"stacks", r.Stacks, o.stacks}} {
		if given(option.flag) && fmt.Sprint(option.was) != fmt.Sprint(option.is) {
			return fmt.Errorf("%s: it was %v and --%[1]s says %[3]v: leave --%[1]s out, or begin anew without --resume", option.flag, option.was, option.is)
		}
	}
	if o.cluster != "" && !slices.Equal(r.Stacks, o.stacks) {
		return fmt.Errorf("stacks: it was %v and cluster %s has %v: use one with a node of each, or begin anew without --resume", r.Stacks, o.cluster, o.stacks)
	}
	o.Quick, o.Pods, o.Churn, o.stacks, o.json = r.Quick, r.Pods, r.Churn, r.Stacks, o.resume
	if !given("scenarios") {
		o.Scenarios = r.Planned
	}
	return nil
}

// chooseFile says where the result goes if the command line does not.
func (o *options) chooseFile(started time.Time) error {
	if o.json == "" {
		dir := filepath.Join(o.repository, "build/bench")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		o.json = filepath.Join(dir, started.Format("20060102-150405")+".json")
	}
	return bench.Savable(o.json)
}

func (o *options) check() error {
	if o.Churn < 1 {
		return fmt.Errorf("--churn %d: use at least 1", o.Churn)
	}
	for _, n := range o.Pods {
		// A node has a /24 for its Pods.
		if n < 0 || n > 250 {
			return fmt.Errorf("--pods %d: use 0 to 250", n)
		}
	}
	slices.Sort(o.Pods)
	o.Pods = slices.Compact(o.Pods)
	for _, s := range o.stacks {
		if s != bench.Gantry && s != bench.Stock {
			return fmt.Errorf("--stacks %q: use %s and %s", s, bench.Gantry, bench.Stock)
		}
	}
	slices.Sort(o.stacks)
	o.stacks = slices.Compact(o.stacks)
	if o.ci {
		o.stacks = []string{bench.Gantry}
	}
	return nil
}

func (o *options) has(stack string) bool { return slices.Contains(o.stacks, stack) }

// kubeletConfig is what both nodes are told beyond the cluster's usual configuration.
const kubeletConfig = `maxPods: 300
containerLogMaxSize: 4Gi
containerLogMaxFiles: 2
`

// onCluster works on the cluster that the command line asks for.
func (o *options) onCluster(ctx context.Context, work func(context.Context, *bench.Bench) error) (err error) {
	name := o.cluster
	if name == "" {
		name = o.name
		config, failure := os.CreateTemp("", "bench-*.yaml")
		if failure != nil {
			return failure
		}
		defer os.Remove(config.Name())
		if _, err := config.WriteString(kubeletConfig); err != nil {
			return err
		}
		config.Close()
		up := []string{"up", "--name", name, "--audit", "--kubelet-config", config.Name(), "--nodes", "0"}
		if o.has(bench.Gantry) {
			up[len(up)-1] = "1"
		}
		if o.has(bench.Stock) {
			up = append(up, "--stock-nodes", "1")
		}
		if !o.keep {
			// Also when ctx has ended.
			defer func() { err = errors.Join(err, o.hackCluster(context.WithoutCancel(ctx), "down", "--name", name)) }()
		}
		if err := o.hackCluster(ctx, up...); err != nil {
			return err
		}
	}
	b, err := bench.Open(ctx, o.home, name, o.Options)
	if err != nil {
		return err
	}
	return work(ctx, b)
}

func (o *options) hackCluster(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(o.repository, "hack/cluster"), args...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	// The binary whose digest the result has, also if a newer one is built elsewhere meanwhile.
	cmd.Env = append(os.Environ(), "GANTRY_BIN="+o.home.Gantry)
	// A signal for our process group ends us; then `down` still has to run to its end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("hack/cluster %s: %w", args[0], err)
	}
	return nil
}

func (o *options) buildImages(ctx context.Context) error {
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	list.Dir, list.Stderr = filepath.Join(o.repository, "e2e"), os.Stderr
	source, err := list.Output()
	if err != nil {
		return fmt.Errorf("go list k8s.io/kubernetes: %w", err)
	}
	if err := images.BuildBench(ctx, o.home.Bin, filepath.Dir(o.home.Images), strings.TrimSpace(string(source)), os.Stderr); err != nil {
		return fmt.Errorf("images: %w", err)
	}
	return nil
}

// measure is the comparison.
func (o *options) measure(ctx context.Context, b *bench.Bench, result *bench.Result) error {
	if err := b.Run(ctx, result, o.json); err != nil {
		return o.unfinished(result, err)
	}
	fmt.Fprintf(os.Stderr, "result: %s\n\n", o.json)
	return o.conclude(result)
}

// unfinished adds to what ended a run what there is of it, and how to go on.
func (o *options) unfinished(result *bench.Result, failure error) error {
	if len(result.Complete) == 0 {
		return fmt.Errorf("%w\nno scenario was complete, so no result was written", failure)
	}
	return fmt.Errorf("%w\n%s has what is complete: %s\nit lacks: %s\n`hack/bench --resume %[2]s` goes on, `hack/bench --from %[2]s` shows it",
		failure, o.json, strings.Join(result.Complete, " "), strings.Join(result.Lacks(result.Planned), " "))
}

// conclude prints a result, and writes it into the documentation if asked to.
func (o *options) conclude(result *bench.Result) error {
	if err := result.Print(os.Stdout); err != nil {
		return err
	}
	if o.writeDocs {
		if err := result.WriteDocs(filepath.Join(o.repository, "docs")); err != nil {
			return err
		}
	}
	missed := result.Missed()
	for _, row := range missed {
		fmt.Fprintf(os.Stderr, "bar missed: %s\n", row.Name)
	}
	if o.strict && len(missed) > 0 {
		return fmt.Errorf("%d bars were missed", len(missed))
	}
	return nil
}

// compare is the small set for CI.
func (o *options) compare(ctx context.Context, b *bench.Bench) error {
	began := time.Now()
	figures, missing, err := b.Figures(ctx)
	if err != nil {
		return err
	}
	if o.writeBaseline {
		return bench.WriteBaseline(o.baseline, figures)
	}
	baseline, err := bench.ReadBaseline(o.baseline)
	if err != nil {
		return err
	}
	well := bench.Compare(os.Stdout, figures, missing, baseline)
	fmt.Fprintf(os.Stderr, "measured in %s\n", time.Since(began).Round(time.Second))
	if !well {
		return errors.New("there are regressions; if they are meant, hack/bench --ci --write-baseline accepts them")
	}
	return nil
}

// origin is what will be measured, and where.
func (o *options) origin(ctx context.Context) (bench.Origin, error) {
	commit, err := o.commit(ctx)
	if err != nil {
		return bench.Origin{}, err
	}
	var peer, binary string
	if o.has(bench.Stock) {
		if peer, err = o.peer(ctx); err != nil {
			return bench.Origin{}, err
		}
	}
	if o.has(bench.Gantry) {
		binary = o.home.Gantry
	}
	return bench.NewOrigin(commit, peer, binary)
}

func (o *options) commit(ctx context.Context) (string, error) {
	git := func(args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, "git", append([]string{"-C", o.repository}, args...)...).Output()
		return strings.TrimSpace(string(out)), err
	}
	commit, err := git("rev-parse", "HEAD")
	if err != nil {
		return "", fmt.Errorf("git rev-parse HEAD: %w", err)
	}
	if changes, err := git("status", "--porcelain", "--untracked-files=no"); err != nil {
		return "", fmt.Errorf("git status: %w", err)
	} else if changes != "" {
		commit += "-dirty"
	}
	return commit, nil
}

// peer names what a stock node consists of, by the modules it is built from.
func (o *options) peer(ctx context.Context) (string, error) {
	var parts []string
	for _, m := range []struct{ dir, name, module string }{
		{"e2e", "kubelet", "k8s.io/kubernetes"},
		{"e2e/peer", "containerd", "github.com/containerd/containerd/v2"},
		{"e2e/peer", "runc", "github.com/opencontainers/runc"},
		{"e2e/peer", "CNI plugins", "github.com/containernetworking/plugins"},
	} {
		list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", m.module)
		list.Dir, list.Stderr = filepath.Join(o.repository, m.dir), os.Stderr
		version, err := list.Output()
		if err != nil {
			return "", fmt.Errorf("go list %s: %w", m.module, err)
		}
		parts = append(parts, m.name+" "+strings.TrimPrefix(strings.TrimSpace(string(version)), "v"))
	}
	return strings.Join(parts, ", "), nil
}
