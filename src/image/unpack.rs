//! Unpacks one layer into a directory, in the form overlayfs expects of a lower layer.
//!
//! Rules: OCI image specification, layer.md; the kernel's `filesystems/overlayfs.rst` for whiteouts and opaque
//! directories. The archive is hostile: every step opens one component with `O_NOFOLLOW` below a directory that is
//! already open, symbolic links are followed here and never by the kernel, `..` stops at the layer's root.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod, fchown,
    fsetxattr, ftruncate, futimens, linkat, lsetxattr, makedev, mkdirat, mknodat, openat, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use super::archive::{Archive, Entry, Kind};
use super::tree::Tree;
use crate::sys::openat2::openat2;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS bookkeeping that some old images still carry (`.wh..wh.plnk` and so on); no content.
const AUFS: &[u8] = b".wh..wh.";
/// Most members of one layer: bounds the lists kept until the end.
const MAX_ENTRIES: u64 = 20_000_000;
/// How many bytes are written between two looks at the free space.
const SPACE_CHECK: u64 = 64 << 20;
/// How many members are made between two looks at the free space.
const SPACE_CHECK_ENTRIES: u64 = 4096;
/// Space that unpacking leaves free: 2 %, at most this. A full disk takes the whole node down; a failed pull does not.
const MAX_RESERVE: u64 = 512 << 20;

/// Why a layer was not unpacked. [`UnpackError::is_transient`] tells trouble of the node from a bad layer.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The stream ended early or is not an archive.
    #[error("{0}")]
    Read(#[source] io::Error),
    /// A member breaks a rule.
    #[error("entry {path:?}: {detail}")]
    Entry {
        /// Name in the archive, lossy and shortened.
        path: String,
        /// The rule.
        detail: String,
    },
    /// The operating system refused to make a member.
    #[error("entry {path:?}: {source}")]
    Io {
        /// Name in the archive, lossy and shortened.
        path: String,
        /// Its error.
        source: io::Error,
    },
    /// The file system is nearly full.
    #[error(
        "not enough space: {available} bytes and {inodes} inodes left; make room there, or move the store to a larger disk with --data-dir"
    )]
    NoSpace {
        /// Bytes left.
        available: u64,
        /// Inodes left.
        inodes: u64,
    },
}

impl UnpackError {
    /// Whether the same layer may unpack when the node has more disk, memory or file handles.
    pub fn is_transient(&self) -> bool {
        let code = |source: &io::Error| source.raw_os_error().map(Errno::from_raw_os_error);
        match self {
            Self::NoSpace { .. } => true,
            Self::Io { source, .. } => matches!(
                code(source),
                Some(
                    Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::ROFS
                )
            ),
            // a download is written to the store while it is read
            Self::Read(source) => matches!(code(source), Some(Errno::NOSPC | Errno::DQUOT)),
            Self::Entry { .. } => false,
        }
    }

    /// What the operating system said.
    pub(super) fn os_error(&self) -> Option<&io::Error> {
        match self {
            Self::Io { source, .. } | Self::Read(source) => Some(source),
            Self::Entry { .. } | Self::NoSpace { .. } => None,
        }
    }
}

/// What was unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// Bytes of file content, rounded up to blocks of 4096.
    pub bytes: u64,
    /// Files, directories and other members made.
    pub inodes: u64,
    /// Directories that the archive uses but does not describe. They were made with mode 0755 and belong to root; where a
    /// lower layer has the same directory its attributes must be copied (`layer.rs` does). Paths below the root, which is
    /// itself the empty path.
    pub implied: Vec<Vec<u8>>,
}

