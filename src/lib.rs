//! Gantry: a complete Kubernetes node in one binary.
//!
//! `docs/architecture.md` walks through the processes, the state on disk and a Pod's way through the
//! folders below. Dependencies between them go one way:
//! `cli -> agent -> {node, source, server} -> pod -> {runtime, image, network, volume, objects, resources, shim} -> sys`.
//! `stream` knows no Kubernetes types; `image`, `network`, `runtime` and `volume` do not know each other.

pub mod agent;
pub mod cli;
pub mod config;
pub mod image;
pub mod network;
pub mod node;
pub mod objects;
pub mod pod;
pub mod resources;
pub mod runtime;
pub mod server;
pub mod shim;
pub mod source;
pub mod stream;
pub mod sys;
pub mod volume;
