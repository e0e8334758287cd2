//! Pod networking: namespaces, the built-in bridge network with its addresses, NAT and host ports, and the files
//! (`resolv.conf`, `hosts`, hostname) that belong to it.
//!
//! [`cni`] makes networks with plugins, if the node is configured for them.
//!
//! # The built-in network
//!
//! Every Pod has a pair of virtual interfaces: `eth0` in its own namespace and a port of the node's bridge. The bridge
//! holds the first address of each podCIDR, the gateway. Two things differ from the CNI bridge plugin:
//!
//! - Pods have full-length prefixes (`/32`, `/128`) and send everything to the gateway, also what is for another Pod of
//!   the node. So connection tracking sees both directions of every connection, and host ports and Service addresses
//!   work whether the `br_netfilter` module is loaded or not.
//! - Nobody learns: the bridge's forwarding table, the node's neighbours and the Pod's gateway are fixed entries. The
//!   first packet needs no ARP, and no Pod can take another's or the gateway's traffic with forged ARP, neighbour
//!   discovery or Ethernet source addresses, which the default capability `CAP_NET_RAW` lets it send.
//!
//! Everything happens in the network namespace in which [`Network::open`] was called. All names (bridge, nftables
//! table, interfaces) derive from the name of the bridge, so that several agents can share a namespace.
//!
//! # State
//!
//! A record for each Pod, `<state_dir>/pods/<uid>/network.json`, is the only state; [`Network`] is a view of them.
//! Operations on one Pod exclude each other, run to their end on a thread of their own even when their future is
//! dropped, and may be repeated at any time, also after the agent was killed in the middle of one.

pub mod cni;
mod conntrack;
pub mod dns;
mod host;
pub mod hostname;
pub mod hosts;
mod ipam;
mod link;
mod manager;
mod namespace;
mod netlink;
mod nft;
mod record;
mod rules;
mod sysctl;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use cni::{CniConfig, CniError};
use dns::ResolvConf;

pub use ipam::CidrError;
pub use manager::Network;
pub use namespace::{dial_in_namespace, in_namespace};
pub use netlink::NetlinkError;
pub use sysctl::SysctlError;

/// Settings of the built-in network.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// The agent's run directory. Pods are below `pods/<uid>`, which the network creates if needed and removes if
    /// nothing else is left in it; namespaces are pinned there.
    pub state_dir: PathBuf,
    /// Name of the bridge, at most 15 bytes; `gantry0` by default.
    pub bridge: String,
    /// MTU of Pod interfaces in bytes; by default that of the interface with the default route, else 1500.
    pub mtu: Option<u32>,
    /// Networks that see Pods under their own addresses: traffic from Pods to them is never masqueraded. With several
    /// nodes, the cluster's Pod network (`--cluster-cidr`); the node's own podCIDRs need not be listed.
    pub cluster_cidrs: Vec<IpNet>,
    /// CNI plugins, which the node may use instead.
    pub cni: CniConfig,
}

impl NetworkConfig {
    /// The defaults; no plugins.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        let state_dir = state_dir.into();
        let cni = CniConfig::never(state_dir.join("cni"));
        Self { state_dir, bridge: "gantry0".into(), mtu: None, cluster_cidrs: Vec::new(), cni }
    }
}

/// Transport protocol of a host port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port of the node that leads to a Pod (`containers[].ports[]` with a `hostPort`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPort {
    /// Transport protocol.
    pub protocol: Protocol,
    /// The node's address it is open on; none: all. `0.0.0.0` and `::` mean all addresses of their family.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<IpAddr>,
    /// Port on the node, 1 to 65535.
    pub host_port: u16,
    /// Port in the Pod.
    pub container_port: u16,
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host_ip {
            Some(ip) => write!(formatter, "{}/{}", std::net::SocketAddr::new(ip, self.host_port), self.protocol),
            None => write!(formatter, "{}/{}", self.host_port, self.protocol),
        }
    }
}

/// Whether the kernel takes nftables rules in the calling thread's network namespace; changes nothing.
pub fn probe_nftables() -> Result<(), NetlinkError> {
    // a table that comes and goes in one transaction: nobody sees it
    let mut transaction = nft::Transaction::new("gantry-probe");
    transaction.remove_table();
    nft::Nftables::open()?.commit(transaction)
}

