//! What to do next for a Pod: a pure function of what is wanted, what has happened and the time.
//!
//! The worker calls [`settle`] to note what follows from time alone (a deadline has passed, an instance has to
//! stop), stores the record, then carries out [`plan`]'s actions. Order and conditions follow
//! `kuberuntime_manager.go` (`computePodActions`, `SyncPod`, `killContainersWithSyncResult`).

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use super::backoff::Backoff;
use super::model::{
    Admission, ContainerFacts, ContainerKind, ContainerSpec, Desired, Instance, Observed, Sandbox, Stop, Termination,
    Verdict,
};
use super::probes::ProbeKind;
use super::restart_all;
use super::rules::{active_deadline, finished, grace_seconds, next_try, phase_when_ended, restarts, restarts_all};

/// The reason of a tear-down that failed. Only its own failures make it wait: a Pod that ends does not care when its
/// volumes would have been tried again.
pub const TEAR_DOWN_FAILED: &str = "FailedKillPod";

/// Something the worker does to the world. Each is idempotent, has a deadline, and reports back once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Decide whether the Pod may run here.
    Admit,
    /// Mount its volumes.
    MountVolumes,
    /// Make namespaces, network, cgroup and shim.
    SetUpSandbox,
    /// Clear what is left of a sandbox that was lost, before a new one.
    ClearSandbox,
    /// Pull the image if need be, create and start the next instance.
    Start(String),
    /// Run the postStart hook.
    PostStart(String),
    /// Run the preStop hook.
    PreStop(String),
    /// Send the stop signal.
    Term(String),
    /// Send KILL to everything in the container.
    Kill(String),
    /// Decide whether there is room for the resources that are wanted now.
    Allocate,
    /// Bring the cgroups of the Pod and its containers to what was allocated.
    Resize,
    /// Run a probe once.
    Probe(String, ProbeKind),
    /// Remove containers, sandbox, volumes and cgroups.
    TearDown,
}

/// What [`plan`] decides.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// To begin now.
    pub actions: Vec<Action>,
    /// Running actions to give up (a pull for a Pod that is to end).
    pub cancel: Vec<Action>,
    /// Look again at this time at the latest.
    pub wake_at: Option<Timestamp>,
    /// Nothing of the Pod is left on the node but its logs and its record.
    pub ended: bool,
}

impl Plan {
    pub(super) fn act(&mut self, running: &BTreeSet<Action>, action: Action) {
        if !running.contains(&action) {
            self.actions.push(action);
        }
    }

    pub(super) fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |other| other.min(at)));
    }
}

/// Notes what follows from the time and from what is wanted: the Pod's end, its deadline, instances to stop.
pub fn settle(desired: &Desired, observed: &mut Observed, running: &BTreeSet<Action>, now: Timestamp) {
    observed.start_time.get_or_insert(now);
    settle_termination(desired, observed, now);
    if observed.termination.is_none() {
        resume(observed, now);
    }
    super::resize::settle(desired, observed, running, now);
    let ending = observed.termination.is_some() || finished(desired, observed).is_some();
    if !ending {
        settle_images(desired, observed, running);
        settle_restarts(desired, observed, now);
        restart_all::settle(desired, observed, running, now);
        return;
    }
    let deadline = observed
        .termination
        .as_ref()
        .map_or_else(|| now + SignedDuration::from_secs(grace_seconds(desired)), |termination| termination.deadline)
        // what waited for others to stop is late by no fault of its own
        .max(now);
    for spec in stop_order(desired, observed) {
        let Some(instance) = observed.containers.get_mut(&spec).and_then(|f| f.current.as_mut()) else { continue };
        begin_stop(instance, now, deadline, format!("Stopping container {spec}"));
    }
    // an instance that is just being started may still turn out to run
    let starting = running.iter().any(|action| matches!(action, Action::Start(_)));
    if !starting && running_instances(observed).next().is_none() && observed.final_phase.is_none() {
        let phase =
            finished(desired, observed).filter(|_| observed.termination.as_ref().is_none_or(|t| t.verdict.is_none()));
        observed.final_phase = Some(phase.unwrap_or_else(|| phase_when_ended(desired, observed)));
    }
}

/// A container that was stopped to be started anew has not ended: it waits for its next start, which is no restart of
/// the back-off table.
fn resume(observed: &mut Observed, now: Timestamp) {
    for facts in observed.containers.values_mut() {
        let stopped = |instance: &Instance| instance.stop.as_ref().is_some_and(|stop| stop.restart);
        let Some(exit) = facts.current.take_if(|i| stopped(i) && i.exit.is_some()).and_then(|i| i.exit) else {
            continue;
        };
        let after = exit.finished_at.map_or(now, |at| at + SignedDuration::from_millis(1));
        facts.restart_backoff.raised_at = Some(after.max(now));
        facts.previous = Some(exit);
    }
}

