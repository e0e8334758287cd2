package bench

import "fmt"

// Origin says what was measured, and where. It is taken before anything is
// measured: who edits, commits or builds during the hour of a run must not change
// what its figures are said to be of.
type Origin struct {
	// Commit is that of the repository; "-dirty" follows if there were changes.
	Commit string `json:"commit"`
	// Program is the beginning of the SHA-256 of the agent's binary; empty without a Gantry node.
	Program string `json:"program"`
	// Peer names the programs of the stock node with their versions.
	Peer    string  `json:"peer,omitempty"`
	Machine Machine `json:"machine"`
}

// NewOrigin describes this machine and the agent's binary as they are now. The
// path is empty if no Gantry node is measured.
func NewOrigin(commit, peer, binary string) (Origin, error) {
	o := Origin{Commit: commit, Peer: peer, Machine: thisMachine()}
	if binary == "" {
		return o, nil
	}
	var err error
	if o.Program, err = digest(binary); err != nil {
		return o, fmt.Errorf("the agent's binary: %w (`make build` makes it, or GANTRY_BIN names another)", err)
	}
	return o, nil
}

// same is an error that names the first thing by which two origins differ, such
// that figures of one must not stand beside those of the other. Load may differ:
// it says how quiet the machine was, not which one it is.
func (o Origin) same(now Origin) error {
	const source, machine = "check out what was measured", "go on where it began"
	for _, field := range []struct {
		name    string
		was, is any
		remedy  string
	}{
		{"commit", o.Commit, now.Commit, source},
		{"program", o.Program, now.Program, "set GANTRY_BIN to the binary that was measured"},
		{"peer", o.Peer, now.Peer, source},
		{"machine.cpus", o.Machine.CPUs, now.Machine.CPUs, machine},
		{"machine.cpu", o.Machine.CPU, now.Machine.CPU, machine},
		{"machine.memoryMiB", o.Machine.MemoryMiB, now.Machine.MemoryMiB, machine},
		{"machine.kernel", o.Machine.Kernel, now.Machine.Kernel, machine},
		{"machine.cgroups", o.Machine.Cgroups, now.Machine.Cgroups, machine},
	} {
		if field.was != field.is {
			return fmt.Errorf("%s: it was %q and is now %q: %s, or begin anew without --resume",
				field.name, fmt.Sprint(field.was), fmt.Sprint(field.is), field.remedy)
		}
	}
	return nil
}
