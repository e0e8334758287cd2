//! Kernel parameters of namespaces, written through `/proc/sys` by a thread that has entered them.
//!
//! `/proc/sys/net` shows the network namespace of the task that opens it, and `kernel.shm*`, `kernel.msg*`,
//! `kernel.sem` and `fs.mqueue.*` its IPC namespace: the same paths serve the node and every Pod.

use std::fs;
use std::io;
use std::path::PathBuf;

/// Why a parameter of a Pod cannot be set. All are terminal for the Pod except `Write`, whose source decides.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// Not a name that can be a path below `/proc/sys`.
    #[error("sysctl name {0:?} is malformed: write it with dots, such as net.ipv4.tcp_syncookies")]
    Malformed(String),
    /// Not in a namespace of its own.
    #[error(
        "sysctl {0:?} is not namespaced: it would change the node; only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* are possible in a Pod"
    )]
    NotNamespaced(String),
    /// The Pod shares the namespace with the node.
    #[error("sysctl {name:?} is not allowed with {field}: it would change the node")]
    NodeNamespace {
        /// The sysctl.
        name: String,
        /// `hostNetwork` or `hostIPC`.
        field: &'static str,
    },
    /// The kernel refused the value.
    #[error("set sysctl {name}={value}: {source}")]
    Write {
        /// The sysctl.
        name: String,
        /// The refused value.
        value: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// The namespace that holds a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Net,
    Ipc,
}

/// Refuses what a Pod may not set (the same groups as kubelet's `pkg/kubelet/sysctl/namespace.go`).
pub fn check(sysctls: &[(String, String)], host_network: bool, host_ipc: bool) -> Result<(), SysctlError> {
    for (name, _) in sysctls {
        path(name)?;
        let shared = match holder(&normalize(name)) {
            None => return Err(SysctlError::NotNamespaced(name.clone())),
            Some(Holder::Net) => host_network.then_some("hostNetwork"),
            Some(Holder::Ipc) => host_ipc.then_some("hostIPC"),
        };
        if let Some(field) = shared {
            return Err(SysctlError::NodeNamespace { name: name.clone(), field });
        }
    }
    Ok(())
}

fn holder(normalized: &str) -> Option<Holder> {
    let ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."];
    if normalized.starts_with("net.") {
        Some(Holder::Net)
    } else if normalized == "kernel.sem" || ipc.iter().any(|prefix| normalized.starts_with(prefix)) {
        Some(Holder::Ipc)
    } else {
        None
    }
}

/// Writes a parameter in the namespaces of the calling thread.
pub fn write(name: &str, value: &str) -> Result<(), SysctlError> {
    let failed = |source| SysctlError::Write { name: name.to_owned(), value: value.to_owned(), source };
    fs::write(path(name)?, value).map_err(failed)
}

/// Reads a parameter in the namespaces of the calling thread.
pub fn read(name: &str) -> io::Result<String> {
    let path = path(name).map_err(io::Error::other)?;
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

/// With the first separator being a slash, slashes and dots have changed roles (sysctl.d(5)).
fn normalize(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => swap(name),
        _ => name.to_owned(),
    }
}

fn swap(name: &str) -> String {
    let other = |letter| match letter {
        '.' => '/',
        '/' => '.',
        letter => letter,
    };
    name.chars().map(other).collect()
}

fn path(name: &str) -> Result<PathBuf, SysctlError> {
    let relative = swap(&normalize(name));
    let fits = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if !relative.contains('/') || !relative.split('/').all(fits) {
        return Err(SysctlError::Malformed(name.to_owned()));
    }
    Ok(PathBuf::from("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths() {
        let text = |name: &str| path(name).map(|path| path.display().to_string()).map_err(|error| error.to_string());
        assert_eq!(text("net.ipv4.ip_forward").unwrap(), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(text("net/ipv4/ip_forward").unwrap(), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(text("net.ipv4.conf.eth0/7.forwarding").unwrap(), "/proc/sys/net/ipv4/conf/eth0.7/forwarding");
        assert_eq!(text("net/ipv4/conf/eth0.7/forwarding").unwrap(), "/proc/sys/net/ipv4/conf/eth0.7/forwarding");
        for hostile in ["", "net", "net..x", "net.//.x", "/../../etc/passwd", "net.ipv4.", "net.a\0b"] {
            assert!(text(hostile).is_err(), "{hostile:?}");
        }
    }

    #[test]
    fn only_the_pods_own_namespaces_are_written() {
        let one = |name: &str| vec![(name.to_owned(), "1".to_owned())];
        for name in
            ["net.core.somaxconn", "net/core/somaxconn", "kernel.shm_rmid_forced", "kernel.sem", "fs.mqueue.msg_max"]
        {
            check(&one(name), false, false).unwrap();
        }
        for name in ["kernel.core_pattern", "vm.swappiness", "fs.file-max", "kernel.semaphore"] {
            assert!(matches!(check(&one(name), false, false), Err(SysctlError::NotNamespaced(_))), "{name}");
        }
        let refused = check(&one("net.core.somaxconn"), true, false).unwrap_err();
        assert!(refused.to_string().contains("hostNetwork"), "{refused}");
        check(&one("net.core.somaxconn"), false, true).unwrap();
        let refused = check(&one("kernel.msgmax"), false, true).unwrap_err();
        assert!(refused.to_string().contains("hostIPC"), "{refused}");
    }
}
