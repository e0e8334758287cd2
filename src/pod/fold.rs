//! How facts accumulate: each function notes in [`Observed`] what was begun, what came of it, what the runtime saw.
//!
//! Pure, so that the same fold serves the running worker, the next life of the agent and the simulator.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};

use super::backoff::{INITIAL_SECONDS, MAX_SECONDS};
use super::effects::{Failure, Outcome, RuntimeEvent};
use super::model::{
    Blocked, ContainerFacts, ContainerKind, Desired, Exit, Instance, Observed, Phase, Sandbox, Waiting,
};
use super::plan::Action;
use super::probes::ProbeFacts;
use super::resize;
use super::resources::Resources;

/// A retry of something that is neither a pull nor a restart, seconds (kubelet's `backOffPeriod`).
const RETRY_SECONDS: i64 = 10;
/// Between two tries to kill a container, seconds.
const KILL_RETRY_SECONDS: i64 = 1;
/// The first retries of volumes and sandbox come sooner: what they wait for is often only just being made.
const FIRST_RETRY_MILLIS: i64 = 500;

/// An event for `kubectl describe`.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// `Warning` instead of `Normal`.
    pub warning: bool,
    /// CamelCase reason.
    pub reason: String,
    /// Text.
    pub message: String,
    /// The container it is about.
    pub container: Option<String>,
}

impl Notice {
    fn pod(failure: &Failure) -> Self {
        Self { warning: true, reason: failure.reason.clone(), message: failure.message.clone(), container: None }
    }

    fn container(name: &str, reason: &str, message: String) -> Self {
        Self { warning: true, reason: reason.to_owned(), message, container: Some(name.to_owned()) }
    }
}

/// The instances that are being stopped, with the text of their `Killing` event.
#[must_use]
pub fn stops(observed: &Observed) -> BTreeMap<String, String> {
    let stopping = |facts: &ContainerFacts| {
        let instance = facts.current.as_ref().filter(|i| i.is_running())?;
        Some(instance.stop.as_ref()?.message.clone())
    };
    observed.containers.iter().filter_map(|(name, facts)| Some((name.clone(), stopping(facts)?))).collect()
}

/// What a Pod without a record on this node must have been through, from its status in the API: the node was
/// restarted, or its state directory is gone. Containers that ran are lost; counts and terminal phases stand.
#[must_use]
pub fn from_status(desired: &Desired, known: &PodStatus) -> Observed {
    let mut observed = Observed {
        start_time: known.start_time.as_ref().map(|t| t.0),
        host_ips: known.host_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
        pod_ips: known.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
        ..Observed::default()
    };
    observed.resize.allocated = resize::from_status(desired, known);
    match known.phase.as_deref() {
        Some("Succeeded") => observed.final_phase = Some(Phase::Succeeded),
        Some("Failed") => observed.final_phase = Some(Phase::Failed),
        _ => {}
    }
    let lists = [&known.init_container_statuses, &known.container_statuses, &known.ephemeral_container_statuses];
    for status in lists.into_iter().flatten().flatten() {
        let facts = facts_from(status);
        let is_main = desired.container(&status.name).is_some_and(|spec| spec.kind == ContainerKind::Main);
        observed.initialized |= is_main && (facts.current.is_some() || facts.previous.is_some());
        observed.containers.insert(status.name.clone(), facts);
    }
    if observed.final_phase.is_some() {
        return observed;
    }
    prepare_again(desired, &mut observed);
    observed
}

/// Init containers prepare a sandbox: a new one needs them again. What they did before stays as their last state.
fn prepare_again(desired: &Desired, observed: &mut Observed) {
    observed.initialized &= desired.of_kind(ContainerKind::Init).next().is_none();
    for spec in desired.of_kind(ContainerKind::Init) {
        let Some(facts) = observed.containers.get_mut(spec.name()) else { continue };
        if let Some(Instance { exit: Some(exit), .. }) = facts.current.take() {
            facts.previous = Some(exit);
        }
    }
}

