//! Our Node object: created if it does not exist, reconciled if it does.
//!
//! Source: `initialNode` and `tryRegisterWithAPIServer` in `pkg/kubelet/kubelet_node_status.go`.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeSpec, NodeStatus, Taint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};

use super::status::{self, NodeFacts, NodeHealth, architecture};
use crate::config::Config;
use crate::resources::devices::is_extended_resource;

/// Marks nodes whose volumes the controller attaches.
const CONTROLLER_ATTACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
/// Tells a cloud controller which address the administrator wants.
const PROVIDED_IP: &str = "alpha.kubernetes.io/provided-node-ip";
/// Labels that are put right on an existing Node; others belong to whoever set them.
const DEFAULT_LABELS: [&str; 5] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
];

/// The Node as we would create it, and the events that its first status deserves.
#[must_use]
pub fn initial_node(
    config: &Config,
    facts: &NodeFacts,
    health: &NodeHealth,
    now: Timestamp,
) -> (Node, Vec<&'static str>) {
    let mut labels: std::collections::BTreeMap<String, String> = [
        ("kubernetes.io/hostname", config.hostname.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    labels.extend(config.node_labels.clone());
    let mut taints = config.kubelet.register_with_taints.clone();
    if config.external_cloud_provider {
        taints.push(Taint {
            key: "node.cloudprovider.kubernetes.io/uninitialized".to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        });
    }
    let provider = Some(config.kubelet.provider_id.clone()).filter(|id| !id.is_empty());
    let (status, events) = status::build(&NodeStatus::default(), config, facts, health, now);
    let mut node = Node {
        metadata: ObjectMeta { name: Some(config.node_name.clone()), labels: Some(labels), ..ObjectMeta::default() },
        spec: Some(NodeSpec {
            provider_id: provider,
            taints: (!taints.is_empty()).then_some(taints),
            ..NodeSpec::default()
        }),
        status: Some(status),
    };
    annotate(&mut node, config);
    (node, events)
}

/// Sets or removes the annotations that are ours.
pub(super) fn annotate(node: &mut Node, config: &Config) {
    let annotations = node.metadata.annotations.get_or_insert_default();
    if config.kubelet.enable_controller_attach_detach {
        annotations.insert(CONTROLLER_ATTACH.to_owned(), "true".to_owned());
    } else {
        annotations.remove(CONTROLLER_ATTACH);
    }
    let given = config.node_ips.iter().any(|address| !address.is_unspecified());
    if config.external_cloud_provider && given {
        let addresses: Vec<String> = config.node_ips.iter().map(ToString::to_string).collect();
        annotations.insert(PROVIDED_IP.to_owned(), addresses.join(","));
    } else {
        annotations.remove(PROVIDED_IP);
    }
}

/// The existing Node with our default labels, annotation and huge pages as they are now; extended resources are
/// zero until their plugins come back.
fn reconcile(existing: &Node, initial: &Node, config: &Config, made_anew: bool) -> Node {
    let mut node = existing.clone();
    let labels = node.metadata.labels.get_or_insert_default();
    for key in DEFAULT_LABELS {
        if let Some(value) = initial.metadata.labels.as_ref().and_then(|labels| labels.get(key)) {
            labels.insert(key.to_owned(), value.clone());
        }
    }
    annotate(&mut node, config);
    let status = node.status.get_or_insert_default();
    let fresh = initial.status.clone().unwrap_or_default();
    for (ours, theirs) in [(fresh.capacity, &mut status.capacity), (fresh.allocatable, &mut status.allocatable)] {
        let ours = ours.unwrap_or_default();
        let amounts = theirs.get_or_insert_with(|| ours.clone());
        amounts.retain(|name, _| !name.starts_with("hugepages-") || ours.contains_key(name));
        for (_, amount) in amounts.iter_mut().filter(|(name, _)| made_anew && is_extended_resource(name)) {
            *amount = Quantity("0".to_owned());
        }
        for (name, amount) in ours {
            if name.starts_with("hugepages-") || name.contains('/') {
                amounts.insert(name, amount);
            }
        }
    }
    node
}

/// What came of an attempt.
#[derive(Debug)]
pub enum Registered {
    /// We made it.
    Created(Box<Node>),
    /// It was there; now it is right.
    Existing(Box<Node>),
}

impl Registered {
    /// The Node as the API server has it.
    #[must_use]
    pub fn into_node(self) -> Node {
        match self {
            Self::Created(node) | Self::Existing(node) => *node,
        }
    }
}

/// One attempt. Every error is worth another try after a pause: the API server may be away, our certificate new.
///
/// `made_anew`: this machine remembers no device plugins, so that extended resources of an existing Node are of another
/// life, and zero.
pub async fn try_register(
    nodes: &Api<Node>,
    initial: &Node,
    config: &Config,
    made_anew: bool,
) -> kube::Result<Registered> {
    let refused = match nodes.create(&PostParams::default(), initial).await {
        Ok(node) => return Ok(Registered::Created(Box::new(node))),
        // whoever may not create Nodes may still own one
        Err(error @ kube::Error::Api(_)) if is(&error, 409) || is(&error, 403) => error,
        Err(error) => return Err(error),
    };
    let existing = match nodes.get(&config.node_name).await {
        // not being allowed to create it is what the administrator must know
        Err(error) if is(&error, 404) && is(&refused, 403) => return Err(refused),
        other => other?,
    };
    let wanted = reconcile(&existing, initial, config, made_anew);
    let node = match status::patch(&existing, &wanted) {
        Some(patch) => nodes.patch_status(&config.node_name, &PatchParams::default(), &Patch::Strategic(patch)).await?,
        None => existing,
    };
    Ok(Registered::Existing(Box::new(node)))
}

/// Whether the API server answered with this status code.
pub(super) fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeApi, failure};
    use super::*;
    use serde_json::json;

    const PATH: &str = "/api/v1/nodes/node";

    fn setup() -> (FakeApi, Api<Node>, Config) {
        let api = FakeApi::default();
        let nodes = Api::all(api.client());
        (api, nodes, Config::for_tests(std::path::Path::new("/nowhere")))
    }

    fn initial(config: &Config) -> Node {
        let mut facts = NodeFacts::default();
        facts.machine.huge_pages = [("hugepages-2Mi".to_owned(), 0)].into();
        initial_node(config, &facts, &NodeHealth::default(), Timestamp::UNIX_EPOCH).0
    }

    #[tokio::test]
    async fn a_new_node_has_everything() {
        let (api, nodes, mut config) = setup();
        config.external_cloud_provider = true;
        config.node_ips = vec!["10.0.0.7".parse().unwrap()];
        config.node_labels = [("pool".to_owned(), "a".to_owned())].into();
        config.kubelet.provider_id = "kind://x".into();
        let result = try_register(&nodes, &initial(&config), &config, false).await.unwrap();
        assert!(matches!(result, Registered::Created(_)));
        let node = api.get(PATH).unwrap();
        assert_eq!(node["metadata"]["labels"]["kubernetes.io/hostname"], "node");
        assert_eq!(node["metadata"]["labels"]["pool"], "a");
        assert_eq!(node["metadata"]["annotations"][CONTROLLER_ATTACH], "true");
        assert_eq!(node["metadata"]["annotations"][PROVIDED_IP], "10.0.0.7");
        assert_eq!(node["spec"]["taints"][0]["key"], "node.cloudprovider.kubernetes.io/uninitialized");
        assert_eq!(node["spec"]["providerID"], "kind://x");
        assert_eq!(node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"], 10250);
        assert_eq!(node["status"]["nodeInfo"]["kubeletVersion"], "v1.37.2");
    }

    #[test]
    fn devices_of_another_life_are_zero() {
        let config = Config::for_tests(std::path::Path::new("/nowhere"));
        let mut existing = initial(&config);
        let amounts = existing.status.as_mut().unwrap().capacity.as_mut().unwrap();
        amounts.insert("r.test/x".to_owned(), Quantity("4".to_owned()));
        let listed = |made_anew| {
            let node = reconcile(&existing, &initial(&config), &config, made_anew);
            node.status.unwrap().capacity.unwrap()["r.test/x"].0.clone()
        };
        assert_eq!((listed(false).as_str(), listed(true).as_str()), ("4", "0"));
    }

    #[tokio::test]
    async fn an_existing_node_is_reconciled() {
        let (api, nodes, config) = setup();
        api.put(
            PATH,
            json!({
                "metadata": {"name": "node", "labels": {"kubernetes.io/arch": "pdp11", "mine": "1"}},
                "spec": {"podCIDR": "10.1.0.0/24"},
                "status": {"capacity": {"hugepages-1Gi": "1Gi", "cpu": "3"}, "allocatable": {"hugepages-1Gi": "1Gi"}}
            }),
        );
        let node = try_register(&nodes, &initial(&config), &config, false).await.unwrap().into_node();
        let labels = node.metadata.labels.unwrap();
        assert_eq!((labels["kubernetes.io/arch"].as_str(), labels["mine"].as_str()), (architecture(), "1"));
        let capacity = node.status.unwrap().capacity.unwrap();
        assert_eq!(capacity.keys().collect::<Vec<_>>(), ["cpu", "hugepages-2Mi"]);
        assert_eq!(node.spec.unwrap().pod_cidr.as_deref(), Some("10.1.0.0/24"));
        let patch = api.seen().into_iter().find(|seen| seen.method == "PATCH").unwrap();
        assert_eq!(
            (patch.path.as_str(), patch.content_type.as_str()),
            ("/api/v1/nodes/node/status", "application/strategic-merge-patch+json")
        );
        // a second time there is nothing to do
        let patches = api.count("PATCH", "/api/v1/nodes/node/status");
        try_register(&nodes, &initial(&config), &config, false).await.unwrap();
        assert_eq!(api.count("PATCH", "/api/v1/nodes/node/status"), patches);
    }

    #[tokio::test]
    async fn forbidden_to_create_but_not_to_own() {
        let (api, nodes, config) = setup();
        api.on(|seen| (seen.method == "POST").then(|| failure(403, "Forbidden")));
        assert!(is(&try_register(&nodes, &initial(&config), &config, false).await.unwrap_err(), 403));
        api.put(PATH, json!({"metadata": {"name": "node"}}));
        assert!(matches!(
            try_register(&nodes, &initial(&config), &config, false).await.unwrap(),
            Registered::Existing(_)
        ));
    }
}
