//! The Node's status as a pure function of what is known.
//!
//! Source: `pkg/kubelet/nodestatus/setters.go`, `nodeStatusHasChanged` in `kubelet_node_status.go`,
//! `component-helpers/node/util/status.go` (the patch).

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeStatus, NodeSwapStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Map, Value, json};

use super::machine::MachineInfo;
use crate::config::{Config, KUBERNETES_VERSION, KubeletConfiguration};
use crate::resources::quantity;

/// Names of one image in a Node's status at most.
const MAX_NAMES_PER_IMAGE: usize = 5;

/// Everything that the status tells, save health.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// The machine.
    pub machine: MachineInfo,
    /// Addresses; kept as they are if a cloud controller has set others.
    pub addresses: Vec<NodeAddress>,
    /// Images, largest first, with all their names (digests first).
    pub images: Vec<ContainerImage>,
    /// Attachable volumes in use (`kubernetes.io/csi/<driver>^<handle>`); `None` until they are known.
    pub volumes_in_use: Option<Vec<String>>,
    /// Resources of device plugins.
    pub devices: DeviceResources,
    /// What our runtimes can do, by handler name (empty for the default one).
    pub runtime_handlers: Vec<NodeRuntimeHandler>,
    /// `supplementalGroupsPolicy` is honoured.
    pub supplemental_groups_policy: bool,
    /// Sorted names of the features we declare.
    pub declared_features: Vec<String>,
}

/// Resources that device plugins offer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceResources {
    /// All devices.
    pub capacity: BTreeMap<String, Quantity>,
    /// Healthy ones.
    pub allocatable: BTreeMap<String, Quantity>,
    /// Resources whose plugin has gone; reported as 0.
    pub removed: Vec<String>,
    /// This machine remembers no plugins: what a Node that is there lists is of another life
    /// (`ShouldResetExtendedResourceCapacity`).
    pub made_anew: bool,
}

/// How the node does. Errors are texts for the Ready condition's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeHealth {
    /// The runtime works.
    pub runtime: Result<(), String>,
    /// The Pod network works.
    pub network: Result<(), String>,
    /// Volumes work.
    pub storage: Result<(), String>,
    /// The machine shuts down.
    pub shutting_down: bool,
    /// Wishes about the host that are not met, as a warning in the Ready message.
    pub soft_requirements: Option<String>,
    /// A memory threshold was crossed.
    pub memory_pressure: bool,
    /// A disk threshold was crossed.
    pub disk_pressure: bool,
    /// A process number threshold was crossed.
    pub pid_pressure: bool,
}

impl Default for NodeHealth {
    /// Nothing is up yet.
    fn default() -> Self {
        Self {
            runtime: Err("container runtime status check may not have completed yet".to_owned()),
            network: Err("container runtime network not ready: the Pod network is being set up".to_owned()),
            storage: Ok(()),
            shutting_down: false,
            soft_requirements: None,
            memory_pressure: false,
            disk_pressure: false,
            pid_pressure: false,
        }
    }
}

/// The new status and the names of events that the change from the previous one deserves
/// (`NodeReady`, `NodeHasDiskPressure`, `Rebooted`, ...).
#[must_use]
pub fn build(
    previous: &NodeStatus,
    config: &Config,
    facts: &NodeFacts,
    health: &NodeHealth,
    now: Timestamp,
) -> (NodeStatus, Vec<&'static str>) {
    let mut status = previous.clone();
    let mut events = Vec::new();
    let keep = config.external_cloud_provider && previous.addresses.as_ref().is_some_and(|list| !list.is_empty());
    if !keep && !facts.addresses.is_empty() {
        status.addresses = Some(facts.addresses.clone());
    }
    resources(&mut status, config, facts);
    let boot_id = previous.node_info.as_ref().map_or("", |info| info.boot_id.as_str());
    if !boot_id.is_empty() && boot_id != facts.machine.boot_id {
        events.push("Rebooted");
    }
    status.node_info = Some(node_info(facts));
    status.daemon_endpoints =
        Some(NodeDaemonEndpoints { kubelet_endpoint: Some(DaemonEndpoint { port: config.kubelet.port }) });
    status.images = Some(images(&facts.images, config.kubelet.node_status_max_images));
    status.runtime_handlers = Some(facts.runtime_handlers.clone());
    status.features = Some(NodeFeatures { supplemental_groups_policy: Some(facts.supplemental_groups_policy) });
    status.declared_features = Some(facts.declared_features.clone());
    if let Some(volumes) = &facts.volumes_in_use {
        status.volumes_in_use = Some(volumes.clone());
    }
    for pressure in &PRESSURES {
        pressure.set(&mut status, (pressure.present)(health), now, &mut events);
    }
    // Ready stays the last condition
    ready(&mut status, config, health, now, &mut events);
    (status, events)
}