fn facts_from(status: &ContainerStatus) -> ContainerFacts {
    let restart_count = u32::try_from(status.restart_count).unwrap_or(0);
    let mut facts = ContainerFacts::default();
    let exit = |state: &k8s_openapi::api::core::v1::ContainerStateTerminated| Exit {
        id: bare_id(state.container_id.as_deref()),
        code: state.exit_code,
        signal: state.signal.unwrap_or(0),
        reason: state.reason.clone().unwrap_or_default(),
        message: state.message.clone().unwrap_or_default(),
        started_at: state.started_at.as_ref().map(|t| t.0),
        finished_at: state.finished_at.as_ref().map(|t| t.0),
    };
    facts.previous = status.last_state.as_ref().and_then(|s| s.terminated.as_ref()).map(exit);
    let state = status.state.as_ref();
    let running = state.and_then(|s| s.running.as_ref());
    let terminated = state.and_then(|s| s.terminated.as_ref());
    if running.is_some() || terminated.is_some() {
        let started_at = running.and_then(|r| r.started_at.as_ref()).map(|t| t.0);
        let exit = terminated.map(exit).unwrap_or_else(|| lost(bare_id(status.container_id.as_deref()), started_at));
        facts.current = Some(Instance {
            id: exit.id.clone(),
            attempt: restart_count,
            requested_image: status.image.clone(),
            image: status.image.clone(),
            image_id: status.image_id.clone(),
            started_at: exit.started_at,
            post_started: true,
            stop: None,
            exit: Some(exit),
            user: None,
            resources: None,
            resizing: false,
        });
        facts.next_attempt = restart_count + 1;
    } else if restart_count > 0 || facts.previous.is_some() {
        facts.next_attempt = restart_count + 1;
    }
    facts
}

fn bare_id(id: Option<&str>) -> String {
    id.and_then(|id| id.split_once("://")).map_or_else(String::new, |(_, id)| id.to_owned())
}

/// The end of an instance that nobody saw.
#[must_use]
pub fn lost(id: String, started_at: Option<Timestamp>) -> Exit {
    Exit {
        id,
        code: 137,
        signal: 0,
        reason: "ContainerStatusUnknown".to_owned(),
        message: "The container could not be located when the pod was terminated".to_owned(),
        started_at,
        finished_at: None,
    }
}

/// Notes that an action begins: what a crash from here on must not forget.
pub fn begin(desired: &Desired, observed: &mut Observed, action: &Action, now: Timestamp) {
    match action {
        // what admission is asked for is what is set aside if it says yes
        Action::Admit => {
            observed.resize.allocated.get_or_insert_with(|| Resources::of(&desired.pod));
        }
        Action::Resize => resize::begin(desired, observed),
        Action::SetUpSandbox => observed.resize.actuated.clone_from(&observed.resize.allocated),
        Action::Start(name) => {
            let facts = observed.containers.entry(name.clone()).or_default();
            facts.tried_image = desired.container(name).map(|spec| spec.image().to_owned());
            if let Some(failed_at) = facts.last_exit().map(|exit| exit.finished_at.unwrap_or(now)) {
                // a start that could not happen (no image, no ConfigMap) is no restart: the delay rises once per exit
                if facts.restart_backoff.raised_at.is_none_or(|raised| raised < failed_at) {
                    facts.restart_backoff.raise(failed_at, now, desired.max_restart_delay);
                }
            }
        }
        Action::Term(name) => with_stop(observed, name, |stop| {
            stop.signalled = true;
            stop.termed_at.get_or_insert(now);
        }),
        Action::Kill(name) => with_stop(observed, name, |stop| {
            stop.signalled = true;
            stop.killed = true;
        }),
        _ => {}
    }
}

fn with_stop(observed: &mut Observed, name: &str, change: impl FnOnce(&mut super::model::Stop)) {
    let instance = observed.containers.get_mut(name).and_then(|facts| facts.current.as_mut());
    if let Some(stop) = instance.and_then(|i| i.stop.as_mut()) {
        change(stop);
    }
}

