//! Why a container's configuration could not be made.

use std::path::PathBuf;

/// All variants but `SeccompRead` are terminal until the Pod, its image or the node's configuration changes; the
/// kubelet's protocol is nevertheless to try again with back-off, as the container's state is `Waiting`.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A Pod object without `spec`.
    #[error("the Pod has no spec")]
    NoSpec,
    /// `runAsNonRoot` with `runAsUser: 0`.
    #[error("container's runAsUser breaks non-root policy (pod: {pod:?}, container: {container})")]
    RunAsUserIsRoot {
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// `runAsNonRoot` and the image's user is a name, which the image's files may map to anything.
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: {container})"
    )]
    NonNumericUser {
        /// The image's user.
        user: String,
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// `runAsNonRoot` and the image says, or leaves it at, root.
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    ImageIsRoot {
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// `runAsNonRoot` and the image's user is a number that is no user ID.
    #[error(
        "container has runAsNonRoot and image has an invalid user id ({uid}). (Must be 1-(2147483647)): must be between 0 and 2147483647, inclusive (pod: {pod:?}, container: {container})"
    )]
    InvalidImageUser {
        /// The number.
        uid: i64,
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// A user or group ID that the kernel does not have.
    #[error("invalid {what} {value}: must be between 0 and 2147483647, inclusive")]
    InvalidId {
        /// `user` or `group`, and where it comes from.
        what: &'static str,
        /// The number.
        value: i64,
    },
    /// The image's user is not in its own `/etc/passwd`.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    UnknownUser(String),
    /// A supplementary groups policy that this node does not know.
    #[error("unsupported supplementalGroupsPolicy: {0}")]
    SupplementalGroupsPolicy(String),
    /// Neither the Pod nor the image says what to run.
    #[error("no command specified")]
    NoCommand,
    /// A string that cannot be passed to a program.
    #[error("{what} contains a NUL byte or is no name: {value:?}")]
    InvalidString {
        /// Which one.
        what: &'static str,
        /// The string, without secrets: names only.
        value: String,
    },
    /// A working directory that is not absolute.
    #[error("working directory {0:?} is not an absolute path")]
    WorkingDirectory(String),
    /// `Localhost` without a name.
    #[error("localhostProfile must be set if seccompProfile type is Localhost.")]
    NoLocalhostProfile,
    /// A profile name that leaves the directory of profiles.
    #[error("localhostProfile {0:?} must be a path below the node's seccomp directory, without \"..\"")]
    LocalhostProfilePath(String),
    /// A profile type that this node does not know.
    #[error("unknown seccompProfile type {0:?}: use RuntimeDefault, Localhost or Unconfined")]
    SeccompType(String),
    /// A profile that cannot be read. Retryable: something else on the node may put it there.
    #[error("cannot load seccomp profile {path:?}: {source}")]
    SeccompRead {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A profile that is none.
    #[error("cannot load seccomp profile {path:?}: decoding seccomp profile failed: {reason}")]
    SeccompFormat {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// AppArmor asked for where there is none, or a profile that nobody has loaded.
    #[error("AppArmor profile {profile:?}: {reason}")]
    AppArmor {
        /// The profile asked for.
        profile: String,
        /// Why it cannot be used.
        reason: &'static str,
    },
    /// A cgroup path that libcontainer would misunderstand.
    #[error("cgroup path {0:?} must be absolute and not the root")]
    CgroupPath(String),
    /// A part of the API that this node does not implement.
    #[error("{field}: {value}: {remedy}")]
    Unsupported {
        /// Path of the field in the manifest.
        field: &'static str,
        /// What it says.
        value: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A value that the OCI types refuse.
    #[error("invalid OCI configuration: {0}")]
    Oci(#[from] oci_spec::OciSpecError),
}

impl SpecError {
    /// The container's waiting reason: `CreateContainerConfigError` for what a kubelet itself refuses,
    /// `CreateContainerError` for what its runtime does.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoSpec
            | Self::RunAsUserIsRoot { .. }
            | Self::NonNumericUser { .. }
            | Self::ImageIsRoot { .. }
            | Self::InvalidImageUser { .. }
            | Self::SupplementalGroupsPolicy(_)
            | Self::NoLocalhostProfile
            | Self::LocalhostProfilePath(_)
            | Self::SeccompType(_)
            | Self::Unsupported { .. } => "CreateContainerConfigError",
            _ => "CreateContainerError",
        }
    }
}
