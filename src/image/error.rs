//! What can go wrong with an image, and which reason a Pod's status gives for it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// An image operation that failed.
///
/// A kubelet retries *every* pull error with back-off, so nothing here is terminal for a Pod; [`ImageError::is_transient`]
/// says whether the same request may succeed soon without anybody changing anything. Errors are cheap to clone because
/// one pull may answer many callers.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ImageError {
    /// The name cannot be parsed. Wording of kubelet's `image_manager.go`. Not transient.
    #[error("Failed to apply default image tag \"{name}\": couldn't parse image name \"{name}\": {detail}")]
    InvalidName {
        /// The name as written in the Pod.
        name: String,
        /// Which rule it breaks.
        detail: String,
    },
    /// The registry does not know the name. Not transient.
    #[error("failed to pull and unpack image \"{name}\": failed to resolve reference \"{name}\": {what}: not found")]
    NotFound {
        /// Normalised image name.
        name: String,
        /// What was asked for: the name, or a blob or manifest of it.
        what: String,
    },
    /// The registry wants other credentials. Not transient.
    #[error(
        "failed to pull and unpack image \"{name}\": failed to resolve reference \"{name}\": pull access denied, repository does not exist or may require authorization: {detail}; check imagePullSecrets of the Pod or its ServiceAccount"
    )]
    AccessDenied {
        /// Normalised image name.
        name: String,
        /// What the registry said.
        detail: String,
    },
    /// Nobody answers, or only with 5xx. Transient.
    #[error("image pull failed for {name} because the registry is unavailable: {detail}")]
    RegistryUnavailable {
        /// Normalised image name.
        name: String,
        /// Connection error or status line.
        detail: String,
    },
    /// The registry answered with something that is not the image. Transient only where bytes were lost on the way.
    #[error("failed to pull and unpack image \"{name}\": {detail}")]
    Pull {
        /// Normalised image name.
        name: String,
        /// What was wrong, with the digest or field it was wrong in.
        detail: String,
        /// Whether trying again may help.
        transient: bool,
    },
    /// A layer is not an archive that may be unpacked. Not transient.
    #[error("failed to pull and unpack image \"{name}\": failed to extract layer {layer}: {detail}")]
    Layer {
        /// Normalised image name.
        name: String,
        /// Digest of the layer.
        layer: String,
        /// Entry and rule.
        detail: String,
    },
    /// An archive of images cannot be imported. Not transient.
    #[error("image archive: {detail}")]
    Archive {
        /// What was wrong, with the member or image it was wrong in, and the remedy.
        detail: String,
    },
    /// The image is used by a container or by this process. Transient.
    #[error("image \"{name}\" is in use: delete the containers that use it first")]
    InUse {
        /// Image name or ID as given.
        name: String,
    },
    /// Credentials (Secret or file) that cannot be read. The text never holds any part of them. Not transient.
    #[error("invalid registry credentials in {origin}: {detail}")]
    Credentials {
        /// Secret key or file path.
        origin: String,
        /// Which field, and what is expected there.
        detail: String,
    },
    /// A call of the operating system failed on the store. Transient (disk full, file handles).
    #[error("image store: {action} {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// The kernel refused an overlay mount. Not transient.
    #[error("cannot mount image \"{name}\" at {}: {detail}", target.display())]
    Mount {
        /// Normalised image name.
        name: String,
        /// Mount point.
        target: PathBuf,
        /// The kernel's own message where it gives one, else the error number.
        detail: String,
    },
    /// Garbage collection could not free enough. Wording of kubelet's `image_gc_manager.go`. Transient.
    #[error(
        "Insufficient free disk space on the node's image filesystem ({used_percent}% of {capacity} bytes used). Failed to free sufficient space by deleting unused images (freed {freed} bytes). Investigate disk usage, as it could be used by active images, logs, volumes, or other data."
    )]
    FreeDiskSpaceFailed {
        /// Per cent of the filesystem in use before the collection.
        used_percent: u64,
        /// Size of the filesystem in bytes.
        capacity: u64,
        /// Bytes that were freed.
        freed: u64,
    },
}

/// What mends it, where that does not follow from the error.
pub(super) fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; make room there, or move the store to a larger disk with --data-dir"
        }
        _ => "",
    }
}

impl ImageError {
    /// The waiting reason of the container (`pkg/kubelet/images/types.go`, `crierrors`).
    ///
    /// `ErrImageNeverPull` and `ImagePullBackOff` are decided by the caller, who knows the policy and the back-off.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "InvalidImageName",
            Self::RegistryUnavailable { .. } => "RegistryUnavailable",
            Self::Io { .. } | Self::InUse { .. } | Self::FreeDiskSpaceFailed { .. } => "ImageInspectError",
            Self::Mount { .. } => "CreateContainerError",
            Self::NotFound { .. }
            | Self::AccessDenied { .. }
            | Self::Pull { .. }
            | Self::Layer { .. }
            | Self::Archive { .. }
            | Self::Credentials { .. } => "ErrImagePull",
        }
    }

    /// Whether the same call may succeed soon although nobody changes the Pod, the image or the node.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RegistryUnavailable { .. }
            | Self::InUse { .. }
            | Self::Io { .. }
            | Self::FreeDiskSpaceFailed { .. } => true,
            Self::Pull { transient, .. } => *transient,
            _ => false,
        }
    }

    /// An error of the operating system on a file of the store.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source: Arc::new(source) }
    }

    /// As [`ImageError::io`], for rustix.
    pub(crate) fn errno(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let io = Self::io(action, path);
        move |errno| io(errno.into())
    }

    /// A pull that cannot succeed with what the registry sent.
    pub(crate) fn pull(name: &str, detail: impl Into<String>) -> Self {
        Self::Pull { name: name.to_owned(), detail: detail.into(), transient: false }
    }
}
