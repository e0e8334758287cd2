//! Carries out one probe: an HTTP, TCP or gRPC request to the Pod's address, or a command in the container.
//!
//! Source: `pkg/kubelet/prober/prober.go` and `pkg/probe`. When a probe is due and what its results add up to is
//! decided in [`super::probes`].

mod dial;
mod grpc;
mod http_get;
mod tls;
mod url;

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::probes::ProbeKind;

pub use http_get::{HttpGet, get};

/// How often a probe that could not be carried out is tried.
const ATTEMPTS: usize = 3;
/// How much of a response or of a command's output is looked at.
const MAX_OUTPUT: usize = 10 * 1024;

/// What a probe has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Good or bad.
    pub verdict: Verdict,
    /// What was seen: a reason, or the first 10 KiB of the answer.
    pub output: String,
}

/// Good or bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Success,
    /// Counts as success, but users should hear of it.
    Warning,
    /// Not as it should be, or no answer in time.
    Failure,
}

impl Verdict {
    /// Whether it counts as success.
    #[must_use]
    pub fn is_success(self) -> bool {
        self != Self::Failure
    }
}

impl Answer {
    fn success(output: impl Into<String>) -> Self {
        Self { verdict: Verdict::Success, output: output.into() }
    }

    fn failure(output: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failure, output: output.into() }
    }

    /// Reason and message of the event that kubelets emit about the container; none for a success.
    #[must_use]
    pub fn event(&self, kind: ProbeKind) -> Option<(&'static str, String)> {
        let (kind, output) = (kind.as_str(), &self.output);
        match self.verdict {
            Verdict::Success => None,
            Verdict::Warning => Some(("ProbeWarning", format!("{kind} probe warning: {output}"))),
            Verdict::Failure => Some(("Unhealthy", format!("{kind} probe failed: {output}"))),
        }
    }
}

/// A probe that could not be carried out: its verdict stands. Retryable by nature, as probes repeat.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// No container port of this name.
    #[error("port {0:?} not found")]
    UnknownPort(String),
    /// A number that is no port.
    #[error("invalid port number: {0}")]
    InvalidPort(i32),
    /// A scheme other than HTTP and HTTPS.
    #[error("unsupported protocol scheme {0:?}: use HTTP or HTTPS")]
    Scheme(String),
    /// A header or path that HTTP cannot carry.
    #[error("invalid HTTP request: {0}")]
    Request(String),
    /// The answer ended early.
    #[error("{0}")]
    Body(String),
    /// The container's runtime could not run the command.
    #[error("{0}")]
    Exec(String),
    /// The Pod has no address yet, and the probe names no host.
    #[error("the Pod has no IP address")]
    NoAddress,
    /// A probe without an action.
    #[error("missing probe handler for {0}")]
    NoAction(String),
}

impl ProbeError {
    /// Reason and message of the event that kubelets emit about the container.
    #[must_use]
    pub fn event(&self, kind: ProbeKind) -> (&'static str, String) {
        ("Unhealthy", format!("{} probe errored and resulted in unknown state: {self}", kind.as_str()))
    }
}

/// How a command in a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEnd {
    /// It has exited.
    Exited {
        /// With this code.
        code: i32,
        /// Having written this to stdout and stderr.
        output: Vec<u8>,
    },
    /// It has been killed, because its time was over.
    TimedOut,
}

/// Runs commands in the container that is probed.
pub trait Exec: Sync {
    /// Runs a command, `$(VAR)` not yet expanded, and kills it after `timeout`. At most 10 KiB of output are used.
    fn exec(&self, command: &[String], timeout: Duration) -> impl Future<Output = Result<ExecEnd, String>> + Send;
}

/// Carries out a probe of a container of a Pod at `pod_ip`. An attempt takes no longer than `timeoutSeconds`.
pub async fn probe(
    probe: &Probe,
    container: &Container,
    pod_ip: Option<&str>,
    exec: &impl Exec,
) -> Result<Answer, ProbeError> {
    let mut result = attempt(probe, container, pod_ip, exec).await;
    for _ in 1..ATTEMPTS {
        if result.is_ok() {
            break;
        }
        result = attempt(probe, container, pod_ip, exec).await;
    }
    result
}

async fn attempt(
    probe: &Probe,
    container: &Container,
    pod_ip: Option<&str>,
    exec: &impl Exec,
) -> Result<Answer, ProbeError> {
    let timeout = Duration::from_secs(probe.timeout_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(1).max(1));
    let host = |own: Option<&str>| -> Result<String, ProbeError> {
        own.filter(|host| !host.is_empty()).or(pod_ip).map(str::to_owned).ok_or(ProbeError::NoAddress)
    };
    if let Some(action) = &probe.exec {
        let command = action.command.as_deref().unwrap_or_default();
        let end = exec.exec(command, timeout).await.map_err(ProbeError::Exec)?;
        return Ok(of_command(end, command, timeout));
    }
    if let Some(action) = &probe.http_get {
        let request = HttpGet { action, container, pod_ip, purpose: "probe" };
        return get(request, timeout).await;
    }
    if let Some(action) = &probe.tcp_socket {
        let port = resolve_port(&action.port, container)?;
        return Ok(match dial::connect(&host(action.host.as_deref())?, port, timeout).await {
            Ok(_) => Answer::success(""),
            Err(error) => Answer::failure(error.to_string()),
        });
    }
    if let Some(action) = &probe.grpc {
        let port = checked_port(action.port)?;
        let service = action.service.as_deref().unwrap_or_default();
        let tls = action.mode.as_deref() == Some("TLS");
        return Ok(grpc::check(&host(None)?, port, service, tls, timeout).await);
    }
    Err(ProbeError::NoAction(container.name.clone()))
}

fn of_command(end: ExecEnd, command: &[String], timeout: Duration) -> Answer {
    match end {
        ExecEnd::Exited { code, mut output } => {
            output.truncate(MAX_OUTPUT);
            let output = String::from_utf8_lossy(&output).into_owned();
            let verdict = if code == 0 { Verdict::Success } else { Verdict::Failure };
            Answer { verdict, output }
        }
        ExecEnd::TimedOut => {
            let command = command.join(" ");
            Answer::failure(format!("command timed out: {command:?} timed out after {}", go_duration(timeout)))
        }
    }
}

/// A port by number, or by the name of one of the container's ports.
pub fn resolve_port(port: &IntOrString, container: &Container) -> Result<u16, ProbeError> {
    match port {
        IntOrString::Int(port) => checked_port(*port),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
            checked_port(named.ok_or_else(|| ProbeError::UnknownPort(name.clone()))?.container_port)
        }
    }
}

fn checked_port(port: i32) -> Result<u16, ProbeError> {
    u16::try_from(port).ok().filter(|port| *port > 0).ok_or(ProbeError::InvalidPort(port))
}

/// Whole seconds as Go prints them in messages: `30s`, `1m0s`.
fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

/// `host:port`, with brackets around an IPv6 address.
fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests;
