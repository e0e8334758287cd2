//! The shim process: parent of one Pod's containers, and the short-lived creator that calls libcontainer.
//!
//! One thread, no runtime: [`main`] must run before anything starts a thread. The shim outlives the agent; what it
//! knows is on disk ([`record`]) before it is told to anybody ([`protocol`]).

pub mod bundle;
pub mod protocol;
pub mod record;

mod cgroup;
mod connection;
mod container;
mod creator;
mod daemon;
mod journal;
mod logfile;
mod pidns;
mod server;

pub use daemon::{LOCK_FILE, LOG_FILE, SOCKET_FILE, main};
