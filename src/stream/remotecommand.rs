//! Exec and attach: the streams of a process, its terminal size and its exit status.
//!
//! Follows `k8s.io/cri-streaming/pkg/streaming/remotecommand` on the wire. The order at the end matters to
//! clients: all output, the end of the output streams, the status, the end of the error stream, the close.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, OptionFuture, join3};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::watch,
};

use super::{
    Limits,
    mux::{Inbound, MAX_CHUNK, Outbound},
    spdy::{self, Accepted},
    status::status_message,
    upgrade::{Transport, Upgrade},
    websocket::{self, Channel, Codec},
};

/// Protocols over SPDY, the newest first.
pub const SPDY_PROTOCOLS: &[&str] = &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// Protocols over WebSocket; the empty one stands for a client that names none.
pub const WEBSOCKET_PROTOCOLS: &[&str] = &[
    "",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "v5.channel.k8s.io",
];

/// After a process ended, something it started may keep its output open. It is listened to until it has been
/// silent for so long.
const OUTPUT_QUIET: Duration = Duration::from_secs(2);
/// Terminal sizes are tiny; a client whose pending ones exceed this is not sending sizes.
const MAX_RESIZE_BUFFER: usize = 4096;

const STDIN: usize = 0;
const STDOUT: usize = 1;
const STDERR: usize = 2;
const ERROR: usize = 3;
const RESIZE: usize = 4;

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    #[serde(rename = "Width", alias = "width", default)]
    pub width: u16,
    /// Rows.
    #[serde(rename = "Height", alias = "height", default)]
    pub height: u16,
}

/// Which streams a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// The client sends input.
    pub stdin: bool,
    /// The client takes standard output.
    pub stdout: bool,
    /// The client takes standard error; never together with `tty`.
    pub stderr: bool,
    /// The process has a terminal.
    pub tty: bool,
}

impl StreamOptions {
    /// Reads `input`, `output`, `error` and `tty` from decoded query parameters.
    ///
    /// # Errors
    /// The text of the 400 answer, if the request wants no stream at all.
    pub fn from_query<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Self, &'static str> {
        let mut first: [Option<bool>; 4] = [None; 4];
        for (name, value) in pairs {
            let place = match name {
                "input" => 0,
                "output" => 1,
                "error" => 2,
                "tty" => 3,
                _ => continue,
            };
            first[place].get_or_insert(value == "1");
        }
        let [stdin, stdout, stderr, tty] = first.map(Option::unwrap_or_default);
        // A terminal has one output: asking for standard error too is not an error, but gives nothing.
        let options = Self { stdin, stdout, stderr: stderr && !tty, tty };
        if options.stdin || options.stdout || options.stderr {
            Ok(options)
        } else {
            Err("you must specify at least 1 of stdin, stdout, stderr")
        }
    }
}

/// A started or attached process, as this module drives it.
pub struct Process {
    /// Takes the client's input; dropped at its end, which closes it.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Standard output, or everything the terminal shows.
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Standard error.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Changes the size of the terminal.
    pub resize: Option<Box<dyn FnMut(TerminalSize) + Send>>,
    /// Completes when the process has ended; its exit code, 128 + n after signal n.
    pub exit: BoxFuture<'static, io::Result<i32>>,
}

/// What is reported to the client at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended with this exit code. An attach reports 0 whatever the container's code is.
    Exited(i32),
    /// It could not be started, or what happened to it is unknown.
    Failed(String),
}

