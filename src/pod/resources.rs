//! cpu and memory of a Pod: what is wanted, what the node has set aside, and what a running container has.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use serde::{Deserialize, Serialize};

use crate::resources::amounts::{self, Amounts, CPU, MEMORY};
use crate::resources::limits;

/// The resources of a Pod and of its containers, as in its specification.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// `spec.resources`.
    pub pod: Option<ResourceRequirements>,
    /// `resources` of init containers and containers, by name.
    pub containers: BTreeMap<String, ResourceRequirements>,
}

impl Resources {
    /// Those of a Pod.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else { return Self::default() };
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        Self {
            pod: spec.resources.clone(),
            containers: containers.map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default())).collect(),
        }
    }

    /// Whether both are the same amounts, however they are written.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self == other
            || self.same_for_pod(other)
                && self.containers.len() == other.containers.len()
                && self.containers.iter().all(|(name, own)| other.containers.get(name).is_some_and(|o| alike(own, o)))
    }

    /// Whether both are the same for the Pod as a whole.
    #[must_use]
    pub fn same_for_pod(&self, other: &Self) -> bool {
        same(self.pod.as_ref(), other.pod.as_ref())
    }

    /// The Pod with these resources instead of its own; containers that are not named here keep theirs.
    #[must_use]
    pub fn laid_over(&self, pod: &Pod) -> Pod {
        let mut pod = pod.clone();
        let Some(spec) = &mut pod.spec else { return pod };
        spec.resources.clone_from(&self.pod);
        for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
            if let Some(resources) = self.containers.get(&container.name) {
                container.resources = Some(resources.clone());
            }
        }
        pod
    }
}

fn same(one: Option<&ResourceRequirements>, other: Option<&ResourceRequirements>) -> bool {
    let none = ResourceRequirements::default();
    alike(one.unwrap_or(&none), other.unwrap_or(&none))
}

fn alike(one: &ResourceRequirements, other: &ResourceRequirements) -> bool {
    one == other
        || Amounts::of(one.requests.as_ref()) == Amounts::of(other.requests.as_ref())
            && Amounts::of(one.limits.as_ref()) == Amounts::of(other.limits.as_ref())
}

/// What a container's cgroup is made from; 0 is none. Limits that the container does not have are those of its Pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuMemory {
    /// Thousandths of a core.
    pub cpu_request: i64,
    /// Thousandths of a core.
    pub cpu_limit: i64,
    /// Bytes.
    pub memory_request: i64,
    /// Bytes.
    pub memory_limit: i64,
}

impl CpuMemory {
    /// What a container of `pod` is to have.
    #[must_use]
    pub fn of(pod: &Pod, container: &Container) -> Self {
        let requests = amounts::requests(container.resources.as_ref());
        let limits = limits::effective(pod, &amounts::limits(container.resources.as_ref()));
        Self {
            cpu_request: requests.milli(CPU),
            cpu_limit: limits.milli(CPU),
            memory_request: requests.value(MEMORY),
            memory_limit: limits.value(MEMORY),
        }
    }

    /// Whether cpu differs.
    #[must_use]
    pub fn cpu_differs(&self, other: &Self) -> bool {
        (self.cpu_request, self.cpu_limit) != (other.cpu_request, other.cpu_limit)
    }

    /// Whether memory differs.
    #[must_use]
    pub fn memory_differs(&self, other: &Self) -> bool {
        (self.memory_request, self.memory_limit) != (other.memory_request, other.memory_limit)
    }

    /// These with the cpu of `other`.
    #[must_use]
    pub fn with_cpu_of(self, other: &Self) -> Self {
        Self { cpu_request: other.cpu_request, cpu_limit: other.cpu_limit, ..self }
    }

    /// These with the memory of `other`.
    #[must_use]
    pub fn with_memory_of(self, other: &Self) -> Self {
        Self { memory_request: other.memory_request, memory_limit: other.memory_limit, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::fixture::{container, pod};

    #[test]
    fn the_same_amounts_are_the_same_however_written() {
        let one = Resources::of(&pod(vec![container("a", &[("cpu", "1000m")], &[("memory", "1Gi")])]));
        let other = Resources::of(&pod(vec![container("a", &[("cpu", "1")], &[("memory", "1024Mi")])]));
        assert!(one != other && one.same(&other));
        let more = Resources::of(&pod(vec![container("a", &[("cpu", "2")], &[("memory", "1Gi")])]));
        assert!(!one.same(&more));
        let mut of_pod = one.clone();
        of_pod.pod = container("", &[("cpu", "2")], &[]).resources;
        assert!(!one.same(&of_pod) && !of_pod.same(&one));
    }

    #[test]
    fn laid_over_a_pod_they_replace_its_own() {
        let small = Resources::of(&pod(vec![container("a", &[("cpu", "1")], &[])]));
        let big = pod(vec![container("a", &[("cpu", "4")], &[]), container("new", &[("cpu", "1")], &[])]);
        let laid = small.laid_over(&big);
        assert_eq!(Resources::of(&laid).containers["a"], small.containers["a"]);
        assert_eq!(Resources::of(&laid).containers["new"], Resources::of(&big).containers["new"]);
    }

    #[test]
    fn limits_of_the_pod_are_those_of_containers_without() {
        let c = container("a", &[("cpu", "100m")], &[("memory", "1Ki")]);
        let mut p = pod(vec![c.clone()]);
        p.spec.as_mut().unwrap().resources = container("", &[], &[("cpu", "3"), ("memory", "64Mi")]).resources;
        let has = CpuMemory { cpu_request: 100, cpu_limit: 3000, memory_request: 0, memory_limit: 1024 };
        assert_eq!(CpuMemory::of(&p, &c), has);
    }
}
