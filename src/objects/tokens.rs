//! ServiceAccount tokens bound to a Pod, requested when needed and renewed in time.
//!
//! Source: `pkg/kubelet/token/token_manager.go`: a token is renewed when 80 % of its life or 24 hours have passed,
//! minus up to 10 s so that a node's tokens do not all expire at once. If renewal fails, the old token serves as long
//! as it is valid.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};

/// Longest time until a token is renewed.
const MAX_AGE: SignedDuration = SignedDuration::from_hours(24);
/// How much earlier than necessary a token may be renewed.
const MAX_JITTER_SECONDS: f64 = 10.0;
/// After a failed renewal of a token that is still valid.
const RETRY: SignedDuration = SignedDuration::from_secs(60);
/// For one request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// How long a refusal is ridden out: the authorizer learns of a new Pod a moment after the node does.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(3);

/// A token that cannot be had. Retryable, except [`TokenError::Standalone`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The request failed and there is no older token.
    #[error("failed to fetch token: {0}")]
    Fetch(String),
    /// The request failed and the older token is no longer valid.
    #[error("token {key} expired and refresh failed: {reason}")]
    Expired {
        /// Whose token it is; never the token.
        key: String,
        /// Why the request failed.
        reason: String,
    },
    /// There is no API server. Terminal.
    #[error("cannot use TokenManager when kubelet is in standalone mode")]
    Standalone,
}

/// Whose token, and for whom.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct TokenKey {
    /// The Pod's namespace, which is the ServiceAccount's.
    pub namespace: String,
    /// `spec.serviceAccountName`
    pub service_account: String,
    /// The Pod that the token is bound to: it becomes invalid when the Pod is deleted.
    pub pod_name: String,
    /// The UID of that Pod.
    pub pod_uid: String,
    /// The intended reader; `None` is the API server.
    pub audience: Option<String>,
    /// The wanted life in seconds; `None` leaves it to the API server.
    pub expiration_seconds: Option<i64>,
}

/// A token. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    value: Arc<str>,
    expires_at: Timestamp,
    refresh_at: Option<Timestamp>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("expires_at", &self.expires_at)
            .field("refresh_at", &self.refresh_at)
            .finish_non_exhaustive()
    }
}

impl Token {
    /// The token itself.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// When it stops being valid.
    #[must_use]
    pub fn expires_at(&self) -> Timestamp {
        self.expires_at
    }

    /// When to ask for it again; `None` if never.
    #[must_use]
    pub fn refresh_at(&self) -> Option<Timestamp> {
        self.refresh_at
    }
}

#[derive(Default)]
struct Entry {
    /// Held while a request is under way, so that several readers make one.
    flight: tokio::sync::Mutex<()>,
    token: Mutex<Option<Token>>,
}

/// The tokens of this node's Pods.
pub struct TokenManager {
    client: Option<Client>,
    clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    entries: Mutex<HashMap<TokenKey, Arc<Entry>>>,
}

impl fmt::Debug for TokenManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenManager").field("tokens", &lock(&self.entries).len()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TokenManager {
    /// A manager that asks an API server.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self::with_clock(Some(client), Timestamp::now)
    }

    /// A manager without an API server: every token is [`TokenError::Standalone`].
    #[must_use]
    pub fn standalone() -> Self {
        Self::with_clock(None, Timestamp::now)
    }

    /// A manager with its own clock; no client means no API server.
    #[must_use]
    pub fn with_clock(client: Option<Client>, clock: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { client, clock: Box::new(clock), entries: Mutex::default() }
    }

    /// A token for `key` that need not be renewed now.
    ///
    /// # Errors
    /// If there is no valid token and none can be had.
    pub async fn token(&self, key: &TokenKey) -> Result<Token, TokenError> {
        let client = self.client.as_ref().ok_or(TokenError::Standalone)?;
        let entry = lock(&self.entries).entry(key.clone()).or_default().clone();
        let _flight = entry.flight.lock().await;
        let old = lock(&entry.token).clone();
        let now = (self.clock)();
        if let Some(token) = old.as_ref().filter(|token| token.refresh_at.is_none_or(|at| now < at)) {
            return Ok(token.clone());
        }
        let reason = match request(client, key).await {
            Ok(token) => {
                *lock(&entry.token) = Some(token.clone());
                return Ok(token);
            }
            Err(reason) => reason,
        };
        let Some(mut token) = old else {
            lock(&self.entries).remove(key);
            return Err(TokenError::Fetch(reason));
        };
        if (self.clock)() > token.expires_at {
            let key = format!("{}/{}", key.namespace, key.service_account);
            return Err(TokenError::Expired { key, reason });
        }
        tracing::error!(namespace = key.namespace, pod = key.pod_name, reason, "Couldn't update token");
        token.refresh_at = Some(now + RETRY);
        *lock(&entry.token) = Some(token.clone());
        Ok(token)
    }

    /// When the first of the tokens handed out for this Pod wants to be renewed.
    #[must_use]
    pub fn next_refresh(&self, pod_uid: &str) -> Option<Timestamp> {
        let entries = lock(&self.entries);
        let of_pod = entries.iter().filter(|(key, _)| key.pod_uid == pod_uid);
        of_pod.filter_map(|(_, entry)| lock(&entry.token).as_ref().and_then(|token| token.refresh_at)).min()
    }

    /// Drops the tokens of a Pod that is gone.
    pub fn forget(&self, pod_uid: &str) {
        lock(&self.entries).retain(|key, _| key.pod_uid != pod_uid);
    }
}

