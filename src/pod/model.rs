//! What is wanted of a Pod ([`Desired`]) and what has happened to it ([`Observed`]).
//!
//! [`Observed`] is the Pod's durable record: it is written to the state directory before an action that must not
//! happen twice, and read back after a restart of the agent. It holds facts only; everything that follows from
//! them (phase, conditions, next step) is computed by [`super::plan`] and [`super::status`].

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use super::backoff::Backoff;
use super::probes::ProbeFacts;
use super::resize::Resize;
use super::resources::CpuMemory;
use super::rules::MIN_GRACE_SECONDS_AFTER_TERM;
use crate::resources::amounts;
use crate::resources::devices::DeviceHealth;

/// Which of a Pod's lists a container stands in; decides order, restarts and its part in the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerKind {
    /// `initContainers`, runs to completion.
    Init,
    /// `initContainers` with `restartPolicy: Always` (KEP-753).
    Sidecar,
    /// `containers`.
    Main,
    /// `ephemeralContainers` (KEP-277).
    Ephemeral,
}

/// A container as the Pod wants it.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerSpec {
    /// Its list.
    pub kind: ContainerKind,
    /// Its specification; an ephemeral container's is brought into the same form.
    pub container: Container,
    /// `targetContainerName` of an ephemeral container.
    pub target: Option<String>,
    /// What it is to have; every step of the Pod compares it.
    pub size: CpuMemory,
}

impl ContainerSpec {
    fn new(pod: &Pod, kind: ContainerKind, container: Container, target: Option<String>) -> Self {
        Self { kind, size: CpuMemory::of(pod, &container), container, target }
    }

    /// The container's name, unique in its Pod.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.container.name
    }

    /// The image reference as the Pod gives it.
    #[must_use]
    pub fn image(&self) -> &str {
        self.container.image.as_deref().unwrap_or_default()
    }

    /// The field path that events and probes name, as kubelet's `fieldPath`.
    #[must_use]
    pub fn field_path(&self) -> String {
        let list = match self.kind {
            ContainerKind::Init | ContainerKind::Sidecar => "initContainers",
            ContainerKind::Main => "containers",
            ContainerKind::Ephemeral => "ephemeralContainers",
        };
        format!("spec.{list}{{{}}}", self.name())
    }
}

/// What the Pod's source wants now.
#[derive(Clone, Debug)]
pub struct Desired {
    /// The Pod as it is to run here: as last seen, with the resources that the node has set aside for it.
    pub pod: Arc<Pod>,
    /// The Pod as last seen; the same as `pod` unless other resources are wanted ([`super::resize`]).
    pub wanted: Arc<Pod>,
    /// Its containers: init and sidecar in order, then main, then ephemeral.
    pub containers: Arc<[ContainerSpec]>,
    /// What `pod` requests as a whole; the status shows it, and is made often.
    pub requests: Arc<BTreeMap<String, Quantity>>,
    /// What `pod` is limited to as a whole.
    pub limits: Arc<BTreeMap<String, Quantity>>,
    /// The node's cap on `CrashLoopBackOff` (KEP-5593), seconds.
    pub max_restart_delay: i64,
    /// Whether the Pod comes from a manifest on the node (static).
    pub is_static: bool,
}

impl Desired {
    /// Reads a Pod's specification.
    #[must_use]
    pub fn new(pod: Arc<Pod>) -> Self {
        let mut containers = Vec::new();
        if let Some(spec) = &pod.spec {
            for container in spec.init_containers.iter().flatten() {
                let kind = if container.restart_policy.as_deref() == Some("Always") {
                    ContainerKind::Sidecar
                } else {
                    ContainerKind::Init
                };
                containers.push(ContainerSpec::new(&pod, kind, container.clone(), None));
            }
            for container in &spec.containers {
                containers.push(ContainerSpec::new(&pod, ContainerKind::Main, container.clone(), None));
            }
            for container in spec.ephemeral_containers.iter().flatten() {
                let target = container.target_container_name.clone();
                let container = from_ephemeral(container);
                containers.push(ContainerSpec::new(&pod, ContainerKind::Ephemeral, container, target));
            }
        }
        let is_static = pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get("kubernetes.io/config.source"))
            .is_some_and(|source| source != "api");
        Self {
            requests: Arc::new(amounts::pod_requests_list(&pod)),
            limits: Arc::new(amounts::pod_limits_list(&pod)),
            wanted: pod.clone(),
            pod,
            containers: containers.into(),
            max_restart_delay: 300,
            is_static,
        }
    }

    /// The Pod's UID.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    /// `restartPolicy` of the Pod.
    #[must_use]
    pub fn restart_policy(&self) -> RestartPolicy {
        match self.pod.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        }
    }

    /// The container of that name.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&ContainerSpec> {
        self.containers.iter().find(|c| c.name() == name)
    }

    /// Containers of one kind, in the Pod's order.
    pub fn of_kind(&self, kind: ContainerKind) -> impl DoubleEndedIterator<Item = &ContainerSpec> {
        self.containers.iter().filter(move |c| c.kind == kind)
    }

    /// `deletionTimestamp` is set.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }
}

