//! The seam between the Pod worker and the world: everything the worker does goes through [`Effects`].
//!
//! The node implements it with the real runtime (`agent`), the simulator with a fake that fails, stalls and crashes.

use std::future::Future;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use tokio_util::sync::CancellationToken;

use super::model::{Admission, Desired, Exit, Instance, Observed};
use super::plan::Action;
use super::resize::{Actuation, Decision};
use crate::resources::cgroup::Enforced;

/// An action with what it needs to know.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to do.
    pub action: Action,
    /// The Pod as wanted when the action was begun.
    pub desired: Arc<Desired>,
    /// What had happened by then.
    pub observed: Arc<Observed>,
    /// The worker no longer wants it: waits end, steps that cannot be left half-done are finished.
    pub cancel: CancellationToken,
}

/// How an action ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Of [`Action::Admit`].
    Admitted(Admission),
    /// Of [`Action::SetUpSandbox`]: the Pod's addresses.
    SandboxUp {
        /// The Pod's IPs, the primary family first.
        pod_ips: Vec<String>,
        /// The limits that the kernel has for the Pod's cgroup.
        enforced: Option<Enforced>,
    },
    /// Of [`Action::Allocate`].
    Allocated(Box<Decision>),
    /// Of [`Action::Resize`].
    Resized(Box<Actuation>),
    /// Of any action without an answer: it is done.
    Done,
    /// Of [`Action::Start`]: the instance runs.
    Started(Box<Instance>),
    /// Of [`Action::Start`]: there is an instance, but its process could not be executed.
    StartError(Box<Instance>),
    /// Of [`Action::Probe`].
    Probed {
        /// When it began.
        began: Timestamp,
        /// `None`: the probe itself could not be carried out.
        success: Option<bool>,
        /// What was seen, for the `Unhealthy` event.
        message: String,
    },
    /// The action failed; it is tried again later.
    Failed(Failure),
    /// Given up on request.
    Cancelled,
}

/// Why an action failed, in kubelet's words.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// An event's or a waiting state's reason, for example `FailedMount` or `ErrImagePull`.
    pub reason: String,
    /// The text users read.
    pub message: String,
}

impl Failure {
    /// A failure with a reason.
    #[must_use]
    pub fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into() }
    }
}

/// What the runtime tells a worker on its own.
#[derive(Clone, Debug, PartialEq)]
pub enum RuntimeEvent {
    /// An instance has ended; its record is on disk.
    Exited(Exit),
    /// The shim is gone, and with it every container that has no exit record.
    SandboxLost,
}

/// What became of a status report or a deletion.
#[derive(Clone, Debug, PartialEq)]
pub enum ApiAnswer {
    /// The API server has it; its copy of the status and the object's resource version.
    Accepted {
        /// `status` as stored.
        status: Box<PodStatus>,
        /// `metadata.resourceVersion`.
        resource_version: Option<String>,
    },
    /// There is no such Pod (any more).
    Gone,
    /// No answer, or a refusal that may pass.
    Failed(String),
}

/// Everything a Pod worker does to the world.
pub trait Effects: Send + Sync + 'static {
    /// Carries out an action. Never fails silently: every way out is an [`Outcome`].
    fn perform(&self, request: Request) -> impl Future<Output = Outcome> + Send;

    /// Writes the Pod's record; returns when a crash of the agent can no longer lose it.
    fn save(&self, desired: &Desired, observed: &Observed);

    /// Sends a status; `base` is the API server's copy as far as known.
    fn report(
        &self,
        desired: Arc<Desired>,
        base: PodStatus,
        status: PodStatus,
    ) -> impl Future<Output = ApiAnswer> + Send;

    /// Whether many Pods are being started, or there is much else to tell the API server: what is not important should
    /// wait.
    fn is_busy(&self) -> bool;

    /// Deletes the API object with grace 0 and the UID as precondition.
    fn delete(&self, desired: Arc<Desired>) -> impl Future<Output = ApiAnswer> + Send;

    /// Removes the last traces (logs, record) of a Pod that is gone.
    fn forget(&self, desired: Arc<Desired>) -> impl Future<Output = ()> + Send;

    /// Publishes the newest status to the node's own readers (HTTP server, statistics).
    fn publish(&self, desired: &Arc<Desired>, observed: &Arc<Observed>, status: &PodStatus);

    /// Emits an event about the Pod or, with a field path, one of its containers.
    fn event(&self, desired: &Desired, warning: bool, reason: &str, message: &str, field_path: Option<String>);

    /// The wall clock.
    fn now(&self) -> Timestamp;

    /// Sleeps until the wall clock shows `at`.
    fn sleep_until(&self, at: Timestamp) -> impl Future<Output = ()> + Send;

    /// The node's own IPs, the primary first.
    fn host_ips(&self) -> Vec<String>;
}
