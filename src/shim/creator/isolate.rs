//! A mount namespace without the mounts of other Pods.
//!
//! With a hundred Pods the node has hundreds of mounts. Every container starts from a copy of them all, and on cgroup v1
//! libcontainer reads the table of them a dozen times for each. None of them is of use to it but its own Pod's.

use std::io;
use std::path::Path;

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::sys::mountattr::{MountAttributes, mount_setattr};

/// Moves the calling thread into a mount namespace in which no mount of another Pod is.
///
/// Does nothing if the directory of all Pods, in which `pod_dir` is, is no mount of its own. What is mounted in the node's
/// namespace from now on is not seen.
pub(super) fn leave_other_pods(pod_dir: &Path) -> io::Result<()> {
    let Some(pods) = pod_dir.parent() else { return Ok(()) };
    let attributes = statx(CWD, pods, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?.stx_attributes;
    if !attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(());
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let own = open_tree(CWD, pod_dir, flags)?;
    mount_setattr(&own, &MountAttributes { propagation: libc::MS_PRIVATE, recursive: true, ..Default::default() })?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    // or unmounting would propagate to the node
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    umount2(pods, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    // the directory is there without the mount as well: it was bound to itself
    Ok(move_mount(&own, "", CWD, pod_dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
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

    /// The mount points that a thread has which called [`leave_other_pods`], and then mounted something at `late`.
    fn seen_after(pod_dir: &Path, late: Option<PathBuf>) -> Vec<PathBuf> {
        let pod_dir = pod_dir.to_owned();
        let leave = move || -> io::Result<Vec<PathBuf>> {
            leave_other_pods(&pod_dir)?;
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
        let before = points();
        let seen = seen_after(&own, Some(own.join("shm/late")));
        for point in ["shm", "shm/deep", "shm/late"] {
            assert!(seen.contains(&own.join(point)), "{point}: {seen:?}");
        }
        assert!(!seen.iter().any(|point| point.starts_with(&other) || *point == pods), "{seen:?}");
        // other tests mount things as well
        let ours = |points: &[PathBuf]| points.iter().filter(|point| point.starts_with(&root)).count();
        assert_eq!(ours(&points()), ours(&before), "the node keeps its mounts, and gets no others");
    }
}
