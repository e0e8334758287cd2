//! The node's parts, and the [`Effects`] that Pod workers act through.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use tokio::sync::watch;

use super::pods::Pods;
use super::progress::Pulls;
use super::records::Records;
use super::report;
use crate::config::Config;
use crate::image::{ImageStore, Keyring};
use crate::network::Network;
use crate::network::dns::NodeDns;
use crate::node::client::ApiClient;
use crate::node::events::{EventRecorder, EventType};
use crate::objects::{FieldContext, ObjectCache, ServiceCache};
use crate::pod::admission::SysctlAllowlist;
use crate::pod::effects::{ApiAnswer, Effects, Failure, Outcome, Request};
use crate::pod::model::{Desired, Observed};
use crate::pod::plan::Action;
use crate::resources::cgroup::CgroupTree;
use crate::resources::devices::DeviceManager;
use crate::runtime::client::{Shim, ShimLauncher};
use crate::runtime::spec::NodeTraits;
use crate::volume::VolumeManager;

/// Everything a Pod's worker needs of the node.
pub struct Node {
    /// The configuration, validated.
    pub config: Arc<Config>,
    /// The API server; none when the agent runs by itself.
    pub api: Option<Arc<ApiClient>>,
    /// Events.
    pub events: EventRecorder,
    /// Records on disk.
    pub records: Records,
    /// All Pods.
    pub pods: Arc<Pods>,
    /// Images.
    pub images: Arc<ImageStore>,
    /// Registry credentials of the node itself.
    pub keyring: Keyring,
    /// Pulls that run.
    pub pulls: Arc<Pulls>,
    /// Pod network.
    pub network: Arc<Network>,
    /// DNS settings.
    pub dns: NodeDns,
    /// Volumes.
    pub volumes: Arc<VolumeManager>,
    /// ConfigMaps and Secrets.
    pub objects: Arc<ObjectCache>,
    /// Services, for environment variables.
    pub services: Arc<ServiceCache>,
    /// Cgroups.
    pub cgroups: Arc<CgroupTree>,
    /// Starts shims.
    pub launcher: ShimLauncher,
    /// What containers may get from this node.
    pub traits: NodeTraits,
    /// Sysctls that Pods may set.
    pub sysctls: SysctlAllowlist,
    /// `status.declaredFeatures`.
    pub declared_features: BTreeSet<String>,
    /// The Node object as last seen.
    pub object: watch::Receiver<Option<Arc<NodeObject>>>,
    /// The node's addresses, the primary first.
    pub addresses: Vec<IpAddr>,
    /// What the node offers, when there is no Node object to say it.
    pub allocatable: BTreeMap<String, Quantity>,
    /// Devices of plugins.
    pub devices: Arc<DeviceManager>,
    /// All sources have told which Pods they have.
    pub(super) sources_ready: AtomicBool,
    /// Steps towards a running container that are being taken now, of all Pods.
    pub(super) steps: AtomicUsize,
    pub(super) shims: Mutex<HashMap<String, Shim>>,
    pub(super) shutting_down: AtomicBool,
    /// Memory of Pods that are gone is about to be given back.
    pub(super) memory_due: AtomicBool,
}

