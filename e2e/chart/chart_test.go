// Package chart tests charts/gantry with Helm itself: that it is well-formed,
// what it renders, what its schema refuses, and, on a cluster, that the API
// server takes all of it.
//
//	go test ./chart                               with a cluster of its own
//	GANTRY_E2E_CLUSTER=dev go test ./chart        on a running one
package chart

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	kubelet "k8s.io/kubelet/config/v1beta1"
	"sigs.k8s.io/yaml"

	"gantry.local/e2e/internal/kit"
)

// helm runs Helm and returns what it says, on failure with its complaint.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(kit.Repository(), "build/bin/helm"), args...)
	// Nothing of the user's: no repositories, plugins or cluster.
	home := t.TempDir()
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "KUBECONFIG=" + os.Getenv("KUBECONFIG")}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

var chartDir = filepath.Join(kit.Repository(), "charts/gantry")

func TestMain(m *testing.M) {
	if err := kit.BuildToolsNow("helm"); err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	kit.Main(m, "--nodes=1")
}

// valuesFiles are the flags for the chart's own values and each file in ci/.
func valuesFiles(t *testing.T) map[string][]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(chartDir, "ci/*-values.yaml"))
	if err != nil || len(files) < 2 {
		t.Fatalf("values in ci: %v %v", files, err)
	}
	all := map[string][]string{"default": nil}
	for _, file := range files {
		all[strings.TrimSuffix(filepath.Base(file), "-values.yaml")] = []string{"--values=" + file}
	}
	return all
}

