//! The task that owns one Pod: observe, settle, plan, act, report, again.
//!
//! Nothing else changes the Pod on this node. Messages come in through one channel; actions run as tasks of their own
//! and report back through the same channel, so that a slow pull or a hung hook never keeps the worker from seeing a
//! deletion.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::effects::{ApiAnswer, Effects, Outcome, Request, RuntimeEvent};
use super::fold;
use super::model::{Admission, Desired, Exit, Observed, Termination, Verdict};
use super::plan::{Action, Plan, plan, settle};
use super::resize;
use super::rules::grace_seconds;
use super::status::status;
use crate::resources::devices::DeviceHealth;

/// Status changes that nobody waits for are held back this long, so that a quick start is one patch.
const REPORT_DELAY: SignedDuration = SignedDuration::from_millis(120);
/// The same for a Pod of which nothing runs yet: that it is being started is worth a patch only if it takes a while.
/// Or, while many Pods are being started or the API server is asked for much else, until the second time has passed.
const STARTING_DELAY: (SignedDuration, SignedDuration) = (SignedDuration::from_secs(1), SignedDuration::from_secs(5));
/// First and longest delay after a status report that failed, seconds.
const REPORT_RETRY: (i64, i64) = (1, 30);

/// What a worker is told.
#[derive(Debug)]
pub enum Message {
    /// The source's newest word on the Pod.
    Desired(Box<Desired>),
    /// The source no longer has the Pod.
    Removed,
    /// The runtime saw something.
    Runtime(RuntimeEvent),
    /// The node ends the Pod (eviction, shutdown); grace in seconds, `None`: the Pod's own.
    Terminate {
        /// What the status will say.
        verdict: Verdict,
        /// Overrides the Pod's grace.
        grace: Option<i64>,
    },
    /// An action is over.
    Finished(Action, Outcome),
    /// A report is over.
    Reported(Box<PodStatus>, ApiAnswer),
    /// A deletion is over.
    Deleted(ApiAnswer),
    /// Devices of the Pod's containers have changed: which they are, and whether they work.
    Devices(BTreeMap<String, DeviceHealth>),
    /// Other Pods have freed resources: a resize that waits for room may have it.
    Room,
    /// The agent stops: leave everything as it is.
    Detach,
}

/// One Pod's owner.
pub struct Worker<E> {
    effects: Arc<E>,
    desired: Arc<Desired>,
    observed: Observed,
    saved: Option<Arc<Observed>>,
    running: BTreeMap<Action, CancellationToken>,
    sender: mpsc::Sender<Message>,
    inbox: mpsc::Receiver<Message>,
    removed: bool,
    /// [`Message::Room`] came, and was not acted on.
    room: bool,
    /// Exits of instances whose start has not been reported yet: a quick process can be over before.
    early_exits: Vec<Exit>,
    api: ApiView,
}

/// What the API server has, and what is on its way there.
#[derive(Default)]
struct ApiView {
    status: PodStatus,
    resource_version: Option<String>,
    sent: Option<PodStatus>,
    in_flight: bool,
    changed_at: Option<Timestamp>,
    retry_at: Option<Timestamp>,
    failures: u32,
    gone: bool,
}

impl<E: Effects> Worker<E> {
    /// A worker for a Pod with the record that an earlier life of the agent left, or none. Messages go through the
    /// returned sender's clones.
    #[must_use]
    pub fn new(effects: Arc<E>, desired: Desired, record: Option<Observed>) -> (Self, mpsc::Sender<Message>) {
        let (sender, inbox) = mpsc::channel(256);
        let known = desired.pod.status.clone().unwrap_or_default();
        let mut observed = record.unwrap_or_else(|| fold::from_status(&desired, &known));
        resize::complete_record(&desired, &mut observed);
        let desired = desired.with_allocation(observed.resize.allocated.as_ref());
        let api = ApiView {
            status: known,
            resource_version: desired.pod.metadata.resource_version.clone(),
            ..ApiView::default()
        };
        let worker = Self {
            effects,
            desired: Arc::new(desired),
            observed,
            saved: None,
            running: BTreeMap::new(),
            sender: sender.clone(),
            inbox,
            removed: false,
            room: false,
            early_exits: Vec::new(),
            api,
        };
        (worker, sender)
    }

