//! `downwardAPI` volumes. Source: `pkg/volume/downwardapi/downwardapi.go`.

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, Pod};

use crate::objects::{FieldContext, pod_volume_field, pod_volume_resource};

use super::atomic::{FileProjection, Payload};
use super::error::SetUpError;
use super::projected::{Defaults, file_mode, file_user};

/// The files of `items`.
pub(super) fn payload(
    pod: &Pod,
    items: Option<&[DownwardAPIVolumeFile]>,
    context: &FieldContext,
    defaults: Defaults,
) -> Result<Payload, SetUpError> {
    let mut payload = Payload::new();
    let mut errors = Vec::new();
    for item in items.unwrap_or_default() {
        match file(pod, item, context, defaults) {
            Ok(file) => drop(payload.insert(item.path.clone(), file)),
            Err(error) => errors.push(error),
        }
    }
    SetUpError::collect(errors).map(|()| payload)
}

fn file(
    pod: &Pod,
    item: &DownwardAPIVolumeFile,
    context: &FieldContext,
    defaults: Defaults,
) -> Result<FileProjection, SetUpError> {
    let text = if let Some(field) = &item.field_ref {
        pod_volume_field(pod, &field.field_path)?
    } else if let Some(resource) = &item.resource_field_ref {
        pod_volume_resource(pod, resource, context)?
    } else {
        let path = &item.path;
        return Err(SetUpError::Invalid(format!("downwardAPI item {path:?} needs fieldRef or resourceFieldRef")));
    };
    let mode = file_mode(item.mode, defaults)?;
    Ok(FileProjection { data: text.into_bytes(), mode, user: file_user(item.user)?.or(defaults.user) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn gives_fields_and_names_every_bad_one() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}
        }))
        .unwrap();
        let items = |value| serde_json::from_value::<Vec<DownwardAPIVolumeFile>>(value).unwrap();
        let defaults = Defaults { mode: 0o644, user: None };
        let mut context = FieldContext::default();
        let cpu = k8s_openapi::apimachinery::pkg::api::resource::Quantity("2".into());
        context.node_allocatable.insert("cpu".into(), cpu);
        let good = items(json!([
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}, "mode": 256},
            {"path": "cpu", "resourceFieldRef": {"containerName": "c", "resource": "limits.cpu", "divisor": "1m"}}]));
        let files = payload(&pod, Some(&good), &context, defaults).unwrap();
        assert_eq!(files["labels"], FileProjection { data: b"a=\"b\"".to_vec(), mode: 0o400, user: None });
        assert_eq!(files["cpu"].data, b"2000");
        let bad = items(json!([
            {"path": "x", "fieldRef": {"fieldPath": "spec.foo"}},
            {"path": "y", "resourceFieldRef": {"containerName": "d", "resource": "limits.cpu"}},
            {"path": "z"}]));
        assert_eq!(
            payload(&pod, Some(&bad), &context, defaults).unwrap_err().to_string(),
            "[unsupported fieldPath: spec.foo, container d not found, downwardAPI item \"z\" needs fieldRef or resourceFieldRef]"
        );
    }
}
