//! Secrets, kept out of logs.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::Secret;

/// A Secret as a node needs it. `Debug` shows the keys, never the values.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretObject {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `type`, for example `kubernetes.io/dockerconfigjson`.
    pub type_: String,
    /// `data`, decoded.
    pub data: BTreeMap<String, Vec<u8>>,
}

impl fmt::Debug for SecretObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretObject")
            .field("namespace", &self.namespace)
            .field("name", &self.name)
            .field("type", &self.type_)
            .field("keys", &self.data.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl From<Secret> for SecretObject {
    fn from(secret: Secret) -> Self {
        Self {
            namespace: secret.metadata.namespace.unwrap_or_default(),
            name: secret.metadata.name.unwrap_or_default(),
            type_: secret.type_.unwrap_or_default(),
            data: secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect(),
        }
    }
}