fn node_info(facts: &NodeFacts) -> NodeSystemInfo {
    let machine = &facts.machine;
    NodeSystemInfo {
        architecture: architecture().to_owned(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: concat!("gantry://", env!("CARGO_PKG_VERSION")).to_owned(),
        kernel_version: machine.kernel_version.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: KUBERNETES_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        running_in_user_namespace: Some(machine.in_user_namespace),
        swap: (machine.swap > 0).then_some(NodeSwapStatus { capacity: Some(machine.swap) }),
        system_uuid: machine.system_uuid.clone(),
    }
}

/// Go's name of our architecture.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn images(images: &[ContainerImage], most: i32) -> Vec<ContainerImage> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let shorten = |image: &ContainerImage| {
        let names = image.names.iter().flatten().take(MAX_NAMES_PER_IMAGE).cloned().collect();
        ContainerImage { names: Some(names), size_bytes: image.size_bytes }
    };
    images.iter().take(most).map(shorten).collect()
}

fn resources(status: &mut NodeStatus, config: &Config, facts: &NodeFacts) {
    let capacity = status.capacity.get_or_insert_default();
    let machine = &facts.machine;
    let mut set = |name: &str, amount: Quantity| {
        capacity.insert(name.to_owned(), amount);
    };
    set("cpu", Quantity(machine.cpus.to_string()));
    set("memory", quantity::from_bytes(machine.memory));
    let kubelet = &config.kubelet;
    let per_core = i64::from(kubelet.pods_per_core) * i64::from(machine.cpus);
    let most = i64::from(kubelet.max_pods);
    set("pods", Quantity(if per_core > 0 { per_core.min(most) } else { most }.to_string()));
    for (name, bytes) in &machine.huge_pages {
        set(name, quantity::from_bytes(*bytes));
    }
    if let Some(bytes) = machine.ephemeral_storage.filter(|_| kubelet.local_storage_capacity_isolation) {
        set("ephemeral-storage", quantity::from_bytes(bytes));
    }
    capacity.retain(|name, _| !name.starts_with("hugepages-") || machine.huge_pages.contains_key(name));
    capacity.extend(facts.devices.capacity.clone());
    for name in &facts.devices.removed {
        capacity.insert(name.clone(), Quantity("0".to_owned()));
    }
    let capacity = capacity.clone();
    status.allocatable = Some(allocatable(&capacity, config, facts));
}

/// Capacity without reservations: kube-reserved, system-reserved, hard eviction thresholds; memory also without
/// huge pages (`pkg/kubelet/cm/node_container_manager_linux.go`).
fn allocatable(
    capacity: &BTreeMap<String, Quantity>,
    config: &Config,
    facts: &NodeFacts,
) -> BTreeMap<String, Quantity> {
    let nanos = |amount: &Quantity| quantity::nanos(&amount.0).unwrap_or(0);
    let mut result = BTreeMap::new();
    for (name, total) in capacity {
        let left = nanos(total) - reserved(name, nanos(total), config);
        result.insert(name.clone(), if left == nanos(total) { total.clone() } else { format(name, left.max(0)) });
    }
    let huge: i128 =
        capacity.iter().filter(|(name, _)| name.starts_with("hugepages-")).map(|(_, amount)| nanos(amount)).sum();
    if huge > 0
        && let Some(memory) = result.get_mut("memory")
    {
        *memory = format("memory", (nanos(memory) - huge).max(0));
    }
    result.extend(facts.devices.allocatable.clone());
    result
}

/// Billionths back to the form of a resource.
fn format(name: &str, nanos: i128) -> Quantity {
    let whole = |unit: i128| i64::try_from(nanos / unit).unwrap_or(i64::MAX);
    if name == "cpu" { quantity::from_milli(whole(1_000_000)) } else { quantity::from_bytes(whole(1_000_000_000)) }
}

