//! TLS of the server: versions, cipher suites, and a serving certificate that can be exchanged while in use.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use jiff::{SignedDuration, Timestamp};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, SanType};
use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::client_ca::RequestAnyCertificate;

/// A certificate made here is good for so long, as the kubelet's is.
const SELF_SIGNED_LIFETIME: SignedDuration = SignedDuration::from_hours(365 * 24);
/// A certificate found is not used any more when it is about to expire.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Why there is no serving certificate or no TLS configuration. Terminal until configuration or files change.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Certificate or key is malformed, or they do not belong together.
    #[error("serving certificate: {0}")]
    Certificate(String),
    /// A field of the configuration names something this node does not have.
    #[error("{field}: {value:?} is not supported; supported are {supported}")]
    Unsupported {
        /// Field of KubeletConfiguration.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it could be.
        supported: String,
    },
}

/// The certificate the server shows; exchanged without disturbing open connections.
pub struct ServingCertificate {
    current: RwLock<Arc<CertifiedKey>>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCertificate").finish_non_exhaustive()
    }
}

impl ServingCertificate {
    /// From PEM: a certificate with its chain, and its key.
    ///
    /// # Errors
    /// [`TlsError::Certificate`].
    pub fn from_pem(certificates: &[u8], key: &[u8]) -> Result<Arc<Self>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let current = RwLock::new(certified(certificates, key, &provider)?);
        Ok(Arc::new(Self { current, provider }))
    }

    /// From `tlsCertFile` and `tlsPrivateKeyFile`.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn from_files(certificates: &Path, key: &Path) -> Result<Arc<Self>, TlsError> {
        Self::from_pem(&read(certificates)?, &read(key)?)
    }

    /// From `kubelet.crt` and `kubelet.key` in the certificate directory; made anew, self-signed, if they are
    /// missing, damaged, about to expire, or do not name every one of `hostnames` and `addresses`.
    ///
    /// # Errors
    /// [`TlsError`] if they cannot be written.
    pub fn self_signed(directory: &Path, hostnames: &[String], addresses: &[IpAddr]) -> Result<Arc<Self>, TlsError> {
        let (certificate_path, key_path) = (directory.join("kubelet.crt"), directory.join("kubelet.key"));
        if let (Ok(certificate), Ok(key)) = (read(&certificate_path), read(&key_path))
            && is_usable(&certificate, hostnames, addresses)
            && let Ok(found) = Self::from_pem(&certificate, &key)
        {
            return Ok(found);
        }
        let (certificate, key) = make_self_signed(hostnames, addresses)?;
        fs::create_dir_all(directory).map_err(|source| TlsError::File { path: directory.to_owned(), source })?;
        // The key first: a crash in between leaves a pair that does not match, which the next start replaces.
        write(&key_path, key.as_bytes(), 0o600)?;
        write(&certificate_path, certificate.as_bytes(), 0o644)?;
        Self::from_pem(certificate.as_bytes(), key.as_bytes())
    }

    /// Shows another certificate from now on. On an error the current one stays.
    ///
    /// # Errors
    /// [`TlsError::Certificate`].
    pub fn replace(&self, certificates: &[u8], key: &[u8]) -> Result<(), TlsError> {
        let next = certified(certificates, key, &self.provider)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

fn certified(certificates: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, TlsError> {
    let invalid = |error: &dyn fmt::Display| TlsError::Certificate(error.to_string());
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(certificates).collect::<Result<_, _>>().map_err(|e| invalid(&e))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| invalid(&e))?;
    CertifiedKey::from_der(chain, key, provider).map(Arc::new).map_err(|e| invalid(&e))
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

/// Writes a file in one step.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = path.with_extension("tmp");
    let attempt = || {
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(mode).open(&temporary)?;
        // An existing file keeps its mode when it is opened.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    attempt().map_err(|source| TlsError::File { path: path.to_owned(), source })
}

fn is_usable(certificate: &[u8], hostnames: &[String], addresses: &[IpAddr]) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(certificate) else { return false };
    let Ok((_, parsed)) = X509Certificate::from_der(&der) else { return false };
    let (now, margin) = (Timestamp::now().as_second(), RENEW_BEFORE.as_secs());
    let validity = parsed.validity();
    if validity.not_before.timestamp() > now || validity.not_after.timestamp() < now + margin {
        return false;
    }
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return false };
    let has_name = |name: &String| {
        names.value.general_names.iter().any(|san| matches!(san, GeneralName::DNSName(dns) if dns == name))
    };
    let has_address = |address: &IpAddr| {
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        names.value.general_names.iter().any(|san| matches!(san, GeneralName::IPAddress(ip) if *ip == octets))
    };
    hostnames.iter().all(has_name) && addresses.iter().all(has_address)
}

