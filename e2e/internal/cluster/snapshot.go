package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

// Snapshot is everything that a node holds of the machine, by kind. What is in
// a later snapshot and not in an earlier one was left behind in between.
type Snapshot map[string][]string

// imageDepth is how deep the node's data directory is listed: images and their
// unpacked layers are many files, and stay on purpose.
const imageDepth = 3

// Snapshot lists a node's processes, mounts, namespaces, links, routes,
// firewall rules, cgroups and files.
func (c *Cluster) Snapshot(index int) (Snapshot, error) {
	n, err := c.node(index)
	if err != nil {
		return nil, err
	}
	if n.Guest {
		raw, err := c.inGuest(n, "snapshot")
		if err != nil {
			return nil, err
		}
		s := Snapshot{}
		return s, json.Unmarshal(raw, &s)
	}
	s := Snapshot{}
	for _, gather := range []func(Node, Snapshot) error{c.listProcesses, c.listMounts, c.listNetwork, c.listFirewall, c.listCgroups, c.listFiles} {
		if err := gather(n, s); err != nil {
			return nil, err
		}
	}
	for _, list := range s {
		sort.Strings(list)
	}
	return s, nil
}

func (s Snapshot) add(kind, format string, args ...any) {
	s[kind] = append(s[kind], fmt.Sprintf(format, args...))
}

// listProcesses lists what runs in the node's cgroup or in its namespaces, the
// agent itself left out, and the namespaces they are in.
func (c *Cluster) listProcesses(n Node, s Snapshot) error {
	node, err := inodeOf(c.namespaceFile(n.Name()))
	if err != nil {
		return err
	}
	namespaces, err := c.pinnedBelow(c.nodeDir(n))
	if err != nil {
		return err
	}
	namespaces[node] = true
	roots := []string{c.cgroupRoot(n)}
	found, err := proc.Find(func(pid int) bool { return inCgroup(pid, roots) || inNamespaces(pid, namespaces) })
	if err != nil {
		return err
	}
	own := map[string]bool{}
	for _, kind := range namespaceKinds {
		if target, err := os.Readlink("/proc/self/ns/" + kind); err == nil {
			own[target] = true
		}
	}
	seen := map[string]bool{}
	for _, id := range found {
		if id.PID == c.Processes[agentProcess(n)].PID {
			continue
		}
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", id.PID))
		if err != nil {
			continue // ended meanwhile
		}
		s.add("processes", "%d %s", id.PID, strings.TrimSpace(strings.ReplaceAll(string(raw), "\x00", " ")))
		for _, kind := range append([]string{"mnt"}, namespaceKinds...) {
			target, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", id.PID, kind))
			if err == nil && !own[target] && !seen[target] {
				seen[target] = true
				s.add("namespaces", "%s", target)
			}
		}
	}
	return nil
}

func (c *Cluster) listMounts(n Node, s Snapshot) error {
	mounts, err := mountsBelow(c.nodeDir(n))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		s.add("mounts", "%s %s", m.kind, m.point)
	}
	return nil
}

func (c *Cluster) listNetwork(n Node, s Snapshot) error {
	ns, err := netns.Open(c.namespaceFile(n.Name()))
	if err != nil {
		return err
	}
	defer ns.Close()
	links, err := ns.Handle.LinkList()
	if err != nil {
		return err
	}
	for _, link := range links {
		s.add("links", "%s %s", link.Type(), link.Attrs().Name)
		addresses, err := ns.Handle.AddrList(link, 0)
		if err != nil {
			return err
		}
		for _, a := range addresses {
			s.add("addresses", "%s %s", link.Attrs().Name, a.IPNet)
		}
	}
	routes, err := ns.Handle.RouteList(nil, 0)
	if err != nil {
		return err
	}
	for _, r := range routes {
		s.add("routes", "%s", r)
	}
	return nil
}

// listFirewall lists the rules; nft is asked because it knows how to print them.
func (c *Cluster) listFirewall(n Node, s Snapshot) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var out []byte
	err := proc.OnThread(func() error {
		if err := proc.EnterNetworkNamespace(c.namespaceFile(n.Name())); err != nil {
			return err
		}
		var err error
		out, err = exec.CommandContext(ctx, "nft", "--stateless", "list", "ruleset").Output()
		return err
	})
	if err != nil {
		return fmt.Errorf("list firewall rules (package nftables): %w", err)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		s.add("firewall", "%s", strings.TrimSpace(line))
	}
	return nil
}

func (c *Cluster) listCgroups(n Node, s Snapshot) error {
	dirs, err := cgroupDirs(c.cgroupRoot(n))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := walk(dir, func(path string, entry fs.DirEntry) error {
			if entry.IsDir() {
				s.add("cgroups", "%s", path)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) listFiles(n Node, s Snapshot) error {
	data := filepath.Join(c.nodeDir(n), "data")
	return walk(c.nodeDir(n), func(path string, entry fs.DirEntry) error {
		s.add("files", "%s", path)
		inData, err := filepath.Rel(data, path)
		if err == nil && entry.IsDir() && !strings.HasPrefix(inData, "..") && strings.Count(inData, "/") >= imageDepth-1 {
			return filepath.SkipDir
		}
		return nil
	})
}

// walk is filepath.WalkDir for a tree in which things come and go.
func walk(root string, visit func(string, fs.DirEntry) error) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || entry == nil {
			return nil
		} else if err != nil {
			return err
		}
		return visit(path, entry)
	})
}
