//! Images from an archive: what `docker save`, `podman save`, `skopeo` and `ctr images export` write.
//!
//! Two forms, told apart by what is in the archive: an OCI image layout (`index.json`; Docker writes it since version 25) and
//! Docker's own (`manifest.json`). Where both are there the layout counts, as with containerd. The archive may be packed
//! with gzip or zstd.
//!
//! An archive comes from anywhere. Its members go to files of ours that have numbers for names, so no path in it is ever
//! one on the node; every content is found again by the digest that was computed while it came in; documents, names and
//! the number of members are bounded.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::archive::{Archive, Kind};
use super::digest::Digest;
use super::error::ImageError;
use super::layer::{Decoder, open_blob, unpack_blob};
use super::layout::{NAME, Staging};
use super::manifest::{Descriptor, Document, MAX_MANIFEST, Manifest, OCI_MANIFEST, architecture, select};
use super::pull::{MAX_NESTING, Ready, publish_image};
use super::reference::{Reference, image_id};
use super::store::{Image, ImageStore};

/// Reads ahead of the tar reader.
const BUFFER: usize = 256 << 10;
/// Most members of an archive: three for each layer of some dozen images is far below.
const MAX_MEMBERS: usize = 20_000;
/// Longest name of a member; what the formats ask for has less than a hundred bytes.
const MAX_NAME: usize = 512;
/// Full name of an image in a layout, where `org.opencontainers.image.ref.name` may be a tag alone.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// One entry of Docker's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// A regular file of the archive.
#[derive(Clone, Debug)]
struct Member {
    path: PathBuf,
    digest: Digest,
    size: u64,
    packing: &'static str,
}

/// An archive on disk.
struct Members {
    files: BTreeMap<String, Member>,
    /// Older versions of Docker write a layer once and link to it.
    links: BTreeMap<String, String>,
    /// Removes all of it when dropped.
    _staging: Staging,
}

/// One image of the archive.
struct Found {
    names: Vec<Reference>,
    /// Digest that the names stand for: an index's, or the manifest's.
    resolved: Digest,
    digest: Digest,
    bytes: Vec<u8>,
    manifest: Manifest,
}

fn wrong(detail: impl Into<String>) -> ImageError {
    ImageError::Archive { detail: detail.into() }
}

impl ImageStore {
    /// Takes all images of an archive, each under its names and its digest. Returns one handle for each name.
    ///
    /// Blocking. After an error the images before the wrong one are there, and nothing else of the archive is.
    pub fn import(self: &Arc<Self>, archive: impl io::Read) -> Result<Vec<Image>, ImageError> {
        let members = self.spool(archive)?;
        let found = members.images()?;
        let mut imported = Vec::new();
        for image in &found {
            imported.extend(self.install(&members, image)?);
        }
        Ok(imported)
    }

    /// Gives an image one more name; a name that another image has moves. `None` if `reference` is not here. Blocking.
    pub fn tag(&self, reference: &str, name: &str) -> Result<Option<Image>, ImageError> {
        let name: Reference = name.parse()?;
        let Some(image) = self.resolve(reference)? else { return Ok(None) };
        let damaged =
            |what: &str| wrong(format!("{what} of image {reference} is damaged: remove the image and add it again"));
        let manifest = self.layout.read_blob(&image.manifest).ok_or_else(|| damaged("the manifest"))?;
        let config = self.layout.read_blob(&image.config_digest).ok_or_else(|| damaged("the configuration"))?;
        let Ok(Document::Manifest(parsed)) = Document::parse(&manifest) else { return Err(damaged("the manifest")) };
        let describe = |name: &Reference| {
            self.describe(&name.to_string(), &image.resolved, &image.manifest, image.manifest_size, &parsed, &config)
                .map_err(wrong)
        };
        let (tagged, by_digest) = (describe(&name)?, describe(&name.with_digest(&image.resolved))?);
        self.commit(|| Ok(vec![tagged.clone(), by_digest]))?;
        self.settle()?;
        Ok(Some(tagged))
    }

