//! From the sources' changes to the registry of Pods.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use super::mirrors::Mirrors;
use super::node::{Node, NodeEffects};
use crate::config::Config;
use crate::pod::model::Desired;
use crate::source::{Origin, PodChange, UrlSource, is_mirror, watch_files, watch_url};

/// Takes changes until the sources end.
pub(super) async fn follow(
    node: Arc<Node>,
    effects: Arc<NodeEffects>,
    mirrors: Arc<Mirrors>,
    mut changes: mpsc::Receiver<PodChange>,
) {
    let mut present: HashMap<Origin, HashSet<String>> = HashMap::new();
    let mut awaited = HashSet::from([Origin::File, Origin::Url]);
    if node.api.is_some() {
        awaited.insert(Origin::Api);
    }
    while let Some(change) = changes.recv().await {
        mirrors.take(&change);
        match change {
            // what it mirrors runs by the word of its own source
            PodChange::Set(_, pod) if is_mirror(&pod) => {}
            PodChange::Set(origin, pod) => {
                let mut desired = Desired::new(pod);
                desired.max_restart_delay = node.max_restart_delay();
                desired.is_static = origin != Origin::Api;
                present.entry(origin).or_default().insert(desired.uid().to_owned());
                node.pods.set(&effects, desired).await;
            }
            PodChange::Removed(origin, key) => {
                present.entry(origin).or_default().remove(&key.uid);
                // nothing happens for a mirror: no Pod of ours has its UID
                node.pods.remove(&key.uid).await;
            }
            PodChange::Synced(origin) => {
                node.pods.retain(origin, present.entry(origin).or_default()).await;
                awaited.remove(&origin);
                if awaited.is_empty() {
                    node.sources_ready.store(true, Ordering::Release);
                }
            }
        }
    }
}

/// Starts the sources of static Pods that the configuration names. One that it does not name has no Pods: those that it
/// had under an earlier configuration end.
pub(super) fn start_static(config: &Arc<Config>, changes: &mpsc::Sender<PodChange>) -> Result<(), String> {
    let kubelet = &config.kubelet;
    let nothing = |origin: Origin| {
        changes.try_send(PodChange::Synced(origin)).map_err(|error| format!("start the source of static Pods: {error}"))
    };
    if kubelet.static_pod_path.is_empty() {
        nothing(Origin::File)?;
    } else {
        let (path, name) = (kubelet.static_pod_path.clone().into(), config.node_name.clone());
        tokio::spawn(watch_files(path, name, kubelet.file_check_frequency.std(), changes.clone()));
    }
    if kubelet.static_pod_url.is_empty() {
        nothing(Origin::Url)?;
    } else {
        let source = UrlSource::new(&kubelet.static_pod_url, &kubelet.static_pod_url_header)
            .map_err(|error| format!("staticPodURL: {error}"))?;
        let name = config.node_name.clone();
        tokio::spawn(watch_url(source, name, kubelet.http_check_frequency.std(), changes.clone()));
    }
    Ok(())
}
