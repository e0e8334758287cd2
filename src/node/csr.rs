//! Certificates from the cluster: a CertificateSigningRequest made, watched, and its answer.
//!
//! Source: client-go `util/certificate/csr/csr.go`, `pkg/kubelet/certificate/bootstrap/bootstrap.go` (names).

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::TryStreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData, SanType};
use sha2::{Digest, Sha512_256};

use super::register::is;

/// Signs client certificates of nodes.
pub(super) const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Signs serving certificates of nodes; nobody approves these by default.
pub(super) const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";
const GROUP: &str = "system:nodes";

/// No certificate. All are worth another try after a pause; `Denied` and `Failed` need an administrator first.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// The API server refuses or is away.
    #[error("cannot request a certificate: {0}")]
    Api(#[from] Box<kube::Error>),
    /// A request of this name is about another key.
    #[error("certificate signing request {0} exists and is not ours: delete it with kubectl delete csr {0}")]
    Foreign(String),
    /// Somebody said no.
    #[error(
        "certificate signing request {name} is denied, reason: {reason}, message: {message}: delete it with kubectl delete csr {name} to ask again"
    )]
    Denied {
        /// The request.
        name: String,
        /// Why, in a word.
        reason: String,
        /// Why.
        message: String,
    },
    /// The signer could not sign it.
    #[error(
        "certificate signing request {name} failed, reason: {reason}, message: {message}: delete it with kubectl delete csr {name} to ask again"
    )]
    Failed {
        /// The request.
        name: String,
        /// Why, in a word.
        reason: String,
        /// Why.
        message: String,
    },
    /// Nobody answered.
    #[error(
        "certificate signing request {0} was not signed in time: approve it with kubectl certificate approve {0}, or see why kube-controller-manager does not sign"
    )]
    Timeout(String),
    /// It was deleted while we waited.
    #[error("certificate signing request {0} was deleted before it was signed")]
    Deleted(String),
    /// The key cannot be used.
    #[error("unable to generate certificate request: {0}")]
    Key(#[from] rcgen::Error),
}

/// What is asked for.
pub(super) struct Template<'a> {
    pub(super) node_name: &'a str,
    pub(super) signer: &'static str,
    pub(super) dns_names: Vec<String>,
    pub(super) addresses: Vec<IpAddr>,
}

impl Template<'_> {
    fn common_name(&self) -> String {
        format!("system:node:{}", self.node_name)
    }

    /// What the key may be used for; elliptic curve keys encipher nothing.
    fn usages(&self) -> [&'static str; 2] {
        ["digital signature", if self.signer == SERVING_SIGNER { "server auth" } else { "client auth" }]
    }

    fn request(&self, key: &KeyPair) -> Result<String, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, GROUP);
        params.distinguished_name.push(DnType::CommonName, self.common_name());
        for name in &self.dns_names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.subject_alt_names.extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        params.serialize_request(key)?.pem()
    }

    /// The same for the same key, subject and usages, so that a restart finds its request again.
    pub(super) fn digested_name(&self, key: &KeyPair) -> String {
        let mut hash = Sha512_256::new();
        let mut write = |bytes: &[u8]| {
            hash.update(URL_SAFE_NO_PAD.encode(bytes));
            hash.update(b"|");
        };
        write(&key.subject_public_key_info());
        write(self.common_name().as_bytes());
        write(GROUP.as_bytes());
        self.usages().iter().for_each(|usage| write(usage.as_bytes()));
        format!("node-csr-{}", URL_SAFE_NO_PAD.encode(hash.finalize()))
    }
}

