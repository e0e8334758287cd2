//! glibc's heap, told to give back what it does not need.
//!
//! An agent does much for a moment (a pull, a hundred Pods) and then little for days. By default each busy thread gets a
//! heap of its own, and what was freed there stays resident.

use nix::libc;

/// Heaps for all threads together; two are busy at a time.
const ARENAS: libc::c_int = 2;
/// Blocks of this size and more are mapped by themselves, and unmapped when they are freed. (Set, because the default
/// grows up to 32 MiB with the blocks that are freed.)
const OWN_MAPPING_BYTES: libc::c_int = 128 << 10;

/// Sets the limits of the heap; call it before threads start. Does nothing with another C library.
pub fn limit() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING_BYTES);
    }
}

/// Gives free memory back to the kernel: after work that needed much of it. Takes some milliseconds.
pub fn release() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number, and the locks that it needs.
    unsafe {
        libc::malloc_trim(0);
    }
}