/// A container that the next life of the agent finds on the node.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The container's name in its Pod.
    pub name: String,
    /// What is known of it from disk and from the shim.
    pub instance: Instance,
}

/// Brings a record up to what is found on the node after the agent was away; `alive`: the shim answers.
///
/// The record may be behind (an instance was started, or ended, after it was written) but never ahead.
pub fn adopt(desired: &Desired, observed: &mut Observed, found: &[Found], alive: bool, now: Timestamp) {
    let mut found: Vec<&Found> = found.iter().collect();
    found.sort_by_key(|f| f.instance.attempt);
    for Found { name, instance } in &found {
        let next_attempt = observed.containers.get(name).map_or(0, |facts| facts.next_attempt);
        let current = observed.containers.get_mut(name).and_then(|facts| facts.current.as_mut());
        match current {
            Some(known) if known.id == instance.id => {
                known.started_at = known.started_at.or(instance.started_at);
                if known.exit.is_none() {
                    known.exit.clone_from(&instance.exit);
                }
            }
            Some(known) if known.attempt >= instance.attempt => {}
            // created and never started: the runtime removes it
            _ if instance.started_at.is_none() && instance.exit.is_none() => {}
            // it is known, and has been put aside: the container begins anew
            None if next_attempt > instance.attempt => {}
            _ => started(desired, observed, name, instance, now),
        }
    }
    for (name, facts) in &mut observed.containers {
        // a signal is noted before it is sent: whether it was is not known, and twice is better than never
        if let Some(stop) = facts.current.as_mut().and_then(|instance| instance.stop.as_mut()) {
            (stop.signalled, stop.killed) = (false, false);
        }
        let known = |id: &str| found.iter().any(|f| &f.name == name && f.instance.id == id);
        if let Some(instance) = facts.current.as_mut().filter(|i| i.is_running() && !known(&i.id)) {
            instance.exit = Some(Exit { finished_at: Some(now), ..lost(instance.id.clone(), instance.started_at) });
        }
    }
    if !alive && observed.sandbox == Sandbox::Ready {
        runtime_event(desired, observed, &RuntimeEvent::SandboxLost, now);
    }
}

/// Notes what the runtime saw. Returns the container that has ended, if one that is known has.
pub fn runtime_event(
    desired: &Desired,
    observed: &mut Observed,
    event: &RuntimeEvent,
    now: Timestamp,
) -> Option<String> {
    match event {
        RuntimeEvent::Exited(exit) => {
            let (name, facts) = observed
                .containers
                .iter_mut()
                .find(|(_, facts)| facts.current.as_ref().is_some_and(|i| i.id == exit.id && i.exit.is_none()))?;
            let name = name.clone();
            if let Some(instance) = facts.current.as_mut() {
                instance.exit = Some(exit.clone());
            }
            Some(name)
        }
        RuntimeEvent::SandboxLost => {
            for facts in observed.containers.values_mut() {
                if let Some(instance) = facts.current.as_mut().filter(|i| i.is_running()) {
                    instance.exit =
                        Some(Exit { finished_at: Some(now), ..lost(instance.id.clone(), instance.started_at) });
                }
            }
            if !observed.torn_down && observed.sandbox == Sandbox::Ready {
                observed.sandbox = Sandbox::Lost;
                prepare_again(desired, observed);
            }
            None
        }
    }
}

