//! Blocking exchanges with the kernel over one netlink socket: batches of requests and dumps.
//!
//! A namespace is set up on a thread that has entered it and then ends, so nothing here is async: the kernel
//! answers netlink requests inside the `send` call, and many requests travel in one datagram.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkSerializable, NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::net::sockopt;

/// Length of `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// Flag of an error message that carries extended acknowledgement attributes (`NLM_F_ACK_TLVS`).
const ACK_TLVS: u16 = 0x200;
/// Flag of an error message that does not repeat the request (`NLM_F_CAPPED`).
const CAPPED: u16 = 0x100;
/// Extended acknowledgement attribute with a human-readable reason (`NLMSGERR_ATTR_MSG`).
const ERROR_ATTR_MESSAGE: u16 = 1;
/// The kernel answers within the system call; only a bug makes a reply wait. Never hang on one.
const REPLY_DEADLINE: Duration = Duration::from_secs(10);
/// Large enough for one datagram of any dump (the kernel fills at most 32 KiB per datagram).
const RECEIVE_BUFFER: usize = 64 * 1024;
/// Socket buffer for a batch that carries the whole rule set.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;

/// Why a netlink exchange failed.
///
/// `Refused` is the kernel's verdict on one request: its `errno` says whether a retry helps (`EBUSY`, `EAGAIN`,
/// `ENOBUFS`, `ENOMEM` are transient). `Socket` and `Malformed` leave the outcome unknown; callers repeat their
/// (idempotent) operation.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be made, written or read.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused request number `index` of the batch.
    #[error("{}{}{detail}", .errno.desc(), if .detail.is_empty() { "" } else { ": " })]
    Refused {
        /// Position in the batch.
        index: usize,
        /// The kernel's error.
        errno: Errno,
        /// The kernel's own explanation; often empty.
        detail: String,
    },
    /// A reply that does not follow the protocol.
    #[error("the kernel sent a malformed netlink message ({0})")]
    Malformed(&'static str),
}

impl NetlinkError {
    /// The kernel's error when it refused a request.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Socket(_) | Self::Malformed(_) => None,
        }
    }
}

/// One request of a batch, without the sequence number that [`NetlinkSocket`] gives it.
#[derive(Debug, Clone)]
pub struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// A request of message type `kind`; `NLM_F_REQUEST` is implied.
    pub fn new(kind: u16, flags: u16, body: Vec<u8>) -> Self {
        Self { kind, flags: flags | NLM_F_REQUEST, body }
    }

    /// A routing request that wants an acknowledgement.
    pub fn route(message: &RouteNetlinkMessage, flags: u16) -> Self {
        let mut body = vec![0; NetlinkSerializable::buffer_len(message)];
        NetlinkSerializable::serialize(message, &mut body);
        Self::new(NetlinkSerializable::message_type(message), flags | NLM_F_ACK, body)
    }

    /// Asks for an acknowledgement.
    pub fn acknowledged(mut self) -> Self {
        self.flags |= NLM_F_ACK;
        self
    }

    fn emit(&self, sequence: u32, out: &mut Vec<u8>) -> Result<(), NetlinkError> {
        let length = u32::try_from(HEADER_LEN + self.body.len())
            .map_err(|_| NetlinkError::Socket(io::Error::other("netlink request longer than 4 GiB")))?;
        out.extend_from_slice(&length.to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&self.flags.to_ne_bytes());
        out.extend_from_slice(&sequence.to_ne_bytes());
        out.extend_from_slice(&0u32.to_ne_bytes());
        out.extend_from_slice(&self.body);
        out.resize(out.len().next_multiple_of(4), 0);
        Ok(())
    }
}

/// The body of a message from the kernel: everything after the netlink header.
pub type Reply = Vec<u8>;