/// Unpacks the uncompressed tar stream `reader` into the empty directory `root`.
///
/// Reads the stream to its end, so that a hash taken on the way covers all of it. Stops with an error at the first
/// member that breaks a rule; the caller throws the directory away.
pub fn unpack_layer(reader: impl BufRead, root: BorrowedFd<'_>) -> Result<Unpacked, UnpackError> {
    let mut archive = Archive::new(reader);
    let mut unpacker = Unpacker::new(root).map_err(UnpackError::Read)?;
    while let Some(entry) = archive.next_entry().map_err(UnpackError::Read)? {
        unpacker.add(&entry, &mut archive)?;
    }
    let result = unpacker.finish()?;
    // What follows the end marker is padding, but it is part of the digest.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(UnpackError::Read)?;
    Ok(result)
}

struct Unpacker {
    tree: Tree,
    /// A second walker for the targets of hard links, so that they do not push the first out of its directory.
    links: Tree,
    /// Directories whose times are set at the end, because making members changes them.
    times: BTreeMap<Vec<u8>, Timestamps>,
    implied: HashSet<Vec<u8>>,
    entries: u64,
    written: u64,
    written_checked: u64,
}

impl Unpacker {
    fn new(root: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            tree: Tree::new(root.try_clone_to_owned()?),
            links: Tree::new(root.try_clone_to_owned()?),
            times: BTreeMap::new(),
            implied: HashSet::new(),
            entries: 0,
            written: 0,
            written_checked: 0,
        })
    }

    fn add<R: BufRead>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), UnpackError> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(rule(&entry.path, format!("more than {MAX_ENTRIES} entries in one layer")));
        }
        if self.entries % SPACE_CHECK_ENTRIES == 1 || self.written - self.written_checked > SPACE_CHECK {
            self.check_space()?;
        }
        let path = clean(&entry.path).map_err(|detail| rule(&entry.path, detail))?;
        let Some((&name, parents)) = path.split_last() else {
            return match entry.kind {
                Kind::Directory => self.root(entry).map_err(|source| failed(&entry.path, source)),
                _ => Err(rule(&entry.path, "the root of a layer must be a directory".to_owned())),
            };
        };
        let implied = &mut self.implied;
        self.tree
            .enter(parents, |made| {
                implied.insert(made.to_vec());
            })
            .map_err(|source| failed(&entry.path, source))?;
        self.member(name, entry, archive)
    }

    fn member<R: BufRead>(&mut self, name: &[u8], entry: &Entry, archive: &mut Archive<R>) -> Result<(), UnpackError> {
        let io = |source: io::Error| failed(&entry.path, source);
        if name == OPAQUE {
            return set_opaque(self.tree.current()).map_err(io);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(rule(&entry.path, "a whiteout must name a file".to_owned()));
            }
            return self.whiteout(hidden).map_err(io);
        }
        let owner = owner(entry)?;
        match &entry.kind {
            Kind::Directory => self.directory(name, entry, owner).map_err(io),
            Kind::File => self.file(name, entry, owner, archive),
            Kind::Hardlink(target) => self.hardlink(name, entry, target),
            Kind::Symlink(target) => {
                if target.is_empty() {
                    return Err(rule(&entry.path, "a symbolic link without a target".to_owned()));
                }
                let dir = self.replace(name, |dir| symlinkat(target.as_slice(), dir, name)).map_err(io)?;
                special_attributes(dir, name, entry, owner, false).map_err(io)
            }
            Kind::Char(major, minor) => self.node(name, entry, owner, FileType::CharacterDevice, (*major, *minor)),
            Kind::Block(major, minor) => self.node(name, entry, owner, FileType::BlockDevice, (*major, *minor)),
            Kind::Fifo => self.node(name, entry, owner, FileType::Fifo, (0, 0)),
        }
    }

    fn root(&mut self, entry: &Entry) -> io::Result<()> {
        let owner = owner(entry).map_err(|e| io::Error::other(e.to_string()))?;
        attributes(self.tree.root(), entry, owner)?;
        self.times.insert(Vec::new(), times(entry));
        Ok(())
    }

    fn directory(&mut self, name: &[u8], entry: &Entry, owner: (Uid, Gid)) -> io::Result<()> {
        let dir = self.tree.current();
        let mut hides_lower = false;
        match mkdirat(dir, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    hides_lower = is_whiteout(dir, name)?;
                    remove(dir, name)?;
                    mkdirat(dir, name, Mode::from_raw_mode(0o755))?;
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        let made = openat(dir, name, DIRECTORY, Mode::empty())?;
        if hides_lower {
            set_opaque(made.as_fd())?;
        }
        attributes(made.as_fd(), entry, owner)?;
        let path = self.tree.path_of(name);
        self.implied.remove(&path);
        self.times.insert(path, times(entry));
        // The next members are most often in here.
        self.tree.push(name, made);
        Ok(())
    }

    fn file<R: BufRead>(
        &mut self,
        name: &[u8],
        entry: &Entry,
        owner: (Uid, Gid),
        archive: &mut Archive<R>,
    ) -> Result<(), UnpackError> {
        const CREATE: OFlags =
            OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
        let io = |source: io::Error| failed(&entry.path, source);
        let mut fd = None;
        self.replace(name, |dir| {
            fd = Some(openat(dir, name, CREATE, Mode::from_raw_mode(0o600))?);
            Ok(())
        })
        .map_err(io)?;
        let Some(fd) = fd else { return Err(io(io::ErrorKind::NotFound.into())) };
        let mut file = File::from(fd);
        // Errors of the stream and of the file are told apart: the first are the registry's, the second the node's.
        let mut write_error = None;
        let whole = [(0, entry.size)];
        for (offset, length) in entry.segments.as_deref().unwrap_or(&whole) {
            let mut at = *offset;
            let result = archive.read_data(*length, |piece| {
                let written = match entry.segments {
                    None => file.write_all(piece),
                    Some(_) => std::os::unix::fs::FileExt::write_all_at(&file, piece, at),
                };
                at += piece.len() as u64;
                written.map_err(|e| {
                    write_error = Some(e);
                    io::ErrorKind::Other.into()
                })
            });
            if let Some(source) = write_error.take() {
                return Err(io(source));
            }
            result.map_err(UnpackError::Read)?;
            self.written += length.next_multiple_of(4096);
            if self.written - self.written_checked > SPACE_CHECK {
                self.check_space()?;
            }
        }
        if entry.segments.is_some() {
            ftruncate(&file, entry.size).map_err(|e| io(e.into()))?;
        }
        attributes(file.as_fd(), entry, owner).and_then(|()| Ok(futimens(&file, &times(entry))?)).map_err(io)
    }

    fn hardlink(&mut self, name: &[u8], entry: &Entry, target: &[u8]) -> Result<(), UnpackError> {
        let io = |source: io::Error| failed(&entry.path, source);
        let cleaned = clean(target).map_err(|detail| rule(&entry.path, format!("hard link target: {detail}")))?;
        let Some((&base, parents)) = cleaned.split_last() else {
            return Err(rule(&entry.path, "hard link to the root of the layer".to_owned()));
        };
        self.links.enter_existing(parents).map_err(|source| {
            failed(&entry.path, io::Error::new(source.kind(), format!("hard link target {}: {source}", lossy(target))))
        })?;
        if self.links.current_path() == self.tree.current_path() && base == name {
            return Err(rule(&entry.path, "hard link to itself".to_owned()));
        }
        let (from, dir) = (self.links.current(), self.tree.current());
        match linkat(from, base, dir, name, AtFlags::empty()) {
            Err(Errno::EXIST) => {
                // Removing what is in the way may take the target with it; then the link below fails, as it should.
                remove_any(dir, name).map_err(io)?;
                self.links.reset();
                self.links.enter_existing(parents).map_err(io)?;
                linkat(self.links.current(), base, self.tree.current(), name, AtFlags::empty())
                    .map_err(|e| io(e.into()))
            }
            result => result.map_err(|errno| {
                failed(&entry.path, io::Error::other(format!("hard link target {}: {errno}", lossy(target))))
            }),
        }
    }

    fn node(
        &mut self,
        name: &[u8],
        entry: &Entry,
        owner: (Uid, Gid),
        kind: FileType,
        (major, minor): (u32, u32),
    ) -> Result<(), UnpackError> {
        if kind == FileType::CharacterDevice && (major, minor) == (0, 0) {
            return Err(rule(
                &entry.path,
                "character device 0:0 is overlayfs' own whiteout; use .wh.<name>".to_owned(),
            ));
        }
        let mode = Mode::from_raw_mode(entry.mode);
        self.replace(name, |dir| mknodat(dir, name, kind, mode, makedev(major, minor)))
            .and_then(|dir| special_attributes(dir, name, entry, owner, true))
            .map_err(|source| failed(&entry.path, source))
    }

    /// Makes a whiteout for `name` of the lower layers. What this layer itself has there stays (layer.md, "Whiteouts").
    fn whiteout(&mut self, name: &[u8]) -> io::Result<()> {
        let dir = self.tree.current();
        match mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)) {
            Err(Errno::EXIST) => {
                let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    set_opaque(openat(dir, name, DIRECTORY, Mode::empty())?.as_fd())?;
                    self.implied.remove(&self.tree.path_of(name));
                }
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Makes a member that is not a directory, in place of whatever has its name.
    fn replace(
        &mut self,
        name: &[u8],
        mut make: impl FnMut(BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> io::Result<BorrowedFd<'_>> {
        match make(self.tree.current()) {
            Err(Errno::EXIST) => {
                remove_any(self.tree.current(), name)?;
                self.links.reset();
                make(self.tree.current())?;
            }
            result => result?,
        }
        Ok(self.tree.current())
    }

    fn check_space(&mut self) -> Result<(), UnpackError> {
        self.written_checked = self.written;
        let stat = rustix::fs::fstatvfs(self.tree.root()).map_err(|e| UnpackError::Read(e.into()))?;
        let available = stat.f_bavail.saturating_mul(stat.f_frsize);
        let reserve = (stat.f_blocks.saturating_mul(stat.f_frsize) / 50).min(MAX_RESERVE);
        // File systems that make inodes as they need them report none at all.
        let inodes_short = stat.f_files > 0 && stat.f_favail < SPACE_CHECK_ENTRIES;
        if available < reserve || inodes_short {
            return Err(UnpackError::NoSpace { available, inodes: stat.f_favail });
        }
        Ok(())
    }

    fn finish(self) -> Result<Unpacked, UnpackError> {
        for (path, times) in &self.times {
            let no_links = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let name = if path.is_empty() { b"." } else { path.as_slice() };
            match openat2(self.tree.root(), name, DIRECTORY, Mode::empty(), no_links) {
                Ok(dir) => futimens(dir, times).map_err(|e| failed(path, e.into()))?,
                // Replaced by a later member.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => return Err(failed(path, errno.into())),
            }
        }
        let mut implied: Vec<_> = self.implied.into_iter().collect();
        if !self.times.contains_key(&Vec::new()) {
            implied.push(Vec::new());
        }
        implied.sort();
        Ok(Unpacked { bytes: self.written, inodes: self.entries, implied })
    }
}

/// Opens a directory itself, never what a link points at.
pub(super) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Splits a name into components; `.` and empty ones go, `..` takes the one before it and may not leave the root.
fn clean(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.len() > super::tree::MAX_PATH {
        return Err(format!("name of {} bytes; the limit is {}", path.len(), super::tree::MAX_PATH));
    }
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or("the name leaves the layer")?;
            }
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

fn owner(entry: &Entry) -> Result<(Uid, Gid), UnpackError> {
    // All ones means "leave as it is" to chown.
    let id = |field: &str, id: u64| {
        u32::try_from(id)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| rule(&entry.path, format!("{field} {id} is not a valid ID; the limit is {}", u32::MAX - 1)))
    };
    Ok((Uid::from_raw(id("uid", entry.uid)?), Gid::from_raw(id("gid", entry.gid)?)))
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: i64::from(entry.mtime.1) };
    Timestamps { last_access: time, last_modification: time }
}

