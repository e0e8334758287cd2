//! Named resource amounts and a Pod's totals.
//!
//! Source: `component-helpers/resource/helpers.go`, KEP-753 (sidecars), KEP-2837 (Pod-level resources) and
//! KEP-688 (overhead). Amounts are billionths of their unit, exact, as [`quantity::nanos`] reads them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::quantity::{self, InvalidQuantity};

/// Processor time, in cores.
pub const CPU: &str = "cpu";
/// Memory, in bytes.
pub const MEMORY: &str = "memory";
/// Prefix of the resources that are huge pages of one size, for example `hugepages-2Mi`.
pub const HUGE_PAGES_PREFIX: &str = "hugepages-";

const NANOS: i128 = 1_000_000_000;

/// Amounts by resource name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amounts(BTreeMap<String, i128>);

impl Amounts {
    /// Reads a list of quantities.
    ///
    /// An entry that is no quantity is left out: [`validate`] refuses such a Pod before anything is computed.
    #[must_use]
    pub fn of(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let entries = list.into_iter().flatten();
        Self(entries.filter_map(|(name, q)| Some((name.clone(), quantity::nanos(&q.0).ok()?))).collect())
    }

    /// Billionths of `name`, zero if it is not listed.
    #[must_use]
    pub fn nanos(&self, name: &str) -> i128 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Whole units of `name`, rounded up, zero if it is not listed.
    #[must_use]
    pub fn value(&self, name: &str) -> i64 {
        ceil(self.nanos(name), NANOS)
    }

    /// Thousandths of `name`, rounded up, zero if it is not listed.
    #[must_use]
    pub fn milli(&self, name: &str) -> i64 {
        ceil(self.nanos(name), NANOS / 1000)
    }

    /// Whether `name` is listed, be it with zero.
    #[must_use]
    pub fn lists(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Sets `name` to a number of whole units.
    pub fn set_value(&mut self, name: &str, value: i64) {
        self.set_nanos(name, i128::from(value) * NANOS);
    }

    /// Sets `name` to a number of billionths.
    pub fn set_nanos(&mut self, name: &str, nanos: i128) {
        self.0.insert(name.to_owned(), nanos);
    }

    /// Names and billionths, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i128)> {
        self.0.iter().map(|(name, nanos)| (name.as_str(), *nanos))
    }

    /// Adds every amount of `other`.
    pub fn add(&mut self, other: &Self) {
        for (name, nanos) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*nanos);
        }
    }

    /// Raises every amount to that of `other` where that is larger.
    pub fn raise_to(&mut self, other: &Self) {
        for (name, nanos) in &other.0 {
            self.0.entry(name.clone()).and_modify(|own| *own = (*own).max(*nanos)).or_insert(*nanos);
        }
    }
}

fn ceil(value: i128, unit: i128) -> i64 {
    let quotient = value.div_euclid(unit) + i128::from(value.rem_euclid(unit) != 0);
    i64::try_from(quotient).unwrap_or(if quotient < 0 { i64::MIN } else { i64::MAX })
}

/// The `requests` of a container or Pod.
#[must_use]
pub fn requests(resources: Option<&ResourceRequirements>) -> Amounts {
    Amounts::of(resources.and_then(|r| r.requests.as_ref()))
}

/// The `limits` of a container or Pod.
#[must_use]
pub fn limits(resources: Option<&ResourceRequirements>) -> Amounts {
    Amounts::of(resources.and_then(|r| r.limits.as_ref()))
}

/// A sidecar: an init container with `restartPolicy: Always`.
#[must_use]
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The resources that a Pod can ask for as a whole: cpu, memory and huge pages (KEP-2837).
fn is_pod_level(name: &str) -> bool {
    name == CPU || name == MEMORY || name.starts_with(HUGE_PAGES_PREFIX)
}

fn pod_level(list: Option<&BTreeMap<String, Quantity>>) -> Amounts {
    let mut amounts = Amounts::of(list);
    amounts.0.retain(|name, _| is_pod_level(name));
    amounts
}

