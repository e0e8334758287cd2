//! Our connection to the API server: a [`kube::Client`] whose credentials can be replaced while it is in use.
//!
//! Everybody keeps a clone of one client. Below it stands a second one that is rebuilt from the kubeconfig when a
//! certificate was rotated: running requests and watches end on the old connections, new ones use the new.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::watch;
use tower::{BoxError, ServiceBuilder, service_fn};

use super::certs::{self, CertStore};
use super::rate::TokenBucket;
use super::resolve::HostResolver;

/// Longest ordinary request, and longest wait for a watch to begin.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time to a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What we call ourselves in the API server's audit log.
const USER_AGENT: &str = concat!("gantry/", env!("CARGO_PKG_VERSION"), " (linux/", "node) kubernetes/v1.37.2");

/// A client that cannot be made. `Kubeconfig` may pass when somebody writes the file; the rest is terminal.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file is missing, no kubeconfig, or names missing files.
    #[error("unable to load kubeconfig {}: {source}: check the file and the certificates it names", .path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: kube::config::KubeconfigError,
    },
    /// Its credentials cannot be used.
    #[error("unable to use the credentials of kubeconfig {}: {source}", .path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<kube::Error>,
    },
}

/// Limits of one client.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Requests a second; 0 for no limit.
    pub qps: f64,
    /// Requests at once above that.
    pub burst: f64,
    /// Deadline of an ordinary request.
    pub timeout: Duration,
}

impl Limits {
    /// `kubeAPIQPS` and `kubeAPIBurst`, where 0 means client-go's kubelet defaults.
    #[must_use]
    pub fn from_config(config: &crate::config::KubeletConfiguration) -> Self {
        let or = |value: i32, default: f64| if value == 0 { default } else { f64::from(value) };
        Self { qps: or(config.kube_api_qps, 50.0), burst: or(config.kube_api_burst, 100.0), timeout: REQUEST_TIMEOUT }
    }

    /// For heartbeats: never held back, never slow.
    #[must_use]
    pub fn heartbeat(timeout: Duration) -> Self {
        Self { qps: 0.0, burst: 0.0, timeout }
    }
}

/// Where credentials come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The API server, and credentials if there are no better ones.
    pub kubeconfig: PathBuf,
    /// Certificate and key in one file that replace the kubeconfig's while they are valid: what rotation writes.
    pub rotated: Option<PathBuf>,
}

impl Credentials {
    /// Those of the configuration, which must have a kubeconfig; nothing in standalone mode.
    #[must_use]
    pub fn from_config(config: &crate::config::Config) -> Option<Self> {
        let kubeconfig = config.kubeconfig.clone()?;
        let store = CertStore::client(&config.paths.cert_dir);
        Some(Self { kubeconfig, rotated: config.kubelet.rotate_certificates.then(|| store.current_path()) })
    }
}

/// The replaceable client; cheap to clone.
#[derive(Clone)]
pub struct ApiClient {
    credentials: Credentials,
    current: Arc<RwLock<Client>>,
    client: Client,
}

impl std::fmt::Debug for ApiClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiClient").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

impl ApiClient {
    /// Reads the credentials and prepares a client; nothing is sent. Must run inside the tokio runtime that will
    /// drive its connections.
    pub async fn new(credentials: Credentials, limits: Limits) -> Result<Self, ClientError> {
        let current = Arc::new(RwLock::new(connect(&credentials).await?));
        let bucket = Arc::new(TokenBucket::new(limits.qps, limits.burst));
        let inner = Arc::clone(&current);
        let service = service_fn(move |request| send(Arc::clone(&inner), Arc::clone(&bucket), limits.timeout, request));
        let client = Client::new(service, "default");
        Ok(Self { credentials, current, client })
    }

    /// The client to use; clones of it follow every later [`reload`](Self::reload).
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Reads the kubeconfig and its certificates again; new requests use new connections. On error the old
    /// credentials stay in use.
    pub async fn reload(&self) -> Result<(), ClientError> {
        let fresh = connect(&self.credentials).await?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        tracing::info!(kubeconfig = %self.credentials.kubeconfig.display(), "API client uses new credentials");
        Ok(())
    }

    /// Reloads whenever rotation announces new certificates; ends when nobody can announce any more.
    pub async fn follow(&self, mut rotated: watch::Receiver<u64>) {
        while rotated.changed().await.is_ok() {
            if let Err(error) = self.reload().await {
                tracing::error!(%error, "the API client keeps its old credentials");
            }
        }
    }
}

/// A request that took too long.
#[derive(Debug, thiserror::Error)]
#[error("the API server did not answer {method} {path} within {} s", .timeout.as_secs())]
struct TooSlow {
    method: http::Method,
    path: String,
    timeout: Duration,
}

