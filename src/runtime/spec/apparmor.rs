//! AppArmor profiles.
//!
//! Source: `pkg/security/apparmor`. Fields come before the annotation that older manifests use.

use k8s_openapi::api::core::v1::{AppArmorProfile, PodSpec};

use super::{ContainerInput, Security, SpecError};

const ANNOTATION_PREFIX: &str = "container.apparmor.security.beta.kubernetes.io/";

/// The profile to set before the program starts; `None` sets none.
pub(super) fn profile(input: &ContainerInput<'_>, security: &Security<'_>) -> Result<Option<String>, SpecError> {
    if security.privileged {
        return Ok(None);
    }
    let pod = input.pod.spec.as_ref();
    let asked = security
        .container
        .and_then(|s| s.app_armor_profile.as_ref().map(of_field))
        .or_else(|| of_annotation(input))
        .or_else(|| pod.and_then(|p: &PodSpec| p.security_context.as_ref()?.app_armor_profile.as_ref().map(of_field)));
    let node = input.node;
    let refuse = |profile: &str, reason| Err(SpecError::AppArmor { profile: profile.to_owned(), reason });
    match asked {
        None => Ok(node.apparmor_default.clone().filter(|_| node.apparmor)),
        Some(Asked::Unconfined) => Ok(None),
        Some(Asked::Default) if !node.apparmor => refuse("RuntimeDefault", "AppArmor is not enabled on the host"),
        Some(Asked::Default) => match &node.apparmor_default {
            Some(name) => Ok(Some(name.clone())),
            None => refuse("RuntimeDefault", "the node has not loaded a default profile"),
        },
        Some(Asked::Localhost(name)) if !node.apparmor => refuse(&name, "AppArmor is not enabled on the host"),
        Some(Asked::Localhost(name)) => Ok(Some(name)),
        Some(Asked::Unknown(name)) => refuse(&name, "use RuntimeDefault, Localhost or Unconfined"),
    }
}

enum Asked {
    Default,
    Unconfined,
    Localhost(String),
    Unknown(String),
}

fn of_field(profile: &AppArmorProfile) -> Asked {
    match profile.type_.as_str() {
        "RuntimeDefault" => Asked::Default,
        "Unconfined" => Asked::Unconfined,
        "Localhost" => Asked::Localhost(profile.localhost_profile.clone().unwrap_or_default()),
        other => Asked::Unknown(other.to_owned()),
    }
}

fn of_annotation(input: &ContainerInput<'_>) -> Option<Asked> {
    let annotations = input.pod.metadata.annotations.as_ref()?;
    let value = annotations.get(&format!("{ANNOTATION_PREFIX}{}", input.container.name))?;
    Some(match value.as_str() {
        "runtime/default" => Asked::Default,
        "unconfined" => Asked::Unconfined,
        other => match other.strip_prefix("localhost/") {
            Some(name) => Asked::Localhost(name.to_owned()),
            None => Asked::Unknown(other.to_owned()),
        },
    })
}