/// Owner first: changing it clears setuid and file capabilities.
fn attributes(fd: BorrowedFd<'_>, entry: &Entry, (uid, gid): (Uid, Gid)) -> io::Result<()> {
    fchown(fd, Some(uid), Some(gid))?;
    fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    for (name, value) in allowed_xattrs(entry) {
        supported(fsetxattr(fd, name, value, XattrFlags::empty()), name)?;
    }
    Ok(())
}

/// As [`attributes`], for what must not be opened: symbolic links, devices and pipes.
fn special_attributes(
    dir: BorrowedFd<'_>,
    name: &[u8],
    entry: &Entry,
    (uid, gid): (Uid, Gid),
    has_mode: bool,
) -> io::Result<()> {
    chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if has_mode {
        // Not a symbolic link: it was made a moment ago in a directory that nobody else can reach.
        rustix::fs::chmodat(dir, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
    }
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    for (key, value) in allowed_xattrs(entry) {
        supported(lsetxattr(path.as_slice(), key, value, XattrFlags::empty()), key)?;
    }
    Ok(utimensat(dir, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// overlayfs' own attributes would let a layer redirect look-ups in other layers: they are never taken from an archive.
fn allowed_xattrs(entry: &Entry) -> impl Iterator<Item = (&[u8], &[u8])> {
    entry.xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())).filter(|(name, _)| {
        let overlay = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
        if overlay {
            tracing::debug!(entry = %lossy(&entry.path), xattr = %lossy(name), "left out an attribute of overlayfs");
        }
        !overlay
    })
}

/// A file system without extended attributes still runs most images; containerd warns and goes on, too.
fn supported(result: Result<(), Errno>, name: &[u8]) -> io::Result<()> {
    match result {
        Err(Errno::NOTSUP) => {
            tracing::warn!(xattr = %lossy(name), "the image file system does not support this extended attribute");
            Ok(())
        }
        other => Ok(other?),
    }
}

pub(super) fn set_opaque(dir: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fsetxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())?)
}

