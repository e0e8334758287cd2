//! Wires one node together: configuration in, running tasks out.

mod admission;
mod allocatable;
mod build;
mod container;
mod devices;
mod endpoints;
mod hooks;
mod images;
mod leave;
mod local;
mod logs;
mod mirrors;
pub mod node;
pub mod pods;
mod probe;
mod process;
pub mod progress;
pub mod records;
pub mod report;
mod resize;
pub mod run;
mod runtime_class;
pub mod sandbox;
mod serving;
mod shutdown;
mod sources;
mod stats;
mod termination;
mod upkeep;

pub use local::socket_path;
pub use run::{Standalone, main};
