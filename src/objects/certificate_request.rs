//! One PodCertificateRequest: made, watched, and its answer.
//!
//! Source: `handleProjection` and `createPodCertificateRequest` in
//! `pkg/kubelet/podcertificate/podcertificatemanager.go`. A node may read its own requests only, by `spec.nodeName`
//! (`plugin/pkg/auth/authorizer/node/node_authorizer.go`).

use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{PodCertificateRequest, PodCertificateRequestSpec};
use k8s_openapi::api::core::v1::{Pod, PodCertificateProjection, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::PostParams;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_objects};

use super::certificate_key::{KeyAndProof, KeyError};
use super::certificates::{CertificateError, Credential, Shared};
use super::follow::{LIST_DEADLINE, Retry};
use super::pem;

/// For one request to the API server.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// For whom a certificate is, and which.
pub(super) struct Subject {
    /// Metadata only.
    pub(super) pod: Pod,
    namespace: String,
    service_account: String,
    source: PodCertificateProjection,
}

impl Subject {
    pub(super) fn new(pod: &Pod, source: &PodCertificateProjection) -> Self {
        let ObjectMeta { namespace, name, uid, resource_version, .. } = &pod.metadata;
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        Self {
            namespace: namespace.clone().unwrap_or_else(|| "default".to_owned()),
            service_account: account.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned()),
            source: source.clone(),
            pod: Pod {
                metadata: ObjectMeta {
                    namespace: namespace.clone(),
                    name: name.clone(),
                    uid: uid.clone(),
                    resource_version: resource_version.clone(),
                    ..ObjectMeta::default()
                },
                ..Pod::default()
            },
        }
    }
}

