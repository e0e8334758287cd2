//! The `kubepods` tree: a cgroup above all Pods, one for each QoS tier, one for each Pod.
//!
//! Source: `pkg/kubelet/cm/{cgroup_manager,pod_container_manager,qos_container_manager,node_container_manager}_linux.go`.
//! All calls are blocking file operations on cgroupfs: fast, but to be kept off the runtime's workers. Containers'
//! own cgroups are made by libcontainer at the path that [`CgroupTree::container_path`] names.

mod apply;
mod hierarchy;
mod names;
mod nested;
mod remove;
mod resize;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;

pub(crate) use apply::page_size_name;
pub use hierarchy::{Hierarchy, LegacyMount};
pub use names::{Driver, Names};
pub use nested::enter_own_cgroup;
pub use resize::{ContainerChange, Enforced};

use super::limits::{self, LimitPolicy, Limits, MIN_SHARES};
use super::qos::{self, QosClass};

/// How long one removal may take: killed processes exit within milliseconds unless the kernel is stuck with one.
const REMOVE_DEADLINE: Duration = Duration::from_secs(2);

/// Why a cgroup could not be made, changed or removed.
///
/// `Io`, `Write` and `Busy` causes can pass: retry with back-off. The others need the administrator.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}{}", remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel did not take a value, for example a limit that conflicts with one above or below.
    #[error("cannot write {value:?} to {path}: {source}{}", remedy(source))]
    Write {
        /// The value.
        value: String,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel, or the cgroup above the node's tree, does not offer a controller that Pods need.
    #[error(
        "cgroup controller {controller:?} is missing at {path}: delegate it (in a systemd unit Delegate=yes, in a container --privileged and --cgroupns=private), or enable it on the kernel's command line"
    )]
    MissingController {
        /// Name of the controller.
        controller: String,
        /// Where it was expected.
        path: PathBuf,
    },
    /// `--nested`, and the machine's cgroups are in sight.
    #[error(
        "--nested: this process is in cgroup {own} of {controller}, and {root} is mounted: run it in a container that sees its own cgroup only"
    )]
    NotNested {
        /// The tree.
        controller: String,
        /// Our cgroup in it.
        own: String,
        /// What the mount shows.
        root: String,
    },
    /// A file name in `unified` that is a path.
    #[error("{name:?} is no file of a cgroup: name a file without slashes, for example memory.high")]
    BadName {
        /// The name.
        name: String,
    },
    /// Someone nested cgroups without end.
    #[error("{path} is nested too deep to be removed")]
    TooDeep {
        /// The directory at which removal stopped.
        path: PathBuf,
    },
}

/// What mends it, where that does not follow from the error.
fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; mount it writable: in a container run it with --privileged and --cgroupns=private"
        }
        _ => "",
    }
}

impl CgroupError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// A write to a file that is not there, or that is busy, is about the file; any other is about the value.
    fn or_io(self) -> Self {
        match self {
            Self::Write { path, source, .. }
                if matches!(
                    source.raw_os_error(),
                    Some(nix::libc::ENOENT | nix::libc::ENODEV | nix::libc::EBUSY | nix::libc::ESRCH)
                ) =>
            {
                Self::Io { action: "write", path, source }
            }
            other => other,
        }
    }

    fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } | Self::Write { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the kernel refused because processes or children are still there.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.os_error() == Some(nix::libc::EBUSY)
    }

    fn is_invalid_value(&self) -> bool {
        self.os_error() == Some(nix::libc::EINVAL)
    }
}

/// The cgroup or file is gone.
pub(super) fn is_absent(error: &CgroupError) -> bool {
    matches!(error.os_error(), Some(nix::libc::ENOENT | nix::libc::ENODEV))
}

/// Where the tree is and what limits it enforces.
#[derive(Clone, Debug)]
pub struct CgroupConfig {
    /// `cgroupRoot`: the cgroup below which the tree is made, `/` by default.
    pub root: String,
    /// `cgroupDriver`: how the cgroups are named.
    pub driver: Driver,
    /// How limits follow from manifests.
    pub policy: LimitPolicy,
}

/// The node's tree of Pod cgroups.
#[derive(Clone, Debug)]
pub struct CgroupTree {
    hierarchy: Hierarchy,
    names: Names,
    policy: LimitPolicy,
}

impl CgroupTree {
    /// Makes the cgroups above the Pods, or takes over those that are there.
    ///
    /// `config.policy` is completed with what the kernel offers: version, swap accounting, huge pages.
    pub fn open(config: CgroupConfig) -> Result<Self, CgroupError> {
        Self::open_in(Hierarchy::discover()?, config)
    }

