use super::*;
use crate::objects::fake_api::FakeApi;
use crate::objects::{CacheOptions, ObjectCache};
use serde_json::{Value, json};

const PATH: &str = "/apis/certificates.k8s.io/v1/clustertrustbundles";

fn pem_of(ders: &[&str]) -> String {
    let mut text = String::new();
    for der in ders {
        pem::encode_certificate(der.as_bytes(), &mut text);
    }
    text
}

fn bundle(name: &str, signer: Option<&str>, labels: Value, ders: &[&str]) -> Value {
    json!({"apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": {"name": name, "labels": labels},
        "spec": {"signerName": signer, "trustBundle": format!("explanation\n{}", pem_of(ders))}})
}

fn source(value: Value) -> ClusterTrustBundleProjection {
    serde_json::from_value(value).unwrap()
}

fn named(name: &str) -> ClusterTrustBundleProjection {
    source(json!({"name": name, "path": "p"}))
}

fn pod(uid: &str, source: &ClusterTrustBundleProjection) -> Pod {
    serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": uid, "uid": uid}, "spec": {"containers": [],
        "volumes": [{"name": "v", "projected": {"sources": [{"clusterTrustBundle": source}]}}]}}))
    .unwrap()
}

fn cache(api: &FakeApi) -> ObjectCache {
    let options = CacheOptions { deadline: Duration::from_secs(2), ..CacheOptions::default() };
    ObjectCache::with_options(Some(api.client()), options)
}

/// The certificates, sorted.
async fn read(cache: &ObjectCache, source: &ClusterTrustBundleProjection) -> Result<Vec<String>, TrustBundleError> {
    let ders = pem::certificates(&cache.trust_anchors(source).await?);
    let mut ders: Vec<String> = ders.into_iter().map(|der| String::from_utf8(der).unwrap()).collect();
    ders.sort();
    Ok(ders)
}

#[tokio::test]
async fn pods_share_a_watch_that_follows_changes_and_ends_with_the_last_of_them() {
    let api = FakeApi::new();
    api.put(PATH, &bundle("a", None, json!({}), &["1", "2", "1"]));
    let cache = cache(&api);
    let mut changes = cache.subscribe();
    let (one, two) = (pod("p1", &named("a")), pod("p2", &named("b")));
    cache.register_pod(&one);
    cache.register_pod(&two);
    assert_eq!(read(&cache, &named("a")).await.unwrap(), ["1", "2"]);
    let change = changes.recv().await.unwrap();
    assert!(change.concerns(&one) && !change.concerns(&two));

    api.put(PATH, &bundle("a", None, json!({}), &["3"]));
    assert_eq!(changes.recv().await.unwrap(), change);
    assert_eq!(read(&cache, &named("a")).await.unwrap(), ["3"]);
    api.put(PATH, &bundle("b", None, json!({}), &["4"]));
    assert!(changes.recv().await.unwrap().concerns(&two));
    api.delete(PATH, "", "a");
    assert_eq!(changes.recv().await.unwrap(), change);
    let error = read(&cache, &named("a")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io \"a\" not found"
    );
    assert_eq!(read(&cache, &source(json!({"name": "a", "path": "p", "optional": true}))).await.unwrap(), [""; 0]);

    let lists = api.requests().iter().filter(|request| !request.query.contains_key("watch")).count();
    assert_eq!((lists, api.watches()), (1, 1));
    cache.unregister_pod("p1");
    assert_eq!(read(&cache, &named("b")).await.unwrap(), ["4"]);
    cache.unregister_pod("p2");
    api.until(|| api.watches() == 0).await;
    assert!(matches!(read(&cache, &named("b")).await, Err(TrustBundleError::NotSynced(_))));
    cache.register_pod(&two);
    assert_eq!(read(&cache, &named("b")).await.unwrap(), ["4"]);
}

