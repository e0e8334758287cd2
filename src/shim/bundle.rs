//! `setup.json`: the part of a bundle that libcontainer cannot do and the creator does itself.
//!
//! libcontainer gets a `config.json` without seccomp, without `noNewPrivileges`, without the Pod's volumes and
//! with two capabilities lent (`docs/upstream.md` says which of its bugs this goes around). The creator
//! attaches [`Setup::mounts`] between create and start; the executor, the last code before `execve`, loads the
//! filter, takes the lent capabilities back and sets `no_new_privs`.

use std::path::PathBuf;

use oci_spec::runtime::LinuxSeccomp;
use serde::{Deserialize, Serialize};

/// File name of [`Setup`] in a bundle directory.
pub const SETUP_FILE: &str = "setup.json";

/// What the creator and the executor apply to one container, and to every process exec'd in it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Setup {
    /// The capability sets the container's process ends up with.
    pub capabilities: CapabilitySets,
    /// `allowPrivilegeEscalation: false`.
    pub no_new_privs: bool,
    /// The seccomp filter; `None` is unconfined.
    pub seccomp: Option<LinuxSeccomp>,
    /// The Pod's volumes and the node's files (`/etc/hosts` and so on), in the order in which they are mounted.
    pub mounts: Vec<BindMount>,
}

/// Linux capability sets by name, `CAP_` prefix included.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CapabilitySets {
    /// Upper bound of what `execve` may grant.
    pub bounding: Vec<String>,
    /// What the kernel checks.
    pub effective: Vec<String>,
    /// What may be made effective.
    pub permitted: Vec<String>,
    /// Kept over `execve` of a file that is marked inheritable.
    pub inheritable: Vec<String>,
    /// Kept over `execve` by a non-root user.
    pub ambient: Vec<String>,
}

/// One mount into a container: a tree of the node, attached at a path of the container.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BindMount {
    /// Directory or file on the node. Trusted: it is not resolved inside another root.
    pub source: PathBuf,
    /// Path below `source`, chosen by the Pod (`subPath`): resolved with `openat2` so that it cannot leave `source`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path: Option<PathBuf>,
    /// Absolute path in the container, resolved inside its root; made if missing.
    pub destination: PathBuf,
    /// Whether the container may write.
    #[serde(default)]
    pub access: Access,
    /// How mounts made later travel between node and container.
    #[serde(default)]
    pub propagation: Propagation,
}

/// Write access to a mount.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Access {
    /// `readOnly: false`.
    #[default]
    ReadWrite,
    /// `readOnly: true`: the mount itself, not what is mounted below it.
    ReadOnly,
    /// `recursiveReadOnly: Enabled`: the mount and everything below it.
    RecursiveReadOnly,
}

/// `mountPropagation` of a volume mount.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Propagation {
    /// `None`: nothing travels.
    #[default]
    Private,
    /// `HostToContainer`.
    Slave,
    /// `Bidirectional`.
    Shared,
}
