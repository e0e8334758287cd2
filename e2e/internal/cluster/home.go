package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"time"
)

// HomeFromEnvironment is what the scripts below hack/ set: GANTRY_REPOSITORY,
// GANTRY_CLUSTER_DIR and GANTRY_BIN.
func HomeFromEnvironment() (Home, error) {
	repository := os.Getenv("GANTRY_REPOSITORY")
	if repository == "" {
		return Home{}, errors.New("GANTRY_REPOSITORY is not set: run the script below hack/ instead of this program")
	}
	or := func(name, fallback string) string {
		if value := os.Getenv(name); value != "" {
			return value
		}
		return filepath.Join(repository, fallback)
	}
	h := Home{
		Clusters: or("GANTRY_CLUSTER_DIR", "build/clusters"),
		Bin:      filepath.Join(repository, "build/bin"),
		Images:   filepath.Join(repository, "build/images/layout"),
		Gantry:   or("GANTRY_BIN", newest(repository, "target/release/gantry", "target/x86_64-unknown-linux-gnu/release/gantry")),
		Guest:    filepath.Join(repository, "build/guest"),

		StockNode: filepath.Join(repository, "hack/stock-node"),
	}
	for _, path := range []*string{&h.Clusters, &h.Gantry} {
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return h, err
		}
		*path = absolute
	}
	return h, nil
}

// newest is the file that was built last: cargo puts it into a directory of the
// target's name if a target is configured.
func newest(dir string, files ...string) string {
	best, built := files[0], time.Time{}
	for _, file := range files {
		if info, err := os.Stat(filepath.Join(dir, file)); err == nil && info.ModTime().After(built) {
			best, built = file, info.ModTime()
		}
	}
	return best
}

// ControlPlaneNamespace is the file of the network namespace from which Pods,
// node ports and the API server can be reached.
func (c *Cluster) ControlPlaneNamespace() string { return c.namespaceFile("control-plane") }

// ServiceDNS is the address at which Pods look for DNS.
const ServiceDNS = "10.96.0.10"

// APIServer is the address and the port of the API server.
func (c *Cluster) APIServer() (string, int) {
	return c.address(hostControlPlane).IP.String(), apiServerPort
}

// PodCIDR is the network of all Pods.
const PodCIDR = podCIDR
