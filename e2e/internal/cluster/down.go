package cluster

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

// Down removes everything that belongs to the cluster: processes, mounts,
// namespaces, links, cgroups, files. It may be repeated after a failure, and
// needs nothing of the cluster to be in order.
func (c *Cluster) Down() error {
	if err := c.killAll(); err != nil {
		return err
	}
	if err := c.restoreMachine(); err != nil {
		return err
	}
	if err := c.removeUplink(); err != nil {
		return err
	}
	if err := unmountBelow(c.Dir); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if c.Network < 0 {
			break // no node was made yet
		}
		if err := removeCgroups(c.cgroupRoot(n)); err != nil {
			return err
		}
	}
	if err := c.waitUplinkGone(); err != nil {
		return err
	}
	// Never delete through a mount: what is mounted may be anything.
	if mounts, err := mountsBelow(c.Dir); err != nil {
		return err
	} else if len(mounts) > 0 {
		return fmt.Errorf("%s is still mounted; nothing was deleted", mounts[0].point)
	}
	return os.RemoveAll(c.Dir)
}

// killAll ends the cluster's processes. Agents leave their shims and containers
// running on purpose, so those are looked for by what cannot be shaken off: the
// node's cgroups and the namespaces that are pinned below the cluster's directory.
func (c *Cluster) killAll() error {
	var roots []string
	if c.Network >= 0 {
		for _, n := range c.Nodes {
			roots = append(roots, c.cgroupRoot(n))
		}
	}
	recorded := map[int]proc.ID{}
	for _, id := range c.Processes {
		recorded[id.PID] = id
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		namespaces, err := c.pinnedBelow(c.Dir)
		if err != nil {
			return err
		}
		ours, err := proc.Find(func(pid int) bool {
			if id, ok := recorded[pid]; ok && id.Alive() {
				return true
			}
			return inCgroup(pid, roots) || inNamespaces(pid, namespaces)
		})
		if err != nil {
			return err
		}
		if len(ours) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes survive SIGKILL, among them %d", len(ours), ours[0].PID)
		}
		for _, root := range roots {
			if err := thawCgroups(root); err != nil {
				return err
			}
		}
		for _, id := range ours {
			if err := id.Signal(unix.SIGKILL); err != nil && !errors.Is(err, proc.ErrGone) {
				return err
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type inode struct{ device, number uint64 }

func inodeOf(path string) (inode, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return inode{}, err
	}
	return inode{uint64(st.Dev), st.Ino}, nil
}

var namespaceKinds = []string{"net", "ipc", "uts", "pid"}

// pinnedBelow are all namespaces with a bind mount below a directory: below the
// cluster's, those made here and those of all Pods.
func (c *Cluster) pinnedBelow(dir string) (map[inode]bool, error) {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return nil, err
	}
	pinned := map[inode]bool{}
	for _, m := range mounts {
		if m.kind != "nsfs" {
			continue
		}
		if id, err := inodeOf(m.point); err == nil {
			pinned[id] = true
		}
	}
	// A namespace of this process itself, pinned by whoever, marks nothing.
	for _, kind := range namespaceKinds {
		if id, err := inodeOf("/proc/self/ns/" + kind); err == nil {
			delete(pinned, id)
		}
	}
	return pinned, nil
}

func inNamespaces(pid int, namespaces map[inode]bool) bool {
	for _, kind := range namespaceKinds {
		if id, err := inodeOf(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil && namespaces[id] {
			return true
		}
	}
	return false
}

// removeUplink removes the host's interface by its other end. By its own name
// it might be someone else's.
func (c *Cluster) removeUplink() error {
	file := c.namespaceFile(switchNamespace)
	if !isNamespace(file) {
		return nil
	}
	sw, err := netns.Open(file)
	if err != nil {
		return err
	}
	defer sw.Close()
	return sw.RemoveLink(uplinkPort)
}

// isNamespace reports whether a namespace is pinned at file, which a crash may
// have left as the plain file it was made as.
func isNamespace(file string) bool {
	var st unix.Statfs_t
	return unix.Statfs(file, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// removeNamespace unpins one namespace.
func (c *Cluster) removeNamespace(name string) error {
	file := c.namespaceFile(name)
	if isNamespace(file) {
		if err := unix.Unmount(file, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", file, err)
		}
	}
	return os.Remove(file)
}

// waitUplinkGone makes sure that the cluster's address has left the machine.
func (c *Cluster) waitUplinkGone() error {
	if c.Network < 0 {
		return nil
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		gone := true
		if link, err := net.InterfaceByName(c.Interface); err == nil {
			addresses, err := link.Addrs()
			if err != nil {
				return err
			}
			for _, a := range addresses {
				gone = gone && a.String() != c.address(hostOutside).String()
			}
		}
		if gone {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interface %s is still there", c.Interface)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// LogFiles are the log files of the cluster's processes.
func (c *Cluster) LogFiles() ([]string, error) { return filepath.Glob(c.path("log", "*.log")) }
