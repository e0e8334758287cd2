//! A node that is a Pod of a StatefulSet leaves its cluster when that becomes smaller or goes away, and only then: after
//! a restart or an update of the Pod the node is the same.
//!
//! The Pod's end is announced by SIGTERM. The node then asks what is to become of it; if it goes for good, it takes no
//! more Pods, evicts those it has as `kubectl drain` does (so that their disruption budgets hold), and deletes its Node.
//! When its time is over before all have moved it goes all the same: its containers end with it.
//!
//! Evictions are made with the node's own credentials, which may evict its own Pods and no others. What those may not,
//! look at the StatefulSet and delete the Node, is the Pod's ServiceAccount's to do.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::node::Node;
use super::pods::PodView;
use crate::config::{Leave, StatefulSetName};
use crate::node::EventType;
use crate::node::client::{ApiClient, ClientError, Credentials, Limits, REQUEST_TIMEOUT};
use crate::source::{Origin, is_mirror, origin};

/// How long the StatefulSet is asked for before the node stays what it is.
const ASK: Duration = Duration::from_secs(15);
/// Pause before a refused eviction is tried again (kubectl: 5 s).
const RETRY: Duration = Duration::from_secs(2);
/// What deleting the Node may take, at the end.
const DELETE: Duration = Duration::from_secs(10);

/// The node cannot leave, and its Node stays. Terminal: the process is about to end. Whoever is left deletes it.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeaveError {
    /// The kubeconfig cannot be used.
    #[error("--leave-kubeconfig: {0}")]
    Client(#[from] ClientError),
    /// The node is named otherwise than a Pod of the StatefulSet.
    #[error("node {node} is no Pod of StatefulSet {set}: set --hostname-override to the Pod's name")]
    Stranger {
        /// Our name.
        node: String,
        /// What we were told.
        set: StatefulSetName,
    },
    /// The API server does not tell what is to become of us.
    #[error("cannot get StatefulSet {set}, so the node stays: {source}: does the Pod's ServiceAccount have its Role?")]
    Set {
        /// Which.
        set: StatefulSetName,
        /// Why.
        source: Box<kube::Error>,
    },
    /// The Node stays.
    #[error(
        "cannot delete Node {node}: {source}: delete it with kubectl delete node {node}, and give the Pod's ServiceAccount the right to"
    )]
    Delete {
        /// Our name.
        node: String,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// What is to become of the node.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// The Pod will be back.
    Returns,
    /// It will not.
    Goes(&'static str),
}

/// Looks at the StatefulSet (`None`: deleted).
fn fate(set: Option<&StatefulSet>, ordinal: i32) -> Fate {
    let Some(set) = set else { return Fate::Goes("its StatefulSet is deleted") };
    if set.metadata.deletion_timestamp.is_some() {
        return Fate::Goes("its StatefulSet is being deleted");
    }
    let replicas = set.spec.replicas.unwrap_or(1);
    let first = set.spec.ordinals.as_ref().and_then(|ordinals| ordinals.start).unwrap_or(0);
    if (first..first.saturating_add(replicas)).contains(&ordinal) {
        Fate::Returns
    } else {
        Fate::Goes("its StatefulSet was scaled down")
    }
}

/// Whether `kubectl drain` would move it: not what its DaemonSet or a file would put back at once. One that is being
/// deleted counts until its object is gone, which is this node's to see to.
fn moves(view: &PodView) -> bool {
    let pod = &view.desired.pod;
    let over = view.observed.final_phase.is_some() && pod.metadata.deletion_timestamp.is_none();
    let owners = pod.metadata.owner_references.iter().flatten();
    let daemon = owners.filter(|owner| owner.controller == Some(true)).any(|owner| owner.kind == "DaemonSet");
    origin(pod) == Origin::Api && !is_mirror(pod) && !daemon && !over
}

/// Leaves the cluster if the node's Pod goes for good. `heartbeats` ends what would make the Node anew.
pub(super) async fn run(node: &Arc<Node>, settings: &Leave, heartbeats: &CancellationToken) -> Result<(), LeaveError> {
    let deadline = Instant::now() + settings.timeout;
    let (name, set) = (&node.config.node_name, &settings.stateful_set);
    let ordinal = set.ordinal(name).ok_or_else(|| LeaveError::Stranger { node: name.clone(), set: set.clone() })?;
    let credentials = Credentials { kubeconfig: settings.kubeconfig.clone(), rotated: None };
    let account = ApiClient::new(credentials, Limits::heartbeat(REQUEST_TIMEOUT)).await?.client();
    let found = stateful_set(&account, set, deadline.min(Instant::now() + ASK)).await?;
    let why = match fate(found.as_ref(), ordinal) {
        Fate::Returns => {
            tracing::info!(statefulset = %set, "this Pod will be back: the Node stays");
            return Ok(());
        }
        Fate::Goes(why) => why,
    };
    tracing::info!(statefulset = %set, why, "leaving the cluster");
    node.events.node_event(EventType::Normal, "Leaving", format!("Node {name} leaves: {why}"));
    if let Some(api) = &node.api {
        cordon(&api.client(), name).await;
        drain(node, &api.client(), deadline).await;
    }
    heartbeats.cancel();
    let object = node.object.borrow().clone();
    let result = timeout_at(Instant::now() + DELETE, delete(&account, name, object.as_deref())).await;
    match result {
        Ok(Err(source)) => return Err(LeaveError::Delete { node: name.clone(), source: source.into() }),
        Ok(Ok(())) => tracing::info!(node = name, "the Node is deleted"),
        Err(_) => tracing::error!(node = name, "the API server does not delete the Node in time"),
    }
    Ok(())
}

/// The StatefulSet as it is now; `None` if there is none.
async fn stateful_set(
    client: &Client,
    name: &StatefulSetName,
    deadline: Instant,
) -> Result<Option<StatefulSet>, LeaveError> {
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), &name.namespace);
    loop {
        match sets.get_opt(&name.name).await {
            Ok(found) => return Ok(found),
            // a refusal will be the same the next time
            Err(source @ kube::Error::Api(_)) => {
                return Err(LeaveError::Set { set: name.clone(), source: source.into() });
            }
            Err(source) if Instant::now() + RETRY > deadline => {
                return Err(LeaveError::Set { set: name.clone(), source: source.into() });
            }
            Err(error) => tracing::warn!(%error, "asking for the StatefulSet, will retry"),
        }
        sleep(RETRY).await;
    }
}

