//! nftables through nfnetlink: transactions of tables, chains, sets, rules and set elements.
//!
//! Only what the node's own table needs. The encoding follows the kernel's `include/uapi/linux/netfilter/nf_tables.h`
//! and the field order that the `nft` tool shows with `--debug=netlink`; `nft list table` reads everything back.

mod attributes;
pub mod expression;

use attributes::Attributes;
pub use expression::Expression;
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE};

use super::netlink::{NetlinkError, NetlinkSocket, Request};

/// `NETLINK_NETFILTER`.
const PROTOCOL: isize = 12;
/// `NFNL_SUBSYS_NFTABLES`, the high byte of every message type.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFPROTO_INET`: one table for IPv4 and IPv6.
const FAMILY_INET: u8 = 1;
/// Elements in one message, so that the nested attribute stays far below its limit of 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 256;

const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const DELETE_ELEMENTS: u16 = 14;

const SET_IS_MAP: u32 = 8;

/// Where the kernel calls a base chain.
#[derive(Debug, Clone, Copy)]
pub struct Hook {
    /// `nat` or `filter`.
    pub kind: &'static str,
    /// The point in the packet's way.
    pub point: HookPoint,
    /// Chains of one point run in ascending order.
    pub priority: i32,
}

/// Points in a packet's way (`enum nf_inet_hooks`).
#[derive(Debug, Clone, Copy)]
pub enum HookPoint {
    /// Received, before routing.
    Prerouting = 0,
    /// Sent by a process of the node.
    Output = 3,
    /// About to leave, after routing.
    Postrouting = 4,
}

/// Type of (a part of) a set's key or value; the number is only for the `nft` tool to print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataType {
    Ipv4Address,
    Ipv6Address,
    Protocol,
    Port,
}

impl DataType {
    fn number(self) -> u32 {
        match self {
            Self::Ipv4Address => 7,
            Self::Ipv6Address => 8,
            Self::Protocol => 12,
            Self::Port => 13,
        }
    }

    /// Bytes in registers, where every part of a concatenation starts at a multiple of four.
    fn length(self) -> u32 {
        match self {
            Self::Ipv6Address => 16,
            Self::Ipv4Address | Self::Protocol | Self::Port => 4,
        }
    }

    /// Number of a concatenation, six bits for each part.
    fn concatenation(parts: &[Self]) -> u32 {
        parts.iter().fold(0, |number, part| number << 6 | part.number())
    }

    fn total_length(parts: &[Self]) -> u32 {
        parts.iter().map(|part| part.length()).sum()
    }
}

/// A set, or a map when it has `data`.
#[derive(Debug, Clone, Copy)]
pub struct Set {
    pub name: &'static str,
    pub key: &'static [DataType],
    pub data: &'static [DataType],
}

/// A key of a set and, in a map, its value: parts padded to four bytes each (see [`pad`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    pub key: Vec<u8>,
    pub data: Vec<u8>,
}

/// Appends one part of a concatenation.
pub fn pad(into: &mut Vec<u8>, part: &[u8]) {
    into.extend_from_slice(part);
    into.resize(into.len().next_multiple_of(4), 0);
}

/// Changes to one table that take effect together or not at all.
#[derive(Debug)]
pub struct Transaction {
    table: String,
    requests: Vec<Request>,
    sets: u32,
}

impl Transaction {
    /// An empty transaction on the table `inet <table>`.
    pub fn new(table: &str) -> Self {
        Self { table: table.to_owned(), requests: vec![marker(BATCH_BEGIN)], sets: 0 }
    }

    /// Creates the table, empty: what it held before is gone.
    pub fn replace_table(&mut self) {
        // Deleting needs it to exist; creating is harmless when it does.
        for (kind, flags) in [(NEW_TABLE, NLM_F_CREATE), (DELETE_TABLE, 0), (NEW_TABLE, NLM_F_CREATE)] {
            let mut table = Attributes::default();
            table.string(1, &self.table);
            self.push(kind, flags, table);
        }
    }

