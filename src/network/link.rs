//! Interfaces, addresses and routes, by routing netlink.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NlaBuffer, NlasIterator};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
    InfoPortKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::ipam::Subnet;
use super::netlink::{NetlinkError, NetlinkSocket, Request, text};

/// `NETLINK_ROUTE`.
const PROTOCOL: isize = 0;
/// The interface inside every Pod, as with CNI.
pub const POD_INTERFACE: &str = "eth0";

// Attributes that are read. Dumps are parsed by hand, attribute by attribute: a device of a kind or kernel that the
// library does not know must not make the whole dump unreadable.
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;

/// What is known of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `bridge`, `veth`, ...; none for hardware.
    pub kind: Option<String>,
    /// Index of the bridge it is a port of.
    pub master: Option<u32>,
    pub mtu: u32,
}

/// A Pod's place on the bridge.
pub struct Port<'a> {
    /// Name of the node's end of the Pod's interfaces.
    pub name: &'a str,
    /// Index of the bridge.
    pub bridge: u32,
    /// Hardware address of the Pod's end.
    pub mac: [u8; 6],
    /// The Pod's addresses.
    pub addresses: &'a [IpAddr],
}

/// Routing netlink in the network namespace of the thread that opened it.
pub struct Links {
    socket: NetlinkSocket,
}

