//! What all Pods together may use, and how the QoS tiers share it.
//!
//! Source: `pkg/kubelet/cm/{node_container_manager,qos_container_manager}_linux.go`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::node::{Node, blocking};
use crate::config::KubeletConfiguration;
use crate::node::events::EventType;
use crate::node::{MachineInfo, status};
use crate::resources::amounts::{Amounts, CPU, MEMORY};
use crate::resources::limits::{Limits, node_limits};
use crate::resources::{machine, quantity};

/// Pause after the kernel has refused the limits: more memory is in use than they allow, and Pods have to end first.
const RETRY: Duration = Duration::from_secs(60);

/// How long changes of Pods are gathered before the tiers are weighed again.
const SETTLE: Duration = Duration::from_secs(1);

/// Process IDs, as reservations name them.
const PID: &str = "pid";

/// Limits the cgroup above all Pods, now or as soon as the kernel takes it, and the reserved ones.
///
/// # Errors
/// A sentence that names the field if a reserved cgroup cannot be limited.
pub(super) async fn enforce(node: &Arc<Node>, machine: &MachineInfo) -> Result<(), String> {
    let kubelet = &node.config.kubelet;
    let amounts = amounts(kubelet, machine, machine::max_tasks());
    let limits = node_limits(&amounts, node.cgroups.policy(), false);
    for (key, compressible) in [("", false), ("-compressible", true)] {
        for (name, cgroup, reserved) in [
            ("system-reserved", &kubelet.system_reserved_cgroup, &kubelet.system_reserved),
            ("kube-reserved", &kubelet.kube_reserved_cgroup, &kubelet.kube_reserved),
        ] {
            let name = format!("{name}{key}");
            if !kubelet.enforce_node_allocatable.contains(&name) {
                continue;
            }
            let limits = node_limits(&listed(reserved), node.cgroups.policy(), compressible);
            let (cgroups, path) = (node.cgroups.clone(), cgroup.clone());
            blocking(move || cgroups.enforce_reserved(&path, &limits)).await.map_err(|error| {
                format!(
                    "enforceNodeAllocatable {name}: cannot limit {cgroup}: {error}; make the cgroup, or take {name} out"
                )
            })?;
        }
    }
    tokio::spawn(enforce_pods(node.clone(), limits));
    Ok(())
}

async fn enforce_pods(node: Arc<Node>, limits: Limits) {
    loop {
        let (cgroups, wanted) = (node.cgroups.clone(), limits.clone());
        match blocking(move || cgroups.enforce_node_allocatable(&wanted)).await {
            Ok(()) => {
                let message = "Updated Node Allocatable limit across pods".to_owned();
                node.events.node_event(EventType::Normal, "NodeAllocatableEnforced", message);
                return;
            }
            Err(error) => {
                let cgroup = node.cgroups.root_path();
                let message = format!("Failed to update Node Allocatable Limits {cgroup:?}: {error}");
                node.events.node_event(EventType::Warning, "FailedNodeAllocatableEnforcement", message);
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Capacity, without reservations if they are enforced. What eviction keeps free is not taken off: its thresholds are
/// to be reached before the kernel's limit.
fn amounts(kubelet: &KubeletConfiguration, machine: &MachineInfo, max_tasks: Option<i64>) -> Amounts {
    let mut capacity = Amounts::default();
    capacity.set_value(CPU, i64::from(machine.cpus));
    capacity.set_value(MEMORY, machine.memory);
    for (name, bytes) in &machine.huge_pages {
        capacity.set_value(name, *bytes);
    }
    if let Some(most) = max_tasks {
        capacity.set_value(PID, most);
    }
    if !kubelet.enforce_node_allocatable.iter().any(|key| key == "pods") {
        return capacity;
    }
    let mut allocatable = Amounts::default();
    for (name, total) in capacity.iter() {
        allocatable.set_nanos(name, (total - status::reservation(name, kubelet)).max(0));
    }
    allocatable
}

/// The amounts of a reservation; they were validated.
fn listed(reserved: &BTreeMap<String, String>) -> Amounts {
    let mut amounts = Amounts::default();
    for (name, amount) in reserved {
        if let Ok(nanos) = quantity::nanos(amount) {
            amounts.set_nanos(name, nanos);
        }
    }
    amounts
}

/// Weighs the tiers by what their Pods request, whenever that changes. Runs until dropped.
pub(super) async fn weigh_tiers(node: Arc<Node>) {
    let mut pods = node.pods.changes();
    let mut current = Vec::new();
    loop {
        let views = node.pods.views();
        let active = views.iter().filter(|view| view.is_active());
        let wanted = node.cgroups.tier_limits(active.map(|view| &*view.desired.pod));
        if wanted != current {
            let (cgroups, limits) = (node.cgroups.clone(), wanted.clone());
            let written =
                blocking(move || limits.iter().try_for_each(|(path, limits)| cgroups.update(path, limits))).await;
            match written {
                Ok(()) => current = wanted,
                // the next change of a Pod is another try
                Err(error) => tracing::warn!(%error, "the QoS cgroups keep their old weights"),
            }
        }
        if pods.changed().await.is_err() {
            return;
        }
        // a Pod's start is a dozen changes, and a burst is hundreds: one sum for all of them
        tokio::time::sleep(SETTLE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::resources::limits::LimitPolicy;

    fn kubelet(enforced: &[&str]) -> KubeletConfiguration {
        let mut kubelet = Config::for_tests(std::path::Path::new("/t")).kubelet;
        kubelet.enforce_node_allocatable = enforced.iter().map(|key| (*key).to_owned()).collect();
        kubelet.system_reserved =
            [("cpu", "500m"), ("memory", "1Gi"), ("pid", "1000")].map(|(k, v)| (k.into(), v.into())).into();
        kubelet.kube_reserved = [("memory".into(), "1Gi".into())].into();
        kubelet
    }

    #[test]
    fn pods_are_limited_to_the_capacity_without_reservations() {
        let machine = MachineInfo {
            cpus: 4,
            memory: 8 << 30,
            huge_pages: [("hugepages-2Mi".to_owned(), 4 << 20)].into(),
            ..MachineInfo::default()
        };
        let policy = LimitPolicy { huge_page_sizes: vec![2 << 20], ..LimitPolicy::default() };
        let limits = |keys: &[&str]| node_limits(&amounts(&kubelet(keys), &machine, Some(32_768)), &policy, false);
        let enforced = limits(&["pods"]);
        assert_eq!((enforced.memory, enforced.pids, enforced.cpu_shares), (Some(6 << 30), Some(31_768), Some(3584)));
        assert_eq!(enforced.huge_pages, [(2 << 20, 4 << 20)].into());
        let none = limits(&["none"]);
        assert_eq!((none.memory, none.pids, none.cpu_shares), (Some(8 << 30), Some(32_768), Some(4096)));
        let mut greedy = kubelet(&["pods"]);
        greedy.kube_reserved = [("memory".into(), "80Gi".into())].into();
        assert_eq!(amounts(&greedy, &machine, None).value(MEMORY), 0);
    }

    #[test]
    fn a_compressible_reservation_limits_the_cpu_only() {
        let reserved = listed(&kubelet(&[]).system_reserved);
        let compressible = node_limits(&reserved, &LimitPolicy::default(), true);
        assert_eq!((compressible.cpu_shares, compressible.memory, compressible.pids), (Some(512), None, None));
        let whole = node_limits(&reserved, &LimitPolicy::default(), false);
        assert_eq!((whole.memory, whole.pids), (Some(1 << 30), Some(1000)));
    }
}
