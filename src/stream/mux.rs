//! The two ends of one multiplexed stream, independent of the transport that carries it.
//!
//! A transport (SPDY or WebSocket) is one future that owns the connection. Its read side feeds an
//! [`Inbound`] per stream through [`Feed`]; its write side takes [`Command`]s from every [`Outbound`] through one
//! bounded queue, so frames never interleave and a slow client slows the producers down.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Chunks queued for one consumer. With [`MAX_CHUNK`] it bounds what a stalled consumer can hold back.
const INBOUND_CHUNKS: usize = 8;
/// Commands queued for the write side of a connection.
const OUTBOUND_COMMANDS: usize = 16;
/// Largest piece in which data is handed on, in bytes.
pub(super) const MAX_CHUNK: usize = 32 << 10;

/// The stream ended without its end being announced: it was reset, or the connection is gone. Terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stream was reset or its connection was lost")]
pub struct Broken;

/// What the write side of a connection is asked to do, in order.
#[derive(Debug)]
pub(super) enum Command {
    /// Accept a stream (SPDY: an empty `SYN_REPLY`).
    Reply(u32),
    /// Payload.
    Data(u32, Bytes),
    /// This side is finished with the stream.
    Finish(u32),
    /// The stream is abandoned; the second value is the SPDY status code.
    Reset(u32, u32),
    /// Answer to a ping.
    Pong(u32),
    /// Tell the peer that the connection ends, flush and stop. The value is the SPDY `GOAWAY` status.
    Shutdown(u32),
}

/// What is left of a stream for its transport once its feed is finished: it can still be reset.
pub(super) struct StreamWatch {
    reset: CancellationToken,
    slot: Weak<OwnedSemaphorePermit>,
}

impl StreamWatch {
    /// The client gave the stream up: sending on it fails from now on.
    pub(super) fn reset(&self) {
        self.reset.cancel();
    }

    /// Whether both ends were dropped.
    pub(super) fn is_over(&self) -> bool {
        self.slot.strong_count() == 0
    }
}

/// A place among the streams of a connection; given back when both ends of the stream are dropped.
type Slot = Arc<OwnedSemaphorePermit>;

enum Event {
    Data(Bytes, OwnedSemaphorePermit),
    Finished,
}

/// Receiving end: what the client sent on one stream.
pub struct Inbound {
    events: mpsc::Receiver<Event>,
    finished: bool,
    _slot: Slot,
}

impl Inbound {
    /// The next piece, `None` after the client finished the stream.
    ///
    /// # Errors
    /// [`Broken`] if the stream was reset or the connection was lost.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, Broken> {
        if self.finished {
            return Ok(None);
        }
        match self.events.recv().await {
            Some(Event::Data(data, _budget)) => Ok(Some(data)),
            Some(Event::Finished) => {
                self.finished = true;
                Ok(None)
            }
            None => Err(Broken),
        }
    }
}

/// The transport's end of an [`Inbound`].
pub(super) struct Feed {
    events: mpsc::Sender<Event>,
    budget: Arc<Semaphore>,
    budget_size: usize,
}

impl Feed {
    /// Hands data on, waiting for room. Data for a consumer that went away is dropped.
    pub(super) async fn data(&self, mut data: Bytes) {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_CHUNK).min(self.budget_size));
            let Ok(permits) = u32::try_from(piece.len()) else { return };
            let acquire = Arc::clone(&self.budget).acquire_many_owned(permits);
            // A consumer that leaves must not keep the connection waiting for budget it would never return.
            let permit = tokio::select! {
                permit = acquire => permit,
                () = self.events.closed() => return,
            };
            let Ok(permit) = permit else { return };
            if self.events.send(Event::Data(piece, permit)).await.is_err() {
                return;
            }
        }
    }

    /// Announces the end of the stream.
    pub(super) async fn finish(self) {
        // A consumer that is gone does not need to know.
        let _ = self.events.send(Event::Finished).await;
    }
}

/// Sending end: what goes to the client on one stream.
pub struct Outbound {
    id: u32,
    commands: mpsc::Sender<Command>,
    open: bool,
    reset: CancellationToken,
    _slot: Slot,
}