impl Node {
    /// The machine is about to shut down: no new Pods.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Acquire)
    }

    pub(super) fn shims(&self) -> MutexGuard<'_, HashMap<String, Shim>> {
        self.shims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The Pod's shim, if it has one.
    #[must_use]
    pub fn shim(&self, uid: &str) -> Option<Shim> {
        self.shims().get(uid).cloned()
    }

    /// `/var/log/pods/<namespace>_<name>_<uid>`.
    #[must_use]
    pub fn log_dir(&self, pod: &Pod) -> PathBuf {
        let meta = &pod.metadata;
        let name = format!(
            "{}_{}_{}",
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
            meta.uid.as_deref().unwrap_or_default()
        );
        self.config.paths.pod_logs_dir.join(name)
    }

    /// `<root_dir>/pods/<uid>`: what kubelet keeps for a Pod.
    #[must_use]
    pub fn kubelet_dir(&self, uid: &str) -> PathBuf {
        self.config.paths.root_dir.join("pods").join(uid)
    }

    /// The IDs of images that containers have. Those of a Pod that is torn down have none any more.
    pub(super) fn images_in_use(&self) -> HashSet<String> {
        let views = self.pods.views();
        let containers =
            views.iter().filter(|view| !view.observed.torn_down).flat_map(|view| view.observed.containers.values());
        containers
            .filter_map(|facts| self.images.resolve(&facts.current.as_ref()?.image_id).ok().flatten())
            .map(|image| image.id.clone())
            .collect()
    }

    /// Where a Pod's containers keep what they write.
    #[must_use]
    pub fn writable_dir(&self, uid: &str) -> PathBuf {
        self.config.paths.data_dir.join("containers").join(uid)
    }

    /// What `fieldRef` and `resourceFieldRef` are answered from.
    #[must_use]
    pub fn field_context(&self, observed: &Observed) -> FieldContext {
        FieldContext {
            node_name: self.config.node_name.clone(),
            host_ips: observed.host_ips.clone(),
            pod_ips: observed.pod_ips.clone(),
            node_allocatable: self.allocatable(),
        }
    }

    /// `status.allocatable` of the Node.
    #[must_use]
    pub fn allocatable(&self) -> BTreeMap<String, Quantity> {
        let object = self.object.borrow();
        let known = object.as_ref().and_then(|node| node.status.as_ref()?.allocatable.clone());
        known.unwrap_or_else(|| self.allocatable.clone())
    }

    /// `crashLoopBackOff.maxContainerRestartPeriod`, seconds (KEP-5593).
    #[must_use]
    pub fn max_restart_delay(&self) -> i64 {
        let period = self.config.kubelet.crash_loop_back_off.max_container_restart_period;
        period.and_then(|period| i64::try_from(period.std().as_secs()).ok()).unwrap_or(crate::pod::backoff::MAX_SECONDS)
    }

    /// Emits an event about a container.
    pub(super) fn container_event(&self, desired: &Desired, name: &str, warning: bool, reason: &str, message: String) {
        let path = desired.container(name).map(crate::pod::model::ContainerSpec::field_path);
        let kind = if warning { EventType::Warning } else { EventType::Normal };
        self.events.pod_event(&desired.pod, kind, reason, message, path);
    }
}

/// Runs blocking file work off the runtime's workers.
pub(super) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, String>
where
    T: Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(format!("the task failed: {error}")),
    }
}

fn outcome<T>(result: Result<T, Failure>, done: impl FnOnce(T) -> Outcome) -> Outcome {
    match result {
        Ok(value) => done(value),
        Err(failure) => Outcome::Failed(failure),
    }
}

/// The effects need the `Arc` they live in (shims outlive a call): this is it.
pub struct NodeEffects(pub Arc<Node>);

/// More [`Step`]s at once than this keep the node's processors, or its disk, busy.
const MANY_STEPS: usize = 8;

/// A step towards a running container, for as long as it takes.
struct Step<'a>(&'a AtomicUsize);

