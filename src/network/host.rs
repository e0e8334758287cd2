//! The node's side of the network: bridge, forwarding, rules, and the Pods' ports on the bridge.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use ipnet::IpNet;
use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::ipam::Subnet;
use super::link::{Links, Port};
use super::nft::{Nftables, Transaction};
use super::record::Record;
use super::{Context, NetworkConfig, NetworkError, Protocol, conntrack, rules, sysctl};

const DEFAULT_MTU: u32 = 1500;
/// What the names of the node's ends of Pod interfaces start with.
const VETH_PREFIX: &str = "gv";

/// Sockets into the agent's network namespace and what it has to contain.
pub struct Host {
    bridge: String,
    configured_mtu: Option<u32>,
    cluster_cidrs: Vec<IpNet>,
    links: Links,
    nftables: Nftables,
    /// Index and MTU of the bridge since it was last made or checked.
    ready: Option<(u32, u32)>,
}

impl Host {
    /// Opens the sockets in the calling thread's network namespace; changes nothing.
    pub fn open(config: &NetworkConfig) -> Result<Self, NetworkError> {
        Ok(Self {
            bridge: config.bridge.clone(),
            configured_mtu: config.mtu,
            cluster_cidrs: config.cluster_cidrs.clone(),
            links: Links::open().context(|| "open a routing socket".into())?,
            nftables: Nftables::open().context(|| "open a netfilter socket".into())?,
            ready: None,
        })
    }

    /// Makes bridge, gateways, forwarding and rules what `subnets` and `pods` ask for. The calling thread must be in
    /// the agent's network namespace.
    pub fn synchronize(&mut self, subnets: &[Subnet], pods: &HashMap<String, Record>) -> Result<(), NetworkError> {
        // Rules first: the guard must be there before route_localnet is set.
        self.replace_rules(subnets, pods)?;
        if subnets.is_empty() {
            return Ok(());
        }
        let (index, _) = self.ensure_bridge()?;
        let bridge = &self.bridge;
        self.links.set_gateways(index, subnets).context(|| format!("set the addresses of bridge {bridge}"))?;
        self.enable_forwarding(subnets)
    }

    /// Removes the bridge, if it is there.
    pub fn remove_bridge(&mut self) -> Result<(), NetworkError> {
        let action = || format!("remove bridge {}", self.bridge);
        let link = self.links.find(&self.bridge).context(action)?;
        if link.is_some_and(|link| link.kind.as_deref() == Some("bridge")) {
            self.links.delete(&self.bridge).context(action)?;
        }
        self.ready = None;
        Ok(())
    }

    fn ensure_bridge(&mut self) -> Result<(u32, u32), NetworkError> {
        let name = &self.bridge;
        let action = || format!("create bridge {name}");
        if let Some(link) = self.links.find(name).context(action)?
            && link.kind.as_deref() != Some("bridge")
        {
            let kind = link.kind.unwrap_or_else(|| "physical interface".into());
            return Err(NetworkError::NotABridge { name: name.clone(), kind });
        }
        let mtu = match self.configured_mtu {
            Some(mtu) => mtu,
            None => self.links.uplink_mtu().context(|| "find the default route".into())?.unwrap_or(DEFAULT_MTU),
        };
        let link = self.links.ensure_bridge(name, gateway_mac(name), mtu).context(action)?;
        self.ready = Some((link.index, mtu));
        Ok((link.index, mtu))
    }

    fn enable_forwarding(&self, subnets: &[Subnet]) -> Result<(), NetworkError> {
        let bridge = self.bridge.replace('.', "/");
        if subnets.iter().any(|subnet| !subnet.is_ipv6()) {
            sysctl::write("net.ipv4.ip_forward", "1")?;
            // Host ports on 127.0.0.1; guarded by a rule. Redirects would tell Pods to bypass the gateway.
            sysctl::write(&format!("net.ipv4.conf.{bridge}.route_localnet"), "1")?;
            sysctl::write(&format!("net.ipv4.conf.{bridge}.send_redirects"), "0")?;
        }
        if subnets.iter().any(Subnet::is_ipv6) {
            sysctl::write(&format!("net.ipv6.conf.{bridge}.accept_ra"), "0")?;
            if sysctl::read("net.ipv6.conf.all.forwarding").is_ok_and(|value| value == "0") {
                keep_accepting_router_advertisements(&self.bridge)?;
                sysctl::write("net.ipv6.conf.all.forwarding", "1")?;
            }
        }
        Ok(())
    }

