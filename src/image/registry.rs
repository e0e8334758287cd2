//! The client side of the OCI distribution specification: manifests and blobs, bounded and with deadlines.
//!
//! Built on `reqwest` rather than on a registry crate: those read manifests, tokens and error pages of any size into
//! memory and panic on a token that is not a valid header.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::Mutex;

use super::auth::{self, Challenge};
use super::credentials::Credential;
use super::digest::Digest;
use super::error::ImageError;
use super::manifest::{DOCKER_LIST, DOCKER_MANIFEST, MAX_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use super::reference::{Reference, Target};

/// Tries of one request, the first included.
pub(super) const ATTEMPTS: u32 = 5;
/// First pause between tries; doubles.
const BACKOFF: Duration = Duration::from_millis(200);
/// Longest pause between tries, also where the registry asks for more.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Largest error page or token that is read.
pub(super) const MAX_REPLY: u64 = 64 << 10;
const MAX_REDIRECTS: usize = 10;

/// The HTTP client that all pulls share.
#[derive(Debug)]
pub(super) struct Registry {
    client: reqwest::Client,
    insecure: Arc<HashSet<String>>,
}

impl Registry {
    pub fn new(insecure: &[String], connect: Duration, read: Duration) -> Result<Self, ImageError> {
        let insecure: Arc<HashSet<String>> = Arc::new(insecure.iter().cloned().collect());
        let plain = Arc::clone(&insecure);
        let redirects = || {
            let plain = Arc::clone(&plain);
            reqwest::redirect::Policy::custom(move |attempt| {
                if attempt.previous().len() > MAX_REDIRECTS {
                    return attempt.error("too many redirects");
                }
                let host = match (attempt.url().host_str(), attempt.url().port()) {
                    (Some(host), Some(port)) => format!("{host}:{port}"),
                    (Some(host), None) => host.to_owned(),
                    (None, _) => String::new(),
                };
                // reqwest itself takes the Authorization header off when the host changes.
                if attempt.url().scheme() == "https" || plain_http(&host, &plain) {
                    attempt.follow()
                } else {
                    attempt.error("redirect to plain HTTP")
                }
            })
        };
        // Does nothing if the process has chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("gantry/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(connect)
                .read_timeout(read)
                .redirect(redirects())
        };
        let client = builder().build().or_else(|error| {
            // a machine without certificate authorities can still use registries that need none
            tracing::warn!(
                error = describe(error),
                "no HTTPS registry can be trusted: install the package ca-certificates and restart"
            );
            builder().tls_certs_only([]).build()
        });
        let client =
            client.map_err(|e| ImageError::RegistryUnavailable { name: "(any)".to_owned(), detail: describe(e) })?;
        Ok(Self { client, insecure })
    }

    /// Whether a host is spoken to without TLS.
    pub fn is_plain(&self, host: &str) -> bool {
        plain_http(host, &self.insecure)
    }
}

/// Loopback hosts, as containerd does, and those that the administrator named.
fn plain_http(host: &str, insecure: &HashSet<String>) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name == "localhost" || address.is_ok_and(|a| a.is_loopback()) || insecure.contains(host) || insecure.contains(name)
}

/// Requests to one repository with one credential.
pub(super) struct Session {
    registry: Arc<Registry>,
    name: String,
    base: String,
    repository: String,
    credential: Option<Credential>,
    /// What the registry's challenge led to; shared by the parallel downloads of a pull.
    authorization: Mutex<Option<HeaderValue>>,
}

/// A body that is being read: from `skip` bytes before the wanted offset, if the registry ignored the range.
pub(super) struct Body {
    response: Response,
    skip: u64,
}

impl Session {
    pub fn new(registry: Arc<Registry>, reference: &Reference, credential: Option<Credential>) -> Self {
        let host = reference.registry_host();
        let scheme = if registry.is_plain(host) { "http" } else { "https" };
        Self {
            name: reference.to_string(),
            base: format!("{scheme}://{host}/v2/{}", reference.path()),
            repository: reference.path().to_owned(),
            credential,
            authorization: Mutex::new(None),
            registry,
        }
    }

    /// The image's name, for errors.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a tag points at now, without fetching it. `None` if the registry does not say.
    pub async fn resolve(&self, target: &Target) -> Result<Option<Digest>, ImageError> {
        let response = self.send(Method::HEAD, &self.manifest_url(target), manifest_headers(), &self.name).await?;
        let digest = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
        Ok(digest.and_then(|d| d.parse().ok()))
    }

    /// A manifest or index, and its digest. One that is asked for by digest is checked against it.
    pub async fn manifest(&self, target: &Target) -> Result<(Bytes, Digest), ImageError> {
        let what = match target {
            Target::Tag(_) => self.name.clone(),
            Target::Digest(digest) => format!("manifest {digest}"),
        };
        let url = self.manifest_url(target);
        let bytes = self.get_bounded(&url, manifest_headers(), &what, MAX_MANIFEST).await?;
        let digest = match target {
            Target::Tag(_) => Digest::sha256(&bytes),
            Target::Digest(digest) if digest.verifies(&bytes) => digest.clone(),
            Target::Digest(digest) => {
                return Err(self.corrupt(format!("the registry sent something else for manifest {digest}")));
            }
        };
        Ok((bytes, digest))
    }

