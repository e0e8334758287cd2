//! Kernel limits of containers, Pods and the node's tiers, computed from manifests.
//!
//! Source: `pkg/kubelet/cm/helpers_linux.go`, `pkg/kubelet/kuberuntime/kuberuntime_container_linux.go`,
//! KEP-2400 (swap) and KEP-2570 (memory QoS). Writing them is the business of [`super::cgroup`].

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::amounts::{self, Amounts, CPU, HUGE_PAGES_PREFIX, MEMORY};
use super::qos::{self, QosClass};
use super::quantity;

/// The smallest weight that the kernel takes, and that of a cgroup that requests no cpu.
pub const MIN_SHARES: u64 = 2;
/// The largest weight that the kernel takes.
pub const MAX_SHARES: u64 = 262_144;
/// Default length of the interval in which a cpu limit is enforced, in microseconds.
pub const DEFAULT_CPU_PERIOD: u64 = 100_000;
/// The smallest quota that the kernel takes, in microseconds.
const MIN_QUOTA: i64 = 1000;

/// Values for one cgroup. A field that is `None` or empty is left as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Relative weight, as `cpu.shares`; on cgroup v2 it is converted to `cpu.weight`.
    pub cpu_shares: Option<u64>,
    /// Microseconds of processor time in a period, `-1` for no limit.
    pub cpu_quota: Option<i64>,
    /// Length of the period in microseconds.
    pub cpu_period: Option<u64>,
    /// Processors, in the kernel's list format.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes, in the kernel's list format.
    pub cpuset_mems: Option<String>,
    /// Bytes, `-1` for no limit.
    pub memory: Option<i64>,
    /// Bytes of memory and swap together; cgroup v1 only.
    pub memory_and_swap: Option<i64>,
    /// Bytes by page size in bytes.
    pub huge_pages: BTreeMap<i64, u64>,
    /// Number of tasks, `-1` for no limit.
    pub pids: Option<i64>,
    /// Contents of cgroup v2 files by name.
    pub unified: BTreeMap<String, String>,
}

impl Limits {
    /// The part that a change of cpu resources concerns.
    #[must_use]
    pub fn of_cpu(&self) -> Self {
        let unified = self.unified.iter().filter(|(file, _)| file.starts_with("cpu."));
        Self {
            cpu_shares: self.cpu_shares,
            cpu_quota: self.cpu_quota,
            cpu_period: self.cpu_period,
            unified: unified.map(|(file, value)| (file.clone(), value.clone())).collect(),
            ..Self::default()
        }
    }

    /// The part that a change of memory resources concerns.
    #[must_use]
    pub fn of_memory(&self) -> Self {
        let unified = self.unified.iter().filter(|(file, _)| file.starts_with("memory."));
        Self {
            memory: self.memory,
            memory_and_swap: self.memory_and_swap,
            unified: unified.map(|(file, value)| (file.clone(), value.clone())).collect(),
            ..Self::default()
        }
    }
}

/// `memorySwap.swapBehavior`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SwapBehavior {
    /// No container may swap.
    #[default]
    NoSwap,
    /// Containers of Burstable Pods may swap in proportion to their memory request.
    LimitedSwap,
}

/// `memoryReservationPolicy` and `memoryThrottlingFactor` (KEP-2570), without effect on cgroup v1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MemoryQos {
    /// `TieredReservation`: requests are protected with `memory.min` or `memory.low`.
    pub tiered_reservation: bool,
    /// Where between request and limit throttling begins; `None` never throttles.
    pub throttling_factor: Option<f64>,
}