    /// Runs until the Pod is gone from source and node (true), or the agent stops (false).
    pub async fn run(mut self) -> bool {
        loop {
            let now = self.effects.now();
            let plan = self.step(now);
            let wake_at = earliest([plan.wake_at, self.report_if_due(&plan, now)]);
            if self.is_over(&plan) {
                self.effects.forget(self.desired.clone()).await;
                return true;
            }
            let message = match wake_at {
                Some(at) => tokio::select! {
                    message = self.inbox.recv() => message,
                    () = self.effects.sleep_until(at) => continue,
                },
                None => self.inbox.recv().await,
            };
            match message {
                None | Some(Message::Detach) => {
                    for cancel in self.running.values() {
                        cancel.cancel();
                    }
                    return false;
                }
                Some(message) => self.take(message),
            }
            // whatever else has come meanwhile is one step, too
            while let Ok(message) = self.inbox.try_recv() {
                if matches!(message, Message::Detach) {
                    return false;
                }
                self.take(message);
            }
        }
    }

    fn is_over(&self, plan: &Plan) -> bool {
        plan.ended && (self.removed || self.api.gone) && !self.api.in_flight
    }

    /// Settles, stores the record, begins actions.
    fn step(&mut self, now: Timestamp) -> Plan {
        if self.observed.host_ips.is_empty() {
            self.observed.host_ips = self.effects.host_ips();
        }
        let before: BTreeSet<Action> = self.running.keys().cloned().collect();
        let stops = fold::stops(&self.observed);
        // an answer that is on its way may be older than the room
        if self.room && !self.running.contains_key(&Action::Allocate) {
            self.room = false;
            resize::room(&mut self.observed, now);
        }
        let resized = self.observed.resize.progress.clone();
        settle(&self.desired, &mut self.observed, &before, now);
        if self.removed {
            self.end_removed(now);
            settle(&self.desired, &mut self.observed, &before, now);
        }
        for (name, message) in fold::stops(&self.observed) {
            if !stops.contains_key(&name) {
                self.container_event(&name, false, "Killing", &message);
            }
        }
        if let Some(done) = resized.filter(|_| self.observed.resize.progress.is_none() && !self.is_ending()) {
            let notice = resize::completed(&self.desired, done.generation);
            self.effects.event(&self.desired, notice.warning, &notice.reason, &notice.message, None);
        }
        let plan = plan(&self.desired, &self.observed, &before, now);
        for action in &plan.actions {
            fold::begin(&self.desired, &mut self.observed, action, now);
        }
        self.save();
        for action in &plan.cancel {
            if let Some(cancel) = self.running.get(action) {
                cancel.cancel();
            }
        }
        for action in &plan.actions {
            self.perform(action.clone());
        }
        plan
    }

    fn is_ending(&self) -> bool {
        self.observed.termination.is_some() || self.observed.final_phase.is_some()
    }

    /// A Pod whose source has dropped it ends with its own grace, whatever the source said last.
    fn end_removed(&mut self, now: Timestamp) {
        if self.observed.termination.is_none() && self.observed.final_phase.is_none() {
            let grace_seconds = grace_seconds(&self.desired);
            self.observed.termination = Some(Termination {
                since: now,
                deadline: now + SignedDuration::from_secs(grace_seconds),
                grace_seconds,
                verdict: None,
            });
        }
    }

    fn save(&mut self) {
        if self.saved.as_deref() != Some(&self.observed) {
            self.effects.save(&self.desired, &self.observed);
            self.saved = Some(Arc::new(self.observed.clone()));
        }
    }

    fn perform(&mut self, action: Action) {
        let cancel = CancellationToken::new();
        let request = Request {
            action: action.clone(),
            desired: self.desired.clone(),
            observed: self.saved.clone().unwrap_or_default(),
            cancel: cancel.clone(),
        };
        let (effects, sender) = (self.effects.clone(), self.sender.clone());
        self.running.insert(action.clone(), cancel);
        tokio::spawn(async move {
            let outcome = effects.perform(request).await;
            // a worker that is gone has left the Pod to the next life of the agent
            let _ = sender.send(Message::Finished(action, outcome)).await;
        });
    }

