//! QoS, cgroups, quantities and statistics.

pub mod amounts;
pub mod cgroup;
pub mod devices;
#[cfg(test)]
pub(crate) mod fixture;
pub mod limits;
pub mod machine;
pub mod qos;
pub mod quantity;
pub mod stats;
