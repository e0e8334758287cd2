//! What a Pod looks like in the API: a pure function of what is wanted, what has happened and the time.
//!
//! Source: `generateAPIPodStatus`, `getPhase` and `convertToAPIContainerStatuses` in `pkg/kubelet/kubelet_pods.go`.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, HostIP, LinuxContainerUser, PodIP, PodStatus, ResourceHealth, ResourceStatus, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::conditions::conditions;
use super::model::{Admission, ContainerFacts, ContainerKind, ContainerSpec, Desired, Exit, Observed, Phase};
use super::resize;
use super::rules::{go_seconds, restarts};
use crate::resources::qos::compute_qos_class;

/// All termination messages of a Pod together, bytes (`MaxPodTerminationMessageLogLength`).
const MAX_MESSAGES: usize = 12 * 1024;

/// Reason of containers that are ended because all of their Pod are restarted (KEP-5532).
pub(super) const RESTARTING_ALL: &str = "RestartingAllContainers";
/// What they say.
pub(super) const RESTARTING_ALL_MESSAGE: &str = "The container is removed because RestartAllContainers in place";

/// Computes the status. `base` is the newest status known, from the API or from this function: fields that others
/// own and unchanged transition times are taken from it.
#[must_use]
pub fn status(desired: &Desired, observed: &Observed, base: &PodStatus, now: Timestamp) -> PodStatus {
    let phase = phase(desired, observed);
    let rejected = match &observed.admission {
        Some(Admission::Rejected { reason, message }) => Some((reason, message)),
        _ => None,
    };
    let mut status = PodStatus {
        phase: Some(phase.as_str().to_owned()),
        start_time: observed.start_time.map(api_time),
        observed_generation: resize::observed_generation(desired, observed, base.observed_generation),
        // the API server has written it for all but static Pods
        qos_class: base.qos_class.clone().or_else(|| Some(compute_qos_class(&desired.pod).as_str().to_owned())),
        ..if rejected.is_some() { base.clone() } else { kept(base) }
    };
    if let Some((reason, message)) = rejected {
        status.reason = Some(reason.clone());
        status.message = Some(message.clone());
        return status;
    }
    let verdict = observed.termination.as_ref().and_then(|t| t.verdict.as_ref()).filter(|_| phase.is_terminal());
    status.reason = verdict.map(|v| v.reason.clone());
    status.message = verdict.map(|v| v.message.clone());
    if let Some(first) = observed.host_ips.first() {
        status.host_ip = Some(first.clone());
        status.host_ips = Some(observed.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect());
    }
    if let Some(first) = observed.pod_ips.first() {
        status.pod_ip = Some(first.clone());
        status.pod_ips = Some(observed.pod_ips.iter().map(|ip| PodIP { ip: ip.clone() }).collect());
    }
    let statuses = |kinds: &[ContainerKind]| -> Option<Vec<ContainerStatus>> {
        let list: Vec<_> = desired
            .containers
            .iter()
            .filter(|spec| kinds.contains(&spec.kind))
            .map(|spec| container_status(desired, observed, spec, now))
            .collect();
        (!list.is_empty()).then_some(list)
    };
    status.init_container_statuses = statuses(&[ContainerKind::Init, ContainerKind::Sidecar]);
    status.container_statuses = statuses(&[ContainerKind::Main]).map(sorted);
    status.ephemeral_container_statuses = statuses(&[ContainerKind::Ephemeral]).map(sorted);
    status.allocated_resources = resize::status::pod_allocated(desired);
    status.resources = Some(resize::status::pod_resources(desired, observed, phase));
    status.conditions = Some(conditions(desired, observed, &status, base, phase, now));
    status
}