fn make_self_signed(hostnames: &[String], addresses: &[IpAddr]) -> Result<(String, String), TlsError> {
    let failed = |error: rcgen::Error| TlsError::Certificate(error.to_string());
    let mut params = CertificateParams::new(hostnames.to_vec()).map_err(failed)?;
    params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
    let now = Timestamp::now();
    let name = format!("{}@{}", hostnames.first().map_or("gantry", String::as_str), now.as_second());
    params.distinguished_name.push(DnType::CommonName, name);
    let seconds = std::time::Duration::from_secs;
    let at =
        |time: Timestamp| std::time::SystemTime::UNIX_EPOCH + seconds(u64::try_from(time.as_second()).unwrap_or(0));
    // An hour back, for clients whose clock is behind.
    params.not_before = at(now - SignedDuration::from_hours(1)).into();
    params.not_after = at(now + SELF_SIGNED_LIFETIME).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// `tlsMinVersion` and `tlsCipherSuites`, as the configuration names them (Go's constants). Empty means default.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// `VersionTLS12` or `VersionTLS13`.
    pub min_version: String,
    /// Names like `TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256`; TLS 1.3 suites are always on, as in Go.
    pub cipher_suites: Vec<String>,
}

/// Go's name of a cipher suite as rustls has it.
fn rustls_name(go: &str) -> String {
    match go {
        "TLS_AES_128_GCM_SHA256" | "TLS_AES_256_GCM_SHA384" | "TLS_CHACHA20_POLY1305_SHA256" => {
            go.replacen("TLS_", "TLS13_", 1)
        }
        // Go has kept an old name without the hash.
        _ if go.ends_with("_CHACHA20_POLY1305") => format!("{go}_SHA256"),
        _ => go.to_owned(),
    }
}

/// The TLS configuration of the server. Clients are asked for a certificate and may have none.
///
/// # Errors
/// [`TlsError::Unsupported`] for versions and suites that rustls does not have (all of them outdated).
pub fn server_config(certificate: Arc<ServingCertificate>, options: &TlsOptions) -> Result<ServerConfig, TlsError> {
    let mut provider = rustls::crypto::ring::default_provider();
    if !options.cipher_suites.is_empty() {
        let name = |suite: &rustls::SupportedCipherSuite| format!("{:?}", suite.suite());
        let supported: Vec<_> = provider.cipher_suites.iter().map(name).collect();
        let wanted: Vec<_> = options.cipher_suites.iter().map(|suite| rustls_name(suite)).collect();
        if let Some(place) = wanted.iter().position(|suite| !supported.contains(suite)) {
            let (value, supported) = (options.cipher_suites[place].clone(), supported.join(", "));
            return Err(TlsError::Unsupported { field: "tlsCipherSuites", value, supported });
        }
        provider.cipher_suites.retain(|suite| suite.tls13().is_some() || wanted.contains(&name(suite)));
    }
    let versions: &[_] = match options.min_version.as_str() {
        "" | "VersionTLS12" => &[&TLS12, &TLS13],
        "VersionTLS13" => &[&TLS13],
        other => {
            let supported = "VersionTLS12, VersionTLS13".into();
            return Err(TlsError::Unsupported { field: "tlsMinVersion", value: other.into(), supported });
        }
    };
    let provider = Arc::new(provider);
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .map_err(|error| TlsError::Certificate(error.to_string()))?
        .with_client_cert_verifier(Arc::new(RequestAnyCertificate(provider)))
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn self_signed_certificates_are_kept_as_long_as_they_fit() {
        let directory = tempfile::tempdir().expect("dir");
        let read = || fs::read(directory.path().join("kubelet.crt")).expect("read");
        let (names, addresses) = (vec!["node-1".to_owned()], vec!["192.0.2.1".parse().expect("address")]);
        let make = |addresses: &[IpAddr]| {
            ServingCertificate::self_signed(directory.path(), &names, addresses).expect("certificate")
        };
        make(&addresses);
        let first = read();
        make(&addresses);
        assert_eq!(first, read(), "kept");
        let mode = fs::metadata(directory.path().join("kubelet.key")).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        make(&["192.0.2.2".parse().expect("address")]);
        let second = read();
        assert_ne!(first, second, "the address changed");
        fs::write(directory.path().join("kubelet.key"), "damaged").expect("write");
        make(&["192.0.2.2".parse().expect("address")]);
        assert_ne!(second, read(), "the key was damaged");
    }

    #[test]
    fn options_name_what_is_wrong() {
        let (certificate, key) = make_self_signed(&["n".into()], &[]).expect("certificate");
        let serving = ServingCertificate::from_pem(certificate.as_bytes(), key.as_bytes()).expect("serving");
        let config = |min: &str, suites: &[&str]| {
            let cipher_suites = suites.iter().map(|&suite| suite.into()).collect();
            server_config(Arc::clone(&serving), &TlsOptions { min_version: min.into(), cipher_suites })
        };
        assert!(config("VersionTLS13", &[]).is_ok());
        assert!(config("", &["TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256"]).is_ok());
        assert!(config("", &["TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305"]).is_ok());
        let error = config("VersionTLS10", &[]).expect_err("old").to_string();
        assert_eq!(error, "tlsMinVersion: \"VersionTLS10\" is not supported; supported are VersionTLS12, VersionTLS13");
        let error = config("", &["TLS_RSA_WITH_RC4_128_SHA"]).expect_err("old").to_string();
        assert!(error.starts_with("tlsCipherSuites: \"TLS_RSA_WITH_RC4_128_SHA\" is not supported"), "{error}");
        assert!(serving.replace(b"", b"").is_err());
    }
}