    /// Writes all members to files, with their digests.
    fn spool(&self, archive: impl io::Read) -> Result<Members, ImageError> {
        let reading = |error: io::Error| wrong(error.to_string());
        let staging = self.layout.staging();
        fs::create_dir(&staging.path).map_err(ImageError::io("create", &staging.path))?;
        let decoder = Decoder::detect(BufReader::with_capacity(BUFFER, archive)).map_err(reading)?;
        let mut archive = Archive::new(BufReader::with_capacity(BUFFER, decoder));
        let (mut files, mut links) = (BTreeMap::new(), BTreeMap::new());
        let mut count = 0;
        while let Some(entry) = archive.next_entry().map_err(reading)? {
            count += 1;
            if count > MAX_MEMBERS {
                return Err(wrong(format!("more than {MAX_MEMBERS} members: save fewer images at a time")));
            }
            let name = plain(&entry.path)?;
            match entry.kind {
                Kind::Directory => {}
                Kind::File if entry.segments.is_some() => {
                    return Err(wrong(format!("{name} is a sparse file: write the archive without --sparse")));
                }
                Kind::File => {
                    let path = staging.path.join(count.to_string());
                    let member = write_member(&mut archive, path, entry.size)?;
                    files.insert(name, member);
                }
                Kind::Symlink(target) => {
                    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                    let target = [directory.as_bytes(), b"/", &target].concat();
                    links.insert(name, plain(&target)?);
                }
                Kind::Hardlink(target) => {
                    links.insert(name, plain(&target)?);
                }
                Kind::Char(..) | Kind::Block(..) | Kind::Fifo => {
                    return Err(wrong(format!("{name} is a device or pipe: this is no archive of images")));
                }
            }
        }
        Ok(Members { files, links, _staging: staging })
    }

    fn install(self: &Arc<Self>, members: &Members, found: &Found) -> Result<Vec<Image>, ImageError> {
        let Found { resolved, digest, bytes, manifest, .. } = found;
        let blobs = manifest.layers.iter().map(|layer| layer.digest.clone());
        let _blobs = self.pin(blobs.chain([digest.clone(), manifest.config.digest.clone()]), std::iter::empty());
        let config = members.blob(&manifest.config.digest)?.document("the image configuration")?;
        let describe = |name: &Reference| {
            self.describe(&name.to_string(), resolved, digest, bytes.len() as u64, manifest, &config)
                .map_err(|detail| wrong(format!("image {name}: {detail}")))
        };
        let named = found.names.iter().map(describe).collect::<Result<Vec<_>, _>>()?;
        let by_digest = found.names.iter().map(|name| describe(&name.with_digest(resolved)));
        let mut all = by_digest.collect::<Result<Vec<_>, _>>()?;
        all.extend(named.iter().cloned());
        let Some(image) = named.first().cloned() else { return Ok(Vec::new()) };
        let _layers = self.pin(std::iter::empty(), image.chain.iter().cloned());
        let mut ready = Vec::new();
        for (at, layer) in manifest.layers.iter().enumerate() {
            let blob = self.layout.blob(&layer.digest);
            let source = &members.blob(&layer.digest)?.path;
            ready.push(if self.layout.layer(&image.chain[at]).is_dir() {
                Ready::Present
            } else {
                let diff_id = image.config.rootfs().diff_ids()[at].parse::<Digest>();
                let diff_id = diff_id.map_err(|e| wrong(format!("image {}: rootfs.diff_ids: {e}", image.name)))?;
                let staged = unpack_blob(&self.layout, open_blob(source)?, &diff_id, &image.name, &layer.digest)?;
                Ready::Staged(Arc::new(staged))
            });
            // A link and no rename: another image of the archive may need it once more.
            match fs::hard_link(source, &blob) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(ImageError::io("link", &blob)(error));
                }
                _ => {}
            }
        }
        publish_image(self, &image, all, &ready, bytes, &config)?;
        // Who imports may be about to end, or to make a disk image of this.
        self.settle()?;
        Ok(named)
    }
}

