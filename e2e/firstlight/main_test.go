// Package firstlight holds the first scenarios that a node must master: what a
// user does on the first day, and what goes wrong on the second.
//
//	go test ./firstlight                                   with a cluster of its own
//	GANTRY_E2E_CLUSTER=dev go test ./firstlight -run OOM   on a running one
//
// hack/cluster must be able to run: as root, with the agent built.
package firstlight

import (
	"testing"

	"gantry.local/e2e/internal/kit"
)

func TestMain(m *testing.M) {
	// A silent node shall be noticed soon, but not within the two seconds that
	// an agent needs to come back.
	kit.Main(m, "--nodes=2", "--node-monitor-grace-period=20s")
}
