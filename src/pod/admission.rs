//! Whether the node takes a Pod that is bound to it.
//!
//! Source: `pkg/kubelet/lifecycle/{predicate,handlers}.go`, `pkg/scheduler/eventhandlers.go` (`AdmissionCheck`),
//! `pkg/kubelet/sysctl`. Reasons and messages are API: controllers and users read them. Eviction, node shutdown
//! and device allocation refuse Pods as well; they know more than a manifest, and are asked elsewhere.

mod affinity;
mod fit;
pub mod preemption;
mod sysctl;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Pod, PodSpec, Taint};

use crate::resources::amounts::{self, Amounts};
use crate::resources::qos;

pub use fit::Insufficient;
pub use sysctl::{SysctlAllowlist, UnknownSysctl};

/// What admission knows about the node.
#[derive(Clone, Copy, Debug)]
pub struct NodeInfo<'a> {
    /// Name of the Node.
    pub name: &'a str,
    /// Labels of the Node. On a rejection for `NodeAffinity` fetch them anew and ask again: they may be stale.
    pub labels: &'a BTreeMap<String, String>,
    /// Taints of the Node.
    pub taints: &'a [Taint],
    /// What Pods may request, `pods` included.
    pub allocatable: &'a Amounts,
    /// `status.declaredFeatures`.
    pub declared_features: &'a BTreeSet<String>,
    /// `status.features.supplementalGroupsPolicy`.
    pub supplemental_groups_policy: bool,
    /// Sysctls that Pods may set.
    pub sysctls: &'a SysctlAllowlist,
    /// Whether the kernel enforces AppArmor.
    pub apparmor: bool,
    /// Whether the `PodLevelResources` feature is on.
    pub pod_level_resources: bool,
}

/// Why a Pod is not taken. Terminal: the Pod's phase becomes `Failed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// `status.reason`, and the reason of the event.
    pub reason: String,
    /// Message of the event.
    pub message: String,
    /// Shortages, when they are the only obstacles: preempting other Pods makes room for a critical one.
    pub insufficient: Vec<Insufficient>,
}

impl Rejection {
    fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into(), insufficient: Vec::new() }
    }

    /// `status.message`.
    #[must_use]
    pub fn status_message(&self) -> String {
        format!("Pod was rejected: {}", self.message)
    }
}

const OS_LABEL: &str = "kubernetes.io/os";
const OS: &str = "linux";

/// Decides about a Pod, given all others that have resources on the node. Of several obstacles the first one counts,
/// in the order of a kubelet.
pub fn admit<'a>(pod: &Pod, others: impl IntoIterator<Item = &'a Pod>, node: &NodeInfo<'_>) -> Result<(), Rejection> {
    let Some(spec) = &pod.spec else {
        return Err(Rejection::new("UnexpectedAdmissionError", "the Pod has no spec"));
    };
    amounts::validate(pod).map_err(|error| Rejection::new("UnexpectedAdmissionError", error.to_string()))?;
    node.sysctls
        .check(spec)
        .map_err(|error| Rejection::new("SysctlForbidden", format!("forbidden sysctl: {error}")))?;
    os(pod, spec)?;
    groups_policy(spec, node)?;
    general(pod, spec, others, node)?;
    apparmor(pod, spec, node)?;
    if amounts::has_pod_level_resources(pod) && !node.pod_level_resources {
        return Err(Rejection::new("PodLevelResourcesNotSupported", "PodLevelResources feature gate is disabled"));
    }
    declared_features(spec, node)
}