/// What of the status of a Pod that was let in stays as it is. Large parts are not: they are made anew.
fn kept(base: &PodStatus) -> PodStatus {
    let PodStatus {
        extended_resource_claim_status,
        host_ip,
        host_ips,
        node_allocatable_resource_claim_statuses,
        nominated_node_name,
        pod_ip,
        pod_ips,
        resize,
        resource_claim_statuses,
        volume_health,
        allocated_resources: _,
        conditions: _,
        container_statuses: _,
        ephemeral_container_statuses: _,
        init_container_statuses: _,
        message: _,
        observed_generation: _,
        phase: _,
        qos_class: _,
        reason: _,
        resources: _,
        start_time: _,
    } = base;
    PodStatus {
        extended_resource_claim_status: extended_resource_claim_status.clone(),
        host_ip: host_ip.clone(),
        host_ips: host_ips.clone(),
        node_allocatable_resource_claim_statuses: node_allocatable_resource_claim_statuses.clone(),
        nominated_node_name: nominated_node_name.clone(),
        pod_ip: pod_ip.clone(),
        pod_ips: pod_ips.clone(),
        resize: resize.clone(),
        resource_claim_statuses: resource_claim_statuses.clone(),
        volume_health: volume_health.clone(),
        ..PodStatus::default()
    }
}

