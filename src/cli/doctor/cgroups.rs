//! Cgroups: which version, which controllers, and whether they are ours to use.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::finding::Finding;

const CHECK: &str = "cgroups";
/// Without these Pods have no limits.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
/// Without these a part of their resources is not limited or counted.
const WANTED: [&str; 3] = ["cpuset", "io", "hugetlb"];

const READ_ONLY: &str = "mount it writable: in a container run it with --privileged and --cgroupns=private; \
     in a systemd unit leave out ProtectControlGroups=";

/// Version 2, at `mount`; `root` is `cgroupRoot`, absolute in the hierarchy.
pub fn unified(mount: &Path, root: &str, writable: impl Fn(&Path) -> bool) -> Vec<Finding> {
    let base = mount.join(root.trim_start_matches('/'));
    let mut findings = Vec::new();
    let existing = base.ancestors().find(|path| path.is_dir()).unwrap_or(mount);
    // from there on down the agent enables them itself
    let text = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    let has = |name: &&str| text.split_whitespace().any(|word| word == *name);
    let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !has(name)).collect();
    if !missing.is_empty() {
        findings.push(Finding::fatal(
            CHECK,
            format!("controllers {} are not available in {}", missing.join(", "), mount.display()),
            "delegate them: in a container run it with --privileged and its own cgroup namespace (--cgroupns=private); \
             in a systemd unit set Delegate=yes; on the machine check cgroup_disable= on the kernel's command line",
        ));
    }
    let unlimited: Vec<&str> = WANTED.into_iter().filter(|name| !has(name)).collect();
    if !unlimited.is_empty() && missing.is_empty() {
        let message = format!("no controllers {}: what they limit is not limited", unlimited.join(", "));
        findings.push(Finding::warning(CHECK, message, "enable them in the kernel, or delegate them to this cgroup"));
    }
    if !writable(&existing.join("cgroup.subtree_control")) {
        let message = format!("{} is read-only: Pods' cgroups cannot be made", existing.display());
        findings.push(Finding::fatal(CHECK, message, READ_ONLY));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "version 2, all controllers"));
    }
    findings
}

/// Version 1: `/proc/self/mountinfo`, and whether the configuration refuses it (`failCgroupV1`).
pub fn legacy(mountinfo: &str, refused: bool, writable: impl Fn(&Path) -> bool) -> Vec<Finding> {
    if refused {
        return vec![Finding::fatal(
            CHECK,
            "this machine has cgroup v1, and failCgroupV1 is true",
            "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line, or set failCgroupV1: false",
        )];
    }
    let mounted = |controller: &str| {
        mountinfo.lines().find_map(|line| {
            let (left, right) = line.split_once(" - cgroup ")?;
            let has = right.rsplit(' ').next()?.split(',').any(|option| option == controller);
            has.then(|| left.split(' ').nth(4)).flatten()
        })
    };
    let needed = ["cpu", "cpuacct", "memory", "pids", "devices", "freezer"];
    let missing: Vec<&str> = needed.into_iter().filter(|controller| mounted(controller).is_none()).collect();
    if !missing.is_empty() {
        let remedy = "mount each controller's tree below /sys/fs/cgroup, or boot with cgroup v2";
        return vec![Finding::fatal(CHECK, format!("controllers {} are not mounted", missing.join(", ")), remedy)];
    }
    let places: BTreeSet<&str> = needed.into_iter().filter_map(mounted).collect();
    let read_only: Vec<&str> = places.into_iter().filter(|place| !writable(Path::new(place))).collect();
    if !read_only.is_empty() {
        let message = format!("read-only, so that Pods' cgroups cannot be made: {}", read_only.join(", "));
        return vec![Finding::fatal(CHECK, message, READ_ONLY)];
    }
    vec![Finding::warning(
        CHECK,
        "version 1: Kubernetes is about to drop it, and memory is counted less exactly",
        "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line",
    )]
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    fn tree(controllers: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("pods")).unwrap();
        for directory in ["", "pods"] {
            fs::write(root.path().join(directory).join("cgroup.controllers"), controllers).unwrap();
        }
        root
    }

    #[test]
    fn missing_delegation_is_told() {
        let none = tree("");
        let findings = unified(none.path(), "/pods/deep/er", |_| false);
        assert_eq!(findings.len(), 2);
        assert!(findings[0].message.contains("cpu, memory, pids"));
        assert!(findings[0].message.ends_with(&none.path().display().to_string()));
        assert!(findings[0].remedy.contains("Delegate=yes") && findings[0].remedy.contains("--privileged"));
        assert!(findings[1].message.contains("/pods is read-only"));
        assert!(findings.iter().all(|finding| finding.level == Level::Fatal));
        let some = tree("cpu memory pids cpuset");
        let findings = unified(some.path(), "/", |_| true);
        assert_eq!(findings[0].level, Level::Warning);
        assert!(findings[0].message.contains("io, hugetlb"));
        let all = tree("cpuset cpu io memory hugetlb pids rdma misc");
        assert_eq!(unified(all.path(), "/", |_| true)[0].level, Level::Ok);
        // the agent enables for it what is there above
        fs::write(all.path().join("pods/cgroup.controllers"), "").unwrap();
        assert_eq!(unified(all.path(), "/pods", |_| true)[0].level, Level::Ok);
    }

    #[test]
    fn version_1_has_to_be_allowed_and_mounted() {
        let line = |names: &str| format!("30 25 0:26 / /sys/fs/cgroup/x rw,nosuid - cgroup cgroup rw,{names}\n");
        let all = ["cpu,cpuacct", "memory", "pids", "devices", "freezer"].map(line).concat();
        let refused = &legacy(&all, true, |_| true)[0];
        assert_eq!(refused.level, Level::Fatal);
        assert!(refused.remedy.contains("failCgroupV1: false"));
        assert_eq!(legacy(&all, false, |_| true)[0].level, Level::Warning);
        let read_only = &legacy(&all, false, |_| false)[0];
        assert_eq!(read_only.level, Level::Fatal);
        assert!(read_only.message.starts_with("read-only") && read_only.message.ends_with(": /sys/fs/cgroup/x"));
        assert!(read_only.remedy.contains("--privileged"));
        let some = &legacy(&line("memory"), false, |_| true)[0];
        assert_eq!(some.level, Level::Fatal);
        assert!(some.message.contains("cpu, cpuacct, pids, devices, freezer"));
    }
}
