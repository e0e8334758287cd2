//! A session against a server that behaves, and one that does not.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::frame::Frame;
use super::session::{SessionError, run};
use super::target::Target;

const SOON: Duration = Duration::from_secs(10);

/// The server's end of a session, and our port.
struct Rig {
    server: WebSocketStream<DuplexStream>,
    port: TcpListener,
    session: tokio::task::JoinHandle<SessionError>,
}

impl Rig {
    async fn new() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target { address: "0.0.0.0".parse().unwrap(), port: port.local_addr().unwrap().port() };
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let client = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let session = tokio::spawn(async move { run(client, &target).await });
        Self { server: WebSocketStream::from_raw_socket(theirs, Role::Server, None).await, port, session }
    }

    fn address(&self) -> String {
        self.port.local_addr().unwrap().to_string()
    }

    async fn send(&mut self, frame: Frame) {
        timeout(SOON, self.server.send(Message::Binary(frame.encode(1)))).await.unwrap().unwrap();
    }

    /// The next message but pings.
    async fn next(&mut self) -> Frame {
        loop {
            if let Message::Binary(message) = timeout(SOON, self.server.next()).await.unwrap().unwrap().unwrap() {
                return Frame::decode(message).unwrap();
            }
        }
    }

    async fn connect(&mut self, connection: i64) -> TcpStream {
        let address = self.address();
        self.send(Frame::Connect { connection, protocol: "tcp".into(), address }).await;
        timeout(SOON, self.port.accept()).await.unwrap().unwrap().0
    }
}

#[tokio::test]
async fn bytes_go_both_ways_until_one_end_is_over() {
    let mut rig = Rig::new().await;
    let mut port = rig.connect(7).await;
    rig.send(Frame::Data(7, Bytes::from_static(b"question"))).await;
    let mut question = [0; 8];
    timeout(SOON, port.read_exact(&mut question)).await.unwrap().unwrap();
    assert_eq!(&question, b"question");
    port.write_all(b"answer").await.unwrap();
    assert_eq!(rig.next().await, Frame::Data(7, Bytes::from_static(b"answer")));
    drop(port);
    assert_eq!(rig.next().await, Frame::Error(7, "EOF".into()));
    // the server's end: what it sent before still arrives
    let mut port = rig.connect(8).await;
    rig.send(Frame::Data(8, Bytes::from_static(b"last words"))).await;
    rig.send(Frame::Error(8, "EOF".into())).await;
    let mut words = String::new();
    timeout(SOON, port.read_to_string(&mut words)).await.unwrap().unwrap();
    assert_eq!(words, "last words");
}

#[tokio::test]
async fn a_connection_to_elsewhere_is_refused_and_the_others_go_on() {
    let mut rig = Rig::new().await;
    let mut port = rig.connect(1).await;
    for address in ["127.0.0.1:1", "169.254.169.254:80"] {
        rig.send(Frame::Connect { connection: 2, protocol: "tcp".into(), address: address.into() }).await;
        let Frame::Error(2, why) = rig.next().await else { panic!("not refused") };
        assert!(why.contains("not allowed"), "{why}");
    }
    rig.send(Frame::Data(3, Bytes::from_static(b"x"))).await;
    assert_eq!(rig.next().await, Frame::Error(3, "connection not found".into()));
    port.write_all(b"still here").await.unwrap();
    assert_eq!(rig.next().await, Frame::Data(1, Bytes::from_static(b"still here")));
}

#[tokio::test]
async fn a_full_buffer_asks_for_a_pause_and_a_drained_one_goes_on() {
    let mut rig = Rig::new().await;
    let mut port = rig.connect(1).await;
    let chunk = Bytes::from(vec![b'x'; 64 << 10]);
    // more than the kernel's buffers and the bound together
    let mut sent = 0;
    let paused = loop {
        rig.send(Frame::Data(1, chunk.clone())).await;
        sent += chunk.len();
        let news = timeout(Duration::from_millis(2), rig.server.next()).await;
        match news.map(|message| message.unwrap().unwrap()) {
            Ok(Message::Binary(message)) => break Frame::decode(message).unwrap(),
            _ => assert!(sent < 64 << 20, "never paused"),
        }
    };
    assert_eq!(paused, Frame::Pause(1));
    let mut all = vec![0; sent];
    timeout(SOON, port.read_exact(&mut all)).await.unwrap().unwrap();
    assert_eq!(rig.next().await, Frame::Resume(1));
}

#[tokio::test]
async fn a_server_that_does_not_pause_loses_the_connection() {
    let mut rig = Rig::new().await;
    let _port = rig.connect(1).await;
    let chunk = Bytes::from(vec![b'x'; 256 << 10]);
    let mut refused = false;
    for _ in 0..256 {
        rig.send(Frame::Data(1, chunk.clone())).await;
        if let Ok(Some(Ok(Message::Binary(message)))) = timeout(Duration::from_millis(5), rig.server.next()).await
            && let Frame::Error(1, why) = Frame::decode(message).unwrap()
        {
            assert_eq!(why, "too much unread data");
            refused = true;
            break;
        }
    }
    assert!(refused, "64 MiB were kept");
    // the session goes on
    rig.connect(2).await;
}

#[tokio::test]
async fn a_pause_of_the_server_is_kept() {
    let mut rig = Rig::new().await;
    let mut port = rig.connect(1).await;
    rig.send(Frame::Pause(1)).await;
    // answered only after the pause was heard
    rig.send(Frame::Data(9, Bytes::from_static(b"x"))).await;
    assert_eq!(rig.next().await, Frame::Error(9, "connection not found".into()));
    port.write_all(b"patience").await.unwrap();
    rig.send(Frame::Data(9, Bytes::from_static(b"x"))).await;
    assert_eq!(rig.next().await, Frame::Error(9, "connection not found".into()));
    assert!(timeout(Duration::from_millis(100), rig.server.next()).await.is_err());
    rig.send(Frame::Resume(1)).await;
    assert_eq!(rig.next().await, Frame::Data(1, Bytes::from_static(b"patience")));
}

#[tokio::test]
async fn connections_that_the_server_has_forgotten_end() {
    let mut rig = Rig::new().await;
    let mut forgotten = rig.connect(1).await;
    let _kept = rig.connect(2).await;
    rig.send(Frame::Sync(vec![2])).await;
    assert_eq!(timeout(SOON, forgotten.read(&mut [0; 8])).await.unwrap().unwrap_or(0), 0);
}

#[tokio::test]
async fn hostile_messages_end_the_session() {
    for message in [Message::Binary(Bytes::from_static(b"\xff")), Message::Text("hello".into())] {
        let mut rig = Rig::new().await;
        let mut port = rig.connect(1).await;
        rig.server.send(message).await.unwrap();
        let error = timeout(SOON, rig.session).await.unwrap().unwrap();
        assert!(matches!(error, SessionError::Frame(_) | SessionError::Text), "{error}");
        assert_eq!(timeout(SOON, port.read(&mut [0; 8])).await.unwrap().unwrap_or(0), 0, "its connections end with it");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_given_up() {
    let (ours, _theirs) = tokio::io::duplex(64 << 10);
    let client = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
    let target = Target { address: "0.0.0.0".parse().unwrap(), port: 1 };
    let started = tokio::time::Instant::now();
    assert!(matches!(run(client, &target).await, SessionError::Silent));
    assert!(started.elapsed() <= Duration::from_secs(61), "{:?}", started.elapsed());
}
