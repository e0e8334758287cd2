//! TLS connections to a k3s server, for requests and for the tunnel.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::node::resolve;

/// Longest time to a TCP connection, and to the end of the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Endpoint {
    /// Of an `https://` URL.
    #[must_use]
    pub fn of_url(url: &str) -> Option<Self> {
        let uri: http::Uri = url.parse().ok()?;
        if uri.scheme_str() != Some("https") {
            return None;
        }
        Self::of_parts(uri.host()?, uri.port_u16().unwrap_or(443))
    }

    /// Of `host:port`.
    #[must_use]
    pub fn of_address(address: &str) -> Option<Self> {
        let (host, port) = address.rsplit_once(':')?;
        Self::of_parts(host, port.parse().ok()?)
    }

    fn of_parts(host: &str, port: u16) -> Option<Self> {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        (port > 0 && ServerName::try_from(host.as_str()).is_ok()).then_some(Self { host, port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.parse() {
            Ok(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            _ => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Whom we believe, and who we say we are.
#[derive(Clone, Debug)]
pub(super) struct Tls(Arc<ClientConfig>);

impl Tls {
    /// Believes servers of these authorities; shows the certificate of a PEM file with its key, if there is one.
    pub(super) fn new(roots: RootCertStore, identity: Option<&Path>) -> io::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let pem = std::fs::read(path)?;
                let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(io::Error::other)?;
                let key = PrivateKeyDer::from_pem_slice(&pem).map_err(io::Error::other)?;
                builder.with_client_auth_cert(chain, key).map_err(io::Error::other)?
            }
        };
        Ok(Self(Arc::new(config)))
    }

    /// Believes anybody: only for asking what the authority is, which is then verified by other means.
    pub(super) fn unverified() -> io::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
            .with_no_client_auth();
        Ok(Self(Arc::new(config)))
    }

    /// A connection to the first of the host's addresses that answers.
    pub(super) async fn connect(&self, endpoint: &Endpoint) -> io::Result<TlsStream<TcpStream>> {
        let addresses = match endpoint.host.parse() {
            Ok(address) => vec![address],
            Err(_) => resolve::lookup(&endpoint.host).await?,
        };
        let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("{} has no address", endpoint.host));
        for address in addresses {
            match self.handshake(SocketAddr::new(address, endpoint.port), &endpoint.host).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn handshake(&self, address: SocketAddr, host: &str) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let attempt = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            TlsConnector::from(self.0.clone()).connect(name, stream).await
        };
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {address} within 10 s"));
        tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or_else(|_| Err(late()))
    }
}

/// Takes every certificate whose key the server has.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for (url, shown) in [
            ("https://example.com:6443", Some("example.com:6443")),
            ("https://example.com/path/", Some("example.com:443")),
            ("https://[fd00::1]:6443", Some("[fd00::1]:6443")),
            ("https://192.0.2.1:6443/", Some("192.0.2.1:6443")),
            ("http://example.com", None),
            ("example.com:6443", None),
            ("https://exa mple", None),
            ("https://a:0", None),
        ] {
            assert_eq!(Endpoint::of_url(url).map(|endpoint| endpoint.to_string()).as_deref(), shown, "{url}");
        }
        assert_eq!(Endpoint::of_address("[fd00::1]:1").unwrap().host, "fd00::1");
        assert_eq!(Endpoint::of_address("10.0.0.1:6443").unwrap().port, 6443);
        assert!(Endpoint::of_address("10.0.0.1").is_none() && Endpoint::of_address("a/b:1").is_none());
    }
}