async fn request(client: &Client, key: &TokenKey) -> Result<Token, String> {
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), &key.namespace);
    let body = TokenRequest {
        spec: TokenRequestSpec {
            // An empty list is the API server itself.
            audiences: key.audience.iter().cloned().collect::<Vec<_>>().into(),
            expiration_seconds: key.expiration_seconds,
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(key.pod_name.clone()),
                uid: Some(key.pod_uid.clone()),
            }),
            ..TokenRequestSpec::default()
        }
        .into(),
        ..TokenRequest::default()
    };
    let parameters = PostParams::default();
    let start = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(100);
    let answer = loop {
        let create = api.create_token_request(&key.service_account, &parameters, &body);
        match tokio::time::timeout(REQUEST_DEADLINE, create).await {
            Err(_) => return Err(format!("no answer from the API server within {} s", REQUEST_DEADLINE.as_secs())),
            Ok(Ok(answer)) => break answer,
            Ok(Err(kube::Error::Api(status))) if status.code == 403 && start.elapsed() + pause < REFUSAL_DEADLINE => {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            Ok(Err(kube::Error::Api(status))) => return Err(status.message.clone()),
            Ok(Err(error)) => return Err(error.to_string()),
        }
    };
    let status = answer.status.unwrap_or_default();
    let value = status.token.filter(|token| !token.is_empty());
    let (Some(value), Some(expires)) = (value, status.expiration_timestamp) else {
        return Err("the API server answered without status.token or status.expirationTimestamp".to_owned());
    };
    let life = answer.spec.unwrap_or_default().expiration_seconds;
    Ok(Token { value: value.into(), expires_at: expires.0, refresh_at: life.map(|life| refresh_at(expires.0, life)) })
}

