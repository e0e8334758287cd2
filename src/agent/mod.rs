//! Wires one node together: configuration in, running tasks out.

pub mod pods;
pub mod records;
pub mod report;