/// Notes how an action ended. Returns the events to emit.
pub fn outcome(
    desired: &Desired,
    observed: &mut Observed,
    action: &Action,
    outcome: &Outcome,
    now: Timestamp,
) -> Vec<Notice> {
    match (action, outcome) {
        // the grace ran out over it
        (Action::PreStop(name), Outcome::Cancelled) => {
            with_stop(observed, name, |stop| stop.pre_stopped = true);
            Vec::new()
        }
        (_, Outcome::Cancelled) => Vec::new(),
        (Action::Admit, Outcome::Admitted(admission)) => {
            observed.admission = Some(admission.clone());
            Vec::new()
        }
        (Action::MountVolumes, Outcome::Done) => {
            observed.volumes_mounted = true;
            unblock(observed, "FailedMount")
        }
        (Action::SetUpSandbox, Outcome::SandboxUp { pod_ips, enforced }) => {
            observed.sandbox = Sandbox::Ready;
            observed.pod_ips.clone_from(pod_ips);
            observed.resize.enforced = *enforced;
            unblock(observed, "FailedCreatePodSandBox")
        }
        (Action::ClearSandbox, Outcome::Done) => {
            observed.sandbox = Sandbox::Absent;
            observed.volumes_mounted = false;
            unblock(observed, super::plan::TEAR_DOWN_FAILED)
        }
        (Action::Allocate, Outcome::Allocated(decision)) => resize::decided(desired, observed, decision, now),
        (Action::Resize, Outcome::Resized(actuation)) => resize::actuated(desired, observed, actuation, now),
        (Action::TearDown, Outcome::Done) => {
            observed.torn_down = true;
            observed.blocked = None;
            Vec::new()
        }
        (
            Action::MountVolumes | Action::SetUpSandbox | Action::ClearSandbox | Action::TearDown,
            Outcome::Failed(failure),
        ) => {
            block(observed, failure, now);
            vec![Notice::pod(failure)]
        }
        (Action::Start(name), Outcome::Started(instance) | Outcome::StartError(instance)) => {
            started(desired, observed, name, instance, now);
            Vec::new()
        }
        (Action::Start(name), Outcome::Failed(failure)) => start_failed(desired, observed, name, failure, now),
        (Action::PostStart(name), Outcome::Done) => {
            if let Some(instance) = observed.containers.get_mut(name).and_then(|f| f.current.as_mut()) {
                instance.post_started = true;
            }
            Vec::new()
        }
        (Action::PostStart(name), Outcome::Failed(failure)) => post_start_failed(desired, observed, name, failure, now),
        (Action::PreStop(name), result) => {
            with_stop(observed, name, |stop| stop.pre_stopped = true);
            match result {
                Outcome::Failed(failure) => vec![Notice::container(name, &failure.reason, failure.message.clone())],
                _ => Vec::new(),
            }
        }
        (Action::Kill(name), Outcome::Failed(_)) => {
            // it may be between two states: try again while it runs, but not without a pause
            with_stop(observed, name, |stop| {
                stop.killed = false;
                stop.kill_again_at = Some(now + SignedDuration::from_secs(KILL_RETRY_SECONDS));
            });
            Vec::new()
        }
        (Action::Probe(name, kind), Outcome::Probed { began, success, message }) => {
            probed(desired, observed, name, *kind, *began, *success, message)
        }
        _ => Vec::new(),
    }
}

fn probed(
    desired: &Desired,
    observed: &mut Observed,
    name: &str,
    kind: super::probes::ProbeKind,
    began: Timestamp,
    success: Option<bool>,
    message: &str,
) -> Vec<Notice> {
    let (Some(facts), Some(spec)) = (observed.containers.get_mut(name), desired.container(name)) else {
        return Vec::new();
    };
    let Some(probe) = kind.of(&spec.container) else { return Vec::new() };
    // a result for an instance that is gone says nothing about the next one
    if !facts.current.as_ref().is_some_and(|i| i.is_running() && i.started_at.is_some_and(|at| at <= began)) {
        return Vec::new();
    }
    match success {
        Some(success) => {
            facts.probes.note(kind, probe, success, began);
            if success {
                Vec::new()
            } else {
                vec![Notice::container(name, "Unhealthy", format!("{} probe failed: {message}", kind.as_str()))]
            }
        }
        None => {
            facts.probes.note_unknown(kind, began);
            vec![Notice::container(
                name,
                "Unhealthy",
                format!("{} probe errored and resulted in unknown state: {message}", kind.as_str()),
            )]
        }
    }
}

