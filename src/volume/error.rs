//! What can go wrong with a Pod's volumes.

use std::io;
use std::path::PathBuf;

use crate::objects::{CertificateError, FieldError, ObjectError, TokenError, TrustBundleError};

use super::atomic::AtomicWriteError;

/// Why one volume cannot be set up. Retryable unless [`SetUpError::is_terminal`]: those
/// need another manifest.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// A ConfigMap or a Secret.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A ServiceAccount token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Trust anchors of ClusterTrustBundles.
    #[error(transparent)]
    TrustBundle(#[from] TrustBundleError),
    /// A certificate of the Pod.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A field of the Pod.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A key of the object that is not there.
    #[error("{0}")]
    MissingKey(String),
    /// The files of an API-backed volume.
    #[error(transparent)]
    Write(#[from] AtomicWriteError),
    /// The type of a `hostPath`.
    #[error("{0}")]
    HostPath(String),
    /// An image volume.
    #[error("{0}")]
    Image(String),
    /// A field with a value that no node can use.
    #[error("{0}")]
    Invalid(String),
    /// Something that this node cannot mount.
    #[error("{0}")]
    Unsupported(String),
    /// Several sources of one projected volume.
    #[error("[{}]", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Several(Vec<SetUpError>),
    /// A system call.
    #[error("{action} {}: {source}", .path.display())]
    Io {
        /// What was tried, for example `mount tmpfs on`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

impl SetUpError {
    pub(super) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// One error as itself, several as a list, none as success.
    pub(super) fn collect(mut errors: Vec<Self>) -> Result<(), Self> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }

    /// Whether trying again cannot help until the manifest changes.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        match self {
            Self::Unsupported(_) | Self::Invalid(_) => true,
            Self::TrustBundle(error) => error.is_terminal(),
            Self::Certificate(error) => error.is_terminal(),
            Self::Several(errors) => errors.iter().any(Self::is_terminal),
            _ => false,
        }
    }
}

/// One volume that could not be set up; its text is that of kubelet's `FailedMount` event.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume {volume:?} : {source}")]
pub struct VolumeFailure {
    /// The volume's name in the Pod.
    pub volume: String,
    /// Why.
    pub source: SetUpError,
}

/// What the [`super::VolumeManager`] could not do. Retryable: each call starts from what is there.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Volumes that could not be set up; the others are. One `FailedMount` event each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    SetUp(Vec<VolumeFailure>),
    /// The Pod has no UID, or one that is no directory name.
    #[error("pod uid {0:?} cannot be used as a directory name")]
    PodUid(String),
    /// The Pod's directory could not be emptied.
    #[error("failed to tear down volumes of pod {uid} at {}: {source}", .path.display())]
    TearDown {
        /// The Pod.
        uid: String,
        /// Where it failed.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The agent is shutting down.
    #[error("volume work was cancelled")]
    Cancelled,
}
