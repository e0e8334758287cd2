//! Probes, carried out for the worker.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};

use super::node::Node;
use crate::pod::effects::{Outcome, Request};
use crate::pod::probe::{self, Exec, ExecEnd, HttpGet, Verdict};
use crate::pod::probes::ProbeKind;
use crate::runtime::client::ShimError;

/// A hook's request has no time-out of its own in the API; the grace period ends it, and this bounds postStart.
const HOOK_TIMEOUT: Duration = Duration::from_secs(120);

struct InContainer<'a> {
    node: &'a Node,
    request: &'a Request,
    name: &'a str,
}

impl Exec for InContainer<'_> {
    async fn exec(&self, command: &[String], timeout: Duration) -> Result<ExecEnd, String> {
        match self.node.exec_capture(self.request, self.name, command, Some(timeout)).await {
            Ok(finished) if finished.timed_out => Ok(ExecEnd::TimedOut),
            Ok(finished) => Ok(ExecEnd::Exited { code: finished.code, output: finished.output.into_bytes() }),
            // a command that cannot be executed is the container's fault, not the probe's
            Err(ShimError::Start(text)) => Ok(ExecEnd::Exited { code: 128, output: text.into_bytes() }),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Node {
    pub(super) async fn probe(self: &Arc<Self>, request: &Request, name: &str, kind: ProbeKind) -> Outcome {
        let began = Timestamp::now();
        let Some(spec) = request.desired.container(name) else { return Outcome::Cancelled };
        let Some(wanted) = kind.of(&spec.container) else { return Outcome::Cancelled };
        let pod_ip = request.observed.pod_ips.first().map(String::as_str);
        let exec = InContainer { node: self, request, name };
        match probe::probe(wanted, &spec.container, pod_ip, &exec).await {
            Ok(answer) => {
                if answer.verdict == Verdict::Warning {
                    let message = format!("{} probe warning: {}", kind.as_str(), answer.output);
                    self.container_event(&request.desired, name, true, "ProbeWarning", message);
                }
                Outcome::Probed { began, success: Some(answer.verdict.is_success()), message: answer.output }
            }
            Err(error) => Outcome::Probed { began, success: None, message: error.to_string() },
        }
    }

    /// The request of an `httpGet` hook: any answer from 200 to 399 will do.
    pub(super) async fn hook_request(
        &self,
        container: &Container,
        action: &HTTPGetAction,
        pod_ip: Option<&str>,
    ) -> Result<(), String> {
        let answer = probe::get(HttpGet { action, container, pod_ip, purpose: "lifecycle" }, HOOK_TIMEOUT).await;
        match answer {
            Ok(answer) if answer.verdict.is_success() => Ok(()),
            Ok(answer) => Err(answer.output),
            Err(error) => Err(error.to_string()),
        }
    }
}
