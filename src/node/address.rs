//! The node's own addresses.
//!
//! Source: `pkg/kubelet/nodestatus/setters.go` NodeAddress and `validateNodeIP` in `kubelet_node_status.go`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use k8s_openapi::api::core::v1::NodeAddress;

use super::resolve;
use crate::config::Config;

/// No usable address. Retryable: interfaces and routes may come up later.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// `--node-ip` is not an address this host may use.
    #[error("failed to validate nodeIP: {0}: correct --node-ip or configure the address on an interface")]
    Invalid(String),
    /// There is no route to anywhere.
    #[error("can't get ip address of node {0}: no default route: set --node-ip")]
    None(String),
}

/// Addresses for the Node's status. Without `--node-ip`: the host name if it is an address, what DNS says about
/// it if that is ours, the source address of the default route.
pub async fn addresses(config: &Config) -> Result<Vec<NodeAddress>, AddressError> {
    let given: Vec<IpAddr> = config.node_ips.iter().copied().filter(|address| !address.is_unspecified()).collect();
    for address in &given {
        usable(*address).map_err(AddressError::Invalid)?;
    }
    // a cloud controller finds the addresses itself unless it was told
    if config.external_cloud_provider && config.node_ips.is_empty() {
        return Ok(vec![typed("Hostname", &config.hostname)]);
    }
    let internal = if given.is_empty() {
        let prefer_v4 = config.node_ips.first().is_none_or(IpAddr::is_ipv4);
        vec![find(&config.hostname, prefer_v4).await.ok_or_else(|| AddressError::None(config.node_name.clone()))?]
    } else {
        given
    };
    let mut addresses: Vec<_> = internal.iter().map(|address| typed("InternalIP", &address.to_string())).collect();
    addresses.push(typed("Hostname", &config.hostname));
    Ok(addresses)
}

fn typed(kind: &str, address: &str) -> NodeAddress {
    NodeAddress { type_: kind.to_owned(), address: address.to_owned() }
}

async fn find(hostname: &str, prefer_v4: bool) -> Option<IpAddr> {
    if let Ok(address) = hostname.parse() {
        return Some(address);
    }
    // without DNS the routes decide
    let named = resolve::lookup(hostname).await.unwrap_or_default();
    let mut usable = named.into_iter().filter(|address| usable(*address).is_ok()).collect::<Vec<_>>();
    usable.sort_by_key(|address| address.is_ipv4() != prefer_v4);
    usable.first().copied().or_else(|| outgoing(prefer_v4)).or_else(|| outgoing(!prefer_v4))
}

/// The address the kernel would use towards the world. Connecting a datagram socket sends nothing.
fn outgoing(v4: bool) -> Option<IpAddr> {
    let (any, world): (SocketAddr, SocketAddr) = if v4 {
        // TEST-NET-1 and the documentation prefix: only a default route leads there
        ((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv4Addr::new(192, 0, 2, 1), 9).into())
    } else {
        ((Ipv6Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9).into())
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(world).ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|address| usable(*address).is_ok())
}

/// Why an address cannot be the node's; nothing if it can.
fn usable(address: IpAddr) -> Result<(), String> {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let problem = if address.is_loopback() {
        "nodeIP can't be loopback address"
    } else if address.is_multicast() {
        "nodeIP can't be a multicast address"
    } else if link_local {
        "nodeIP can't be a link-local unicast address"
    } else if address.is_unspecified() {
        "nodeIP can't be an all zeros address"
    } else {
        // only an address of this host can be bound
        return match UdpSocket::bind((address, 0)) {
            Ok(_) => Ok(()),
            Err(_) => Err(format!("node IP: \"{address}\" not found in the host's network interfaces")),
        };
    };
    Err(problem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_addresses() {
        for (address, words) in [
            ("127.0.0.1", "loopback"),
            ("::1", "loopback"),
            ("224.0.0.1", "multicast"),
            ("169.254.1.1", "link-local"),
            ("fe80::1", "link-local"),
            ("0.0.0.0", "all zeros"),
            ("192.0.2.77", "not found in the host's network interfaces"),
        ] {
            assert!(usable(address.parse().unwrap()).unwrap_err().contains(words), "{address}");
        }
    }

    #[tokio::test]
    async fn given_and_found_addresses() {
        let mut config = Config::for_tests(std::path::Path::new("/nowhere"));
        config.node_ips = vec!["127.0.0.1".parse().unwrap()];
        assert!(matches!(addresses(&config).await, Err(AddressError::Invalid(_))));
        config.node_ips.clear();
        config.external_cloud_provider = true;
        assert_eq!(addresses(&config).await.unwrap(), [typed("Hostname", "node")]);
        config.external_cloud_provider = false;
        config.hostname = "10.1.2.3".into();
        let found = addresses(&config).await.unwrap();
        assert_eq!(found, [typed("InternalIP", "10.1.2.3"), typed("Hostname", "10.1.2.3")]);
    }
}
