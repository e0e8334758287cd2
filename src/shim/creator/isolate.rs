//! A mount namespace of what a container is made from, and nothing else.
//!
//! With a hundred Pods the node has hundreds of mounts, their volumes among them. Every container starts from a copy of
//! them all, and on cgroup v1 libcontainer reads the table of them a dozen times for each.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::sys::mountattr::{MountAttributes, mount_setattr};

/// What libcontainer needs of the node beside the Pod's directory: processes, cgroups, devices.
const NEEDED: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A copy of a mount that is nowhere yet.
struct Copy {
    mount: OwnedFd,
    path: PathBuf,
}

impl Copy {
    fn of(path: &Path, more: OpenTreeFlags) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | more;
        let mount = open_tree(CWD, path, flags)?;
        // or what happens to it would happen on the node
        let private = MountAttributes { propagation: libc::MS_PRIVATE, recursive: true, ..Default::default() };
        mount_setattr(mount.as_fd(), &private)?;
        Ok(Self { mount, path: path.to_owned() })
    }

    fn alone(path: &Path) -> io::Result<Self> {
        Self::of(path, OpenTreeFlags::empty())
    }

    fn with_all_below(path: &Path) -> io::Result<Self> {
        Self::of(path, OpenTreeFlags::AT_RECURSIVE)
    }

    fn attach(&self, at: &Path) -> io::Result<()> {
        Ok(move_mount(&self.mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    }
}

/// Moves the calling thread into a mount namespace that has the root's file system, [`NEEDED`], and `pod_dir` with the
/// mounts in it; of other mounts only those that lead there.
///
/// Where that cannot be (an initial ramdisk as the root, symbolic links in the path), only the mounts of other Pods'
/// directories go. Does nothing if the directory of all Pods, in which `pod_dir` is, is no mount of its own. What is mounted in the node's
/// namespace from now on is not seen.
pub(super) fn leave_other_mounts(pod_dir: &Path) -> io::Result<()> {
    let Some(pods) = pod_dir.parent() else { return Ok(()) };
    if !is_mount(pods)? {
        return Ok(());
    }
    let root = Copy::alone(Path::new("/"))?;
    let mut copies = Vec::new();
    for path in NEEDED.map(Path::new) {
        copies.push(Copy::with_all_below(path)?);
    }
    let mut way: Vec<&Path> = pods.ancestors().filter(|path| path.parent().is_some()).collect();
    way.reverse();
    for path in way {
        if is_mount(path)? {
            copies.push(Copy::alone(path)?);
        }
    }
    let own = Copy::with_all_below(pod_dir)?;

    unshare(CloneFlags::CLONE_NEWNS)?;
    // or unmounting would propagate to the node
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    // Where symbolic links lead through is not copied: with such a path the node's mounts are needed.
    if pods.canonicalize()? != pods {
        return unmount_pods(pods, &own);
    }
    // anywhere: it is about to be the root
    root.attach(pods)?;
    chdir(pods)?;
    if let Err(error) = pivot_root(".", ".") {
        tracing::debug!(%error, "the mounts of the node are kept");
        return keep_root(pods, &own);
    }
    // The old root is on top of the new one.
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    for copy in copies.iter().chain([&own]) {
        copy.attach(&copy.path)?;
    }
    Ok(())
}

/// An initial ramdisk cannot be replaced as the root: the new one goes from where it was to become that.
fn keep_root(pods: &Path, own: &Copy) -> io::Result<()> {
    chdir("/")?;
    umount2(pods, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    unmount_pods(pods, own)
}

/// All mounts stay but those in the directories of other Pods.
fn unmount_pods(pods: &Path, own: &Copy) -> io::Result<()> {
    umount2(pods, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    // the directory is there without the mount as well: it was bound to itself
    own.attach(&own.path)
}

fn is_mount(path: &Path) -> io::Result<bool> {
    let attributes = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?.stx_attributes;
    Ok(attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn points() -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect()
    }

    /// Unmounts what a test mounted, also when it fails.
    struct Mounts(Vec<PathBuf>);

    impl Mounts {
        fn add(&mut self, source: &str, kind: Option<&str>, target: &Path, flags: MsFlags) {
            mount(Some(source), target, kind, flags, None::<&str>).unwrap();
            self.0.push(target.to_owned());
        }
    }

    impl Drop for Mounts {
        fn drop(&mut self) {
            for point in self.0.iter().rev() {
                umount2(point, MntFlags::MNT_DETACH).unwrap();
            }
        }
    }

    /// The mount points that a thread has which called [`leave_other_mounts`], and then mounted something at `late`.
    fn seen_after(pod_dir: &Path, late: Option<PathBuf>) -> Vec<PathBuf> {
        let pod_dir = pod_dir.to_owned();
        let leave = move || -> io::Result<Vec<PathBuf>> {
            leave_other_mounts(&pod_dir)?;
            if let Some(late) = late {
                mount(Some("tmpfs"), &late, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
            }
            Ok(points())
        };
        std::thread::spawn(leave).join().unwrap().unwrap()
    }

    #[test]
    fn only_the_pods_own_mounts_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let pods = root.join("pods");
        let (own, other) = (pods.join("own"), pods.join("other"));
        fs::create_dir_all(own.join("shm/inner")).unwrap();
        fs::create_dir_all(other.join("shm")).unwrap();

        let mut mounts = Mounts(Vec::new());
        mounts.add("tmpfs", Some("tmpfs"), &root.join("pods/own/shm/inner"), MsFlags::empty());
        assert!(seen_after(&own, None).contains(&own.join("shm/inner")), "without a mount of its own nothing is done");
        drop(mounts);

        let mut mounts = Mounts(Vec::new());
        mounts.add(pods.to_str().unwrap(), None, &pods, MsFlags::MS_BIND);
        // an unmount in a copy would come back here, if nothing were done about it
        mount(None::<&str>, &pods, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        mounts.add("tmpfs", Some("tmpfs"), &own.join("shm"), MsFlags::empty());
        fs::create_dir(own.join("shm/deep")).unwrap();
        fs::create_dir(own.join("shm/late")).unwrap();
        mounts.add("tmpfs", Some("tmpfs"), &own.join("shm/deep"), MsFlags::empty());
        mounts.add("tmpfs", Some("tmpfs"), &other.join("shm"), MsFlags::empty());
        fs::create_dir_all(root.join("volumes")).unwrap();
        mounts.add("tmpfs", Some("tmpfs"), &root.join("volumes"), MsFlags::empty());
        let before = points();
        let seen = seen_after(&own, Some(own.join("shm/late")));
        for point in ["shm", "shm/deep", "shm/late"] {
            assert!(seen.contains(&own.join(point)), "{point}: {seen:?}");
        }
        let is_needed = |point: &PathBuf| {
            point == Path::new("/") || NEEDED.iter().any(|needed| point.starts_with(needed)) || pods.starts_with(point)
        };
        let others: Vec<_> = seen.iter().filter(|point| !point.starts_with(&own) && !is_needed(point)).collect();
        assert!(others.is_empty(), "{others:?}");
        // other tests mount things as well
        let ours = |points: &[PathBuf]| points.iter().filter(|point| point.starts_with(&root)).count();
        assert_eq!(ours(&points()), ours(&before), "the node keeps its mounts, and gets no others");

        // Through another mount, which the way to where it leads is not.
        let link = root.join("volumes/link");
        std::os::unix::fs::symlink(&root, &link).unwrap();
        let seen = seen_after(&link.join("pods/own"), None);
        assert!(seen.contains(&own.join("shm")), "by a symbolic link: {seen:?}");
        assert!(!seen.iter().any(|point| point.starts_with(&other)), "by a symbolic link: {seen:?}");
    }

    #[test]
    fn a_root_that_cannot_be_replaced_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let pods = root.join("pods");
        for path in ["own/shm", "other/shm"] {
            fs::create_dir_all(pods.join(path)).unwrap();
        }
        let leave = {
            let pods = pods.clone();
            move || -> io::Result<Vec<PathBuf>> {
                unshare(CloneFlags::CLONE_NEWNS)?;
                mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
                mount(Some(&pods), &pods, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
                for pod in ["own", "other"] {
                    mount(Some("tmpfs"), &pods.join(pod).join("shm"), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
                }
                let own = Copy::with_all_below(&pods.join("own"))?;
                Copy::alone(Path::new("/"))?.attach(&pods)?;
                keep_root(&pods, &own)?;
                Ok(points())
            }
        };
        let seen = std::thread::spawn(leave).join().unwrap().unwrap();
        let ours: Vec<_> = seen.iter().filter(|point| point.starts_with(&root)).collect();
        assert_eq!(ours, [&pods.join("own"), &pods.join("own/shm")], "{seen:?}");
    }
}
