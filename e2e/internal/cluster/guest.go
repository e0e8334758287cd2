package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

// A guest node is a User Mode Linux machine with pure cgroup v2 whose network
// card is the node's port of the cluster's bridge. Inside, this same program
// manages a "cluster" of one node and no control plane, in a directory of the
// same path: what acts on a node here is run there instead.

const (
	// guestPort is where the guest takes commands.
	guestPort = 7000
	// guestMemory also holds what the node unpacks: its disk is a tmpfs.
	guestMemory = "4096M"
	guestJobDir = "/run/job" // uml-init mounts the job's directory there
)

// guestJob is what a guest is told at boot.
type guestJob struct {
	Home    Home           `json:"home"`
	Dir     string         `json:"dir"`
	State   State          `json:"state"`
	Overlay map[string]any `json:"overlay,omitempty"`
	Token   string         `json:"token"`
}

func guestProcess(n Node) string { return fmt.Sprintf("guest-%d", n.Index) }

// nodeProcess is the process on this machine without which the node cannot be Ready.
func nodeProcess(n Node) string {
	if n.Guest {
		return guestProcess(n)
	}
	return agentProcess(n)
}

// guestNamespaceFile lies apart from the other namespaces: the routes that the
// supervisor keeps in those are of no use to a namespace without an address.
func (c *Cluster) guestNamespaceFile(n Node) string { return filepath.Join(c.nodeDir(n), "netns") }

func (c *Cluster) guestJobDir(n Node) string { return filepath.Join(c.nodeDir(n), "job") }

// makeGuest prepares a guest node; its cgroup here is that of the kernel's processes.
func (c *Cluster) makeGuest(n Node, options Options) error {
	for _, part := range []string{"linux", "rootfs/sbin/uml-init"} {
		if _, err := os.Stat(filepath.Join(c.Home.Guest, part)); err != nil {
			return fmt.Errorf("no guest system (hack/guest build makes it): %w", err)
		}
	}
	job := c.guestJobDir(n)
	if err := os.MkdirAll(job, 0o700); err != nil {
		return err
	}
	sw, err := netns.Open(c.namespaceFile(switchNamespace))
	if err != nil {
		return err
	}
	defer sw.Close()
	ns, err := netns.Create(c.guestNamespaceFile(n))
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ns.Attach(sw, bridgeName, n.Name()); err != nil {
		return err
	}

	token := make([]byte, 16)
	if _, err := rand.Read(token); err != nil {
		return err
	}
	there := c.State
	there.Nodes, there.Processes = []Node{{Index: n.Index}}, map[string]proc.ID{}
	there.GantryBinary = guestJobDir + "/gantry"
	raw, err := json.Marshal(guestJob{Home: c.Home, Dir: c.Dir, State: there, Overlay: options.KubeletConfig, Token: hex.EncodeToString(token)})
	if err != nil {
		return err
	}
	command := "exec " + guestJobDir + "/cluster guest-init\n"
	for name, content := range map[string][]byte{"job.json": raw, "cmd": []byte(command), "out": nil} {
		if err := os.WriteFile(filepath.Join(job, name), content, 0o600); err != nil {
			return err
		}
	}
	for name, file := range map[string]string{
		"cluster": options.Self, "gantry": c.GantryBinary, "ca.crt": c.pkiPath("ca.crt"), "bootstrap.conf": c.path("bootstrap.conf"),
	} {
		if err := linkOrCopy(file, filepath.Join(job, name)); err != nil {
			return err
		}
	}
	if options.GuestSwap > 0 {
		if err := makeSwap(c.guestSwapFile(n), options.GuestSwap<<20); err != nil {
			return err
		}
	}
	return makeCgroups(c.cgroupRoot(n), c.cgroupRoot(n)+"/agent")
}

// guestSwapFile is what the guest sees as its first disk, if it has swap.
func (c *Cluster) guestSwapFile(n Node) string { return filepath.Join(c.guestJobDir(n), "swap") }

// makeSwap writes what mkswap writes, into a file that takes no room until it is
// used (include/linux/swap.h: union swap_header).
func makeSwap(path string, size int64) error {
	const page = 4096
	header := make([]byte, page)
	binary.LittleEndian.PutUint32(header[1024:], 1)
	binary.LittleEndian.PutUint32(header[1028:], uint32(size/page-1)) // #nosec G115 -- up to 16 TiB
	copy(header[page-10:], "SWAPSPACE2")
	if err := os.WriteFile(path, header, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// linkOrCopy gives a file a second name, in another file system a copy.
func linkOrCopy(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return err
	}
	target, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(target, source); err != nil {
		target.Close()
		return err
	}
	return target.Close()
}

// bootGuest starts the machine and waits until it takes commands.
func (c *Cluster) bootGuest(ctx context.Context, n Node) error {
	dirs, err := cgroupDirs(c.cgroupRoot(n) + "/agent")
	if err != nil {
		return err
	}
	var disks []string
	if _, err := os.Stat(c.guestSwapFile(n)); err == nil {
		disks = []string{"ubd0=" + c.guestSwapFile(n)}
	}
	if err := c.startProcess(guestProcess(n), proc.Spec{
		Args: append([]string{
			filepath.Join(c.Home.Guest, "linux"), "mem=" + guestMemory, "seccomp=on", "ro", "quiet",
			"root=/dev/root", "rootfstype=hostfs", "rootflags=" + filepath.Join(c.Home.Guest, "rootfs"), "init=/sbin/uml-init",
			"con=null", "con0=null,fd:1", "uml_dir=" + c.nodeDir(n), "umid=uml",
			"jobdir=" + c.guestJobDir(n), "vec0:transport=raw,ifname=eth0",
		}, disks...),
		// The guest's memory is a deleted file there.
		Env:              []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.nodeDir(n), "TMPDIR=/dev/shm"},
		NetworkNamespace: c.guestNamespaceFile(n), Cgroups: dirs,
	}); err != nil {
		return err
	}
	err = c.poll(ctx, guestProcess(n), func(ctx context.Context) error {
		_, err := c.guestRequest(ctx, n, http.MethodGet, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w\n--- what the guest's init says:\n%s", err, tail(filepath.Join(c.guestJobDir(n), "out"), 30))
	}
	return nil
}

// guestResult is what came of a command in the guest.
type guestResult struct {
	Stdout, Stderr []byte
	Failed         bool
}

// inGuest runs a command of this program in a node's guest and returns its output.
func (c *Cluster) inGuest(n Node, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	args = append([]string{args[0], "--name=" + c.Name, fmt.Sprintf("--node=%d", n.Index)}, args[1:]...)
	body, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	answer, err := c.guestRequest(ctx, n, http.MethodPost, body)
	if err != nil {
		return nil, fmt.Errorf("guest of %s: %w", n.Name(), err)
	}
	var result guestResult
	if err := json.Unmarshal(answer, &result); err != nil {
		return nil, fmt.Errorf("guest of %s: %w", n.Name(), err)
	}
	if result.Failed {
		return result.Stdout, fmt.Errorf("in the guest of %s: %s", n.Name(), bytes.TrimSpace(result.Stderr))
	}
	os.Stderr.Write(result.Stderr)
	return result.Stdout, nil
}

func (c *Cluster) guestRequest(ctx context.Context, n Node, method string, body []byte) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(c.guestJobDir(n), "job.json"))
	if err != nil {
		return nil, err
	}
	var job guestJob
	if err := json.Unmarshal(raw, &job); err != nil {
		return nil, err
	}
	url := fmt.Sprintf("http://%s:%d/", c.nodeAddress(n).IP, guestPort)
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+job.Token)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return answer, err
}
