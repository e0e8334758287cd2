package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/proc"
)

// Runner runs specs.
type Runner struct {
	// Bin holds ginkgo, e2e.test and kubectl.
	Bin string
	// Dir gets the log and the reports.
	Dir string
	// NetworkNamespace is the file of the namespace that the tests run in.
	NetworkNamespace string
	Kubeconfig       string
	// RepoList is a KUBE_TEST_REPO_LIST file.
	RepoList string
	// Procs is the number of specs at a time.
	Procs   int
	Timeout time.Duration
	// Done is told of every spec when it ends, without the reason; calls do not overlap.
	Done func(Result)
}

// ErrSuite means that the tests could not begin, or not end as they should.
var ErrSuite = errors.New("the tests did not run as they should")

// ErrInterrupted means that not everything was run because the run was ended
// from outside. It can be resumed.
var ErrInterrupted = errors.New("interrupted; --resume goes on")

// Files below Runner.Dir.
const (
	LogFile    = "ginkgo.log"
	reportFile = "report.json"
	junitFile  = "junit.xml"
)

// Run runs the specs and returns a result for each, in the same order. When
// ctx ends, what runs is interrupted and cleans up; what is known is returned.
func (r Runner) Run(ctx context.Context, specs []Spec) ([]Result, error) {
	log, err := os.Create(filepath.Join(r.Dir, LogFile))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	var failure error
	// The namespace belongs to the thread, and what is started inherits it.
	err = proc.OnThread(func() error {
		if err := proc.EnterNetworkNamespace(r.NetworkNamespace); err != nil {
			return err
		}
		failure = r.command(ctx, specs, io.MultiWriter(log, newProgress(specs, r.Done))).Run()
		return nil
	})
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(r.Dir, reportFile))
	if err != nil {
		return nil, fmt.Errorf("%w: %w; %w; see %s", ErrSuite, failure, err, log.Name())
	}
	results, problem := parseReport(raw, specs)
	var exit *exec.ExitError
	if problem == nil && failure != nil && !errors.As(failure, &exit) {
		problem = failure // not merely that a spec failed
	}
	if problem != nil {
		return results, fmt.Errorf("%w: %w; see %s", ErrSuite, problem, log.Name())
	}
	if ctx.Err() != nil {
		return results, ErrInterrupted
	}
	return results, nil
}

func (r Runner) command(ctx context.Context, specs []Spec, log io.Writer) *exec.Cmd {
	args := []string{
		"run", fmt.Sprintf("--procs=%d", r.Procs), "--timeout=" + r.Timeout.String(), "--grace-period=2m",
		"-v", "--no-color", "--silence-skips", "--poll-progress-after=0",
		"--output-dir=" + r.Dir, "--json-report=" + reportFile, "--junit-report=" + junitFile,
	}
	for _, s := range specs {
		args = append(args, "--focus="+pattern(s.Name))
	}
	args = append(args, filepath.Join(r.Bin, "e2e.test"), "--",
		"--kubeconfig="+r.Kubeconfig, "--kubectl-path="+filepath.Join(r.Bin, "kubectl"),
		"--provider=local", "--disable-log-dump",
		// The cluster is ready when the tests begin, so these only bound mistakes.
		"--node-schedulable-timeout=1m", "--system-pods-startup-timeout=1m", "--system-daemonsets-startup-timeout=1m")
	cmd := exec.CommandContext(ctx, filepath.Join(r.Bin, "ginkgo"), args...)
	cmd.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+r.RepoList, "PATH="+r.Bin+":"+os.Getenv("PATH"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = r.Dir, log, log
	// A process group of its own, because Ctrl-C must interrupt it once, not
	// twice; all of it is interrupted, as by a terminal: ginkgo does not pass
	// the signal on. It does not outlive this process.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGINT) }
	cmd.WaitDelay = 3 * time.Minute
	return cmd
}