    /// Replaces the nftables table in one transaction.
    pub fn replace_rules(&mut self, subnets: &[Subnet], pods: &HashMap<String, Record>) -> Result<(), NetworkError> {
        let table = rules::table(&self.bridge);
        let transaction = match subnets.is_empty() && pods.is_empty() {
            true => {
                let mut transaction = Transaction::new(&table);
                transaction.remove_table();
                transaction
            }
            false => rules::whole_table(&self.bridge, subnets, &self.cluster_cidrs, pods.values()),
        };
        self.nftables.commit(transaction).context(|| format!("replace nftables table inet {table}"))
    }

    /// Opens a Pod's host ports; false when the table is not as expected and must be replaced.
    pub fn open_host_ports(&mut self, pod: &Record) -> Result<bool, NetworkError> {
        let mut transaction = Transaction::new(&rules::table(&self.bridge));
        rules::add_host_ports(&mut transaction, pod);
        self.change_elements(transaction, "open host ports", pod)
    }

    /// Closes them; false when the table is not as expected and must be replaced.
    pub fn close_host_ports(&mut self, pod: &Record) -> Result<bool, NetworkError> {
        let mut transaction = Transaction::new(&rules::table(&self.bridge));
        rules::delete_host_ports(&mut transaction, pod);
        self.change_elements(transaction, "close host ports", pod)
    }

    /// Lets UDP clients of a Pod's host ports find out that they lead elsewhere now. The calling thread must be in the
    /// agent's network namespace.
    pub fn forget_udp_flows(&mut self, pod: &Record) -> Result<(), NetworkError> {
        let udp = pod.host_ports.iter().filter(|port| port.protocol == Protocol::Udp);
        let ports: HashSet<u16> = udp.map(|port| port.host_port).collect();
        if ports.is_empty() {
            return Ok(());
        }
        let addresses = self.links.addresses().context(|| "list the node's addresses".into())?;
        let addresses = addresses.into_iter().map(|(_, net)| net.addr()).collect();
        let action = || format!("forget UDP flows to host ports of Pod {}/{}", pod.namespace, pod.name);
        conntrack::forget_udp(&addresses, &ports).context(action)
    }

    fn change_elements(&mut self, transaction: Transaction, action: &str, pod: &Record) -> Result<bool, NetworkError> {
        match self.nftables.commit(transaction) {
            Ok(()) => Ok(true),
            // Someone flushed the rules, or an interrupted operation has done part of the work.
            Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EEXIST)) => Ok(false),
            Err(source) => {
                let action = format!("{action} of Pod {}/{}", pod.namespace, pod.name);
                Err(NetworkError::Netlink { action, source })
            }
        }
    }

    /// Creates a Pod's interfaces. The calling thread may be in any network namespace.
    pub fn create_veth(&mut self, pod: &Record, net_ns: BorrowedFd<'_>) -> Result<(), CreateVethError> {
        let Some((bridge, mtu)) = self.ready else { return Err(CreateVethError::BridgeMissing) };
        let place = Place::of(&self.bridge, pod);
        match self.links.create_veth(&place.port(bridge), mtu, net_ns) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.errno(), Some(Errno::ENODEV | Errno::EINVAL)) && self.bridge_is_gone() => {
                self.ready = None;
                Err(CreateVethError::BridgeMissing)
            }
            Err(source) => {
                let action = format!("create interface {}", place.name);
                Err(CreateVethError::Other(NetworkError::Netlink { action, source }))
            }
        }
    }

    fn bridge_is_gone(&mut self) -> bool {
        let index = self.ready.map(|(index, _)| index);
        self.links.find(&self.bridge).is_ok_and(|link| link.map(|link| link.index) != index)
    }

    /// Deletes a Pod's interfaces, which may be gone.
    pub fn delete_veth(&mut self, pod: &Record) -> Result<(), NetworkError> {
        let place = Place::of(&self.bridge, pod);
        let action = || format!("delete interface {}", place.name);
        match self.links.find(&self.bridge).context(action)? {
            Some(bridge) => self.links.remove(&place.port(bridge.index)).context(action),
            None => self.links.delete(&place.name).context(action),
        }
    }

    /// Whether a Pod's interface exists.
    pub fn has_veth(&mut self, uid: &str) -> Result<bool, NetworkError> {
        let name = veth_name(&self.bridge, uid);
        Ok(self.links.find(&name).context(|| format!("look up interface {name}"))?.is_some())
    }

    /// Deletes ports of the bridge that belong to no Pod and puts those of Pods back on the bridge.
    pub fn reconcile_veths(&mut self, pods: &HashMap<String, Record>) -> Result<(), NetworkError> {
        let mut places: HashMap<String, Place> =
            pods.values().map(|pod| Place::of(&self.bridge, pod)).map(|place| (place.name.clone(), place)).collect();
        let links = self.links.all().context(|| "list interfaces".into())?;
        let Some(bridge) = links.iter().find(|link| link.name == self.bridge).map(|link| link.index) else {
            return Ok(());
        };
        for link in links.iter().filter(|link| link.name.starts_with(VETH_PREFIX)) {
            let name = &link.name;
            match places.remove(name) {
                Some(_) if link.master == Some(bridge) => {}
                Some(place) => {
                    let action = || format!("attach {name} to bridge {}", self.bridge);
                    self.links.attach(&place.port(bridge)).context(action)?;
                }
                None if link.master == Some(bridge) => {
                    self.links.delete(name).context(|| format!("delete interface {name} of a Pod that is gone"))?;
                }
                None => {}
            }
        }
        Ok(())
    }
}

