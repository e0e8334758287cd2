//! Mounts the volumes of Pods, keeps them current and takes them down.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec, Volume, VolumeMount};
use tokio::sync::{OwnedMutexGuard, broadcast};

use crate::objects::{CertificateManager, FieldContext, ObjectCache, TokenManager};

use super::atomic::{self, Payload};
use super::empty_dir::{self, Medium};
use super::error::{SetUpError, VolumeError, VolumeFailure};
use super::image::{ImageVolumes, NoImageVolumes};
use super::projected::{Defaults, Sources};
use super::{config_map, downward_api, host_path, mounts, ownership, secret, unsupported};

/// How long a mount waits for a signer before it is tried again later.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(3);

/// Where volumes live.
#[derive(Clone, Debug)]
pub struct VolumeConfig {
    /// kubelet's `--root-dir`, by default `/var/lib/kubelet`.
    pub root_dir: PathBuf,
}

/// What a volume is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum VolumeKind {
    /// `emptyDir`
    EmptyDir,
    /// `hostPath`
    HostPath,
    /// `configMap`
    ConfigMap,
    /// `secret`
    Secret,
    /// `downwardAPI`
    DownwardApi,
    /// `projected`
    Projected,
    /// `image`
    Image,
}

impl VolumeKind {
    /// The directory of the kind in `pods/<uid>/volumes`: kubelet's plugin name with `~` for `/`.
    #[must_use]
    pub fn directory(self) -> &'static str {
        match self {
            Self::EmptyDir => "kubernetes.io~empty-dir",
            Self::HostPath => "kubernetes.io~host-path",
            Self::ConfigMap => "kubernetes.io~configmap",
            Self::Secret => "kubernetes.io~secret",
            Self::DownwardApi => "kubernetes.io~downward-api",
            Self::Projected => "kubernetes.io~projected",
            Self::Image => "kubernetes.io~image",
        }
    }

    /// Whether the content comes from the API server and follows it.
    #[must_use]
    pub fn is_api_backed(self) -> bool {
        matches!(self, Self::ConfigMap | Self::Secret | Self::DownwardApi | Self::Projected)
    }

    fn of(volume: &Volume) -> Option<Self> {
        [
            (volume.empty_dir.is_some(), Self::EmptyDir),
            (volume.host_path.is_some(), Self::HostPath),
            (volume.config_map.is_some(), Self::ConfigMap),
            (volume.secret.is_some(), Self::Secret),
            (volume.downward_api.is_some(), Self::DownwardApi),
            (volume.projected.is_some(), Self::Projected),
            (volume.image.is_some(), Self::Image),
        ]
        .into_iter()
        .find_map(|(is, kind)| is.then_some(kind))
    }
}

/// A volume that containers can be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedVolume {
    /// Where it is on the node.
    pub path: PathBuf,
    /// Whether containers may only read it, whatever `volumeMounts[].readOnly` says.
    pub read_only: bool,
    /// What it is.
    pub kind: VolumeKind,
}

/// The volumes of a Pod by name.
pub type MountedVolumes = BTreeMap<String, MountedVolume>;

/// The volumes of this node's Pods.
pub struct VolumeManager {
    /// `<root_dir>/pods`
    pods: PathBuf,
    objects: Arc<ObjectCache>,
    tokens: Arc<TokenManager>,
    certificates: Arc<CertificateManager>,
    images: Arc<dyn ImageVolumes>,
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl std::fmt::Debug for VolumeManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeManager").field("pods", &self.pods).finish_non_exhaustive()
    }
}

/// What is left to do for a volume once its content is known; all of it blocks.
enum Work {
    EmptyDir { ready: PathBuf, medium: Medium, mode: Option<u32> },
    HostPath { path: String, kind: Option<String> },
    Files { tmpfs: Option<Option<i64>>, payload: Payload, nested: Vec<PathBuf> },
    Image,
}

struct Prepared {
    name: String,
    mounted: MountedVolume,
    work: Work,
}

impl VolumeManager {
    /// A manager that keeps the volumes below `config.root_dir`; image volumes are refused until
    /// [`Self::with_image_volumes`], certificates until [`Self::with_certificates`].
    #[must_use]
    pub fn new(config: VolumeConfig, objects: Arc<ObjectCache>, tokens: Arc<TokenManager>) -> Self {
        let pods = config.root_dir.join("pods");
        let certificates = Arc::new(CertificateManager::standalone());
        Self { pods, objects, tokens, certificates, images: Arc::new(NoImageVolumes), locks: Mutex::default() }
    }

    /// Takes certificates of Pods from `certificates`.
    #[must_use]
    pub fn with_certificates(mut self, certificates: Arc<CertificateManager>) -> Self {
        self.certificates = certificates;
        self
    }

