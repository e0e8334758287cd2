//! Images as mounted file systems, by the mount API that takes one parameter at a time: any number of layers, no paths in
//! one long string.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, statfs, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use super::error::ImageError;
use super::store::Image;
use super::unpack::copy_directory_attributes;

/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAYFS: i64 = 0x794c_7630;

/// What is to be done where [`probe_overlay`] does not find it.
pub const OVERLAY_REMEDY: &str = "modprobe overlay, and write overlay to /etc/modules-load.d/gantry.conf; \
    without the module take a kernel with CONFIG_OVERLAY_FS";

/// Asks the kernel for overlayfs as mounting an image will. That loads its module, if there is one that is not loaded.
///
/// # Errors
/// Why not: `ENODEV` if the kernel has none, `EPERM` without `CAP_SYS_ADMIN`.
pub fn probe_overlay() -> io::Result<()> {
    Ok(fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map(drop)?)
}

/// Mounts the image, with a writable layer on top, at the existing directory `target`.
///
/// `upper` and `work` are made in `writable`, which must be on a file system that overlayfs accepts for them (not another
/// overlay) and must be the container's own. What the container writes stays there over an unmount. Does nothing if the
/// overlay is mounted already, so it may be repeated after a crash. Needs `CAP_SYS_ADMIN`; blocking.
pub fn mount_rootfs(image: &Image, writable: &Path, target: &Path) -> Result<(), ImageError> {
    let (upper, work) = (writable.join("upper"), writable.join("work"));
    let mut lower: Vec<PathBuf> = image.layers.iter().rev().cloned().collect();
    if lower.is_empty() {
        lower.push(image.root.join("empty/a"));
    }
    std::fs::create_dir_all(&work).map_err(ImageError::io("create", &work))?;
    if !upper.exists() {
        make_upper(&lower[0], &upper)?;
    }
    overlay(image, &Overlay { lower, upper: Some((upper, work)), attributes: MountAttrFlags::empty() }, target)
}

/// Mounts the image read-only and without execution at the existing directory `target`: an `image` volume (KEP-4639).
///
/// Repeatable and blocking like [`mount_rootfs`].
pub fn mount_read_only(image: &Image, target: &Path) -> Result<(), ImageError> {
    let mut lower: Vec<PathBuf> = image.layers.iter().rev().cloned().collect();
    // Without an upper directory overlayfs wants two lower ones.
    for empty in ["empty/a", "empty/b"] {
        if lower.len() < 2 {
            lower.push(image.root.join(empty));
        }
    }
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    overlay(image, &Overlay { lower, upper: None, attributes }, target)
}

/// Unmounts what [`mount_rootfs`] or [`mount_read_only`] mounted at `target`. Nothing mounted there is fine.
///
/// A mount that is still busy is detached: it vanishes from `target` now and goes when its last user does.
pub fn unmount_rootfs(target: &Path) -> Result<(), ImageError> {
    match unmount(target, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            tracing::warn!(target = %target.display(), "root file system is busy; it is detached");
            unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).map_err(ImageError::errno("unmount", target))
        }
        Err(Errno::INVAL | Errno::NOENT) | Ok(()) => Ok(()),
        Err(errno) => Err(ImageError::errno("unmount", target)(errno)),
    }
}

/// The root directory that the container sees is `upper`: it starts with the attributes of the image's.
fn make_upper(top: &Path, upper: &Path) -> Result<(), ImageError> {
    let fresh = upper.with_extension("new");
    std::fs::create_dir_all(&fresh).map_err(ImageError::io("create", &fresh))?;
    let copy = || copy_directory_attributes(File::open(top)?.as_fd(), File::open(&fresh)?.as_fd());
    copy().map_err(ImageError::io("copy attributes to", &fresh))?;
    std::fs::rename(&fresh, upper).map_err(ImageError::io("rename", upper))
}

struct Overlay {
    /// Top first.
    lower: Vec<PathBuf>,
    upper: Option<(PathBuf, PathBuf)>,
    attributes: MountAttrFlags,
}

fn overlay(image: &Image, overlay: &Overlay, target: &Path) -> Result<(), ImageError> {
    let failed = |detail: String| ImageError::Mount { name: image.name.clone(), target: target.to_owned(), detail };
    match mounted(target) {
        Ok(Some(OVERLAYFS)) => return Ok(()),
        Ok(Some(other)) => {
            return Err(failed(format!("a file system of type {other:#x} is mounted there; unmount it")));
        }
        Ok(None) => {}
        Err(source) => return Err(failed(format!("the mount point cannot be used: {source}"))),
    }
    match new_api(overlay, target) {
        Err(Failure::NoLowerAppend) => classic(overlay, target).map_err(failed),
        Err(Failure::Other(detail)) => Err(failed(detail)),
        Ok(()) => Ok(()),
    }
}

