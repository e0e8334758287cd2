//! `emptyDir` volumes. Sources: `pkg/volume/emptydir/empty_dir.go`, `calculateEmptyDirMemorySize` in
//! `pkg/kubelet/volumemanager/cache/desired_state_of_world.go`.
//!
//! `sizeLimit` bounds a tmpfs here; on disk it is for eviction to enforce.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::{Container, EmptyDirVolumeSource, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::objects::FieldContext;
use crate::resources::quantity;

use super::error::SetUpError;
use super::{mounts, ownership};

/// Where the files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// The node's disk.
    Disk,
    /// A tmpfs of at most so many bytes.
    Memory(Option<i64>),
    /// A hugetlbfs with pages of so many bytes.
    HugePages(i64),
}

impl Medium {
    pub fn new(pod: &Pod, source: &EmptyDirVolumeSource, context: &FieldContext) -> Result<Self, SetUpError> {
        match source.medium.as_deref().unwrap_or_default() {
            "" => Ok(Self::Disk),
            "Memory" => Ok(Self::Memory(memory_size(pod, source.size_limit.as_ref(), context)?)),
            medium if medium == "HugePages" || medium.starts_with("HugePages-") => {
                Ok(Self::HugePages(page_size(pod, medium)?))
            }
            medium => Err(SetUpError::Invalid(format!(
                "unknown storage medium {medium:?}: emptyDir.medium must be empty, Memory, HugePages or HugePages-<size>"
            ))),
        }
    }
}

fn bytes(quantity: &Quantity) -> Result<i64, SetUpError> {
    quantity::value(quantity).map_err(|error| SetUpError::Invalid(error.to_string()))
}

/// The size of a tmpfs: the least of the volume's limit, the Pod's memory limit and the Node's allocatable memory.
pub(super) fn memory_size(
    pod: &Pod,
    limit: Option<&Quantity>,
    context: &FieldContext,
) -> Result<Option<i64>, SetUpError> {
    let limit = limit.map(bytes).transpose()?;
    let node = context.node_allocatable.get("memory").map(bytes).transpose()?;
    Ok([limit, pod_memory_limit(pod)?, node].into_iter().flatten().filter(|size| *size > 0).min())
}

/// What the Pod's cgroup may use; `None` if a container has no limit. Source: `ResourceConfigForPod` in
/// `pkg/kubelet/cm/helpers_linux.go` and `PodLimits` in `component-helpers/resource/helpers.go`.
fn pod_memory_limit(pod: &Pod) -> Result<Option<i64>, SetUpError> {
    let Some(spec) = &pod.spec else { return Ok(None) };
    let limit = |resources: Option<&ResourceRequirements>| -> Result<i64, SetUpError> {
        let memory = resources.and_then(|r| r.limits.as_ref()).and_then(|limits| limits.get("memory"));
        memory.map_or(Ok(0), bytes)
    };
    let overhead = spec.overhead.as_ref().and_then(|overhead| overhead.get("memory")).map_or(Ok(0), bytes)?;
    let of_pod = limit(spec.resources.as_ref())?;
    if of_pod > 0 {
        return Ok(Some(of_pod.saturating_add(overhead)));
    }
    let (mut main, mut sidecars, mut peak) = (0_i64, 0_i64, 0_i64);
    for container in &spec.containers {
        match limit(container.resources.as_ref())? {
            0 => return Ok(None),
            memory => main = main.saturating_add(memory),
        }
    }
    for container in spec.init_containers.iter().flatten() {
        let memory = limit(container.resources.as_ref())?;
        if memory == 0 {
            return Ok(None);
        }
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars = sidecars.saturating_add(memory);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.saturating_add(memory));
        }
    }
    Ok(Some(main.saturating_add(sidecars).max(peak).saturating_add(overhead)))
}