/// A netlink socket; it belongs to the network namespace of the thread that opened it, for ever.
#[derive(Debug)]
pub struct NetlinkSocket {
    socket: Socket,
    sequence: u32,
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl NetlinkSocket {
    /// Opens a socket of a netlink `protocol` (`NETLINK_ROUTE`, `NETLINK_NETFILTER`) in the calling thread's
    /// network namespace.
    pub fn open(protocol: isize) -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        // Do not repeat whole requests in errors: a refused batch would overflow the receive buffer.
        socket.set_cap_ack(true)?;
        let deadline = Some(REPLY_DEADLINE);
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, deadline).map_err(io::Error::from)?;
        // FORCE needs CAP_NET_ADMIN in the initial user namespace; the plain option is capped by wmem_max.
        if sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
            sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER).map_err(io::Error::from)?;
        }
        if sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER).map_err(io::Error::from)?;
        }
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends all `requests` in one datagram and waits for every acknowledgement they ask for.
    ///
    /// The error is that of the first request that was refused. Routing requests after it were still carried out;
    /// a netfilter batch is all or nothing.
    pub fn execute(&mut self, requests: &[Request]) -> Result<(), NetlinkError> {
        let Some(first) = self.send(requests)? else { return Ok(()) };
        let mut outstanding = requests.iter().filter(|request| request.flags & NLM_F_ACK != 0).count();
        let mut refused: Option<(usize, Errno, String)> = None;
        while outstanding > 0 {
            let datagram = self.receive()?;
            for message in messages(&datagram) {
                let message = message?;
                let Ok(index) = usize::try_from(message.sequence.wrapping_sub(first)) else { continue };
                // A late reply to an exchange that was given up.
                let Some(request) = requests.get(index) else { continue };
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                let errno = message.error_code()?;
                if errno != 0 && refused.as_ref().is_none_or(|(earlier, ..)| index < *earlier) {
                    refused = Some((index, Errno::from_raw(errno), message.error_detail()));
                }
                if request.flags & NLM_F_ACK != 0 {
                    outstanding = outstanding.saturating_sub(1);
                } else if index == 0 && errno != 0 {
                    // The batch as a whole was refused: no request of it will be answered.
                    outstanding = 0;
                }
            }
        }
        match refused {
            None => Ok(()),
            Some((index, errno, detail)) => Err(NetlinkError::Refused { index, errno, detail }),
        }
    }

    /// Asks for one object; the answer is one message or the kernel's refusal.
    pub fn get(&mut self, message: &RouteNetlinkMessage) -> Result<Reply, NetlinkError> {
        let mut reply = None;
        self.query(&unacknowledged(message, 0), false, |body| reply = Some(body.to_vec()))?;
        reply.ok_or(NetlinkError::Malformed("no reply"))
    }

    /// Asks for all objects of a kind.
    pub fn dump(&mut self, message: &RouteNetlinkMessage) -> Result<Vec<Reply>, NetlinkError> {
        let mut replies = Vec::new();
        self.query(&unacknowledged(message, NLM_F_DUMP), true, |body| replies.push(body.to_vec()))?;
        Ok(replies)
    }

    /// Passes the body of every message of a dump to `each`.
    pub fn visit(&mut self, request: Request, each: impl FnMut(&[u8])) -> Result<(), NetlinkError> {
        self.query(&request, true, each)
    }

    fn query(&mut self, request: &Request, dump: bool, mut each: impl FnMut(&[u8])) -> Result<(), NetlinkError> {
        let Some(sequence) = self.send(std::slice::from_ref(request))? else { return Ok(()) };
        loop {
            let datagram = self.receive()?;
            for message in messages(&datagram) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let errno = Errno::from_raw(message.error_code()?);
                        return Err(NetlinkError::Refused { index: 0, errno, detail: message.error_detail() });
                    }
                    _ => each(message.body),
                }
                if !dump {
                    return Ok(());
                }
            }
        }
    }

    /// Returns the sequence number of the first request, none when there is nothing to send.
    fn send(&mut self, requests: &[Request]) -> Result<Option<u32>, NetlinkError> {
        if requests.is_empty() {
            return Ok(None);
        }
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::with_capacity(requests.iter().map(|request| request.body.len() + 32).sum());
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            request.emit(self.sequence, &mut datagram)?;
        }
        self.socket.send(&datagram, 0)?;
        Ok(Some(first))
    }

    fn receive(&self) -> Result<Vec<u8>, NetlinkError> {
        let mut datagram = Vec::with_capacity(RECEIVE_BUFFER);
        loop {
            match self.socket.recv(&mut datagram, 0) {
                Ok(_) => return Ok(datagram),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let text = format!("no reply from the kernel within {} s", REPLY_DEADLINE.as_secs());
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn unacknowledged(message: &RouteNetlinkMessage, flags: u16) -> Request {
    let mut request = Request::route(message, flags);
    request.flags &= !NLM_F_ACK;
    request
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Message<'_> {
    /// `errno` of an `NLMSG_ERROR`, zero for an acknowledgement.
    fn error_code(&self) -> Result<i32, NetlinkError> {
        let code = self.body.first_chunk::<4>().ok_or(NetlinkError::Malformed("error message too short"))?;
        Ok(i32::from_ne_bytes(*code).wrapping_neg())
    }

    fn error_detail(&self) -> String {
        if self.flags & ACK_TLVS == 0 {
            return String::new();
        }
        // The code, then the request's header, then the request itself unless it was capped, then attributes.
        let Some(length) = self.body.get(4..8).and_then(|bytes| bytes.first_chunk::<4>()) else {
            return String::new();
        };
        let request = match self.flags & CAPPED {
            0 => usize::try_from(u32::from_ne_bytes(*length)).unwrap_or(usize::MAX),
            _ => HEADER_LEN,
        };
        let attributes = self.body.get(4usize.saturating_add(request)..).unwrap_or_default();
        NlasIterator::new(attributes)
            .filter_map(Result::ok)
            .find(|attribute| attribute.kind() == ERROR_ATTR_MESSAGE)
            .map(|attribute| text(attribute.value()))
            .unwrap_or_default()
    }
}

/// A NUL-terminated string attribute.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Splits a datagram into messages; an inconsistent length ends it with an error, never with a panic.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, NetlinkError>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let message = split_message(&mut datagram);
        if message.is_err() {
            datagram = &[];
        }
        Some(message)
    })
}

