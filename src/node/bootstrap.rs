//! TLS bootstrap: from a bootstrap kubeconfig (normally a short-lived token) to a client certificate of our own.
//!
//! Source: `pkg/kubelet/certificate/bootstrap/bootstrap.go`. Every step may be interrupted: the key waits in
//! `kubelet-client.key.tmp`, the request is found again by its name.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use kube::config::{
    AuthInfo, Cluster, Context, KubeConfigOptions, Kubeconfig, KubeconfigError, NamedAuthInfo, NamedCluster,
    NamedContext,
};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};

use super::certs::{CertError, CertStore, write_private};
use super::client::{ApiClient, ClientError, Credentials, Limits, REQUEST_TIMEOUT};
use super::csr::{CLIENT_SIGNER, CsrError, Template, request_certificate};
use crate::config::Config;

/// Keeps the key until its certificate is there.
const KEY_FILE: &str = "kubelet-client.key.tmp";
/// How long one attempt waits for approval, as kubelet.
const APPROVAL_TIMEOUT: Duration = Duration::from_secs(3600);

/// No certificate yet. Retryable unless a file is wrong: kubelet ends and is started again, we try again.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The bootstrap kubeconfig cannot be used.
    #[error("bootstrap: {0}")]
    Client(#[from] ClientError),
    /// The request came to nothing.
    #[error("bootstrap: {0}")]
    Csr(#[from] CsrError),
    /// The certificate cannot be kept.
    #[error("bootstrap: {0}")]
    Cert(#[from] CertError),
    /// Key or kubeconfig cannot be written.
    #[error("bootstrap: {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bootstrap kubeconfig has no usable cluster.
    #[error("bootstrap: {}: {problem}", .path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Makes sure that `--kubeconfig` exists with a valid certificate, if `--bootstrap-kubeconfig` says how to get one.
/// Returns at once when nothing is to be done.
pub async fn ensure_kubeconfig(config: &Config) -> Result<(), BootstrapError> {
    let (Some(kubeconfig), Some(bootstrap)) = (&config.kubeconfig, &config.bootstrap_kubeconfig) else {
        return Ok(());
    };
    if is_still_valid(kubeconfig).await {
        tracing::info!(kubeconfig = %kubeconfig.display(), "kubeconfig exists and is valid, no bootstrap necessary");
        return Ok(());
    }
    let store = CertStore::client(&config.paths.cert_dir);
    // the certificate may be there already and only the kubeconfig missing
    let have = store.current().ok().flatten().is_some_and(|pair| pair.not_after > Timestamp::now());
    if !have {
        request(config, bootstrap, &store).await?;
    }
    write_kubeconfig(bootstrap, kubeconfig, &store.current_path()).await
}

async fn request(config: &Config, bootstrap: &Path, store: &CertStore) -> Result<(), BootstrapError> {
    tracing::info!(bootstrap = %bootstrap.display(), "requesting a client certificate");
    let key_path = config.paths.cert_dir.join(KEY_FILE);
    let key = load_or_make_key(&key_path).map_err(|source| BootstrapError::Io { path: key_path.clone(), source })?;
    let credentials = Credentials { kubeconfig: bootstrap.to_owned(), rotated: None };
    let client = ApiClient::new(credentials, Limits::heartbeat(REQUEST_TIMEOUT)).await?.client();
    let template =
        Template { node_name: &config.node_name, signer: CLIENT_SIGNER, dns_names: Vec::new(), addresses: Vec::new() };
    let name = template.digested_name(&key);
    let chain = request_certificate(client, &template, &key, Some(name), APPROVAL_TIMEOUT).await?;
    store.update(&chain, &key.serialize_pem())?;
    if let Err(error) = std::fs::remove_file(&key_path) {
        tracing::warn!(%error, path = %key_path.display(), "the temporary key stays");
    }
    Ok(())
}

/// The key of an interrupted bootstrap, or a new one that is on disk before it is used.
fn load_or_make_key(path: &Path) -> std::io::Result<KeyPair> {
    if let Ok(pem) = std::fs::read_to_string(path)
        && let Ok(key) = KeyPair::from_pem(&pem)
    {
        return Ok(key);
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(std::io::Error::other)?;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    write_private(path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

/// Whether a kubeconfig has a client certificate all of whose chain is valid now.
async fn is_still_valid(kubeconfig: &Path) -> bool {
    let path = kubeconfig.to_owned();
    let check = move || -> Result<bool, KubeconfigError> {
        let file = Kubeconfig::read_from(&path)?;
        let context = file.current_context.as_deref().unwrap_or("");
        let context = file.contexts.iter().find(|named| named.name == context).and_then(|named| named.context.as_ref());
        let user = context.and_then(|context| context.user.as_deref()).unwrap_or("");
        let user = file.auth_infos.iter().find(|named| named.name == user).and_then(|named| named.auth_info.as_ref());
        let Some(user) = user else { return Ok(false) };
        let pem = match (&user.client_certificate_data, &user.client_certificate) {
            (Some(data), _) => {
                use base64::Engine;
                base64::engine::general_purpose::STANDARD.decode(data).unwrap_or_default()
            }
            (None, Some(file)) => std::fs::read(file).unwrap_or_default(),
            (None, None) => Vec::new(),
        };
        let now = Timestamp::now().as_second();
        let mut count = 0;
        for block in x509_parser::pem::Pem::iter_from_buffer(&pem) {
            let Ok(block) = block else { return Ok(false) };
            if block.label != "CERTIFICATE" {
                continue;
            }
            let Ok(certificate) = block.parse_x509() else { return Ok(false) };
            if certificate.validity().not_after.timestamp() < now {
                return Ok(false);
            }
            count += 1;
        }
        Ok(count > 0)
    };
    if !kubeconfig.exists() {
        return false;
    }
    match tokio::task::spawn_blocking(check).await {
        Ok(Ok(valid)) => valid,
        Ok(Err(error)) => {
            tracing::warn!(%error, kubeconfig = %kubeconfig.display(), "unable to read the existing kubeconfig");
            false
        }
        Err(_) => false,
    }
}

/// The bootstrap file's cluster with our certificate.
async fn write_kubeconfig(bootstrap: &Path, kubeconfig: &Path, certificate: &Path) -> Result<(), BootstrapError> {
    let wrong = |problem: String| BootstrapError::Kubeconfig { path: bootstrap.to_owned(), problem };
    let file = Kubeconfig::read_from(bootstrap).map_err(|error| wrong(error.to_string()))?;
    // also checks that the named files exist
    let loader = kube::Config::from_custom_kubeconfig(file.clone(), &KubeConfigOptions::default()).await;
    loader.map_err(|error| wrong(error.to_string()))?;
    let context = file.current_context.as_deref().unwrap_or("");
    let context = file.contexts.iter().find(|named| named.name == context).and_then(|named| named.context.as_ref());
    let cluster = context.and_then(|context| file.clusters.iter().find(|named| named.name == context.cluster));
    let cluster: &Cluster = cluster
        .and_then(|named| named.cluster.as_ref())
        .ok_or_else(|| wrong("its current context names no cluster".to_owned()))?;
    let written = with_certificate(cluster.clone(), certificate);
    let text = serde_saphyr::to_string(&written).map_err(|error| wrong(error.to_string()))?;
    write(kubeconfig, &text)
}

/// A kubeconfig for an API server at a URL, whose authorities are in a file, with our certificate. An equal one that is
/// there already is left alone.
pub(super) fn write_cluster(
    url: &str,
    authority: &Path,
    kubeconfig: &Path,
    certificate: &Path,
) -> Result<(), BootstrapError> {
    let cluster = Cluster {
        server: Some(url.to_owned()),
        certificate_authority: Some(authority.to_string_lossy().into_owned()),
        ..Cluster::default()
    };
    let text = serde_saphyr::to_string(&with_certificate(cluster, certificate))
        .map_err(|error| BootstrapError::Kubeconfig { path: kubeconfig.to_owned(), problem: error.to_string() })?;
    if std::fs::read_to_string(kubeconfig).is_ok_and(|known| known == text) {
        return Ok(());
    }
    write(kubeconfig, &text)
}

fn write(kubeconfig: &Path, text: &str) -> Result<(), BootstrapError> {
    let failed = |source| BootstrapError::Io { path: kubeconfig.to_owned(), source };
    if let Some(directory) = kubeconfig.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    write_private(kubeconfig, text.as_bytes()).map_err(failed)
}

/// Our certificate at a cluster.
fn with_certificate(cluster: Cluster, certificate: &Path) -> Kubeconfig {
    let certificate = certificate.to_string_lossy().into_owned();
    Kubeconfig {
        api_version: Some("v1".to_owned()),
        kind: Some("Config".to_owned()),
        clusters: vec![NamedCluster {
            name: "default-cluster".to_owned(),
            cluster: Some(cluster),
            other: Default::default(),
        }],
        auth_infos: vec![NamedAuthInfo {
            name: "default-auth".to_owned(),
            auth_info: Some(AuthInfo {
                client_certificate: Some(certificate.clone()),
                client_key: Some(certificate),
                ..AuthInfo::default()
            }),
            other: Default::default(),
        }],
        contexts: vec![NamedContext {
            name: "default-context".to_owned(),
            context: Some(Context {
                cluster: "default-cluster".to_owned(),
                user: Some("default-auth".to_owned()),
                namespace: Some("default".to_owned()),
                ..Context::default()
            }),
            other: Default::default(),
        }],
        current_context: Some("default-context".to_owned()),
        ..Kubeconfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::certs::tests::pair;
    use super::super::fake::{HttpServer, failure};
    use super::*;
    use serde_json::{Value, json};
    use std::sync::{Arc, Mutex};

    fn bootstrap_kubeconfig(port: u16) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: k\n  cluster: {{server: \"http://127.0.0.1:{port}\"}}\n\
             users:\n- name: u\n  user: {{token: abcdef.0123456789abcdef}}\ncontexts:\n- name: c\n  context: {{cluster: k, user: u}}\n"
        )
    }

    fn config(dir: &Path) -> Config {
        let mut config = Config::for_tests(dir);
        config.kubeconfig = Some(dir.join("etc/kubelet.conf"));
        config.bootstrap_kubeconfig = Some(dir.join("bootstrap.conf"));
        config
    }

    fn csr(name: &str, condition: Option<&str>, certificate: &str) -> Value {
        use base64::Engine;
        let conditions: Vec<Value> = condition
            .map(|kind| json!({"type": kind, "status": "True", "reason": "Because", "message": "words"}))
            .into_iter()
            .collect();
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
            "metadata": {"name": name, "uid": "u1", "resourceVersion": "5"},
            "spec": {"request": "", "signerName": CLIENT_SIGNER},
            "status": {"conditions": conditions, "certificate": encode(certificate)}
        })
    }

    /// Answers list requests about CSRs with one object and refuses watches.
    async fn server(condition: &'static str, certificate: String) -> (HttpServer, Arc<Mutex<Vec<String>>>) {
        let posts = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&posts);
        let server = HttpServer::start(move |request| {
            let object = csr("the-name", Some(condition), &certificate);
            if request.method() == "POST" {
                seen.lock().unwrap().push(request.uri().path().to_owned());
                return (201, csr("the-name", None, ""));
            }
            if request.uri().query().unwrap_or("").contains("watch=true") {
                return failure(410, "Expired");
            }
            (200, json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "5"}, "items": [object]}))
        })
        .await;
        (server, posts)
    }

    #[tokio::test]
    async fn a_token_becomes_a_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        // the signer must use our key: put one there as an interrupted bootstrap would have
        let (certificate, key) = pair(1, 3600, &[]);
        std::fs::create_dir_all(&config.paths.cert_dir).unwrap();
        std::fs::write(config.paths.cert_dir.join(KEY_FILE), &key).unwrap();
        let (server, posts) = server("Approved", certificate).await;
        std::fs::write(dir.path().join("bootstrap.conf"), bootstrap_kubeconfig(server.port)).unwrap();
        ensure_kubeconfig(&config).await.unwrap();
        assert_eq!(*posts.lock().unwrap(), ["/apis/certificates.k8s.io/v1/certificatesigningrequests"]);
        assert!(!config.paths.cert_dir.join(KEY_FILE).exists());
        let kubeconfig = config.kubeconfig.as_ref().unwrap();
        let text = std::fs::read_to_string(kubeconfig).unwrap();
        assert!(text.contains("kubelet-client-current.pem") && !text.contains("abcdef"), "{text}");
        assert!(is_still_valid(kubeconfig).await);
        // now there is nothing to do
        ensure_kubeconfig(&config).await.unwrap();
        assert_eq!(posts.lock().unwrap().len(), 1);
        // a lost kubeconfig is written again without a new request
        std::fs::remove_file(kubeconfig).unwrap();
        ensure_kubeconfig(&config).await.unwrap();
        assert_eq!(posts.lock().unwrap().len(), 1);
        assert!(is_still_valid(kubeconfig).await);
    }

    #[tokio::test]
    async fn a_denied_request_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let (server, _) = server("Denied", String::new()).await;
        std::fs::write(dir.path().join("bootstrap.conf"), bootstrap_kubeconfig(server.port)).unwrap();
        let error = ensure_kubeconfig(&config).await.unwrap_err().to_string();
        assert!(
            error.contains("is denied, reason: Because") && error.contains("kubectl delete csr the-name"),
            "{error}"
        );
        assert!(config.paths.cert_dir.join(KEY_FILE).exists(), "the next start asks with the same key");
    }

    #[tokio::test]
    async fn expired_and_foreign_kubeconfigs_are_not_valid() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        assert!(!is_still_valid(&path).await);
        std::fs::write(&path, bootstrap_kubeconfig(1)).unwrap();
        assert!(!is_still_valid(&path).await);
        let store = CertStore::client(dir.path());
        let (certificate, key) = pair(100, 50, &[]);
        store.update(&certificate, &key).unwrap();
        std::fs::write(dir.path().join("b"), bootstrap_kubeconfig(1)).unwrap();
        write_kubeconfig(&dir.path().join("b"), &path, &store.current_path()).await.unwrap();
        assert!(!is_still_valid(&path).await);
    }
}
