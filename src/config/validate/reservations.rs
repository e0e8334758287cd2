//! What is kept from Pods, and what holds them to it. Source: `validation_reserved_memory.go` too.

use std::collections::BTreeSet;

use super::{Errors, one_of};
use crate::config::kubelet::KubeletConfiguration;
use crate::resources::quantity;

pub(super) fn reservations(config: &KubeletConfiguration, errors: &mut Errors) {
    const NAME: &str = "enforceNodeAllocatable (--enforce-node-allocatable)";
    let enforced = &config.enforce_node_allocatable;
    for pair in [["system-reserved", "system-reserved-compressible"], ["kube-reserved", "kube-reserved-compressible"]] {
        let both = pair.iter().all(|key| enforced.iter().any(|value| value == key));
        errors.when(both, format!("both {:?} and {:?} cannot be specified together in {NAME}", pair[0], pair[1]));
    }
    let mut seen = BTreeSet::new();
    for key in enforced {
        if !seen.insert(key) {
            errors.when(true, format!("duplicated enforcements {key:?} in {NAME}"));
            continue;
        }
        let needs = |cgroup: &str, field: &str, flag: &str, errors: &mut Errors| {
            errors
                .when(cgroup.is_empty(), format!("{field} ({flag}) must be specified when {key:?} included in {NAME}"));
        };
        match key.as_str() {
            "pods" => {}
            "system-reserved" | "system-reserved-compressible" => {
                needs(&config.system_reserved_cgroup, "systemReservedCgroup", "--system-reserved-cgroup", errors);
            }
            "kube-reserved" | "kube-reserved-compressible" => {
                needs(&config.kube_reserved_cgroup, "kubeReservedCgroup", "--kube-reserved-cgroup", errors);
            }
            "none" => {
                let message = format!("{NAME} may not contain additional enforcements when \"none\" is specified");
                errors.when(enforced.len() > 1, message);
                continue;
            }
            _ => {
                let options = [
                    "pods",
                    "system-reserved",
                    "system-reserved-compressible",
                    "kube-reserved",
                    "kube-reserved-compressible",
                    "none",
                ];
                one_of(errors, NAME, key, &options);
                continue;
            }
        }
        errors.when(
            !config.cgroups_per_qos,
            format!("cgroupsPerQOS (--cgroups-per-qos) must be set to true when {key:?} contained in {NAME}"),
        );
    }
    if !config.reserved_system_cpus.is_empty() {
        errors.when(
            !config.system_reserved_cgroup.is_empty() || !config.kube_reserved_cgroup.is_empty(),
            "can't use reservedSystemCPUs (--reserved-cpus) with systemReservedCgroup (--system-reserved-cgroup) or \
             kubeReservedCgroup (--kube-reserved-cgroup)",
        );
        let cpus = &config.reserved_system_cpus;
        errors.when(
            !is_cpu_list(cpus),
            format!("unable to parse reservedSystemCPUs (--reserved-cpus) {cpus}, error: write a list such as 0-3,7"),
        );
    }
    for (name, reserved) in [
        ("systemReserved (--system-reserved)", &config.system_reserved),
        ("kubeReserved (--kube-reserved)", &config.kube_reserved),
    ] {
        for (resource, amount) in reserved {
            let known = matches!(resource.as_str(), "cpu" | "memory" | "ephemeral-storage" | "pid");
            errors.when(!known, format!("{name}: cannot reserve {resource:?} resource"));
            match quantity::nanos(amount) {
                Ok(nanos) => errors.when(
                    nanos < 0,
                    format!("{name}: resource quantity for {resource:?} cannot be negative: {amount}"),
                ),
                Err(error) => errors.when(true, format!("{name}: {resource}: {error}")),
            }
        }
    }
    let mut seen = BTreeSet::new();
    for reservation in &config.reserved_memory {
        let node = reservation.numa_node;
        for (kind, amount) in &reservation.limits {
            errors.when(
                kind != "memory" && !kind.starts_with("hugepages-"),
                format!(
                    "the limit type {kind:?} for NUMA node {node} is not supported, only [memory hugepages-<HugePageSize>] is accepted"
                ),
            );
            errors.when(
                quantity::nanos(&amount.0) == Ok(0),
                format!("reserved memory may not be zero for NUMA node {node} and resource {kind:?}"),
            );
            errors.when(
                !seen.insert((node, kind)),
                format!("the reserved memory has a duplicate value for NUMA node {node} and resource {kind:?}"),
            );
        }
    }
}

/// The kernel's list form: `0-3,7`.
fn is_cpu_list(text: &str) -> bool {
    text.split(',').all(|range| match range.split_once('-') {
        Some((first, last)) => match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => first <= last,
            _ => false,
        },
        None => range.parse::<u32>().is_ok(),
    })
}
