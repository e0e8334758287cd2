//! One file per volume kind, and the manager that mounts them for a Pod.
//!
//! Layout below the root directory, as kubelet's: `pods/<uid>/volumes/kubernetes.io~<kind>/<name>`.
//!
//! Crash safety needs no journal: whatever is mounted or written for a Pod lies below `pods/<uid>`, a directory that
//! is made first. Setting up is idempotent, and taking down is a fold over the kernel's mount table and that
//! directory, so it works for Pods of an earlier life of the agent too. Taking down never descends into another
//! mount: data of a `hostPath` or of a claim cannot be deleted ([`mounts::remove_tree`]).

mod atomic;
mod config_map;
mod container;
mod downward_api;
mod empty_dir;
mod error;
mod host_path;
mod image;
mod manager;
mod mounts;
mod ownership;
mod projected;
mod secret;
mod unsupported;

pub use atomic::{AtomicWriteError, FileProjection, Payload, write as atomic_write};
pub use container::{MountRefused, container_mounts};
pub use error::{SetUpError, VolumeError, VolumeFailure};
pub use image::{ImageVolumes, NoImageVolumes};
pub use manager::{MountedVolume, MountedVolumes, VolumeConfig, VolumeKind, VolumeManager};
pub use mounts::{is_mount_point, mounts_below, remove_tree};
pub use ownership::{apply_fs_group, fs_group_mismatch};
