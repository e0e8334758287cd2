package firstlight

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/kit"
	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

// machine is what a program sees that is not this machine: mounts and a network
// of its own, the kernel perhaps without something.
type machine struct {
	*kit.Env
	t       *testing.T
	dir     string
	network *netns.Namespace
	// cgroup is where a node may make its own.
	cgroup string
	// spoil is a shell script that runs in the mount namespace first.
	spoil string
	// filter is a thread's seccomp filter, which its children inherit.
	filter []unix.SockFilter
}

// address is its own, in its network.
const address = "192.0.2.1"

func newMachine(t *testing.T, e *kit.Env) *machine {
	t.Helper()
	m := &machine{Env: e.In(t), t: t, dir: t.TempDir(), cgroup: ownCgroup(t)}
	var err error
	file := filepath.Join(m.dir, "netns")
	if m.network, err = netns.Create(file); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.network.Close()
		// A child that another test forks holds all descriptors until its exec, so a plain unmount may be told that it is busy.
		if err := unix.Unmount(file, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", file, err)
		}
	})
	if err := m.network.Configure("lo", &net.IPNet{IP: net.ParseIP(address), Mask: net.CIDRMask(32, 32)}); err != nil {
		t.Fatal(err)
	}
	return m
}

// command is gantry as somebody without a cluster runs it there, as with `unshare --mount`.
func (m *machine) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	m.t.Helper()
	program, err := m.Program()
	if err != nil {
		m.t.Fatal(err)
	}
	shell := []string{"-ec", m.spoil + "\nexec \"$@\"", "sh", program, name,
		"--fail-cgroupv1=false", "--fail-swap-on=false", "--enable-server=false", "--healthz-port=0", "--read-only-port=0",
		"--hostname-override=unfit", "--node-ip=" + address, "--cgroup-root=" + m.cgroup, "--network-plugin=builtin"}
	for flag, sub := range map[string]string{"state-dir": "run", "data-dir": "data", "root-dir": "root", "cert-dir": "root/pki"} {
		shell = append(shell, "--"+flag+"="+filepath.Join(m.dir, sub))
	}
	cmd := exec.CommandContext(ctx, "sh", append(shell, args...)...)
	cmd.Dir = m.dir
	return cmd
}

