//! Image garbage collection, by kubelet's policy (`pkg/kubelet/images/image_gc_manager.go`): oldest use first, between two
//! thresholds of disk usage. Unlike there, the disk is measured again after each image, so that it frees what it must and no
//! more, and times of use survive a restart.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::error::ImageError;
use super::store::ImageStore;

/// When images go (`imageGCHighThresholdPercent` and its neighbours in `KubeletConfiguration`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GcPolicy {
    /// Per cent of the file system in use at which collection starts; 100 never starts.
    pub high_percent: u8,
    /// Per cent down to which it frees.
    pub low_percent: u8,
    /// Images that were pulled less than this ago stay (`imageMinimumGCAge`).
    pub min_age: Duration,
    /// Images that were not used for this long go even if there is space (`imageMaximumGCAge`); `None` is off.
    pub max_age: Option<Duration>,
}

impl Default for GcPolicy {
    /// kubelet's: 85, 80, two minutes, off.
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, min_age: Duration::from_secs(120), max_age: None }
    }
}

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// IDs of images that went because nobody had used them for `max_age`.
    pub by_age: Vec<String>,
    /// IDs of images that went to make space.
    pub by_space: Vec<String>,
    /// Bytes that the file system gained.
    pub freed: u64,
}

struct Candidate {
    id: String,
    last_used: SystemTime,
    pulled: SystemTime,
}

impl ImageStore {
    /// Frees disk space by `policy`. `in_use` are the IDs of images that containers or `image` volumes have; they are also
    /// noted as used now. Images that this process holds handles of stay, too.
    ///
    /// Call it every few minutes, and before evicting Pods for disk pressure. Fails with
    /// [`ImageError::FreeDiskSpaceFailed`] if the low threshold was not reached.
    pub async fn collect_garbage(
        self: &Arc<Self>,
        in_use: &HashSet<String>,
        policy: GcPolicy,
    ) -> Result<Collected, ImageError> {
        let (store, in_use) = (Arc::clone(self), in_use.clone());
        blocking(move || store.collect(&in_use, policy)).await
    }

    /// Removes every image that nobody uses and that is older than `min_age`: what the eviction manager asks for before it
    /// kills Pods.
    pub async fn remove_unused(
        self: &Arc<Self>,
        in_use: &HashSet<String>,
        min_age: Duration,
    ) -> Result<Collected, ImageError> {
        let (store, in_use) = (Arc::clone(self), in_use.clone());
        blocking(move || {
            store.sweep()?;
            let mut collected = Collected::default();
            let before = store.available()?.0;
            for candidate in store.candidates(&in_use) {
                if is_older(candidate.pulled, min_age) && store.remove_id(&candidate.id)? {
                    collected.by_space.push(candidate.id);
                }
            }
            collected.freed = store.available()?.0.saturating_sub(before);
            Ok(collected)
        })
        .await
    }

    fn collect(&self, in_use: &HashSet<String>, policy: GcPolicy) -> Result<Collected, ImageError> {
        for id in in_use {
            self.note_use(id)?;
        }
        self.sweep()?;
        let mut collected = Collected::default();
        let (before, capacity) = self.available()?;
        let mut candidates = self.candidates(in_use);
        // Just started, a node has not yet restarted its Pods: nothing would look used.
        if let Some(max_age) = policy.max_age
            && self.opened.elapsed() > max_age
        {
            let mut young = Vec::new();
            for candidate in candidates {
                if is_older(candidate.last_used, max_age) && self.remove_id(&candidate.id)? {
                    collected.by_age.push(candidate.id);
                } else {
                    young.push(candidate);
                }
            }
            candidates = young;
        }
        let (available, _) = self.available()?;
        let used_percent = 100 - available.min(capacity).saturating_mul(100) / capacity.max(1);
        if policy.high_percent < 100 && used_percent >= u64::from(policy.high_percent) {
            let target = capacity / 100 * u64::from(100 - policy.low_percent.min(100));
            let mut now = available;
            for candidate in candidates {
                if now >= target {
                    break;
                }
                if is_older(candidate.pulled, policy.min_age) && self.remove_id(&candidate.id)? {
                    collected.by_space.push(candidate.id);
                    now = self.available()?.0;
                }
            }
            if now < target {
                let freed = now.saturating_sub(before);
                return Err(ImageError::FreeDiskSpaceFailed { used_percent, capacity, freed });
            }
        }
        collected.freed = self.available()?.0.saturating_sub(before);
        Ok(collected)
    }

    /// Unused images, the one that nobody used for longest first.
    fn candidates(&self, in_use: &HashSet<String>) -> Vec<Candidate> {
        let mut by_id = BTreeMap::new();
        self.with_images(|images| {
            for image in images.values().filter(|image| !in_use.contains(&image.id)) {
                by_id.entry(image.id.clone()).or_insert((image.config_digest.clone(), image.manifest.clone()));
            }
        });
        let mut all: Vec<_> = by_id
            .into_iter()
            .map(|(id, (config, manifest))| Candidate {
                id,
                last_used: self.layout.time(&config),
                pulled: self.layout.time(&manifest),
            })
            .collect();
        all.sort_by_key(|candidate| (candidate.last_used, candidate.pulled));
        all
    }

    /// Bytes available and capacity of the file system.
    fn available(&self) -> Result<(u64, u64), ImageError> {
        let root = self.layout.root();
        let stat = rustix::fs::statvfs(root).map_err(ImageError::errno("stat", root))?;
        Ok((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
    }
}

/// A clock that was set back makes nothing old.
fn is_older(time: SystemTime, age: Duration) -> bool {
    SystemTime::now().duration_since(time).is_ok_and(|passed| passed >= age)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ImageError::io("collect garbage in", "images")(std::io::Error::other(e.to_string())))?
}
