//! gRPC over HTTP/2, as much of it as a node's neighbours speak: unary calls both ways, and a server's stream of
//! messages. No compression, no reflection, no balancing.
//!
//! Source: the gRPC wire format (`PROTOCOL-HTTP2.md`) and its status codes. Messages are bounded by
//! [`MAX_MESSAGE`], as grpc-go bounds what it receives.

mod authority;
mod client;
mod frame;
mod hpack;
mod server;

use http::HeaderMap;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

pub use client::{Channel, Messages};
pub use server::serve;

/// Largest message that is taken, bytes (grpc-go's `defaultClientMaxReceiveMessageSize`).
pub const MAX_MESSAGE: usize = 4 << 20;

/// How a call failed: a gRPC status. A broken connection is [`Status::UNAVAILABLE`] and may be tried again, and so may
/// [`Status::DEADLINE_EXCEEDED`]; whether others are terminal is for the caller to know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rpc error: code = {} desc = {message}", self.name())]
pub struct Status {
    /// The number.
    pub code: u32,
    /// What the peer, or this end, says about it.
    pub message: String,
}

impl Status {
    /// Success.
    pub const OK: u32 = 0;
    /// An error without a better code: what Go's servers make of a plain one.
    pub const UNKNOWN: u32 = 2;
    /// No answer in time.
    pub const DEADLINE_EXCEEDED: u32 = 4;
    /// A message is too large.
    pub const RESOURCE_EXHAUSTED: u32 = 8;
    /// There is no such method, or the peer does not speak gRPC.
    pub const UNIMPLEMENTED: u32 = 12;
    /// The peer broke the protocol.
    pub const INTERNAL: u32 = 13;
    /// The connection cannot be made or broke.
    pub const UNAVAILABLE: u32 = 14;

    /// A status with a message.
    #[must_use]
    pub fn new(code: u32, message: impl ToString) -> Self {
        Self { code, message: message.to_string() }
    }

    fn unavailable(reason: impl ToString) -> Self {
        Self::new(Self::UNAVAILABLE, reason)
    }

    fn internal(reason: impl ToString) -> Self {
        Self::new(Self::INTERNAL, reason)
    }

    /// Go's name of the code.
    #[must_use]
    pub fn name(&self) -> String {
        const NAMES: [&str; 17] = [
            "OK",
            "Canceled",
            "Unknown",
            "InvalidArgument",
            "DeadlineExceeded",
            "NotFound",
            "AlreadyExists",
            "PermissionDenied",
            "ResourceExhausted",
            "FailedPrecondition",
            "Aborted",
            "OutOfRange",
            "Unimplemented",
            "Internal",
            "Unavailable",
            "DataLoss",
            "Unauthenticated",
        ];
        let name = usize::try_from(self.code).ok().and_then(|code| NAMES.get(code));
        name.map_or_else(|| format!("Code({})", self.code), |name| (*name).to_owned())
    }

    /// The status in trailers, or in the headers of an answer without a message.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let code = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
        let message = headers.get("grpc-message").and_then(|value| value.to_str().ok()).map(percent_decode);
        Some(Self { code, message: message.unwrap_or_default() })
    }
}

/// What gRPC escapes in a message: all that is not printable ASCII, and the sign itself ("PROTOCOL-HTTP2.md").
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

