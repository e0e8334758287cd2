package firstlight

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	podresourcesapi "k8s.io/kubelet/pkg/apis/podresources/v1"

	"gantry.local/e2e/internal/kit"
)

// amounts are the Node's capacity and allocatable of a resource, "-" where it has none.
func amounts(e *kit.Env, node, resource string) (string, error) {
	object, err := e.Client.CoreV1().Nodes().Get(e.Ctx, node, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	text := func(list corev1.ResourceList) string {
		amount, found := list[corev1.ResourceName(resource)]
		if !found {
			return "-"
		}
		return amount.String()
	}
	return text(object.Status.Capacity) + "/" + text(object.Status.Allocatable), nil
}

func waitAmounts(e *kit.Env, node, resource, want string, timeout time.Duration) {
	e.Eventually(timeout, fmt.Sprintf("%s of %s on %s", want, resource, node), func() (bool, string) {
		have, err := amounts(e, node, resource)
		return err == nil && have == want, fmt.Sprintf("%s, %v", have, err)
	})
}

// health is how a container's devices do, as its status says.
func health(pod *corev1.Pod, container string) string {
	var words []string
	for _, resource := range kit.Status(pod, container).AllocatedResourcesStatus {
		for _, device := range resource.Resources {
			words = append(words, fmt.Sprintf("%s %s %s", resource.Name, device.ResourceID, device.Health))
		}
	}
	return strings.Join(words, ", ")
}

func waitRefused(e *kit.Env, t *testing.T, name, reason, message string) {
	t.Helper()
	pod := e.WaitPod(name, 60*time.Second, "refused", func(p *corev1.Pod) (bool, string) {
		return p.Status.Phase == corev1.PodFailed, kit.Describe(p)
	})
	if pod.Status.Reason != reason || pod.Status.Message != message {
		t.Errorf("Pod %s: reason %q, message %q; not %q, %q", name, pod.Status.Reason, pod.Status.Message, reason, message)
	}
}

// A plugin's devices: offered, given to one container each, watched, and kept
// whatever happens to the agent and to the plugin.
func TestDevicePlugin(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	const resource = "gantry.test/device"
	node := strconv.Itoa(victim)
	plugins := filepath.Join(e.NodeDir(victim), "kubelet", "device-plugins")
	p := newDevicePlugin(t, resource, filepath.Join(plugins, "test.sock"),
		map[string]string{"d1": pluginapi.Healthy, "d2": pluginapi.Healthy, "d3": pluginapi.Unhealthy})
	device := func(count string) func(*corev1.Pod) { return kit.Limit(resource, count) }
	granted := func(pod, container string) string {
		return strings.TrimSpace(e.Exec(pod, container, "printenv", "GRANTED"))
	}

	p.serve()
	for _, wrong := range []struct{ version, resource, text string }{
		{"v1", resource, `requested API version "v1" is not supported by kubelet. Supported version is ["v1beta1"]`},
		{pluginapi.Version, "cpu", `the ResourceName "cpu" is invalid`},
	} {
		if err := p.register(wrong.version, wrong.resource); err == nil || !strings.Contains(err.Error(), wrong.text) {
			t.Errorf("register %s %s: %v, not %s", wrong.version, wrong.resource, err, wrong.text)
		}
	}
	if err := p.register(pluginapi.Version, resource); err != nil {
		t.Fatal(err)
	}
	waitAmounts(e, victimName, resource, "3/2", 20*time.Second)

	// Through the scheduler: the other node has no such device.
	e.Create(e.Pod("one", "busybox:1.37", kit.Forever, device("1"), func(p *corev1.Pod) {
		p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "OWN", Value: "the Pod's"}}
	}))
	one := e.WaitReady(60*time.Second, "one")[0]
	if one.Spec.NodeName != victimName {
		t.Fatalf("the Pod is on %s", one.Spec.NodeName)
	}
	if id := granted("one", "main"); id != "d2" {
		t.Errorf("the container has %q: d2 is preferred", id)
	}
	seen := e.Exec("one", "main", "sh", "-c", `
		printenv OWN; cat /grant/file; echo; stat -c %t:%T /dev/granted/d2
		touch /grant/x 2>/dev/null || echo read-only
		head -c 2 /dev/granted/d2 | wc -c
		echo x > /dev/granted/d2 || echo full`)
	if want := "the Pod's\ngranted\n1:7\nread-only\n2\nfull\n"; seen != want {
		t.Errorf("in the container: %q, not %q", seen, want)
	}
	if allocated, prepared := p.calls(); len(allocated) != 1 || len(prepared) != 1 || prepared[0] != "d2" {
		t.Errorf("Allocate for %v, PreStartContainer for %v", allocated, prepared)
	}
	e.WaitPod("one", 20*time.Second, "the device is shown", func(p *corev1.Pod) (bool, string) {
		return health(p, "main") == resource+" d2 Healthy", health(p, "main")
	})

	t.Run("monitoring agents are told", func(t *testing.T) {
		conn, err := grpc.NewClient("unix://"+filepath.Join(e.NodeDir(victim), "kubelet", "pod-resources", "kubelet.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		lister := podresourcesapi.NewPodResourcesListerClient(conn)
		list, err := lister.List(e.Ctx, &podresourcesapi.ListPodResourcesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var listed string
		for _, pod := range list.PodResources {
			if pod.Namespace == e.Namespace && pod.Name == "one" {
				listed = fmt.Sprint(pod.Containers[0].Name, pod.Containers[0].Devices[0].ResourceName, pod.Containers[0].Devices[0].DeviceIds)
			}
		}
		if want := fmt.Sprint("main", resource, []string{"d2"}); listed != want {
			t.Errorf("List: %s, not %s", listed, want)
		}
		one, err := lister.Get(e.Ctx, &podresourcesapi.GetPodResourcesRequest{PodName: "one", PodNamespace: e.Namespace})
		if err != nil || len(one.PodResources.Containers[0].Devices) != 1 {
			t.Errorf("Get: %v, %v", one, err)
		}
		if _, err := lister.Get(e.Ctx, &podresourcesapi.GetPodResourcesRequest{PodName: "none", PodNamespace: e.Namespace}); err == nil || !strings.Contains(err.Error(), "pod none in namespace "+e.Namespace+" not found") {
			t.Errorf("Get of a Pod that is not there: %v", err)
		}
		all, err := lister.GetAllocatableResources(e.Ctx, &podresourcesapi.AllocatableResourcesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var working []string
		for _, device := range all.Devices {
			if device.ResourceName == resource {
				working = append(working, device.DeviceIds...)
			}
		}
		slices.Sort(working)
		if !slices.Equal(working, []string{"d1", "d2"}) {
			t.Errorf("GetAllocatableResources: %v", working)
		}
	})

	t.Run("devices are exclusive", func(t *testing.T) {
		e := e.In(t)
		e.Create(e.Pod("forced", "busybox:1.37", kit.Forever, kit.On(victimName), device("2")))
		waitRefused(e, t, "forced", "UnexpectedAdmissionError",
			"Pod was rejected: Allocate failed due to requested number of devices unavailable for "+resource+". Requested: 2, Available: 1, which is unexpected")
		e.Create(e.Pod("waits", "busybox:1.37", kit.Forever, device("2")))
		e.WaitPod("waits", 30*time.Second, "unschedulable", func(p *corev1.Pod) (bool, string) {
			for _, condition := range p.Status.Conditions {
				if condition.Type == corev1.PodScheduled && strings.Contains(condition.Message, "Insufficient "+resource) {
					return true, ""
				}
			}
			return false, kit.Describe(p)
		})
		e.Delete("waits")
		e.Create(e.Pod("free", "busybox:1.37", kit.Forever, kit.On(victimName), func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{"cluster.test/license": apiresource.MustParse("1")}
		}))
		e.WaitReady(60*time.Second, "free") // a resource of nobody's is the cluster's business
	})

	t.Run("init containers leave theirs to the next", func(t *testing.T) {
		e := e.In(t)
		pod := e.Pod("stages", "busybox:1.37", kit.Forever, kit.On(victimName), device("1"))
		pod.Spec.InitContainers = []corev1.Container{{
			Name: "init", Image: e.Image("busybox:1.37"), Command: []string{"sh", "-c", "printenv GRANTED"},
			Resources: pod.Spec.Containers[0].Resources,
		}}
		e.Create(pod)
		e.WaitReady(60*time.Second, "stages")
		if init, main := strings.TrimSpace(e.Logs("stages", "init")), granted("stages", "main"); init != "d1" || main != "d1" {
			t.Errorf("the init container had %q, the main one has %q", init, main)
		}
		e.Delete("stages")
		e.WaitGone("stages", 30*time.Second)
	})

	t.Run("health is told", func(t *testing.T) {
		e := e.In(t)
		start := time.Now()
		p.set("d2", pluginapi.Unhealthy)
		e.WaitPod("one", 20*time.Second, "the device is shown as broken", func(p *corev1.Pod) (bool, string) {
			return health(p, "main") == resource+" d2 Unhealthy", health(p, "main")
		})
		t.Logf("shown after %v", time.Since(start).Round(time.Millisecond))
		waitAmounts(e, victimName, resource, "3/1", 20*time.Second)
		p.set("d2", pluginapi.Healthy)
		waitAmounts(e, victimName, resource, "3/2", 20*time.Second)
	})

	t.Run("a plugin that refuses", func(t *testing.T) {
		e := e.In(t)
		p.fail(errors.New("out of order"))
		e.Create(e.Pod("refused", "busybox:1.37", kit.Forever, kit.On(victimName), device("1")))
		waitRefused(e, t, "refused", "UnexpectedAdmissionError",
			"Pod was rejected: Allocate failed due to rpc error: code = Unknown desc = out of order, which is unexpected")
		p.fail(nil)
	})

	t.Run("CDI", func(t *testing.T) {
		e := e.In(t)
		const file = "/var/run/cdi/gantry-firstlight.json"
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		spec := `{"cdiVersion": "0.6.0", "kind": "gantry.test/cdi", "devices": [{"name": "x", "containerEdits": {
			"env": ["FROM_CDI=yes"], "deviceNodes": [{"path": "/dev/from-cdi", "hostPath": "/dev/zero"}, {"path": "/opt/elsewhere", "hostPath": "/dev/zero"}],
			"mounts": [{"hostPath": "` + p.shared + `", "containerPath": "/cdi", "options": ["ro", "bind"]}]}}]}`
		if err := os.WriteFile(file, []byte(spec), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(file) })
		p.cdi = "gantry.test/cdi=x"
		e.Create(e.Pod("cdi", "busybox:1.37", kit.Forever, kit.On(victimName), device("1")))
		e.WaitReady(60*time.Second, "cdi")
		seen := e.Exec("cdi", "main", "sh", "-c", "printenv FROM_CDI; stat -c %t:%T /dev/from-cdi; head -c 3 /dev/from-cdi | wc -c; stat -c %t:%T /opt/elsewhere; head -c 3 /opt/elsewhere | wc -c; cat /cdi/file; touch /cdi/x 2>/dev/null || echo read-only")
		if want := "yes\n1:5\n3\n1:5\n3\ngrantedread-only\n"; seen != want {
			t.Errorf("in the container: %q, not %q", seen, want)
		}
		e.Delete("cdi")
		e.WaitGone("cdi", 30*time.Second)
		p.cdi = "gantry.test/cdi=none"
		e.Create(e.Pod("none", "busybox:1.37", kit.Forever, kit.On(victimName), device("1")))
		e.WaitPod("none", 60*time.Second, "waits for its CDI device", func(p *corev1.Pod) (bool, string) {
			waiting := kit.Status(p, "main").State.Waiting
			return waiting != nil && waiting.Reason == "CreateContainerError" && strings.Contains(waiting.Message, "unresolvable CDI devices gantry.test/cdi=none"), kit.Describe(p)
		})
		e.Delete("none")
		e.WaitGone("none", 30*time.Second)
		p.cdi = ""
	})

	t.Run("the agent is killed", func(t *testing.T) {
		e := e.In(t)
		t.Cleanup(func() { e.Command(t, "start-agent", "--node", node) })
		before := kit.Status(e.Get("one"), "main").ContainerID
		e.Command(t, "kill-agent", "--node", node)
		e.Command(t, "start-agent", "--node", node)
		// Until the plugin is back nothing can be given, and nothing is taken away.
		waitAmounts(e, victimName, resource, "0/0", 30*time.Second)
		e.Create(e.Pod("early", "busybox:1.37", kit.Forever, kit.On(victimName), device("1")))
		waitRefused(e, t, "early", "UnexpectedAdmissionError",
			"Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy devices "+resource+", which is unexpected")
		if _, err := os.Stat(p.socket); !os.IsNotExist(err) {
			t.Errorf("the plugin's old socket is still there: %v", err)
		}
		p.stop()
		p.join()
		waitAmounts(e, victimName, resource, "3/2", 20*time.Second)
		if after := kit.Status(e.Get("one"), "main").ContainerID; after != before || granted("one", "main") != "d2" {
			t.Errorf("the container was %s, and is %s", before, after)
		}
		e.Create(e.Pod("late", "busybox:1.37", kit.Forever, kit.On(victimName), device("1")))
		e.WaitReady(60*time.Second, "late")
		if id := granted("late", "main"); id != "d1" {
			t.Errorf("the new container has %q: d2 is taken", id)
		}
		e.Delete("late")
		e.WaitGone("late", 30*time.Second)
	})

	t.Run("the plugin goes and comes", func(t *testing.T) {
		e := e.In(t)
		p.stop()
		waitAmounts(e, victimName, resource, "3/0", 20*time.Second)
		p.join()
		waitAmounts(e, victimName, resource, "3/2", 20*time.Second)
	})

	t.Run("a Pod that is gone has none", func(t *testing.T) {
		e := e.In(t)
		e.Delete("one")
		e.WaitGone("one", 30*time.Second)
		e.Create(e.Pod("both", "busybox:1.37", kit.Forever, kit.On(victimName), device("2")))
		e.WaitReady(60*time.Second, "both")
		if ids := granted("both", "main"); ids != "d1,d2" {
			t.Errorf("the container has %q", ids)
		}
	})
}

// Plugins that do not come by themselves are found by their sockets.
func TestPluginRegistry(t *testing.T) {
	t.Parallel()
	share(t, victimName)
	e := kit.New(t)
	registry := filepath.Join(e.NodeDir(victim), "kubelet", "plugins_registry", "below")
	if err := os.MkdirAll(registry, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(registry) })
	devices := map[string]string{"d": pluginapi.Healthy}
	found := newDevicePlugin(t, "gantry.test/found", filepath.Join(registry, "found.sock"), devices)
	found.serve()
	if notice := found.awaitNotice(); !notice.PluginRegistered || notice.Error != "" {
		t.Errorf("registered: %v", notice)
	}
	waitAmounts(e, victimName, found.resource, "1/1", 20*time.Second)
	found.stop() // removes the socket
	waitAmounts(e, victimName, found.resource, "1/0", 20*time.Second)

	other := newDevicePlugin(t, "csi.gantry.test", filepath.Join(registry, "csi.sock"), devices)
	other.kind = registerapi.CSIPlugin
	other.serve()
	want := "RegisterPlugin error -- no handler registered for plugin type: CSIPlugin at socket " + other.socket
	if notice := other.awaitNotice(); notice.PluginRegistered || notice.Error != want {
		t.Errorf("a CSI plugin: %v", notice)
	}
}

