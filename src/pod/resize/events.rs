//! The events of a resize, with what the Pod has or is to have as JSON.
//!
//! Source: `pkg/kubelet/events/resize.go`.

use k8s_openapi::api::core::v1::{Container, ResourceRequirements};
use serde::Serialize;

use super::{Pending, Resources};
use crate::pod::fold::Notice;
use crate::pod::model::Desired;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    init_containers: Vec<Part<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    containers: Vec<Part<'a>>,
    generation: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct Part<'a> {
    name: &'a str,
    resources: ResourceRequirements,
}

fn list<'a>(containers: Option<&'a Vec<Container>>, resources: &Resources) -> Vec<Part<'a>> {
    let of = |container: &'a Container| Part {
        name: &container.name,
        resources: resources.containers.get(&container.name).cloned().unwrap_or_default(),
    };
    containers.into_iter().flatten().map(of).collect()
}

fn notice(
    reason: &str,
    warning: bool,
    what: &str,
    desired: &Desired,
    resources: &Resources,
    generation: Option<i64>,
    error: Option<&str>,
) -> Notice {
    let spec = desired.pod.spec.as_ref();
    let summary = Summary {
        init_containers: list(spec.and_then(|s| s.init_containers.as_ref()), resources),
        containers: list(spec.map(|s| &s.containers), resources),
        generation: generation.unwrap_or_default(),
        error,
    };
    let message = match serde_json::to_string(&summary) {
        Ok(json) => format!("{what}: {json}"),
        Err(_) => what.to_owned(),
    };
    Notice { warning, reason: reason.to_owned(), message, container: None }
}

/// `ResizeStarted`: the change is allocated.
pub(super) fn started(desired: &Desired, wanted: &Resources, generation: Option<i64>) -> Notice {
    notice("ResizeStarted", false, "Pod resize started", desired, wanted, generation, None)
}

/// `ResizeCompleted`: the Pod has what was allocated.
pub(in crate::pod) fn completed(desired: &Desired, generation: Option<i64>) -> Notice {
    let allocated = Resources::of(&desired.pod);
    notice("ResizeCompleted", false, "Pod resize completed", desired, &allocated, generation, None)
}

/// `ResizeDeferred` or `ResizeInfeasible`.
pub(super) fn pending(desired: &Desired, pending: &Pending) -> Notice {
    let (reason, what) = if pending.infeasible {
        ("ResizeInfeasible", "Pod resize Infeasible")
    } else {
        ("ResizeDeferred", "Pod resize Deferred")
    };
    notice(reason, true, what, desired, &pending.wanted, pending.generation, Some(&pending.message))
}

/// `ResizeError`: it was allocated, and the kernel or the containers' use of memory does not allow it yet.
pub(super) fn failed(desired: &Desired, generation: Option<i64>, error: &str) -> Notice {
    let allocated = Resources::of(&desired.pod);
    notice("ResizeError", true, "Pod resize error", desired, &allocated, generation, Some(error))
}
