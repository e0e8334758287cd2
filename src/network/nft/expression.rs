//! Expressions, the instructions of nftables rules: each loads, tests or acts.

use std::net::IpAddr;

use ipnet::IpNet;

use super::attributes::Attributes;

/// A 32-bit data register. Longer values occupy the registers after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register(u8);

impl Register {
    /// The register number `index`, 0 to 15.
    pub const fn new(index: u8) -> Self {
        assert!(index < 16, "nftables has 16 registers of 32 bits");
        Self(index)
    }

    /// `NFT_REG32_00` is 8.
    fn number(self) -> u32 {
        u32::from(self.0) + 8
    }
}

/// The IP family of a packet or address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }
}

/// A property of a packet that is not in its bytes (`enum nft_meta_keys`).
#[derive(Debug, Clone, Copy)]
pub enum Meta {
    InputInterface = 6,
    OutputInterface = 7,
    Family = 15,
    Protocol = 16,
}

/// A field of a packet.
#[derive(Debug, Clone, Copy)]
pub enum Field {
    Source(Family),
    Destination(Family),
    /// Of TCP, UDP and SCTP.
    DestinationPort,
}

impl Field {
    /// Header (1 network, 2 transport), offset and length.
    fn place(self) -> (u32, u32, u32) {
        match self {
            Self::Source(Family::V4) => (1, 12, 4),
            Self::Destination(Family::V4) => (1, 16, 4),
            Self::Source(Family::V6) => (1, 8, 16),
            Self::Destination(Family::V6) => (1, 24, 16),
            Self::DestinationPort => (2, 2, 2),
        }
    }
}

/// Where a rule sends the packet.
#[derive(Debug, Clone, Copy)]
pub enum Verdict<'a> {
    Drop,
    Return,
    Jump(&'a str),
}

