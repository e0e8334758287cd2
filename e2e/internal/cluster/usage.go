package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/proc"
)

// Role is what a process does for its node.
type Role string

// The roles. Everything but the Pods' own processes is what the node costs.
const (
	RoleAgent   Role = "agent"   // gantry agent; kubelet
	RoleRuntime Role = "runtime" // containerd
	RoleShim    Role = "shim"    // of either kind
	RolePause   Role = "pause"   // holds the namespaces of a stock node's Pod
	RolePod     Role = "pod"     // a container's own process
)

// Process is what one process of a node holds.
type Process struct {
	PID  int
	Role Role
	// Memory in bytes, from smaps_rollup. Private is what no other process shares.
	RSS, PSS, Private int64
	Threads           int
	// Files are open descriptors; Connections are those that are TCP sockets,
	// which come and go with the traffic of the last minutes.
	Files, Connections int
}

// CPU is the time that everything in a node's cgroup has used: its programs,
// its Pods, and processes that have ended.
func (c *Cluster) CPU(index int) (time.Duration, error) {
	n, err := c.node(index)
	if err != nil {
		return 0, err
	}
	dirs, err := cgroupDirs(c.cgroupRoot(n))
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		// v1: nanoseconds.
		if raw, err := os.ReadFile(filepath.Join(dir, "cpuacct.usage")); err == nil {
			used, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
			return time.Duration(used), err
		}
		if raw, err := os.ReadFile(filepath.Join(dir, "cpu.stat")); err == nil {
			if used, ok := numberAfter(string(raw), "usage_usec"); ok {
				return time.Duration(used) * time.Microsecond, nil
			}
		}
	}
	return 0, fmt.Errorf("no hierarchy accounts the CPU time of %s", c.cgroupRoot(n))
}

// Usage lists the processes of a node with what they hold.
func (c *Cluster) Usage(index int) ([]Process, error) {
	n, err := c.node(index)
	if err != nil {
		return nil, err
	}
	roots := []string{c.cgroupRoot(n)}
	found, err := proc.Find(func(pid int) bool { return inCgroup(pid, roots) })
	if err != nil {
		return nil, err
	}
	agent := c.Processes[agentProcess(n)].PID
	var processes []Process
	for _, id := range found {
		p, err := measure(id.PID)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // ended meanwhile
		} else if err != nil {
			return nil, err
		}
		if id.PID == agent {
			p.Role = RoleAgent
		}
		processes = append(processes, p)
	}
	return processes, nil
}

func measure(pid int) (Process, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	p := Process{PID: pid}
	line, err := os.ReadFile(dir + "cmdline")
	if err != nil {
		return p, err
	}
	p.Role = role(bytes.Split(line, []byte{0}))
	memory, err := os.ReadFile(dir + "smaps_rollup")
	if err != nil {
		return p, err
	}
	sum := func(names ...string) (bytes int64) {
		for _, name := range names {
			kib, _ := numberAfter(string(memory), name+":")
			bytes += kib << 10
		}
		return bytes
	}
	p.RSS, p.PSS, p.Private = sum("Rss"), sum("Pss"), sum("Private_Clean", "Private_Dirty")
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return p, err
	}
	threads, _ := numberAfter(string(status), "Threads:")
	p.Threads = int(threads)
	files, err := os.ReadDir(dir + "fd")
	if err != nil {
		return p, err
	}
	p.Files = len(files)
	tcp := tcpSockets(dir)
	for _, file := range files {
		if target, err := os.Readlink(dir + "fd/" + file.Name()); err == nil && tcp[target] {
			p.Connections++
		}
	}
	return p, nil
}

// tcpSockets are the TCP sockets of a process's network namespace, as links to them read.
func tcpSockets(dir string) map[string]bool {
	sockets := map[string]bool{}
	for _, table := range []string{"net/tcp", "net/tcp6"} {
		raw, err := os.ReadFile(dir + table)
		if err != nil {
			continue // no IPv6
		}
		for _, line := range strings.Split(string(raw), "\n") {
			// proc(5): the tenth field is the inode.
			if fields := strings.Fields(line); len(fields) > 9 {
				sockets["socket:["+fields[9]+"]"] = true
			}
		}
	}
	return sockets
}

// role tells by its command line what a process is; the agent is known by its pid.
func role(words [][]byte) Role {
	switch filepath.Base(string(words[0])) {
	case "gantry":
		if len(words) > 1 && string(words[1]) == "shim" {
			return RoleShim
		}
	case "containerd-shim-runc-v2":
		return RoleShim
	case "containerd":
		return RoleRuntime
	case "pause":
		return RolePause
	}
	return RolePod
}

// numberAfter is the number after a word that begins a line.
func numberAfter(text, word string) (int64, bool) {
	for _, line := range strings.Split(text, "\n") {
		fields := strings.Fields(line)
		if len(fields) >= 2 && fields[0] == word {
			value, err := strconv.ParseInt(fields[1], 10, 64)
			return value, err == nil
		}
	}
	return 0, false
}

// StopStack ends what a node runs besides its Pods' containers: the agent, on a
// stock node containerd too. With Pods on the node their shims may end as well.
func (c *Cluster) StopStack(index int) error {
	n, err := c.node(index)
	if err != nil {
		return err
	}
	roots := []string{c.cgroupRoot(n) + "/agent"}
	deadline := time.Now().Add(20 * time.Second)
	for {
		left, err := proc.Find(func(pid int) bool { return inCgroup(pid, roots) })
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d of %s survives SIGKILL", left[0].PID, n.Name())
		}
		for _, id := range left {
			if err := id.Signal(unix.SIGKILL); err != nil && !errors.Is(err, proc.ErrGone) {
				return err
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// NodeAddress is the address at which a node serves its kubelet endpoints.
func (c *Cluster) NodeAddress(index int) (string, error) {
	n, err := c.node(index)
	if err != nil {
		return "", err
	}
	return c.nodeAddress(n).IP.String(), nil
}

// NodeDir is the directory that holds all files of a node.
func (c *Cluster) NodeDir(index int) (string, error) {
	n, err := c.node(index)
	if err != nil {
		return "", err
	}
	return c.nodeDir(n), nil
}

// AgentPID is the process of a node's agent.
func (c *Cluster) AgentPID(index int) (int, error) {
	n, err := c.node(index)
	if err != nil {
		return 0, err
	}
	id := c.Processes[agentProcess(n)]
	if !id.Alive() {
		return 0, fmt.Errorf("the agent of %s does not run", n.Name())
	}
	return id.PID, nil
}