/// Serves one exec or attach on an upgraded connection. `start` is called once the client has all its streams;
/// its error text goes to the client. Returns what was reported, or `None` if the client left before the end:
/// the [`Process`] is dropped then, which closes its streams, and its fate is up to whoever made it.
///
/// # Errors
/// If the connection fails, breaks the protocol, idles too long, or the client does not create its streams in time.
pub async fn serve<T, F>(
    io: T,
    upgrade: &Upgrade,
    options: StreamOptions,
    limits: Limits,
    start: impl FnOnce() -> F + Send,
) -> io::Result<Option<Outcome>>
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
    F: Future<Output = Result<Process, String>> + Send,
{
    match upgrade.transport {
        Transport::Spdy => {
            let (mut accepted, driver) = spdy::connection(io, limits);
            let protocol = upgrade.protocol;
            let work = async move {
                let gather = gather_spdy(&mut accepted, protocol, options);
                let Ok(session) = tokio::time::timeout(limits.stream_creation_timeout, gather).await else {
                    accepted.close().await;
                    let message = "timed out waiting for client to create streams";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                };
                let Some(session) = session else { return Ok(None) };
                let outcome = session.run(start).await;
                accepted.close().await;
                Ok(outcome)
            };
            alongside(work, driver).await
        }
        Transport::WebSocket => {
            let codec = Codec::of(upgrade.protocol);
            let write = |wanted: bool| if wanted { Channel::Write } else { Channel::Ignored };
            let channels = [
                if options.stdin { Channel::Read } else { Channel::Ignored },
                write(options.stdout),
                write(options.stderr),
                Channel::Write,
                Channel::Read,
            ];
            let (ends, closer, driver) = websocket::channels(io, codec, &channels, limits);
            let structured = upgrade.protocol.starts_with("v4.") || upgrade.protocol.starts_with("v5.");
            let work = async move {
                let Some(session) = websocket_session(ends, structured).await else { return Ok(None) };
                let outcome = session.run(start).await;
                closer.close().await;
                Ok(outcome)
            };
            alongside(work, driver).await
        }
    }
}

/// Runs `work` while `driver` moves its bytes, then lets the driver deliver what is queued.
async fn alongside<O>(
    work: impl Future<Output = io::Result<Option<O>>>,
    driver: impl Future<Output = io::Result<()>>,
) -> io::Result<Option<O>> {
    tokio::pin!(driver, work);
    tokio::select! {
        outcome = &mut work => {
            // A client that does not take what is queued is bounded by the connection's own timeouts only as
            // long as it takes something: the driver ends when idle.
            let delivered = driver.await;
            let outcome = outcome?;
            delivered.map(|()| outcome)
        }
        ended = &mut driver => ended.map(|()| None),
    }
}

/// The streams of one exec or attach.
struct Session {
    stdin: Option<Inbound>,
    stdout: Option<Outbound>,
    stderr: Option<Outbound>,
    error: Outbound,
    resize: Option<Inbound>,
    /// Ends of streams that the server does not write to; reset at the end, as the Go server does.
    unused: Vec<Outbound>,
    /// The status is a JSON object (v4, v5); otherwise text, and nothing on success.
    structured: bool,
}

async fn gather_spdy(accepted: &mut Accepted, protocol: &str, options: StreamOptions) -> Option<Session> {
    let resizable = matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let wanted = [options.stdin, options.stdout, options.stderr, true, options.tty && resizable];
    let mut found: [Option<(Inbound, Outbound)>; 5] = [const { None }; 5];
    while found.iter().zip(wanted).any(|(stream, wanted)| wanted && stream.is_none()) {
        let incoming = accepted.next().await?;
        let place = match incoming.headers.get("streamType") {
            Some("stdin") => STDIN,
            Some("stdout") => STDOUT,
            Some("stderr") => STDERR,
            Some("error") => ERROR,
            Some("resize") => RESIZE,
            _ => {
                incoming.refuse().await;
                continue;
            }
        };
        // A second stream of a kind takes the place of the first, as in the Go server.
        found[place] = Some(incoming.accept().await.ok()?);
    }
    let [stdin, stdout, stderr, error, resize] = found;
    let (_, mut error) = error?;
    let mut unused = Vec::new();
    let mut split = |stream: Option<(Inbound, Outbound)>| {
        let (inbound, outbound) = stream?;
        unused.push(outbound);
        Some(inbound)
    };
    let (stdin, resize) = (split(stdin), split(resize));
    if protocol == "channel.k8s.io" {
        // The first protocol ends stdin's way back and resets the error stream at once; v2 was made to fix that.
        for outbound in &mut unused {
            outbound.finish().await;
        }
        error.reset(spdy::status::CANCEL).await;
    }
    let output = |stream: Option<(Inbound, Outbound)>| stream.map(|(_, outbound)| outbound);
    Some(Session {
        stdin,
        stdout: output(stdout),
        stderr: output(stderr),
        error,
        resize,
        unused,
        structured: protocol == "v4.channel.k8s.io",
    })
}