/// Why one try gave no certificate. All but [`IssueError::Final`] are worth another try.
#[derive(Debug, thiserror::Error)]
pub(super) enum IssueError {
    /// The signer refuses.
    #[error(transparent)]
    Final(#[from] CertificateError),
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// What was tried, and what went wrong.
    #[error("while {0}: {1}")]
    Api(&'static str, String),
    /// Somebody deleted it.
    #[error("PodCertificateRequest {0:?} appears to have been deleted")]
    Deleted(String),
    /// The signer left something out.
    #[error("PodCertificateRequest {0:?} is issued without {1}")]
    Incomplete(String, &'static str),
}

/// Makes a key and a request, and waits for the certificate.
pub(super) async fn try_issue(shared: &Shared, subject: &Subject) -> Result<Credential, IssueError> {
    let key_type = subject.source.key_type.clone();
    let turn = shared.keys.acquire().await;
    let made = tokio::task::spawn_blocking(move || KeyAndProof::generate(&key_type)).await;
    let KeyAndProof { key, proof } =
        made.map_err(|error| IssueError::Api("generating keypair", error.to_string()))??;
    drop(turn);
    let request = create(shared, subject, proof).await?;
    let name = request.metadata.name.clone().unwrap_or_default();
    let answer = wait(shared, subject, &name).await?;
    let full = format!("{}/{name}", subject.namespace);
    let status = answer.status.unwrap_or_default();
    let mut chain = String::new();
    for der in pem::certificates(status.certificate_chain.as_deref().unwrap_or_default()) {
        pem::encode_certificate(&der, &mut chain);
    }
    if chain.is_empty() {
        return Err(IssueError::Incomplete(full, "status.certificateChain"));
    }
    let Some(not_after) = status.not_after else { return Err(IssueError::Incomplete(full, "status.notAfter")) };
    let Some(begin) = status.begin_refresh_at else {
        return Err(IssueError::Incomplete(full, "status.beginRefreshAt"));
    };
    let soonest = later(Timestamp::now(), shared.options.pause);
    let refresh_at = later(begin.0, shared.options.jitter.mul_f64(fastrand::f64())).max(soonest);
    Ok(Credential { key, chain, not_after: not_after.0, refresh_at })
}

/// Addition that ends at the end of time: the signer says when it begins.
pub(super) fn later(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_add(by).unwrap_or(Timestamp::MAX)
}

async fn create(shared: &Shared, subject: &Subject, proof: Vec<u8>) -> Result<PodCertificateRequest, IssueError> {
    let accounts: Api<ServiceAccount> = Api::namespaced(shared.client.clone(), &subject.namespace);
    let account = answer("fetching service account", accounts.get(&subject.service_account)).await?;
    let mut node = shared.node.clone();
    let known = tokio::time::timeout(REQUEST_DEADLINE, node.wait_for(Option::is_some)).await;
    let uid = known.ok().and_then(Result::ok).and_then(|node| node.as_ref()?.metadata.uid.clone());
    let node_uid = uid.ok_or_else(|| IssueError::Api("getting node object", "it is not known yet".to_owned()))?;
    let (meta, source) = (&subject.pod.metadata, &subject.source);
    let (pod_name, pod_uid) = (meta.name.clone().unwrap_or_default(), meta.uid.clone().unwrap_or_default());
    let request = PodCertificateRequest {
        metadata: ObjectMeta {
            namespace: Some(subject.namespace.clone()),
            generate_name: Some("req-".to_owned()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Pod".to_owned(),
                name: pod_name.clone(),
                uid: pod_uid.clone(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: PodCertificateRequestSpec {
            signer_name: source.signer_name.clone(),
            pod_name,
            pod_uid,
            service_account_name: subject.service_account.clone(),
            service_account_uid: account.metadata.uid.unwrap_or_default(),
            node_name: shared.node_name.clone(),
            node_uid,
            max_expiration_seconds: source.max_expiration_seconds,
            stub_pkc_s10_request: ByteString(proof),
            unverified_user_annotations: source.user_annotations.clone(),
        },
        status: None,
    };
    let api: Api<PodCertificateRequest> = Api::namespaced(shared.client.clone(), &subject.namespace);
    let parameters = PostParams::default();
    answer("creating PodCertificateRequest", api.create(&parameters, &request)).await
}

async fn answer<T>(doing: &'static str, call: impl Future<Output = kube::Result<T>>) -> Result<T, IssueError> {
    match tokio::time::timeout(REQUEST_DEADLINE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(IssueError::Api(doing, status.message.clone())),
        Ok(Err(error)) => Err(IssueError::Api(doing, error.to_string())),
        Err(_) => Err(IssueError::Api(doing, format!("no answer from the API server within {REQUEST_DEADLINE:?}"))),
    }
}

/// Waits until the request is issued. As long as it is there the signer may take its time.
async fn wait(shared: &Shared, subject: &Subject, name: &str) -> Result<PodCertificateRequest, IssueError> {
    let api: Api<PodCertificateRequest> = Api::namespaced(shared.client.clone(), &subject.namespace);
    let full = format!("{}/{name}", subject.namespace);
    loop {
        // The node authorizer asks for the first of the two; the second leaves the one request.
        let fields = format!("spec.nodeName={},metadata.name={name}", shared.node_name);
        let config = watcher::Config::default().fields(&fields);
        let mut events = std::pin::pin!(watch_objects(api.clone(), config).backoff(Retry::default()));
        let (mut found, mut listed) = (false, false);
        loop {
            let event = if listed {
                events.next().await
            } else {
                match tokio::time::timeout(LIST_DEADLINE, events.next()).await {
                    Ok(event) => event,
                    // Never answered: the connection may be dead.
                    Err(_) => break,
                }
            };
            match event {
                Some(Ok(Event::Init)) => found = false,
                Some(Ok(Event::InitApply(request) | Event::Apply(request))) => {
                    found = true;
                    if let Some(request) = judge(shared, subject, &full, request)? {
                        return Ok(request);
                    }
                }
                Some(Ok(Event::InitDone)) if !found => return Err(IssueError::Deleted(full)),
                Some(Ok(Event::InitDone)) => listed = true,
                Some(Ok(Event::Delete(_))) => return Err(IssueError::Deleted(full)),
                Some(Err(error)) => tracing::debug!(request = full, %error, "Failed to watch PodCertificateRequest"),
                None => break,
            }
        }
    }
}

/// The request if it is issued, nothing if it is undecided.
fn judge(
    shared: &Shared,
    subject: &Subject,
    full: &str,
    request: PodCertificateRequest,
) -> Result<Option<PodCertificateRequest>, CertificateError> {
    for condition in request.status.iter().flat_map(|status| status.conditions.iter().flatten()) {
        let (reason, message) = (condition.reason.clone(), condition.message.clone());
        let (text, error) = match condition.type_.as_str() {
            "Issued" => return Ok(Some(request)),
            "Denied" => ("was denied", CertificateError::Denied { reason, message }),
            "Failed" => ("failed", CertificateError::Failed { reason, message }),
            _ => continue,
        };
        let message = format!(
            "PodCertificateRequest {full} {text}, reason={:?}, message={:?}",
            condition.reason, condition.message
        );
        (shared.warn)(&subject.pod, &condition.type_, message);
        return Err(error);
    }
    Ok(None)
}
