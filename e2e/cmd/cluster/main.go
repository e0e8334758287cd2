// Command cluster makes, shows and removes test clusters: a real Kubernetes
// control plane and Gantry nodes on one machine. hack/cluster runs it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"gantry.local/e2e/internal/cluster"
	"gantry.local/e2e/internal/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := root().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "hack/cluster:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	root := &cobra.Command{
		Use:           "hack/cluster",
		Short:         "A real Kubernetes control plane with Gantry nodes on this machine",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(upCommand(), downCommand(), statusCommand(), envCommand(), logsCommand(), nodeExecCommand(),
		agentCommand("start-agent", "Start a node's agent", func(c *cluster.Cluster, node int) error { return c.StartAgent(node) }),
		agentCommand("stop-agent", "Stop a node's agent by SIGTERM; its Pods stay", func(c *cluster.Cluster, node int) error { return c.StopAgent(node, false) }),
		agentCommand("kill-agent", "Kill a node's agent by SIGKILL; its Pods stay", func(c *cluster.Cluster, node int) error { return c.StopAgent(node, true) }),
		k3sCommand("start-k3s", "Start the stand-in for a k3s server", func(ctx context.Context, c *cluster.Cluster) error { return c.StartK3s(ctx) }),
		k3sCommand("kill-k3s", "Kill the stand-in for a k3s server", func(_ context.Context, c *cluster.Cluster) error { return c.KillK3s() }),
		snapshotCommand(), superviseCommand(), imagesCommand(), guestInitCommand())
	return root
}

const defaultName = "dev"

// open runs work on a locked cluster.
func open(name string, work func(*cluster.Cluster) error) error {
	h, err := cluster.HomeFromEnvironment()
	if err != nil {
		return err
	}
	c, err := h.Open(name)
	if err != nil {
		return err
	}
	defer c.Close()
	return work(c)
}

func upCommand() *cobra.Command {
	var options cluster.Options
	var kubeletConfig string
	command := &cobra.Command{
		Use:   "up",
		Short: "Make a cluster and return when its nodes are Ready",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := cluster.HomeFromEnvironment()
			if err != nil {
				return err
			}
			if kubeletConfig != "" {
				raw, err := os.ReadFile(kubeletConfig)
				if err != nil {
					return fmt.Errorf("--kubelet-config: %w", err)
				}
				if err := yaml.UnmarshalStrict(raw, &options.KubeletConfig); err != nil {
					return fmt.Errorf("--kubelet-config %s: %w", kubeletConfig, err)
				}
			}
			if options.ClusterSigningDuration < 130*time.Second {
				return fmt.Errorf("--cluster-signing-duration %s: use at least 130s, or nodes ask for new certificates all the time", options.ClusterSigningDuration)
			}
			if options.Self, err = os.Executable(); err != nil {
				return err
			}
			options.Progress = os.Stderr
			if err := images.Build(cmd.Context(), h.Bin, filepath.Dir(h.Images), os.Stderr); err != nil {
				return fmt.Errorf("images: %w", err)
			}
			c, err := h.Up(cmd.Context(), options)
			if c == nil {
				return err
			}
			defer c.Close()
			if err != nil {
				return fmt.Errorf("%w\nhack/cluster logs --name %s shows more, hack/cluster down --name %s cleans up", err, options.Name, options.Name)
			}
			fmt.Fprintf(os.Stderr, "use it:  eval \"$(hack/cluster env --name %s)\"\n", options.Name)
			return nil
		},
	}
	flags := command.Flags()
	flags.StringVar(&options.Name, "name", defaultName, "name of the cluster")
	flags.IntVar(&options.Nodes, "nodes", 1, "number of Gantry nodes; 0 gives only the control plane")
	flags.IntVar(&options.StockNodes, "stock-nodes", 0, "number of further nodes that run kubelet, containerd and runc")
	flags.BoolVar(&options.Audit, "audit", false, "let the API server record what nodes ask of it, in audit.log of the cluster's directory")
	flags.Int64Var(&options.GuestSwap, "guest-swap", 0, "MiB of swap that each guest node has")
	flags.IntVar(&options.GuestNodes, "guest-nodes", 0, "number of further nodes that are virtual machines with pure cgroup v2 (hack/guest build)")
	flags.DurationVar(&options.NodeMonitorGracePeriod, "node-monitor-grace-period", 50*time.Second, "how long a silent node stays Ready")
	flags.DurationVar(&options.ClusterSigningDuration, "cluster-signing-duration", 365*24*time.Hour, "how long certificates of nodes are valid, at least 130s")
	flags.BoolVar(&options.K3s, "k3s", false, "let nodes join a stand-in for a k3s server, through whose tunnel alone the API server reaches them")
	flags.DurationVar(&options.K3sCertificateDuration, "k3s-certificate-duration", 365*24*time.Hour, "how long the certificates of nodes are valid that it issues")
	flags.StringVar(&kubeletConfig, "kubelet-config", "", "file with KubeletConfiguration fields for every node")
	flags.StringArrayVar(&options.AgentArgs, "agent-arg", nil, "further argument of every agent (repeatable)")
	flags.DurationVar(&options.Timeout, "timeout", 2*time.Minute, "give up after this time")
	return command
}

