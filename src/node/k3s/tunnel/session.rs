//! One session of the tunnel: many connections to our own port through one WebSocket.
//!
//! Source: remotedialer `session.go`, `session_serve.go`, `connection.go`, `readbuffer.go`. What the server sends is kept
//! until our port takes it; above [`PAUSE_AT`] it is asked to pause, and one that does not loses the connection.
//! Unlike remotedialer's a connection to elsewhere is refused by itself: it is no reason to end the others.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval_at, sleep, timeout, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_util::sync::CancellationToken;

use super::frame::{EOF, Frame, FrameError};
use super::target::Target;

/// Kept for one connection before the server is asked to pause (`MaxBuffer`), and before it may go on.
const PAUSE_AT: usize = 2 << 20;
const RESUME_BELOW: usize = PAUSE_AT / 8;
/// Kept for one connection at most: what was on its way when the server was asked to pause.
const MAX_HELD: usize = 4 * PAUSE_AT;
/// Kept for all of them at most.
const MAX_HELD_TOGETHER: usize = 8 * MAX_HELD;
/// What keeping a message costs beside its bytes.
const OVERHEAD: usize = 64;
/// Connections at once.
const MAX_CONNECTIONS: usize = 512;
/// Data on its way to the server, in messages of [`CHUNK`] at most.
const QUEUE: usize = 16;
const CHUNK: usize = 32 << 10;
/// Short messages on their way to the server. More wait only if it reads nothing.
const URGENT: usize = 2 * MAX_CONNECTIONS;

const PING_INTERVAL: Duration = Duration::from_secs(5);
const SYNC_INTERVAL: Duration = Duration::from_secs(60);
/// Silence of the server, which answers pings, or a message that it does not take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest time to a connection to our own port.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what is left may go on to our port once the server has ended a connection.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a session is over. All are worth another one after a pause.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection failed.
    #[error("the tunnel's connection: {0}")]
    Socket(Box<WsError>),
    /// The server ended it.
    #[error("the server closed the tunnel")]
    Closed,
    /// Nothing was heard, or taken, for a minute.
    #[error("the server has been silent in the tunnel for a minute")]
    Silent,
    /// It makes no sense.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Text where there is none.
    #[error("the server sends text through the tunnel")]
    Text,
}

impl From<WsError> for SessionError {
    fn from(error: WsError) -> Self {
        match error {
            WsError::ConnectionClosed | WsError::AlreadyClosed => Self::Closed,
            error => Self::Socket(Box::new(error)),
        }
    }
}

/// Serves connections until the session ends; all of them end with it.
pub(super) async fn run<S>(socket: WebSocketStream<S>, target: &Target) -> SessionError
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (sink, stream) = socket.split();
    let (data, queue) = mpsc::channel(QUEUE);
    let (control, urgent) = mpsc::channel(URGENT);
    let shared = Arc::new(Shared { data, control, stuck: CancellationToken::new(), held: AtomicUsize::new(0) });
    let stuck = shared.stuck.clone();
    let mut session = Session { target, shared, connections: HashMap::new(), tasks: JoinSet::new() };
    let result = tokio::select! {
        result = session.read(stream) => result,
        result = write(sink, urgent, queue) => result,
        () = stuck.cancelled() => Err(SessionError::Silent),
    };
    result.err().unwrap_or(SessionError::Closed)
}

/// What the connections of a session have in common.
struct Shared {
    /// Data, and the end of it.
    data: mpsc::Sender<Frame>,
    /// Everything that must not wait behind data.
    control: mpsc::Sender<Frame>,
    /// The server takes nothing any more.
    stuck: CancellationToken,
    /// Bytes held for all connections.
    held: AtomicUsize,
}

impl Shared {
    fn urgent(&self, frame: Frame) {
        if self.control.try_send(frame).is_err() {
            self.stuck.cancel();
        }
    }
}

/// What the server has sent on one connection and our port has not taken.
struct Held {
    connection: i64,
    shared: Arc<Shared>,
    /// Bytes, and whether the server was asked to pause.
    state: Mutex<(usize, bool)>,
}

