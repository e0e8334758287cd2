//! The server side of one SPDY connection.

use std::{collections::HashMap, io};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

use super::{
    frame::{self, Decoder, Encoder, Frame, status},
    headers::Headers,
};
use crate::stream::{
    CLOSE_TIMEOUT, Limits,
    mux::{Activity, Broken, Closer, Command, Feed, Hub, Inbound, MAX_CHUNK, Outbound, StreamWatch},
};

/// Streams opened by the client and not looked at yet.
const PENDING_STREAMS: usize = 16;
/// Frames are gathered up to this size before they are written, in bytes.
const WRITE_BATCH: usize = 64 << 10;

/// A stream that a client wants to open.
pub struct Incoming {
    /// Stream id.
    pub id: u32,
    /// What the stream is for.
    pub headers: Headers,
    inbound: Inbound,
    outbound: Outbound,
}

impl Incoming {
    /// Accepts the stream: the client gets its `SYN_REPLY`.
    ///
    /// # Errors
    /// [`Broken`] if the connection is gone.
    pub async fn accept(self) -> Result<(Inbound, Outbound), Broken> {
        self.outbound.reply().await?;
        Ok((self.inbound, self.outbound))
    }

    /// Refuses the stream (`RST_STREAM` with `CANCEL`, as the Go server does).
    pub async fn refuse(mut self) {
        self.outbound.reset(status::CANCEL).await;
    }
}

/// The streams that a client opens, one after the other.
pub struct Accepted {
    incoming: mpsc::Receiver<Incoming>,
    closer: Closer,
}

impl Accepted {
    /// The next stream; `None` once the client is gone or opens no more.
    pub async fn next(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Ends the connection after everything queued was delivered.
    pub async fn close(&self) {
        self.closer.close().await;
    }
}

/// Serves SPDY on `io`: the streams that the client opens, and the future that drives the connection. Dropping
/// the future closes the connection at once.
pub(in crate::stream) fn connection<T>(io: T, limits: Limits) -> (Accepted, impl Future<Output = io::Result<()>> + Send)
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (hub, commands) = Hub::new(limits.max_streams, limits.max_buffered_bytes);
    let (sender, incoming) = mpsc::channel(PENDING_STREAMS);
    let accepted = Accepted { incoming, closer: hub.closer() };
    (accepted, drive(io, limits, hub, commands, sender))
}

async fn drive<T>(
    io: T,
    limits: Limits,
    hub: Hub,
    commands: mpsc::Receiver<Command>,
    incoming: mpsc::Sender<Incoming>,
) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let activity = Activity::new();
    let (mut read, mut write) = tokio::io::split(io);
    let mut reader = Reader {
        decoder: Decoder::new(limits.max_header_bytes),
        streams: HashMap::new(),
        next_id: 1,
        incoming: Some(incoming),
        hub,
        activity: activity.clone(),
    };
    let closing = {
        let reading = reader.run(&mut read);
        let writing = write_frames(&mut write, commands, activity.clone());
        tokio::pin!(reading, writing);
        tokio::select! {
            outcome = &mut writing => outcome.map(|()| true),
            outcome = &mut reading => match outcome {
                Ok(()) => Ok(false),
                Err(error) => {
                    // Let the peer know why; it may have stopped reading, so only for a moment.
                    let _ = tokio::time::timeout(CLOSE_TIMEOUT, &mut writing).await;
                    Err(error)
                }
            },
            () = activity.idle(limits.idle_timeout) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }?;
    if closing {
        // Closing with unread bytes would make the kernel send a reset, which can overtake our last frames.
        let mut scratch = vec![0; MAX_CHUNK];
        let drain = async { while matches!(read.read(&mut scratch).await, Ok(1..)) {} };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, drain).await;
    }
    Ok(())
}

/// The reader's part of a stream.
struct Stream {
    /// Until the client finishes its direction.
    feed: Option<Feed>,
    watch: StreamWatch,
}

struct Reader {
    decoder: Decoder,
    streams: HashMap<u32, Stream>,
    next_id: u32,
    incoming: Option<mpsc::Sender<Incoming>>,
    hub: Hub,
    activity: Activity,
}

