//! The only folder with `unsafe`: system calls that std, nix and rustix do not wrap, or not as events.
#![allow(unsafe_code, reason = "this folder wraps raw system calls; each block states its invariant")]

pub mod child;
pub mod confine;
pub mod fork;
pub mod heap;
pub mod mountattr;
pub mod openat2;
pub mod scratch;
pub mod spread;
pub mod watch;
