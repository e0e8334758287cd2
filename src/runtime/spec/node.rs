//! What the node offers to containers and how it is configured.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::runtime::Capability;

use crate::resources::machine;

/// The node's side of a container's configuration.
#[derive(Clone, Debug)]
pub struct NodeTraits {
    /// Whether the node has the unified hierarchy.
    pub cgroup_v2: bool,
    /// Memory in bytes, against which out-of-memory preferences are weighed.
    pub memory_capacity: i64,
    /// Capabilities that this node can grant: the agent's own bounding set, by name without prefix.
    pub capabilities: BTreeSet<String>,
    /// The lowest `oom_score_adj` that the agent may set; `None` if any (it needs `CAP_SYS_RESOURCE`).
    pub min_oom_score_adj: Option<i32>,
    /// `seccompDefault`: containers without a profile get `RuntimeDefault`.
    pub seccomp_default: bool,
    /// Directory of `Localhost` profiles: `<root-dir>/seccomp`.
    pub seccomp_directory: PathBuf,
    /// Whether the kernel enforces AppArmor.
    pub apparmor: bool,
    /// Name of the loaded AppArmor profile for `RuntimeDefault`.
    pub apparmor_default: Option<String>,
    /// Whether the kernel enforces SELinux.
    pub selinux: bool,
    /// Paths that containers find empty.
    pub masked_paths: Vec<String>,
    /// Paths that containers cannot write.
    pub read_only_paths: Vec<String>,
}

impl NodeTraits {
    /// Looks at this machine and process. `seccomp_directory` and `seccomp_default` come from the configuration.
    pub fn detect(cgroup_v2: bool, seccomp_directory: PathBuf, seccomp_default: bool) -> io::Result<Self> {
        let capabilities = bounding_set(&fs::read_to_string("/proc/self/status")?);
        let own_score = fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse().unwrap_or(0);
        let may_lower = capabilities.contains("SYS_RESOURCE");
        Ok(Self {
            cgroup_v2,
            memory_capacity: i64::try_from(machine::meminfo()?.total).unwrap_or(i64::MAX),
            capabilities,
            min_oom_score_adj: (!may_lower).then_some(own_score),
            seccomp_default,
            seccomp_directory,
            apparmor: fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|s| s.starts_with('Y')),
            apparmor_default: None,
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            masked_paths: masked_paths(),
            read_only_paths: ["bus", "fs", "irq", "sys", "sysrq-trigger"].map(|name| format!("/proc/{name}")).to_vec(),
        })
    }
}

/// Reads `CapBnd` of `/proc/<pid>/status`.
fn bounding_set(status: &str) -> BTreeSet<String> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap_or_default();
    let bits = u64::from_str_radix(line.trim(), 16).unwrap_or(0);
    let names = (0..64).filter(|bit| bits & (1 << bit) != 0).filter_map(|bit| CAPABILITY_NAMES.get(bit));
    names.filter(|name| Capability::from_str(name).is_ok()).map(|name| (*name).to_owned()).collect()
}

/// By number, as in `capability.h`.
const CAPABILITY_NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What Docker and the kubelet hide: files that tell about, or control, the whole machine.
fn masked_paths() -> Vec<String> {
    let mut paths: Vec<String> = [
        "/proc/asound",
        "/proc/acpi",
        "/proc/interrupts",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/sys/firmware",
        "/sys/devices/virtual/powercap",
    ]
    .map(str::to_owned)
    .to_vec();
    let throttle = |cpu| format!("/sys/devices/system/cpu/cpu{cpu}/thermal_throttle");
    paths.extend(machine::possible_cpus().into_iter().map(throttle).filter(|path| Path::new(path).exists()));
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_has_a_name_that_oci_knows() {
        for name in CAPABILITY_NAMES {
            assert!(Capability::from_str(name).is_ok(), "{name}");
        }
        let all = bounding_set("Name:\tx\nCapBnd:\t000001ffffffffff\n");
        assert_eq!(all.len(), 41);
        assert_eq!(bounding_set("CapBnd:\t0000000000000021\n"), ["CHOWN", "KILL"].map(str::to_owned).into());
    }

    #[test]
    fn detects_this_node() {
        let node = NodeTraits::detect(false, "/var/lib/kubelet/seccomp".into(), false).unwrap();
        assert!(node.capabilities.contains("SYS_ADMIN") && node.memory_capacity > 0);
        assert_eq!(node.min_oom_score_adj.is_none(), node.capabilities.contains("SYS_RESOURCE"));
    }
}
