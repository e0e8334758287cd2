//! The hierarchies that the kernel has mounted, and directories in them.
//!
//! Version 1 has a tree for every controller, version 2 one for all. On hybrid nodes (controllers in version 1,
//! process tracking in version 2) the limits are those of version 1, as libcontainer decides as well.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::CgroupError;

pub(super) const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// Version 2 controllers that are enabled down the path, with whether Pods cannot run without. Memory first: a cgroup
/// with processes refuses it (`EBUSY`), but takes cpu and pids, and is then the root of threaded ones, which the others
/// cannot be enabled for.
const UNIFIED_CONTROLLERS: [(&str, bool); 6] =
    [("memory", true), ("cpu", true), ("pids", true), ("cpuset", false), ("io", false), ("hugetlb", false)];
/// Version 1 controllers in which Pods get a directory: those that libcontainer puts containers in.
const LEGACY_CONTROLLERS: [&str; 12] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "perf_event",
    "net_cls",
    "net_prio",
];

/// Where cgroups live on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// One tree for all controllers.
    Unified {
        /// Its mount point.
        mount: PathBuf,
    },
    /// One tree for each controller, or for a few that are mounted together.
    Legacy {
        /// The trees, those without controllers (`name=systemd`, hybrid `unified`) included.
        mounts: Vec<LegacyMount>,
    },
}

/// A version 1 tree, or the controller-less version 2 tree of a hybrid node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegacyMount {
    /// Its mount point.
    pub path: PathBuf,
    /// Its controllers; none for a tree that only groups processes.
    pub controllers: Vec<String>,
}

impl Hierarchy {
    /// Looks at the mounts of this process.
    pub fn discover() -> Result<Self, CgroupError> {
        let mount = Path::new(MOUNT_POINT);
        let kind = statfs(mount).map_err(|e| CgroupError::io("inspect", mount, e.into()))?.filesystem_type();
        if kind == CGROUP2_SUPER_MAGIC {
            return Ok(Self::Unified { mount: mount.to_owned() });
        }
        let mountinfo = Path::new("/proc/self/mountinfo");
        let text = fs::read_to_string(mountinfo).map_err(|e| CgroupError::io("read", mountinfo, e))?;
        let mounts = legacy_mounts(&text);
        for needed in ["cpu", "memory", "pids"] {
            if !mounts.iter().any(|m| m.controllers.iter().any(|c| c == needed)) {
                return Err(CgroupError::MissingController { controller: needed.to_owned(), path: mount.to_owned() });
            }
        }
        Ok(Self::Legacy { mounts })
    }

    /// Whether this is version 2.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        matches!(self, Self::Unified { .. })
    }

    /// The directories of a cgroup in every tree, whether they exist or not.
    #[must_use]
    pub fn directories(&self, path: &str) -> Vec<PathBuf> {
        match self {
            Self::Unified { mount } => vec![join(mount, path)],
            Self::Legacy { mounts } => mounts.iter().map(|m| join(&m.path, path)).collect(),
        }
    }

    /// The directory of a cgroup in the tree of a controller; `None` if the node has no such controller.
    #[must_use]
    pub fn directory(&self, controller: &str, path: &str) -> Option<PathBuf> {
        match self {
            Self::Unified { mount } => Some(join(mount, path)),
            Self::Legacy { mounts } => {
                let mount = mounts.iter().find(|m| m.controllers.iter().any(|c| c == controller))?;
                Some(join(&mount.path, path))
            }
        }
    }

    /// Makes a cgroup and its ancestors, with every controller usable for limits at the last level and below.
    pub fn create(&self, path: &str) -> Result<(), CgroupError> {
        match self {
            Self::Unified { mount } => create_unified(mount, path),
            Self::Legacy { mounts } => {
                for mount in mounts.iter().filter(|m| m.controllers.iter().any(|c| is_used(c))) {
                    create_legacy(mount, path)?;
                }
                Ok(())
            }
        }
    }

    /// Whether the kernel accounts swap per cgroup. `path` is an existing cgroup that is not the root.
    #[must_use]
    pub fn has_swap_controller(&self, path: &str) -> bool {
        let file = if self.is_unified() { "memory.swap.max" } else { "memory.memsw.limit_in_bytes" };
        self.directory("memory", path).is_some_and(|directory| directory.join(file).exists())
    }

    /// Huge page sizes in bytes that can be limited: those of the kernel, if it has the `hugetlb` controller.
    #[must_use]
    pub fn huge_page_sizes(&self) -> Vec<i64> {
        let controlled = match self {
            Self::Unified { mount } => controllers(mount).is_ok_and(|c| c.contains("hugetlb")),
            Self::Legacy { .. } => self.directory("hugetlb", "/").is_some(),
        };
        if !controlled {
            return Vec::new();
        }
        let entries = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
        let mut sizes: Vec<i64> = entries
            .filter_map(|e| e.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<i64>().ok())
            .map(|kib| kib.saturating_mul(1024))
            .collect();
        sizes.sort_unstable();
        sizes
    }
}

fn is_used(controller: &str) -> bool {
    LEGACY_CONTROLLERS.contains(&controller)
}

fn join(mount: &Path, path: &str) -> PathBuf {
    mount.join(path.trim_start_matches('/'))
}

