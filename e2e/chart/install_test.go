package chart

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// push puts the image of the node into the cluster's registry: the one that
// hack/image has built, if GANTRY_IMAGE names it, as hack/test has it.
func push(t *testing.T, e *kit.Env, image string) {
	t.Helper()
	var made v1.Image
	if path := os.Getenv("GANTRY_IMAGE"); path != "" {
		t.Logf("the image is %s", path)
		made = kit.Archive(t, path)
	} else {
		made = assemble(t)
	}
	ref, err := name.ParseReference(e.Image(image), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, made, remote.WithContext(e.Ctx)); err != nil {
		t.Fatal(err)
	}
}

// assemble makes what the Dockerfile describes of the binary under test: one
// file and authorities, on nothing. That is quicker than to build it inside.
func assemble(t *testing.T) v1.Image {
	t.Helper()
	binary := os.Getenv("GANTRY_BIN")
	if binary == "" {
		binary = filepath.Join(kit.Repository(), "target/release/gantry")
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		var buffer bytes.Buffer
		w := tar.NewWriter(&buffer)
		for _, dir := range []string{"usr/bin/", "etc/ssl/certs/", "run/", "tmp/", "var/lib/", "var/log/"} {
			if err := w.WriteHeader(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
				return nil, err
			}
		}
		// The same bytes each time: it is read more than once.
		for _, file := range [][2]string{{"usr/bin/gantry", binary}, {"etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/ca-certificates.crt"}} {
			target, source := file[0], file[1]
			content, err := os.ReadFile(source)
			if err != nil {
				return nil, err
			}
			if err := w.WriteHeader(&tar.Header{Name: target, Mode: 0o755, Size: int64(len(content))}); err != nil {
				return nil, err
			}
			if _, err := w.Write(content); err != nil {
				return nil, err
			}
		}
		return io.NopCloser(&buffer), w.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	made, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	if made, err = mutate.ConfigFile(made, &v1.ConfigFile{
		Architecture: runtime.GOARCH, OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(t, layer)},
		Config: v1.Config{Entrypoint: []string{"/usr/bin/gantry"}, Cmd: []string{"agent"}},
	}); err != nil {
		t.Fatal(err)
	}
	return made
}

func diffIDs(t *testing.T, layer v1.Layer) []v1.Hash {
	t.Helper()
	id, err := layer.DiffID()
	if err != nil {
		t.Fatal(err)
	}
	return []v1.Hash{id}
}