    /// A small blob, checked against its digest.
    pub async fn small_blob(&self, digest: &Digest) -> Result<Bytes, ImageError> {
        let what = format!("blob {digest}");
        let bytes = self.get_bounded(&self.blob_url(digest), HeaderMap::new(), &what, MAX_MANIFEST).await?;
        if digest.verifies(&bytes) {
            Ok(bytes)
        } else {
            Err(self.corrupt(format!("the registry sent something else for {what}")))
        }
    }

    /// Starts to read a blob at `offset`.
    pub async fn blob(&self, digest: &Digest, offset: u64) -> Result<Body, ImageError> {
        let mut headers = HeaderMap::new();
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            headers.insert(RANGE, range);
        }
        let response = self.send(Method::GET, &self.blob_url(digest), headers, &format!("blob {digest}")).await?;
        let skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { offset };
        Ok(Body { response, skip })
    }

    /// Content that is not what was asked for: somebody's error or attack, and asking again does not help.
    pub fn corrupt(&self, detail: String) -> ImageError {
        ImageError::pull(&self.name, detail)
    }

    fn manifest_url(&self, target: &Target) -> String {
        match target {
            Target::Tag(tag) => format!("{}/manifests/{tag}", self.base),
            Target::Digest(digest) => format!("{}/manifests/{digest}", self.base),
        }
    }

    fn blob_url(&self, digest: &Digest) -> String {
        format!("{}/blobs/{digest}", self.base)
    }

    /// Reads a whole body of at most `limit` bytes; tries again if the connection breaks.
    async fn get_bounded(&self, url: &str, headers: HeaderMap, what: &str, limit: u64) -> Result<Bytes, ImageError> {
        let mut attempt = 1;
        loop {
            let response = self.send(Method::GET, url, headers.clone(), what).await?;
            match read_bounded(response, limit).await {
                Ok(Some(bytes)) => return Ok(bytes),
                Ok(None) => return Err(self.corrupt(format!("{what} is larger than the limit of {limit} bytes"))),
                Err(error) if attempt == ATTEMPTS => return Err(self.unavailable(describe(error))),
                Err(_) => pause(attempt, None).await,
            }
            attempt += 1;
        }
    }

    /// Sends a request, answers challenges, tries again after transient failures. Only successes come back.
    async fn send(&self, method: Method, url: &str, headers: HeaderMap, what: &str) -> Result<Response, ImageError> {
        let mut attempt = 1;
        let mut challenged = false;
        loop {
            let authorization = self.authorization.lock().await.clone();
            let mut request = self.registry.client.request(method.clone(), url).headers(headers.clone());
            if let Some(value) = &authorization {
                request = request.header(AUTHORIZATION, value);
            }
            let wait = match request.send().await {
                Err(error) if attempt == ATTEMPTS || error.is_redirect() || error.is_builder() => {
                    return Err(self.unavailable(describe(error)));
                }
                Err(_) => None,
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && !challenged => {
                    challenged = true;
                    self.answer(response, authorization).await?;
                    continue;
                }
                Ok(response) if is_transient(response.status()) && attempt < ATTEMPTS => retry_after(&response),
                Ok(response) => return Err(self.refused(response, what).await),
            };
            pause(attempt, wait).await;
            attempt += 1;
        }
    }

    /// Turns a 401 into an `Authorization` header for the next request.
    async fn answer(&self, response: Response, used: Option<HeaderValue>) -> Result<(), ImageError> {
        let challenge = Challenge::from_headers(response.headers());
        let mut slot = self.authorization.lock().await;
        if *slot != used {
            // A parallel download has just renewed it.
            return Ok(());
        }
        let value = match challenge {
            Some(Challenge::Basic) => match &self.credential {
                Some(credential) => auth::basic(credential),
                None => return Err(self.denied("the registry wants a user name and a password")),
            },
            Some(Challenge::Bearer(bearer)) => {
                // A realm in the clear would show the password to everybody on the way.
                let realm = reqwest::Url::parse(&bearer.realm)
                    .map_err(|_| self.denied("the registry's token server has no valid URL"))?;
                let host = realm.host_str().unwrap_or_default();
                let host = realm.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
                if realm.scheme() != "https" && !self.registry.is_plain(&host) {
                    return Err(self.denied("the registry's token server is not reached by https"));
                }
                self.token(realm, &bearer).await?
            }
            None => return Err(self.denied("the registry asks for authentication in a way that is not supported")),
        };
        *slot = Some(value.ok_or_else(|| self.denied("the credentials hold characters that HTTP cannot carry"))?);
        Ok(())
    }

    async fn token(&self, realm: reqwest::Url, bearer: &auth::Bearer) -> Result<Option<HeaderValue>, ImageError> {
        let mut attempt = 1;
        loop {
            let request = auth::token_request(
                &self.registry.client,
                realm.clone(),
                bearer,
                &self.repository,
                self.credential.as_ref(),
            );
            let wait = match request.send().await {
                Err(error) if attempt == ATTEMPTS => return Err(self.unavailable(describe(error))),
                Err(_) => None,
                Ok(response) if response.status().is_success() => {
                    let body = read_bounded(response, MAX_REPLY).await.map_err(|e| self.unavailable(describe(e)))?;
                    let body = body.ok_or_else(|| self.denied("the token server's reply is too long"))?;
                    return auth::bearer_header(&body)
                        .ok_or_else(|| self.denied("the token server sent no token"))
                        .map(Some);
                }
                Ok(response) if is_transient(response.status()) && attempt < ATTEMPTS => retry_after(&response),
                Ok(response) => return Err(self.refused(response, "token").await),
            };
            pause(attempt, wait).await;
            attempt += 1;
        }
    }

    async fn refused(&self, response: Response, what: &str) -> ImageError {
        let status = response.status();
        let message = match read_bounded(response, MAX_REPLY).await {
            Ok(Some(body)) => auth::server_message(&body),
            _ => String::new(),
        };
        let detail = if message.is_empty() { status.to_string() } else { format!("server message: {message}") };
        match status {
            StatusCode::NOT_FOUND => ImageError::NotFound { name: self.name.clone(), what: what.to_owned() },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.denied(&detail),
            StatusCode::TOO_MANY_REQUESTS => ImageError::Pull {
                name: self.name.clone(),
                detail: format!("the registry limits the rate of requests ({detail})"),
                transient: true,
            },
            status if status.is_server_error() => self.unavailable(format!("{status} for {what}")),
            status => ImageError::pull(&self.name, format!("unexpected status {status} for {what}: {detail}")),
        }
    }

    fn denied(&self, detail: &str) -> ImageError {
        ImageError::AccessDenied { name: self.name.clone(), detail: detail.to_owned() }
    }

    /// The registry cannot be reached.
    pub fn unavailable(&self, detail: String) -> ImageError {
        ImageError::RegistryUnavailable { name: self.name.clone(), detail }
    }
}

