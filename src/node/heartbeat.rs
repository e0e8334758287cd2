//! The Node's life: registered, its status kept true, watched.
//!
//! One task computes the status every `nodeStatusUpdateFrequency` and whenever health changes; it is sent when it
//! differs or `nodeStatusReportFrequency` has passed. Source: `syncNodeStatus` and `fastStatusUpdateOnce` in
//! `pkg/kubelet/kubelet_node_status.go`. Unlike kubelet we register again when our Node was deleted while we
//! run, after a pause that leaves an administrator time to stop us.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::events::{EventRecorder, EventType};
use super::register::{self, Registered};
use super::status::{self, NodeFacts, NodeHealth};
use crate::config::Config;

/// Attempts to update one status.
const STATUS_RETRIES: usize = 5;
/// First and longest pause between attempts to register.
const REGISTER_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(7));
/// A deleted Node is made again after this long.
const RECREATE_AFTER: Duration = Duration::from_secs(30);
/// Changes of facts within this time go out together.
const SETTLE: Duration = Duration::from_millis(250);

/// Keeps our Node object; see the module.
pub struct NodeKeeper {
    /// What was configured.
    pub config: Arc<Config>,
    /// For the Node's watch and registration.
    pub client: Client,
    /// For status updates: not rate-limited.
    pub heartbeat: Client,
    /// What the status tells.
    pub facts: watch::Receiver<Arc<NodeFacts>>,
    /// How we do.
    pub health: watch::Receiver<NodeHealth>,
    /// Where events go.
    pub recorder: EventRecorder,
    /// Gets our Node whenever it changes; others learn Pod CIDRs, UID and labels from it. `None` while there is none.
    pub node: watch::Sender<Option<Arc<Node>>>,
}

/// When the status was last sent, and how long the next report may wait.
struct Reported {
    at: Instant,
    jitter: f64,
}