/// The page size of a medium: its own, or the only one that the Pod requests. A request is necessary.
fn page_size(pod: &Pod, medium: &str) -> Result<i64, SetUpError> {
    let own = match medium.strip_prefix("HugePages-") {
        Some(size) => Some(bytes(&Quantity(size.to_owned()))?),
        None => None,
    };
    let spec = pod.spec.as_ref();
    let containers =
        spec.into_iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let resources = containers
        .filter_map(|container: &Container| container.resources.as_ref())
        .chain(spec.and_then(|spec| spec.resources.as_ref()));
    let mut found = None;
    for name in resources.flat_map(|resources| resources.requests.iter().flatten().map(|(name, _)| name)) {
        let Some(size) = name.strip_prefix("hugepages-") else { continue };
        let size = bytes(&Quantity(size.to_owned()))?;
        if own.is_some_and(|own| own != size) {
            continue;
        }
        if found.is_some_and(|found| found != size) {
            return Err(SetUpError::Invalid(format!(
                "medium: {medium} can't be used if container requests multiple huge page sizes"
            )));
        }
        found = Some(size);
    }
    found.ok_or_else(|| {
        SetUpError::Invalid(format!(
            "medium {medium}: hugePages storage requested, but there is no resource request for huge pages"
        ))
    })
}

/// Makes the directory; gives it to `fs_group`. `ready` is a file that says that this has been done: what the
/// containers have changed since stays changed.
pub(super) fn set_up(
    directory: &Path,
    ready: &Path,
    medium: Medium,
    mode: Option<u32>,
    fs_group: Option<u32>,
) -> Result<(), SetUpError> {
    let is_ready = ready.exists();
    let there = match medium {
        Medium::Disk => directory.is_dir(),
        _ => mounts::is_mount_point(directory).map_err(SetUpError::io("stat", directory))?,
    };
    if is_ready && there {
        return Ok(());
    }
    make_directory(directory, 0o777).map_err(SetUpError::io("mkdir", directory))?;
    match medium {
        Medium::Disk => {}
        Medium::Memory(size) => {
            mounts::mount_tmpfs(directory, size).map_err(SetUpError::io("mount tmpfs on", directory))?;
        }
        Medium::HugePages(size) => {
            mounts::mount_hugetlbfs(directory, size).map_err(SetUpError::io("mount hugetlbfs on", directory))?;
        }
    }
    if let Some(mode) = mode {
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(directory, permissions).map_err(SetUpError::io("chmod", directory))?;
    }
    if let Some(gid) = fs_group {
        ownership::apply_fs_group(directory, gid, false).map_err(SetUpError::io("set ownership of", directory))?;
    }
    mark_ready(ready).map_err(SetUpError::io("create", ready))
}

/// Makes a directory and its parents; its mode is `mode` whatever the umask, that of the parents 0750.
pub(super) fn make_directory(directory: &Path, mode: u32) -> io::Result<()> {
    if let Some(parent) = directory.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(parent)?;
    }
    match fs::create_dir(directory) {
        // What is mounted on it has a mode of its own.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && mounts::is_mount_point(directory)? => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::set_permissions(directory, fs::Permissions::from_mode(mode)),
    }
}

