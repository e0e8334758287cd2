//! Requests to a k3s server's supervisor: the authority, the cluster's settings, certificates.
//!
//! Source: k3s `pkg/server/handlers`, `pkg/nodepassword/validate.go` (statuses), `pkg/agent/config/config.go` (what an
//! agent sends).

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;

use super::authority::{Authority, AuthorityError};
use super::connection::{Endpoint, Tls};
use super::settings::ServerConfig;
use super::token::Token;

/// Longest request.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Largest answer.
const MAX_REPLY: usize = 1 << 20;
/// What is shown of an error page.
const MAX_MESSAGE: usize = 300;

/// An answer that does not help. Only [`Authority`](Self::Authority) with another hash is terminal; the rest is worth
/// another try: servers start, tokens are made anew.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// Nobody is there, or not with that certificate.
    #[error(
        "cannot reach the k3s server {server}: {source}: check --k3s-server, that the server runs, and that this machine reaches it"
    )]
    Unreachable {
        /// The server.
        server: Endpoint,
        /// Why.
        source: io::Error,
    },
    /// Whoever is there is not to be trusted.
    #[error("k3s server {server}: {source}")]
    Authority {
        /// The server.
        server: Endpoint,
        /// Why.
        source: AuthorityError,
    },
    /// A token without a hash, and another authority than the first time.
    #[error(
        "the k3s server {0} is not of the authority that was trusted the first time: use the full token of /var/lib/rancher/k3s/server/node-token; or, if the cluster was made anew, remove server-ca.crt from --cert-dir to trust the new one"
    )]
    Changed(Endpoint),
    /// 401.
    #[error(
        "the k3s server {0} does not accept the token: use that of /var/lib/rancher/k3s/server/node-token (k3s token list shows tokens that expire)"
    )]
    Unauthorized(Endpoint),
    /// 403 for a certificate: the name belongs to somebody with another password.
    #[error(
        "the k3s server {server} knows node {node} with another password than that of {file} ({message}): give this node another name (--hostname-override), or, if the old node is gone, delete Secret kube-system/{node}.node-password.k3s"
    )]
    Password {
        /// The server.
        server: Endpoint,
        /// Our name.
        node: String,
        /// Where our password is.
        file: String,
        /// The server's words.
        message: String,
    },
    /// 429 and 503.
    #[error("the k3s server {server} is not ready yet ({status}: {message})")]
    NotReady {
        /// The server.
        server: Endpoint,
        /// The status.
        status: StatusCode,
        /// The server's words.
        message: String,
    },
    /// Anything else that is no success.
    #[error(
        "the k3s server {server} answers {path} with {status}: {message}: see the server's log; the token must be one for agents"
    )]
    Refused {
        /// The server.
        server: Endpoint,
        /// What was asked for.
        path: String,
        /// The status.
        status: StatusCode,
        /// The server's words.
        message: String,
    },
    /// A success that makes no sense.
    #[error("the k3s server {server} answers {path} with something else ({problem}): is that a k3s server?")]
    Nonsense {
        /// The server.
        server: Endpoint,
        /// What was asked for.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

/// How a node names itself when it asks for a certificate.
pub(super) struct Applicant<'a> {
    pub(super) node: &'a str,
    pub(super) password: &'a str,
    pub(super) password_file: &'a Path,
    /// Comma between them.
    pub(super) addresses: &'a str,
}

/// A server whose authority was verified.
#[derive(Debug)]
pub(super) struct Supervisor {
    server: Endpoint,
    token: Token,
    authority: Authority,
    /// Our client certificate, once there is one.
    identity: Option<PathBuf>,
}

