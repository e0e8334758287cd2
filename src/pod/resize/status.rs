//! What the status says of resources: `resources`, `allocatedResources` and the two conditions.
//!
//! Source: `convertContainerStatusResources` and `convertToAPIPodLevelResourcesStatus` in
//! `pkg/kubelet/kubelet_pods.go`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PodCondition, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{CpuMemory, Pending, Progress};
use crate::pod::model::{Desired, Observed, Phase};
use crate::pod::status::api_time;
use crate::resources::amounts::{Amounts, CPU, MEMORY};
use crate::resources::cgroup::Enforced;
use crate::resources::limits::{
    DEFAULT_CPU_PERIOD, MIN_SHARES, milli_cpu_to_quota, milli_cpu_to_shares, quota_to_milli_cpu, shares_to_milli_cpu,
    shares_to_weight, weight_to_shares,
};
use crate::resources::quantity::{from_bytes, from_milli};

/// The condition of a resize that was not allocated.
pub const PENDING: &str = "PodResizePending";
/// The condition of a resize that is being carried out.
pub const IN_PROGRESS: &str = "PodResizeInProgress";

/// The smallest cpu limit that the kernel enforces, in thousandths; lower ones are shown as they were asked for.
const MIN_MILLI_CPU_LIMIT: i64 = 10;

/// The conditions of resizes, in kubelet's order.
#[must_use]
pub fn conditions(observed: &Observed) -> Vec<PodCondition> {
    let pending = observed.resize.pending.as_ref().map(|pending: &Pending| PodCondition {
        type_: PENDING.to_owned(),
        status: "True".to_owned(),
        reason: Some(pending.reason().to_owned()),
        message: Some(pending.message.clone()),
        last_transition_time: Some(api_time(pending.since)),
        last_probe_time: None,
        observed_generation: pending.generation,
    });
    let progress = observed.resize.progress.as_ref().map(|progress: &Progress| PodCondition {
        type_: IN_PROGRESS.to_owned(),
        status: "True".to_owned(),
        reason: progress.error.as_ref().map(|_| "Error".to_owned()),
        message: progress.error.clone(),
        last_transition_time: Some(api_time(progress.since)),
        last_probe_time: None,
        observed_generation: progress.generation,
    });
    pending.into_iter().chain(progress).collect()
}

/// Puts a quantity where another amount stands; the same amount stays as it is written.
fn put(list: &mut BTreeMap<String, Quantity>, name: &str, quantity: Quantity) {
    let amount = |quantity: &Quantity| crate::resources::quantity::nanos(&quantity.0).ok();
    if list.get(name).and_then(amount) != amount(&quantity) {
        list.insert(name.to_owned(), quantity);
    }
}

/// `resources` of a container: what was allocated, with what a running instance really has.
#[must_use]
pub fn container_resources(allocated: Option<&ResourceRequirements>, has: Option<&CpuMemory>) -> ResourceRequirements {
    let mut shown = allocated.cloned().unwrap_or_default();
    let Some(has) = has else { return shown };
    if let Some(limits) = &mut shown.limits {
        let wanted = Amounts::of(Some(limits)).milli(CPU);
        if has.cpu_limit > 0 {
            let quota = milli_cpu_to_quota(has.cpu_limit, DEFAULT_CPU_PERIOD);
            let limit = quota_to_milli_cpu(quota, DEFAULT_CPU_PERIOD);
            if limit > MIN_MILLI_CPU_LIMIT || wanted > MIN_MILLI_CPU_LIMIT {
                put(limits, CPU, from_milli(limit));
            }
        }
        if has.memory_limit > 0 {
            put(limits, MEMORY, from_bytes(has.memory_limit));
        }
    }
    if let Some(requests) = &mut shown.requests {
        let wanted = Amounts::of(Some(requests)).milli(CPU);
        let request = if has.cpu_request > 0 { has.cpu_request } else { has.cpu_limit };
        show_cpu_request(requests, wanted, shares_to_milli_cpu(milli_cpu_to_shares(request)));
        if has.memory_request > 0 {
            put(requests, MEMORY, from_bytes(has.memory_request));
        }
    }
    shown
}

/// The kernel's smallest weight stands for every smaller request.
fn show_cpu_request(requests: &mut BTreeMap<String, Quantity>, wanted: i64, request: i64) {
    let least = i64::try_from(MIN_SHARES).unwrap_or(i64::MAX);
    if request > least || wanted > least {
        put(requests, CPU, from_milli(request));
    }
}

/// `status.allocatedResources`.
#[must_use]
pub fn pod_allocated(desired: &Desired) -> Option<BTreeMap<String, Quantity>> {
    Some(&*desired.requests).filter(|list| !list.is_empty()).cloned()
}

/// `status.resources`: what was allocated, and while the Pod runs what the kernel enforces for it as a whole.
#[must_use]
pub fn pod_resources(desired: &Desired, observed: &Observed, phase: Phase) -> ResourceRequirements {
    let mut shown = desired.pod.spec.as_ref().and_then(|spec| spec.resources.clone()).unwrap_or_default();
    let requests = &*desired.requests;
    let enforced = observed.resize.enforced.as_ref().filter(|_| phase == Phase::Running);
    let Some(enforced) = enforced else {
        shown.requests = pod_allocated(desired);
        shown.limits = Some(&*desired.limits).filter(|list| !list.is_empty()).cloned();
        return shown;
    };
    let (mut own, mut limits) = (shown.requests.take().unwrap_or_default(), shown.limits.take().unwrap_or_default());
    let wanted = Amounts::of(Some(&own)).milli(CPU);
    // weights of cgroup v2 are coarse: a request that has become this one is the same
    if round_trip(milli_cpu_to_shares(wanted)) != enforced.cpu_shares {
        show_cpu_request(&mut own, wanted, shares_to_milli_cpu(enforced.cpu_shares));
    }
    if let (false, Some(memory)) = (own.contains_key(MEMORY), requests.get(MEMORY)) {
        own.insert(MEMORY.to_owned(), memory.clone());
    }
    show_limits(&mut limits, enforced);
    shown.requests = Some(own).filter(|list| !list.is_empty());
    shown.limits = Some(limits).filter(|list| !list.is_empty());
    shown
}

