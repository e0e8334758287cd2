//! What plugins offer, and what of it is allocated: the state without its connections.
//!
//! Source: `ManagerImpl` in `pkg/kubelet/cm/devicemanager/manager.go`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::api::{ContainerResponse, HEALTHY, Listing};
use super::choose::{Choice, Request, choose};
use super::error::DeviceError;
use super::holdings::{Grant, Holdings, NO_NUMA, Reusable};

/// A resource whose plugin is away keeps its place in the Node's capacity so long (`endpointStopGracePeriod`).
const GRACE: Duration = Duration::from_secs(5 * 60);

/// Devices of a container: by resource and ID, whether they work.
pub type DeviceHealth = BTreeMap<String, BTreeMap<String, bool>>;

/// How many devices there are, by resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// All devices.
    pub capacity: BTreeMap<String, usize>,
    /// Those that work.
    pub allocatable: BTreeMap<String, usize>,
    /// Resources whose plugin has not come back in time.
    pub removed: BTreeSet<String>,
}

/// A resource that a plugin offers or offered not long ago.
#[derive(Clone, Debug, Default)]
struct Offer {
    healthy: BTreeSet<String>,
    unhealthy: BTreeSet<String>,
    /// Since when no plugin is connected.
    stopped: Option<Instant>,
}

/// What was last said of a device.
#[derive(Clone, Debug)]
struct Device {
    healthy: bool,
    numa: Vec<i64>,
}

/// A device and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DevicePlace {
    pub resource: String,
    pub id: String,
    /// NUMA nodes.
    pub numa: Vec<i64>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Inventory {
    offers: BTreeMap<String, Offer>,
    /// Every device as it was last listed, also of plugins that have gone.
    known: BTreeMap<String, BTreeMap<String, Device>>,
    removed: BTreeSet<String>,
    /// What is allocated.
    pub holdings: Holdings,
}

impl Inventory {
    /// What an earlier life knew: resources are offered again, without a device until their plugins come back.
    pub fn restored(holdings: Holdings, registered: impl IntoIterator<Item = String>, now: Instant) -> Self {
        let offer = || Offer { stopped: Some(now), ..Offer::default() };
        let offers = registered.into_iter().map(|resource| (resource, offer())).collect();
        Self { offers, holdings, ..Self::default() }
    }

    /// A plugin has listed its devices.
    pub fn list(&mut self, resource: &str, listing: Listing) {
        let offer = self.offers.entry(resource.to_owned()).or_default();
        *offer = Offer::default();
        let mut known = BTreeMap::new();
        for device in listing.devices {
            let healthy = device.health == HEALTHY;
            if healthy {
                offer.unhealthy.remove(&device.id);
                offer.healthy.insert(device.id.clone());
            } else {
                offer.healthy.remove(&device.id);
                offer.unhealthy.insert(device.id.clone());
            }
            let numa = device.topology.iter().flat_map(|topology| &topology.nodes).map(|node| node.id).collect();
            known.insert(device.id, Device { healthy, numa });
        }
        self.known.insert(resource.to_owned(), known);
        self.removed.remove(resource);
    }

    /// A plugin has connected: what it offers is there for longer than a grace.
    pub fn connected(&mut self, resource: &str) {
        if let Some(offer) = self.offers.get_mut(resource) {
            offer.stopped = None;
        }
    }

    /// The last plugin of a resource has gone: none of its devices can be allocated. What Pods have is not touched,
    /// and is as healthy as it was.
    pub fn disconnected(&mut self, resource: &str, now: Instant) {
        if let Some(offer) = self.offers.get_mut(resource) {
            let healthy = std::mem::take(&mut offer.healthy);
            offer.unhealthy.extend(healthy);
            offer.stopped = Some(now);
        }
    }

    /// Removes resources whose plugin stayed away; whether there were any, and when to look again.
    pub fn expire(&mut self, now: Instant) -> (bool, Option<Instant>) {
        let is_over = |offer: &Offer| offer.stopped.is_some_and(|since| now.duration_since(since) > GRACE);
        let over: Vec<String> =
            self.offers.iter().filter(|(_, offer)| is_over(offer)).map(|(name, _)| name.clone()).collect();
        for resource in &over {
            self.offers.remove(resource);
        }
        let next = self.offers.values().filter_map(|offer| offer.stopped).min();
        let any = !over.is_empty();
        self.removed.extend(over);
        (any, next.map(|since| since + GRACE + Duration::from_millis(1)))
    }