fn settle_termination(desired: &Desired, observed: &mut Observed, now: Timestamp) {
    if let Some(Admission::Rejected { .. }) = observed.admission {
        return;
    }
    if desired.is_deleted() {
        let deadline = now + SignedDuration::from_secs(grace_seconds(desired));
        match &mut observed.termination {
            Some(termination) => {
                // a later delete may shorten the grace, measured from the moment it is seen, and never lengthen it
                if grace_shrank(desired, termination) {
                    termination.deadline = termination.deadline.min(deadline);
                }
            }
            None => {
                observed.termination =
                    Some(Termination { since: now, deadline, grace_seconds: grace_seconds(desired), verdict: None });
            }
        }
        if let Some(termination) = &mut observed.termination {
            termination.grace_seconds = termination.grace_seconds.min(grace_seconds(desired));
        }
    } else if observed.termination.is_none()
        && finished(desired, observed).is_none()
        && active_deadline(desired, observed).is_some_and(|deadline| deadline <= now)
    {
        let verdict = Verdict {
            reason: "DeadlineExceeded".to_owned(),
            message: "Pod was active on the node longer than the specified deadline".to_owned(),
            disruption: false,
            disruption_message: None,
        };
        observed.termination = Some(Termination::by_node(desired, now, verdict));
    }
}

fn grace_shrank(desired: &Desired, termination: &Termination) -> bool {
    grace_seconds(desired) < termination.grace_seconds
}

impl Termination {
    /// The node's own decision to end a Pod, with the Pod's own grace.
    #[must_use]
    pub fn by_node(desired: &Desired, now: Timestamp, verdict: Verdict) -> Self {
        let grace_seconds = grace_seconds(desired);
        Self {
            since: now,
            deadline: now + SignedDuration::from_secs(grace_seconds),
            grace_seconds,
            verdict: Some(verdict),
        }
    }
}

/// Instances to stop although the Pod goes on: condemned by a probe, of another image than wanted, or to be resized in
/// a way that needs a new one.
fn settle_restarts(desired: &Desired, observed: &mut Observed, now: Timestamp) {
    for spec in desired.containers.iter() {
        let Some(facts) = observed.containers.get_mut(spec.name()) else { continue };
        let Some(instance) = facts.current.as_mut().filter(|i| i.is_running()) else { continue };
        if let Some(kind) = facts.probes.condemned_by() {
            let grace = kind.of(&spec.container).and_then(|p| p.termination_grace_period_seconds);
            let grace = grace.unwrap_or_else(|| grace_seconds(desired)).max(1);
            let word = kind.as_str().to_lowercase();
            let message = format!("Container {} failed {word} probe, will be restarted", spec.name());
            begin_stop(instance, now, now + SignedDuration::from_secs(grace), message);
            continue;
        }
        if spec.kind == ContainerKind::Ephemeral {
            continue;
        }
        let message = if instance.requested_image != spec.image() {
            format!("Container {} definition changed, will be restarted", spec.name())
        } else if instance.resources.is_some_and(|has| super::resize::needs_restart(spec, &has)) {
            format!("Container {} resize requires restart", spec.name())
        } else {
            continue;
        };
        if instance.stop.is_none() {
            begin_stop(instance, now, now + SignedDuration::from_secs(grace_seconds(desired)), message);
            instance.stop.iter_mut().for_each(|stop| stop.restart = true);
        }
    }
}

/// Another image is another container to kubelet (its hash is in the back-off's key): what went wrong with the one
/// before neither delays it nor is shown any longer.
fn settle_images(desired: &Desired, observed: &mut Observed, running: &BTreeSet<Action>) {
    for spec in desired.containers.iter().filter(|spec| !running.contains(&Action::Start(spec.name().to_owned()))) {
        let Some(facts) = observed.containers.get_mut(spec.name()) else { continue };
        if facts.tried_image.as_deref().is_some_and(|tried| tried != spec.image()) {
            facts.tried_image = Some(spec.image().to_owned());
            facts.waiting = None;
            facts.pull_backoff = Backoff::default();
            facts.restart_backoff = Backoff::default();
        }
    }
}

pub(super) fn begin_stop(instance: &mut Instance, now: Timestamp, deadline: Timestamp, message: String) {
    match &mut instance.stop {
        Some(stop) => stop.deadline = stop.deadline.min(deadline),
        None => {
            instance.stop = Some(Stop {
                since: now,
                deadline,
                pre_stopped: false,
                signalled: false,
                termed_at: None,
                kill_again_at: None,
                killed: false,
                message,
                restart: false,
            });
        }
    }
}

