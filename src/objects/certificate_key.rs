//! Keys for Pods, and the proof that we have them.
//!
//! Source: `generateKeyAndProof` and `pemEncodeKey` in `pkg/kubelet/podcertificate/podcertificatemanager.go`.

use std::fmt;

use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
    PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256, RsaKeySize,
};

use super::pem;

/// A key that cannot be made. Retryable, except [`KeyError::UnknownType`].
#[derive(Debug, thiserror::Error)]
pub(super) enum KeyError {
    /// `keyType` of a newer Kubernetes.
    #[error(
        "unknown key type {0:?}: this node makes RSA3072, RSA4096, ECDSAP256, ECDSAP384, ECDSAP521 and ED25519 keys"
    )]
    UnknownType(String),
    /// The library could not.
    #[error("while generating keypair: {0}")]
    Generate(#[from] rcgen::Error),
}

/// A key and an empty PKCS#10 request that is signed with it. `Debug` does not show the key.
pub(super) struct KeyAndProof {
    /// PKCS#8 as PEM.
    pub(super) key: String,
    /// DER.
    pub(super) proof: Vec<u8>,
}

impl fmt::Debug for KeyAndProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyAndProof").finish_non_exhaustive()
    }
}

impl KeyAndProof {
    /// Makes a key of `keyType`; takes up to seconds of work for RSA.
    pub(super) fn generate(key_type: &str) -> Result<Self, KeyError> {
        let key = match key_type {
            "RSA3072" => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_3072),
            "RSA4096" => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_4096),
            "ECDSAP256" => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
            "ECDSAP384" => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
            "ECDSAP521" => KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512),
            "ED25519" => KeyPair::generate_for(&PKCS_ED25519),
            other => return Err(KeyError::UnknownType(other.to_owned())),
        }?;
        let mut request = CertificateParams::default();
        request.distinguished_name = DistinguishedName::new();
        let proof = request.serialize_request(&key)?.der().to_vec();
        let mut text = String::new();
        pem::encode("PRIVATE KEY", key.serialized_der(), &mut text);
        Ok(Self { key: text, proof })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::PrivatePkcs8KeyDer;
    use rustls_pki_types::pem::PemObject;
    use x509_parser::certification_request::X509CertificationRequest;
    use x509_parser::prelude::FromDer;
    use x509_parser::public_key::PublicKey;

    #[test]
    fn makes_every_type_of_key_with_an_empty_request() {
        for (kind, bits) in [
            ("RSA3072", 3072),
            ("RSA4096", 4096),
            ("ECDSAP256", 256),
            ("ECDSAP384", 384),
            ("ECDSAP521", 528),
            ("ED25519", 0),
        ] {
            let made = KeyAndProof::generate(kind).unwrap();
            let (rest, request) = X509CertificationRequest::from_der(&made.proof).unwrap();
            assert!(rest.is_empty(), "{kind}");
            let info = &request.certification_request_info;
            assert_eq!((info.subject.iter().count(), info.iter_attributes().count()), (0, 0), "{kind}");
            let size = match info.subject_pki.parsed().unwrap() {
                PublicKey::RSA(key) => key.key_size(),
                PublicKey::EC(point) => point.key_size(),
                _ => 0,
            };
            assert_eq!(size, bits, "{kind}");
            // The key in the file is the one that the request is about.
            let der = PrivatePkcs8KeyDer::from_pem_slice(made.key.as_bytes()).unwrap();
            let key = KeyPair::try_from(&der).unwrap();
            use rcgen::PublicKeyData;
            assert_eq!(key.subject_public_key_info(), info.subject_pki.raw, "{kind}");
            assert!(!format!("{made:?}").contains(made.key.lines().nth(1).unwrap()));
        }
        assert!(matches!(KeyAndProof::generate("RSA1024"), Err(KeyError::UnknownType(_))));
    }
}
