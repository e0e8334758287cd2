//! Which sysctls a Pod may set.
//!
//! Source: `pkg/kubelet/sysctl/{allowlist,safe_sysctls}.go`. All kernels that this node runs on have namespaces for
//! the safe ones.

use k8s_openapi::api::core::v1::PodSpec;

/// In a namespace of the Pod, and without influence on others.
const SAFE: [&str; 14] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_slow_start_after_idle",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// A pattern of `allowedUnsafeSysctls` that would reach out of the Pod. Terminal: the configuration is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the sysctls {0:?} are not known to be namespaced: allow only names below kernel.shm, kernel.msg, kernel.sem, fs.mqueue., net. and user."
)]
pub struct UnknownSysctl(pub String);

/// The safe sysctls and those that the administrator allows.
#[derive(Clone, Debug)]
pub struct SysctlAllowlist {
    names: Vec<(String, Namespace)>,
    prefixes: Vec<(String, Namespace)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Namespace {
    Ipc,
    Net,
    User,
}

impl Namespace {
    fn of(name: &str) -> Option<Self> {
        let has = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        if name == "kernel.sem" || has(&["kernel.shm", "kernel.msg", "fs.mqueue."]) {
            Some(Self::Ipc)
        } else if has(&["net."]) {
            Some(Self::Net)
        } else if has(&["user."]) {
            Some(Self::User)
        } else {
            None
        }
    }

    /// The name in messages, if the Pod shares this namespace with the host.
    fn shared_with_host(self, spec: &PodSpec) -> Option<&'static str> {
        match self {
            Self::Ipc => (spec.host_ipc == Some(true)).then_some("IPC"),
            Self::Net => (spec.host_network == Some(true)).then_some("Net"),
            Self::User => (spec.host_users != Some(false)).then_some("User"),
        }
    }
}

impl SysctlAllowlist {
    /// The safe sysctls, and names or patterns ending in `*` (`allowedUnsafeSysctls`).
    pub fn new(unsafe_patterns: &[String]) -> Result<Self, UnknownSysctl> {
        let mut list = Self { names: Vec::new(), prefixes: Vec::new() };
        for pattern in SAFE.into_iter().chain(unsafe_patterns.iter().map(String::as_str)) {
            let pattern = normalize(pattern);
            let (prefix, name) = (pattern.strip_suffix('*'), &pattern);
            let namespace = Namespace::of(prefix.unwrap_or(name)).ok_or_else(|| UnknownSysctl(pattern.clone()))?;
            match prefix {
                Some(prefix) => list.prefixes.push((prefix.to_owned(), namespace)),
                None => list.names.push((pattern, namespace)),
            }
        }
        Ok(list)
    }

    /// Checks all sysctls of a Pod; the error is the message for users.
    pub(super) fn check(&self, spec: &PodSpec) -> Result<(), String> {
        for sysctl in spec.security_context.iter().flat_map(|s| s.sysctls.iter().flatten()) {
            let name = normalize(&sysctl.name);
            let exact = self.names.iter().find(|(own, _)| *own == name);
            let allowed = exact.or_else(|| self.prefixes.iter().find(|(prefix, _)| name.starts_with(prefix.as_str())));
            let Some((_, namespace)) = allowed else { return Err(format!("{name:?} not allowlisted")) };
            if let Some(shared) = namespace.shared_with_host(spec) {
                return Err(format!("{name:?} not allowed with host {shared} enabled"));
            }
        }
        Ok(())
    }
}

/// Names with slashes as separators, written with dots: what separates and what does not changes places.
fn normalize(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(first) if name.as_bytes()[first] == b'/' => {
            let swap = |c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            };
            name.chars().map(swap).collect()
        }
        _ => name.to_owned(),
    }
}