impl Reader {
    /// Reads until the client closes the connection, cleanly or not.
    async fn run<R: AsyncRead + Unpin>(&mut self, read: &mut R) -> io::Result<()> {
        let mut buffer = BytesMut::new();
        loop {
            loop {
                match self.decoder.decode(&mut buffer) {
                    Ok(Some(frame)) => {
                        if self.handle(frame).await.is_err() {
                            return Ok(());
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        let _ = self.hub.command(Command::Shutdown(status::GOAWAY_PROTOCOL_ERROR)).await;
                        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                    }
                }
            }
            buffer.reserve(MAX_CHUNK);
            if read.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            self.activity.touch();
        }
    }

    async fn handle(&mut self, frame: Frame) -> Result<(), Broken> {
        match frame {
            Frame::SynStream { id, headers, fin, unidirectional } => {
                self.open(id, headers, fin, unidirectional).await?;
            }
            Frame::Data { id, data, fin, .. } => {
                // Data for a stream that is finished or was reset crosses with our reset: it is dropped.
                if let Some(Stream { feed: Some(feed), .. }) = self.streams.get(&id) {
                    feed.data(data).await;
                }
                self.finish_if(fin, id).await;
            }
            Frame::Headers { id, fin, .. } | Frame::SynReply { id, fin, .. } => self.finish_if(fin, id).await,
            Frame::RstStream { id, .. } => {
                if let Some(stream) = self.streams.remove(&id) {
                    stream.watch.reset();
                }
            }
            // Ours would be even; we send none, so an even one answers nothing.
            Frame::Ping(id) if id % 2 == 1 => self.hub.command(Command::Pong(id)).await?,
            Frame::GoAway { .. } => drop(self.incoming.take()),
            Frame::Ping(_) | Frame::Ignored => {}
        }
        Ok(())
    }

    async fn finish_if(&mut self, fin: bool, id: u32) {
        if fin && let Some(feed) = self.streams.get_mut(&id).and_then(|stream| stream.feed.take()) {
            feed.finish().await;
        }
    }

    async fn open(&mut self, id: u32, headers: Headers, fin: bool, unidirectional: bool) -> Result<(), Broken> {
        let Some(incoming) = &self.incoming else { return Ok(()) };
        if id.is_multiple_of(2) || id < self.next_id {
            return self.hub.command(Command::Reset(id, status::PROTOCOL_ERROR)).await;
        }
        self.next_id = id.saturating_add(2);
        self.streams.retain(|_, stream| !stream.watch.is_over());
        let Some((feed, watch, inbound, outbound)) = self.hub.stream(id) else {
            return self.hub.command(Command::Reset(id, status::REFUSED_STREAM)).await;
        };
        let outbound = if unidirectional { outbound.closed() } else { outbound };
        let feed = if fin {
            feed.finish().await;
            None
        } else {
            Some(feed)
        };
        self.streams.insert(id, Stream { feed, watch });
        let stream = Incoming { id, headers, inbound, outbound };
        if incoming.send(stream).await.is_err() {
            // Nobody takes streams any more; the connection is about to be closed.
            self.incoming = None;
        }
        Ok(())
    }
}

async fn write_frames<W: AsyncWrite + Unpin>(
    write: &mut W,
    mut commands: mpsc::Receiver<Command>,
    activity: Activity,
) -> io::Result<()> {
    let mut encoder = Encoder::new();
    let mut out = BytesMut::new();
    let mut last_stream = 0;
    while let Some(command) = commands.recv().await {
        let mut next = Some(command);
        let mut stop = false;
        while let Some(command) = next {
            match command {
                Command::Reply(id) => {
                    last_stream = last_stream.max(id);
                    encoder.syn_reply(id, &mut out).map_err(io::Error::other)?;
                }
                Command::Data(id, payload) => frame::data(id, &payload, false, &mut out),
                Command::Finish(id) => frame::data(id, &[], true, &mut out),
                Command::Reset(id, code) => frame::rst_stream(id, code, &mut out),
                Command::Pong(id) => frame::ping(id, &mut out),
                Command::Shutdown(code) => {
                    frame::goaway(last_stream, code, &mut out);
                    stop = true;
                    break;
                }
            }
            next = if out.len() < WRITE_BATCH { commands.try_recv().ok() } else { None };
        }
        write.write_all(&out).await?;
        out.clear();
        write.flush().await?;
        activity.touch();
        if stop {
            break;
        }
    }
    write.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::DuplexStream;

    use super::{super::testing, *};

    type Client = testing::Client<DuplexStream>;

    fn pair(limits: Limits) -> (Client, Accepted, tokio::task::JoinHandle<io::Result<()>>) {
        let (client, server) = tokio::io::duplex(1 << 16);
        let (accepted, driver) = connection(server, limits);
        (Client::new(client), accepted, tokio::spawn(driver))
    }

    #[tokio::test]
    async fn streams_echo_and_half_close() {
        let (mut client, mut accepted, driver) = pair(Limits::default());
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout")] {
            client.open(id, &[("streamType", kind)]).await;
            let incoming = accepted.next().await.expect("stream");
            assert_eq!(incoming.headers.get("streamType"), Some(kind));
            let (mut inbound, mut outbound) = incoming.accept().await.expect("accept");
            assert_eq!(client.frame().await, Some(Frame::SynReply { id, headers: Headers::default(), fin: false }));
            client.data(id, b"ping", true).await;
            assert_eq!(inbound.recv().await, Ok(Some(Bytes::from_static(b"ping"))));
            assert_eq!(inbound.recv().await, Ok(None));
            outbound.send(Bytes::from_static(b"pong")).await.expect("send");
            outbound.finish().await;
            let expected = Frame::Data { id, data: Bytes::from_static(b"pong"), fin: false, more: false };
            assert_eq!(client.frame().await, Some(expected));
            let expected = Frame::Data { id, data: Bytes::new(), fin: true, more: false };
            assert_eq!(client.frame().await, Some(expected));
        }
        accepted.close().await;
        assert_eq!(client.frame().await, Some(Frame::GoAway { last_stream: 5, status: 0 }));
        assert_eq!(client.frame().await, None);
        drop(client);
        driver.await.expect("join").expect("driver");
    }

