//! How far a pull is, for progress bars and for "what is this Pod waiting for".

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// Where a caller of [`super::ImageStore::pull`] wants to see progress. Receivers may come and go.
pub type ProgressSender = watch::Sender<PullProgress>;

/// How often progress is published. Only while somebody asked for it and a pull runs.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

/// A snapshot of a pull.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// Bottom to top; empty until the manifest is known.
    pub layers: Vec<LayerProgress>,
}

/// A snapshot of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    /// Digest of the compressed layer.
    pub digest: String,
    /// Compressed bytes received.
    pub downloaded: u64,
    /// Compressed bytes in all.
    pub total: u64,
    /// What is being done.
    pub state: LayerState,
}

/// What is being done about a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerState {
    /// Waits for other layers.
    Waiting,
    /// Comes in, and is unpacked on the way.
    Downloading,
    /// Is unpacked from what is on disk, or what is left of a download.
    Extracting,
    /// Is there.
    Done,
}

/// The live counters behind a [`LayerProgress`].
#[derive(Debug)]
pub(super) struct Counter {
    digest: String,
    total: u64,
    downloaded: AtomicU64,
    state: AtomicU8,
}

impl Counter {
    pub fn new(digest: String, total: u64) -> Arc<Self> {
        Arc::new(Self { digest, total, downloaded: AtomicU64::new(0), state: AtomicU8::new(0) })
    }

    pub fn add(&self, bytes: u64) {
        self.downloaded.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn downloaded(&self) -> u64 {
        self.downloaded.load(Ordering::Relaxed)
    }

    pub fn set(&self, state: LayerState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    pub fn snapshot(&self) -> LayerProgress {
        LayerProgress {
            digest: self.digest.clone(),
            downloaded: self.downloaded(),
            total: self.total,
            state: match self.state.load(Ordering::Relaxed) {
                0 => LayerState::Waiting,
                1 => LayerState::Downloading,
                2 => LayerState::Extracting,
                _ => LayerState::Done,
            },
        }
    }
}
