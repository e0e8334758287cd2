//! Pulled images on their way to stable storage.
//!
//! A Pod need not wait for its image to be on the disk: what is written can be read at once. But the index must not name
//! what a power failure may tear. So a pull's images are named in `unsynced.json` first, with the boot in which they were
//! written: as long as that boot lasts, a restarted agent finds all of them whole in the kernel's memory or on the disk.
//! A moment later everything is on the disk, and they move to the index.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::error::ImageError;
use super::store::{Image, ImageStore};

impl ImageStore {
    /// Puts everything that was pulled on stable storage and then into the index. Blocking: as long as the disk needs.
    pub fn settle(&self) -> Result<(), ImageError> {
        let unsynced = self.unsynced();
        if unsynced.is_empty() {
            return Ok(());
        }
        self.layout.sync()?;
        self.settled(&unsynced)
    }

    /// The same in the background. A failure is logged, and tried again after the next pull: until then the images are
    /// there as well, but not after a reboot.
    pub(super) fn settle_soon(self: &Arc<Self>) {
        if self.settling.swap(true, Ordering::AcqRel) {
            return;
        }
        let weak = Arc::downgrade(self);
        let spawned = std::thread::Builder::new().name("image-sync".to_owned()).spawn(move || settle_all(&weak));
        if let Err(error) = spawned {
            self.settling.store(false, Ordering::Release);
            tracing::warn!(%error, "pulled images are not put on stable storage: no thread");
        }
    }
}

/// Holds the store only for moments, so that who closes it does not wait for the disk.
fn settle_all(weak: &Weak<ImageStore>) {
    loop {
        let Some(store) = weak.upgrade() else { return };
        let (unsynced, layout) = (store.unsynced(), store.layout.clone());
        if unsynced.is_empty() {
            store.settling.store(false, Ordering::Release);
            // One that came between the look and the store found somebody at work.
            if store.unsynced().is_empty() || store.settling.swap(true, Ordering::AcqRel) {
                return;
            }
            continue;
        }
        drop(store);
        let synced = layout.sync();
        let Some(store) = weak.upgrade() else { return };
        if let Err(error) = synced.and_then(|()| store.settled(&unsynced)) {
            store.settling.store(false, Ordering::Release);
            tracing::error!(%error, "pulled images are not on stable storage; after a reboot they will be pulled again");
            return;
        }
    }
}

/// Whether an image has to be in the index before its pull ends: if a name moves, a power failure must not bring back
/// what it meant before.
pub(super) fn moves(image: &Image, previous: Option<&Image>) -> bool {
    previous.is_some_and(|previous| previous.manifest != image.manifest)
}
