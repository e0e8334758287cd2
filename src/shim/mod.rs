//! The shim process: parent of one Pod's containers, and the short-lived creator that calls libcontainer.

pub mod bundle;
