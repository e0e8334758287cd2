//! `Setup.mounts`: trees of the node, made on the node and attached in a container that is created, not started.
//!
//! Done here and not by libcontainer, which ignores a mount's own propagation and knows no `subPath`.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags, fstat, fstatfs, open, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::resolve::{Kind, ensure_in_root, open_sub_path};
use crate::shim::bundle::{Access, BindMount, Propagation};
use crate::sys::mountattr::{MountAttributes, mount_setattr};

/// `PROC_SUPER_MAGIC` of linux/magic.h.
const PROC_MAGIC: rustix::fs::FsWord = 0x9fa0;
/// What may be mounted over in /proc: runc's list (lxcfs and friends).
const PROC_FILES: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
];

/// A detached tree and where it goes.
#[derive(Debug)]
pub(super) struct Tree {
    mount: OwnedFd,
    kind: Kind,
    destination: PathBuf,
    text: String,
}

/// Clones every source in the node's mount namespace, with the wanted access and propagation.
pub(super) fn clone_all(mounts: &[BindMount]) -> Result<Vec<Tree>, String> {
    mounts.iter().map(|mount| clone(mount).map_err(|e| format!("mount {}: {e}", describe(mount)))).collect()
}

fn describe(mount: &BindMount) -> String {
    let sub_path =
        mount.sub_path.as_ref().map(|p| format!(" (subPath {:?})", p.display().to_string())).unwrap_or_default();
    format!("{}{sub_path} at {}", mount.source.display(), mount.destination.display())
}

fn clone(mount: &BindMount) -> io::Result<Tree> {
    if !mount.destination.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the destination must be an absolute path"));
    }
    let mut source = open(&mount.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if let Some(sub_path) = mount.sub_path.as_ref().filter(|p| !p.as_os_str().is_empty()) {
        source = open_sub_path(source.as_fd(), sub_path)?;
    }
    require_propagation(source.as_fd(), mount.propagation)?;
    let is_directory = FileType::from_raw_mode(fstat(&source)?.st_mode) == FileType::Directory;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(&source, c"", flags)?;
    let propagation = match mount.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    let change = MountAttributes { propagation, recursive: true, ..Default::default() };
    mount_setattr(&tree, &change)?;
    if mount.access != Access::ReadWrite {
        let recursive = mount.access == Access::RecursiveReadOnly;
        mount_setattr(&tree, &MountAttributes { set: libc::MOUNT_ATTR_RDONLY, propagation: 0, recursive })?;
    }
    let kind = if is_directory { Kind::Directory } else { Kind::File };
    Ok(Tree { mount: tree, kind, destination: mount.destination.clone(), text: describe(mount) })
}

/// `HostToContainer` and `Bidirectional` need a source that takes part in propagation (containerd says the same).
fn require_propagation(source: BorrowedFd<'_>, wanted: Propagation) -> io::Result<()> {
    if wanted == Propagation::Private {
        return Ok(());
    }
    let id = statx(source, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let fields = table
        .lines()
        .find(|line| line.split(' ').next().and_then(|f| f.parse().ok()) == Some(id))
        .and_then(|line| line.split(" - ").next())
        .unwrap_or_default();
    let has = |name: &str| fields.split(' ').skip(6).any(|field| field.starts_with(name));
    let mounted_on = fields.split(' ').nth(4).unwrap_or("?");
    match wanted {
        Propagation::Shared if !has("shared:") => {
            Err(io::Error::other(format!("it is mounted on {mounted_on:?} but it is not a shared mount")))
        }
        Propagation::Slave if !has("shared:") && !has("master:") => {
            Err(io::Error::other(format!("it is mounted on {mounted_on:?} but it is not a shared or slave mount")))
        }
        _ => Ok(()),
    }
}

/// Makes mount points in the root file system while it can still be written, for what is not covered by another
/// mount (`config` are the destinations that libcontainer mounts).
pub(super) fn make_mount_points(rootfs: &Path, trees: &[Tree], config: &[PathBuf]) -> Result<(), String> {
    let root = File::open(rootfs).map_err(|e| format!("open {}: {e}", rootfs.display()))?;
    for (index, tree) in trees.iter().enumerate() {
        let is_covered = |by: &Path| by != Path::new("/") && tree.destination != by && tree.destination.starts_with(by);
        if config.iter().any(|by| is_covered(by)) || trees[..index].iter().any(|by| is_covered(&by.destination)) {
            continue;
        }
        ensure_in_root(root.as_fd(), &tree.destination, tree.kind)
            .map_err(|e| format!("make the mount point for {}: {e}", tree.text))?;
    }
    Ok(())
}

/// Attaches the trees below `root`. The calling process must be in the container's mount namespace.
pub(super) fn attach_all(root: BorrowedFd<'_>, trees: Vec<Tree>) -> Result<(), String> {
    trees.into_iter().try_for_each(|tree| attach(root, &tree).map_err(|e| format!("mount {}: {e}", tree.text)))
}

fn attach(root: BorrowedFd<'_>, tree: &Tree) -> io::Result<()> {
    let destination = ensure_in_root(root, &tree.destination, tree.kind)?;
    if fstatfs(&destination)?.f_type == PROC_MAGIC {
        let path = tree.destination.to_string_lossy();
        if !PROC_FILES.contains(&path.as_ref()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{path:?} cannot be mounted because it is inside /proc"),
            ));
        }
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(&tree.mount, c"", &destination, c"", flags)?)
}
