//! The heart: what a Pod should do next (`plan`), what it looks like (`status`) and the task that owns it (`worker`).

pub mod env;