fn os(pod: &Pod, spec: &PodSpec) -> Result<(), Rejection> {
    if pod.metadata.labels.as_ref().and_then(|labels| labels.get(OS_LABEL)).is_some_and(|os| os != OS) {
        return Err(Rejection::new(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    if spec.os.as_ref().is_some_and(|os| os.name != OS) {
        return Err(Rejection::new("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"));
    }
    Ok(())
}

fn groups_policy(spec: &PodSpec, node: &NodeInfo<'_>) -> Result<(), Rejection> {
    let policy = spec.security_context.as_ref().and_then(|s| s.supplemental_groups_policy.as_deref());
    if policy == Some("Strict") && !node.supplemental_groups_policy {
        let message = "SupplementalGroupsPolicy=Strict is not supported in this node";
        return Err(Rejection::new("SupplementalGroupsPolicyNotSupported", message));
    }
    Ok(())
}

/// What the scheduler has checked as well: resources, affinity, name, ports; and taints, except for static Pods.
fn general<'a>(
    pod: &Pod,
    spec: &PodSpec,
    others: impl IntoIterator<Item = &'a Pod>,
    node: &NodeInfo<'_>,
) -> Result<(), Rejection> {
    let others: Vec<&Pod> = others.into_iter().filter(|other| other.metadata.uid != pod.metadata.uid).collect();
    let failed = |predicate: &str, why: &str| Rejection::new(predicate, format!("Predicate {predicate} failed: {why}"));

    let insufficient = fit::shortages(pod, &others, node);
    let mut obstacles = Vec::new();
    if !affinity::matches(spec, node.name, node.labels) {
        obstacles.push(failed("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"));
    }
    if spec.node_name.as_deref().is_some_and(|name| !name.is_empty() && name != node.name) {
        obstacles.push(failed("NodeName", "node(s) didn't match the requested node name"));
    }
    if fit::ports_conflict(spec, &others) {
        obstacles.push(failed("NodePorts", "node(s) didn't have free ports for the requested pod ports"));
    }
    if !qos::is_static(pod) && affinity::has_untolerated_taint(spec, node.taints) {
        obstacles.push(failed("TaintToleration", "node(s) had taints that the pod didn't tolerate"));
    }
    match insufficient.first() {
        // for a critical Pod room can be made, but nothing else can be helped
        Some(_) if qos::is_critical(pod) && !obstacles.is_empty() => Err(obstacles.swap_remove(0)),
        Some(shortage) => {
            let rejection = Rejection::new(format!("OutOf{}", shortage.resource), shortage.to_string());
            Err(Rejection { insufficient: if obstacles.is_empty() { insufficient } else { Vec::new() }, ..rejection })
        }
        None if obstacles.is_empty() => Ok(()),
        None => Err(obstacles.swap_remove(0)),
    }
}

/// Types of the AppArmor profiles that a Pod asks for.
fn apparmor_types<'a>(pod: &'a Pod, spec: &'a PodSpec) -> impl Iterator<Item = &'a str> {
    let of_pod = spec.security_context.as_ref().and_then(|s| s.app_armor_profile.as_ref());
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let fields = containers.filter_map(|c| c.security_context.as_ref()?.app_armor_profile.as_ref());
    let annotations = pod.metadata.annotations.iter().flatten();
    let old = annotations
        .filter(|(key, _)| key.starts_with("container.apparmor.security.beta.kubernetes.io/"))
        .map(|(_, value)| if value == "unconfined" { "Unconfined" } else { value.as_str() });
    of_pod.into_iter().chain(fields).map(|profile| profile.type_.as_str()).chain(old)
}

fn apparmor(pod: &Pod, spec: &PodSpec, node: &NodeInfo<'_>) -> Result<(), Rejection> {
    // a Pod that runs has been admitted before
    let pending = pod.status.as_ref().and_then(|s| s.phase.as_deref()).is_none_or(|phase| phase == "Pending");
    if pending && !node.apparmor && apparmor_types(pod, spec).any(|profile| profile != "Unconfined") {
        return Err(Rejection::new("AppArmor", "Cannot enforce AppArmor: AppArmor is not enabled on the host"));
    }
    Ok(())
}

/// Features that a Pod cannot run without, which a node declares when it has them (KEP-5328).
fn declared_features(spec: &PodSpec, node: &NodeInfo<'_>) -> Result<(), Rejection> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut rules = containers.flat_map(|c| c.restart_policy_rules.iter().flatten());
    let needed = [
        ("RestartAllContainersOnContainerExits", rules.any(|rule| rule.action == "RestartAllContainers")),
        ("UserNamespacesHostNetworkSupport", spec.host_network == Some(true) && spec.host_users == Some(false)),
    ];
    let missing: Vec<&str> = needed
        .into_iter()
        .filter(|(feature, needed)| *needed && !node.declared_features.contains(*feature))
        .map(|(feature, _)| feature)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("Pod requires node features that are not available: {}", missing.join(", "));
    Err(Rejection::new("PodFeatureUnsupported", message))
}

#[cfg(test)]
mod tests;
