//! Where Pods come from: the API server, manifest files, a URL; and the mirrors of those that the API server does
//! not know.
//!
//! Source: `pkg/kubelet/config`. Every source sends [`PodChange`]s into one channel.

pub mod api;
mod defaults;
mod file;
mod manifest;
mod mirror;
mod url;
mod validate;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

pub use defaults::set_defaults;
pub use file::watch_files;
pub use manifest::{ManifestError, parse_manifest};
pub use mirror::{MirrorAction, MirrorPods};
pub use url::{UrlSource, watch_url};

/// `api`, `file`, `http` or `local`: who said that a Pod shall be.
pub const SOURCE: &str = "kubernetes.io/config.source";
/// When the node first saw the Pod.
pub const SEEN: &str = "kubernetes.io/config.seen";
/// Identity of a static Pod's manifest.
pub const HASH: &str = "kubernetes.io/config.hash";
/// On a mirror Pod: the hash of what it mirrors.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Which source speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// The API server.
    Api,
    /// Manifest files.
    File,
    /// A manifest URL.
    Url,
    /// Somebody at this machine, over the local socket.
    Local,
}

impl Origin {
    /// The word kubelet annotates Pods with.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::File => "file",
            Self::Url => "http",
            Self::Local => "local",
        }
    }
}

/// One piece of news from a source.
#[derive(Clone, Debug)]
pub enum PodChange {
    /// This Pod shall run, or has changed. May repeat.
    Set(Origin, Arc<Pod>),
    /// This Pod is gone from its source; what runs of it must end.
    Removed(Origin, PodKey),
    /// The source has told everything it knows. Before all sources have, nothing may be cleaned up. Repeats after
    /// the API server was away.
    Synced(Origin),
}

/// Enough of a Pod to know it by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodKey {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl PodKey {
    /// The key of a Pod.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let metadata = &pod.metadata;
        Self { uid: text(&metadata.uid), namespace: text(&metadata.namespace), name: text(&metadata.name) }
    }
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Whether a Pod stands in the API server for one that we have from elsewhere.
#[must_use]
pub fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, MIRROR).is_some()
}

/// Who said that a Pod shall be; the API server, if it does not tell.
#[must_use]
pub fn origin(pod: &Pod) -> Origin {
    match annotation(pod, SOURCE) {
        Some("file") => Origin::File,
        Some("http") => Origin::Url,
        Some("local") => Origin::Local,
        _ => Origin::Api,
    }
}

/// Whether a Pod comes from a file or URL (mirrors do not).
#[must_use]
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, SOURCE).is_some_and(|source| source != Origin::Api.as_str()) && !is_mirror(pod)
}
