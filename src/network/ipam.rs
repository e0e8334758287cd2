//! Pod addresses: which addresses of a podCIDR may be given out, and the round-robin choice among them.
//!
//! Who holds an address is recorded in the Pods' own records ([`super::record`]); this is the view of them in
//! memory. Addresses are handed out in ascending order and wrap around, so that one that was just released is the
//! last to be used again and stale caches elsewhere in the cluster have time to expire.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Why a podCIDR cannot be used. Terminal until the Node object changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// No room for a gateway and one Pod.
    #[error("podCIDR {0} has no room for a gateway and a Pod: use a /30 (IPv4), a /126 (IPv6) or larger")]
    TooSmall(IpNet),
    /// Kubernetes allows one podCIDR for each IP family (`validation.go`, `ValidateNodeSpec`).
    #[error("podCIDRs {0} and {1} are of the same IP family: a node has at most one for each family")]
    SameFamily(IpNet, IpNet),
}

/// A podCIDR and the gateway its Pods use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    net: IpNet,
}

impl Subnet {
    /// Host bits of `net` are ignored, as in the Node's `spec.podCIDR`.
    pub fn new(net: IpNet) -> Result<Self, CidrError> {
        let net = net.trunc();
        if net.max_prefix_len() - net.prefix_len() < 2 {
            return Err(CidrError::TooSmall(net));
        }
        Ok(Self { net })
    }

    /// The subnets of a Node's `spec.podCIDRs`, in their order: the first family is the Pods' primary one.
    pub fn of_node(cidrs: &[IpNet]) -> Result<Vec<Self>, CidrError> {
        let mut subnets: Vec<Self> = Vec::with_capacity(cidrs.len());
        for cidr in cidrs {
            let subnet = Self::new(*cidr)?;
            if let Some(other) = subnets.iter().find(|other| other.is_ipv6() == subnet.is_ipv6()) {
                return Err(CidrError::SameFamily(other.net, subnet.net));
            }
            subnets.push(subnet);
        }
        Ok(subnets)
    }

    /// The podCIDR.
    pub fn net(&self) -> IpNet {
        self.net
    }

    /// Whether this is an IPv6 subnet.
    pub fn is_ipv6(&self) -> bool {
        matches!(self.net, IpNet::V6(_))
    }

    /// The first address, held by the bridge.
    pub fn gateway(&self) -> IpAddr {
        self.at(1)
    }

    /// How many Pods fit: all addresses but the network's, the gateway's and, with IPv4, the broadcast address.
    pub fn capacity(&self) -> u128 {
        let host_bits = u32::from(self.net.max_prefix_len() - self.net.prefix_len());
        let all = 1u128.checked_shl(host_bits).unwrap_or(u128::MAX);
        all - if self.is_ipv6() { 2 } else { 3 }
    }

    fn at(&self, offset: u128) -> IpAddr {
        match self.net.network() {
            // An offset below 2^32 is ensured by the capacity.
            IpAddr::V4(base) => {
                let offset = u32::try_from(offset).unwrap_or(u32::MAX);
                IpAddr::V4(Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset)))
            }
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(base.to_bits().wrapping_add(offset))),
        }
    }

    fn offset(&self, address: IpAddr) -> Option<u128> {
        match (self.net.network(), address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => address.to_bits().checked_sub(base.to_bits()).map(u128::from),
            (IpAddr::V6(base), IpAddr::V6(address)) => address.to_bits().checked_sub(base.to_bits()),
            _ => None,
        }
    }
}

/// The addresses in use, and where the search for the next one starts.
#[derive(Debug, Default)]
pub struct Pool {
    used: HashSet<IpAddr>,
    /// The last address given out of a subnet.
    last: HashMap<IpNet, IpAddr>,
}

impl Pool {
    /// Takes the next free address, none when all are in use.
    pub fn allocate(&mut self, subnet: &Subnet) -> Option<IpAddr> {
        let capacity = subnet.capacity();
        // Pods have the offsets 2..capacity + 2.
        let start =
            self.last.get(&subnet.net).and_then(|last| subnet.offset(*last)).map_or(0, |last| last.saturating_sub(1));
        // Among used + 1 candidates one is free, if there are as many.
        let attempts = capacity.min(self.used.len() as u128 + 1);
        let address = (0..attempts)
            .map(|step| subnet.at((start + step) % capacity + 2))
            .find(|candidate| !self.used.contains(candidate))?;
        self.reserve(subnet.net, address);
        Some(address)
    }

