//! Walks inside one directory tree without ever leaving it.
//!
//! A chroot for path look-ups, in user space: each step is one `openat(O_NOFOLLOW)` below the directory that the last
//! step opened, symbolic links are read and followed here, `..` at the root stays at the root. The current directory
//! stays open, so members that follow each other in an archive cost no look-up at all.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, mkdirat, openat, readlinkat, unlinkat};
use rustix::io::Errno;

use super::unpack::{DIRECTORY, is_whiteout, set_opaque};

/// Longest path inside a tree: what a process could use at all (`PATH_MAX`).
pub(super) const MAX_PATH: usize = 4096;
/// Deepest nesting: each level costs an open file while walking and while removing.
const MAX_DEPTH: usize = 256;
/// As the kernel's `MAXSYMLINKS`.
const MAX_LINKS: u32 = 40;

/// Hears of each directory that had to be made, by its path below the root.
type Made<'a> = &'a mut dyn FnMut(&[u8]);

/// A tree and a current directory in it.
pub(super) struct Tree {
    root: OwnedFd,
    /// Real directories from the root to the current one.
    stack: Vec<(Vec<u8>, OwnedFd)>,
}

impl Tree {
    pub fn new(root: OwnedFd) -> Self {
        Self { root, stack: Vec::new() }
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The current directory.
    pub fn current(&self) -> BorrowedFd<'_> {
        self.stack.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd())
    }

    /// The current directory's path below the root.
    pub fn current_path(&self) -> Vec<u8> {
        self.stack.iter().map(|(name, _)| name.as_slice()).collect::<Vec<_>>().join(&b'/')
    }

    /// The path below the root of `name` in the current directory.
    pub fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.current_path();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    /// Goes into a directory of the current one that the caller has opened.
    pub fn push(&mut self, name: &[u8], fd: OwnedFd) {
        self.stack.push((name.to_vec(), fd));
    }

    /// Back to the root.
    pub fn reset(&mut self) {
        self.stack.clear();
    }

    /// Goes to the directory `path`, making what is missing; `made` hears of each directory made.
    pub fn enter(&mut self, path: &[&[u8]], mut made: impl FnMut(&[u8])) -> io::Result<()> {
        self.walk(path, Some(&mut made))
    }

    /// Goes to the directory `path`, which must exist.
    pub fn enter_existing(&mut self, path: &[&[u8]]) -> io::Result<()> {
        self.walk(path, None)
    }

    fn walk(&mut self, path: &[&[u8]], mut made: Option<Made<'_>>) -> io::Result<()> {
        // The stack holds real directories only. A component that names one cannot be a link, so a shared prefix is
        // where the walk may start.
        let shared = self.stack.iter().zip(path).take_while(|((have, _), want)| have == *want).count();
        self.stack.truncate(shared);
        let mut todo: VecDeque<Vec<u8>> = path[shared..].iter().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(part) = todo.pop_front() {
            if part == b".." {
                self.stack.pop();
                continue;
            }
            if self.stack.len() >= MAX_DEPTH {
                return Err(io::Error::other(format!("more than {MAX_DEPTH} nested directories")));
            }
            let here = self.current();
            let fd = match openat(here, part.as_slice(), DIRECTORY, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    let Some(made) = made.as_mut() else { return Err(Errno::NOENT.into()) };
                    mkdirat(here, part.as_slice(), Mode::from_raw_mode(0o755))?;
                    // The umask of the process must not show in an image.
                    let fd = openat(here, part.as_slice(), DIRECTORY, Mode::empty())?;
                    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755))?;
                    made(&self.path_of(&part));
                    fd
                }
                // A whiteout that this layer itself covers with a directory: nothing of the lower layers shows in it.
                Err(Errno::NOTDIR) if made.is_some() && is_whiteout(here, &part)? => {
                    unlinkat(here, part.as_slice(), AtFlags::empty())?;
                    mkdirat(here, part.as_slice(), Mode::from_raw_mode(0o755))?;
                    let fd = openat(here, part.as_slice(), DIRECTORY, Mode::empty())?;
                    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755))?;
                    set_opaque(fd.as_fd())?;
                    fd
                }
                // A link, or something else that is no directory: reading it as a link tells.
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    let target = readlinkat(here, part.as_slice(), Vec::new())
                        .map_err(|errno| io::Error::from(if errno == Errno::INVAL { Errno::NOTDIR } else { errno }))?;
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    if target.as_bytes().starts_with(b"/") {
                        self.stack.clear();
                    }
                    let parts = target.as_bytes().split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".");
                    for part in parts.rev() {
                        todo.push_front(part.to_vec());
                    }
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            self.stack.push((part, fd));
        }
        Ok(())
    }
}
