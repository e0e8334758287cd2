//! Certificates for Pods: a key, a PodCertificateRequest, its answer, and all of that again in time (KEP-4317).
//!
//! Source: `pkg/kubelet/podcertificate/podcertificatemanager.go`. One task per `podCertificate` source, from the
//! first mount to the Pod's end: it asks, waits with a watch of this one request, and asks again when the signer said
//! to. As with kubelet nothing is kept over a restart: keys are in memory and in the Pod's tmpfs only, which keeps its
//! content until the first new certificate is there.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, PodCertificateProjection};
use kube::Client;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::AbortHandle;

use super::certificate_request::{IssueError, Subject, later, try_issue};
use super::follow::{Retry, lock};

/// A certificate that is not renewed so long after its time is worth an event (`refreshOverdueDuration`).
const OVERDUE: Duration = Duration::from_secs(600);
/// Longest sleep without a look at the clock, which may have been set.
const LOOK: SignedDuration = SignedDuration::from_hours(1);
/// Changes that a slow subscriber may fall behind by before it is told that it has missed some.
const CHANGES: usize = 1024;

/// A certificate that cannot be had. [`CertificateError::NotIssued`] is worth another try, the others are for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Nobody has signed the request yet, or it could not be made.
    #[error("credential bundle is not issued yet{}", .0.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default())]
    NotIssued(Option<String>),
    /// The signer says no.
    #[error("PodCertificateRequest was permanently denied: reason={reason:?} message={message:?}")]
    Denied {
        /// Why, in a word.
        reason: String,
        /// Why.
        message: String,
    },
    /// The signer could not sign it.
    #[error("PodCertificateRequest was permanently failed: reason={reason:?} message={message:?}")]
    Failed {
        /// Why, in a word.
        reason: String,
        /// Why.
        message: String,
    },
    /// There is no API server.
    #[error(
        "podCertificate projection needs an API server and this node has none; put a key and a certificate into a hostPath volume"
    )]
    Standalone,
    /// The node is told not to ask for any.
    #[error(
        "podCertificate projection is off on this node: feature gate PodCertificateRequest is false; set it to true"
    )]
    Gate,
}

impl CertificateError {
    /// Whether another try cannot help.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        !matches!(self, Self::NotIssued(_))
    }
}

/// A key with its certificates. `Debug` does not show the key.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub(super) key: String,
    pub(super) chain: String,
    pub(super) not_after: Timestamp,
    pub(super) refresh_at: Timestamp,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Credential");
        shown.field("not_after", &self.not_after).field("refresh_at", &self.refresh_at).finish_non_exhaustive()
    }
}

impl Credential {
    /// PKCS#8 as PEM.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The certificates as PEM, the Pod's own first.
    #[must_use]
    pub fn chain(&self) -> &str {
        &self.chain
    }
}

/// Hears of a Pod (its metadata), a reason and a message; every event is a warning.
pub type WarningSink = Box<dyn Fn(&Pod, &str, String) + Send + Sync>;

/// Times of a [`CertificateManager`].
#[derive(Clone, Copy, Debug)]
pub struct CertificateOptions {
    /// Up to how much later than the signer said a certificate is renewed, so that those of many Pods are not renewed
    /// at once (`jitterDuration`).
    pub jitter: Duration,
    /// Shortest time from a certificate to the next request, whatever the signer says.
    pub pause: Duration,
}

impl Default for CertificateOptions {
    fn default() -> Self {
        Self { jitter: Duration::from_secs(300), pause: Duration::from_secs(60) }
    }
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Key {
    pod_uid: String,
    volume: String,
    source: usize,
}

type State = Result<Arc<Credential>, CertificateError>;

struct Entry {
    state: watch::Receiver<State>,
    task: AbortHandle,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the manager and its tasks share.
pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) node_name: String,
    pub(super) node: watch::Receiver<Option<Arc<Node>>>,
    pub(super) warn: WarningSink,
    pub(super) options: CertificateOptions,
    /// One key is made at a time, as with kubelet: RSA takes a processor for a second.
    pub(super) keys: Semaphore,
    changes: broadcast::Sender<String>,
}

/// The certificates of this node's Pods.
pub struct CertificateManager {
    /// None without an API server.
    /// Or why there are none.
    shared: Result<Arc<Shared>, CertificateError>,
    entries: Mutex<HashMap<Key, Entry>>,
    changes: broadcast::Sender<String>,
}

impl fmt::Debug for CertificateManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateManager").field("certificates", &lock(&self.entries).len()).finish_non_exhaustive()
    }
}

impl CertificateManager {
    /// A manager of node `node_name`, whose object comes from `node`.
    #[must_use]
    pub fn new(
        client: Client,
        node_name: &str,
        node: watch::Receiver<Option<Arc<Node>>>,
        warn: WarningSink,
        options: CertificateOptions,
    ) -> Self {
        let changes = broadcast::channel(CHANGES).0;
        let (node_name, sender) = (node_name.to_owned(), changes.clone());
        let shared = Shared { client, node_name, node, warn, options, keys: Semaphore::new(1), changes: sender };
        Self { shared: Ok(Arc::new(shared)), entries: Mutex::default(), changes }
    }

