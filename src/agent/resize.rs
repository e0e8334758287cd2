//! Brings the cgroups of a Pod and its containers to what was allocated.
//!
//! Source: `doPodResizeAction` and `validateMemoryResizeAction` in `pkg/kubelet/kuberuntime/kuberuntime_manager.go`.
//! `oom_score_adj` stays what it was when a container started, as with any CRI runtime: the kernel lets a process
//! lower it only with a capability, and the container's own processes may have changed theirs.

use k8s_openapi::api::core::v1::Pod;

use super::node::{Node, blocking};
use crate::pod::effects::Request;
use crate::pod::model::Observed;
use crate::pod::resize::{self, Actuation};
use crate::pod::resources::{CpuMemory, Resources};
use crate::resources::cgroup::{CgroupTree, ContainerChange, Enforced};
use crate::resources::limits::{
    Limits, container_limits, container_weight, milli_cpu_to_quota, milli_cpu_to_shares, pod_limits,
    quota_to_milli_cpu, shares_to_milli_cpu, weight_to_shares,
};

/// The kernel rounds memory limits down to pages of at least this, bytes.
const PAGE: i64 = 4096;

/// A container whose cgroup has to change.
struct Target {
    id: String,
    name: String,
    path: String,
    limits: Limits,
    has: CpuMemory,
    wants: CpuMemory,
}

impl Node {
    /// Writes the limits of a Pod and of its running containers. What was written counts, also if the rest fails.
    pub(super) async fn resize(&self, request: &Request) -> Actuation {
        let (cgroups, desired, observed) = (self.cgroups.clone(), request.desired.clone(), request.observed.clone());
        let done = blocking(move || {
            let policy = cgroups.policy();
            let targets = resize::changes(&desired, &observed).into_iter().map(|(spec, instance, has, wants)| {
                let mut limits = container_limits(&desired.pod, &spec.container, policy, false);
                if policy.cgroup_v2
                    && let Some(shares) = limits.cpu_shares.take()
                {
                    limits.unified.insert("cpu.weight".to_owned(), container_weight(shares).to_string());
                }
                let path = cgroups.container_path(&desired.pod, &instance.id);
                // an earlier life of the agent may have begun this, and not noted what it did
                let has = cgroups.enforced(&path).map_or(has, |real| as_enforced(has, &real, policy.cgroup_v2));
                Target { id: instance.id.clone(), name: spec.name().to_owned(), path, limits, has, wants }
            });
            let targets: Vec<Target> = targets.collect();
            Ok::<_, String>(actuate(&cgroups, &desired.pod, &observed, targets))
        });
        done.await.unwrap_or_else(|error| Actuation { error: Some(error), ..Actuation::default() })
    }
}

/// What a container has, where the record says something else than the kernel.
fn as_enforced(has: CpuMemory, real: &Enforced, cgroup_v2: bool) -> CpuMemory {
    let shares = milli_cpu_to_shares(if has.cpu_request > 0 { has.cpu_request } else { has.cpu_limit });
    let shares = if cgroup_v2 { weight_to_shares(container_weight(shares)) } else { shares };
    let quota = (has.cpu_limit > 0).then(|| milli_cpu_to_quota(has.cpu_limit, real.cpu_period));
    let memory = real.memory.unwrap_or_default();
    CpuMemory {
        cpu_request: if shares == real.cpu_shares { has.cpu_request } else { shares_to_milli_cpu(real.cpu_shares) },
        cpu_limit: if quota == real.cpu_quota {
            has.cpu_limit
        } else {
            quota_to_milli_cpu(real.cpu_quota.unwrap_or_default(), real.cpu_period)
        },
        // the kernel counts in pages
        memory_limit: if (has.memory_limit - memory).abs() < PAGE { has.memory_limit } else { memory },
        ..has
    }
}

fn actuate(cgroups: &CgroupTree, pod: &Pod, observed: &Observed, mut targets: Vec<Target>) -> Actuation {
    let error = write(cgroups, pod, observed, &mut targets).err();
    let complete = error.is_none();
    Actuation {
        pod: complete.then(|| Resources::of(pod)),
        enforced: cgroups.enforced(&cgroups.pod_path(pod)).ok(),
        containers: targets.into_iter().map(|target| (target.id, target.has)).collect(),
        error,
    }
}

