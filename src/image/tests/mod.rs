//! Tests of the whole module: a registry on loopback that misbehaves on request, and images made on the spot.
//!
//! They need root, as the node does: owners, devices, extended attributes and mounts are real.

mod import;
mod mount;
mod pull;
mod registry;
mod store;
mod unpack;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::digest::Digest;
use super::manifest::{OCI_INDEX, OCI_MANIFEST, architecture};
use super::{ImageError, ImageStore, StoreConfig};

/// How a layer travels.
#[derive(Clone, Copy, Debug)]
pub(super) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// A layer: as a tar archive, and as a registry serves it.
pub(super) struct Layer {
    pub diff_id: Digest,
    pub blob: Vec<u8>,
    pub digest: Digest,
    media_type: &'static str,
}

impl Layer {
    pub fn new(tar: &[u8], compression: Compression) -> Self {
        let (blob, media_type) = match compression {
            Compression::Plain => (tar.to_vec(), "application/vnd.oci.image.layer.v1.tar"),
            Compression::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar).unwrap();
                (gzip.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip")
            }
            Compression::Zstd => (zstd::encode_all(tar, 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd"),
        };
        Self { diff_id: Digest::sha256(tar), digest: Digest::sha256(&blob), blob, media_type }
    }

    /// A layer with one file.
    pub fn file(path: &str, content: &[u8], compression: Compression) -> Self {
        Self::new(&tar_of(&[Member::file(path, content)]), compression)
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.blob.len()})
    }
}

/// An image: documents and layers.
pub(super) struct TestImage {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
}

impl TestImage {
    pub fn new(layers: &[&Layer]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
        let config = json!({
            "architecture": architecture(), "os": "linux",
            "config": {"Cmd": ["/app"], "Env": null, "Volumes": null, "ExposedPorts": {"80/tcp": {}}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::sha256(&config), "size": config.len(),
            },
            "layers": layers.iter().map(|layer| layer.descriptor()).collect::<Vec<_>>(),
        });
        Self { manifest: serde_json::to_vec(&manifest).unwrap(), config }
    }

    pub fn digest(&self) -> Digest {
        Digest::sha256(&self.manifest)
    }

    pub fn id(&self) -> String {
        Digest::sha256(&self.config).to_string()
    }

    /// An index with this image for this machine, and something else for another.
    pub fn index(&self) -> Vec<u8> {
        let platform = |arch: &str| json!({"os": "linux", "architecture": arch});
        let entry = |digest: &Digest, size: usize, arch: &str| json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": size, "platform": platform(arch)});
        let other = entry(&Digest::sha256(b"other"), 5, "s390x");
        let index = json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [other, entry(&self.digest(), self.manifest.len(), architecture())],
        });
        serde_json::to_vec(&index).unwrap()
    }
}

/// A member of a test archive, written without the `tar` crate's own checks.
#[derive(Debug)]
pub(super) struct Member {
    pub path: Vec<u8>,
    pub kind: tar::EntryType,
    pub link: Vec<u8>,
    pub content: Vec<u8>,
    pub mode: u32,
    pub owner: (u64, u64),
    pub mtime: u64,
    pub device: (u32, u32),
    pub pax: Vec<(String, Vec<u8>)>,
}

impl Member {
    pub fn new(path: &str, kind: tar::EntryType) -> Self {
        Self {
            path: path.into(),
            kind,
            link: Vec::new(),
            content: Vec::new(),
            mode: if kind.is_dir() { 0o755 } else { 0o644 },
            owner: (0, 0),
            mtime: 1_000_000_000,
            device: (0, 0),
            pax: Vec::new(),
        }
    }

    pub fn file(path: &str, content: &[u8]) -> Self {
        Self { content: content.to_vec(), ..Self::new(path, tar::EntryType::Regular) }
    }

    pub fn dir(path: &str) -> Self {
        Self::new(path, tar::EntryType::Directory)
    }

    pub fn symlink(path: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(path, tar::EntryType::Symlink) }
    }

    pub fn hardlink(path: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(path, tar::EntryType::Link) }
    }

    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub fn owner(self, uid: u64, gid: u64) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    pub fn pax(mut self, key: &str, value: &[u8]) -> Self {
        self.pax.push((key.into(), value.into()));
        self
    }
}

pub(super) fn tar_of(members: &[Member]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for member in members {
        let mut pax: Vec<(&str, &[u8])> = member.pax.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
        if member.path.len() > 100 {
            pax.push(("path", &member.path));
        }
        if member.link.len() > 100 {
            pax.push(("linkpath", &member.link));
        }
        if !pax.is_empty() {
            builder.append_pax_extensions(pax).unwrap();
        }
        let mut header = tar::Header::new_ustar();
        let raw = header.as_ustar_mut().unwrap();
        let length = member.path.len().min(100);
        raw.name[..length].copy_from_slice(&member.path[..length]);
        let length = member.link.len().min(100);
        raw.linkname[..length].copy_from_slice(&member.link[..length]);
        header.set_entry_type(member.kind);
        header.set_mode(member.mode);
        header.set_uid(member.owner.0);
        header.set_gid(member.owner.1);
        header.set_mtime(member.mtime);
        header.set_device_major(member.device.0).unwrap();
        header.set_device_minor(member.device.1).unwrap();
        header.set_size(member.content.len() as u64);
        header.set_cksum();
        builder.append(&header, member.content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A store in a directory of its own.
pub(super) struct TestStore {
    pub store: Arc<ImageStore>,
    pub dir: tempfile::TempDir,
}

impl TestStore {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { store: open(dir.path()), dir }
    }

    pub fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    /// What is in a directory of the store, once nobody puts pulled images on stable storage: the index is made in `tmp`.
    pub fn names(&self, below: &str) -> Vec<String> {
        while below == "tmp" && self.store.settling.load(std::sync::atomic::Ordering::Acquire) {
            std::thread::yield_now();
        }
        let mut names: Vec<_> = std::fs::read_dir(self.images().join(below))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Nothing of a pull is left: not visible, and not half-made either.
    pub fn assert_empty(&self) {
        assert_eq!(self.store.list(), []);
        for dir in ["tmp", "layers/sha256"] {
            assert_eq!(self.names(dir), Vec::<String>::new(), "{dir}");
        }
    }
}

pub(super) fn open(dir: &Path) -> Arc<ImageStore> {
    let mut config = StoreConfig::new(dir);
    config.read_timeout = std::time::Duration::from_millis(400);
    loop {
        match ImageStore::open(config.clone()) {
            // Who puts the images of an earlier one on stable storage may be holding it for a moment.
            Err(ImageError::Io { action: "lock", .. }) => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}
