//! tmpfs and hugetlbfs for volumes, what is mounted below a directory, and removal that never leaves its mount.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

/// Whether something is mounted at exactly this path. A path that does not exist is no mount point.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    match rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()) {
        Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Mounts a tmpfs on the directory `path` unless something is mounted there already. `size` is in bytes; without it
/// the kernel allows half of the memory. Its pages stay out of swap where the kernel can do that (6.4).
pub fn mount_tmpfs(path: &Path, size: Option<i64>) -> io::Result<()> {
    if is_mount_point(path)? {
        return Ok(());
    }
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(size) = size.filter(|size| *size > 0) {
        fsconfig_set_string(&context, "size", size.to_string())?;
    }
    // EINVAL: an older kernel. EPERM: a user namespace may not withhold pages from swap.
    match fsconfig_set_flag(&context, "noswap") {
        Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    attach(&context, path)
}

/// Mounts a hugetlbfs of pages of `page_size` bytes on the directory `path` unless something is mounted there already.
pub fn mount_hugetlbfs(path: &Path, page_size: i64) -> io::Result<()> {
    if is_mount_point(path)? {
        return Ok(());
    }
    let context = fsopen("hugetlbfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "pagesize", page_size.to_string())?;
    attach(&context, path)
}

fn attach(context: &OwnedFd, path: &Path) -> io::Result<()> {
    fsconfig_create(context)?;
    let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    Ok(move_mount(&mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// The mount points below `directory` (itself included), the last mounted first.
pub fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/thread-self/mountinfo")?;
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let mut found: Vec<PathBuf> = points
        .map(|point| PathBuf::from(std::ffi::OsString::from_vec(unescape(point))))
        .filter(|point| point.starts_with(directory))
        .collect();
    found.reverse();
    Ok(found)
}

/// Undoes the octal escapes that the kernel uses for blanks and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = (first == b'\\' && tail.len() >= 3 && tail[..3].iter().all(|b| (b'0'..=b'7').contains(b)))
            .then(|| tail[..3].iter().fold(0_u32, |code, digit| code * 8 + u32::from(digit - b'0')));
        match code.and_then(|code| u8::try_from(code).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// Unmounts everything below `directory`. A mount that is in use goes away for everyone who looks for it now, and for
/// those who use it when they are done.
pub fn unmount_below(directory: &Path) -> io::Result<()> {
    // The table names paths without links.
    let directory = match fs::canonicalize(directory) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // Mounts may be stacked, and new ones may propagate in: look again until there are none.
    for _ in 0..8 {
        let points = mounts_below(&directory)?;
        if points.is_empty() {
            return Ok(());
        }
        for point in points {
            match unmount(&point, UnmountFlags::NOFOLLOW) {
                Err(Errno::BUSY) => unmount(&point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?,
                // Gone already, with the mount it was on.
                Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "mounts keep appearing"))
}

const BELOW: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Depth beyond which a directory is moved up before it is emptied, so that a container cannot exhaust the agent's
/// file descriptors with a deep tree.
const MAX_DEPTH: usize = 64;

/// Removes the directory `path` with everything in it, but nothing that is mounted in it: a mount point, also one of
/// the same file system, is an error (`EXDEV` or `EBUSY`). A missing directory is fine.
///
/// The caller trusts `path` itself; what is below may be hostile and may change meanwhile.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a directory that can be removed"));
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match rustix::fs::open(parent, flags, Mode::empty()) {
        Ok(parent) => parent,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let root = match open_below(&parent, name.as_bytes()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    empty(&root)?;
    drop(root);
    match rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn open_below(directory: impl AsFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    crate::sys::openat2::openat2(directory, name, flags, Mode::empty(), BELOW)
}

/// A directory that is being emptied, and its name in the one before it.
struct Level {
    directory: OwnedFd,
    name: Vec<u8>,
}

fn empty(root: &OwnedFd) -> io::Result<()> {
    let mut levels = vec![Level { directory: rustix::io::dup(root)?, name: Vec::new() }];
    let mut moved = 0_u64;
    while let Some(level) = levels.last() {
        match first_left(&level.directory, root, levels.len(), &mut moved)? {
            Some(name) => match open_below(&level.directory, &name) {
                Ok(directory) => levels.push(Level { directory, name }),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            },
            None => {
                let done = levels.pop();
                if let (Some(done), Some(parent)) = (done, levels.last()) {
                    match rustix::fs::unlinkat(&parent.directory, &done.name, AtFlags::REMOVEDIR) {
                        // Not empty: something was added meanwhile, the next round finds it.
                        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
        }
    }
    Ok(())
}

/// Removes what is no directory and gives the first directory that has to be emptied.
fn first_left(directory: &OwnedFd, root: &OwnedFd, depth: usize, moved: &mut u64) -> io::Result<Option<Vec<u8>>> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if depth < MAX_DEPTH {
            return Ok(Some(name.to_vec()));
        }
        loop {
            let up = format!("..removing.{moved}");
            *moved += 1;
            match rustix::fs::renameat_with(directory, name, root, &up, RenameFlags::NOREPLACE) {
                Ok(()) | Err(Errno::NOENT) => break,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
pub(super) use tests::Scratch;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::mount_bind;
    use std::os::unix::fs::PermissionsExt;

    /// Unmounts what a test has mounted, also when it fails.
    pub(in crate::volume) struct Scratch(pub tempfile::TempDir);

    impl Scratch {
        pub fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        pub fn dir(&self, name: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            unmount_below(self.0.path()).unwrap();
        }
    }

    #[test]
    fn tmpfs_has_its_size_and_is_mounted_once() {
        let scratch = Scratch::new();
        let dir = scratch.dir("with space\\and backslash");
        assert!(!is_mount_point(&dir).unwrap());
        mount_tmpfs(&dir, Some(1 << 20)).unwrap();
        mount_tmpfs(&dir, Some(1 << 20)).unwrap();
        assert!(is_mount_point(&dir).unwrap());
        assert_eq!(mounts_below(scratch.0.path()).unwrap(), std::slice::from_ref(&dir));
        let stat = rustix::fs::statvfs(&dir).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, 1 << 20);
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o777);
        unmount_below(scratch.0.path()).unwrap();
        assert!(!is_mount_point(&dir).unwrap());
        assert!(!is_mount_point(&scratch.0.path().join("none")).unwrap());
    }

    #[test]
    fn hugetlbfs_is_mounted_with_the_page_size() {
        let scratch = Scratch::new();
        let dir = scratch.dir("huge");
        mount_hugetlbfs(&dir, 2 << 20).unwrap();
        assert_eq!(rustix::fs::statfs(&dir).unwrap().f_bsize, 2 << 20);
    }

    #[test]
    fn unmounts_stacked_nested_and_busy_mounts() {
        let scratch = Scratch::new();
        let outer = scratch.dir("outer");
        mount_tmpfs(&outer, None).unwrap();
        let inner = scratch.dir("outer/inner");
        mount_tmpfs(&inner, None).unwrap();
        mount_bind(&inner, &outer).unwrap();
        let busy = scratch.dir("busy");
        mount_tmpfs(&busy, None).unwrap();
        let _open = fs::File::create(busy.join("held")).unwrap();
        unmount_below(scratch.0.path()).unwrap();
        assert_eq!(mounts_below(scratch.0.path()).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn removal_stops_at_a_mount_also_of_the_same_file_system() {
        let scratch = Scratch::new();
        let precious = scratch.dir("precious");
        fs::write(precious.join("data"), "keep").unwrap();
        let point = scratch.dir("pod/volumes/x/mnt");
        mount_bind(&precious, &point).unwrap();
        let error = remove_tree(&scratch.0.path().join("pod")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::XDEV.raw_os_error()), "{error}");
        assert_eq!(fs::read_to_string(precious.join("data")).unwrap(), "keep");
        unmount_below(&scratch.0.path().join("pod")).unwrap();
        remove_tree(&scratch.0.path().join("pod")).unwrap();
        assert_eq!(fs::read_to_string(precious.join("data")).unwrap(), "keep");
        let over = scratch.dir("over");
        mount_bind(&precious, &over).unwrap();
        assert!(remove_tree(&over).is_err());
        assert_eq!(fs::read_to_string(precious.join("data")).unwrap(), "keep");
    }

    #[test]
    fn removal_does_not_follow_links() {
        let scratch = Scratch::new();
        let precious = scratch.dir("precious");
        fs::write(precious.join("data"), "keep").unwrap();
        let pod = scratch.dir("pod");
        std::os::unix::fs::symlink(&precious, pod.join("link")).unwrap();
        std::os::unix::fs::symlink(precious.join("data"), pod.join("file")).unwrap();
        remove_tree(&pod).unwrap();
        remove_tree(&pod).unwrap();
        assert!(!pod.exists() && precious.join("data").exists());
        std::os::unix::fs::symlink(&precious, &pod).unwrap();
        assert!(remove_tree(&pod).is_err());
        assert!(precious.join("data").exists());
    }

    #[test]
    fn removes_a_tree_that_is_deeper_than_any_path() {
        let scratch = Scratch::new();
        let top = scratch.dir("deep");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut directory = rustix::fs::open(&top, flags, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&directory, "d", Mode::from(0o700)).unwrap();
            rustix::fs::mkdirat(&directory, "..removing.0", Mode::from(0o700)).unwrap();
            directory = rustix::fs::openat(&directory, "d", flags, Mode::empty()).unwrap();
        }
        drop(directory);
        remove_tree(&top).unwrap();
        assert!(!top.exists());
    }

    proptest::proptest! {
        #[test]
        fn unescaping_never_panics_and_undoes_the_kernels_escapes(path in "[a-z \\\\\t]{0,20}", junk in proptest::collection::vec(0_u8.., 0..20)) {
            let escaped: String = path.chars().map(|c| match c {
                ' ' | '\t' | '\\' => format!("\\{:03o}", u32::from(c)),
                c => c.to_string(),
            }).collect();
            proptest::prop_assert_eq!(unescape(escaped.as_bytes()), path.as_bytes());
            let _ = unescape(&junk);
        }
    }
}
