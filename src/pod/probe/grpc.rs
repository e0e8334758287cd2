//! The gRPC health check: `grpc.health.v1.Health/Check`.
//!
//! Source: `pkg/probe/grpc/grpc.go`, the health checking protocol and the gRPC wire format over HTTP/2. The two
//! messages have one field each and are written and read by hand.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};

use super::{Answer, MAX_OUTPUT, dial, go_duration, host_port, tls};

/// Number of the first field with type length-delimited, and with type varint.
const FIELD_1_BYTES: u8 = 0x0a;
const FIELD_1_VARINT: u8 = 0x08;

/// Asks a server for the health of a service; an empty name is the server as a whole.
pub(super) async fn check(host: &str, port: u16, service: &str, use_tls: bool, limit: Duration) -> Answer {
    let deadline = Instant::now() + limit;
    let address = host_port(host, port);
    let too_late = |reason: &str| {
        Answer::failure(format!(
            "timeout: failed to connect service {address:?} within {}: {reason}",
            go_duration(limit)
        ))
    };
    let unreachable = |reason: &dyn std::fmt::Display| {
        Answer::failure(format!("error: failed to connect service at {address:?}: {reason}"))
    };
    let stream = match dial::connect(host, port, limit).await {
        Ok(stream) => stream,
        Err(error) if error.timed_out => return too_late("context deadline exceeded"),
        Err(error) => return unreachable(&error),
    };
    let answer = if use_tls {
        match timeout_at(deadline, tls::handshake(stream, host, &[b"h2"])).await {
            Err(_) => return too_late("context deadline exceeded"),
            Ok(Err(error)) => return unreachable(&error),
            Ok(Ok(stream)) => timeout_at(deadline, call(TokioIo::new(stream), &address, service, true)).await,
        }
    } else {
        timeout_at(deadline, call(TokioIo::new(stream), &address, service, false)).await
    };
    match answer {
        Err(_) => Answer::failure(format!("timeout: health rpc did not complete within {}", go_duration(limit))),
        Ok(Err(status)) => status.into_answer(limit),
        Ok(Ok(1)) => Answer::success("service healthy"),
        Ok(Ok(status)) => Answer::failure(format!("service unhealthy (responded with {:?})", serving_status(status))),
    }
}

/// How a call failed: a gRPC status, or a broken connection, which gRPC calls `Unavailable`.
struct Status {
    code: u32,
    message: String,
}

impl Status {
    fn unavailable(reason: impl ToString) -> Self {
        Self { code: 14, message: reason.to_string() }
    }

    fn into_answer(self, limit: Duration) -> Answer {
        let Self { code, message } = self;
        Answer::failure(match code {
            4 => format!("timeout: health rpc did not complete within {}", go_duration(limit)),
            12 => format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {message}"
            ),
            _ => format!("error: health rpc probe failed: rpc error: code = {} desc = {message}", code_name(code)),
        })
    }
}

async fn call<S>(io: TokioIo<S>, authority: &str, service: &str, tls: bool) -> Result<u64, Status>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.map_err(Status::unavailable)?;
    tokio::spawn(connection);
    let scheme = if tls { "https" } else { "http" };
    let request = Request::post(format!("{scheme}://{authority}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/1.37")
        .body(Full::new(encode_request(service)))
        .map_err(Status::unavailable)?;
    let response = sender.send_request(request).await.map_err(Status::unavailable)?;
    let http_status = response.status();
    // a call without an answer has its status in the headers
    if let Some(status) = status_of(response.headers()) {
        if status.code != 0 {
            return Err(status);
        }
    } else if !http_status.is_success() {
        let code = if http_status == http::StatusCode::NOT_FOUND { 12 } else { 2 };
        return Err(Status {
            code,
            message: format!("unexpected HTTP status code received from server: {http_status}"),
        });
    }
    let mut body = response.into_body();
    let mut message = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(Status::unavailable)?;
        if let Some(data) = frame.data_ref() {
            if message.len() + data.len() > MAX_OUTPUT {
                return Err(Status {
                    code: 8,
                    message: format!("received message larger than max ({MAX_OUTPUT} bytes)"),
                });
            }
            message.extend_from_slice(data);
        } else if let Ok(map) = frame.into_trailers() {
            trailers = Some(map);
        }
    }
    match trailers.as_ref().and_then(status_of) {
        Some(status) if status.code != 0 => Err(status),
        _ => decode_response(&message).ok_or(Status { code: 13, message: "malformed health response".to_owned() }),
    }
}

fn status_of(headers: &HeaderMap) -> Option<Status> {
    let code = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message = headers.get("grpc-message").and_then(|value| value.to_str().ok()).map(percent_decode);
    Some(Status { code, message: message.unwrap_or_default() })
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = (*first == b'%').then(|| tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok())).flatten();
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `HealthCheckRequest{service}` with the five bytes that gRPC puts before a message.
fn encode_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(FIELD_1_BYTES);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
            length >>= 7;
        }
        message.put_u8(u8::try_from(length).unwrap_or(0));
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(&message);
    framed.freeze()
}

/// `HealthCheckResponse{status}`: fields that are not known are skipped, a missing one is 0.
fn decode_response(framed: &[u8]) -> Option<u64> {
    let (prefix, message) = framed.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    // no compression was offered
    if prefix[0] != 0 || usize::try_from(length).ok()? != message.len() {
        return None;
    }
    let mut rest = message;
    let mut status = 0;
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        match key & 7 {
            0 => {
                let value = varint(&mut rest)?;
                if key == u64::from(FIELD_1_VARINT) {
                    status = value;
                }
            }
            1 => rest = rest.get(8..)?,
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                rest = rest.get(length..)?;
            }
            5 => rest = rest.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn serving_status(status: u64) -> String {
    match status {
        0 => "UNKNOWN".to_owned(),
        1 => "SERVING".to_owned(),
        2 => "NOT_SERVING".to_owned(),
        3 => "SERVICE_UNKNOWN".to_owned(),
        other => other.to_string(),
    }
}

fn code_name(code: u32) -> String {
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
    let name = usize::try_from(code).ok().and_then(|code| NAMES.get(code));
    name.map_or_else(|| format!("Code({code})"), |name| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_and_reads_the_messages() {
        assert_eq!(encode_request("").as_ref(), [0, 0, 0, 0, 0]);
        assert_eq!(encode_request("ab").as_ref(), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = "x".repeat(300);
        assert_eq!(encode_request(&long)[5..8], [0x0a, 0xac, 0x02]);
        assert_eq!(decode_response(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(decode_response(&[0, 0, 0, 0, 0]), Some(0));
        // an unknown field before the known one
        assert_eq!(decode_response(&[0, 0, 0, 0, 6, 0x12, 2, 9, 9, 8, 2]), Some(2));
        for broken in
            [&[][..], &[0, 0, 0, 0, 9, 8], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0, 1, 8], &[0, 0, 0, 0, 2, 0x12, 9]]
        {
            assert_eq!(decode_response(broken), None, "{broken:?}");
        }
        assert_eq!(percent_decode("a%20b%zz%C3%BC"), "a b%zzü");
    }

    proptest::proptest! {
        #[test]
        fn hostile_answers_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64), text in ".{0,40}") {
            decode_response(&bytes);
            percent_decode(&text);
        }
    }
}
