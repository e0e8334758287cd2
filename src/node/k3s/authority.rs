//! The cluster's certificate authority, and what vouches for it.
//!
//! Source: `hashCA` in k3s `pkg/clientaccess/token.go`. A token's hash is that of the file if the file holds one
//! certificate; otherwise that of the root under which its first certificate stands, so that authorities may change
//! below their root. Unlike k3s we then trust the certificates between the two and no others of the file: the hash says
//! nothing about them.

use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::X509Certificate;

/// More than this in one bundle is no cluster's.
const MAX_CERTIFICATES: usize = 32;

/// An authority that cannot be used, or is not the one that the token names. `Mismatch` is terminal, `Invalid` may pass
/// when the server was set up wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// No certificates.
    #[error("the server's /cacerts is no list of certificates ({0}): is that a k3s server?")]
    Invalid(String),
    /// Another cluster, or somebody between it and us.
    #[error(
        "the server's certificate authority has the hash {found}, the token is of one with {wanted}: use the token of this cluster (/var/lib/rancher/k3s/server/node-token), and do not join if it is: somebody else answers"
    )]
    Mismatch {
        /// The server's.
        found: String,
        /// The token's.
        wanted: String,
    },
}

/// Certificates that may vouch for servers of the cluster.
#[derive(Clone, Debug)]
pub struct Authority {
    anchors: Vec<CertificateDer<'static>>,
}

impl Authority {
    /// Takes a bundle if it has the hash; without one whatever it is.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn verified(pem: &[u8], hash: Option<&str>) -> Result<Self, AuthorityError> {
        let invalid = |error: &dyn std::fmt::Display| AuthorityError::Invalid(error.to_string());
        let mut all = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            all.push(certificate.map_err(|error| invalid(&error))?.into_owned());
            if all.len() > MAX_CERTIFICATES {
                return Err(invalid(&format_args!("more than {MAX_CERTIFICATES} certificates")));
            }
        }
        if all.is_empty() {
            return Err(invalid(&"none in it"));
        }
        let mut parsed = Vec::new();
        for der in &all {
            let (_, certificate) = x509_parser::parse_x509_certificate(der).map_err(|error| invalid(&error))?;
            parsed.push(certificate);
        }
        let chain = if parsed.len() > 1 { chain(&parsed) } else { None };
        let (digest, trusted) = match &chain {
            Some(chain) => (Sha256::digest(&all[chain[chain.len() - 1]]), chain.clone()),
            None => (Sha256::digest(pem), (0..all.len()).collect()),
        };
        let trusted = match hash {
            Some(wanted) => {
                let found = hex::encode(digest);
                if found != wanted {
                    return Err(AuthorityError::Mismatch { found, wanted: wanted.to_owned() });
                }
                trusted
            }
            None => (0..all.len()).collect::<Vec<_>>(),
        };
        let anchors = trusted.into_iter().map(|index| all[index].clone()).collect();
        Ok(Self { anchors })
    }

    /// For TLS.
    ///
    /// # Errors
    /// [`AuthorityError::Invalid`] if TLS cannot use one of them.
    pub(super) fn roots(&self) -> Result<RootCertStore, AuthorityError> {
        let mut roots = RootCertStore::empty();
        for anchor in &self.anchors {
            roots.add(anchor.clone()).map_err(|error| AuthorityError::Invalid(error.to_string()))?;
        }
        Ok(roots)
    }
}

/// Indices from the first certificate to a root after it, each signed by the next.
fn chain(certificates: &[X509Certificate<'_>]) -> Option<Vec<usize>> {
    let valid = |index: usize| certificates[index].validity().is_valid();
    let mut chain = vec![0];
    if !valid(0) {
        return None;
    }
    while chain.len() <= certificates.len() {
        let last = &certificates[chain[chain.len() - 1]];
        let issues = |index: &usize| {
            let issuer = &certificates[*index];
            issuer.is_ca()
                && valid(*index)
                && issuer.subject().as_raw() == last.issuer().as_raw()
                && last.verify_signature(Some(issuer.public_key())).is_ok()
        };
        let next = (1..certificates.len()).filter(|index| !chain.contains(index)).find(issues)?;
        chain.push(next);
        if is_root(&certificates[next]) {
            return Some(chain);
        }
    }
    None
}

/// It names no other key as its authority's.
fn is_root(certificate: &X509Certificate<'_>) -> bool {
    let mut own = None;
    let mut authority = None;
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => own = Some(id.0),
            ParsedExtension::AuthorityKeyIdentifier(id) => authority = id.key_identifier.as_ref().map(|id| id.0),
            _ => {}
        }
    }
    authority.is_none() || authority == own
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.use_authority_key_identifier_extension = true;
        params
    }

    /// Of one certificate that signs itself.
    fn root(name: &str) -> (String, Issuer<'static, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let pem = params(name).self_signed(&key).unwrap().pem();
        (pem, Issuer::new(params(name), key))
    }

    fn below(issuer: &Issuer<'_, KeyPair>, name: &str) -> String {
        let key = KeyPair::generate().unwrap();
        params(name).signed_by(&key, issuer).unwrap().pem()
    }

    fn der_hash(pem: &str) -> String {
        hex::encode(Sha256::digest(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()))
    }

    #[test]
    fn one_certificate_is_hashed_as_the_file() {
        let (pem, _) = root("k3s-server-ca");
        let hash = hex::encode(Sha256::digest(&pem));
        assert_eq!(Authority::verified(pem.as_bytes(), Some(&hash)).unwrap().anchors.len(), 1);
        let error = Authority::verified(pem.as_bytes(), Some(&"0".repeat(64))).unwrap_err();
        assert!(matches!(&error, AuthorityError::Mismatch { found, .. } if *found == hash), "{error}");
    }

    #[test]
    fn a_bundle_is_hashed_as_its_root_and_trusted_up_to_it() {
        let (root_pem, issuer) = root("root");
        let (stranger, _) = root("stranger");
        let bundle = format!("{}{stranger}{root_pem}", below(&issuer, "server-ca"));
        let authority = Authority::verified(bundle.as_bytes(), Some(&der_hash(&root_pem))).unwrap();
        assert_eq!(authority.anchors.len(), 2, "the stranger is not trusted");
        assert!(authority.roots().is_ok());
        assert!(Authority::verified(bundle.as_bytes(), Some(&der_hash(&stranger))).is_err());
        // trust on first use takes all
        assert_eq!(Authority::verified(bundle.as_bytes(), None).unwrap().anchors.len(), 3);
    }

    #[test]
    fn a_root_that_did_not_sign_vouches_for_nothing() {
        let (root_pem, _) = root("root");
        let (_, impostor) = root("root");
        let bundle = format!("{}{root_pem}", below(&impostor, "server-ca"));
        let error = Authority::verified(bundle.as_bytes(), Some(&der_hash(&root_pem))).unwrap_err();
        assert!(matches!(error, AuthorityError::Mismatch { .. }));
    }

    #[test]
    fn what_is_no_bundle_is_refused() {
        let (pem, _) = root("r");
        for text in [String::new(), "<html>".to_owned(), pem.repeat(MAX_CERTIFICATES + 1)] {
            assert!(matches!(Authority::verified(text.as_bytes(), None), Err(AuthorityError::Invalid(_))));
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bundles_never_panic(text in "(-----(BEGIN|END) CERTIFICATE-----\n|[A-Za-z0-9+/=]{0,64}\n?){0,6}") {
            let _ = Authority::verified(text.as_bytes(), Some("0"));
        }
    }
}
