//! HTTP requests of probes and hooks.
//!
//! Source: `pkg/probe/http/{http,request}.go`. No certificate is checked, no proxy is used, nothing is kept alive;
//! redirects are followed on the same host only.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, LOCATION, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};

use super::url::Url;
use super::{Answer, MAX_OUTPUT, ProbeError, Verdict, dial, host_port, resolve_port, tls};

/// Kubernetes version of the protocol, as in the `User-Agent`.
const VERSION: &str = "1.37";
const MAX_REDIRECTS: usize = 10;

/// An `httpGet` of a probe or hook.
#[derive(Clone, Copy, Debug)]
pub struct HttpGet<'a> {
    /// What the manifest says.
    pub action: &'a HTTPGetAction,
    /// The container whose ports have names.
    pub container: &'a Container,
    /// The Pod's address, where the manifest names no host.
    pub pod_ip: Option<&'a str>,
    /// `probe` or `lifecycle`: part of the `User-Agent`.
    pub purpose: &'a str,
}

/// Sends a request and judges the answer: 200 to 399 is success. Everything together takes no longer than `limit`.
pub async fn get(request: HttpGet<'_>, limit: Duration) -> Result<Answer, ProbeError> {
    let deadline = Instant::now() + limit;
    let action = request.action;
    let tls = match action.scheme.as_deref().unwrap_or("HTTP").to_ascii_uppercase().as_str() {
        "" | "HTTP" => false,
        "HTTPS" => true,
        other => return Err(ProbeError::Scheme(other.to_ascii_lowercase())),
    };
    let host =
        action.host.as_deref().filter(|host| !host.is_empty()).or(request.pod_ip).ok_or(ProbeError::NoAddress)?;
    let port = resolve_port(&action.port, request.container)?;
    let mut url = Url::new(tls, host, port, action.path.as_deref().unwrap_or_default());
    let (headers, mut host_header) = headers(&request)?;
    let http2 = action.protocol.as_deref() == Some("HTTP2");
    let original_host = url.host.clone();

    for _ in 0..=MAX_REDIRECTS {
        let response = match timeout_at(deadline, send(&url, &headers, host_header.as_ref(), http2, deadline)).await {
            Err(_) => {
                let reason = "context deadline exceeded (Client.Timeout exceeded while awaiting headers)";
                return Ok(Answer::failure(format!("Get {:?}: {reason}", url.to_string())));
            }
            Ok(Err(SendError::Request(reason))) => return Err(ProbeError::Request(reason)),
            Ok(Err(SendError::Transport(reason))) => {
                return Ok(Answer::failure(format!("Get {:?}: {reason}", url.to_string())));
            }
            Ok(Ok(response)) => response,
        };
        let Some(location) = redirect(&response) else { return judge(response, deadline).await };
        let Some(next) = url.join(&location) else {
            return Ok(Answer::failure(format!("Get {location:?}: unsupported protocol scheme")));
        };
        if !next.host.eq_ignore_ascii_case(&original_host) {
            return judge(response, deadline).await;
        }
        // a host that was asked for by name is kept unless the redirect names another
        if (next.tls, next.port) != (url.tls, url.port) {
            host_header = None;
        }
        url = next;
    }
    Ok(Answer::failure(format!("Get {:?}: stopped after {MAX_REDIRECTS} redirects", url.to_string())))
}

/// The manifest's headers and, apart, its `Host`.
fn headers(request: &HttpGet<'_>) -> Result<(HeaderMap, Option<HeaderValue>), ProbeError> {
    let mut headers = HeaderMap::new();
    for header in request.action.http_headers.iter().flatten() {
        let invalid = |what: &str| ProbeError::Request(format!("httpHeaders: {what} of {:?} is invalid", header.name));
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| invalid("name"))?;
        let value = HeaderValue::from_str(&header.value).map_err(|_| invalid("value"))?;
        headers.append(name, value);
    }
    if !headers.contains_key(USER_AGENT) {
        let agent = HeaderValue::from_str(&format!("kube-{}/{VERSION}", request.purpose));
        headers.insert(USER_AGENT, agent.map_err(|error| ProbeError::Request(error.to_string()))?);
    }
    match headers.get(ACCEPT) {
        None => {
            headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        }
        // empty: the manifest wants none
        Some(accept) if accept.is_empty() => {
            headers.remove(ACCEPT);
        }
        Some(_) => {}
    }
    let host = headers.remove(HOST).filter(|host| !host.is_empty());
    Ok((headers, host))
}

