//! Resources and host ports.
//!
//! Source: `pkg/scheduler/framework/plugins/{noderesources/fit,nodeports/node_ports}.go`.

use std::fmt;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::NodeInfo;
use crate::resources::amounts::{self, Amounts, CPU, HUGE_PAGES_PREFIX, MEMORY};

const EPHEMERAL_STORAGE: &str = "ephemeral-storage";
const PODS: &str = "pods";

/// A resource that the node does not have enough of: cpu in thousandths, others in units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Insufficient {
    /// Name of the resource.
    pub resource: String,
    /// What the Pod asks for.
    pub requested: i64,
    /// What other Pods have.
    pub used: i64,
    /// What there is.
    pub capacity: i64,
}

impl fmt::Display for Insufficient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resource, requested, used, capacity } = self;
        write!(
            f,
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    }
}

fn measure(amounts: &Amounts, name: &str) -> i64 {
    if name == CPU { amounts.milli(CPU) } else { amounts.value(name) }
}

/// What a Pod has of a resource, in the unit of [`Insufficient`].
pub(super) fn request_of(pod: &Pod, resource: &str) -> i64 {
    if resource == PODS { 1 } else { measure(&amounts::pod_requests(pod), resource) }
}

/// What there is too little of, in the scheduler's order.
pub(super) fn shortages(pod: &Pod, others: &[&Pod], node: &NodeInfo<'_>) -> Vec<Insufficient> {
    let mut shortages = Vec::new();
    let mut check = |resource: &str, requested: i64, used: i64, capacity: i64| {
        if requested > 0 && requested > capacity.saturating_sub(used) {
            shortages.push(Insufficient { resource: resource.to_owned(), requested, used, capacity });
        }
    };
    let count = i64::try_from(others.len()).unwrap_or(i64::MAX);
    check(PODS, 1, count, node.allocatable.value(PODS));

    let requests = amounts::pod_requests(pod);
    let of_others: Vec<Amounts> = others.iter().map(|other| amounts::pod_requests(other)).collect();
    let scalars = requests.iter().map(|(name, _)| name).filter(|name| is_scalar(name));
    for name in [CPU, MEMORY, EPHEMERAL_STORAGE].into_iter().chain(scalars) {
        // resources of the cluster, which no node has, are none of the node's business
        if is_extended(name) && !node.allocatable.lists(name) {
            continue;
        }
        let used = of_others.iter().map(|amounts| measure(amounts, name)).fold(0, i64::saturating_add);
        check(name, measure(&requests, name), used, measure(node.allocatable, name));
    }
    shortages
}

/// Not one of Kubernetes' own: with a domain other than `kubernetes.io`.
fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.")
}

/// Counted like cpu and memory, but by name.
fn is_scalar(name: &str) -> bool {
    name.contains('/') || name.starts_with(HUGE_PAGES_PREFIX) || name.starts_with("attachable-volumes-")
}

/// Address, protocol and port of everything that a Pod wants on the host.
fn host_ports(spec: &PodSpec) -> impl Iterator<Item = (&str, &str, i32)> {
    let sidecars = spec.init_containers.iter().flatten().filter(|c| amounts::is_sidecar(c));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    ports.filter_map(|port| {
        let ip = port.host_ip.as_deref().filter(|ip| !ip.is_empty()).unwrap_or(ANY);
        let protocol = port.protocol.as_deref().filter(|protocol| !protocol.is_empty()).unwrap_or("TCP");
        Some((ip, protocol, port.host_port.filter(|port| *port > 0)?))
    })
}

const ANY: &str = "0.0.0.0";

pub(super) fn ports_conflict(spec: &PodSpec, others: &[&Pod]) -> bool {
    host_ports(spec).any(|(ip, protocol, port)| {
        let taken = others.iter().filter_map(|other| other.spec.as_ref()).flat_map(host_ports);
        let mut same = taken.filter(|(_, p, n)| (*p, *n) == (protocol, port));
        same.any(|(other, ..)| other == ip || other == ANY || ip == ANY)
    })
}
