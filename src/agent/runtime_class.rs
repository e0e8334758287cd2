//! RuntimeClasses: a node has one runtime, and says so of every other.
//!
//! Source: `pkg/kubelet/runtimeclass`; the words are those of kubelet and containerd.

use std::time::Duration;

use k8s_openapi::api::core::v1::PodSpec;
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::Api;

use super::node::Node;

/// Handler that a RuntimeClass names when it means the ordinary OCI runtime, which is built in.
const OWN_HANDLER: &str = "runc";
/// Longest wait for a RuntimeClass.
const RUNTIME_CLASS_DEADLINE: Duration = Duration::from_secs(20);

fn check_handler(class: &str, handler: &str) -> Result<(), String> {
    if handler == OWN_HANDLER {
        return Ok(());
    }
    Err(format!(
        "no runtime for {handler:?} is configured, which spec.runtimeClassName {class} asks for: this node has its own only, whose handler is {OWN_HANDLER:?}"
    ))
}

impl Node {
    /// Whether the Pod's RuntimeClass is this node's runtime. Nothing of the class but its handler is the node's
    /// business: overhead and node selector were put into the Pod when it was created.
    pub(super) async fn runtime_class(&self, spec: &PodSpec) -> Result<(), String> {
        let Some(name) = spec.runtime_class_name.as_deref().filter(|name| !name.is_empty()) else { return Ok(()) };
        let api = self.api.as_ref().ok_or_else(|| {
            format!(
                "spec.runtimeClassName: {name}: there are no RuntimeClasses without an API server; remove the field"
            )
        })?;
        let classes: Api<RuntimeClass> = Api::all(api.client());
        let answer = tokio::time::timeout(RUNTIME_CLASS_DEADLINE, classes.get_opt(name)).await;
        let class = answer
            .map_err(|_| format!("no answer on RuntimeClass {name} within {} s", RUNTIME_CLASS_DEADLINE.as_secs()))?
            .map_err(|error| format!("read RuntimeClass {name}: {error}"))?
            .ok_or_else(|| format!("RuntimeClass {name:?} not found"))?;
        check_handler(name, &class.handler)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_runtimes_are_refused_by_name() {
        assert_eq!(check_handler("plain", "runc"), Ok(()));
        let error = check_handler("safe", "kata").unwrap_err();
        assert!(error.starts_with("no runtime for \"kata\" is configured") && error.contains("safe"), "{error}");
    }
}
