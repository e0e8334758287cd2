//! Device nodes and the rules of the device controller.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{ContainerInput, Security};

/// Directories of `/dev` that are instances of their own in a container, or no devices.
const SKIPPED: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
/// How deep `/dev` is searched.
const MAX_DEPTH: usize = 8;

/// A device that a plugin has allocated to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceGrant {
    /// The node, at its path in the container.
    pub device: LinuxDevice,
    /// `r`, `w` and `m` (make) as allowed.
    pub access: String,
}

/// Nodes beyond those that every container has.
pub(super) fn nodes(input: &ContainerInput<'_>, security: &Security<'_>) -> Vec<LinuxDevice> {
    let mut nodes: Vec<LinuxDevice> = input.devices.iter().map(|grant| grant.device.clone()).collect();
    if security.privileged {
        let is_new = |device: &&LinuxDevice| !input.devices.iter().any(|grant| grant.device.path() == device.path());
        nodes.extend(input.host_devices.iter().filter(is_new).cloned());
    }
    nodes
}

/// Nothing but what is listed; libcontainer adds the devices that every container has.
pub(super) fn rules(input: &ContainerInput<'_>, security: &Security<'_>) -> Vec<LinuxDeviceCgroup> {
    let mut rules = vec![everything(false)];
    if security.privileged {
        rules.push(everything(true));
    }
    rules.extend(input.devices.iter().map(|grant| {
        let mut rule = LinuxDeviceCgroup::from(&grant.device);
        rule.set_allow(true);
        rule.set_access(Some(grant.access.clone()));
        rule
    }));
    rules
}

fn everything(allow: bool) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow);
    rule.set_typ(Some(LinuxDeviceType::A));
    rule.set_access(Some("rwm".to_owned()));
    rule
}

/// The node's devices as a privileged container gets them. Reads `/dev`.
pub fn host_devices() -> io::Result<Vec<LinuxDevice>> {
    let mut devices = Vec::new();
    collect(Path::new("/dev"), 0, &mut devices)?;
    Ok(devices)
}

fn collect(directory: &Path, depth: usize, devices: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let path = entry.path();
        // hot-plugged devices may go while we look
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        let kind = metadata.file_type();
        let typ = if kind.is_dir() {
            if depth < MAX_DEPTH && !SKIPPED.iter().any(|skipped| name == *skipped) {
                collect(&path, depth + 1, devices)?;
            }
            continue;
        } else if kind.is_block_device() {
            LinuxDeviceType::B
        } else if kind.is_char_device() && !(depth == 0 && name == "console") {
            LinuxDeviceType::C
        } else {
            continue;
        };
        let number = metadata.rdev();
        let mut device = LinuxDevice::default();
        device.set_path(path);
        device.set_typ(typ);
        device.set_major(i64::from(rustix::fs::major(number)));
        device.set_minor(i64::from(rustix::fs::minor(number)));
        device.set_file_mode(Some(metadata.permissions().mode() & 0o7777));
        device.set_uid(Some(metadata.uid()));
        device.set_gid(Some(metadata.gid()));
        devices.push(device);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nodes_devices() {
        let devices = host_devices().unwrap();
        let null = devices.iter().find(|d| d.path() == Path::new("/dev/null")).unwrap();
        assert_eq!((null.typ(), null.major(), null.minor()), (LinuxDeviceType::C, 1, 3));
        assert!(!devices.iter().any(|d| d.path().starts_with("/dev/pts") || d.path() == Path::new("/dev/console")));
    }

    #[test]
    fn rules_read_as_the_kernel_expects() {
        assert_eq!(everything(false).to_string(), "a *:* rwm");
    }
}