/// Writes the current member to `path`.
fn write_member<R: io::BufRead>(archive: &mut Archive<R>, path: PathBuf, size: u64) -> Result<Member, ImageError> {
    let mut file = File::create_new(&path).map_err(ImageError::io("create", &path))?;
    // Only the algorithm of it is used.
    let mut hash = Digest::sha256(b"").hasher();
    let (mut magic, mut trouble) = (Vec::new(), None);
    let read = archive.read_data(size, |bytes| {
        hash.update(bytes);
        magic.extend(bytes.iter().take(4 - magic.len()));
        file.write_all(bytes).inspect_err(|error| trouble = Some(io::Error::from(error.kind())))
    });
    if let Some(error) = trouble {
        return Err(ImageError::io("write", &path)(error));
    }
    read.map_err(|error| wrong(error.to_string()))?;
    let packing = match magic.as_slice() {
        [0x1f, 0x8b, ..] => "+gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
        _ => "",
    };
    Ok(Member { path, digest: hash.finish(), size, packing })
}

/// A member's name without what does not matter in it. One that leads out of the archive is refused.
fn plain(path: &[u8]) -> Result<String, ImageError> {
    let shown = || String::from_utf8_lossy(&path[..path.len().min(MAX_NAME)]).into_owned();
    if path.len() > MAX_NAME {
        return Err(wrong(format!("a name of {} bytes, {}…: this is no archive of images", path.len(), shown())));
    }
    let text = std::str::from_utf8(path).map_err(|_| wrong(format!("the name {:?} is not UTF-8", shown())))?;
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop().ok_or_else(|| wrong(format!("the name {text:?} leads out of the archive")))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

impl Member {
    /// The content of a manifest, an index or a configuration.
    fn document(&self, what: &str) -> Result<Vec<u8>, ImageError> {
        if self.size > MAX_MANIFEST {
            return Err(wrong(format!("{what} has {} bytes; the limit is {MAX_MANIFEST}", self.size)));
        }
        fs::read(&self.path).map_err(ImageError::io("read", &self.path))
    }
}

impl Members {
    fn get(&self, name: &str) -> Option<&Member> {
        let mut name = name;
        // A link to a link is not written by anybody, and one to itself must end.
        for _ in 0..3 {
            if let Some(file) = self.files.get(name) {
                return Some(file);
            }
            name = self.links.get(name)?;
        }
        None
    }

    fn named(&self, name: &str) -> Result<&Member, ImageError> {
        self.get(&plain(name.as_bytes())?)
            .ok_or_else(|| wrong(format!("{name} is named in it, but not there: the archive is not complete")))
    }

    /// The blob of a layout.
    fn blob(&self, digest: &Digest) -> Result<&Member, ImageError> {
        if let Some(member) = self.get(&format!("blobs/{}/{}", digest.algorithm(), digest.hex())) {
            if member.digest == *digest {
                return Ok(member);
            }
            return Err(wrong(match digest.algorithm() {
                "sha256" => format!("blob {digest} has digest {}: the archive is damaged", member.digest),
                other => format!("blob {digest}: only sha256 is supported in archives, not {other}"),
            }));
        }
        let same = |member: &&Member| member.digest == *digest;
        self.files.values().find(same).ok_or_else(|| {
            wrong(format!("blob {digest} is missing: save the image with all content for linux/{}", architecture()))
        })
    }

    /// What the archive holds.
    fn images(&self) -> Result<Vec<Found>, ImageError> {
        if let Some(index) = self.get("index.json") {
            return self.layout_images(&index.document("index.json")?);
        }
        let list = self.get("manifest.json").ok_or_else(|| {
            wrong("neither index.json nor manifest.json is in it: write it with docker save, or as an OCI layout")
        })?;
        let list: Vec<DockerImage> = serde_json::from_slice(&list.document("manifest.json")?)
            .map_err(|error| wrong(format!("manifest.json: {error}")))?;
        list.iter().map(|image| self.docker_image(image)).collect()
    }

    fn layout_images(&self, index: &[u8]) -> Result<Vec<Found>, ImageError> {
        let entries = match Document::parse(index).map_err(|detail| wrong(format!("index.json: {detail}")))? {
            Document::Index(entries) => entries,
            Document::Manifest(_) => return Err(wrong("index.json is a manifest, where an index must be")),
        };
        entries.iter().map(|entry| self.layout_image(entry)).collect()
    }

    fn layout_image(&self, entry: &Descriptor) -> Result<Found, ImageError> {
        let unnamed = |detail: &str| {
            wrong(format!("image {} {detail}: save it by its full name, repository and tag", entry.digest))
        };
        let name = match (entry.annotations.get(CONTAINERD_NAME), entry.annotations.get(NAME)) {
            (Some(name), _) => name,
            (None, Some(name)) if name.contains(['/', ':']) => name,
            (None, Some(tag)) => return Err(unnamed(&format!("has only the tag {tag:?}"))),
            (None, None) => return Err(unnamed("has no name")),
        };
        let mut digest = entry.digest.clone();
        for _ in 0..MAX_NESTING {
            let bytes = self.blob(&digest)?.document("the manifest")?;
            match Document::parse(&bytes).map_err(|detail| wrong(format!("image {name}: {detail}")))? {
                Document::Manifest(manifest) => {
                    let names = vec![name.parse()?];
                    return Ok(Found { names, resolved: entry.digest.clone(), digest, bytes, manifest });
                }
                Document::Index(entries) => {
                    let none = || wrong(format!("image {name} is not for linux/{}", architecture()));
                    digest = select(&entries, architecture()).ok_or_else(none)?.digest.clone();
                }
            }
        }
        Err(wrong(format!("image {name}: indexes are nested more than {MAX_NESTING} levels deep")))
    }

    /// Writes the manifest that Docker's own form lacks.
    fn docker_image(&self, image: &DockerImage) -> Result<Found, ImageError> {
        let config = self.named(&image.config)?;
        let names = image.repo_tags.iter().flatten().map(|tag| tag.parse()).collect::<Result<Vec<Reference>, _>>()?;
        if names.is_empty() {
            return Err(wrong(format!("image {} has no name: save it by name, not by ID", image.config)));
        }
        let descriptor = |media_type: String, member: &Member| {
            let Member { digest, size, .. } = member;
            serde_json::json!({"mediaType": media_type, "digest": digest, "size": size})
        };
        let layers = image.layers.iter().flatten().map(|layer| {
            let member = self.named(layer)?;
            Ok(descriptor(format!("application/vnd.oci.image.layer.v1.tar{}", member.packing), member))
        });
        let layers = layers.collect::<Result<Vec<_>, ImageError>>()?;
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG.to_owned(), config),
            "layers": layers,
        });
        let bytes = manifest.to_string().into_bytes();
        let digest = Digest::sha256(&bytes);
        match Document::parse(&bytes).map_err(|detail| wrong(format!("image {}: {detail}", names[0])))? {
            Document::Manifest(manifest) => Ok(Found { names, resolved: digest.clone(), digest, bytes, manifest }),
            Document::Index(_) => Err(wrong(format!("image {}: no manifest", names[0]))),
        }
    }
}

/// Whether `image` is what somebody means who writes `text`: its ID, the beginning of it, or one of its names.
pub(crate) fn is_called(text: &str, id: &str, names: &[String]) -> bool {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    let beginning = text.strip_prefix("sha256:").unwrap_or(text);
    let short = beginning.len() >= 8 && beginning.bytes().all(|b| b.is_ascii_hexdigit()) && hex.starts_with(beginning);
    if image_id(text).is_some() || short {
        return hex.starts_with(beginning);
    }
    text.parse::<Reference>().is_ok_and(|name| names.contains(&name.to_string()))
}
