//! From the sources' changes to the registry of Pods.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::node::{Node, NodeEffects};
use crate::config::Config;
use crate::pod::model::Desired;
use crate::source::{Origin, PodChange, UrlSource, is_mirror, watch_files, watch_url};

/// Takes changes until the sources end.
pub(super) async fn follow(node: Arc<Node>, effects: Arc<NodeEffects>, mut changes: mpsc::Receiver<PodChange>) {
    let mut present: [HashSet<String>; 3] = Default::default();
    let slot = |origin: Origin| match origin {
        Origin::Api => 0,
        Origin::File => 1,
        Origin::Url => 2,
    };
    let mut synced = [false; 3];
    while let Some(change) = changes.recv().await {
        match change {
            PodChange::Set(origin, pod) => {
                if is_mirror(&pod) {
                    continue;
                }
                let mut desired = Desired::new(pod);
                desired.max_restart_delay = node.max_restart_delay();
                desired.is_static = origin != Origin::Api;
                present[slot(origin)].insert(desired.uid().to_owned());
                node.pods.set(&effects, desired).await;
            }
            PodChange::Removed(origin, key) => {
                present[slot(origin)].remove(&key.uid);
                node.pods.remove(&key.uid).await;
            }
            PodChange::Synced(origin) => {
                synced[slot(origin)] = true;
                if origin == Origin::Api {
                    node.pods.retain(false, &present[0]).await;
                } else {
                    let both: HashSet<String> = present[1].union(&present[2]).cloned().collect();
                    node.pods.retain(true, &both).await;
                }
            }
        }
    }
}

/// Starts the sources of static Pods that the configuration names.
pub(super) fn start_static(config: &Arc<Config>, changes: &mpsc::Sender<PodChange>) -> Result<(), String> {
    let kubelet = &config.kubelet;
    if !kubelet.static_pod_path.is_empty() {
        let (path, name) = (kubelet.static_pod_path.clone().into(), config.node_name.clone());
        tokio::spawn(watch_files(path, name, kubelet.file_check_frequency.std(), changes.clone()));
    }
    if !kubelet.static_pod_url.is_empty() {
        let source = UrlSource::new(&kubelet.static_pod_url, &kubelet.static_pod_url_header)
            .map_err(|error| format!("staticPodURL: {error}"))?;
        let name = config.node_name.clone();
        tokio::spawn(watch_url(source, name, kubelet.http_check_frequency.std(), changes.clone()));
    }
    Ok(())
}