/// What `systemReserved` and `kubeReserved` keep of a resource, in billionths. `pid` is a resource here.
#[must_use]
pub fn reservation(name: &str, kubelet: &KubeletConfiguration) -> i128 {
    let amount =
        |map: &BTreeMap<String, String>| map.get(name).and_then(|text| quantity::nanos(text).ok()).unwrap_or(0);
    if name == "cpu" && !kubelet.reserved_system_cpus.is_empty() {
        // the explicit list supersedes both amounts
        i128::from(super::machine::count_cpus(&kubelet.reserved_system_cpus)) * 1_000_000_000
    } else {
        amount(&kubelet.system_reserved) + amount(&kubelet.kube_reserved)
    }
}

/// How much of a resource Pods do not get, in billionths.
fn reserved(name: &str, total: i128, config: &Config) -> i128 {
    let kubelet = &config.kubelet;
    let explicit = reservation(name, kubelet);
    let signal = match name {
        "memory" => "memory.available",
        "ephemeral-storage" => "nodefs.available",
        _ => return explicit,
    };
    if config.allocatable_ignores_eviction {
        return explicit;
    }
    let threshold = kubelet.eviction_hard.get(signal).map_or("", String::as_str);
    let eviction = match threshold.strip_suffix('%').map(str::parse::<f64>) {
        // whole bytes, as kubelet computes it
        Some(Ok(percent)) => percent_of(total / 1_000_000_000, percent) * 1_000_000_000,
        _ => quantity::nanos(threshold).unwrap_or(0),
    };
    explicit + eviction
}

/// A percentage in hundred-thousandths, so that no float holds a byte count.
fn percent_of(bytes: i128, percent: f64) -> i128 {
    let scaled = format!("{:.0}", percent.clamp(0.0, 100.0) * 1000.0);
    bytes * scaled.parse::<i128>().unwrap_or(0) / 100_000
}

