use k8s_openapi::api::core::v1::{
    Affinity, AppArmorProfile, ContainerPort, ContainerRestartRule, NodeAffinity, NodeSelector,
    NodeSelectorRequirement, NodeSelectorTerm, PodOS, PodSecurityContext, Sysctl, Toleration,
};

use super::*;
use crate::resources::fixture::{container, pod};

/// A node that tests change.
struct Node {
    labels: BTreeMap<String, String>,
    taints: Vec<Taint>,
    allocatable: Amounts,
    features: BTreeSet<String>,
    sysctls: SysctlAllowlist,
    all: bool,
}

impl Node {
    fn new() -> Self {
        let mut allocatable = Amounts::default();
        for (name, value) in
            [("cpu", 2), ("memory", 1000), ("pods", 3), ("ephemeral-storage", 500), ("example.com/gpu", 1)]
        {
            allocatable.set_value(name, value);
        }
        Self {
            labels: [("zone", "a"), ("cores", "8")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            taints: Vec::new(),
            allocatable,
            features: BTreeSet::new(),
            sysctls: SysctlAllowlist::new(&["kernel.msg*".to_owned(), "net/core/somaxconn".to_owned()]).unwrap(),
            all: true,
        }
    }

    fn admit(&self, pod: &Pod, others: &[Pod]) -> Result<(), Rejection> {
        let info = NodeInfo {
            name: "n1",
            labels: &self.labels,
            taints: &self.taints,
            allocatable: &self.allocatable,
            declared_features: &self.features,
            supplemental_groups_policy: self.all,
            sysctls: &self.sysctls,
            apparmor: self.all,
            pod_level_resources: self.all,
        };
        admit(pod, others, &info)
    }

    fn reason(&self, pod: &Pod, others: &[Pod]) -> String {
        self.admit(pod, others).err().map(|rejection| rejection.reason).unwrap_or_default()
    }
}

fn named(uid: &str, requests: &[(&str, &str)]) -> Pod {
    let mut p = pod(vec![container("c", requests, &[])]);
    p.metadata.uid = Some(uid.to_owned());
    p
}

fn spec(pod: &mut Pod) -> &mut PodSpec {
    pod.spec.as_mut().unwrap()
}

#[test]
fn shortages_are_told_in_kubelets_words() {
    let node = Node::new();
    let other = named("o", &[("cpu", "1500m"), ("memory", "900")]);
    let rejection = node.admit(&named("p", &[("cpu", "600m")]), std::slice::from_ref(&other)).unwrap_err();
    assert_eq!(rejection.reason, "OutOfcpu");
    assert_eq!(
        rejection.status_message(),
        "Pod was rejected: Node didn't have enough resource: cpu, requested: 600, used: 1500, capacity: 2000"
    );
    assert_eq!(rejection.insufficient.len(), 1);
    for (requests, reason) in [
        (&[("cpu", "500m")][..], ""),
        (&[("memory", "101")], "OutOfmemory"),
        (&[("ephemeral-storage", "501")], "OutOfephemeral-storage"),
        (&[("example.com/gpu", "2")], "OutOfexample.com/gpu"),
        (&[("cpu", "5"), ("memory", "5000")], "OutOfcpu"),
        // of the cluster, not of the node
        (&[("example.com/license", "2")], ""),
        (&[("hugepages-2Mi", "2Mi")], "OutOfhugepages-2Mi"),
    ] {
        assert_eq!(node.reason(&named("p", requests), std::slice::from_ref(&other)), reason, "{requests:?}");
    }
}

#[test]
fn the_number_of_pods_is_limited() {
    let node = Node::new();
    let others = ["a", "b", "c"].map(|uid| named(uid, &[]));
    assert_eq!(node.reason(&named("p", &[]), &others), "OutOfpods");
    // one that is asked about again does not stand in its own way
    assert_eq!(node.reason(&named("a", &[]), &others), "");
    assert_eq!(node.reason(&named("p", &[]), &others[..2]), "");
}

fn requirement(key: &str, operator: &str, values: &[&str]) -> NodeSelectorRequirement {
    let values = values.iter().map(|v| (*v).to_owned()).collect();
    NodeSelectorRequirement { key: key.into(), operator: operator.into(), values: Some(values) }
}

fn with_terms(terms: Vec<NodeSelectorTerm>) -> Pod {
    let mut p = named("p", &[]);
    let required = Some(NodeSelector { node_selector_terms: terms });
    spec(&mut p).affinity = Some(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: required,
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    });
    p
}