    /// Tells UIDs of Pods whose certificate is new, for [`Self::refresh`].
    #[must_use]
    pub fn new_certificates(&self) -> broadcast::Receiver<String> {
        self.certificates.subscribe()
    }

    /// Lets `images` mount image volumes.
    #[must_use]
    pub fn with_image_volumes(mut self, images: Arc<dyn ImageVolumes>) -> Self {
        self.images = images;
        self
    }

    /// Mounts every volume that a container of the Pod uses. Idempotent.
    ///
    /// The Pod must be registered with the [`ObjectCache`] first.
    ///
    /// # Errors
    /// [`VolumeError::SetUp`] names every volume that failed; the others are mounted.
    pub async fn mount(&self, pod: &Pod, context: &FieldContext) -> Result<MountedVolumes, VolumeError> {
        let (uid, guard) = self.lock(pod.metadata.uid.as_deref().unwrap_or_default()).await?;
        let directory = self.pods.join(&uid);
        let parent = directory.clone();
        let made = blocking(guard, move || empty_dir::make_directory(&parent, 0o750)).await?;
        let (guard, made) = made;
        made.map_err(|source| VolumeError::SetUp(vec![failure("", SetUpError::io("mkdir", &directory)(source))]))?;
        self.set_up(pod, context, guard, &directory, |_| true, false).await
    }

    /// Brings the content of API-backed volumes up to date: after a change of an object, a token's time
    /// ([`Self::next_refresh`]) or a change of the Pod's labels and annotations. Does nothing for volumes that are not
    /// mounted.
    ///
    /// # Errors
    /// [`VolumeError::SetUp`] names every volume that keeps its old content.
    pub async fn refresh(&self, pod: &Pod, context: &FieldContext) -> Result<(), VolumeError> {
        let (uid, guard) = self.lock(pod.metadata.uid.as_deref().unwrap_or_default()).await?;
        let directory = self.pods.join(uid);
        self.set_up(pod, context, guard, &directory, VolumeKind::is_api_backed, true).await.map(drop)
    }

    /// When the next token of a volume of this Pod has to be renewed with [`Self::refresh`].
    #[must_use]
    pub fn next_refresh(&self, pod: &Pod) -> Option<Timestamp> {
        self.tokens.next_refresh(pod.metadata.uid.as_deref()?)
    }

    /// Whether nothing has been done for the Pod's volumes in this life of the agent.
    #[must_use]
    pub fn is_inherited(&self, pod_uid: &str) -> bool {
        !self.locks.lock().unwrap_or_else(PoisonError::into_inner).contains_key(pod_uid)
    }

    /// Unmounts everything of a Pod, also of an earlier life of the agent, and removes its directory. Idempotent.
    ///
    /// Nothing that is mounted is descended into, so data that a volume only refers to stays.
    ///
    /// # Errors
    /// [`VolumeError::TearDown`]; what is left is there for the next call.
    pub async fn unmount(&self, pod_uid: &str) -> Result<(), VolumeError> {
        let (uid, guard) = self.lock(pod_uid).await?;
        let directory = self.pods.join(&uid);
        let path = directory.clone();
        let work = move || mounts::unmount_below(&path).and_then(|()| mounts::remove_tree(&path));
        let (guard, done) = blocking(guard, work).await?;
        done.map_err(|source| VolumeError::TearDown { uid: uid.clone(), path: directory, source })?;
        self.tokens.forget(&uid);
        self.certificates.forget(&uid);
        self.images.release(&uid);
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        // The map and our guard are the last who know it.
        if locks.get(&uid).is_some_and(|lock| Arc::strong_count(lock) <= 2) {
            locks.remove(&uid);
        }
        drop(guard);
        Ok(())
    }