async fn websocket_session(ends: Vec<websocket::Ends>, structured: bool) -> Option<Session> {
    let [stdin, stdout, stderr, error, resize] = <[_; 5]>::try_from(ends).ok()?;
    let mut session = Session {
        stdin: stdin.inbound,
        stdout: stdout.outbound,
        stderr: stderr.outbound,
        error: error.outbound?,
        resize: resize.inbound,
        unused: Vec::new(),
        structured,
    };
    // An empty message on the lowest writable channel tells the client that the connection stands.
    let lowest = session.stdout.as_mut().or(session.stderr.as_mut()).unwrap_or(&mut session.error);
    lowest.send(Bytes::new()).await.ok()?;
    Some(session)
}

impl Session {
    async fn run<F>(mut self, start: impl FnOnce() -> F + Send) -> Option<Outcome>
    where
        F: Future<Output = Result<Process, String>> + Send,
    {
        let outcome = match start().await {
            Ok(process) => self.copy(process).await?,
            Err(message) => Outcome::Failed(message),
        };
        for output in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            output.finish().await;
        }
        if let Some(status) = status_message(&outcome, self.structured) {
            // The first protocol's error stream is reset already and cannot take it; the exit itself is no less true.
            let _ = self.error.send(status.into()).await;
        }
        self.error.finish().await;
        for outbound in &mut self.unused {
            outbound.reset(spdy::status::CANCEL).await;
        }
        Some(outcome)
    }

    /// Moves everything between client and process. `None` if the client is gone.
    async fn copy(&mut self, process: Process) -> Option<Outcome> {
        let (ended, has_ended) = watch::channel(false);
        let stdout = copy_output(process.stdout, self.stdout.as_mut(), has_ended.clone());
        let stderr = copy_output(process.stderr, self.stderr.as_mut(), has_ended);
        let exit = async {
            let exit = process.exit.await;
            ended.send_replace(true);
            exit
        };
        let output = join3(exit, stdout, stderr);
        let input = async {
            let stdin: OptionFuture<_> = self.stdin.take().map(|from| copy_input(from, process.stdin)).into();
            let resize: OptionFuture<_> = self.resize.take().map(|from| copy_sizes(from, process.resize)).into();
            tokio::join!(stdin, resize);
            // Input that ended does not end the process.
            std::future::pending::<()>().await;
        };
        let (exit, stdout, stderr) = tokio::select! {
            output = output => output,
            () = input => return None,
        };
        match (exit, stdout.and(stderr)) {
            (_, Err(Gone)) => None,
            (Ok(code), Ok(())) => Some(Outcome::Exited(code)),
            (Err(error), Ok(())) => Some(Outcome::Failed(error.to_string())),
        }
    }
}

/// The client does not take output any more.
struct Gone;

async fn copy_output(
    from: Option<Box<dyn AsyncRead + Send + Unpin>>,
    mut to: Option<&mut Outbound>,
    mut ended: watch::Receiver<bool>,
) -> Result<(), Gone> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(MAX_CHUNK);
        let quiet = async {
            if ended.wait_for(|ended| *ended).await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(OUTPUT_QUIET).await;
        };
        let count = tokio::select! {
            biased;
            count = from.read_buf(&mut buffer) => count,
            () = quiet => return Ok(()),
        };
        match count {
            // A read error on a pipe or terminal means that there is nothing more to come.
            Ok(0) | Err(_) => return Ok(()),
            Ok(_) => {
                let data = buffer.split().freeze();
                // Output that the client did not ask for is read all the same, so that the process can go on.
                if let Some(to) = &mut to {
                    to.send(data).await.map_err(|_| Gone)?;
                }
            }
        }
    }
}

