package kit

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal is a command that runs on a terminal of its own, as if a user had
// typed it.
type Terminal struct {
	e      *Env
	cmd    *exec.Cmd
	master *os.File
	lock   sync.Mutex
	shown  strings.Builder
	ended  chan error
}

// OnTerminal starts kubectl on a new terminal of the given size. It is killed at
// the test's end if it still runs.
func (e *Env) OnTerminal(rows, columns uint16, args ...string) *Terminal {
	e.t.Helper()
	master, slave, err := openTerminal()
	if err != nil {
		e.t.Fatalf("open a terminal: %v", err)
	}
	defer slave.Close()
	ctx, cancel := context.WithTimeout(e.Ctx, 2*time.Minute)
	t := &Terminal{e: e, cmd: e.KubectlCommand(ctx, args...), master: master, ended: make(chan error, 1)}
	t.Resize(rows, columns)
	t.cmd.Stdin, t.cmd.Stdout, t.cmd.Stderr = slave, slave, slave
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := t.cmd.Start(); err != nil {
		cancel()
		e.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buffer := make([]byte, 4096)
		for {
			// EIO: nobody has the other end open any more.
			n, err := master.Read(buffer)
			t.lock.Lock()
			t.shown.Write(buffer[:n])
			t.lock.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		err := t.cmd.Wait()
		<-read
		t.ended <- err
	}()
	e.t.Cleanup(func() {
		cancel()
		master.Close()
	})
	return t
}

func openTerminal() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		master.Close()
		return nil, nil, err
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

// Resize gives the terminal another size, which tells the command (SIGWINCH).
func (t *Terminal) Resize(rows, columns uint16) {
	t.e.t.Helper()
	raw, err := t.master.SyscallConn()
	if err != nil {
		t.e.t.Fatal(err)
	}
	var failure error
	if err := raw.Control(func(fd uintptr) {
		failure = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
	}); err != nil || failure != nil {
		t.e.t.Fatalf("resize the terminal: %v %v", err, failure)
	}
}

// Type types text.
func (t *Terminal) Type(text string) {
	t.e.t.Helper()
	if _, err := t.master.WriteString(text); err != nil {
		t.e.t.Fatalf("type %q: %v; the terminal shows: %q", text, err, t.Shown())
	}
}

// Shown is everything that the terminal has shown.
func (t *Terminal) Shown() string {
	t.lock.Lock()
	defer t.lock.Unlock()
	return t.shown.String()
}

// Await waits until the terminal shows a text.
func (t *Terminal) Await(text string) {
	t.e.t.Helper()
	t.e.Eventually(30*time.Second, fmt.Sprintf("the terminal shows %q", text), func() (bool, string) {
		shown := t.Shown()
		return strings.Contains(shown, text), shown
	})
}

// Wait waits for the command's end and returns its exit code.
func (t *Terminal) Wait() int {
	t.e.t.Helper()
	select {
	case <-t.ended:
		return t.cmd.ProcessState.ExitCode()
	case <-time.After(30 * time.Second):
		t.e.t.Fatalf("the command does not end; the terminal shows: %q", t.Shown())
		return -1
	}
}