    /// For the Node's status.
    pub fn totals(&self) -> Totals {
        let of = |count: fn(&Offer) -> usize| {
            self.offers.iter().map(|(resource, offer)| (resource.clone(), count(offer))).collect()
        };
        Totals {
            capacity: of(|offer| offer.healthy.len() + offer.unhealthy.len()),
            allocatable: of(|offer| offer.healthy.len()),
            removed: self.removed.clone(),
        }
    }

    /// Devices that can be allocated, by resource: what the checkpoint calls registered.
    pub fn registered(&self) -> impl Iterator<Item = (&str, &BTreeSet<String>)> {
        self.offers.iter().map(|(resource, offer)| (resource.as_str(), &offer.healthy))
    }

    /// A plugin's resource; others are none of ours (`isDevicePluginResource`).
    pub fn is_ours(&self, resource: &str) -> bool {
        self.offers.contains_key(resource) || self.holdings.names(resource)
    }

    /// Which devices a container gets.
    pub fn choose(
        &self,
        pod: &str,
        container: &str,
        resource: &str,
        required: usize,
        reusable: &Reusable,
    ) -> Result<Choice, DeviceError> {
        let has = self.holdings.get(pod, container, resource).map(Grant::ids);
        choose(&Request {
            pod,
            container,
            resource,
            required,
            has: has.as_ref(),
            healthy: self.offers.get(resource).map(|offer| &offer.healthy),
            in_use: &self.holdings.in_use(resource),
            reusable: reusable.get(resource),
        })
    }

    /// Notes what was allocated.
    pub fn grant(
        &mut self,
        pod: &str,
        container: &str,
        resource: &str,
        ids: &BTreeSet<String>,
        response: ContainerResponse,
    ) {
        let known = self.known.get(resource);
        let mut devices: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for id in ids {
            let numa = known.and_then(|known| known.get(id)).map(|device| device.numa.as_slice()).unwrap_or_default();
            for node in if numa.is_empty() { &[NO_NUMA] } else { numa } {
                devices.entry(*node).or_default().push(id.clone());
            }
        }
        self.holdings.insert(pod, container, resource, Grant { devices, response });
    }

    /// The devices that work.
    pub fn allocatable(&self) -> Vec<DevicePlace> {
        let places = self.offers.iter().flat_map(|(resource, offer)| {
            let known = self.known.get(resource);
            offer.healthy.iter().map(move |id| DevicePlace {
                resource: resource.clone(),
                id: id.clone(),
                numa: known.and_then(|known| known.get(id)).map(|device| device.numa.clone()).unwrap_or_default(),
            })
        });
        places.collect()
    }

    /// The devices of a container.
    pub fn devices_of(&self, pod: &str, container: &str) -> Vec<DevicePlace> {
        let grants = self.holdings.of_container(pod, container).into_iter().flatten();
        let places = grants.flat_map(|(resource, grant)| {
            grant.ids().into_iter().map(|id| {
                let on = grant.devices.iter().filter(|(node, ids)| **node != NO_NUMA && ids.contains(&id));
                DevicePlace { resource: resource.clone(), numa: on.map(|(node, _)| *node).collect(), id }
            })
        });
        places.collect()
    }

    /// How the devices of a Pod's containers do. One that was not listed since the start is taken for healthy, as
    /// kubelet does (`UpdateAllocatedResourcesStatus`).
    pub fn health(&self, pod: &str) -> BTreeMap<String, DeviceHealth> {
        let healthy = |resource: &str, id: &str| {
            self.known.get(resource).and_then(|known| known.get(id)).is_none_or(|device| device.healthy)
        };
        let of_resource = |resource: &str, grant: &Grant| {
            grant.ids().into_iter().map(|id| (id.clone(), healthy(resource, &id))).collect()
        };
        let containers = self.holdings.of_pod(pod).map(|(container, grants)| {
            let devices = grants.iter().map(|(resource, grant)| (resource.clone(), of_resource(resource, grant)));
            (container.to_owned(), devices.collect())
        });
        containers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::{ListedDevice, NumaNode, Topology};
    use super::*;

    fn listing(devices: &[(&str, &str)]) -> Listing {
        let device = |(id, health): &(&str, &str)| ListedDevice {
            id: (*id).to_owned(),
            health: (*health).to_owned(),
            topology: None,
        };
        Listing { devices: devices.iter().map(device).collect() }
    }

    fn ids(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|id| (*id).to_owned()).collect()
    }

