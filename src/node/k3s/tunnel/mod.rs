//! The tunnel: WebSockets to the cluster's servers, through which their API servers reach this node's port.
//!
//! Source: k3s `pkg/agent/tunnel/tunnel.go`, `pkg/daemons/control/tunnel.go`. Each API server knows only the nodes that
//! have a tunnel to its own server, so there is one to each of them; which there are, a server says.

mod frame;
mod session;
mod target;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Error as WsError};

use self::target::Target;
use super::authority::Authority;
use super::connection::{Endpoint, Tls};
use super::join::{Files, member, target as server_and_token};
use crate::config::Config;
use crate::node::certs::CertStore;

/// First and longest pause before a tunnel is tried again (k3s: a second, always).
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// How often a server is asked which servers there are, and how soon after a failure.
const LOOK: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(5));
/// Longest time to an open WebSocket on an open connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest message; remotedialer sends what it has read at once, 32 KiB as a rule.
const MAX_MESSAGE: usize = 1 << 20;
/// Servers of one cluster.
const MAX_SERVERS: usize = 32;

/// No tunnel to a server. All are tried again.
#[derive(Debug, thiserror::Error)]
enum TunnelError {
    /// The certificates cannot be used, or nobody is there.
    #[error("cannot reach the k3s server {server}: {source}")]
    Unreachable { server: Endpoint, source: io::Error },
    /// It answers with something else than a WebSocket.
    #[error(
        "the k3s server {server} opens no tunnel: {reason}: is the Node deleted, or its certificate of another cluster?"
    )]
    Refused { server: Endpoint, reason: String },
}

/// Keeps the tunnels open.
pub struct Tunnel {
    config: Arc<Config>,
    target: Target,
}

impl Tunnel {
    /// To this node's port, as configured; nothing without a server or port.
    #[must_use]
    pub fn new(config: Arc<Config>) -> Option<Self> {
        config.k3s.as_ref()?;
        let address: IpAddr = config.kubelet.address.parse().ok()?;
        let port = u16::try_from(config.kubelet.port).ok()?;
        Some(Self { config, target: Target { address, port } })
    }

    /// Runs until dropped.
    pub async fn run(self) {
        let tunnel = Arc::new(self);
        let mut open: HashMap<Endpoint, Abort> = HashMap::new();
        loop {
            let (wanted, pause) = match tunnel.servers().await {
                Ok(servers) => (servers, LOOK.0),
                Err(error) => {
                    tracing::debug!(%error, "the k3s servers are not known anew");
                    // those that are known, or else the one that was named
                    (open.keys().cloned().collect(), LOOK.1)
                }
            };
            let wanted = if wanted.is_empty() { tunnel.named() } else { wanted };
            open.retain(|server, _| wanted.contains(server));
            for server in wanted {
                open.entry(server.clone())
                    .or_insert_with(|| Abort(tokio::spawn(tunnel.clone().follow(server)).abort_handle()));
            }
            sleep(pause).await;
        }
    }

    /// The server of the command line.
    fn named(&self) -> Vec<Endpoint> {
        let k3s = self.config.k3s.as_ref();
        k3s.and_then(|k3s| server_and_token(k3s).ok()).map(|(server, _)| server).into_iter().collect()
    }

    /// All servers, as one of them says.
    async fn servers(&self) -> Result<Vec<Endpoint>, super::JoinError> {
        let list = member(&self.config)?.api_servers().await?;
        let mut servers: Vec<Endpoint> =
            list.iter().filter_map(|address| Endpoint::of_address(address)).take(MAX_SERVERS).collect();
        servers.sort();
        servers.dedup();
        Ok(servers)
    }

    /// Keeps the tunnel to one server open.
    async fn follow(self: Arc<Self>, server: Endpoint) {
        let mut pause = PAUSE.0;
        loop {
            match self.connect(&server).await {
                Ok(socket) => {
                    tracing::info!(server = %server, "tunnel to the k3s server is open");
                    pause = PAUSE.0;
                    let error = session::run(socket, &self.target).await;
                    tracing::warn!(server = %server, %error, "tunnel to the k3s server is lost, will connect again");
                }
                Err(error) => tracing::warn!(%error, "no tunnel, so no logs and exec through this server; will retry"),
            }
            sleep(pause.mul_f64(1.0 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn connect(&self, server: &Endpoint) -> Result<WebSocketStream<TlsStream<TcpStream>>, TunnelError> {
        let unreachable = |source| TunnelError::Unreachable { server: server.clone(), source };
        let refused = |reason: String| TunnelError::Refused { server: server.clone(), reason };
        // read anew each time: they are renewed
        let authority = std::fs::read(Files::of(&self.config).server_ca).map_err(unreachable)?;
        let roots = Authority::verified(&authority, None).and_then(|authority| authority.roots());
        let roots = roots.map_err(|error| unreachable(io::Error::other(error)))?;
        let certificate = CertStore::client(&self.config.paths.cert_dir).current_path();
        let stream =
            Tls::new(roots, Some(&certificate)).map_err(unreachable)?.connect(server).await.map_err(unreachable)?;
        let uri = format!("wss://{server}/v1-k3s/connect").parse();
        let request = ClientRequestBuilder::new(uri.map_err(|error| unreachable(io::Error::other(error)))?);
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let handshake = tokio_tungstenite::client_async_with_config(request, stream, Some(config));
        match timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok((socket, _))) => Ok(socket),
            Ok(Err(WsError::Http(response))) => Err(refused(response.status().to_string())),
            Ok(Err(error)) => Err(refused(error.to_string())),
            Err(_) => Err(refused("no answer within 10 s".to_owned())),
        }
    }
}

/// Ends a task with itself.
struct Abort(AbortHandle);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}
