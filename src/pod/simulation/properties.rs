//! What has to hold, whatever happens.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};

use super::world::{State, World};
use crate::pod::fold::Found;
use crate::pod::model::{Desired, Observed, Sandbox};
use crate::pod::resize;
use crate::pod::resources::CpuMemory;
use crate::pod::status::status;

/// A status of the newest generation without a word on a resize means that every container has what is wanted.
pub(super) fn check_sizes(seed: u64, state: &State, status: &PodStatus) {
    let Some(pod) = &state.pod else { return };
    let ending = pod.metadata.deletion_timestamp.is_some()
        || state.record.as_ref().is_none_or(|r| r.termination.is_some() || r.final_phase.is_some());
    let resizes = [resize::status::PENDING, resize::status::IN_PROGRESS];
    let told = status.conditions.iter().flatten().any(|c| resizes.contains(&&*c.type_));
    if ending || told || status.observed_generation != pod.metadata.generation {
        return;
    }
    for (name, has, wants) in sizes(state, pod) {
        assert!(has == wants, "seed {seed}: {name} has {has:?} instead of {wants:?}, and the status says nothing");
    }
}

/// Running containers with what they have and what is wanted for them.
fn sizes<'a>(state: &'a State, pod: &Pod) -> Vec<(&'a str, CpuMemory, CpuMemory)> {
    let desired = Desired::new(Arc::new(pod.clone()));
    let running = state.containers.iter().filter(|c| c.instance.started_at.is_some() && c.instance.exit.is_none());
    let sized = running.filter_map(|c| {
        let wants = desired.container(&c.name)?.size;
        Some((c.name.as_str(), state.sizes[&c.instance.id], wants))
    });
    sized.collect()
}

pub(super) fn check_transition(seed: u64, old: &PodStatus, new: &PodStatus) {
    let terminal = |s: &PodStatus| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"));
    assert!(!terminal(old) || old.phase == new.phase, "seed {seed}: left phase {:?} for {:?}", old.phase, new.phase);
    let ready = |s: &PodStatus| s.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    assert!(!(terminal(new) && ready(new)), "seed {seed}: terminal and ready");
    for before in old.container_statuses.iter().flatten() {
        let after = new.container_statuses.iter().flatten().find(|c| c.name == before.name);
        let after = after.unwrap_or_else(|| panic!("seed {seed}: no status for {}", before.name));
        assert!(after.restart_count >= before.restart_count, "seed {seed}: restart count of {} fell", before.name);
    }
    assert!(old.start_time.is_none() || old.start_time == new.start_time, "seed {seed}: start time changed");
}

/// Without crashes, what was wanted ten minutes ago has come about.
pub(super) fn check_settled(world: &Arc<World>, crash_every: u64) {
    let state = world.state();
    let Some(pod) = state.pod.as_ref().filter(|pod| pod.metadata.deletion_timestamp.is_none()) else { return };
    let ending = state.record.as_ref().is_none_or(|r| r.termination.is_some() || r.final_phase.is_some());
    if crash_every != 0 || ending || world.now().duration_since(state.resized_at) < SignedDuration::from_mins(10) {
        return;
    }
    let termed = |name: &str| state.containers.iter().any(|c| c.name == name && c.termed_at.is_some());
    for (name, has, wants) in sizes(&state, pod).into_iter().filter(|(name, ..)| !termed(name)) {
        assert!(has == wants, "seed {}: {name} has {has:?} instead of {wants:?} for ten minutes", world.seed);
    }
}

/// Restarts of one container, each as (end of the run before, start): no sooner than the table allows.
pub(super) fn check_back_off(seed: u64, name: &str, restarts: &[(Timestamp, Timestamp)]) {
    let mut delay = 0;
    let mut last: Option<Timestamp> = None;
    for (finished, started) in restarts {
        if last.is_some_and(|last| finished.duration_since(last).as_secs() >= 600) {
            delay = 0;
        }
        let waited = started.duration_since(*finished).as_secs_f64();
        assert!(
            waited + 0.001 >= f64::from(delay),
            "seed {seed}: {name} restarted after {waited} s instead of {delay} s"
        );
        delay = if delay == 0 { 10 } else { (delay * 2).min(300) };
        // the table is entered when a try begins, which pulls may keep from being a start for long
        last = Some(*finished);
    }
}

/// A restart of the agent alone changes no status: it is a function of what happened to the Pod.
pub(super) fn check_adopted(
    seed: u64,
    desired: &Desired,
    before: &Observed,
    after: &Observed,
    found: &[Found],
    alive: bool,
    now: Timestamp,
) {
    let known = |name: &str| before.containers.get(name).and_then(|facts| facts.current.as_ref());
    let unchanged = (alive || before.sandbox != Sandbox::Ready)
        && before.containers.iter().all(|(name, facts)| {
            let newest = found.iter().filter(|f| &f.name == name).max_by_key(|f| f.instance.attempt);
            facts.current.as_ref().is_none_or(|known| newest.is_some_and(|f| f.instance.id == known.id))
        })
        && found.iter().all(|f| match known(&f.name) {
            Some(known) if known.id == f.instance.id => {
                known.exit == f.instance.exit && known.started_at == f.instance.started_at
            }
            Some(known) => known.attempt > f.instance.attempt,
            None => false,
        });
    if !unchanged {
        return;
    }
    let base = desired.pod.status.clone().unwrap_or_default();
    let show = |observed: &Observed| {
        let desired = desired.with_allocation(observed.resize.allocated.as_ref());
        status(&desired, observed, &base, now)
    };
    assert_eq!(show(before), show(after), "seed {seed}: a restart of the agent changes the status");
}

/// The phase is terminal, and the sandbox is gone.
pub(super) fn is_over(status: &PodStatus) -> bool {
    let torn_down =
        status.conditions.iter().flatten().any(|c| c.type_ == "PodReadyToStartContainers" && c.status == "False");
    torn_down && matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

/// How a Pod that ended by itself did so, without times and identities.
pub(super) fn ending(status: &PodStatus) -> Vec<String> {
    let state = |c: &ContainerStatus| {
        let exit = |state: Option<&k8s_openapi::api::core::v1::ContainerState>| {
            let ended = state.and_then(|s| s.terminated.as_ref());
            ended.map(|t| format!("{} {} {}", t.exit_code, t.signal.unwrap_or(0), t.reason.as_deref().unwrap_or("-")))
        };
        let (now, last) = (exit(c.state.as_ref()), exit(c.last_state.as_ref()));
        format!("{}: {now:?}, before {last:?}, {} restarts, started {:?}", c.name, c.restart_count, c.started)
    };
    let conditions = status.conditions.iter().flatten();
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    std::iter::once(format!("{:?} {:?}", status.phase, status.reason))
        .chain(conditions.map(|c| format!("{}={} {:?}", c.type_, c.status, c.reason)))
        .chain(containers.map(state))
        .collect()
}
