//! Seccomp filters: the default profile and the node's own files.
//!
//! Source: `getSeccompProfile` of the kubelet, containerd's `contrib/seccomp` for what `RuntimeDefault` allows, and
//! the OCI and Docker formats of profile files. In a filter `valueTwo` of `SCMP_CMP_MASKED_EQ` is the value and
//! `value` the mask, as the OCI specification has it.

mod default;
mod file;

use std::collections::BTreeSet;
use std::path::{Component, Path};

use k8s_openapi::api::core::v1::PodSpec;
use oci_spec::runtime::LinuxSeccomp;

use super::{NodeTraits, Security, SpecError};

pub use default::runtime_default;

/// The filter of a container; `None` is unconfined.
pub(super) fn profile(
    pod: &PodSpec,
    security: &Security<'_>,
    capabilities: &BTreeSet<String>,
    node: &NodeTraits,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    if security.privileged {
        return Ok(None);
    }
    let own = security.container.and_then(|s| s.seccomp_profile.as_ref());
    let profile = own.or(pod.security_context.as_ref().and_then(|s| s.seccomp_profile.as_ref()));
    match profile.map(|p| (p.type_.as_str(), p.localhost_profile.as_deref())) {
        None if node.seccomp_default => Ok(Some(runtime_default(capabilities))),
        None | Some(("Unconfined", _)) => Ok(None),
        Some(("RuntimeDefault", _)) => Ok(Some(runtime_default(capabilities))),
        Some(("Localhost", None | Some(""))) => Err(SpecError::NoLocalhostProfile),
        Some(("Localhost", Some(name))) => localhost(name, &node.seccomp_directory, capabilities).map(Some),
        Some((other, _)) => Err(SpecError::SeccompType(other.to_owned())),
    }
}

fn localhost(name: &str, directory: &Path, capabilities: &BTreeSet<String>) -> Result<LinuxSeccomp, SpecError> {
    let relative = Path::new(name);
    if !relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(SpecError::LocalhostProfilePath(name.to_owned()));
    }
    file::read(&directory.join(relative), capabilities)
}
