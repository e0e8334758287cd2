//! A container's `volumeMounts` as bind mounts. Source: `makeMounts` in `pkg/kubelet/kubelet_pods.go`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::VolumeMount;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::pod::env::expand;
use crate::shim::bundle::{Access, BindMount, Propagation};

use super::host_path;
use super::manager::{MountedVolumes, VolumeKind};

/// A volume mount that cannot be made; the waiting reason is `CreateContainerConfigError`. Retryable, because volumes
/// and their content change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountRefused {
    /// `volumeMounts[].name` is no volume of the Pod, or it is not mounted.
    #[error("cannot find volume {volume:?} to mount into container {container:?}")]
    NoVolume {
        /// The volume.
        volume: String,
        /// The container.
        container: String,
    },
    /// `subPathExpr` refers to variables that are missing or empty.
    #[error("missing value for {0}")]
    MissingValue(String),
    /// `subPath` is absolute.
    #[error("error SubPath `{0}` must not be an absolute path")]
    AbsoluteSubPath(String),
    /// `subPath` climbs.
    #[error("unable to provision SubPath `{0}`: must not contain '..'")]
    Backstep(String),
    /// `subPath` could not be made. Says no more, because that could tell about the node's file system.
    #[error("failed to create subPath directory for volumeMount {volume:?} of container {container:?}")]
    SubPath {
        /// The volume.
        volume: String,
        /// The container.
        container: String,
    },
    /// A `hostPath` without a type that is missing and cannot be made.
    #[error("failed to create {path:?} for volumeMount {volume:?} of container {container:?}")]
    HostPath {
        /// The path.
        path: String,
        /// The volume.
        volume: String,
        /// The container.
        container: String,
    },
    /// `mountPropagation` has an unknown value.
    #[error("invalid MountPropagation mode: {0:?}")]
    Propagation(String),
    /// `recursiveReadOnly` has an unknown value or does not go with the other fields.
    #[error("failed to resolve recursive read-only mode: {0}")]
    RecursiveReadOnly(String),
    /// `bindMountOptions`, which is alpha.
    #[error(
        "volumeMounts[].bindMountOptions {options:?} of volume {volume:?} is not supported by this node; remove the field"
    )]
    BindMountOptions {
        /// The options.
        options: Vec<String>,
        /// The volume.
        volume: String,
    },
}

/// Turns the `mounts` of `container` into bind mounts, in their order. `environment` is the container's, for
/// `subPathExpr`.
///
/// Makes `subPath` directories that are missing, so it blocks on the disk.
///
/// # Errors
/// The first mount that cannot be made.
pub fn container_mounts(
    container: &str,
    mounts: &[VolumeMount],
    volumes: &MountedVolumes,
    environment: &BTreeMap<String, String>,
) -> Result<Vec<BindMount>, MountRefused> {
    mounts.iter().map(|mount| bind_mount(container, mount, volumes, environment)).collect()
}

fn bind_mount(
    container: &str,
    mount: &VolumeMount,
    volumes: &MountedVolumes,
    environment: &BTreeMap<String, String>,
) -> Result<BindMount, MountRefused> {
    let (volume_name, container_name) = (|| mount.name.clone(), || container.to_owned());
    let volume = volumes
        .get(&mount.name)
        .ok_or_else(|| MountRefused::NoVolume { volume: volume_name(), container: container_name() })?;
    if let Some(options) = mount.bind_mount_options.clone().filter(|options| !options.is_empty()) {
        return Err(MountRefused::BindMountOptions { options, volume: volume_name() });
    }
    let sub_path = sub_path(mount, environment)?;
    if volume.kind == VolumeKind::HostPath && sub_path.is_none() && !volume.path.exists() {
        host_path::make_directory(&volume.path).map_err(|error| {
            tracing::error!(%error, "Failed to create hostPath directory");
            let path = volume.path.display().to_string();
            MountRefused::HostPath { path, volume: volume_name(), container: container_name() }
        })?;
    }
    if let Some(sub_path) = sub_path.as_deref().filter(|_| volume.kind != VolumeKind::Image) {
        make_sub_path(&volume.path, sub_path).map_err(|error| {
            tracing::error!(%error, volume = mount.name, container, "Failed to create subPath directory");
            MountRefused::SubPath { volume: volume_name(), container: container_name() }
        })?;
    }
    let access = match recursive_read_only(mount)? {
        true => Access::RecursiveReadOnly,
        false if mount.read_only.unwrap_or_default() || volume.read_only => Access::ReadOnly,
        false => Access::ReadWrite,
    };
    let propagation = match mount.mount_propagation.as_deref() {
        None | Some("None") => Propagation::Private,
        Some("HostToContainer") => Propagation::Slave,
        Some("Bidirectional") => Propagation::Shared,
        Some(other) => return Err(MountRefused::Propagation(other.to_owned())),
    };
    let destination = Path::new("/").join(&mount.mount_path);
    Ok(BindMount { source: volume.path.clone(), sub_path, destination, access, propagation })
}

