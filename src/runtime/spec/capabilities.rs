//! Capability sets.
//!
//! Source: containerd `pkg/oci/spec.go` (the default set), its CRI plugin (add, drop, `ALL`) and CVE-2022-24769
//! (nothing is inheritable). Names are without prefix until [`sets`].

use std::collections::BTreeSet;
use std::str::FromStr;

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::Security;
use crate::shim::bundle::CapabilitySets;

/// What a container has when it asks for nothing.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// What the executor needs to load a seccomp filter without `no_new_privs` and to shrink the bounding set.
const LENT: [Capability; 2] = [Capability::SysAdmin, Capability::Setpcap];

/// The capabilities of a container's processes, as far as the node has them itself.
///
/// One that it lacks, or that does not exist, is left out with a line in the log, as runc does.
pub(super) fn wanted(security: &Security<'_>, node: &BTreeSet<String>) -> BTreeSet<String> {
    if security.privileged {
        return node.clone();
    }
    let asked = security.container.and_then(|s| s.capabilities.as_ref());
    let names =
        |list: Option<&Vec<String>>| -> Vec<String> { list.into_iter().flatten().map(|n| normalize(n)).collect() };
    let add = names(asked.and_then(|c| c.add.as_ref()));
    let drop = names(asked.and_then(|c| c.drop.as_ref()));
    let all = |list: &[String]| list.iter().any(|name| name == "ALL");

    let mut result: BTreeSet<String> = DEFAULT.map(str::to_owned).into();
    if all(&add) {
        result.clone_from(node);
    }
    if all(&drop) {
        result.clear();
    }
    result.extend(add.iter().filter(|name| *name != "ALL").cloned());
    for name in &drop {
        result.remove(name);
    }
    result.retain(|name| {
        let available = node.contains(name);
        if !available {
            tracing::warn!(capability = %name, "capability is unknown to this node or not its to give: left out");
        }
        available
    });
    result
}

fn normalize(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").map_or(upper.clone(), str::to_owned)
}

/// The sets that a process ends up with.
pub(super) fn sets(wanted: &BTreeSet<String>) -> CapabilitySets {
    let names: Vec<String> = wanted.iter().map(|name| format!("CAP_{name}")).collect();
    CapabilitySets {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        inheritable: Vec::new(),
        ambient: Vec::new(),
    }
}

/// The sets that libcontainer applies: with what is lent to the executor.
pub(super) fn with_lent(wanted: &BTreeSet<String>) -> LinuxCapabilities {
    let mut all: Capabilities = wanted.iter().filter_map(|name| Capability::from_str(name).ok()).collect();
    all.extend(LENT);
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(all.clone()));
    sets.set_effective(Some(all.clone()));
    sets.set_permitted(Some(all));
    sets.set_inheritable(None);
    sets.set_ambient(None);
    sets
}