/// A pressure condition and its words.
struct Pressure {
    condition: &'static str,
    present: fn(&NodeHealth) -> bool,
    /// Reason, message and event while it lasts.
    yes: [&'static str; 3],
    /// The same otherwise.
    no: [&'static str; 3],
}

const PRESSURES: [Pressure; 3] = [
    Pressure {
        condition: "MemoryPressure",
        present: |health| health.memory_pressure,
        yes: ["KubeletHasInsufficientMemory", "kubelet has insufficient memory available", "NodeHasInsufficientMemory"],
        no: ["KubeletHasSufficientMemory", "kubelet has sufficient memory available", "NodeHasSufficientMemory"],
    },
    Pressure {
        condition: "DiskPressure",
        present: |health| health.disk_pressure,
        yes: ["KubeletHasDiskPressure", "kubelet has disk pressure", "NodeHasDiskPressure"],
        no: ["KubeletHasNoDiskPressure", "kubelet has no disk pressure", "NodeHasNoDiskPressure"],
    },
    Pressure {
        condition: "PIDPressure",
        present: |health| health.pid_pressure,
        yes: ["KubeletHasInsufficientPID", "kubelet has insufficient PID available", "NodeHasInsufficientPID"],
        no: ["KubeletHasSufficientPID", "kubelet has sufficient PID available", "NodeHasSufficientPID"],
    },
];

impl Pressure {
    fn set(&self, status: &mut NodeStatus, present: bool, now: Timestamp, events: &mut Vec<&'static str>) {
        let [reason, message, event] = if present { self.yes } else { self.no };
        if put(status, self.condition, present, reason, message.to_owned(), now) {
            events.push(event);
        }
    }
}

/// Sets a condition; true if its status changed. The transition time moves only then.
fn put(status: &mut NodeStatus, kind: &str, value: bool, reason: &str, message: String, now: Timestamp) -> bool {
    let word = if value { "True" } else { "False" };
    let conditions = status.conditions.get_or_insert_default();
    let index = conditions.iter().position(|condition| condition.type_ == kind);
    let old = index.map(|index| conditions.remove(index));
    let changed = old.as_ref().is_none_or(|old| old.status != word);
    let since = old.filter(|_| !changed).and_then(|old| old.last_transition_time).unwrap_or(Time(now));
    let condition = NodeCondition {
        type_: kind.to_owned(),
        status: word.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(since),
    };
    conditions.insert(index.unwrap_or(conditions.len()), condition);
    changed
}

fn ready(
    status: &mut NodeStatus,
    config: &Config,
    health: &NodeHealth,
    now: Timestamp,
    events: &mut Vec<&'static str>,
) {
    let mut problems: Vec<String> = Vec::new();
    for problem in
        [&health.runtime, &health.network, &health.storage].into_iter().filter_map(|part| part.as_ref().err())
    {
        if !problems.contains(problem) {
            problems.push(problem.clone());
        }
    }
    if health.shutting_down {
        problems.push("node is shutting down".to_owned());
    }
    let mut required = vec!["cpu", "memory", "pods"];
    if config.kubelet.local_storage_capacity_isolation {
        required.push("ephemeral-storage");
    }
    let missing: Vec<&str> = required
        .into_iter()
        .filter(|name| !status.capacity.as_ref().is_some_and(|capacity| capacity.contains_key(*name)))
        .collect();
    if !missing.is_empty() {
        problems.push(format!("missing node capacity for resources: {}", missing.join(", ")));
    }
    let mut message = match problems.as_slice() {
        [] => "kubelet is posting ready status".to_owned(),
        [one] => one.clone(),
        several => format!("[{}]", several.join(", ")),
    };
    if let Some(warning) = &health.soft_requirements {
        message = format!("{message}. WARNING: {warning}");
    }
    let is_ready = problems.is_empty();
    let known = status.conditions.iter().flatten().any(|condition| condition.type_ == "Ready");
    let reason = if is_ready { "KubeletReady" } else { "KubeletNotReady" };
    // a condition that did not exist before is no event
    if put(status, "Ready", is_ready, reason, message, now) && known {
        events.push(if is_ready { "NodeReady" } else { "NodeNotReady" });
    }
}

/// Whether a status says that the node is ready.
#[must_use]
pub fn is_ready(status: &NodeStatus) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Whether anything but heartbeat times differs.
#[must_use]
pub fn has_changed(old: &NodeStatus, new: &NodeStatus) -> bool {
    let plain = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        status.conditions.iter_mut().for_each(|list| list.sort_by(|a, b| a.type_.cmp(&b.type_)));
        for amounts in [&mut status.capacity, &mut status.allocatable].into_iter().flatten() {
            for amount in amounts.values_mut() {
                // equal amounts may be written differently
                if let Ok(nanos) = quantity::nanos(&amount.0) {
                    *amount = Quantity(nanos.to_string());
                }
            }
        }
        // empty and absent lists are the same to the API server
        for list in [&mut status.volumes_in_use, &mut status.declared_features] {
            *list = list.take().filter(|list| !list.is_empty());
        }
        status.images = status.images.take().filter(|list| !list.is_empty());
        status.runtime_handlers = status.runtime_handlers.take().filter(|list| !list.is_empty());
        status
    };
    plain(old) != plain(new)
}

/// The strategic merge patch from one Node to another: changed metadata labels and annotations, and status.
/// Nothing if they are equal.
#[must_use]
pub fn patch(old: &Node, new: &Node) -> Option<Value> {
    let (old, new) = (serde_json::to_value(old).ok()?, serde_json::to_value(new).ok()?);
    let mut patch = Map::new();
    let at = |node: &Value, path: &str| node.pointer(path).cloned().unwrap_or(json!({}));
    let mut metadata = Map::new();
    for key in ["labels", "annotations"] {
        let path = format!("/metadata/{key}");
        if let Some(changes) = difference(&at(&old, &path), &at(&new, &path)) {
            metadata.insert(key.to_owned(), changes);
        }
    }
    if !metadata.is_empty() {
        patch.insert("metadata".to_owned(), Value::Object(metadata));
    }
    if let Some(mut status) = difference(&at(&old, "/status"), &at(&new, "/status")) {
        if let Some(conditions) = status.get_mut("conditions").and_then(Value::as_array_mut) {
            // they merge by type: send only those that differ
            let before = at(&old, "/status/conditions");
            let same = |new: &Value| before.as_array().is_some_and(|list| list.contains(new));
            conditions.retain(|condition| !same(condition));
        }
        if let Some(addresses) = status.get_mut("addresses").and_then(Value::as_array_mut) {
            // they would merge by type too, and two of one type would be one
            addresses.push(json!({"$patch": "replace"}));
        }
        patch.insert("status".to_owned(), status);
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

/// What must be merged into `old` to get `new`: removed keys become null, lists are replaced.
fn difference(old: &Value, new: &Value) -> Option<Value> {
    let (Value::Object(before), Value::Object(after)) = (old, new) else {
        return (old != new).then(|| new.clone());
    };
    let mut changes = Map::new();
    for (key, value) in after {
        match before.get(key) {
            Some(old) => {
                if let Some(change) = difference(old, value) {
                    changes.insert(key.clone(), change);
                }
            }
            None => {
                changes.insert(key.clone(), value.clone());
            }
        }
    }
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        changes.insert(key.clone(), Value::Null);
    }
    (!changes.is_empty()).then_some(Value::Object(changes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn facts() -> NodeFacts {
        NodeFacts {
            machine: MachineInfo {
                cpus: 4,
                memory: 8 << 30,
                ephemeral_storage: Some(100_000_000_000),
                huge_pages: [("hugepages-2Mi".to_owned(), 1 << 30)].into(),
                boot_id: "b1".into(),
                ..MachineInfo::default()
            },
            addresses: vec![NodeAddress { type_: "InternalIP".into(), address: "10.0.0.1".into() }],
            declared_features: vec!["ExtendWebSocketsToKubelet".into()],
            ..NodeFacts::default()
        }
    }

    fn healthy() -> NodeHealth {
        NodeHealth { runtime: Ok(()), network: Ok(()), ..NodeHealth::default() }
    }

    fn config() -> Config {
        Config::for_tests(Path::new("/nowhere"))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn amounts(map: &Option<BTreeMap<String, Quantity>>) -> Vec<(&str, &str)> {
        map.iter().flatten().map(|(name, amount)| (name.as_str(), amount.0.as_str())).collect()
    }

    #[test]
    fn allocatable_is_capacity_less_reservations() {
        let mut config = config();
        config.kubelet.system_reserved = [("cpu".into(), "500m".into()), ("memory".into(), "1Gi".into())].into();
        config.kubelet.kube_reserved = [("cpu".into(), "250m".into())].into();
        let (status, _) = build(&NodeStatus::default(), &config, &facts(), &healthy(), at(0));
        assert_eq!(
            amounts(&status.capacity),
            [
                ("cpu", "4"),
                ("ephemeral-storage", "97656250Ki"),
                ("hugepages-2Mi", "1Gi"),
                ("memory", "8Gi"),
                ("pods", "110")
            ]
        );
        assert_eq!(
            amounts(&status.allocatable),
            // 8Gi - 1Gi reserved - 100Mi eviction - 1Gi huge pages; 90 % of the disk
            [
                ("cpu", "3250m"),
                ("ephemeral-storage", "87890625Ki"),
                ("hugepages-2Mi", "1Gi"),
                ("memory", "6044Mi"),
                ("pods", "110")
            ]
        );
        config.kubelet.reserved_system_cpus = "0-1".into();
        config.kubelet.pods_per_core = 10;
        config.allocatable_ignores_eviction = true;
        let (status, _) = build(&NodeStatus::default(), &config, &facts(), &healthy(), at(0));
        assert_eq!(
            amounts(&status.allocatable),
            [
                ("cpu", "2"),
                ("ephemeral-storage", "97656250Ki"),
                ("hugepages-2Mi", "1Gi"),
                ("memory", "6Gi"),
                ("pods", "40")
            ]
        );
    }

    #[test]
    fn conditions_in_kubelets_words() {
        let (first, events) = build(&NodeStatus::default(), &config(), &facts(), &NodeHealth::default(), at(10));
        assert_eq!(events, ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"]);
        let condition = |status: &NodeStatus, kind: &str| {
            status.conditions.iter().flatten().find(|condition| condition.type_ == kind).unwrap().clone()
        };
        assert_eq!(first.conditions.as_ref().unwrap().last().unwrap().type_, "Ready");
        let ready = condition(&first, "Ready");
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("KubeletNotReady")));
        assert!(ready.message.unwrap().starts_with("[container runtime status check"));
        let (second, events) = build(&first, &config(), &facts(), &healthy(), at(20));
        assert_eq!(events, ["NodeReady"]);
        assert!(is_ready(&second));
        assert_eq!(condition(&second, "Ready").message.as_deref(), Some("kubelet is posting ready status"));
        assert_eq!(condition(&second, "Ready").last_transition_time, Some(Time(at(20))));
        assert_eq!(condition(&second, "MemoryPressure").last_transition_time, Some(Time(at(10))));
        let pressed = NodeHealth { disk_pressure: true, shutting_down: true, ..healthy() };
        let (third, events) = build(&second, &config(), &facts(), &pressed, at(30));
        assert_eq!(events, ["NodeHasDiskPressure", "NodeNotReady"]);
        assert_eq!(condition(&third, "Ready").message.as_deref(), Some("node is shutting down"));
        assert_eq!(condition(&third, "DiskPressure").reason.as_deref(), Some("KubeletHasDiskPressure"));
    }

    #[test]
    fn a_reboot_is_noticed_once() {
        let (first, _) = build(&NodeStatus::default(), &config(), &facts(), &healthy(), at(0));
        let mut rebooted = facts();
        rebooted.machine.boot_id = "b2".into();
        let (second, events) = build(&first, &config(), &rebooted, &healthy(), at(1));
        assert_eq!(events, ["Rebooted"]);
        assert!(build(&second, &config(), &rebooted, &healthy(), at(2)).1.is_empty());
    }

    #[test]
    fn heartbeats_are_no_change_but_travel_with_one() {
        let node = |status| Node { status: Some(status), ..Node::default() };
        let (first, _) = build(&NodeStatus::default(), &config(), &facts(), &healthy(), at(0));
        let (second, _) = build(&first, &config(), &facts(), &healthy(), at(10));
        assert!(!has_changed(&first, &second));
        let sent = patch(&node(first.clone()), &node(second.clone())).unwrap();
        assert_eq!(sent["status"].as_object().unwrap().keys().collect::<Vec<_>>(), ["conditions"]);
        assert_eq!(sent["status"]["conditions"].as_array().unwrap().len(), 4);
        assert_eq!(patch(&node(first.clone()), &node(first.clone())), None);
        let mut written = second.clone();
        written.capacity.as_mut().unwrap().insert("memory".into(), Quantity((8_i64 << 30).to_string()));
        assert!(!has_changed(&written, &second), "the same amount in other words");
    }

    #[test]
    fn patches_remove_and_replace() {
        let mut swapped = facts();
        swapped.machine.swap = 5;
        let (first, _) = build(&NodeStatus::default(), &config(), &swapped, &healthy(), at(0));
        let mut moved = facts();
        moved.addresses.push(NodeAddress { type_: "InternalIP".into(), address: "fd00::1".into() });
        moved.machine.huge_pages.clear();
        let (second, _) = build(&first, &config(), &moved, &healthy(), at(0));
        let node = |status| Node { status: Some(status), ..Node::default() };
        let sent = patch(&node(first), &node(second)).unwrap();
        assert_eq!(sent["status"]["nodeInfo"], json!({"swap": null}));
        assert_eq!(sent["status"]["capacity"], json!({"hugepages-2Mi": null}));
        assert_eq!(sent["status"]["addresses"].as_array().unwrap().last().unwrap(), &json!({"$patch": "replace"}));
    }

    #[test]
    fn devices_images_and_cloud_addresses() {
        let mut config = config();
        config.kubelet.node_status_max_images = 1;
        config.external_cloud_provider = true;
        let mut facts = facts();
        let names = (0..9).map(|n| format!("image:{n}")).collect();
        facts.images = vec![ContainerImage { names: Some(names), size_bytes: Some(9) }, ContainerImage::default()];
        facts.devices.capacity = [("example.com/gpu".into(), Quantity("2".into()))].into();
        facts.devices.allocatable = [("example.com/gpu".into(), Quantity("1".into()))].into();
        facts.devices.removed = vec!["example.com/old".into()];
        let cloud = vec![NodeAddress { type_: "ExternalIP".into(), address: "1.2.3.4".into() }];
        let previous = NodeStatus { addresses: Some(cloud.clone()), ..NodeStatus::default() };
        let (status, _) = build(&previous, &config, &facts, &healthy(), at(0));
        assert_eq!(status.addresses, Some(cloud));
        assert_eq!(status.images.as_ref().unwrap().len(), 1);
        assert_eq!(status.images.unwrap()[0].names.as_ref().unwrap().len(), 5);
        assert!(amounts(&status.allocatable).contains(&("example.com/gpu", "1")));
        assert!(amounts(&status.capacity).contains(&("example.com/old", "0")));
    }
}
