use super::*;
use crate::objects::fake_api::FakeApi;
use crate::objects::pem;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/namespaces/ns/podcertificaterequests";
const ACCOUNTS: &str = "/api/v1/namespaces/ns/serviceaccounts";
const LONG: Duration = Duration::from_secs(10);

type Warnings = Arc<Mutex<Vec<(String, String)>>>;

fn setup(options: CertificateOptions) -> (FakeApi, CertificateManager, Warnings) {
    let api = FakeApi::new();
    api.put(ACCOUNTS, &json!({"metadata": {"namespace": "ns", "name": "robot", "uid": "sa-uid"}}));
    let node =
        Node { metadata: ObjectMeta { uid: Some("node-uid".into()), ..ObjectMeta::default() }, ..Node::default() };
    let warnings = Warnings::default();
    let heard = warnings.clone();
    let warn: WarningSink = Box::new(move |pod, reason, message| {
        assert_eq!(pod.metadata.uid.as_deref(), Some("u1"));
        heard.lock().unwrap().push((reason.to_owned(), message));
    });
    let node = watch::channel(Some(Arc::new(node))).1;
    let manager = CertificateManager::new(api.client(), "n", node, warn, options);
    (api, manager, warnings)
}

/// No jitter, and renewal as soon as the signer says.
const EXACT: CertificateOptions = CertificateOptions { jitter: Duration::ZERO, pause: Duration::ZERO };

fn pod() -> Pod {
    let pod = json!({"metadata": {"namespace": "ns", "name": "web", "uid": "u1"},
        "spec": {"serviceAccountName": "robot", "containers": []}});
    serde_json::from_value(pod).unwrap()
}

fn source() -> PodCertificateProjection {
    serde_json::from_value(json!({"signerName": "ex.org/s", "keyType": "ED25519", "credentialBundlePath": "c",
        "maxExpirationSeconds": 3600, "userAnnotations": {"ex.org/a": "b"}}))
    .unwrap()
}

async fn get(manager: &CertificateManager, deadline: Duration) -> Result<Arc<Credential>, CertificateError> {
    manager.credential(&pod(), "v", 0, &source(), deadline).await
}

/// The only request there is, as soon as there is one other than `not`.
async fn request(api: &FakeApi, not: &str) -> Value {
    let new = || api.list(REQUESTS).into_iter().find(|request| request["metadata"]["name"] != not);
    api.until(|| new().is_some()).await;
    new().unwrap()
}

