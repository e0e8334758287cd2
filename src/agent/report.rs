//! Pod status and deletion at the API server.
//!
//! Source: `pkg/util/pod/pod.go` (`PatchPodStatus`) and `pkg/kubelet/status/status_manager.go` (`syncPod`): a
//! strategic-merge patch of what has changed, with the UID as precondition and no resource version.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::{Map, Value, json};

use crate::pod::effects::ApiAnswer;
use crate::pod::model::Desired;
use crate::pod::resize::status::{IN_PROGRESS, PENDING};

/// Longest wait for an answer of the API server.
const DEADLINE: Duration = Duration::from_secs(20);

/// Lists that are merged by a key and therefore replaced as a whole when they change.
const REPLACED_LISTS: [&str; 2] = ["podIPs", "hostIPs"];

/// The patch that makes `base` into `status`; `None` if nothing differs.
#[must_use]
pub fn status_patch(uid: &str, base: &PodStatus, status: &PodStatus) -> Option<Value> {
    let (Ok(Value::Object(base)), Ok(Value::Object(status))) =
        (serde_json::to_value(base), serde_json::to_value(status))
    else {
        return None;
    };
    let mut patch = Map::new();
    for (key, value) in &status {
        if base.get(key) == Some(value) {
            continue;
        }
        let change = match (key.as_str(), value) {
            ("resources" | "allocatedResources", Value::Object(new)) => merge(base.get(key), new),
            ("conditions", Value::Array(list)) => changed_conditions(list, base.get(key)),
            (name, Value::Array(list)) if REPLACED_LISTS.contains(&name) => {
                let mut all = vec![json!({"$patch": "replace"})];
                all.extend(list.iter().cloned());
                Value::Array(all)
            }
            _ => value.clone(),
        };
        patch.insert(key.clone(), change);
    }
    for key in base.keys().filter(|key| !status.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    (!patch.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": patch}))
}

/// What makes one map into another when it is merged into it: entries that went away are sent as null.
fn merge(base: Option<&Value>, new: &Map<String, Value>) -> Value {
    let old = base.and_then(Value::as_object);
    let mut patch: Map<String, Value> = Map::new();
    for (key, value) in new {
        let before = old.and_then(|old| old.get(key));
        match value {
            same if before == Some(same) => {}
            Value::Object(inner) => {
                patch.insert(key.clone(), merge(before, inner));
            }
            value => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    for key in old.into_iter().flat_map(Map::keys).filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    Value::Object(patch)
}

/// Conditions are merged by type: only those that differ are sent, so that nobody else's are touched. A field that
/// went away is sent as null. Conditions that come and go are the node's own: they are deleted by name.
fn changed_conditions(list: &[Value], base: Option<&Value>) -> Value {
    let old = base.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let changed = list.iter().filter(|condition| !old.contains(condition)).map(|condition| {
        let mut condition = condition.clone();
        let before = old.iter().find(|c| c["type"] == condition["type"]).and_then(Value::as_object);
        if let Some(fields) = condition.as_object_mut() {
            for key in before.into_iter().flat_map(Map::keys) {
                fields.entry(key.clone()).or_insert(Value::Null);
            }
        }
        condition
    });
    let gone = [IN_PROGRESS, PENDING].into_iter().filter(|kind| {
        let has = |list: &[Value]| list.iter().any(|condition| condition["type"] == **kind);
        has(old) && !has(list)
    });
    Value::Array(changed.chain(gone.map(|kind| json!({"$patch": "delete", "type": kind}))).collect())
}

/// Sends the difference between `base` and `status`.
pub async fn report(client: &Client, desired: &Desired, base: &PodStatus, status: &PodStatus) -> ApiAnswer {
    let meta = &desired.pod.metadata;
    let Some(patch) = status_patch(desired.uid(), base, status) else {
        return ApiAnswer::Accepted {
            status: Box::new(status.clone()),
            resource_version: meta.resource_version.clone(),
        };
    };
    let api = pods(client, desired);
    let name = meta.name.as_deref().unwrap_or_default();
    let (patch, params) = (Patch::Strategic(patch), PatchParams::default());
    let request = api.patch_status(name, &params, &patch);
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(pod)) => ApiAnswer::Accepted {
            status: Box::new(pod.status.unwrap_or_default()),
            resource_version: pod.metadata.resource_version,
        },
        Ok(Err(error)) => answer(&error),
        Err(_) => ApiAnswer::Failed(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}

/// Deletes the object at once, if it is still the one this node ran.
pub async fn delete(client: &Client, desired: &Desired) -> ApiAnswer {
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: Some(desired.uid().to_owned()), resource_version: None }),
        ..DeleteParams::default()
    };
    let api = pods(client, desired);
    let request = api.delete(desired.pod.metadata.name.as_deref().unwrap_or_default(), &params);
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(_)) => ApiAnswer::Gone,
        Ok(Err(error)) => answer(&error),
        Err(_) => ApiAnswer::Failed(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}

fn pods(client: &Client, desired: &Desired) -> Api<Pod> {
    Api::namespaced(client.clone(), desired.pod.metadata.namespace.as_deref().unwrap_or("default"))
}

/// 404: no such Pod; 409: another Pod of that name has taken its place.
fn answer(error: &kube::Error) -> ApiAnswer {
    match error {
        kube::Error::Api(status) if status.code == 404 || status.code == 409 => ApiAnswer::Gone,
        error => ApiAnswer::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodCondition, PodIP, ResourceRequirements};
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;

    fn condition(kind: &str, reason: Option<&str>) -> PodCondition {
        PodCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: reason.map(str::to_owned),
            ..PodCondition::default()
        }
    }

    #[test]
    fn sends_only_what_differs() {
        let base = PodStatus {
            phase: Some("Pending".to_owned()),
            reason: Some("Old".to_owned()),
            conditions: Some(vec![condition("PodScheduled", None), condition("Ready", Some("No"))]),
            ..PodStatus::default()
        };
        let status = PodStatus {
            phase: Some("Running".to_owned()),
            conditions: Some(vec![condition("PodScheduled", None), condition("Ready", None)]),
            pod_ips: Some(vec![PodIP { ip: "10.0.0.2".to_owned() }]),
            ..PodStatus::default()
        };
        let patch = status_patch("u", &base, &status).unwrap();
        assert_eq!(
            patch,
            json!({"metadata": {"uid": "u"}, "status": {
                "phase": "Running",
                "reason": null,
                "conditions": [{"type": "Ready", "status": "True", "reason": null}],
                "podIPs": [{"$patch": "replace"}, {"ip": "10.0.0.2"}],
            }})
        );
        assert_eq!(status_patch("u", &status, &status), None);
    }

    #[test]
    fn what_goes_away_is_named() {
        let quantities = |list: &[(&str, &str)]| {
            Some(list.iter().map(|(name, text)| ((*name).to_owned(), Quantity((*text).to_owned()))).collect())
        };
        let base = PodStatus {
            conditions: Some(vec![condition("Other", None), condition(PENDING, None), condition(IN_PROGRESS, None)]),
            allocated_resources: quantities(&[("cpu", "1"), ("memory", "1Mi")]),
            resources: Some(ResourceRequirements {
                limits: quantities(&[("cpu", "1")]),
                requests: quantities(&[("cpu", "1"), ("memory", "1Mi")]),
                ..ResourceRequirements::default()
            }),
            ..PodStatus::default()
        };
        let status = PodStatus {
            conditions: Some(vec![condition(IN_PROGRESS, None)]),
            allocated_resources: quantities(&[("cpu", "2")]),
            resources: Some(ResourceRequirements { requests: quantities(&[("cpu", "2")]), ..Default::default() }),
            ..PodStatus::default()
        };
        assert_eq!(
            status_patch("u", &base, &status).unwrap()["status"],
            json!({
                "conditions": [{"$patch": "delete", "type": PENDING}],
                "allocatedResources": {"cpu": "2", "memory": null},
                "resources": {"requests": {"cpu": "2", "memory": null}, "limits": null},
            })
        );
    }
}