// Upstream's own sample plugin, as a DaemonSet.
func TestSampleDevicePlugin(t *testing.T) {
	t.Parallel()
	share(t, victimName)
	e := kit.New(t)
	const resource = "example.com/resource"
	e.BuildTools(t, "sample-device-plugin")
	program := filepath.Join(kit.Repository(), "build", "bin", "sample-device-plugin")
	tmp := t.TempDir()
	if err := os.MkdirAll("/var/run/cdi", 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove("/var/run/cdi/example.com.json") })
	pod := e.Pod("sample", "busybox:1.37", []string{"/sample-device-plugin"}, func(p *corev1.Pod) {
		mount := func(name, host, path string) {
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: host}}})
			p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: name, MountPath: path})
		}
		mount("program", program, "/sample-device-plugin")
		mount("plugins", filepath.Join(e.NodeDir(victim), "kubelet", "device-plugins"), "/var/lib/kubelet/device-plugins")
		mount("tmp", tmp, "/tmp")
		mount("cdi", "/var/run/cdi", "/var/run/cdi")
		p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "CDI_ENABLED", Value: "1"}}
		p.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": victimName}
	})
	labels := &metav1.LabelSelector{MatchLabels: pod.Labels}
	set := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "sample", Namespace: e.Namespace},
		Spec: appsv1.DaemonSetSpec{Selector: labels, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels}, Spec: pod.Spec,
		}},
	}
	if _, err := e.Client.AppsV1().DaemonSets(e.Namespace).Create(e.Ctx, set, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitAmounts(e, victimName, resource, "2/2", 60*time.Second)
	e.Create(e.Pod("user", "busybox:1.37", kit.Forever, kit.Limit(resource, "1")))
	user := e.WaitReady(60*time.Second, "user")[0]
	// It mounts /tmp/Dev-N of the node, which the node made when it was not there.
	seen := strings.TrimSpace(e.Exec("user", "main", "sh", "-c", "ls -d /tmp/Dev-*"))
	if seen != "/tmp/Dev-1" && seen != "/tmp/Dev-2" {
		t.Errorf("in the container: %q", seen)
	}
	t.Cleanup(func() { _ = os.RemoveAll(seen) })
	// And names a CDI device, whose node it wants beside.
	id := strings.TrimPrefix(seen, "/tmp/")
	described := e.Exec("user", "main", "sh", "-c", "printenv CDI_DEVICE; stat -c '%F %t' /tmp/CDI-"+id)
	if want := "CDI-" + id + "\nblock special file 1\n"; described != want {
		t.Errorf("in the container: %q, not %q", described, want)
	}
	e.WaitPod(user.Name, 20*time.Second, "the device is shown", func(p *corev1.Pod) (bool, string) {
		return health(p, "main") == fmt.Sprintf("%s %s Healthy", resource, filepath.Base(seen)), health(p, "main")
	})
}