impl NodeKeeper {
    /// Runs until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        self.recorder.node_event(EventType::Normal, "Starting", "Starting kubelet.".to_owned());
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.watch_node() => {}
            () = self.keep() => {}
        }
    }

    /// Registers, then keeps the status true, for ever.
    async fn keep(&self) {
        let (mut facts, mut health) = (self.facts.clone(), self.health.clone());
        let mut node = self.node.subscribe();
        let mut tick = tokio::time::interval(self.config.kubelet.node_status_update_frequency.std().max(SETTLE));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reported: Option<Reported> = None;
        let mut registered = !self.config.kubelet.register_node;
        loop {
            if !registered {
                self.register().await;
                registered = true;
            }
            match self.sync(&mut reported).await {
                Ok(()) => {}
                Err(error) if register::is(&error, 404) && self.config.kubelet.register_node => {
                    tracing::warn!(node = self.config.node_name, "our Node was deleted; registering it again soon");
                    tokio::time::sleep(RECREATE_AFTER).await;
                    (registered, reported) = (false, None);
                    continue;
                }
                Err(error) => tracing::error!(%error, "unable to update node status"),
            }
            let before = self.facts.borrow().clone();
            loop {
                tokio::select! {
                    _ = tick.tick() => break,
                    Ok(()) = health.changed() => break,
                    Ok(()) = facts.changed() => {
                        // images alone wait for the next tick
                        if urgent(&before, &facts.borrow_and_update()) {
                            tokio::time::sleep(SETTLE).await;
                            break;
                        }
                    }
                    // somebody else's change may have undone ours
                    Ok(()) = node.changed() => {
                        if node.borrow_and_update().is_none() { break }
                    }
                }
            }
        }
    }

    async fn register(&self) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut pause = REGISTER_PAUSE.0;
        loop {
            let (facts, health) = (self.facts.borrow().clone(), self.health.borrow().clone());
            let (initial, events) = register::initial_node(&self.config, &facts, &health, now());
            tracing::info!(node = self.config.node_name, "attempting to register node");
            match register::try_register(&nodes, &initial, &self.config, facts.devices.made_anew).await {
                Ok(result) => {
                    tracing::info!(node = self.config.node_name, "successfully registered node");
                    let created = matches!(result, Registered::Created(_));
                    self.publish(result.into_node());
                    if created {
                        self.announce(&events, &facts);
                    }
                    return;
                }
                Err(error) => tracing::error!(%error, "unable to register node with API server, will retry"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REGISTER_PAUSE.1);
        }
    }

    /// One status update: computed on the Node we last saw, then, if that failed, on the API server's.
    async fn sync(&self, reported: &mut Option<Reported>) -> kube::Result<()> {
        let nodes: Api<Node> = Api::all(self.heartbeat.clone());
        let mut last = None;
        for attempt in 0..STATUS_RETRIES {
            let cached = self.node.borrow().clone().filter(|_| attempt == 0);
            let original = match cached {
                Some(node) => Ok(node),
                None => nodes.get(&self.config.node_name).await.map(Arc::new),
            };
            let result = match original {
                Ok(original) => self.update(&nodes, &original, reported).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => return Ok(()),
                // on a cached Node this is worth another look, on a live one it is final
                Err(error) if attempt > 0 && register::is(&error, 404) => {
                    self.node.send_replace(None);
                    return Err(error);
                }
                Err(error) => {
                    tracing::debug!(%error, attempt, "error updating node status, will retry");
                    last = Some(error);
                }
            }
        }
        last.map_or(Ok(()), Err)
    }

    async fn update(&self, nodes: &Api<Node>, original: &Node, reported: &mut Option<Reported>) -> kube::Result<()> {
        let (facts, health) = (self.facts.borrow().clone(), self.health.borrow().clone());
        let previous = original.status.clone().unwrap_or_default();
        let (status, events) = status::build(&previous, &self.config, &facts, &health, now());
        let mut node = original.clone();
        let labels = node.metadata.labels.get_or_insert_default();
        for (key, value) in [("kubernetes.io/os", "linux"), ("kubernetes.io/arch", status::architecture())] {
            labels.insert(key.to_owned(), value.to_owned());
        }
        register::annotate(&mut node, &self.config);
        let mut changed = status::has_changed(&previous, &status) || node.metadata.labels != original.metadata.labels;
        changed |= node.metadata.annotations.clone().unwrap_or_default()
            != original.metadata.annotations.clone().unwrap_or_default();
        node.status = Some(status);
        let period = self.config.kubelet.node_status_report_frequency.std();
        let due = reported.as_ref().is_none_or(|last| last.at.elapsed() >= period.mul_f64(1.0 + last.jitter));
        if !changed && !due {
            return Ok(());
        }
        // after a change the next report moves by up to half a period, so that nodes do not report in step
        let jitter = if changed || reported.is_none() { fastrand::f64() - 0.5 } else { 0.0 };
        if let Some(patch) = status::patch(original, &node) {
            let patch = Patch::Strategic(patch);
            let updated = nodes.patch_status(&self.config.node_name, &PatchParams::default(), &patch).await?;
            self.publish(updated);
        }
        *reported = Some(Reported { at: Instant::now(), jitter });
        self.announce(&events, &facts);
        Ok(())
    }

    fn announce(&self, events: &[&'static str], facts: &NodeFacts) {
        for &event in events {
            let name = &self.config.node_name;
            if event == "Rebooted" {
                let message = format!("Node {name} has been rebooted, boot id: {}", facts.machine.boot_id);
                self.recorder.node_event(EventType::Warning, event, message);
            } else {
                self.recorder.node_event(EventType::Normal, event, format!("Node {name} status is now: {event}"));
            }
        }
    }

    /// Follows our Node. Errors are retried with back-off by the watcher.
    async fn watch_node(&self) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let selector = watcher::Config::default().fields(&format!("metadata.name={}", self.config.node_name));
        let mut stream = watcher(nodes, selector).default_backoff().boxed();
        let mut present = false;
        loop {
            match stream.try_next().await {
                Ok(Some(watcher::Event::Init)) => present = false,
                Ok(Some(watcher::Event::InitApply(node) | watcher::Event::Apply(node))) => {
                    present = true;
                    self.publish(node);
                }
                Ok(Some(watcher::Event::InitDone)) if !present => {
                    self.node.send_replace(None);
                }
                Ok(Some(watcher::Event::Delete(_))) => {
                    self.node.send_replace(None);
                }
                Ok(Some(watcher::Event::InitDone)) => {}
                Ok(None) => return,
                Err(error) => tracing::warn!(%error, "watching our Node failed, will retry"),
            }
        }
    }

    /// Publishes a Node unless a newer one is known already.
    fn publish(&self, node: Node) {
        let node = Arc::new(node);
        let schedulable = |node: &Node| !node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
        let mut flipped = None;
        self.node.send_if_modified(|current| {
            let same = |old: &Arc<Node>| old.metadata.uid == node.metadata.uid;
            if let Some(old) = current.as_ref().filter(|old| same(old)) {
                if version(old) >= version(&node) && version(&node) > 0 {
                    return false;
                }
                flipped = (schedulable(old) != schedulable(&node)).then(|| schedulable(&node));
            }
            *current = Some(Arc::clone(&node));
            true
        });
        self.recorder.set_node_uid(node.metadata.uid.clone());
        if let Some(schedulable) = flipped {
            let event = if schedulable { "NodeSchedulable" } else { "NodeNotSchedulable" };
            let message = format!("Node {} status is now: {event}", self.config.node_name);
            self.recorder.node_event(EventType::Normal, event, message);
        }
    }
}

