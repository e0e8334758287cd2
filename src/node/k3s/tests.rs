//! Joining a server over real TLS, and servers that cannot be joined.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::join::{JoinError, attempt, join, member};
use super::supervisor::SupervisorError;
use crate::config::{Config, K3s, Secret};
use crate::node::certs::CertStore;

/// A certificate authority with its own certificate.
struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self { pem: params.self_signed(&key).unwrap().pem(), issuer: Issuer::new(params, key) }
    }

    /// A certificate with its key, for these names.
    fn issue(&self, names: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        (CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap(), key)
    }

    fn hash(&self) -> String {
        hex::encode(Sha256::digest(&self.pem))
    }
}

type Answers = Arc<Mutex<HashMap<String, Vec<(u16, String)>>>>;

/// A k3s server as old ones were: it makes the keys itself.
struct Server {
    port: u16,
    ca: Ca,
    /// Answers that come before the usual ones, each once.
    answers: Answers,
    seen: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    async fn start() -> Self {
        let (ca, clients) = (Ca::new("server-ca"), Ca::new("client-ca"));
        let (certificate, key) = ca.issue(&["127.0.0.1"]);
        let tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let signed = |ca: &Ca, name: &str| {
            let (certificate, key) = ca.issue(&[name, "192.0.2.5"]);
            format!("{}{}{}", certificate.pem(), ca.pem, key.serialize_pem())
        };
        let settings =
            r#"{"ClusterDNS":"10.43.0.10","ClusterDomain":"k3s.local","HTTPSPort":6443,"SupervisorPort":6443}"#;
        let usual: HashMap<String, String> = [
            ("/cacerts", ca.pem.clone()),
            ("/v1-k3s/config", settings.to_owned()),
            ("/v1-k3s/client-ca.crt", clients.pem.clone()),
            ("/v1-k3s/server-ca.crt", ca.pem.clone()),
            ("/v1-k3s/apiservers", r#"["10.0.0.1:6443"]"#.to_owned()),
            ("/v1-k3s/client-kubelet.crt", signed(&clients, "n")),
            ("/v1-k3s/serving-kubelet.crt", signed(&ca, "n")),
        ]
        .map(|(path, body)| (path.to_owned(), body))
        .into();
        let (answers, seen) = (Answers::default(), Arc::new(Mutex::new(Vec::new())));
        let (special, record) = (answers.clone(), seen.clone());
        let task = tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(tls));
            while let Ok((stream, _)) = listener.accept().await {
                // an impostor is hung up on
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                let service = hyper::service::service_fn(|request: Request<Incoming>| {
                    let path = request.uri().path().to_owned();
                    record.lock().unwrap().push((path.clone(), request.headers().clone()));
                    let first = special.lock().unwrap().get_mut(&path).and_then(Vec::pop);
                    let (status, body) = first.unwrap_or_else(|| (200, usual[&path].clone()));
                    let mut response = Response::new(Full::new(Bytes::from(body)));
                    *response.status_mut() = StatusCode::from_u16(status).unwrap();
                    std::future::ready(Ok::<_, std::convert::Infallible>(response))
                });
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            }
        });
        Self { port, ca, answers, seen, task }
    }

    fn answer_once(&self, path: &str, status: u16, body: &str) {
        self.answers.lock().unwrap().entry(path.to_owned()).or_default().push((status, body.to_owned()));
    }

    fn config(&self, dir: &Path, token: &str) -> Config {
        let mut config = Config::for_tests(dir);
        config.node_name = "n".into();
        // an address needs no look-up
        config.hostname = "192.0.2.5".into();
        config.kubeconfig = Some(dir.join("kubeconfig"));
        config.k3s = Some(K3s {
            server: format!("https://127.0.0.1:{}", self.port),
            token: Some(Secret::new(token.to_owned())),
            token_file: None,
            node_password_file: dir.join("password"),
        });
        config
    }

    fn token(&self) -> String {
        format!("K10{}::server:s3cret", self.ca.hash())
    }

    fn header(&self, path: &str, name: &str) -> String {
        let seen = self.seen.lock().unwrap();
        let (_, headers) = seen.iter().rev().find(|(seen, _)| seen == path).unwrap();
        headers.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
    }
}

