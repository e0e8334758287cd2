//! Who asks, and whether they may.
//!
//! In the order of the kubelet: a client certificate, a bearer token (TokenReview), anonymous if that is enabled.
//! Then a SubjectAccessReview for each [subresource](super::attributes) until one is allowed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION};
use ring::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};

use super::{
    attributes,
    cache::TtlCache,
    client_ca::{ClientCa, PeerCertificates},
};

/// Tokens and decisions remembered at once.
const CACHE_ENTRIES: usize = 4096;

/// An authenticated user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct UserInfo {
    /// Name.
    pub name: String,
    /// UID, if the authenticator knows one.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// What else the authenticator says.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// One question to the authorizer: may `user` do `verb` on `nodes/<subresource>` of this node?
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AccessReview {
    /// Who.
    pub user: UserInfo,
    /// What.
    pub verb: &'static str,
    /// On what.
    pub subresource: &'static str,
}

/// A review that could not be made, for example because the API server cannot be reached. Retryable: nothing is
/// remembered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReviewError(pub String);

/// Asks the API server.
pub trait Reviewer: Send + Sync {
    /// Whose token this is; `None` if nobody's.
    fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<UserInfo>, ReviewError>>;
    /// Whether it is allowed.
    fn access<'a>(&'a self, review: &'a AccessReview) -> BoxFuture<'a, Result<bool, ReviewError>>;
}

/// `authentication` and `authorization` of the kubelet's configuration.
#[derive(Clone, Copy, Debug)]
pub struct AuthConfig {
    /// `authentication.anonymous.enabled`.
    pub anonymous: bool,
    /// `authentication.webhook`: its `cacheTTL`, or `None` if it is not enabled.
    pub token_review: Option<Duration>,
    /// `authorization.mode`.
    pub authorization: AuthorizationMode,
}

/// `authorization.mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthorizationMode {
    /// `AlwaysAllow`.
    AlwaysAllow,
    /// `Webhook`, with how long answers are kept.
    Webhook {
        /// `cacheAuthorizedTTL`.
        authorized: Duration,
        /// `cacheUnauthorizedTTL`.
        unauthorized: Duration,
    },
}

impl Default for AuthConfig {
    fn default() -> Self {
        let (authorized, unauthorized) = (Duration::from_secs(300), Duration::from_secs(30));
        let authorization = AuthorizationMode::Webhook { authorized, unauthorized };
        Self { anonymous: false, token_review: Some(Duration::from_secs(120)), authorization }
    }
}

/// A request that is not served, with the answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{body}")]
pub struct Denied {
    /// 401, 403, or 500 if the API server could not be asked.
    pub status: StatusCode,
    /// Plain text.
    pub body: String,
}

/// Authentication and authorization of requests.
pub struct Auth {
    config: AuthConfig,
    client_ca: Arc<ClientCa>,
    reviewer: Arc<dyn Reviewer>,
    /// Tokens are remembered by a keyed hash: nothing in memory can be turned back into one.
    token_key: hmac::Key,
    tokens: TtlCache<[u8; 32], Option<UserInfo>>,
    decisions: TtlCache<AccessReview, bool>,
}

impl Auth {
    /// Puts the parts together.
    ///
    /// # Errors
    /// If the system has no randomness for the key of the token cache.
    pub fn new(config: AuthConfig, client_ca: Arc<ClientCa>, reviewer: Arc<dyn Reviewer>) -> std::io::Result<Self> {
        let mut key = [0; 32];
        SystemRandom::new().fill(&mut key).map_err(|_| std::io::Error::other("no random numbers"))?;
        let token_key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        let (tokens, decisions) = (TtlCache::new(CACHE_ENTRIES), TtlCache::new(CACHE_ENTRIES));
        Ok(Self { config, client_ca, reviewer, token_key, tokens, decisions })
    }

    /// Who asks, if they may.
    ///
    /// # Errors
    /// [`Denied`], with the kubelet's texts.
    pub async fn admit(
        &self,
        peer: &PeerCertificates,
        headers: &HeaderMap,
        method: &Method,
        path: &str,
    ) -> Result<UserInfo, Denied> {
        let Some(user) = self.authenticate(peer, headers).await else {
            return Err(Denied { status: StatusCode::UNAUTHORIZED, body: "Unauthorized".into() });
        };
        let AuthorizationMode::Webhook { authorized, unauthorized } = self.config.authorization else {
            return Ok(user);
        };
        let verb = attributes::verb(method, path);
        let subresources = attributes::subresources(path);
        for subresource in subresources.iter().copied() {
            let review = AccessReview { user: user.clone(), verb, subresource };
            let allowed = match self.decisions.get(&review) {
                Some(allowed) => allowed,
                None => {
                    let allowed = self.reviewer.access(&review).await.map_err(|error| {
                        tracing::error!(user = user.name, verb, subresource, %error, "Authorization error");
                        let name = &user.name;
                        let body = format!(
                            "Authorization error (user={name}, verb={verb}, resource=nodes, subresource={subresource})"
                        );
                        Denied { status: StatusCode::INTERNAL_SERVER_ERROR, body }
                    })?;
                    self.decisions.insert(review, allowed, if allowed { authorized } else { unauthorized });
                    allowed
                }
            };
            if allowed {
                return Ok(user);
            }
        }
        let (name, list) = (&user.name, subresources.join(" "));
        let body = format!("Forbidden (user={name}, verb={verb}, resource=nodes, subresource(s)=[{list}])\n");
        Err(Denied { status: StatusCode::FORBIDDEN, body })
    }

