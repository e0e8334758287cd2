package firstlight

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// Static Pods come from files on the node, and are shown in the API server by
// mirrors: whatever happens to the mirror, the file decides.
func TestStaticPods(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	number := strconv.Itoa(victim)
	directory := filepath.Join(e.NodeDir(victim), "manifests")
	file := filepath.Join(directory, e.Namespace+".yaml")
	name := "static-" + victimName
	write := func(revision string) {
		t.Helper()
		text := fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: static, namespace: %s, labels: {revision: "%s"}}
spec:
  terminationGracePeriodSeconds: 2
  containers:
    - name: main
      image: %s
      env: [{name: REVISION, value: "%s"}]
      command: [sh, -c, "echo started >> /starts/log; trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"]
      volumeMounts: [{name: starts, mountPath: /starts}]
  volumes: [{name: starts, emptyDir: {}}]
`, e.Namespace, revision, e.Image("busybox:1.37"), revision)
		// As an editor does: a name that is no manifest's, then in one step.
		temporary := filepath.Join(directory, "."+e.Namespace)
		if err := os.WriteFile(temporary, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(temporary, file); err != nil {
			t.Fatal(err)
		}
	}
	remove := func() {
		if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
	}
	t.Cleanup(func() {
		remove()
		e.Command(t, "start-agent", "--node", number)
	})
	// mirror waits for a mirror that is Ready and fits.
	mirror := func(t *testing.T, what string, fits func(*corev1.Pod) bool) *corev1.Pod {
		t.Helper()
		var pod *corev1.Pod
		e.In(t).Eventually(60*time.Second, what, func() (bool, string) {
			var err error
			if pod, err = e.Client.CoreV1().Pods(e.Namespace).Get(e.Ctx, name, metav1.GetOptions{}); err != nil {
				return false, err.Error()
			}
			ready, state := kit.Ready(pod)
			return ready && pod.DeletionTimestamp == nil && fits(pod), fmt.Sprintf("%s %v: %s", pod.UID, pod.Labels, state)
		})
		return pod
	}
	revision := func(want string) func(*corev1.Pod) bool {
		return func(p *corev1.Pod) bool { return p.Labels["revision"] == want }
	}
	gone := func(t *testing.T) {
		t.Helper()
		e.In(t).Eventually(60*time.Second, "the mirror is gone", func() (bool, string) {
			pod, err := e.Client.CoreV1().Pods(e.Namespace).Get(e.Ctx, name, metav1.GetOptions{})
			if err != nil {
				return apierrors.IsNotFound(err), err.Error()
			}
			return false, kit.Describe(pod)
		})
	}
	// runs checks from inside which revision it is, and that it was started once.
	checkRevision := func(t *testing.T, want string) {
		t.Helper()
		e := e.In(t)
		if got := e.Exec(name, "main", "printenv", "REVISION"); got != want+"\n" {
			t.Errorf("revision %q runs, want %s", got, want)
		}
		if starts := e.Exec(name, "main", "cat", "/starts/log"); starts != "started\n" {
			t.Errorf("it was started %d times", strings.Count(starts, "\n"))
		}
	}

	write("1")
	first := mirror(t, "the mirror of a new file", revision("1"))
	if first.Annotations[corev1.MirrorPodAnnotationKey] == "" || first.Annotations["kubernetes.io/config.source"] != "file" {
		t.Errorf("annotations %v", first.Annotations)
	}
	if len(first.OwnerReferences) != 1 || first.OwnerReferences[0].Name != victimName {
		t.Errorf("the mirror belongs to %v, want its node", first.OwnerReferences)
	}
	checkRevision(t, "1")

	t.Run("a deleted mirror comes back", func(t *testing.T) {
		e.In(t).Delete(name)
		again := mirror(t, "another mirror", func(p *corev1.Pod) bool { return p.UID != first.UID })
		if was, is := kit.Status(first, "main"), kit.Status(again, "main"); was.ContainerID != is.ContainerID || is.RestartCount != 0 {
			t.Errorf("the container is %s with %d restarts, before %s: kubectl must not touch it", is.ContainerID, is.RestartCount, was.ContainerID)
		}
		checkRevision(t, "1")
	})
	t.Run("a restarted agent keeps it", func(t *testing.T) {
		before := mirror(t, "the mirror", revision("1"))
		e.Command(t, "kill-agent", "--node", number)
		e.Command(t, "start-agent", "--node", number)
		// A Pod that the new agent has started says that it is at work.
		e := e.In(t)
		e.Create(e.Pod("after", "busybox:1.37", kit.Forever, kit.On(victimName)))
		e.WaitReady(60*time.Second, "after")
		after := mirror(t, "the mirror", revision("1"))
		if before.UID != after.UID || kit.Status(before, "main").ContainerID != kit.Status(after, "main").ContainerID {
			t.Errorf("mirror %s with the container %s, before %s with %s", after.UID, kit.Status(after, "main").ContainerID, before.UID, kit.Status(before, "main").ContainerID)
		}
		checkRevision(t, "1")
	})
	t.Run("a changed file replaces it", func(t *testing.T) {
		write("2")
		mirror(t, "the mirror of the changed file", revision("2"))
		checkRevision(t, "2")
	})
	t.Run("a file that goes and comes", func(t *testing.T) {
		remove()
		time.Sleep(20 * time.Millisecond)
		write("3")
		mirror(t, "the mirror of the new file", revision("3"))
		checkRevision(t, "3")
		// The same file again: the same Pod, which may have to end first.
		remove()
		time.Sleep(200 * time.Millisecond)
		write("3")
		time.Sleep(time.Second)
		mirror(t, "the mirror of the same file", revision("3"))
		checkRevision(t, "3")
	})
	t.Run("a file that changes while no agent runs", func(t *testing.T) {
		e.Command(t, "stop-agent", "--node", number)
		write("4")
		e.Command(t, "start-agent", "--node", number)
		mirror(t, "the mirror of the changed file", revision("4"))
		checkRevision(t, "4")
	})
	t.Run("a wrong file disturbs nobody", func(t *testing.T) {
		wrong := filepath.Join(directory, e.Namespace+"-wrong.yaml")
		if err := os.WriteFile(wrong, []byte("kind: Pod\napiVersion: v1\nspec: {containers: {}}\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(wrong)
		e.In(t).Eventually(20*time.Second, "the agent's log names the file", func() (bool, string) {
			logs := string(e.Command(t, "logs", "agent-"+number))
			return strings.Contains(logs, filepath.Base(wrong)), logs[max(0, len(logs)-2000):]
		})
		checkRevision(t, "4")
	})
	t.Run("a removed file removes it", func(t *testing.T) {
		remove()
		gone(t)
	})
	t.Run("a file removed while no agent runs", func(t *testing.T) {
		write("5")
		mirror(t, "the mirror", revision("5"))
		e.Command(t, "stop-agent", "--node", number)
		remove()
		e.Command(t, "start-agent", "--node", number)
		gone(t)
		e.In(t).Eventually(20*time.Second, "no process of it is left", func() (bool, string) {
			for _, line := range e.Snapshot(t, victim)["processes"] {
				if strings.Contains(line, "/starts/log") {
					return false, line
				}
			}
			return true, ""
		})
	})
}
