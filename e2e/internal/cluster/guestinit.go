package cluster

import (
	"bytes"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/netns"
	"gantry.local/e2e/internal/proc"
)

// swapDisk is there in a guest that has swap (guestSwapFile).
const swapDisk = "/dev/ubda"

// GuestInit makes a guest a node and serves commands until the guest ends.
func GuestInit() error {
	raw, err := os.ReadFile(filepath.Join(guestJobDir, "job.json"))
	if err != nil {
		return err
	}
	var job guestJob
	if err := json.Unmarshal(raw, &job); err != nil {
		return fmt.Errorf("job.json: %w", err)
	}
	c := &Cluster{Home: job.Home, Dir: job.Dir, State: job.State}
	n := c.Nodes[0]
	// Containers' upper directories cannot lie on the guest's root, which is an
	// overlay itself. The logs are written through to the cluster's directory.
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", c.Dir, "tmpfs", 0, "size=75%,mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", c.Dir, err)
	}
	for _, dir := range []string{"log", "pki", "netns"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("none", c.path("log"), "hostfs", 0, c.path("log")); err != nil {
		return fmt.Errorf("mount the cluster's log directory: %w", err)
	}
	for from, to := range map[string]string{"ca.crt": c.pkiPath("ca.crt"), "bootstrap.conf": c.path("bootstrap.conf")} {
		content, err := os.ReadFile(filepath.Join(guestJobDir, from))
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, content, 0o600); err != nil {
			return err
		}
	}
	if _, err := os.Stat(swapDisk); err == nil {
		name, err := unix.BytePtrFromString(swapDisk)
		if err != nil {
			return err
		}
		if _, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(name)), 0, 0); errno != 0 {
			return fmt.Errorf("swapon %s: %w", swapDisk, errno)
		}
	}
	// The node gets a namespace of its own here too: then nothing of the guest
	// (kernel threads, this program) is taken for the node's.
	ns, err := netns.Create(c.namespaceFile(n.Name()))
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ns.Take("vec0", c.nodeAddress(n), c.address(hostRouter).IP); err != nil {
		return err
	}
	if err := c.makeNodeFiles(n, job.Overlay); err != nil {
		return err
	}
	if err := c.save(); err != nil {
		return err
	}
	var listener net.Listener
	if err := proc.OnThread(func() error {
		if err := proc.EnterNetworkNamespace(ns.File); err != nil {
			return err
		}
		var err error
		listener, err = net.Listen("tcp", fmt.Sprintf("%s:%d", c.nodeAddress(n).IP, guestPort))
		return err
	}); err != nil {
		return err
	}
	server := &http.Server{Handler: guestCommands(job), ReadHeaderTimeout: 10 * time.Second}
	return server.Serve(listener)
}

// guestCommands runs commands of this program for whoever knows the token.
func guestCommands(job guestJob) http.Handler {
	mux := http.NewServeMux()
	authorized := func(handle http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+job.Token)) != 1 {
				http.Error(w, "wrong token", http.StatusUnauthorized)
				return
			}
			handle(w, r)
		}
	}
	mux.HandleFunc("GET /", authorized(func(http.ResponseWriter, *http.Request) {}))
	mux.HandleFunc("POST /", authorized(func(w http.ResponseWriter, r *http.Request) {
		var args []string
		if err := json.NewDecoder(r.Body).Decode(&args); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var out, errOut bytes.Buffer
		cmd := exec.CommandContext(r.Context(), guestJobDir+"/cluster", args...)
		cmd.Env = append(os.Environ(),
			"GANTRY_REPOSITORY="+guestJobDir, "GANTRY_CLUSTER_DIR="+job.Home.Clusters, "GANTRY_BIN="+job.State.GantryBinary)
		cmd.Stdout, cmd.Stderr = &out, &errOut
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			fmt.Fprintln(&errOut, err)
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(guestResult{Stdout: out.Bytes(), Stderr: errOut.Bytes(), Failed: err != nil})
	}))
	return mux
}
