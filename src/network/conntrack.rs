//! Forgetting tracked UDP flows to host ports.
//!
//! Destination NAT is decided by the first packet of a flow, and a UDP flow lasts as long as packets come. A client that
//! sent to a host port before its Pod had it, or to the Pod that had it before, would stay with that decision for ever.
//! (TCP and SCTP clients connect anew.)

use std::collections::HashSet;
use std::net::IpAddr;

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_DUMP, NlaBuffer, NlasIterator};

use super::netlink::{NetlinkError, NetlinkSocket, Request};

/// `NETLINK_NETFILTER`.
const PROTOCOL: isize = 12;
/// `NFNL_SUBSYS_CTNETLINK` in the high byte, `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE` in the low one.
const GET: u16 = 0x0101;
const DELETE: u16 = 0x0102;
/// Length of `struct nfgenmsg`, whose first byte is the address family.
const HEADER: usize = 4;
const UDP: u8 = 17;
/// Flows that are forgotten with one message to the kernel.
const BATCH: usize = 256;

const TUPLE_ORIGINAL: u16 = 1;
const ZONE: u16 = 18;
const TUPLE_ADDRESSES: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const DESTINATION_V4: u16 = 2;
const DESTINATION_V6: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const DESTINATION_PORT: u16 = 3;

/// Forgets UDP flows to `ports` of the node's own `addresses`, in the calling thread's network namespace.
pub fn forget_udp(addresses: &HashSet<IpAddr>, ports: &HashSet<u16>) -> Result<(), NetlinkError> {
    let mut deletions = Vec::new();
    // A dump of a busy node's flows is large: look at each and keep only what is to be deleted.
    NetlinkSocket::open(PROTOCOL)?.visit(Request::new(GET, NLM_F_DUMP, vec![0; HEADER]), |body| {
        if destination(body).is_some_and(|(address, port)| addresses.contains(&address) && ports.contains(&port)) {
            deletions.push(deletion(body));
        }
    })?;
    let mut socket = NetlinkSocket::open(PROTOCOL)?;
    for batch in deletions.chunks(BATCH) {
        match socket.execute(batch) {
            // Some ended by themselves meanwhile.
            Err(error) if error.errno() == Some(Errno::ENOENT) => {}
            other => other?,
        }
    }
    Ok(())
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    let attribute = attributes(bytes).find(|attribute| attribute.kind() == kind)?;
    attribute.into_inner().get(4..usize::from(attribute.length()))
}

/// Where the first packet of a UDP flow was sent to.
fn destination(body: &[u8]) -> Option<(IpAddr, u16)> {
    let tuple = find(body.get(HEADER..)?, TUPLE_ORIGINAL)?;
    let (addresses, protocol) = (find(tuple, TUPLE_ADDRESSES)?, find(tuple, TUPLE_PROTOCOL)?);
    if find(protocol, PROTOCOL_NUMBER)? != [UDP] {
        return None;
    }
    let port = u16::from_be_bytes(*find(protocol, DESTINATION_PORT)?.first_chunk()?);
    let v4 = || Some(IpAddr::from(*find(addresses, DESTINATION_V4)?.first_chunk::<4>()?));
    let v6 = || Some(IpAddr::from(*find(addresses, DESTINATION_V6)?.first_chunk::<16>()?));
    Some((v4().or_else(v6)?, port))
}

/// The request to delete the flow of a dumped message: the same family, tuple and zone.
fn deletion(body: &[u8]) -> Request {
    let mut request = body.get(..HEADER).unwrap_or_default().to_vec();
    for attribute in attributes(body.get(HEADER..).unwrap_or_default()) {
        if matches!(attribute.kind(), TUPLE_ORIGINAL | ZONE) {
            let bytes = attribute.into_inner();
            request.extend_from_slice(bytes.get(..usize::from(attribute.length())).unwrap_or_default());
            request.resize(request.len().next_multiple_of(4), 0);
        }
    }
    Request::new(DELETE, 0, request).acknowledged()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hostile_messages_do_not_panic(body in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (destination(&body), deletion(&body));
        }
    }
}