async fn send(
    current: Arc<RwLock<Client>>,
    bucket: Arc<TokenBucket>,
    timeout: Duration,
    request: Request<Body>,
) -> Result<Response<Body>, BoxError> {
    bucket.acquire().await;
    let client = current.read().unwrap_or_else(PoisonError::into_inner).clone();
    let streams = request
        .uri()
        .query()
        .is_some_and(|query| query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1" | "follow=true")));
    let slow = TooSlow { method: request.method().clone(), path: request.uri().path().to_owned(), timeout };
    let answer = async {
        let response = client.send(request).await?;
        if streams {
            return Ok(response);
        }
        // the deadline covers the body too
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await?.to_bytes();
        Ok(Response::from_parts(parts, Body::from(bytes)))
    };
    tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| Err(slow.into()))
}

/// The kubeconfig's current context; certificate files are read now.
pub(super) async fn load_config(kubeconfig: &Path) -> Result<Config, ClientError> {
    let failed = |source| ClientError::Kubeconfig { path: kubeconfig.to_owned(), source };
    let path = kubeconfig.to_owned();
    let file = tokio::task::spawn_blocking(move || Kubeconfig::read_from(path));
    let file = file.await.unwrap_or(Err(kube::config::KubeconfigError::CurrentContextNotSet)).map_err(failed)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)
}

/// One plain client for the kubeconfig's current context, with our resolver.
async fn connect(credentials: &Credentials) -> Result<Client, ClientError> {
    let kubeconfig = &credentials.kubeconfig;
    let mut config = load_config(kubeconfig).await?;
    if let Some(path) = &credentials.rotated
        && certs::read(path).is_ok_and(|pair| pair.is_some_and(|pair| pair.not_after > jiff::Timestamp::now()))
    {
        let text = path.to_string_lossy().into_owned();
        config.auth_info.client_certificate = Some(text.clone());
        config.auth_info.client_key = Some(text);
        config.auth_info.client_certificate_data = None;
        config.auth_info.client_key_data = None;
    }
    config.headers.push((http::header::USER_AGENT, http::HeaderValue::from_static(USER_AGENT)));
    build(&config).map_err(|source| ClientError::Credentials { path: kubeconfig.clone(), source: source.into() })
}

/// A client for some other server, without credentials, trusting the system's authorities.
pub(crate) fn plain(base: http::Uri) -> Result<Client, ClientError> {
    let path = PathBuf::from(base.to_string());
    build(&Config::new(base)).map_err(|source| ClientError::Credentials { path, source: source.into() })
}

fn build(config: &Config) -> kube::Result<Client> {
    // an error says that somebody chose a provider already
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut http = HttpConnector::new_with_resolver(HostResolver);
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    http.set_keepalive(Some(Duration::from_secs(30)));
    http.set_nodelay(true);
    let https = config.rustls_https_connector_with_connector(http)?;
    let client = hyper_util::client::legacy::Builder::new(TokioExecutor::new()).build(https);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    Ok(ClientBuilder::new(service, config.default_namespace.clone()).build())
}

#[cfg(test)]
mod tests {
    use super::super::fake::HttpServer;
    use super::*;
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;

    fn only(path: &Path) -> Credentials {
        Credentials { kubeconfig: path.to_owned(), rotated: None }
    }

    fn kubeconfig(server: &str, token: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster: {{server: \"{server}\"}}\n\
             users:\n- name: u\n  user: {{token: {token}}}\ncontexts:\n- name: c\n  context: {{cluster: c, user: u}}\n"
        )
    }

    #[tokio::test]
    async fn reload_changes_credentials_under_all_clones() {
        let server = HttpServer::start(|request| {
            let token = request.headers()["authorization"].to_str().unwrap().to_owned();
            let agent = request.headers()["user-agent"].to_str().unwrap();
            assert!(agent.starts_with("gantry/"), "{agent}");
            (200, serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": token}}))
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let url = format!("http://localhost:{}", server.port);
        std::fs::write(&path, kubeconfig(&url, "one")).unwrap();
        let client = ApiClient::new(only(&path), Limits::heartbeat(Duration::from_secs(5))).await.unwrap();
        let nodes: Api<Node> = Api::all(client.client());
        assert_eq!(nodes.get("n").await.unwrap().metadata.name.unwrap(), "Bearer one");
        std::fs::write(&path, kubeconfig(&url, "two")).unwrap();
        client.reload().await.unwrap();
        assert_eq!(nodes.get("n").await.unwrap().metadata.name.unwrap(), "Bearer two");
        std::fs::write(&path, "nonsense").unwrap();
        assert!(client.reload().await.is_err());
        assert_eq!(nodes.get("n").await.unwrap().metadata.name.unwrap(), "Bearer two");
    }

    #[tokio::test]
    async fn a_silent_server_is_given_up() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let url = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        std::fs::write(&path, kubeconfig(&url, "t")).unwrap();
        let client = ApiClient::new(only(&path), Limits::heartbeat(Duration::from_millis(100))).await.unwrap();
        let error = Api::<Node>::all(client.client()).get("n").await.unwrap_err();
        assert!(format!("{error:?}").contains("TooSlow"), "{error:?}");
    }

    #[tokio::test]
    async fn a_missing_kubeconfig_is_named() {
        let error =
            ApiClient::new(only(Path::new("/does/not/exist")), Limits::heartbeat(REQUEST_TIMEOUT)).await.unwrap_err();
        assert!(error.to_string().contains("/does/not/exist"));
    }
}
