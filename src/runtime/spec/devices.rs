//! Device nodes and the rules of the device controller.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{ContainerInput, Identity, Security};

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

/// Why a device cannot be given to a container. Retryable: the node's devices come and go.
#[derive(Debug, thiserror::Error)]
pub enum DeviceGrantError {
    /// There is none at the path.
    #[error("{path:?}: {source}", path = .path.display())]
    Io {
        /// The path on the node.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// Something else is there.
    #[error("{0:?} is not a device node")]
    NotADevice(PathBuf),
    /// Other letters than `r`, `w` and `m`, or none.
    #[error("{path:?}: invalid permissions {permissions:?}: they are of r, w and m")]
    Permissions {
        /// The path in the container.
        path: PathBuf,
        /// As given.
        permissions: String,
    },
    /// No place for a device.
    #[error("{0:?}: a device's path in the container has to be absolute, without ..")]
    Place(PathBuf),
}

impl DeviceGrant {
    /// A device at its path in the container.
    ///
    /// # Errors
    /// Permissions that are none, and a path that is not absolute.
    pub fn new(device: LinuxDevice, permissions: &str) -> Result<Self, DeviceGrantError> {
        let path = device.path().clone();
        if permissions.is_empty() || permissions.bytes().any(|byte| !matches!(byte, b'r' | b'w' | b'm')) {
            return Err(DeviceGrantError::Permissions { path, permissions: permissions.to_owned() });
        }
        if !path.is_absolute()
            || path.parent().is_none()
            || path.components().any(|part| part == std::path::Component::ParentDir)
        {
            return Err(DeviceGrantError::Place(path));
        }
        Ok(Self { device, access: permissions.to_owned() })
    }

    /// Below `/dev`, where libcontainer makes devices, and only there; elsewhere a node has to be mounted.
    #[must_use]
    pub fn is_in_dev(&self) -> bool {
        self.device.path().starts_with("/dev")
    }

    /// Makes the device at a path of the node, to be mounted into the container of that user and group.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make_at(&self, path: &Path, uid: u32, gid: u32) -> io::Result<()> {
        use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
        let typ = match self.device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            _ => FileType::CharacterDevice,
        };
        let number = |value: i64| u32::try_from(value).map_err(io::Error::other);
        let device = makedev(number(self.device.major())?, number(self.device.minor())?);
        let mode = self.device.file_mode().unwrap_or(0o666);
        mknodat(CWD, path, typ, Mode::from_raw_mode(mode), device)?;
        // whatever the umask has taken
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        std::os::unix::fs::chown(path, self.device.uid().or(Some(uid)), self.device.gid().or(Some(gid)))
    }

    /// The device at a path of the node, or all devices of a directory there, as containerd takes them. Reads the
    /// node's files.
    ///
    /// # Errors
    /// See [`DeviceGrantError`].
    pub fn from_host(host: &Path, container: &Path, permissions: &str) -> Result<Vec<Self>, DeviceGrantError> {
        let failed = |source: io::Error| DeviceGrantError::Io { path: host.to_owned(), source };
        let real = fs::canonicalize(host).map_err(failed)?;
        if !real.is_dir() {
            let mut device = device_at(&real)?;
            device.set_path(container.to_owned());
            return Ok(vec![Self::new(device, permissions)?]);
        }
        let mut devices = Vec::new();
        collect(&real, 0, &mut devices).map_err(failed)?;
        let moved = devices.into_iter().map(|mut device| {
            let path = device.path().strip_prefix(&real).map(|rest| container.join(rest));
            if let Ok(path) = path {
                device.set_path(path);
            }
            Self::new(device, permissions)
        });
        moved.collect()
    }
}

/// The device at a path of the node, which may be a link.
///
/// # Errors
/// There is none.
pub fn device_at(path: &Path) -> Result<LinuxDevice, DeviceGrantError> {
    let failed = |source: io::Error| DeviceGrantError::Io { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(failed)?;
    let kind = metadata.file_type();
    let typ = if kind.is_block_device() {
        LinuxDeviceType::B
    } else if kind.is_char_device() {
        LinuxDeviceType::C
    } else if kind.is_fifo() {
        LinuxDeviceType::P
    } else {
        return Err(DeviceGrantError::NotADevice(path.to_owned()));
    };
    Ok(device_of(path.to_owned(), typ, &metadata))
}

fn device_of(path: PathBuf, typ: LinuxDeviceType, metadata: &fs::Metadata) -> LinuxDevice {
    let number = metadata.rdev();
    let mut device = LinuxDevice::default();
    device.set_path(path);
    device.set_typ(typ);
    device.set_major(i64::from(rustix::fs::major(number)));
    device.set_minor(i64::from(rustix::fs::minor(number)));
    device.set_file_mode(Some(metadata.permissions().mode() & 0o7777));
    device.set_uid(Some(metadata.uid()));
    device.set_gid(Some(metadata.gid()));
    device
}

/// Nodes beyond those that every container has. One without an owner is the container's user's.
pub(super) fn nodes(input: &ContainerInput<'_>, security: &Security<'_>, identity: &Identity) -> Vec<LinuxDevice> {
    let own = |grant: &DeviceGrant| {
        let mut device = grant.device.clone();
        device.set_uid(device.uid().or(Some(identity.uid)));
        device.set_gid(device.gid().or(Some(identity.gid)));
        device
    };
    let mut nodes: Vec<LinuxDevice> = input.devices.iter().filter(|grant| grant.is_in_dev()).map(own).collect();
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
    let counted = input.devices.iter().filter(|grant| grant.device.typ() != LinuxDeviceType::P);
    rules.extend(counted.map(|grant| {
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
        devices.push(device_of(path, typ, &metadata));
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
    fn devices_are_granted_where_a_plugin_wants_them() {
        let grant = |host: &str, container: &str, permissions: &str| {
            DeviceGrant::from_host(Path::new(host), Path::new(container), permissions)
        };
        let zero = &grant("/dev/zero", "/dev/x/y", "rw").unwrap()[0];
        assert_eq!(zero.device.path(), Path::new("/dev/x/y"));
        assert_eq!((zero.device.typ(), zero.device.major(), zero.device.minor()), (LinuxDeviceType::C, 1, 5));
        assert_eq!(zero.access, "rw");
        assert!(matches!(grant("/dev/zero", "/dev/x", "rwx"), Err(DeviceGrantError::Permissions { .. })));
        assert!(matches!(grant("/dev/zero", "/dev/x", ""), Err(DeviceGrantError::Permissions { .. })));
        assert!(!grant("/dev/zero", "/tmp/x", "r").unwrap()[0].is_in_dev());
        assert!(matches!(grant("/dev/zero", "x", "r"), Err(DeviceGrantError::Place(_))));
        assert!(matches!(grant("/dev/zero", "/dev/../x", "r"), Err(DeviceGrantError::Place(_))));
        assert!(matches!(grant("/etc/passwd", "/dev/x", "r"), Err(DeviceGrantError::NotADevice(_))));
        assert!(matches!(grant("/dev/none", "/dev/x", "r"), Err(DeviceGrantError::Io { .. })));
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("link")).unwrap();
        let link = dir.path().join("link");
        assert_eq!(DeviceGrant::from_host(&link, Path::new("/dev/l"), "r").unwrap()[0].device.minor(), 3);
        assert!(DeviceGrant::from_host(dir.path(), Path::new("/dev/l"), "r").unwrap().is_empty(), "no device in it");
    }

    #[test]
    fn rules_read_as_the_kernel_expects() {
        assert_eq!(everything(false).to_string(), "a *:* rwm");
    }
}
