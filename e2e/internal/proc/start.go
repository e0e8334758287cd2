package proc

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spec says how to start a daemon.
type Spec struct {
	Args []string
	Env  []string
	Dir  string
	// LogFile gets stdout and stderr; it is appended to.
	LogFile string
	// NetworkNamespace is the file of the namespace to start in; empty means the caller's.
	NetworkNamespace string
	// Cgroups are directories whose cgroup.procs the process joins before it runs anything.
	Cgroups []string
}

// Start starts a daemon in a session of its own. It outlives the caller.
func Start(spec Spec) (ID, error) {
	log, err := os.OpenFile(spec.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return ID{}, err
	}
	defer log.Close()
	path, err := exec.LookPath(spec.Args[0])
	if err != nil {
		return ID{}, fmt.Errorf("start %s: %w", spec.Args[0], err)
	}
	var id ID
	err = OnThread(func() error {
		if spec.NetworkNamespace != "" {
			if err := EnterNetworkNamespace(spec.NetworkNamespace); err != nil {
				return err
			}
		}
		// On cgroup v1 a thread may move alone (`tasks`), and its child starts
		// where it is: so the daemon never runs outside. The v2 hierarchy knows
		// no lone threads; there the child is moved right after the fork.
		for _, dir := range spec.Cgroups {
			if err := os.WriteFile(dir+"/tasks", []byte(fmt.Sprint(unix.Gettid())), 0); err != nil && !os.IsNotExist(err) && !os.IsPermission(err) {
				return fmt.Errorf("join cgroup %s: %w", dir, err)
			}
		}
		cmd := exec.Command(path, spec.Args[1:]...)
		cmd.Args[0] = spec.Args[0]
		cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = spec.Env, spec.Dir, log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %s: %w", spec.Args[0], err)
		}
		for _, dir := range spec.Cgroups {
			if err := os.WriteFile(dir+"/cgroup.procs", []byte(fmt.Sprint(cmd.Process.Pid)), 0); err != nil {
				cmd.Process.Kill()
				cmd.Wait()
				return fmt.Errorf("move %s into cgroup %s: %w", spec.Args[0], dir, err)
			}
		}
		var err error
		id, err = Identify(cmd.Process.Pid)
		// Reap it if it ends while we are still its parent, so that it does not
		// look alive as a zombie.
		go cmd.Wait()
		return err
	})
	return id, err
}

// OnThread runs work on a thread of its own, which is thrown away afterwards:
// whatever namespace or cgroup work enters cannot leak into other goroutines.
func OnThread(work func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- work()
	}()
	return <-done
}

// EnterNetworkNamespace moves the calling thread. Use it inside OnThread.
func EnterNetworkNamespace(file string) error {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", file, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", file, err)
	}
	return nil
}

// Exec replaces the calling process by a command inside a network namespace.
// It returns only on failure.
func Exec(networkNamespace string, args, env []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	// exec(2) gives the whole process the namespaces of the calling thread.
	runtime.LockOSThread()
	if err := EnterNetworkNamespace(networkNamespace); err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", path, unix.Exec(path, args, env))
}
