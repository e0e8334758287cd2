package main

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func node(name string, podCIDRs []string, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: podCIDRs}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}}
	for _, address := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: address})
	}
	return n
}

func TestWantedRoutes(t *testing.T) {
	wanted, failures := wantedRoutes("self", []*corev1.Node{
		node("self", []string{"10.244.0.0/24"}, "172.18.0.2"),
		node("other", []string{"10.244.1.0/24", "fd00:10:244:1::/64"}, "172.18.0.3", "fc00::3"),
		node("young", nil, "172.18.0.4"),
		node("silent", []string{"10.244.3.0/24"}),
		node("broken", []string{"10.244.4.0"}, "172.18.0.5"),
	})
	if len(wanted) != 2 || wanted["10.244.1.0/24"].String() != "172.18.0.3" || wanted["fd00:10:244:1::/64"].String() != "fc00::3" {
		t.Errorf("routes: %v", wanted)
	}
	if len(failures) != 1 {
		t.Errorf("failures: %v", failures)
	}
}
