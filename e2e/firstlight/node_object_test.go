package firstlight

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"gantry.local/e2e/internal/kit"
)

// What the node says of itself, and that a new start sets right what others
// changed.
func TestNodeObject(t *testing.T) {
	t.Parallel()
	own(t, victimName)
	e := kit.New(t)
	nodes := e.Client.CoreV1().Nodes()
	get := func() *corev1.Node {
		t.Helper()
		node, err := nodes.Get(e.Ctx, victimName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return node
	}
	node := get()
	labels := map[string]string{"kubernetes.io/hostname": victimName, "kubernetes.io/os": "linux", "kubernetes.io/arch": runtime.GOARCH}
	for label, want := range labels {
		if got := node.Labels[label]; got != want {
			t.Errorf("label %s=%q, want %q", label, got, want)
		}
	}
	addresses := map[corev1.NodeAddressType]string{}
	for _, address := range node.Status.Addresses {
		addresses[address.Type] = address.Address
	}
	if addresses[corev1.NodeHostName] != victimName || !strings.HasPrefix(addresses[corev1.NodeInternalIP], "172.29.") {
		t.Errorf("addresses %v", addresses)
	}
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourcePods, corev1.ResourceEphemeralStorage} {
		capacity, allocatable := node.Status.Capacity[name], node.Status.Allocatable[name]
		if capacity.Sign() <= 0 || allocatable.Sign() <= 0 || allocatable.Cmp(capacity) > 0 {
			t.Errorf("%s: capacity %s, allocatable %s", name, &capacity, &allocatable)
		}
	}
	conditions := map[corev1.NodeConditionType]corev1.ConditionStatus{}
	for _, condition := range node.Status.Conditions {
		conditions[condition.Type] = condition.Status
	}
	for condition, want := range map[corev1.NodeConditionType]corev1.ConditionStatus{
		corev1.NodeReady: corev1.ConditionTrue, corev1.NodeMemoryPressure: corev1.ConditionFalse,
		corev1.NodeDiskPressure: corev1.ConditionFalse, corev1.NodePIDPressure: corev1.ConditionFalse,
	} {
		if conditions[condition] != want {
			t.Errorf("condition %s is %q, want %s", condition, conditions[condition], want)
		}
	}
	info := node.Status.NodeInfo
	if info.KubeletVersion == "" || !strings.HasPrefix(info.ContainerRuntimeVersion, "gantry://") || info.KernelVersion == "" || info.BootID == "" || info.OSImage == "" {
		t.Errorf("nodeInfo %+v", info)
	}
	if port := node.Status.DaemonEndpoints.KubeletEndpoint.Port; port != 10250 {
		t.Errorf("kubelet's port is %d", port)
	}
	lease := func() time.Time {
		t.Helper()
		lease, err := e.Client.CoordinationV1().Leases("kube-node-lease").Get(e.Ctx, victimName, metav1.GetOptions{})
		if err != nil || lease.Spec.RenewTime == nil {
			t.Fatalf("lease: %v %v", lease, err)
		}
		if len(lease.OwnerReferences) != 1 || lease.OwnerReferences[0].UID != node.UID {
			t.Errorf("the lease belongs to %v", lease.OwnerReferences)
		}
		return lease.Spec.RenewTime.Time
	}
	first := lease()
	e.Eventually(20*time.Second, "the lease is renewed", func() (bool, string) {
		now := lease()
		return now.After(first), now.String()
	})

	patch := `{"metadata": {"labels": {"kubernetes.io/os": "plan9", "kubernetes.io/arch": null, "example.org/mine": "kept"}}}`
	if _, err := nodes.Patch(e.Ctx, victimName, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	number := strconv.Itoa(victim)
	t.Cleanup(func() {
		e.Command(t, "start-agent", "--node", number)
		if _, err := nodes.Patch(e.Ctx, victimName, types.MergePatchType, []byte(`{"metadata": {"labels": {"example.org/mine": null}}}`), metav1.PatchOptions{}); err != nil {
			t.Error(err)
		}
	})
	e.Command(t, "stop-agent", "--node", number)
	e.Command(t, "start-agent", "--node", number)
	e.Eventually(20*time.Second, "the node's labels are right again", func() (bool, string) {
		now := get()
		return now.Labels["kubernetes.io/os"] == "linux" && now.Labels["kubernetes.io/arch"] == runtime.GOARCH, fmt.Sprint(now.Labels)
	})
	after := get()
	if after.UID != node.UID || after.Labels["example.org/mine"] != "kept" || after.Spec.PodCIDR != node.Spec.PodCIDR {
		t.Errorf("the node's object was not kept: %+v", after.ObjectMeta)
	}
	e.Eventually(20*time.Second, "the event of enforced limits", func() (bool, string) {
		list, err := e.Client.CoreV1().Events("default").List(e.Ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + victimName})
		if err != nil {
			return false, err.Error()
		}
		seen := ""
		for _, event := range list.Items {
			seen += event.Reason + " "
		}
		return strings.Contains(seen, "NodeAllocatableEnforced ") && strings.Contains(seen, "Starting "), seen
	})
}

// Every request to the node's port is authenticated and authorized.
func TestNodeEndpoints(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	name := quietNode(e)
	share(t, name)
	node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var address string
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			address = a.Address
		}
	}
	admin, err := rest.TLSConfigFor(e.Config)
	if err != nil {
		t.Fatal(err)
	}
	admin.InsecureSkipVerify = true // the node's certificate is its own; the rotation's test has the cluster's
	token, err := e.Client.CoreV1().ServiceAccounts(e.Namespace).CreateToken(e.Ctx, "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	request := func(path, bearer string, client *tls.Config) (int, string) {
		t.Helper()
		transport := &http.Transport{TLSClientConfig: client}
		defer transport.CloseIdleConnections()
		req, err := http.NewRequestWithContext(e.Ctx, http.MethodGet, "https://"+address+":10250"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if bearer != "" {
			req.Header.Set("Authorization", "Bearer "+bearer)
		}
		response, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Do(req)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return response.StatusCode, string(body)
	}
	nobody := &tls.Config{InsecureSkipVerify: true}
	for _, c := range []struct {
		what, path, token string
		client            *tls.Config
		code              int
	}{
		{"anonymous", "/pods", "", nobody, http.StatusUnauthorized},
		{"anonymous", "/healthz", "", nobody, http.StatusUnauthorized},
		{"a token that is none", "/pods", "nonsense", nobody, http.StatusUnauthorized},
		{"a Pod's account", "/pods", token.Status.Token, nobody, http.StatusForbidden},
		{"a Pod's account", "/run/" + e.Namespace + "/x/main", token.Status.Token, nobody, http.StatusForbidden},
		{"an administrator", "/pods", "", admin, http.StatusOK},
		{"an administrator", "/healthz", "", admin, http.StatusOK},
	} {
		if code, body := request(c.path, c.token, c.client); code != c.code {
			t.Errorf("%s asks for %s: %d, want %d: %.200s", c.what, c.path, code, c.code, body)
		}
	}
}