fn split_message<'a>(datagram: &mut &'a [u8]) -> Result<Message<'a>, NetlinkError> {
    let Some(header) = datagram.first_chunk::<HEADER_LEN>() else {
        return Err(NetlinkError::Malformed("truncated header"));
    };
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let length = usize::try_from(word(0)).unwrap_or(usize::MAX);
    if length < HEADER_LEN || length > datagram.len() {
        return Err(NetlinkError::Malformed("length field out of range"));
    }
    let message = Message { kind: half(4), flags: half(6), sequence: word(8), body: &datagram[HEADER_LEN..length] };
    *datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_padded_and_numbered() {
        let mut out = Vec::new();
        Request::new(7, NLM_F_ACK, vec![1, 2, 3]).emit(9, &mut out).unwrap();
        assert_eq!(out.len(), 20);
        let mut rest: &[u8] = &out;
        let message = split_message(&mut rest).unwrap();
        assert_eq!((message.kind, message.sequence, message.body), (7, 9, &[1u8, 2, 3][..]));
        assert_eq!(message.flags, NLM_F_ACK | NLM_F_REQUEST);
        assert!(rest.is_empty());
    }

    #[test]
    fn the_kernels_explanation_is_found_behind_the_request() {
        let mut body = (-95i32).to_ne_bytes().to_vec();
        body.extend_from_slice(&16u32.to_ne_bytes());
        body.extend_from_slice(&[0; 12]);
        body.extend_from_slice(&[9, 0, 1, 0]);
        body.extend_from_slice(b"nope\0\0\0\0");
        let message = Message { kind: NLMSG_ERROR, flags: ACK_TLVS, sequence: 0, body: &body };
        assert_eq!(message.error_code().unwrap(), 95);
        assert_eq!(message.error_detail(), "nope");
    }

    proptest! {
        #[test]
        fn hostile_datagrams_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes).flatten() {
                let _ = (message.error_code(), message.error_detail());
            }
        }
    }
}