fn sub_path(mount: &VolumeMount, environment: &BTreeMap<String, String>) -> Result<Option<PathBuf>, MountRefused> {
    let path = match mount.sub_path_expr.as_deref().filter(|expression| !expression.is_empty()) {
        Some(expression) => {
            let mut missing = BTreeSet::new();
            let path = expand(expression, |name| {
                let value = environment.get(name).filter(|value| !value.is_empty());
                if value.is_none() {
                    missing.insert(name.to_owned());
                }
                value.cloned().unwrap_or_default()
            });
            if !missing.is_empty() {
                return Err(MountRefused::MissingValue(missing.into_iter().collect::<Vec<_>>().join(", ")));
            }
            path
        }
        None => mount.sub_path.clone().unwrap_or_default(),
    };
    if path.is_empty() {
        return Ok(None);
    }
    if path.starts_with('/') {
        return Err(MountRefused::AbsoluteSubPath(path));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(MountRefused::Backstep(path));
    }
    Ok(Some(PathBuf::from(path)))
}

/// Every kernel that this node runs on can do it (`mount_setattr`, 5.12).
fn recursive_read_only(mount: &VolumeMount) -> Result<bool, MountRefused> {
    let mode = mount.recursive_read_only.as_deref().unwrap_or("Disabled");
    if mode == "Disabled" {
        return Ok(false);
    }
    let name = &mount.name;
    let refuse = |reason| Err(MountRefused::RecursiveReadOnly(reason));
    if mount.read_only != Some(true) {
        return refuse(format!("volume {name:?} requested recursive read-only mode, but it is not read-only"));
    }
    if let Some(propagation) = mount.mount_propagation.as_deref().filter(|propagation| *propagation != "None") {
        return refuse(format!(
            "volume {name:?} requested recursive read-only mode, but it is not compatible with propagation {propagation:?}"
        ));
    }
    match mode {
        "IfPossible" | "Enabled" => Ok(true),
        other => refuse(format!("unknown recursive read-only mode {other:?}")),
    }
}

const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// Makes `sub_path` in `volume` unless it exists, with the mode of the volume's root: a new directory must be open to
/// an `fsGroup`. Nothing is made outside of the volume, whatever links are in it.
fn make_sub_path(volume: &Path, sub_path: &Path) -> rustix::io::Result<()> {
    let root = rustix::fs::openat(CWD, volume, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let open = |path: &Path, flags: OFlags| {
        crate::sys::openat2::openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), INSIDE)
    };
    match open(sub_path, OFlags::PATH) {
        Ok(_) => return Ok(()),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&root)?.st_mode & 0o7777);
    let mut parent = PathBuf::from(".");
    let mut created: Option<OwnedFd> = None;
    for component in sub_path.components() {
        let Component::Normal(name) = component else { continue };
        let path = parent.join(name);
        if created.is_none() && open(&path, OFlags::PATH | OFlags::DIRECTORY).is_ok() {
            parent = path;
            continue;
        }
        let directory = match created.take() {
            Some(directory) => directory,
            None => open(&parent, OFlags::RDONLY | OFlags::DIRECTORY)?,
        };
        created = Some(make_one(directory.as_fd(), name, mode)?);
        parent = path;
    }
    Ok(())
}