/// What the node's configuration and kernel say about limits.
#[derive(Clone, Debug)]
pub struct LimitPolicy {
    /// Whether the node has the unified hierarchy.
    pub cgroup_v2: bool,
    /// `cpuCFSQuota`: whether cpu limits are enforced.
    pub cpu_cfs_quota: bool,
    /// `cpuCFSQuotaPeriod` in microseconds.
    pub cpu_period: u64,
    /// `singleProcessOOMKill`: if not, the kernel kills all processes of a container at once. cgroup v2 only.
    pub single_process_oom_kill: bool,
    /// `podPidsLimit`; `None` is no limit.
    pub pod_pids_limit: Option<i64>,
    /// Memory of the node in bytes.
    pub memory_capacity: i64,
    /// Swap of the node in bytes.
    pub swap_capacity: i64,
    /// Whether the kernel accounts swap for cgroups ([`super::cgroup::Hierarchy::has_swap_controller`]).
    pub swap_controller: bool,
    /// `memorySwap.swapBehavior`.
    pub swap_behavior: SwapBehavior,
    /// Page sizes in bytes for which limits can be set ([`super::cgroup::Hierarchy::huge_page_sizes`]).
    pub huge_page_sizes: Vec<i64>,
    /// `None` when the `MemoryQoS` feature is off.
    pub memory_qos: Option<MemoryQos>,
    /// Allocatable memory of the node in bytes, for throttling containers without a limit.
    pub allocatable_memory: i64,
    /// Size of a memory page in bytes.
    pub page_size: i64,
}

impl Default for LimitPolicy {
    /// A kubelet's defaults on cgroup v2, with no swap and no huge pages.
    fn default() -> Self {
        Self {
            cgroup_v2: true,
            cpu_cfs_quota: true,
            cpu_period: DEFAULT_CPU_PERIOD,
            single_process_oom_kill: false,
            pod_pids_limit: None,
            memory_capacity: 0,
            swap_capacity: 0,
            swap_controller: false,
            swap_behavior: SwapBehavior::NoSwap,
            huge_page_sizes: Vec::new(),
            memory_qos: Some(MemoryQos::default()),
            allocatable_memory: 0,
            page_size: 4096,
        }
    }
}

/// cpu requests as a weight: 1024 for a core.
#[must_use]
pub fn milli_cpu_to_shares(milli: i64) -> u64 {
    let shares = u64::try_from(i128::from(milli) * 1024 / 1000).unwrap_or(MIN_SHARES);
    shares.clamp(MIN_SHARES, MAX_SHARES)
}

/// A weight as cpu requests; the inverse of [`milli_cpu_to_shares`] but for rounding.
#[must_use]
pub fn shares_to_milli_cpu(shares: u64) -> i64 {
    let milli = (u128::from(shares) * 1000).div_ceil(1024);
    i64::try_from(milli).unwrap_or(i64::MAX)
}

/// A cpu limit as microseconds in a period; `-1` when there is none.
#[must_use]
pub fn milli_cpu_to_quota(milli: i64, period: u64) -> i64 {
    if milli == 0 {
        return -1;
    }
    let quota = i128::from(milli) * i128::from(period) / 1000;
    i64::try_from(quota).unwrap_or(i64::MAX).max(MIN_QUOTA)
}

/// Microseconds in a period as a cpu limit; 0 when there is none.
#[must_use]
pub fn quota_to_milli_cpu(quota: i64, period: u64) -> i64 {
    if quota <= 0 || period == 0 {
        return 0;
    }
    i64::try_from(i128::from(quota) * 1000 / i128::from(period)).unwrap_or(i64::MAX)
}

/// `cpu.weight` of a cgroup with this `cpu.shares`, as a kubelet sets it for Pods and tiers (KEP-2254).
#[must_use]
pub fn shares_to_weight(shares: u64) -> u64 {
    1 + (shares.clamp(MIN_SHARES, MAX_SHARES) - MIN_SHARES) * 9999 / (MAX_SHARES - MIN_SHARES)
}

/// `cpu.shares` of a cgroup with this `cpu.weight`; the inverse of [`shares_to_weight`] but for rounding.
#[must_use]
pub fn weight_to_shares(weight: u64) -> u64 {
    (weight.max(1) - 1) * (MAX_SHARES - MIN_SHARES) / 9999 + MIN_SHARES
}

