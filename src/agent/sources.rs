//! From the sources' changes to the registry of Pods.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::node::{Node, NodeEffects};
use crate::pod::model::Desired;
use crate::source::{Origin, PodChange, is_mirror};

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
