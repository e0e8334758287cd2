//! All Pods of this node: one worker each, and what the rest of the agent may know about them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::pod::effects::{Effects, RuntimeEvent};
use crate::pod::model::{Admission, Desired, Observed};
use crate::pod::resize::Verdict;
use crate::pod::resize::order::{Place, is_larger};
use crate::pod::resources::Resources;
use crate::pod::worker::{Message, Worker};
use crate::source::{Origin, origin};

/// A Pod as readers see it.
#[derive(Clone, Debug)]
pub struct PodView {
    /// As wanted.
    pub desired: Arc<Desired>,
    /// What has happened.
    pub observed: Arc<Observed>,
    /// What is, or will be, reported.
    pub status: Arc<PodStatus>,
}

impl PodView {
    /// The Pod with its newest status, as `/pods` shows it.
    #[must_use]
    pub fn pod(&self) -> Pod {
        Pod { status: Some((*self.status).clone()), ..(*self.desired.pod).clone() }
    }

    /// Holds resources of the node: admitted, and not at its end.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.observed.final_phase.is_none() && matches!(self.observed.admission, Some(Admission::Admitted))
    }
}

impl Entry {
    /// Counts against the node's resources.
    fn is_counted(&self) -> bool {
        self.view.is_active() || self.admitted
    }

    /// The Pod with what is set aside for it.
    fn allocated(&self) -> &Arc<Pod> {
        self.granted.as_ref().unwrap_or(&self.view.desired.pod)
    }

    /// Its place among those that want other resources than they have; `None` if it does not, or never can.
    fn place(&self) -> Option<Place> {
        let pending = self.view.observed.resize.pending.as_ref();
        let waits = self.view.is_active() && self.granted.is_none() && self.view.desired.wants_resize();
        let feasible = waits && !pending.is_some_and(|pending| pending.infeasible);
        feasible.then(|| Place::of(self.allocated(), &self.view.desired.wanted, pending.map(|pending| pending.since)))
    }
}

struct Entry {
    sender: mpsc::Sender<Message>,
    task: JoinHandle<()>,
    view: PodView,
    /// Admitted since the view was published; admission counts it.
    admitted: bool,
    /// The Pod with resources that were set aside since the view was published.
    granted: Option<Arc<Pod>>,
    /// A resize of it waits for room.
    deferred: bool,
    /// Of which source; a source's first full list removes only its own.
    origin: Origin,
    /// Its source has dropped it: it ends.
    removed: bool,
    /// The API server has its last phase.
    end_reported: bool,
    /// A static Pod that waits for the end of the one whose name it has.
    successor: Option<Desired>,
}

/// Tells the Pods whose resize waits for room that there may be some. They are asked under the lock that guards the
/// answer, so that none is given between the look and the call.
fn tell_room(entries: &mut HashMap<String, Entry>) {
    for entry in entries.values_mut().filter(|entry| entry.deferred) {
        entry.deferred = false;
        let sender = entry.sender.clone();
        tokio::spawn(async move { sender.send(Message::Room).await });
    }
}

/// The registry of workers.
pub struct Pods {
    entries: Mutex<HashMap<String, Entry>>,
    /// Changes whenever a view does.
    changed: watch::Sender<u64>,
}

