//! The Pods bound to our node, from the API server.
//!
//! Source: `pkg/kubelet/config/apiserver.go`. The field selector is what the node authorizer allows; the watch
//! begins when our Node object was seen, because before that nobody can tell what the Pods may use.

use std::collections::HashMap;
use std::sync::Arc;

use futures::TryStreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};

use super::{Origin, PodChange, PodKey, SEEN, SOURCE};

/// What is known of a Pod that was announced.
struct Known {
    key: PodKey,
    seen: String,
    /// Confirmed by the list that is being read.
    listed: bool,
}

/// Follows our Pods until the receiver goes away. Errors are retried with back-off.
pub async fn watch_pods(
    client: Client,
    node_name: String,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    changes: mpsc::Sender<PodChange>,
) {
    if node.wait_for(Option::is_some).await.is_err() {
        return;
    }
    let selector = watcher::Config::default().fields(&format!("spec.nodeName={node_name}"));
    let mut stream = std::pin::pin!(watcher(Api::<Pod>::all(client), selector).default_backoff());
    let mut known = Pods::default();
    loop {
        let event = match stream.try_next().await {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "watching our Pods failed, will retry");
                continue;
            }
        };
        for change in known.apply(event) {
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }
}

/// Folds watch events into changes; a new list also tells which Pods are gone.
#[derive(Default)]
struct Pods {
    by_uid: HashMap<String, Known>,
}

impl Pods {
    fn apply(&mut self, event: watcher::Event<Pod>) -> Vec<PodChange> {
        match event {
            watcher::Event::Init => {
                self.by_uid.values_mut().for_each(|known| known.listed = false);
                Vec::new()
            }
            watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => self.set(pod).into_iter().collect(),
            watcher::Event::Delete(pod) => {
                let known = pod.metadata.uid.as_ref().and_then(|uid| self.by_uid.remove(uid));
                known.map(|known| PodChange::Removed(Origin::Api, known.key)).into_iter().collect()
            }
            watcher::Event::InitDone => {
                let gone = self.by_uid.extract_if(|_, known| !known.listed);
                let mut changes: Vec<_> = gone.map(|(_, known)| PodChange::Removed(Origin::Api, known.key)).collect();
                changes.push(PodChange::Synced(Origin::Api));
                changes
            }
        }
    }

    fn set(&mut self, mut pod: Pod) -> Option<PodChange> {
        let key = PodKey::of(&pod);
        if key.uid.is_empty() {
            tracing::error!(pod = %format!("{}/{}", key.namespace, key.name), "Pod without UID ignored");
            return None;
        }
        let known = self.by_uid.entry(key.uid.clone()).or_insert_with(|| Known {
            key,
            seen: Timestamp::now().to_string(),
            listed: true,
        });
        known.listed = true;
        // nobody on the node reads these, and they are the larger half of a Pod
        pod.metadata.managed_fields = None;
        let annotations = pod.metadata.annotations.get_or_insert_default();
        // a mirror keeps the words of what it mirrors
        annotations.entry(SEEN.to_owned()).or_insert_with(|| known.seen.clone());
        if !annotations.contains_key(super::MIRROR) {
            annotations.insert(SOURCE.to_owned(), Origin::Api.as_str().to_owned());
        }
        Some(PodChange::Set(Origin::Api, Arc::new(pod)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::fake::HttpServer;
    use serde_json::json;

    fn pod(uid: &str, name: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": uid, "name": name, "namespace": "ns"}})).unwrap()
    }

    fn words(changes: &[PodChange]) -> Vec<String> {
        let word = |change: &PodChange| match change {
            PodChange::Set(_, pod) => format!("set {}", pod.metadata.name.as_deref().unwrap()),
            PodChange::Removed(_, key) => format!("removed {}", key.name),
            PodChange::Synced(_) => "synced".to_owned(),
        };
        changes.iter().map(word).collect()
    }

    #[test]
    fn lists_and_watches_fold_into_changes() {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let mut pods = Pods::default();
        let mut run = |events: Vec<watcher::Event<Pod>>| {
            words(&events.into_iter().flat_map(|event| pods.apply(event)).collect::<Vec<_>>())
        };
        assert_eq!(
            run(vec![Init, InitApply(pod("1", "a")), InitApply(pod("2", "b")), InitDone]),
            ["set a", "set b", "synced"]
        );
        assert_eq!(
            run(vec![Apply(pod("3", "c")), Delete(pod("1", "a")), Delete(pod("9", "x"))]),
            ["set c", "removed a"]
        );
        // while the watch was away b was deleted and made again under the same name
        assert_eq!(
            run(vec![Init, InitApply(pod("4", "b")), InitApply(pod("3", "c")), InitDone]),
            ["set b", "set c", "removed b", "synced"]
        );
    }

    #[test]
    fn the_first_sight_stays() {
        let mut pods = Pods::default();
        let seen = |change: Option<PodChange>| {
            let Some(PodChange::Set(_, pod)) = change else { panic!() };
            assert_eq!(super::super::annotation(&pod, SOURCE), Some("api"));
            super::super::annotation(&pod, SEEN).unwrap().to_owned()
        };
        let first = seen(pods.set(pod("1", "a")));
        assert_eq!(first, seen(pods.set(pod("1", "a"))));
        assert!(pods.set(pod("", "a")).is_none());
    }

    #[tokio::test]
    async fn nothing_is_asked_before_the_node_was_seen() {
        let server = HttpServer::start(|request| {
            let query = request.uri().query().unwrap_or("");
            assert!(query.contains("fieldSelector=spec.nodeName%3Dn"), "{query}");
            if query.contains("watch=true") {
                return crate::node::fake::failure(410, "Expired");
            }
            let items = json!([{"metadata": {"uid": "1", "name": "a", "namespace": "ns"}}]);
            (200, json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}))
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster: {{server: \"http://127.0.0.1:{}\"}}\ncontexts:\n- name: c\n  context: {{cluster: c, user: u}}\nusers:\n- name: u\n  user: {{}}\n",
            server.port
        );
        std::fs::write(&path, text).unwrap();
        let credentials = crate::node::client::Credentials { kubeconfig: path, rotated: None };
        let limits = crate::node::Limits::heartbeat(std::time::Duration::from_secs(5));
        let client = crate::node::ApiClient::new(credentials, limits).await.unwrap().client();
        let (node_tx, node) = watch::channel(None);
        let (tx, mut rx) = mpsc::channel(8);
        tokio::spawn(watch_pods(client, "n".into(), node, tx));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert!(rx.try_recv().is_err());
        node_tx.send_replace(Some(Arc::new(Node::default())));
        let changes = [rx.recv().await.unwrap(), rx.recv().await.unwrap()];
        assert_eq!(words(&changes), ["set a", "synced"]);
    }
}