/// One expression.
#[derive(Debug, Clone)]
pub enum Expression<'a> {
    /// Loads a property.
    Meta(Meta, Register),
    /// Loads a field.
    Payload(Field, Register),
    /// Keeps the bits of `mask`.
    Mask(Register, Vec<u8>),
    /// Goes on if the register holds the value.
    Equal(Register, Vec<u8>),
    /// Goes on if the set has the key; in a map, loads the value.
    Lookup { set: &'a str, key: Register, value: Option<Register> },
    /// Loads the kind of the destination address (`RTN_LOCAL`, ...).
    DestinationKind(Register),
    /// Rewrites destination address and port.
    DestinationNat { family: Family, address: Register, port: Register },
    /// Rewrites the source to an address of the outgoing interface.
    Masquerade,
    /// Ends the rule.
    Verdict(Verdict<'a>),
}

const COMPARE_EQUAL: u32 = 0;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`: without it many Pods that ask one DNS server at once collide in the choice of a
/// port and lose packets.
const RANDOM_PORT: u32 = 16;
const FIB_DESTINATION: u32 = 2;
const FIB_RESULT_ADDRESS_KIND: u32 = 3;
const NAT_DESTINATION: u32 = 1;
/// Kind of an address of the node itself (`RTN_LOCAL`), as the fib expression loads it.
const ADDRESS_IS_LOCAL: u32 = 2;

impl Expression<'_> {
    /// The attributes of one `NFTA_LIST_ELEM`.
    pub fn encode(&self, into: &mut Attributes) {
        let mut put = |name: &str, fill: &dyn Fn(&mut Attributes)| {
            into.string(1, name);
            into.nest(2, fill);
        };
        match self {
            Self::Meta(key, register) => put("meta", &|meta| {
                meta.number(2, *key as u32);
                meta.number(1, register.number());
            }),
            Self::Payload(field, register) => put("payload", &|payload| {
                let (header, offset, length) = field.place();
                payload.number(1, register.number());
                payload.number(2, header);
                payload.number(3, offset);
                payload.number(4, length);
            }),
            Self::Mask(register, mask) => put("bitwise", &|bitwise| {
                bitwise.number(1, register.number());
                bitwise.number(2, register.number());
                bitwise.number(3, u32::try_from(mask.len()).unwrap_or_default());
                bitwise.nest(4, |data| data.bytes(1, mask));
                bitwise.nest(5, |data| data.bytes(1, &vec![0; mask.len()]));
            }),
            Self::Equal(register, value) => put("cmp", &|compare| {
                compare.number(1, register.number());
                compare.number(2, COMPARE_EQUAL);
                compare.nest(3, |data| data.bytes(1, value));
            }),
            Self::Lookup { set, key, value } => put("lookup", &|lookup| {
                lookup.string(1, set);
                lookup.number(2, key.number());
                if let Some(value) = value {
                    lookup.number(3, value.number());
                }
            }),
            Self::DestinationKind(register) => put("fib", &|fib| {
                fib.number(1, register.number());
                fib.number(2, FIB_RESULT_ADDRESS_KIND);
                fib.number(3, FIB_DESTINATION);
            }),
            Self::DestinationNat { family, address, port } => put("nat", &|nat| {
                nat.number(1, NAT_DESTINATION);
                nat.number(2, u32::from(family.number()));
                nat.number(3, address.number());
                nat.number(5, port.number());
            }),
            Self::Masquerade => put("masq", &|masquerade| masquerade.number(1, RANDOM_PORT)),
            Self::Verdict(verdict) => put("immediate", &|immediate| {
                // Register 0 is the verdict.
                immediate.number(1, 0);
                immediate.nest(2, |data| data.nest(2, |attributes| verdict.encode(attributes)));
            }),
        }
    }
}

impl Verdict<'_> {
    fn encode(self, into: &mut Attributes) {
        // NF_DROP, NFT_RETURN, NFT_JUMP.
        let code: i32 = match self {
            Self::Drop => 0,
            Self::Return => -5,
            Self::Jump(_) => -3,
        };
        into.number(1, code.cast_unsigned());
        if let Self::Jump(chain) = self {
            into.string(2, chain);
        }
    }
}

const SCRATCH: Register = Register::new(0);

/// Only packets of this family.
pub fn family_is(family: Family) -> Vec<Expression<'static>> {
    vec![Expression::Meta(Meta::Family, SCRATCH), Expression::Equal(SCRATCH, vec![family.number()])]
}

/// Only packets that use this interface.
pub fn interface_is(which: Meta, name: &str) -> Vec<Expression<'static>> {
    const IFNAMSIZ: usize = 16;
    let mut padded = name.as_bytes().to_vec();
    padded.resize(IFNAMSIZ, 0);
    vec![Expression::Meta(which, SCRATCH), Expression::Equal(SCRATCH, padded)]
}

/// Only packets to an address of the node itself.
pub fn destination_is_local() -> Vec<Expression<'static>> {
    let local = ADDRESS_IS_LOCAL.to_ne_bytes().to_vec();
    vec![Expression::DestinationKind(SCRATCH), Expression::Equal(SCRATCH, local)]
}

/// Only packets of the network's family with a source in it.
pub fn source_in(net: IpNet) -> Vec<Expression<'static>> {
    address_in(Field::Source(Family::of(net.addr())), net)
}

/// Only packets of the network's family with a destination in it.
pub fn destination_in(net: IpNet) -> Vec<Expression<'static>> {
    address_in(Field::Destination(Family::of(net.addr())), net)
}

fn address_in(field: Field, net: IpNet) -> Vec<Expression<'static>> {
    let mut expressions = family_is(Family::of(net.addr()));
    expressions.push(Expression::Payload(field, SCRATCH));
    if net.prefix_len() < net.max_prefix_len() {
        expressions.push(Expression::Mask(SCRATCH, octets(net.netmask())));
    }
    expressions.push(Expression::Equal(SCRATCH, octets(net.network())));
    expressions
}

/// The bytes of an address in network byte order.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
