//! ConfigMaps and Secrets that Pods of this node refer to, each watched by its name.
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

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::Client;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::error::ObjectError;
use super::follow::{Object, Shared, State, follow, lock};
use super::references::{ObjectKey, ObjectKind, References, references};
use super::secret::SecretObject;

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
    changes: broadcast::Sender<ObjectKey>,
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
        Self { client, options, registry: Mutex::default(), changes: broadcast::channel(CHANGES).0 }
    }

    /// Keeps what `pod` refers to readable until [`Self::unregister_pod`]; call it again when the Pod changes.
    ///
    /// Watches start in the background: call it within a tokio runtime.
    pub fn register_pod(&self, pod: &Pod) {
        let Some(uid) = &pod.metadata.uid else { return };
        self.set_references(uid, references(pod));
    }

    /// Lets go what the Pod referred to.
    pub fn unregister_pod(&self, uid: &str) {
        self.set_references(uid, References::new());
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
    pub fn subscribe(&self) -> broadcast::Receiver<ObjectKey> {
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
mod tests {
    use super::*;
    use crate::objects::fake_api::FakeApi;
    use serde_json::{Value, json};

    const CONFIG_MAPS: &str = "/api/v1/namespaces/ns/configmaps";
    const SECRETS: &str = "/api/v1/namespaces/ns/secrets";

    fn config_map(name: &str, value: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "ns", "name": name}, "data": {"k": value}})
    }

    fn pod(uid: &str, volumes: Value, env: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": uid, "uid": uid},
            "spec": {"containers": [{"name": "c", "env": env}], "volumes": volumes}
        }))
        .unwrap()
    }

    fn volume_pod(uid: &str, name: &str) -> Pod {
        pod(uid, json!([{"name": "v", "configMap": {"name": name}}]), json!([]))
    }

    fn cache(api: &FakeApi) -> ObjectCache {
        let options = CacheOptions { deadline: Duration::from_secs(2), idle: Duration::from_secs(300) };
        ObjectCache::with_options(Some(api.client()), options)
    }

    async fn value(cache: &ObjectCache, name: &str) -> Result<String, ObjectError> {
        cache.config_map("ns", name).await.map(|object| object.data.as_ref().unwrap()["k"].clone())
    }

    #[tokio::test]
    async fn watches_one_object_by_name_and_follows_its_changes() {
        let api = FakeApi::new();
        api.put(CONFIG_MAPS, &config_map("a", "1"));
        api.put(CONFIG_MAPS, &config_map("other", "x"));
        let cache = cache(&api);
        let mut changes = cache.subscribe();
        cache.register_pod(&volume_pod("p1", "a"));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        let key = ObjectKey { kind: ObjectKind::ConfigMap, namespace: "ns".into(), name: "a".into() };
        assert_eq!(changes.recv().await, Ok(key.clone()));

        api.put(CONFIG_MAPS, &config_map("a", "2"));
        assert_eq!(changes.recv().await, Ok(key.clone()));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("2"));

        api.delete(CONFIG_MAPS, "ns", "a");
        assert_eq!(changes.recv().await, Ok(key.clone()));
        let error = value(&cache, "a").await.unwrap_err();
        assert_eq!(error.to_string(), "configmap \"a\" not found");
        assert!(error.is_not_found());

        api.put(CONFIG_MAPS, &config_map("a", "3"));
        assert_eq!(changes.recv().await, Ok(key));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("3"));
        for request in api.requests() {
            assert_eq!(request.query.get("fieldSelector").map(String::as_str), Some("metadata.name=a"));
        }
        assert!(matches!(value(&cache, "other").await, Err(ObjectError::NotRegistered { .. })));
    }

    #[tokio::test]
    async fn pods_share_a_watch_that_ends_with_the_last_of_them() {
        let api = FakeApi::new();
        api.put(CONFIG_MAPS, &config_map("a", "1"));
        let cache = cache(&api);
        cache.register_pod(&volume_pod("p1", "a"));
        cache.register_pod(&volume_pod("p2", "a"));
        cache.register_pod(&volume_pod("p2", "a"));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        api.until(|| api.watches() == 1).await;
        let lists = api.requests().iter().filter(|request| !request.query.contains_key("watch")).count();
        assert_eq!(lists, 1);

        cache.unregister_pod("p2");
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        cache.unregister_pod("p1");
        api.until(|| api.watches() == 0).await;
        assert!(matches!(value(&cache, "a").await, Err(ObjectError::NotRegistered { .. })));
        assert_eq!(lock(&cache.registry).pods.len(), 0);
    }

    #[tokio::test]
    async fn a_pod_that_refers_to_something_else_lets_the_old_object_go() {
        let api = FakeApi::new();
        api.put(CONFIG_MAPS, &config_map("a", "1"));
        api.put(CONFIG_MAPS, &config_map("b", "2"));
        let cache = cache(&api);
        cache.register_pod(&volume_pod("p1", "a"));
        cache.register_pod(&volume_pod("p1", "b"));
        assert_eq!(value(&cache, "b").await.as_deref(), Ok("2"));
        assert!(matches!(value(&cache, "a").await, Err(ObjectError::NotRegistered { .. })));
        api.until(|| api.watches() == 1).await;
    }

    #[tokio::test]
    async fn an_immutable_object_is_read_once() {
        let api = FakeApi::new();
        let mut object = config_map("a", "1");
        object["immutable"] = json!(true);
        api.put(CONFIG_MAPS, &object);
        let cache = cache(&api);
        cache.register_pod(&volume_pod("p1", "a"));
        for _ in 0..3 {
            assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(api.requests().len(), 1, "{:?}", api.requests());
    }

    #[tokio::test]
    async fn a_refusal_right_after_binding_is_ridden_out() {
        let api = FakeApi::new();
        api.put(CONFIG_MAPS, &config_map("a", "1"));
        api.fail(CONFIG_MAPS, 403, 2);
        let cache = cache(&api);
        cache.register_pod(&volume_pod("p1", "a"));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
    }

    #[tokio::test]
    async fn errors_say_what_the_server_said() {
        let api = FakeApi::new();
        api.fail(CONFIG_MAPS, 403, usize::MAX);
        api.fail(SECRETS, 503, usize::MAX);
        let options = CacheOptions { deadline: Duration::from_millis(100), ..CacheOptions::default() };
        let cache = ObjectCache::with_options(Some(api.client()), options);
        let volumes = json!([{"name": "v", "configMap": {"name": "a"}}, {"name": "w", "secret": {"secretName": "s"}}]);
        cache.register_pod(&pod("p1", volumes, json!([])));
        assert_eq!(value(&cache, "a").await, Err(ObjectError::Forbidden { message: "fake 403".into() }));
        let error = cache.secret("ns", "s").await.unwrap_err();
        assert_eq!(error.to_string(), "failed to sync secret cache: fake 503");
        let alone = ObjectCache::standalone();
        alone.register_pod(&volume_pod("p1", "a"));
        assert!(matches!(value(&alone, "a").await, Err(ObjectError::Standalone { .. })));
    }

    #[tokio::test]
    async fn secrets_are_decoded_and_not_printed() {
        let api = FakeApi::new();
        api.put(
            SECRETS,
            &json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {"namespace": "ns", "name": "s", "annotations": {"last": "hunter2"}}, "data": {"password": "aHVudGVyMg=="}}),
        );
        let cache = cache(&api);
        cache.register_pod(&pod("p1", json!([{"name": "v", "secret": {"secretName": "s"}}]), json!([])));
        let secret = cache.secret("ns", "s").await.unwrap();
        assert_eq!(secret.data["password"], b"hunter2");
        let shown = format!("{secret:?} {cache:?}") + &format!("{:?}", lock(&cache.registry));
        assert!(shown.contains("password") && !shown.contains("hunter2") && !shown.contains("104, 117"), "{shown}");
    }

    #[tokio::test]
    async fn an_object_that_only_env_needs_is_let_go_when_idle() {
        let api = FakeApi::new();
        api.put(CONFIG_MAPS, &config_map("a", "1"));
        api.put(CONFIG_MAPS, &config_map("v", "1"));
        let options = CacheOptions { deadline: Duration::from_secs(2), idle: Duration::from_millis(50) };
        let cache = ObjectCache::with_options(Some(api.client()), options);
        let env = json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "k"}}}]);
        cache.register_pod(&pod("p1", json!([{"name": "v", "configMap": {"name": "v"}}]), env));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        assert_eq!(value(&cache, "v").await.as_deref(), Ok("1"));
        api.until(|| api.watches() == 1).await;
        api.put(CONFIG_MAPS, &config_map("a", "2"));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("2"));
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(api.watches(), 1, "the volume's object must stay watched");
    }

    #[tokio::test]
    async fn what_was_read_stays_readable_when_the_server_goes_away() {
        let api = FakeApi::new();
        api.put(CONFIG_MAPS, &config_map("a", "1"));
        let cache = cache(&api);
        cache.register_pod(&volume_pod("p1", "a"));
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        api.until(|| api.watches() == 1).await;
        api.fail(CONFIG_MAPS, 503, usize::MAX);
        api.close_watches();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("1"));
        api.fail(CONFIG_MAPS, 503, 0);
        api.put(CONFIG_MAPS, &config_map("a", "2"));
        let mut changes = cache.subscribe();
        changes.recv().await.unwrap();
        assert_eq!(value(&cache, "a").await.as_deref(), Ok("2"));
    }
}