impl Links {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: NetlinkSocket::open(PROTOCOL)? })
    }

    /// Looks an interface up by name.
    pub fn find(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        match self.socket.get(&RouteNetlinkMessage::GetLink(message)) {
            Ok(reply) => Ok(parse_link(&reply)),
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All interfaces.
    pub fn all(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let replies = self.socket.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(replies.iter().filter_map(|reply| parse_link(reply)).collect())
    }

    /// Creates a bridge that is up and keeps its hardware address, or adjusts an existing one.
    pub fn ensure_bridge(&mut self, name: &str, mac: [u8; 6], mtu: u32) -> Result<Link, NetlinkError> {
        if self.find(name)?.is_none() {
            let mut message = LinkMessage::default();
            let data = InfoData::Bridge(vec![InfoBridge::ForwardDelay(0)]);
            message.attributes = vec![
                LinkAttribute::IfName(name.into()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]),
            ];
            let request = RouteNetlinkMessage::NewLink(message);
            tolerate(self.socket.execute(&[Request::route(&request, NLM_F_CREATE | NLM_F_EXCL)]), &[Errno::EEXIST])?;
        }
        // Without an address of its own a bridge takes the lowest of its ports' and changes it when Pods come and go.
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes =
            vec![LinkAttribute::IfName(name.into()), LinkAttribute::Address(mac.into()), LinkAttribute::Mtu(mtu)];
        self.socket.execute(&[Request::route(&RouteNetlinkMessage::SetLink(message), 0)])?;
        self.find(name)?.ok_or(NetlinkError::Refused { index: 0, errno: Errno::ENODEV, detail: String::new() })
    }

    /// Makes the gateways of `subnets` the only addresses of the bridge, apart from IPv6 link-local ones.
    pub fn set_gateways(&mut self, bridge: u32, subnets: &[Subnet]) -> Result<(), NetlinkError> {
        let wanted: Vec<IpNet> = subnets.iter().map(gateway).collect();
        let present: Vec<IpNet> =
            self.addresses()?.into_iter().filter(|(index, _)| *index == bridge).map(|(_, net)| net).collect();
        let link_local = |net: &IpNet| matches!(net, IpNet::V6(v6) if v6.addr().is_unicast_link_local());
        let stale = present.iter().filter(|net| !wanted.contains(net) && !link_local(net));
        let missing = wanted.iter().filter(|net| !present.contains(net));
        let mut requests: Vec<Request> =
            stale.map(|net| Request::route(&RouteNetlinkMessage::DelAddress(address(bridge, *net)), 0)).collect();
        requests.extend(missing.map(|net| new_address(bridge, *net)));
        self.socket.execute(&requests)
    }

    /// All addresses with the interfaces that have them.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpNet)>, NetlinkError> {
        let replies = self.socket.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(replies.iter().filter_map(|reply| parse_address(reply)).collect())
    }

    /// The MTU of the interface with the best default route, IPv4 first; none without a default route.
    pub fn uplink_mtu(&mut self) -> Result<Option<u32>, NetlinkError> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let replies = self.socket.dump(&RouteNetlinkMessage::GetRoute(message))?;
            let Some((_, index)) = replies.iter().filter_map(|reply| parse_default_route(reply)).min() else {
                continue;
            };
            return Ok(self.all()?.into_iter().find(|link| link.index == index).map(|link| link.mtu));
        }
        Ok(None)
    }

    /// Creates a Pod's interfaces: the node's end as a port of the bridge, the Pod's end inside its namespace.
    pub fn create_veth(&mut self, port: &Port<'_>, mtu: u32, net_ns: BorrowedFd<'_>) -> Result<(), NetlinkError> {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(POD_INTERFACE.into()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Address(port.mac.into()),
            LinkAttribute::NetNsFd(net_ns.as_raw_fd()),
        ];
        let mut pair = LinkMessage::default();
        let data = InfoData::Veth(InfoVeth::Peer(peer));
        pair.attributes = vec![
            LinkAttribute::IfName(port.name.into()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)]),
            // A port from its first moment: an interrupted set-up leaves nothing that is not on our bridge.
            LinkAttribute::Controller(port.bridge),
        ];
        let create = Request::route(&RouteNetlinkMessage::NewLink(pair), NLM_F_CREATE | NLM_F_EXCL);
        self.socket.execute(&[create])?;
        self.plug(port)
    }

    /// Makes an existing interface the Pod's port again.
    pub fn attach(&mut self, port: &Port<'_>) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(port.name.into()), LinkAttribute::Controller(port.bridge)];
        self.socket.execute(&[Request::route(&RouteNetlinkMessage::SetLink(message), 0)])?;
        self.plug(port)
    }

    /// Tells bridge and node where the Pod is, once and for all, and opens the port.
    fn plug(&mut self, port: &Port<'_>) -> Result<(), NetlinkError> {
        let missing = NetlinkError::Refused { index: 0, errno: Errno::ENODEV, detail: port.name.into() };
        let index = self.find(port.name)?.ok_or(missing)?.index;
        let mut requests = vec![no_ipv6_addresses(port.name), open_port(port.name), forwarding_entry(index, port.mac)];
        requests.extend(port.addresses.iter().map(|address| new_neighbour(port.bridge, *address, port.mac)));
        self.socket.execute(&requests)
    }

    /// Deletes a Pod's interfaces and what the node knows of its addresses; all of it may be gone already.
    pub fn remove(&mut self, port: &Port<'_>) -> Result<(), NetlinkError> {
        self.delete(port.name)?;
        for address in port.addresses {
            let message = RouteNetlinkMessage::DelNeighbour(neighbour(port.bridge, *address));
            tolerate(self.socket.execute(&[Request::route(&message, 0)]), &[Errno::ENOENT, Errno::ENODEV])?;
        }
        Ok(())
    }

    /// Deletes an interface; it may be gone already.
    pub fn delete(&mut self, name: &str) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        let request = Request::route(&RouteNetlinkMessage::DelLink(message), 0);
        tolerate(self.socket.execute(&[request]), &[Errno::ENODEV])
    }

    /// Inside a Pod's namespace: the loopback interface up, and `eth0` with its addresses and default routes.
    ///
    /// Addresses have full-length prefixes and everything goes through the gateway; [`super`] says why.
    pub fn configure_pod(&mut self, addresses: &[(IpAddr, Subnet)], gateway_mac: [u8; 6]) -> Result<(), NetlinkError> {
        self.socket.execute(&[raise("lo")])?;
        if addresses.is_empty() {
            return Ok(());
        }
        let missing = NetlinkError::Refused { index: 0, errno: Errno::ENODEV, detail: POD_INTERFACE.into() };
        let index = self.find(POD_INTERFACE)?.ok_or(missing)?.index;
        let mut requests: Vec<Request> =
            addresses.iter().map(|(address, _)| new_address(index, IpNet::from(*address))).collect();
        requests.push(raise(POD_INTERFACE));
        for (_, subnet) in addresses {
            let gateway = subnet.gateway();
            requests.push(new_route(index, Some(IpNet::from(gateway)), None));
            requests.push(new_route(index, None, Some(gateway)));
            requests.push(new_neighbour(index, gateway, gateway_mac));
        }
        self.socket.execute(&requests)
    }
}

fn tolerate(result: Result<(), NetlinkError>, expected: &[Errno]) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.errno().is_some_and(|errno| expected.contains(&errno)) => Ok(()),
        other => other,
    }
}

pub(super) fn raise(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.push(LinkAttribute::IfName(name.into()));
    Request::route(&RouteNetlinkMessage::SetLink(message), 0)
}

/// Opens a port that learns nothing from the frames it receives and gets none that are not for its Pod, but
/// broadcasts and multicasts.
///
/// Where `br_netfilter` is active, it sends a packet whose destination it has translated straight to the other port
/// instead of through the node. Back to the Pod that it came from (a Pod that uses its own Service or host port) it
/// gets in hairpin mode only.
fn open_port(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let options =
        vec![InfoBridgePort::HairpinMode(true), InfoBridgePort::Learning(false), InfoBridgePort::UnicastFlood(false)];
    let port = LinkInfo::PortData(InfoPortData::BridgePort(options));
    message.attributes = vec![
        LinkAttribute::IfName(name.into()),
        LinkAttribute::LinkInfo(vec![LinkInfo::PortKind(InfoPortKind::Bridge), port]),
    ];
    // The kernel changes the options of a port only in RTM_NEWLINK on an existing interface.
    Request::route(&RouteNetlinkMessage::NewLink(message), 0)
}