fn mark_ready(ready: &Path) -> io::Result<()> {
    if let Some(parent) = ready.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(parent)?;
    }
    fs::File::create(ready).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::mounts::Scratch;
    use serde_json::{Value, json};
    use std::os::unix::fs::MetadataExt;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({ "spec": spec })).unwrap()
    }

    fn context(memory: &str) -> FieldContext {
        let mut context = FieldContext::default();
        context.node_allocatable.insert("memory".into(), Quantity(memory.into()));
        context
    }

    fn limit(memory: &str) -> Value {
        json!({"name": "c", "resources": {"limits": {"memory": memory}}})
    }

    #[test]
    fn a_tmpfs_is_as_large_as_the_least_limit() {
        let size = |spec, limit: Option<&str>| {
            memory_size(&pod(spec), limit.map(|l| Quantity(l.into())).as_ref(), &context("1000")).unwrap()
        };
        assert_eq!(size(json!({"containers": [{"name": "c"}]}), None), Some(1000));
        assert_eq!(size(json!({"containers": [{"name": "c"}]}), Some("10")), Some(10));
        assert_eq!(size(json!({"containers": [limit("100")]}), Some("500")), Some(100));
        assert_eq!(
            size(json!({"containers": [limit("100"), limit("50")], "overhead": {"memory": "5"}}), None),
            Some(155)
        );
        assert_eq!(size(json!({"containers": [limit("100"), {"name": "d"}]}), None), Some(1000));
        assert_eq!(size(json!({"containers": [limit("100")], "initContainers": [limit("300")]}), None), Some(300));
        let sidecar = json!({"name": "s", "restartPolicy": "Always", "resources": {"limits": {"memory": "40"}}});
        assert_eq!(
            size(json!({"containers": [limit("100")], "initContainers": [sidecar, limit("70")]}), None),
            Some(140)
        );
        assert_eq!(
            size(json!({"containers": [{"name": "c"}], "resources": {"limits": {"memory": "7"}}}), None),
            Some(7)
        );
        let nothing =
            memory_size(&pod(json!({"containers": [{"name": "c"}]})), None, &FieldContext::default()).unwrap();
        assert_eq!(nothing, None);
    }

    #[test]
    fn huge_pages_need_a_request_of_one_size() {
        let medium = |requests: Value, medium: &str| {
            let pod = pod(json!({"containers": [{"name": "c", "resources": {"requests": requests}}]}));
            let source = EmptyDirVolumeSource { medium: Some(medium.into()), ..EmptyDirVolumeSource::default() };
            Medium::new(&pod, &source, &FieldContext::default()).map_err(|error| error.to_string())
        };
        let both = json!({"hugepages-2Mi": "2Mi", "hugepages-1Gi": "1Gi"});
        assert_eq!(medium(json!({"hugepages-2Mi": "2Mi"}), "HugePages"), Ok(Medium::HugePages(2 << 20)));
        assert_eq!(medium(both.clone(), "HugePages-1Gi"), Ok(Medium::HugePages(1 << 30)));
        assert_eq!(
            medium(both, "HugePages").unwrap_err(),
            "medium: HugePages can't be used if container requests multiple huge page sizes"
        );
        assert_eq!(
            medium(json!({}), "HugePages-2Mi").unwrap_err(),
            "medium HugePages-2Mi: hugePages storage requested, but there is no resource request for huge pages"
        );
        assert!(medium(json!({}), "Disk").unwrap_err().contains("unknown storage medium \"Disk\""));
    }

    #[test]
    fn what_containers_change_stays_changed() {
        let scratch = Scratch::new();
        let (dir, ready) = (scratch.0.path().join("v/d"), scratch.0.path().join("p/ready"));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        set_up(&dir, &ready, Medium::Disk, None, Some(77)).unwrap();
        assert_eq!((mode(&dir), fs::metadata(&dir).unwrap().gid()), (0o2777, 77));
        fs::write(dir.join("f"), "").unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        set_up(&dir, &ready, Medium::Disk, None, Some(77)).unwrap();
        assert_eq!(mode(&dir), 0o700);
        fs::remove_file(&ready).unwrap();
        set_up(&dir, &ready, Medium::Disk, Some(0o1770), None).unwrap();
        assert_eq!(mode(&dir), 0o1770);
    }

    #[test]
    fn a_lost_tmpfs_is_mounted_again() {
        let scratch = Scratch::new();
        let (dir, ready) = (scratch.0.path().join("v/d"), scratch.0.path().join("p/ready"));
        for _ in 0..2 {
            set_up(&dir, &ready, Medium::Memory(Some(1 << 20)), None, Some(77)).unwrap();
            assert!(mounts::is_mount_point(&dir).unwrap());
            assert_eq!(fs::metadata(&dir).unwrap().gid(), 77);
        }
        // As after a reboot.
        mounts::unmount_below(&dir).unwrap();
        set_up(&dir, &ready, Medium::Memory(Some(1 << 20)), None, Some(77)).unwrap();
        assert!(mounts::is_mount_point(&dir).unwrap());
    }
}
