package cluster

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchies are the mount points of all cgroup hierarchies, v1 and v2.
func hierarchies() ([]string, error) {
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, m := range mounts {
		if (m.kind == "cgroup" || m.kind == "cgroup2") && m.root == "/" {
			found = append(found, m.point)
		}
	}
	if len(found) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return found, nil
}

// cgroupDirs are the directories of one cgroup in all hierarchies.
func cgroupDirs(name string) ([]string, error) {
	found, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for i := range found {
		found[i] = filepath.Join(found[i], name)
	}
	return found, nil
}

// makeCgroups makes cgroups in all hierarchies, parents first.
func makeCgroups(names ...string) error {
	for _, name := range names {
		dirs, err := cgroupDirs(name)
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup: %w", err)
			}
			// A v1 cpuset starts empty and takes no process until it has both.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				value, err := os.ReadFile(filepath.Join(dir, file))
				if err != nil || len(bytes.TrimSpace(value)) > 0 {
					continue
				}
				inherited, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
				if err != nil || len(bytes.TrimSpace(inherited)) == 0 {
					continue // v2: empty means "as the parent"
				}
				if err := os.WriteFile(filepath.Join(dir, file), inherited, 0); err != nil {
					return fmt.Errorf("fill %s/%s: %w", dir, file, err)
				}
			}
		}
	}
	return nil
}

// thawCgroups lets frozen processes run, or they could not die (v1).
func thawCgroups(name string) error {
	dirs, err := cgroupDirs(name)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile
			}
			switch entry.Name() {
			case "freezer.state":
				os.WriteFile(path, []byte("THAWED"), 0)
			case "cgroup.freeze":
				os.WriteFile(path, []byte("0"), 0)
			}
			return nil
		})
	}
	return nil
}

// removeCgroups removes a cgroup with all below it from all hierarchies. The
// kernel may hold on to one for a moment after its last process ended.
func removeCgroups(name string) error {
	dirs, err := cgroupDirs(name)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(5 * time.Second)
	for _, dir := range dirs {
		for {
			err := removeTree(dir)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup: %w", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("rmdir %s: %w", dir, err)
	}
	return nil
}

// inCgroup reports whether a process is in one of the cgroups or below, in any hierarchy.
func inCgroup(pid int, names []string) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for lines.Scan() {
		parts := strings.SplitN(lines.Text(), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for _, name := range names {
			if parts[2] == name || strings.HasPrefix(parts[2], name+"/") {
				return true
			}
		}
	}
	return false
}
