//! `config.json` as libcontainer may see it: without what we do ourselves, with what it needs to let us.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use caps::Capability;
use libcontainer::capabilities::CapabilityExt;
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Process, Spec};

use crate::shim::bundle::{CapabilitySets, SETUP_FILE, Setup};
use crate::shim::journal::note;
use crate::shim::protocol::CreateRequest;
use crate::sys::confine::{CapabilityMasks, bounding_set};

/// Lent to every process until the executor has loaded its filter: CAP_SYS_ADMIN to load it without `no_new_privs`,
/// CAP_SETPCAP to shrink the bounding set, CAP_DAC_READ_SEARCH to enter a working directory as runc does.
const LENT: [Capability; 3] = [Capability::CAP_SYS_ADMIN, Capability::CAP_SETPCAP, Capability::CAP_DAC_READ_SEARCH];

/// Reads `setup.json`.
pub(super) fn read_setup(container_dir: &Path) -> Result<Setup, String> {
    let path = container_dir.join(SETUP_FILE);
    let bytes = fs::read(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))
}

/// Reads `config.json`.
pub(super) fn read_spec(container_dir: &Path) -> Result<Spec, String> {
    let path = container_dir.join("config.json");
    Spec::load(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Kernel masks of the sets, without what this node does not have itself (a node in a container, for example).
pub(super) fn capability_masks(sets: &CapabilitySets) -> Result<CapabilityMasks, String> {
    let node = bounding_set();
    let mask = |names: &[String], what: &str| -> Result<u64, String> {
        let mut mask = 0;
        for name in names {
            let capability = Capability::from_str(name).map_err(|_| {
                format!("setup.json: capabilities.{what}: {name:?} is not a capability; use names like CAP_NET_RAW")
            })?;
            mask |= capability.bitmask();
        }
        if mask & !node != 0 {
            let missing: Vec<&str> = names
                .iter()
                .filter(|name| Capability::from_str(name).is_ok_and(|c| c.bitmask() & !node != 0))
                .map(String::as_str)
                .collect();
            if what == "bounding" {
                note!("warning: this node lacks {}: left out", missing.join(", "));
            }
        }
        Ok(mask & node)
    };
    Ok(CapabilityMasks {
        bounding: mask(&sets.bounding, "bounding")?,
        effective: mask(&sets.effective, "effective")?,
        permitted: mask(&sets.permitted, "permitted")?,
        inheritable: mask(&sets.inheritable, "inheritable")?,
        ambient: mask(&sets.ambient, "ambient")?,
    })
}

fn lent(masks: &CapabilityMasks) -> LinuxCapabilities {
    let node = bounding_set();
    let with_lent = |mask: u64| -> Option<Capabilities> {
        let mask = (mask | LENT.iter().fold(0, |all, c| all | c.bitmask())) & node;
        Some(
            caps::all()
                .into_iter()
                .filter(|c| c.bitmask() & mask != 0)
                .map(oci_spec::runtime::Capability::from_cap)
                .collect(),
        )
    };
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(with_lent(masks.bounding | masks.permitted));
    sets.set_effective(with_lent(masks.permitted));
    sets.set_permitted(with_lent(masks.permitted));
    sets.set_inheritable(None);
    sets.set_ambient(None);
    sets
}

/// A process for libcontainer; the executor restores what is changed here.
pub(super) fn adapt_process(process: &mut Process, masks: &CapabilityMasks, container: &Path) -> Result<(), String> {
    process.set_no_new_privileges(None);
    process.set_capabilities(Some(lent(masks)));
    process.set_cwd(PathBuf::from("/"));
    process.set_selinux_label(None);
    // Without HOME libcontainer would ask the C library for it, which would load code named by the image's nsswitch.conf.
    let env = process.env_mut().get_or_insert_default();
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        env.push("HOME=/".to_owned());
    }
    if let Some(wanted) = process.oom_score_adj() {
        process.set_oom_score_adj(Some(adjust_oom_score(wanted, container)?));
    }
    Ok(())
}

/// Sets this process' own value, which children inherit: the wanted one or, with a warning, what the kernel allows.
pub(super) fn adjust_oom_score(wanted: i32, container: &Path) -> Result<i32, String> {
    let allowed = possible_oom_score_adj(wanted).map_err(|e| format!("oomScoreAdj {wanted}: {e}"))?;
    if allowed != wanted {
        let container = container.display();
        note!("warning: {container}: oomScoreAdj {wanted} needs CAP_SYS_RESOURCE on the node: {allowed} instead");
    }
    Ok(allowed)
}

/// The wanted value or, where the kernel refuses to lower ours, ours. Tried on this short-lived process itself.
fn possible_oom_score_adj(wanted: i32) -> io::Result<i32> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let current = fs::read_to_string(FILE)?.trim().parse().map_err(io::Error::other)?;
    match fs::write(FILE, wanted.to_string()) {
        Ok(()) => Ok(wanted),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(current),
        Err(error) => Err(error),
    }
}

/// The whole spec for libcontainer. Returns it with the process as the agent wrote it.
pub(super) fn adapt(
    mut spec: Spec,
    request: &CreateRequest,
    masks: &CapabilityMasks,
) -> Result<(Spec, Process), String> {
    let mut process = spec.process().clone().ok_or("config.json has no process")?;
    process.set_terminal(Some(request.terminal));
    let wanted = process.clone();
    adapt_process(&mut process, masks, &request.container_dir)?;
    spec.set_process(Some(process));
    let mut linux = spec.linux().clone().ok_or("config.json has no linux")?;
    linux.set_seccomp(None);
    linux.set_cgroups_path(Some(request.cgroup_path.clone()));
    spec.set_linux(Some(linux));
    let mut root = spec.root().clone().ok_or("config.json has no root")?;
    root.set_path(request.container_dir.join(root.path()));
    spec.set_root(Some(root));
    Ok((spec, wanted))
}
