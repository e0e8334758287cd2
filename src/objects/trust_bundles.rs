//! ClusterTrustBundles, watched together as long as a volume of a Pod of this node shows one (KEP-3257).
//!
//! Source: `pkg/kubelet/clustertrustbundle/clustertrustbundle_manager.go`. A node may read all of them
//! (`system:node` in `plugin/pkg/auth/authorizer/rbac/bootstrappolicy/policy.go`). The first Pod that needs one starts
//! the watch, the last one stops it and all is forgotten. Of an object its certificates, signer and labels are kept.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::{ClusterTrustBundleProjection, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_objects};
use kube::{Api, Client};
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

use super::cache::Change;
use super::follow::{LIST_DEADLINE, Retry, lock};
use super::pem;

/// Certificates that are kept of all bundles together; the API server takes 1 MiB of PEM per bundle.
const MAX_BYTES: usize = 32 << 20;
/// Longest label selector, as with kubelet.
const MAX_SELECTOR: usize = 100 * 1024;

/// Trust anchors that cannot be had; the texts are kubelet's where it has one. Retryable, except
/// [`TrustBundleError::Selector`], [`TrustBundleError::SelectorLength`], [`TrustBundleError::Unnamed`] and
/// [`TrustBundleError::Standalone`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustBundleError {
    /// The bundles have not been read since a Pod needs one.
    #[error("ClusterTrustBundle informer has not yet synced: {0}")]
    NotSynced(String),
    /// There is no bundle of this name.
    #[error("while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io {0:?} not found")]
    NotFound(String),
    /// No bundle of the signer has the labels.
    #[error("combination of signerName and labelSelector matched zero ClusterTrustBundles")]
    NoMatch,
    /// The node keeps no more.
    #[error(
        "ClusterTrustBundle {name:?} is not kept by this node: all bundles together have more than {} MiB of certificates; remove bundles that nobody uses",
        MAX_BYTES >> 20
    )]
    TooMuch {
        /// The bundle.
        name: String,
    },
    /// The label selector is none.
    #[error("while parsing label selector: {0}")]
    Selector(String),
    /// The label selector is too long.
    #[error("label selector length ({0}) is larger than {MAX_SELECTOR}")]
    SelectorLength(usize),
    /// Neither `name` nor `signerName`.
    #[error("ClusterTrustBundle projection requires either name or signerName to be set")]
    Unnamed,
    /// There is no API server.
    #[error(
        "ClusterTrustBundle projection is not supported in static kubelet mode: this node has no API server; put the certificates into a hostPath volume"
    )]
    Standalone,
    /// The node is told not to show any.
    #[error(
        "ClusterTrustBundle projection is off on this node: feature gate ClusterTrustBundleProjection is false; set it to true"
    )]
    Gate,
}

impl TrustBundleError {
    /// Whether only another manifest helps.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Selector(_) | Self::SelectorLength(_) | Self::Unnamed | Self::Standalone | Self::Gate)
    }
}

/// The `clusterTrustBundle` sources of a Pod's volumes.
fn sources(pod: &Pod) -> impl Iterator<Item = &ClusterTrustBundleProjection> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let projected = volumes.filter_map(|volume| volume.projected.as_ref());
    projected
        .flat_map(|volume| volume.sources.iter().flatten())
        .filter_map(|source| source.cluster_trust_bundle.as_ref())
}

/// Whether a volume of the Pod may show the bundle.
pub(super) fn shows(pod: &Pod, name: &str, signer: Option<&str>) -> bool {
    sources(pod).any(|source| match &source.name {
        Some(wanted) => wanted == name,
        None => source.signer_name.is_some() && source.signer_name.as_deref() == signer,
    })
}

/// What is kept of a bundle.
#[derive(Debug, PartialEq, Eq)]
struct Bundle {
    signer: Option<String>,
    labels: BTreeMap<String, String>,
    /// The certificates; none if there was no room.
    anchors: Option<Vec<Vec<u8>>>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Bundles {
    by_name: BTreeMap<String, Arc<Bundle>>,
    bytes: usize,
}

impl Bundles {
    fn apply(&mut self, object: ClusterTrustBundle, limit: usize) -> (String, Arc<Bundle>) {
        let name = object.metadata.name.unwrap_or_default();
        self.remove(&name);
        let anchors = pem::certificates(&object.spec.trust_bundle);
        let bytes: usize = anchors.iter().map(|der| der.len() + size_of::<Vec<u8>>()).sum();
        let fits = self.bytes + bytes <= limit;
        if !fits {
            tracing::error!(bundle = name, bytes, limit, "ClusterTrustBundles of the cluster are too large to be kept");
        }
        let bundle = Arc::new(Bundle {
            signer: object.spec.signer_name.filter(|signer| !signer.is_empty()),
            labels: object.metadata.labels.unwrap_or_default(),
            anchors: fits.then_some(anchors),
            bytes: if fits { bytes } else { 0 },
        });
        self.bytes += bundle.bytes;
        self.by_name.insert(name.clone(), bundle.clone());
        (name, bundle)
    }