impl Held {
    /// Counts bytes that came; false if they are too many.
    fn take(&self, count: usize) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += count;
        let together = self.shared.held.fetch_add(count, Ordering::AcqRel) + count;
        if state.0 > PAUSE_AT && !state.1 {
            state.1 = true;
            self.shared.urgent(Frame::Pause(self.connection));
        }
        state.0 <= MAX_HELD && together <= MAX_HELD_TOGETHER
    }

    fn release(&self, count: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 -= count;
        self.shared.held.fetch_sub(count, Ordering::AcqRel);
        if state.0 < RESUME_BELOW && state.1 {
            state.1 = false;
            self.shared.urgent(Frame::Resume(self.connection));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.shared.held.fetch_sub(state.0, Ordering::AcqRel);
    }
}

/// The reading side's handle of a connection.
struct Connection {
    input: mpsc::UnboundedSender<Bytes>,
    held: Arc<Held>,
    paused: watch::Sender<bool>,
    /// The server has ended it: nothing follows what is held.
    over: CancellationToken,
    task: tokio::task::AbortHandle,
}

struct Session<'a> {
    target: &'a Target,
    shared: Arc<Shared>,
    connections: HashMap<i64, Connection>,
    /// Each returns the number of its connection.
    tasks: JoinSet<i64>,
}

impl Session<'_> {
    async fn read(
        &mut self,
        mut stream: impl Stream<Item = Result<Message, WsError>> + Unpin,
    ) -> Result<(), SessionError> {
        let mut sync = interval_at(Instant::now() + SYNC_INTERVAL, SYNC_INTERVAL);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                message = timeout_at(heard + PATIENCE, stream.next()) => {
                    heard = Instant::now();
                    match message.map_err(|_| SessionError::Silent)?.ok_or(SessionError::Closed)?? {
                        Message::Binary(message) => self.handle(Frame::decode(message)?),
                        Message::Text(_) => return Err(SessionError::Text),
                        Message::Close(_) => return Err(SessionError::Closed),
                        Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                    }
                }
                Some(ended) = self.tasks.join_next() => if let Ok(connection) = ended {
                    self.connections.remove(&connection);
                },
                _ = sync.tick() => {
                    let mut ids: Vec<i64> = self.connections.keys().copied().collect();
                    ids.sort_unstable();
                    self.shared.urgent(Frame::Sync(ids));
                }
            }
        }
    }

    fn handle(&mut self, frame: Frame) {
        match frame {
            Frame::Connect { connection, protocol, address } => self.open(connection, &protocol, &address),
            Frame::Data(_, payload) if payload.is_empty() => {}
            Frame::Data(connection, payload) => match self.connections.get(&connection) {
                Some(open) if open.held.take(payload.len() + OVERHEAD) => {
                    // whoever does not listen any more is about to be removed
                    let _ = open.input.send(payload);
                }
                Some(_) => {
                    tracing::warn!(connection, "the k3s server does not pause, the connection is given up");
                    self.drop_connection(connection);
                    self.refuse(connection, "too much unread data");
                }
                None => self.refuse(connection, "connection not found"),
            },
            Frame::Error(connection, _) => {
                if let Some(open) = self.connections.get(&connection) {
                    open.over.cancel();
                }
            }
            Frame::Pause(connection) => self.pause(connection, true),
            Frame::Resume(connection) => self.pause(connection, false),
            Frame::Sync(ids) => {
                let stale: Vec<i64> = self.connections.keys().filter(|id| !ids.contains(id)).copied().collect();
                stale.into_iter().for_each(|connection| self.drop_connection(connection));
            }
            Frame::Other => {}
        }
    }

    fn open(&mut self, connection: i64, protocol: &str, address: &str) {
        let socket = match self.target.resolve(protocol, address) {
            Some(socket) => socket,
            None => {
                tracing::warn!(protocol, address, "the k3s server asks for a connection to elsewhere, refused");
                return self.refuse(connection, "connect not allowed: only this node's own port");
            }
        };
        if self.connections.len() >= MAX_CONNECTIONS {
            return self.refuse(connection, "too many connections");
        }
        if self.connections.contains_key(&connection) {
            self.drop_connection(connection);
            return self.refuse(connection, "connection exists");
        }
        let shared = self.shared.clone();
        let held = Arc::new(Held { connection, shared: shared.clone(), state: Mutex::new((0, false)) });
        let (input, chunks) = mpsc::unbounded_channel();
        let (paused, pauses) = watch::channel(false);
        let over = CancellationToken::new();
        let pipe = Pipe { connection, shared, held: held.clone(), chunks, pauses, over: over.clone() };
        let task = self.tasks.spawn(pipe.run(socket));
        self.connections.insert(connection, Connection { input, held, paused, over, task });
    }

    fn refuse(&self, connection: i64, why: &str) {
        self.shared.urgent(Frame::Error(connection, why.to_owned()));
    }

    fn pause(&self, connection: i64, paused: bool) {
        if let Some(open) = self.connections.get(&connection) {
            open.paused.send_replace(paused);
        }
    }

    fn drop_connection(&mut self, connection: i64) {
        if let Some(open) = self.connections.remove(&connection) {
            open.task.abort();
        }
    }
}

