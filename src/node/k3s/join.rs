//! Joining through the supervisor, and what is kept of it: authorities, certificates, a kubeconfig, the cluster's
//! settings.
//!
//! Everything is asked for anew at each start, certificates only if need be. What is already here is enough to start with
//! while no server answers: a node must come back without its control plane.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::authority::AuthorityError;
use super::connection::Endpoint;
use super::password;
use super::settings::ServerConfig;
use super::supervisor::{Applicant, Supervisor, SupervisorError};
use super::token::{Token, TokenError};
use crate::config::{Config, K3s};
use crate::node::address::{self, AddressError};
use crate::node::bootstrap::{BootstrapError, write_cluster};
use crate::node::certs::{self, CertError, CertStore, write_private};

/// First and longest pause between attempts (k3s: 5 to 10 s).
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// Sysctls of k3s' own load balancer Pods (k3s `pkg/daemons/agent/agent_linux.go`).
const FORWARDING: [&str; 2] = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];

/// No certificates yet. `Token`, `Server` and a wrong authority are terminal ([`JoinError::is_terminal`]); the rest is
/// tried again.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// `--k3s-token` is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// `--k3s-server` is none.
    #[error("--k3s-server {0:?} is no https URL of a server: write https://HOST:6443")]
    Server(String),
    /// The server does not help.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// We do not know our own address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A certificate cannot be kept, or is not what was asked for.
    #[error("the k3s server's certificate: {0}")]
    Cert(#[from] CertError),
    /// The kubeconfig cannot be written.
    #[error(transparent)]
    Kubeconfig(#[from] BootstrapError),
    /// No key can be made.
    #[error("unable to make a certificate request: {0}")]
    Key(#[from] rcgen::Error),
    /// A file cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl JoinError {
    /// Whether trying again is in vain until somebody changes something here.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        use SupervisorError::Authority;
        matches!(
            self,
            Self::Token(_)
                | Self::Server(_)
                | Self::Supervisor(Authority { source: AuthorityError::Mismatch { .. }, .. })
        )
    }
}

/// Where things are that a server gave us.
pub(super) struct Files {
    pub(super) client_ca: PathBuf,
    pub(super) server_ca: PathBuf,
    settings: PathBuf,
}

impl Files {
    pub(super) fn of(config: &Config) -> Self {
        let in_certs = |name| config.paths.cert_dir.join(name);
        Self {
            client_ca: in_certs("client-ca.crt"),
            server_ca: in_certs("server-ca.crt"),
            settings: in_certs("k3s-config.json"),
        }
    }
}

/// What a server said.
#[derive(Debug)]
pub(super) struct Joined {
    settings: ServerConfig,
    /// There are other certificates or authorities than before.
    pub(super) changed: bool,
}

/// Makes the node a member of the cluster of `--k3s-server`, and returns the configuration with what the cluster says.
/// Tries until it succeeds; returns at once with what is known from before if that is enough.
///
/// # Errors
/// [`JoinError`], terminal.
pub async fn join(config: &Config) -> Result<Config, JoinError> {
    let mut pause = PAUSE.0;
    loop {
        let error = match attempt(config).await {
            Ok(joined) => return Ok(with_settings(config, &joined.settings)),
            Err(error) if error.is_terminal() => return Err(error),
            Err(error) => error,
        };
        if let Some(settings) = known(config) {
            tracing::warn!(%error, "starting with what the k3s server said before");
            return Ok(with_settings(config, &settings));
        }
        tracing::warn!(%error, "joining the k3s cluster, will retry");
        tokio::time::sleep(pause.mul_f64(1.0 + fastrand::f64())).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// The settings from before, if everything else is here too and valid.
fn known(config: &Config) -> Option<ServerConfig> {
    let files = Files::of(config);
    let now = Timestamp::now();
    let valid = |store: CertStore| store.current().ok().flatten().is_some_and(|pair| pair.not_after > now);
    let complete = files.client_ca.exists()
        && files.server_ca.exists()
        && config.kubeconfig.as_ref().is_some_and(|path| path.exists())
        && valid(CertStore::client(&config.paths.cert_dir))
        && valid(CertStore::serving(&config.paths.cert_dir));
    if !complete {
        return None;
    }
    serde_json::from_slice(&std::fs::read(files.settings).ok()?).ok()
}

/// The configuration, with what the user left open filled in.
fn with_settings(config: &Config, settings: &ServerConfig) -> Config {
    let client_ca = Files::of(config).client_ca;
    let mut config = config.clone();
    let kubelet = &mut config.kubelet;
    if kubelet.cluster_dns.is_empty() {
        kubelet.cluster_dns = settings.dns();
    }
    if kubelet.cluster_domain.is_empty() {
        kubelet.cluster_domain.clone_from(&settings.cluster_domain);
    }
    if kubelet.allowed_unsafe_sysctls.is_empty() {
        // k3s' load balancer needs them, and k3s' kubelets allow them
        kubelet.allowed_unsafe_sysctls = FORWARDING.map(str::to_owned).to_vec();
    }
    if kubelet.authentication.x509.client_ca_file.is_empty() {
        kubelet.authentication.x509.client_ca_file = client_ca.display().to_string();
    }
    config
}

/// `--k3s-server`, and the token as it is now.
pub(super) fn target(k3s: &K3s) -> Result<(Endpoint, Token), JoinError> {
    let server = Endpoint::of_url(&k3s.server).ok_or_else(|| JoinError::Server(k3s.server.clone()))?;
    let token = match (&k3s.token, &k3s.token_file) {
        (Some(token), _) => Token::parse(token.reveal())?,
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(|source| JoinError::Io { path: path.clone(), source })?;
            Token::parse(&text)?
        }
        (None, None) => return Err(TokenError::Empty.into()),
    };
    Ok((server, token))
}

/// A verified server to ask.
pub(super) async fn supervisor(config: &Config, k3s: &K3s) -> Result<Supervisor, JoinError> {
    let (server, token) = target(k3s)?;
    let store = CertStore::client(&config.paths.cert_dir);
    let valid = store.current().ok().flatten().is_some_and(|pair| pair.not_after > Timestamp::now());
    let known = std::fs::read(Files::of(config).server_ca).ok();
    Ok(Supervisor::find(&server, token, known, valid.then(|| store.current_path())).await?)
}

/// The server as a member of the cluster speaks with it: its authority is known from joining.
pub(super) fn member(config: &Config) -> Result<Supervisor, JoinError> {
    let Some(k3s) = &config.k3s else { return Err(JoinError::Server(String::new())) };
    let (server, token) = target(k3s)?;
    let path = Files::of(config).server_ca;
    let known = std::fs::read(&path).map_err(|source| JoinError::Io { path, source })?;
    let identity = CertStore::client(&config.paths.cert_dir).current_path();
    Ok(Supervisor::known(&server, token, &known, identity)?)
}

/// Asks a server once for everything, and keeps it. Certificates come only in time for their renewal, or when they are
/// not what they should be.
pub(super) async fn attempt(config: &Config) -> Result<Joined, JoinError> {
    let Some(k3s) = &config.k3s else { return Err(JoinError::Server(String::new())) };
    let addresses = address::addresses(config).await?;
    let addresses: Vec<IpAddr> =
        addresses.iter().filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    let supervisor = supervisor(config, k3s).await?;
    let settings = supervisor.config().await?;
    let files = Files::of(config);
    let client_ca = supervisor.certificates("/v1-k3s/client-ca.crt").await?;
    let server_ca = supervisor.certificates("/v1-k3s/server-ca.crt").await?;
    let new_client_ca = keep(&files.client_ca, &client_ca)?;
    // a verified server may name further authorities
    let new_server_ca = keep(&files.server_ca, &server_ca)?;

    let password = password::ensure(&k3s.node_password_file)
        .map_err(|source| JoinError::Io { path: k3s.node_password_file.clone(), source })?;
    let list = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let applicant = Applicant {
        node: &config.node_name,
        password: &password,
        password_file: &k3s.node_password_file,
        addresses: &list,
    };
    let client = CertStore::client(&config.paths.cert_dir);
    let serving = CertStore::serving(&config.paths.cert_dir);
    let mut changed = new_client_ca || new_server_ca;
    if new_client_ca || is_due(&client, &[]) {
        renew(&supervisor, "/v1-k3s/client-kubelet.crt", &applicant, &client).await?;
        changed = true;
    }
    if new_server_ca || is_due(&serving, &addresses) {
        renew(&supervisor, "/v1-k3s/serving-kubelet.crt", &applicant, &serving).await?;
        changed = true;
    }
    if let Some(kubeconfig) = &config.kubeconfig {
        let (server, _) = target(k3s)?;
        let url = format!("https://{}", settings.api_server(&server));
        write_cluster(&url, &files.server_ca, kubeconfig, &client.current_path())?;
    }
    let text = serde_json::to_vec(&settings).unwrap_or_default();
    keep(&files.settings, &text)?;
    Ok(Joined { settings, changed })
}

/// Writes a file that says something else; whether it did.
fn keep(path: &Path, content: &[u8]) -> Result<bool, JoinError> {
    if std::fs::read(path).is_ok_and(|known| known == content) {
        return Ok(false);
    }
    let write = || {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        write_private(path, content)
    };
    write().map_err(|source| JoinError::Io { path: path.to_owned(), source })?;
    Ok(true)
}

/// Asks for a certificate with a key of our own; an old server sends one of its own, which is then the one.
async fn renew(
    supervisor: &Supervisor,
    path: &str,
    applicant: &Applicant<'_>,
    store: &CertStore,
) -> Result<(), JoinError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    // only the key counts: the server decides about names
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key)?;
    let reply = supervisor.sign(path, applicant, request.der().to_vec()).await?;
    let chain = certs::certificates(&reply);
    match certs::private_key(&reply) {
        Some(theirs) => store.update(&chain, theirs)?,
        None => store.update(&chain, &key.serialize_pem())?,
    };
    tracing::info!(certificate = %store.current_path().display(), "certificate issued by the k3s server");
    Ok(())
}

