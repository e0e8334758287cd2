//! QoS, cgroups, quantities and statistics.

pub mod quantity;