async fn cordon(client: &Client, name: &str) {
    let patch = Patch::Strategic(serde_json::json!({"spec": {"unschedulable": true}}));
    let nodes: Api<NodeObject> = Api::all(client.clone());
    if let Err(error) = nodes.patch(name, &PatchParams::default(), &patch).await {
        tracing::warn!(%error, "the node cannot be made unschedulable");
    }
}

/// Evicts until no Pod is left or the time is over.
async fn drain(node: &Node, client: &Client, deadline: Instant) {
    let mut changes = node.pods.changes();
    let mut accepted: HashSet<String> = HashSet::new();
    loop {
        let left: Vec<PodView> = node.pods.views().into_iter().filter(moves).collect();
        if left.is_empty() {
            tracing::info!("no Pod is left to move");
            return;
        }
        for view in &left {
            let ends = view.desired.pod.metadata.deletion_timestamp.is_some();
            if !ends && !accepted.contains(view.desired.uid()) && evict(client, &view.desired.pod).await {
                accepted.insert(view.desired.uid().to_owned());
            }
        }
        tokio::select! {
            _ = changes.changed() => {}
            () = sleep(RETRY) => {}
            () = sleep_until(deadline) => {
                let names: Vec<_> = left.iter().filter_map(|view| view.desired.pod.metadata.name.as_deref()).collect();
                tracing::warn!(pods = ?names, "these Pods have not moved in time; they end with the node");
                return;
            }
        }
    }
}

