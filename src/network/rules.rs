//! The node's nftables table `inet gantry-<bridge>`: masquerading of Pod traffic that leaves the cluster, and host ports.
//!
//! ```text
//! prerouting, output   to an address of the node      -> chain host-ports
//! host-ports           (address,) protocol and port   -> destination NAT by map, one element for each host port
//! postrouting          from 127.0.0.0/8 to a Pod, a Pod to itself through its host port, a Pod to the outside
//!                                                     -> masquerade
//! loopback-guard       from the bridge, 127.0.0.0/8   -> drop
//! ```
//!
//! Host ports are set elements, so that a Pod with some costs one small transaction and packets cost one look-up,
//! however many there are. The guard undoes what `route_localnet` (needed for host ports on 127.0.0.1) would open:
//! without it Pods could reach services that listen on the node's loopback only (CVE-2020-8558).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::HostPort;
use super::ipam::Subnet;
use super::nft::expression::{
    Family, Field, Meta, Register, Verdict, destination_in, destination_is_local, family_is, interface_is, octets,
    source_in,
};
use super::nft::{DataType, Element, Expression, Hook, HookPoint, Set, Transaction, pad};
use super::record::Record;

const PRIORITY_RAW: i32 = -300;
const PRIORITY_DESTINATION_NAT: i32 = -100;
const PRIORITY_SOURCE_NAT: i32 = 100;

const HOST_PORTS: &str = "host-ports";
const MASQUERADE: &str = "masquerade";

/// The sets of one IP family.
struct FamilySets {
    family: Family,
    /// Host ports on every address of the node.
    any_address: Set,
    /// Host ports with a `hostIP`.
    one_address: Set,
    /// Pods that may talk to themselves through a host port.
    hairpin: Set,
}

use DataType::{Ipv4Address, Ipv6Address, Port, Protocol};

const V4: FamilySets = FamilySets {
    family: Family::V4,
    any_address: Set { name: "host-ports-v4", key: &[Protocol, Port], data: &[Ipv4Address, Port] },
    one_address: Set { name: "host-ip-ports-v4", key: &[Ipv4Address, Protocol, Port], data: &[Ipv4Address, Port] },
    hairpin: Set { name: "hairpin-v4", key: &[Ipv4Address, Ipv4Address], data: &[] },
};
const V6: FamilySets = FamilySets {
    family: Family::V6,
    any_address: Set { name: "host-ports-v6", key: &[Protocol, Port], data: &[Ipv6Address, Port] },
    one_address: Set { name: "host-ip-ports-v6", key: &[Ipv6Address, Protocol, Port], data: &[Ipv6Address, Port] },
    hairpin: Set { name: "hairpin-v6", key: &[Ipv6Address, Ipv6Address], data: &[] },
};
const FAMILIES: [&FamilySets; 2] = [&V4, &V6];

/// Name of the table that belongs to a bridge.
pub fn table(bridge: &str) -> String {
    format!("gantry-{bridge}")
}

/// The whole table.
pub fn whole_table<'a>(
    bridge: &str,
    subnets: &[Subnet],
    cluster_cidrs: &[IpNet],
    pods: impl Iterator<Item = &'a Record>,
) -> Transaction {
    let mut transaction = Transaction::new(&table(bridge));
    transaction.replace_table();
    for sets in FAMILIES {
        transaction.add_set(&sets.any_address);
        transaction.add_set(&sets.one_address);
        transaction.add_set(&sets.hairpin);
    }
    host_port_chains(&mut transaction);
    masquerade_chains(&mut transaction, bridge, subnets, cluster_cidrs);
    loopback_guard(&mut transaction, bridge);
    for pod in pods {
        add_host_ports(&mut transaction, pod);
    }
    transaction
}

