//! `configMap` volumes. Source: `pkg/volume/configmap/configmap.go`.

use k8s_openapi::api::core::v1::{ConfigMap, KeyToPath};

use crate::objects::ObjectCache;

use super::atomic::{FileProjection, Payload};
use super::error::SetUpError;
use super::projected::{Defaults, file_user};

/// The files of ConfigMap `name`; none if it is missing and `optional`.
pub(super) async fn payload(
    objects: &ObjectCache,
    namespace: &str,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: bool,
    defaults: Defaults,
) -> Result<Payload, SetUpError> {
    match objects.config_map(namespace, name).await {
        Ok(config_map) => files(&config_map, items, optional, defaults),
        Err(error) if optional && error.is_not_found() => Ok(Payload::new()),
        Err(error) => Err(error.into()),
    }
}

fn files(
    config_map: &ConfigMap,
    items: Option<&[KeyToPath]>,
    optional: bool,
    defaults: Defaults,
) -> Result<Payload, SetUpError> {
    let text = config_map.data.iter().flatten().map(|(key, value)| (key, value.as_bytes()));
    let binary = config_map.binary_data.iter().flatten().map(|(key, value)| (key, value.0.as_slice()));
    let find = |key: &str| -> Option<&[u8]> {
        let text = config_map.data.as_ref().and_then(|data| data.get(key)).map(String::as_bytes);
        text.or_else(|| config_map.binary_data.as_ref().and_then(|data| data.get(key)).map(|value| value.0.as_slice()))
    };
    project(text.chain(binary), find, items, optional, defaults, |key| {
        format!("configmap references non-existent config key: {key}")
    })
}

/// Turns keys and values into files: all of them, or the listed `items`.
pub(super) fn project<'a>(
    all: impl Iterator<Item = (&'a String, &'a [u8])>,
    find: impl Fn(&str) -> Option<&'a [u8]>,
    items: Option<&[KeyToPath]>,
    optional: bool,
    defaults: Defaults,
    missing: impl Fn(&str) -> String,
) -> Result<Payload, SetUpError> {
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        let file = |data: &[u8]| FileProjection { data: data.to_vec(), mode: defaults.mode, user: defaults.user };
        return Ok(all.map(|(key, data)| (key.clone(), file(data))).collect());
    };
    let mut payload = Payload::new();
    for item in items {
        let Some(data) = find(&item.key) else {
            if optional {
                continue;
            }
            return Err(SetUpError::MissingKey(missing(&item.key)));
        };
        let mode = super::projected::file_mode(item.mode, defaults)?;
        let user = file_user(item.user)?.or(defaults.user);
        payload.insert(item.path.clone(), FileProjection { data: data.to_vec(), mode, user });
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DEFAULTS: Defaults = Defaults { mode: 0o644, user: None };

    fn config_map() -> ConfigMap {
        serde_json::from_value(json!({"data": {"a": "1", "b": "2"}, "binaryData": {"bin": "AP8="}})).unwrap()
    }

    fn items(items: serde_json::Value) -> Vec<KeyToPath> {
        serde_json::from_value(items).unwrap()
    }

    #[test]
    fn all_keys_or_the_listed_ones() {
        let all = files(&config_map(), None, false, DEFAULTS).unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["a", "b", "bin"]);
        assert_eq!(all["bin"].data, [0, 255]);
        let listed = items(json!([{"key": "b", "path": "x/y", "mode": 256}, {"key": "bin", "path": "z"}]));
        let some = files(&config_map(), Some(&listed), false, DEFAULTS).unwrap();
        assert_eq!(some["x/y"], FileProjection { data: b"2".to_vec(), mode: 0o400, user: None });
        assert_eq!((some["z"].mode, some.len()), (0o644, 2));
    }

    #[test]
    fn a_missing_key_is_an_error_unless_optional() {
        let listed = items(json!([{"key": "none", "path": "x"}, {"key": "a", "path": "y"}]));
        let error = files(&config_map(), Some(&listed), false, DEFAULTS).unwrap_err();
        assert_eq!(error.to_string(), "configmap references non-existent config key: none");
        assert_eq!(files(&config_map(), Some(&listed), true, DEFAULTS).unwrap().len(), 1);
        let bad = items(json!([{"key": "a", "path": "y", "mode": 4096}]));
        assert!(matches!(files(&config_map(), Some(&bad), true, DEFAULTS), Err(SetUpError::Invalid(_))));
    }
}