/// Makes one directory; a link that appears in its place is not followed.
fn make_one(parent: impl AsFd, name: &std::ffi::OsStr, mode: Mode) -> rustix::io::Result<OwnedFd> {
    match rustix::fs::mkdirat(&parent, name, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    rustix::fs::fchmod(&made, mode)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::manager::MountedVolume;
    use serde_json::{Value, json};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn volumes(path: &Path, kind: VolumeKind, read_only: bool) -> MountedVolumes {
        [("v".to_owned(), MountedVolume { path: path.to_owned(), read_only, kind })].into()
    }

    fn one(path: &Path, kind: VolumeKind, mount: Value) -> Result<BindMount, MountRefused> {
        let mut mount = mount;
        mount["name"] = json!("v");
        mount["mountPath"] = json!("/m");
        let mount: VolumeMount = serde_json::from_value(mount).unwrap();
        let env =
            [("A".to_owned(), "x".to_owned()), ("E".to_owned(), String::new()), ("UP".to_owned(), "../y".to_owned())];
        container_mounts("c", &[mount], &volumes(path, kind, false), &env.into()).map(|mut mounts| mounts.remove(0))
    }

    #[test]
    fn translates_every_field() {
        let dir = tempfile::tempdir().unwrap();
        let ask = |mount| one(dir.path(), VolumeKind::EmptyDir, mount).unwrap();
        let plain = ask(json!({}));
        assert_eq!((plain.access, plain.propagation, plain.sub_path), (Access::ReadWrite, Propagation::Private, None));
        assert_eq!((plain.source.as_path(), plain.destination.as_path()), (dir.path(), Path::new("/m")));
        assert_eq!(ask(json!({"readOnly": true})).access, Access::ReadOnly);
        assert_eq!(ask(json!({"readOnly": true, "recursiveReadOnly": "Disabled"})).access, Access::ReadOnly);
        for mode in ["IfPossible", "Enabled"] {
            assert_eq!(ask(json!({"readOnly": true, "recursiveReadOnly": mode})).access, Access::RecursiveReadOnly);
        }
        assert_eq!(ask(json!({"mountPropagation": "HostToContainer"})).propagation, Propagation::Slave);
        assert_eq!(ask(json!({"mountPropagation": "Bidirectional"})).propagation, Propagation::Shared);
        let mount = VolumeMount { name: "v".into(), mount_path: "rel".into(), ..VolumeMount::default() };
        let read_only = volumes(dir.path(), VolumeKind::Secret, true);
        let made = container_mounts("c", &[mount], &read_only, &BTreeMap::new()).unwrap();
        assert_eq!((made[0].access, made[0].destination.as_path()), (Access::ReadOnly, Path::new("/rel")));
    }

    #[test]
    fn refuses_with_kubelets_texts() {
        let dir = tempfile::tempdir().unwrap();
        for (mount, text) in [
            (json!({"subPath": "/a"}), "error SubPath `/a` must not be an absolute path"),
            (json!({"subPath": "a/../b"}), "unable to provision SubPath `a/../b`: must not contain '..'"),
            (json!({"subPathExpr": "$(UP)"}), "unable to provision SubPath `../y`: must not contain '..'"),
            (json!({"subPathExpr": "$(B)/$(E)/$(A)"}), "missing value for B, E"),
            (json!({"mountPropagation": "Odd"}), "invalid MountPropagation mode: \"Odd\""),
            (
                json!({"recursiveReadOnly": "Enabled"}),
                "failed to resolve recursive read-only mode: volume \"v\" requested recursive read-only mode, but it is not read-only",
            ),
            (
                json!({"readOnly": true, "recursiveReadOnly": "Enabled", "mountPropagation": "Bidirectional"}),
                "failed to resolve recursive read-only mode: volume \"v\" requested recursive read-only mode, but it is not compatible with propagation \"Bidirectional\"",
            ),
            (
                json!({"readOnly": true, "recursiveReadOnly": "Odd"}),
                "failed to resolve recursive read-only mode: unknown recursive read-only mode \"Odd\"",
            ),
        ] {
            assert_eq!(one(dir.path(), VolumeKind::EmptyDir, mount).unwrap_err().to_string(), text);
        }
        assert!(one(dir.path(), VolumeKind::EmptyDir, json!({"bindMountOptions": ["noexec"]})).is_err());
        let stranger = VolumeMount { name: "w".into(), ..VolumeMount::default() };
        let error = container_mounts("c", &[stranger], &MountedVolumes::new(), &BTreeMap::new()).unwrap_err();
        assert_eq!(error.to_string(), "cannot find volume \"w\" to mount into container \"c\"");
    }

    #[test]
    fn makes_sub_paths_with_the_mode_of_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2777)).unwrap();
        let mount = one(dir.path(), VolumeKind::EmptyDir, json!({"subPathExpr": "a/$(A)/./b"})).unwrap();
        assert_eq!(mount.sub_path.as_deref(), Some(Path::new("a/x/./b")));
        for path in ["a", "a/x", "a/x/b"] {
            assert_eq!(fs::metadata(dir.path().join(path)).unwrap().mode() & 0o7777, 0o2777, "{path}");
        }
        fs::write(dir.path().join("a/file"), "").unwrap();
        one(dir.path(), VolumeKind::EmptyDir, json!({"subPath": "a/file"})).unwrap();
        assert!(one(dir.path(), VolumeKind::EmptyDir, json!({"subPath": "a/file/x"})).is_err());
        one(dir.path(), VolumeKind::Image, json!({"subPath": "none"})).unwrap();
        assert!(!dir.path().join("none").exists());
    }

    #[test]
    fn links_do_not_lead_out_of_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        fs::create_dir_all(volume.join("real")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink("../outside", volume.join("up")).unwrap();
        symlink(&outside, volume.join("absolute")).unwrap();
        symlink("real", volume.join("inside")).unwrap();
        symlink("../nowhere", volume.join("dangling")).unwrap();
        for path in ["up/new", "absolute/new", "up", "dangling", "dangling/x"] {
            let error = one(&volume, VolumeKind::EmptyDir, json!({"subPath": path})).unwrap_err().to_string();
            assert_eq!(error, "failed to create subPath directory for volumeMount \"v\" of container \"c\"", "{path}");
        }
        one(&volume, VolumeKind::EmptyDir, json!({"subPath": "inside/new"})).unwrap();
        assert!(volume.join("real/new").is_dir());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert!(!dir.path().join("nowhere").exists());
    }

    #[test]
    fn a_missing_host_path_without_type_becomes_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        one(&path, VolumeKind::HostPath, json!({})).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755);
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(one(&dir.path().join("file/x"), VolumeKind::HostPath, json!({})).is_err());
    }
}