#[test]
fn affinity_knows_all_operators() {
    let node = Node::new();
    for (requirement, matches) in [
        (requirement("zone", "In", &["a", "b"]), true),
        (requirement("zone", "In", &["b"]), false),
        (requirement("zone", "NotIn", &["b"]), true),
        (requirement("absent", "NotIn", &["b"]), true),
        (requirement("zone", "NotIn", &["a"]), false),
        (requirement("zone", "Exists", &[]), true),
        (requirement("absent", "Exists", &[]), false),
        (requirement("absent", "DoesNotExist", &[]), true),
        (requirement("cores", "Gt", &["7"]), true),
        (requirement("cores", "Gt", &["8"]), false),
        (requirement("cores", "Lt", &["9"]), true),
        (requirement("zone", "Lt", &["9"]), false),
        (requirement("absent", "Lt", &["9"]), false),
        (requirement("cores", "Gt", &["1", "2"]), false),
        (requirement("zone", "Near", &["a"]), false),
    ] {
        let term = NodeSelectorTerm { match_expressions: Some(vec![requirement.clone()]), match_fields: None };
        let reason = node.reason(&with_terms(vec![term]), &[]);
        assert_eq!(reason, if matches { "" } else { "NodeAffinity" }, "{requirement:?}");
    }
}

#[test]
fn terms_are_alternatives_and_requirements_add_up() {
    let node = Node::new();
    let term = |expressions: &[(&str, &str)], name: Option<&str>| NodeSelectorTerm {
        match_expressions: Some(expressions.iter().map(|(k, v)| requirement(k, "In", &[v])).collect()),
        match_fields: name.map(|name| vec![requirement("metadata.name", "In", &[name])]),
    };
    for (terms, matches) in [
        (vec![], false),
        (vec![NodeSelectorTerm::default()], false),
        (vec![term(&[("zone", "b")], None), term(&[("zone", "a")], None)], true),
        (vec![term(&[("zone", "a"), ("cores", "9")], None)], false),
        (vec![term(&[], Some("n1"))], true),
        (vec![term(&[], Some("n2"))], false),
        (vec![term(&[("zone", "a")], Some("n2"))], false),
    ] {
        let reason = node.reason(&with_terms(terms.clone()), &[]);
        assert_eq!(reason, if matches { "" } else { "NodeAffinity" }, "{terms:?}");
    }
    let mut p = named("p", &[]);
    spec(&mut p).node_selector = Some([("zone".to_owned(), "b".to_owned())].into());
    let rejection = node.admit(&p, &[]).unwrap_err();
    assert_eq!(rejection.message, "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector");
    let mut p = named("p", &[]);
    spec(&mut p).node_name = Some("n2".into());
    assert_eq!(node.reason(&p, &[]), "NodeName");
}

fn with_port(uid: &str, ip: &str, protocol: &str, port: i32) -> Pod {
    let mut p = named(uid, &[]);
    let text = |t: &str| (!t.is_empty()).then(|| t.to_owned());
    spec(&mut p).containers[0].ports = Some(vec![ContainerPort {
        host_ip: text(ip),
        protocol: text(protocol),
        host_port: Some(port),
        ..ContainerPort::default()
    }]);
    p
}

