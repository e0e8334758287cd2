//! In-place resize: changing cpu and memory of a Pod that runs (KEP-1287, KEP-5419).
//!
//! A change of the specification becomes true in two steps. The node *allocates*: it decides whether there is room, and
//! notes what it has set aside; until then, and when it refuses, the Pod runs with what it had ([`super::model::Desired`]
//! shows it so everywhere). Then it *actuates*: cgroups are changed, or a container is started anew where its
//! `resizePolicy` says so. Both are notes in the Pod's record, so that a new life of the agent goes on where the last
//! one was.
//!
//! Source: `pkg/kubelet/allocation/allocation_manager.go`, `computePodResizeAction` in `kuberuntime_manager.go` and the
//! resize conditions of `pkg/kubelet/status/status_manager.go`.

mod events;
pub mod order;
pub mod status;

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PodStatus;
use serde::{Deserialize, Serialize};

use super::fold::Notice;
use super::model::{Admission, ContainerKind, ContainerSpec, Desired, Instance, Observed, Sandbox};
use super::plan::{Action, Plan};
use super::resources::{CpuMemory, Resources};
use crate::resources::cgroup::Enforced;

pub(super) use events::completed;

/// A deferred resize is tried when room appears, and after this time in case nobody has told (kubelet's `retryDelay`).
const DEFERRED_RETRY: SignedDuration = SignedDuration::from_mins(3);
/// A resize that failed is tried again after this time (kubelet's `backOffPeriod`).
const FAILED_RETRY: SignedDuration = SignedDuration::from_secs(10);

/// What has happened to a Pod's resources.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resize {
    /// What the node has set aside for the Pod; `None` before admission.
    pub allocated: Option<Resources>,
    /// What the Pod's cgroup was last made from; `None` also while it is being changed.
    pub actuated: Option<Resources>,
    /// What the kernel had for the Pod's cgroup after that.
    pub enforced: Option<Enforced>,
    /// A change that was not allocated (`PodResizePending`).
    pub pending: Option<Pending>,
    /// A change that was allocated and is not actuated (`PodResizeInProgress`).
    pub progress: Option<Progress>,
}

/// A resize that the node has not allocated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pending {
    /// What was refused.
    pub wanted: Resources,
    /// It can never be; otherwise it waits for room.
    pub infeasible: bool,
    /// Why.
    pub message: String,
    /// `metadata.generation` of the Pod that was judged.
    pub generation: Option<i64>,
    /// Since when the answer is this.
    pub since: Timestamp,
    /// A deferred one is looked at again then.
    pub retry_at: Timestamp,
}

impl Pending {
    /// The condition's reason.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        if self.infeasible { "Infeasible" } else { "Deferred" }
    }
}

/// A resize that is being carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// `metadata.generation` of the Pod that was allocated.
    pub generation: Option<i64>,
    /// Since when the condition is what it is.
    pub since: Timestamp,
    /// Why the last try failed.
    pub error: Option<String>,
    /// After a failure, the next try.
    pub retry_at: Option<Timestamp>,
}

/// The node's answer to a wanted change.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What was asked for.
    pub wanted: Resources,
    /// By which generation of the Pod.
    pub generation: Option<i64>,
    /// The answer.
    pub verdict: Verdict,
}

/// Whether there is room for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is set aside.
    Granted,
    /// Not now; the text says what is missing.
    Deferred(String),
    /// Not on this node; the text says why.
    Infeasible(String),
}

/// What came of [`Action::Resize`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Actuation {
    /// What the Pod's cgroup was made from, if all of it was written.
    pub pod: Option<Resources>,
    /// What the kernel has for it now.
    pub enforced: Option<Enforced>,
    /// Containers whose cgroups were changed, by the ID of the instance, with what they have now.
    pub containers: Vec<(String, CpuMemory)>,
    /// Why it stopped half-way.
    pub error: Option<String>,
}

impl Desired {
    /// The Pod as it runs with what was set aside for it.
    #[must_use]
    pub fn with_allocation(&self, allocated: Option<&Resources>) -> Self {
        let differing = allocated.filter(|allocated| !allocated.same(&Resources::of(&self.wanted)));
        let wanted = self.wanted.clone();
        let pod = differing.map_or_else(|| wanted.clone(), |allocated| Arc::new(allocated.laid_over(&wanted)));
        if Arc::ptr_eq(&pod, &self.pod) {
            return self.clone();
        }
        Self { wanted, max_restart_delay: self.max_restart_delay, is_static: self.is_static, ..Self::new(pod) }
    }

    /// Other resources are wanted than were set aside.
    #[must_use]
    pub fn wants_resize(&self) -> bool {
        !Arc::ptr_eq(&self.pod, &self.wanted)
    }
}

