//! ConfigMaps and Secrets that Pods of this node refer to, each watched by its name, and ClusterTrustBundles.
//!
//! The Node authorizer lets a node read an object only by name and only while a Pod on it refers to it
//! (`plugin/pkg/auth/authorizer/node/node_authorizer.go`), so there is one watch per object: the first Pod that
//! refers to it starts the watch, the last one stops it (`pkg/kubelet/util/manager/watch_based_manager.go`). An
//! immutable object is read once; one that only environment variables need is let go after a while without a reader.
//! What is cached is therefore bounded by what runs here.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ClusterTrustBundleProjection, ConfigMap, Pod, Secret};
use kube::Client;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::error::ObjectError;
use super::follow::{Object, Shared, State, follow, lock};
use super::references::{ObjectKey, ObjectKind, References, references};
use super::secret::SecretObject;
use super::trust_bundles::{self, TrustBundleError, TrustBundles};

/// Times of an [`ObjectCache`].
#[derive(Clone, Copy, Debug)]
pub struct CacheOptions {
    /// How long a reader waits for an object that has not been read yet. Right after a Pod is bound the authorizer
    /// may refuse for a moment; the watch tries again meanwhile.
    pub deadline: Duration,
    /// How long the watch of an object that no volume needs lives on after the last reader.
    pub idle: Duration,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(3), idle: Duration::from_secs(300) }
    }
}

/// An object that appeared, changed or disappeared.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// A ConfigMap or a Secret.
    Object(ObjectKey),
    /// A ClusterTrustBundle.
    TrustBundle {
        /// `metadata.name`
        name: String,
        /// `spec.signerName`
        signer: Option<String>,
    },
}

impl Change {
    /// Whether a volume of the Pod may show the object.
    #[must_use]
    pub fn concerns(&self, pod: &Pod) -> bool {
        match self {
            Self::Object(key) => pod.metadata.namespace.as_deref() == Some(&key.namespace),
            Self::TrustBundle { name, signer } => trust_bundles::shows(pod, name, signer.as_deref()),
        }
    }
}

/// Changes that a slow subscriber may fall behind by before it is told that it has missed some.
const CHANGES: usize = 1024;

/// One object and the Pods that refer to it.
#[derive(Debug)]
struct Slot {
    shared: Arc<Shared>,
    pods: usize,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.shared.phase).task.take() {
            task.abort();
        }
    }
}

#[derive(Debug, Default)]
struct Registry {
    pods: HashMap<String, References>,
    slots: HashMap<ObjectKey, Slot>,
}

/// The ConfigMaps and Secrets of this node's Pods.
pub struct ObjectCache {
    client: Option<Client>,
    options: CacheOptions,
    registry: Mutex<Registry>,
    changes: broadcast::Sender<Change>,
    trust_bundles: TrustBundles,
}

impl fmt::Debug for ObjectCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectCache")
            .field("standalone", &self.client.is_none())
            .field("objects", &lock(&self.registry).slots.len())
            .finish_non_exhaustive()
    }
}