/// A fixed entry of the bridge's forwarding table: frames to the hardware address leave through this port.
fn forwarding_entry(port: u32, mac: [u8; 6]) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.state = NeighbourState::Noarp;
    message.header.flags = NeighbourFlags::Controller;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.into()));
    Request::route(&RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

fn neighbour(interface: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = interface;
    message.attributes.push(NeighbourAttribute::Destination(match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }));
    message
}

/// A neighbour that is never asked for and that no ARP or neighbour discovery message can move.
fn new_neighbour(interface: u32, address: IpAddr, mac: [u8; 6]) -> Request {
    let mut message = neighbour(interface, address);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.into()));
    Request::route(&RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// The node's end is a bridge port: an IPv6 link-local address on it would only cost messages.
fn no_ipv6_addresses(name: &str) -> Request {
    let mut message = LinkMessage::default();
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    message.attributes =
        vec![LinkAttribute::IfName(name.into()), LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])];
    Request::route(&RouteNetlinkMessage::SetLink(message), 0)
}

fn gateway(subnet: &Subnet) -> IpNet {
    // The prefix length of a network is valid for its own family.
    IpNet::new(subnet.gateway(), subnet.net().prefix_len()).unwrap_or(subnet.net())
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn address(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    message
}

pub(super) fn new_address(index: u32, net: IpNet) -> Request {
    let mut message = address(index, net);
    if net.addr().is_ipv6() {
        // Addresses are unique by allocation; detection of duplicates would make them unusable for a second.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request::route(&RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// A route to `destination` (none: the default route), on the link itself or through a gateway.
pub(super) fn new_route(index: u32, destination: Option<IpNet>, through: Option<IpAddr>) -> Request {
    let mut message = RouteMessage::default();
    let family = family(destination.map(|net| net.addr()).or(through).unwrap_or(IpAddr::from([0, 0, 0, 0])));
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    if let Some(net) = destination {
        message.header.destination_prefix_length = net.prefix_len();
        message.attributes.push(RouteAttribute::Destination(net.addr().into()));
    }
    match through {
        None => message.header.scope = RouteScope::Link,
        Some(gateway) => {
            message.header.scope = RouteScope::Universe;
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
    }
    Request::route(&RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// The attributes after a fixed header, as (type, value); what cannot be read ends the list.
fn attributes<'a>(bytes: &'a [u8]) -> impl Iterator<Item = (u16, &'a [u8])> {
    // The iterator has checked that an attribute's length is at least that of its header and within the bytes.
    let value = |attribute: NlaBuffer<&'a [u8]>| &attribute.into_inner()[4..usize::from(attribute.length())];
    NlasIterator::new(bytes).map_while(Result::ok).map(move |attribute| (attribute.kind(), value(attribute)))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<4>().map(|word| u32::from_ne_bytes(*word))
}

fn parse_link(reply: &[u8]) -> Option<Link> {
    const HEADER: usize = 16;
    let mut link = Link { index: word(reply, 4)?, name: String::new(), kind: None, master: None, mtu: 0 };
    for (kind, value) in attributes(reply.get(HEADER..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MTU => link.mtu = word(value, 0)?,
            IFLA_MASTER => link.master = word(value, 0),
            IFLA_LINKINFO => link.kind = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND).map(|a| text(a.1)),
            _ => {}
        }
    }
    Some(link)
}

fn parse_address(reply: &[u8]) -> Option<(u32, IpNet)> {
    const HEADER: usize = 8;
    let prefix = *reply.get(1)?;
    let index = word(reply, 4)?;
    let find = |wanted| attributes(reply.get(HEADER..)?).find(|(kind, _)| *kind == wanted);
    // On point-to-point links IFA_ADDRESS is the other end's.
    let (_, value) = find(IFA_LOCAL).or_else(|| find(IFA_ADDRESS))?;
    let address = match value.len() {
        4 => IpAddr::from(*value.first_chunk::<4>()?),
        16 => IpAddr::from(*value.first_chunk::<16>()?),
        _ => return None,
    };
    Some((index, IpNet::new(address, prefix).ok()?))
}

/// Metric and interface of a default route of the main table.
fn parse_default_route(reply: &[u8]) -> Option<(u32, u32)> {
    const HEADER: usize = 12;
    let (prefix, table) = (*reply.get(1)?, *reply.get(4)?);
    if prefix != 0 || table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut metric, mut interface) = (0, None);
    for (kind, value) in attributes(reply.get(HEADER..)?) {
        match kind {
            RTA_OIF => interface = word(value, 0),
            RTA_PRIORITY => metric = word(value, 0)?,
            _ => {}
        }
    }
    Some((metric, interface?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hostile_replies_do_not_panic(body in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (parse_link(&body), parse_address(&body), parse_default_route(&body));
        }
    }
}
