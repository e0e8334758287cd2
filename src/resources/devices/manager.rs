//! Plugins, their connections, and what they are asked for.
//!
//! Source: `pkg/kubelet/cm/devicemanager/{manager,endpoint}.go`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::api::{
    AllocateRequest, AllocateResponse, DeviceIds, Empty, Listing, PluginOptions, Preference, PreferenceRequest,
    PreferenceResponse,
};
use super::checkpoint;
use super::choose::{Choice, Question};
use super::error::{DeviceError, RegisterError};
use super::holdings::{Grant, Holdings, Reusable};
use super::inventory::{DeviceHealth, DevicePlace, Inventory, Totals};
use super::options::ContainerDevices;
use crate::resources::amounts::{self, Amounts};
use crate::stream::grpc::{Channel, Status};

/// How long a plugin's socket may take to answer (kubelet's `dial`).
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// How long a plugin may take to say what it wants, or which devices it prefers.
const ASK_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to prepare devices. kubelet sets no bound; other Pods with devices wait meanwhile.
const ALLOCATE_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take before a container's start (`KubeletPreStartContainerRPCTimeoutInSecs`).
const PRE_START_LIMIT: Duration = Duration::from_secs(30);

/// A connection to a plugin.
#[derive(Clone)]
struct Plugin {
    /// Which registration it is.
    number: u64,
    socket: PathBuf,
    channel: Channel,
    stop: CancellationToken,
}

#[derive(Default)]
struct State {
    inventory: Inventory,
    /// By resource; the last one is asked.
    plugins: BTreeMap<String, Vec<Plugin>>,
    /// What the last plugin of a resource wants, also while it is away.
    options: BTreeMap<String, PluginOptions>,
    registrations: u64,
}

/// The devices of a node.
pub struct DeviceManager {
    dir: PathBuf,
    state: Mutex<State>,
    /// Pods get devices one after the other: what one is promised, the next is not.
    allocating: tokio::sync::Mutex<()>,
    /// What the checkpoint says.
    written: Arc<tokio::sync::Mutex<Vec<u8>>>,
    changed: watch::Sender<u64>,
    restored: bool,
}

impl DeviceManager {
    /// The devices of the node with that root directory (`/var/lib/kubelet`), as its checkpoint has them. One that
    /// cannot be read is passed over, as kubelet does: its Pods run on, and nobody knows what they have.
    #[must_use]
    pub fn open(root_dir: &Path) -> Self {
        let dir = root_dir.join("device-plugins");
        let found = checkpoint::read(&dir);
        let (restored, known) = (!matches!(found, Ok(None)), matches!(found, Ok(Some(_))));
        let (holdings, registered) = match found {
            Ok(known) => known.unwrap_or_default(),
            Err(error) => {
                let file = dir.join(checkpoint::FILE);
                tracing::error!(file = %file.display(), %error, "the devices that Pods have are not known");
                (Holdings::default(), Vec::new())
            }
        };
        let inventory = Inventory::restored(holdings, registered, Instant::now());
        // what has just been read need not be written
        let written = if known { checkpoint::encode(&inventory).unwrap_or_default() } else { Vec::new() };
        Self {
            dir,
            state: Mutex::new(State { inventory, ..State::default() }),
            allocating: tokio::sync::Mutex::default(),
            written: Arc::new(tokio::sync::Mutex::new(written)),
            changed: watch::Sender::new(0),
            restored,
        }
    }

