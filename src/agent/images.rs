//! Images of `image` volumes, and what the Node's status says about images.

use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ContainerImage, ImageVolumeSource, Pod};

use crate::image::{ImageStore, Keyring, Reference, mount_read_only};
use crate::volume::ImageVolumes;

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
                    let reference: Reference = requested.parse().map_err(|error: crate::image::ImageError| error.to_string())?;
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
