//! CDI: devices that files of the node describe. A container names them; what they need is edited into its
//! configuration.
//!
//! Source: the Container Device Interface specification 1.1 and its Go library
//! (`tags.cncf.io/container-device-interface`). The directories are read when a container with CDI devices starts, so
//! that there is nothing to keep up to date. Hooks, network devices and Intel RDT are refused by name.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, Mount, MountBuilder};

use super::spec::{DeviceGrant, device_at};
use file::{ContainerEdits, DeviceNode, File};

/// Where specifications are; one in a later directory replaces those of the same device before it.
pub const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// Annotations with this prefix name devices as well, separated by commas.
const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";

/// Why devices cannot be added to a container. Retryable: a specification may be put right.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// No specification describes them, or two of the same rank do.
    #[error("CDI device injection failed: unresolvable CDI devices {names}{why}")]
    Unresolvable {
        /// The devices, with commas.
        names: String,
        /// What is wrong with files that could be theirs.
        why: String,
    },
    /// A specification asks for what this node does not do.
    #[error(
        "CDI device injection failed: {file}: containerEdits.{field} of {device:?} is not supported by this node: \
         remove the field"
    )]
    Unsupported {
        /// The specification.
        file: PathBuf,
        /// The device that was asked for.
        device: String,
        /// The field.
        field: &'static str,
    },
    /// A specification is wrong about a device node, a variable or a mount.
    #[error("CDI device injection failed: {file}: {reason}")]
    Edit {
        /// The specification.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What CDI devices add to a container's configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edits {
    /// Environment variables, which override the container's own.
    pub env: Vec<(String, String)>,
    /// Device nodes.
    pub devices: Vec<DeviceGrant>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Names of devices in annotations.
#[must_use]
pub fn named_by(annotations: &BTreeMap<String, String>) -> Vec<String> {
    let ours = annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX));
    ours.flat_map(|(_, value)| value.split(',')).map(|name| name.trim().to_owned()).collect()
}

/// Finds devices in the specifications of directories and puts together what they need. Blocking.
///
/// # Errors
/// See [`CdiError`]; nothing is added if one device cannot be.
pub fn resolve(directories: &[&Path], names: &[String]) -> Result<Edits, CdiError> {
    let found = Found::read(directories);
    let missing: Vec<&str> =
        names.iter().filter(|name| !found.devices.contains_key(*name)).map(String::as_str).collect();
    if !missing.is_empty() {
        let why = if found.broken.is_empty() { String::new() } else { format!(" ({})", found.broken.join("; ")) };
        return Err(CdiError::Unresolvable { names: missing.join(", "), why });
    }
    let mut edits = Edits::default();
    let mut seen = BTreeSet::new();
    for name in names {
        let Some((file, device)) = found.devices.get(name) else { continue };
        let file = &found.files[*file];
        // what a file asks for all of its devices is added once
        if seen.insert(&file.path) {
            edits.add(&file.path, name, &file.spec.container_edits)?;
        }
        edits.add(&file.path, name, &file.spec.devices[*device].container_edits)?;
    }
    Ok(edits)
}

/// The specifications of a node.
#[derive(Default)]
struct Found {
    files: Vec<File>,
    /// By full name: file, and device in it.
    devices: BTreeMap<String, (usize, usize)>,
    broken: Vec<String>,
}

impl Found {
    fn read(directories: &[&Path]) -> Self {
        let mut found = Self::default();
        for directory in directories {
            let mut here: BTreeMap<String, (usize, usize)> = BTreeMap::new();
            let mut twice = BTreeSet::new();
            for file in file::read_all(directory) {
                let file = match file {
                    Ok(file) => file,
                    Err(broken) => {
                        found.broken.push(broken);
                        continue;
                    }
                };
                for (index, device) in file.spec.devices.iter().enumerate() {
                    let name = format!("{}={}", file.spec.kind, device.name);
                    if here.insert(name.clone(), (found.files.len(), index)).is_some() {
                        found.broken.push(format!("{}: {name} is described twice", file.path.display()));
                        twice.insert(name);
                    }
                }
                found.files.push(file);
            }
            found.devices.extend(here);
            // nobody knows which one is meant
            found.devices.retain(|name, _| !twice.contains(name));
        }
        found
    }
}