/// The containers to stop now: everything but sidecars first, then sidecars from the last to the first.
fn stop_order(desired: &Desired, observed: &Observed) -> Vec<String> {
    let running = |spec: &&ContainerSpec| observed.containers.get(spec.name()).is_some_and(ContainerFacts::is_running);
    let first: Vec<_> = desired
        .containers
        .iter()
        .filter(|spec| spec.kind != ContainerKind::Sidecar)
        .filter(running)
        .map(|spec| spec.name().to_owned())
        .collect();
    if !first.is_empty() {
        return first;
    }
    desired.of_kind(ContainerKind::Sidecar).rev().find(running).map(|spec| spec.name().to_owned()).into_iter().collect()
}

fn running_instances(observed: &Observed) -> impl Iterator<Item = (&String, &Instance)> {
    observed
        .containers
        .iter()
        .filter_map(|(name, facts)| Some((name, facts.current.as_ref().filter(|i| i.is_running())?)))
}

/// The next actions. `running` are those that were begun and have not reported back.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed, running: &BTreeSet<Action>, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let rejected = matches!(observed.admission, Some(Admission::Rejected { .. }));
    if observed.final_phase.is_some() || observed.termination.is_some() || rejected {
        plan_end(desired, observed, running, now, &mut plan);
        return plan;
    }
    if observed.admission.is_none() {
        plan.act(running, Action::Admit);
        return plan;
    }
    plan_stops(desired, observed, running, now, &mut plan);
    if finished(desired, observed).is_some() {
        return plan;
    }
    // of a Pod that has finished by itself the deadline says nothing any more, also when it passes
    if let Some(deadline) = active_deadline(desired, observed) {
        plan.wake(deadline);
    }
    for action in running {
        // its image is no longer wanted
        let Action::Start(name) = action else { continue };
        let tried = observed.containers.get(name).and_then(|facts| facts.tried_image.as_deref());
        if desired.container(name).is_some_and(|spec| tried.is_some_and(|tried| tried != spec.image())) {
            plan.cancel.push(action.clone());
        }
    }
    let may_start = super::resize::plan(desired, observed, running, now, &mut plan);
    let ready = plan_sandbox(observed, running, now, &mut plan);
    if ready && observed.restarting_all.is_none() {
        if may_start {
            plan_starts(desired, observed, running, now, &mut plan);
        }
        plan_probes(desired, observed, running, now, &mut plan);
    }
    plan
}

fn plan_end(desired: &Desired, observed: &Observed, running: &BTreeSet<Action>, now: Timestamp, plan: &mut Plan) {
    for action in running {
        if matches!(
            action,
            Action::Admit | Action::Start(_) | Action::MountVolumes | Action::SetUpSandbox | Action::PostStart(_)
        ) {
            plan.cancel.push(action.clone());
        }
    }
    plan_stops(desired, observed, running, now, plan);
    plan_probes(desired, observed, running, now, plan);
    let acting = running.iter().any(|a| !matches!(a, Action::Probe(..)));
    if running_instances(observed).next().is_some() || acting {
        return;
    }
    if observed.torn_down {
        plan.ended = true;
    } else if let Some(blocked) = observed.blocked.as_ref().filter(|b| b.reason == TEAR_DOWN_FAILED && b.retry_at > now)
    {
        plan.wake(blocked.retry_at);
    } else {
        plan.act(running, Action::TearDown);
    }
}

/// True when containers may start.
fn plan_sandbox(observed: &Observed, running: &BTreeSet<Action>, now: Timestamp, plan: &mut Plan) -> bool {
    if running.contains(&Action::ClearSandbox) {
        return false;
    }
    if let Some(blocked) = observed.blocked.as_ref().filter(|b| b.retry_at > now) {
        plan.wake(blocked.retry_at);
    } else if observed.sandbox == Sandbox::Lost {
        plan.act(running, Action::ClearSandbox);
    } else {
        if !observed.volumes_mounted {
            plan.act(running, Action::MountVolumes);
        }
        if observed.sandbox == Sandbox::Absent {
            plan.act(running, Action::SetUpSandbox);
        }
    }
    observed.volumes_mounted && observed.sandbox == Sandbox::Ready
}

fn plan_stops(desired: &Desired, observed: &Observed, running: &BTreeSet<Action>, now: Timestamp, plan: &mut Plan) {
    for (name, instance) in running_instances(observed) {
        let Some(stop) = &instance.stop else { continue };
        if stop.killed {
            continue;
        }
        let kill_at = stop.kill_at();
        if kill_at.is_some_and(|at| at <= now) {
            plan.act(running, Action::Kill(name.clone()));
            continue;
        }
        let late = stop.deadline <= now;
        plan.wake(kill_at.filter(|_| late).unwrap_or(stop.deadline));
        let has_hook = desired
            .container(name)
            .and_then(|spec| spec.container.lifecycle.as_ref())
            .is_some_and(|lifecycle| lifecycle.pre_stop.is_some());
        if has_hook && !stop.pre_stopped && !late {
            plan.act(running, Action::PreStop(name.clone()));
            continue;
        }
        if running.contains(&Action::PreStop(name.clone())) {
            plan.cancel.push(Action::PreStop(name.clone()));
        }
        if !stop.signalled {
            plan.act(running, Action::Term(name.clone()));
        }
    }
}

