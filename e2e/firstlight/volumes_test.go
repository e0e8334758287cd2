package firstlight

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"gantry.local/e2e/internal/kit"
)

// mounted adds a volume and mounts it in all containers.
func mounted(p *corev1.Pod, name, path string, source corev1.VolumeSource) {
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: source})
	for i := range p.Spec.Containers {
		c := &p.Spec.Containers[i]
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: name, MountPath: path})
	}
}

// Volumes of every kind that first light has: what is in them, who may read
// it, and that it follows the API objects.
func TestVolumes(t *testing.T) {
	t.Parallel()
	e := kit.New(t)
	node := quietNode(e)
	share(t, node)
	settings(t, e, "app", map[string]string{"colour": "green", "shape": "round"}, map[string]string{"password": "s3cret"})
	// On the node's side, which is this machine's.
	hostDir := t.TempDir()
	if err := os.WriteFile(hostDir+"/from-host", []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	mode, expiration := int32(0o400), int64(3607)
	label := &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}
	local := corev1.LocalObjectReference{Name: "app"}
	pod := e.Pod("volumes", "busybox:1.37", kit.Forever, kit.On(node))
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "other", Image: e.Image("busybox:1.37"), Command: kit.Forever})
	mounted(pod, "config", "/config", corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: local}})
	mounted(pod, "item", "/item", corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
		LocalObjectReference: local, Items: []corev1.KeyToPath{{Key: "shape", Path: "a/b", Mode: &mode}},
	}})
	mounted(pod, "secret", "/secret", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "app", DefaultMode: &mode}})
	mounted(pod, "downward", "/downward", corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
		Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: label}},
	}})
	mounted(pod, "projected", "/projected", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", Audience: "vault", ExpirationSeconds: &expiration}},
		{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: local}},
		{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "name", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}}},
	}}})
	mounted(pod, "scratch", "/scratch", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
	mounted(pod, "memory", "/memory", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}})
	mounted(pod, "host", "/host", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: hostDir}})
	e.Create(pod)
	running := e.WaitReady(60*time.Second, "volumes")[0]
	read := func(path string) string {
		t.Helper()
		return e.Exec("volumes", "main", "cat", path)
	}

	for path, want := range map[string]string{
		"/config/colour": "green", "/config/shape": "round", "/item/a/b": "round", "/secret/password": "s3cret",
		"/projected/colour": "green", "/projected/name": "volumes", "/host/from-host": "host\n",
		"/downward/labels": `app="volumes"`,
	} {
		if got := read(path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if got := e.Exec("volumes", "main", "ls", "/item", "/item/a"); !strings.Contains(got, "b\n") || strings.Contains(got, "colour") {
		t.Errorf("a volume with one item holds:\n%s", got)
	}
	for _, path := range []string{"/secret/password", "/item/a/b"} {
		if got := e.Exec("volumes", "main", "stat", "-L", "-c", "%a", path); got != "400\n" {
			t.Errorf("%s has the mode %s", path, got)
		}
	}
	for path, want := range map[string]string{"/secret": "tmpfs", "/projected": "tmpfs", "/memory": "tmpfs", "/var/run/secrets/kubernetes.io/serviceaccount": "tmpfs"} {
		if got := e.Exec("volumes", "main", "sh", "-c", "grep ' "+path+" ' /proc/mounts | cut -d' ' -f3"); got != want+"\n" {
			t.Errorf("%s is on %q, want %s", path, got, want)
		}
	}
	// Containers of a Pod share its volumes.
	e.Exec("volumes", "main", "sh", "-c", "echo shared > /scratch/file; echo shared > /memory/file; echo back > /host/from-pod")
	for _, path := range []string{"/scratch/file", "/memory/file"} {
		if got := e.Exec("volumes", "other", "cat", path); got != "shared\n" {
			t.Errorf("%s in the other container: %q", path, got)
		}
	}
	if got, err := os.ReadFile(hostDir + "/from-pod"); string(got) != "back\n" {
		t.Errorf("the host sees %q %v", got, err)
	}
	if out, errOut, err := e.Kubectl(e.Ctx, "exec", "-n", e.Namespace, "volumes", "-c", "main", "--", "touch", "/config/new"); err == nil {
		t.Errorf("a ConfigMap volume can be written: %s%s", out, errOut)
	}

	t.Run("tokens", func(t *testing.T) {
		e := e.In(t)
		// The one that every Pod gets is good for the API server, as the Pod's.
		config := rest.AnonymousClientConfig(e.Config)
		config.BearerToken = e.Exec("volumes", "main", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/token")
		config.TLSClientConfig.CAFile = ""
		config.TLSClientConfig.CAData = []byte(e.Exec("volumes", "main", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"))
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		review, err := client.AuthenticationV1().SelfSubjectReviews().Create(e.Ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatalf("the API server does not take the Pod's token: %v", err)
		}
		user := review.Status.UserInfo
		if want := "system:serviceaccount:" + e.Namespace + ":default"; user.Username != want {
			t.Errorf("the token is that of %s, want %s", user.Username, want)
		}
		if got := fmt.Sprint(user.Extra["authentication.kubernetes.io/pod-uid"]); got != "["+string(running.UID)+"]" {
			t.Errorf("the token is bound to the Pod %s, want %s", got, running.UID)
		}
		if got := e.Exec("volumes", "main", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/namespace"); got != e.Namespace {
			t.Errorf("namespace %q", got)
		}
		// The other one is for somebody else.
		token := e.Exec("volumes", "main", "cat", "/projected/token")
		vault, err := e.Client.AuthenticationV1().TokenReviews().Create(e.Ctx, &authenticationv1.TokenReview{
			Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{"vault"}},
		}, metav1.CreateOptions{})
		if err != nil || !vault.Status.Authenticated {
			t.Errorf("the token for the audience vault: %+v %v", vault, err)
		}
	})
	t.Run("updates", func(t *testing.T) {
		e := e.In(t)
		patch, _ := json.Marshal(map[string]any{"data": map[string]string{"colour": "blue"}})
		if _, err := e.Client.CoreV1().ConfigMaps(e.Namespace).Patch(e.Ctx, "app", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		patch, _ = json.Marshal(map[string]any{"stringData": map[string]string{"password": "changed"}})
		if _, err := e.Client.CoreV1().Secrets(e.Namespace).Patch(e.Ctx, "app", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		patch, _ = json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]string{"tier": "front"}}})
		if _, err := e.Client.CoreV1().Pods(e.Namespace).Patch(e.Ctx, "volumes", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		// A watch brings it, kubelet's own delay is a minute and more.
		for path, want := range map[string]string{
			"/config/colour": "blue", "/projected/colour": "blue", "/secret/password": "changed", "/downward/labels": "app=\"volumes\"\ntier=\"front\"",
		} {
			e.Eventually(20*time.Second, path+" is up to date", func() (bool, string) {
				got := e.Exec("volumes", "other", "cat", path)
				return got == want, got
			})
		}
	})
	if after := e.Get("volumes"); kit.Status(after, "main").RestartCount != 0 {
		t.Errorf("the container was restarted: %s", kit.Describe(after))
	}
	e.Delete("volumes")
	e.WaitGone("volumes", 30*time.Second)
	if got, err := os.ReadFile(hostDir + "/from-host"); string(got) != "host\n" {
		t.Errorf("the host's file after the Pod's end: %q %v", got, err)
	}
}