/// Whether `spec.resources` names cpu, memory or huge pages in requests or limits.
#[must_use]
pub fn has_pod_level_resources(pod: &Pod) -> bool {
    let Some(resources) = pod.spec.as_ref().and_then(|s| s.resources.as_ref()) else { return false };
    [&resources.requests, &resources.limits].into_iter().flatten().flat_map(|list| list.keys()).any(|n| is_pod_level(n))
}

/// What the containers need at the Pod's most demanding moment, without Pod-level resources and overhead.
fn of_containers(pod: &Pod, of: impl Fn(Option<&ResourceRequirements>) -> Amounts) -> Amounts {
    let Some(spec) = &pod.spec else { return Amounts::default() };
    let mut total = Amounts::default();
    for container in &spec.containers {
        total.add(&of(container.resources.as_ref()));
    }
    let mut sidecars = Amounts::default();
    let mut initializing = Amounts::default();
    for container in spec.init_containers.iter().flatten() {
        let mut own = of(container.resources.as_ref());
        if is_sidecar(container) {
            total.add(&own);
            sidecars.add(&own);
            initializing.raise_to(&sidecars);
        } else {
            own.add(&sidecars);
            initializing.raise_to(&own);
        }
    }
    total.raise_to(&initializing);
    total
}

/// Requests of all containers together, without Pod-level resources and overhead.
#[must_use]
pub fn container_requests(pod: &Pod) -> Amounts {
    of_containers(pod, requests)
}

/// What the Pod requests of the node: containers, or the Pod-level request where there is one, plus overhead.
#[must_use]
pub fn pod_requests(pod: &Pod) -> Amounts {
    let mut total = container_requests(pod);
    let Some(spec) = &pod.spec else { return total };
    let own = pod_level(spec.resources.as_ref().and_then(|r| r.requests.as_ref()));
    total.0.extend(own.0);
    total.add(&Amounts::of(spec.overhead.as_ref()));
    total
}

/// The Pod's limits: containers, or the Pod-level limit where there is one; overhead raises limits that exist.
#[must_use]
pub fn pod_limits(pod: &Pod) -> Amounts {
    let mut total = of_containers(pod, limits);
    let Some(spec) = &pod.spec else { return total };
    let own = pod_level(spec.resources.as_ref().and_then(|r| r.limits.as_ref()));
    total.0.extend(own.0);
    for (name, nanos) in Amounts::of(spec.overhead.as_ref()).0 {
        if let Some(limit) = total.0.get_mut(&name).filter(|limit| **limit != 0) {
            *limit = limit.saturating_add(nanos);
        }
    }
    total
}

/// What the Pod requests of the node, as a list for its status.
#[must_use]
pub fn pod_requests_list(pod: &Pod) -> BTreeMap<String, Quantity> {
    list(pod, &pod_requests(pod), |resources| resources.requests.as_ref())
}

/// The Pod's limits, as a list for its status.
#[must_use]
pub fn pod_limits_list(pod: &Pod) -> BTreeMap<String, Quantity> {
    list(pod, &pod_limits(pod), |resources| resources.limits.as_ref())
}

/// Amounts as quantities, each written as the first of its name in the Pod is.
fn list(
    pod: &Pod,
    amounts: &Amounts,
    of: impl Fn(&ResourceRequirements) -> Option<&BTreeMap<String, Quantity>>,
) -> BTreeMap<String, Quantity> {
    let spec = pod.spec.as_ref();
    let containers = spec.iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
    let of_containers = containers.filter_map(|container| container.resources.as_ref());
    let all: Vec<_> = spec.and_then(|s| s.resources.as_ref()).into_iter().chain(of_containers).collect();
    let format = |name: &str| {
        all.iter().find_map(|resources| of(resources)?.get(name)).map(quantity::Format::of).unwrap_or_default()
    };
    amounts.iter().map(|(name, nanos)| (name.to_owned(), quantity::from_nanos(nanos, format(name)))).collect()
}