/// What follows from a Pod's record for its port of the bridge.
struct Place {
    name: String,
    mac: [u8; 6],
    addresses: Vec<IpAddr>,
}

impl Place {
    fn of(bridge: &str, pod: &Record) -> Self {
        let addresses: Vec<IpAddr> = pod.addresses.iter().map(|entry| entry.address).collect();
        let mac = addresses.first().map_or([0x0a, 0x58, 0, 0, 0, 0], |address| mac_of(*address));
        Self { name: veth_name(bridge, &pod.uid), mac, addresses }
    }

    fn port(&self, bridge: u32) -> Port<'_> {
        Port { name: &self.name, bridge, mac: self.mac, addresses: &self.addresses }
    }
}

/// Why a Pod's interfaces could not be made.
pub enum CreateVethError {
    /// The bridge is not there: synchronize and try again.
    BridgeMissing,
    /// Anything else.
    Other(NetworkError),
}

/// A forwarding node ignores router advertisements unless told otherwise; a node that has its own default route from
/// them would lose it.
fn keep_accepting_router_advertisements(bridge: &str) -> Result<(), NetworkError> {
    const DIRECTORY: &str = "/proc/sys/net/ipv6/conf";
    for entry in std::fs::read_dir(DIRECTORY).context(|| format!("list {DIRECTORY}"))? {
        let name = entry.context(|| format!("list {DIRECTORY}"))?.file_name();
        let Some(name) = name.to_str().filter(|name| *name != bridge && !name.starts_with(VETH_PREFIX)) else {
            continue;
        };
        let parameter = format!("net.ipv6.conf.{}.accept_ra", name.replace('.', "/"));
        if sysctl::read(&parameter).is_ok_and(|value| value == "1") {
            sysctl::write(&parameter, "2")?;
        }
    }
    Ok(())
}

/// Name of the node's end of a Pod's interfaces.
fn veth_name(bridge: &str, uid: &str) -> String {
    let digest = Sha256::new().chain_update(bridge).chain_update([0]).chain_update(uid).finalize();
    let hash = hex::encode(digest);
    format!("{VETH_PREFIX}{}", &hash[..11])
}

/// The bridge's hardware address. Pods know it by heart, so it depends on nothing that can change.
pub fn gateway_mac(bridge: &str) -> [u8; 6] {
    let digest = Sha256::digest(bridge);
    [0x0a, 0x59, digest[0], digest[1], digest[2], digest[3]]
}

/// A Pod's hardware address, which follows from the IP address: when an address moves to another Pod, nobody's neighbour cache
/// becomes wrong.
fn mac_of(address: IpAddr) -> [u8; 6] {
    let tail = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let digest = Sha256::digest(v6.octets());
            [digest[0], digest[1], digest[2], digest[3]]
        }
    };
    // Locally administered, unicast; the prefix that container networks use.
    [0x0a, 0x58, tail[0], tail[1], tail[2], tail[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_depend_on_bridge_and_pod() {
        let name = veth_name("gantry0", "uid");
        assert_eq!(name.len(), 13);
        assert!(name.starts_with("gv"));
        assert_ne!(name, veth_name("gantry1", "uid"));
        assert_ne!(name, veth_name("gantry0", "other"));
    }

    #[test]
    fn hardware_addresses_are_unicast_and_follow_the_ip() {
        assert_eq!(mac_of("10.1.2.3".parse().unwrap()), [0x0a, 0x58, 10, 1, 2, 3]);
        let (a, b) = (mac_of("fd00::2".parse().unwrap()), mac_of("fd00::3".parse().unwrap()));
        assert_ne!(a, b);
        assert_eq!(a[0] & 1, 0);
    }
}