async fn copy_input(mut from: Inbound, mut to: Option<Box<dyn AsyncWrite + Send + Unpin>>) {
    // What a process does not read any more is dropped, so that the connection keeps moving.
    while let Ok(Some(data)) = from.recv().await {
        if let Some(writer) = &mut to
            && writer.write_all(&data).await.is_err()
        {
            to = None;
        }
    }
}

async fn copy_sizes(mut from: Inbound, mut to: Option<Box<dyn FnMut(TerminalSize) + Send>>) {
    let mut pending = Vec::new();
    while let Ok(Some(data)) = from.recv().await {
        pending.extend_from_slice(&data);
        let Ok(sizes) = take_sizes(&mut pending) else { break };
        for size in sizes {
            if let Some(to) = &mut to {
                to(size);
            }
        }
    }
    // Whatever else comes is not a size; it is read so that the connection keeps moving.
    while let Ok(Some(_)) = from.recv().await {}
}

/// Takes the complete sizes off the front of `pending`: JSON objects, one after the other.
fn take_sizes(pending: &mut Vec<u8>) -> Result<Vec<TerminalSize>, ()> {
    let mut sizes = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(pending).into_iter::<TerminalSize>();
    for size in stream.by_ref() {
        match size {
            Ok(size) => sizes.push(size),
            Err(error) if error.is_eof() => break,
            Err(_) => return Err(()),
        }
    }
    let consumed = stream.byte_offset();
    pending.drain(..consumed.min(pending.len()));
    if pending.len() > MAX_RESIZE_BUFFER { Err(()) } else { Ok(sizes) }
}

#[cfg(test)]
mod tests {
    use futures::{SinkExt, StreamExt};
    use tokio::{io::DuplexStream, sync::oneshot};
    use tokio_tungstenite::{
        WebSocketStream,
        tungstenite::{Message, protocol::Role},
    };

    use super::*;
    use crate::stream::spdy::testing::Client;

    /// What a test sees of the process it plays.
    struct Played {
        stdin: DuplexStream,
        stdout: DuplexStream,
        stderr: DuplexStream,
        sizes: std::sync::mpsc::Receiver<TerminalSize>,
        exit: oneshot::Sender<io::Result<i32>>,
    }

    fn process() -> (Process, Played) {
        let (stdin, their_stdin) = tokio::io::duplex(1 << 16);
        let (stdout, their_stdout) = tokio::io::duplex(1 << 16);
        let (stderr, their_stderr) = tokio::io::duplex(1 << 16);
        let (sizes, their_sizes) = std::sync::mpsc::channel();
        let (exit, ended) = oneshot::channel();
        let process = Process {
            stdin: Some(Box::new(stdin)),
            stdout: Some(Box::new(stdout)),
            stderr: Some(Box::new(stderr)),
            resize: Some(Box::new(move |size| sizes.send(size).unwrap_or_default())),
            exit: Box::pin(async { ended.await.unwrap_or_else(|_| Err(io::Error::other("lost"))) }),
        };
        let played =
            Played { stdin: their_stdin, stdout: their_stdout, stderr: their_stderr, sizes: their_sizes, exit };
        (process, played)
    }

    fn upgrade(transport: Transport, protocol: &'static str) -> Upgrade {
        Upgrade::accepted(transport, protocol)
    }

    const ALL: StreamOptions = StreamOptions { stdin: true, stdout: true, stderr: true, tty: false };

    const LIMITS: Limits = Limits {
        idle_timeout: Duration::from_secs(60),
        stream_creation_timeout: Duration::from_millis(300),
        max_streams: 10,
        max_buffered_bytes: 1 << 20,
        max_header_bytes: 1 << 14,
    };

    type Served = tokio::task::JoinHandle<io::Result<Option<Outcome>>>;

