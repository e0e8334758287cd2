//! `fsGroup`: the group of a volume's files, and the rights that the group gets.
//!
//! Source: `pkg/volume/volume_linux.go`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;

const WRITABLE: u32 = 0o660;
const READABLE: u32 = 0o440;
const DIRECTORY: u32 = 0o2110;

/// Deeper trees are refused: they would exhaust the agent's file descriptors.
const MAX_DEPTH: usize = 256;

/// Gives everything below `root`, and at last `root` itself, to the group `gid`, and the group read rights (and write
/// rights unless `read_only`); directories hand the group on to new files. Links are not followed.
pub fn apply_fs_group(root: &Path, gid: u32, read_only: bool) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = rustix::fs::open(root, flags, Mode::empty())?;
    walk(&directory, Gid::from_raw(gid), read_only, 0)
}

/// Depth first, so that a root that looks right means that everything below is (see [`fs_group_mismatch`]).
fn walk(directory: &OwnedFd, gid: Gid, read_only: bool, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("volume has more than {MAX_DEPTH} levels of directories")));
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            match rustix::fs::openat(directory, name, flags, Mode::empty()) {
                Ok(child) => {
                    walk(&child, gid, read_only, depth + 1)?;
                    continue;
                }
                Err(Errno::NOENT) => continue,
                // Replaced meanwhile: it is handled like a file.
                Err(Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match rustix::fs::openat(directory, name, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(file) => change(&file, gid, read_only)?,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    change(directory, gid, read_only)
}

fn change(file: impl AsFd, gid: Gid, read_only: bool) -> io::Result<()> {
    let file = file.as_fd();
    let stat = rustix::fs::fstat(file)?;
    rustix::fs::chownat(file, "", None, Some(gid), AtFlags::EMPTY_PATH)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::Symlink {
        return Ok(());
    }
    let mut rights = if read_only { READABLE } else { WRITABLE };
    if kind == FileType::Directory {
        rights |= DIRECTORY;
    }
    // A descriptor opened with O_PATH cannot be passed to fchmod; its link in /proc can. The mode is set also when it
    // has the rights already: chown clears the set-user-ID and set-group-ID bits of files.
    let mode = Mode::from_raw_mode((stat.st_mode & 0o7777) | rights);
    Ok(rustix::fs::chmodat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), mode, AtFlags::empty())?)
}

/// Whether `fsGroupChangePolicy: OnRootMismatch` demands a change: the root's group or rights are not as
/// [`apply_fs_group`] leaves them.
pub fn fs_group_mismatch(root: &Path, gid: u32, read_only: bool) -> io::Result<bool> {
    let stat = rustix::fs::stat(root)?;
    let rights = DIRECTORY | if read_only { READABLE } else { WRITABLE };
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    Ok(stat.st_gid != gid || !is_directory || stat.st_mode & rights != rights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("volume");
        fs::create_dir_all(root.join("sub")).unwrap();
        for (path, mode) in [("sub", 0o700), ("", 0o755)] {
            fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::write(root.join("sub/file"), "").unwrap();
        fs::set_permissions(root.join("sub/file"), fs::Permissions::from_mode(0o4500)).unwrap();
        fs::write(dir.path().join("outside"), "").unwrap();
        fs::set_permissions(dir.path().join("outside"), fs::Permissions::from_mode(0o600)).unwrap();
        symlink(dir.path().join("outside"), root.join("link")).unwrap();
        symlink(dir.path(), root.join("dirlink")).unwrap();
        (dir, root)
    }

    fn owner(path: &Path) -> (u32, u32, u32) {
        let stat = fs::symlink_metadata(path).unwrap();
        (stat.mode() & 0o7777, stat.uid(), stat.gid())
    }

    #[test]
    fn the_group_gets_rights_and_links_are_not_followed() {
        let (dir, root) = tree();
        assert!(fs_group_mismatch(&root, 4321, false).unwrap());
        apply_fs_group(&root, 4321, false).unwrap();
        assert_eq!(owner(&root), (0o2775, 0, 4321));
        assert_eq!(owner(&root.join("sub")), (0o2770, 0, 4321));
        assert_eq!(owner(&root.join("sub/file")), (0o4760, 0, 4321));
        assert_eq!(owner(&root.join("link")).2, 4321);
        assert_eq!(owner(&dir.path().join("outside")), (0o600, 0, 0));
        assert!(!fs_group_mismatch(&root, 4321, false).unwrap());
        assert!(fs_group_mismatch(&root, 4322, false).unwrap());
        fs::set_permissions(&root, fs::Permissions::from_mode(0o775)).unwrap();
        assert!(fs_group_mismatch(&root, 4321, false).unwrap());
    }

    #[test]
    fn read_only_volumes_get_no_write_rights() {
        let (_dir, root) = tree();
        apply_fs_group(&root, 4321, true).unwrap();
        assert_eq!(owner(&root), (0o2755, 0, 4321));
        assert_eq!(owner(&root.join("sub")), (0o2750, 0, 4321));
        assert_eq!(owner(&root.join("sub/file")), (0o4540, 0, 4321));
        assert!(!fs_group_mismatch(&root, 4321, true).unwrap());
        assert!(fs_group_mismatch(&root, 4321, false).unwrap());
    }
}
