//! Port-forward: pairs of a data and an error stream, each with a TCP connection into the Pod.
//!
//! Follows `k8s.io/cri-streaming/pkg/streaming/portforward` on the wire.

use std::{collections::HashMap, io, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use super::{
    Limits,
    mux::{Activity, Broken, Inbound, MAX_CHUNK, Outbound},
    spdy::{self, Accepted, Headers, Incoming},
    upgrade::{Transport, Upgrade},
    websocket::{self, Channel, Codec, Tunnel},
};

/// Protocols over SPDY.
pub const SPDY_PROTOCOLS: &[&str] = &["portforward.k8s.io"];
/// Protocols over WebSocket; the empty one stands for a client that names none.
pub const WEBSOCKET_PROTOCOLS: &[&str] = &["", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", TUNNEL_PROTOCOL];
/// The WebSocket protocol that tunnels SPDY.
pub const TUNNEL_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";

/// Once one side has finished, how long the other may go on without moving a byte.
const HALF_CLOSED_IDLE: Duration = Duration::from_secs(300);

/// A connection to a port of the Pod.
pub type PodConnection = Box<dyn PodIo>;

/// What a connection to a port of the Pod can do; TCP streams can.
pub trait PodIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> PodIo for T {}

/// Connects to ports of one Pod, and knows its name for error texts.
pub trait Forwarder: Send + Sync {
    /// Connects to `port` in the Pod's network.
    fn connect(&self, port: u16) -> BoxFuture<'_, io::Result<PodConnection>>;
    /// The Pod in error texts: `namespace/name, uid u`.
    fn pod(&self) -> &str;
}

/// The ports a channel request names in its query (`port=80,443`).
///
/// # Errors
/// The text of the 400 answer.
pub fn ports_from_query<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Vec<u16>, String> {
    let mut ports = Vec::new();
    for (_, value) in pairs.filter(|(name, _)| *name == "port") {
        if value.is_empty() {
            return Err("query parameter \"port\" cannot be empty".into());
        }
        for text in value.split(',') {
            ports.push(parse_port(text).ok_or_else(|| format!("unable to parse {value:?} as a port: not 1 to 65535"))?);
        }
    }
    if ports.is_empty() {
        return Err("query parameter \"port\" is required".into());
    }
    // Two channels a port, and channel numbers are one byte (255 is reserved).
    if ports.len() > 127 { Err(format!("{} ports are too many: at most 127", ports.len())) } else { Ok(ports) }
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

/// Serves port-forward on an upgraded connection until the client leaves. `ports` are those of the query, for the
/// channel protocols; over SPDY every pair of streams names its own.
///
/// # Errors
/// If the connection fails, breaks the protocol or idles too long.
pub async fn serve<T>(
    io: T,
    upgrade: &Upgrade,
    ports: &[u16],
    limits: Limits,
    forwarder: &dyn Forwarder,
) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    match (upgrade.transport, upgrade.protocol) {
        (Transport::Spdy, _) => serve_spdy(io, limits, forwarder).await,
        (Transport::WebSocket, TUNNEL_PROTOCOL) => serve_spdy(Tunnel::new(io).await, limits, forwarder).await,
        (Transport::WebSocket, protocol) => serve_channels(io, Codec::of(protocol), ports, limits, forwarder).await,
    }
}

async fn serve_channels<T>(
    io: T,
    codec: Codec,
    ports: &[u16],
    limits: Limits,
    forwarder: &dyn Forwarder,
) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let kinds: Vec<_> = ports.iter().flat_map(|_| [Channel::ReadWrite, Channel::Write]).collect();
    let (ends, closer, driver) = websocket::channels(io, codec, &kinds, limits);
    let mut ends = ends.into_iter();
    let work = async move {
        let mut pairs = FuturesUnordered::new();
        for port in ports.iter().copied() {
            let (Some(data), Some(error)) = (ends.next(), ends.next()) else { break };
            let (Some(inbound), Some(data), Some(error)) = (data.inbound, data.outbound, error.outbound) else { break };
            pairs.push(async move {
                let mut pair = Pair { port, inbound, data, error };
                pair.announce().await?;
                pair.forward(forwarder).await;
                Ok::<_, Broken>(())
            });
        }
        while pairs.next().await.is_some() {}
        closer.close().await;
    };
    tokio::pin!(driver, work);
    tokio::select! {
        () = &mut work => driver.await,
        ended = &mut driver => ended,
    }
}

async fn serve_spdy<T>(io: T, limits: Limits, forwarder: &dyn Forwarder) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (mut accepted, driver) = spdy::connection(io, limits);
    let work = accept_pairs(&mut accepted, limits, forwarder);
    tokio::pin!(driver, work);
    tokio::select! {
        () = &mut work => driver.await,
        ended = &mut driver => ended,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Error,
}

/// One half of a pair that has arrived.
struct Half {
    kind: Kind,
    port: u16,
    inbound: Inbound,
    outbound: Outbound,
    expires: Instant,
}

async fn accept_pairs(accepted: &mut Accepted, limits: Limits, forwarder: &dyn Forwarder) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut running = FuturesUnordered::new();
    let mut open = true;
    while open || !running.is_empty() {
        let expiry = halves.values().map(|half| half.expires).min();
        let expired = async {
            match expiry {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            incoming = accepted.next(), if open => match incoming {
                Some(incoming) => {
                    if let Some(pair) = match_up(incoming, &mut halves, limits.stream_creation_timeout).await {
                        running.push(async move {
                            let mut pair = pair;
                            pair.forward(forwarder).await;
                        });
                    }
                }
                None => open = false,
            },
            Some(()) = running.next() => {}
            () = expired => {
                let now = Instant::now();
                let late: Vec<_> = halves.extract_if(|_, half| half.expires <= now).collect();
                for (request, mut half) in late {
                    if half.kind == Kind::Error {
                        let text = format!("(request={request}) timed out waiting for streams");
                        let _ = half.outbound.send(text.into()).await;
                    }
                    half.outbound.reset(spdy::status::CANCEL).await;
                }
            }
        }
    }
    accepted.close().await;
}

/// Accepts a stream and looks for its other half.
async fn match_up(incoming: Incoming, halves: &mut HashMap<String, Half>, timeout: Duration) -> Option<Pair> {
    let Some((kind, port)) = stream_kind(&incoming.headers) else {
        incoming.refuse().await;
        return None;
    };
    let request = match incoming.headers.get("requestID") {
        Some(request) if !request.is_empty() => request.to_owned(),
        // Old clients send no id; they open the error stream and then, with the next id, the data stream.
        _ if kind == Kind::Data => incoming.id.saturating_sub(2).to_string(),
        _ => incoming.id.to_string(),
    };
    if halves.get(&request).is_some_and(|half| half.kind == kind) {
        incoming.refuse().await;
        return None;
    }
    let (inbound, outbound) = incoming.accept().await.ok()?;
    let half = Half { kind, port, inbound, outbound, expires: Instant::now() + timeout };
    let Some(other) = halves.remove(&request) else {
        halves.insert(request, half);
        return None;
    };
    let (data, error) = if kind == Kind::Data { (half, other) } else { (other, half) };
    Some(Pair { port: data.port, inbound: data.inbound, data: data.outbound, error: error.outbound })
}

fn stream_kind(headers: &Headers) -> Option<(Kind, u16)> {
    let kind = match headers.get("streamType")? {
        "data" => Kind::Data,
        "error" => Kind::Error,
        _ => return None,
    };
    Some((kind, parse_port(headers.get("port")?)?))
}

/// One forwarded connection.
struct Pair {
    port: u16,
    inbound: Inbound,
    data: Outbound,
    error: Outbound,
}

impl Pair {
    /// The first message on both channels is the port, little-endian.
    async fn announce(&mut self) -> Result<(), Broken> {
        let port = Bytes::copy_from_slice(&self.port.to_le_bytes());
        self.data.send(port.clone()).await?;
        self.error.send(port).await
    }

    async fn forward(&mut self, forwarder: &dyn Forwarder) {
        let outcome = match forwarder.connect(self.port).await {
            Ok(connection) => self.copy(connection).await,
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            let text = format!("error forwarding port {} to pod {}: {error}", self.port, forwarder.pod());
            let _ = self.error.send(text.into()).await;
            // The client opens a new pair for its next connection; the others of this client go on.
            self.data.reset(spdy::status::CANCEL).await;
            self.error.reset(spdy::status::CANCEL).await;
        }
        self.data.finish().await;
        self.error.finish().await;
    }

    /// Copies both ways until both sides have finished, or one is lost.
    async fn copy(&mut self, connection: PodConnection) -> io::Result<()> {
        let (mut from_pod, mut to_pod) = tokio::io::split(connection);
        let activity = Activity::new();
        let reset = self.data.was_reset();
        let (inbound, outbound) = (&mut self.inbound, &mut self.data);
        let upload = async {
            while let Some(data) = inbound.recv().await.map_err(|Broken| End::ClientGone)? {
                activity.touch();
                to_pod.write_all(&data).await.map_err(End::Failed)?;
            }
            to_pod.shutdown().await.map_err(End::Failed)
        };
        let download = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(MAX_CHUNK);
                if from_pod.read_buf(&mut buffer).await.map_err(End::Failed)? == 0 {
                    outbound.finish().await;
                    return Ok(());
                }
                activity.touch();
                outbound.send(buffer.split().freeze()).await.map_err(|Broken| End::ClientGone)?;
            }
        };
        // Both at once: a side that waits for the other to read must not keep us from reading.
        let both = async {
            tokio::pin!(upload, download);
            tokio::select! {
                end = &mut upload => match end {
                    Ok(()) => half_closed(&activity, download).await,
                    end => end,
                },
                end = &mut download => match end {
                    Ok(()) => half_closed(&activity, upload).await,
                    end => end,
                },
            }
        };
        let end = tokio::select! {
            end = both => end,
            // Clients reset the data stream when they are done with a connection, and wait for the error stream.
            () = reset => Err(End::ClientGone),
        };
        match end {
            Err(End::Failed(error)) => Err(error),
            Ok(()) | Err(End::ClientGone) => Ok(()),
        }
    }
}