fn condition(kind: &str) -> Value {
    json!({"type": kind, "status": "True", "reason": "Because", "message": "of this", "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

/// Signs, with a certificate that holds `body`.
fn sign(api: &FakeApi, mut request: Value, body: &str, refresh: Timestamp, end: Timestamp) {
    let mut chain = "-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\ncomment\n".to_owned();
    pem::encode_certificate(body.as_bytes(), &mut chain);
    request["status"] = json!({"conditions": [condition("Issued")], "certificateChain": chain,
        "notBefore": "2026-01-01T00:00:00Z", "notAfter": end.to_string(), "beginRefreshAt": refresh.to_string()});
    api.put(REQUESTS, &request);
}

fn from_now(seconds: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(seconds)
}

fn body(credential: &Credential) -> String {
    String::from_utf8(pem::certificates(credential.chain()).concat()).unwrap()
}

#[tokio::test]
async fn asks_once_as_kubelet_does_and_gives_what_was_signed() {
    let (api, manager, warnings) = setup(CertificateOptions::default());
    let error = get(&manager, Duration::ZERO).await.unwrap_err();
    assert_eq!((error.to_string().as_str(), error.is_terminal()), ("credential bundle is not issued yet", false));
    let asked = request(&api, "").await;
    assert_eq!(asked["metadata"]["generateName"], "req-");
    let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u1"}]);
    assert_eq!(asked["metadata"]["ownerReferences"], owner);
    let mut spec = asked["spec"].clone();
    assert!(!spec.as_object_mut().unwrap().remove("stubPKCS10Request").unwrap().as_str().unwrap().is_empty());
    let expected = json!({"signerName": "ex.org/s", "podName": "web", "podUID": "u1", "serviceAccountName": "robot",
        "serviceAccountUID": "sa-uid", "nodeName": "n", "nodeUID": "node-uid", "maxExpirationSeconds": 3600,
        "unverifiedUserAnnotations": {"ex.org/a": "b"}});
    assert_eq!(spec, expected);
    let mut changes = manager.subscribe();
    sign(&api, asked, "one", from_now(1800), from_now(3600));
    let (one, two) = tokio::join!(get(&manager, LONG), get(&manager, LONG));
    assert_eq!(one, two);
    let credential = one.unwrap();
    assert_eq!(body(&credential), "one");
    assert!(credential.key().starts_with("-----BEGIN PRIVATE KEY-----\n"));
    assert!(!credential.chain().contains("comment") && !credential.chain().contains("not base64"));
    assert_eq!(changes.recv().await.unwrap(), "u1");
    let jitter = credential.refresh_at.duration_since(from_now(1800)).as_secs();
    assert!((-5..=300).contains(&jitter), "{jitter}");
    assert_eq!(api.list(REQUESTS).len(), 1);
    let selector = "spec.nodeName=n,metadata.name=";
    assert!(api.requests().iter().any(|seen| seen.query.get("fieldSelector").is_some_and(|s| s.starts_with(selector))));
    api.until(|| api.watches() == 0).await;
    assert!(warnings.lock().unwrap().is_empty());
    assert!(!format!("{credential:?}{manager:?}").contains(credential.key().lines().nth(1).unwrap()));
}

#[tokio::test]
async fn renews_in_time_with_another_key_and_warns_of_the_end() {
    let (api, manager, warnings) = setup(EXACT);
    let _ = get(&manager, Duration::ZERO).await;
    let first = request(&api, "").await;
    let name = first["metadata"]["name"].as_str().unwrap().to_owned();
    sign(&api, first, "one", from_now(0), from_now(1));
    let one = get(&manager, LONG).await.unwrap();
    let mut changes = manager.subscribe();
    let second = request(&api, &name).await;
    assert_eq!(get(&manager, LONG).await.unwrap(), one, "the old one serves");
    api.until(|| !warnings.lock().unwrap().is_empty()).await;
    assert_eq!(warnings.lock().unwrap()[0], ("CertificateExpired".to_owned(), "PodCertificate expired".to_owned()));
    sign(&api, second, "two", from_now(600), from_now(3600));
    assert_eq!(changes.recv().await.unwrap(), "u1");
    let two = get(&manager, LONG).await.unwrap();
    assert!(body(&two) == "two" && two.key() != one.key());
    manager.forget("u1");
    assert!(lock(&manager.entries).is_empty());
}

#[tokio::test]
async fn the_end_of_time_is_a_time() {
    let (api, manager, _) = setup(CertificateOptions::default());
    let _ = get(&manager, Duration::ZERO).await;
    sign(&api, request(&api, "").await, "one", Timestamp::MAX, Timestamp::MIN);
    let credential = get(&manager, LONG).await.unwrap();
    assert!(credential.refresh_at.duration_since(Timestamp::MAX).as_secs() == 0);
    tokio::task::yield_now().await;
    assert_eq!(body(&get(&manager, LONG).await.unwrap()), "one");
    assert!(lock(&manager.entries).values().all(|entry| !entry.task.is_finished()));
}

#[tokio::test]
async fn refusals_are_final_and_told() {
    for (kind, verb, done) in [("Denied", "was denied", "denied"), ("Failed", "failed", "failed")] {
        let (api, manager, warnings) = setup(EXACT);
        let _ = get(&manager, Duration::ZERO).await;
        let mut asked = request(&api, "").await;
        asked["status"] = json!({"conditions": [condition("Other"), condition(kind)]});
        api.put(REQUESTS, &asked);
        let error = get(&manager, LONG).await.unwrap_err();
        let text = format!("PodCertificateRequest was permanently {done}: reason=\"Because\" message=\"of this\"");
        assert_eq!((error.to_string(), error.is_terminal()), (text, true));
        let name = asked["metadata"]["name"].as_str().unwrap();
        let message = format!("PodCertificateRequest ns/{name} {verb}, reason=\"Because\", message=\"of this\"");
        assert_eq!(*warnings.lock().unwrap(), [(kind.to_owned(), message)]);
        assert_eq!(get(&manager, LONG).await.unwrap_err(), error);
        assert_eq!(api.list(REQUESTS).len(), 1);
    }
}

#[tokio::test]
async fn a_deleted_request_is_made_again_and_a_poor_answer_refused() {
    let (api, manager, _) = setup(EXACT);
    api.fail(REQUESTS, 403, 1);
    let _ = get(&manager, Duration::ZERO).await;
    let first = request(&api, "").await;
    api.until(|| api.watches() == 1).await;
    let name = first["metadata"]["name"].as_str().unwrap().to_owned();
    api.delete(REQUESTS, "ns", &name);
    let mut second = request(&api, &name).await;
    second["status"] = json!({"conditions": [condition("Issued")], "certificateChain": "\u{0}-----BEGIN"});
    api.put(REQUESTS, &second);
    let name = second["metadata"]["name"].as_str().unwrap().to_owned();
    let third = request(&api, &name).await;
    let error = get(&manager, Duration::ZERO).await.unwrap_err();
    assert!(error.to_string().ends_with("is issued without status.certificateChain"), "{error}");
    sign(&api, third, "good", from_now(600), from_now(3600));
    assert_eq!(body(&get(&manager, LONG).await.unwrap()), "good");
}

#[tokio::test]
async fn errors_say_what_is_missing() {
    let (api, manager, _) = setup(EXACT);
    api.fail(REQUESTS, 403, usize::MAX);
    let _ = get(&manager, Duration::ZERO).await;
    let said = || async { get(&manager, Duration::ZERO).await.unwrap_err().to_string() };
    while !said().await.contains(':') {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(said().await, "credential bundle is not issued yet: while creating PodCertificateRequest: fake 403");
    let mut unknown = source();
    unknown.key_type = "DSA".into();
    let error = manager.credential(&pod(), "w", 0, &unknown, Duration::from_millis(50)).await.unwrap_err();
    assert!(error.to_string().contains("unknown key type \"DSA\""), "{error}");
    let alone = CertificateManager::standalone();
    assert_eq!(get(&alone, LONG).await, Err(CertificateError::Standalone));
    assert_eq!(get(&CertificateManager::off(), LONG).await, Err(CertificateError::Gate));
}