    fn take(&mut self, message: Message) {
        let now = self.effects.now();
        match message {
            Message::Desired(desired) => self.take_desired(*desired),
            Message::Removed => self.removed = true,
            Message::Room => self.room = true,
            Message::Devices(devices) => self.observed.devices = devices,
            Message::Runtime(event) => self.take_runtime(event, now),
            Message::Terminate { verdict, grace } => {
                let termination = self
                    .observed
                    .termination
                    .get_or_insert_with(|| Termination::by_node(&self.desired, now, verdict.clone()));
                if termination.verdict.is_none() && self.observed.final_phase.is_none() {
                    termination.verdict = Some(verdict);
                }
                if let Some(grace) = grace {
                    termination.deadline = termination.deadline.min(now + SignedDuration::from_secs(grace.max(1)));
                }
            }
            Message::Finished(action, outcome) => self.take_outcome(&action, outcome, now),
            Message::Reported(sent, answer) => self.take_report(*sent, answer, now),
            Message::Deleted(answer) => {
                self.api.in_flight = false;
                match answer {
                    ApiAnswer::Failed(error) => {
                        tracing::warn!(pod = self.desired.uid(), error, "deleting the Pod object failed, will retry");
                        self.api.failed(now);
                    }
                    // the watch brings the removal; until then there is nothing to do
                    ApiAnswer::Accepted { .. } | ApiAnswer::Gone => self.api.gone = true,
                }
            }
            Message::Detach => {}
        }
    }

    fn take_runtime(&mut self, event: RuntimeEvent, now: Timestamp) {
        let crashed = fold::runtime_event(&self.desired, &mut self.observed, &event, now);
        match (crashed, event) {
            (Some(name), _) => self.back_off_event(&name, now),
            (None, RuntimeEvent::Exited(exit)) if self.running.keys().any(|a| matches!(a, Action::Start(_))) => {
                self.early_exits.push(exit);
            }
            _ => {}
        }
    }

    fn take_desired(&mut self, desired: Desired) {
        let version = desired.pod.metadata.resource_version.clone();
        if is_older(version.as_deref(), self.api.resource_version.as_deref()) {
            return;
        }
        let known = desired.pod.status.clone().unwrap_or_default();
        if known != self.api.status {
            self.api.status = known;
            // somebody else wrote it: what was sent may have been overwritten
            self.api.sent = None;
        }
        self.api.resource_version = version;
        self.desired = Arc::new(desired.with_allocation(self.observed.resize.allocated.as_ref()));
    }

    fn take_outcome(&mut self, action: &Action, outcome: Outcome, now: Timestamp) {
        self.running.remove(action);
        if let Outcome::Admitted(Admission::Rejected { reason, message }) = &outcome {
            let message = message.strip_prefix("Pod was rejected: ").unwrap_or(message);
            self.effects.event(&self.desired, true, reason, message, None);
        }
        for event in fold::outcome(&self.desired, &mut self.observed, action, &outcome, now) {
            match event.container {
                Some(name) => self.container_event(&name, event.warning, &event.reason, &event.message),
                None => self.effects.event(&self.desired, event.warning, &event.reason, &event.message, None),
            }
        }
        match (action, &outcome) {
            (Action::Allocate, _) => {
                let allocated = self.observed.resize.allocated.as_ref();
                self.desired = Arc::new(self.desired.with_allocation(allocated));
            }
            (Action::Start(name), Outcome::StartError(_)) => self.back_off_event(name, now),
            (Action::Start(_), Outcome::Started(_)) => {
                for exit in std::mem::take(&mut self.early_exits) {
                    self.take_runtime(RuntimeEvent::Exited(exit), now);
                }
            }
            _ => {}
        }
    }

    fn container_event(&self, name: &str, warning: bool, reason: &str, message: &str) {
        let path = self.desired.container(name).map(super::model::ContainerSpec::field_path);
        self.effects.event(&self.desired, warning, reason, message, path);
    }

