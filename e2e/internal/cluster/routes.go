package cluster

import (
	"context"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"gantry.local/e2e/internal/netns"
)

// Routes does what a cloud's route controller does: in every network namespace
// of the cluster it keeps a route to each node's Pods through that node.
type Routes struct {
	// Namespaces is the directory with the namespaces' files. A namespace
	// named like a node is that node's own.
	Namespaces string
	nodes      listers.NodeLister
	applied    map[routeKey]bool
}

type routeKey struct{ namespace, podCIDR, gateway string }

// Run keeps the routes until ctx ends.
func (r *Routes) Run(ctx context.Context, client kubernetes.Interface) error {
	r.applied = map[routeKey]bool{}
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().Nodes()
	r.nodes = informer.Lister()
	changed := make(chan struct{}, 1)
	wake := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	_, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { wake() },
		UpdateFunc: func(any, any) { wake() },
		DeleteFunc: func(any) { wake() },
	})
	if err != nil {
		return err
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	for {
		var retry <-chan time.Time
		if err := r.reconcile(); err != nil {
			log.Printf("routes: %v; trying again", err)
			retry = time.After(time.Second)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-retry:
		}
	}
}

func (r *Routes) reconcile() error {
	nodes, err := r.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(r.Namespaces)
	if err != nil {
		return err
	}
	wanted := map[routeKey]bool{}
	for _, node := range nodes {
		address := internalIP(node)
		if address == "" || node.Spec.PodCIDR == "" {
			continue
		}
		for _, entry := range entries {
			if entry.Name() != node.Name {
				wanted[routeKey{entry.Name(), node.Spec.PodCIDR, address}] = true
			}
		}
	}
	for key := range r.applied {
		if wanted[key] {
			continue
		}
		if err := r.apply(key, (*netns.Namespace).RemoveRoute); err != nil {
			return err
		}
		log.Printf("routes: %s: %s via %s removed", key.namespace, key.podCIDR, key.gateway)
		delete(r.applied, key)
	}
	for key := range wanted {
		if r.applied[key] {
			continue
		}
		if err := r.apply(key, (*netns.Namespace).Route); err != nil {
			return err
		}
		log.Printf("routes: %s: %s via %s", key.namespace, key.podCIDR, key.gateway)
		r.applied[key] = true
	}
	return nil
}

func (r *Routes) apply(key routeKey, change func(*netns.Namespace, *net.IPNet, net.IP) error) error {
	_, podCIDR, err := net.ParseCIDR(key.podCIDR)
	if err != nil {
		return err
	}
	ns, err := netns.Open(filepath.Join(r.Namespaces, key.namespace))
	if err != nil {
		return err
	}
	defer ns.Close()
	return change(ns, podCIDR, net.ParseIP(key.gateway).To4())
}

func internalIP(node *corev1.Node) string {
	for _, address := range node.Status.Addresses {
		if address.Type == corev1.NodeInternalIP {
			return address.Address
		}
	}
	return ""
}
