//! WebSocket transports: numbered channels, and a tunnel that carries SPDY frames as an opaque byte stream.
//!
//! Channels (`channel.k8s.io` and its versions): every message is one channel number and a payload; in the base64
//! variants an ASCII digit and base64 text. With half-close (`v5`), the message `[255, n]` ends channel `n`.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{
    CLOSE_TIMEOUT, Limits,
    mux::{Activity, Closer, Command, Feed, Hub, Inbound, MAX_CHUNK, Outbound},
};

/// Largest message a client may send, in bytes: the bound of Go's `x/net/websocket`, which the kubelet uses.
const MAX_MESSAGE: usize = 32 << 20;
/// First byte of the message that ends a channel.
const CLOSE_CHANNEL: u8 = 255;

fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE))
}

fn close_normally() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

/// How a sub-protocol puts channels into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codec {
    /// Text messages with base64, instead of binary ones.
    pub base64: bool,
    /// The client may end single channels.
    pub half_close: bool,
}

impl Codec {
    /// The codec of a negotiated sub-protocol.
    pub fn of(protocol: &str) -> Self {
        Self { base64: protocol.contains("base64"), half_close: protocol.starts_with("v5.") }
    }

    fn encode(self, channel: u8, payload: &[u8]) -> Message {
        if self.base64 {
            let mut text = String::with_capacity(1 + payload.len().div_ceil(3) * 4);
            text.push(char::from(b'0'.wrapping_add(channel)));
            BASE64.encode_string(payload, &mut text);
            Message::text(text)
        } else {
            let mut message = BytesMut::with_capacity(1 + payload.len());
            message.put_u8(channel);
            message.put_slice(payload);
            Message::Binary(message.freeze())
        }
    }

    /// The channel and payload of a message; `None` if it makes no sense and is to be passed over.
    fn decode(self, mut message: Bytes) -> Option<(u8, Bytes)> {
        if message.is_empty() {
            return None;
        }
        let first = message.get_u8();
        if self.base64 {
            let payload = BASE64.decode(&message).ok()?;
            Some((first.checked_sub(b'0')?, payload.into()))
        } else {
            Some((first, message))
        }
    }
}

/// What the client may do with a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Nothing: what is sent on it is dropped, both ways.
    Ignored,
    /// The client sends.
    Read,
    /// The server sends.
    Write,
    /// Both send.
    ReadWrite,
}

/// The two ends of one channel, as far as it has them.
pub struct Ends {
    /// What the client sends.
    pub inbound: Option<Inbound>,
    /// What goes to the client.
    pub outbound: Option<Outbound>,
}

/// Serves numbered channels on an upgraded connection: the ends of `channels`, a handle to close the connection,
/// and the future that drives it. Dropping the future closes the connection at once.
pub(super) fn channels<T>(
    io: T,
    codec: Codec,
    channels: &[Channel],
    limits: Limits,
) -> (Vec<Ends>, Closer, impl Future<Output = io::Result<()>> + Send)
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (hub, commands) = Hub::new(channels.len(), limits.max_buffered_bytes);
    let mut ends = Vec::with_capacity(channels.len());
    let mut feeds = Vec::with_capacity(channels.len());
    for (number, channel) in (0_u32..).zip(channels) {
        let Some((feed, _, inbound, outbound)) = hub.stream(number) else { break };
        let reads = matches!(channel, Channel::Read | Channel::ReadWrite);
        let writes = matches!(channel, Channel::Write | Channel::ReadWrite);
        feeds.push(reads.then_some(feed));
        ends.push(Ends { inbound: reads.then_some(inbound), outbound: writes.then_some(outbound) });
    }
    (ends, hub.closer(), drive(io, codec, feeds, commands, limits))
}

async fn drive<T>(
    io: T,
    codec: Codec,
    feeds: Vec<Option<Feed>>,
    commands: mpsc::Receiver<Command>,
    limits: Limits,
) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let activity = Activity::new();
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await;
    let (mut sink, mut stream) = socket.split();
    let closing = tokio::select! {
        outcome = write_messages(&mut sink, codec, commands, &activity) => outcome.map(|()| true),
        outcome = read_messages(&mut stream, codec, feeds, &activity) => outcome.map(|()| false),
        () = activity.idle(limits.idle_timeout) => Err(io::Error::from(io::ErrorKind::TimedOut)),
    }?;
    let finish = async {
        if closing {
            while matches!(stream.next().await, Some(Ok(_))) {}
        }
        // The client is leaving or has left; whether it still listens does not matter any more.
        let _ = sink.close().await;
    };
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, finish).await;
    Ok(())
}

