//! API objects that Pods refer to (ConfigMaps, Secrets, tokens), and the fields of a Pod that env and volumes expose.
//!
//! | file | what it holds |
//! |---|---|
//! | `cache.rs` | ConfigMaps and Secrets, each watched by name as long as a Pod of this node refers to it |
//! | `references.rs` | which objects a Pod refers to |
//! | `tokens.rs` | ServiceAccount tokens bound to a Pod |
//! | `services.rs` | Services, and the environment variables made of them |
//! | `fields.rs` | `fieldRef` and `resourceFieldRef`, pure |

mod cache;
mod fields;
mod references;
mod services;
mod tokens;

#[cfg(test)]
pub(crate) mod fake_api;

pub use cache::{CacheOptions, ObjectCache, ObjectError, SecretObject};
pub use fields::{
    FieldContext, FieldError, env_field, env_resource, pod_volume_field, pod_volume_resource, split_subscript,
};
pub use references::{ObjectKey, ObjectKind, References};
pub use services::{ServiceCache, ServicesNotRead, service_environment};
pub use tokens::{Token, TokenError, TokenKey, TokenManager};
