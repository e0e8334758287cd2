package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A stock node runs kubelet, containerd and runc (hack/stock-node) where others
// run Gantry. Those change and leave things that belong to the whole machine.

// kubeletSettings are what a kubelet changes for the whole machine, below /proc/sys.
var kubeletSettings = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// kubeletLogLinks is where a kubelet puts its links to logs; it knows no other place.
const kubeletLogLinks = "/var/log/containers"

// preserveSettings records the machine's settings before a kubelet runs for the first time.
func (c *Cluster) preserveSettings() error {
	if c.Settings != nil {
		return nil
	}
	saved := map[string]string{}
	for _, name := range kubeletSettings {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			return err
		}
		saved[name] = string(value)
	}
	c.Settings = saved
	return c.save()
}

// restoreMachine undoes what kubelets changed and removes what they left outside the cluster's directory.
func (c *Cluster) restoreMachine() error {
	if c.Settings == nil {
		return nil
	}
	for name, value := range c.Settings {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
			return fmt.Errorf("restore a setting of the machine: %w", err)
		}
	}
	entries, err := os.ReadDir(kubeletLogLinks)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, entry := range entries {
		link := filepath.Join(kubeletLogLinks, entry.Name())
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, c.Dir+"/") {
			if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