func downCommand() *cobra.Command {
	var name string
	var all bool
	command := &cobra.Command{
		Use:   "down",
		Short: "Remove a cluster with everything that belongs to it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := cluster.HomeFromEnvironment()
			if err != nil {
				return err
			}
			names := []string{name}
			if all {
				if names, err = h.Names(); err != nil {
					return err
				}
			}
			var failures []error
			for _, name := range names {
				err := open(name, (*cluster.Cluster).Down)
				if errors.Is(err, cluster.ErrNoCluster) {
					err = nil // it is what was asked for
				}
				if err != nil {
					failures = append(failures, fmt.Errorf("down %s: %w", name, err))
				}
			}
			return errors.Join(failures...)
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	command.Flags().BoolVar(&all, "all", false, "remove all clusters of this directory")
	return command
}

func statusCommand() *cobra.Command {
	var name string
	command := &cobra.Command{
		Use:   "status",
		Short: "Show clusters; fails if something is not as it should be",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			names := []string{name}
			if name == "" {
				h, err := cluster.HomeFromEnvironment()
				if err != nil {
					return err
				}
				if names, err = h.Names(); err != nil {
					return err
				}
				if len(names) == 0 {
					fmt.Println("no clusters")
				}
			}
			healthy := true
			for _, name := range names {
				if err := open(name, func(c *cluster.Cluster) error {
					well, err := c.Status(cmd.Context(), os.Stdout)
					healthy = healthy && well
					return err
				}); err != nil {
					return err
				}
			}
			if !healthy {
				return errors.New("not everything is healthy")
			}
			return nil
		},
	}
	command.Flags().StringVar(&name, "name", "", "name of the cluster (default: all)")
	return command
}

func envCommand() *cobra.Command {
	var name string
	command := &cobra.Command{
		Use:   "env",
		Short: "Print export lines for a shell: KUBECONFIG, PATH, GANTRY_REGISTRY, GANTRY_CLUSTER",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return open(name, func(c *cluster.Cluster) error {
				fmt.Print(c.Environment())
				return nil
			})
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	return command
}

func logsCommand() *cobra.Command {
	var name string
	command := &cobra.Command{
		Use:   "logs [PROCESS]",
		Short: "Print the log of a process (see status), or the paths of all logs",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return open(name, func(c *cluster.Cluster) error {
				files, err := c.LogFiles()
				if err != nil {
					return err
				}
				var known []string
				for _, file := range files {
					process := strings.TrimSuffix(filepath.Base(file), ".log")
					known = append(known, process)
					if len(args) == 0 {
						fmt.Println(file)
					} else if args[0] == process {
						f, err := os.Open(file)
						if err != nil {
							return err
						}
						defer f.Close()
						_, err = io.Copy(os.Stdout, f)
						return err
					}
				}
				if len(args) > 0 {
					return fmt.Errorf("no process %q; there are %s", args[0], strings.Join(known, ", "))
				}
				return nil
			})
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	return command
}

func agentCommand(use, short string, act func(*cluster.Cluster, int) error) *cobra.Command {
	var name string
	var node int
	command := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return open(name, func(c *cluster.Cluster) error { return act(c, node) })
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	command.Flags().IntVar(&node, "node", 1, "number of the node")
	return command
}

func k3sCommand(use, short string, act func(context.Context, *cluster.Cluster) error) *cobra.Command {
	var name string
	command := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return open(name, func(c *cluster.Cluster) error { return act(cmd.Context(), c) })
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	return command
}

func nodeExecCommand() *cobra.Command {
	var name string
	var node int
	command := &cobra.Command{
		Use:   "node-exec -- COMMAND...",
		Short: "Run a command in a node's network namespace",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return open(name, func(c *cluster.Cluster) error { return c.Exec(node, args) })
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	command.Flags().IntVar(&node, "node", 1, "number of the node")
	return command
}

func snapshotCommand() *cobra.Command {
	var name string
	var node int
	command := &cobra.Command{
		Use:   "snapshot",
		Short: "List as JSON what a node holds: processes, mounts, namespaces, links, rules, cgroups, files",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return open(name, func(c *cluster.Cluster) error {
				s, err := c.Snapshot(node)
				if err != nil {
					return err
				}
				out := json.NewEncoder(os.Stdout)
				out.SetIndent("", "  ")
				return out.Encode(s)
			})
		},
	}
	command.Flags().StringVar(&name, "name", defaultName, "name of the cluster")
	command.Flags().IntVar(&node, "node", 1, "number of the node")
	return command
}

func imagesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "images",
		Short: "Build the images that the registries serve, if missing or stale",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := cluster.HomeFromEnvironment()
			if err != nil {
				return err
			}
			return images.Build(cmd.Context(), h.Bin, filepath.Dir(h.Images), os.Stderr)
		},
	}
}

// guestInitCommand is what runs in a guest node instead of the machine's own services.
func guestInitCommand() *cobra.Command {
	return &cobra.Command{
		Use: "guest-init", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return cluster.GuestInit() },
	}
}

// superviseCommand is the cluster's own daemon: the registry and the routes.
func superviseCommand() *cobra.Command {
	var kubeconfig, listen, namespaces string
	var r images.Registry
	command := &cobra.Command{
		Use: "supervise", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log.SetFlags(log.LstdFlags | log.Lmicroseconds | log.LUTC)
			handler, err := r.Handler()
			if err != nil {
				return err
			}
			listener, err := net.Listen("tcp", listen)
			if err != nil {
				return err
			}
			server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
			failed := make(chan error, 2)
			go func() { failed <- server.Serve(listener) }()
			config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return err
			}
			client, err := kubernetes.NewForConfig(config)
			if err != nil {
				return err
			}
			go func() { failed <- (&cluster.Routes{Namespaces: namespaces}).Run(cmd.Context(), client) }()
			err = <-failed
			if cmd.Context().Err() != nil {
				return nil // asked to end
			}
			return err
		},
	}
	flags := command.Flags()
	flags.StringVar(&kubeconfig, "kubeconfig", "", "")
	flags.StringVar(&listen, "listen", "", "")
	flags.StringVar(&namespaces, "namespaces", "", "")
	flags.StringVar(&r.Layout, "images", "", "")
	flags.StringVar(&r.Pushes, "pushes", "", "")
	return command
}
