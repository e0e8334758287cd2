//! QoS class, criticality and the kernel's out-of-memory preference.
//!
//! Source: `pkg/apis/core/v1/helper/qos/qos.go`, `pkg/kubelet/qos/policy.go`, `pkg/kubelet/types/pod_update.go`.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use super::amounts::{self, CPU, MEMORY};

/// `oom_score_adj` of Guaranteed and node-critical Pods: the last that the kernel kills.
pub const GUARANTEED_OOM_SCORE_ADJ: i32 = -997;
/// `oom_score_adj` of BestEffort Pods: the first that the kernel kills.
pub const BEST_EFFORT_OOM_SCORE_ADJ: i32 = 1000;
/// Priority from which a Pod is critical (`system-cluster-critical`).
pub const SYSTEM_CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// `status.qosClass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QosClass {
    /// Every container has equal cpu and memory requests and limits.
    Guaranteed,
    /// Neither of the others.
    Burstable,
    /// No container asks for cpu or memory.
    BestEffort,
}

impl QosClass {
    /// The name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// The class of a Pod: what the API server has written in its status, or else computed from its containers.
#[must_use]
pub fn qos_class(pod: &Pod) -> QosClass {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => QosClass::Guaranteed,
        Some("Burstable") => QosClass::Burstable,
        Some("BestEffort") => QosClass::BestEffort,
        _ => compute_qos_class(pod),
    }
}

/// The class that follows from a Pod's resources alone.
#[must_use]
pub fn compute_qos_class(pod: &Pod) -> QosClass {
    let Some(spec) = &pod.spec else { return QosClass::BestEffort };
    if amounts::has_pod_level_resources(pod) {
        return class_of(spec.resources.as_ref());
    }
    let all = spec.init_containers.iter().flatten().chain(&spec.containers);
    let mut classes = all.map(|c| class_of(c.resources.as_ref()));
    let Some(first) = classes.next() else { return QosClass::BestEffort };
    if classes.all(|class| class == first) { first } else { QosClass::Burstable }
}

fn class_of(resources: Option<&ResourceRequirements>) -> QosClass {
    let (requests, limits) = (amounts::requests(resources), amounts::limits(resources));
    let class = |name: &str| match (requests.nanos(name), limits.nanos(name)) {
        (request, limit) if request != limit => QosClass::Burstable,
        (0, _) => QosClass::BestEffort,
        _ => QosClass::Guaranteed,
    };
    if class(CPU) == class(MEMORY) { class(CPU) } else { QosClass::Burstable }
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// A Pod from a file or URL of the node, not from the API server.
#[must_use]
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, "kubernetes.io/config.source").is_some_and(|source| source != "api")
}

/// The API server's image of a static Pod.
#[must_use]
pub fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, "kubernetes.io/config.mirror").is_some()
}

/// A Pod that is never evicted and may preempt others on the node: static, mirror, or of system priority.
#[must_use]
pub fn is_critical(pod: &Pod) -> bool {
    let priority = pod.spec.as_ref().and_then(|s| s.priority);
    is_static(pod) || is_mirror(pod) || priority.is_some_and(|p| p >= SYSTEM_CRITICAL_PRIORITY)
}

/// A critical Pod of class `system-node-critical`.
#[must_use]
pub fn is_node_critical(pod: &Pod) -> bool {
    let class = pod.spec.as_ref().and_then(|s| s.priority_class_name.as_deref());
    is_critical(pod) && class == Some("system-node-critical")
}

/// `oom_score_adj` of a container's processes. `memory_capacity` is the node's, in bytes.
#[must_use]
pub fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i32 {
    if is_node_critical(pod) {
        return GUARANTEED_OOM_SCORE_ADJ;
    }
    match qos_class(pod) {
        QosClass::Guaranteed => return GUARANTEED_OOM_SCORE_ADJ,
        QosClass::BestEffort => return BEST_EFFORT_OOM_SCORE_ADJ,
        QosClass::Burstable => {}
    }
    let spread = unallocated_memory_per_container(pod);
    let score =
        |request: i64| 1000 - 1000 * (i128::from(request) + i128::from(spread)) / i128::from(memory_capacity.max(1));
    let mut adj = score(amounts::requests(container.resources.as_ref()).value(MEMORY));
    let init_containers = pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten());
    if amounts::is_sidecar(container) && init_containers.into_iter().any(|c| c.name == container.name) {
        // a sidecar must not be killed before the containers that it serves
        let smallest = pod.spec.iter().flat_map(|s| &s.containers);
        let smallest = smallest.map(|c| amounts::requests(c.resources.as_ref()).value(MEMORY)).min();
        adj = adj.min(smallest.map_or(adj, score));
    }
    // above every Guaranteed and below every BestEffort container
    let clamped = adj.clamp(i128::from(1000 + GUARANTEED_OOM_SCORE_ADJ), i128::from(BEST_EFFORT_OOM_SCORE_ADJ - 1));
    i32::try_from(clamped).unwrap_or(BEST_EFFORT_OOM_SCORE_ADJ - 1)
}

