//! The heart: what a Pod should do next (`plan`), what it looks like (`status`) and the task that owns it (`worker`).

pub mod admission;
pub mod backoff;
mod conditions;
pub mod effects;
pub mod env;
pub mod features;
pub mod fold;
pub mod model;
pub mod plan;
pub mod probe;
pub mod probes;
pub mod resize;
pub mod resources;
mod restart_all;
pub mod rules;
#[cfg(test)]
mod simulation;
pub mod status;
#[cfg(test)]
mod testing;
pub mod worker;