/// A record of an agent that did not know of resizes: what ran, ran with what was wanted.
pub fn complete_record(desired: &Desired, observed: &mut Observed) {
    if observed.admission == Some(Admission::Admitted) && observed.resize.allocated.is_none() {
        let resources = Resources::of(&desired.wanted);
        observed.resize.allocated = Some(resources.clone());
        observed.resize.actuated = Some(resources);
    }
}

/// What was set aside before a restart of the machine, when a change of it is still waiting for room: its status tells.
#[must_use]
pub fn from_status(desired: &Desired, known: &PodStatus) -> Option<Resources> {
    known.conditions.iter().flatten().find(|condition| condition.type_ == status::PENDING)?;
    let mut resources = Resources::of(&desired.wanted);
    let statuses = [&known.init_container_statuses, &known.container_statuses];
    for status in statuses.into_iter().flatten().flatten() {
        if let (Some(own), Some(known)) = (resources.containers.get_mut(&status.name), &status.resources) {
            own.clone_from(known);
        }
    }
    if resources.pod.is_some() {
        resources.pod.clone_from(&known.resources);
    }
    Some(resources)
}

/// The change that is wanted has not been judged.
#[must_use]
pub fn is_undecided(desired: &Desired, observed: &Observed) -> bool {
    let judged = |pending: &Pending| pending.wanted.same(&Resources::of(&desired.wanted));
    desired.wants_resize() && !observed.resize.pending.as_ref().is_some_and(judged)
}

/// The generation that the status is about: a change counts when the node has an answer to it.
#[must_use]
pub fn observed_generation(desired: &Desired, observed: &Observed, reported: Option<i64>) -> Option<i64> {
    let answered = observed.final_phase.is_some() || !is_undecided(desired, observed);
    if answered { desired.pod.metadata.generation } else { reported }
}

/// Which of a container's resources call for a new instance when they change (`resizePolicy`).
#[must_use]
pub fn needs_restart(spec: &ContainerSpec, has: &CpuMemory) -> bool {
    let restarts = |name: &str| {
        let mut policies = spec.container.resize_policy.iter().flatten();
        policies.any(|policy| policy.resource_name == name && policy.restart_policy == "RestartContainer")
    };
    has.cpu_differs(&spec.size) && restarts("cpu") || has.memory_differs(&spec.size) && restarts("memory")
}

/// A container that runs and goes on running, with what it has and what it is to have.
fn running<'a>(
    desired: &'a Desired,
    observed: &'a Observed,
) -> impl Iterator<Item = (&'a ContainerSpec, &'a Instance, CpuMemory, CpuMemory)> {
    let resizable = desired.containers.iter().filter(|spec| spec.kind != ContainerKind::Ephemeral);
    resizable.filter_map(|spec| {
        let instance = observed.containers.get(spec.name())?.current.as_ref()?;
        let has = instance.resources.filter(|_| instance.is_running() && instance.stop.is_none())?;
        Some((spec, instance, has, spec.size))
    })
}

/// Containers whose cgroups have to change.
#[must_use]
pub fn changes<'a>(
    desired: &'a Desired,
    observed: &'a Observed,
) -> Vec<(&'a ContainerSpec, &'a Instance, CpuMemory, CpuMemory)> {
    running(desired, observed).filter(|(_, instance, has, wants)| instance.resizing || has != wants).collect()
}

/// Something was allocated that is not actuated.
fn is_due(desired: &Desired, observed: &Observed) -> bool {
    let Resize { allocated: Some(allocated), actuated, .. } = &observed.resize else { return false };
    let of_pod = !actuated.as_ref().is_some_and(|actuated| actuated.same(allocated));
    observed.sandbox == Sandbox::Ready && (of_pod || !changes(desired, observed).is_empty())
}

/// A container that is being stopped has something else than was allocated, or has been stopped to be started anew.
fn is_restarting(desired: &Desired, observed: &Observed) -> bool {
    desired.containers.iter().any(|spec| {
        let Some(facts) = observed.containers.get(spec.name()) else { return false };
        match &facts.current {
            Some(instance) => instance.is_running() && instance.resources.is_some_and(|has| has != spec.size),
            None => facts.next_attempt > 0 && facts.waiting.is_none(),
        }
    })
}

/// Notes what follows from what is wanted and what has been done.
pub fn settle(desired: &Desired, observed: &mut Observed, acting: &BTreeSet<Action>, now: Timestamp) {
    if observed.final_phase.is_some() {
        (observed.resize.pending, observed.resize.progress) = (None, None);
        return;
    }
    if !desired.wants_resize() {
        observed.resize.pending = None;
    }
    let (due, restarting) = (is_due(desired, observed), is_restarting(desired, observed));
    let starting = acting.iter().any(|action| matches!(action, Action::Start(_) | Action::Resize));
    let progress = &mut observed.resize.progress;
    if due {
        let generation = desired.pod.metadata.generation;
        progress.get_or_insert(Progress { generation, since: now, error: None, retry_at: None });
    } else if !restarting && !starting && observed.sandbox == Sandbox::Ready {
        *progress = None;
    }
}