    /// Marks an address as used; the search continues after it.
    pub fn reserve(&mut self, net: IpNet, address: IpAddr) {
        self.used.insert(address);
        self.last.insert(net, address);
    }

    /// Gives an address back.
    pub fn release(&mut self, address: IpAddr) {
        self.used.remove(&address);
    }

    /// How many addresses of `subnet` are in use.
    pub fn in_use(&self, subnet: &Subnet) -> usize {
        self.used.iter().filter(|address| subnet.net.contains(*address)).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnet(cidr: &str) -> Subnet {
        Subnet::new(cidr.parse().unwrap()).unwrap()
    }

    #[test]
    fn small_subnets_are_used_to_the_last_address() {
        let subnet = subnet("10.1.2.0/29");
        assert_eq!(subnet.gateway(), "10.1.2.1".parse::<IpAddr>().unwrap());
        assert_eq!(subnet.capacity(), 5);
        let mut pool = Pool::default();
        let all: Vec<String> = std::iter::from_fn(|| pool.allocate(&subnet)).map(|ip| ip.to_string()).collect();
        assert_eq!(all, ["10.1.2.2", "10.1.2.3", "10.1.2.4", "10.1.2.5", "10.1.2.6"]);
        assert_eq!(pool.in_use(&subnet), 5);
        pool.release("10.1.2.4".parse().unwrap());
        assert_eq!(pool.allocate(&subnet), Some("10.1.2.4".parse().unwrap()));
        assert_eq!(pool.allocate(&subnet), None);
    }

    #[test]
    fn a_released_address_is_the_last_to_come_again() {
        let subnet = subnet("fd00:1::/125");
        assert_eq!(subnet.capacity(), 6);
        let mut pool = Pool::default();
        let first = pool.allocate(&subnet).unwrap();
        assert_eq!(first, "fd00:1::2".parse::<IpAddr>().unwrap());
        pool.release(first);
        let later: Vec<IpAddr> = (0..6).map(|_| pool.allocate(&subnet).unwrap()).collect();
        assert_eq!(later[5], first);
        assert!(!later[..5].contains(&first));
    }

    #[test]
    fn huge_subnets_do_not_overflow() {
        let subnet = subnet("::/0");
        let mut pool = Pool::default();
        pool.reserve(subnet.net(), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe".parse().unwrap());
        assert!(pool.allocate(&subnet).is_some());
        assert!(pool.allocate(&subnet).is_some());
    }

    #[test]
    fn node_cidrs_are_checked() {
        let parse = |cidrs: &[&str]| Subnet::of_node(&cidrs.iter().map(|c| c.parse().unwrap()).collect::<Vec<_>>());
        assert_eq!(parse(&["10.0.0.9/24", "fd00::/64"]).unwrap()[0].net().to_string(), "10.0.0.0/24");
        assert!(matches!(parse(&["10.0.0.0/31"]), Err(CidrError::TooSmall(_))));
        assert!(matches!(parse(&["10.0.0.0/24", "10.1.0.0/24"]), Err(CidrError::SameFamily(..))));
    }

    proptest! {
        #[test]
        fn never_twice_and_never_outside(prefix in 24u8..=30, operations in proptest::collection::vec(any::<(bool, u8)>(), 1..200)) {
            let subnet = Subnet::new(IpNet::new("172.16.5.0".parse().unwrap(), prefix).unwrap()).unwrap();
            let mut pool = Pool::default();
            let mut held: Vec<IpAddr> = Vec::new();
            for (give_back, which) in operations {
                if give_back && !held.is_empty() {
                    let address = held.swap_remove(usize::from(which) % held.len());
                    pool.release(address);
                } else if let Some(address) = pool.allocate(&subnet) {
                    prop_assert!(!held.contains(&address));
                    prop_assert!(subnet.net().contains(&address));
                    prop_assert!(address != subnet.gateway() && address != subnet.net().network());
                    prop_assert!(address != subnet.net().broadcast());
                    held.push(address);
                } else {
                    prop_assert_eq!(held.len() as u128, subnet.capacity());
                }
            }
        }
    }
}
