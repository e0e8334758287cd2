//! The client's end of the local socket.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::{Arg, ArgMatches};
use futures::TryStreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::AsyncRead;
use tokio::net::UnixStream;
use tokio_util::io::ReaderStream;

use crate::agent::socket_path;

/// Longest wait for the head of an answer. Removing a large image is the slowest that is asked for.
const DEADLINE: Duration = Duration::from_secs(120);
/// Longest wait for the head of the answer to an upload, which comes when all has been taken.
const UPLOAD_DEADLINE: Duration = Duration::from_secs(3600);
/// Pieces in which an upload is read.
const PIECE: usize = 256 << 10;
/// Largest answer that is taken as a whole.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of a stream: a Pod with all it has.
const MAX_LINE: usize = 16 << 20;

/// Why a command failed; the text is for its user.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// Nobody serves the socket.
    #[error(
        "no gantry agent serves {}: start one (gantry agent, or gantry run POD.yaml), or name its directory with \
         --state-dir",
        .0.display()
    )]
    NoAgent(PathBuf),
    /// The socket is there, and does not let us in.
    #[error("cannot use {}: {source}: run this as root", .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent refused, in its own words.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// The text.
        message: String,
    },
    /// The connection broke, or what came over it makes no sense.
    #[error("the agent's answer: {0}")]
    Broken(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl CliError {
    fn broken(error: impl fmt::Display) -> Self {
        Self::Broken(error.to_string())
    }
}

/// Speaks HTTP over the local socket; one connection for each request.
#[derive(Clone, Debug)]
pub(super) struct Client {
    socket: PathBuf,
}

/// `--state-dir`, by which every command finds its agent.
pub(super) fn state_dir_arg() -> Arg {
    Arg::new("state-dir")
        .long("state-dir")
        .help("Directory of the agent's state, where its socket is")
        .default_value("/run/gantry")
        .env("GANTRY_STATE_DIR")
}

impl Client {
    pub(super) fn new(state_dir: &std::path::Path) -> Self {
        Self { socket: socket_path(state_dir) }
    }

    pub(super) fn from_matches(matches: &ArgMatches) -> Self {
        let state_dir = matches.get_one::<String>("state-dir").map_or("/run/gantry", String::as_str);
        Self::new(std::path::Path::new(state_dir))
    }

    /// A connection.
    pub(super) async fn connect(&self) -> Result<UnixStream, CliError> {
        UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            // a socket whose agent was killed refuses
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CliError::NoAgent(self.socket.clone()),
            _ => CliError::Socket { path: self.socket.clone(), source: error },
        })
    }

    /// Sends a request; an answer that is no success is an error with the agent's text.
    pub(super) async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, CliError> {
        self.exchange(method, path, Full::new(body), DEADLINE).await
    }

    /// `POST` of something of any length, and the JSON that comes back.
    pub(super) async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        content: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<T, CliError> {
        let body = StreamBody::new(ReaderStream::with_capacity(content, PIECE).map_ok(Frame::data));
        let response = self.exchange(Method::POST, path, body, UPLOAD_DEADLINE).await?;
        serde_json::from_slice(&whole(response.into_body()).await?).map_err(CliError::broken)
    }

    async fn exchange<B>(
        &self,
        method: Method,
        path: &str,
        body: B,
        deadline: Duration,
    ) -> Result<Response<Incoming>, CliError>
    where
        B: Body + Send + Unpin + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = self.connect().await?;
        let exchange = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(CliError::broken)?;
            // ends with the body of the answer
            tokio::spawn(connection);
            let request = Request::builder().method(method).uri(path).header(http::header::HOST, "localhost");
            let request = request.body(body).map_err(CliError::broken)?;
            sender.send_request(request).await.map_err(CliError::broken)
        };
        let response = tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| CliError::broken(format_args!("none in {} minutes", deadline.as_secs() / 60)))??;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = whole(response.into_body()).await?;
        let message = String::from_utf8_lossy(&text).trim_end().to_owned();
        Err(CliError::Refused { status, message })
    }

    /// `GET`, and the JSON that comes back.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        serde_json::from_slice(&whole(response.into_body()).await?).map_err(CliError::broken)
    }

    /// `POST`, and the JSON that comes back.
    pub(super) async fn post<T: DeserializeOwned>(&self, path: &str, body: Bytes) -> Result<T, CliError> {
        let response = self.send(Method::POST, path, body).await?;
        serde_json::from_slice(&whole(response.into_body()).await?).map_err(CliError::broken)
    }

    /// `GET` of something that comes line by line.
    pub(super) async fn lines(&self, path: &str) -> Result<Lines, CliError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(Lines { body: response.into_body(), buffer: BytesMut::new() })
    }
}

async fn whole(body: Incoming) -> Result<Bytes, CliError> {
    let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(CliError::broken)?;
    Ok(body.to_bytes())
}

/// The lines of a streamed answer.
pub(super) struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    /// The next line without its end; a last one need not have one.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, CliError> {
        let mut searched = 0;
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.buffer[searched..]) {
                let mut line = self.buffer.split_to(searched + end + 1);
                line.truncate(searched + end);
                return Ok(Some(line.freeze()));
            }
            searched = self.buffer.len();
            if searched > MAX_LINE {
                return Ok(Some(self.buffer.split().freeze()));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(CliError::broken(error)),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Ok(Some(self.buffer.split().freeze())),
            }
        }
    }
}

/// A path segment or query value, percent-encoded.
pub(super) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Runs a command's work; what it says on failure goes to stderr.
pub(super) fn block_on(work: impl Future<Output = Result<ExitCode, CliError>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("Error: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(work).unwrap_or_else(|error| {
        eprintln!("Error: {error}");
        ExitCode::FAILURE
    });
    // a read of the terminal may still wait
    runtime.shutdown_background();
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::query::decode_segment;

    proptest::proptest! {
        #[test]
        fn the_server_reads_what_we_encode(text in "\\PC{0,40}") {
            let encoded = encode(&text);
            proptest::prop_assert!(encoded.is_ascii() && !encoded.contains(['/', '?', '&', ' ', '+']));
            proptest::prop_assert_eq!(decode_segment(&encoded), text);
        }
    }

    #[tokio::test]
    async fn nobody_at_the_socket_is_said_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::new(dir.path());
        let missing = client.connect().await.unwrap_err().to_string();
        assert!(missing.contains("gantry.sock") && missing.contains("--state-dir"), "{missing}");
        // an agent that was killed leaves its socket
        drop(std::os::unix::net::UnixListener::bind(socket_path(dir.path())).unwrap());
        assert!(matches!(client.connect().await, Err(CliError::NoAgent(_))));
    }
}
