package cluster

import (
	"context"
	"fmt"
	"io"
	"sort"
	"text/tabwriter"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Status prints what runs. It returns false when something that should run does not.
func (c *Cluster) Status(ctx context.Context, w io.Writer) (bool, error) {
	healthy := true
	fmt.Fprintf(w, "cluster %s, since %s\n", c.Name, c.Created.Format(time.RFC3339))
	if c.Network < 0 {
		fmt.Fprintln(w, "  has no network: `up` did not come far; remove it by hack/cluster down --name "+c.Name)
		return false, nil
	}
	fmt.Fprintf(w, "  API server  %s\n  registry    %s\n  directory   %s\n\n", c.ServerURL(), c.Registry(), c.Dir)
	table := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(table, "  PROCESS\tPID\tSTATE")
	var names []string
	for name := range c.Processes {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		state := "running"
		if !c.Processes[name].Alive() {
			state, healthy = "not running (log: "+c.processLog(name)+")", false
		}
		fmt.Fprintf(table, "  %s\t%d\t%s\n", name, c.Processes[name].PID, state)
	}
	if err := table.Flush(); err != nil {
		return false, err
	}
	client, err := c.Client()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		fmt.Fprintf(w, "\n  the API server does not list nodes: %v\n", err)
		return false, nil
	}
	fmt.Fprintln(table, "\n  NODE\tREADY\tADDRESS\tPOD CIDR\tVERSION")
	for i := range nodes.Items {
		node := &nodes.Items[i]
		ready, why := nodeReady(node)
		state := "Ready"
		if !ready {
			state, healthy = "NotReady: "+why, false
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\t%s\t%s\n", node.Name, state, internalIP(node), node.Spec.PodCIDR, node.Status.NodeInfo.KubeletVersion)
	}
	return healthy, table.Flush()
}
