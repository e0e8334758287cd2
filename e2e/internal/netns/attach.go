package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Attach connects a namespace to a bridge like Plug, but leaves its eth0
// without any address: frames are for whoever opens a packet socket on it,
// such as a virtual machine.
func (ns *Namespace) Attach(sw *Namespace, bridge, port string) error {
	// The namespace's own kernel must not answer for the machine behind eth0,
	// not even for a link-local address.
	for _, name := range []string{"all", "default"} {
		if err := ns.Sysctl("ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := addPort(sw, bridge, &netlink.Veth{
		// One segment a frame: a packet socket would be handed the 64 KiB ones
		// that this kernel passes around, and User Mode Linux drops those.
		LinkAttrs:     netlink.LinkAttrs{Name: port, GSOMaxSegs: 1},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(int(ns.file.Fd())),
	}); err != nil {
		return err
	}
	return ns.Configure("eth0", nil)
}

// Take moves an interface of the caller's namespace into ns, as eth0 with an
// address and a default route.
func (ns *Namespace) Take(name string, address *net.IPNet, gateway net.IP) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if err := h.LinkSetNsFd(link, int(ns.file.Fd())); err != nil {
		return fmt.Errorf("move %s: %w", name, err)
	}
	if link, err = ns.Handle.LinkByName(name); err != nil {
		return fmt.Errorf("interface %s after its move: %w", name, err)
	}
	if err := ns.Handle.LinkSetName(link, "eth0"); err != nil {
		return fmt.Errorf("rename %s: %w", name, err)
	}
	if err := ns.Configure("eth0", address); err != nil {
		return err
	}
	return ns.Route(nil, gateway)
}
