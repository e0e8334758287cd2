package firstlight

import (
	"context"
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"gantry.local/e2e/internal/kit"
)

// A Deployment is scaled, updated and moved by a drain.
func TestDeployment(t *testing.T) {
	t.Parallel()
	own(t, victimName) // it is drained
	e := kit.New(t)
	labels := map[string]string{"app": "web"}
	replicas := int32(3)
	template := e.Pod("", "app-a:1", nil).Spec
	template.Containers[0].ReadinessProbe = &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: portOf(3000)}},
		PeriodSeconds: 1,
	}
	_, err := e.Client.AppsV1().Deployments(e.Namespace).Create(e.Ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: template},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}

	kubectl := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(e.Ctx, 2*time.Minute)
		defer cancel()
		if out, errOut, err := e.Kubectl(ctx, append([]string{"-n", e.Namespace}, args...)...); err != nil {
			t.Fatalf("kubectl %v: %v\n%s%s", args, err, out, errOut)
		}
	}
	// settled waits for exactly that many Pods, all Ready, each with an IP of its own.
	settled := func(want int) []corev1.Pod {
		t.Helper()
		var pods []corev1.Pod
		e.Eventually(90*time.Second, fmt.Sprintf("%d Ready Pods and no other", want), func() (bool, string) {
			list, err := e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{LabelSelector: "app=web"})
			if err != nil {
				return false, err.Error()
			}
			pods = list.Items
			seen := fmt.Sprintf("%d Pods", len(pods))
			ips := map[string]bool{}
			for i := range pods {
				ready, state := kit.Ready(&pods[i])
				seen += "\n" + pods[i].Name + ": " + state
				if ready {
					ips[pods[i].Status.PodIP] = true
				}
			}
			return len(pods) == want && len(ips) == want, seen
		})
		return pods
	}

	settled(3)
	kubectl("scale", "deployment/web", "--replicas=5")
	settled(5)
	kubectl("scale", "deployment/web", "--replicas=1")
	settled(1)
	kubectl("scale", "deployment/web", "--replicas=3")
	before := map[string]bool{}
	for _, pod := range settled(3) {
		before[pod.Name] = true
	}

	kubectl("set", "env", "deployment/web", "REVISION=2")
	kubectl("rollout", "status", "deployment/web", "--timeout=100s")
	for _, pod := range settled(3) {
		if before[pod.Name] {
			t.Errorf("Pod %s of the old revision is still there", pod.Name)
		}
	}

	nodes, drained := e.Nodes(), victimName
	defer kubectl("uncordon", drained)
	// Only this test's Pods: others may run on a cluster that is shared.
	kubectl("drain", drained, "--pod-selector=app=web", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=100s")
	if len(nodes) > 1 {
		for _, pod := range settled(3) {
			if pod.Spec.NodeName == drained {
				t.Errorf("Pod %s is on the drained node", pod.Name)
			}
		}
		return
	}
	e.Eventually(60*time.Second, "no Pod on the drained node", func() (bool, string) {
		list, err := e.Client.CoreV1().Pods(e.Namespace).List(e.Ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + drained})
		if err != nil {
			return false, err.Error()
		}
		return len(list.Items) == 0, fmt.Sprintf("%d Pods", len(list.Items))
	})
}