impl Edits {
    fn add(&mut self, file: &Path, device: &str, edits: &ContainerEdits) -> Result<(), CdiError> {
        let unsupported = [
            ("hooks", !edits.hooks.is_empty()),
            ("netDevices", !edits.net_devices.is_empty()),
            ("intelRdt", edits.intel_rdt.is_some()),
        ];
        if let Some((field, _)) = unsupported.into_iter().find(|(_, used)| *used) {
            return Err(CdiError::Unsupported { file: file.to_owned(), device: device.to_owned(), field });
        }
        let wrong = |reason: String| CdiError::Edit { file: file.to_owned(), reason };
        for variable in &edits.env {
            let (name, value) = variable
                .split_once('=')
                .filter(|(name, _)| !name.is_empty())
                .ok_or_else(|| wrong(format!("invalid environment variable {variable:?}")))?;
            self.env.push((name.to_owned(), value.to_owned()));
        }
        for node in &edits.device_nodes {
            let grant = grant(node).map_err(wrong)?;
            self.devices.retain(|other| other.device.path() != grant.device.path());
            self.devices.push(grant);
        }
        for mount in &edits.mounts {
            if mount.host_path.is_empty() || !mount.container_path.starts_with('/') {
                return Err(wrong(format!("invalid mount {:?} at {:?}", mount.host_path, mount.container_path)));
            }
            let mut options = mount.options.clone();
            let typ = if mount.typ.is_empty() { "bind" } else { &mount.typ };
            if typ == "bind" && !options.iter().any(|option| option == "bind" || option == "rbind") {
                options.push("rbind".to_owned());
            }
            let builder = MountBuilder::default().destination(&mount.container_path).typ(typ).source(&mount.host_path);
            let mount = builder.options(options).build().map_err(|error| wrong(error.to_string()))?;
            self.mounts.retain(|other| other.destination() != mount.destination());
            self.mounts.push(mount);
        }
        self.groups.extend(edits.additional_gids.iter().filter(|gid| **gid != 0));
        Ok(())
    }
}