#[test]
fn host_ports_conflict_by_address_and_protocol() {
    let node = Node::new();
    let taken = [with_port("o", "10.0.0.1", "TCP", 80)];
    for (pod, conflict) in [
        (with_port("p", "", "", 80), true),
        (with_port("p", "0.0.0.0", "TCP", 80), true),
        (with_port("p", "10.0.0.1", "TCP", 80), true),
        (with_port("p", "10.0.0.2", "TCP", 80), false),
        (with_port("p", "", "UDP", 80), false),
        (with_port("p", "", "", 81), false),
        (with_port("p", "", "", 0), false),
    ] {
        assert_eq!(node.reason(&pod, &taken), if conflict { "NodePorts" } else { "" });
    }
    // an init container has left before others come, a sidecar stays
    let mut init = with_port("o", "", "", 80);
    let containers = std::mem::take(&mut spec(&mut init).containers);
    spec(&mut init).init_containers = Some(containers);
    assert_eq!(node.reason(&with_port("p", "", "", 80), std::slice::from_ref(&init)), "");
    spec(&mut init).init_containers.as_mut().unwrap()[0].restart_policy = Some("Always".into());
    assert_eq!(node.reason(&with_port("p", "", "", 80), &[init]), "NodePorts");
}

#[test]
fn taints_that_evict_keep_pods_out() {
    let mut node = Node::new();
    let taint =
        |effect: &str| Taint { key: "k".into(), value: Some("v".into()), effect: effect.into(), ..Taint::default() };
    node.taints = vec![taint("NoSchedule")];
    assert_eq!(node.reason(&named("p", &[]), &[]), "");
    node.taints = vec![taint("NoExecute")];
    let rejection = node.admit(&named("p", &[]), &[]).unwrap_err();
    assert_eq!(
        (rejection.reason.as_str(), rejection.message.as_str()),
        ("TaintToleration", "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate")
    );
    let toleration = |key: &str, operator: &str, value: &str, effect: &str| {
        let text = |t: &str| (!t.is_empty()).then(|| t.to_owned());
        Toleration {
            key: text(key),
            operator: text(operator),
            value: text(value),
            effect: text(effect),
            toleration_seconds: None,
        }
    };
    for (toleration, tolerated) in [
        (toleration("k", "", "v", ""), true),
        (toleration("k", "Equal", "w", ""), false),
        (toleration("", "Exists", "", ""), true),
        (toleration("k", "Exists", "", "NoExecute"), true),
        (toleration("k", "Exists", "", "NoSchedule"), false),
        (toleration("other", "Exists", "", ""), false),
        (toleration("k", "Gt", "1", ""), false),
    ] {
        let mut p = named("p", &[]);
        spec(&mut p).tolerations = Some(vec![toleration.clone()]);
        assert_eq!(node.reason(&p, &[]).is_empty(), tolerated, "{toleration:?}");
    }
    let mut fixed = named("p", &[]);
    fixed.metadata.annotations = Some([("kubernetes.io/config.source".to_owned(), "file".to_owned())].into());
    assert_eq!(node.reason(&fixed, &[]), "");
}

#[test]
fn sysctls_must_be_allowed_and_the_pods_own() {
    let node = Node::new();
    let check = |name: &str, change: fn(&mut PodSpec)| {
        let mut p = named("p", &[]);
        let sysctls = Some(vec![Sysctl { name: name.into(), value: "1".into() }]);
        spec(&mut p).security_context = Some(PodSecurityContext { sysctls, ..PodSecurityContext::default() });
        change(spec(&mut p));
        let result = node.admit(&p, &[]);
        assert!(result.as_ref().err().is_none_or(|r| r.reason == "SysctlForbidden"));
        result.err().map(|rejection| rejection.message)
    };
    for allowed in ["net.ipv4.tcp_syncookies", "net/ipv4/tcp_syncookies", "kernel.msgmax", "net.core.somaxconn"] {
        assert_eq!(check(allowed, |_| ()), None, "{allowed}");
    }
    let message = |text: &str| Some(format!("forbidden sysctl: {text}"));
    assert_eq!(check("kernel.panic", |_| ()), message("\"kernel.panic\" not allowlisted"));
    assert_eq!(
        check("net.ipv4.tcp_syncookies", |s| s.host_network = Some(true)),
        message("\"net.ipv4.tcp_syncookies\" not allowed with host Net enabled")
    );
    assert_eq!(
        check("kernel.msgmax", |s| s.host_ipc = Some(true)),
        message("\"kernel.msgmax\" not allowed with host IPC enabled")
    );
    assert!(SysctlAllowlist::new(&["kernel.*".to_owned()]).is_err());
    assert!(SysctlAllowlist::new(&["vm.swappiness".to_owned()]).is_err());
}