/// Takes everything to the server, short messages first.
async fn write(
    mut sink: impl Sink<Message, Error = WsError> + Unpin,
    mut urgent: mpsc::Receiver<Frame>,
    mut queue: mpsc::Receiver<Frame>,
) -> Result<(), SessionError> {
    let mut ping = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
    let mut id: i64 = 0;
    loop {
        let frame = tokio::select! {
            biased;
            Some(frame) = urgent.recv() => Some(frame),
            _ = ping.tick() => None,
            Some(frame) = queue.recv() => Some(frame),
            else => return Ok(()),
        };
        id = id.wrapping_add(1);
        let message = frame.map_or(Message::Ping(Bytes::new()), |frame| Message::Binary(frame.encode(id)));
        timeout(PATIENCE, sink.send(message)).await.map_err(|_| SessionError::Silent)??;
    }
}

/// One connection between the server and our port.
struct Pipe {
    connection: i64,
    shared: Arc<Shared>,
    held: Arc<Held>,
    chunks: mpsc::UnboundedReceiver<Bytes>,
    pauses: watch::Receiver<bool>,
    over: CancellationToken,
}

impl Pipe {
    async fn run(mut self, socket: SocketAddr) -> i64 {
        let connection = self.connection;
        let data = self.shared.data.clone();
        let end = match timeout(DIAL_TIMEOUT, TcpStream::connect(socket)).await {
            Ok(Ok(stream)) => self.copy(stream).await,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no connection to {socket} within 10 s")),
        };
        if let Some(why) = end {
            // behind the data; a session that is over needs no word of it
            let _ = data.send(Frame::Error(connection, why)).await;
        }
        connection
    }

    /// Copies both ways until one end is over. Returns what the server is to be told, if it was not the server.
    async fn copy(&mut self, stream: TcpStream) -> Option<String> {
        let _ = stream.set_nodelay(true);
        let (mut from, mut to) = stream.into_split();
        let (connection, data, held) = (self.connection, &self.shared.data, &self.held);
        let pauses = &mut self.pauses;
        let up = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                match from.read(&mut buffer).await {
                    Ok(0) => return EOF.to_owned(),
                    Ok(count) => {
                        if pauses.wait_for(|paused| !paused).await.is_err()
                            || data
                                .send(Frame::Data(connection, Bytes::copy_from_slice(&buffer[..count])))
                                .await
                                .is_err()
                        {
                            return EOF.to_owned();
                        }
                    }
                    Err(error) => return error.to_string(),
                }
            }
        };
        let (chunks, over) = (&mut self.chunks, &self.over);
        let down = async {
            loop {
                let chunk = tokio::select! {
                    biased;
                    Some(chunk) = chunks.recv() => chunk,
                    () = over.cancelled() => return None,
                };
                if let Err(error) = to.write_all(&chunk).await {
                    return Some(error.to_string());
                }
                held.release(chunk.len() + OVERHEAD);
            }
        };
        let too_late = async {
            over.cancelled().await;
            sleep(DRAIN_TIMEOUT).await;
        };
        tokio::select! {
            why = up => Some(why),
            why = down => why,
            () = too_late => None,
        }
    }
}
