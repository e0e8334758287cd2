//! Container logs: reading the CRI log format, across rotated files, and following what is being written.
//!
//! The kubelet reads the current file only and loses its place when it is rotated (kubernetes/kubernetes#115701,
//! #59902). Here a reader holds the files open and keeps its place in them:
//!
//! | module | what it does |
//! |---|---|
//! | [`options`] | `PodLogOptions` from a query, and its validation |
//! | [`record`] | one line of the CRI format |
//! | [`files`] | which files belong to an instance, in order, and where the last n lines begin |
//! | [`reader`] | bytes of files to bytes for the client; synchronous, for a blocking thread |
//! | [`watch`] | one inotify instance for all followers |
//! | [`follow`] | the asynchronous side: reader, watcher and the end of the container together |
//! | [`instance`] | which instance of a container the logs are asked of |

pub mod files;
pub mod follow;
pub mod instance;
pub mod options;
pub mod reader;
pub mod record;
pub mod watch;