fn show_limits(limits: &mut BTreeMap<String, Quantity>, enforced: &Enforced) {
    let wanted = Amounts::of(Some(limits)).milli(CPU);
    if let Some(quota) = enforced.cpu_quota {
        let limit = quota_to_milli_cpu(quota, enforced.cpu_period);
        if limit > MIN_MILLI_CPU_LIMIT || wanted > MIN_MILLI_CPU_LIMIT {
            put(limits, CPU, from_milli(limit));
        }
    }
    if let Some(memory) = enforced.memory {
        put(limits, MEMORY, from_bytes(memory));
    }
}

fn round_trip(shares: u64) -> u64 {
    weight_to_shares(shares_to_weight(shares))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::fixture::{container, pod};

    fn shown(requests: &[(&str, &str)], limits: &[(&str, &str)], has: CpuMemory) -> Vec<String> {
        let allocated = container("a", requests, limits).resources;
        let shown = container_resources(allocated.as_ref(), Some(&has));
        let text = |list: Option<BTreeMap<String, Quantity>>| {
            list.into_iter().flatten().map(|(name, quantity)| format!("{name}={}", quantity.0)).collect::<Vec<_>>()
        };
        [text(shown.requests), text(shown.limits)].concat()
    }

    #[test]
    fn a_running_container_shows_what_it_has() {
        let old = CpuMemory { cpu_request: 100, cpu_limit: 200, memory_request: 1 << 20, memory_limit: 2 << 20 };
        let wanted = [("cpu", "150m"), ("memory", "3Mi")];
        assert_eq!(shown(&wanted, &wanted, old), ["cpu=100m", "memory=1Mi", "cpu=200m", "memory=2Mi"]);
        // limits that are only being added are shown as they are to be
        let none = CpuMemory { cpu_limit: 0, memory_limit: 0, ..old };
        assert_eq!(shown(&wanted, &wanted, none)[2..], ["cpu=150m", "memory=3Mi"]);
        let unlimited = container_resources(container("a", &[], &[]).resources.as_ref(), Some(&old));
        assert_eq!(unlimited.limits.unwrap_or_default(), BTreeMap::new());
    }

    #[test]
    fn what_the_kernel_cannot_tell_apart_is_shown_as_asked_for() {
        let has = |request, limit| CpuMemory { cpu_request: request, cpu_limit: limit, ..CpuMemory::default() };
        assert_eq!(shown(&[("cpu", "1m")], &[("cpu", "5m")], has(1, 5)), ["cpu=1m", "cpu=5m"]);
        assert_eq!(shown(&[("cpu", "1m")], &[("cpu", "5m")], has(100, 5))[0], "cpu=100m");
        assert_eq!(
            shown(&[("memory", "100M")], &[], CpuMemory { memory_request: 100_000_000, ..has(0, 0) }),
            ["memory=100M"]
        );
    }

    fn desired() -> Desired {
        let full = [("cpu", "100m"), ("memory", "64Mi")];
        Desired::new(std::sync::Arc::new(pod(vec![container("a", &full, &full), container("b", &full, &full)])))
    }

    #[test]
    fn a_pod_shows_its_sums_and_then_what_is_enforced() {
        let (desired, mut observed) = (desired(), Observed::default());
        let list = |list: Option<BTreeMap<String, Quantity>>| {
            list.unwrap_or_default().into_values().map(|quantity| quantity.0).collect::<Vec<_>>()
        };
        let pending = pod_resources(&desired, &observed, Phase::Pending);
        assert_eq!(
            (list(pending.requests), list(pending.limits)),
            (vec!["200m".to_owned(), "128Mi".to_owned()], vec!["200m".to_owned(), "128Mi".to_owned()])
        );
        assert_eq!(list(pod_allocated(&desired)), ["200m", "128Mi"]);
        observed.resize.enforced =
            Some(Enforced { cpu_shares: 204, cpu_quota: Some(30_000), cpu_period: 100_000, memory: Some(1 << 30) });
        let running = pod_resources(&desired, &observed, Phase::Running);
        assert_eq!(list(running.requests), ["200m", "128Mi"]);
        assert_eq!(list(running.limits), ["300m", "1Gi"]);
    }

    #[test]
    fn coarse_weights_do_not_change_a_request() {
        let mut p = pod(vec![container("a", &[], &[])]);
        p.spec.as_mut().unwrap().resources = container("", &[("cpu", "120m")], &[]).resources;
        let (desired, mut observed) = (Desired::new(std::sync::Arc::new(p)), Observed::default());
        let enforced = |cpu_shares| Some(Enforced { cpu_shares, cpu_period: 100_000, ..Enforced::default() });
        observed.resize.enforced = enforced(round_trip(milli_cpu_to_shares(120)));
        let request = |observed: &Observed| {
            pod_resources(&desired, observed, Phase::Running).requests.unwrap_or_default()["cpu"].0.clone()
        };
        assert_eq!(request(&observed), "120m");
        observed.resize.enforced = enforced(1024);
        assert_eq!(request(&observed), "1");
    }
}