// A user's way: install, look at the new node, use it, more of them, fewer of
// them, an upgrade, uninstall. Nodes leave the cluster when they go for good, and
// only then. The only node of the cluster is Gantry: this is Gantry in Gantry.
func TestInstall(t *testing.T) {
	e := kit.New(t)
	push(t, e, "gantry:test")
	// The first Pod of a node makes what all of them share.
	e.Create(e.Pod("first", "busybox:1.37", kit.Forever, kit.On("node-1")))
	e.WaitReady(time.Minute, "first")
	e.Delete("first")
	e.WaitGone("first", time.Minute)
	clean := e.Snapshot(t, 1)
	flags := []string{
		"--namespace=" + e.Namespace, "--kubeconfig=" + e.Kubeconfig,
		"--set=image.repository=" + e.Image("gantry"), "--set=image.tag=test", "--set=apiServer.url=" + e.Config.Host,
		"--set-json=extraArgs=[\"--insecure-registry=" + e.Registry + "\"]",
		"--set=terminationGracePeriodSeconds=90",
		`--set=nodeSelector.kubernetes\.io/hostname=node-1`,
		"--set-json=cluster.dns=[\"10.96.0.10\"]",
		"--set-json=node.taints=[{\"key\":\"gantry/nested\",\"value\":\"true\",\"effect\":\"NoSchedule\"}]",
		"--set-json=tolerations=[{\"key\":\"node-role.kubernetes.io/control-plane\",\"operator\":\"Exists\"}]",
	}
	do := func(args ...string) string {
		t.Helper()
		out, err := helm(t, append(args, flags...)...)
		if err != nil {
			t.Fatalf("helm %s: %v\n%s", args[0], err, out)
		}
		return out
	}
	do("install", "edge", chartDir, "--dry-run=server")
	notes := do("install", "edge", chartDir)
	if !strings.Contains(notes, "about to join") {
		t.Errorf("notes:\n%s", notes)
	}
	t.Cleanup(func() {
		helm(t, "uninstall", "edge", "--namespace="+e.Namespace, "--kubeconfig="+e.Kubeconfig, "--ignore-not-found", "--wait=watcher")
		nodes, _ := e.Client.CoreV1().Nodes().List(e.Ctx, metav1.ListOptions{LabelSelector: "gantry/nested=true"})
		for _, node := range nodes.Items {
			e.Client.CoreV1().Nodes().Delete(e.Ctx, node.Name, metav1.DeleteOptions{})
		}
	})
	ready := func(count int) {
		t.Helper()
		e.Eventually(2*time.Minute, fmt.Sprintf("%d nested nodes Ready", count), func() (bool, string) {
			nodes, err := e.Client.CoreV1().Nodes().List(e.Ctx, metav1.ListOptions{LabelSelector: "gantry/nested=true"})
			if err != nil {
				return false, err.Error()
			}
			found, said := 0, ""
			for _, node := range nodes.Items {
				c := kit.NodeReady(&node)
				said += fmt.Sprintf("%s: %s %s; ", node.Name, c.Status, c.Message)
				if c.Status == corev1.ConditionTrue {
					found++
				}
			}
			return found == count, said
		})
	}
	ready(1)

	labels := map[string]string{"app": "guest"}
	replicas := int32(2)
	pod := e.Pod("unused", "busybox:1.37", kit.Forever, kit.Limit(corev1.ResourceMemory, "32Mi")).Spec
	pod.NodeSelector = map[string]string{"gantry/nested": "true"}
	pod.Tolerations = []corev1.Toleration{{Key: "gantry/nested", Operator: corev1.TolerationOpExists}}
	deployment := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "guest"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: pod},
		},
	}
	if _, err := e.Client.AppsV1().Deployments(e.Namespace).Create(e.Ctx, deployment, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	available := func() {
		t.Helper()
		e.Eventually(2*time.Minute, "the Deployment is available", func() (bool, string) {
			d, err := e.Client.AppsV1().Deployments(e.Namespace).Get(e.Ctx, "guest", metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			return d.Status.ReadyReplicas == 2, fmt.Sprintf("%d of 2 ready", d.Status.ReadyReplicas)
		})
	}
	available()
	pods, err := e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{LabelSelector: "app=guest"})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.Items {
		if pod.Spec.NodeName != "edge-gantry-0" {
			t.Errorf("%s landed on %s", pod.Name, pod.Spec.NodeName)
		}
		// The API server reaches the nested node under its Pod's address.
		if out := e.Exec(pod.Name, "main", "hostname"); strings.TrimSpace(out) != pod.Name {
			t.Errorf("hostname of %s: %q", pod.Name, out)
		}
	}

	do("upgrade", "edge", chartDir, "--set=replicas=2")
	ready(2)
	t.Run("others' Nodes", func(t *testing.T) { othersNodesAreSafe(t, e.In(t)) })
	t.Run("scaled down", func(t *testing.T) { scaledDown(t, e.In(t), pod) })
	node, err := e.Client.CoreV1().Nodes().Get(e.Ctx, "edge-gantry-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	before, err := e.Client.CoreV1().Pods(e.Namespace).Get(e.Ctx, "edge-gantry-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	do("upgrade", "edge", chartDir, "--set=replicas=1", "--set=podAnnotations.note=second")
	e.Eventually(2*time.Minute, "the upgraded Pod is Ready, the other gone", func() (bool, string) {
		pods, err := e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/instance=edge"})
		if err != nil || len(pods.Items) != 1 {
			return false, fmt.Sprint(len(pods.Items), " Pods ", err)
		}
		is, _ := kit.Ready(&pods.Items[0])
		return is && pods.Items[0].UID != before.UID, kit.Describe(&pods.Items[0])
	})
	ready(1)
	if after, err := e.Client.CoreV1().Nodes().Get(e.Ctx, "edge-gantry-0", metav1.GetOptions{}); err != nil || after.UID != node.UID || after.Spec.Unschedulable {
		t.Errorf("an upgrade of the Pod has made its Node another: %v", err)
	}
	available()
	pods, err = e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{LabelSelector: "app=guest"})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.Items {
		e.Eventually(time.Minute, "exec after the upgrade", func() (bool, string) {
			out, errOut, err := e.Kubectl(e.Ctx, "exec", "-n", e.Namespace, pod.Name, "--", "hostname")
			return err == nil && strings.TrimSpace(out) == pod.Name, fmt.Sprint(out, errOut, err)
		})
	}

	// The Pods have nowhere else to go, and are evicted all the same.
	if out, err := helm(t, "uninstall", "edge", "--namespace="+e.Namespace, "--kubeconfig="+e.Kubeconfig, "--wait=watcher"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	left, err := e.Client.CoreV1().Nodes().List(e.Ctx, metav1.ListOptions{LabelSelector: "gantry/nested=true"})
	if err != nil || len(left.Items) > 0 {
		t.Errorf("%d Nodes are left after the uninstall: %v", len(left.Items), err)
	}
	for _, pod := range pods.Items {
		e.WaitGone(pod.Name, 10*time.Second)
	}
	if err := e.Client.AppsV1().Deployments(e.Namespace).Delete(e.Ctx, "guest", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	// Helm waits for the StatefulSet; its Pods are collected after it.
	e.Eventually(time.Minute, "nothing is left of the release", func() (bool, string) {
		out, errOut, err := e.Kubectl(e.Ctx, "get", "all,configmaps,secrets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,persistentvolumeclaims,nodes",
			"--all-namespaces", "--selector=app.kubernetes.io/instance=edge", "--output=name")
		return err == nil && out == "", fmt.Sprint(out, errOut, err)
	})
	e.Eventually(time.Minute, "the machine's node is as it was", func() (bool, string) {
		left := ""
		for kind, held := range e.Snapshot(t, 1) {
			for _, thing := range held {
				if !slices.Contains(clean[kind], thing) {
					left += kind + " " + thing + "; "
				}
			}
		}
		return left == "", left
	})
}