    fn serve_process(upgrade: Upgrade, options: StreamOptions) -> (DuplexStream, Played, Served) {
        let (client, server) = tokio::io::duplex(1 << 16);
        let (process, played) = process();
        let task =
            tokio::spawn(async move { serve(server, &upgrade, options, LIMITS, || async { Ok(process) }).await });
        (client, played, task)
    }

    #[test]
    fn query_of_a_request() {
        let parse = |query: &[(&'static str, &'static str)]| StreamOptions::from_query(query.iter().copied());
        assert_eq!(parse(&[("input", "1"), ("output", "1"), ("error", "1"), ("command", "sh")]), Ok(ALL));
        let terminal = parse(&[("tty", "1"), ("output", "1"), ("error", "1")]).expect("options");
        assert!(terminal.tty && terminal.stdout && !terminal.stderr);
        assert!(parse(&[("tty", "1"), ("error", "1")]).is_err());
        assert!(parse(&[("input", "true")]).is_err());
    }

    #[test]
    fn sizes_arrive_in_any_pieces() {
        let mut pending = br#"{"Width":80,"Height":24}{"Width":1"#.to_vec();
        assert_eq!(take_sizes(&mut pending), Ok(vec![TerminalSize { width: 80, height: 24 }]));
        pending.extend(br#"00,"Height":30}"#);
        assert_eq!(take_sizes(&mut pending), Ok(vec![TerminalSize { width: 100, height: 30 }]));
        assert_eq!(take_sizes(&mut b"garbage".to_vec()), Err(()));
        assert_eq!(take_sizes(&mut vec![b' '; MAX_RESIZE_BUFFER * 2]), Ok(vec![]));
        assert_eq!(take_sizes(&mut [b"{\"a\":\"", &[b'x'; MAX_RESIZE_BUFFER][..]].concat()), Err(()));
    }

    #[tokio::test]
    async fn spdy_exec_in_the_order_clients_expect() {
        let (io, mut process, task) = serve_process(upgrade(Transport::Spdy, "v4.channel.k8s.io"), ALL);
        let mut client = Client::new(io);
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
            client.open(id, &[("streamType", kind)]).await;
        }
        client.data(3, b"input", true).await;
        let mut input = String::new();
        process.stdin.read_to_string(&mut input).await.expect("stdin ends");
        assert_eq!(input, "input");
        process.stdout.write_all(b"out").await.expect("write");
        assert_eq!(client.payload(5).await, b"out");
        process.stderr.write_all(b"err").await.expect("write");
        drop((process.stdout, process.stderr));
        process.exit.send(Ok(3)).expect("exit");
        let frames = client.rest().await;
        let text = |id| String::from_utf8(frames.payload(id)).expect("text");
        assert_eq!(text(7), "err");
        let status: serde_json::Value = serde_json::from_str(&text(1)).expect("json");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        // Output ends before the status is told, the status before its stream ends, and that before the GOAWAY.
        assert_eq!(frames.ends(), ["fin 5", "fin 7", "fin 1", "rst 3", "goaway"]);
        assert!(frames.end_position("fin 7") < frames.payload_position(1));
        drop(client);
        assert_eq!(task.await.expect("join").expect("served"), Some(Outcome::Exited(3)));
    }

