//! The kernel: version, features and limits.

use std::fs;
use std::io;
use std::path::Path;

use super::finding::Finding;
use crate::image::OVERLAY_REMEDY;

/// The oldest kernel that has all that is used (`mount_setattr`, overlayfs in the new mount API).
const OLDEST: (u32, u32) = (5, 15);
/// The kernel's own default; every watcher of logs and configurations takes one.
const INOTIFY_INSTANCES: u64 = 128;

/// What this process may do.
pub fn privileges(root: bool, sys_admin: bool) -> Finding {
    const REMEDY: &str = "run as root; in a container with --privileged";
    match (root, sys_admin) {
        (false, _) => Finding::fatal("privileges", "this is not root", REMEDY),
        (true, false) => Finding::fatal("privileges", "root without CAP_SYS_ADMIN cannot mount", REMEDY),
        (true, true) => Finding::ok("privileges", "root with CAP_SYS_ADMIN"),
    }
}

/// `release` is that of uname.
pub fn version(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found >= OLDEST {
        return Finding::ok("kernel", format!("Linux {release}"));
    }
    let (major, minor) = OLDEST;
    let message = format!("Linux {release} is too old");
    Finding::fatal("kernel", message, format!("boot Linux {major}.{minor} or newer"))
}

/// Whether the kernel mounts overlayfs. That it is not in `/proc/filesystems` says little: its module is loaded when it
/// is first asked for.
pub fn overlay(result: io::Result<()>) -> Finding {
    const CHECK: &str = "overlayfs";
    let Err(error) = result else { return Finding::ok(CHECK, "there") };
    match error.raw_os_error() {
        Some(nix::libc::ENODEV) => {
            let message = "the kernel has no overlay file system, on which containers run";
            Finding::fatal(CHECK, message, OVERLAY_REMEDY)
        }
        _ => Finding::fatal(
            CHECK,
            format!("the kernel does not give it: {error}"),
            "run as root; in a container with --privileged, which also lifts its seccomp profile",
        ),
    }
}

/// Features, as `/proc` below `root` shows them.
pub fn features(root: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let missing: Vec<&str> = ["net", "ipc", "uts", "pid", "mnt", "cgroup", "user"]
        .into_iter()
        .filter(|kind| fs::symlink_metadata(root.join("proc/self/ns").join(kind)).is_err())
        .collect();
    let config: Vec<String> = missing.iter().map(|kind| format!("CONFIG_{}_NS", kind.to_uppercase())).collect();
    findings.push(if missing.is_empty() {
        Finding::ok("namespaces", "all kinds")
    } else if missing == ["user"] {
        Finding::warning("namespaces", "no user namespaces", "take a kernel with CONFIG_USER_NS for hostUsers: false")
    } else {
        let message = format!("the kernel has no namespaces of kind {}", missing.join(", "));
        Finding::fatal("namespaces", message, format!("take a kernel with {}", config.join(", ")))
    });
    let actions = fs::read_to_string(root.join("proc/sys/kernel/seccomp/actions_avail")).unwrap_or_default();
    findings.push(match actions.contains("errno") {
        true => Finding::ok("seccomp", "filters"),
        false => Finding::fatal(
            "seccomp",
            "the kernel has no seccomp filters, which RuntimeDefault profiles need",
            "take a kernel with CONFIG_SECCOMP_FILTER",
        ),
    });
    findings
}

/// Limits that stop a node with many Pods.
pub fn limits(root: &Path) -> Vec<Finding> {
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(root.join("proc/sys").join(name.replace('.', "/"))).ok()?;
        text.trim().parse().ok()
    };
    let mut findings = Vec::new();
    for kind in ["net", "ipc", "uts", "pid", "mnt"] {
        let name = format!("user.max_{kind}_namespaces");
        if let Some(limit @ 0..64) = number(&name) {
            let message = format!("{name} is {limit}: each Pod needs one");
            findings.push(Finding::fatal("sysctl", message, format!("sysctl -w {name}=15000, and in /etc/sysctl.d")));
        }
    }
    if let Some(limit) = number("fs.inotify.max_user_instances").filter(|limit| *limit < INOTIFY_INSTANCES) {
        findings.push(Finding::warning(
            "sysctl",
            format!("fs.inotify.max_user_instances is {limit}: programs in Pods that watch files may fail"),
            "sysctl -w fs.inotify.max_user_instances=8192, and in /etc/sysctl.d",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("sysctl", "limits are high enough"));
    }
    findings
}

