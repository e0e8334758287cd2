//! API objects that Pods refer to (ConfigMaps, Secrets, ClusterTrustBundles, tokens, certificates), and the fields of a Pod that env and volumes expose.
//!
//! | file | what it holds |
//! |---|---|
//! | `cache.rs` | ConfigMaps and Secrets, each watched by name as long as a Pod of this node refers to it |
//! | `follow.rs` | the watch of one of them |
//! | `secret.rs` | a Secret that never shows its values |
//! | `error.rs` | why an object cannot be had |
//! | `references.rs` | which objects a Pod refers to |
//! | `trust_bundles.rs` | ClusterTrustBundles, watched together as long as a Pod of this node shows one |
//! | `pem.rs` | PEM as Go reads and writes it |
//! | `certificates.rs` | certificates of Pods, requested when needed and renewed in time |
//! | `certificate_request.rs` | one request for one, and its answer |
//! | `certificate_key.rs` | their keys |
//! | `tokens.rs` | ServiceAccount tokens bound to a Pod |
//! | `services.rs` | Services, and the environment variables made of them |
//! | `fields.rs` | `fieldRef` and `resourceFieldRef`, pure |

mod cache;
mod certificate_key;
mod certificate_request;
mod certificates;
mod error;
mod fields;
mod follow;
mod pem;
mod references;
mod secret;
mod services;
mod tokens;
mod trust_bundles;

#[cfg(test)]
pub(crate) mod fake_api;

pub use cache::{CacheOptions, Change, ObjectCache};
pub use certificates::{CertificateError, CertificateManager, CertificateOptions, Credential, WarningSink};
pub use error::ObjectError;
pub use fields::{
    FieldContext, FieldError, env_field, env_resource, pod_volume_field, pod_volume_resource, split_subscript,
};
pub use references::{ObjectKey, ObjectKind, References};
pub use secret::SecretObject;
pub use services::{ServiceCache, ServicesNotRead, service_environment};
pub use tokens::{Token, TokenError, TokenKey, TokenManager};
pub use trust_bundles::TrustBundleError;
