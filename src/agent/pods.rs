//! All Pods of this node: one worker each, and what the rest of the agent may know about them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::pod::effects::{Effects, RuntimeEvent};
use crate::pod::model::{Admission, Desired, Observed};
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

struct Entry {
    sender: mpsc::Sender<Message>,
    task: JoinHandle<()>,
    view: PodView,
    /// Admitted since the view was published; admission counts it.
    admitted: bool,
    /// Of which source; a source's first full list removes only its own.
    origin: Origin,
    /// Its source has dropped it: it ends.
    removed: bool,
    /// The API server has its last phase.
    end_reported: bool,
    /// A static Pod that waits for the end of the one whose name it has.
    successor: Option<Desired>,
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
            .filter(|(other, entry)| *other != uid && (entry.view.is_active() || entry.admitted))
            .map(|(_, entry)| entry.view.desired.pod.clone())
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
            let successor = pods.lock().remove(&ended).and_then(|entry| entry.successor);
            pods.changed.send_modify(|n| *n += 1);
            if let Some(successor) = successor {
                pods.spawn(&effects, successor, None);
            }
        });
        let entry =
            Entry { sender, task, view, admitted: false, origin, removed: false, end_reported: false, successor: None };
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
        let view = &mut entry.view;
        let same =
            Arc::ptr_eq(&view.desired, desired) && Arc::ptr_eq(&view.observed, observed) && *view.status == *status;
        if same {
            return;
        }
        *view = PodView { desired: desired.clone(), observed: observed.clone(), status: Arc::new(status.clone()) };
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