/// Whether nftables, with which the built-in network routes host ports and masquerades, works.
pub fn nftables(result: Result<(), String>, builtin_network: bool) -> Finding {
    const REMEDY: &str = "modprobe nf_tables; without the module take a kernel with CONFIG_NF_TABLES and CONFIG_NF_NAT, \
        or use CNI plugins (--network-plugin=cni)";
    match result {
        Ok(()) => Finding::ok("nftables", "works"),
        Err(error) if builtin_network => Finding::fatal("nftables", format!("does not work: {error}"), REMEDY),
        Err(error) => {
            Finding::warning("nftables", format!("does not work: {error}"), "modprobe nf_tables, if a plugin needs it")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn privileges_are_needed() {
        assert_eq!(privileges(true, true).level, Level::Ok);
        let not_root = privileges(false, false);
        assert_eq!((not_root.level, not_root.message.as_str()), (Level::Fatal, "this is not root"));
        assert!(privileges(true, false).remedy.contains("--privileged"));
    }

    #[test]
    fn old_kernels_are_told_from_new_ones() {
        for (release, level) in [
            ("5.15.0-91-generic", Level::Ok),
            ("6.1.0", Level::Ok),
            ("5.14.21", Level::Fatal),
            ("4.19.0-25-amd64", Level::Fatal),
            ("10.0", Level::Ok),
        ] {
            assert_eq!(version(release).level, level, "{release}");
        }
        assert_eq!(version("5.4.0").remedy, "boot Linux 5.15 or newer");
    }

    #[test]
    fn a_kernel_without_features_is_told_which() {
        let bare = root(&[]);
        let findings = features(bare.path());
        assert!(findings.iter().all(|finding| finding.level == Level::Fatal), "{findings:?}");
        assert!(findings[0].message.contains("net, ipc") && findings[0].remedy.contains("CONFIG_NET_NS"));
        assert!(findings[1].remedy.contains("CONFIG_SECCOMP_FILTER"));
        let mut files = vec![("proc/sys/kernel/seccomp/actions_avail", "kill_process errno allow\n")];
        let kinds = ["net", "ipc", "uts", "pid", "mnt", "cgroup"].map(|kind| format!("proc/self/ns/{kind}"));
        files.extend(kinds.iter().map(|path| (path.as_str(), "")));
        let levels: Vec<Level> = features(root(&files).path()).iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Warning, Level::Ok]);
        files.push(("proc/self/ns/user", ""));
        assert!(features(root(&files).path()).iter().all(|finding| finding.level == Level::Ok));
    }

    #[test]
    fn overlayfs_is_asked_of_the_kernel() {
        assert_eq!(overlay(Ok(())).level, Level::Ok);
        let none = overlay(Err(io::Error::from_raw_os_error(nix::libc::ENODEV)));
        assert_eq!(none.level, Level::Fatal);
        assert!(none.message.contains("no overlay file system") && none.remedy.starts_with("modprobe overlay"));
        let refused = overlay(Err(io::Error::from_raw_os_error(nix::libc::EPERM)));
        assert_eq!(refused.level, Level::Fatal);
        assert!(refused.message.contains("not permitted") && refused.remedy.contains("--privileged"));
    }

    #[test]
    fn low_limits_name_the_sysctl() {
        let low =
            root(&[("proc/sys/user/max_net_namespaces", "0\n"), ("proc/sys/fs/inotify/max_user_instances", "64\n")]);
        let findings = limits(low.path());
        assert_eq!(findings[0].level, Level::Fatal);
        assert!(findings[0].remedy.starts_with("sysctl -w user.max_net_namespaces="));
        assert_eq!(findings[1].level, Level::Warning);
        assert!(findings[1].message.contains("max_user_instances is 64"));
        assert_eq!(limits(root(&[]).path())[0].level, Level::Ok);
    }

    #[test]
    fn nftables_matter_to_the_built_in_network() {
        assert_eq!(nftables(Err("no".into()), true).level, Level::Fatal);
        assert_eq!(nftables(Err("no".into()), false).level, Level::Warning);
        assert_eq!(nftables(Ok(()), true).level, Level::Ok);
    }
}
