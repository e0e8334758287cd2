//! Images of `image` volumes, what the Node's status says about images, and imports.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::{ContainerImage, ImageVolumeSource, Pod};

use crate::image::{ImageError, ImageStore, Keyring, Reference, mount_read_only};
use crate::server::local::{Archive, LocalError};
use crate::volume::ImageVolumes;

/// How long an import waits for more of its archive.
const SILENCE: Duration = Duration::from_secs(600);

/// Mounts images as volumes (KEP-4639).
pub(super) struct VolumeImages {
    pub images: Arc<ImageStore>,
    pub keyring: Keyring,
}

impl ImageVolumes for VolumeImages {
    fn mount<'a>(
        &'a self,
        _pod: &'a Pod,
        _volume: &'a str,
        source: &'a ImageVolumeSource,
        target: PathBuf,
    ) -> BoxFuture<'a, Result<PathBuf, String>> {
        async move {
            let requested = source.reference.as_deref().unwrap_or_default();
            let policy = source.pull_policy.as_deref().unwrap_or(super::container::default_policy(requested));
            let present = self.images.resolve(requested).map_err(|error| error.to_string())?;
            let image = match (policy, present) {
                ("Never", None) => {
                    return Err(format!("Container image {requested:?} is not present with pull policy of Never"));
                }
                ("Never" | "IfNotPresent", Some(image)) => image,
                _ => {
                    let reference: Reference = requested.parse().map_err(|error: ImageError| error.to_string())?;
                    let credentials = self.keyring.lookup(&reference);
                    self.images.pull(requested, &credentials, None).await.map_err(|error| error.to_string())?.image
                }
            };
            let mounted = target.clone();
            super::node::blocking(move || mount_read_only(&image, &mounted)).await?;
            Ok(target)
        }
        .boxed()
    }

    // the image is pinned by its mount only while it is being made: garbage collection asks the volumes
    fn release(&self, _pod_uid: &str) {}
}

/// `status.images`, largest first.
pub(super) fn node_images(images: &ImageStore) -> Vec<ContainerImage> {
    let listed = images.list().into_iter().map(|image| ContainerImage {
        names: Some(image.repo_digests.into_iter().chain(image.repo_tags).collect()),
        size_bytes: i64::try_from(image.size).ok(),
    });
    listed.collect()
}

/// Imports an archive that comes in; the names of its images.
pub(super) async fn import(images: Arc<ImageStore>, archive: Archive) -> Result<Vec<String>, LocalError> {
    let archive = Body { archive, current: Bytes::new(), runtime: tokio::runtime::Handle::current() };
    let imported = tokio::task::spawn_blocking(move || images.import(archive)).await;
    let imported = imported.map_err(|error| LocalError::Internal(error.to_string()))?.map_err(refused)?;
    Ok(imported.into_iter().map(|image| image.name.clone()).collect())
}

/// Gives an image one more name; the full form of it.
pub(super) async fn tag(images: Arc<ImageStore>, reference: String, name: String) -> Result<String, LocalError> {
    let wanted = reference.clone();
    let tagged = tokio::task::spawn_blocking(move || images.tag(&wanted, &name)).await;
    let tagged = tagged.map_err(|error| LocalError::Internal(error.to_string()))?.map_err(refused)?;
    let absent = || LocalError::NotFound(format!("image {reference:?} is not here: gantry images lists them"));
    tagged.map(|image| image.name.clone()).ok_or_else(absent)
}

fn refused(error: ImageError) -> LocalError {
    match error {
        ImageError::Io { .. } => LocalError::Internal(error.to_string()),
        error => LocalError::Invalid(error.to_string()),
    }
}

/// The blocking end of a body.
struct Body {
    archive: Archive,
    current: Bytes,
    runtime: tokio::runtime::Handle,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            let next = async { tokio::time::timeout(SILENCE, self.archive.next()).await };
            match self.runtime.block_on(next) {
                Ok(Some(piece)) => self.current = piece?,
                Ok(None) => return Ok(0),
                Err(_) => {
                    let text = format!("nothing came in for {} minutes", SILENCE.as_secs() / 60);
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
            }
        }
        let take = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..take]);
        Ok(take)
    }
}