impl Default for Pods {
    fn default() -> Self {
        Self { entries: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Pods {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a Pod may go on: it has not ended, and was not refused.
    #[must_use]
    pub fn goes_on(&self, uid: &str) -> bool {
        let refused = |observed: &Observed| matches!(observed.admission, Some(Admission::Rejected { .. }));
        let over = |observed: &Observed| observed.final_phase.is_some() || refused(observed);
        self.lock().get(uid).is_some_and(|entry| !over(&entry.view.observed))
    }

    /// Told on every change of any Pod.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// All Pods.
    #[must_use]
    pub fn views(&self) -> Vec<PodView> {
        self.lock().values().map(|entry| entry.view.clone()).collect()
    }

    /// The Pod with that UID.
    #[must_use]
    pub fn view(&self, uid: &str) -> Option<PodView> {
        self.lock().get(uid).map(|entry| entry.view.clone())
    }

    /// The Pod with that name; the newest if an older one of the same name is still ending.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<PodView> {
        let entries = self.lock();
        let matching = entries.values().map(|entry| &entry.view).filter(|view| {
            let meta = &view.desired.pod.metadata;
            meta.namespace.as_deref() == Some(namespace) && meta.name.as_deref() == Some(name)
        });
        matching.max_by_key(|view| view.desired.pod.metadata.creation_timestamp.clone()).cloned()
    }

    /// Runs `decide` on all Pods that hold resources, but `uid`, and counts `uid` among them if it says so: no two
    /// Pods are admitted on the strength of the same free CPU.
    pub fn admit<E>(&self, uid: &str, decide: impl FnOnce(&[Arc<Pod>]) -> Result<(), E>) -> Result<(), E> {
        let mut entries = self.lock();
        let others: Vec<_> = entries
            .iter()
            .filter(|(other, entry)| *other != uid && entry.is_counted())
            .map(|(_, entry)| entry.allocated().clone())
            .collect();
        let admission = decide(&others);
        if let Some(entry) = entries.get_mut(uid) {
            entry.admitted = admission.is_ok();
        }
        admission
    }

    /// Waits until something holds of the Pods.
    pub async fn until(&self, holds: impl Fn() -> bool) {
        let mut changes = self.changes();
        while !holds() {
            // the sender lives as long as this
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// The API server has a Pod's last phase.
    pub fn end_reported(&self, uid: &str) {
        if let Some(entry) = self.lock().get_mut(uid) {
            entry.end_reported = true;
        }
        self.changed.send_modify(|n| *n += 1);
    }

    /// Whether nothing of a Pod is left to be ended, cleared away or told.
    #[must_use]
    pub fn is_over(&self, uid: &str) -> bool {
        self.lock().get(uid).is_none_or(|entry| entry.view.observed.torn_down && entry.end_reported)
    }

    /// Decides about a resize with the same care as [`Pods::admit`]. Other Pods whose turn is before this one's have
    /// their room first, as if they were asked now: they are, when room appears.
    ///
    /// `fits` says why a Pod does not fit beside others.
    pub fn allocate(&self, desired: &Desired, fits: impl Fn(&Pod, &[Arc<Pod>]) -> Result<(), String>) -> Verdict {
        let uid = desired.uid();
        let mut entries = self.lock();
        let Some(since) = entries.get(uid).map(|entry| entry.view.observed.resize.pending.as_ref().map(|p| p.since))
        else {
            return Verdict::Deferred("the Pod is ending".to_owned());
        };
        let place = Place::of(&desired.pod, &desired.wanted, since);
        let counted = entries.iter().filter(|(other, entry)| *other != uid && entry.is_counted());
        let mut others: HashMap<&str, Arc<Pod>> =
            counted.map(|(other, entry)| (other.as_str(), entry.allocated().clone())).collect();
        let list = |others: &HashMap<&str, Arc<Pod>>, without: &str| -> Vec<Arc<Pod>> {
            others.iter().filter(|(uid, _)| **uid != without).map(|(_, pod)| pod.clone()).collect()
        };
        let mut before: Vec<_> = entries
            .iter()
            // what another one gives back is room when it has done so
            .filter(|(other, entry)| *other != uid && is_larger(&entry.view.desired.wanted, entry.allocated()))
            .filter_map(|(other, entry)| Some((entry.place()?, other.as_str(), entry.view.desired.wanted.clone())))
            .filter(|(other, ..)| *other < place)
            .collect();
        before.sort_by_key(|(place, ..)| *place);
        for (_, other, wanted) in before {
            if fits(&wanted, &list(&others, other)).is_ok() {
                others.insert(other, wanted);
            }
        }
        let answer = fits(&desired.wanted, &list(&others, uid));
        drop(others);
        let mut freed = false;
        if let Some(entry) = entries.get_mut(uid) {
            entry.deferred = answer.is_err();
            if answer.is_ok() {
                freed = is_larger(entry.allocated(), &desired.wanted);
                entry.granted = Some(desired.wanted.clone());
            }
        }
        if freed {
            tell_room(&mut entries);
        }
        answer.map_or_else(Verdict::Deferred, |()| Verdict::Granted)
    }

    /// Passes on what the runtime saw.
    pub fn runtime_event(&self, uid: &str, event: RuntimeEvent) {
        let Some(sender) = self.sender(uid) else { return };
        tokio::spawn(async move { sender.send(Message::Runtime(event)).await });
    }

    fn sender(&self, uid: &str) -> Option<mpsc::Sender<Message>> {
        self.lock().get(uid).map(|entry| entry.sender.clone())
    }

    /// Sends a message to a Pod's worker; false if there is none.
    pub async fn send(&self, uid: &str, message: Message) -> bool {
        match self.sender(uid) {
            Some(sender) => sender.send(message).await.is_ok(),
            None => false,
        }
    }

    /// Takes a Pod from a source: a new one gets a worker, a known one's worker is told.
    pub async fn set<E: Effects>(self: &Arc<Self>, effects: &Arc<E>, desired: Desired) {
        let uid = desired.uid().to_owned();
        if let Some(sender) = self.sender(&uid) {
            // a manifest that was taken away and put back has the identity it had; what ends, ends
            if desired.is_static && self.wait_for_end(&desired) {
                return;
            }
            // a full channel is a worker that is busy; it takes its messages in order
            let _ = sender.send(Message::Desired(Box::new(desired))).await;
            return;
        }
        if desired.is_static && self.wait_for_namesake(&desired) {
            return;
        }
        self.spawn(effects, desired, None);
    }

    /// Whether the Pod of that UID is ending; the new one starts after it then.
    fn wait_for_end(&self, desired: &Desired) -> bool {
        let mut entries = self.lock();
        let ending = entries.get_mut(desired.uid()).filter(|entry| entry.removed);
        ending.map(|entry| entry.successor = Some(desired.clone())).is_some()
    }

    /// Whether a Pod's source has dropped it, so that it is about to be gone.
    #[must_use]
    pub fn is_ending(&self, uid: &str) -> bool {
        self.lock().get(uid).is_some_and(|entry| entry.removed)
    }

    /// A static Pod's name stays the same when its manifest changes: the new one starts after the old one's end.
    fn wait_for_namesake(&self, desired: &Desired) -> bool {
        let meta = &desired.pod.metadata;
        let mut entries = self.lock();
        let namesake = entries.values_mut().find(|entry| {
            let other = &entry.view.desired.pod.metadata;
            entry.origin != Origin::Api && other.name == meta.name && other.namespace == meta.namespace
        });
        namesake.map(|entry| entry.successor = Some(desired.clone())).is_some()
    }

    /// Starts the worker of a Pod, with the record of an earlier life if there is one.
    pub fn spawn<E: Effects>(self: &Arc<Self>, effects: &Arc<E>, desired: Desired, record: Option<Observed>) {
        let uid = desired.uid().to_owned();
        let origin = origin(&desired.pod);
        let allocated = record.as_ref().and_then(|record| record.resize.allocated.as_ref());
        let desired = desired.with_allocation(allocated);
        let view = PodView {
            desired: Arc::new(desired.clone()),
            observed: Arc::new(record.clone().unwrap_or_default()),
            status: Arc::new(desired.pod.status.clone().unwrap_or_default()),
        };
        let (worker, sender) = Worker::new(effects.clone(), desired, record);
        let (pods, effects, ended) = (self.clone(), effects.clone(), uid.clone());
        let mut entries = self.lock();
        let task = tokio::spawn(async move {
            if !worker.run().await {
                return;
            }
            let successor = {
                let mut entries = pods.lock();
                let ended = entries.remove(&ended);
                if ended.as_ref().is_some_and(Entry::is_counted) {
                    tell_room(&mut entries);
                }
                ended.and_then(|entry| entry.successor)
            };
            pods.changed.send_modify(|n| *n += 1);
            if let Some(successor) = successor {
                pods.spawn(&effects, successor, None);
            }
        });
        let entry = Entry {
            sender,
            task,
            view,
            admitted: false,
            granted: None,
            deferred: false,
            origin,
            removed: false,
            end_reported: false,
            successor: None,
        };
        entries.insert(uid, entry);
        drop(entries);
        self.changed.send_modify(|n| *n += 1);
    }

    /// A source no longer has a Pod.
    pub async fn remove(&self, uid: &str) {
        {
            let mut entries = self.lock();
            for entry in entries.values_mut().filter(|e| e.successor.as_ref().is_some_and(|s| s.uid() == uid)) {
                entry.successor = None;
            }
            if let Some(entry) = entries.get_mut(uid) {
                entry.removed = true;
            }
        }
        self.send(uid, Message::Removed).await;
    }

    /// A source has listed everything it has: Pods of it that are not among them are gone.
    pub async fn retain(&self, origin: Origin, present: &HashSet<String>) {
        let gone: Vec<_> = self
            .lock()
            .iter()
            .filter(|(uid, entry)| entry.origin == origin && !present.contains(*uid))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in gone {
            self.remove(&uid).await;
        }
    }

    /// Publishes a Pod's newest state.
    pub fn publish(&self, desired: &Arc<Desired>, observed: &Arc<Observed>, status: &PodStatus) {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(desired.uid()) else { return };
        entry.admitted &= observed.admission.is_none();
        let view = &entry.view;
        let same =
            Arc::ptr_eq(&view.desired, desired) && Arc::ptr_eq(&view.observed, observed) && *view.status == *status;
        if same {
            return;
        }
        let (counted, had) = (entry.is_counted(), entry.allocated().clone());
        entry.view = PodView { desired: desired.clone(), observed: observed.clone(), status: Arc::new(status.clone()) };
        // the grant is in the record once the Pod is shown with it
        entry.granted = entry
            .granted
            .take()
            .filter(|granted| entry.view.is_active() && !Resources::of(granted).same(&Resources::of(&desired.pod)));
        let ended = counted && !entry.is_counted();
        let shrunk = !Arc::ptr_eq(&had, entry.allocated()) && is_larger(&had, entry.allocated());
        if ended || shrunk {
            tell_room(&mut entries);
        }
        drop(entries);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Lets go of all Pods: their workers end, their containers run on.
    pub async fn detach(&self) {
        let entries: Vec<_> = self.lock().drain().map(|(_, entry)| (entry.sender, entry.task)).collect();
        for (sender, _) in &entries {
            let _ = sender.send(Message::Detach).await;
        }
        for (_, task) in entries {
            let _ = task.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::model::Phase;
    use crate::resources::amounts::{CPU, pod_requests};
    use crate::resources::fixture::{container, pod};

    fn sized(uid: &str, cpu: &str, priority: i32) -> Pod {
        let mut p = pod(vec![container("a", &[("cpu", cpu)], &[])]);
        p.metadata.uid = Some(uid.to_owned());
        p.spec.as_mut().unwrap().priority = Some(priority);
        p
    }

    /// A node of ten cores.
    fn fits(pod: &Pod, others: &[Arc<Pod>]) -> Result<(), String> {
        let used: i64 = others.iter().map(|other| pod_requests(other).milli(CPU)).sum();
        if used + pod_requests(pod).milli(CPU) <= 10_000 { Ok(()) } else { Err("Node didn't have enough".to_owned()) }
    }

    /// A Pod that has `has` and wants `wants`, and what its worker would be told.
    fn insert(pods: &Pods, has: &Pod, wants: Pod) -> (Arc<Desired>, mpsc::Receiver<Message>) {
        let allocated = Resources::of(has);
        let desired = Arc::new(Desired::new(Arc::new(wants)).with_allocation(Some(&allocated)));
        let mut observed = Observed { admission: Some(Admission::Admitted), ..Observed::default() };
        observed.resize.allocated = Some(allocated);
        let view = PodView { desired: desired.clone(), observed: Arc::new(observed), status: Arc::default() };
        let (sender, inbox) = mpsc::channel(4);
        let entry = Entry {
            sender,
            task: tokio::spawn(async {}),
            view,
            admitted: false,
            granted: None,
            deferred: false,
            origin: Origin::Api,
            removed: false,
            end_reported: false,
            successor: None,
        };
        pods.lock().insert(desired.uid().to_owned(), entry);
        (desired, inbox)
    }

    fn view(pods: &Pods, uid: &str) -> Observed {
        (*pods.view(uid).unwrap().observed).clone()
    }

    #[tokio::test]
    async fn room_goes_to_the_one_whose_turn_it_is() {
        let pods = Pods::default();
        let (big, _) = insert(&pods, &sized("big", "5", 0), sized("big", "5", 0));
        let (low, mut low_inbox) = insert(&pods, &sized("low", "3", 0), sized("low", "6", 0));
        let (high, mut high_inbox) = insert(&pods, &sized("high", "2", 10), sized("high", "6", 10));
        assert!(matches!(pods.allocate(&low, fits), Verdict::Deferred(_)));
        assert!(matches!(pods.allocate(&high, fits), Verdict::Deferred(_)));
        let ended = Observed { final_phase: Some(Phase::Succeeded), ..view(&pods, "big") };
        pods.publish(&big, &Arc::new(ended), &PodStatus::default());
        assert!(matches!(low_inbox.recv().await, Some(Message::Room)));
        assert!(matches!(high_inbox.recv().await, Some(Message::Room)));
        // there would be room for either
        assert!(matches!(pods.allocate(&low, fits), Verdict::Deferred(_)), "the other one is first");
        assert_eq!(pods.allocate(&high, fits), Verdict::Granted);
    }

    #[tokio::test]
    async fn what_is_granted_counts_at_once_and_what_is_given_back_is_room() {
        let pods = Pods::default();
        let (shrinking, _) = insert(&pods, &sized("shrinking", "6", 0), sized("shrinking", "1", 0));
        let (one, mut one_inbox) = insert(&pods, &sized("one", "2", 0), sized("one", "8", 0));
        let (other, _) = insert(&pods, &sized("other", "1", 0), sized("other", "7", 0));
        assert!(matches!(pods.allocate(&one, fits), Verdict::Deferred(_)));
        assert_eq!(pods.allocate(&shrinking, fits), Verdict::Granted);
        assert!(matches!(one_inbox.recv().await, Some(Message::Room)));
        assert_eq!(pods.allocate(&one, fits), Verdict::Granted);
        assert!(matches!(pods.allocate(&other, fits), Verdict::Deferred(_)), "eight cores are granted already");
        let new = sized("new", "1", 0);
        assert!(pods.admit("new", |others| fits(&new, others)).is_err());
    }
}
