//! A node inside a container: its Pods' cgroups have to be below the container's own.
//!
//! A privileged container may see the whole machine's tree (runtimes leave it in the host's cgroup namespace). A
//! second node there would take the first one's `kubepods` for its own, and end the Pods in it.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsmount, fsopen, move_mount,
};

use super::CgroupError;
use super::hierarchy::{Hierarchy, MOUNT_POINT};

/// Makes the cgroup that this process is in the root of all that it sees.
///
/// With version 2 it enters a cgroup namespace of its own, which the threads and processes that it starts from here on
/// inherit: call it before there are any. With version 1 runtimes mount the container's own cgroups, which is checked.
pub fn enter_own_cgroup() -> Result<(), CgroupError> {
    let read = |file: &'static str| {
        fs::read_to_string(file).map_err(|source| CgroupError::io("read", Path::new(file), source))
    };
    if !Hierarchy::discover()?.is_unified() {
        return only_own(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?);
    }
    let failed = |action, source: io::Error| CgroupError::io(action, Path::new(MOUNT_POINT), source);
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(|errno| failed("enter a cgroup namespace for", errno.into()))?;
    mount_own().map_err(|errno| failed("mount", errno.into()))
}

/// Mounts what this process's cgroup namespace shows. By parts, because mount(2) refuses a file system on a mount of
/// itself with `EBUSY`, and version 2 is one file system whatever part of it a mount shows.
fn mount_own() -> rustix::io::Result<()> {
    let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(mount.as_fd(), "", CWD, MOUNT_POINT, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Whether the version 1 trees below the mount point show no more than this process's own cgroup.
fn only_own(cgroups: &str, mountinfo: &str) -> Result<(), CgroupError> {
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(own)) = (parts.next(), parts.next()) else { continue };
        let first = controllers.split(',').next().unwrap_or_default();
        if first.is_empty() || first.starts_with("name=") {
            // these only group processes: no limit is set there
            continue;
        }
        let shown = mountinfo.lines().find_map(|line| {
            let (left, right) = line.split_once(" - cgroup ")?;
            let options = right.rsplit(' ').next()?;
            options.split(',').any(|option| option == first).then(|| left.split(' ').nth(3)).flatten()
        });
        if let Some(root) = shown.filter(|root| *root != own) {
            return Err(CgroupError::NotNested {
                controller: first.to_owned(),
                own: own.to_owned(),
                root: root.to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CGROUPS: &str = "5:memory:/kubepods/pod1/a\n4:cpu,cpuacct:/kubepods/pod1/a\n1:name=systemd:/x\n0::/y\n";

    fn mountinfo(root: &str) -> String {
        format!(
            "31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             32 31 0:28 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             33 31 0:29 {root} /sys/fs/cgroup/memory rw master:4 - cgroup cgroup rw,memory\n\
             34 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        )
    }

    #[test]
    fn a_container_that_sees_its_own_cgroup_may_go_on() {
        only_own(CGROUPS, &mountinfo("/kubepods/pod1/a")).unwrap();
        only_own("5:memory:/\n", &mountinfo("/")).unwrap();
        only_own("", "").unwrap();
    }

    #[test]
    fn one_that_sees_the_machines_may_not() {
        let error = only_own(CGROUPS, &mountinfo("/")).unwrap_err().to_string();
        assert!(error.contains("/kubepods/pod1/a") && error.contains("--nested"), "{error}");
    }
}
