//! Mirror Pods: what the API server shows of our static Pods.
//!
//! Source: `pkg/kubelet/pod/mirror_client.go` and `tryReconcileMirrorPods` in `pkg/kubelet/kubelet.go`.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client};
use tokio::sync::watch;

use super::{HASH, MIRROR, annotation, is_mirror};

/// What was done about one mirror Pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorAction {
    /// It is as it should be.
    Kept,
    /// There was none.
    Created,
    /// It mirrored something else, and is right now.
    Replaced,
    /// It has no static Pod any more.
    Deleted,
    /// Our Node is not there, or on its way out: no mirror can be made.
    Postponed,
}

/// Makes, replaces and deletes mirror Pods. All errors are worth another try.
#[derive(Clone)]
pub struct MirrorPods {
    client: Client,
    node: watch::Receiver<Option<Arc<Node>>>,
}

impl MirrorPods {
    /// `node` is our Node, which owns all mirror Pods.
    #[must_use]
    pub fn new(client: Client, node: watch::Receiver<Option<Arc<Node>>>) -> Self {
        Self { client, node }
    }

    /// Brings the mirror of a static Pod in line; `mirror` is what the API source has under its name.
    pub async fn reconcile(&self, pod: &Pod, mirror: Option<&Pod>) -> kube::Result<MirrorAction> {
        let mut action = MirrorAction::Created;
        if let Some(mirror) = mirror {
            if mirrors(mirror, pod) && mirror.metadata.deletion_timestamp.is_none() {
                return Ok(MirrorAction::Kept);
            }
            if !self.delete(mirror).await? {
                // somebody was quicker; the watch will tell what is there now
                return Ok(MirrorAction::Postponed);
            }
            action = MirrorAction::Replaced;
        }
        let node = self.node.borrow().clone();
        let uid = node
            .filter(|node| node.metadata.deletion_timestamp.is_none())
            .and_then(|node| Some((node.metadata.name.clone()?, node.metadata.uid.clone()?)));
        let Some((name, uid)) = uid else { return Ok(MirrorAction::Postponed) };
        let wanted = mirror_of(pod, &name, &uid);
        let pods: Api<Pod> = self.pods(pod);
        match pods.create(&PostParams::default(), &wanted).await {
            Ok(_) => Ok(action),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                // made before a restart, perhaps; if it is another the watch brings it back to us
                let existing = pods.get(wanted.metadata.name.as_deref().unwrap_or("")).await?;
                Ok(if mirrors(&existing, pod) { MirrorAction::Kept } else { MirrorAction::Postponed })
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes a mirror whose static Pod is gone.
    pub async fn delete_orphan(&self, mirror: &Pod) -> kube::Result<MirrorAction> {
        Ok(if self.delete(mirror).await? { MirrorAction::Deleted } else { MirrorAction::Kept })
    }

    /// At once, and only this very mirror; false if it is gone or another stands there.
    async fn delete(&self, mirror: &Pod) -> kube::Result<bool> {
        if !is_mirror(mirror) {
            // a real Pod of that name is nobody's to remove
            return Ok(false);
        }
        let mut params = DeleteParams::default().grace_period(0);
        params.preconditions = Some(Preconditions { uid: mirror.metadata.uid.clone(), resource_version: None });
        let name = mirror.metadata.name.as_deref().unwrap_or("");
        match self.pods(mirror).delete(name, &params).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn pods(&self, pod: &Pod) -> Api<Pod> {
        Api::namespaced(self.client.clone(), pod.metadata.namespace.as_deref().unwrap_or("default"))
    }
}

/// Whether a mirror shows this very static Pod.
fn mirrors(mirror: &Pod, pod: &Pod) -> bool {
    mirror.metadata.name == pod.metadata.name
        && mirror.metadata.namespace == pod.metadata.namespace
        && annotation(mirror, MIRROR).is_some()
        && annotation(mirror, MIRROR) == annotation(pod, HASH)
}

/// The object to create: the Pod, annotated, owned by our Node.
fn mirror_of(pod: &Pod, node_name: &str, node_uid: &str) -> Pod {
    let mut mirror = pod.clone();
    let hash = annotation(pod, HASH).unwrap_or("").to_owned();
    mirror.metadata.annotations.get_or_insert_default().insert(MIRROR.to_owned(), hash);
    // the API server gives it an identity of its own
    mirror.metadata.uid = None;
    mirror.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node_name.to_owned(),
        uid: node_uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    mirror.status = None;
    mirror
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::fake::FakeApi;
    use serde_json::json;

    const PATH: &str = "/api/v1/namespaces/ns/pods/a-n";

    fn static_pod(hash: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "a-n", "namespace": "ns", "uid": hash, "annotations": {HASH: hash, super::super::SOURCE: "file"}},
            "spec": {"containers": []}, "status": {"phase": "Pending"}
        }))
        .unwrap()
    }

    fn setup() -> (FakeApi, watch::Sender<Option<Arc<Node>>>, MirrorPods) {
        let api = FakeApi::default();
        let (tx, rx) = watch::channel(None);
        let mirrors = MirrorPods::new(api.client(), rx);
        (api, tx, mirrors)
    }

    fn node() -> Option<Arc<Node>> {
        Some(Arc::new(serde_json::from_value(json!({"metadata": {"name": "n", "uid": "nu"}})).unwrap()))
    }

    fn stored(api: &FakeApi) -> Pod {
        serde_json::from_value(api.get(PATH).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn the_life_of_a_mirror() {
        let (api, tx, mirrors) = setup();
        let one = static_pod("h1");
        assert_eq!(mirrors.reconcile(&one, None).await.unwrap(), MirrorAction::Postponed);
        tx.send_replace(node());
        assert_eq!(mirrors.reconcile(&one, None).await.unwrap(), MirrorAction::Created);
        let mirror = stored(&api);
        assert_eq!(annotation(&mirror, MIRROR), Some("h1"));
        assert!(is_mirror(&mirror) && !super::super::is_static(&mirror));
        let owner = &mirror.metadata.owner_references.as_ref().unwrap()[0];
        assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Node", "nu", Some(true)));
        assert_eq!(mirrors.reconcile(&one, Some(&mirror)).await.unwrap(), MirrorAction::Kept);
        // after a restart the watch may not have told yet
        assert_eq!(mirrors.reconcile(&one, None).await.unwrap(), MirrorAction::Kept);
        // the manifest changed
        let two = static_pod("h2");
        assert_eq!(mirrors.reconcile(&two, Some(&mirror)).await.unwrap(), MirrorAction::Replaced);
        let delete = api.seen().into_iter().find(|seen| seen.method == "DELETE").unwrap();
        assert_eq!(delete.body["gracePeriodSeconds"], 0);
        assert_eq!(delete.body["preconditions"]["uid"], json!(mirror.metadata.uid));
        // kubectl delete: it comes back
        let mut deleted = stored(&api);
        deleted.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now()));
        assert_eq!(mirrors.reconcile(&two, Some(&deleted)).await.unwrap(), MirrorAction::Replaced);
        // the manifest is gone
        assert_eq!(mirrors.delete_orphan(&stored(&api)).await.unwrap(), MirrorAction::Deleted);
        assert!(api.get(PATH).is_none());
        assert_eq!(mirrors.delete_orphan(&deleted).await.unwrap(), MirrorAction::Kept);
    }

    #[tokio::test]
    async fn a_real_pod_of_that_name_is_left_alone() {
        let (api, tx, mirrors) = setup();
        tx.send_replace(node());
        let real = json!({"metadata": {"name": "a-n", "namespace": "ns", "uid": "r"}, "spec": {"containers": []}});
        api.put(PATH, real.clone());
        let real: Pod = serde_json::from_value(real).unwrap();
        assert_eq!(mirrors.reconcile(&static_pod("h"), Some(&real)).await.unwrap(), MirrorAction::Postponed);
        assert_eq!(api.count("DELETE", PATH), 0);
    }
}