    fn remove(&mut self, name: &str) -> Option<Arc<Bundle>> {
        let old = self.by_name.remove(name)?;
        self.bytes -= old.bytes;
        Some(old)
    }
}

#[derive(Debug)]
enum State {
    /// Not read yet, with what went wrong at the last try.
    Pending(Option<String>),
    Read(Bundles),
}

#[derive(Debug, Default)]
struct Users {
    pods: HashSet<String>,
    watch: Option<Watch>,
}

#[derive(Debug)]
struct Watch {
    state: Arc<watch::Sender<State>>,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The ClusterTrustBundles that volumes of this node show.
pub(super) struct TrustBundles {
    /// Or why there are none.
    client: Result<Client, TrustBundleError>,
    deadline: Duration,
    limit: usize,
    users: Mutex<Users>,
    changes: broadcast::Sender<Change>,
    /// The order of a bundle's certificates: the same as long as the agent lives, but nobody can rely on it.
    order: RandomState,
}

impl fmt::Debug for TrustBundles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundles").field("pods", &lock(&self.users).pods.len()).finish_non_exhaustive()
    }
}

impl TrustBundles {
    pub fn new(
        client: Result<Client, TrustBundleError>,
        deadline: Duration,
        changes: broadcast::Sender<Change>,
    ) -> Self {
        let (users, order) = (Mutex::default(), RandomState::new());
        Self { client, deadline, limit: MAX_BYTES, users, changes, order }
    }

    /// Keeps the bundles readable as long as a Pod that shows one is registered.
    pub fn register_pod(&self, uid: &str, pod: &Pod) {
        if sources(pod).next().is_none() {
            return self.unregister_pod(uid);
        }
        let Ok(client) = &self.client else { return };
        let mut users = lock(&self.users);
        users.pods.insert(uid.to_owned());
        users.watch.get_or_insert_with(|| {
            let state = Arc::new(watch::Sender::new(State::Pending(None)));
            let task = tokio::spawn(follow(client.clone(), state.clone(), self.changes.clone(), self.limit));
            Watch { state, task: task.abort_handle() }
        });
    }

    pub fn unregister_pod(&self, uid: &str) {
        let mut users = lock(&self.users);
        users.pods.remove(uid);
        if users.pods.is_empty() {
            users.watch = None;
        }
    }

    /// The PEM of the certificates that `source` selects, each once; empty if it selects none and is optional.
    pub async fn anchors(&self, source: &ClusterTrustBundleProjection) -> Result<String, TrustBundleError> {
        let mut state = {
            let users = lock(&self.users);
            match &users.watch {
                Some(watch) => watch.state.subscribe(),
                None => {
                    let unregistered = TrustBundleError::NotSynced("no registered Pod needs it".to_owned());
                    return Err(self.client.as_ref().err().cloned().unwrap_or(unregistered));
                }
            }
        };
        let read = state.wait_for(|state| matches!(state, State::Read(_)));
        // Elapsed or not: what counts is what is known then.
        let _ = tokio::time::timeout(self.deadline, read).await;
        match &*state.borrow() {
            State::Read(bundles) => self.select(bundles, source),
            State::Pending(reason) => {
                let reason = reason.as_deref().unwrap_or("timed out waiting for the condition");
                Err(TrustBundleError::NotSynced(reason.to_owned()))
            }
        }
    }