/// When a token of `life` seconds that ends at `expires` is renewed.
fn refresh_at(expires: Timestamp, life: i64) -> Timestamp {
    let jitter = SignedDuration::from_secs_f64(fastrand::f64() * MAX_JITTER_SECONDS);
    let late = expires - SignedDuration::from_secs(life / 5);
    let old = expires - SignedDuration::from_secs(life) + MAX_AGE;
    late.min(old) - jitter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fake_api::FakeApi;
    use serde_json::json;
    use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

    fn key(audience: Option<&str>) -> TokenKey {
        TokenKey {
            namespace: "ns".into(),
            service_account: "robot".into(),
            pod_name: "web".into(),
            pod_uid: "u1".into(),
            audience: audience.map(str::to_owned),
            expiration_seconds: Some(3600),
        }
    }

    /// A manager with a clock, an API server that numbers its tokens, and that server's count.
    fn setup() -> (FakeApi, TokenManager, Arc<AtomicI64>, Arc<AtomicUsize>) {
        let api = FakeApi::new();
        let now = Arc::new(AtomicI64::new(1_000_000));
        let issued = Arc::new(AtomicUsize::new(0));
        let (server_now, count) = (now.clone(), issued.clone());
        api.on_token(move |path, body| {
            assert_eq!(path, "/api/v1/namespaces/ns/serviceaccounts/robot/token");
            assert_eq!(body["spec"]["boundObjectRef"], json!({"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u1"}));
            let number = count.fetch_add(1, Ordering::SeqCst);
            let audience = body["spec"]["audiences"][0].as_str().unwrap_or("api").to_owned();
            let life = body["spec"]["expirationSeconds"].as_i64().unwrap();
            let expires = Timestamp::from_second(server_now.load(Ordering::SeqCst) + life).unwrap();
            Ok(json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {},
                "spec": body["spec"], "status": {"token": format!("{audience}-{number}"), "expirationTimestamp": expires.to_string()}}))
        });
        let clock = now.clone();
        let manager = TokenManager::with_clock(Some(api.client()), move || {
            Timestamp::from_second(clock.load(Ordering::SeqCst)).unwrap()
        });
        (api, manager, now, issued)
    }

    #[tokio::test]
    async fn caches_a_token_until_four_fifths_of_its_life() {
        let (_api, manager, now, issued) = setup();
        assert_eq!(manager.token(&key(None)).await.unwrap().value(), "api-0");
        assert_eq!(manager.token(&key(Some("vault"))).await.unwrap().value(), "vault-1");
        now.fetch_add(2869, Ordering::SeqCst);
        assert_eq!(manager.token(&key(None)).await.unwrap().value(), "api-0");
        let next = manager.next_refresh("u1").unwrap().as_second();
        assert!((1_000_000 + 2869..=1_000_000 + 2880).contains(&next), "{next}");
        assert_eq!(manager.next_refresh("u2"), None);
        now.fetch_add(11, Ordering::SeqCst);
        assert_eq!(manager.token(&key(None)).await.unwrap().value(), "api-2");
        assert_eq!(issued.load(Ordering::SeqCst), 3);
        manager.forget("u1");
        assert_eq!(manager.next_refresh("u1"), None);
    }

    #[tokio::test]
    async fn readers_at_the_same_time_share_one_request() {
        let (_api, manager, _, issued) = setup();
        let key = key(None);
        let tokens = futures::future::join_all((0..8).map(|_| manager.token(&key))).await;
        assert!(tokens.iter().all(|token| token.as_ref().unwrap().value() == "api-0"));
        assert_eq!(issued.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn an_old_token_serves_while_renewal_fails_and_it_is_valid() {
        let (api, manager, now, issued) = setup();
        manager.token(&key(None)).await.unwrap();
        api.fail("/api/v1/namespaces/ns/serviceaccounts/robot/token", 503, usize::MAX);
        now.fetch_add(3000, Ordering::SeqCst);
        assert_eq!(manager.token(&key(None)).await.unwrap().value(), "api-0");
        assert_eq!(manager.next_refresh("u1").unwrap().as_second(), 1_003_060, "must not be asked for at once");
        now.fetch_add(601, Ordering::SeqCst);
        let error = manager.token(&key(None)).await.unwrap_err();
        assert_eq!(error.to_string(), "token ns/robot expired and refresh failed: fake 503");
        api.fail("/api/v1/namespaces/ns/serviceaccounts/robot/token", 503, 0);
        assert_eq!(manager.token(&key(None)).await.unwrap().value(), "api-1");
        assert_eq!(issued.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn refusals_are_ridden_out_and_other_errors_are_not() {
        let (api, manager, _, _) = setup();
        let path = "/api/v1/namespaces/ns/serviceaccounts/robot/token";
        api.fail(path, 403, 2);
        assert_eq!(manager.token(&key(None)).await.unwrap().value(), "api-0");
        api.fail(path, 404, 1);
        let error = manager.token(&key(Some("x"))).await.unwrap_err();
        assert_eq!(error.to_string(), "failed to fetch token: fake 404");
        assert_eq!(TokenManager::standalone().token(&key(None)).await, Err(TokenError::Standalone));
    }

    #[test]
    fn a_long_lived_token_is_renewed_daily() {
        let expires = Timestamp::from_second(10_000_000).unwrap();
        let week = 7 * 24 * 3600;
        let day_old = 10_000_000 - week + 24 * 3600;
        assert!((day_old - 11..=day_old).contains(&refresh_at(expires, week).as_second()));
    }

    #[tokio::test]
    async fn debug_shows_no_token() {
        let (_api, manager, _, _) = setup();
        let token = manager.token(&key(None)).await.unwrap();
        assert!(!format!("{token:?}{manager:?}").contains("api-0"));
    }
}