impl Supervisor {
    /// Asks for the authority and verifies it: by the token's hash, or else that it is the one `known` from before.
    pub(super) async fn find(
        server: &Endpoint,
        token: Token,
        known: Option<Vec<u8>>,
        identity: Option<PathBuf>,
    ) -> Result<Self, SupervisorError> {
        let unreachable = |source| SupervisorError::Unreachable { server: server.clone(), source };
        let distrusted = |source| SupervisorError::Authority { server: server.clone(), source };
        let tls = Tls::unverified().map_err(unreachable)?;
        let request = Ask { method: Method::GET, path: "/cacerts", headers: HeaderMap::new(), body: Bytes::new() };
        let reply = send(server, &tls, &request).await?;
        let pem = success(server, &request, reply)?;
        let pinned = token.ca_hash.is_none() && known.is_some();
        let authority = match (&token.ca_hash, known) {
            (Some(hash), _) => Authority::verified(&pem, Some(hash)),
            // seen before: only that one is believed
            (None, Some(known)) => Authority::verified(&known, None),
            (None, None) => {
                let authority = Authority::verified(&pem, None);
                tracing::warn!(
                    server = %server,
                    "the k3s token has no CA hash: the authority that answers now is trusted from here on; use the full token of node-token to have it verified"
                );
                authority
            }
        }
        .map_err(distrusted)?;
        let supervisor = Self { server: server.clone(), token, authority, identity };
        // as k3s: the server's own certificate must be of that authority
        let tls = supervisor.tls(false)?;
        match send(server, &tls, &request).await {
            Err(SupervisorError::Unreachable { source, .. }) if pinned && is_distrust(&source) => {
                return Err(SupervisorError::Changed(server.clone()));
            }
            reply => success(server, &request, reply?)?,
        };
        Ok(supervisor)
    }

    /// One whose authority was verified before.
    pub(super) fn known(
        server: &Endpoint,
        token: Token,
        authority: &[u8],
        identity: PathBuf,
    ) -> Result<Self, SupervisorError> {
        let authority = Authority::verified(authority, None)
            .map_err(|source| SupervisorError::Authority { server: server.clone(), source })?;
        Ok(Self { server: server.clone(), token, authority, identity: Some(identity) })
    }

    fn tls(&self, with_identity: bool) -> Result<Tls, SupervisorError> {
        let distrusted = |source| SupervisorError::Authority { server: self.server.clone(), source };
        let roots = self.authority.roots().map_err(distrusted)?;
        let identity = self.identity.as_deref().filter(|_| with_identity);
        Tls::new(roots, identity).map_err(|source| SupervisorError::Unreachable { server: self.server.clone(), source })
    }

    /// The cluster's settings.
    pub(super) async fn config(&self) -> Result<ServerConfig, SupervisorError> {
        const PATH: &str = "/v1-k3s/config";
        let reply = self.get(PATH).await?;
        serde_json::from_slice(&reply).map_err(|error| self.nonsense(PATH, error.to_string()))
    }

    /// The servers there are (`host:port`); empty where the server does not know, or is too old to say.
    pub(super) async fn api_servers(&self) -> Result<Vec<String>, SupervisorError> {
        const PATH: &str = "/v1-k3s/apiservers";
        let reply = self.get(PATH).await?;
        let list: Option<Vec<String>> =
            serde_json::from_slice(&reply).map_err(|error| self.nonsense(PATH, error.to_string()))?;
        Ok(list.unwrap_or_default())
    }

    /// A file of certificates.
    pub(super) async fn certificates(&self, path: &str) -> Result<Bytes, SupervisorError> {
        let reply = self.get(path).await?;
        match Authority::verified(&reply, None) {
            Ok(_) => Ok(reply),
            Err(error) => Err(self.nonsense(path, error.to_string())),
        }
    }

    /// Asks for a certificate with a request (DER); what comes is PEM, with a key if the server chose it.
    pub(super) async fn sign(
        &self,
        path: &str,
        applicant: &Applicant<'_>,
        request: Vec<u8>,
    ) -> Result<String, SupervisorError> {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("k3s-node-name", applicant.node),
            ("k3s-node-password", applicant.password),
            ("k3s-node-ip", applicant.addresses),
        ] {
            let value =
                HeaderValue::from_str(value).map_err(|error| self.nonsense(path, format!("{name}: {error}")))?;
            headers.insert(HeaderName::from_static(name), value);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let ask = Ask { method: Method::POST, path, headers, body: request.into() };
        let reply = match self.authenticated(ask).await {
            // with that word alone it is about who asks (k3s `doAuth`), not about the password
            Err(SupervisorError::Refused { status: StatusCode::FORBIDDEN, message, server, .. })
                if message != "forbidden" =>
            {
                return Err(SupervisorError::Password {
                    server,
                    node: applicant.node.to_owned(),
                    file: applicant.password_file.display().to_string(),
                    message,
                });
            }
            reply => reply?,
        };
        String::from_utf8(reply.to_vec()).map_err(|error| self.nonsense(path, error.to_string()))
    }