/// Reads `/proc/self/mountinfo`: of each tree the first mount.
fn legacy_mounts(mountinfo: &str) -> Vec<LegacyMount> {
    let mut seen = BTreeSet::new();
    let mut mounts = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(path), Some(device)) = (left.split(' ').nth(4), left.split(' ').nth(2)) else { continue };
        let mut right = right.split(' ');
        let (kind, options) = (right.next().unwrap_or_default(), right.nth(1).unwrap_or_default());
        let controllers = match kind {
            "cgroup" => options.split(',').filter(|o| is_used(o)).map(str::to_owned).collect(),
            "cgroup2" => Vec::new(),
            _ => continue,
        };
        if seen.insert(device.to_owned()) {
            mounts.push(LegacyMount { path: PathBuf::from(path), controllers });
        }
    }
    mounts
}

fn create_legacy(mount: &LegacyMount, path: &str) -> Result<(), CgroupError> {
    let mut directory = mount.path.clone();
    for component in path.split('/').filter(|c| !c.is_empty()) {
        let parent = directory.clone();
        directory.push(component);
        make(&directory)?;
        if mount.controllers.iter().any(|c| c == "cpuset") {
            // a new cpuset is empty and takes no process
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if read(&directory.join(file))?.trim().is_empty() {
                    write(&directory.join(file), read(&parent.join(file))?.trim())?;
                }
            }
        }
    }
    Ok(())
}

fn create_unified(mount: &Path, path: &str) -> Result<(), CgroupError> {
    let mut directory = mount.to_owned();
    for component in path.split('/').filter(|c| !c.is_empty()) {
        enable_controllers(&directory)?;
        directory.push(component);
        make(&directory)?;
    }
    enable_controllers(&directory)
}

fn make(directory: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError::io("create", directory, e)),
        _ => Ok(()),
    }
}

fn controllers(directory: &Path) -> Result<BTreeSet<String>, CgroupError> {
    Ok(read(&directory.join("cgroup.controllers"))?.split_whitespace().map(str::to_owned).collect())
}

/// Enables the controllers of a directory for its children.
fn enable_controllers(directory: &Path) -> Result<(), CgroupError> {
    let available = controllers(directory)?;
    let control = directory.join("cgroup.subtree_control");
    let enabled: BTreeSet<String> = read(&control)?.split_whitespace().map(str::to_owned).collect();
    for (controller, required) in UNIFIED_CONTROLLERS {
        if enabled.contains(controller) {
            continue;
        }
        if !available.contains(controller) {
            if required {
                return Err(CgroupError::MissingController {
                    controller: controller.to_owned(),
                    path: directory.to_owned(),
                });
            }
            continue;
        }
        let enable = format!("+{controller}");
        match write(&control, &enable) {
            // a cgroup with processes cannot have children with controllers; in a container, where the root of
            // the hierarchy is the container's own cgroup, the processes are this container's
            Err(CgroupError::Io { source, .. }) if is_busy(&source) && is_namespace_root(directory) => {
                evacuate(directory)?;
                write(&control, &enable)?;
            }
            // no such controller after all, for example threaded subtrees
            Err(_) if !required => {}
            result => result?,
        }
    }
    Ok(())
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EBUSY)
}

/// The mount point shows a cgroup namespace: the real root has no type.
fn is_namespace_root(directory: &Path) -> bool {
    directory == Path::new(MOUNT_POINT) && directory.join("cgroup.type").exists()
}

/// Moves the processes of a container's own root cgroup to a leaf, `init`, as container init systems do.
fn evacuate(directory: &Path) -> Result<(), CgroupError> {
    let leaf = directory.join("init");
    make(&leaf)?;
    // a process may fork while it is moved: look again until nobody is left
    for _ in 0..16 {
        let pids = read(&directory.join("cgroup.procs"))?;
        if pids.trim().is_empty() {
            return Ok(());
        }
        for pid in pids.lines() {
            match write(&leaf.join("cgroup.procs"), pid) {
                Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(nix::libc::ESRCH) => {}
                result => result?,
            }
        }
    }
    Ok(())
}

/// Reads a file of a cgroup.
pub(super) fn read(file: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(file).map_err(|e| CgroupError::io("read", file, e))
}

/// Writes a file of a cgroup, which must exist: cgroup files are never created by a write.
pub(super) fn write(file: &Path, value: &str) -> Result<(), CgroupError> {
    let result =
        fs::OpenOptions::new().write(true).open(file).and_then(|mut f| io::Write::write_all(&mut f, value.as_bytes()));
    result.map_err(|source| CgroupError::Write { value: value.to_owned(), path: file.to_owned(), source }.or_io())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:27 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw,mode=755
32 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 31 0:29 / /mnt/memory rw - cgroup cgroup rw,memory
35 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
36 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
garbage
37 31 0:32 /";

    #[test]
    fn finds_the_trees_of_a_hybrid_node() {
        let mounts = legacy_mounts(HYBRID);
        let controllers: Vec<_> = mounts.iter().map(|m| m.controllers.join("+")).collect();
        assert_eq!(controllers, ["cpu+cpuacct", "memory", "", ""]);
        let h = Hierarchy::Legacy { mounts };
        assert_eq!(h.directory("cpuacct", "/kubepods"), Some(PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/kubepods")));
        assert_eq!(h.directory("pids", "/kubepods"), None);
        assert_eq!(h.directories("/x").len(), 4);
    }

    #[test]
    fn this_node_has_what_pods_need() {
        let h = Hierarchy::discover().unwrap();
        for controller in ["cpu", "memory", "pids"] {
            assert!(h.directory(controller, "/").unwrap().is_dir(), "{controller}");
        }
    }

    proptest::proptest! {
        #[test]
        fn mountinfo_never_panics(text in "([a-z0-9/ ,:=-]{0,40}\n){0,8}") {
            legacy_mounts(&text);
        }
    }
}
