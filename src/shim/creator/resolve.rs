//! Paths chosen by a Pod or an image, resolved by the kernel so that no symlink leads out (`openat2(2)`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat, readlinkat};
use rustix::io::Errno;

use crate::sys::openat2::openat2;

/// Most symlinks followed for a destination that does not exist yet; the kernel's own limit.
const MAX_LINKS: u32 = 40;

/// What a path should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
}

/// Opens (O_PATH) `path` below `root`, where `/` and `..` stop at `root`; makes it, parents with mode 0755, if
/// it is not there.
pub(super) fn ensure_in_root(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} contains `..`", path.display())));
    }
    ensure(root, path, kind, MAX_LINKS)
}

/// Opens (O_PATH) `path` below `root`, as the container would see it.
pub(super) fn open_in_root(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    Ok(open(root, path)?)
}

fn open(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new("/") } else { path };
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how)
}

fn ensure(root: BorrowedFd<'_>, path: &Path, kind: Kind, links: u32) -> io::Result<OwnedFd> {
    match open(root, path) {
        Ok(found) => return Ok(found),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("cannot make {}", path.display())));
    };
    let directory = ensure(root, parent, Kind::Directory, links)?;
    let made = match kind {
        Kind::Directory => mkdirat(&directory, name, Mode::from_raw_mode(0o755)),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(&directory, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        Ok(()) => Ok(open(root, path)?),
        // A dangling symlink: make what it points to, as seen from inside.
        Err(Errno::EXIST) => {
            let target = match readlinkat(&directory, name, Vec::new()) {
                Ok(target) => PathBuf::from(std::ffi::OsString::from(target.to_string_lossy().into_owned())),
                Err(_) => return Ok(open(root, path)?),
            };
            let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
            ensure(root, &parent.join(target), kind, links)
        }
        Err(error) => Err(error.into()),
    }
}

/// Opens (O_PATH) a `subPath` of a volume; it cannot leave `volume`. Missing directories are made with the volume's
/// own mode (kubelet: `SafeMakeDir` in pkg/volume/util/subpath).
pub(super) fn open_sub_path(volume: BorrowedFd<'_>, sub_path: &Path) -> io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let open = |path: &Path| openat2(volume, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how);
    match open(sub_path) {
        Err(Errno::NOENT) => {}
        other => return Ok(other?),
    }
    let mode = Mode::from_raw_mode(fstat(volume)?.st_mode & 0o7777);
    let mut path = PathBuf::new();
    for component in sub_path.components() {
        let name = match component {
            Component::Normal(name) => name,
            Component::CurDir => continue,
            _ => return Err(Errno::XDEV.into()),
        };
        let parent = if path.as_os_str().is_empty() { volume.try_clone_to_owned()? } else { open(&path)? };
        path.push(name);
        match mkdirat(&parent, name, mode) {
            Ok(()) => {
                // mkdir is subject to the umask. O_NOFOLLOW: the Pod may swap it for a symlink meanwhile.
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(parent.as_fd(), name, flags, Mode::empty())?;
                fchmod(made, mode)?;
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(open(sub_path)?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn scene() -> io::Result<(tempfile::TempDir, File)> {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("root"))?;
        let root = File::open(dir.path().join("root"))?;
        Ok((dir, root))
    }

    #[test]
    fn destinations_are_made_inside() -> io::Result<()> {
        let (dir, root) = scene()?;
        let inside = dir.path().join("root");
        symlink("/elsewhere/deep", inside.join("absolute"))?;
        symlink("../../../outside", inside.join("relative"))?;
        ensure_in_root(root.as_fd(), Path::new("/absolute/a"), Kind::Directory)?;
        ensure_in_root(root.as_fd(), Path::new("/relative/f"), Kind::File)?;
        assert!(inside.join("elsewhere/deep/a").is_dir());
        assert!(inside.join("outside/f").is_file());
        assert!(!dir.path().join("outside").exists());
        Ok(())
    }

    #[test]
    fn link_loops_and_dots_are_refused() -> io::Result<()> {
        let (dir, root) = scene()?;
        symlink("b", dir.path().join("root/a"))?;
        symlink("a", dir.path().join("root/b"))?;
        assert!(ensure_in_root(root.as_fd(), Path::new("/a/x"), Kind::Directory).is_err());
        assert!(ensure_in_root(root.as_fd(), Path::new("/../x"), Kind::Directory).is_err());
        Ok(())
    }

    #[test]
    fn sub_paths_stay_beneath_and_take_the_volumes_mode() -> io::Result<()> {
        let (dir, root) = scene()?;
        let volume = dir.path().join("root");
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2775))?;
        open_sub_path(root.as_fd(), Path::new("a/b"))?;
        assert_eq!(fs::metadata(volume.join("a/b"))?.permissions().mode() & 0o7777, 0o2775);
        fs::write(dir.path().join("secret"), "")?;
        symlink("../secret", volume.join("up"))?;
        symlink(dir.path(), volume.join("absolute"))?;
        for escape in ["up", "absolute/secret", "../secret", "absolute/new"] {
            assert!(open_sub_path(root.as_fd(), Path::new(escape)).is_err(), "{escape}");
        }
        assert!(!dir.path().join("new").exists());
        Ok(())
    }
}