/// A start may have come about just before the sandbox was lost, and be told of only after that.
fn started(desired: &Desired, observed: &mut Observed, name: &str, instance: &Instance, now: Timestamp) {
    let gone = observed.sandbox == Sandbox::Lost;
    let kind = desired.container(name).map(|spec| spec.kind);
    let facts = observed.containers.entry(name.to_owned()).or_default();
    if let Some(exit) = facts.current.take().and_then(|old| old.exit) {
        facts.previous = Some(exit);
    }
    facts.next_attempt = facts.next_attempt.max(instance.attempt + 1);
    facts.waiting = None;
    facts.pull_backoff = super::backoff::Backoff::default();
    facts.probes = ProbeFacts::default();
    let hook = desired
        .container(name)
        .and_then(|spec| spec.container.lifecycle.as_ref())
        .is_some_and(|lifecycle| lifecycle.post_start.is_some());
    let mut instance = instance.clone();
    instance.post_started |= !hook;
    if gone && instance.is_running() {
        instance.exit = Some(Exit { finished_at: Some(now), ..lost(instance.id.clone(), instance.started_at) });
    }
    match kind {
        // as in `prepare_again`: the next sandbox needs it anew
        Some(ContainerKind::Init) if gone => facts.previous = instance.exit,
        _ => facts.current = Some(instance),
    }
    if kind == Some(ContainerKind::Main) && !gone {
        observed.initialized = true;
    }
}

fn start_failed(
    desired: &Desired,
    observed: &mut Observed,
    name: &str,
    failure: &Failure,
    now: Timestamp,
) -> Vec<Notice> {
    let facts = observed.containers.entry(name.to_owned()).or_default();
    let is_pull = matches!(failure.reason.as_str(), "ErrImagePull" | "RegistryUnavailable");
    let retry_at = if is_pull {
        facts.pull_backoff.raise(now, now, MAX_SECONDS);
        now + SignedDuration::from_secs(facts.pull_backoff.delay.max(INITIAL_SECONDS))
    } else {
        now + SignedDuration::from_secs(RETRY_SECONDS)
    };
    facts.waiting =
        Some(Waiting { reason: failure.reason.clone(), message: failure.message.clone(), since: now, retry_at });
    let text = if is_pull || failure.reason.starts_with("ErrImage") || failure.reason == "InvalidImageName" {
        format!("Error: {}", failure.reason)
    } else {
        format!("Error: {}", failure.message)
    };
    let mut notices = vec![Notice::container(name, "Failed", text)];
    if is_pull {
        let image = desired.container(name).map(|spec| spec.image().to_owned()).unwrap_or_default();
        let message = format!("Back-off pulling image {image:?}");
        notices.push(Notice { warning: false, ..Notice::container(name, "BackOff", message) });
    }
    notices
}

fn post_start_failed(
    desired: &Desired,
    observed: &mut Observed,
    name: &str,
    failure: &Failure,
    now: Timestamp,
) -> Vec<Notice> {
    let grace = super::rules::grace_seconds(desired);
    let Some(instance) = observed.containers.get_mut(name).and_then(|f| f.current.as_mut()).filter(|i| i.is_running())
    else {
        return Vec::new();
    };
    instance.stop.get_or_insert_with(|| super::model::Stop {
        since: now,
        deadline: now + SignedDuration::from_secs(grace),
        pre_stopped: true,
        signalled: false,
        termed_at: None,
        kill_again_at: None,
        killed: false,
        message: "FailedPostStartHook".to_owned(),
        restart: false,
    });
    vec![Notice::container(name, &failure.reason, failure.message.clone())]
}

fn block(observed: &mut Observed, failure: &Failure, now: Timestamp) {
    let failures = observed.blocked.as_ref().map_or(0, |b| b.failures) + 1;
    let millis = (FIRST_RETRY_MILLIS << (failures - 1).min(8)).min(120_000);
    observed.blocked = Some(Blocked {
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        retry_at: now + SignedDuration::from_millis(millis),
        failures,
    });
}

fn unblock(observed: &mut Observed, reason: &str) -> Vec<Notice> {
    if observed.blocked.as_ref().is_some_and(|blocked| blocked.reason == reason) {
        observed.blocked = None;
    }
    Vec::new()
}