    /// UIDs of the Pods that have a directory: those that no Pod claims are for [`Self::unmount`].
    ///
    /// # Errors
    /// If the directory cannot be read; a missing one is empty.
    pub fn orphans(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.pods) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut uids = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                uids.extend(entry.file_name().into_string());
            }
        }
        uids.sort();
        Ok(uids)
    }

    /// One operation per Pod at a time. The guard goes along with blocking work, so that work whose caller has given
    /// up is finished before the next begins.
    async fn lock(&self, uid: &str) -> Result<(String, OwnedMutexGuard<()>), VolumeError> {
        if !is_file_name(uid) {
            return Err(VolumeError::PodUid(uid.to_owned()));
        }
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.entry(uid.to_owned()).or_default().clone()
        };
        Ok((uid.to_owned(), lock.lock_owned().await))
    }

    async fn set_up(
        &self,
        pod: &Pod,
        context: &FieldContext,
        guard: OwnedMutexGuard<()>,
        directory: &Path,
        wanted: impl Fn(VolumeKind) -> bool,
        only_mounted: bool,
    ) -> Result<MountedVolumes, VolumeError> {
        let Some(spec) = &pod.spec else { return Ok(MountedVolumes::new()) };
        let fs_group = fs_group(spec).map_err(|error| VolumeError::SetUp(vec![failure("", error)]))?;
        let used = used_volumes(spec);
        // what is mounted has a certificate already
        let patience = if only_mounted { Duration::ZERO } else { CERTIFICATE_PATIENCE };
        let (objects, tokens, certificates) = (&*self.objects, &*self.tokens, &*self.certificates);
        let sources = Sources { pod, context, objects, tokens, certificates, patience, fs_group };
        let volumes = spec.volumes.iter().flatten().filter(|volume| used.contains(volume.name.as_str()));
        let volumes = volumes.filter(|volume| VolumeKind::of(volume).map_or(!only_mounted, &wanted));
        let prepared = volumes.map(|volume| async {
            let prepared = self.prepare(volume, &sources, spec, directory).await;
            prepared.map_err(|error| failure(&volume.name, error))
        });
        let prepared = futures::future::join_all(prepared).await;
        let work = move || {
            let mut mounted = MountedVolumes::new();
            let mut failures = Vec::new();
            for volume in prepared {
                let done = volume.and_then(|volume| {
                    if only_mounted && !volume.mounted.path.exists() {
                        return Ok(None);
                    }
                    let Prepared { name, mounted, work } = volume;
                    work.run(&mounted, fs_group).map_err(|error| failure(&name, error))?;
                    Ok(Some((name, mounted)))
                });
                match done {
                    Ok(volume) => mounted.extend(volume),
                    Err(failure) => failures.push(failure),
                }
            }
            if failures.is_empty() { Ok(mounted) } else { Err(VolumeError::SetUp(failures)) }
        };
        blocking(guard, work).await?.1
    }

    /// Gets what a volume is made of.
    async fn prepare(
        &self,
        volume: &Volume,
        sources: &Sources<'_>,
        spec: &PodSpec,
        directory: &Path,
    ) -> Result<Prepared, SetUpError> {
        let name = volume.name.as_str();
        if !is_file_name(name) {
            return Err(SetUpError::Invalid(format!("volume name {name:?} cannot be used as a directory name")));
        }
        let kind = VolumeKind::of(volume).ok_or_else(|| unsupported::refuse(volume))?;
        let mut path = directory.join("volumes").join(kind.directory()).join(name);
        let namespace = sources.namespace();
        let work = if let Some(source) = &volume.empty_dir {
            let ready = directory.join("plugins").join(kind.directory()).join(name).join("ready");
            let mode = source.mode.map(directory_mode).transpose()?;
            Work::EmptyDir { ready, medium: Medium::new(sources.pod, source, sources.context)?, mode }
        } else if let Some(source) = &volume.host_path {
            path = PathBuf::from(&source.path);
            Work::HostPath { path: source.path.clone(), kind: source.type_.clone() }
        } else if let Some(source) = &volume.image {
            let target = path.clone();
            // The Pod's own directory was made under the guard that the caller holds.
            let made = tokio::task::spawn_blocking(move || empty_dir::make_directory(&target, 0o755)).await;
            made.map_err(io::Error::other).flatten().map_err(SetUpError::io("mkdir", &path))?;
            let mounted = self.images.mount(sources.pod, name, source, path.clone()).await;
            path = mounted.map_err(SetUpError::Image)?;
            Work::Image
        } else {
            let payload = if let Some(source) = &volume.config_map {
                let defaults = Defaults::new(source.default_mode, source.default_user)?;
                let optional = source.optional.unwrap_or_default();
                let items = source.items.as_deref();
                config_map::payload(sources.objects, namespace, &source.name, items, optional, defaults).await?
            } else if let Some(source) = &volume.secret {
                let defaults = Defaults::new(source.default_mode, source.default_user)?;
                let optional = source.optional.unwrap_or_default();
                let secret_name = source.secret_name.as_deref().unwrap_or_default();
                let items = source.items.as_deref();
                secret::payload(sources.objects, namespace, secret_name, items, optional, defaults).await?
            } else if let Some(source) = &volume.downward_api {
                let defaults = Defaults::new(source.default_mode, source.default_user)?;
                downward_api::payload(sources.pod, source.items.as_deref(), sources.context, defaults)?
            } else if let Some(source) = &volume.projected {
                sources.projected(name, source).await?
            } else {
                return Err(unsupported::refuse(volume));
            };
            // As with kubelet, a ConfigMap is the only one that may be on disk.
            let tmpfs = match kind {
                VolumeKind::ConfigMap => None,
                _ => Some(empty_dir::memory_size(sources.pod, None, sources.context)?),
            };
            Work::Files { tmpfs, payload, nested: nested_mount_points(name, spec) }
        };
        let read_only = kind.is_api_backed() || kind == VolumeKind::Image;
        Ok(Prepared { name: name.to_owned(), mounted: MountedVolume { path, read_only, kind }, work })
    }
}

