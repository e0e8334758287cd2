//! `image` volumes: the seam to whoever pulls and mounts images.

use std::path::PathBuf;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ImageVolumeSource, Pod};

/// Mounts images for Pods. The volume manager knows no registry.
pub trait ImageVolumes: Send + Sync {
    /// Pulls the image of volume `volume` as its `pullPolicy` says and gives the path where it is mounted read-only;
    /// idempotent. `target` is a directory of the volume's own: what is mounted on it (or below the Pod's directory)
    /// is unmounted with the Pod's other volumes. The error is the text of the event.
    fn mount<'a>(
        &'a self,
        pod: &'a Pod,
        volume: &'a str,
        source: &'a ImageVolumeSource,
        target: PathBuf,
    ) -> BoxFuture<'a, Result<PathBuf, String>>;

    /// The volumes of the Pod are unmounted: its images may be collected.
    fn release(&self, pod_uid: &str);
}

/// A node without image volumes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoImageVolumes;

impl ImageVolumes for NoImageVolumes {
    fn mount<'a>(
        &'a self,
        _pod: &'a Pod,
        _volume: &'a str,
        source: &'a ImageVolumeSource,
        _target: PathBuf,
    ) -> BoxFuture<'a, Result<PathBuf, String>> {
        let reference = source.reference.clone().unwrap_or_default();
        Box::pin(async move {
            Err(format!(
                "volumes[].image {reference:?} is not supported by this node; copy the files with an init container"
            ))
        })
    }

    fn release(&self, _pod_uid: &str) {}
}