#[tokio::test]
async fn an_old_server_is_joined_and_missed_by_nobody() {
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    let config = server.config(dir.path(), &server.token());
    let joined = join(&config).await.unwrap();
    assert_eq!(joined.kubelet.cluster_dns, ["10.43.0.10"]);
    assert_eq!(joined.kubelet.cluster_domain, "k3s.local");
    assert!(joined.kubelet.authentication.x509.client_ca_file.ends_with("client-ca.crt"));
    let authorization = format!("Basic {}", STANDARD.encode("node:s3cret"));
    assert_eq!(server.header("/v1-k3s/config", "authorization"), authorization);
    assert_eq!(server.header("/cacerts", "authorization"), "", "whoever is not verified gets no token");
    let password = std::fs::read_to_string(dir.path().join("password")).unwrap();
    for path in ["/v1-k3s/client-kubelet.crt", "/v1-k3s/serving-kubelet.crt"] {
        assert_eq!(server.header(path, "k3s-node-name"), "n");
        assert_eq!(server.header(path, "k3s-node-ip"), "192.0.2.5");
        assert_eq!(server.header(path, "k3s-node-password"), password.trim());
    }
    // its key is ours now
    let store = CertStore::client(&config.paths.cert_dir);
    assert!(store.current().unwrap().is_some());
    let kubeconfig = std::fs::read_to_string(dir.path().join("kubeconfig")).unwrap();
    assert!(kubeconfig.contains(&format!("https://127.0.0.1:{}", server.port)), "{kubeconfig}");
    // what the user has set stays, and nothing is asked for twice
    let requests = server.seen.lock().unwrap().len();
    let mut own = config.clone();
    own.kubelet.cluster_dns = vec!["192.0.2.53".into()];
    assert_eq!(join(&own).await.unwrap().kubelet.cluster_dns, ["192.0.2.53"]);
    assert!(!attempt(&config).await.unwrap().changed);
    let again: Vec<_> = server.seen.lock().unwrap()[requests..].iter().map(|(path, _)| path.clone()).collect();
    assert!(!again.iter().any(|path| path.ends_with("kubelet.crt")), "{again:?}");
    // a certificate that is refused is left at home
    server.answer_once("/v1-k3s/apiservers", 401, "not authorized");
    assert_eq!(member(&config).unwrap().api_servers().await.unwrap(), ["10.0.0.1:6443"]);
    // without the server: as before
    server.task.abort();
    let alone = join(&config).await.unwrap();
    assert_eq!(alone.kubelet.cluster_dns, ["10.43.0.10"]);
}

#[tokio::test]
async fn an_impostor_gets_no_secret() {
    let (real, impostor) = (Server::start().await, Server::start().await);
    let dir = tempfile::tempdir().unwrap();
    let error = join(&impostor.config(dir.path(), &real.token())).await.unwrap_err();
    assert!(error.is_terminal() && error.to_string().contains(&impostor.ca.hash()), "{error}");
    // one that shows the right authority without having its key
    impostor.answer_once("/cacerts", 200, &real.ca.pem);
    let error = attempt(&impostor.config(dir.path(), &real.token())).await.unwrap_err();
    assert!(matches!(error, JoinError::Supervisor(SupervisorError::Unreachable { .. })), "{error}");
    for (path, headers) in impostor.seen.lock().unwrap().iter() {
        assert_eq!(path, "/cacerts");
        assert!(!headers.contains_key("authorization") && !headers.contains_key("k3s-node-password"));
    }
}

#[tokio::test]
async fn a_bare_password_trusts_the_first_and_no_other() {
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    attempt(&server.config(dir.path(), "s3cret")).await.unwrap();
    let other = Server::start().await;
    let error = attempt(&other.config(dir.path(), "s3cret")).await.unwrap_err();
    assert!(matches!(error, JoinError::Supervisor(SupervisorError::Changed(_))), "{error}");
    assert!(error.to_string().contains("server-ca.crt"), "{error}");
    assert!(other.seen.lock().unwrap().iter().all(|(_, headers)| !headers.contains_key("authorization")));
}

#[tokio::test]
async fn refusals_name_the_remedy() {
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    let config = server.config(dir.path(), &server.token());
    for (path, status, body, words) in [
        ("/v1-k3s/config", 401, "{}", "does not accept the token"),
        ("/v1-k3s/config", 403, "{}", "must be one for agents"),
        ("/v1-k3s/config", 503, "{}", "is not ready yet"),
        ("/v1-k3s/client-kubelet.crt", 403, "{}", "kube-system/n.node-password.k3s"),
        ("/v1-k3s/client-kubelet.crt", 403, r#"{"message":"forbidden"}"#, "must be one for agents"),
        ("/v1-k3s/client-kubelet.crt", 503, "{}", "is not ready yet"),
        ("/v1-k3s/client-kubelet.crt", 200, "{}", "no certificate"),
        ("/v1-k3s/client-ca.crt", 200, "{}", "is that a k3s server?"),
    ] {
        server.answer_once(path, status, body);
        let error = attempt(&config).await.unwrap_err();
        assert!(error.to_string().contains(words) && !error.is_terminal(), "{path} {status}: {error}");
        assert!(!error.to_string().contains("s3cret"));
    }
    attempt(&config).await.unwrap();
}
