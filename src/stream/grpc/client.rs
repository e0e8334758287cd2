//! The calling side.

use std::marker::PhantomData;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::Status;
use super::frame::{self, Reader};

/// Largest header block that is taken, bytes.
const MAX_HEADERS: u32 = 64 << 10;

/// Between two tries to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A connection to a server. Clones share it; it is closed when the last of them, and of the streams on it, is gone.
#[derive(Clone, Debug)]
pub struct Channel {
    sender: SendRequest<Full<Bytes>>,
    base: String,
    agent: &'static str,
}

impl Channel {
    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// Unavailable, or deadline exceeded after `limit`.
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Self, Status> {
        let connect = async {
            let stream = UnixStream::connect(socket)
                .await
                .map_err(|error| Status::unavailable(format!("dial unix {}: {error}", socket.display())))?;
            Self::over(stream, "http://localhost".to_owned(), "gantry").await
        };
        tokio::time::timeout(limit, connect).await.map_err(|_| too_late())?
    }

    /// Connects to a Unix socket that may not be served yet: it is tried until it is.
    ///
    /// # Errors
    /// What the last try said, after `limit`.
    pub async fn connect_when_served(socket: &Path, limit: Duration) -> Result<Self, Status> {
        let deadline = Instant::now() + limit;
        loop {
            match Self::connect(socket, deadline.saturating_duration_since(Instant::now())).await {
                Err(status) if Instant::now() + RETRY_PAUSE >= deadline => return Err(status),
                Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
                connected => return connected,
            }
        }
    }

    /// Speaks over a connection that is there. `base` is scheme and authority of the requests.
    ///
    /// # Errors
    /// Unavailable, if the connection breaks.
    pub async fn over<S>(io: S, base: String, agent: &'static str) -> Result<Self, Status>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.max_header_list_size(MAX_HEADERS);
        let (sender, connection) = builder.handshake(TokioIo::new(io)).await.map_err(Status::unavailable)?;
        tokio::spawn(connection);
        Ok(Self { sender, base, agent })
    }

    /// One question, one answer. `path` is `/package.Service/Method`.
    ///
    /// # Errors
    /// The peer's status; deadline exceeded after `limit`; what a broken connection or message makes.
    pub async fn unary<Q, A>(&self, path: &str, question: &Q, limit: Duration) -> Result<A, Status>
    where
        Q: Message,
        A: Message + Default,
    {
        let deadline = Instant::now() + limit;
        let call = async {
            let mut messages = self.send::<Q, A>(path, question, Some(limit)).await?;
            let answer = messages.next().await?;
            let answer = answer.ok_or_else(|| Status::internal("the answer has no message"))?;
            match messages.next().await? {
                None => Ok(answer),
                Some(_) => Err(Status::internal("the answer has more than one message")),
            }
        };
        timeout_at(deadline, call).await.map_err(|_| too_late())?
    }

    /// One question, and answers as they come.
    ///
    /// # Errors
    /// As [`Channel::unary`], without a deadline.
    pub async fn stream<Q, A>(&self, path: &str, question: &Q) -> Result<Messages<A>, Status>
    where
        Q: Message,
        A: Message + Default,
    {
        self.send(path, question, None).await
    }

    async fn send<Q, A>(&self, path: &str, question: &Q, limit: Option<Duration>) -> Result<Messages<A>, Status>
    where
        Q: Message,
        A: Message + Default,
    {
        let mut request = Request::post(format!("{}{path}", self.base))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", self.agent);
        if let Some(limit) = limit {
            request = request.header("grpc-timeout", format!("{}m", limit.as_millis().min(99_999_999)));
        }
        let request = request.body(Full::new(frame::encode(&question.encode_to_vec()))).map_err(Status::internal)?;
        let response = self.sender.clone().send_request(request).await.map_err(Status::unavailable)?;
        // a call without an answer has its status in the headers
        match (Status::of(response.headers()), response.status()) {
            (Some(status), _) if status.code != Status::OK => return Err(status),
            (None, http) if !http.is_success() => {
                let code = if http == StatusCode::NOT_FOUND { Status::UNIMPLEMENTED } else { Status::UNKNOWN };
                return Err(Status::new(code, format!("unexpected HTTP status code received from server: {http}")));
            }
            _ => {}
        }
        let headers_only = Status::of(response.headers()).is_some();
        Ok(Messages { reader: Reader::new(response.into_body()), headers_only, message: PhantomData })
    }
}

fn too_late() -> Status {
    Status::new(Status::DEADLINE_EXCEEDED, "context deadline exceeded")
}

/// A server's messages, one after the other.
pub struct Messages<A> {
    reader: Reader,
    headers_only: bool,
    message: PhantomData<fn() -> A>,
}

impl<A: Message + Default> Messages<A> {
    /// The next message; `None` when the server has ended the stream without an error.
    ///
    /// # Errors
    /// The status with which it ended otherwise.
    pub async fn next(&mut self) -> Result<Option<A>, Status> {
        if let Some(message) = self.reader.next().await? {
            return A::decode(message).map(Some).map_err(Status::internal);
        }
        match self.reader.trailers.as_ref().and_then(Status::of) {
            Some(status) if status.code != Status::OK => Err(status),
            None if !self.headers_only => Err(Status::internal("server closed the stream without sending trailers")),
            _ => Ok(None),
        }
    }
}