// start starts it. Go makes the mounts of a new namespace private.
func (m *machine) start(cmd *exec.Cmd) {
	m.t.Helper()
	err := proc.OnThread(func() error {
		if err := proc.EnterNetworkNamespace(m.network.File); err != nil {
			return err
		}
		if len(m.filter) > 0 {
			program := unix.SockFprog{Len: uint16(len(m.filter)), Filter: &m.filter[0]}
			if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
				return errno
			}
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		return cmd.Start()
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// refuses runs a command that has to fail, and to say all of these.
func (m *machine) refuses(name string, wants ...string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.Ctx, 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd := m.command(ctx, name)
	cmd.Stdout, cmd.Stderr = &out, &out
	m.start(cmd)
	if err := cmd.Wait(); err == nil || ctx.Err() != nil {
		m.t.Errorf("gantry %s ends with %v", name, err)
	}
	m.saysAll("gantry "+name, out.String(), wants)
}

// says runs a command that does not end by itself until it has said all of these.
func (m *machine) says(name string, args []string, wants ...string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.Ctx, 60*time.Second)
	defer cancel()
	file := filepath.Join(m.dir, name+".log")
	out, err := os.Create(file)
	if err != nil {
		m.t.Fatal(err)
	}
	defer out.Close()
	cmd := m.command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	m.start(cmd)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		cmd.Process.Signal(os.Interrupt) // it may have ended
		<-ended
	}()
	m.Eventually(45*time.Second, "gantry "+name+" says what is in the way", func() (bool, string) {
		raw, err := os.ReadFile(file)
		if err != nil {
			return false, err.Error()
		}
		missing := slices.DeleteFunc(slices.Clone(wants), func(want string) bool { return bytes.Contains(raw, []byte(want)) })
		return len(missing) == 0, fmt.Sprintf("no %q in %s", missing, raw)
	})
}

// ownCgroup is a cgroup below which a node may make its own.
func ownCgroup(t *testing.T) string {
	name := fmt.Sprintf("gantry-unfit-%d", os.Getpid())
	t.Cleanup(func() {
		// children first; what has no such cgroup matches nothing
		script := `for top in /sys/fs/cgroup/"$0" /sys/fs/cgroup/*/"$0"; do [ ! -d "$top" ] || find "$top" -depth -type d -exec rmdir {} +; done`
		if out, err := exec.Command("sh", "-c", script, name).CombinedOutput(); err != nil {
			t.Errorf("remove cgroup %s: %v\n%s", name, err, out)
		}
	})
	return "/" + name
}

func (m *machine) saysAll(what, text string, wants []string) {
	m.t.Helper()
	seen := strings.Join(strings.Fields(text), " ")
	for _, want := range wants {
		if !strings.Contains(seen, want) {
			m.t.Errorf("%s does not say %q:\n%s", what, want, text)
		}
	}
}

// Machines that cannot be a node, or cannot any more: doctor and the agent name
// what is in the way, and the mend.
func TestUnfitMachine(t *testing.T) {
	t.Parallel()
	e := kit.New(t)

	t.Run("full disk", func(t *testing.T) {
		m := newMachine(t, e)
		data, run := filepath.Join(m.dir, "data"), filepath.Join(m.dir, "run")
		m.spoil = `mkdir -p data; mount -t tmpfs -o size=1m tmpfs data; dd if=/dev/zero of=data/filled bs=4k 2>/dev/null || true`
		m.refuses("doctor", "FATAL disk "+data+": 0 MiB free, 0 %, and 512 MiB are needed: images cannot be pulled",
			"-> remove what is not needed, or move it to a larger disk with --data-dir")
		m.refuses("agent", "open the image store: image store: write "+data+"/images/",
			"No space left on device (os error 28); make room there, or move the store to a larger disk with --data-dir")

		m.spoil = `mkdir -p run; mount -t tmpfs -o size=1m tmpfs run; dd if=/dev/zero of=run/filled bs=4k 2>/dev/null || true`
		m.refuses("doctor", "FATAL disk "+run+": 0 MiB free, 0 %, and 16 MiB are needed: Pods cannot be started",
			"-> remove what is not needed, or move it to a larger disk with --state-dir")
	})

	t.Run("no room for an image", func(t *testing.T) {
		m := newMachine(t, e)
		data := filepath.Join(m.dir, "data")
		m.spoil = `mkdir -p data; mount -t tmpfs -o size=2m tmpfs data`
		m.refuses("doctor", data+": 2 MiB free, 100 %, and 512 MiB are needed: images cannot be pulled")
		// The machine reaches the cluster's registry, and nothing else.
		var listener net.Listener
		if err := proc.OnThread(func() (err error) {
			if err = proc.EnterNetworkNamespace(m.network.File); err == nil {
				listener, err = net.Listen("tcp", "127.0.0.1:0")
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: e.Registry})
		server := &http.Server{Handler: proxy, ReadHeaderTimeout: 10 * time.Second}
		go server.Serve(listener)
		t.Cleanup(func() { server.Close() })
		image := listener.Addr().String() + "/busybox:1.37"
		pod := "{apiVersion: v1, kind: Pod, metadata: {name: unfit}, spec: {hostNetwork: true, containers: [{name: main, image: \"" + image + "\"}]}}"
		if err := os.WriteFile(filepath.Join(m.dir, "pod.yaml"), []byte(pod), 0o644); err != nil {
			t.Fatal(err)
		}
		m.says("run", []string{"pod.yaml"},
			"failed to extract layer sha256:", data+"/images/tmp/", "; make room there, or move the store to a larger disk with --data-dir")
	})

	t.Run("no overlayfs", func(t *testing.T) {
		m := newMachine(t, e)
		// What a kernel without it answers (fs/fsopen.c), whatever the file system: a filter does not see names.
		m.filter = []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // struct seccomp_data: nr
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FSOPEN, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENODEV)},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
		const mend = "modprobe overlay, and write overlay to /etc/modules-load.d/gantry.conf; without the module take a kernel with CONFIG_OVERLAY_FS"
		m.refuses("doctor", "FATAL overlayfs the kernel has no overlay file system, on which containers run", "-> "+mend)
		m.refuses("agent", "overlayfs, on which containers run: No such device (os error 19); "+mend)
	})

	// As in a container without --privileged, and the cgroups that it may only look at.
	t.Run("read-only cgroups", func(t *testing.T) {
		m := newMachine(t, e)
		m.spoil = `
for place in $(awk '/ - cgroup/ { print $5 }' /proc/self/mountinfo); do
	mount --bind "$place" "$place"
	mount -o remount,bind,ro "$place"
done`
		const mend = "mount it writable: in a container run it with --privileged and --cgroupns=private"
		m.refuses("doctor", "FATAL cgroups", "read-only", "cgroups cannot be made", "-> "+mend)
		m.refuses("agent", "open the cgroup tree: cannot ", "Read-only file system (os error 30); "+mend)
	})
}