#[cfg(not(test))]
fn now() -> Timestamp {
    Timestamp::now()
}

/// Tests' wall clock follows tokio's, which they can pause.
#[cfg(test)]
fn now() -> Timestamp {
    thread_local!(static START: (Timestamp, Instant) = (Timestamp::now(), Instant::now()));
    START.with(|(wall, start)| *wall + Instant::now().saturating_duration_since(*start))
}

/// Resource versions of one object can be compared since Kubernetes 1.35 (KEP 5504).
fn version(node: &Node) -> u64 {
    node.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// Whether somebody waits for a change of facts: attach/detach for volumes, the scheduler for devices.
fn urgent(old: &NodeFacts, new: &NodeFacts) -> bool {
    old.volumes_in_use != new.volumes_in_use
        || old.devices != new.devices
        || old.addresses != new.addresses
        || old.runtime_handlers != new.runtime_handlers
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeApi;
    use super::*;
    use serde_json::Value;

    const PATH: &str = "/api/v1/nodes/node";
    const STATUS: &str = "/api/v1/nodes/node/status";

    struct Rig {
        api: FakeApi,
        facts: watch::Sender<Arc<NodeFacts>>,
        health: watch::Sender<NodeHealth>,
        node: watch::Receiver<Option<Arc<Node>>>,
        cancel: CancellationToken,
    }

    fn start() -> Rig {
        let api = FakeApi::default();
        // the fake has no watches: let them hang as an idle one does
        api.on(|seen| seen.query.contains("watch=true").then_some((200, Value::Null)));
        let mut facts = NodeFacts::default();
        facts.machine.ephemeral_storage = Some(1 << 30);
        facts.machine.boot_id = "b".into();
        let (facts_tx, facts) = watch::channel(Arc::new(facts));
        let (health_tx, health) = watch::channel(NodeHealth::default());
        let (node_tx, node) = watch::channel(None);
        let config = Arc::new(Config::for_tests(std::path::Path::new("/nowhere")));
        let keeper = NodeKeeper {
            config,
            client: api.client(),
            heartbeat: api.client(),
            facts,
            health,
            recorder: EventRecorder::log_only("node"),
            node: node_tx,
        };
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        tokio::spawn(async move {
            tokio::select! { () = keeper.keep() => {}, () = token.cancelled() => {} }
        });
        Rig { api, facts: facts_tx, health: health_tx, node, cancel }
    }

    fn ready(api: &FakeApi) -> bool {
        let node = api.get(PATH).unwrap_or_default();
        node["status"]["conditions"].as_array().is_some_and(|list| {
            list.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        })
    }

    #[tokio::test(start_paused = true)]
    async fn registers_and_reports_health_at_once() {
        let mut rig = start();
        rig.node.wait_for(Option::is_some).await.unwrap();
        assert!(rig.api.get(PATH).is_some() && !ready(&rig.api));
        let before = Instant::now();
        rig.health.send_modify(|health| {
            health.runtime = Ok(());
            health.network = Ok(());
        });
        rig.node
            .wait_for(|node| node.as_ref().is_some_and(|node| status::is_ready(node.status.as_ref().unwrap())))
            .await
            .unwrap();
        assert!(before.elapsed() < Duration::from_secs(1));
        assert!(ready(&rig.api));
        rig.cancel.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn an_unchanged_status_is_sent_every_five_minutes_only() {
        let mut rig = start();
        rig.node.wait_for(Option::is_some).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = rig.api.count("PATCH", STATUS);
        tokio::time::sleep(Duration::from_secs(140)).await;
        assert_eq!(rig.api.count("PATCH", STATUS), before);
        tokio::time::sleep(Duration::from_secs(330)).await;
        assert!(rig.api.count("PATCH", STATUS) > before);
        // a volume in use goes out at once
        let before = rig.api.count("PATCH", STATUS);
        rig.facts.send_modify(|facts| Arc::make_mut(facts).volumes_in_use = Some(vec!["kubernetes.io/csi/d^v".into()]));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(rig.api.count("PATCH", STATUS), before + 1);
        rig.cancel.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_node_comes_back_after_a_while() {
        let mut rig = start();
        rig.node.wait_for(Option::is_some).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        rig.api.remove(PATH);
        rig.health.send_modify(|health| health.disk_pressure = true);
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(rig.api.get(PATH).is_none(), "an administrator has time");
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(rig.api.get(PATH).is_some());
        rig.cancel.cancel();
    }

    #[tokio::test]
    async fn our_node_is_watched() {
        use super::super::client::{ApiClient, Credentials, Limits};
        let node = |version: &str, unschedulable: bool| {
            serde_json::json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node", "uid": "u", "resourceVersion": version},
                "spec": {"podCIDR": "10.1.2.0/24", "unschedulable": unschedulable}
            })
        };
        let server = super::super::fake::HttpServer::start(move |request| {
            let query = request.uri().query().unwrap_or("");
            assert!(query.contains("fieldSelector=metadata.name%3Dnode"), "{query}");
            if query.contains("watch=true") {
                return (200, serde_json::json!({"type": "MODIFIED", "object": node("2", true)}));
            }
            let metadata = serde_json::json!({"resourceVersion": "1"});
            (200, serde_json::json!({"apiVersion": "v1", "kind": "NodeList", "metadata": metadata, "items": [node("1", false)]}))
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{}", server.port)}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {}}]
        });
        std::fs::write(&path, text.to_string()).unwrap();
        let credentials = Credentials { kubeconfig: path, rotated: None };
        let client = ApiClient::new(credentials, Limits::heartbeat(Duration::from_secs(5))).await.unwrap().client();
        let (node_tx, mut node_rx) = watch::channel(None);
        let keeper = NodeKeeper {
            config: Arc::new(Config::for_tests(dir.path())),
            heartbeat: client.clone(),
            client,
            facts: watch::channel(Arc::default()).1,
            health: watch::channel(NodeHealth::default()).1,
            recorder: EventRecorder::log_only("node"),
            node: node_tx,
        };
        tokio::spawn(async move { keeper.watch_node().await });
        let cordoned = |node: &Option<Arc<Node>>| {
            node.as_ref().and_then(|node| node.spec.as_ref()).is_some_and(|spec| spec.unschedulable == Some(true))
        };
        let seen = tokio::time::timeout(Duration::from_secs(10), node_rx.wait_for(cordoned)).await.unwrap().unwrap();
        assert_eq!(seen.as_ref().unwrap().spec.as_ref().unwrap().pod_cidr.as_deref(), Some("10.1.2.0/24"));
    }
}
