//! The HTTPS server's certificate, authentication and sockets, from the configuration.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use super::endpoints::Endpoints;
use super::node::Node;
use crate::config::Config;
use crate::node::certs::CertStore;
use crate::server::auth::{Auth, AuthConfig, AuthorizationMode, ReviewError, Reviewer};
use crate::server::client_ca::ClientCa;
use crate::server::reviews::ApiReviewer;
use crate::server::tls::{ServingCertificate, TlsOptions, server_config};
use crate::server::{Server, ServerOptions};

/// How long a client CA or serving certificate file may be out of date.
const RELOAD: Duration = Duration::from_secs(60);

/// The server, which listens nowhere yet, and the certificate authority of its clients.
pub(super) fn server(node: &Arc<Node>) -> Result<(Arc<Server>, Arc<ClientCa>), String> {
    let config = &node.config;
    let kubelet = &config.kubelet;
    let client_ca = Arc::new(ClientCa::none());
    let ca_file = kubelet.authentication.x509.client_ca_file.clone();
    if !ca_file.is_empty() {
        client_ca.load(Path::new(&ca_file)).map_err(|error| format!("clientCAFile {ca_file}: {error}"))?;
    }
    let reviewer: Arc<dyn Reviewer> = match &node.api {
        Some(api) => Arc::new(ApiReviewer::new(api.client(), config.node_name.clone())),
        None => Arc::new(NobodyReviews),
    };
    let webhook = &kubelet.authentication.webhook;
    let auth_config = AuthConfig {
        anonymous: kubelet.authentication.anonymous.enabled,
        token_review: (webhook.enabled && node.api.is_some()).then(|| webhook.cache_ttl.std()),
        authorization: if kubelet.authorization.mode == "AlwaysAllow" {
            AuthorizationMode::AlwaysAllow
        } else {
            AuthorizationMode::Webhook {
                authorized: kubelet.authorization.webhook.cache_authorized_ttl.std(),
                unauthorized: kubelet.authorization.webhook.cache_unauthorized_ttl.std(),
            }
        },
    };
    let auth =
        Auth::new(auth_config, client_ca.clone(), reviewer).map_err(|error| format!("authentication: {error}"))?;
    let mut options = ServerOptions {
        debugging_handlers: kubelet.enable_debugging_handlers,
        system_logs: kubelet.enable_system_log_handler,
        ..ServerOptions::default()
    };
    options.stream_limits.idle_timeout = kubelet.streaming_connection_idle_timeout.std();
    let server = Server::new(Arc::new(Endpoints(node.clone())), auth, options)
        .map_err(|error| format!("start the server: {error}"))?;
    Ok((server, client_ca))
}

/// Serves HTTPS and the health port. The tasks end with the runtime.
pub(super) async fn listen(
    node: &Arc<Node>,
    server: &Arc<Server>,
    client_ca: Arc<ClientCa>,
    rotated: watch::Receiver<u64>,
) -> Result<(), String> {
    let config = &node.config;
    let kubelet = &config.kubelet;
    let certificate = certificate(config, &node.addresses)?;
    let tls_options =
        TlsOptions { min_version: kubelet.tls_min_version.clone(), cipher_suites: kubelet.tls_cipher_suites.clone() };
    let tls = server_config(certificate.clone(), &tls_options).map_err(|error| error.to_string())?;
    let listener = bind(&kubelet.address, kubelet.port, "port").await?;
    tokio::spawn(server.clone().serve(listener, tls));
    if kubelet.healthz_port > 0 {
        let health = bind(&kubelet.healthz_bind_address, kubelet.healthz_port, "healthzPort").await?;
        tokio::spawn(server.clone().serve_healthz(health));
    }
    let ca_file = kubelet.authentication.x509.client_ca_file.clone();
    tokio::spawn(reload(config.clone(), certificate, client_ca, ca_file, rotated));
    Ok(())
}

async fn bind(address: &str, port: i32, field: &str) -> Result<TcpListener, String> {
    let address: IpAddr = address.parse().map_err(|_| format!("address {address:?} is not an IP address"))?;
    let port = u16::try_from(port).map_err(|_| format!("{field} {port} is not a port"))?;
    let socket = SocketAddr::new(address, port);
    TcpListener::bind(socket).await.map_err(|error| {
        format!("{field}: cannot listen on {socket}: {error}; stop what uses the port, or set another")
    })
}

fn certificate(config: &Config, addresses: &[IpAddr]) -> Result<Arc<ServingCertificate>, String> {
    let kubelet = &config.kubelet;
    if !kubelet.tls_cert_file.is_empty() {
        return ServingCertificate::from_files(
            Path::new(&kubelet.tls_cert_file),
            Path::new(&kubelet.tls_private_key_file),
        )
        .map_err(|error| error.to_string());
    }
    if config.serves_with_cluster_certificate() {
        let current = CertStore::serving(&config.paths.cert_dir).current_path();
        if let Ok(certificate) = ServingCertificate::from_files(&current, &current) {
            return Ok(certificate);
        }
    }
    ServingCertificate::self_signed(&config.paths.cert_dir, std::slice::from_ref(&config.hostname), addresses)
        .map_err(|error| error.to_string())
}

/// Follows changes of the files: a rotated certificate at once, others within a minute.
async fn reload(
    config: Arc<Config>,
    certificate: Arc<ServingCertificate>,
    client_ca: Arc<ClientCa>,
    ca_file: String,
    mut rotated: watch::Receiver<u64>,
) {
    loop {
        tokio::select! {
            changed = rotated.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RELOAD) => {}
        }
        if !ca_file.is_empty()
            && let Err(error) = client_ca.load(Path::new(&ca_file))
        {
            tracing::warn!(file = ca_file, %error, "the client CA stays as it was");
        }
        let kubelet = &config.kubelet;
        let (chain, key) = if kubelet.tls_cert_file.is_empty() {
            if !config.serves_with_cluster_certificate() {
                continue;
            }
            let current = CertStore::serving(&config.paths.cert_dir).current_path();
            (current.clone(), current)
        } else {
            (kubelet.tls_cert_file.clone().into(), kubelet.tls_private_key_file.clone().into())
        };
        let (Ok(chain), Ok(key)) = (std::fs::read(&chain), std::fs::read(&key)) else { continue };
        if let Err(error) = certificate.replace(&chain, &key) {
            tracing::warn!(%error, "the serving certificate stays as it was");
        }
    }
}

/// Without an API server nobody can say who a token belongs to or what a user may do.
struct NobodyReviews;

impl Reviewer for NobodyReviews {
    fn token<'a>(
        &'a self,
        _token: &'a str,
    ) -> futures::future::BoxFuture<'a, Result<Option<crate::server::auth::UserInfo>, ReviewError>> {
        Box::pin(std::future::ready(Err(ReviewError("this node has no API server to ask".to_owned()))))
    }

    fn access<'a>(
        &'a self,
        _review: &'a crate::server::auth::AccessReview,
    ) -> futures::future::BoxFuture<'a, Result<bool, ReviewError>> {
        Box::pin(std::future::ready(Err(ReviewError("this node has no API server to ask".to_owned()))))
    }
}
