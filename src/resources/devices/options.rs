//! What all of a container's devices together ask of its start.
//!
//! Source: `deviceRunContainerOptions` in `pkg/kubelet/cm/devicemanager/pod_devices.go`. The first resource, by name,
//! has the say where two disagree.

use std::collections::BTreeMap;

use super::api::{ContainerResponse, PluginDevice, PluginMount};

/// What a container gets with its devices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerDevices {
    /// Environment variables; the container's own come before them.
    pub env: BTreeMap<String, String>,
    /// Trees of the node's, below the container's own mounts.
    pub mounts: Vec<PluginMount>,
    /// Device nodes, or directories of them.
    pub devices: Vec<PluginDevice>,
    /// Annotations for the runtime.
    pub annotations: BTreeMap<String, String>,
    /// Names of CDI devices.
    pub cdi: Vec<String>,
}

impl ContainerDevices {
    /// Takes the answers of several plugins together.
    pub(super) fn of<'a>(responses: impl IntoIterator<Item = &'a ContainerResponse>) -> Self {
        let mut all = Self::default();
        for response in responses {
            for (name, value) in &response.envs {
                all.env.entry(name.clone()).or_insert_with(|| value.clone());
            }
            for (name, value) in &response.annotations {
                all.annotations.entry(name.clone()).or_insert_with(|| value.clone());
            }
            for mount in &response.mounts {
                if !all.mounts.iter().any(|other| other.container_path == mount.container_path) {
                    all.mounts.push(mount.clone());
                }
            }
            for device in &response.devices {
                if !all.devices.iter().any(|other| other.container_path == device.container_path) {
                    all.devices.push(device.clone());
                }
            }
            for device in &response.cdi_devices {
                if !all.cdi.contains(&device.name) {
                    all.cdi.push(device.name.clone());
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::CdiDevice;
    use super::*;

    fn response(value: &str, path: &str) -> ContainerResponse {
        ContainerResponse {
            envs: [("A".to_owned(), value.to_owned())].into(),
            mounts: vec![PluginMount { container_path: "/m".to_owned(), host_path: path.to_owned(), read_only: true }],
            devices: vec![PluginDevice {
                container_path: "/dev/d".to_owned(),
                host_path: path.to_owned(),
                permissions: "rw".to_owned(),
            }],
            annotations: [("a".to_owned(), value.to_owned())].into(),
            cdi_devices: vec![CdiDevice { name: "v/c=d".to_owned() }, CdiDevice { name: format!("v/c={value}") }],
        }
    }

    #[test]
    fn the_first_has_the_say() {
        let all = ContainerDevices::of([&response("1", "/x"), &response("2", "/y")]);
        assert_eq!(all.env["A"], "1");
        assert_eq!(all.annotations["a"], "1");
        assert_eq!((all.mounts.len(), all.mounts[0].host_path.as_str()), (1, "/x"));
        assert_eq!((all.devices.len(), all.devices[0].host_path.as_str()), (1, "/x"));
        assert_eq!(all.cdi, ["v/c=d", "v/c=1", "v/c=2"]);
    }
}
