// Package proc starts, identifies and ends processes. A process is never
// addressed by its pid alone: pids are reused, so the start time is compared
// on a pidfd before a signal is sent.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ID names one process for as long as the machine is up.
type ID struct {
	PID int `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat: clock ticks after boot.
	StartTime uint64 `json:"startTime"`
	// BootID tells a process of this boot from one of an earlier boot.
	BootID string `json:"bootID"`
}

// ErrGone means that the process has ended (or was never the one meant).
var ErrGone = errors.New("process is gone")

// stat is the part of /proc/PID/stat that is used here.
type stat struct {
	state     byte
	parent    int
	startTime uint64
}

func readStat(pid int) (stat, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, ErrGone
	}
	// The name (field 2) may hold blanks and parentheses; it ends at the last one.
	text := string(raw)
	close := strings.LastIndexByte(text, ')')
	if close < 0 {
		return stat{}, fmt.Errorf("/proc/%d/stat: no process name in %q", pid, text)
	}
	fields := strings.Fields(text[close+1:])
	if len(fields) < 20 {
		return stat{}, fmt.Errorf("/proc/%d/stat: %d fields after the name", pid, len(fields))
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: parent: %w", pid, err)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: start time: %w", pid, err)
	}
	return stat{state: fields[0][0], parent: parent, startTime: start}, nil
}

// BootID is the kernel's random identifier of this boot.
func BootID() string {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

// Identify returns the identity of a running process.
func Identify(pid int) (ID, error) {
	s, err := readStat(pid)
	if err != nil {
		return ID{}, err
	}
	return ID{PID: pid, StartTime: s.startTime, BootID: BootID()}, nil
}

// Alive reports whether exactly this process still runs. A zombie does not.
func (id ID) Alive() bool {
	if id.PID <= 0 || id.BootID != BootID() {
		return false
	}
	s, err := readStat(id.PID)
	return err == nil && s.startTime == id.StartTime && s.state != 'Z' && s.state != 'X'
}

// open returns a pidfd that is certain to belong to this process.
func (id ID) open() (int, error) {
	if id.PID <= 1 || id.BootID != BootID() {
		return -1, ErrGone
	}
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return -1, ErrGone
		}
		return -1, fmt.Errorf("pidfd_open %d: %w", id.PID, err)
	}
	// The pidfd pins whoever has the pid now; the start time tells who that is.
	if s, err := readStat(id.PID); err != nil || s.startTime != id.StartTime {
		unix.Close(fd)
		return -1, ErrGone
	}
	return fd, nil
}

// Signal sends a signal to exactly this process.
func (id ID) Signal(sig unix.Signal) error {
	fd, err := id.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return ErrGone
		}
		return fmt.Errorf("signal %v to process %d: %w", sig, id.PID, err)
	}
	return nil
}

// Wait returns when the process has ended.
func (id ID) Wait(ctx context.Context) error {
	fd, err := id.open()
	if errors.Is(err, ErrGone) {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	for {
		if !id.Alive() {
			return nil
		}
		// A pidfd becomes readable at exit. The slices let ctx interrupt.
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll pidfd of %d: %w", id.PID, err)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("process %d still runs: %w", id.PID, err)
		}
	}
}

// Stop sends SIGTERM, and SIGKILL when the process is still there after grace.
func (id ID) Stop(grace time.Duration) error {
	if err := id.Signal(unix.SIGTERM); errors.Is(err, ErrGone) {
		return nil
	} else if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if id.Wait(ctx) == nil {
		return nil
	}
	return id.Kill()
}

// Kill sends SIGKILL and waits for the end.
func (id ID) Kill() error {
	if err := id.Signal(unix.SIGKILL); errors.Is(err, ErrGone) {
		return nil
	} else if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return id.Wait(ctx)
}

// Find returns all live processes for which match holds, except this one and its ancestors.
func Find(match func(pid int) bool) ([]ID, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	spared := map[int]bool{}
	for pid := os.Getpid(); pid > 0; {
		spared[pid] = true
		s, err := readStat(pid)
		if err != nil {
			break
		}
		pid = s.parent
	}
	boot := BootID()
	var found []ID
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || spared[pid] {
			continue
		}
		s, err := readStat(pid)
		if err != nil || s.state == 'Z' || s.state == 'X' || !match(pid) {
			continue
		}
		found = append(found, ID{PID: pid, StartTime: s.startTime, BootID: boot})
	}
	return found, nil
}