#[test]
fn other_systems_and_unknown_features_are_refused() {
    let mut node = Node::new();
    let mut p = named("p", &[]);
    p.metadata.labels = Some([("kubernetes.io/os".to_owned(), "windows".to_owned())].into());
    assert_eq!(node.reason(&p, &[]), "PodOSSelectorNodeLabelDoesNotMatch");
    let mut p = named("p", &[]);
    spec(&mut p).os = Some(PodOS { name: "windows".into() });
    assert_eq!(node.reason(&p, &[]), "PodOSNotSupported");

    let mut restart = named("p", &[]);
    let rule = ContainerRestartRule { action: "RestartAllContainers".into(), exit_codes: None };
    spec(&mut restart).containers[0].restart_policy_rules = Some(vec![rule]);
    let rejection = node.admit(&restart, &[]).unwrap_err();
    assert_eq!(rejection.reason, "PodFeatureUnsupported");
    assert!(rejection.message.ends_with("not available: RestartAllContainersOnContainerExits"));
    node.features.insert("RestartAllContainersOnContainerExits".into());
    assert_eq!(node.reason(&restart, &[]), "");

    node.all = false;
    let mut strict = named("p", &[]);
    let policy = Some("Strict".to_owned());
    spec(&mut strict).security_context =
        Some(PodSecurityContext { supplemental_groups_policy: policy, ..PodSecurityContext::default() });
    assert_eq!(node.reason(&strict, &[]), "SupplementalGroupsPolicyNotSupported");
    let mut leveled = named("p", &[]);
    spec(&mut leveled).resources = container("x", &[("cpu", "1")], &[]).resources;
    assert_eq!(node.reason(&leveled, &[]), "PodLevelResourcesNotSupported");

    let mut armored = named("p", &[]);
    let profile = Some(AppArmorProfile { type_: "RuntimeDefault".into(), localhost_profile: None });
    spec(&mut armored).security_context =
        Some(PodSecurityContext { app_armor_profile: profile, ..PodSecurityContext::default() });
    let rejection = node.admit(&armored, &[]).unwrap_err();
    assert_eq!(
        (rejection.reason.as_str(), rejection.message.as_str()),
        ("AppArmor", "Cannot enforce AppArmor: AppArmor is not enabled on the host")
    );
    armored.status.get_or_insert_default().phase = Some("Running".into());
    assert_eq!(node.reason(&armored, &[]), "");
}

#[test]
fn room_is_made_for_critical_pods_only_where_that_helps() {
    let node = Node::new();
    let mut critical = named("p", &[("cpu", "3")]);
    spec(&mut critical).priority = Some(2_000_000_000);
    assert_eq!(node.admit(&critical, &[]).unwrap_err().insufficient.len(), 1);
    spec(&mut critical).node_selector = Some([("zone".to_owned(), "b".to_owned())].into());
    let rejection = node.admit(&critical, &[]).unwrap_err();
    assert_eq!((rejection.reason.as_str(), rejection.insufficient.len()), ("NodeAffinity", 0));
}

#[test]
fn manifests_with_wrong_quantities_are_refused() {
    let rejection = Node::new().admit(&named("p", &[("cpu", "one")]), &[]).unwrap_err();
    assert_eq!(rejection.reason, "UnexpectedAdmissionError");
    assert!(rejection.message.contains("spec.containers[0].resources.requests[cpu]"), "{rejection:?}");
}

proptest::proptest! {
    #[test]
    fn what_fits_alone_is_refused_only_for_lack_of_room(milli in 1_i64..4000, used in 0_i64..4000) {
        let node = Node::new();
        let others = [named("o", &[("cpu", &format!("{used}m"))])];
        let admitted = node.admit(&named("p", &[("cpu", &format!("{milli}m"))]), &others).is_ok();
        proptest::prop_assert_eq!(admitted, milli + used <= 2000);
    }
}