    /// `BackOff`, when a container that has ended must wait before it is started again.
    fn back_off_event(&self, name: &str, now: Timestamp) {
        let (Some(facts), Some(spec)) = (self.observed.containers.get(name), self.desired.container(name)) else {
            return;
        };
        let Some(exit) = facts.exit() else { return };
        if facts.current.as_ref().and_then(|instance| instance.stop.as_ref()).is_some_and(|stop| stop.restart) {
            return;
        }
        let wait = facts.restart_backoff.until(exit.finished_at.unwrap_or(now), self.desired.max_restart_delay);
        let ending = self.observed.termination.is_some() || self.desired.is_deleted() || self.removed;
        if !ending && super::rules::restarts(&self.desired, spec, exit) && wait.is_some_and(|until| until > now) {
            let meta = &self.desired.pod.metadata;
            let message = format!(
                "Back-off restarting failed container {name} in pod {}_{}({})",
                meta.name.as_deref().unwrap_or_default(),
                meta.namespace.as_deref().unwrap_or_default(),
                self.desired.uid()
            );
            self.container_event(name, true, "BackOff", &message);
        }
    }

    fn take_report(&mut self, sent: PodStatus, answer: ApiAnswer, now: Timestamp) {
        self.api.in_flight = false;
        match answer {
            ApiAnswer::Accepted { status, resource_version } => {
                self.api.failures = 0;
                self.api.retry_at = None;
                self.api.sent = Some(sent);
                if !is_older(resource_version.as_deref(), self.api.resource_version.as_deref()) {
                    self.api.status = *status;
                    self.api.resource_version = resource_version;
                }
            }
            ApiAnswer::Gone => {
                self.api.sent = Some(sent);
                self.removed = true;
            }
            ApiAnswer::Failed(error) => {
                tracing::warn!(pod = self.desired.uid(), error, "reporting the Pod's status failed, will retry");
                self.api.failed(now);
            }
        }
    }

    /// Sends the status if it has changed, deletes the object if nothing is left; returns when to look again.
    fn report_if_due(&mut self, plan: &Plan, now: Timestamp) -> Option<Timestamp> {
        // what was sent last is what transition times are kept from, unless the API server knows better
        let base = self.api.sent.as_ref().unwrap_or(&self.api.status);
        let current = status(&self.desired, &self.observed, base, now);
        if let Some(saved) = &self.saved {
            self.effects.publish(&self.desired, saved, &current);
        }
        if self.api.in_flight || self.removed || self.api.gone {
            return None;
        }
        if let Some(retry_at) = self.api.retry_at.filter(|at| *at > now) {
            return Some(retry_at);
        }
        if self.api.sent.as_ref() != Some(&current) && current != self.api.status {
            let changed_at = *self.api.changed_at.get_or_insert(now);
            let due = if !only_starts(base) || !only_starts(&current) {
                changed_at + REPORT_DELAY
            } else if self.effects.is_busy() {
                (now + STARTING_DELAY.0).min(changed_at + STARTING_DELAY.1)
            } else {
                changed_at + STARTING_DELAY.0
            };
            // the end is reported once everything is cleared away, if that is quick: one patch instead of two
            let clearing = self.observed.final_phase.is_some() && !plan.ended;
            let starting = self.running.keys().any(|action| matches!(action, Action::Start(_)));
            let urgent = plan.ended || (!clearing && is_urgent(base, &current, starting));
            if due > now && !urgent {
                return Some(due);
            }
            self.api.changed_at = None;
            self.api.in_flight = true;
            let (effects, sender, desired) = (self.effects.clone(), self.sender.clone(), self.desired.clone());
            let base = self.api.status.clone();
            tokio::spawn(async move {
                let answer = effects.report(desired, base, current.clone()).await;
                let _ = sender.send(Message::Reported(Box::new(current), answer)).await;
            });
            return None;
        }
        self.api.changed_at = None;
        if plan.ended && self.desired.is_deleted() && !self.desired.is_static {
            self.api.in_flight = true;
            let (effects, sender, desired) = (self.effects.clone(), self.sender.clone(), self.desired.clone());
            tokio::spawn(async move {
                let answer = effects.delete(desired).await;
                let _ = sender.send(Message::Deleted(answer)).await;
            });
        }
        None
    }
}