/// Whether a certificate has to be asked for: there is none, it lacks an address, or 70 percent of its life are over.
fn is_due(store: &CertStore, addresses: &[IpAddr]) -> bool {
    match store.current() {
        Ok(Some(pair)) => {
            addresses.iter().any(|address| !pair.addresses.contains(address))
                || renewal_time(store, &pair, 0.7) <= Timestamp::now()
        }
        Ok(None) => true,
        Err(error) => {
            tracing::warn!(%error, "the current certificate cannot be used");
            true
        }
    }
}

/// When a part of a certificate's life here is over. k3s dates certificates back to the birth of their authority, so
/// their life begins when the file was written.
pub(super) fn renewal_time(store: &CertStore, pair: &certs::Pair, part: f64) -> Timestamp {
    let written = std::fs::metadata(store.current_path()).and_then(|metadata| metadata.modified()).ok();
    let written = written.and_then(|time| Timestamp::try_from(time).ok()).unwrap_or(pair.not_before);
    let begin = written.max(pair.not_before).min(pair.not_after);
    begin + pair.not_after.duration_since(begin).mul_f64(part)
}

/// Asks a server who it is and for its settings as [`join`] does, and changes nothing here or there.
///
/// # Errors
/// [`JoinError`].
pub async fn check(config: &Config) -> Result<(), JoinError> {
    let Some(k3s) = &config.k3s else { return Err(JoinError::Server(String::new())) };
    supervisor(config, k3s).await?.config().await?;
    Ok(())
}