/// Adds what one Pod's host ports need to an existing table.
pub fn add_host_ports(transaction: &mut Transaction, pod: &Record) {
    for sets in FAMILIES {
        let elements = PodElements::new(sets.family, pod);
        transaction.add_elements(&sets.any_address, &elements.any_address);
        transaction.add_elements(&sets.one_address, &elements.one_address);
        transaction.add_elements(&sets.hairpin, &elements.hairpin);
    }
}

/// Removes it again.
pub fn delete_host_ports(transaction: &mut Transaction, pod: &Record) {
    for sets in FAMILIES {
        let elements = PodElements::new(sets.family, pod);
        transaction.delete_elements(&sets.any_address, &elements.any_address);
        transaction.delete_elements(&sets.one_address, &elements.one_address);
        transaction.delete_elements(&sets.hairpin, &elements.hairpin);
    }
}

/// The elements of one Pod and family.
#[derive(Debug, PartialEq, Eq)]
struct PodElements {
    any_address: Vec<Element>,
    one_address: Vec<Element>,
    hairpin: Vec<Element>,
}

impl PodElements {
    fn new(family: Family, pod: &Record) -> Self {
        let mut elements = Self { any_address: Vec::new(), one_address: Vec::new(), hairpin: Vec::new() };
        let address = pod.addresses.iter().map(|entry| entry.address).find(|ip| Family::of(*ip) == family);
        let Some(address) = address else { return elements };
        for port in pod.host_ports.iter().filter(|port| port.serves(family)) {
            let mut key = Vec::new();
            if let Some(host_ip) = port.specific_host_ip() {
                pad(&mut key, &octets(host_ip));
            }
            pad(&mut key, &[port.protocol.number()]);
            pad(&mut key, &port.host_port.to_be_bytes());
            let mut data = Vec::new();
            pad(&mut data, &octets(address));
            pad(&mut data, &port.container_port.to_be_bytes());
            let list = match port.specific_host_ip() {
                Some(_) => &mut elements.one_address,
                None => &mut elements.any_address,
            };
            list.push(Element { key, data });
        }
        if !(elements.any_address.is_empty() && elements.one_address.is_empty()) {
            elements.hairpin.push(Element { key: octets(address).repeat(2), data: Vec::new() });
        }
        elements
    }
}

impl HostPort {
    /// Whether it is open on addresses of the family. (`0.0.0.0` is every IPv4 address, `::` every IPv6 one.)
    fn serves(&self, family: Family) -> bool {
        self.host_ip.is_none_or(|ip| Family::of(ip) == family)
    }

    /// The one address it is open on, none for all.
    fn specific_host_ip(&self) -> Option<IpAddr> {
        self.host_ip.filter(|ip| !ip.is_unspecified())
    }

    /// Whether both would be the same key of a map. A port on one address and the same on all do not conflict: the more
    /// specific one wins.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        let key = |port: &Self| (port.protocol, port.host_port, port.specific_host_ip());
        let share_family = [Family::V4, Family::V6].iter().any(|f| self.serves(*f) && other.serves(*f));
        key(self) == key(other) && share_family
    }
}

fn host_port_chains(transaction: &mut Transaction) {
    transaction.add_chain(HOST_PORTS, None);
    for (name, point) in [("prerouting", HookPoint::Prerouting), ("output", HookPoint::Output)] {
        transaction.add_chain(name, Some(Hook { kind: "nat", point, priority: PRIORITY_DESTINATION_NAT }));
        let mut rule = destination_is_local();
        rule.push(Expression::Verdict(Verdict::Jump(HOST_PORTS)));
        transaction.add_rule(name, &rule);
    }
    // The kernel does not route packets from ::1 out of the node, so translating them would only lose them.
    let mut rule = destination_in(Ipv6Net::from(Ipv6Addr::LOCALHOST).into());
    rule.push(Expression::Verdict(Verdict::Return));
    transaction.add_rule(HOST_PORTS, &rule);
    for sets in FAMILIES {
        for set in [&sets.one_address, &sets.any_address] {
            transaction.add_rule(HOST_PORTS, &translate(sets.family, set));
        }
    }
}

