//! The images of this node: which there are, and what belongs to them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use oci_spec::image::ImageConfiguration;

use super::digest::{Digest, chain_ids};
use super::error::ImageError;
use super::layout::{self, Layout, NAME, RESOLVED, Reachable, remove_tree};
use super::manifest::{Descriptor, Document, Manifest};
use super::pull::{LayerJobs, Pulls};
use super::reference::{Reference, Target, image_id};
use super::registry::Registry;
use super::settle;

/// How an [`ImageStore`] is opened.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The node's data directory; the store is `images` below it.
    pub data_dir: PathBuf,
    /// Registries, as `host` or `host:port`, that are spoken to by plain HTTP. Loopback hosts always are.
    pub insecure_registries: Vec<String>,
    /// Layers that are downloaded and unpacked at the same time, over all pulls.
    pub max_parallel_downloads: usize,
    /// How long a connection to a registry may take.
    pub connect_timeout: Duration,
    /// How long a registry may send nothing. A pull as a whole has no limit.
    pub read_timeout: Duration,
}

impl StoreConfig {
    /// Defaults: no insecure registries, 4 layers at a time, 15 s to connect, 45 s of silence.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            insecure_registries: Vec::new(),
            max_parallel_downloads: 4,
            connect_timeout: Duration::from_secs(15),
            read_timeout: Duration::from_secs(45),
        }
    }
}

/// An image that is complete on disk.
///
/// A handle: cheap to clone, and while one is alive outside the store the image is not removed. Whoever starts a
/// container holds the handle from `resolve` or `pull` until the container is in the `in_use` set of the garbage collector.
#[derive(Clone)]
pub struct Image(pub(super) Arc<ImageData>);

/// The facts about an [`Image`].
pub struct ImageData {
    /// Normalised name under which it was found.
    pub name: String,
    /// `sha256:<digest of the configuration>`: the image ID of Docker and CRI.
    pub id: String,
    /// `host/repository@sha256:…`: what the name resolved to in the registry, the index's digest for a multi-platform
    /// image. This is `imageID` in a container's status, as with containerd.
    pub repo_digest: String,
    /// Digest of this platform's manifest.
    pub manifest_digest: String,
    /// The image's configuration.
    pub config: ImageConfiguration,
    /// Unpacked layers, bottom to top.
    pub layers: Vec<PathBuf>,
    /// Bytes of manifest, configuration and compressed layers; what `Node.status.images` reports.
    pub size: u64,
    pub(super) resolved: Digest,
    pub(super) manifest: Digest,
    pub(super) manifest_size: u64,
    pub(super) media_type: String,
    pub(super) config_digest: Digest,
    pub(super) layer_digests: Vec<Digest>,
    pub(super) chain: Vec<Digest>,
    /// The store's directory.
    pub(super) root: PathBuf,
}

impl Deref for Image {
    type Target = ImageData;

    fn deref(&self) -> &ImageData {
        &self.0
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("name", &self.name).field("id", &self.id).finish_non_exhaustive()
    }
}

/// An image as `Node.status.images` and `crictl images` show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// Image ID.
    pub id: String,
    /// Names with a tag.
    pub repo_tags: Vec<String>,
    /// Names with a digest.
    pub repo_digests: Vec<String>,
    /// See [`ImageData::size`].
    pub size: u64,
    /// When it was last used or pulled.
    pub last_used: SystemTime,
}

/// Space on the file system of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Size of the file system in bytes.
    pub capacity: u64,
    /// Bytes that are free for everybody.
    pub available: u64,
    /// Inodes in all.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
    /// Bytes that images take: blobs and unpacked layers.
    pub used: u64,
    /// Inodes that images take.
    pub inodes_used: u64,
}

/// The image store of a node. One process at a time may have it open.
pub struct ImageStore {
    pub(super) layout: Layout,
    pub(super) registry: Arc<Registry>,
    pub(super) downloads: tokio::sync::Semaphore,
    pub(super) pulls: Mutex<Pulls>,
    pub(super) layer_jobs: Mutex<LayerJobs>,
    pub(super) blob_locks: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// Somebody puts pulled images on stable storage (`settle.rs`).
    pub(super) settling: AtomicBool,
    /// Held by whoever changes what is visible on disk. Never taken on a tokio worker.
    commit: Mutex<()>,
    state: Mutex<State>,
    pub(super) opened: Instant,
    _lock: File,
}

#[derive(Default)]
struct State {
    /// By normalised name.
    images: BTreeMap<String, Image>,
    /// Those that the index does not name yet.
    unsynced: Unsynced,
    /// Blobs and chain IDs that pulls in flight count on, with their number.
    pins: HashMap<Pin, usize>,
}

/// Names and manifests of images that may not be on stable storage yet.
pub(super) type Unsynced = BTreeMap<String, Digest>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Pin {
    Blob(Digest),
    Layer(Digest),
}

