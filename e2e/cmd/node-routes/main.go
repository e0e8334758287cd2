// Command node-routes keeps, on the node it runs on, a route to the Pods of
// every other node through that node's address: what a cloud's route controller
// does, for nodes that share a link. kind's node image runs it as a DaemonSet.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// ours marks the routes, so that those of nodes that are gone are known.
const ours = netlink.RouteProtocol(0x67)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Getenv("NODE_NAME")); err != nil {
		log.Fatal("node-routes: ", err)
	}
}

func run(ctx context.Context, self string) error {
	if self == "" {
		return errors.New("NODE_NAME is empty: set it from the Pod's spec.nodeName")
	}
	config, err := clientConfig()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().Nodes()
	changed := make(chan struct{}, 1)
	wake := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	if _, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { wake() }, UpdateFunc: func(any, any) { wake() }, DeleteFunc: func(any) { wake() },
	}); err != nil {
		return err
	}
	lister := informer.Lister()
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	for {
		var retry <-chan time.Time
		nodes, err := lister.List(labels.Everything())
		if err == nil {
			err = reconcile(self, nodes)
		}
		if err != nil {
			log.Printf("%v; trying again", err)
			retry = time.After(5 * time.Second)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry:
		}
	}
}

// clientConfig is the ServiceAccount's, at the address in CONTROL_PLANE_ENDPOINT
// if there is one: kube-proxy may wait for the routes, so they cannot wait for it.
func clientConfig() (*rest.Config, error) {
	endpoint := os.Getenv("CONTROL_PLANE_ENDPOINT")
	config, err := rest.InClusterConfig()
	if err != nil {
		return clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	}
	if endpoint != "" {
		config.Host = "https://" + endpoint
	}
	return config, nil
}

// reconcile adds the routes that are missing and removes those of nodes that
// are gone.
func reconcile(self string, nodes []*corev1.Node) error {
	wanted, failures := wantedRoutes(self, nodes)
	present, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: ours}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, route := range present {
		if route.Dst == nil {
			continue
		}
		if gateway, ok := wanted[route.Dst.String()]; ok && gateway.Equal(route.Gw) {
			delete(wanted, route.Dst.String())
		} else if !ok {
			if err := netlink.RouteDel(&route); err != nil && !errors.Is(err, unix.ESRCH) {
				failures = append(failures, fmt.Errorf("remove the route to %s: %w", route.Dst, err))
			}
		}
	}
	for text, gateway := range wanted {
		_, destination, err := net.ParseCIDR(text)
		if err == nil {
			err = netlink.RouteReplace(&netlink.Route{Dst: destination, Gw: gateway, Protocol: ours})
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("route to %s via %s: %w", text, gateway, err))
		} else {
			log.Printf("route to %s via %s", text, gateway)
		}
	}
	return errors.Join(failures...)
}

// wantedRoutes are the gateways by destination.
func wantedRoutes(self string, nodes []*corev1.Node) (map[string]net.IP, []error) {
	wanted := map[string]net.IP{}
	var failures []error
	for _, node := range nodes {
		if node.Name == self {
			continue
		}
		for _, podCIDR := range node.Spec.PodCIDRs {
			_, destination, err := net.ParseCIDR(podCIDR)
			if err != nil {
				failures = append(failures, fmt.Errorf("node %s: spec.podCIDRs: %w", node.Name, err))
				continue
			}
			for _, address := range node.Status.Addresses {
				ip := net.ParseIP(address.Address)
				if address.Type == corev1.NodeInternalIP && ip != nil && (ip.To4() == nil) == (destination.IP.To4() == nil) {
					wanted[destination.String()] = ip
					break
				}
			}
		}
	}
	return wanted, failures
}
