package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type mount struct {
	root, point, kind string
}

// readMounts reads the mounts of this mount namespace, oldest first.
func readMounts() ([]mount, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	// proc(5): blanks, tabs, line feeds and backslashes are written in octal.
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var mounts []mount
	for _, line := range strings.Split(strings.TrimSpace(string(raw)), "\n") {
		fields := strings.Fields(line)
		separator := 6
		for separator < len(fields) && fields[separator] != "-" {
			separator++
		}
		if separator+1 >= len(fields) {
			return nil, fmt.Errorf("/proc/self/mountinfo: unexpected line %q", line)
		}
		mounts = append(mounts, mount{root: unescape.Replace(fields[3]), point: unescape.Replace(fields[4]), kind: fields[separator+1]})
	}
	return mounts, nil
}

// mountsBelow are the mounts on dir or below, in the order they were made.
func mountsBelow(dir string) ([]mount, error) {
	// Mount points are listed without symbolic links.
	resolved, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	all, err := readMounts()
	if err != nil {
		return nil, err
	}
	var below []mount
	for _, m := range all {
		// A mount point that was removed is listed with this ending.
		point := strings.TrimSuffix(m.point, "//deleted")
		if point == resolved || strings.HasPrefix(point, resolved+"/") {
			below = append(below, m)
		}
	}
	return below, nil
}

// unmountBelow unmounts everything on dir and below, the newest first.
func unmountBelow(dir string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		mounts, err := mountsBelow(dir)
		if err != nil || len(mounts) == 0 {
			return err
		}
		var last error
		for i := len(mounts) - 1; i >= 0; i-- {
			err := unix.Unmount(mounts[i].point, unix.UMOUNT_NOFOLLOW)
			if errors.Is(err, unix.EBUSY) {
				// Whoever holds it open is not ours to end, or still ending.
				err = unix.Unmount(mounts[i].point, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
			}
			if err != nil {
				last = fmt.Errorf("unmount %s: %w", mounts[i].point, err)
			}
		}
		if last != nil && time.Now().After(deadline) {
			return last
		}
		if last != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}
}