impl ObjectCache {
    /// A cache that reads from an API server.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self::with_options(Some(client), CacheOptions::default())
    }

    /// A cache of a node without an API server: every read is [`ObjectError::Standalone`].
    #[must_use]
    pub fn standalone() -> Self {
        Self::with_options(None, CacheOptions::default())
    }

    /// A cache with its own times; no client means no API server.
    #[must_use]
    pub fn with_options(client: Option<Client>, options: CacheOptions) -> Self {
        let changes = broadcast::channel(CHANGES).0;
        let bundles = client.clone().ok_or(TrustBundleError::Standalone);
        let trust_bundles = TrustBundles::new(bundles, options.deadline, changes.clone());
        Self { client, options, registry: Mutex::default(), changes, trust_bundles }
    }

    /// Refuses ClusterTrustBundles: what the feature gate `ClusterTrustBundleProjection` set to false asks for.
    #[must_use]
    pub fn without_trust_bundles(mut self) -> Self {
        self.trust_bundles =
            TrustBundles::new(Err(TrustBundleError::Gate), self.options.deadline, self.changes.clone());
        self
    }

    /// Keeps what `pod` refers to readable until [`Self::unregister_pod`]; call it again when the Pod changes.
    ///
    /// Watches start in the background: call it within a tokio runtime.
    pub fn register_pod(&self, pod: &Pod) {
        let Some(uid) = &pod.metadata.uid else { return };
        self.set_references(uid, references(pod));
        self.trust_bundles.register_pod(uid, pod);
    }

    /// Lets go what the Pod referred to.
    pub fn unregister_pod(&self, uid: &str) {
        self.set_references(uid, References::new());
        self.trust_bundles.unregister_pod(uid);
    }

    fn set_references(&self, uid: &str, new: References) {
        let mut registry = lock(&self.registry);
        let Registry { pods, slots } = &mut *registry;
        for (key, live) in &new {
            let slot = slots.entry(key.clone()).or_insert_with(|| Slot::new(key.clone()));
            slot.pods += 1;
            lock(&slot.shared.phase).live += usize::from(*live);
            self.wake(&slot.shared);
        }
        let old = if new.is_empty() { pods.remove(uid) } else { pods.insert(uid.to_owned(), new) };
        for (key, live) in old.into_iter().flatten() {
            let Some(slot) = slots.get_mut(&key) else { continue };
            slot.pods -= 1;
            lock(&slot.shared.phase).live -= usize::from(live);
            if slot.pods == 0 {
                slots.remove(&key);
            }
        }
    }

    /// Marks the object as wanted now and starts its watch if it rests.
    fn wake(&self, shared: &Arc<Shared>) {
        let Some(client) = &self.client else { return };
        let mut phase = lock(&shared.phase);
        phase.accessed = Instant::now();
        if phase.frozen || phase.task.is_some() {
            return;
        }
        let (client, changes, idle) = (client.clone(), self.changes.clone(), self.options.idle);
        let watched = shared.clone();
        phase.task = Some(
            match shared.key.kind {
                ObjectKind::ConfigMap => tokio::spawn(follow::<ConfigMap>(client, watched, changes, idle)),
                ObjectKind::Secret => tokio::spawn(follow::<Secret>(client, watched, changes, idle)),
            }
            .abort_handle(),
        );
    }

    /// The ConfigMap, as soon as it has been read.
    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<Arc<ConfigMap>, ObjectError> {
        match self.get(ObjectKind::ConfigMap, namespace, name).await? {
            Object::ConfigMap(object) => Ok(object),
            Object::Secret(_) => Err(not_registered(namespace, name)),
        }
    }

    /// The Secret, as soon as it has been read.
    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Arc<SecretObject>, ObjectError> {
        match self.get(ObjectKind::Secret, namespace, name).await? {
            Object::Secret(object) => Ok(object),
            Object::ConfigMap(_) => Err(not_registered(namespace, name)),
        }
    }

    /// The PEM of the certificates that `source` selects, each once, as soon as the ClusterTrustBundles have been read;
    /// empty if it selects none and is optional. A Pod that shows one must be registered.
    ///
    /// # Errors
    /// If it selects none and is not optional, or the bundles cannot be read.
    pub async fn trust_anchors(&self, source: &ClusterTrustBundleProjection) -> Result<String, TrustBundleError> {
        self.trust_bundles.anchors(source).await
    }

    async fn get(&self, kind: ObjectKind, namespace: &str, name: &str) -> Result<Object, ObjectError> {
        if self.client.is_none() {
            return Err(ObjectError::Standalone { kind, namespace: namespace.to_owned(), name: name.to_owned() });
        }
        let key = ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        let mut states = {
            let registry = lock(&self.registry);
            let slot = registry.slots.get(&key).ok_or_else(|| not_registered(namespace, name))?;
            self.wake(&slot.shared);
            slot.shared.state.subscribe()
        };
        let read = states.wait_for(|state| !matches!(state, State::Pending(_)));
        let read = match tokio::time::timeout(self.options.deadline, read).await {
            Ok(Ok(state)) => Some(state.clone()),
            Ok(Err(_)) => return Err(not_registered(namespace, name)),
            Err(_) => None,
        };
        let state = read.unwrap_or_else(|| states.borrow().clone());
        match state {
            State::Found { object, .. } => Ok(object),
            State::Missing => Err(ObjectError::NotFound { kind, namespace: key.namespace, name: key.name }),
            State::Pending(Some(error)) => Err(error),
            State::Pending(None) => {
                Err(ObjectError::Unavailable { kind, reason: "timed out waiting for the condition".to_owned() })
            }
        }
    }

    /// Tells which objects appeared, changed or disappeared. A receiver that lags ([`broadcast::error::RecvError`])
    /// has to look at everything.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }
}

fn not_registered(namespace: &str, name: &str) -> ObjectError {
    ObjectError::NotRegistered { namespace: namespace.to_owned(), name: name.to_owned() }
}

impl Slot {
    fn new(key: ObjectKey) -> Self {
        Self { shared: Arc::new(Shared::new(key)), pods: 0 }
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