fn write(cgroups: &CgroupTree, pod: &Pod, observed: &Observed, targets: &mut [Target]) -> Result<(), String> {
    let path = cgroups.pod_path(pod);
    let limits = pod_limits(pod, cgroups.policy(), false);
    check_memory(cgroups, &path, &limits, targets)?;
    remove_ended(cgroups, pod, observed).map_err(|error| error.to_string())?;

    let is_less = |wanted: i64, had: i64| wanted != 0 && (had == 0 || wanted < had);
    let mut changed: Vec<&mut Target> = targets.iter_mut().filter(|t| t.has.memory_differs(&t.wants)).collect();
    let changes: Vec<_> = changed
        .iter()
        .map(|target| ContainerChange {
            path: target.path.clone(),
            limits: target.limits.of_memory(),
            shrinks: is_less(target.wants.memory_limit, target.has.memory_limit),
        })
        .collect();
    let done = |index: usize| changed[index].has = changed[index].has.with_memory_of(&changed[index].wants);
    cgroups.resize_memory(&path, &limits, &changes, done).map_err(|error| error.to_string())?;

    let mut changed: Vec<&mut Target> = targets.iter_mut().filter(|t| t.has.cpu_differs(&t.wants)).collect();
    let changes: Vec<_> = changed
        .iter()
        .map(|target| ContainerChange {
            path: target.path.clone(),
            limits: target.limits.of_cpu(),
            shrinks: is_less(target.wants.cpu_limit, target.has.cpu_limit),
        })
        .collect();
    let done = |index: usize| changed[index].has = changed[index].has.with_cpu_of(&changed[index].wants);
    cgroups.resize_cpu(&path, &limits, &changes, done).map_err(|error| error.to_string())
}

/// Cgroups of containers that have ended would keep the Pod's limits from shrinking below theirs.
fn remove_ended(
    cgroups: &CgroupTree,
    pod: &Pod,
    observed: &Observed,
) -> Result<(), crate::resources::cgroup::CgroupError> {
    let exits = observed.containers.values().flat_map(|facts| facts.exit().into_iter().chain(&facts.previous));
    exits.filter(|exit| !exit.id.is_empty()).try_for_each(|exit| cgroups.remove_container(pod, &exit.id))
}

/// A limit below what is in use would make the kernel kill: it is refused before anything is changed.
fn check_memory(cgroups: &CgroupTree, pod: &str, limits: &Limits, targets: &[Target]) -> Result<(), String> {
    let usage = |path: &str| cgroups.stats(path).ok().and_then(|stats| stats.memory).map(|memory| memory.usage);
    let mut errors = Vec::new();
    let has = cgroups.enforced(pod).map_err(|error| error.to_string())?.memory;
    if let Some(wanted) = limits.memory.filter(|wanted| *wanted >= 0 && has.is_none_or(|has| *wanted < has)) {
        match usage(pod) {
            None => errors.push("missing pod memory usage".to_owned()),
            Some(used) if used >= wanted.unsigned_abs() => {
                errors.push(format!("attempting to set pod memory limit ({wanted}) below current usage ({used})"))
            }
            Some(_) => {}
        }
    }
    for Target { name, path, has, wants, .. } in targets {
        let wanted = wants.memory_limit;
        if wanted == 0 || has.memory_limit != 0 && wanted >= has.memory_limit {
            continue;
        }
        match usage(path) {
            None => errors.push(format!("missing container {name:?} memory usage")),
            Some(used) if used >= wanted.unsigned_abs() => errors.push(format!(
                "attempting to set container {name:?} memory limit ({wanted}) below current usage ({used})"
            )),
            Some(_) => {}
        }
    }
    match errors.as_slice() {
        [] => Ok(()),
        [one] => Err(format!("cannot decrease memory limits: {one}")),
        many => Err(format!("cannot decrease memory limits: [{}]", many.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_better_than_a_record_that_was_cut_short() {
        let has = CpuMemory { cpu_request: 100, cpu_limit: 200, memory_request: 1 << 20, memory_limit: (8 << 20) + 5 };
        let same = Enforced { cpu_shares: 102, cpu_quota: Some(20_000), cpu_period: 100_000, memory: Some(8 << 20) };
        assert_eq!(as_enforced(has, &same, false), has);
        let v2 = Enforced { cpu_shares: weight_to_shares(container_weight(102)), ..same };
        assert_eq!(as_enforced(has, &v2, true), has);
        let changed = Enforced { cpu_shares: 307, cpu_quota: Some(50_000), memory: None, ..same };
        let found = CpuMemory { cpu_request: 300, cpu_limit: 500, memory_limit: 0, ..has };
        assert_eq!(as_enforced(has, &changed, false), found);
        let unlimited = CpuMemory { cpu_limit: 0, memory_limit: 0, ..has };
        let none = Enforced { cpu_quota: None, memory: None, ..same };
        assert_eq!(as_enforced(unlimited, &none, false), unlimited);
        assert_eq!(as_enforced(CpuMemory { cpu_limit: 0, ..has }, &same, false).cpu_limit, 200);
    }
}