/// Asks for a certificate and waits for it; returns the PEM chain. With a name an earlier request is taken up again.
pub(super) async fn request_certificate(
    client: Client,
    template: &Template<'_>,
    key: &KeyPair,
    name: Option<String>,
    timeout: Duration,
) -> Result<String, CsrError> {
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let usages = template.usages().map(str::to_owned).to_vec();
    let wanted = CertificateSigningRequest {
        metadata: ObjectMeta {
            generate_name: name.is_none().then(|| "csr-".to_owned()),
            name,
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(template.request(key)?.into_bytes()),
            signer_name: template.signer.to_owned(),
            usages: Some(usages),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let created = match (requests.create(&PostParams::default(), &wanted).await, &wanted.metadata.name) {
        (Ok(created), _) => created,
        (Err(error), Some(name)) if is(&error, 409) => {
            let existing = requests.get(name).await.map_err(Box::new)?;
            if existing.spec.signer_name != template.signer || !same_key(&existing.spec.request.0, key) {
                return Err(CsrError::Foreign(name.clone()));
            }
            tracing::info!(csr = name, "csr for this node already exists, reusing");
            existing
        }
        (Err(error), _) => return Err(Box::new(error).into()),
    };
    let name = created.metadata.name.clone().unwrap_or_default();
    tracing::info!(csr = name, signer = template.signer, "waiting for the certificate to be issued");
    let waiting = wait(&requests, &name, created.metadata.uid.as_deref());
    tokio::time::timeout(timeout, waiting).await.unwrap_or(Err(CsrError::Timeout(name)))
}

/// Whether a PEM request is about our key.
fn same_key(request: &[u8], key: &KeyPair) -> bool {
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(request) else { return false };
    let request = <x509_parser::certification_request::X509CertificationRequest<'_> as x509_parser::prelude::FromDer<
        '_,
        x509_parser::error::X509Error,
    >>::from_der(&pem.contents);
    request
        .is_ok_and(|(_, request)| request.certification_request_info.subject_pki.raw == key.subject_public_key_info())
}

async fn wait(requests: &Api<CertificateSigningRequest>, name: &str, uid: Option<&str>) -> Result<String, CsrError> {
    let selector = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut stream = std::pin::pin!(watcher(requests.clone(), selector).default_backoff());
    let mut present = false;
    loop {
        let event = match stream.try_next().await {
            Ok(Some(event)) => event,
            Ok(None) => return Err(CsrError::Deleted(name.to_owned())),
            Err(error) => {
                tracing::warn!(%error, csr = name, "watching the certificate request failed, will retry");
                continue;
            }
        };
        let request = match event {
            watcher::Event::Init => {
                present = false;
                continue;
            }
            watcher::Event::InitApply(request) | watcher::Event::Apply(request) => request,
            watcher::Event::InitDone if present => continue,
            watcher::Event::InitDone | watcher::Event::Delete(_) => return Err(CsrError::Deleted(name.to_owned())),
        };
        if request.metadata.uid.as_deref() != uid {
            return Err(CsrError::Deleted(name.to_owned()));
        }
        present = true;
        if let Some(result) = verdict(&request) {
            return result;
        }
    }
}

/// What a request has come to; nothing while it waits.
fn verdict(request: &CertificateSigningRequest) -> Option<Result<String, CsrError>> {
    let status = request.status.as_ref()?;
    let name = request.metadata.name.clone().unwrap_or_default();
    let mut approved = false;
    for condition in status.conditions.iter().flatten() {
        let reason = condition.reason.clone().unwrap_or_default();
        let message = condition.message.clone().unwrap_or_default();
        match condition.type_.as_str() {
            "Denied" => return Some(Err(CsrError::Denied { name, reason, message })),
            "Failed" => return Some(Err(CsrError::Failed { name, reason, message })),
            "Approved" => approved = true,
            _ => {}
        }
    }
    let certificate = status.certificate.as_ref().filter(|certificate| approved && !certificate.0.is_empty())?;
    Some(Ok(String::from_utf8_lossy(&certificate.0).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(node_name: &str) -> Template<'_> {
        Template { node_name, signer: CLIENT_SIGNER, dns_names: Vec::new(), addresses: Vec::new() }
    }

    #[test]
    fn names_follow_key_subject_and_usages() {
        let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let name = client("n").digested_name(&one);
        assert_eq!(name, client("n").digested_name(&one));
        assert!(name.starts_with("node-csr-") && name.len() == 9 + 43);
        assert_ne!(name, client("m").digested_name(&one));
        assert_ne!(name, client("n").digested_name(&two));
        let serving = Template { signer: SERVING_SIGNER, ..client("n") };
        assert_ne!(name, serving.digested_name(&one));
    }

    #[test]
    fn requests_say_who_we_are() {
        use x509_parser::prelude::FromDer;
        let key = KeyPair::generate().unwrap();
        let template = Template {
            signer: SERVING_SIGNER,
            dns_names: vec!["n.example".into()],
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ..client("n")
        };
        let pem = template.request(&key).unwrap();
        assert!(pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----") && same_key(pem.as_bytes(), &key));
        assert!(!same_key(pem.as_bytes(), &KeyPair::generate().unwrap()) && !same_key(b"junk", &key));
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let (_, request) =
            x509_parser::certification_request::X509CertificationRequest::from_der(&block.contents).unwrap();
        assert_eq!(request.certification_request_info.subject.to_string(), "O=system:nodes, CN=system:node:n");
        assert_eq!(request.requested_extensions().unwrap().count(), 1);
        // client requests have no names at all: the signer would refuse them
        let pem = client("n").request(&key).unwrap();
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let (_, request) =
            x509_parser::certification_request::X509CertificationRequest::from_der(&block.contents).unwrap();
        assert_eq!(request.requested_extensions().map_or(0, Iterator::count), 0);
    }
}