fn sorted(mut list: Vec<ContainerStatus>) -> Vec<ContainerStatus> {
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// The phase. Succeeded and Failed appear only when nothing of the Pod runs any more.
#[must_use]
pub fn phase(desired: &Desired, observed: &Observed) -> Phase {
    if let Some(Admission::Rejected { .. }) = observed.admission {
        return Phase::Failed;
    }
    if let Some(phase) = observed.final_phase {
        return phase;
    }
    if !observed.initialized {
        return Phase::Pending;
    }
    let mut waits = false;
    let mut ran = false;
    for spec in desired.of_kind(ContainerKind::Main) {
        match observed.containers.get(spec.name()) {
            Some(facts) if facts.is_running() || facts.exit().is_some() || facts.previous.is_some() => ran = true,
            _ => waits = true,
        }
    }
    if waits || !ran { Phase::Pending } else { Phase::Running }
}

/// A time as the API keeps it: whole seconds.
#[must_use]
pub fn api_time(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

fn container_status(desired: &Desired, observed: &Observed, spec: &ContainerSpec, now: Timestamp) -> ContainerStatus {
    let none = ContainerFacts::default();
    let facts = observed.containers.get(spec.name()).unwrap_or(&none);
    let limit = MAX_MESSAGES / desired.containers.len().max(1);
    let running = facts.is_running();
    let started = running && facts.probes.is_started(&spec.container);
    let ready = match spec.kind {
        ContainerKind::Init => facts.exit().is_some_and(|exit| exit.code == 0),
        ContainerKind::Ephemeral => false,
        ContainerKind::Sidecar | ContainerKind::Main => running && facts.probes.is_ready(&spec.container),
    };
    let (state, last_state) = states(desired, observed, spec, facts, limit, now);
    let instance = facts.current.as_ref();
    ContainerStatus {
        name: spec.name().to_owned(),
        image: instance.map_or_else(|| spec.image().to_owned(), |i| i.image.clone()),
        image_id: instance.map(|i| i.image_id.clone()).unwrap_or_default(),
        container_id: instance.map(|i| container_id(&i.id)),
        restart_count: i32::try_from(facts.restart_count()).unwrap_or(i32::MAX),
        started: Some(started),
        ready,
        state: Some(state),
        last_state: last_state
            .map(|exit| ContainerState { terminated: Some(terminated(exit, limit)), ..ContainerState::default() }),
        resources: instance.map(|instance| {
            let has = instance.resources.as_ref().filter(|_| running);
            resize::status::container_resources(spec.container.resources.as_ref(), has)
        }),
        allocated_resources: instance.and_then(|_| spec.container.resources.as_ref().and_then(|r| r.requests.clone())),
        user: instance.and_then(|i| i.user.clone()).map(|(uid, gid, groups)| ContainerUser {
            linux: Some(LinuxContainerUser { uid, gid, supplemental_groups: Some(groups) }),
        }),
        volume_mounts: volume_mounts(spec),
        allocated_resources_status: device_status(observed, spec),
        ..ContainerStatus::default()
    }
}

/// The container's ID as the API shows it.
#[must_use]
pub fn container_id(id: &str) -> String {
    format!("gantry://{id}")
}

/// How a main container's devices do (KEP-4680). kubelet says it of no other kind.
fn device_status(observed: &Observed, spec: &ContainerSpec) -> Option<Vec<ResourceStatus>> {
    let devices = observed.devices.get(spec.name()).filter(|_| spec.kind == ContainerKind::Main)?;
    let health = |(id, healthy): (&String, &bool)| ResourceHealth {
        resource_id: id.clone(),
        health: Some(if *healthy { "Healthy" } else { "Unhealthy" }.to_owned()),
        message: None,
    };
    let status = |(name, devices): (&String, &BTreeMap<String, bool>)| ResourceStatus {
        name: name.clone(),
        resources: Some(devices.iter().map(health).collect()),
    };
    Some(devices.iter().map(status).collect())
}

fn volume_mounts(spec: &ContainerSpec) -> Option<Vec<VolumeMountStatus>> {
    let list: Vec<_> = spec
        .container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| {
            let read_only = mount.read_only.unwrap_or(false);
            let recursive = matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible"));
            VolumeMountStatus {
                name: mount.name.clone(),
                mount_path: mount.mount_path.clone(),
                read_only: read_only.then_some(true),
                recursive_read_only: read_only
                    .then(|| if recursive { "Enabled".to_owned() } else { "Disabled".to_owned() }),
                volume_status: None,
            }
        })
        .collect();
    (!list.is_empty()).then_some(list)
}

fn states<'a>(
    desired: &Desired,
    observed: &Observed,
    spec: &ContainerSpec,
    facts: &'a ContainerFacts,
    limit: usize,
    now: Timestamp,
) -> (ContainerState, Option<&'a Exit>) {
    let waiting = |reason: &str, message: Option<String>| ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.to_owned()), message }),
        ..ContainerState::default()
    };
    if let Some(instance) = facts.current.as_ref().filter(|i| i.is_running() && (i.post_started || i.stop.is_some())) {
        let running = ContainerStateRunning { started_at: instance.started_at.map(api_time) };
        let state = ContainerState { running: Some(running), ..ContainerState::default() };
        return (state, facts.previous.as_ref());
    }
    let over = observed.final_phase.is_some() || observed.termination.is_some();
    if observed.restarting_all.is_some() && !over && spec.kind != ContainerKind::Ephemeral {
        let last = facts.exit().or(facts.previous.as_ref());
        return (waiting(RESTARTING_ALL, Some(RESTARTING_ALL_MESSAGE.to_owned())), last);
    }
    // a container that will not be tried again keeps the state in which it ended
    if let Some(exit) = facts.exit() {
        let again = !over && restarts(desired, spec, exit);
        let terminated_state =
            ContainerState { terminated: Some(terminated(exit, limit)), ..ContainerState::default() };
        if !again {
            return (terminated_state, facts.previous.as_ref());
        }
        if let Some(failure) = &facts.waiting {
            let (reason, message) = shown_failure(spec, failure, now);
            return (waiting(&reason, Some(message)), Some(exit));
        }
        if backs_off(desired, facts, now) {
            let message = crash_loop_message(desired, spec, facts.restart_backoff.delay);
            return (waiting("CrashLoopBackOff", Some(message)), Some(exit));
        }
        return (terminated_state, facts.previous.as_ref());
    }
    if let Some(failure) = facts.waiting.as_ref().filter(|_| !over) {
        let (reason, message) = shown_failure(spec, failure, now);
        return (waiting(&reason, Some(message)), facts.previous.as_ref());
    }
    if !over && backs_off(desired, facts, now) {
        let message = crash_loop_message(desired, spec, facts.restart_backoff.delay);
        return (waiting("CrashLoopBackOff", Some(message)), facts.previous.as_ref());
    }
    let has_init = desired.containers.iter().any(|c| matches!(c.kind, ContainerKind::Init | ContainerKind::Sidecar));
    let reason = if has_init && !observed.initialized { "PodInitializing" } else { "ContainerCreating" };
    (waiting(reason, None), facts.previous.as_ref())
}