/// What to do about it. True when containers may start meanwhile.
pub fn plan(
    desired: &Desired,
    observed: &Observed,
    acting: &BTreeSet<Action>,
    now: Timestamp,
    plan: &mut Plan,
) -> bool {
    if is_undecided(desired, observed) {
        plan.act(acting, Action::Allocate);
    } else if let Some(pending) = observed.resize.pending.as_ref().filter(|pending| !pending.infeasible) {
        if pending.retry_at <= now {
            plan.act(acting, Action::Allocate);
        } else {
            plan.wake(pending.retry_at);
        }
    }
    if acting.contains(&Action::Resize) {
        return false;
    }
    if !is_due(desired, observed) {
        return true;
    }
    // while it fails, what crashes is started again all the same
    if let Some(retry_at) = observed.resize.progress.as_ref().and_then(|p| p.retry_at).filter(|at| *at > now) {
        plan.wake(retry_at);
        return true;
    }
    let stopping = observed.containers.values().filter_map(|facts| facts.current.as_ref());
    let stopping = stopping.filter(|i| i.is_running() && i.stop.as_ref().is_some_and(|stop| stop.restart));
    if stopping.count() == 0 {
        plan.act(acting, Action::Resize);
    }
    false
}

/// Notes that cgroups are being changed: if the agent ends meanwhile, what they have is not known.
pub fn begin(desired: &Desired, observed: &mut Observed) {
    let ids: Vec<String> = changes(desired, observed).iter().map(|(_, instance, ..)| instance.id.clone()).collect();
    for instance in observed.containers.values_mut().filter_map(|facts| facts.current.as_mut()) {
        instance.resizing |= ids.contains(&instance.id);
    }
    observed.resize.actuated = None;
}

/// Notes the node's answer.
pub fn decided(desired: &Desired, observed: &mut Observed, decision: &Decision, now: Timestamp) -> Vec<Notice> {
    let Decision { wanted, generation, verdict } = decision;
    let resize = &mut observed.resize;
    let (infeasible, message) = match verdict {
        Verdict::Granted => {
            resize.allocated = Some(wanted.clone());
            resize.pending = None;
            resize.progress = Some(Progress { generation: *generation, since: now, error: None, retry_at: None });
            return vec![events::started(desired, wanted, *generation)];
        }
        Verdict::Deferred(message) => (false, message),
        Verdict::Infeasible(message) => (true, message),
    };
    let before = resize.pending.take();
    let alike = before.as_ref().filter(|before| before.infeasible == infeasible);
    let pending = Pending {
        wanted: wanted.clone(),
        infeasible,
        message: message.clone(),
        generation: *generation,
        since: alike.map_or(now, |before| before.since),
        retry_at: now + DEFERRED_RETRY,
    };
    let told = alike.is_some_and(|before| before.generation == *generation);
    let notice = events::pending(desired, &pending);
    resize.pending = Some(pending);
    if told { Vec::new() } else { vec![notice] }
}

/// Notes what was actuated.
pub fn actuated(desired: &Desired, observed: &mut Observed, actuation: &Actuation, now: Timestamp) -> Vec<Notice> {
    for (id, has) in &actuation.containers {
        let mut instances = observed.containers.values_mut().filter_map(|facts| facts.current.as_mut());
        if let Some(instance) = instances.find(|instance| instance.id == *id) {
            instance.resources = Some(*has);
            instance.resizing = false;
        }
    }
    let resize = &mut observed.resize;
    if let Some(pod) = &actuation.pod {
        resize.actuated = Some(pod.clone());
    }
    if let Some(enforced) = actuation.enforced {
        resize.enforced = Some(enforced);
    }
    let Some(error) = &actuation.error else {
        if let Some(progress) = &mut resize.progress {
            progress.retry_at = None;
        }
        return Vec::new();
    };
    let generation = desired.pod.metadata.generation;
    let progress = resize.progress.get_or_insert(Progress { generation, since: now, error: None, retry_at: None });
    progress.retry_at = Some(now + FAILED_RETRY);
    if progress.error.as_ref() == Some(error) {
        return Vec::new();
    }
    if progress.error.is_none() {
        progress.since = now;
    }
    progress.error = Some(error.clone());
    vec![events::failed(desired, progress.generation, error)]
}

/// Room has appeared: a deferred resize is looked at again now.
pub fn room(observed: &mut Observed, now: Timestamp) {
    if let Some(pending) = &mut observed.resize.pending {
        pending.retry_at = now;
    }
}

#[cfg(test)]
mod tests;