/// A quantity in a Pod's manifest that is not one. Terminal: the manifest has to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {source}")]
pub struct InvalidResource {
    /// Path of the field in the manifest.
    pub field: String,
    /// What is wrong with it.
    pub source: InvalidQuantity,
}

/// Checks every quantity that this module reads. The API server has done so; a static manifest has not been checked.
pub fn validate(pod: &Pod) -> Result<(), InvalidResource> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    let check = |field: &str, list: Option<&BTreeMap<String, Quantity>>| {
        for (name, q) in list.into_iter().flatten() {
            quantity::nanos(&q.0).map_err(|source| InvalidResource { field: format!("{field}[{name}]"), source })?;
        }
        Ok(())
    };
    let both = |field: &str, resources: Option<&ResourceRequirements>| {
        check(&format!("{field}.requests"), resources.and_then(|r| r.requests.as_ref()))?;
        check(&format!("{field}.limits"), resources.and_then(|r| r.limits.as_ref()))
    };
    both("spec.resources", spec.resources.as_ref())?;
    check("spec.overhead", spec.overhead.as_ref())?;
    for (index, container) in spec.containers.iter().enumerate() {
        both(&format!("spec.containers[{index}].resources"), container.resources.as_ref())?;
    }
    for (index, container) in spec.init_containers.iter().flatten().enumerate() {
        both(&format!("spec.initContainers[{index}].resources"), container.resources.as_ref())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{container, pod};
    use super::*;

    #[test]
    fn init_containers_count_at_their_peak() {
        let mut p = pod(vec![container("a", &[("cpu", "1")], &[]), container("b", &[("cpu", "500m")], &[])]);
        p.spec.as_mut().unwrap().init_containers = Some(vec![container("i", &[("cpu", "3"), ("memory", "1Gi")], &[])]);
        let total = pod_requests(&p);
        assert_eq!(total.milli(CPU), 3000);
        assert_eq!(total.value(MEMORY), 1 << 30);
    }

    #[test]
    fn sidecars_add_up_with_what_runs_beside_them() {
        // KEP-753: InitContainerUse(i) = sidecars before i + container i
        let mut sidecar = container("s", &[("cpu", "2")], &[]);
        sidecar.restart_policy = Some("Always".into());
        let mut p = pod(vec![container("a", &[("cpu", "1")], &[])]);
        p.spec.as_mut().unwrap().init_containers =
            Some(vec![container("i1", &[("cpu", "4")], &[]), sidecar, container("i2", &[("cpu", "3")], &[])]);
        assert_eq!(pod_requests(&p).milli(CPU), 5000);
    }

    #[test]
    fn pod_level_requests_replace_the_sum_and_overhead_is_added() {
        let mut p = pod(vec![container("a", &[("cpu", "1"), ("example.com/gpu", "2")], &[("memory", "10")])]);
        let spec = p.spec.as_mut().unwrap();
        spec.resources = Some(ResourceRequirements {
            requests: Some(
                [("cpu".into(), Quantity("4".into())), ("example.com/gpu".into(), Quantity("9".into()))].into(),
            ),
            ..Default::default()
        });
        spec.overhead = Some([("cpu".into(), Quantity("250m".into())), ("memory".into(), Quantity("5".into()))].into());
        let total = pod_requests(&p);
        assert_eq!((total.milli(CPU), total.value("example.com/gpu")), (4250, 2));
        let limits = pod_limits(&p);
        assert_eq!((limits.lists(CPU), limits.value(MEMORY)), (false, 15));
    }

    #[test]
    fn a_wrong_quantity_is_named() {
        let p = pod(vec![container("a", &[], &[("memory", "12 apples")])]);
        assert!(
            validate(&p)
                .unwrap_err()
                .to_string()
                .starts_with("spec.containers[0].resources.limits[memory]: \"12 apples\"")
        );
    }
}
