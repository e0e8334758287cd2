//! Devices of plugins: the node's capacity, Pods' admission, containers' starts.
//!
//! Source: `pkg/kubelet/cm/container_manager_linux.go`; `pkg/kubelet/cm/admission/errors.go` for the words.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use oci_spec::runtime::Mount;
use tokio::sync::watch;

use super::node::{Node, blocking};
use crate::node::NodeFacts;
use crate::node::status::DeviceResources;
use crate::pod::admission::Rejection;
use crate::pod::effects::Failure;
use crate::pod::worker::Message;
use crate::resources::devices::{ContainerDevices, DeviceHealth, PluginMount, Totals};
use crate::runtime::cdi;
use crate::runtime::spec::DeviceGrant;
use crate::shim::bundle::{Access, BindMount, Propagation};

/// The feature gate of devices' health in a Pod's status.
const HEALTH_GATE: &str = "ResourceHealthStatus";

/// What a container gets with its devices, ready for its bundle.
#[derive(Debug, Default)]
pub(super) struct Equipment {
    /// Environment variables that the container's own override.
    pub env: BTreeMap<String, String>,
    /// Environment variables that override the container's own.
    pub cdi_env: Vec<(String, String)>,
    pub grants: Vec<DeviceGrant>,
    /// Mounts of plugins.
    pub mounts: Vec<BindMount>,
    /// Mounts of CDI.
    pub cdi_mounts: Vec<Mount>,
    pub annotations: BTreeMap<String, String>,
    pub groups: Vec<i64>,
}

impl Node {
    /// Gives a Pod's containers their devices, before anything else is asked about it.
    pub(super) async fn allocate_devices(&self, pod: &Pod) -> Result<(), Rejection> {
        let allocated = self.devices.allocate(pod, |uid| self.keeps_devices(uid)).await;
        allocated.map_err(|error| Rejection {
            reason: "UnexpectedAdmissionError".to_owned(),
            message: format!("Allocate failed due to {error}, which is unexpected"),
            insufficient: Vec::new(),
        })
    }

    /// Takes the devices of a Pod back that is not admitted after all.
    pub(super) async fn release_devices(&self, uid: &str) {
        self.devices.release(|other| other != uid).await;
    }

    /// Whether a Pod's devices are its own. Before all sources have told what they have, one that is not known may
    /// still come.
    fn keeps_devices(&self, uid: &str) -> bool {
        self.pods.goes_on(uid) || (self.pods.view(uid).is_none() && !self.sources_ready.load(Ordering::Acquire))
    }

    /// What a container gets with its devices; they are made ready for it.
    pub(super) async fn equip(&self, pod: &Pod, container: &Container) -> Result<Equipment, Failure> {
        let config_error =
            |error: &dyn std::fmt::Display| Failure::new("CreateContainerConfigError", error.to_string());
        let devices = self.devices.start(pod, container, |uid| self.keeps_devices(uid)).await;
        let devices = devices.map_err(|error| config_error(&error))?;
        if devices == ContainerDevices::default() {
            return Ok(Equipment::default());
        }
        blocking(move || equipment(devices)).await.map_err(|error| Failure::new("CreateContainerError", error))
    }
}

/// Looks up what is named. Blocking.
fn equipment(devices: ContainerDevices) -> Result<Equipment, String> {
    let ContainerDevices { env, mounts, devices, annotations, mut cdi } = devices;
    for name in cdi::named_by(&annotations) {
        if !cdi.contains(&name) {
            cdi.push(name);
        }
    }
    let mut equipment = Equipment { env, annotations, ..Equipment::default() };
    for device in devices {
        let host = Path::new(&device.host_path);
        let container = if device.container_path.is_empty() { host } else { Path::new(&device.container_path) };
        let grants = DeviceGrant::from_host(host, container, &device.permissions).map_err(|error| error.to_string())?;
        equipment.grants.extend(grants);
    }
    equipment.mounts = mounts.into_iter().map(bind).collect::<Result<_, _>>()?;
    if !cdi.is_empty() {
        let edits = cdi::resolve(&cdi::DIRECTORIES.map(Path::new), &cdi).map_err(|error| error.to_string())?;
        let is_new =
            |grant: &DeviceGrant| !edits.devices.iter().any(|other| other.device.path() == grant.device.path());
        equipment.grants.retain(is_new);
        equipment.grants.extend(edits.devices);
        equipment.cdi_env = edits.env;
        equipment.cdi_mounts = edits.mounts;
        equipment.groups = edits.groups.into_iter().map(i64::from).collect();
    }
    Ok(equipment)
}

