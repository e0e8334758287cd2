package chart

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"gantry.local/e2e/internal/kit"
)

// A node's Pod may delete the Node of its own name, and no other.
func othersNodesAreSafe(t *testing.T, e *kit.Env) {
	pod, err := e.Client.CoreV1().Pods(e.Namespace).Get(e.Ctx, "edge-gantry-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	token, err := e.Client.CoreV1().ServiceAccounts(e.Namespace).CreateToken(e.Ctx, pod.Spec.ServiceAccountName, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	config := rest.AnonymousClientConfig(e.Config)
	config.BearerToken = token.Status.Token
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	dry := metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}}
	e.Eventually(20*time.Second, "the policy holds", func() (bool, string) {
		err := client.CoreV1().Nodes().Delete(e.Ctx, "edge-gantry-1", dry)
		return err != nil && strings.Contains(err.Error(), "no Node but its own"), fmt.Sprint(err)
	})
	if err := client.CoreV1().Nodes().Delete(e.Ctx, "edge-gantry-0", dry); err != nil {
		t.Errorf("its own Node: %v", err)
	}
	for what, err := range map[string]error{
		"list nodes": func() error { _, err := client.CoreV1().Nodes().List(e.Ctx, metav1.ListOptions{}); return err }(),
		"evict": client.PolicyV1().Evictions(e.Namespace).Evict(e.Ctx, &policyv1.Eviction{
			ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Namespace: e.Namespace}, DeleteOptions: &dry,
		}),
	} {
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s is more than leaving takes: %v", what, err)
		}
	}
}

// One node less, by kubectl scale: its Pods move as far and as fast as their
// disruption budget allows, then its Node goes.
func scaledDown(t *testing.T, e *kit.Env, spec corev1.PodSpec) {
	const name = "moving"
	cordon := func(unschedulable bool) {
		t.Helper()
		patch := fmt.Appendf(nil, `{"spec":{"unschedulable":%t}}`, unschedulable)
		if _, err := e.Client.CoreV1().Nodes().Patch(e.Ctx, "edge-gantry-0", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// All of them on the node that goes.
	cordon(true)
	replicas, labels := int32(2), map[string]string{"app": name}
	deployments := e.Client.AppsV1().Deployments(e.Namespace)
	if _, err := deployments.Create(e.Ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: spec},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	budgets := e.Client.PolicyV1().PodDisruptionBudgets(e.Namespace)
	all := intstr.FromInt32(replicas)
	if _, err := budgets.Create(e.Ctx, &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       policyv1.PodDisruptionBudgetSpec{MinAvailable: &all, Selector: &metav1.LabelSelector{MatchLabels: labels}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// on counts the Ready Pods on a node.
	on := func(node string) (count int32, said string) {
		pods, err := e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{LabelSelector: "app=" + name})
		if err != nil {
			return 0, err.Error()
		}
		for i := range pods.Items {
			pod := &pods.Items[i]
			is, _ := kit.Ready(pod)
			said += fmt.Sprintf("%s on %s ready %t; ", pod.Name, pod.Spec.NodeName, is)
			if is && pod.Spec.NodeName == node && pod.DeletionTimestamp == nil {
				count++
			}
		}
		return count, said
	}
	e.Eventually(time.Minute, "both Pods on the node that goes", func() (bool, string) {
		count, said := on("edge-gantry-1")
		return count == replicas, said
	})
	e.Eventually(20*time.Second, "the budget knows its Pods", func() (bool, string) {
		budget, err := budgets.Get(e.Ctx, name, metav1.GetOptions{})
		return err == nil && budget.Status.CurrentHealthy == replicas && budget.Status.ObservedGeneration == budget.Generation, fmt.Sprint(err)
	})
	cordon(false)

	if out, errOut, err := e.Kubectl(e.Ctx, "scale", "-n", e.Namespace, "statefulset/edge-gantry", "--replicas=1"); err != nil {
		t.Fatal(out, errOut, err)
	}
	nodes := e.Client.CoreV1().Nodes()
	e.Eventually(20*time.Second, "the node takes no more Pods", func() (bool, string) {
		node, err := nodes.Get(e.Ctx, "edge-gantry-1", metav1.GetOptions{})
		return err == nil && node.Spec.Unschedulable, fmt.Sprint(err)
	})
	// It keeps trying, and the budget keeps it from succeeding.
	time.Sleep(6 * time.Second)
	if count, said := on("edge-gantry-1"); count != replicas {
		t.Errorf("the disruption budget allows nothing, and only %d Pods are left on the node: %s", count, said)
	}
	if _, err := nodes.Get(e.Ctx, "edge-gantry-1", metav1.GetOptions{}); err != nil {
		t.Errorf("the Node is gone before its Pods: %v", err)
	}

	ctx, cancel := context.WithCancel(e.Ctx)
	fewest := replicas
	var watching sync.WaitGroup
	watching.Go(func() {
		for ctx.Err() == nil {
			if d, err := deployments.Get(ctx, name, metav1.GetOptions{}); err == nil {
				fewest = min(fewest, d.Status.AvailableReplicas)
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	if _, err := budgets.Patch(e.Ctx, name, types.MergePatchType, []byte(`{"spec":{"minAvailable":1}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	e.Eventually(time.Minute, "the Node is gone", func() (bool, string) {
		_, err := nodes.Get(e.Ctx, "edge-gantry-1", metav1.GetOptions{})
		_, said := on("")
		return apierrors.IsNotFound(err), fmt.Sprint(err, " ", said)
	})
	// Not one of them is left to the garbage collector.
	behind, err := e.Client.CoreV1().Pods("").List(e.Ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=edge-gantry-1"})
	if err != nil || len(behind.Items) > 0 {
		t.Errorf("%d Pods are bound to the Node that is gone: %v", len(behind.Items), err)
	}
	e.Eventually(time.Minute, "both Pods have moved", func() (bool, string) {
		count, said := on("edge-gantry-0")
		return count == replicas, said
	})
	cancel()
	watching.Wait()
	if fewest < 1 {
		t.Errorf("at times %d Pods were available, and the budget wants one", fewest)
	}
	e.WaitGone("edge-gantry-1", time.Minute)
	if _, err := nodes.Get(e.Ctx, "edge-gantry-1", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the Node is back: %v", err)
	}
	if err := budgets.Delete(e.Ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := deployments.Delete(e.Ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}