/// `cpu.weight` that a container runtime gives a container with these shares: unlike [`shares_to_weight`] the default
/// of the one is the default of the other (1024 and 100). Source: `opencontainers/cgroups`, and libcontainer after it.
#[must_use]
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the formula is one of real numbers between 1 and 10000"
)]
pub fn container_weight(shares: u64) -> u64 {
    match shares {
        0..=MIN_SHARES => 1,
        MAX_SHARES.. => 10_000,
        shares => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            (10_f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

/// Limits of one container.
///
/// `exclusive_cpus`: the cpu manager gave the container processors of its own, which a quota would only slow down.
#[must_use]
pub fn container_limits(pod: &Pod, container: &Container, policy: &LimitPolicy, exclusive_cpus: bool) -> Limits {
    let requests = amounts::requests(container.resources.as_ref());
    let own = amounts::limits(container.resources.as_ref());
    let limits = effective(pod, &own);
    let request = if requests.lists(CPU) { requests.milli(CPU) } else { limits.milli(CPU) };
    let quota = milli_cpu_to_quota(if exclusive_cpus { 0 } else { limits.milli(CPU) }, policy.cpu_period);
    let memory = limits.value(MEMORY);
    let mut result = Limits {
        cpu_shares: Some(milli_cpu_to_shares(request)),
        cpu_quota: policy.cpu_cfs_quota.then_some(quota),
        cpu_period: policy.cpu_cfs_quota.then_some(policy.cpu_period),
        memory: (memory != 0).then_some(memory),
        huge_pages: huge_pages(&limits, policy),
        ..Limits::default()
    };
    if policy.cgroup_v2 && !policy.single_process_oom_kill {
        result.unified.insert("memory.oom.group".into(), "1".into());
    }
    swap(pod, &requests, &own, policy, &mut result);
    memory_qos(pod, &requests, &own, policy, &mut result);
    result
}

/// A container's own limits; where it has none, those of the Pod as a whole.
#[must_use]
pub fn effective(pod: &Pod, own: &Amounts) -> Amounts {
    let mut limits = own.clone();
    if amounts::has_pod_level_resources(pod) {
        let pod_level = amounts::limits(pod.spec.as_ref().and_then(|s| s.resources.as_ref()));
        for (name, nanos) in pod_level.iter() {
            // zero huge pages are a limit, zero cpu or memory is none
            let missing = if name.starts_with(HUGE_PAGES_PREFIX) { !own.lists(name) } else { own.nanos(name) == 0 };
            if missing {
                limits.set_nanos(name, nanos);
            }
        }
    }
    limits
}

/// Every page size of the node gets a limit; one that is not asked for gets zero.
fn huge_pages(limits: &Amounts, policy: &LimitPolicy) -> BTreeMap<i64, u64> {
    let mut pages: BTreeMap<i64, u64> = policy.huge_page_sizes.iter().map(|size| (*size, 0)).collect();
    for (name, _) in limits.iter() {
        let size =
            name.strip_prefix(HUGE_PAGES_PREFIX).and_then(|size| quantity::value(&Quantity(size.to_owned())).ok());
        if let Some(limit) = size.and_then(|size| pages.get_mut(&size)) {
            *limit = u64::try_from(limits.value(name)).unwrap_or(0);
        }
    }
    pages
}

fn swap(pod: &Pod, requests: &Amounts, own: &Amounts, policy: &LimitPolicy, result: &mut Limits) {
    if !policy.swap_controller {
        return;
    }
    if !policy.cgroup_v2 {
        result.memory_and_swap = result.memory;
        return;
    }
    let request = requests.value(MEMORY);
    let limited = may_swap(pod, requests, own, policy) && (1..=policy.memory_capacity).contains(&request);
    let bytes = if limited {
        i128::from(request) * i128::from(policy.swap_capacity) / i128::from(policy.memory_capacity)
    } else {
        0
    };
    result.unified.insert("memory.swap.max".into(), bytes.to_string());
}

/// Whether a container gets swap (`GetContainerSwapBehavior`).
fn may_swap(pod: &Pod, requests: &Amounts, own: &Amounts, policy: &LimitPolicy) -> bool {
    policy.swap_behavior == SwapBehavior::LimitedSwap
        && policy.swap_controller
        && policy.cgroup_v2
        && !qos::is_critical(pod)
        && qos::qos_class(pod) == QosClass::Burstable
        // neither also means equal
        && requests.value(MEMORY) != own.value(MEMORY)
}

/// Whether a container with these resources gets swap.
#[must_use]
pub fn swaps(pod: &Pod, container: &Container, policy: &LimitPolicy) -> bool {
    let resources = container.resources.as_ref();
    may_swap(pod, &amounts::requests(resources), &amounts::limits(resources), policy)
}

fn memory_qos(pod: &Pod, requests: &Amounts, own: &Amounts, policy: &LimitPolicy, result: &mut Limits) {
    if !policy.cgroup_v2 {
        return;
    }
    let Some(memory_qos) = policy.memory_qos else {
        // a container made while the feature was on must not stay throttled
        result.unified.insert("memory.high".into(), "max".into());
        return;
    };
    let (request, limit) = (requests.value(MEMORY), own.value(MEMORY));
    if request != 0 && memory_qos.tiered_reservation {
        result.unified.insert(protection(pod).into(), request.to_string());
    } else {
        result.unified.extend([("memory.min".into(), "0".into()), ("memory.low".into(), "0".into())]);
    }
    let pod_limit = amounts::limits(pod.spec.as_ref().and_then(|s| s.resources.as_ref())).value(MEMORY);
    // the Pod's own memory.high throttles the container as well
    let pod_throttles = limit == 0 && pod_limit != 0;
    let Some(factor) = memory_qos.throttling_factor.filter(|_| !pod_throttles && (request != limit || request == 0))
    else {
        return;
    };
    let upper = if limit != 0 { limit } else { policy.allocatable_memory };
    if let Some(high) = throttle_at(request, upper, factor, policy.page_size) {
        result.unified.insert("memory.high".into(), high.to_string());
    }
}

fn protection(pod: &Pod) -> &'static str {
    if qos::qos_class(pod) == QosClass::Guaranteed { "memory.min" } else { "memory.low" }
}

/// `memory.high` between request and limit, on a page boundary; `None` when it would not be above the request.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a factor of bytes; the KEP rounds to pages"
)]
fn throttle_at(request: i64, upper: i64, factor: f64, page_size: i64) -> Option<i64> {
    if upper <= 0 {
        return None;
    }
    let high = (request as f64 + (upper as f64 - request as f64) * factor).floor() as i64;
    let high = high / page_size.max(1) * page_size.max(1);
    (high > request && high > 0).then_some(high)
}

