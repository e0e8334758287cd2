//! One control connection: bounded buffers in both directions, and the descriptors that wait for their frame.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::protocol::{MAX_FDS, Message, Request, complete, encode};

/// Unsent bytes after which a peer that does not read is dropped.
const MAX_UNSENT: usize = 4 << 20;

/// A frame to send with its descriptor.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
}

/// An accepted peer.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) token: u64,
    pub(super) subscribed: bool,
    incoming: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    outgoing: VecDeque<Outgoing>,
    pub(super) wants_write: bool,
}

impl Connection {
    /// Takes a peer if it is root or our own user.
    pub(super) fn accept(stream: UnixStream, token: u64) -> io::Result<Connection> {
        let peer = getsockopt(&stream, PeerCredentials)?;
        if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("uid {} may not connect", peer.uid())));
        }
        stream.set_nonblocking(true)?;
        Ok(Connection {
            stream,
            token,
            subscribed: false,
            incoming: Vec::new(),
            fds: VecDeque::new(),
            outgoing: VecDeque::new(),
            wants_write: false,
        })
    }

    /// Reads what is there. The error ends the connection; end of file is `UnexpectedEof`.
    pub(super) fn read(&mut self) -> io::Result<Vec<(Request, Vec<OwnedFd>)>> {
        let mut chunk = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if self.fds.len() > MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors without a frame"));
        }
        self.incoming.extend_from_slice(&chunk[..received]);
        self.frames()
    }

    fn frames(&mut self) -> io::Result<Vec<(Request, Vec<OwnedFd>)>> {
        let invalid = |error: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let mut requests = Vec::new();
        let mut at = 0;
        while let Some(len) = complete(&self.incoming[at..]).map_err(|e| invalid(&e))? {
            let body = &self.incoming[at + 4..at + 4 + len];
            let request: Request = serde_json::from_slice(body).map_err(|e| invalid(&e))?;
            if request.fds > self.fds.len() {
                return Err(invalid(&format!("{} descriptors announced, {} came", request.fds, self.fds.len())));
            }
            let fds = self.fds.drain(..request.fds).collect();
            requests.push((request, fds));
            at += 4 + len;
        }
        self.incoming.drain(..at);
        if self.incoming.is_empty() {
            self.incoming = Vec::new();
        }
        Ok(requests)
    }

    /// Queues a message and sends what the socket takes. An error ends the connection.
    pub(super) fn send(&mut self, message: &Message, fd: Option<OwnedFd>) -> io::Result<()> {
        let bytes = encode(message).map_err(io::Error::other)?;
        self.outgoing.push_back(Outgoing { bytes, sent: 0, fd });
        self.flush()
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(frame) = self.outgoing.front_mut() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fd = frame.fd.as_ref().map(AsFd::as_fd);
            if let Some(fd) = &fd {
                control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
            }
            let rest = [IoSlice::new(&frame.bytes[frame.sent..])];
            match sendmsg(&self.stream, &rest, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => {
                    frame.sent += sent;
                    frame.fd = None; // went with the first byte
                    if frame.sent == frame.bytes.len() {
                        self.outgoing.pop_front();
                    }
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.outgoing.iter().map(|frame| frame.bytes.len()).sum::<usize>() > MAX_UNSENT {
            return Err(io::Error::other("the peer does not read"));
        }
        Ok(())
    }

    /// Whether bytes wait for the socket.
    pub(super) fn has_unsent(&self) -> bool {
        !self.outgoing.is_empty()
    }
}