/// One container starts at a time, in order, and waits for the postStart hook of the one before it: meshes rely on it.
fn plan_starts(desired: &Desired, observed: &Observed, running: &BTreeSet<Action>, now: Timestamp, plan: &mut Plan) {
    for spec in desired.containers.iter() {
        let Some(facts) = observed.containers.get(spec.name()) else { continue };
        let due = next_try(desired, facts).filter(|at| *at > now);
        if let Some(due) = due.filter(|_| facts.exit().is_some_and(|exit| restarts_all(spec, exit))) {
            plan.wake(due);
        }
    }
    for (name, instance) in running_instances(observed) {
        if !instance.post_started && instance.stop.is_none() {
            plan.act(running, Action::PostStart(name.clone()));
        }
    }
    let starting = |a: &Action| matches!(a, Action::Start(_) | Action::PostStart(_));
    if running.iter().any(starting) || plan.actions.iter().any(starting) {
        return;
    }
    for spec in candidates(desired, observed) {
        let none = ContainerFacts::default();
        let facts = observed.containers.get(spec.name()).unwrap_or(&none);
        match next_try(desired, facts) {
            Some(at) if at > now => {
                plan.wake(at);
                // a failed pull is shown as back-off after a while
                if let Some(shown) = facts.waiting.as_ref().map(super::status::shown_until).filter(|shown| *shown > now)
                {
                    plan.wake(shown);
                }
            }
            _ => {
                plan.act(running, Action::Start(spec.name().to_owned()));
                return;
            }
        }
    }
}

/// Containers that should run and do not, in the order of their starts.
fn candidates<'a>(desired: &'a Desired, observed: &Observed) -> Vec<&'a ContainerSpec> {
    let none = ContainerFacts::default();
    let facts = |spec: &ContainerSpec| observed.containers.get(spec.name()).unwrap_or(&none);
    let mut list = Vec::new();
    // ephemeral containers help to look at a Pod whatever else it waits for
    list.extend(desired.of_kind(ContainerKind::Ephemeral).filter(|spec| facts(spec).current.is_none()));
    for spec in desired.containers.iter() {
        let facts = facts(spec);
        match spec.kind {
            // what restarts all containers starts with them
            _ if facts.exit().is_some_and(|exit| restarts_all(spec, exit)) => {
                if !observed.initialized && spec.kind != ContainerKind::Main {
                    return list;
                }
            }
            ContainerKind::Sidecar => {
                if !facts.is_running() {
                    list.push(spec);
                }
                let started = facts.is_running() && facts.probes.is_started(&spec.container);
                if !observed.initialized && !started {
                    return list;
                }
            }
            ContainerKind::Init if !observed.initialized => match facts.exit() {
                Some(exit) if exit.code == 0 => {}
                Some(exit) => {
                    if restarts(desired, spec, exit) {
                        list.push(spec);
                    }
                    return list;
                }
                None => {
                    if !facts.is_running() {
                        list.push(spec);
                    }
                    return list;
                }
            },
            ContainerKind::Main => match facts.exit() {
                Some(exit) if restarts(desired, spec, exit) => list.push(spec),
                None if !facts.is_running() => list.push(spec),
                _ => {}
            },
            ContainerKind::Init | ContainerKind::Ephemeral => {}
        }
    }
    list
}

fn plan_probes(desired: &Desired, observed: &Observed, running: &BTreeSet<Action>, now: Timestamp, plan: &mut Plan) {
    let ending = observed.termination.is_some() || observed.final_phase.is_some();
    for spec in desired.containers.iter() {
        let Some(facts) = observed.containers.get(spec.name()) else { continue };
        let Some(started_at) = facts.current.as_ref().filter(|i| i.is_running()).and_then(|i| i.started_at) else {
            continue;
        };
        for kind in ProbeKind::ALL {
            // once a Pod is to end only readiness matters
            if ending && kind != ProbeKind::Readiness {
                continue;
            }
            let Some(due) = facts.probes.due(kind, &spec.container, started_at) else { continue };
            let action = Action::Probe(spec.name().to_owned(), kind);
            if running.contains(&action) {
                continue;
            }
            if due <= now {
                plan.act(running, action);
            } else {
                plan.wake(due);
            }
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
