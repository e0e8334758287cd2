//! `secret` volumes, on tmpfs only. Source: `pkg/volume/secret/secret.go`.

use k8s_openapi::api::core::v1::KeyToPath;

use crate::objects::{ObjectCache, SecretObject};

use super::atomic::Payload;
use super::config_map::project;
use super::error::SetUpError;
use super::projected::Defaults;

/// The files of Secret `name`; none if it is missing and `optional`.
pub(super) async fn payload(
    objects: &ObjectCache,
    namespace: &str,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: bool,
    defaults: Defaults,
) -> Result<Payload, SetUpError> {
    match objects.secret(namespace, name).await {
        Ok(secret) => files(&secret, items, optional, defaults),
        Err(error) if optional && error.is_not_found() => Ok(Payload::new()),
        Err(error) => Err(error.into()),
    }
}

fn files(
    secret: &SecretObject,
    items: Option<&[KeyToPath]>,
    optional: bool,
    defaults: Defaults,
) -> Result<Payload, SetUpError> {
    let all = secret.data.iter().map(|(key, value)| (key, value.as_slice()));
    let find = |key: &str| secret.data.get(key).map(Vec::as_slice);
    project(all, find, items, optional, defaults, |key| format!("references non-existent secret key: {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_missing_key_is_named_as_kubelet_names_it() {
        let secret = SecretObject {
            namespace: "ns".into(),
            name: "s".into(),
            type_: "Opaque".into(),
            data: [("k".to_owned(), b"v".to_vec())].into(),
        };
        let defaults = Defaults { mode: 0o640, user: Some(7) };
        let all = files(&secret, None, false, defaults).unwrap();
        assert_eq!((all["k"].mode, all["k"].user), (0o640, Some(7)));
        let items: Vec<KeyToPath> = serde_json::from_value(json!([{"key": "x", "path": "p"}])).unwrap();
        let error = files(&secret, Some(&items), false, defaults).unwrap_err();
        assert_eq!(error.to_string(), "references non-existent secret key: x");
    }
}
