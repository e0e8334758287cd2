//! The gRPC health check: `grpc.health.v1.Health/Check`.
//!
//! Source: `pkg/probe/grpc/grpc.go`, the health checking protocol and the gRPC wire format over HTTP/2.

use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};

use super::{Answer, dial, go_duration, host_port, tls};
use crate::stream::grpc::{Channel, Status};

/// `HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct Question {
    #[prost(string, tag = "1")]
    service: String,
}

/// `HealthCheckResponse`; the status is an enumeration, which may have numbers that are not known here.
#[derive(Clone, PartialEq, Message)]
struct Health {
    #[prost(int32, tag = "1")]
    status: i32,
}

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
            Ok(Ok(stream)) => timeout_at(deadline, call(stream, "https", &address, service, limit)).await,
        }
    } else {
        timeout_at(deadline, call(stream, "http", &address, service, limit)).await
    };
    match answer {
        Err(_) => Answer::failure(format!("timeout: health rpc did not complete within {}", go_duration(limit))),
        Ok(Err(status)) => failure(&status, limit),
        Ok(Ok(1)) => Answer::success("service healthy"),
        Ok(Ok(status)) => Answer::failure(format!("service unhealthy (responded with {:?})", serving_status(status))),
    }
}

fn failure(status: &Status, limit: Duration) -> Answer {
    Answer::failure(match status.code {
        Status::DEADLINE_EXCEEDED => format!("timeout: health rpc did not complete within {}", go_duration(limit)),
        Status::UNIMPLEMENTED => format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
            status.message
        ),
        _ => format!("error: health rpc probe failed: {status}"),
    })
}

async fn call<S>(io: S, scheme: &str, authority: &str, service: &str, limit: Duration) -> Result<i32, Status>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let channel = Channel::over(io, format!("{scheme}://{authority}"), "kube-probe/1.37").await?;
    let question = Question { service: service.to_owned() };
    let health: Health = channel.unary("/grpc.health.v1.Health/Check", &question, limit).await?;
    Ok(health.status)
}

fn serving_status(status: i32) -> String {
    match status {
        0 => "UNKNOWN".to_owned(),
        1 => "SERVING".to_owned(),
        2 => "NOT_SERVING".to_owned(),
        3 => "SERVICE_UNKNOWN".to_owned(),
        other => other.to_string(),
    }
}