    /// Deletes the table, which may be missing.
    pub fn remove_table(&mut self) {
        for (kind, flags) in [(NEW_TABLE, NLM_F_CREATE), (DELETE_TABLE, 0)] {
            let mut table = Attributes::default();
            table.string(1, &self.table);
            self.push(kind, flags, table);
        }
    }

    /// Adds a chain; without a hook it is only jumped to.
    pub fn add_chain(&mut self, name: &str, hook: Option<Hook>) {
        let mut chain = Attributes::default();
        chain.string(1, &self.table);
        chain.string(3, name);
        if let Some(hook) = hook {
            chain.nest(4, |attributes| {
                attributes.number(1, hook.point as u32);
                attributes.number(2, hook.priority.cast_unsigned());
            });
            chain.string(7, hook.kind);
        }
        self.push(NEW_CHAIN, NLM_F_CREATE, chain);
    }

    /// Adds a set.
    pub fn add_set(&mut self, set: &Set) {
        self.sets += 1;
        let mut attributes = Attributes::default();
        attributes.string(1, &self.table);
        attributes.string(2, set.name);
        attributes.number(3, if set.data.is_empty() { 0 } else { SET_IS_MAP });
        attributes.number(4, DataType::concatenation(set.key));
        attributes.number(5, DataType::total_length(set.key));
        if !set.data.is_empty() {
            attributes.number(6, DataType::concatenation(set.data));
            attributes.number(7, DataType::total_length(set.data));
        }
        attributes.number(10, self.sets);
        self.push(NEW_SET, NLM_F_CREATE, attributes);
    }

    /// Adds a rule at the end of a chain.
    pub fn add_rule(&mut self, chain: &str, expressions: &[Expression<'_>]) {
        let mut rule = Attributes::default();
        rule.string(1, &self.table);
        rule.string(2, chain);
        rule.nest(4, |list| {
            for expression in expressions {
                list.nest(1, |attributes| expression.encode(attributes));
            }
        });
        self.push(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, rule);
    }

    /// Adds elements to a set; one that is there with the same value is no error.
    pub fn add_elements(&mut self, set: &Set, elements: &[Element]) {
        self.elements(NEW_ELEMENTS, NLM_F_CREATE, set, elements);
    }

    /// Deletes elements; one that is missing fails the transaction with `ENOENT`.
    pub fn delete_elements(&mut self, set: &Set, elements: &[Element]) {
        self.elements(DELETE_ELEMENTS, 0, set, elements);
    }

    fn elements(&mut self, kind: u16, flags: u16, set: &Set, elements: &[Element]) {
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let mut message = Attributes::default();
            message.string(1, &self.table);
            message.string(2, set.name);
            message.nest(3, |list| {
                for element in chunk {
                    list.nest(1, |attributes| {
                        attributes.nest(1, |key| key.bytes(1, &element.key));
                        if !element.data.is_empty() {
                            attributes.nest(2, |data| data.bytes(1, &element.data));
                        }
                    });
                }
            });
            self.push(kind, flags, message);
        }
    }

    fn push(&mut self, kind: u16, flags: u16, attributes: Attributes) {
        let mut body = vec![FAMILY_INET, 0, 0, 0];
        body.extend_from_slice(attributes.as_bytes());
        self.requests.push(Request::new(SUBSYSTEM << 8 | kind, flags, body));
    }

    /// The messages to send; only the last change is acknowledged, refusals are always reported.
    fn into_requests(mut self) -> Vec<Request> {
        if self.requests.len() == 1 {
            return Vec::new();
        }
        if let Some(last) = self.requests.pop() {
            self.requests.push(last.acknowledged());
        }
        self.requests.push(marker(BATCH_END));
        self.requests
    }
}

fn marker(kind: u16) -> Request {
    let mut body = vec![0, 0];
    body.extend_from_slice(&SUBSYSTEM.to_be_bytes());
    Request::new(kind, 0, body)
}

/// nftables in the network namespace of the thread that opened it.
pub struct Nftables {
    socket: NetlinkSocket,
}

impl Nftables {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: NetlinkSocket::open(PROTOCOL)? })
    }

    /// Carries a transaction out.
    pub fn commit(&mut self, transaction: Transaction) -> Result<(), NetlinkError> {
        self.socket.execute(&transaction.into_requests())
    }
}
