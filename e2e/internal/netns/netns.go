// Package netns makes network namespaces that are pinned by files, and wires
// them together. Everything is done with netlink on handles of the namespaces:
// nothing touches the caller's own namespace, except the one end of a veth
// pair that Join is told to put there.
package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"gantry.local/e2e/internal/proc"
)

// Namespace is an open network namespace.
type Namespace struct {
	File   string
	file   *os.File
	Handle *netlink.Handle
}

// Create makes a namespace pinned at file, with its loopback up.
func Create(file string) (*Namespace, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	pin, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("pin network namespace: %w", err)
	}
	pin.Close()
	err = proc.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), file, "", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(file)
		return nil, fmt.Errorf("pin network namespace at %s: %w", file, err)
	}
	ns, err := Open(file)
	if err != nil {
		return nil, err
	}
	lo, err := ns.Handle.LinkByName("lo")
	if err == nil {
		err = ns.Handle.LinkSetUp(lo)
	}
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("loopback of %s: %w", file, err)
	}
	return ns, nil
}

// Open opens a namespace by its file.
func Open(file string) (*Namespace, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	ns := &Namespace{File: file, file: f}
	err = proc.OnThread(func() error {
		// netlink sockets belong to the namespace they were opened in.
		if err := EnterFile(f); err != nil {
			return err
		}
		ns.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w", file, err)
	}
	return ns, nil
}

// EnterFile moves the calling thread into an open namespace.
func EnterFile(f *os.File) error { return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET) }

// Close closes the handles; the namespace lives on.
func (ns *Namespace) Close() {
	ns.Handle.Close()
	ns.file.Close()
}

// Sysctl sets a value under /proc/sys/net of the namespace.
func (ns *Namespace) Sysctl(name, value string) error {
	return proc.OnThread(func() error {
		if err := EnterFile(ns.file); err != nil {
			return err
		}
		return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
	})
}

// Bridge makes a bridge with an address, up.
func (ns *Namespace) Bridge(name string, address *net.IPNet) error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	if err := ns.Handle.LinkAdd(bridge); err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	return ns.Configure(name, address)
}

// Configure gives an interface an address and brings it up.
func (ns *Namespace) Configure(name string, address *net.IPNet) error {
	return configure(ns.Handle, name, address)
}

func configure(h *netlink.Handle, name string, address *net.IPNet) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if address != nil {
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: address}); err != nil {
			return fmt.Errorf("address %s on %s: %w", address, name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	return nil
}

// Plug connects a namespace to a bridge: a veth pair whose one end is a port
// named port of the bridge, and whose other end is eth0 of ns.
func (ns *Namespace) Plug(sw *Namespace, bridge, port string, address *net.IPNet, gateway net.IP) error {
	if err := addPort(sw, bridge, &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: port},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(int(ns.file.Fd())),
	}); err != nil {
		return err
	}
	if err := ns.Configure("eth0", address); err != nil {
		return err
	}
	return ns.Route(nil, gateway)
}

func addPort(sw *Namespace, bridge string, veth *netlink.Veth) error {
	master, err := sw.Handle.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", bridge, err)
	}
	veth.MasterIndex = master.Attrs().Index
	if err := sw.Handle.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth %s: %w", veth.Name, err)
	}
	link, err := sw.Handle.LinkByName(veth.Name)
	if err != nil {
		return fmt.Errorf("veth %s: %w", veth.Name, err)
	}
	return sw.Handle.LinkSetUp(link)
}

// ErrTaken means that the caller's namespace already has an interface of that name.
var ErrTaken = errors.New("interface name is taken")

// Uplink connects the caller's own namespace to the bridge by an interface
// name. The name is claimed by making the interface, which is atomic.
func Uplink(sw *Namespace, bridge, port, name string, address *net.IPNet) error {
	self, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer self.Close()
	err = addPort(sw, bridge, &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: port},
		PeerName:      name,
		PeerNamespace: netlink.NsFd(int(self.Fd())),
	})
	if errors.Is(err, unix.EEXIST) {
		return ErrTaken
	} else if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	return configure(h, name, address)
}

// Route sets the route to dst (nil: the default route) through a neighbour.
func (ns *Namespace) Route(dst *net.IPNet, gateway net.IP) error {
	if err := ns.Handle.RouteReplace(&netlink.Route{Dst: dst, Gw: gateway}); err != nil {
		return fmt.Errorf("route %v via %s: %w", dst, gateway, err)
	}
	return nil
}

// RemoveRoute removes the route to dst; it may be gone already.
func (ns *Namespace) RemoveRoute(dst *net.IPNet, gateway net.IP) error {
	err := ns.Handle.RouteDel(&netlink.Route{Dst: dst, Gw: gateway})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route %v: %w", dst, err)
	}
	return nil
}

// RemoveLink removes an interface, and with it the other end of a veth pair.
func (ns *Namespace) RemoveLink(name string) error {
	link, err := ns.Handle.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	} else if err != nil {
		return err
	}
	return ns.Handle.LinkDel(link)
}
