//! One inotify instance for all followers.
//!
//! The kubelet takes one per follower, and a node's limit on instances (`fs.inotify.max_user_instances`, 128 by
//! default) becomes a limit on `kubectl logs -f`.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::AbortHandle,
};

/// Watches directories for changes. Cheap to clone; the last clone ends it.
#[derive(Clone)]
pub struct LogWatcher {
    inner: Arc<Inner>,
    _task: Arc<AbortOnDrop>,
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Inner {
    fd: AsyncFd<OwnedFd>,
    directories: Mutex<HashMap<i32, Directory>>,
}

struct Directory {
    changes: watch::Sender<()>,
    subscribers: usize,
}

/// Tells that something changed in a directory. Changes since the last look are never lost.
pub struct Subscription {
    changes: watch::Receiver<()>,
    descriptor: i32,
    inner: Arc<Inner>,
}

impl LogWatcher {
    /// Starts watching nothing. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the kernel has no inotify instance left.
    pub fn new() -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let inner = Arc::new(Inner { fd: register(fd)?, directories: Mutex::default() });
        let task = tokio::spawn(run(Arc::clone(&inner)));
        Ok(Self { inner, _task: Arc::new(AbortOnDrop(task.abort_handle())) })
    }

    /// Watches a directory: writes to its files, new files, renames.
    ///
    /// # Errors
    /// If the directory does not exist, or the limit on watches is reached.
    pub fn watch(&self, directory: &Path) -> io::Result<Subscription> {
        let events = WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR;
        let mut directories = self.inner.directories();
        // The same directory gives the same descriptor again.
        let descriptor = inotify::add_watch(&self.inner.fd, directory, events)?;
        let entry = directories
            .entry(descriptor)
            .or_insert_with(|| Directory { changes: watch::Sender::new(()), subscribers: 0 });
        entry.subscribers += 1;
        Ok(Subscription { changes: entry.changes.subscribe(), descriptor, inner: Arc::clone(&self.inner) })
    }
}

/// See [`crate::stream::fd`] for why this is sound.
#[allow(deprecated, reason = "the successor is unsafe for types that are not I/O-safe; OwnedFd is")]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

impl Inner {
    fn directories(&self) -> MutexGuard<'_, HashMap<i32, Directory>> {
        self.directories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscription {
    /// From here on only later changes count.
    pub fn mark_seen(&mut self) {
        self.changes.mark_unchanged();
    }

    /// Waits for a change after the last look. `false` if the directory is gone.
    pub async fn changed(&mut self) -> bool {
        self.changes.changed().await.is_ok()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut directories = self.inner.directories();
        if let Some(entry) = directories.get_mut(&self.descriptor) {
            entry.subscribers -= 1;
            if entry.subscribers == 0 {
                directories.remove(&self.descriptor);
                // It fails if the directory is gone, which is just as good.
                let _ = inotify::remove_watch(&self.inner.fd, self.descriptor);
            }
        }
    }
}

async fn run(inner: Arc<Inner>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    while let Ok(mut guard) = inner.fd.readable().await {
        let mut reader = Reader::new(&inner.fd, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let mut directories = inner.directories();
                    if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                        directories.values().for_each(|directory| directory.changes.send_replace(()));
                    } else if event.events().contains(ReadFlags::IGNORED) {
                        // The directory is gone (or was let go): dropping the sender tells who still listens.
                        directories.remove(&event.wd());
                    } else if let Some(directory) = directories.get(&event.wd()) {
                        directory.changes.send_replace(());
                    }
                }
                Err(Errno::INTR) => {}
                // WOULDBLOCK, and nothing else is documented.
                Err(_) => break,
            }
        }
        guard.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn changes_are_told_to_those_who_watch() {
        let (first, second) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let watcher = LogWatcher::new().expect("watcher");
        let mut one = watcher.watch(first.path()).expect("watch");
        let mut same = watcher.watch(first.path()).expect("watch");
        let mut other = watcher.watch(second.path()).expect("watch");
        std::fs::write(first.path().join("0.log"), "x").expect("write");
        let second_long = Duration::from_secs(5);
        assert!(timeout(second_long, one.changed()).await.expect("in time"));
        assert!(timeout(second_long, same.changed()).await.expect("in time"));
        assert!(timeout(Duration::from_millis(50), other.changed()).await.is_err(), "nothing changed there");
        drop(one);
        std::fs::write(first.path().join("0.log"), "y").expect("write");
        assert!(timeout(second_long, same.changed()).await.expect("in time"), "one of two left");
        drop(same);
        assert_eq!(watcher.inner.directories().len(), 1);
        drop(second);
        let gone = async { while other.changed().await {} };
        timeout(second_long, gone).await.expect("told that the directory is gone");
    }
}