/// The part of a Pod-level memory request that no container asks for, divided among them, in bytes.
fn unallocated_memory_per_container(pod: &Pod) -> i64 {
    let Some(spec) = &pod.spec else { return 0 };
    let pod_level = amounts::requests(spec.resources.as_ref()).value(MEMORY);
    let containers = spec.containers.len() + spec.init_containers.as_ref().map_or(0, Vec::len);
    let rest = pod_level.saturating_sub(amounts::container_requests(pod).value(MEMORY)).max(0);
    i64::try_from(containers).ok().and_then(|n| rest.checked_div(n)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::super::fixture::{container, pod};
    use super::*;

    const GI: i64 = 1 << 30;

    #[test]
    fn classes() {
        let full = [("cpu", "1"), ("memory", "1Gi")];
        for (containers, class) in [
            (vec![container("a", &[], &[])], QosClass::BestEffort),
            (vec![container("a", &full, &full)], QosClass::Guaranteed),
            (vec![container("a", &full, &full), container("b", &[], &[])], QosClass::Burstable),
            (vec![container("a", &full, &full[..1])], QosClass::Burstable),
            (vec![container("a", &full[..1], &full[..1])], QosClass::Burstable),
            (vec![container("a", &[("cpu", "1000m"), ("memory", "1Gi")], &full)], QosClass::Guaranteed),
            (vec![container("a", &[("example.com/gpu", "1")], &[])], QosClass::BestEffort),
            (vec![container("a", &[("cpu", "0")], &[])], QosClass::BestEffort),
        ] {
            assert_eq!(qos_class(&pod(containers.clone())), class, "{containers:?}");
        }
    }

    #[test]
    fn init_containers_count_for_the_class() {
        let full = [("cpu", "1"), ("memory", "1Gi")];
        let mut p = pod(vec![container("a", &full, &full)]);
        p.spec.as_mut().unwrap().init_containers = Some(vec![container("i", &[], &[])]);
        assert_eq!(qos_class(&p), QosClass::Burstable);
    }

    #[test]
    fn oom_scores_follow_the_request() {
        for (request, adj) in [("0", 999), ("1", 999), ("4Gi", 500), ("8Gi", 3), ("800Mi", 903)] {
            let c = container("a", &[("memory", request), ("cpu", "1")], &[]);
            assert_eq!(oom_score_adj(&pod(vec![c.clone()]), &c, 8 * GI), adj, "{request}");
        }
    }

    #[test]
    fn sidecars_are_killed_no_earlier_than_what_they_serve() {
        let mut sidecar = container("s", &[("memory", "1Mi")], &[]);
        sidecar.restart_policy = Some("Always".into());
        let mut p = pod(vec![container("a", &[("memory", "4Gi")], &[]), container("b", &[("memory", "2Gi")], &[])]);
        p.spec.as_mut().unwrap().init_containers = Some(vec![sidecar.clone()]);
        assert_eq!(oom_score_adj(&p, &sidecar, 8 * GI), 750);
    }

    #[test]
    fn pod_level_requests_are_spread() {
        let a = container("a", &[("memory", "1Gi")], &[]);
        let mut p = pod(vec![a.clone(), container("b", &[], &[])]);
        p.spec.as_mut().unwrap().resources = Some(ResourceRequirements {
            requests: Some([("memory".into(), Quantity("5Gi".into()))].into()),
            ..Default::default()
        });
        // (1 + (5 - 1) / 2) / 8
        assert_eq!(oom_score_adj(&p, &a, 8 * GI), 625);
    }

    #[test]
    fn node_critical_pods_are_protected_whatever_they_request() {
        let c = container("a", &[], &[]);
        let mut p = pod(vec![c.clone()]);
        let spec = p.spec.as_mut().unwrap();
        spec.priority = Some(2_000_001_000);
        spec.priority_class_name = Some("system-node-critical".into());
        assert_eq!(oom_score_adj(&p, &c, GI), GUARANTEED_OOM_SCORE_ADJ);
        assert!(is_critical(&p));
    }

    proptest::proptest! {
        #[test]
        fn burstable_stays_between_the_other_classes(request in 1_i64.., capacity in 1_i64..) {
            let c = container("a", &[("memory", &request.to_string())], &[]);
            let adj = oom_score_adj(&pod(vec![c.clone()]), &c, capacity);
            proptest::prop_assert!((3..=999).contains(&adj), "{adj}");
        }
    }
}
