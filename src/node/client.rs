//! Our connection to the API server: a [`kube::Client`] whose credentials can be replaced while it is in use.
//!
//! Everybody keeps a clone of one client. Below it stands a second one that is rebuilt from the kubeconfig when a
//! certificate was rotated: running requests and watches end on the old connections, new ones use the new.
//!
//! Where the server speaks HTTP/2, requests share one connection, and so do the first watches, as client-go has it:
//! a burst of Pods costs no TLS handshakes. A server allows so many streams of a connection, and hyper opens no second
//! one: watches beyond [`SHARED_WATCHES`] (one for each ConfigMap and Secret in use) have connections of their own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower::{BoxError, ServiceBuilder, service_fn};

use super::certs::{self, CertStore};
use super::rate::TokenBucket;
use super::resolve::HostResolver;

/// Longest ordinary request, and longest wait for a watch to begin.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time to a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Watches that share the connection of ordinary requests; a server lets a client have 100 streams at least (Go's
/// default, `--http2-max-streams-per-connection` of the API server may raise it).
const SHARED_WATCHES: usize = 40;
/// How often a silent HTTP/2 connection is probed, and how long an answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(15));
/// What a stream may have on its way, bytes; all of them together cannot use up the connection's share.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 128 * STREAM_WINDOW;
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

/// How long a request in the background waits for others at most.
const BACKGROUND_WAIT: Duration = Duration::from_secs(5);

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
    current: Arc<RwLock<Channels>>,
    client: Client,
    background: Client,
    bucket: Arc<TokenBucket>,
}

/// What requests go through until the credentials change.
#[derive(Clone)]
struct Channels {
    shared: Client,
    /// For watches beyond [`SHARED_WATCHES`]; HTTP/1.1, a connection each.
    separate: Client,
    watches: Arc<Semaphore>,
}