/// Whether the API server has accepted the eviction, or the Pod is gone.
async fn evict(client: &Client, pod: &Pod) -> bool {
    let meta = &pod.metadata;
    let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else { return true };
    let eviction = Eviction {
        metadata: ObjectMeta { name: meta.name.clone(), namespace: meta.namespace.clone(), ..ObjectMeta::default() },
        delete_options: Some(DeleteOptions {
            preconditions: Some(Preconditions { uid: meta.uid.clone(), ..Preconditions::default() }),
            ..DeleteOptions::default()
        }),
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let answer: kube::Result<serde_json::Value> =
        pods.create_subresource("eviction", name, &PostParams::default(), &eviction).await;
    match answer {
        Ok(_) => {
            tracing::info!(pod = format!("{namespace}/{name}"), "evicted");
            true
        }
        Err(kube::Error::Api(status)) if status.code == 404 => true,
        Err(kube::Error::Api(status)) if status.code == 429 => {
            tracing::info!(pod = format!("{namespace}/{name}"), "not evicted yet: {}", status.message);
            false
        }
        Err(error) => {
            tracing::warn!(pod = format!("{namespace}/{name}"), %error, "not evicted, will retry");
            false
        }
    }
}

/// Deletes the Node, if it is still ours.
async fn delete(client: &Client, name: &str, object: Option<&NodeObject>) -> kube::Result<()> {
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let mut params = DeleteParams::default();
    if let Some(uid) = object.and_then(|object| object.metadata.uid.clone()) {
        params = params.preconditions(kube::api::Preconditions { uid: Some(uid), resource_version: None });
    }
    match nodes.delete(name, &params).await {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        result => result.map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::model::{Desired, Observed};
    use serde_json::json;

    #[test]
    fn only_what_goes_for_good_leaves() {
        let set = |value| serde_json::from_value::<StatefulSet>(value).unwrap();
        let two = set(json!({"metadata": {}, "spec": {"replicas": 2}}));
        assert_eq!(fate(Some(&two), 0), Fate::Returns);
        assert_eq!(fate(Some(&two), 1), Fate::Returns);
        assert!(matches!(fate(Some(&two), 2), Fate::Goes(_)));
        let from_five = set(json!({"metadata": {}, "spec": {"replicas": 2, "ordinals": {"start": 5}}}));
        assert_eq!(fate(Some(&from_five), 6), Fate::Returns);
        assert!(matches!(fate(Some(&from_five), 4), Fate::Goes(_)));
        assert!(matches!(fate(Some(&from_five), 7), Fate::Goes(_)));
        let ending = set(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"replicas": 2}}));
        assert!(matches!(fate(Some(&ending), 0), Fate::Goes(_)));
        assert!(matches!(fate(None, 0), Fate::Goes(_)));
        assert_eq!(fate(Some(&set(json!({"metadata": {}}))), 0), Fate::Returns, "one replica by default");
    }

    #[test]
    fn what_would_come_back_is_not_moved() {
        let view = |metadata: serde_json::Value| {
            let pod: Pod = serde_json::from_value(json!({"metadata": metadata})).unwrap();
            PodView {
                desired: Arc::new(Desired::new(Arc::new(pod))),
                observed: Arc::new(Observed::default()),
                status: Arc::default(),
            }
        };
        let owner = |kind: &str, controller| json!({"ownerReferences": [{"apiVersion": "apps/v1", "kind": kind, "name": "x", "uid": "y", "controller": controller}]});
        assert!(moves(&view(json!({"name": "bare"}))));
        assert!(moves(&view(owner("ReplicaSet", true))));
        assert!(moves(&view(owner("DaemonSet", false))));
        assert!(!moves(&view(owner("DaemonSet", true))));
        assert!(!moves(&view(json!({"annotations": {"kubernetes.io/config.source": "file"}}))));
        assert!(!moves(&view(json!({"annotations": {"kubernetes.io/config.mirror": "hash"}}))));
    }
}
