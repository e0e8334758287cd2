//! The node's heartbeat: a Lease renewed on a thread of its own, so that nothing else the agent does can delay it.
//!
//! Source: `component-helpers/apimachinery/lease/controller.go`; name, duration and owner from
//! `pkg/kubelet/kubelet.go`. A node whose Lease lapses is marked `Unknown` and, after minutes, emptied.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::client::{ApiClient, Credentials, Limits};
use super::register::is;

/// Namespace of all node Leases.
const NAMESPACE: &str = "kube-node-lease";
/// First and longest pause between attempts to get or make the Lease.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(7));
/// Attempts to renew before the Lease is fetched again.
const RENEWALS: usize = 5;

/// What a Lease says.
#[derive(Clone, Debug)]
pub struct LeaseSettings {
    /// Name of Lease and holder.
    pub node_name: String,
    /// `nodeLeaseDurationSeconds`.
    pub duration_seconds: i32,
}

impl LeaseSettings {
    /// A quarter of the duration.
    fn interval(&self) -> Duration {
        Duration::from_secs(u64::try_from(self.duration_seconds).unwrap_or(1)) / 4
    }
}

/// Starts the thread. `node` is our Node, whose UID makes it the Lease's owner; `rotated` changes when
/// certificates did. The thread ends soon after `cancel`.
pub fn spawn(
    settings: LeaseSettings,
    credentials: Credentials,
    node: watch::Receiver<Option<Arc<Node>>>,
    rotated: watch::Receiver<u64>,
    cancel: CancellationToken,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("lease".to_owned()).spawn(move || {
        runtime.block_on(async {
            let connected = async {
                let mut pause = PAUSE.0;
                loop {
                    match ApiClient::new(credentials.clone(), Limits::heartbeat(settings.interval())).await {
                        Ok(client) => return client,
                        Err(error) => tracing::error!(%error, "no client for the node lease, will retry"),
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            };
            let work = async {
                let client = connected.await;
                let leases = Api::namespaced(client.client(), NAMESPACE);
                let reload = async {
                    client.follow(rotated).await;
                    std::future::pending::<()>().await;
                };
                tokio::select! { () = keep(&settings, &leases, node) => {}, () = reload => {} }
            };
            tokio::select! { () = work => {}, () = cancel.cancelled() => {} }
        });
    })
}

/// Renews for ever, every quarter of the duration with 4 % jitter.
async fn keep(settings: &LeaseSettings, leases: &Api<Lease>, node: watch::Receiver<Option<Arc<Node>>>) {
    let mut held: Option<Lease> = None;
    loop {
        let uid = node.borrow().as_ref().and_then(|node| node.metadata.uid.clone());
        held = Some(match held {
            Some(lease) => match renew(settings, leases, &lease, uid.as_deref()).await {
                Some(lease) => lease,
                None => ensure(settings, leases, &node).await,
            },
            None => ensure(settings, leases, &node).await,
        });
        tokio::time::sleep(settings.interval().mul_f64(1.0 + 0.04 * fastrand::f64())).await;
    }
}

/// Replaces the Lease by a renewed one; nothing if it must be fetched again.
async fn renew(settings: &LeaseSettings, leases: &Api<Lease>, lease: &Lease, uid: Option<&str>) -> Option<Lease> {
    let mut base = lease.clone();
    for _ in 0..RENEWALS {
        let wanted = renewed(settings, &base, uid, Timestamp::now());
        match leases.replace(&settings.node_name, &PostParams::default(), &wanted).await {
            Ok(lease) => return Some(lease),
            Err(error) if is(&error, 404) => return None,
            // somebody else wrote it: renew what is there
            Err(error) if is(&error, 409) => base = leases.get(&settings.node_name).await.ok()?,
            Err(error) => tracing::warn!(%error, "failed to renew the node lease"),
        }
    }
    None
}

/// The Lease as it is or as we make it, renewed just now; tries until it succeeds.
async fn ensure(settings: &LeaseSettings, leases: &Api<Lease>, node: &watch::Receiver<Option<Arc<Node>>>) -> Lease {
    let mut pause = PAUSE.0;
    loop {
        let uid = node.borrow().as_ref().and_then(|node| node.metadata.uid.clone());
        let result = match leases.get_opt(&settings.node_name).await {
            Ok(Some(lease)) => {
                let wanted = renewed(settings, &lease, uid.as_deref(), Timestamp::now());
                leases.replace(&settings.node_name, &PostParams::default(), &wanted).await
            }
            // without the owner a Lease would outlive its Node
            Ok(None) if uid.is_some() => {
                let wanted = renewed(settings, &Lease::default(), uid.as_deref(), Timestamp::now());
                leases.create(&PostParams::default(), &wanted).await
            }
            Ok(None) => {
                let mut node = node.clone();
                // both outcomes lead to another try
                let _ = tokio::time::timeout(PAUSE.1, node.wait_for(Option::is_some)).await;
                if node.borrow().is_none() {
                    tokio::time::sleep(PAUSE.0).await;
                }
                continue;
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(lease) => return lease,
            Err(error) => tracing::error!(%error, "failed to ensure the node lease exists, will retry"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// The next state of a Lease.
fn renewed(settings: &LeaseSettings, lease: &Lease, uid: Option<&str>, now: Timestamp) -> Lease {
    let mut metadata = lease.metadata.clone();
    if metadata.name.is_none() {
        metadata = ObjectMeta {
            name: Some(settings.node_name.clone()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        };
    }
    // the owner follows a Node that was deleted and made again
    let owner = metadata.owner_references.as_ref().and_then(|owners| owners.first());
    if let Some(uid) = uid
        && owner.is_none_or(|owner| owner.uid != uid)
    {
        metadata.owner_references = Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: settings.node_name.clone(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        }]);
    }
    let spec = LeaseSpec {
        holder_identity: Some(settings.node_name.clone()),
        lease_duration_seconds: Some(settings.duration_seconds),
        renew_time: Some(MicroTime(now)),
        ..lease.spec.clone().unwrap_or_default()
    };
    Lease { metadata, spec: Some(spec) }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeApi, failure};
    use super::*;
    use serde_json::json;

    const PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n";

    fn settings() -> LeaseSettings {
        LeaseSettings { node_name: "n".into(), duration_seconds: 40 }
    }

    fn node(uid: &str) -> Option<Arc<Node>> {
        let metadata = ObjectMeta { uid: Some(uid.to_owned()), ..ObjectMeta::default() };
        Some(Arc::new(Node { metadata, ..Node::default() }))
    }

    #[tokio::test(start_paused = true)]
    async fn created_renewed_and_owned() {
        let api = FakeApi::default();
        let (tx, rx) = watch::channel(None);
        let leases = Api::namespaced(api.client(), NAMESPACE);
        let task = tokio::spawn(async move { keep(&settings(), &leases, rx).await });
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(api.get(PATH).is_none(), "not without an owner");
        tx.send_replace(node("u1"));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let lease = api.get(PATH).unwrap();
        assert_eq!(lease["spec"]["holderIdentity"], "n");
        assert_eq!(lease["spec"]["leaseDurationSeconds"], 40);
        assert_eq!(lease["metadata"]["ownerReferences"][0]["uid"], "u1");
        let renewals = api.count("PUT", PATH);
        tokio::time::sleep(Duration::from_secs(105)).await;
        let more = api.count("PUT", PATH) - renewals;
        assert!((9..=11).contains(&more), "{more}");
        // deleted: made again; Node made again: new owner
        api.remove(PATH);
        tx.send_replace(node("u2"));
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(api.get(PATH).unwrap()["metadata"]["ownerReferences"][0]["uid"], "u2");
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn errors_and_conflicts_are_survived() {
        let api = FakeApi::default();
        api.put(
            PATH,
            json!({"metadata": {"name": "n", "namespace": NAMESPACE, "uid": "l"}, "spec": {"leaseTransitions": 3}}),
        );
        let failures = std::sync::atomic::AtomicUsize::new(0);
        api.on(move |seen| {
            let fail = seen.method == "PUT" && failures.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 3;
            fail.then(|| failure(409, "Conflict"))
        });
        let leases = Api::namespaced(api.client(), NAMESPACE);
        let (_tx, rx) = watch::channel(node("u"));
        let lease = ensure(&settings(), &leases, &rx).await;
        assert_eq!(lease.spec.as_ref().unwrap().lease_transitions, Some(3));
        assert!(renew(&settings(), &leases, &lease, Some("u")).await.is_some());
    }

    #[test]
    fn the_thread_ends_when_cancelled() {
        let cancel = CancellationToken::new();
        let (_node_tx, node) = watch::channel(None);
        let (_rotated_tx, rotated) = watch::channel(0);
        let nothing = Credentials { kubeconfig: "/does/not/exist".into(), rotated: None };
        let thread = spawn(settings(), nothing, node, rotated, cancel.clone()).unwrap();
        cancel.cancel();
        thread.join().unwrap();
    }
}