pub(super) fn is_whiteout(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<bool> {
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0)
}

fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    Ok(unlinkat(dir, name, AtFlags::empty())?)
}

fn remove_any(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {
            let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
            path.extend_from_slice(name);
            std::fs::remove_dir_all(std::ffi::OsStr::from_bytes(&path))
        }
        result => Ok(result?),
    }
}

pub(super) fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(256)]).into_owned()
}

fn rule(path: &[u8], detail: String) -> UnpackError {
    UnpackError::Entry { path: lossy(path), detail }
}

fn failed(path: &[u8], source: io::Error) -> UnpackError {
    UnpackError::Io { path: lossy(path), source }
}

/// Copies mode, owner and extended attributes of `from` to `to`, both directories.
pub(super) fn copy_directory_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let mut names = vec![0u8; 65536];
    let length = match rustix::fs::flistxattr(from, &mut names) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(errno) => return Err(errno.into()),
    };
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty() && !n.starts_with(b"trusted.overlay.")) {
        let mut value = vec![0u8; 65536];
        let length = rustix::fs::fgetxattr(from, name, &mut value)?;
        supported(fsetxattr(to, name, &value[..length], XattrFlags::empty()), name)?;
    }
    let time = |sec: i64, nsec: u64| Timespec { tv_sec: sec, tv_nsec: i64::try_from(nsec).unwrap_or(0) };
    let mtime = time(stat.st_mtime, stat.st_mtime_nsec);
    Ok(futimens(to, &Timestamps { last_access: mtime, last_modification: mtime })?)
}
