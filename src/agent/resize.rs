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
use crate::resources::cgroup::{CgroupTree, ContainerChange};
use crate::resources::limits::{Limits, container_limits, container_weight, pod_limits};

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
                Target { id: instance.id.clone(), name: spec.name().to_owned(), path, limits, has, wants }
            });
            let targets: Vec<Target> = targets.collect();
            Ok::<_, String>(actuate(&cgroups, &desired.pod, &observed, targets))
        });
        done.await.unwrap_or_else(|error| Actuation { error: Some(error), ..Actuation::default() })
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
