//! The pulls that run, for whoever wants to see how far they are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::image::{LayerState, ProgressSender, PullProgress};
use crate::server::local::Pull;

struct Running {
    uid: String,
    container: String,
    image: String,
    progress: ProgressSender,
}

impl Running {
    fn summary(&self) -> Pull {
        let progress = self.progress.borrow();
        Pull {
            uid: self.uid.clone(),
            container: self.container.clone(),
            image: self.image.clone(),
            layers: progress.layers.len(),
            layers_done: progress.layers.iter().filter(|layer| layer.state == LayerState::Done).count(),
            // a layer that is here already was not downloaded, and is not missing either
            downloaded: progress
                .layers
                .iter()
                .map(|layer| if layer.state == LayerState::Done { layer.total } else { layer.downloaded })
                .sum(),
            total: progress.layers.iter().map(|layer| layer.total).sum(),
        }
    }
}

/// All pulls of the node that Pods wait for.
pub struct Pulls {
    running: Mutex<BTreeMap<u64, Running>>,
    /// Counts beginnings and ends.
    changed: watch::Sender<u64>,
}

impl Default for Pulls {
    fn default() -> Self {
        Self { running: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

/// As long as it lives, the pull is shown.
pub struct Shown {
    pulls: Arc<Pulls>,
    key: u64,
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.pulls.lock().remove(&self.key);
        self.pulls.changed.send_modify(|count| *count += 1);
    }
}

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pull begins: where to tell its progress, and what to keep until it is over.
    #[must_use]
    pub fn begin(self: &Arc<Self>, uid: &str, container: &str, image: &str) -> (ProgressSender, Shown) {
        let progress = ProgressSender::new(PullProgress::default());
        let (uid, container, image) = (uid.to_owned(), container.to_owned(), image.to_owned());
        let running = Running { uid, container, image, progress: progress.clone() };
        let mut all = self.lock();
        let key = all.last_key_value().map_or(0, |(last, _)| last + 1);
        all.insert(key, running);
        drop(all);
        self.changed.send_modify(|count| *count += 1);
        (progress, Shown { pulls: self.clone(), key })
    }

    /// Told when a pull begins or ends.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> Vec<Pull> {
        self.lock().values().map(Running::summary).collect()
    }

    /// Those of one Pod, and what tells when they have come further.
    #[must_use]
    pub fn of(&self, uid: &str) -> (Vec<Pull>, Vec<watch::Receiver<PullProgress>>) {
        let running = self.lock();
        let own = || running.values().filter(|pull| pull.uid == uid);
        // the receivers first: what comes between is seen twice, not never
        let receivers = own().map(|pull| pull.progress.subscribe()).collect();
        (own().map(Running::summary).collect(), receivers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::LayerProgress;

    #[tokio::test]
    async fn a_pull_is_shown_while_it_runs() {
        let pulls = Arc::new(Pulls::default());
        let mut changes = pulls.changes();
        let (sender, shown) = pulls.begin("u", "c", "busybox");
        changes.changed().await.unwrap();
        let (_, mut receivers) = pulls.of("u");
        let layer = |state, downloaded| LayerProgress { digest: "d".into(), downloaded, total: 10, state };
        let layers = vec![layer(LayerState::Done, 0), layer(LayerState::Downloading, 4)];
        sender.send_replace(PullProgress { layers });
        receivers[0].changed().await.unwrap();
        let pull = pulls.list().remove(0);
        assert_eq!((pull.layers, pull.layers_done, pull.downloaded, pull.total), (2, 1, 14, 20));
        assert!(pulls.of("other").0.is_empty());
        drop(shown);
        changes.changed().await.unwrap();
        assert!(pulls.list().is_empty());
    }
}
