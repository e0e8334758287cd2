//! Limits in OCI terms.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources};

use crate::resources::cgroup::page_size_name;
use crate::resources::limits::Limits;

/// Limits as `linux.resources`; libcontainer converts shares to a weight on cgroup v2.
pub(super) fn to_oci(limits: &Limits) -> LinuxResources {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(limits.cpu_shares);
    cpu.set_quota(limits.cpu_quota);
    cpu.set_period(limits.cpu_period);
    cpu.set_cpus(limits.cpuset_cpus.clone());
    cpu.set_mems(limits.cpuset_mems.clone());
    let mut memory = LinuxMemory::default();
    memory.set_limit(limits.memory);
    memory.set_swap(limits.memory_and_swap);
    let huge_pages: Vec<LinuxHugepageLimit> = limits
        .huge_pages
        .iter()
        .map(|(size, bytes)| {
            let mut limit = LinuxHugepageLimit::default();
            limit.set_page_size(page_size_name(*size));
            limit.set_limit(i64::try_from(*bytes).unwrap_or(i64::MAX));
            limit
        })
        .collect();

    let mut resources = LinuxResources::default();
    resources.set_cpu(Some(cpu));
    resources.set_memory(Some(memory));
    resources.set_pids(limits.pids.map(|limit| {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        pids
    }));
    resources.set_hugepage_limits((!huge_pages.is_empty()).then_some(huge_pages));
    let unified = limits.unified.clone().into_iter().collect::<std::collections::HashMap<_, _>>();
    resources.set_unified((!unified.is_empty()).then_some(unified));
    resources
}