impl Outbound {
    /// Queues `data`, waiting while the client is slow.
    ///
    /// # Errors
    /// [`Broken`] if the connection is gone, the client reset the stream, or this end was finished or reset before.
    pub async fn send(&mut self, data: Bytes) -> Result<(), Broken> {
        if !self.open || self.reset.is_cancelled() {
            return Err(Broken);
        }
        self.commands.send(Command::Data(self.id, data)).await.map_err(|_| Broken)
    }

    /// Tells the client that nothing more follows on this stream. Repeating it does nothing.
    pub async fn finish(&mut self) {
        if std::mem::take(&mut self.open) {
            // If the connection is gone, so is the one who would be told.
            let _ = self.commands.send(Command::Finish(self.id)).await;
        }
    }

    /// Abandons the stream in both directions. Does nothing after [`finish`](Self::finish), as in spdystream.
    pub async fn reset(&mut self, code: u32) {
        if std::mem::take(&mut self.open) {
            let _ = self.commands.send(Command::Reset(self.id, code)).await;
        }
    }

    /// Completes when the client resets the stream, which it may do after it finished its own direction.
    pub fn was_reset(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reset.clone().cancelled_owned()
    }

    /// This end, finished without a word.
    pub(super) fn closed(mut self) -> Self {
        self.open = false;
        self
    }

    pub(super) async fn reply(&self) -> Result<(), Broken> {
        self.commands.send(Command::Reply(self.id)).await.map_err(|_| Broken)
    }
}

/// What the streams of one connection share.
#[derive(Clone)]
pub(super) struct Hub {
    commands: mpsc::Sender<Command>,
    budget: Arc<Semaphore>,
    budget_size: usize,
    slots: Arc<Semaphore>,
}

impl Hub {
    /// A hub and the queue of commands for the write side.
    pub(super) fn new(max_streams: usize, max_buffered: usize) -> (Self, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(OUTBOUND_COMMANDS);
        let budget_size = max_buffered.clamp(1, Semaphore::MAX_PERMITS);
        let hub = Self {
            commands,
            budget: Arc::new(Semaphore::new(budget_size)),
            budget_size,
            slots: Arc::new(Semaphore::new(max_streams.min(Semaphore::MAX_PERMITS))),
        };
        (hub, queue)
    }

    /// Both ends of a new stream, or `None` if the connection has as many as it may have.
    pub(super) fn stream(&self, id: u32) -> Option<(Feed, StreamWatch, Inbound, Outbound)> {
        let slot = Arc::new(Arc::clone(&self.slots).try_acquire_owned().ok()?);
        let (sender, events) = mpsc::channel(INBOUND_CHUNKS);
        let reset = CancellationToken::new();
        let feed = Feed { events: sender, budget: Arc::clone(&self.budget), budget_size: self.budget_size };
        let watch = StreamWatch { reset: reset.clone(), slot: Arc::downgrade(&slot) };
        let inbound = Inbound { events, finished: false, _slot: Arc::clone(&slot) };
        let outbound = Outbound { id, commands: self.commands.clone(), open: true, reset, _slot: slot };
        Some((feed, watch, inbound, outbound))
    }

    /// Queues a command that belongs to no open stream.
    pub(super) async fn command(&self, command: Command) -> Result<(), Broken> {
        self.commands.send(command).await.map_err(|_| Broken)
    }

    /// A handle that ends the connection.
    pub(super) fn closer(&self) -> Closer {
        Closer(self.commands.clone())
    }
}

/// Ends a connection in good order: everything queued before is still delivered.
pub(super) struct Closer(mpsc::Sender<Command>);

impl Closer {
    pub(super) async fn close(&self) {
        let _ = self.0.send(Command::Shutdown(0)).await;
    }
}

/// When something last moved on a connection, in either direction.
#[derive(Clone)]
pub(super) struct Activity {
    start: Instant,
    last_millis: Arc<AtomicU64>,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), last_millis: Arc::new(AtomicU64::new(0)) }
    }

    pub(super) fn touch(&self) {
        let millis = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_millis.store(millis, Ordering::Relaxed);
    }

    /// Completes once nothing has moved for `timeout`.
    pub(super) async fn idle(&self, timeout: Duration) {
        loop {
            let last = Duration::from_millis(self.last_millis.load(Ordering::Relaxed));
            let deadline = self.start + last + timeout;
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}