/// A node of the specification, completed by the one that the machine has (`fillMissingInfo`).
fn grant(node: &DeviceNode) -> Result<DeviceGrant, String> {
    let host_path = if node.host_path.is_empty() { &node.path } else { &node.host_path };
    let wanted = match node.typ.as_str() {
        "" => None,
        "b" => Some(LinuxDeviceType::B),
        "c" => Some(LinuxDeviceType::C),
        "u" => Some(LinuxDeviceType::U),
        "p" => Some(LinuxDeviceType::P),
        other => return Err(format!("device {:?}: invalid type {other:?}", node.path)),
    };
    let complete = wanted.is_some_and(|typ| node.major != 0 || typ == LinuxDeviceType::P);
    let mut device = match device_at(Path::new(host_path)) {
        Ok(device) => device,
        Err(_) if complete => {
            let mut device = oci_spec::runtime::LinuxDevice::default();
            device.set_typ(wanted.unwrap_or_default());
            device.set_file_mode(Some(0o666));
            device
        }
        Err(error) => return Err(format!("failed to stat CDI host device {host_path:?}: {error}")),
    };
    if let Some(wanted) = wanted.filter(|wanted| *wanted != device.typ()) {
        let is = device.typ();
        return Err(format!(
            "CDI device ({:?}, {host_path:?}), host type mismatch ({}, {})",
            node.path,
            wanted.as_str(),
            is.as_str()
        ));
    }
    device.set_path(node.path.clone().into());
    if complete {
        device.set_major(node.major);
        device.set_minor(node.minor);
    }
    if node.file_mode.is_some() {
        device.set_file_mode(node.file_mode);
    }
    // those of the container's user where the specification has none
    device.set_uid(node.uid);
    device.set_gid(node.gid);
    DeviceGrant::new(device, if node.permissions.is_empty() { "rwm" } else { &node.permissions })
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const GPU: &str = r#"{"cdiVersion": "0.6.0", "kind": "example.com/gpu",
        "containerEdits": {"env": ["ALL=1"]},
        "devices": [
            {"name": "a", "containerEdits": {"env": ["A=x=y"], "deviceNodes": [{"path": "/dev/gpu-a", "hostPath": "/dev/null"}],
                "mounts": [{"hostPath": "/opt/gpu", "containerPath": "/gpu", "options": ["ro", "nosuid"]}]}},
            {"name": "b", "containerEdits": {"deviceNodes": [
                {"path": "/dev/gpu-b", "type": "c", "major": 195, "minor": 7, "permissions": "rw", "fileMode": 384, "uid": 5}],
                "additionalGids": [44]}},
            {"name": "hooked", "containerEdits": {"hooks": [{"hookName": "createContainer", "path": "/x"}]}}
        ]}"#;

    fn resolved(files: &[(&str, &str)], names: &[&str]) -> Result<Edits, CdiError> {
        let dir = tempfile::tempdir().unwrap();
        let (low, high) = (dir.path().join("low"), dir.path().join("high"));
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        resolve(&[&low, &high], &names)
    }

    #[test]
    fn devices_bring_what_they_need() {
        let edits = resolved(&[("low/gpu.json", GPU)], &["example.com/gpu=a", "example.com/gpu=b"]).unwrap();
        let env = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(edits.env, [env("ALL", "1"), env("A", "x=y")], "once for the file");
        let [a, b] = &edits.devices[..] else { panic!("{:?}", edits.devices) };
        assert_eq!((a.device.path().as_path(), a.device.major(), a.device.minor()), (Path::new("/dev/gpu-a"), 1, 3));
        assert_eq!(a.access, "rwm");
        assert_eq!((b.device.major(), b.device.minor(), b.device.file_mode()), (195, 7, Some(0o600)));
        assert_eq!((b.device.uid(), b.device.gid(), b.access.as_str()), (Some(5), None, "rw"));
        let mount = &edits.mounts[0];
        assert_eq!(mount.options().as_deref().unwrap(), ["ro", "nosuid", "rbind"]);
        assert_eq!((mount.source().as_deref(), mount.typ().as_deref()), (Some(Path::new("/opt/gpu")), Some("bind")));
        assert_eq!(edits.groups, [44]);
    }

    #[test]
    fn what_cannot_be_found_or_done_is_named() {
        let text = |files: &[(&str, &str)], name: &str| resolved(files, &[name]).unwrap_err().to_string();
        let files = [("low/gpu.json", GPU)];
        assert_eq!(
            text(&files, "example.com/gpu=c"),
            "CDI device injection failed: unresolvable CDI devices example.com/gpu=c"
        );
        let hooked = text(&files, "example.com/gpu=hooked");
        assert!(hooked.contains("containerEdits.hooks") && hooked.contains("gpu.json"), "{hooked}");
        let broken = text(&[("low/gpu.yaml", "kind: example.com/gpu\nwhat: 1\n")], "example.com/gpu=a");
        assert!(broken.contains("gpu.yaml"), "{broken}");
        let twice = text(&[("low/a.json", GPU), ("low/b.json", GPU)], "example.com/gpu=a");
        assert!(twice.contains("twice"), "{twice}");
        let yaml = "cdiVersion: 0.5.0\nkind: example.com/gpu\ndevices:\n- name: a\n  containerEdits:\n    deviceNodes:\n    - path: /dev/none\n";
        assert!(text(&[("low/a.yaml", yaml)], "example.com/gpu=a").contains("failed to stat CDI host device"));
    }

    #[test]
    fn a_later_directory_has_the_say() {
        let yaml = "cdiVersion: 0.5.0\nkind: example.com/gpu\ndevices:\n- name: a\n  containerEdits:\n    env: [\"LATER=1\"]\n";
        let files = [("low/gpu.json", GPU), ("high/gpu.yaml", yaml), ("high/readme.txt", "no")];
        let edits = resolved(&files, &["example.com/gpu=a"]).unwrap();
        assert_eq!(edits.env, [("LATER".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn annotations_name_devices() {
        let annotations =
            [("cdi.k8s.io/plugin_x".to_owned(), "v/c=1,v/c=2".to_owned()), ("other".to_owned(), "v/c=3".to_owned())];
        assert_eq!(named_by(&annotations.into()), ["v/c=1", "v/c=2"]);
    }
}