impl<'a> Step<'a> {
    fn of(action: &Action, steps: &'a AtomicUsize) -> Option<Self> {
        matches!(action, Action::MountVolumes | Action::SetUpSandbox | Action::Start(_)).then(|| {
            steps.fetch_add(1, Ordering::Relaxed);
            Self(steps)
        })
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Effects for NodeEffects {
    async fn perform(&self, request: Request) -> Outcome {
        let node = &self.0;
        let _step = Step::of(&request.action, &node.steps);
        match request.action.clone() {
            Action::Admit => node.admit(&request).await,
            Action::MountVolumes => outcome(node.mount_volumes(&request).await, |()| Outcome::Done),
            Action::Allocate => node.allocate(&request).await,
            Action::Resize => Outcome::Resized(Box::new(node.resize(&request).await)),
            Action::SetUpSandbox => outcome(node.set_up_sandbox(&request).await, |(pod_ips, enforced)| {
                Outcome::SandboxUp { pod_ips, enforced: Some(enforced) }
            }),
            Action::ClearSandbox => outcome(node.clear_sandbox(&request.desired).await, |()| Outcome::Done),
            Action::TearDown => outcome(node.tear_down(&request.desired).await, |()| Outcome::Done),
            Action::Start(name) => node.start_container(&request, &name).await,
            Action::PostStart(name) => node.run_hook(&request, &name, super::hooks::Hook::PostStart).await,
            Action::PreStop(name) => node.run_hook(&request, &name, super::hooks::Hook::PreStop).await,
            Action::Term(name) => outcome(node.signal(&request, &name, false).await, |()| Outcome::Done),
            Action::Kill(name) => outcome(node.signal(&request, &name, true).await, |()| Outcome::Done),
            Action::Probe(name, kind) => node.probe(&request, &name, kind).await,
        }
    }

    fn save(&self, desired: &Desired, observed: &Observed) {
        if let Err(error) = self.0.records.save(desired, observed) {
            // the next change tries again; until then a crash would repeat the last step, which is idempotent
            tracing::error!(pod = desired.uid(), %error, "the Pod's record cannot be written: is the state directory full?");
        }
    }

    // what the API server shows of a static Pod is its mirror, which `super::mirrors` keeps up to date
    async fn report(&self, desired: Arc<Desired>, base: PodStatus, status: PodStatus) -> ApiAnswer {
        let is_end = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let answer = match &self.0.api {
            Some(api) if !desired.is_static => report::report(&api.client(), &desired, &base, &status).await,
            _ => ApiAnswer::Accepted {
                status: Box::new(status),
                resource_version: desired.pod.metadata.resource_version.clone(),
            },
        };
        if is_end && !matches!(answer, ApiAnswer::Failed(_)) {
            self.0.pods.end_reported(desired.uid());
        }
        answer
    }

    fn is_busy(&self) -> bool {
        self.0.steps.load(Ordering::Relaxed) > MANY_STEPS || self.0.api.as_ref().is_some_and(|api| api.is_busy())
    }

    async fn delete(&self, desired: Arc<Desired>) -> ApiAnswer {
        match &self.0.api {
            Some(api) => report::delete(&api.client(), &desired).await,
            None => ApiAnswer::Gone,
        }
    }

    async fn forget(&self, desired: Arc<Desired>) {
        self.0.forget(&desired).await;
    }

    fn publish(&self, desired: &Arc<Desired>, observed: &Arc<Observed>, status: &PodStatus) {
        self.0.pods.publish(desired, observed, status);
    }

    fn event(&self, desired: &Desired, warning: bool, reason: &str, message: &str, field_path: Option<String>) {
        let kind = if warning { EventType::Warning } else { EventType::Normal };
        self.0.events.pod_event(&desired.pod, kind, reason, message.to_owned(), field_path);
    }

    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sleep_until(&self, at: Timestamp) -> impl Future<Output = ()> + Send {
        let wait = Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default();
        // the timer rounds down to its tick: a moment more saves a second look
        tokio::time::sleep(wait + Duration::from_millis(1))
    }

    fn host_ips(&self) -> Vec<String> {
        self.0.addresses.iter().map(ToString::to_string).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_count_while_they_are_taken() {
        let steps = AtomicUsize::new(0);
        let taken = [Step::of(&Action::MountVolumes, &steps), Step::of(&Action::SetUpSandbox, &steps)];
        let none = Step::of(&Action::TearDown, &steps);
        assert_eq!((steps.load(Ordering::Relaxed), none.is_none()), (2, true));
        drop(taken);
        assert_eq!(steps.load(Ordering::Relaxed), 0);
    }
}
