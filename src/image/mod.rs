//! Images: registry client, store, unpacking, garbage collection, credentials.
//!
//! [`ImageStore::pull`] brings an image to the node, [`ImageStore::resolve`] finds it again, [`mount_rootfs`] puts it under a
//! container. `layout.rs` describes what is on disk and why a crash cannot hurt it, `unpack.rs` why a hostile layer cannot.

mod archive;
mod auth;
mod credentials;
mod digest;
mod error;
mod gc;
mod import;
mod layer;
mod layout;
mod manifest;
mod mount;
mod progress;
mod pull;
mod reference;
mod registry;
mod settle;
mod store;
mod tree;
mod unpack;

#[cfg(test)]
mod tests;

pub use credentials::{Credential, Keyring};
pub use digest::Digest;
pub use error::ImageError;
pub use gc::{Collected, GcPolicy};
pub(crate) use import::is_called;
pub use mount::{OVERLAY_REMEDY, mount_read_only, mount_rootfs, probe_overlay, unmount_rootfs};
pub use progress::{LayerProgress, LayerState, ProgressSender, PullProgress};
pub use pull::Pulled;
pub use reference::{Reference, Target};
pub use store::{DiskUsage, Image, ImageData, ImageStore, ImageSummary, StoreConfig};
pub use unpack::{UnpackError, Unpacked, unpack_layer};