/// Loads the key of the map and translates to what it says.
fn translate<'a>(family: Family, set: &'a Set) -> Vec<Expression<'a>> {
    // The value of an IPv6 map needs five registers, the key at most six: both fit into sixteen.
    const VALUE: u8 = 8;
    let address_registers = match family {
        Family::V4 => 1,
        Family::V6 => 4,
    };
    let mut rule = family_is(family);
    let mut next = 0;
    if set.key.len() == 3 {
        rule.push(Expression::Payload(Field::Destination(family), Register::new(next)));
        next += address_registers;
    }
    rule.push(Expression::Meta(Meta::Protocol, Register::new(next)));
    rule.push(Expression::Payload(Field::DestinationPort, Register::new(next + 1)));
    rule.push(Expression::Lookup { set: set.name, key: Register::new(0), value: Some(Register::new(VALUE)) });
    let port = Register::new(VALUE + address_registers);
    rule.push(Expression::DestinationNat { family, address: Register::new(VALUE), port });
    rule
}

fn masquerade_chains(transaction: &mut Transaction, bridge: &str, subnets: &[Subnet], cluster_cidrs: &[IpNet]) {
    transaction.add_chain(MASQUERADE, None);
    let multicast: [IpNet; 2] = [
        Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4).into(),
        Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8).into(),
    ];
    let mut rule = interface_is(Meta::OutputInterface, bridge);
    rule.push(Expression::Verdict(Verdict::Return));
    transaction.add_rule(MASQUERADE, &rule);
    for net in multicast.iter().copied().chain(subnets.iter().map(Subnet::net)).chain(cluster_cidrs.iter().copied()) {
        let mut rule = destination_in(net);
        rule.push(Expression::Verdict(Verdict::Return));
        transaction.add_rule(MASQUERADE, &rule);
    }
    transaction.add_rule(MASQUERADE, &[Expression::Masquerade]);

    const CHAIN: &str = "postrouting";
    let hook = Hook { kind: "nat", point: HookPoint::Postrouting, priority: PRIORITY_SOURCE_NAT };
    transaction.add_chain(CHAIN, Some(hook));
    let mut rule = interface_is(Meta::OutputInterface, bridge);
    rule.extend(source_in(loopback()));
    rule.push(Expression::Masquerade);
    transaction.add_rule(CHAIN, &rule);
    for sets in FAMILIES {
        let mut rule = family_is(sets.family);
        let destination = match sets.family {
            Family::V4 => Register::new(1),
            Family::V6 => Register::new(4),
        };
        rule.push(Expression::Payload(Field::Source(sets.family), Register::new(0)));
        rule.push(Expression::Payload(Field::Destination(sets.family), destination));
        rule.push(Expression::Lookup { set: sets.hairpin.name, key: Register::new(0), value: None });
        rule.push(Expression::Masquerade);
        transaction.add_rule(CHAIN, &rule);
    }
    for subnet in subnets {
        let mut rule = source_in(subnet.net());
        rule.push(Expression::Verdict(Verdict::Jump(MASQUERADE)));
        transaction.add_rule(CHAIN, &rule);
    }
}

fn loopback_guard(transaction: &mut Transaction, bridge: &str) {
    const CHAIN: &str = "loopback-guard";
    let hook = Hook { kind: "filter", point: HookPoint::Prerouting, priority: PRIORITY_RAW };
    transaction.add_chain(CHAIN, Some(hook));
    for condition in [source_in(loopback()), destination_in(loopback())] {
        let mut rule = interface_is(Meta::InputInterface, bridge);
        rule.extend(condition);
        rule.push(Expression::Verdict(Verdict::Drop));
        transaction.add_rule(CHAIN, &rule);
    }
}

fn loopback() -> IpNet {
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into()
}