impl Channels {
    /// Where to send a request, and what a watch holds as long as it lasts.
    fn choose(&self, streams: bool) -> (Client, Option<OwnedSemaphorePermit>) {
        if !streams {
            return (self.shared.clone(), None);
        }
        match Arc::clone(&self.watches).try_acquire_owned() {
            Ok(place) => (self.shared.clone(), Some(place)),
            Err(_) => (self.separate.clone(), None),
        }
    }
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
        let (inner, turns) = (Arc::clone(&current), Arc::clone(&bucket));
        let client = service_fn(move |request| {
            let (inner, turns) = (Arc::clone(&inner), Arc::clone(&turns));
            async move {
                turns.acquire().await;
                send(inner, limits.timeout, request).await
            }
        });
        let (inner, spare) = (Arc::clone(&current), Arc::clone(&bucket));
        let background = service_fn(move |request| {
            let (inner, spare) = (Arc::clone(&inner), Arc::clone(&spare));
            async move {
                spare.wait_for_spare(BACKGROUND_WAIT).await;
                send(inner, limits.timeout, request).await
            }
        });
        let (client, background) = (Client::new(client, "default"), Client::new(background, "default"));
        Ok(Self { credentials, current, client, background, bucket })
    }

    /// The client to use; clones of it follow every later [`reload`](Self::reload).
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// For what nobody waits for (events): requests that do not count against the limit, and that wait while others use
    /// it up, up to five seconds each.
    #[must_use]
    pub fn background(&self) -> Client {
        self.background.clone()
    }

    /// Whether requests may soon have to wait for their turn.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.bucket.is_scarce()
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
    current: Arc<RwLock<Channels>>,
    timeout: Duration,
    request: Request<Body>,
) -> Result<Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError> {
    let streams = request
        .uri()
        .query()
        .is_some_and(|query| query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1" | "follow=true")));
    let (client, place) = current.read().unwrap_or_else(PoisonError::into_inner).choose(streams);
    let slow = TooSlow { method: request.method().clone(), path: request.uri().path().to_owned(), timeout };
    let answer = async {
        let response = client.send(request).await?;
        if streams {
            let held = |body: Body| {
                let body = body.map_err(BoxError::from).map_frame(move |frame| {
                    let _ = &place;
                    frame
                });
                body.boxed_unsync()
            };
            return Ok(response.map(held));
        }
        // the deadline covers the body too
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await?.to_bytes();
        Ok(Response::from_parts(parts, Body::from(bytes).map_err(BoxError::from).boxed_unsync()))
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
async fn connect(credentials: &Credentials) -> Result<Channels, ClientError> {
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
    let failed = |source: kube::Error| ClientError::Credentials { path: kubeconfig.clone(), source: source.into() };
    let separate = build(&config, false).map_err(failed)?;
    let shared = build(&config, true).map_err(failed)?;
    Ok(Channels { shared, separate, watches: Arc::new(Semaphore::new(SHARED_WATCHES)) })
}

/// A client for some other server, without credentials, trusting the system's authorities.
pub(crate) fn plain(base: http::Uri) -> Result<Client, ClientError> {
    let path = PathBuf::from(base.to_string());
    build(&Config::new(base), false).map_err(|source| ClientError::Credentials { path, source: source.into() })
}

/// `multiplexed`: HTTP/2 where the server offers it.
fn build(config: &Config, multiplexed: bool) -> kube::Result<Client> {
    // an error says that somebody chose a provider already
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut http = HttpConnector::new_with_resolver(HostResolver);
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    http.set_keepalive(Some(Duration::from_secs(30)));
    http.set_nodelay(true);
    // the name that a proxy's certificate bears instead of the server's is kube's to check
    let https = if multiplexed && config.tls_server_name.is_none() {
        let builder = HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
        builder.enable_http1().enable_http2().wrap_connector(http)
    } else {
        config.rustls_https_connector_with_connector(http)?
    };
    let client = hyper_util::client::legacy::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(PING.0)
        .http2_keep_alive_timeout(PING.1)
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .build(https);
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::StreamExt;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
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

    /// Speaks HTTP/2 over TLS, answers watches with a body that does not end, and counts connections.
    async fn multiplexing_server() -> (u16, String, Arc<AtomicUsize>) {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut tls = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
        let listener = tokio::net::TcpListener::bind("localhost:0").await.unwrap();
        let (port, connections) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let stream = hyper_util::rt::TokioIo::new(acceptor.accept(stream).await.unwrap());
                    let answer = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
                        let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
                        let text = futures::stream::once(async {
                            Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from("{}")))
                        });
                        let rest = futures::stream::pending();
                        let body = text.chain(if watches {
                            rest.left_stream()
                        } else {
                            futures::stream::empty().right_stream()
                        });
                        Ok::<_, std::convert::Infallible>(Response::new(StreamBody::new(body)))
                    });
                    let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                        .serve_connection(stream, answer)
                        .await;
                });
            }
        });
        (port, cert.pem(), connections)
    }

    #[tokio::test]
    async fn requests_and_the_first_watches_share_a_connection() {
        let (port, authority, connections) = multiplexing_server().await;
        let dir = tempfile::tempdir().unwrap();
        let (path, ca) = (dir.path().join("kubeconfig"), dir.path().join("ca.crt"));
        std::fs::write(&ca, authority).unwrap();
        let text = kubeconfig(&format!("https://localhost:{port}"), "t");
        let server = format!("server: \"https://localhost:{port}\"");
        let trusting = text.replace(&server, &format!("{server}, certificate-authority: {}", ca.display()));
        std::fs::write(&path, trusting).unwrap();
        let client = ApiClient::new(only(&path), Limits::heartbeat(Duration::from_secs(5))).await.unwrap().client();
        let get = |uri: &'static str| client.send(Request::get(uri).body(Body::empty()).unwrap());
        get("/first").await.unwrap();
        let mut watches =
            futures::future::try_join_all((0..SHARED_WATCHES).map(|_| get("/pods?watch=true"))).await.unwrap();
        futures::future::try_join_all((0..50).map(|_| get("/pods"))).await.unwrap();
        assert_eq!(connections.load(Ordering::Relaxed), 1);
        let separate = get("/pods?watch=true").await.unwrap();
        assert_eq!((connections.load(Ordering::Relaxed), separate.version()), (2, http::Version::HTTP_11));
        // a watch that is over makes room
        assert_eq!(watches.pop().unwrap().version(), http::Version::HTTP_2);
        let next = get("/pods?watch=true").await.unwrap();
        assert_eq!((connections.load(Ordering::Relaxed), next.version()), (2, http::Version::HTTP_2));
    }
}
