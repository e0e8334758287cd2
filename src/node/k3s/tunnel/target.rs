//! What the tunnel leads to: this node's own port, and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Our HTTPS port, where the server may be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// `address` of KubeletConfiguration.
    pub(super) address: IpAddr,
    /// `port` of KubeletConfiguration.
    pub(super) port: u16,
}

impl Target {
    /// Where to connect for what a server asks for: it knows our port by the loopback address, whatever address it is
    /// really on (k3s `isKubeletOrStreamPort`, `dialContext`).
    pub(super) fn resolve(&self, protocol: &str, address: &str) -> Option<SocketAddr> {
        let asked: SocketAddr = match address.strip_prefix("localhost:") {
            Some(port) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port.parse().ok()?),
            None => address.parse().ok()?,
        };
        if protocol != "tcp" || asked.port() != self.port || !asked.ip().is_loopback() {
            return None;
        }
        let host = match self.address {
            IpAddr::V4(any) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(any) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            bound => bound,
        };
        Some(SocketAddr::new(host, self.port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_port_and_nothing_else() {
        let target = Target { address: Ipv4Addr::UNSPECIFIED.into(), port: 10250 };
        let local = "127.0.0.1:10250".parse().ok();
        for address in ["127.0.0.1:10250", "[::1]:10250", "localhost:10250"] {
            assert_eq!(target.resolve("tcp", address), local, "{address}");
        }
        for (protocol, address) in [
            ("tcp", "127.0.0.1:10255"),
            ("tcp", "127.0.0.1:22"),
            ("tcp", "10.0.0.1:10250"),
            ("tcp", "169.254.169.254:10250"),
            ("tcp", "example.com:10250"),
            ("tcp", "localhost"),
            ("udp", "127.0.0.1:10250"),
            ("unix", "127.0.0.1:10250"),
            ("tcp", ""),
        ] {
            assert_eq!(target.resolve(protocol, address), None, "{protocol}/{address}");
        }
        let bound = Target { address: "192.0.2.7".parse().unwrap(), port: 10250 };
        assert_eq!(bound.resolve("tcp", "127.0.0.1:10250"), "192.0.2.7:10250".parse().ok());
    }
}