    async fn get(&self, path: &str) -> Result<Bytes, SupervisorError> {
        self.authenticated(Ask { method: Method::GET, path, headers: HeaderMap::new(), body: Bytes::new() }).await
    }

    /// With all that proves who we are; once more without our certificate if that is why we are refused: the Node it
    /// is of may have been deleted.
    async fn authenticated(&self, mut ask: Ask<'_>) -> Result<Bytes, SupervisorError> {
        let mut secret = HeaderValue::from_str(self.token.authorization())
            .map_err(|error| self.nonsense(ask.path, format!("the token is no header: {error}")))?;
        secret.set_sensitive(true);
        ask.headers.insert(AUTHORIZATION, secret);
        let mut reply = send(&self.server, &self.tls(true)?, &ask).await?;
        if reply.status() == StatusCode::UNAUTHORIZED && self.identity.is_some() {
            tracing::info!(server = %self.server, "our certificate is not accepted, trying with the token");
            reply = send(&self.server, &self.tls(false)?, &ask).await?;
        }
        success(&self.server, &ask, reply)
    }

    fn nonsense(&self, path: &str, problem: String) -> SupervisorError {
        SupervisorError::Nonsense { server: self.server.clone(), path: path.to_owned(), problem }
    }
}

/// Whether TLS failed for want of trust.
fn is_distrust(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

/// One request.
struct Ask<'a> {
    method: Method,
    path: &'a str,
    headers: HeaderMap,
    body: Bytes,
}

/// Sends a request on a connection of its own, as k3s' agents do.
async fn send(server: &Endpoint, tls: &Tls, ask: &Ask<'_>) -> Result<http::Response<Bytes>, SupervisorError> {
    let attempt = async {
        let stream = tls.connect(server).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let mut request = Request::new(Full::new(ask.body.clone()));
        *request.method_mut() = ask.method.clone();
        *request.uri_mut() = ask.path.parse().map_err(io::Error::other)?;
        *request.headers_mut() = ask.headers.clone();
        let host = HeaderValue::from_str(&server.to_string()).map_err(io::Error::other)?;
        request.headers_mut().insert(HOST, host);
        request
            .headers_mut()
            .insert(USER_AGENT, HeaderValue::from_static(concat!("gantry/", env!("CARGO_PKG_VERSION"))));
        let exchange = async {
            let (parts, body) = sender.send_request(request).await.map_err(io::Error::other)?.into_parts();
            let body = Limited::new(body, MAX_REPLY).collect().await.map_err(io::Error::other)?.to_bytes();
            Ok(http::Response::from_parts(parts, body))
        };
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            reply = &mut exchange => reply,
            // the connection's end is known to the exchange too, which says more
            _ = connection => exchange.await,
        }
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer within 20 s");
    tokio::time::timeout(TIMEOUT, attempt)
        .await
        .unwrap_or_else(|_| Err(late()))
        .map_err(|source| SupervisorError::Unreachable { server: server.clone(), source })
}

fn success(server: &Endpoint, ask: &Ask<'_>, reply: http::Response<Bytes>) -> Result<Bytes, SupervisorError> {
    let (server, status) = (server.clone(), reply.status());
    let message = || words(reply.body());
    Err(match status {
        StatusCode::OK => return Ok(reply.into_body()),
        StatusCode::UNAUTHORIZED => SupervisorError::Unauthorized(server),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            SupervisorError::NotReady { server, status, message: message() }
        }
        _ => SupervisorError::Refused { server, path: ask.path.to_owned(), status, message: message() },
    })
}

/// The beginning of an error page, on one line. A `Status` object is reduced to its message.
fn words(body: &[u8]) -> String {
    let message = serde_json::from_slice::<serde_json::Value>(body).ok();
    let message = message.and_then(|value| Some(value.get("message")?.as_str()?.to_owned()));
    let text = message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_pages_are_short_and_on_one_line() {
        assert_eq!(words(br#"{"kind":"Status","message":"not\nauthorized"}"#), "not authorized");
        assert_eq!(words(b"a\x1b[1m\r\n b"), "a[1m b");
        assert_eq!(words("ä".repeat(1000).as_bytes()).chars().count(), MAX_MESSAGE);
    }
}
