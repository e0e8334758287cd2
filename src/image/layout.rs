//! The store on disk.
//!
//! ```text
//! <data_dir>/images/
//!   oci-layout, index.json, blobs/sha256/   an OCI image layout: `skopeo inspect oci:<dir>:<name>` reads it
//!   unsynced.json                           what was pulled in the last moments
//!   layers/sha256/<chain ID>/diff           an unpacked layer, in overlayfs' form
//!   layers/sha256/<chain ID>/layer.json     what it takes on disk
//!   empty/a, empty/b                        lower directories of an image without layers
//!   tmp/                                    work in progress; swept at start
//! ```
//!
//! `index.json` is the truth: an image exists if it is named there. Everything it names is on stable storage before it is
//! written, so a crash at any instant leaves either the old index or the new one and nothing half-made behind either.
//! Images that are not on stable storage yet are named in `unsynced.json`, which counts until the next boot only
//! (`settle.rs`). What neither reaches is garbage.
//!
//! Compressed blobs stay after unpacking. They are what makes the layout complete for other tools, let a lost layer be
//! unpacked again without the network, and are what containerd keeps by default, so disk sizing carries over.
//!
//! Two times ride on files whose content never changes: the modification time of a manifest blob is when the image was
//! pulled, that of a configuration blob when it was last used. Both survive restarts, unlike a kubelet's.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::ImageError;
use super::manifest::{Descriptor, MAX_MANIFEST, OCI_INDEX};
use crate::sys::spread::spread;

const UNSYNCED: &str = "unsynced.json";
/// Full, normalised image name.
pub(super) const NAME: &str = "org.opencontainers.image.ref.name";
/// Digest that the name resolved to: the index's for a multi-platform image, while the descriptor is its manifest.
pub(super) const RESOLVED: &str = "dev.gantry.resolved-digest";

/// Paths of a store.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
}

/// `layer.json`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(super) struct LayerUsage {
    pub bytes: u64,
    pub inodes: u64,
}

/// `unsynced.json`.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Unsynced {
    boot_id: String,
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    manifests: Vec<Descriptor>,
}

impl Layout {
    /// Makes what is missing, takes the lock and sweeps work that a crash left behind.
    pub fn open(data_dir: &Path) -> Result<(Self, File), ImageError> {
        let layout = Self { root: data_dir.join("images") };
        for dir in ["blobs/sha256", "blobs/sha512", "layers/sha256", "layers/sha512", "empty/a", "empty/b"] {
            let dir = layout.root.join(dir);
            fs::create_dir_all(&dir).map_err(ImageError::io("create", &dir))?;
        }
        // Images hold setuid files: nobody but root may reach them outside a container.
        rustix::fs::chmod(&layout.root, rustix::fs::Mode::from_raw_mode(0o700))
            .map_err(ImageError::errno("chmod", &layout.root))?;
        let lock = layout.lock()?;
        let tmp = layout.root.join("tmp");
        remove_tree(&tmp)?;
        fs::create_dir(&tmp).map_err(ImageError::io("create", &tmp))?;
        spread(&tmp);
        let marker = layout.root.join("oci-layout");
        if !marker.exists() {
            layout.write_file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok((layout, lock))
    }

    fn lock(&self) -> Result<File, ImageError> {
        let path = self.root.join("lock");
        let lock = File::create(&path).map_err(ImageError::io("create", &path))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
            let source = match errno {
                rustix::io::Errno::WOULDBLOCK => {
                    io::Error::new(io::ErrorKind::WouldBlock, "another gantry uses this image store; stop it first")
                }
                other => other.into(),
            };
            ImageError::io("lock", &path)(source)
        })?;
        Ok(lock)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    pub fn layer(&self, chain_id: &Digest) -> PathBuf {
        self.root.join("layers").join(chain_id.algorithm()).join(chain_id.hex())
    }

    /// A fresh name for work in progress.
    pub fn staging(&self) -> Staging {
        Staging { path: self.root.join("tmp").join(uuid::Uuid::new_v4().to_string()), kept: false }
    }

