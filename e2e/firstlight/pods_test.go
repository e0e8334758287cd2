package firstlight

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"gantry.local/e2e/internal/kit"
)

// twoApps is the tutorial's Pod: App A on port 3000 and App B on port 4000.
func twoApps(e *kit.Env, name, node string) *corev1.Pod {
	pod := e.Pod(name, "app-a:1", nil, kit.On(node))
	pod.Spec.Containers = []corev1.Container{
		{Name: "app-a", Image: e.Image("app-a:1")},
		{Name: "app-b", Image: e.Image("app-b:1")},
	}
	return pod
}

// The containers of a Pod share localhost, and reach other Pods by their IP,
// on the same node and on another.
func TestTwoAppsShareLocalhost(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	nodes := e.Nodes()
	near, far := nodes[0], nodes[len(nodes)-1]
	share(t, near, far)
	e.Create(twoApps(e, "apps", near), twoApps(e, "neighbour", near), twoApps(e, "remote", far))
	pods := e.WaitReady(90*time.Second, "apps", "neighbour", "remote")
	seen := map[string]string{}
	for _, pod := range pods {
		if pod.Status.PodIP == "" || seen[pod.Status.PodIP] != "" {
			t.Fatalf("Pod %s has the IP %q, Pod %q too", pod.Name, pod.Status.PodIP, seen[pod.Status.PodIP])
		}
		seen[pod.Status.PodIP] = pod.Name
	}

	own := map[string]string{"app-a": "http://localhost:3000", "app-b": "http://localhost:4000"}
	for _, from := range []string{"app-a", "app-b"} {
		// By the application itself, which is the container's main process.
		fetch := func(url, want string) {
			t.Helper()
			got := e.Exec("apps", from, "wget", "-q", "-T", "10", "-O", "-", own[from]+"/peer?url="+url)
			if got != want {
				t.Errorf("%s fetches %s: got %q, want %q", from, url, got, want)
			}
		}
		fetch("http://localhost:3000/", "app-a on apps\n")
		fetch("http://localhost:4000/", "app-b on apps\n")
		for _, other := range pods[1:] {
			fetch(fmt.Sprintf("http://%s:3000/", other.Status.PodIP), "app-a on "+other.Name+"\n")
			fetch(fmt.Sprintf("http://%s:4000/", other.Status.PodIP), "app-b on "+other.Name+"\n")
		}
		logs := e.Logs("apps", from)
		if !strings.Contains(logs, from+": ") || !strings.Contains(logs, "GET /peer?url=http://localhost:4000/ from") {
			t.Errorf("the log of %s lacks its requests:\n%s", from, logs)
		}
		if name := strings.TrimSpace(e.Exec("apps", from, "hostname")); name != "apps" {
			t.Errorf("hostname in %s is %q, want the Pod's name", from, name)
		}
	}
	// The control plane reaches Pods as well.
	out, errOut, err := e.Kubectl(e.Ctx, "get", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/remote:4000/proxy/", e.Namespace))
	if err != nil || out != "app-b on remote\n" {
		t.Errorf("proxy to remote:4000: %q %s %v", out, errOut, err)
	}
}

// Two containers of a Pod cannot have the same port: the second one crashes,
// and is restarted with kubelet's delays, while the first goes on serving.
func TestSamePortCrashLoops(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	pod := twoApps(e, "clash", node)
	// The second waits a moment, so that it is certain who has the port.
	pod.Spec.Containers[1].Command = []string{"sh", "-c", "sleep 2; exec /app-b"}
	pod.Spec.Containers[1].Env = []corev1.EnvVar{{Name: "PORT", Value: "3000"}}
	e.Create(pod)

	// When each run started and ended; the API server shows whole seconds.
	started, finished := map[int32]time.Time{}, map[int32]time.Time{}
	waited := map[string]bool{}
	last := e.WaitPod("clash", 150*time.Second, "the fourth start of app-b", func(pod *corev1.Pod) (bool, string) {
		s := kit.Status(pod, "app-b")
		if s.State.Running != nil {
			started[s.RestartCount] = s.State.Running.StartedAt.Time
		}
		if s.State.Terminated != nil {
			finished[s.RestartCount] = s.State.Terminated.FinishedAt.Time
		}
		if s.LastTerminationState.Terminated != nil {
			n := s.RestartCount
			if s.State.Running != nil {
				n-- // the last state is that of the run before
			}
			finished[n] = s.LastTerminationState.Terminated.FinishedAt.Time
		}
		if w := s.State.Waiting; w != nil && w.Reason == "CrashLoopBackOff" {
			for _, delay := range []string{"10s", "20s", "40s"} {
				if strings.Contains(w.Message, "back-off "+delay+" restarting failed container") {
					waited[delay] = true
				}
			}
		}
		_, running := started[3]
		return running, kit.Describe(pod)
	})
	// The first restart comes at once, then the delay doubles from 10 s.
	for n, delay := range map[int32]time.Duration{1: 0, 2: 10 * time.Second, 3: 20 * time.Second} {
		end, ok := finished[n-1]
		begin, ok2 := started[n]
		if !ok || !ok2 {
			t.Errorf("restart %d: the end of the run before was seen: %t; its start: %t", n, ok, ok2)
			continue
		}
		if gap := begin.Sub(end); gap < delay-time.Second || gap > delay+10*time.Second {
			t.Errorf("restart %d came after %s, want %s", n, gap, delay)
		}
	}
	for _, delay := range []string{"10s", "20s"} {
		if !waited[delay] {
			t.Errorf("no CrashLoopBackOff told of its delay of %s", delay)
		}
	}
	if s := kit.Status(last, "app-a"); s.RestartCount != 0 || !s.Ready {
		t.Errorf("app-a, which had the port first: ready %t, restarts %d", s.Ready, s.RestartCount)
	}
	if got := e.Exec("clash", "app-a", "wget", "-q", "-T", "5", "-O", "-", "http://localhost:3000/"); got != "app-a on clash\n" {
		t.Errorf("app-a answers %q", got)
	}
	if logs := e.Logs("clash", "app-b", "--previous"); !strings.Contains(logs, "port 3000 is already taken") {
		t.Errorf("the log of the crashed run does not tell why:\n%s", logs)
	}
	e.WaitEvent("clash", "Back-off restarting failed container app-b", 10*time.Second)
}
