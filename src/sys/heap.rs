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
    use super::*;

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn what_lies_free_between_blocks_in_use_goes_back() {
        let mut blocks: Vec<Vec<u8>> = (0..160 << 10).map(|_| vec![1; 1000]).collect();
        let full = resident_kib();
        // What stays is in the way of the heap's own shrinking, which is at its end only.
        let mut at = 0;
        blocks.retain(|_| {
            at += 1;
            at % 64 == 0
        });
        let kept = resident_kib();
        release();
        let released = resident_kib();
        // 160 MB in all; other tests run beside this one.
        assert!(kept > full - 40_000, "the heap shrinks by itself: {full} {kept}");
        assert!(released < full - 80_000, "{full} {kept} {released}");
        drop(blocks);
    }
}
