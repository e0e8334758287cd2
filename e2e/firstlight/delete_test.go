package firstlight

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gantry.local/e2e/internal/kit"
)

func TestDelete(t *testing.T) {
	t.Parallel()
	share(t, victimName)
	e := kit.New(t)

	t.Run("TERM ends it", func(t *testing.T) {
		e := e.In(t)
		// Ready is sooner than the shell's first line, and a process 1 without a handler does not notice TERM.
		e.Create(e.Pod("polite", "busybox:1.37", []string{"sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 3600 & wait; done"}, kit.On(victimName), kit.Grace(30)))
		e.WaitReady(60*time.Second, "polite")
		e.Eventually(20*time.Second, "the shell handles TERM", func() (bool, string) {
			logs := e.Logs("polite", "main")
			return strings.Contains(logs, "up\n"), logs
		})
		e.Delete("polite")
		if took := e.WaitGone("polite", 60*time.Second); took > 10*time.Second {
			t.Errorf("gone after %s, though the container ends at once on SIGTERM", took)
		}
	})
	t.Run("KILL at the deadline", func(t *testing.T) {
		e := e.In(t)
		const grace = 5
		e.Create(e.Pod("stubborn", "busybox:1.37", []string{"sh", "-c", "trap 'echo got TERM' TERM; echo up; while :; do sleep 1; done"}, kit.On(victimName), kit.Grace(grace)))
		e.WaitReady(60*time.Second, "stubborn")
		ctx, cancel := context.WithTimeout(e.Ctx, time.Minute)
		defer cancel()
		follow := e.KubectlCommand(ctx, "logs", "-n", e.Namespace, "stubborn", "-f")
		var logs lockedBuffer
		follow.Stdout = &logs
		if err := follow.Start(); err != nil {
			t.Fatal(err)
		}
		e.Eventually(20*time.Second, "kubectl logs -f shows the first line", func() (bool, string) {
			return strings.Contains(logs.String(), "up\n"), logs.String()
		})
		e.Delete("stubborn")
		took := e.WaitGone("stubborn", 60*time.Second)
		if took < grace*time.Second-500*time.Millisecond || took > (grace+6)*time.Second {
			t.Errorf("gone after %s, grace is %d s", took, grace)
		}
		if err := follow.Wait(); err != nil {
			t.Errorf("kubectl logs -f: %v", err)
		}
		if !strings.Contains(logs.String(), "got TERM\n") {
			t.Errorf("the container did not get SIGTERM; its log: %q", logs.String())
		}
	})
	t.Run("grace 0", func(t *testing.T) {
		e := e.In(t)
		marker := fmt.Sprintf("%d", 1e6+time.Now().UnixNano()%1e6)
		e.Create(e.Pod("forced", "busybox:1.37", []string{"sleep", marker}, kit.On(victimName), kit.Grace(60)))
		e.WaitReady(60*time.Second, "forced")
		if !runs(t, e, "sleep "+marker) {
			t.Fatal("the snapshot does not show the running container: the check below would prove nothing")
		}
		if _, errOut, err := e.Kubectl(e.Ctx, "delete", "pod", "-n", e.Namespace, "forced", "--grace-period=0", "--force"); err != nil {
			t.Fatalf("kubectl delete: %v %s", err, errOut)
		}
		e.WaitGone("forced", 10*time.Second)
		e.Eventually(20*time.Second, "the process is gone", func() (bool, string) {
			return !runs(t, e, "sleep "+marker), "it runs"
		})
	})
	t.Run("while pulling", func(t *testing.T) {
		e := e.In(t)
		image := e.SlowImage("deleted", 30*time.Second)
		e.Create(e.Pod("pulling", image, kit.Forever, kit.On(victimName)))
		e.WaitEvent("pulling", "Pulling: ", 30*time.Second)
		e.Delete("pulling")
		if took := e.WaitGone("pulling", 25*time.Second); took > 15*time.Second {
			t.Errorf("gone after %s: it must not wait for the pull", took)
		}
	})
}

// lockedBuffer is written by one goroutine and read by another.
type lockedBuffer struct {
	lock   sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.lock.Lock()
	defer b.lock.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.lock.Lock()
	defer b.lock.Unlock()
	return b.buffer.String()
}

// runs reports whether a process with that command line runs on the node.
func runs(t *testing.T, e *kit.Env, command string) bool {
	t.Helper()
	return slices.ContainsFunc(e.Snapshot(t, victim)["processes"], func(line string) bool {
		_, cmdline, _ := strings.Cut(line, " ")
		return cmdline == command
	})
}

// After 50 Pods the node holds what it held before: no process, mount,
// namespace, link, route, rule, cgroup, directory or file more.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	burst := func(prefix string, count int) {
		t.Helper()
		var names []string
		for i := range count {
			name := fmt.Sprintf("%s-%d", prefix, i)
			names = append(names, name)
			e.Create(e.Pod(name, "busybox:1.37", nil, kit.On(victimName), countedStarts))
		}
		e.WaitReady(3*time.Minute, names...)
		e.DeleteAll(3 * time.Minute)
	}
	// What is made once and stays (images, the bridge, cgroups of the QoS
	// classes) exists after a first Pod.
	burst("warm", 2)
	before := settledSnapshot(t, e)
	burst("pod", 50)

	var left []string
	deadline := time.Now().Add(60 * time.Second)
	for {
		after := e.Snapshot(t, victim)
		left = nil
		for kind, list := range after {
			for _, item := range missingFrom(before[kind], list) {
				left = append(left, kind+": "+item)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			break
		}
		time.Sleep(time.Second)
	}
	slices.Sort(left)
	if len(left) > 0 {
		t.Errorf("%d things are left after 50 Pods:\n%s", len(left), strings.Join(left[:min(len(left), 60)], "\n"))
	}
}

// settledSnapshot waits until two snapshots in a row are the same.
func settledSnapshot(t *testing.T, e *kit.Env) map[string][]string {
	t.Helper()
	var last map[string][]string
	e.Eventually(60*time.Second, "the node has come to rest", func() (bool, string) {
		now := e.Snapshot(t, victim)
		var changes []string
		for kind, list := range now {
			changes = append(changes, missingFrom(last[kind], list)...)
		}
		for kind, list := range last {
			changes = append(changes, missingFrom(now[kind], list)...)
		}
		last = now
		if len(changes) > 0 {
			time.Sleep(2 * time.Second)
		}
		return len(changes) == 0, strings.Join(changes[:min(len(changes), 10)], "\n")
	})
	return last
}

// missingFrom are the items of list that base has not, or has less often.
func missingFrom(base, list []string) []string {
	count := map[string]int{}
	for _, item := range base {
		count[item]++
	}
	var missing []string
	for _, item := range list {
		if count[item]--; count[item] < 0 {
			missing = append(missing, item)
		}
	}
	return missing
}
