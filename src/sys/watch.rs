//! Waiting for a change of a file or directory, by inotify.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An inotify instance on a path, or on its nearest ancestor that exists. It tells of one change: start a new one
/// before looking at what changed.
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Begins to watch.
    pub fn start(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let content = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ATTRIB;
        let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
        inotify.add_watch(existing, content)?;
        // a file is often replaced by a rename, which only its directory sees
        if existing == path
            && path.is_file()
            && let Some(parent) = path.parent()
        {
            inotify.add_watch(parent, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE)?;
        }
        let fd = inotify.as_fd().try_clone_to_owned()?;
        #[allow(
            deprecated,
            reason = "an OwnedFd keeps its descriptor as long as it lives: what the unsafe form asks for"
        )]
        Ok(Self(AsyncFd::with_interest(fd, Interest::READABLE)?))
    }

    /// Waits for a change; for ever without inotify.
    pub async fn changed(watch: Option<&Self>) {
        match watch {
            Some(Self(fd)) => {
                if let Err(error) = fd.readable().await {
                    tracing::warn!(%error, "inotify failed");
                }
            }
            None => std::future::pending().await,
        }
    }
}