fn percent_decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn percent_encode(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use prost::Message;
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    fn text(text: &str) -> Text {
        Text { text: text.to_owned() }
    }

    /// Echoes; an empty text is an error, `sleep` never ends.
    async fn answer(path: String, message: Bytes) -> Result<Bytes, Status> {
        let Text { text } = Text::decode(message).map_err(Status::internal)?;
        match (path.as_str(), text.as_str()) {
            (_, "") => Err(Status::new(Status::UNKNOWN, "nothing: 100 %\nü")),
            (_, "sleep") => std::future::pending().await,
            ("/t.T/Echo", _) => Ok(Text { text }.encode_to_vec().into()),
            _ => Err(Status::new(Status::UNIMPLEMENTED, format!("unknown method {path}"))),
        }
    }

    async fn start(dir: &tempfile::TempDir) -> Channel {
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::new(answer)));
            }
        });
        Channel::connect(&path, Duration::from_secs(5)).await.unwrap()
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn calls_are_answered_and_errors_keep_their_text() {
        let dir = tempfile::tempdir().unwrap();
        let channel = start(&dir).await;
        let echo: Text = channel.unary("/t.T/Echo", &text("hello"), LIMIT).await.unwrap();
        assert_eq!(echo, text("hello"));
        let long = text(&"x".repeat(1 << 20));
        assert_eq!(channel.unary::<_, Text>("/t.T/Echo", &long, LIMIT).await.unwrap(), long);
        let error = channel.unary::<_, Text>("/t.T/Echo", &text(""), LIMIT).await.unwrap_err();
        assert_eq!(error, Status::new(Status::UNKNOWN, "nothing: 100 %\nü"));
        let error = channel.unary::<_, Text>("/t.T/Other", &text("a"), LIMIT).await.unwrap_err();
        assert_eq!(error.to_string(), "rpc error: code = Unimplemented desc = unknown method /t.T/Other");
        let short = Duration::from_millis(50);
        let error = channel.unary::<_, Text>("/t.T/Echo", &text("sleep"), short).await.unwrap_err();
        assert_eq!(error.code, Status::DEADLINE_EXCEEDED);
    }

    /// As grpc-go calls itself when it is given the path of a socket.
    #[tokio::test]
    async fn a_path_in_place_of_an_authority_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let _ = start(&dir).await;
        let mut stream = UnixStream::connect(dir.path().join("s")).await.unwrap();
        let mut request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
        let mut block = vec![0x83, 0x86];
        let type_ = ("content-type", "application/grpc");
        for (name, value) in [(":path", "/t.T/Echo"), (":authority", "%2Frun%2Fs"), type_] {
            block.extend([0, u8::try_from(name.len()).unwrap()]);
            block.extend(name.as_bytes());
            block.push(u8::try_from(value.len()).unwrap());
            block.extend(value.as_bytes());
        }
        request.extend([0, 0, u8::try_from(block.len()).unwrap(), 1, 4, 0, 0, 0, 1]);
        request.extend(block);
        let message = frame::encode(&text("hello").encode_to_vec());
        request.extend([0, 0, u8::try_from(message.len()).unwrap(), 0, 1, 0, 0, 0, 1]);
        request.extend(message);
        tokio::io::AsyncWriteExt::write_all(&mut stream, &request).await.unwrap();
        let mut answer = Vec::new();
        while !answer.windows(5).any(|part| part == b"hello") {
            let read = tokio::io::AsyncReadExt::read_buf(&mut stream, &mut answer);
            assert!(tokio::time::timeout(LIMIT, read).await.unwrap().unwrap() > 0, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let channel = start(&dir).await;
        let error = channel.unary::<_, Text>("/t.T/Echo", &text(&"x".repeat(5 << 20)), LIMIT).await.unwrap_err();
        assert_eq!(error.code, Status::RESOURCE_EXHAUSTED, "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_speaks_no_grpc_is_unavailable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            let (mut stream, _): (UnixStream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        });
        let error = match Channel::connect(&path, LIMIT).await {
            Ok(channel) => channel.unary::<_, Text>("/t.T/Echo", &text("a"), LIMIT).await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.code, Status::UNAVAILABLE, "{error}");
        let error = Channel::connect(&dir.path().join("none"), LIMIT).await.err().unwrap();
        assert_eq!(error.code, Status::UNAVAILABLE);
    }

    #[test]
    fn texts_survive_their_encoding() {
        assert_eq!(percent_decode("a%20b%zz%C3%BC"), "a b%zzü");
        for text in ["", "plain", "50 %", "line\nfeed", "ü"] {
            assert_eq!(percent_decode(&percent_encode(text)), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn hostile_texts_never_panic(text in ".{0,40}") {
            percent_decode(&text);
        }
    }
}