    #[tokio::test]
    async fn spdy_terminal_sizes() {
        let options = StreamOptions { stdin: false, stdout: true, stderr: false, tty: true };
        let (io, process, task) = serve_process(upgrade(Transport::Spdy, "v3.channel.k8s.io"), options);
        let mut client = Client::new(io);
        for (id, kind) in [(1, "error"), (3, "stdout"), (5, "resize")] {
            client.open(id, &[("streamType", kind)]).await;
        }
        client.data(5, br#"{"Width":132,"Height":43}"#, false).await;
        let sizes = process.sizes;
        let size = tokio::task::spawn_blocking(move || sizes.recv_timeout(Duration::from_secs(5))).await.expect("join");
        assert_eq!(size, Ok(TerminalSize { width: 132, height: 43 }));
        drop((process.stdout, process.stderr));
        process.exit.send(Ok(0)).expect("exit");
        let frames = client.rest().await;
        assert_eq!(frames.payload(1), b"", "v3 says nothing on success");
        drop(client);
        assert_eq!(task.await.expect("join").expect("served"), Some(Outcome::Exited(0)));
    }

    #[tokio::test]
    async fn streams_that_are_not_created_in_time() {
        let (io, _process, task) = serve_process(upgrade(Transport::Spdy, "v4.channel.k8s.io"), ALL);
        let mut client = Client::new(io);
        client.open(1, &[("streamType", "error")]).await;
        let frames = client.rest().await;
        assert_eq!(frames.ends(), ["goaway"]);
        drop(client);
        assert_eq!(task.await.expect("join").expect_err("late").kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn output_kept_open_by_a_child_does_not_hold_the_client_forever() {
        let (io, process, task) = serve_process(upgrade(Transport::Spdy, "v4.channel.k8s.io"), ALL);
        let mut client = Client::new(io);
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
            client.open(id, &[("streamType", kind)]).await;
        }
        process.exit.send(Ok(0)).expect("exit");
        let frames = client.rest().await;
        assert_eq!(frames.payload(1), br#"{"status":"Success"}"#);
        drop((client, process.stdout));
        assert_eq!(task.await.expect("join").expect("served"), Some(Outcome::Exited(0)));
    }

    #[tokio::test]
    async fn a_client_that_leaves_drops_the_process() {
        let (io, mut process, task) = serve_process(upgrade(Transport::WebSocket, "v4.channel.k8s.io"), ALL);
        drop(io);
        let mut rest = Vec::new();
        process.stdin.read_to_end(&mut rest).await.expect("stdin is closed");
        let served = task.await.expect("join");
        assert!(matches!(served, Ok(None) | Err(_)), "{served:?}");
        assert!(process.exit.is_closed());
    }

    async fn websocket(io: DuplexStream) -> WebSocketStream<DuplexStream> {
        WebSocketStream::from_raw_socket(io, Role::Client, None).await
    }

    #[tokio::test]
    async fn websocket_half_close_and_status() {
        let (io, mut process, task) = serve_process(upgrade(Transport::WebSocket, "v5.channel.k8s.io"), ALL);
        let mut client = websocket(io).await;
        let mut next = async || client.next().await.expect("message").expect("message").into_data();
        assert_eq!(&next().await[..], [1], "the empty message on stdout comes first");
        client.send(Message::binary(&b"\x00input"[..])).await.expect("send");
        client.send(Message::binary(&b"\xff\x00"[..])).await.expect("send");
        let mut input = String::new();
        process.stdin.read_to_string(&mut input).await.expect("stdin ends");
        assert_eq!(input, "input");
        process.stderr.write_all(b"err").await.expect("write");
        let mut next = async || client.next().await.expect("message").expect("message");
        assert_eq!(&next().await.into_data()[..], b"\x02err");
        drop((process.stdout, process.stderr));
        process.exit.send(Ok(0)).expect("exit");
        assert_eq!(&next().await.into_data()[..], b"\x03{\"status\":\"Success\"}");
        let Message::Close(Some(close)) = next().await else { panic!("no close frame") };
        assert_eq!(u16::from(close.code), 1000);
        drop(client);
        assert_eq!(task.await.expect("join").expect("served"), Some(Outcome::Exited(0)));
    }

    #[tokio::test]
    async fn websocket_base64_without_version() {
        let (io, mut process, _task) = serve_process(upgrade(Transport::WebSocket, "base64.channel.k8s.io"), ALL);
        let mut client = websocket(io).await;
        let mut next = async || client.next().await.expect("message").expect("message");
        assert_eq!(next().await, Message::text("1"));
        process.stdout.write_all(b"\n").await.expect("write");
        assert_eq!(next().await, Message::text("1Cg=="));
        drop((process.stdout, process.stderr));
        process.exit.send(Ok(7)).expect("exit");
        let status = next().await.into_text().expect("text");
        let text = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, &status[1..]).expect("base64");
        assert_eq!(text, b"command terminated with non-zero exit code: exit status 7");
    }
}
