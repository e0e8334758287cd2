//! The answering side, for unary calls.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

use super::authority::lenient;
use super::frame::{self, Reader};
use super::{Status, percent_encode};

/// How long a caller may take to send its question.
const QUESTION_LIMIT: Duration = Duration::from_secs(10);
/// Calls at once on one connection.
const MAX_CALLS: u32 = 16;
/// Largest header block that is taken, bytes.
const MAX_HEADERS: u32 = 64 << 10;

/// Answers the calls that come over a connection, until the peer closes it. The handler gets the method's path and the
/// message.
pub async fn serve<S, H, F>(io: S, handler: Arc<H>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
    H: Fn(String, Bytes) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Bytes, Status>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let handler = handler.clone();
        async move { Ok::<_, Infallible>(response(call(request, &*handler).await)) }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.max_concurrent_streams(MAX_CALLS).max_header_list_size(MAX_HEADERS);
    if let Err(error) = builder.serve_connection(TokioIo::new(lenient(io)), service).await {
        tracing::debug!(%error, "a gRPC connection ended");
    }
}

async fn call<H, F>(request: Request<Incoming>, handler: &H) -> Result<Bytes, Status>
where
    H: Fn(String, Bytes) -> F,
    F: Future<Output = Result<Bytes, Status>>,
{
    let (head, body) = request.into_parts();
    let content_type = head.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !content_type.starts_with("application/grpc") {
        return Err(Status::internal(format!("invalid gRPC request content-type {content_type:?}")));
    }
    let mut reader = Reader::new(body);
    let message = tokio::time::timeout(QUESTION_LIMIT, reader.next())
        .await
        .map_err(|_| Status::new(Status::DEADLINE_EXCEEDED, "the question takes too long"))??;
    let message = message.ok_or_else(|| Status::internal("the question has no message"))?;
    handler(head.uri.path().to_owned(), message).await
}

type Body = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

fn response(answer: Result<Bytes, Status>) -> Response<Body> {
    let mut frames = Vec::with_capacity(2);
    let status = match answer {
        Ok(message) => {
            frames.push(Ok(Frame::data(frame::encode(&message))));
            Status::new(Status::OK, "")
        }
        Err(status) => status,
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status.code));
    if let Ok(message) = HeaderValue::from_str(&percent_encode(&status.message)) {
        trailers.insert("grpc-message", message);
    }
    frames.push(Ok(Frame::trailers(trailers)));
    let mut response = Response::new(StreamBody::new(stream::iter(frames)));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}