enum SendError {
    /// The request cannot be made.
    Request(String),
    /// There was no answer.
    Transport(String),
}

async fn send(
    url: &Url,
    headers: &HeaderMap,
    host: Option<&HeaderValue>,
    http2: bool,
    deadline: Instant,
) -> Result<Response<Incoming>, SendError> {
    let transport = |error: &dyn std::fmt::Display| SendError::Transport(error.to_string());
    let limit = deadline.saturating_duration_since(Instant::now());
    let stream = dial::connect(&url.host, url.port, limit).await.map_err(|error| transport(&error))?;
    if !url.tls {
        return exchange(TokioIo::new(stream), url, headers, host, http2).await;
    }
    let stream = tls::handshake(stream, &url.host, &[b"h2", b"http/1.1"]).await.map_err(|error| transport(&error))?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    exchange(TokioIo::new(stream), url, headers, host, http2).await
}

async fn exchange<S>(
    io: TokioIo<S>,
    url: &Url,
    headers: &HeaderMap,
    host: Option<&HeaderValue>,
    http2: bool,
) -> Result<Response<Incoming>, SendError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let transport = |error: hyper::Error| SendError::Transport(describe(&error));
    let malformed = |error: http::Error| SendError::Request(error.to_string());
    if http2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.map_err(transport)?;
        // ends when the response has been dropped with the sender
        tokio::spawn(connection);
        let authority = host.and_then(|host| host.to_str().ok()).map_or(host_port(&url.host, url.port), str::to_owned);
        let scheme = if url.tls { "https" } else { "http" };
        let uri = http::Uri::builder().scheme(scheme).authority(authority).path_and_query(url.target.as_str()).build();
        let mut request = Request::get(uri.map_err(malformed)?).version(Version::HTTP_2).body(Empty::<Bytes>::new());
        if let Ok(request) = &mut request {
            request.headers_mut().extend(headers.clone());
        }
        return sender.send_request(request.map_err(malformed)?).await.map_err(transport);
    }
    let (mut sender, connection) =
        hyper::client::conn::http1::Builder::new().title_case_headers(true).handshake(io).await.map_err(transport)?;
    tokio::spawn(connection);
    let mut request = Request::get(url.target.as_str()).body(Empty::<Bytes>::new()).map_err(malformed)?;
    let own = default_host(url);
    let own = HeaderValue::from_str(&own).map_err(|error| SendError::Request(error.to_string()))?;
    request.headers_mut().insert(HOST, host.cloned().unwrap_or(own));
    request.headers_mut().extend(headers.clone());
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    sender.send_request(request).await.map_err(transport)
}

/// As Go writes it: with the port, as the URL has one.
fn default_host(url: &Url) -> String {
    host_port(&url.host, url.port)
}

/// The innermost cause: hyper's own words say little.
fn describe(error: &hyper::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    if error.is_incomplete_message() { "EOF".to_owned() } else { cause.to_string() }
}

fn redirect(response: &Response<Incoming>) -> Option<String> {
    let follows = matches!(
        response.status(),
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    );
    let location = response.headers().get(LOCATION).filter(|_| follows)?;
    location.to_str().ok().filter(|location| !location.is_empty()).map(str::to_owned)
}

async fn judge(response: Response<Incoming>, deadline: Instant) -> Result<Answer, ProbeError> {
    let status = response.status();
    let body = timeout_at(deadline, read_body(response.into_body())).await.unwrap_or_else(|_| {
        let reason = "context deadline exceeded (Client.Timeout or context cancellation while reading body)";
        Err(ProbeError::Body(reason.to_owned()))
    })?;
    Ok(match status.as_u16() {
        200..=299 => Answer::success(body),
        300..=399 => {
            let output = format!("Probe terminated redirects, Response body: {body}");
            Answer { verdict: Verdict::Warning, output }
        }
        // without the body: events are read by people who may not read the application's answers
        code => Answer::failure(format!("HTTP probe failed with statuscode: {code}")),
    })
}

/// Reads no more than the first 10 KiB.
async fn read_body(mut body: Incoming) -> Result<String, ProbeError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ProbeError::Body(describe(&error)))?;
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(&data[..data.len().min(MAX_OUTPUT - bytes.len())]);
        }
        if bytes.len() == MAX_OUTPUT {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