/// What a Pod needs of the network.
#[derive(Debug, Clone)]
pub struct PodNetworkRequest {
    /// `metadata.uid`; for static Pods the hash that stands for it.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Hostname for the Pod's UTS namespace (see [`hostname`]); unused with `host_network`.
    pub hostname: String,
    /// `spec.hostNetwork`: no network and UTS namespace, no address, no host ports.
    pub host_network: bool,
    /// `spec.hostIPC`: no IPC namespace.
    pub host_ipc: bool,
    /// Host ports of all containers; ignored with `host_network`, where containers open them themselves.
    pub host_ports: Vec<HostPort>,
    /// `spec.securityContext.sysctls`; they override the defaults.
    pub sysctls: Vec<(String, String)>,
    /// Limits of its traffic; CNI plugins only.
    pub bandwidth: Bandwidth,
    /// Its `resolv.conf`; CNI plugins only.
    pub dns: ResolvConf,
}

/// Limits of a Pod's traffic in bits a second (annotations `kubernetes.io/ingress-bandwidth` and `egress-bandwidth`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// To the Pod.
    pub ingress: Option<u64>,
    /// From the Pod.
    pub egress: Option<u64>,
}

/// A Pod's network, ready for its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetwork {
    /// The Pod's addresses in the order of the node's podCIDRs, or as plugins gave them; empty with `hostNetwork` (the node's are the Pod's).
    pub ips: Vec<IpAddr>,
    /// Its network namespace; none with `hostNetwork`.
    pub net_ns: Option<PathBuf>,
    /// Its IPC namespace; none with `hostIPC`.
    pub ipc_ns: Option<PathBuf>,
    /// Its UTS namespace; none with `hostNetwork`.
    pub uts_ns: Option<PathBuf>,
}

/// Why a network operation failed.
///
/// Terminal until the Pod or the configuration changes: `InvalidBridge`, `InvalidUid`, `Cidr`, `Sysctl` (except a write
/// error) and `NotABridge`. Worth a retry: all others; `HostPortInUse` and `Exhausted` end when other Pods go,
/// `NotReady` when the node has a podCIDR or a CNI configuration.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The configured name cannot be that of an interface.
    #[error("bridge name {0:?} is invalid: use 1 to 15 letters, digits, '-', '_' or '.'")]
    InvalidBridge(String),
    /// The uid cannot be the name of a directory.
    #[error("Pod uid {0:?} is invalid: it must be a file name of 1 to 128 letters, digits, '-', '_' or '.'")]
    InvalidUid(String),
    /// The node's podCIDRs cannot be used.
    #[error(transparent)]
    Cidr(#[from] CidrError),
    /// The node has no podCIDR or no CNI configuration yet.
    #[error("{0}")]
    NotReady(String),
    /// All addresses are in use.
    #[error("no free Pod address: all {in_use} of podCIDR {cidr} are in use")]
    Exhausted {
        /// The podCIDR.
        cidr: IpNet,
        /// How many Pods have an address in it.
        in_use: usize,
    },
    /// Another Pod has the host port.
    #[error("host port {port} is in use by Pod {owner}")]
    HostPortInUse {
        /// The wanted port.
        port: HostPort,
        /// `namespace/name` of the Pod that has it.
        owner: String,
    },
    /// A sysctl is malformed, not allowed or refused.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// Something else has the bridge's name.
    #[error("interface {name} is a {kind}, not a bridge: remove it or configure another bridge name")]
    NotABridge {
        /// The bridge's name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// The kernel refused a change of interfaces, addresses, routes or rules.
    #[error("{action}: {source}")]
    Netlink {
        /// What was attempted.
        action: String,
        /// Why it failed.
        source: NetlinkError,
    },
    /// A CNI plugin or its configuration failed.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// A file, mount or namespace operation failed.
    #[error("{action}: {source}")]
    Io {
        /// What was attempted.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel took too long; the operation goes on and may be repeated.
    #[error("{0} did not end within {1} s")]
    Deadline(&'static str, u64),
}

/// Adds what was attempted to an error.
trait Context<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, NetworkError>;
}

impl<T> Context<T> for Result<T, NetlinkError> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, NetworkError> {
        self.map_err(|source| NetworkError::Netlink { action: action(), source })
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, NetworkError> {
        self.map_err(|source| NetworkError::Io { action: action(), source })
    }
}
