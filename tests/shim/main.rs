//! The shim and the creator for real: needs root and a static busybox (Debian: busybox-static).
#![allow(clippy::disallowed_methods, reason = "tests run tools and wait as they like")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod confinement;
mod exec;
mod harness;
mod lifecycle;
mod mounts;
mod recovery;
mod streams;