/// `restartPolicy` of a Pod or container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Restart whatever the exit code.
    Always,
    /// Restart after a non-zero exit code.
    OnFailure,
    /// Never restart.
    Never,
}

fn from_ephemeral(e: &EphemeralContainer) -> Container {
    Container {
        args: e.args.clone(),
        command: e.command.clone(),
        env: e.env.clone(),
        env_from: e.env_from.clone(),
        image: e.image.clone(),
        image_pull_policy: e.image_pull_policy.clone(),
        name: e.name.clone(),
        resources: e.resources.clone(),
        security_context: e.security_context.clone(),
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path.clone(),
        termination_message_policy: e.termination_message_policy.clone(),
        tty: e.tty,
        volume_devices: e.volume_devices.clone(),
        volume_mounts: e.volume_mounts.clone(),
        working_dir: e.working_dir.clone(),
        restart_policy: Some("Never".to_owned()),
        ..Container::default()
    }
}

/// Everything that has happened to a Pod on this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Observed {
    /// When the node first saw the Pod (`status.startTime`).
    pub start_time: Option<Timestamp>,
    /// The verdict of admission; `None` before it.
    pub admission: Option<Admission>,
    /// The sandbox: namespaces, addresses, shim.
    pub sandbox: Sandbox,
    /// All volumes are mounted.
    pub volumes_mounted: bool,
    /// Why the last try to mount volumes or make the sandbox failed, and when to try again.
    pub blocked: Option<Blocked>,
    /// By container name.
    pub containers: BTreeMap<String, ContainerFacts>,
    /// A main container has run: init containers do not run again in this sandbox.
    pub initialized: bool,
    /// All containers are being ended to be started anew (`RestartAllContainers`, KEP-5532), since then.
    pub restarting_all: Option<Timestamp>,
    /// Set once, when the Pod is to end.
    pub termination: Option<Termination>,
    /// Sandbox, volumes and cgroups are gone after the end.
    pub torn_down: bool,
    /// The IPs the Pod had, kept after the sandbox is gone.
    pub pod_ips: Vec<String>,
    /// The node's IPs when the Pod was first seen.
    pub host_ips: Vec<String>,
    /// Phases Succeeded and Failed are final: the one that was first computed after the end.
    pub final_phase: Option<Phase>,
    /// Resources: what was set aside, and changes of it.
    pub resize: Resize,
    /// Devices of plugins that containers have, by name, and whether they work.
    pub devices: BTreeMap<String, DeviceHealth>,
}

/// `status.phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Not all containers have started.
    Pending,
    /// At least one container runs, or will again.
    Running,
    /// All main containers ended with exit code 0.
    Succeeded,
    /// All main containers ended, one with another exit code; or the node ended the Pod.
    Failed,
}

impl Phase {
    /// The word in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
        }
    }

    /// Succeeded or Failed.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed)
    }
}

/// The node's decision about a new Pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Admission {
    /// The Pod may run.
    Admitted,
    /// It may not; the Pod is Failed with this reason and message.
    Rejected {
        /// `status.reason`, for example `OutOfcpu`.
        reason: String,
        /// `status.message`.
        message: String,
    },
}

/// The Pod's namespaces and shim.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Sandbox {
    /// Not made yet.
    #[default]
    Absent,
    /// Up; containers may start.
    Ready,
    /// It was up and is lost (the shim died, or the node was restarted): it is cleared and made again.
    Lost,
}

/// A step before the containers that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Blocked {
    /// The event's reason: `FailedMount`, `FailedCreatePodSandBox`.
    pub reason: String,
    /// The error text.
    pub message: String,
    /// Not before.
    pub retry_at: Timestamp,
    /// Failures in a row.
    pub failures: u32,
}

/// What has happened to one container of the Pod, over all its instances.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerFacts {
    /// The newest instance.
    pub current: Option<Instance>,
    /// The instance before it (`lastState`).
    pub previous: Option<Exit>,
    /// The number the next instance gets; the restart count is that of the newest instance.
    pub next_attempt: u32,
    /// Why the next instance has not started.
    pub waiting: Option<Waiting>,
    /// The image reference of the newest try to start; what went wrong with another one says nothing about this.
    pub tried_image: Option<String>,
    /// `CrashLoopBackOff`.
    pub restart_backoff: Backoff,
    /// `ImagePullBackOff`.
    pub pull_backoff: Backoff,
    /// Results of the probes of the newest instance.
    pub probes: ProbeFacts,
}