/// The next instance has to wait for the delay after the last one's end.
fn backs_off(desired: &Desired, facts: &ContainerFacts, now: Timestamp) -> bool {
    let until = |exit: &Exit| facts.restart_backoff.until(exit.finished_at.unwrap_or(now), desired.max_restart_delay);
    facts.last_exit().and_then(until).is_some_and(|until| until > now)
}

/// `back-off 10s restarting failed container=c pod=p_ns(uid)`.
#[must_use]
pub fn crash_loop_message(desired: &Desired, spec: &ContainerSpec, delay: i64) -> String {
    let meta = &desired.pod.metadata;
    format!(
        "back-off {} restarting failed container={} pod={}_{}({})",
        go_seconds(delay),
        spec.name(),
        meta.name.as_deref().unwrap_or_default(),
        meta.namespace.as_deref().unwrap_or_default(),
        desired.uid()
    )
}

/// A failed pull is `ErrImagePull` when it happens and `ImagePullBackOff` while the next one is waited for.
fn shown_failure(spec: &ContainerSpec, failure: &super::model::Waiting, now: Timestamp) -> (String, String) {
    let waits = failure.retry_at > now && shown_until(failure) <= now;
    if waits && matches!(failure.reason.as_str(), "ErrImagePull" | "RegistryUnavailable") {
        let message = format!("Back-off pulling image \"{}\": ErrImagePull: {}", spec.image(), failure.message);
        return ("ImagePullBackOff".to_owned(), message);
    }
    (failure.reason.clone(), failure.message.clone())
}

/// How long a failed pull is shown as such before it is shown as back-off.
const PULL_ERROR: SignedDuration = SignedDuration::from_secs(2);

/// Until when a failure to start is shown as what it was; then it is a wait for the next try.
#[must_use]
pub fn shown_until(failure: &super::model::Waiting) -> Timestamp {
    failure.since + PULL_ERROR
}