async fn read_messages<S>(
    stream: &mut S,
    codec: Codec,
    mut feeds: Vec<Option<Feed>>,
    activity: &Activity,
) -> io::Result<()>
where
    S: Stream<Item = Result<Message, WsError>> + Unpin,
{
    while let Some(message) = stream.next().await {
        activity.touch();
        let message = match message.map_err(to_io)? {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => Bytes::from(text),
            Message::Close(_) => break,
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
        };
        if codec.half_close && message.first() == Some(&CLOSE_CHANNEL) {
            let invalid = || io::Error::new(io::ErrorKind::InvalidData, "close signal must name one existing channel");
            let [_, channel] = message[..] else { return Err(invalid()) };
            let feed = feeds.get_mut(usize::from(channel)).ok_or_else(invalid)?;
            if let Some(feed) = feed.take() {
                feed.finish().await;
            }
            continue;
        }
        if let Some((channel, payload)) = codec.decode(message)
            && let Some(Some(feed)) = feeds.get(usize::from(channel))
        {
            feed.data(payload).await;
        }
    }
    Ok(())
}

async fn write_messages<S>(
    sink: &mut S,
    codec: Codec,
    mut commands: mpsc::Receiver<Command>,
    activity: &Activity,
) -> io::Result<()>
where
    S: Sink<Message, Error = WsError> + Unpin,
{
    while let Some(command) = commands.recv().await {
        let mut next = Some(command);
        while let Some(command) = next {
            match command {
                Command::Data(id, payload) => {
                    let channel = u8::try_from(id).map_err(|_| io::ErrorKind::InvalidInput)?;
                    sink.feed(codec.encode(channel, &payload)).await.map_err(to_io)?;
                }
                Command::Shutdown(_) => return sink.send(close_normally()).await.map_err(to_io),
                // Channels have no ends of their own in the direction of the client.
                Command::Reply(_) | Command::Finish(_) | Command::Reset(..) | Command::Pong(_) => {}
            }
            next = commands.try_recv().ok();
        }
        sink.flush().await.map_err(to_io)?;
        activity.touch();
    }
    Ok(())
}

fn to_io(error: WsError) -> io::Error {
    match error {
        WsError::Io(error) => error,
        WsError::ConnectionClosed | WsError::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

/// A byte stream in binary WebSocket messages (`SPDY/3.1+portforward.k8s.io`). A normal close is its end.
pub(super) struct Tunnel<T> {
    socket: WebSocketStream<T>,
    unread: Bytes,
    close_sent: bool,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Tunnel<T> {
    pub(super) async fn new(io: T) -> Self {
        let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await;
        Self { socket, unread: Bytes::new(), close_sent: false }
    }

    #[cfg(test)]
    pub(super) async fn client(io: T) -> Self {
        let socket = WebSocketStream::from_raw_socket(io, Role::Client, Some(config())).await;
        Self { socket, unread: Bytes::new(), close_sent: false }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.unread.is_empty() {
                let count = self.unread.len().min(buf.remaining());
                buf.put_slice(&self.unread.split_to(count));
                return Poll::Ready(Ok(()));
            }
            match ready!(self.socket.poll_next_unpin(cx)) {
                None | Some(Ok(Message::Close(_)) | Err(WsError::ConnectionClosed)) => return Poll::Ready(Ok(())),
                Some(Ok(Message::Binary(bytes))) => self.unread = bytes,
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    let message = "text message in a tunnel of binary ones";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, message)));
                }
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.socket.poll_ready_unpin(cx)).map_err(to_io)?;
        let piece = &data[..data.len().min(2 * MAX_CHUNK)];
        self.socket.start_send_unpin(Message::Binary(Bytes::copy_from_slice(piece))).map_err(to_io)?;
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_flush_unpin(cx).map_err(to_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.close_sent {
            ready!(self.socket.poll_ready_unpin(cx)).map_err(to_io)?;
            self.socket.start_send_unpin(close_normally()).map_err(to_io)?;
            self.close_sent = true;
        }
        self.socket.poll_flush_unpin(cx).map_err(to_io)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_of_each_codec() {
        let (binary, base64) = (Codec::of("v4.channel.k8s.io"), Codec::of("v4.base64.channel.k8s.io"));
        assert_eq!(binary.encode(1, b"hi"), Message::Binary(Bytes::from_static(b"\x01hi")));
        assert_eq!(base64.encode(1, b"\n"), Message::text("1Cg=="));
        assert_eq!(base64.decode(Bytes::from_static(b"0Zm9vCg==")), Some((0, Bytes::from_static(b"foo\n"))));
        assert_eq!(base64.decode(Bytes::from_static(b"0***")), None);
        assert_eq!(binary.decode(Bytes::new()), None);
        assert!(Codec::of("v5.channel.k8s.io").half_close && !binary.half_close);
    }

    proptest! {
        #[test]
        fn codecs_are_inverse(channel in 0_u8..10, payload in prop::collection::vec(any::<u8>(), 0..100), base64: bool) {
            let codec = Codec { base64, half_close: false };
            let message = codec.encode(channel, &payload).into_data();
            prop_assert_eq!(codec.decode(message), Some((channel, Bytes::from(payload))));
        }

        #[test]
        fn hostile_messages_do_not_panic(message in prop::collection::vec(any::<u8>(), 0..100), base64: bool) {
            let _ = Codec { base64, half_close: false }.decode(message.into());
        }
    }
}