    /// Whether an earlier life had plugins: there was a checkpoint.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        self.restored
    }

    /// Where plugins have their sockets.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Told when devices come, go, change their health or owner.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn tell(&self) {
        self.changed.send_modify(|n| *n += 1);
    }

    /// How many devices there are, and when a plugin that is away is given up: ask again then.
    #[must_use]
    pub fn totals(&self) -> (Totals, Option<Instant>) {
        let mut state = self.lock();
        let State { inventory, plugins, options, .. } = &mut *state;
        let (_, next) = inventory.expire(Instant::now());
        let totals = inventory.totals();
        // one that has connected may not have listed anything yet
        options.retain(|resource, _| totals.capacity.contains_key(resource) || plugins.contains_key(resource));
        (totals, next)
    }

    /// The Pods (UIDs) that have devices, and how each container's do.
    #[must_use]
    pub fn health(&self) -> BTreeMap<String, BTreeMap<String, DeviceHealth>> {
        let state = self.lock();
        let pods = state.inventory.holdings.pods().map(str::to_owned);
        pods.map(|pod| {
            let health = state.inventory.health(&pod);
            (pod, health)
        })
        .collect()
    }

    /// The devices that work.
    pub(super) fn allocatable(&self) -> Vec<DevicePlace> {
        self.lock().inventory.allocatable()
    }

    /// The devices of a container.
    pub(super) fn devices_of(&self, pod: &str, container: &str) -> Vec<DevicePlace> {
        self.lock().inventory.devices_of(pod, container)
    }

    /// Raises what the node offers to what is in use, for a Pod that has its devices already: a plugin that is away
    /// must not keep it out (`sanitizeNodeAllocatable`).
    pub fn count_in(&self, pod: &str, allocatable: &mut Amounts) {
        let state = self.lock();
        if !state.inventory.holdings.has_pod(pod) {
            return;
        }
        for (resource, count) in state.inventory.holdings.counts() {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            if allocatable.value(resource) < count {
                allocatable.set_value(resource, count);
            }
        }
    }

    /// Takes the devices back of Pods that are not to keep them.
    pub async fn release(&self, keep: impl Fn(&str) -> bool) {
        if self.take_back(keep)
            && let Err(error) = self.save().await
        {
            tracing::error!(%error, "devices that are free may be kept for Pods that have ended");
        }
    }

    fn take_back(&self, keep: impl Fn(&str) -> bool) -> bool {
        // whoever answers may have a lock of his own, under which he asks us
        let pods: Vec<String> = self.lock().inventory.holdings.pods().map(str::to_owned).collect();
        let gone: Vec<String> = pods.into_iter().filter(|pod| !keep(pod)).collect();
        let any = !gone.is_empty() && self.lock().inventory.holdings.retain(|pod| !gone.iter().any(|one| one == pod));
        if any {
            self.tell();
        }
        any
    }

    /// Gives a Pod's containers the devices that their limits ask for. May be repeated. Devices of Pods that are not
    /// `active` are free.
    ///
    /// # Errors
    /// The first container that does not get its own. Those before it keep theirs until the Pod is released.
    pub async fn allocate(&self, pod: &Pod, active: impl Fn(&str) -> bool) -> Result<(), DeviceError> {
        self.give_all(pod, None, active).await
    }

    /// What a container gets with its devices, which are made ready for it. Devices of a resource whose plugin came
    /// only after the Pod are allocated now, if `active` says that the Pod is to go on.
    ///
    /// # Errors
    /// Retryable: what a plugin says, or that it is away.
    pub async fn start(
        &self,
        pod: &Pod,
        container: &Container,
        active: impl Fn(&str) -> bool,
    ) -> Result<ContainerDevices, DeviceError> {
        let uid = uid(pod);
        let mut incomplete = false;
        for (resource, count) in wants(container) {
            if count == 0 || !self.lock().inventory.is_ours(&resource) {
                continue;
            }
            self.prepare(uid, &container.name, &resource).await?;
            let has = self.lock().inventory.holdings.get(uid, &container.name, &resource).is_some();
            incomplete |= !has && active(uid);
        }
        if incomplete {
            self.give_all(pod, Some(&container.name), active).await?;
        }
        if self.lock().inventory.holdings.of_container(uid, &container.name).is_some() {
            // an earlier try may have got them and not have been able to note it
            self.save().await?;
        }
        let state = self.lock();
        let grants = state.inventory.holdings.of_container(uid, &container.name);
        Ok(ContainerDevices::of(grants.into_iter().flat_map(|grants| grants.values()).map(|grant| &grant.response)))
    }

    /// Gives devices to all containers, or to one.
    async fn give_all(&self, pod: &Pod, only: Option<&str>, active: impl Fn(&str) -> bool) -> Result<(), DeviceError> {
        let Some(spec) = &pod.spec else { return Ok(()) };
        let init = spec.init_containers.iter().flatten();
        let containers: Vec<_> = init
            .map(|container| (container, !amounts::is_sidecar(container)))
            .chain(spec.containers.iter().map(|container| (container, false)))
            .collect();
        let is_ours = |container: &Container| {
            let state = self.lock();
            wants(container).iter().any(|(resource, _)| state.inventory.is_ours(resource))
        };
        if !containers.iter().any(|(container, _)| is_ours(container)) {
            return Ok(());
        }
        let _turn = self.allocating.lock().await;
        self.take_back(active);
        let mut reusable = Reusable::new();
        let mut any = false;
        for (container, ends) in &containers {
            if only.is_some_and(|name| name == container.name) {
                // what was left to be used again may have been taken by those that come later
                let lasting = containers.iter().filter(|(other, ends)| !ends && other.name != container.name);
                for (other, _) in lasting {
                    self.lock().inventory.holdings.pass_on(uid(pod), &other.name, false, &mut reusable);
                }
            }
            if only.is_none_or(|name| name == container.name) {
                for (resource, count) in wants(container) {
                    any |= self.give(uid(pod), &container.name, &resource, count, &reusable).await?;
                }
            }
            self.lock().inventory.holdings.pass_on(uid(pod), &container.name, *ends, &mut reusable);
        }
        if any {
            self.tell();
        }
        // also when an earlier try could not
        self.save().await
    }

    /// Devices of one resource for one container; whether anything was allocated.
    async fn give(
        &self,
        pod: &str,
        container: &str,
        resource: &str,
        count: usize,
        reusable: &Reusable,
    ) -> Result<bool, DeviceError> {
        let choice = {
            let state = self.lock();
            if !state.inventory.is_ours(resource) {
                return Ok(false);
            }
            state.inventory.choose(pod, container, resource, count, reusable)?
        };
        let ids = match choice {
            Choice::Nothing => return Ok(false),
            Choice::These(ids) => ids,
            Choice::Ask(question) => {
                let preferred = self.preferred(resource, &question).await?;
                question.answer(&preferred)
            }
        };
        let plugin = self.plugin(resource).ok_or_else(|| DeviceError::NoPlugin(resource.to_owned()))?;
        let containers = vec![DeviceIds { ids: ids.iter().cloned().collect() }];
        let response: AllocateResponse = plugin
            .channel
            .unary("/v1beta1.DevicePlugin/Allocate", &AllocateRequest { containers }, ALLOCATE_LIMIT)
            .await
            .map_err(DeviceError::Allocate)?;
        let response = response.containers.into_iter().next().ok_or(DeviceError::NoResponse)?;
        tracing::debug!(pod, container, resource, devices = ?ids, "devices allocated");
        self.lock().inventory.grant(pod, container, resource, &ids, response);
        Ok(true)
    }

    /// Which devices the plugin would like to give, if it is one that cares.
    async fn preferred(&self, resource: &str, question: &Question) -> Result<Vec<String>, DeviceError> {
        let options = self.lock().options.get(resource).copied().unwrap_or_default();
        if !options.preferred_allocation {
            return Ok(Vec::new());
        }
        let plugin = self.plugin(resource).ok_or_else(|| DeviceError::NoEndpoint(resource.to_owned()))?;
        let containers = vec![Preference {
            available: question.available.iter().cloned().collect(),
            must_include: question.must_include.iter().cloned().collect(),
            size: i32::try_from(question.size).unwrap_or(i32::MAX),
        }];
        let response: PreferenceResponse = plugin
            .channel
            .unary("/v1beta1.DevicePlugin/GetPreferredAllocation", &PreferenceRequest { containers }, ASK_LIMIT)
            .await
            .map_err(DeviceError::Preferred)?;
        Ok(response.containers.into_iter().next().map(|container| container.ids).unwrap_or_default())
    }

    /// PreStartContainer, for a plugin that asked for it.
    async fn prepare(&self, pod: &str, container: &str, resource: &str) -> Result<(), DeviceError> {
        let (ids, plugin) = {
            let state = self.lock();
            if !state.inventory.registered().any(|(name, _)| name == resource) {
                return Err(DeviceError::NoEndpoint(resource.to_owned()));
            }
            if !state.options.get(resource).is_some_and(|options| options.pre_start_required) {
                return Ok(());
            }
            let ids = state.inventory.holdings.get(pod, container, resource).map(Grant::ids);
            (ids, state.plugins.get(resource).and_then(|plugins| plugins.last()).cloned())
        };
        let ids = ids.ok_or_else(|| DeviceError::NotAllocated {
            pod: pod.to_owned(),
            container: container.to_owned(),
            resource: resource.to_owned(),
        })?;
        let plugin = plugin.ok_or_else(|| DeviceError::Stopped(resource.to_owned()))?;
        let ids = DeviceIds { ids: ids.into_iter().collect() };
        let answer: Result<Empty, Status> =
            plugin.channel.unary("/v1beta1.DevicePlugin/PreStartContainer", &ids, PRE_START_LIMIT).await;
        answer.map(|_| ()).map_err(DeviceError::PreStart)
    }

    fn plugin(&self, resource: &str) -> Option<Plugin> {
        self.lock().plugins.get(resource)?.last().cloned()
    }

    /// Connects to a plugin, and follows its devices until it goes or another one takes its socket; returns the number
    /// of the registration.
    pub(super) async fn connect(self: &Arc<Self>, resource: &str, socket: &Path) -> Result<u64, RegisterError> {
        let channel = Channel::connect_when_served(socket, DIAL_LIMIT).await.map_err(RegisterError::Dial)?;
        let options: PluginOptions = channel
            .unary("/v1beta1.DevicePlugin/GetDevicePluginOptions", &Empty {}, ASK_LIMIT)
            .await
            .map_err(RegisterError::Options)?;
        let plugin = {
            let mut state = self.lock();
            state.registrations += 1;
            let (number, stop) = (state.registrations, CancellationToken::new());
            let plugin = Plugin { number, socket: socket.to_owned(), channel, stop };
            let plugins = state.plugins.entry(resource.to_owned()).or_default();
            plugins.retain(|other| {
                let replaced = other.socket == socket;
                if replaced {
                    other.stop.cancel();
                }
                !replaced
            });
            plugins.push(plugin.clone());
            state.options.insert(resource.to_owned(), options);
            state.inventory.connected(resource);
            plugin
        };
        self.tell();
        tracing::info!(resource, socket = %socket.display(), "device plugin connected");
        let (manager, resource, number) = (self.clone(), resource.to_owned(), plugin.number);
        tokio::spawn(async move {
            tokio::select! {
                status = manager.follow(&resource, &plugin) => {
                    tracing::warn!(resource, %status, "ListAndWatch ended unexpectedly for device plugin");
                }
                () = plugin.stop.cancelled() => {}
            }
            manager.disconnect(&resource, number);
        });
        Ok(number)
    }

    /// Takes what a plugin lists, as long as it does.
    async fn follow(&self, resource: &str, plugin: &Plugin) -> Status {
        let messages = plugin.channel.stream::<_, Listing>("/v1beta1.DevicePlugin/ListAndWatch", &Empty {}).await;
        let mut messages = match messages {
            Ok(messages) => messages,
            Err(status) => return status,
        };
        loop {
            match messages.next().await {
                Ok(Some(listing)) => {
                    tracing::debug!(resource, devices = listing.devices.len(), "devices listed");
                    {
                        let mut state = self.lock();
                        let plugins = state.plugins.get(resource);
                        if plugins.is_some_and(|plugins| plugins.iter().any(|other| other.number == plugin.number)) {
                            state.inventory.list(resource, listing);
                        }
                    }
                    self.tell();
                    if let Err(error) = self.save().await {
                        tracing::error!(%error, "the devices of the node");
                    }
                }
                Ok(None) => return Status::new(Status::OK, "EOF"),
                Err(status) => return status,
            }
        }
    }

    /// Forgets a plugin, unless another one has taken its place.
    pub(super) fn disconnect(&self, resource: &str, number: u64) {
        let mut state = self.lock();
        let Some(plugins) = state.plugins.get_mut(resource) else { return };
        let Some(index) = plugins.iter().position(|plugin| plugin.number == number) else { return };
        plugins.remove(index).stop.cancel();
        if plugins.is_empty() {
            state.plugins.remove(resource);
            state.inventory.disconnected(resource, Instant::now());
        }
        drop(state);
        tracing::info!(resource, "device plugin disconnected");
        self.tell();
    }

    /// Writes the checkpoint, if it has changed. When this returns, a crash cannot lose what was allocated before.
    async fn save(&self) -> Result<(), DeviceError> {
        let mut written = self.written.clone().lock_owned().await;
        let failed = |error: &dyn std::fmt::Display| DeviceError::Checkpoint(error.to_string());
        let bytes = checkpoint::encode(&self.lock().inventory).map_err(|error| failed(&error))?;
        if *written == bytes {
            return Ok(());
        }
        let dir = self.dir.clone();
        // whoever waits for it may be cancelled; the turn ends with the write nevertheless
        let write = move || {
            checkpoint::write(&dir, &bytes)?;
            *written = bytes;
            Ok::<_, io::Error>(())
        };
        tokio::task::spawn_blocking(write).await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// What a container's limits ask for. Extended resources cannot be overcommitted: requests are the same.
fn wants(container: &Container) -> Vec<(String, usize)> {
    let limits = amounts::limits(container.resources.as_ref());
    let extended = limits.iter().filter(|(name, _)| name.contains('/'));
    extended.map(|(name, _)| (name.to_owned(), usize::try_from(limits.value(name)).unwrap_or(0))).collect()
}
