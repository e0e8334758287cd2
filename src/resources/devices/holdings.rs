//! Which container has which devices.
//!
//! Source: `pkg/kubelet/cm/devicemanager/pod_devices.go`.

use std::collections::{BTreeMap, BTreeSet};

use super::api::ContainerResponse;

/// Where devices without a place on the board are counted (`nodeWithoutTopology`).
pub(super) const NO_NUMA: i64 = -1;

/// Devices of one resource that a container has.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Grant {
    /// By NUMA node; a device that belongs to several is listed for each.
    pub devices: BTreeMap<i64, Vec<String>>,
    /// How the container gets at them.
    pub response: ContainerResponse,
}

impl Grant {
    /// The devices.
    pub fn ids(&self) -> BTreeSet<String> {
        self.devices.values().flatten().cloned().collect()
    }
}

/// Devices by resource, taken over from init containers that have ended by then.
pub(super) type Reusable = BTreeMap<String, BTreeSet<String>>;

type Container = BTreeMap<String, Grant>;

/// All that is allocated: by Pod (UID), container and resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Holdings(BTreeMap<String, BTreeMap<String, Container>>);

impl Holdings {
    pub fn has_pod(&self, pod: &str) -> bool {
        self.0.contains_key(pod)
    }

    pub fn insert(&mut self, pod: &str, container: &str, resource: &str, grant: Grant) {
        let containers = self.0.entry(pod.to_owned()).or_default();
        containers.entry(container.to_owned()).or_default().insert(resource.to_owned(), grant);
    }

    pub fn get(&self, pod: &str, container: &str, resource: &str) -> Option<&Grant> {
        self.0.get(pod)?.get(container)?.get(resource)
    }

    /// A container's grants by resource.
    pub fn of_container(&self, pod: &str, container: &str) -> Option<&Container> {
        self.0.get(pod)?.get(container)
    }

    /// A Pod's grants by container and resource.
    pub fn of_pod(&self, pod: &str) -> impl Iterator<Item = (&str, &Container)> {
        self.0.get(pod).into_iter().flatten().map(|(name, grants)| (name.as_str(), grants))
    }

    /// The Pods that have devices.
    pub fn pods(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Pod, container, resource and grant of everything.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &str, &Grant)> {
        self.0.iter().flat_map(|(pod, containers)| {
            containers.iter().flat_map(move |(container, grants)| {
                grants.iter().map(move |(resource, grant)| (pod.as_str(), container.as_str(), resource.as_str(), grant))
            })
        })
    }

    /// Takes the devices of Pods back that are not to be kept; whether there were any.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|pod, _| keep(pod));
        self.0.len() != before
    }

    /// Devices of a resource that somebody has.
    pub fn in_use(&self, resource: &str) -> BTreeSet<String> {
        self.iter().filter(|(.., name, _)| *name == resource).flat_map(|(.., grant)| grant.ids()).collect()
    }

    /// Whether anything of a resource is allocated.
    pub fn names(&self, resource: &str) -> bool {
        self.iter().any(|(.., name, _)| name == resource)
    }

    /// How many devices of each resource are in use.
    pub fn counts(&self) -> BTreeMap<&str, usize> {
        let mut devices: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (.., resource, grant) in self.iter() {
            let ids = grant.devices.values().flatten().map(String::as_str);
            devices.entry(resource).or_default().extend(ids);
        }
        devices.into_iter().map(|(resource, ids)| (resource, ids.len())).collect()
    }

    /// After a container was served: an init container leaves its devices to those that come later; one that runs on
    /// (a sidecar) and a main container keep theirs.
    pub fn pass_on(&self, pod: &str, container: &str, ends: bool, reusable: &mut Reusable) {
        for (resource, grant) in self.of_container(pod, container).into_iter().flatten() {
            let devices = reusable.entry(resource.clone()).or_default();
            for id in grant.ids() {
                if ends {
                    devices.insert(id);
                } else {
                    devices.remove(&id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(ids: &[&str]) -> Grant {
        let ids = ids.iter().map(|id| (*id).to_owned()).collect();
        Grant { devices: [(NO_NUMA, ids)].into(), response: ContainerResponse::default() }
    }

    #[test]
    fn what_is_held_is_in_use_until_it_is_let_go() {
        let mut holdings = Holdings::default();
        holdings.insert("p", "a", "r/x", grant(&["1", "2"]));
        holdings.insert("q", "a", "r/x", grant(&["3"]));
        holdings.insert("q", "b", "r/y", grant(&["1"]));
        assert_eq!(holdings.in_use("r/x").into_iter().collect::<Vec<_>>(), ["1", "2", "3"]);
        assert_eq!(holdings.counts(), [("r/x", 3), ("r/y", 1)].into());
        assert!(holdings.retain(|pod| pod == "p"));
        assert!(!holdings.retain(|pod| pod == "p"));
        assert_eq!(holdings.in_use("r/x").len(), 2);
        assert!(!holdings.names("r/y"));
    }

    #[test]
    fn a_device_on_two_nodes_is_one_device() {
        let mut holdings = Holdings::default();
        let devices = [(0, vec!["1".to_owned()]), (1, vec!["1".to_owned()])].into();
        holdings.insert("p", "a", "r/x", Grant { devices, ..Grant::default() });
        assert_eq!(holdings.counts(), [("r/x", 1)].into());
    }

    #[test]
    fn init_containers_leave_their_devices_to_the_next() {
        let mut holdings = Holdings::default();
        let mut reusable = Reusable::new();
        holdings.insert("p", "init", "r/x", grant(&["1", "2"]));
        holdings.pass_on("p", "init", true, &mut reusable);
        assert_eq!(reusable["r/x"].len(), 2);
        holdings.insert("p", "sidecar", "r/x", grant(&["1"]));
        holdings.pass_on("p", "sidecar", false, &mut reusable);
        assert_eq!(reusable["r/x"], ["2".to_owned()].into());
    }
}
