//! Users by client certificate.
//!
//! As in the kubelet, TLS asks for a certificate and checks only that the client has its key. Whether an authority
//! of ours issued it is checked per request, against the authorities of that moment: a changed CA file takes effect
//! on open connections too, and a certificate that expires on a long connection stops counting.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::auth::UserInfo;

/// The certificates that a client showed, its own first. Empty if it showed none.
pub type PeerCertificates = Vec<CertificateDer<'static>>;

/// The authorities whose client certificates count; exchanged while in use.
pub struct ClientCa {
    verifier: RwLock<Option<Arc<dyn ClientCertVerifier>>>,
    provider: Arc<CryptoProvider>,
}

impl ClientCa {
    /// Without authorities: no certificate counts.
    pub fn none() -> Self {
        Self { verifier: RwLock::new(None), provider: Arc::new(rustls::crypto::ring::default_provider()) }
    }

    /// Takes the authorities of a PEM file (`authentication.x509.clientCAFile`) from now on. Whoever watches the
    /// file calls this again when it changes; on an error the authorities stay as they were.
    ///
    /// # Errors
    /// If the file cannot be read or holds no certificate.
    pub fn load(&self, path: &Path) -> io::Result<()> {
        self.replace(&std::fs::read(path)?).map_err(|error| {
            io::Error::new(error.kind(), format!("authentication.x509.clientCAFile {}: {error}", path.display()))
        })
    }

    /// Takes the authorities of a PEM bundle from now on.
    ///
    /// # Errors
    /// If it holds no certificate, or one that is not a certificate.
    pub fn replace(&self, pem: &[u8]) -> io::Result<()> {
        let invalid = |error: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            roots.add(certificate.map_err(|error| invalid(&error))?).map_err(|error| invalid(&error))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| invalid(&error))?;
        *self.verifier.write().unwrap_or_else(PoisonError::into_inner) = Some(verifier);
        Ok(())
    }

    /// The user of a certificate issued by one of the authorities and valid now: common name and organisations.
    pub fn user(&self, peer: &PeerCertificates) -> Option<UserInfo> {
        let (own, intermediates) = peer.split_first()?;
        let verifier = self.verifier.read().unwrap_or_else(PoisonError::into_inner).clone()?;
        if let Err(error) = verifier.verify_client_cert(own, intermediates, UnixTime::now()) {
            tracing::debug!(%error, "Client certificate does not count");
            return None;
        }
        let (_, certificate) = X509Certificate::from_der(own).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        if name.is_empty() {
            return None;
        }
        let groups = subject.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
        let id = format!("X509SHA256={}", hex::encode(Sha256::digest(own)));
        let extra = BTreeMap::from([("authentication.kubernetes.io/credential-id".to_owned(), vec![id])]);
        Some(UserInfo { name, uid: String::new(), groups, extra })
    }
}

/// Asks every client for a certificate and takes any whose key it proves to have; see [`ClientCa::user`].
#[derive(Debug)]
pub(super) struct RequestAnyCertificate(pub(super) Arc<CryptoProvider>);

impl ClientCertVerifier for RequestAnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