    fn totals(inventory: &Inventory) -> (usize, usize) {
        let totals = inventory.totals();
        (totals.capacity["r/x"], totals.allocatable["r/x"])
    }

    #[tokio::test(start_paused = true)]
    async fn a_plugin_that_goes_is_waited_for_and_then_removed() {
        let mut inventory = Inventory::default();
        inventory.list("r/x", listing(&[("1", "Healthy"), ("2", "Unhealthy"), ("3", "Healthy")]));
        assert_eq!(totals(&inventory), (3, 2));
        inventory.disconnected("r/x", Instant::now());
        assert_eq!(totals(&inventory), (3, 0));
        let (expired, next) = inventory.expire(Instant::now());
        assert!(!expired);
        tokio::time::sleep_until(next.unwrap()).await;
        assert_eq!(inventory.expire(Instant::now()), (true, None));
        let left = inventory.totals();
        assert!(left.capacity.is_empty() && left.removed.contains("r/x"));
        inventory.list("r/x", listing(&[("1", "Healthy")]));
        assert!(inventory.totals().removed.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_plugin_that_comes_back_in_time_stays() {
        let mut inventory = Inventory::restored(Holdings::default(), ["r/x".to_owned()], Instant::now());
        assert_eq!(totals(&inventory), (0, 0));
        let error = inventory.choose("p", "c", "r/x", 1, &Reusable::new()).unwrap_err();
        assert_eq!(error, DeviceError::NoneHealthy("r/x".to_owned()));
        inventory.connected("r/x");
        assert_eq!(inventory.expire(Instant::now() + GRACE * 2), (false, None));
        inventory.list("r/x", listing(&[("1", "Healthy")]));
        assert_eq!(totals(&inventory), (1, 1));
    }

    #[test]
    fn health_is_that_of_the_last_listing() {
        let mut inventory = Inventory::default();
        inventory.list("r/x", listing(&[("1", "Healthy"), ("2", "Healthy")]));
        inventory.grant("p", "c", "r/x", &ids(&["1", "2"]), ContainerResponse::default());
        let health = |inventory: &Inventory| inventory.health("p")["c"]["r/x"].clone();
        assert_eq!(health(&inventory), [("1".to_owned(), true), ("2".to_owned(), true)].into());
        inventory.list("r/x", listing(&[("1", "Broken")]));
        assert_eq!(health(&inventory), [("1".to_owned(), false), ("2".to_owned(), true)].into());
        assert!(inventory.health("q").is_empty());
    }

    #[test]
    fn devices_are_noted_by_their_place() {
        let mut inventory = Inventory::default();
        let mut list = listing(&[("1", "Healthy"), ("2", "Healthy")]);
        list.devices[0].topology = Some(Topology { nodes: vec![NumaNode { id: 0 }, NumaNode { id: 1 }] });
        inventory.list("r/x", list);
        inventory.grant("p", "c", "r/x", &ids(&["1", "2"]), ContainerResponse::default());
        let grant = inventory.holdings.get("p", "c", "r/x").unwrap();
        let place = |node: i64, id: &str| (node, vec![id.to_owned()]);
        assert_eq!(grant.devices, [place(-1, "2"), place(0, "1"), place(1, "1")].into());
        assert_eq!(grant.ids(), ids(&["1", "2"]));
        let places = inventory.devices_of("p", "c");
        let numa = |id: &str| places.iter().find(|place| place.id == id).map(|place| place.numa.as_slice());
        assert_eq!((numa("1"), numa("2")), (Some(&[0, 1][..]), Some(&[][..])));
        assert_eq!(inventory.allocatable(), places, "all work, and the container has all");
    }

    #[test]
    fn resources_of_others_are_none_of_ours() {
        let mut inventory = Inventory::default();
        assert!(!inventory.is_ours("r/x"));
        inventory.grant("p", "c", "r/x", &ids(&["1"]), ContainerResponse::default());
        assert!(inventory.is_ours("r/x"), "it was once allocated");
    }
}