    /// A manager without an API server: every certificate is [`CertificateError::Standalone`].
    #[must_use]
    pub fn standalone() -> Self {
        Self::refusing(CertificateError::Standalone)
    }

    /// A manager that refuses: what the feature gate `PodCertificateRequest` set to false asks for.
    #[must_use]
    pub fn off() -> Self {
        Self::refusing(CertificateError::Gate)
    }

    fn refusing(why: CertificateError) -> Self {
        Self { shared: Err(why), entries: Mutex::default(), changes: broadcast::channel(1).0 }
    }

    /// The certificate of source number `index` of the Pod's volume `volume`, kept fresh from now on; waits up to
    /// `deadline` for the first one. Call it within a tokio runtime.
    ///
    /// # Errors
    /// If there is none, or the signer has refused to issue or to renew it.
    pub async fn credential(
        &self,
        pod: &Pod,
        volume: &str,
        index: usize,
        source: &PodCertificateProjection,
        deadline: Duration,
    ) -> Result<Arc<Credential>, CertificateError> {
        let shared = self.shared.as_ref().map_err(Clone::clone)?;
        let pod_uid = pod.metadata.uid.clone().unwrap_or_default();
        let key = Key { pod_uid, volume: volume.to_owned(), source: index };
        let mut state = {
            let mut entries = lock(&self.entries);
            let entry = entries.entry(key).or_insert_with(|| {
                let (sender, state) = watch::channel(Err(CertificateError::NotIssued(None)));
                let subject = Subject::new(pod, source);
                Entry { state, task: tokio::spawn(keep(shared.clone(), subject, sender)).abort_handle() }
            });
            entry.state.clone()
        };
        let settled = |state: &State| !state.as_ref().is_err_and(|error| !error.is_terminal());
        // Elapsed or not: what counts is what is known then.
        let _ = tokio::time::timeout(deadline, state.wait_for(settled)).await;
        state.borrow().clone()
    }

    /// Drops the certificates of a Pod that is gone.
    pub fn forget(&self, pod_uid: &str) {
        lock(&self.entries).retain(|key, _| key.pod_uid != pod_uid);
    }

    /// Tells UIDs of Pods that have a new certificate. A receiver that lags has to look at everything.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<String> {
        self.changes.subscribe()
    }
}

/// Gets a certificate and renews it until the signer refuses to, or the task is aborted.
async fn keep(shared: Arc<Shared>, subject: Subject, state: watch::Sender<State>) {
    let refused = |error: CertificateError| {
        drop(state.send_replace(Err(error)));
    };
    let mut current = match issue(&shared, &subject, Some(&state)).await {
        Ok(credential) => credential,
        Err(error) => return refused(error),
    };
    loop {
        let (refresh_at, not_after) = (current.refresh_at, current.not_after);
        drop(state.send_replace(Ok(current)));
        // Nobody may be listening, which is fine.
        let _ = shared.changes.send(subject.pod.metadata.uid.clone().unwrap_or_default());
        let renew = async {
            sleep_until(refresh_at).await;
            issue(&shared, &subject, None).await
        };
        let warnings = async {
            let overdue = async {
                sleep_until(later(refresh_at, OVERDUE)).await;
                (shared.warn)(
                    &subject.pod,
                    "CertificateOverdueForRefresh",
                    "PodCertificate refresh overdue".to_owned(),
                );
            };
            let expired = async {
                sleep_until(not_after).await;
                (shared.warn)(&subject.pod, "CertificateExpired", "PodCertificate expired".to_owned());
            };
            tokio::join!(overdue, expired);
            std::future::pending().await
        };
        let renewed = tokio::select! { renewed = renew => renewed, never = warnings => never };
        current = match renewed {
            Ok(credential) => credential,
            Err(error) => return refused(error),
        };
    }
}

async fn sleep_until(at: Timestamp) {
    loop {
        let left = at.duration_since(Timestamp::now());
        if !left.is_positive() {
            return;
        }
        tokio::time::sleep(left.min(LOOK).unsigned_abs()).await;
    }
}

/// Tries until there is a certificate or a final refusal; `state` hears why there is none yet.
async fn issue(
    shared: &Shared,
    subject: &Subject,
    state: Option<&watch::Sender<State>>,
) -> Result<Arc<Credential>, CertificateError> {
    let mut pauses = Retry::default();
    loop {
        let error = match try_issue(shared, subject).await {
            Ok(credential) => return Ok(Arc::new(credential)),
            Err(IssueError::Final(error)) => return Err(error),
            Err(error) => error,
        };
        let meta = &subject.pod.metadata;
        tracing::warn!(namespace = meta.namespace, pod = meta.name, %error, "no certificate for the Pod");
        if let Some(state) = state {
            drop(state.send_replace(Err(CertificateError::NotIssued(Some(error.to_string())))));
        }
        tokio::time::sleep(pauses.next().unwrap_or(OVERDUE)).await;
    }
}

#[cfg(test)]
#[path = "certificates_tests.rs"]
mod tests;