#[tokio::test]
async fn signer_and_labels_select_bundles_and_each_certificate_is_there_once() {
    let api = FakeApi::new();
    api.put(PATH, &bundle("s:1", Some("ex.org/s"), json!({"live": "yes"}), &["1", "2"]));
    api.put(PATH, &bundle("s:2", Some("ex.org/s"), json!({"live": "no"}), &["2", "3"]));
    api.put(PATH, &bundle("t:1", Some("ex.org/t"), json!({"live": "yes"}), &["4"]));
    api.put(PATH, &bundle("none", None, json!({"live": "yes"}), &["5"]));
    let cache = cache(&api);
    let of = |selector: Value| source(json!({"signerName": "ex.org/s", "path": "p", "labelSelector": selector}));
    cache.register_pod(&pod("p1", &of(json!({}))));
    assert_eq!(read(&cache, &of(json!({}))).await.unwrap(), ["1", "2", "3"]);
    assert_eq!(read(&cache, &of(json!({"matchLabels": {"live": "yes"}}))).await.unwrap(), ["1", "2"]);
    let not = json!({"matchExpressions": [{"key": "live", "operator": "NotIn", "values": ["yes"]}]});
    assert_eq!(read(&cache, &of(not)).await.unwrap(), ["2", "3"]);
    for nothing in [json!(null), json!({"matchLabels": {"live": "maybe"}})] {
        let mut source = of(nothing);
        let error = read(&cache, &source).await.unwrap_err();
        assert_eq!(error.to_string(), "combination of signerName and labelSelector matched zero ClusterTrustBundles");
        source.optional = Some(true);
        assert_eq!(read(&cache, &source).await.unwrap(), [""; 0]);
    }
    let bad = of(json!({"matchExpressions": [{"key": "live", "operator": "Near"}]}));
    assert!(read(&cache, &bad).await.unwrap_err().is_terminal());
    let long = of(json!({"matchLabels": {"live": "x".repeat(MAX_SELECTOR)}}));
    assert_eq!(read(&cache, &long).await, Err(TrustBundleError::SelectorLength(MAX_SELECTOR + 5)));
    let unnamed = source(json!({"path": "p"}));
    assert_eq!(read(&cache, &unnamed).await, Err(TrustBundleError::Unnamed));
    // The order is an own one, but stays: nothing is written again without a change.
    assert_eq!(cache.trust_anchors(&of(json!({}))).await, cache.trust_anchors(&of(json!({}))).await);
}

#[tokio::test]
async fn a_new_list_tells_what_is_different() {
    let api = FakeApi::new();
    api.put(PATH, &bundle("same", None, json!({}), &["1"]));
    api.put(PATH, &bundle("goes", None, json!({}), &["2"]));
    let state = Arc::new(watch::Sender::new(State::Pending(None)));
    let (changes, mut receiver) = broadcast::channel(16);
    let task = tokio::spawn(follow(api.client(), state.clone(), changes.clone(), MAX_BYTES));
    let mut seen = [receiver.recv().await.unwrap(), receiver.recv().await.unwrap()];
    seen.sort_by_key(|change| format!("{change:?}"));
    let change = |name: &str| Change::TrustBundle { name: name.to_owned(), signer: None };
    assert_eq!(seen, [change("goes"), change("same")]);
    task.abort();
    let _ = task.await;
    api.delete(PATH, "", "goes");
    let task = tokio::spawn(follow(api.client(), state, changes, MAX_BYTES));
    assert_eq!(receiver.recv().await.unwrap(), change("goes"));
    api.put(PATH, &bundle("comes", None, json!({}), &["3"]));
    assert_eq!(receiver.recv().await.unwrap(), change("comes"));
    task.abort();
}

#[tokio::test]
async fn errors_say_what_the_server_said_and_heal() {
    let api = FakeApi::new();
    api.put(PATH, &bundle("a", None, json!({}), &["1"]));
    api.fail(PATH, 403, usize::MAX);
    let options = CacheOptions { deadline: Duration::from_millis(100), ..CacheOptions::default() };
    let cache = ObjectCache::with_options(Some(api.client()), options);
    cache.register_pod(&pod("p1", &named("a")));
    let error = read(&cache, &named("a")).await.unwrap_err();
    assert_eq!(error.to_string(), "ClusterTrustBundle informer has not yet synced: fake 403");
    assert!(!error.is_terminal());
    api.fail(PATH, 403, 0);
    let mut changes = cache.subscribe();
    assert!(changes.recv().await.is_ok());
    assert_eq!(read(&cache, &named("a")).await.unwrap(), ["1"]);
    let alone = ObjectCache::standalone();
    alone.register_pod(&pod("p1", &named("a")));
    assert_eq!(read(&alone, &named("a")).await, Err(TrustBundleError::Standalone));
    let off = ObjectCache::new(api.client()).without_trust_bundles();
    off.register_pod(&pod("p1", &named("a")));
    assert_eq!(read(&off, &named("a")).await, Err(TrustBundleError::Gate));
}

#[test]
fn what_does_not_fit_is_not_kept() {
    let mut bundles = Bundles::default();
    let object =
        |name: &str, size: usize| serde_json::from_value(bundle(name, None, json!({}), &[&"x".repeat(size)])).unwrap();
    bundles.apply(object("a", 600), 1000);
    bundles.apply(object("b", 600), 1000);
    assert!(bundles.by_name["a"].anchors.is_some() && bundles.by_name["b"].anchors.is_none());
    let manager = TrustBundles::new(Err(TrustBundleError::Standalone), Duration::ZERO, broadcast::channel(1).0);
    assert_eq!(manager.select(&bundles, &named("b")), Err(TrustBundleError::TooMuch { name: "b".into() }));
    bundles.apply(object("a", 10), 1000);
    bundles.apply(object("b", 600), 1000);
    assert!(manager.select(&bundles, &named("b")).is_ok());
    bundles.remove("a");
    bundles.remove("b");
    bundles.remove("c");
    assert_eq!(bundles.bytes, 0);
}