impl Work {
    fn run(self, mounted: &MountedVolume, fs_group: Option<u32>) -> Result<(), SetUpError> {
        let directory = &mounted.path;
        match self {
            Self::EmptyDir { ready, medium, mode } => empty_dir::set_up(directory, &ready, medium, mode, fs_group),
            Self::HostPath { path, kind } => host_path::set_up(&path, kind.as_deref()),
            Self::Image => Ok(()),
            Self::Files { tmpfs, payload, nested } => {
                empty_dir::make_directory(directory, 0o777).map_err(SetUpError::io("mkdir", directory))?;
                if let Some(size) = tmpfs {
                    mounts::mount_tmpfs(directory, size).map_err(SetUpError::io("mount tmpfs on", directory))?;
                }
                for point in nested {
                    let point = directory.join(point);
                    fs::create_dir_all(&point).map_err(SetUpError::io("create nested mount point", &point))?;
                }
                atomic::write(directory, &payload, |directory| match fs_group {
                    Some(gid) => ownership::apply_fs_group(directory, gid, true),
                    None => Ok(()),
                })?;
                Ok(())
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    guard: OwnedMutexGuard<()>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<(OwnedMutexGuard<()>, T), VolumeError> {
    let task = tokio::task::spawn_blocking(move || {
        let done = work();
        (guard, done)
    });
    task.await.map_err(|_| VolumeError::Cancelled)
}

fn failure(volume: &str, source: SetUpError) -> VolumeFailure {
    VolumeFailure { volume: volume.to_owned(), source }
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && name.len() <= 255 && !name.contains(['/', '\0'])
}

fn directory_mode(mode: i32) -> Result<u32, SetUpError> {
    let bits = u32::try_from(mode).ok().filter(|mode| *mode <= 0o1777);
    bits.ok_or_else(|| {
        SetUpError::Invalid(format!("emptyDir.mode {mode} must be a number between 0 and 01777 (octal)"))
    })
}

fn fs_group(spec: &PodSpec) -> Result<Option<u32>, SetUpError> {
    let group = spec.security_context.as_ref().and_then(|context| context.fs_group);
    let invalid = |group| SetUpError::Invalid(format!("securityContext.fsGroup {group} must be a group ID"));
    group
        .map(|group| {
            u32::try_from(group).ok().filter(|gid| *gid <= i32::MAX.unsigned_abs()).ok_or_else(|| invalid(group))
        })
        .transpose()
}

/// The mounts of every container, ephemeral ones included.
fn container_mounts(spec: &PodSpec) -> impl Iterator<Item = &[VolumeMount]> {
    let main = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| c.volume_mounts.as_deref());
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| c.volume_mounts.as_deref());
    main.chain(ephemeral).map(Option::unwrap_or_default)
}

/// The volumes that a container mounts, or uses as a device. Source: `GetPodVolumeNames` in
/// `pkg/volume/util/util.go`.
fn used_volumes(spec: &PodSpec) -> BTreeSet<&str> {
    let main = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| c.volume_devices.as_deref());
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| c.volume_devices.as_deref());
    let devices = main.chain(ephemeral).flatten().flatten().map(|device| device.name.as_str());
    container_mounts(spec).flatten().map(|mount| mount.name.as_str()).chain(devices).collect()
}

/// Where other volumes are mounted inside of volume `name`: read-only content needs the directories beforehand.
/// Source: `pkg/volume/util/nested_volumes.go`.
fn nested_mount_points(name: &str, spec: &PodSpec) -> Vec<PathBuf> {
    let mut nested = BTreeSet::new();
    for mounts in container_mounts(spec) {
        let all: BTreeSet<PathBuf> = mounts.iter().map(|mount| absolute(&mount.mount_path)).collect();
        for own in mounts.iter().filter(|mount| mount.name == name).map(|mount| absolute(&mount.mount_path)) {
            let inside =
                all.iter().filter_map(|path| path.strip_prefix(&own).ok()).filter(|path| !path.as_os_str().is_empty());
            let mut kept: Vec<&Path> = Vec::new();
            // Paths sort by their parts, so an outer mount point comes before those inside of it.
            for path in inside {
                if !kept.iter().any(|outer| path.starts_with(outer)) {
                    kept.push(path);
                }
            }
            nested.extend(kept.into_iter().map(Path::to_owned));
        }
    }
    nested.into_iter().collect()
}

/// A mount path without `.`, `..` and double slashes.
fn absolute(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            std::path::Component::Normal(name) => clean.push(name),
            std::path::Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
