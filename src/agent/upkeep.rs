//! What keeps a running node up to date: its address ranges, API-backed volumes, the image store.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as NodeObject;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;

use super::images;
use super::node::Node;
use crate::config::Config;
use crate::image::GcPolicy;
use crate::node::{NodeFacts, NodeHealth};

/// How often images are looked at for collection (`ImageGCPeriod` in kubelet).
const IMAGE_GC_PERIOD: Duration = Duration::from_secs(5 * 60);

/// The address ranges that the cluster has assigned, for the next start.
const POD_CIDRS_FILE: &str = "pod-cidrs.json";

/// Gives the network the address ranges that the cluster assigns, and tells the node's health, also when CNI plugins
/// change it.
pub(super) async fn follow_pod_cidrs(
    node: Arc<Node>,
    mut object: watch::Receiver<Option<Arc<NodeObject>>>,
    health: watch::Sender<NodeHealth>,
) {
    let mut network = node.network.changes();
    loop {
        let cidrs = pod_cidrs(&node.config, object.borrow_and_update().as_deref());
        set_pod_cidrs(&node, &cidrs, &health).await;
        if !cidrs.is_empty() {
            let text = serde_json::to_vec(&cidrs).unwrap_or_default();
            let path = node.config.paths.state_dir.join(POD_CIDRS_FILE);
            if fs::read(&path).is_ok_and(|known| known == text) {
                // nothing new
            } else if let Err(error) = fs::write(&path, text) {
                tracing::warn!(%error, path = %path.display(), "the next start has to wait for the API server's word");
            }
        }
        tokio::select! {
            changed = object.changed() => if changed.is_err() { return std::future::pending().await },
            _ = network.changed() => {}
        }
    }
}

pub(super) async fn set_pod_cidrs(node: &Node, cidrs: &[IpNet], health: &watch::Sender<NodeHealth>) {
    if !cidrs.is_empty()
        && let Err(error) = node.network.set_pod_cidrs(cidrs).await
    {
        tracing::error!(%error, "the Pod network cannot be set up");
    }
    let ready = node.network.ready();
    health.send_if_modified(|health| {
        let changed = health.network != ready;
        health.network = ready;
        changed
    });
}

/// The ranges of the agent's last life on this boot.
pub(super) fn read_pod_cidrs(config: &Config) -> Vec<IpNet> {
    let known = fs::read(config.paths.state_dir.join(POD_CIDRS_FILE)).ok();
    known.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

pub(super) fn pod_cidrs(config: &Config, object: Option<&NodeObject>) -> Vec<IpNet> {
    let spec = object.and_then(|node| node.spec.as_ref());
    let assigned = spec.and_then(|spec| spec.pod_cidrs.clone().or_else(|| Some(vec![spec.pod_cidr.clone()?])));
    let own =
        (!config.kubelet.pod_cidr.is_empty()).then(|| config.kubelet.pod_cidr.split(',').map(str::to_owned).collect());
    // a node by itself has nobody to assign it a range
    let standalone = config.kubeconfig.is_none().then(|| vec!["10.88.0.0/16".to_owned()]);
    assigned.or(own).or(standalone).unwrap_or_default().iter().filter_map(|cidr| cidr.parse().ok()).collect()
}

/// Brings API-backed volumes up to date when an object changes, a token ages, a certificate is renewed or a Pod's
/// labels change.
pub(super) async fn refresh_volumes(node: Arc<Node>) {
    let mut objects = node.objects.subscribe();
    let mut certificates = node.volumes.new_certificates();
    let mut pods = node.pods.changes();
    let mut versions: HashMap<String, Option<String>> = HashMap::new();
    loop {
        let views: Vec<_> =
            node.pods.views().into_iter().filter(|view| view.observed.volumes_mounted && view.is_active()).collect();
        let next = views.iter().filter_map(|view| node.volumes.next_refresh(&view.desired.pod)).min();
        let wait = next.map_or(Duration::from_secs(3600), |at| {
            Duration::try_from(at.duration_since(jiff::Timestamp::now())).unwrap_or_default()
        });
        let mut stale: Vec<_> = Vec::new();
        tokio::select! {
            changed = objects.recv() => match changed {
                Ok(change) => stale.extend(views.into_iter().filter(|view| change.concerns(&view.desired.pod))),
                Err(RecvError::Lagged(_)) => stale = views,
                Err(RecvError::Closed) => return,
            },
            renewed = certificates.recv() => match renewed {
                Ok(uid) => stale.extend(views.into_iter().find(|view| view.desired.uid() == uid)),
                Err(RecvError::Lagged(_)) => stale = views,
                Err(RecvError::Closed) => return,
            },
            changed = pods.changed() => {
                if changed.is_err() { return }
                versions.retain(|uid, _| views.iter().any(|view| view.desired.uid() == uid));
                for view in views {
                    let meta = &view.desired.pod.metadata;
                    let resources = &view.observed.resize.allocated;
                    let version = Some(format!("{:?}{:?}{resources:?}", meta.labels, meta.annotations));
                    let known = versions.insert(view.desired.uid().to_owned(), version.clone());
                    // volumes of an earlier life of the agent have tokens and certificates that nobody would renew
                    if known.map_or_else(|| node.volumes.is_inherited(view.desired.uid()), |known| known != version) {
                        stale.push(view);
                    }
                }
            }
            () = tokio::time::sleep(wait) => stale = views,
        }
        for view in stale {
            let context = node.field_context(&view.observed);
            if let Err(error) = node.volumes.refresh(&view.desired.pod, &context).await {
                tracing::warn!(pod = view.desired.uid(), %error, "volumes are not up to date");
            }
        }
    }
}

/// Reports the images there are, and collects those that nobody uses when the disk fills up.
pub(super) async fn keep_images(node: Arc<Node>, facts: watch::Sender<Arc<NodeFacts>>) {
    let mut pods = node.pods.changes();
    let mut collected = tokio::time::Instant::now();
    loop {
        let list = images::node_images(&node.images);
        facts.send_if_modified(|facts| {
            let changed = facts.images != list;
            if changed {
                Arc::make_mut(facts).images = list;
            }
            changed
        });
        if collected.elapsed() >= IMAGE_GC_PERIOD {
            collected = tokio::time::Instant::now();
            collect_images(&node).await;
        }
        let until = collected + IMAGE_GC_PERIOD;
        tokio::select! {
            changed = pods.changed() => {
                if changed.is_err() { return }
                // many Pods at once are one look
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

async fn collect_images(node: &Arc<Node>) {
    let kubelet = &node.config.kubelet;
    let percent = |value: i32| u8::try_from(value.clamp(0, 100)).unwrap_or(100);
    let policy = GcPolicy {
        high_percent: percent(kubelet.image_gc_high_threshold_percent),
        low_percent: percent(kubelet.image_gc_low_threshold_percent),
        min_age: kubelet.image_minimum_gc_age.std(),
        max_age: Some(kubelet.image_maximum_gc_age.std()).filter(|age| !age.is_zero()),
    };
    if let Err(error) = node.images.collect_garbage(&node.images_in_use(), policy).await {
        node.events.node_event(crate::node::EventType::Warning, "ImageGCFailed", error.to_string());
    }
}
