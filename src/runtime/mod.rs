//! An OCI bundle from a Pod, and the client side of the shim.

pub mod cdi;
pub mod client;
pub mod spec;
