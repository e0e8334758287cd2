//! The node's side of the network: bridge, forwarding, rules, and the Pods' ports on the bridge.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use ipnet::IpNet;
use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::ipam::Subnet;
use super::link::{Links, Veth};
use super::nft::{Nftables, Transaction};
use super::record::Record;
use super::{Context, NetworkConfig, NetworkError, rules, sysctl};

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
        let (index, _) = self.ensure_bridge(subnets)?;
        let bridge = &self.bridge;
        self.links.set_gateways(index, subnets).context(|| format!("set the addresses of bridge {bridge}"))?;
        self.enable_forwarding(subnets)
    }

    fn ensure_bridge(&mut self, subnets: &[Subnet]) -> Result<(u32, u32), NetworkError> {
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
        let mac = subnets.first().map_or([2; 6], |subnet| mac_of(subnet.gateway()));
        let link = self.links.ensure_bridge(name, mac, mtu).context(action)?;
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

    /// Creates a Pod's interfaces; makes the bridge again if it has disappeared. The calling thread may be in any
    /// namespace as long as the bridge is there.
    pub fn create_veth(&mut self, uid: &str, address: IpAddr, net_ns: BorrowedFd<'_>) -> Result<(), CreateVethError> {
        let Some((bridge, mtu)) = self.ready else { return Err(CreateVethError::BridgeMissing) };
        let name = veth_name(&self.bridge, uid);
        let veth = Veth { name: &name, bridge, mtu, mac: mac_of(address), net_ns };
        match self.links.create_veth(&veth) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.errno(), Some(Errno::ENODEV | Errno::EINVAL)) && self.bridge_is_gone() => {
                self.ready = None;
                Err(CreateVethError::BridgeMissing)
            }
            Err(source) => {
                let action = format!("create interface {name}");
                Err(CreateVethError::Other(NetworkError::Netlink { action, source }))
            }
        }
    }

    fn bridge_is_gone(&mut self) -> bool {
        let index = self.ready.map(|(index, _)| index);
        self.links.find(&self.bridge).is_ok_and(|link| link.map(|link| link.index) != index)
    }

    /// Deletes a Pod's interfaces, which may be gone.
    pub fn delete_veth(&mut self, uid: &str) -> Result<(), NetworkError> {
        let name = veth_name(&self.bridge, uid);
        self.links.delete(&name).context(|| format!("delete interface {name}"))
    }

    /// Whether a Pod's interface exists.
    pub fn has_veth(&mut self, uid: &str) -> Result<bool, NetworkError> {
        let name = veth_name(&self.bridge, uid);
        Ok(self.links.find(&name).context(|| format!("look up interface {name}"))?.is_some())
    }

    /// Deletes ports of the bridge that belong to no Pod and puts those of Pods back on the bridge.
    pub fn reconcile_veths(&mut self, pods: &HashMap<String, Record>) -> Result<(), NetworkError> {
        let expected: HashSet<String> = pods.keys().map(|uid| veth_name(&self.bridge, uid)).collect();
        let links = self.links.all().context(|| "list interfaces".into())?;
        let Some(bridge) = links.iter().find(|link| link.name == self.bridge).map(|link| link.index) else {
            return Ok(());
        };
        for link in links.iter().filter(|link| link.name.starts_with(VETH_PREFIX)) {
            let name = &link.name;
            if expected.contains(name) {
                if link.master != Some(bridge) {
                    self.links.attach(name, bridge).context(|| format!("attach {name} to bridge {}", self.bridge))?;
                }
            } else if link.master == Some(bridge) {
                self.links.delete(name).context(|| format!("delete interface {name} of a Pod that is gone"))?;
            }
        }
        Ok(())
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

/// A hardware address that follows from the IP address: when an address moves to another Pod, nobody's neighbour cache
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
