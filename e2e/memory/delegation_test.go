package memory

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/kit"
)

// A container or a service to which no controllers were delegated: doctor and
// the agent name them, and the mend.
func TestNoDelegation(t *testing.T) {
	e := kit.New(t)
	program, err := e.Program()
	if err != nil {
		t.Fatal(err)
	}
	if !native() {
		program = "/run/job/gantry"
	}
	// The cgroup namespace's root is below a cgroup that enables nothing for it;
	// the namespaces, and the mount in them, end with the command.
	const script = `
top=/sys/fs/cgroup/gantry-no-delegation
trap 'rmdir $top/inner $top' EXIT
mkdir $top $top/inner
sh -c 'echo $$ >'$top'/inner/cgroup.procs && exec unshare --cgroup --mount sh -ec "umount --lazy /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec \"\$@\"" sh "$@"' sh "$@" 2>&1 || true
`
	dir := t.TempDir()
	flags := []string{"--fail-swap-on=false", "--enable-server=false", "--hostname-override=undelegated", "--healthz-port=0",
		// the bridge here is the node's
		"--network-plugin=cni", "--cni-conf-dir=" + filepath.Join(dir, "cni")}
	for flag, sub := range map[string]string{"state-dir": "run", "data-dir": "data", "root-dir": "root", "cert-dir": "root/pki"} {
		flags = append(flags, "--"+flag+"="+filepath.Join(dir, sub))
	}
	for name, wants := range map[string][]string{
		"doctor": {"FATAL cgroups controllers cpu, memory, pids are not available in /sys/fs/cgroup", "-> delegate them: in a container run it with --privileged and its own cgroup namespace (--cgroupns=private); in a systemd unit set Delegate=yes"},
		"agent":  {`open the cgroup tree: cgroup controller "memory" is missing at /sys/fs/cgroup: delegate it (in a systemd unit Delegate=yes, in a container --privileged and --cgroupns=private)`},
	} {
		args := append([]string{"sh", "-ec", script, "sh", program, name}, flags...)
		out, errOut, err := e.NodeExec(e.Ctx, 1, args...)
		if err != nil {
			t.Errorf("gantry %s: %v", name, err)
		}
		seen := strings.Join(strings.Fields(out), " ")
		for _, want := range wants {
			if !strings.Contains(seen, want) {
				t.Errorf("gantry %s does not say %q:\n%s%s", name, want, out, errOut)
			}
		}
	}
}

// native says whether this machine itself has pure cgroup v2.
func native() bool {
	var fs unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}
