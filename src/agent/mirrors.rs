//! Keeps a mirror Pod in the API server for every static Pod, with the static Pod's status.
//!
//! Source: `tryReconcileMirrorPods` and `deleteOrphanedMirrorPods` in `pkg/kubelet/kubelet.go`. One task of its own looks
//! at what is wanted and what the watch shows, so that an API server that is away (perhaps because it is itself a static
//! Pod) delays mirrors only. Pods of the local socket have no mirror: the cluster did not ask for them.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Client;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::node::Node;
use super::report;
use crate::pod::effects::ApiAnswer;
use crate::pod::model::Desired;
use crate::source::{MirrorAction, MirrorPods, Origin, PodChange, is_mirror};

/// Status changes within this time are one patch.
const SETTLE: Duration = Duration::from_millis(120);
/// Longest wait for the API server.
const DEADLINE: Duration = Duration::from_secs(20);
/// First and longest wait after a failure.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long the watch may take to show what was created.
const SHOWN: Duration = Duration::from_secs(5);

/// Namespace and name.
type Name = (String, String);

fn name_of(pod: &Pod) -> Name {
    (pod.metadata.namespace.clone().unwrap_or_default(), pod.metadata.name.clone().unwrap_or_default())
}

/// A mirror as the API server has it.
struct Mirror {
    pod: Arc<Pod>,
    /// What was sent last and not overwritten by somebody since.
    sent: Option<PodStatus>,
}

/// When to try again.
struct Pause {
    until: Instant,
    length: Duration,
}

#[derive(Default)]
struct State {
    /// Static Pods that files and URLs want.
    wanted: BTreeMap<Name, Arc<Pod>>,
    mirrors: BTreeMap<Name, Mirror>,
    pauses: BTreeMap<Name, Pause>,
    synced: HashSet<Origin>,
}

impl State {
    fn take(&mut self, change: &PodChange) -> bool {
        match change {
            PodChange::Set(Origin::Api, pod) if is_mirror(pod) => {
                let name = name_of(pod);
                let sent = self.mirrors.remove(&name).and_then(|old| {
                    let same = old.pod.metadata.uid == pod.metadata.uid && old.pod.status == pod.status;
                    let own = old.sent.as_ref() == pod.status.as_ref();
                    old.sent.filter(|_| same || own)
                });
                self.mirrors.insert(name.clone(), Mirror { pod: pod.clone(), sent });
                self.pauses.remove(&name);
            }
            PodChange::Removed(Origin::Api, key) => {
                let name = (key.namespace.clone(), key.name.clone());
                let known = self.mirrors.get(&name);
                if known.is_none_or(|mirror| mirror.pod.metadata.uid.as_ref() != Some(&key.uid)) {
                    return false;
                }
                self.mirrors.remove(&name);
                self.pauses.remove(&name);
            }
            PodChange::Set(Origin::File | Origin::Url, pod) => {
                let name = name_of(pod);
                self.pauses.remove(&name);
                self.wanted.insert(name, pod.clone());
            }
            PodChange::Removed(Origin::File | Origin::Url, key) => {
                let name = (key.namespace.clone(), key.name.clone());
                if self.wanted.get(&name).is_some_and(|pod| pod.metadata.uid.as_ref() == Some(&key.uid)) {
                    self.wanted.remove(&name);
                    self.pauses.remove(&name);
                }
            }
            PodChange::Synced(origin) => return self.synced.insert(*origin),
            PodChange::Set(..) | PodChange::Removed(..) => return false,
        }
        true
    }

    /// Mirrors are compared with what the API server has only after it has listed it.
    fn may_create(&self) -> bool {
        self.synced.contains(&Origin::Api)
    }

    /// Mirrors of nothing are known only after all sources have told what they have.
    fn orphans(&self) -> Vec<(Name, Arc<Pod>)> {
        if ![Origin::Api, Origin::File, Origin::Url].iter().all(|origin| self.synced.contains(origin)) {
            return Vec::new();
        }
        let orphans = self.mirrors.iter().filter(|(name, _)| !self.wanted.contains_key(*name));
        orphans.map(|(name, mirror)| (name.clone(), mirror.pod.clone())).collect()
    }