/// Limits of a Pod's own cgroup. `exclusive_cpus` as for [`container_limits`], of any container.
#[must_use]
pub fn pod_limits(pod: &Pod, policy: &LimitPolicy, exclusive_cpus: bool) -> Limits {
    let (requests, limits) = (amounts::pod_requests(pod), amounts::pod_limits(pod));
    let shares = milli_cpu_to_shares(requests.milli(CPU));
    let enforced = policy.cpu_cfs_quota && !exclusive_cpus;
    let quota = if enforced { milli_cpu_to_quota(limits.milli(CPU), policy.cpu_period) } else { -1 };
    let memory = limits.value(MEMORY);
    let mut result = Limits {
        huge_pages: huge_pages(&requests, policy),
        pids: policy.pod_pids_limit.filter(|limit| *limit > 0),
        ..Limits::default()
    };
    let declared = |name: &str| {
        let Some(spec) = &pod.spec else { return false };
        let pod_level = amounts::limits(spec.resources.as_ref()).nanos(name) != 0;
        let mut all = spec.init_containers.iter().flatten().chain(&spec.containers);
        pod_level || all.all(|c| amounts::limits(c.resources.as_ref()).nanos(name) != 0)
    };
    match qos::qos_class(pod) {
        QosClass::BestEffort => result.cpu_shares = Some(MIN_SHARES),
        class => {
            let guaranteed = class == QosClass::Guaranteed;
            result.cpu_shares = Some(shares);
            if guaranteed || declared(CPU) {
                (result.cpu_quota, result.cpu_period) = (Some(quota), Some(policy.cpu_period));
            }
            if guaranteed || declared(MEMORY) {
                result.memory = Some(memory);
            }
        }
    }
    if let Some(memory_qos) = policy.memory_qos.filter(|_| policy.cgroup_v2) {
        let request = requests.value(MEMORY);
        if memory_qos.tiered_reservation && request > 0 {
            result.unified.insert(protection(pod).into(), request.to_string());
        }
        let throttled = amounts::has_pod_level_resources(pod) && declared(MEMORY) && request != memory;
        let high = memory_qos.throttling_factor.filter(|_| throttled);
        if let Some(high) = high.and_then(|factor| throttle_at(request, memory, factor, policy.page_size)) {
            result.unified.insert("memory.high".into(), high.to_string());
        }
    }
    result
}