impl ApiView {
    fn failed(&mut self, now: Timestamp) {
        let delay = REPORT_RETRY.0.saturating_mul(1 << self.failures.min(5)).min(REPORT_RETRY.1);
        self.failures += 1;
        self.retry_at = Some(now + SignedDuration::from_secs(delay));
    }
}

/// Users and controllers wait for a change of phase or readiness; the rest may wait a moment for company. So may lost
/// readiness while a container is `starting`: a quick restart is no news to every EndpointSlice of the cluster.
fn is_urgent(old: &PodStatus, new: &PodStatus, starting: bool) -> bool {
    let ready =
        |s: &PodStatus| s.conditions.iter().flatten().find(|c| c.type_ == "Ready").is_some_and(|c| c.status == "True");
    (old.phase != new.phase && new.phase.as_deref() != Some("Pending"))
        || (ready(old) != ready(new) && (ready(new) || !starting))
}

/// Whether the Pod's containers are being made and none has run, succeeded or failed so far.
fn only_starts(status: &PodStatus) -> bool {
    let starts = |container: &ContainerStatus| {
        let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
        container.restart_count == 0
            && waiting.is_some_and(|w| matches!(w.reason.as_deref(), Some("ContainerCreating" | "PodInitializing")))
    };
    matches!(status.phase.as_deref(), None | Some("Pending"))
        && status.container_statuses.iter().chain(&status.init_container_statuses).flatten().all(starts)
}

fn earliest(times: [Option<Timestamp>; 2]) -> Option<Timestamp> {
    times.into_iter().flatten().min()
}

/// Resource versions of one object can be compared as numbers (KEP-5504); unreadable ones are taken as newer.
fn is_older(version: Option<&str>, than: Option<&str>) -> bool {
    let number = |text: Option<&str>| text.and_then(|t| t.parse::<u64>().ok());
    matches!((number(version), number(than)), (Some(a), Some(b)) if a < b)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ContainerState, ContainerStateWaiting, PodCondition};

    use super::*;

    #[test]
    fn a_quick_restart_is_no_news() {
        let status = |phase: &str, ready: &str| PodStatus {
            phase: Some(phase.to_owned()),
            conditions: Some(vec![PodCondition {
                type_: "Ready".to_owned(),
                status: ready.to_owned(),
                ..PodCondition::default()
            }]),
            ..PodStatus::default()
        };
        let (ready, unready) = (status("Running", "True"), status("Running", "False"));
        assert!(is_urgent(&ready, &unready, false), "a probe says so");
        assert!(!is_urgent(&ready, &unready, true), "it may be ready again before anybody asks");
        assert!(is_urgent(&unready, &ready, true));
        assert!(is_urgent(&ready, &status("Failed", "False"), true));
        assert!(!is_urgent(&status("Pending", "False"), &status("Pending", "False"), false));
    }

    #[test]
    fn a_first_start_is_worth_a_patch_only_if_it_takes_a_while() {
        let status = |phase: Option<&str>, reasons: &[&str]| PodStatus {
            phase: phase.map(str::to_owned),
            container_statuses: (!reasons.is_empty()).then(|| reasons.iter().map(|reason| waiting(reason)).collect()),
            ..PodStatus::default()
        };
        assert!(only_starts(&PodStatus::default()), "nothing is known yet");
        assert!(only_starts(&status(Some("Pending"), &["ContainerCreating", "PodInitializing"])));
        assert!(!only_starts(&status(Some("Pending"), &["ContainerCreating", "ErrImagePull"])), "users look for that");
        assert!(!only_starts(&status(Some("Running"), &["ContainerCreating"])));
        let mut again = status(Some("Pending"), &["PodInitializing"]);
        again.init_container_statuses = Some(vec![ContainerStatus { restart_count: 1, ..waiting("PodInitializing") }]);
        assert!(!only_starts(&again));
    }

    fn waiting(reason: &str) -> ContainerStatus {
        let state = ContainerStateWaiting { reason: Some(reason.to_owned()), message: None };
        ContainerStatus {
            state: Some(ContainerState { waiting: Some(state), ..ContainerState::default() }),
            ..ContainerStatus::default()
        }
    }
}