    async fn authenticate(&self, peer: &PeerCertificates, headers: &HeaderMap) -> Option<UserInfo> {
        let mut user = match self.client_ca.user(peer) {
            Some(user) => user,
            None => match bearer_token(headers) {
                // A token that is nobody's does not make its bearer anonymous.
                Some(token) => self.token_user(token).await?,
                None if self.config.anonymous => {
                    let groups = vec!["system:unauthenticated".into()];
                    return Some(UserInfo { name: "system:anonymous".into(), groups, ..UserInfo::default() });
                }
                None => return None,
            },
        };
        let authenticated = "system:authenticated";
        if !user.groups.iter().any(|group| group == authenticated) {
            user.groups.push(authenticated.into());
        }
        Some(user)
    }

    async fn token_user(&self, token: &str) -> Option<UserInfo> {
        let ttl = self.config.token_review?;
        let mut key = [0; 32];
        key.copy_from_slice(hmac::sign(&self.token_key, token.as_bytes()).as_ref());
        if let Some(user) = self.tokens.get(&key) {
            return user;
        }
        match self.reviewer.token(token).await {
            Ok(user) => {
                self.tokens.insert(key, user.clone(), ttl);
                user
            }
            Err(error) => {
                tracing::error!(%error, "Unable to authenticate the request due to an error");
                None
            }
        }
    }
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::FutureExt;
    use http::HeaderValue;

    use super::*;

    /// Knows one token, and who may do what: pairs of user and subresource.
    #[derive(Default)]
    struct Fake {
        allowed: Vec<(&'static str, &'static str)>,
        broken: bool,
        asked: Mutex<Vec<String>>,
    }

    impl Reviewer for Fake {
        fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<UserInfo>, ReviewError>> {
            self.asked.lock().expect("lock").push("token".into());
            let user = (token == "secret").then(|| UserInfo { name: "alice".into(), ..UserInfo::default() });
            async move { if self.broken { Err(ReviewError("down".into())) } else { Ok(user) } }.boxed()
        }

        fn access<'a>(&'a self, review: &'a AccessReview) -> BoxFuture<'a, Result<bool, ReviewError>> {
            self.asked.lock().expect("lock").push(format!("{} {}", review.verb, review.subresource));
            let allowed = self.allowed.contains(&(review.user.name.as_str(), review.subresource));
            async move { if self.broken { Err(ReviewError("down".into())) } else { Ok(allowed) } }.boxed()
        }
    }

    fn auth(config: AuthConfig, fake: Fake) -> (Auth, Arc<Fake>) {
        let fake = Arc::new(fake);
        (Auth::new(config, Arc::new(ClientCa::none()), Arc::clone(&fake) as _).expect("auth"), fake)
    }

    fn token(token: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")).expect("value"));
        headers
    }

    async fn status(auth: &Auth, headers: &HeaderMap, path: &str) -> (u16, String) {
        match auth.admit(&PeerCertificates::default(), headers, &Method::GET, path).await {
            Ok(user) => (200, user.name),
            Err(denied) => (denied.status.as_u16(), denied.body),
        }
    }

    #[tokio::test]
    async fn tokens_and_subresources() {
        let (auth, fake) = auth(AuthConfig::default(), Fake { allowed: vec![("alice", "proxy")], ..Fake::default() });
        assert_eq!(status(&auth, &HeaderMap::new(), "/pods").await, (401, "Unauthorized".into()));
        assert_eq!(status(&auth, &token("wrong"), "/pods").await.0, 401);
        assert_eq!(status(&auth, &token("secret"), "/pods").await, (200, "alice".into()));
        let (code, body) = status(&auth, &token("secret"), "/metrics").await;
        let expected = "Forbidden (user=alice, verb=get, resource=nodes, subresource(s)=[metrics])\n";
        assert_eq!((code, body.as_str()), (403, expected));
        // All of it again comes from the caches.
        let before = fake.asked.lock().expect("lock").clone();
        assert_eq!(before, ["token", "token", "get pods", "get proxy", "get metrics"]);
        assert_eq!(status(&auth, &token("secret"), "/pods").await.0, 200);
        assert_eq!(status(&auth, &token("secret"), "/metrics").await.0, 403);
        assert_eq!(status(&auth, &token("wrong"), "/pods").await.0, 401);
        assert_eq!(*fake.asked.lock().expect("lock"), before);
    }

    #[tokio::test]
    async fn an_unreachable_api_server_denies_and_is_asked_again() {
        let (auth, fake) =
            auth(AuthConfig { anonymous: true, ..AuthConfig::default() }, Fake { broken: true, ..Fake::default() });
        assert_eq!(status(&auth, &token("secret"), "/pods").await.0, 401);
        let (code, body) = status(&auth, &HeaderMap::new(), "/pods").await;
        let expected = "Authorization error (user=system:anonymous, verb=get, resource=nodes, subresource=pods)";
        assert_eq!((code, body.as_str()), (500, expected));
        status(&auth, &HeaderMap::new(), "/pods").await;
        assert_eq!(*fake.asked.lock().expect("lock"), ["token", "get pods", "get pods"]);
    }

    #[tokio::test]
    async fn modes() {
        let config = AuthConfig { anonymous: true, authorization: AuthorizationMode::AlwaysAllow, token_review: None };
        let (auth, fake) = auth(config, Fake::default());
        assert_eq!(status(&auth, &HeaderMap::new(), "/exec/a/b/c").await, (200, "system:anonymous".into()));
        assert_eq!(status(&auth, &token("secret"), "/pods").await.0, 401, "tokens are not accepted at all");
        assert!(fake.asked.lock().expect("lock").is_empty());
    }
}