impl ContainerFacts {
    /// The newest instance runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.current.as_ref().is_some_and(Instance::is_running)
    }

    /// How the newest instance ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<&Exit> {
        self.current.as_ref().and_then(|i| i.exit.as_ref())
    }

    /// How the newest instance that has ended did so: what back-off counts from, also when the sandbox it ran in is
    /// gone.
    #[must_use]
    pub fn last_exit(&self) -> Option<&Exit> {
        self.current.as_ref().map_or(self.previous.as_ref(), |instance| instance.exit.as_ref())
    }

    /// `restartCount`.
    #[must_use]
    pub fn restart_count(&self) -> u32 {
        self.next_attempt.saturating_sub(1)
    }
}

/// One run of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// 64 hexadecimal digits.
    pub id: String,
    /// 0 for the first.
    pub attempt: u32,
    /// The image reference that the Pod gave when it was started; another one now means a restart.
    pub requested_image: String,
    /// The image's name as the runtime knows it.
    pub image: String,
    /// The image's digest reference.
    pub image_id: String,
    /// When the process was started; `None` if it never was.
    pub started_at: Option<Timestamp>,
    /// postStart has succeeded, or there is none.
    pub post_started: bool,
    /// The instance is being stopped.
    pub stop: Option<Stop>,
    /// It has ended.
    pub exit: Option<Exit>,
    /// The user it runs as: uid, gid, supplementary groups (`status.user.linux`).
    pub user: Option<(i64, i64, Vec<i64>)>,
    /// What its cgroup was made from, and changed to since.
    #[serde(default)]
    pub resources: Option<CpuMemory>,
    /// A change of its cgroup was begun, and how far it came has not been noted.
    #[serde(default)]
    pub resizing: bool,
}

impl Instance {
    /// Started and not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.started_at.is_some() && self.exit.is_none()
    }
}

/// How an instance ended (`state.terminated`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    /// The instance.
    pub id: String,
    /// 128 + n for signal n.
    pub code: i32,
    /// The signal that ended it, or 0.
    pub signal: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`.
    pub reason: String,
    /// The termination message.
    pub message: String,
    /// When the process was started.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

/// `state.waiting`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Waiting {
    /// For example `ErrImagePull`, `CreateContainerConfigError`.
    pub reason: String,
    /// What is wrong.
    pub message: String,
    /// When it went wrong.
    pub since: Timestamp,
    /// The next try, not before.
    pub retry_at: Timestamp,
}

/// The stopping of an instance, step by step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stop {
    /// When it began.
    pub since: Timestamp,
    /// The grace ends at this time.
    pub deadline: Timestamp,
    /// preStop is over, or there is none to run.
    pub pre_stopped: bool,
    /// The stop signal was sent.
    pub signalled: bool,
    /// When it was first sent.
    #[serde(default)]
    pub termed_at: Option<Timestamp>,
    /// KILL was sent.
    pub killed: bool,
    /// The last try to send it failed: not again before this time.
    #[serde(default)]
    pub kill_again_at: Option<Timestamp>,
    /// For the `Killing` event.
    pub message: String,
    /// It is stopped to be started anew, whatever its restart policy and without back-off.
    #[serde(default)]
    pub restart: bool,
}

impl Stop {
    /// When KILL is sent: at the deadline, but whatever has used up the grace before (preStop, containers that stop
    /// earlier, an agent that was away) leaves an instance two seconds from its stop signal (kubelet's
    /// `minimumGracePeriodInSeconds`). `None` before the signal.
    #[must_use]
    pub fn kill_at(&self) -> Option<Timestamp> {
        let window = SignedDuration::from_secs(MIN_GRACE_SECONDS_AFTER_TERM);
        let at = self.deadline.max(self.termed_at? + window);
        Some(self.kill_again_at.map_or(at, |again| again.max(at)))
    }
}

/// The end of the Pod as a whole, requested from outside or by a rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Termination {
    /// When it was first requested.
    pub since: Timestamp,
    /// All containers are killed by then; it only moves closer.
    pub deadline: Timestamp,
    /// The grace from which `deadline` was computed, seconds.
    pub grace_seconds: i64,
    /// Status of the Pod when the node itself ends it (eviction, deadline, shutdown).
    pub verdict: Option<Verdict>,
}

/// Why the node ended a Pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// `status.reason`, for example `Evicted`, `DeadlineExceeded`, `Terminated`.
    pub reason: String,
    /// `status.message`.
    pub message: String,
    /// Report condition `DisruptionTarget` with reason `TerminationByKubelet`.
    pub disruption: bool,
    /// Message of that condition, where it is not `message`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disruption_message: Option<String>,
}