    /// The names in the index.
    pub fn read_index(&self) -> Result<Vec<Descriptor>, ImageError> {
        let path = self.root.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => {
                let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
                    ImageError::io("parse", &path)(io::Error::other(format!(
                        "{e}; remove the file to start with an empty store"
                    )))
                })?;
                Ok(index.manifests)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(ImageError::io("read", &path)(e)),
        }
    }

    /// Replaces the index, durably.
    pub fn write_index(&self, manifests: Vec<Descriptor>) -> Result<(), ImageError> {
        let index = Index { schema_version: 2, media_type: Some(OCI_INDEX.to_owned()), manifests };
        let bytes = serde_json::to_vec_pretty(&index)
            .map_err(|e| ImageError::io("write", self.root.join("index.json"))(io::Error::other(e.to_string())))?;
        self.write_file("index.json", &bytes)
    }

    /// Replaces the names that are not in the index yet. Not durably: they count in this boot only.
    pub fn write_unsynced(&self, manifests: Vec<Descriptor>) -> Result<(), ImageError> {
        let path = self.root.join(UNSYNCED);
        let write = || {
            if manifests.is_empty() {
                return match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            let staging = self.staging();
            fs::write(&staging.path, serde_json::to_vec(&Unsynced { boot_id: boot_id()?, manifests })?)?;
            fs::rename(&staging.path, &path)
        };
        write().map_err(ImageError::io("write", &path))
    }

    /// The names that were not in the index yet, if they were written in this boot.
    pub fn read_unsynced(&self) -> Vec<Descriptor> {
        let Ok(bytes) = fs::read(self.root.join(UNSYNCED)) else { return Vec::new() };
        match (serde_json::from_slice::<Unsynced>(&bytes), boot_id()) {
            (Ok(unsynced), Ok(boot_id)) if unsynced.boot_id == boot_id => unsynced.manifests,
            _ => Vec::new(),
        }
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.root.join(name);
        let staging = self.staging();
        let write = || {
            let mut file = File::create(&staging.path)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&staging.path, &path)?;
            File::open(&self.root)?.sync_all()
        };
        write().map_err(ImageError::io("write", &path))
    }

    /// Stores a small blob. Durable only after [`Layout::sync`].
    pub fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.blob(digest);
        if path.exists() {
            return Ok(());
        }
        let staging = self.staging();
        fs::write(&staging.path, bytes).map_err(ImageError::io("write", &path))?;
        fs::rename(&staging.path, &path).map_err(ImageError::io("rename", &path))
    }

    /// Reads a manifest or configuration blob; `None` if it is missing or damaged.
    pub fn read_blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.blob(digest)).ok()?.take(MAX_MANIFEST + 1).read_to_end(&mut bytes).ok()?;
        digest.verifies(&bytes).then_some(bytes)
    }

    /// Puts everything written to the store's file system on stable storage.
    pub fn sync(&self) -> Result<(), ImageError> {
        let root = File::open(&self.root).map_err(ImageError::io("open", &self.root))?;
        rustix::fs::syncfs(root).map_err(ImageError::errno("sync", &self.root))
    }

    /// What a layer takes on disk; zero if its record is lost.
    pub fn layer_usage(&self, layer: &Path) -> LayerUsage {
        fs::read(layer.join("layer.json")).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
    }

    /// Every blob on disk: digest, path and size.
    pub fn blobs(&self) -> Result<Vec<(Digest, PathBuf, u64)>, ImageError> {
        let mut all = Vec::new();
        for (digest, path) in self.named_by_digest("blobs")? {
            let size = fs::symlink_metadata(&path).map_or(0, |m| m.len());
            all.push((digest, path, size));
        }
        Ok(all)
    }

    /// Every unpacked layer on disk: chain ID and path.
    pub fn layers(&self) -> Result<Vec<(Digest, PathBuf)>, ImageError> {
        self.named_by_digest("layers")
    }

    fn named_by_digest(&self, kind: &str) -> Result<Vec<(Digest, PathBuf)>, ImageError> {
        let mut all = Vec::new();
        for algorithm in ["sha256", "sha512"] {
            let dir = self.root.join(kind).join(algorithm);
            for entry in fs::read_dir(&dir).map_err(ImageError::io("list", &dir))? {
                let entry = entry.map_err(ImageError::io("list", &dir))?;
                let digest = entry.file_name().to_str().and_then(|hex| format!("{algorithm}:{hex}").parse().ok());
                match digest {
                    Some(digest) => all.push((digest, entry.path())),
                    None => tracing::warn!(path = %entry.path().display(), "not a file of the image store; left alone"),
                }
            }
        }
        Ok(all)
    }

    /// Removes blobs and layers that `keep` does not name. Layers leave their place by a rename, so none is ever seen
    /// half-removed; the returned directories are for [`remove_tree`], which may take long.
    pub fn remove_unreachable(&self, keep: &Reachable) -> Result<Vec<PathBuf>, ImageError> {
        let mut trash = Vec::new();
        for (chain_id, path) in self.layers()? {
            if !keep.layers.contains(&chain_id) {
                let mut staging = self.staging();
                fs::rename(&path, &staging.path).map_err(ImageError::io("remove", &path))?;
                staging.kept = true;
                trash.push(staging.path.clone());
            }
        }
        for (digest, path, _) in self.blobs()? {
            if !keep.blobs.contains(&digest) {
                fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
            }
        }
        Ok(trash)
    }

    /// Sets the time that rides on a blob; see the module.
    pub fn touch(&self, digest: &Digest, time: SystemTime) -> Result<(), ImageError> {
        let path = self.blob(digest);
        File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_modified(time))
            .map_err(ImageError::io("touch", &path))
    }

    /// The time that rides on a blob.
    pub fn time(&self, digest: &Digest) -> SystemTime {
        fs::metadata(self.blob(digest)).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

/// What the kernel calls its life (random(4)).
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// What may not be removed.
#[derive(Debug, Default)]
pub(super) struct Reachable {
    pub blobs: HashSet<Digest>,
    pub layers: HashSet<Digest>,
}

/// A file or directory below `tmp` that is removed when dropped, unless it was renamed away.
#[derive(Debug)]
pub(super) struct Staging {
    pub path: PathBuf,
    kept: bool,
}

impl Staging {
    /// Moves it to its place. `false` if something is there already: another pull was faster.
    pub fn commit(&self, to: &Path) -> Result<bool, ImageError> {
        match fs::rename(&self.path, to) {
            Ok(()) => Ok(true),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                ) && to.exists() =>
            {
                Ok(false)
            }
            Err(e) => Err(ImageError::io("rename", to)(e)),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove_tree(&self.path)
        {
            tracing::warn!(%error, "leftover of an image pull; the next start removes it");
        }
    }
}

/// Removes a file or a directory with all in it; nothing there is fine.
pub(super) fn remove_tree(path: &Path) -> Result<(), ImageError> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// The index entry of one name.
pub(super) fn named(name: &str, resolved: &Digest, media_type: &str, manifest: &Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: manifest.clone(),
        size,
        annotations: BTreeMap::from([(NAME.to_owned(), name.to_owned()), (RESOLVED.to_owned(), resolved.to_string())]),
        platform: None,
    }
}