    fn is_paused(&self, name: &Name) -> bool {
        self.pauses.get(name).is_some_and(|pause| pause.until > Instant::now())
    }

    fn failed(&mut self, name: &Name) {
        let length = self.pauses.get(name).map_or(RETRY.0, |pause| (pause.length * 2).min(RETRY.1));
        self.pauses.insert(name.clone(), Pause { until: Instant::now() + length, length });
    }

    /// The mirror stays as it is known, or is not known, until the watch tells.
    fn await_watch(&mut self, name: &Name) {
        self.pauses.insert(name.clone(), Pause { until: Instant::now() + SHOWN, length: RETRY.0 });
    }
}

/// What is wanted and what is there; fed by the sources, worked off by [`Mirrors::run`].
#[derive(Default)]
pub(super) struct Mirrors {
    state: Mutex<State>,
    changed: Notify,
}

impl Mirrors {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears what the sources say.
    pub(super) fn take(&self, change: &PodChange) {
        if self.lock().take(change) {
            self.changed.notify_one();
        }
    }

    /// Brings mirrors in line for ever.
    pub(super) async fn run(self: Arc<Self>, node: Arc<Node>, client: Client) {
        let api = MirrorPods::new(client.clone(), node.object.clone());
        let (mut pods, mut object) = (node.pods.changes(), node.object.clone());
        loop {
            pods.mark_unchanged();
            object.mark_unchanged();
            if self.lock().may_create() {
                self.delete_orphans(&api).await;
                self.ensure(&api).await;
                let status = |uid: &str| node.pods.view(uid).map(|view| (*view.status).clone());
                self.report(&client, status).await;
            }
            let next =
                self.lock().pauses.values().map(|pause| pause.until).filter(|until| *until > Instant::now()).min();
            let pause = async {
                match next {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                changed = pods.changed() => if changed.is_err() { return },
                changed = object.changed() => if changed.is_err() { return },
                () = pause => {}
            }
            tokio::time::sleep(SETTLE).await;
        }
    }

    async fn delete_orphans(&self, api: &MirrorPods) {
        let orphans = self.lock().orphans();
        for (name, mirror) in orphans {
            if self.lock().is_paused(&name) {
                continue;
            }
            match tokio::time::timeout(DEADLINE, api.delete_orphan(&mirror)).await {
                Ok(Ok(_)) => self.lock().await_watch(&name),
                Ok(Err(error)) => self.fail(&name, "deleting an orphaned mirror Pod", &error),
                Err(late) => self.fail(&name, "deleting an orphaned mirror Pod", &late),
            }
        }
    }

    async fn ensure(&self, api: &MirrorPods) {
        let wanted: Vec<_> = self.lock().wanted.iter().map(|(name, pod)| (name.clone(), pod.clone())).collect();
        for (name, pod) in wanted {
            let mirror = {
                let state = self.lock();
                if state.is_paused(&name) {
                    continue;
                }
                state.mirrors.get(&name).map(|mirror| mirror.pod.clone())
            };
            match tokio::time::timeout(DEADLINE, api.reconcile(&pod, mirror.as_deref())).await {
                Ok(Ok(MirrorAction::Kept)) if mirror.is_some() => {}
                // our Node is not there yet, or another Pod has the name: both are told by a watch, some time
                Ok(Ok(MirrorAction::Postponed)) => self.lock().failed(&name),
                Ok(Ok(action)) => {
                    tracing::debug!(pod = %format!("{}/{}", name.0, name.1), ?action, "mirror Pod");
                    let mut state = self.lock();
                    let uid = mirror.as_ref().and_then(|mirror| mirror.metadata.uid.clone());
                    if state.mirrors.get(&name).is_some_and(|known| known.pod.metadata.uid == uid) {
                        state.mirrors.remove(&name);
                    }
                    if !state.mirrors.contains_key(&name) {
                        state.await_watch(&name);
                    }
                }
                Ok(Err(error)) => self.fail(&name, "making a mirror Pod", &error),
                Err(late) => self.fail(&name, "making a mirror Pod", &late),
            }
        }
    }

    /// Sends each static Pod's status (by its UID) to its mirror, if they differ.
    async fn report(&self, client: &Client, status_of: impl Fn(&str) -> Option<PodStatus>) {
        let wanted: Vec<_> = self.lock().wanted.iter().map(|(name, pod)| (name.clone(), pod.clone())).collect();
        for (name, pod) in wanted {
            let Some(status) = status_of(pod.metadata.uid.as_deref().unwrap_or_default()) else { continue };
            let (desired, base) = {
                let state = self.lock();
                let Some(mirror) = state.mirrors.get(&name).filter(|_| !state.is_paused(&name)) else { continue };
                if mirror.sent.as_ref() == Some(&status) || mirror.pod.metadata.deletion_timestamp.is_some() {
                    continue;
                }
                (Desired::new(mirror.pod.clone()), mirror.pod.status.clone().unwrap_or_default())
            };
            let answer = report::report(client, &desired, &base, &status).await;
            let mut state = self.lock();
            let mirror = state.mirrors.get_mut(&name);
            let mirror = mirror.filter(|mirror| mirror.pod.metadata.uid.as_deref() == Some(desired.uid()));
            match (answer, mirror) {
                (ApiAnswer::Accepted { status: stored, .. }, Some(mirror)) => {
                    Arc::make_mut(&mut mirror.pod).status = Some(*stored);
                    mirror.sent = Some(status);
                }
                // the watch tells that it is gone, and it is made again
                (ApiAnswer::Accepted { .. } | ApiAnswer::Gone, _) => {}
                (ApiAnswer::Failed(error), _) => {
                    tracing::warn!(pod = %format!("{}/{}", name.0, name.1), error, "reporting a static Pod's status failed, will retry");
                    state.failed(&name);
                }
            }
        }
    }

    fn fail(&self, name: &Name, what: &str, error: &dyn std::fmt::Display) {
        tracing::warn!(pod = %format!("{}/{}", name.0, name.1), %error, "{what} failed, will retry");
        self.lock().failed(name);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::node::fake::FakeApi;
    use crate::source::{HASH, MIRROR, PodKey};

    fn pod(uid: &str, name: &str, annotation: Option<&str>) -> Arc<Pod> {
        let annotations = annotation.map(|key| json!({ key: "h" }));
        let metadata = json!({"namespace": "ns", "name": name, "uid": uid, "annotations": annotations});
        Arc::new(serde_json::from_value(json!({"metadata": metadata, "status": {"phase": "Pending"}})).unwrap())
    }

    fn names(orphans: &[(Name, Arc<Pod>)]) -> Vec<&str> {
        orphans.iter().map(|(name, _)| name.1.as_str()).collect()
    }

    #[test]
    fn orphans_are_known_when_all_have_told() {
        let mut state = State::default();
        let mirror = |uid: &str, name: &str| PodChange::Set(Origin::Api, pod(uid, name, Some(MIRROR)));
        assert!(state.take(&mirror("m1", "a")) && state.take(&mirror("m2", "b")));
        assert!(!state.take(&PodChange::Set(Origin::Api, pod("r", "real", None))), "a real Pod is not ours");
        assert!(!state.take(&PodChange::Set(Origin::Local, pod("l", "local", None))), "a local Pod has no mirror");
        assert!(state.take(&PodChange::Set(Origin::File, pod("s", "a", None))));
        for origin in [Origin::Api, Origin::File] {
            state.take(&PodChange::Synced(origin));
            assert!(state.orphans().is_empty());
        }
        state.take(&PodChange::Synced(Origin::Url));
        assert_eq!(names(&state.orphans()), ["b"]);
        // the manifest's older identity went away: that is not the one which is wanted
        let key = |uid: &str| PodKey { uid: uid.into(), namespace: "ns".into(), name: "a".into() };
        state.take(&PodChange::Removed(Origin::File, key("older")));
        assert_eq!(names(&state.orphans()), ["b"]);
        state.take(&PodChange::Removed(Origin::File, key("s")));
        assert_eq!(names(&state.orphans()), ["a", "b"]);
        assert!(!state.take(&PodChange::Removed(Origin::Api, key("other"))), "an older mirror");
        assert!(state.take(&PodChange::Removed(Origin::Api, key("m1"))));
        assert_eq!(names(&state.orphans()), ["b"]);
    }

    #[test]
    fn a_status_that_somebody_changed_is_sent_again() {
        let mut state = State::default();
        let mirror = pod("m", "a", Some(MIRROR));
        state.take(&PodChange::Set(Origin::Api, mirror.clone()));
        let name = name_of(&mirror);
        let sent = PodStatus { phase: Some("Running".to_owned()), ..PodStatus::default() };
        state.mirrors.get_mut(&name).unwrap().sent = Some(sent.clone());
        let with = |phase: &str| {
            let mut pod = (*mirror).clone();
            pod.status = Some(PodStatus { phase: Some(phase.to_owned()), ..PodStatus::default() });
            PodChange::Set(Origin::Api, Arc::new(pod))
        };
        state.take(&with("Running"));
        assert_eq!(state.mirrors[&name].sent, Some(sent), "our own patch comes back");
        state.take(&with("Unknown"));
        assert_eq!(state.mirrors[&name].sent, None);
    }

    #[tokio::test]
    async fn a_mirror_shows_its_static_pod_and_cannot_be_deleted() {
        const PATH: &str = "/api/v1/namespaces/ns/pods/a";
        let api = FakeApi::default();
        let node = serde_json::from_value(json!({"metadata": {"name": "n", "uid": "nu"}})).unwrap();
        let (_sender, object) = tokio::sync::watch::channel(Some(Arc::new(node)));
        let (client, pods) = (api.client(), MirrorPods::new(api.client(), object));
        let mirrors = Mirrors::default();
        let stored = || -> Pod { serde_json::from_value(api.get(PATH).unwrap()).unwrap() };
        let watch = |pod: Pod| mirrors.take(&PodChange::Set(Origin::Api, Arc::new(pod)));
        mirrors.take(&PodChange::Set(Origin::File, pod("s", "a", Some(HASH))));
        mirrors.take(&PodChange::Synced(Origin::Api));
        pods_ensured(&mirrors, &pods).await;
        watch(stored());
        let running = |uid: &str| {
            assert_eq!(uid, "s");
            Some(PodStatus { phase: Some("Running".to_owned()), ..PodStatus::default() })
        };
        mirrors.report(&client, running).await;
        assert_eq!(stored().status.unwrap().phase.as_deref(), Some("Running"));
        let patches = || api.seen().iter().filter(|seen| seen.method == "PATCH").count();
        mirrors.report(&client, running).await;
        assert_eq!(patches(), 1, "what is there is not sent again");
        // kubectl delete: it comes back, and is told the status again
        let mut deleted = stored();
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
        deleted.metadata.deletion_timestamp = Some(now);
        watch(deleted);
        pods_ensured(&mirrors, &pods).await;
        assert!(stored().metadata.deletion_timestamp.is_none());
        watch(stored());
        mirrors.report(&client, running).await;
        assert_eq!(patches(), 2);
        // the manifest goes away
        let key = PodKey { uid: "s".into(), namespace: "ns".into(), name: "a".into() };
        mirrors.take(&PodChange::Removed(Origin::File, key));
        mirrors.take(&PodChange::Synced(Origin::File));
        mirrors.take(&PodChange::Synced(Origin::Url));
        mirrors.delete_orphans(&pods).await;
        assert!(api.get(PATH).is_none());
    }

    async fn pods_ensured(mirrors: &Mirrors, pods: &MirrorPods) {
        mirrors.ensure(pods).await;
        assert!(mirrors.lock().is_paused(&("ns".to_owned(), "a".to_owned())), "the watch is waited for");
    }

    #[test]
    fn failures_wait_longer_and_news_end_the_wait() {
        let mut state = State::default();
        let wanted = pod("s", "a", None);
        let name = name_of(&wanted);
        let mut lengths = Vec::new();
        for _ in 0..7 {
            state.failed(&name);
            lengths.push(state.pauses[&name].length.as_secs());
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 30, 30]);
        assert!(state.is_paused(&name));
        state.take(&PodChange::Set(Origin::File, wanted));
        assert!(!state.is_paused(&name));
    }
}