func TestLint(t *testing.T) {
	for name, flags := range valuesFiles(t) {
		t.Run(name, func(t *testing.T) {
			if out, err := helm(t, append([]string{"lint", "--strict", chartDir}, flags...)...); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// template renders the chart and returns its objects by kind.
func template(t *testing.T, flags ...string) map[string][]*unstructured.Unstructured {
	t.Helper()
	out, err := helm(t, append([]string{"template", "edge", chartDir, "--namespace=nodes", "--kube-version=1.37.2"}, flags...)...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	objects := map[string][]*unstructured.Unstructured{}
	for _, document := range bytes.Split([]byte(out), []byte("\n---")) {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(document, &object.Object); err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if object.Object != nil {
			objects[object.GetKind()] = append(objects[object.GetKind()], object)
		}
	}
	return objects
}

// typed reads the only object of a kind.
func typed[T any](t *testing.T, objects map[string][]*unstructured.Unstructured, kind string) *T {
	t.Helper()
	if len(objects[kind]) != 1 {
		t.Fatalf("%d objects of kind %s", len(objects[kind]), kind)
	}
	var object T
	// Strictly: a field that does not exist would be dropped by the API server.
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(objects[kind][0].Object, &object, true); err != nil {
		t.Fatal(err)
	}
	return &object
}

func names(objects []*unstructured.Unstructured) []string {
	var names []string
	for _, object := range objects {
		names = append(names, object.GetName())
	}
	return names
}

func TestTemplate(t *testing.T) {
	for name, flags := range valuesFiles(t) {
		t.Run(name, func(t *testing.T) {
			objects := template(t, flags...)
			set := typed[appsv1.StatefulSet](t, objects, "StatefulSet")
			config := typed[corev1.ConfigMap](t, objects, "ConfigMap")
			for label, value := range set.Spec.Selector.MatchLabels {
				if set.Spec.Template.Labels[label] != value {
					t.Errorf("the selector's label %s=%s is not the Pods'", label, value)
				}
			}
			pod := set.Spec.Template.Spec
			if len(pod.Containers) != 1 || pod.Containers[0].SecurityContext.Privileged == nil || !*pod.Containers[0].SecurityContext.Privileged {
				t.Error("a node has to be privileged")
			}
			volumes := []string{}
			for _, volume := range pod.Volumes {
				volumes = append(volumes, volume.Name)
			}
			for _, claim := range set.Spec.VolumeClaimTemplates {
				volumes = append(volumes, claim.Name)
			}
			for _, mount := range pod.Containers[0].VolumeMounts {
				if !slices.Contains(volumes, mount.Name) {
					t.Errorf("nothing is called %s, which is mounted at %s", mount.Name, mount.MountPath)
				}
			}
			var file kubelet.KubeletConfiguration
			if err := yaml.UnmarshalStrict([]byte(config.Data["config.yaml"]), &file); err != nil {
				t.Errorf("KubeletConfiguration: %v\n%s", err, config.Data["config.yaml"])
			}
			if file.Authentication.Anonymous.Enabled == nil || *file.Authentication.Anonymous.Enabled {
				t.Error("anyone may ask the node")
			}
		})
	}
}

func TestValuesAreHeeded(t *testing.T) {
	flags := valuesFiles(t)
	objects := template(t, flags["token"]...)
	set := typed[appsv1.StatefulSet](t, objects, "StatefulSet")
	args := strings.Join(set.Spec.Template.Spec.Containers[0].Args, "\n")
	for _, arg := range []string{"--node-labels=gantry/nested=true,tier=edge,", "--cluster-cidr=10.244.0.0/16", "--network-plugin=builtin"} {
		if !strings.Contains(args, arg) {
			t.Errorf("%s is missing in:\n%s", arg, args)
		}
	}
	if bindings := names(objects["ClusterRoleBinding"]); *set.Spec.Replicas != 3 || !slices.Equal(bindings, []string{"nodes-edge-gantry-leave"}) {
		t.Errorf("replicas, or rights that a token makes needless: %v", bindings)
	}
	config := typed[corev1.ConfigMap](t, objects, "ConfigMap").Data
	var file kubelet.KubeletConfiguration
	if err := yaml.Unmarshal([]byte(config["config.yaml"]), &file); err != nil {
		t.Fatal(err)
	}
	if file.MaxPods != 20 || len(file.RegisterWithTaints) != 1 || file.ClusterDNS[0] != "10.96.0.10" {
		t.Errorf("KubeletConfiguration: %+v", file)
	}
	if secret := typed[corev1.Secret](t, objects, "Secret"); secret.StringData["token"] != "abcdef.0123456789abcdef" {
		t.Error("the token is not in the Secret")
	}
	if strings.Contains(args+config["bootstrap.conf"], "0123456789abcdef") {
		t.Error("the token is where anyone may read it")
	}

	objects = template(t)
	if len(objects["ClusterRoleBinding"]) != 3 || len(objects["Secret"]) != 0 {
		t.Errorf("a ServiceAccount needs two bindings to join, one to leave, and no Secret: %v", names(objects["ClusterRoleBinding"]))
	}
	// What leaving takes is there with it, and not without.
	leaving := []string{"Role", "ClusterRole", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "Job"}
	without := template(t, "--set=leave.enabled=false")
	for _, kind := range leaving {
		if len(objects[kind]) == 0 || len(without[kind]) != 0 {
			t.Errorf("%s: %v with leave.enabled, %v without", kind, names(objects[kind]), names(without[kind]))
		}
	}
	if args := typed[appsv1.StatefulSet](t, without, "StatefulSet").Spec.Template.Spec.Containers[0].Args; strings.Contains(strings.Join(args, "\n"), "--leave") {
		t.Errorf("leave.enabled is false: %v", args)
	}
	args = strings.Join(typed[appsv1.StatefulSet](t, objects, "StatefulSet").Spec.Template.Spec.Containers[0].Args, "\n")
	for _, arg := range []string{"--leave-stateful-set=nodes/edge-gantry", "--leave-timeout=225s"} {
		if !strings.Contains(args, arg) {
			t.Errorf("%s is missing in:\n%s", arg, args)
		}
	}
	objects = template(t, flags["persistent"]...)
	set = typed[appsv1.StatefulSet](t, objects, "StatefulSet")
	if set.Name != "edge" || len(set.Spec.VolumeClaimTemplates) != 1 || set.Spec.Template.Spec.ServiceAccountName != "other" {
		t.Errorf("%s %v", set.Name, set.Spec.VolumeClaimTemplates)
	}
	if accounts := names(objects["ServiceAccount"]); !slices.Equal(accounts, []string{"edge-retire"}) || len(objects["PodMonitor"]) != 1 {
		t.Errorf("ServiceAccounts %v, or PodMonitor", accounts)
	}
}

// What is wrong is refused by name, before anything is made.
func TestWrongValues(t *testing.T) {
	for flag, complaint := range map[string]string{
		"--set=replicas=-1":                            "replicas",
		"--set=replica=1":                              "replica",
		"--set=bootstrap.method=password":              "method",
		"--set=bootstrap.method=token":                 "kubeadm token create",
		"--set=bootstrap.token.value=short":            "value",
		"--set=apiServer.url=http://plain":             "url",
		"--set-json=node.taints=[{\"key\":\"a\"}]":     "effect",
		"--set=image.pullPolicy=Sometimes":             "pullPolicy",
		"--set-json=extraArgs=[\"node-ip=192.0.2.1\"]": "extraArgs",
		"--set-json=node.labels={\"a\":1}":             "labels",
		"--set=persistence.sizes=1Gi":                  "sizes",
		"--set=terminationGracePeriodSeconds=soon":     "terminationGracePeriodSeconds",
		"--set-json=cluster.dns=\"10.96.0.10\"":        "dns",
		"--set=podMonitor.enabled=perhaps":             "enabled",
		"--set=leave.enabled=perhaps":                  "enabled",
	} {
		out, err := helm(t, "template", "edge", chartDir, flag)
		if err == nil || !strings.Contains(out, complaint) {
			t.Errorf("%s: %v, and %q is not in:\n%s", flag, err, complaint, out)
		}
	}
}