    fn select(&self, bundles: &Bundles, source: &ClusterTrustBundleProjection) -> Result<String, TrustBundleError> {
        let selected: Vec<_> = if let Some(name) = &source.name {
            bundles.by_name.get_key_value(name).into_iter().collect()
        } else if let Some(signer) = &source.signer_name {
            let selector = selector(source.label_selector.as_ref())?;
            let of_signer = bundles.by_name.iter().filter(|(_, bundle)| bundle.signer.as_ref() == Some(signer));
            of_signer.filter(|(_, bundle)| selector.as_ref().is_some_and(|s| s.matches(&bundle.labels))).collect()
        } else {
            return Err(TrustBundleError::Unnamed);
        };
        if selected.is_empty() && source.optional != Some(true) {
            return Err(match &source.name {
                Some(name) => TrustBundleError::NotFound(name.clone()),
                None => TrustBundleError::NoMatch,
            });
        }
        let mut anchors: Vec<(u64, &[u8])> = Vec::new();
        for (name, bundle) in selected {
            let of_bundle = bundle.anchors.as_ref().ok_or_else(|| TrustBundleError::TooMuch { name: name.clone() })?;
            anchors.extend(of_bundle.iter().map(|der| (self.order.hash_one(der), der.as_slice())));
        }
        anchors.sort_unstable();
        anchors.dedup();
        let mut text = String::new();
        for (_, der) in anchors {
            pem::encode_certificate(der, &mut text);
        }
        Ok(text)
    }
}

/// No selector selects nothing, an empty one everything. Source: `LabelSelectorAsSelector` in
/// `apimachinery/pkg/apis/meta/v1/helpers.go`.
fn selector(selector: Option<&LabelSelector>) -> Result<Option<Selector>, TrustBundleError> {
    let Some(selector) = selector else { return Ok(None) };
    let selector =
        Selector::try_from(selector.clone()).map_err(|error| TrustBundleError::Selector(error.to_string()))?;
    let length = selector.to_string().len();
    if length > MAX_SELECTOR {
        return Err(TrustBundleError::SelectorLength(length));
    }
    Ok(Some(selector))
}

/// Watches all bundles until it is aborted.
async fn follow(client: Client, state: Arc<watch::Sender<State>>, changes: broadcast::Sender<Change>, limit: usize) {
    let api: Api<ClusterTrustBundle> = Api::all(client);
    // Nobody may be listening, which is fine.
    let tell = |name: &str, bundle: &Bundle| {
        let _ = changes.send(Change::TrustBundle { name: name.to_owned(), signer: bundle.signer.clone() });
    };
    loop {
        let mut events =
            std::pin::pin!(watch_objects(api.clone(), watcher::Config::default()).backoff(Retry::default()));
        let mut fresh = Bundles::default();
        loop {
            let pending = matches!(*state.borrow(), State::Pending(None));
            let event = if pending {
                match tokio::time::timeout(LIST_DEADLINE, events.next()).await {
                    Ok(event) => event,
                    // Never answered: the connection may be dead.
                    Err(_) => break,
                }
            } else {
                events.next().await
            };
            let Some(event) = event else { break };
            match event {
                Ok(Event::Init) => fresh = Bundles::default(),
                Ok(Event::InitApply(object)) => drop(fresh.apply(object, limit)),
                Ok(Event::InitDone) => {
                    let new = std::mem::take(&mut fresh);
                    let now = new.by_name.clone();
                    let old = match state.send_replace(State::Read(new)) {
                        State::Read(old) => old.by_name,
                        State::Pending(_) => BTreeMap::new(),
                    };
                    now.iter().filter(|(name, bundle)| old.get(*name) != Some(bundle)).for_each(|(n, b)| tell(n, b));
                    old.iter().filter(|(name, bundle)| now.get(*name) != Some(bundle)).for_each(|(n, b)| tell(n, b));
                }
                Ok(Event::Apply(object)) => {
                    state.send_if_modified(|state| {
                        if let State::Read(bundles) = state {
                            let (name, bundle) = bundles.apply(object, limit);
                            tell(&name, &bundle);
                        }
                        false
                    });
                }
                Ok(Event::Delete(object)) => {
                    state.send_if_modified(|state| {
                        let name = object.metadata.name.as_deref().unwrap_or_default();
                        if let State::Read(bundles) = state
                            && let Some(bundle) = bundles.remove(name)
                        {
                            tell(name, &bundle);
                        }
                        false
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "Failed to watch ClusterTrustBundles");
                    let reason = match error {
                        watcher::Error::InitialListFailed(kube::Error::Api(status))
                        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
                        | watcher::Error::WatchError(status) => status.message.clone(),
                        error => error.to_string(),
                    };
                    state.send_if_modified(|state| {
                        if let State::Pending(last) = state {
                            *last = Some(reason);
                        }
                        false
                    });
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "trust_bundles_tests.rs"]
mod tests;
