//! One connection to a shim: requests in flight by id, events for all.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::Serialize;
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinHandle;

use super::{ShimError, ShimEvent};
use crate::shim::SOCKET_FILE;
use crate::shim::protocol::{Event, MAX_FDS, Message, PROTOCOL_VERSION, Request, complete, encode};

/// Events that a slow receiver may be behind.
const EVENT_BACKLOG: usize = 256;

type Answer = Result<(Value, Vec<OwnedFd>), ShimError>;

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    /// Held while a frame is written: frames of several requests must not mix.
    writing: tokio::sync::Mutex<()>,
    /// `None` once the connection is gone.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    events: broadcast::Sender<ShimEvent>,
    next_id: AtomicU64,
}

/// A connection; its reader ends with it.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Link {
    pub(super) async fn open(pod_dir: &Path) -> Result<Link, ShimError> {
        // A socket's path is at most 108 bytes; through a descriptor of its directory it is always short.
        let dir = File::open(pod_dir).map_err(|_| ShimError::Disconnected)?;
        let path = format!("/proc/self/fd/{}/{SOCKET_FILE}", dir.as_raw_fd());
        let stream = UnixStream::connect(path).await.map_err(|_| ShimError::Disconnected)?;
        let shared = Arc::new(Shared {
            stream,
            writing: tokio::sync::Mutex::default(),
            pending: Mutex::new(Some(HashMap::new())),
            events: broadcast::channel(EVENT_BACKLOG).0,
            next_id: AtomicU64::new(1),
        });
        let reader = tokio::spawn(read(shared.clone()));
        Ok(Link { shared, reader })
    }

    pub(super) fn events(&self) -> broadcast::Receiver<ShimEvent> {
        self.shared.events.subscribe()
    }

    /// Sends a request with its descriptors and waits for the answer.
    pub(super) async fn request<A: Serialize>(
        &self,
        command: &str,
        args: &A,
        fds: Vec<OwnedFd>,
        deadline: Duration,
    ) -> Answer {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let args = serde_json::to_value(args).map_err(|e| ShimError::Invalid(format!("{command}: {e}")))?;
        let request = Request { v: PROTOCOL_VERSION, id, command: command.to_owned(), args, fds: fds.len() };
        let frame = encode(&request).map_err(|e| ShimError::Invalid(format!("{command}: {e}")))?;
        let (sender, receiver) = oneshot::channel();
        self.shared.pending().as_mut().ok_or(ShimError::Disconnected)?.insert(id, sender);
        let _forget = Forget { shared: &self.shared, id };
        let answered = async {
            self.shared.write(&frame, fds).await?;
            receiver.await.map_err(|_| ShimError::Disconnected)?
        };
        tokio::time::timeout(deadline, answered).await.map_err(|_| ShimError::Timeout(command.to_owned()))?
    }
}

/// Removes an unanswered request when its future is dropped.
struct Forget<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.shared.pending().as_mut() {
            pending.remove(&self.id);
        }
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write(&self, frame: &[u8], fds: Vec<OwnedFd>) -> Result<(), ShimError> {
        let guard = self.writing.lock().await;
        let mut unfinished = Unfinished { shared: self, armed: false };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut sent = 0;
        while sent < frame.len() {
            let send = || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if sent == 0 && !borrowed.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&borrowed));
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(sendmsg(&self.stream, &[IoSlice::new(&frame[sent..])], &mut control, flags)?)
            };
            sent += self.stream.async_io(Interest::WRITABLE, send).await.map_err(|_| ShimError::Disconnected)?;
            unfinished.armed = sent < frame.len();
        }
        drop(guard);
        Ok(())
    }

    fn disconnect(&self) {
        if self.pending().take().is_some() {
            // Nobody may be listening.
            let _unheard = self.events.send(ShimEvent::Disconnected);
        }
    }

    fn deliver(&self, message: Message, fds: Vec<OwnedFd>) {
        if let Some(id) = message.id {
            let waiting = self.pending().as_mut().and_then(|pending| pending.remove(&id));
            if let Some(waiting) = waiting {
                let answer = match message.error {
                    Some(error) => Err(error.into()),
                    None => Ok((message.ok.unwrap_or_default(), fds)),
                };
                let _given_up = waiting.send(answer);
            }
        } else if let Some(event) = message.event {
            // A newer shim may have events that we do not know.
            if let Ok(event) = serde_json::from_value::<Event>(event) {
                let _unheard = self.events.send(event.into());
            }
        }
    }
}

/// A frame that was cut off (its future was dropped) leaves the stream without meaning: end it.
struct Unfinished<'a> {
    shared: &'a Shared,
    armed: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.armed {
            let _gone_already = rustix::net::shutdown(&self.shared.stream, rustix::net::Shutdown::Both);
        }
    }
}

async fn read(shared: Arc<Shared>) {
    if let Err(error) = read_frames(&shared).await
        && error.kind() != io::ErrorKind::UnexpectedEof
    {
        tracing::warn!(%error, "connection to a shim ended");
    }
    shared.disconnect();
}

async fn read_frames(shared: &Shared) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut fds = VecDeque::new();
    loop {
        let received = shared
            .stream
            .async_io(Interest::READABLE, || {
                let mut chunk = [0; 16 << 10];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
                let received = recvmsg(&shared.stream, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags)?.bytes;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(more) = message {
                        fds.extend(more);
                    }
                }
                bytes.extend_from_slice(&chunk[..received]);
                Ok(received)
            })
            .await?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut at = 0;
        while let Some(len) = complete(&bytes[at..]).map_err(io::Error::other)? {
            let message: Message = serde_json::from_slice(&bytes[at + 4..at + 4 + len])?;
            let count = message.fds.min(fds.len());
            shared.deliver(message, fds.drain(..count).collect());
            at += 4 + len;
        }
        bytes.drain(..at);
    }
}
