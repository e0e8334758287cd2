//! Why an object cannot be had.

use super::references::ObjectKind;

/// An object that cannot be had. All but [`ObjectError::Standalone`] are worth a retry: objects get created, rights
/// get granted and servers come back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// The API server says that there is no such object.
    #[error("{kind} \"{name}\" not found")]
    NotFound {
        /// What was asked for.
        kind: ObjectKind,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The node may not read it, even after the time that the authorizer needs to learn of a new Pod.
    #[error("{message}")]
    Forbidden {
        /// What the API server says.
        message: String,
    },
    /// The API server did not answer, or not in time.
    #[error("failed to sync {kind} cache: {reason}")]
    Unavailable {
        /// What was asked for.
        kind: ObjectKind,
        /// Why it failed.
        reason: String,
    },
    /// No registered Pod refers to it.
    #[error("object {namespace:?}/{name:?} not registered")]
    NotRegistered {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// There is no API server. Terminal: a static Pod of such a node may not refer to API objects.
    #[error(
        "{kind} {namespace}/{name} cannot be read because this node has no API server: a static Pod may not refer to API objects, put the value into the manifest or use a hostPath volume"
    )]
    Standalone {
        /// What was asked for.
        kind: ObjectKind,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

impl ObjectError {
    /// Whether the object is known not to exist, which `optional: true` allows.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}