    #[tokio::test]
    async fn pings_resets_and_bad_ids() {
        let (mut client, mut accepted, _driver) = pair(Limits::default());
        let mut out = BytesMut::new();
        frame::ping(77, &mut out);
        client.io.write_all(&out).await.expect("write");
        assert_eq!(client.frame().await, Some(Frame::Ping(77)));
        client.open(2, &[("streamType", "even")]).await;
        assert_eq!(client.frame().await, Some(Frame::RstStream { id: 2, status: status::PROTOCOL_ERROR }));
        client.open(1, &[("streamType", "data")]).await;
        let (mut inbound, _outbound) = accepted.next().await.expect("stream").accept().await.expect("accept");
        client.frame().await.expect("reply");
        out.clear();
        frame::rst_stream(1, status::CANCEL, &mut out);
        client.io.write_all(&out).await.expect("write");
        assert_eq!(inbound.recv().await, Err(Broken));
        client.open(1, &[("streamType", "again")]).await;
        assert_eq!(client.frame().await, Some(Frame::RstStream { id: 1, status: status::PROTOCOL_ERROR }));
    }

    #[tokio::test]
    async fn a_reset_after_the_clients_end_stops_the_way_back() {
        let (mut client, mut accepted, _driver) = pair(Limits::default());
        client.open(1, &[("streamType", "data")]).await;
        let (mut inbound, mut outbound) = accepted.next().await.expect("stream").accept().await.expect("accept");
        client.frame().await.expect("reply");
        client.data(1, b"", true).await;
        assert_eq!(inbound.recv().await, Ok(None));
        outbound.send(Bytes::from_static(b"still open")).await.expect("send");
        let mut out = BytesMut::new();
        frame::rst_stream(1, status::CANCEL, &mut out);
        client.io.write_all(&out).await.expect("write");
        tokio::time::timeout(Duration::from_secs(5), outbound.was_reset()).await.expect("told");
        assert_eq!(outbound.send(Bytes::from_static(b"lost")).await, Err(Broken));
    }

    #[tokio::test]
    async fn too_many_streams_are_refused_until_one_is_dropped() {
        let (mut client, mut accepted, _driver) = pair(Limits { max_streams: 1, ..Limits::default() });
        client.open(1, &[("streamType", "data")]).await;
        let first = accepted.next().await.expect("stream").accept().await.expect("accept");
        client.frame().await.expect("reply");
        client.open(3, &[("streamType", "data")]).await;
        assert_eq!(client.frame().await, Some(Frame::RstStream { id: 3, status: status::REFUSED_STREAM }));
        drop(first);
        client.open(5, &[("streamType", "data")]).await;
        assert_eq!(accepted.next().await.expect("stream").id, 5);
    }

    #[tokio::test]
    async fn a_stalled_consumer_stops_the_client_and_loses_nothing() {
        let limits = Limits { max_buffered_bytes: 64 << 10, ..Limits::default() };
        let (mut client, mut accepted, _driver) = pair(limits);
        client.open(1, &[("streamType", "stdin")]).await;
        let (mut inbound, _outbound) = accepted.next().await.expect("stream").accept().await.expect("accept");
        client.frame().await.expect("reply");
        let sender = tokio::spawn(async move {
            client.data(1, &vec![7; 1 << 20], true).await;
            client
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!sender.is_finished(), "a megabyte fits nowhere: the client has to wait");
        let mut total = 0;
        while let Some(data) = inbound.recv().await.expect("recv") {
            total += data.len();
        }
        assert_eq!(total, 1 << 20);
        sender.await.expect("join");
    }

    #[tokio::test]
    async fn garbage_ends_the_connection_with_goaway() {
        let (mut client, _accepted, driver) = pair(Limits::default());
        client.io.write_all(b"\xffSSH-2.0-client\r\n").await.expect("write");
        assert_eq!(client.frame().await, Some(Frame::GoAway { last_stream: 0, status: 1 }));
        assert!(driver.await.expect("join").is_err());
    }

    #[tokio::test]
    async fn idle_connections_end() {
        let limits = Limits { idle_timeout: Duration::from_millis(100), ..Limits::default() };
        let (mut client, _accepted, driver) = pair(limits);
        assert_eq!(client.frame().await, None);
        assert_eq!(driver.await.expect("join").expect_err("idle").kind(), io::ErrorKind::TimedOut);
    }
}
