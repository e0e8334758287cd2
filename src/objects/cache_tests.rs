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
    assert_eq!(changes.recv().await, Ok(Change::Object(key.clone())));

    api.put(CONFIG_MAPS, &config_map("a", "2"));
    assert_eq!(changes.recv().await, Ok(Change::Object(key.clone())));
    assert_eq!(value(&cache, "a").await.as_deref(), Ok("2"));

    api.delete(CONFIG_MAPS, "ns", "a");
    assert_eq!(changes.recv().await, Ok(Change::Object(key.clone())));
    let error = value(&cache, "a").await.unwrap_err();
    assert_eq!(error.to_string(), "configmap \"a\" not found");
    assert!(error.is_not_found());

    api.put(CONFIG_MAPS, &config_map("a", "3"));
    assert_eq!(changes.recv().await, Ok(Change::Object(key)));
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
