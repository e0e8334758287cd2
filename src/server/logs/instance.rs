//! Which instance of a container logs are asked of, by the Pod's status.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use crate::server::api::ApiError;

/// Whether the Pod's spec has a container, init container or ephemeral container of this name.
pub fn has_container(pod: &Pod, name: &str) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let ephemeral = spec.ephemeral_containers.iter().flatten().map(|container| &container.name);
        containers.map(|container| &container.name).chain(ephemeral).any(|found| found == name)
    })
}

fn status<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    lists.into_iter().flatten().flatten().find(|status| status.name == name)
}

/// The id (`<runtime>://<id>`) of the instance whose logs are meant, by the rules and with the texts of the
/// kubelet's `validateContainerLogStatus`.
///
/// # Errors
/// [`ApiError::BadRequest`] if there is no such instance (yet).
pub fn container_id<'a>(pod: &'a Pod, container: &str, previous: bool) -> Result<&'a str, ApiError> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let error = |text: String| Err(ApiError::BadRequest(text));
    let this = format!("container {container:?} in pod {name:?}");
    let Some(status) = status(pod, container) else { return error(format!("{this} is not available")) };
    let state = status.state.as_ref();
    let last = status.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    let last_id = last.and_then(|last| last.container_id.as_deref()).filter(|id| !id.is_empty());
    if previous {
        let missing = || ApiError::BadRequest(format!("previous terminated {this} not found"));
        return last_id.ok_or_else(missing);
    }
    if state.is_some_and(|state| state.running.is_some()) {
        return Ok(status.container_id.as_deref().unwrap_or_default());
    }
    let terminated = state.and_then(|state| state.terminated.as_ref());
    if terminated.is_some() || last.is_some() {
        // If its successor could not be started, the terminated state has no id, and the last one counts.
        let id = terminated.and_then(|state| state.container_id.as_deref()).filter(|id| !id.is_empty());
        return id.or(last_id).map_or_else(|| error(format!("{this} is terminated")), Ok);
    }
    let Some(waiting) = state.and_then(|state| state.waiting.as_ref()) else {
        return error(format!("{this} is waiting to start - no logs yet"));
    };
    error(match waiting.reason.as_deref().unwrap_or_default() {
        "ErrImagePull" => format!("{this} is waiting to start: image can't be pulled"),
        "ImagePullBackOff" => format!("{this} is waiting to start: trying and failing to pull image"),
        reason => format!("{this} is waiting to start: {reason}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        let pod = serde_json::json!({
            "metadata": {"name": "p"},
            "spec": {"containers": [{"name": "c"}], "initContainers": [{"name": "i"}]},
            "status": {"containerStatuses": [status]},
        });
        serde_json::from_value(pod).expect("pod")
    }

    fn status_of(state: serde_json::Value, last: serde_json::Value) -> serde_json::Value {
        serde_json::json!({"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "containerID": "x://current", "state": state, "lastState": last})
    }

    #[test]
    fn instances() {
        let ended = serde_json::json!({"terminated": {"exitCode": 0, "containerID": "x://last"}});
        let running = pod(status_of(serde_json::json!({"running": {}}), ended.clone()));
        assert_eq!(container_id(&running, "c", false), Ok("x://current"));
        assert_eq!(container_id(&running, "c", true), Ok("x://last"));
        let back_off = pod(status_of(serde_json::json!({"waiting": {"reason": "CrashLoopBackOff"}}), ended));
        assert_eq!(container_id(&back_off, "c", false), Ok("x://last"));
        let no_id = pod(status_of(serde_json::json!({"terminated": {"exitCode": 128}}), serde_json::json!({})));
        let text = container_id(&no_id, "c", false).expect_err("no logs").to_string();
        assert_eq!(text, "container \"c\" in pod \"p\" is terminated");
        let pulling = pod(status_of(serde_json::json!({"waiting": {"reason": "ErrImagePull"}}), serde_json::json!({})));
        let text = container_id(&pulling, "c", false).expect_err("no logs").to_string();
        assert_eq!(text, "container \"c\" in pod \"p\" is waiting to start: image can't be pulled");
        let text = container_id(&pulling, "c", true).expect_err("no logs").to_string();
        assert_eq!(text, "previous terminated container \"c\" in pod \"p\" not found");
        let text = container_id(&pulling, "i", false).expect_err("no logs").to_string();
        assert_eq!(text, "container \"i\" in pod \"p\" is not available");
        assert!(has_container(&pulling, "i") && !has_container(&pulling, "x"));
    }
}
