//! `openat2(2)`, again where the kernel asks for that.
#![allow(clippy::disallowed_methods, reason = "this is what is to be used in its place")]

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::path::Arg;

/// A machine on which so many tries fail in a row does nothing but rename.
const TRIES: u32 = 128;

/// Opens a path that may not leave `directory` (`flags` of openat2(2)).
///
/// With `..` in the path or in a link the kernel says `EAGAIN` when anything on the machine is renamed or mounted at that
/// moment, because it cannot be sure then that the path stays inside.
pub fn openat2(
    directory: impl AsFd,
    path: impl Arg + Copy,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    for _ in 1..TRIES {
        match rustix::fs::openat2(&directory, path, flags, mode, resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    rustix::fs::openat2(directory, path, flags, mode, resolve)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn renames_elsewhere_are_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let (elsewhere, done) = (tempfile::tempdir().unwrap(), AtomicBool::new(false));
        let (one, other) = (elsewhere.path().join("1"), elsewhere.path().join("2"));
        fs::write(&one, "").unwrap();
        let path = "a/../a/b/../b/../../a/b/../../a/b";
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let mut refused = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    fs::rename(&one, &other).unwrap();
                    fs::rename(&other, &one).unwrap();
                }
            });
            for _ in 0..20_000 {
                let plain = rustix::fs::openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
                refused += u32::from(plain.is_err_and(|error| error == Errno::AGAIN));
                let again = openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
                if let Err(error) = again {
                    done.store(true, Ordering::Relaxed);
                    panic!("{error}");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        println!("{refused} of 20000 would have failed");
    }
}
