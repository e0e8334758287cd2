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

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const PAGE: usize = 4096;

    /// How many of these addresses are on pages that the process has (proc_pid_pagemap(5): bit 63).
    fn present(addresses: &[usize]) -> usize {
        let map = File::open("/proc/self/pagemap").unwrap();
        let is_present = |address: &&usize| {
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, (*address / PAGE * 8) as u64).unwrap();
            u64::from_ne_bytes(entry) >> 63 == 1
        };
        addresses.iter().filter(is_present).count()
    }

    /// Not by the resident size, which is that of all tests that run.
    #[test]
    fn what_lies_free_between_blocks_in_use_goes_back() {
        let mut blocks: Vec<Vec<u8>> = (0..64 << 10).map(|_| vec![1; 1000]).collect();
        // A page in the middle of each run of blocks that will be free.
        let freed: Vec<usize> = blocks.iter().skip(32).step_by(64).map(|block| block.as_ptr().addr()).collect();
        let mut at = 0;
        // What stays is in the way of the heap's own shrinking, which is at its end only.
        blocks.retain(|_| {
            at += 1;
            at % 64 == 0
        });
        let before = present(&freed);
        release();
        let after = present(&freed);
        // Other tests may be given some of it meanwhile.
        assert!(before > freed.len() * 9 / 10 && after < freed.len() / 2, "{before} and {after} of {}", freed.len());
        drop(blocks);
    }
}
