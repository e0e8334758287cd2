package conformance

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// MachineHas says whether this machine has something that some specs need and
// no node can make up for.
func MachineHas(feature string) (bool, error) {
	switch feature {
	case "CAP_SYS_RESOURCE":
		return hasCapability(unix.CAP_SYS_RESOURCE)
	case "dummy-links":
		// In a namespace that ends with the command.
		return exec.Command("unshare", "--net", "ip", "link", "add", "gantry-probe", "type", "dummy").Run() == nil, nil
	default:
		return false, fmt.Errorf("feature %q; there are CAP_SYS_RESOURCE and dummy-links", feature)
	}
}

// GuestsHave is MachineHas for nodes that are virtual machines, whose root may do everything.
func GuestsHave(feature string) (bool, error) {
	if feature == "CAP_SYS_RESOURCE" {
		return true, nil
	}
	return MachineHas(feature)
}

func hasCapability(number int) (bool, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false, err
	}
	_, rest, _ := strings.Cut(string(status), "\nCapEff:")
	var effective uint64
	if _, err := fmt.Sscanf(rest, "%x", &effective); err != nil {
		return false, fmt.Errorf("/proc/self/status: CapEff: %w", err)
	}
	return effective&(1<<number) != 0, nil
}
