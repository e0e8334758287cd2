package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// counterKind is something that the kernel counts.
type counterKind struct {
	name   string
	kind   uint32
	config uint64
}

// errNotCounted means that the kernel here does not count system calls for us.
var errNotCounted = errors.New("system calls cannot be counted here")

func counterKinds() ([]counterKind, error) {
	// Two usual places of tracefs.
	var raw []byte
	var err error
	for _, dir := range []string{"/sys/kernel/tracing", "/sys/kernel/debug/tracing"} {
		if raw, err = os.ReadFile(filepath.Join(dir, "events/raw_syscalls/sys_enter/id")); err == nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w (mount tracefs on /sys/kernel/tracing)", errNotCounted, err)
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return nil, err
	}
	return []counterKind{
		{"calls", unix.PERF_TYPE_TRACEPOINT, id},
		{"faults", unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_PAGE_FAULTS},
		{"switches", unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_CONTEXT_SWITCHES},
	}, nil
}

// kernelCounts counts for all of the node's processes, and for what they start,
// while something is done to the node.
func (s *Stack) kernelCounts(do func() error) (map[string]uint64, error) {
	kinds, err := counterKinds()
	if err != nil {
		return nil, err
	}
	h, err := s.holdings()
	if err != nil {
		return nil, err
	}
	files := map[string][]int{}
	defer func() {
		for _, open := range files {
			for _, fd := range open {
				unix.Close(fd)
			}
		}
	}()
	for _, p := range h.processes {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID))
		if err != nil {
			return nil, err
		}
		for _, thread := range threads {
			tid, err := strconv.Atoi(thread.Name())
			if err != nil {
				return nil, err
			}
			for _, kind := range kinds {
				fd, err := count(tid, kind)
				if errors.Is(err, unix.ESRCH) {
					continue // ended meanwhile
				} else if err != nil {
					return nil, fmt.Errorf("%w: perf_event_open: %w", errNotCounted, err)
				}
				files[kind.name] = append(files[kind.name], fd)
			}
		}
	}
	if err := do(); err != nil {
		return nil, err
	}
	counts := map[string]uint64{}
	for name, open := range files {
		for _, fd := range open {
			var value [8]byte
			if _, err := unix.Read(fd, value[:]); err != nil {
				return nil, fmt.Errorf("read a counter: %w", err)
			}
			counts[name] += binary.NativeEndian.Uint64(value[:])
		}
	}
	return counts, nil
}

// count starts to count for a thread and for the threads and processes that
// come from it.
func count(tid int, kind counterKind) (int, error) {
	attributes := unix.PerfEventAttr{Type: kind.kind, Config: kind.config, Bits: unix.PerfBitInherit}
	attributes.Size = uint32(unsafe.Sizeof(attributes))
	return unix.PerfEventOpen(&attributes, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
}