/// Why copying stopped early.
enum End {
    /// The client gave the connection up.
    ClientGone,
    /// The connection to the Pod failed.
    Failed(io::Error),
}

async fn half_closed(activity: &Activity, other: impl Future<Output = Result<(), End>>) -> Result<(), End> {
    activity.touch();
    tokio::select! {
        end = other => end,
        () = activity.idle(HALF_CLOSED_IDLE) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::{FutureExt, SinkExt};
    use tokio::io::DuplexStream;
    use tokio_tungstenite::{
        WebSocketStream,
        tungstenite::{Message, protocol::Role},
    };

    use super::*;
    use crate::stream::spdy::testing::Client;

    /// A Pod whose port 1 refuses and whose other ports echo.
    struct Echo(Mutex<Vec<u16>>);

    impl Forwarder for Echo {
        fn connect(&self, port: u16) -> BoxFuture<'_, io::Result<PodConnection>> {
            self.0.lock().expect("lock").push(port);
            async move {
                if port == 1 {
                    return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
                }
                let (ours, theirs) = tokio::io::duplex(1 << 12);
                tokio::spawn(async move {
                    let (mut read, mut write) = tokio::io::split(theirs);
                    tokio::io::copy(&mut read, &mut write).await.expect("echo");
                    write.shutdown().await.expect("shutdown");
                });
                Ok(Box::new(ours) as PodConnection)
            }
            .boxed()
        }

        fn pod(&self) -> &str {
            "ns/p, uid u"
        }
    }

    fn served(transport: Transport, protocol: &'static str, ports: &'static [u16]) -> DuplexStream {
        let (client, server) = tokio::io::duplex(1 << 16);
        let upgrade = Upgrade::accepted(transport, protocol);
        let limits = Limits { stream_creation_timeout: Duration::from_millis(300), ..Limits::default() };
        tokio::spawn(async move { serve(server, &upgrade, ports, limits, &Echo(Mutex::default())).await });
        client
    }

    async fn open_pair(
        client: &mut Client<impl AsyncRead + AsyncWrite + Unpin>,
        first: u32,
        port: &str,
        request: &str,
    ) {
        let mut common = vec![("port", port)];
        if !request.is_empty() {
            common.push(("requestID", request));
        }
        client.open(first, &[&common[..], &[("streamType", "error")]].concat()).await;
        client.open(first + 2, &[&common[..], &[("streamType", "data")]].concat()).await;
    }

    #[test]
    fn ports_of_a_query() {
        let parse = |value: &'static str| ports_from_query([("port", value)].into_iter());
        assert_eq!(parse("80,443"), Ok(vec![80, 443]));
        for bad in ["", "0", "65536", "+1", "80,", "http"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(ports_from_query([("ports", "80")].into_iter()).is_err());
    }

    #[tokio::test]
    async fn spdy_pairs_are_independent() {
        let mut client = Client::new(served(Transport::Spdy, "portforward.k8s.io", &[]));
        open_pair(&mut client, 1, "8080", "0").await;
        open_pair(&mut client, 5, "1", "1").await;
        // A client that sends no request ids.
        open_pair(&mut client, 9, "9090", "").await;
        let big = vec![b'x'; 300_000];
        let echoed = client.exchange(3, &big, true).await;
        assert_eq!(echoed.payload(3).len(), big.len());
        assert_eq!(
            String::from_utf8(echoed.payload(5)).expect("text"),
            "error forwarding port 1 to pod ns/p, uid u: connection refused"
        );
        let echoed = client.exchange(11, b"legacy", true).await;
        assert_eq!(echoed.payload(11), b"legacy");
        client.open(13, &[("port", "0"), ("streamType", "data")]).await;
        assert!(client.until(|end| end == "rst 13").await.ends().contains(&"rst 13".to_owned()));
    }

    #[tokio::test]
    async fn half_a_pair_expires() {
        let mut client = Client::new(served(Transport::Spdy, "portforward.k8s.io", &[]));
        client.open(1, &[("port", "80"), ("streamType", "error"), ("requestID", "7")]).await;
        let frames = client.until(|end| end == "rst 1").await;
        assert_eq!(frames.payload(1), b"(request=7) timed out waiting for streams");
    }

    #[tokio::test]
    async fn websocket_channels_announce_their_ports() {
        let io = served(Transport::WebSocket, "v4.channel.k8s.io", &[8080, 1]);
        let mut client = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
        client.send(Message::binary(&b"\x00hello"[..])).await.expect("send");
        let mut received: HashMap<u8, Vec<u8>> = HashMap::new();
        while received.get(&0).is_none_or(|data| data.len() < 7) || received.get(&3).is_none_or(|text| text.len() < 3) {
            let message = client.next().await.expect("message").expect("message").into_data();
            received.entry(message[0]).or_default().extend(&message[1..]);
        }
        assert_eq!(received[&0], b"\x90\x1fhello");
        assert_eq!(received[&1], [0x90, 0x1f]);
        assert_eq!(received[&2], [1, 0]);
        assert!(received[&3].starts_with(b"\x01\x00error forwarding port 1 to pod ns/p"));
    }

    #[tokio::test]
    async fn tunnel_carries_spdy() {
        let io = served(Transport::WebSocket, TUNNEL_PROTOCOL, &[]);
        let tunnel = Tunnel::client(io).await;
        let mut client = Client::new(tunnel);
        open_pair(&mut client, 1, "8080", "0").await;
        let echoed = client.exchange(3, &vec![1; 200_000], true).await;
        assert_eq!(echoed.payload(3), vec![1; 200_000]);
    }
}