fn terminated(exit: &Exit, limit: usize) -> ContainerStateTerminated {
    let mut end = exit.message.len().min(limit);
    while !exit.message.is_char_boundary(end) {
        end -= 1;
    }
    ContainerStateTerminated {
        container_id: Some(container_id(&exit.id)),
        exit_code: exit.code,
        signal: (exit.signal != 0).then_some(exit.signal),
        reason: Some(exit.reason.clone()),
        message: (end > 0).then(|| exit.message[..end].to_owned()),
        // Go writes an unset time as null; the epoch marks a container that never ran, as containerd does
        started_at: Some(api_time(exit.started_at.unwrap_or(Timestamp::UNIX_EPOCH))),
        finished_at: exit.finished_at.map(api_time),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

    use super::*;
    use crate::pod::model::{Instance, Waiting};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn desired(policy: &str) -> Desired {
        let container = Container { name: "c".to_owned(), image: Some("image:1".to_owned()), ..Container::default() };
        let mut pod = Pod {
            spec: Some(PodSpec {
                containers: vec![container],
                restart_policy: Some(policy.to_owned()),
                ..PodSpec::default()
            }),
            ..Pod::default()
        };
        pod.metadata.name = Some("p".to_owned());
        pod.metadata.namespace = Some("ns".to_owned());
        pod.metadata.uid = Some("u".to_owned());
        Desired::new(Arc::new(pod))
    }

    fn crashed(code: i32, delay: i64) -> Observed {
        let exit = Exit {
            id: "i".to_owned(),
            code,
            signal: 0,
            reason: "Error".to_owned(),
            message: String::new(),
            started_at: Some(at(0)),
            finished_at: Some(at(5)),
        };
        let instance = Instance {
            id: "i".to_owned(),
            attempt: 2,
            requested_image: "image:1".to_owned(),
            image: "image:1".to_owned(),
            image_id: "image@sha256:1".to_owned(),
            started_at: Some(at(0)),
            post_started: true,
            stop: None,
            exit: Some(exit),
            user: None,
            resources: None,
            resizing: false,
        };
        let mut facts = ContainerFacts { current: Some(instance), next_attempt: 3, ..ContainerFacts::default() };
        facts.restart_backoff.delay = delay;
        facts.restart_backoff.raised_at = Some(at(0));
        let mut observed = Observed {
            admission: Some(Admission::Admitted),
            initialized: true,
            start_time: Some(at(0)),
            ..Observed::default()
        };
        observed.containers.insert("c".to_owned(), facts);
        observed
    }

    #[test]
    fn a_crashed_container_waits_with_its_last_state_shown() {
        let status = status(&desired("Always"), &crashed(1, 20), &PodStatus::default(), at(6));
        assert_eq!(status.phase.as_deref(), Some("Running"));
        let container = &status.container_statuses.unwrap()[0];
        let waiting = container.state.as_ref().unwrap().waiting.as_ref().unwrap();
        assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
        let message = "back-off 20s restarting failed container=c pod=p_ns(u)";
        assert_eq!(waiting.message.as_deref(), Some(message));
        let last = container.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
        assert_eq!((last.exit_code, container.restart_count, container.ready), (1, 2, false));
    }

    #[test]
    fn a_container_that_is_not_restarted_stays_terminated() {
        let status = status(&desired("Never"), &crashed(3, 20), &PodStatus::default(), at(6));
        let container = &status.container_statuses.unwrap()[0];
        assert_eq!(container.state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 3);
    }

    #[test]
    fn a_failed_pull_becomes_back_off() {
        let mut observed = crashed(1, 0);
        observed.initialized = false;
        let facts = observed.containers.get_mut("c").unwrap();
        facts.current = None;
        let (since, retry_at) = (at(10), at(20));
        facts.waiting =
            Some(Waiting { reason: "ErrImagePull".to_owned(), message: "no such image".to_owned(), since, retry_at });
        let shown = |now| {
            let status = status(&desired("Always"), &observed, &PodStatus::default(), now);
            assert_eq!(status.phase.as_deref(), Some("Pending"));
            let waiting = status.container_statuses.unwrap()[0].state.clone().unwrap().waiting.unwrap();
            (waiting.reason.unwrap(), waiting.message.unwrap())
        };
        assert_eq!(shown(at(11)), ("ErrImagePull".to_owned(), "no such image".to_owned()));
        let message = "Back-off pulling image \"image:1\": ErrImagePull: no such image".to_owned();
        assert_eq!(shown(at(13)), ("ImagePullBackOff".to_owned(), message));
    }

    #[test]
    fn devices_are_shown_with_their_health() {
        let mut observed = crashed(1, 20);
        let devices = [("1".to_owned(), true), ("2".to_owned(), false)].into();
        observed.devices.insert("c".to_owned(), [("r.test/x".to_owned(), devices)].into());
        let status = status(&desired("Always"), &observed, &PodStatus::default(), at(6));
        let shown = status.container_statuses.unwrap()[0].allocated_resources_status.clone().unwrap();
        let text = serde_json::to_string(&shown).unwrap();
        let expected = r#"[{"name":"r.test/x","resources":[{"health":"Healthy","resourceID":"1"},{"health":"Unhealthy","resourceID":"2"}]}]"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn transition_times_change_only_with_the_status() {
        let desired = desired("Always");
        let first = status(&desired, &crashed(1, 20), &PodStatus::default(), at(6));
        let second = status(&desired, &crashed(1, 20), &first, at(9));
        assert_eq!(first, second);
    }

    #[test]
    fn a_rejected_pod_is_failed_and_keeps_what_the_api_server_set() {
        let base = PodStatus { qos_class: Some("BestEffort".to_owned()), ..PodStatus::default() };
        let observed = Observed {
            admission: Some(Admission::Rejected {
                reason: "OutOfcpu".to_owned(),
                message: "Pod was rejected".to_owned(),
            }),
            ..Observed::default()
        };
        let status = status(&desired("Always"), &observed, &base, at(0));
        assert_eq!(status.phase.as_deref(), Some("Failed"));
        assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
        assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
    }
}
