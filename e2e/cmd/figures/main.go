// Command figures measures what a node costs, as a watch of the API server sees
// it: how long Pods take to be Ready and to be gone, and what agent and shims
// use meanwhile. The cluster is the one of KUBECONFIG; the image is present
// before anything is measured.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const namespace = "default"

var (
	image  = flag.String("image", os.Getenv("GANTRY_REGISTRY")+"/busybox:1.37", "image of the Pods")
	single = flag.Int("single", 20, "Pods started and deleted one at a time")
	burst  = flag.Int("burst", 50, "Pods started at once")
	idle   = flag.Duration("idle", time.Minute, "how long idle Pods are watched for their CPU")
	node   = flag.String("node-dir", "", "the node's directory: its processes are known by it")
)

// report is what is printed, and written as JSON with -json.
type report struct {
	CreateToReadyMedianMs, CreateToReadyP90Ms float64
	DeleteToGoneMedianMs, DeleteToGoneP90Ms   float64
	BurstPods                                 int
	BurstAllReadyS, BurstAllGoneS             float64
	AgentRSSEmptyMiB, AgentRSSBurstMiB        float64
	AgentPSSEmptyMiB, AgentPSSBurstMiB        float64
	ShimPSSKiB, ShimPrivateKiB                float64
	IdleCPUSecondsPerMinute                   float64
	ExecMedianMs                              float64
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	check(err)
	config.QPS, config.Burst = 1000, 1000
	client, err := kubernetes.NewForConfig(config)
	check(err)
	r := measure(client)
	out, err := json.MarshalIndent(r, "", "  ")
	check(err)
	fmt.Println(string(out))
}

func measure(client kubernetes.Interface) report {
	var r report
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	events := follow(ctx, client)
	start(ctx, client, "warm")
	events.until("warm", ready)
	remove(ctx, client, "warm")
	events.until("warm", gone)
	time.Sleep(2 * time.Second)
	r.AgentRSSEmptyMiB, r.AgentPSSEmptyMiB, _ = memory(agents())

	var up, down []float64
	for i := range *single {
		name := "one-" + strconv.Itoa(i)
		began := time.Now()
		start(ctx, client, name)
		up = append(up, since(began, events.until(name, ready)))
		time.Sleep(500 * time.Millisecond)
		began = time.Now()
		remove(ctx, client, name)
		down = append(down, since(began, events.until(name, gone)))
	}
	r.CreateToReadyMedianMs, r.CreateToReadyP90Ms = quantile(up, 0.5), quantile(up, 0.9)
	r.DeleteToGoneMedianMs, r.DeleteToGoneP90Ms = quantile(down, 0.5), quantile(down, 0.9)

	r.BurstPods = *burst
	began := time.Now()
	names := make([]string, *burst)
	for i := range names {
		names[i] = "many-" + strconv.Itoa(i)
		go start(ctx, client, names[i])
	}
	r.BurstAllReadyS = since(began, events.untilAll(names, ready)) / 1000
	time.Sleep(3 * time.Second)
	r.AgentRSSBurstMiB, r.AgentPSSBurstMiB, _ = memory(agents())
	shims := shims()
	_, pss, private := memory(shims)
	if len(shims) > 0 {
		r.ShimPSSKiB, r.ShimPrivateKiB = pss*1024/float64(len(shims)), private*1024/float64(len(shims))
	}
	everything := append(agents(), shims...)
	before := cpu(everything)
	time.Sleep(*idle)
	r.IdleCPUSecondsPerMinute = (cpu(everything) - before) * 60 / idle.Seconds()

	var execs []float64
	for range 10 {
		began := time.Now()
		out, err := exec.CommandContext(ctx, "kubectl", "exec", names[0], "--", "true").CombinedOutput()
		if err != nil {
			log.Fatalf("kubectl exec: %v: %s", err, out)
		}
		execs = append(execs, since(began, time.Now()))
	}
	r.ExecMedianMs = quantile(execs, 0.5)

	began = time.Now()
	for _, name := range names {
		go remove(ctx, client, name)
	}
	r.BurstAllGoneS = since(began, events.untilAll(names, gone)) / 1000
	return r
}

// watched remembers when each Pod was first seen Ready and gone.
type watched struct {
	times chan sighting
	seen  map[sighting]time.Time
}

type sighting struct {
	name string
	what string
	at   time.Time
}

const (
	ready = "ready"
	gone  = "gone"
)

func follow(ctx context.Context, client kubernetes.Interface) *watched {
	w, err := client.CoreV1().Pods(namespace).Watch(ctx, metav1.ListOptions{})
	check(err)
	out := &watched{times: make(chan sighting, 4096), seen: map[sighting]time.Time{}}
	go func() {
		for event := range w.ResultChan() {
			pod, ok := event.Object.(*corev1.Pod)
			if !ok {
				log.Fatalf("the watch ended: %v", event.Object)
			}
			now := time.Now()
			if event.Type == watch.Deleted {
				out.times <- sighting{pod.Name, gone, now}
				continue
			}
			for _, c := range pod.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
					out.times <- sighting{pod.Name, ready, now}
				}
			}
		}
	}()
	return out
}

func (w *watched) until(name, what string) time.Time {
	key := sighting{name: name, what: what}
	for {
		if at, ok := w.seen[key]; ok {
			return at
		}
		select {
		case s := <-w.times:
			k := sighting{name: s.name, what: s.what}
			if _, known := w.seen[k]; !known {
				w.seen[k] = s.at
			}
		case <-time.After(3 * time.Minute):
			log.Fatalf("Pod %s is not %s after three minutes", name, what)
		}
	}
}

func (w *watched) untilAll(names []string, what string) time.Time {
	var last time.Time
	for _, name := range names {
		if at := w.until(name, what); at.After(last) {
			last = at
		}
	}
	return last
}

func start(ctx context.Context, client kubernetes.Interface, name string) {
	grace := int64(30)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "main", Image: *image,
				Command: []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"},
			}},
		},
	}
	_, err := client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
	check(err)
}

func remove(ctx context.Context, client kubernetes.Interface, name string) {
	check(client.CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{}))
}

// processes of one of gantry's subcommands that work for the node.
func processes(subcommand string) []int {
	var pids []int
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		line, err := os.ReadFile(file)
		words := strings.Split(string(line), "\x00")
		if err != nil || len(words) < 3 || filepath.Base(words[0]) != "gantry" || words[1] != subcommand {
			continue
		}
		if !strings.Contains(strings.Join(words[2:], " "), *node) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		pids = append(pids, pid)
	}
	return pids
}

func agents() []int { return processes("agent") }
func shims() []int  { return processes("shim") }

// memory is RSS, PSS and private memory of processes together, in MiB.
func memory(pids []int) (rss, pss, private float64) {
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(text), "\n") {
			fields := strings.Fields(line)
			if len(fields) < 2 {
				continue
			}
			kib, _ := strconv.ParseFloat(fields[1], 64)
			switch fields[0] {
			case "Rss:":
				rss += kib / 1024
			case "Pss:":
				pss += kib / 1024
			case "Private_Dirty:", "Private_Clean:":
				private += kib / 1024
			}
		}
	}
	return rss, pss, private
}

// cpu is the time that processes have used, in seconds.
func cpu(pids []int) float64 {
	total := 0.0
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		for _, i := range []int{11, 12} {
			ticks, _ := strconv.ParseFloat(fields[i], 64)
			total += ticks / 100
		}
	}
	return total
}

func since(from, to time.Time) float64 { return float64(to.Sub(from).Microseconds()) / 1000 }

func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1))]
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