    fn open_in(hierarchy: Hierarchy, config: CgroupConfig) -> Result<Self, CgroupError> {
        let names = Names::new(config.driver, &config.root);
        let mut policy = config.policy;
        for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            hierarchy.create(&names.tier(class))?;
        }
        policy.cgroup_v2 = hierarchy.is_unified();
        policy.swap_controller = hierarchy.has_swap_controller(&names.root());
        policy.huge_page_sizes = hierarchy.huge_page_sizes();
        let tree = Self { hierarchy, names, policy };
        // tiers do not limit huge pages: a fresh one may
        let unbounded: BTreeMap<i64, u64> = tree.policy.huge_page_sizes.iter().map(|size| (*size, 1 << 62)).collect();
        let best_effort = Limits { cpu_shares: Some(MIN_SHARES), huge_pages: unbounded.clone(), ..Limits::default() };
        let mut burstable = Limits { huge_pages: unbounded, ..Limits::default() };
        if tree.policy.cgroup_v2 && !tree.protects_memory() {
            // values of an earlier configuration would stay
            burstable.unified.insert("memory.low".into(), "0".into());
            let reset = [("memory.min".into(), "0".into()), ("memory.low".into(), "0".into())].into();
            tree.update(&tree.names.root(), &Limits { unified: reset, ..Limits::default() })?;
        }
        tree.update(&tree.names.tier(QosClass::BestEffort), &best_effort)?;
        tree.update(&tree.names.tier(QosClass::Burstable), &burstable)?;
        Ok(tree)
    }

    fn protects_memory(&self) -> bool {
        self.policy.memory_qos.is_some_and(|qos| qos.tiered_reservation)
    }

    /// How limits follow from manifests on this node, for [`limits::container_limits`].
    #[must_use]
    pub fn policy(&self) -> &LimitPolicy {
        &self.policy
    }

    /// The mounted hierarchies.
    #[must_use]
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// Path of the cgroup above all Pods.
    #[must_use]
    pub fn root_path(&self) -> String {
        self.names.root()
    }

    /// Path of a Pod's cgroup within the hierarchies.
    #[must_use]
    pub fn pod_path(&self, pod: &Pod) -> String {
        self.names.pod(qos::qos_class(pod), pod.metadata.uid.as_deref().unwrap_or_default())
    }

    /// Path of a container's cgroup within the hierarchies: `linux.cgroupsPath` of its bundle.
    #[must_use]
    pub fn container_path(&self, pod: &Pod, container_id: &str) -> String {
        self.names.container(&self.pod_path(pod), container_id)
    }

    /// Makes a Pod's cgroup with its limits, or brings an existing one up to date.
    ///
    /// `exclusive_cpus`: a container of the Pod has processors of its own.
    pub fn ensure_pod(&self, pod: &Pod, exclusive_cpus: bool) -> Result<(), CgroupError> {
        let path = self.pod_path(pod);
        self.hierarchy.create(&path)?;
        self.update(&path, &limits::pod_limits(pod, &self.policy, exclusive_cpus))
    }

    /// Writes limits to any cgroup of the tree: `/resize`, tiers, node allocatable.
    pub fn update(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        apply::apply(&self.hierarchy, path, limits)
    }

    /// Limits all Pods together to what is allocatable (`enforceNodeAllocatable: pods`), or to the capacity.
    ///
    /// Memory in use above a new limit makes the kernel refuse it: retry, evictions bring the use down.
    pub fn enforce_node_allocatable(&self, limits: &Limits) -> Result<(), CgroupError> {
        self.update(&self.names.root(), limits)
    }

    /// Limits an existing cgroup outside the tree (`kubeReservedCgroup`, `systemReservedCgroup`).
    pub fn enforce_reserved(&self, cgroup: &str, limits: &Limits) -> Result<(), CgroupError> {
        let path = &self.names.other(cgroup);
        for directory in ["cpu", "memory"].iter().filter_map(|c| self.hierarchy.directory(c, path)) {
            if let Err(source) = fs::metadata(&directory) {
                return Err(CgroupError::io("find the reserved cgroup", &directory, source));
            }
        }
        self.update(path, limits)
    }

    /// What the tiers weigh with these Pods on the node: cgroups, in the order to [`CgroupTree::update`] them. Changes
    /// when Pods come, go or are resized.
    #[must_use]
    pub fn tier_limits<'a>(&self, pods: impl IntoIterator<Item = &'a Pod> + Clone) -> Vec<(String, Limits)> {
        let mut burstable =
            Limits { cpu_shares: Some(limits::burstable_tier_shares(pods.clone())), ..Limits::default() };
        let mut result = Vec::new();
        if self.policy.cgroup_v2 && self.protects_memory() {
            let memory = |class: QosClass| -> i64 {
                let of_class = pods.clone().into_iter().filter(|pod| qos::qos_class(pod) == class);
                of_class
                    .map(|pod| super::amounts::pod_requests(pod).value(super::amounts::MEMORY))
                    .fold(0, i64::saturating_add)
            };
            let (guaranteed, low) = (memory(QosClass::Guaranteed), memory(QosClass::Burstable));
            burstable.unified.insert("memory.low".into(), low.to_string());
            let root = [
                ("memory.min".into(), guaranteed.saturating_add(low).to_string()),
                ("memory.low".into(), low.to_string()),
            ];
            result.push((self.names.root(), Limits { unified: root.into(), ..Limits::default() }));
        }
        result.push((self.names.tier(QosClass::Burstable), burstable));
        result
    }

    /// UIDs of all Pods that have a cgroup in any hierarchy, with its path, for reconciliation at start.
    pub fn pod_uids(&self) -> Result<BTreeMap<String, String>, CgroupError> {
        let mut found = BTreeMap::new();
        for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            let tier = self.names.tier(class);
            for directory in self.hierarchy.directories(&tier) {
                let entries = match fs::read_dir(&directory) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    result => result.map_err(|e| CgroupError::io("list", &directory, e))?,
                };
                for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
                    let Ok(name) = entry.file_name().into_string() else { continue };
                    if let Some(uid) = self.names.pod_uid(&name) {
                        found.insert(uid, format!("{tier}/{name}"));
                    }
                }
            }
        }
        Ok(found)
    }

    /// Removes a Pod's cgroup from every tier and hierarchy, killing what is left in it. Gone already is success.
    pub fn remove_pod(&self, uid: &str) -> Result<(), CgroupError> {
        for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            self.remove(&self.names.pod(class, uid))?;
        }
        Ok(())
    }

    /// Removes one container's cgroup, with whatever the container nested in it, killing what is left in it.
    pub fn remove_container(&self, pod: &Pod, container_id: &str) -> Result<(), CgroupError> {
        self.remove(&self.container_path(pod, container_id))
    }

    fn remove(&self, path: &str) -> Result<(), CgroupError> {
        let mut directories = self.hierarchy.directories(path);
        directories.retain(|directory| directory.exists());
        remove::remove(&directories, Instant::now() + REMOVE_DEADLINE)
    }

    /// What a cgroup uses now.
    pub fn stats(&self, path: &str) -> Result<super::stats::CgroupStats, CgroupError> {
        super::stats::read(&self.hierarchy, path)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Stdio};

    use super::super::fixture::{container, pod};
    use super::*;

    /// A tree of its own in the real hierarchies, gone when dropped.
    pub(super) struct Scratch(pub(super) CgroupTree, String);

    impl Scratch {
        pub(super) fn new(driver: Driver) -> Self {
            let name = format!("gantrytest{:x}", fastrand::u64(..));
            let root = match driver {
                Driver::Cgroupfs => format!("/{name}"),
                Driver::Systemd => format!("/{name}.slice"),
            };
            let policy = LimitPolicy { memory_capacity: 8 << 30, pod_pids_limit: Some(64), ..LimitPolicy::default() };
            let tree = CgroupTree::open(CgroupConfig { root: root.clone(), driver, policy }).unwrap();
            Self(tree, root)
        }

        /// A tree in a hierarchy of plain files, which is only read.
        pub(super) fn around(hierarchy: Hierarchy) -> CgroupTree {
            CgroupTree { hierarchy, names: Names::new(Driver::Cgroupfs, "/"), policy: LimitPolicy::default() }
        }

        fn read(&self, controller: &str, path: &str, file: &str) -> String {
            let directory = self.0.hierarchy.directory(controller, path).unwrap();
            hierarchy::read(&directory.join(file)).unwrap().trim().to_owned()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            self.0.remove(&self.1).unwrap();
        }
    }

    pub(super) fn example(uid: &str) -> Pod {
        let mut p = pod(vec![container("a", &[("cpu", "500m")], &[("cpu", "2"), ("memory", "64Mi")])]);
        p.metadata.uid = Some(uid.to_owned());
        p
    }

    fn sleeper(tree: &CgroupTree, path: &str) -> Child {
        #[allow(clippy::disallowed_methods, reason = "a process to be killed, not a tool on a hot path")]
        let mut command = std::process::Command::new("sleep");
        let child = command.arg("1000").stdin(Stdio::null()).spawn().unwrap();
        for directory in tree.hierarchy.directories(path).iter().filter(|d| d.exists()) {
            fs::write(directory.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        child
    }

    fn memory_limit(scratch: &Scratch, path: &str) -> String {
        let file = if scratch.0.hierarchy.is_unified() { "memory.max" } else { "memory.limit_in_bytes" };
        scratch.read("memory", path, file)
    }

    #[test]
    fn a_pod_gets_its_limits_and_can_be_resized() {
        for driver in [Driver::Cgroupfs, Driver::Systemd] {
            let scratch = Scratch::new(driver);
            let tree = &scratch.0;
            let mut p = example("1111-aa");
            tree.ensure_pod(&p, false).unwrap();
            let path = tree.pod_path(&p);
            assert_eq!(memory_limit(&scratch, &path), (64_i64 << 20).to_string());
            assert_eq!(scratch.read("pids", &path, "pids.max"), "64");
            if !tree.hierarchy.is_unified() {
                assert_eq!(scratch.read("cpu", &path, "cpu.shares"), "512");
                assert_eq!(scratch.read("cpu", &path, "cpu.cfs_quota_us"), "200000");
                assert_eq!(scratch.read("cpuset", &path, "cpuset.cpus"), scratch.read("cpuset", "/", "cpuset.cpus"));
            }
            p.spec.as_mut().unwrap().containers[0] =
                container("a", &[("cpu", "1")], &[("cpu", "3"), ("memory", "128Mi")]);
            tree.ensure_pod(&p, false).unwrap();
            assert_eq!(memory_limit(&scratch, &path), (128_i64 << 20).to_string());
            p.spec.as_mut().unwrap().containers[0] =
                container("a", &[("cpu", "1")], &[("cpu", "1"), ("memory", "32Mi")]);
            tree.ensure_pod(&p, false).unwrap();
            assert_eq!(memory_limit(&scratch, &path), (32_i64 << 20).to_string());
            assert_eq!(tree.pod_uids().unwrap(), [("1111-aa".to_owned(), path)].into());
        }
    }

    #[test]
    fn removal_kills_what_is_left_and_walks_nested_cgroups() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        let tree = &scratch.0;
        let p = example("2222");
        tree.ensure_pod(&p, false).unwrap();
        let nested = format!("{}/deep/er", tree.container_path(&p, "c1"));
        tree.hierarchy.create(&nested).unwrap();
        let mut child = sleeper(tree, &nested);
        tree.remove_pod("2222").unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(tree.pod_uids().unwrap().is_empty());
        for directory in tree.hierarchy.directories(&tree.pod_path(&p)) {
            assert!(!directory.exists(), "{}", directory.display());
        }
        tree.remove_pod("2222").unwrap();
    }

    #[test]
    fn only_the_named_pod_is_removed() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        let tree = &scratch.0;
        let (mine, other) = (example("3333"), example("4444"));
        tree.ensure_pod(&mine, false).unwrap();
        tree.ensure_pod(&other, false).unwrap();
        let mut child = sleeper(tree, &tree.pod_path(&other));
        tree.remove_pod("3333").unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        assert_eq!(tree.pod_uids().unwrap().into_keys().collect::<Vec<_>>(), ["4444"]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn tiers_and_allocatable_are_enforced() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        let tree = &scratch.0;
        for (path, limits) in tree.tier_limits([&example("5555"), &example("6666")]) {
            tree.update(&path, &limits).unwrap();
        }
        let tier = tree.names.tier(QosClass::Burstable);
        if tree.hierarchy.is_unified() {
            assert_eq!(scratch.read("cpu", &tier, "cpu.weight"), shares_to_weight(1024).to_string());
        } else {
            assert_eq!(scratch.read("cpu", &tier, "cpu.shares"), "1024");
        }
        let limits = Limits { memory: Some(4 << 30), cpu_shares: Some(1500), pids: Some(4000), ..Limits::default() };
        tree.enforce_node_allocatable(&limits).unwrap();
        assert_eq!(memory_limit(&scratch, &tree.root_path()), (4_i64 << 30).to_string());
        let missing = tree.enforce_reserved("/no/such/cgroup", &limits).unwrap_err();
        assert!(missing.to_string().contains("/no/such/cgroup"), "{missing}");
    }

    #[test]
    fn opening_twice_takes_over() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        scratch.0.ensure_pod(&example("7777"), false).unwrap();
        let config = CgroupConfig { root: scratch.1.clone(), driver: Driver::Cgroupfs, policy: LimitPolicy::default() };
        let again = CgroupTree::open(config).unwrap();
        assert_eq!(again.pod_uids().unwrap().len(), 1);
    }

    use super::super::limits::shares_to_weight;
}