/// Limits of the cgroup above all Pods, or of a reserved one, from amounts of cpu, memory, `pid` and huge pages.
///
/// `compressible_only` leaves out all but cpu (`kube-reserved-compressible`, `system-reserved-compressible`).
#[must_use]
pub fn node_limits(amounts: &Amounts, policy: &LimitPolicy, compressible_only: bool) -> Limits {
    let mut result =
        Limits { cpu_shares: amounts.lists(CPU).then(|| milli_cpu_to_shares(amounts.milli(CPU))), ..Limits::default() };
    if !compressible_only {
        result.memory = amounts.lists(MEMORY).then(|| amounts.value(MEMORY));
        result.pids = amounts.lists("pid").then(|| amounts.value("pid"));
        result.huge_pages = huge_pages(amounts, policy);
    }
    result
}

/// Weight of the Burstable tier: what its Pods request together.
#[must_use]
pub fn burstable_tier_shares<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> u64 {
    let burstable = pods.into_iter().filter(|pod| qos::qos_class(pod) == QosClass::Burstable);
    let milli = burstable.map(|pod| amounts::pod_requests(pod).milli(CPU)).fold(0_i64, i64::saturating_add);
    milli_cpu_to_shares(milli)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{container, pod};
    use super::*;

    fn policy() -> LimitPolicy {
        LimitPolicy { memory_capacity: 8 << 30, allocatable_memory: 8 << 30, ..LimitPolicy::default() }
    }

    #[test]
    fn cpu_formulas() {
        for (milli, shares, quota) in
            [(0, 2, -1), (1, 2, 1000), (5, 5, 1000), (100, 102, 10_000), (1000, 1024, 100_000)]
        {
            assert_eq!(milli_cpu_to_shares(milli), shares, "{milli}");
            assert_eq!(milli_cpu_to_quota(milli, DEFAULT_CPU_PERIOD), quota, "{milli}");
        }
        assert_eq!(milli_cpu_to_shares(i64::MAX), MAX_SHARES);
        assert_eq!((shares_to_weight(2), shares_to_weight(1024), shares_to_weight(MAX_SHARES)), (1, 39, 10_000));
        assert_eq!(quota_to_milli_cpu(50_000, 100_000), 500);
        assert_eq!((weight_to_shares(1), weight_to_shares(39), weight_to_shares(10_000)), (2, 998, MAX_SHARES));
        // the table of the runtime's release notes
        for (shares, weight) in [(2, 1), (1024, 100), (102, 17), (MAX_SHARES, 10_000), (0, 1)] {
            assert_eq!(container_weight(shares), weight, "{shares}");
        }
    }

    #[test]
    fn a_missing_cpu_request_defaults_to_the_limit() {
        let c = container("a", &[], &[("cpu", "2"), ("memory", "1Gi")]);
        let l = container_limits(&pod(vec![c.clone()]), &c, &policy(), false);
        assert_eq!((l.cpu_shares, l.cpu_quota, l.memory), (Some(2048), Some(200_000), Some(1 << 30)));
        assert_eq!(l.unified.get("memory.oom.group").map(String::as_str), Some("1"));
    }

    #[test]
    fn no_limits_are_no_limits() {
        let c = container("a", &[], &[]);
        let l = container_limits(&pod(vec![c.clone()]), &c, &policy(), false);
        assert_eq!((l.cpu_shares, l.cpu_quota, l.memory), (Some(2), Some(-1), None));
        let off = LimitPolicy { cpu_cfs_quota: false, ..policy() };
        assert_eq!(container_limits(&pod(vec![c.clone()]), &c, &off, false).cpu_quota, None);
    }

    #[test]
    fn exclusive_cpus_have_no_quota() {
        let full = [("cpu", "2"), ("memory", "1Gi")];
        let c = container("a", &full, &full);
        let p = pod(vec![c.clone()]);
        assert_eq!(container_limits(&p, &c, &policy(), true).cpu_quota, Some(-1));
        assert_eq!(pod_limits(&p, &policy(), true).cpu_quota, Some(-1));
    }

    #[test]
    fn pod_level_limits_stand_in_for_missing_ones() {
        let c = container("a", &[("cpu", "100m")], &[]);
        let mut p = pod(vec![c.clone(), container("b", &[], &[("cpu", "1")])]);
        p.spec.as_mut().unwrap().resources = container("p", &[], &[("cpu", "3"), ("memory", "64Mi")]).resources;
        let l = container_limits(&p, &c, &policy(), false);
        assert_eq!((l.cpu_quota, l.memory), (Some(300_000), Some(64 << 20)));
        let l = pod_limits(&p, &policy(), false);
        assert_eq!((l.cpu_quota, l.memory), (Some(300_000), Some(64 << 20)));
    }

    #[test]
    fn a_pod_is_limited_only_when_all_its_containers_are() {
        let limited = container("a", &[("cpu", "1")], &[("cpu", "2"), ("memory", "1Gi")]);
        let l = pod_limits(&pod(vec![limited.clone(), container("b", &[], &[("memory", "1Gi")])]), &policy(), false);
        assert_eq!((l.cpu_shares, l.cpu_quota, l.memory), (Some(1024), None, Some(2 << 30)));
        let l = pod_limits(&pod(vec![container("b", &[], &[])]), &policy(), false);
        assert_eq!((l.cpu_shares, l.cpu_quota, l.memory), (Some(2), None, None));
    }

    #[test]
    fn huge_pages_that_are_not_asked_for_are_forbidden() {
        let policy = LimitPolicy { huge_page_sizes: vec![2 << 20, 1 << 30], ..policy() };
        let c = container("a", &[], &[("hugepages-2Mi", "64Mi"), ("cpu", "1"), ("memory", "1Gi")]);
        let l = container_limits(&pod(vec![c.clone()]), &c, &policy, false);
        assert_eq!(l.huge_pages, [(2 << 20, 64 << 20), (1 << 30, 0)].into());
    }

    #[test]
    fn swap_is_shared_by_request() {
        let policy = LimitPolicy {
            swap_controller: true,
            swap_behavior: SwapBehavior::LimitedSwap,
            swap_capacity: 4 << 30,
            ..policy()
        };
        let swap = |c: Container| {
            container_limits(&pod(vec![c.clone()]), &c, &policy, false).unified.remove("memory.swap.max").unwrap()
        };
        assert_eq!(swap(container("a", &[("memory", "2Gi")], &[])), (1_i64 << 30).to_string());
        assert_eq!(swap(container("a", &[("memory", "2Gi"), ("cpu", "1")], &[("memory", "2Gi")])), "0");
        assert_eq!(swap(container("a", &[], &[])), "0");
        let v1 = LimitPolicy { cgroup_v2: false, ..policy };
        let c = container("a", &[], &[("memory", "1Gi")]);
        let l = container_limits(&pod(vec![c.clone()]), &c, &v1, false);
        assert_eq!((l.memory_and_swap, l.unified.len()), (Some(1 << 30), 0));
    }

    #[test]
    fn memory_qos_protects_and_throttles() {
        let policy = LimitPolicy {
            memory_qos: Some(MemoryQos { tiered_reservation: true, throttling_factor: Some(0.9) }),
            ..policy()
        };
        let c = container("a", &[("memory", "1000")], &[("memory", "100000")]);
        let l = container_limits(&pod(vec![c.clone()]), &c, &policy, false);
        assert_eq!(l.unified.get("memory.low").map(String::as_str), Some("1000"));
        assert_eq!(l.unified.get("memory.high").map(String::as_str), Some("86016"));
        let off = LimitPolicy { memory_qos: None, ..policy };
        let l = container_limits(&pod(vec![c.clone()]), &c, &off, false);
        assert_eq!(l.unified.get("memory.high").map(String::as_str), Some("max"));
    }

    #[test]
    fn tiers_weigh_what_their_pods_request() {
        let burstable = pod(vec![container("a", &[("cpu", "1500m")], &[])]);
        let full = [("cpu", "4"), ("memory", "1Gi")];
        assert_eq!(burstable_tier_shares([&burstable, &burstable, &pod(vec![container("g", &full, &full)])]), 3072);
        assert_eq!(burstable_tier_shares([]), MIN_SHARES);
        let mut reserved = Amounts::default();
        reserved.set_value(CPU, 2);
        reserved.set_value(MEMORY, 5);
        assert_eq!(node_limits(&reserved, &policy(), false).memory, Some(5));
        assert_eq!(node_limits(&reserved, &policy(), true).memory, None);
    }

    proptest::proptest! {
        #[test]
        fn shares_and_back(milli in 2_i64..256_000) {
            let back = shares_to_milli_cpu(milli_cpu_to_shares(milli));
            proptest::prop_assert!((milli - back).abs() <= 1, "{milli} {back}");
        }
    }
}