/// Type of the file system that is mounted exactly at `target`.
fn mounted(target: &Path) -> io::Result<Option<i64>> {
    let stat = statx(CWD, target, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE)?;
    if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(None);
    }
    Ok(Some(statfs(target)?.f_type))
}

enum Failure {
    /// The kernel is too old for `lowerdir+`.
    NoLowerAppend,
    Other(String),
}

fn new_api(overlay: &Overlay, target: &Path) -> Result<(), Failure> {
    let other = |step: &str, errno: Errno| Failure::Other(format!("{step}: {errno}"));
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| other("fsopen", errno))?;
    let set = |key: &str, value: &Path| fsconfig_set_string(context.as_fd(), key, value);
    let explain = |step: &str, errno: Errno| {
        let messages = kernel_messages(&context);
        Failure::Other(if messages.is_empty() {
            format!("{step}: {errno}")
        } else {
            format!("{step}: {errno}: {messages}")
        })
    };
    fsconfig_set_string(context.as_fd(), "source", "overlay").map_err(|errno| explain("source", errno))?;
    for (at, lower) in overlay.lower.iter().enumerate() {
        match set("lowerdir+", lower) {
            Err(Errno::INVAL) if at == 0 && kernel_messages(&context).contains("nknown parameter") => {
                return Err(Failure::NoLowerAppend);
            }
            result => result.map_err(|errno| explain(&format!("lowerdir+={}", lower.display()), errno))?,
        }
    }
    if let Some((upper, work)) = &overlay.upper {
        set("upperdir", upper).map_err(|errno| explain(&format!("upperdir={}", upper.display()), errno))?;
        set("workdir", work).map_err(|errno| explain(&format!("workdir={}", work.display()), errno))?;
    }
    fsconfig_create(context.as_fd()).map_err(|errno| explain("create", errno))?;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, overlay.attributes)
        .map_err(|errno| explain("fsmount", errno))?;
    move_mount(mount.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| other("move_mount", errno))
}

/// What the kernel wrote about a failed file system context: one message per read.
fn kernel_messages(context: &OwnedFd) -> String {
    let Ok(mut file) = context.try_clone().map(File::from) else { return String::new() };
    let mut messages = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = file.read(&mut buffer) {
        messages.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned());
        if messages.len() == 8 {
            break;
        }
    }
    messages.join("; ")
}

/// mount(2), for kernels without `lowerdir+`: all layers in one page of options, so they are named by file descriptors.
fn classic(overlay: &Overlay, target: &Path) -> Result<(), String> {
    let mut open = Vec::with_capacity(overlay.lower.len());
    for lower in &overlay.lower {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open.push(rustix::fs::open(lower, flags, Mode::empty()).map_err(|e| format!("{}: {e}", lower.display()))?);
    }
    let lower: Vec<Vec<u8>> = open.iter().map(|fd| descriptor_path(fd.as_fd())).collect();
    let mut options = b"lowerdir=".to_vec();
    options.extend(lower.join(&b':'));
    if let Some((upper, work)) = &overlay.upper {
        for (key, path) in [(",upperdir=", upper), (",workdir=", work)] {
            options.extend_from_slice(key.as_bytes());
            options.extend(escaped(path));
        }
    }
    if options.len() >= 4096 {
        return Err(format!(
            "{} layers do not fit the mount options of this kernel; newer ones (6.8 and later) take one layer at a time",
            lower.len()
        ));
    }
    let mut flags = MountFlags::empty();
    for (attribute, flag) in [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
        (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
    ] {
        flags.set(flag, overlay.attributes.contains(attribute));
    }
    let options = std::ffi::CString::new(options).map_err(|_| "a path holds a NUL byte".to_owned())?;
    rustix::mount::mount("overlay", target, "overlay", flags, Some(options.as_c_str()))
        .map_err(|errno| format!("mount: {errno}"))
}

fn descriptor_path(fd: BorrowedFd<'_>) -> Vec<u8> {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes()
}

/// overlayfs takes commas, colons and backslashes in a path after a backslash.
fn escaped(path: &Path) -> Vec<u8> {
    let mut escaped = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b',' | b':' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    escaped
}

/// Mounts by the way of older kernels, whatever this one can do.
#[cfg(test)]
pub(super) fn classic_for_tests(lower: Vec<PathBuf>, writable: &Path, target: &Path) {
    let upper = Some((writable.join("upper"), writable.join("work")));
    classic(&Overlay { lower, upper, attributes: MountAttrFlags::empty() }, target).unwrap();
}