/// Keeps what a pull found or made from being collected before its image exists.
pub(super) struct Pins<'a> {
    store: &'a ImageStore,
    pins: Vec<Pin>,
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        let mut state = self.store.state();
        for pin in &self.pins {
            if let Some(count) = state.pins.get_mut(pin) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(pin);
                }
            }
        }
    }
}

/// A poisoned lock is only ever held around updates that cannot stop half-way.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageStore {
    /// Opens the store, making it if it is not there. Sweeps what a crash or a power failure left: work in progress, and
    /// blobs and layers that no image reaches. An image that lost a file is dropped, and pulled again when it is needed.
    ///
    /// Blocking. Fails if another process has the store open, or the directory cannot be used.
    pub fn open(config: StoreConfig) -> Result<Arc<Self>, ImageError> {
        let (layout, lock) = Layout::open(&config.data_dir)?;
        let registry = Registry::new(&config.insecure_registries, config.connect_timeout, config.read_timeout)?;
        let store = Self {
            layout,
            registry: Arc::new(registry),
            downloads: tokio::sync::Semaphore::new(config.max_parallel_downloads.max(1)),
            pulls: Mutex::default(),
            layer_jobs: Mutex::default(),
            blob_locks: Mutex::default(),
            settling: AtomicBool::new(false),
            commit: Mutex::new(()),
            state: Mutex::default(),
            opened: Instant::now(),
            _lock: lock,
        };
        let mut entries = store.layout.read_index()?;
        let indexed = entries.len();
        entries.extend(store.layout.read_unsynced());
        let (mut images, mut unsynced) = (BTreeMap::<String, Image>::new(), Unsynced::new());
        let mut incomplete = false;
        for (at, entry) in entries.iter().enumerate() {
            match store.load(entry) {
                // A crash after it came into the index.
                Some(image) if images.contains_key(&image.name) => {}
                Some(image) => {
                    if at >= indexed {
                        unsynced.insert(image.name.clone(), image.manifest.clone());
                    }
                    images.insert(image.name.clone(), image);
                }
                None => {
                    incomplete = true;
                    tracing::warn!(
                        name = entry.annotations.get(NAME).map_or("", String::as_str),
                        digest = %entry.digest,
                        "image is not complete on disk; it is dropped and will be pulled again when it is needed"
                    );
                }
            }
        }
        {
            let mut state = store.state();
            (state.images, state.unsynced) = (images, unsynced);
        }
        if incomplete || entries.is_empty() {
            store.write_index()?;
        }
        for trash in store.layout.remove_unreachable(&store.reachable())? {
            remove_tree(&trash)?;
        }
        let store = Arc::new(store);
        if !store.unsynced().is_empty() {
            store.settle_soon();
        }
        Ok(store)
    }

    /// The image of that name, tag, digest or ID, if it is here. Does no I/O.
    pub fn resolve(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let state = self.state();
        if let Some(id) = image_id(reference) {
            return Ok(state.images.values().find(|image| image.id == id.as_str()).cloned());
        }
        let reference: Reference = reference.parse()?;
        if let Some(image) = state.images.get(&reference.to_string()) {
            return Ok(Some(image.clone()));
        }
        let Target::Digest(digest) = reference.target() else { return Ok(None) };
        let repository = format!("{}@", reference.repository());
        let same = |image: &&Image| {
            image.repo_digest.starts_with(&repository) && (image.manifest == *digest || image.resolved == *digest)
        };
        Ok(state.images.values().find(same).cloned())
    }

    /// All images, largest first, as kubelet sorts them for `Node.status.images`.
    pub fn list(&self) -> Vec<ImageSummary> {
        let mut by_id: BTreeMap<String, ImageSummary> = BTreeMap::new();
        for image in self.state().images.values() {
            let summary = by_id.entry(image.id.clone()).or_insert_with(|| ImageSummary {
                id: image.id.clone(),
                repo_tags: Vec::new(),
                repo_digests: Vec::new(),
                size: image.size,
                last_used: self.layout.time(&image.config_digest),
            });
            if image.name.contains('@') {
                summary.repo_digests.push(image.name.clone());
            } else {
                summary.repo_tags.push(image.name.clone());
            }
        }
        let mut all: Vec<_> = by_id.into_values().collect();
        all.sort_by_key(|summary| std::cmp::Reverse(summary.size));
        all
    }

    /// Records that a container uses the image now. Survives a restart. Unknown IDs are fine: the image may be gone.
    /// Short enough (two system calls on a file that is cached) for async code.
    pub fn note_use(&self, image_id: &str) -> Result<(), ImageError> {
        let digest = self.state().images.values().find(|i| i.id == image_id).map(|i| i.config_digest.clone());
        digest.map_or(Ok(()), |digest| self.layout.touch(&digest, SystemTime::now()))
    }

    /// Removes an image: all its names, and what no other image shares. `false` if there was none.
    ///
    /// `in_use` are the IDs of images that containers have; such an image, or one that this process holds a handle of,
    /// is refused with [`ImageError::InUse`]. Blocking.
    pub fn remove(&self, reference: &str, in_use: &HashSet<String>) -> Result<bool, ImageError> {
        let Some(id) = self.resolve(reference)?.map(|image| image.id.clone()) else { return Ok(false) };
        if in_use.contains(&id) || !self.remove_id(&id)? {
            return Err(ImageError::InUse { name: reference.to_owned() });
        }
        Ok(true)
    }

    /// Space taken and left. Blocking.
    pub fn disk_usage(&self) -> Result<DiskUsage, ImageError> {
        let root = self.layout.root();
        let stat = rustix::fs::statvfs(root).map_err(ImageError::errno("stat", root))?;
        let mut usage = DiskUsage {
            capacity: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
            inodes: stat.f_files,
            inodes_free: stat.f_favail,
            ..DiskUsage::default()
        };
        for (_, _, size) in self.layout.blobs()? {
            usage.used += size;
            usage.inodes_used += 1;
        }
        for (_, path) in self.layout.layers()? {
            let layer = self.layout.layer_usage(&path);
            usage.used += layer.bytes;
            usage.inodes_used += layer.inodes;
        }
        Ok(usage)
    }

    /// Removes all names of an image ID. `false` if somebody holds it.
    pub(super) fn remove_id(&self, id: &str) -> Result<bool, ImageError> {
        let trash = {
            let _commit = lock(&self.commit);
            {
                let mut state = self.state();
                // One count is the store's own.
                if state.images.values().any(|image| image.id == id && Arc::strong_count(&image.0) > 1) {
                    return Ok(false);
                }
                state.images.retain(|_, image| image.id != id);
                let State { images, unsynced, .. } = &mut *state;
                unsynced.retain(|name, _| images.contains_key(name));
            }
            self.write_index()?;
            self.layout.remove_unreachable(&self.reachable())?
        };
        for path in trash {
            remove_tree(&path)?;
        }
        Ok(true)
    }

    /// Removes what neither an image nor a pull in flight counts on.
    pub(super) fn sweep(&self) -> Result<(), ImageError> {
        let trash = {
            let _commit = lock(&self.commit);
            self.layout.remove_unreachable(&self.reachable())?
        };
        trash.iter().try_for_each(|path| remove_tree(path))
    }

    /// Names and images, for garbage collection. The handles do not count as use: they are gone when this returns.
    pub(super) fn with_images<T>(&self, f: impl FnOnce(&BTreeMap<String, Image>) -> T) -> T {
        f(&self.state().images)
    }

    /// Keeps blobs and layers of a pull in flight.
    pub(super) fn pin(&self, blobs: impl Iterator<Item = Digest>, layers: impl Iterator<Item = Digest>) -> Pins<'_> {
        let pins: Vec<Pin> = blobs.map(Pin::Blob).chain(layers.map(Pin::Layer)).collect();
        let mut state = self.state();
        for pin in &pins {
            *state.pins.entry(pin.clone()).or_default() += 1;
        }
        Pins { store: self, pins }
    }

    /// Makes images visible after `publish` has put their files in place. On stable storage they are only after
    /// [`ImageStore::settle`], unless a name moves. Blocking.
    pub(super) fn commit(&self, publish: impl FnOnce() -> Result<Vec<Image>, ImageError>) -> Result<(), ImageError> {
        let _commit = lock(&self.commit);
        let images = publish()?;
        let (before, moved, named_again) = {
            let mut state = self.state();
            let before = (state.images.clone(), state.unsynced.clone());
            let moved = images.iter().any(|image| settle::moves(image, before.0.get(&image.name)));
            let durable = |manifest: &Digest| {
                before.0.values().any(|image| image.manifest == *manifest && !before.1.contains_key(&image.name))
            };
            let mut named_again = false;
            for image in images {
                if durable(&image.manifest) {
                    state.unsynced.remove(&image.name);
                    named_again = true;
                } else {
                    state.unsynced.insert(image.name.clone(), image.manifest.clone());
                }
                state.images.insert(image.name.clone(), image);
            }
            (before, moved, named_again)
        };
        let written = if moved {
            self.layout.sync().and_then(|()| {
                self.state().unsynced.clear();
                self.write_index()
            })
        } else {
            // New names for what is in the index already have to be there as well.
            self.write(named_again)
        };
        if written.is_err() {
            let mut state = self.state();
            (state.images, state.unsynced) = before;
        }
        written
    }

    /// What may not be on stable storage yet.
    pub(super) fn unsynced(&self) -> Unsynced {
        self.state().unsynced.clone()
    }

    /// These are on stable storage now, unless they have been replaced meanwhile.
    pub(super) fn settled(&self, synced: &Unsynced) -> Result<(), ImageError> {
        let _commit = lock(&self.commit);
        let before = self.unsynced();
        self.state().unsynced.retain(|name, manifest| synced.get(name) != Some(manifest));
        let written = self.write_index();
        if written.is_err() {
            self.state().unsynced = before;
        }
        written
    }

    /// What an image consists of, by its manifest and configuration; does not look whether its layers are there.
    pub(super) fn describe(
        &self,
        name: &str,
        resolved: &Digest,
        digest: &Digest,
        manifest_size: u64,
        manifest: &Manifest,
        config: &[u8],
    ) -> Result<Image, String> {
        let config: ImageConfiguration =
            serde_json::from_slice(config).map_err(|e| format!("the image configuration is not valid: {e}"))?;
        let diff_ids = config.rootfs().diff_ids().iter().map(|id| id.parse::<Digest>());
        let diff_ids = diff_ids.collect::<Result<Vec<_>, _>>().map_err(|e| format!("rootfs.diff_ids: {e}"))?;
        if diff_ids.len() != manifest.layers.len() {
            return Err(format!(
                "the manifest has {} layers, the image configuration {} (rootfs.diff_ids)",
                manifest.layers.len(),
                diff_ids.len()
            ));
        }
        let chain = chain_ids(&diff_ids);
        let repository = name.parse::<Reference>().map_err(|e| e.to_string())?.repository();
        let layer_sizes: u64 = manifest.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size));
        Ok(Image(Arc::new(ImageData {
            name: name.to_owned(),
            id: manifest.config.digest.to_string(),
            repo_digest: format!("{repository}@{resolved}"),
            manifest_digest: digest.to_string(),
            config,
            layers: chain.iter().map(|id| self.layout.layer(id).join("diff")).collect(),
            size: layer_sizes.saturating_add(manifest.config.size).saturating_add(manifest_size),
            resolved: resolved.clone(),
            manifest: digest.clone(),
            manifest_size,
            media_type: manifest.media_type.clone(),
            config_digest: manifest.config.digest.clone(),
            layer_digests: manifest.layers.iter().map(|layer| layer.digest.clone()).collect(),
            chain,
            root: self.layout.root().to_owned(),
        })))
    }

    /// The image of an index entry, if all of it is on disk.
    fn load(&self, entry: &Descriptor) -> Option<Image> {
        let name = entry.annotations.get(NAME)?;
        let resolved = entry.annotations.get(RESOLVED).map_or(Ok(entry.digest.clone()), |d| d.parse()).ok()?;
        let bytes = self.layout.read_blob(&entry.digest)?;
        let Document::Manifest(manifest) = Document::parse(&bytes).ok()? else { return None };
        let config = self.layout.read_blob(&manifest.config.digest)?;
        let image = self.describe(name, &resolved, &entry.digest, bytes.len() as u64, &manifest, &config).ok()?;
        let complete = image.layers.iter().all(|layer| layer.is_dir())
            && image.layer_digests.iter().all(|digest| self.layout.blob(digest).is_file());
        complete.then_some(image)
    }

    /// Writes the index, durably, and then what is not in it yet: what moves there is always in one of the two.
    fn write_index(&self) -> Result<(), ImageError> {
        self.write(true)
    }

    fn write(&self, index: bool) -> Result<(), ImageError> {
        let (durable, unsynced) = {
            let state = self.state();
            let entry = |image: &Image| {
                layout::named(&image.name, &image.resolved, &image.media_type, &image.manifest, image.manifest_size)
            };
            let (unsynced, durable): (Vec<&Image>, Vec<&Image>) =
                state.images.values().partition(|image| state.unsynced.contains_key(&image.name));
            (durable.into_iter().map(entry).collect::<Vec<_>>(), unsynced.into_iter().map(entry).collect::<Vec<_>>())
        };
        if index {
            self.layout.write_index(durable)?;
        }
        self.layout.write_unsynced(unsynced)
    }

    fn reachable(&self) -> Reachable {
        let state = self.state();
        let mut reachable = Reachable::default();
        for image in state.images.values() {
            reachable.blobs.extend([image.manifest.clone(), image.config_digest.clone()]);
            reachable.blobs.extend(image.layer_digests.iter().cloned());
            reachable.layers.extend(image.chain.iter().cloned());
        }
        for pin in state.pins.keys() {
            match pin {
                Pin::Blob(digest) => reachable.blobs.insert(digest.clone()),
                Pin::Layer(chain_id) => reachable.layers.insert(chain_id.clone()),
            };
        }
        reachable
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