impl Body {
    /// The next bytes; `None` at the end. An error is the connection's and worth another try.
    pub async fn next(&mut self) -> Result<Option<Bytes>, String> {
        while let Some(mut bytes) = self.response.chunk().await.map_err(describe)? {
            let skip = self.skip.min(bytes.len() as u64);
            self.skip -= skip;
            // At most the length of the bytes.
            let bytes = bytes.split_off(usize::try_from(skip).unwrap_or(bytes.len()));
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }
}

fn manifest_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
    if let Ok(value) = HeaderValue::from_str(&accept) {
        headers.insert(ACCEPT, value);
    }
    headers
}

fn is_transient(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_BACKOFF))
}

/// Waits before try `attempt + 1`: doubling, with jitter, so that a node's pulls do not come back in step.
pub(super) async fn pause(attempt: u32, asked: Option<Duration>) {
    let base = BACKOFF.saturating_mul(1 << attempt.saturating_sub(1).min(10)).min(MAX_BACKOFF);
    let jitter = Duration::from_millis(fastrand::u64(0..=100));
    tokio::time::sleep(asked.unwrap_or(base) + jitter).await;
}

/// `None` if the body is longer than `limit`.
async fn read_bounded(mut response: Response, limit: u64) -> Result<Option<Bytes>, reqwest::Error> {
    if response.content_length().is_some_and(|length| length > limit) {
        return Ok(None);
    }
    let mut body = bytes::BytesMut::new();
    while let Some(piece) = response.chunk().await? {
        if (body.len() + piece.len()) as u64 > limit {
            return Ok(None);
        }
        body.extend_from_slice(&piece);
    }
    Ok(Some(body.freeze()))
}

/// The whole chain of causes, without the URL: redirects carry signatures in theirs.
fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn certificates_are_checked() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let registry = Registry::new(&[], Duration::from_secs(5), Duration::from_secs(5)).unwrap();
        let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![own.cert.der().clone()], key).unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            acceptor.accept(stream).await.is_ok()
        });
        let error = registry.client.get(format!("https://{address}/v2/?secret=1")).send().await.unwrap_err();
        let error = describe(error);
        assert!(error.contains("certificate") && !error.contains("secret"), "{error}");
        assert!(!server.await.unwrap());
    }

    #[test]
    fn only_loopback_and_named_hosts_are_plain() {
        let insecure = HashSet::from(["reg.local:5000".to_owned(), "bare".to_owned()]);
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:5000",
            "[::1]",
            "reg.local:5000",
            "bare:1",
        ] {
            assert!(plain_http(host, &insecure), "{host}");
        }
        for host in
            ["reg.local", "reg.local:5001", "10.0.0.1:5000", "localhost.evil", "127.0.0.1.evil:80", "[::2]:5000"]
        {
            assert!(!plain_http(host, &insecure), "{host}");
        }
    }
}