/// A mount of a plugin's. What is not there is made as a directory, as containerd does.
fn bind(mount: PluginMount) -> Result<BindMount, String> {
    let source = PathBuf::from(&mount.host_path);
    let failed = |error: std::io::Error| format!("mount {:?} of a device: {error}", mount.host_path);
    if !source.is_absolute() || !mount.container_path.starts_with('/') {
        return Err(format!(
            "mount {:?} of a device at {:?}: paths have to be absolute",
            mount.host_path, mount.container_path
        ));
    }
    if let Err(error) = fs::metadata(&source) {
        if error.kind() != std::io::ErrorKind::NotFound {
            return Err(failed(error));
        }
        fs::create_dir_all(&source).map_err(failed)?;
    }
    Ok(BindMount {
        source,
        sub_path: None,
        destination: mount.container_path.into(),
        access: if mount.read_only { Access::ReadOnly } else { Access::ReadWrite },
        propagation: Propagation::Private,
    })
}

/// What the Node's status says of devices.
fn resources(totals: Totals, made_anew: bool) -> DeviceResources {
    let list = |amounts: BTreeMap<String, usize>| {
        amounts.into_iter().map(|(resource, count)| (resource, Quantity(count.to_string()))).collect()
    };
    DeviceResources {
        capacity: list(totals.capacity),
        allocatable: list(totals.allocatable),
        removed: totals.removed.into_iter().collect(),
        made_anew,
    }
}

/// Opens the sockets for device plugins, and for those who want to know about devices.
pub(super) fn serve(node: &Arc<Node>) -> Result<(), String> {
    let root = &node.config.paths.root_dir;
    let opened = node.devices.serve(root.join("plugins_registry"));
    opened.map_err(|error| format!("open the socket for device plugins: {error}"))?;
    let pods = Arc::downgrade(&node.pods);
    let known = move |active: bool| {
        let Some(pods) = pods.upgrade() else { return Vec::new() };
        let views = pods.views().into_iter().filter(|view| !active || pods.goes_on(view.desired.uid()));
        views.map(|view| view.desired.pod.clone()).collect()
    };
    let opened = node.devices.tell_pod_resources(&root.join("pod-resources"), known);
    opened.map_err(|error| format!("open the socket for Pods' resources: {error}"))
}

/// Puts the devices into the Node's status; returns when to look again without being told.
pub(super) fn show(node: &Node, facts: &watch::Sender<Arc<NodeFacts>>) -> Option<tokio::time::Instant> {
    let (totals, next) = node.devices.totals();
    let devices = resources(totals, !node.devices.is_restored());
    facts.send_if_modified(|facts| {
        let changed = facts.devices != devices;
        if changed {
            Arc::make_mut(facts).devices = devices;
        }
        changed
    });
    next
}

/// Keeps the Node's status, the Pods' status and the owners of devices up to date. Runs until dropped.
pub(super) async fn follow(node: Arc<Node>, facts: watch::Sender<Arc<NodeFacts>>) {
    let mut devices = node.devices.changes();
    let mut pods = node.pods.changes();
    let mut told: BTreeMap<String, BTreeMap<String, DeviceHealth>> = BTreeMap::new();
    let mut next = show(&node, &facts);
    loop {
        node.devices.release(|uid| node.keeps_devices(uid)).await;
        if node.config.feature_gates.enabled(HEALTH_GATE) {
            let health = node.devices.health();
            for (uid, containers) in &health {
                if told.get(uid) != Some(containers) {
                    node.pods.send(uid, Message::Devices(containers.clone())).await;
                }
            }
            told = health;
        }
        let later = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Ok(()) = devices.changed() => {}
            Ok(()) = pods.changed() => continue,
            () = later => {}
        }
        next = show(&node, &facts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::devices::PluginDevice;

    #[test]
    fn a_container_is_equipped_with_what_a_plugin_names() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("made");
        let mount = |host: &Path, read_only| PluginMount {
            container_path: "/m".to_owned(),
            host_path: host.to_str().unwrap().to_owned(),
            read_only,
        };
        let devices = ContainerDevices {
            mounts: vec![mount(&made, true)],
            devices: vec![PluginDevice {
                container_path: String::new(),
                host_path: "/dev/null".to_owned(),
                permissions: "rw".to_owned(),
            }],
            ..ContainerDevices::default()
        };
        let equipment = equipment(devices).unwrap();
        assert!(made.is_dir(), "what is not there is made");
        assert_eq!(equipment.mounts[0].access, Access::ReadOnly);
        assert_eq!(equipment.grants[0].device.path(), Path::new("/dev/null"));
        assert!(bind(mount(Path::new("relative"), false)).unwrap_err().contains("absolute"));
        let unknown = ContainerDevices { cdi: vec!["none.test/x=1".to_owned()], ..ContainerDevices::default() };
        assert!(super::equipment(unknown).unwrap_err().contains("unresolvable CDI devices none.test/x=1"));
    }
}
