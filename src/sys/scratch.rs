//! A buffer whose memory goes back to the kernel when it is idle.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Zero-filled private memory outside the allocator's heap.
#[derive(Debug)]
pub struct Scratch {
    start: NonNull<libc::c_void>,
    len: usize,
}

impl Scratch {
    /// Reserves `len` bytes; the kernel gives pages only when they are touched.
    pub fn new(len: NonZeroUsize) -> io::Result<Scratch> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) }?;
        Ok(Scratch { start, len: len.get() })
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has `len` initialised (zero) bytes, is ours alone and lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }

    /// Gives the pages back; the bytes are zero afterwards.
    pub fn release(&mut self) {
        // SAFETY: the range is exactly our mapping, and `&mut self` says that no slice of it is alive.
        let released = unsafe { madvise(self.start, self.len, MmapAdvise::MADV_DONTNEED) };
        debug_assert!(released.is_ok());
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the range is exactly our mapping and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.start, self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Position of the first `needle`, with the C library's vector code.
pub fn find_byte(needle: u8, haystack: &[u8]) -> Option<usize> {
    // SAFETY: memchr reads at most `len` bytes from a valid slice.
    let found = unsafe { libc::memchr(haystack.as_ptr().cast(), i32::from(needle), haystack.len()) };
    (!found.is_null()).then(|| found.addr() - haystack.as_ptr().addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_zero_again_after_release() -> io::Result<()> {
        let mut scratch = Scratch::new(NonZeroUsize::MIN.saturating_add(8191))?;
        scratch.bytes()[8191] = 7;
        scratch.release();
        assert_eq!(scratch.bytes()[8191], 0);
        Ok(())
    }

    #[test]
    fn finds_bytes() {
        assert_eq!(find_byte(b'\n', b"ab\nc\n"), Some(2));
        assert_eq!(find_byte(b'\n', b"abc"), None);
        assert_eq!(find_byte(b'\n', b""), None);
    }
}
