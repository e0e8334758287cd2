//! The life of the agent: start every part in order, run until a signal, let go of the Pods.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node as NodeObject, NodeRuntimeHandler, NodeRuntimeHandlerFeatures};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::mirrors::Mirrors;
use super::node::{Node, NodeEffects};
use super::pods::Pods;
use super::progress::Pulls;
use super::records::Records;
use super::shutdown::{Shutdown, ended_by_shutdown};
use super::{allocatable, images, leave, local, process, serving, sources};
use crate::config::Config;
use crate::image::{GcPolicy, ImageError, ImageStore, Keyring, StoreConfig};
use crate::network::dns::{NodeDns, ResolvConf};
use crate::network::{Network, NetworkConfig};
use crate::node::client::Credentials;
use crate::node::k3s::{self, Renewal, Tunnel};
use crate::node::lease::{self, LeaseSettings};
use crate::node::rotation::Rotation;
use crate::node::{
    ApiClient, EventRecorder, Limits, MachineInfo, NodeFacts, NodeHealth, NodeKeeper, address, bootstrap, status,
};
use crate::objects::{CertificateManager, CertificateOptions, ObjectCache, ServiceCache, TokenManager, WarningSink};
use crate::pod::admission::SysctlAllowlist;
use crate::pod::model::Desired;
use crate::resources::amounts::{Amounts, MEMORY};
use crate::resources::cgroup::{CgroupConfig, CgroupError, CgroupTree, Driver, enter_own_cgroup};
use crate::resources::limits::{LimitPolicy, MemoryQos, SwapBehavior};
use crate::runtime::client::ShimLauncher;
use crate::runtime::spec::NodeTraits;
use crate::source::{Origin, PodChange, api as api_source, origin};
use crate::volume::{VolumeConfig, VolumeManager};

/// How often images are looked at for collection (`ImageGCPeriod` in kubelet).
const IMAGE_GC_PERIOD: Duration = Duration::from_secs(5 * 60);

/// The address ranges that the cluster has assigned, for the next start.
const POD_CIDRS_FILE: &str = "pod-cidrs.json";

/// How long a standalone node waits for its Pod network.
const NETWORK_WAIT: Duration = Duration::from_secs(10);

/// Features whose meaning for other components this node has (`status.declaredFeatures`).
const DECLARED_FEATURES: [&str; 4] = [
    "ExtendWebSocketsToKubelet",
    "InPlacePodLevelResourcesVerticalScaling",
    "InPlacePodVerticalScalingInitContainers",
    "RestartAllContainersOnContainerExits",
];

/// Runs the agent; returns when it is told to stop.
#[must_use]
pub fn main(config: Config) -> ExitCode {
    // before there are threads: they inherit it
    if config.nested
        && let Err(error) = enter_own_cgroup()
    {
        tracing::error!(%error, "the container's cgroup cannot be used");
        eprintln!("gantry: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "the runtime cannot be started");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(Arc::new(config))) {
        Ok(()) => {
            // Pods run on: nothing of the runtime's may wait for them
            runtime.shutdown_timeout(Duration::from_secs(2));
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{error}");
            eprintln!("gantry: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a node has towards its API server, or does without.
struct Cluster {
    api: Option<Arc<ApiClient>>,
    events: EventRecorder,
    rotated: watch::Sender<u64>,
    object: watch::Sender<Option<Arc<NodeObject>>>,
    facts: watch::Sender<Arc<NodeFacts>>,
    health: watch::Sender<NodeHealth>,
    cancel: CancellationToken,
}

async fn run(config: Arc<Config>) -> Result<(), String> {
    // signals are heard from here on, so that a stop during the start is a stop
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| format!("listen for SIGTERM: {error}"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| format!("listen for SIGINT: {error}"))?;
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let started = start(config, Role::Agent);
    let running = tokio::select! {
        running = started => running?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tokio::select! {
        _ = terminate.recv() => {
            tokio::select! {
                () = running.end() => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; Pods that are left run on");
    running.stop().await;
    Ok(())
}

/// What the process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A node of a cluster, or of its own, until it is told to stop.
    Agent,
    /// Runs what comes over the local socket, and nothing else: no manifests, no port.
    Standalone,
}

struct Running {
    node: Arc<Node>,
    cluster: Cluster,
    shutdown: Arc<Shutdown>,
    /// Nobody else may use the state directory meanwhile.
    _lock: fs::File,
}

impl Running {
    /// What SIGTERM asks for beside the agent's own end: the node's, from the cluster or of its Pods.
    async fn end(&self) {
        if let Some(settings) = &self.node.config.leave
            && let Err(error) = leave::run(&self.node, settings, &self.cluster.cancel).await
        {
            tracing::error!("{error}");
        }
        if self.shutdown.is_meant_by_sigterm() {
            tracing::info!("SIGTERM: the node ends, and its Pods in order; another signal lets them run on");
            self.shutdown.run().await;
        }
    }

    /// Lets go of the Pods.
    async fn stop(self) {
        self.cluster.cancel.cancel();
        local::close(&self.node.config.paths.state_dir);
        self.node.pods.detach().await;
    }
}

/// A node inside another command: `gantry run` where no agent runs. Everything is asked of it over the local socket.
pub struct Standalone(Running);

impl Standalone {
    /// Starts it, and waits until Pods can have a network. The configuration must have no kubeconfig.
    ///
    /// # Errors
    /// A sentence that says which part cannot be started, and why.
    pub async fn start(config: Config) -> Result<Self, String> {
        let running = start(Arc::new(config), Role::Standalone).await?;
        let mut health = running.cluster.health.subscribe();
        let ready = health.wait_for(|health| health.network.is_ok());
        if tokio::time::timeout(NETWORK_WAIT, ready).await.is_err() {
            // Pods of the host's network do without
            tracing::warn!("the Pod network is not ready");
        }
        Ok(Self(running))
    }

    /// Stops it; Pods that were not removed before run on, and the next agent adopts them.
    pub async fn stop(self) {
        self.0.stop().await;
    }
}

async fn start(config: Arc<Config>, role: Role) -> Result<Running, String> {
    // a Pod beside other work on this machine takes the machine as it is
    if role == Role::Agent {
        process::check_swap(&config.kubelet)?;
    }
    for dir in [&config.paths.root_dir, &config.paths.data_dir, &config.paths.state_dir] {
        fs::create_dir_all(dir).map_err(|error| format!("create {}: {error}", dir.display()))?;
    }
    let lock = local::lock(&config.paths.state_dir).await?;
    if let Some(kubeconfig) = config.kubeconfig.as_deref().filter(|_| config.bootstrap_kubeconfig.is_some()) {
        tracing::debug!(kubeconfig = %kubeconfig.display(), "bootstrapping if need be");
        bootstrap::ensure_kubeconfig(&config).await.map_err(|error| error.to_string())?;
    }
    let config = match &config.k3s {
        Some(_) => Arc::new(k3s::join(&config).await.map_err(|error| error.to_string())?),
        None => config,
    };
    let cluster = connect(&config).await?;
    let node = build(&config, &cluster).await?;
    if role == Role::Agent {
        // after the launcher was made: Pods keep the limits that this process was started with
        process::claim_resources(&config.kubelet);
    }
    let machine = cluster.facts.borrow().machine.clone();
    allocatable::enforce(&node, &machine).await?;
    let effects = Arc::new(NodeEffects(node.clone()));
    adopt(&node, &effects).await?;
    if role == Role::Standalone {
        end_local_pods(&node).await;
    }
    let (server, client_ca) = serving::server(&node)?;
    if role == Role::Agent {
        serving::listen(&node, &server, client_ca, cluster.rotated.subscribe()).await?;
    }
    // an agent that comes back with Pods running was ready before: it must not say otherwise for a moment
    let known = read_pod_cidrs(&config);
    set_pod_cidrs(&node, &known, &cluster.health).await;
    cluster.health.send_modify(|health| health.runtime = Ok(()));
    let changes = watch_cluster(&config, &cluster, &node, &effects, role)?;
    local::serve(&node, server, changes)?;
    tokio::spawn(Network::clone(&node.network).follow_plugins());
    tokio::spawn(follow_pod_cidrs(node.clone(), cluster.object.subscribe(), cluster.health.clone()));
    tokio::spawn(refresh_volumes(node.clone()));
    tokio::spawn(allocatable::weigh_tiers(node.clone()));
    tokio::spawn(keep_images(node.clone(), cluster.facts.clone()));
    let shutdown = Arc::new(Shutdown::new(node.clone(), cluster.health.clone()));
    if role == Role::Agent && shutdown.is_configured() {
        tokio::spawn(shutdown.clone().follow_logind());
    }
    tracing::info!(node = config.node_name, "the node is running");
    Ok(Running { node, cluster, shutdown, _lock: lock })
}

async fn connect(config: &Arc<Config>) -> Result<Cluster, String> {
    let (rotated, _) = watch::channel(0);
    let (object, _) = watch::channel(None);
    let (health, _) = watch::channel(NodeHealth::default());
    let machine = MachineInfo::read(Path::new("/"), &config.paths.root_dir).map_err(|error| error.to_string())?;
    let addresses = address::addresses(config).await.map_err(|error| error.to_string())?;
    let (facts, _) = watch::channel(Arc::new(NodeFacts {
        machine,
        addresses,
        runtime_handlers: vec![NodeRuntimeHandler {
            name: Some(String::new()),
            features: Some(NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(true),
                user_namespaces: Some(false),
            }),
        }],
        supplemental_groups_policy: true,
        declared_features: DECLARED_FEATURES.map(str::to_owned).to_vec(),
        ..NodeFacts::default()
    }));
    let (api, events) = match Credentials::from_config(config) {
        Some(credentials) => {
            let limits = Limits::from_config(&config.kubelet);
            let api = ApiClient::new(credentials, limits).await.map_err(|error| error.to_string())?;
            let (events, send) = EventRecorder::new(&config.node_name, api.client(), &config.kubelet);
            tokio::spawn(send);
            (Some(Arc::new(api)), events)
        }
        None => (None, EventRecorder::log_only(&config.node_name)),
    };
    Ok(Cluster { api, events, rotated, object, facts, health, cancel: CancellationToken::new() })
}

async fn build(config: &Arc<Config>, cluster: &Cluster) -> Result<Arc<Node>, String> {
    let facts = cluster.facts.borrow().clone();
    let addresses: Vec<IpAddr> =
        facts.addresses.iter().filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    let records =
        Records::open(&config.paths.state_dir).map_err(|error| format!("open the state directory: {error}"))?;
    let mut store = StoreConfig::new(&config.paths.data_dir);
    store.insecure_registries.clone_from(&config.insecure_registries);
    let images = open_images(store).await?;
    let home = std::env::home_dir().unwrap_or_else(|| "/".into());
    let keyring = Keyring::from_node(&config.paths.root_dir, &home);
    let mut network = NetworkConfig::new(&config.paths.state_dir);
    network.bridge.clone_from(&config.bridge_name);
    network.cluster_cidrs.clone_from(&config.cluster_cidrs);
    network.cni.clone_from(&config.cni);
    let network = Network::open(network).await.map_err(|error| format!("open the Pod network: {error}"))?;
    let (objects, tokens, services) = match &cluster.api {
        Some(api) => (ObjectCache::new(api.client()), TokenManager::new(api.client()), ServiceCache::new(api.client())),
        None => (ObjectCache::standalone(), TokenManager::standalone(), ServiceCache::standalone()),
    };
    let certificates = cluster.api.as_ref().map_or_else(CertificateManager::standalone, |api| {
        let events = cluster.events.clone();
        let warn: WarningSink = Box::new(move |pod, reason, message| {
            events.pod_event(pod, crate::node::EventType::Warning, reason, message, None);
        });
        let object = cluster.object.subscribe();
        CertificateManager::new(api.client(), &config.node_name, object, warn, CertificateOptions::default())
    });
    let objects = Arc::new(objects);
    let volumes =
        VolumeManager::new(VolumeConfig { root_dir: config.paths.root_dir.clone() }, objects.clone(), Arc::new(tokens))
            .with_certificates(Arc::new(certificates))
            .with_image_volumes(Arc::new(images::VolumeImages { images: images.clone(), keyring: keyring.clone() }));
    let (initial, _) =
        status::build(&Default::default(), config, &facts, &cluster.health.borrow(), jiff::Timestamp::now());
    let allocatable = initial.allocatable.unwrap_or_default();
    let cgroups = cgroups(config, &facts, &Amounts::of(Some(&allocatable)))
        .map_err(|error| format!("open the cgroup tree: {error}"))?;
    let traits = NodeTraits::detect(
        cgroups.policy().cgroup_v2,
        config.paths.seccomp_dir.clone(),
        config.kubelet.seccomp_default,
    )
    .map_err(|error| format!("look at this process: {error}"))?;
    Ok(Arc::new(Node {
        config: config.clone(),
        api: cluster.api.clone(),
        events: cluster.events.clone(),
        records,
        pods: Arc::new(Pods::default()),
        images,
        keyring,
        pulls: Arc::new(Pulls::default()),
        network: Arc::new(network),
        dns: dns(config, &addresses),
        volumes: Arc::new(volumes),
        objects,
        services: Arc::new(services),
        cgroups: Arc::new(cgroups),
        launcher: ShimLauncher::new().map_err(|error| format!("prepare to start shims: {error}"))?,
        traits,
        sysctls: SysctlAllowlist::new(&config.kubelet.allowed_unsafe_sysctls)
            .map_err(|error| format!("allowedUnsafeSysctls: {error}"))?,
        declared_features: DECLARED_FEATURES.map(str::to_owned).into(),
        object: cluster.object.subscribe(),
        addresses,
        allocatable,
        shims: Mutex::new(HashMap::new()),
        shutting_down: AtomicBool::new(false),
    }))
}

/// Opens the image store; an earlier life that was just killed may need a moment to let go of it.
async fn open_images(config: StoreConfig) -> Result<Arc<ImageStore>, String> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let config = config.clone();
        let opened =
            tokio::task::spawn_blocking(move || ImageStore::open(config)).await.map_err(|error| error.to_string())?;
        match opened {
            Err(ImageError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::WouldBlock && tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            opened => return opened.map_err(|error| format!("open the image store: {error}")),
        }
    }
}

fn cgroups(config: &Config, facts: &NodeFacts, allocatable: &Amounts) -> Result<CgroupTree, CgroupError> {
    let kubelet = &config.kubelet;
    let policy = LimitPolicy {
        cpu_cfs_quota: kubelet.cpu_cfs_quota,
        cpu_period: u64::try_from(kubelet.cpu_cfs_quota_period.std().as_micros()).unwrap_or(100_000),
        single_process_oom_kill: kubelet.single_process_oom_kill.unwrap_or(false),
        pod_pids_limit: Some(kubelet.pod_pids_limit).filter(|limit| *limit > 0),
        memory_capacity: facts.machine.memory,
        swap_capacity: facts.machine.swap,
        swap_behavior: match kubelet.memory_swap.swap_behavior.as_str() {
            "LimitedSwap" => SwapBehavior::LimitedSwap,
            _ => SwapBehavior::NoSwap,
        },
        memory_qos: config.feature_gates.enabled("MemoryQoS").then(|| MemoryQos {
            tiered_reservation: kubelet.memory_reservation_policy == "TieredReservation",
            throttling_factor: kubelet.memory_throttling_factor,
        }),
        allocatable_memory: allocatable.value(MEMORY),
        ..LimitPolicy::default()
    };
    let driver = if kubelet.cgroup_driver == "systemd" { Driver::Systemd } else { Driver::Cgroupfs };
    let root = if kubelet.cgroup_root.is_empty() { "/".to_owned() } else { kubelet.cgroup_root.clone() };
    CgroupTree::open(CgroupConfig { root, driver, policy })
}

fn dns(config: &Config, addresses: &[IpAddr]) -> NodeDns {
    let path = &config.kubelet.resolver_config;
    let resolver = (!path.is_empty()).then(|| fs::read_to_string(path).ok()).flatten();
    let resolver = resolver.and_then(|text| match ResolvConf::parse(&text) {
        Ok(resolver) => Some(resolver),
        Err(error) => {
            tracing::warn!(file = path, %error, "resolvConf is not used");
            None
        }
    });
    NodeDns {
        resolver,
        cluster_dns: config.kubelet.cluster_dns.iter().filter_map(|address| address.parse().ok()).collect(),
        cluster_domain: config.kubelet.cluster_domain.clone(),
        node_ips: addresses.to_vec(),
    }
}

/// Takes over what an earlier life of the agent left, before any source says what should be.
async fn adopt(node: &Arc<Node>, effects: &Arc<NodeEffects>) -> Result<(), String> {
    let (known, unknown) = node.records.load().map_err(|error| format!("read the Pods' records: {error}"))?;
    let live: HashSet<String> = known.keys().chain(&unknown).cloned().collect();
    node.network.reconcile(&live).await.map_err(|error| format!("reconcile the Pod network: {error}"))?;
    for uid in unknown {
        let mut pod = k8s_openapi::api::core::v1::Pod::default();
        pod.metadata.uid = Some(uid);
        let orphan = Desired::new(Arc::new(pod));
        match node.tear_down(&orphan).await {
            Ok(()) => node.forget(&orphan).await,
            Err(failure) => tracing::error!(pod = orphan.uid(), error = failure.message, "an orphaned Pod stays"),
        }
    }
    for (uid, leftover) in known {
        tracing::info!(pod = uid, "adopting");
        let mut desired = Desired::new(Arc::new(leftover.pod));
        desired.max_restart_delay = node.max_restart_delay();
        let mut observed = leftover.observed;
        if matches!(origin(&desired.pod), Origin::File | Origin::Url) && ended_by_shutdown(&observed) {
            node.forget(&desired).await;
            continue;
        }
        node.objects.register_pod(&desired.pod);
        node.adopt(&desired, &mut observed).await;
        node.pods.spawn(effects, desired, Some(observed));
    }
    // cgroups and volumes of Pods that have no record at all
    let (cgroups, volumes, keep) = (node.cgroups.clone(), node.volumes.clone(), live);
    let left = cgroups.pod_uids().map_err(|error| error.to_string())?.into_keys();
    let orphans: HashSet<String> =
        left.chain(volumes.orphans().unwrap_or_default()).filter(|uid| !keep.contains(uid)).collect();
    for uid in orphans {
        tracing::warn!(pod = uid, "clearing away what is left of a Pod without a record");
        if let Err(error) = volumes.unmount(&uid).await {
            tracing::error!(pod = uid, %error, "volumes of an orphaned Pod stay");
        }
        if let Err(error) = cgroups.remove_pod(&uid) {
            tracing::error!(pod = uid, %error, "the cgroup of an orphaned Pod stays");
        }
    }
    Ok(())
}

/// Pods of a `gantry run` that was killed have nobody left who would end them.
async fn end_local_pods(node: &Arc<Node>) {
    for view in node.pods.views().iter().filter(|view| origin(&view.desired.pod) == Origin::Local) {
        tracing::warn!(pod = view.desired.uid(), "ending what an earlier run left");
        node.pods.remove(view.desired.uid()).await;
    }
}

/// Starts everything that talks to the API server or reads manifests.
fn watch_cluster(
    config: &Arc<Config>,
    cluster: &Cluster,
    node: &Arc<Node>,
    effects: &Arc<NodeEffects>,
    role: Role,
) -> Result<mpsc::Sender<PodChange>, String> {
    let (changes, inbox) = mpsc::channel::<PodChange>(256);
    let mirrors = Arc::new(Mirrors::default());
    tokio::spawn(sources::follow(node.clone(), effects.clone(), mirrors.clone(), inbox));
    if role == Role::Agent {
        sources::start_static(config, &changes)?;
    }
    let (Some(api), Some(credentials)) = (&cluster.api, Credentials::from_config(config)) else { return Ok(changes) };
    tokio::spawn(mirrors.run(node.clone(), api.client()));
    let keeper = NodeKeeper {
        config: config.clone(),
        client: api.client(),
        heartbeat: api.client(),
        facts: cluster.facts.subscribe(),
        health: cluster.health.subscribe(),
        recorder: cluster.events.clone(),
        node: cluster.object.clone(),
    };
    tokio::spawn(keeper.run(cluster.cancel.clone()));
    let settings = LeaseSettings {
        node_name: config.node_name.clone(),
        duration_seconds: config.kubelet.node_lease_duration_seconds,
    };
    let (object, rotated) = (cluster.object.subscribe(), cluster.rotated.subscribe());
    lease::spawn(settings, credentials, object, rotated, cluster.cancel.clone())
        .map_err(|error| format!("start the lease thread: {error}"))?;
    renew_certificates(config, cluster, api);
    let (follower, rotated) = (api.clone(), cluster.rotated.subscribe());
    tokio::spawn(async move { follower.follow(rotated).await });
    let events = cluster.events.clone();
    let mut object = cluster.object.subscribe();
    tokio::spawn(async move {
        while object.changed().await.is_ok() {
            events.set_node_uid(object.borrow().as_ref().and_then(|node| node.metadata.uid.clone()));
        }
    });
    let object = cluster.object.subscribe();
    tokio::spawn(api_source::watch_pods(api.client(), config.node_name.clone(), object, changes.clone()));
    Ok(changes)
}

/// Keeps the node's certificates valid, by whom it got them from.
fn renew_certificates(config: &Arc<Config>, cluster: &Cluster, api: &Arc<ApiClient>) {
    let rotated = cluster.rotated.clone();
    if let Some(tunnel) = Tunnel::new(config.clone()) {
        let facts = cluster.facts.subscribe();
        tokio::spawn(Renewal { config: config.clone(), facts, rotated }.run());
        tokio::spawn(tunnel.run());
        return;
    }
    if config.kubelet.rotate_certificates {
        tokio::spawn(Rotation::client(config.clone(), api.client(), rotated.clone()).run());
    }
    if config.kubelet.server_tls_bootstrap {
        let facts = cluster.facts.subscribe();
        tokio::spawn(Rotation::serving(config.clone(), api.client(), facts, rotated).run());
    }
}

/// Gives the network the address ranges that the cluster assigns, and tells the node's health, also when CNI plugins
/// change it.
async fn follow_pod_cidrs(
    node: Arc<Node>,
    mut object: watch::Receiver<Option<Arc<NodeObject>>>,
    health: watch::Sender<NodeHealth>,
) {
    let mut network = node.network.changes();
    loop {
        let cidrs = pod_cidrs(&node.config, object.borrow_and_update().as_deref());
        set_pod_cidrs(&node, &cidrs, &health).await;
        if !cidrs.is_empty() {
            let text = serde_json::to_vec(&cidrs).unwrap_or_default();
            let path = node.config.paths.state_dir.join(POD_CIDRS_FILE);
            if fs::read(&path).is_ok_and(|known| known == text) {
                // nothing new
            } else if let Err(error) = fs::write(&path, text) {
                tracing::warn!(%error, path = %path.display(), "the next start has to wait for the API server's word");
            }
        }
        tokio::select! {
            changed = object.changed() => if changed.is_err() { return std::future::pending().await },
            _ = network.changed() => {}
        }
    }
}

async fn set_pod_cidrs(node: &Node, cidrs: &[IpNet], health: &watch::Sender<NodeHealth>) {
    if !cidrs.is_empty()
        && let Err(error) = node.network.set_pod_cidrs(cidrs).await
    {
        tracing::error!(%error, "the Pod network cannot be set up");
    }
    let ready = node.network.ready();
    health.send_if_modified(|health| {
        let changed = health.network != ready;
        health.network = ready;
        changed
    });
}

/// The ranges of the agent's last life on this boot.
fn read_pod_cidrs(config: &Config) -> Vec<IpNet> {
    let known = fs::read(config.paths.state_dir.join(POD_CIDRS_FILE)).ok();
    known.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn pod_cidrs(config: &Config, object: Option<&NodeObject>) -> Vec<IpNet> {
    let spec = object.and_then(|node| node.spec.as_ref());
    let assigned = spec.and_then(|spec| spec.pod_cidrs.clone().or_else(|| Some(vec![spec.pod_cidr.clone()?])));
    let own =
        (!config.kubelet.pod_cidr.is_empty()).then(|| config.kubelet.pod_cidr.split(',').map(str::to_owned).collect());
    // a node by itself has nobody to assign it a range
    let standalone = config.kubeconfig.is_none().then(|| vec!["10.88.0.0/16".to_owned()]);
    assigned.or(own).or(standalone).unwrap_or_default().iter().filter_map(|cidr| cidr.parse().ok()).collect()
}

/// Brings API-backed volumes up to date when an object changes, a token ages, a certificate is renewed or a Pod's
/// labels change.
async fn refresh_volumes(node: Arc<Node>) {
    let mut objects = node.objects.subscribe();
    let mut certificates = node.volumes.new_certificates();
    let mut pods = node.pods.changes();
    let mut versions: HashMap<String, Option<String>> = HashMap::new();
    loop {
        let views: Vec<_> =
            node.pods.views().into_iter().filter(|view| view.observed.volumes_mounted && view.is_active()).collect();
        let next = views.iter().filter_map(|view| node.volumes.next_refresh(&view.desired.pod)).min();
        let wait = next.map_or(Duration::from_secs(3600), |at| {
            Duration::try_from(at.duration_since(jiff::Timestamp::now())).unwrap_or_default()
        });
        let mut stale: Vec<_> = Vec::new();
        tokio::select! {
            changed = objects.recv() => match changed {
                Ok(change) => stale.extend(views.into_iter().filter(|view| change.concerns(&view.desired.pod))),
                Err(RecvError::Lagged(_)) => stale = views,
                Err(RecvError::Closed) => return,
            },
            renewed = certificates.recv() => match renewed {
                Ok(uid) => stale.extend(views.into_iter().find(|view| view.desired.uid() == uid)),
                Err(RecvError::Lagged(_)) => stale = views,
                Err(RecvError::Closed) => return,
            },
            changed = pods.changed() => {
                if changed.is_err() { return }
                versions.retain(|uid, _| views.iter().any(|view| view.desired.uid() == uid));
                for view in views {
                    let meta = &view.desired.pod.metadata;
                    let resources = &view.observed.resize.allocated;
                    let version = Some(format!("{:?}{:?}{resources:?}", meta.labels, meta.annotations));
                    let known = versions.insert(view.desired.uid().to_owned(), version.clone());
                    // volumes of an earlier life of the agent have tokens and certificates that nobody would renew
                    if known.map_or_else(|| node.volumes.is_inherited(view.desired.uid()), |known| known != version) {
                        stale.push(view);
                    }
                }
            }
            () = tokio::time::sleep(wait) => stale = views,
        }
        for view in stale {
            let context = node.field_context(&view.observed);
            if let Err(error) = node.volumes.refresh(&view.desired.pod, &context).await {
                tracing::warn!(pod = view.desired.uid(), %error, "volumes are not up to date");
            }
        }
    }
}

/// Reports the images there are, and collects those that nobody uses when the disk fills up.
async fn keep_images(node: Arc<Node>, facts: watch::Sender<Arc<NodeFacts>>) {
    let mut pods = node.pods.changes();
    let mut collected = tokio::time::Instant::now();
    loop {
        let list = images::node_images(&node.images);
        facts.send_if_modified(|facts| {
            let changed = facts.images != list;
            if changed {
                Arc::make_mut(facts).images = list;
            }
            changed
        });
        if collected.elapsed() >= IMAGE_GC_PERIOD {
            collected = tokio::time::Instant::now();
            collect_images(&node).await;
        }
        let until = collected + IMAGE_GC_PERIOD;
        tokio::select! {
            changed = pods.changed() => {
                if changed.is_err() { return }
                // many Pods at once are one look
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

async fn collect_images(node: &Arc<Node>) {
    let kubelet = &node.config.kubelet;
    let percent = |value: i32| u8::try_from(value.clamp(0, 100)).unwrap_or(100);
    let policy = GcPolicy {
        high_percent: percent(kubelet.image_gc_high_threshold_percent),
        low_percent: percent(kubelet.image_gc_low_threshold_percent),
        min_age: kubelet.image_minimum_gc_age.std(),
        max_age: Some(kubelet.image_maximum_gc_age.std()).filter(|age| !age.is_zero()),
    };
    let in_use: HashSet<String> = node
        .pods
        .views()
        .iter()
        .flat_map(|view| view.observed.containers.values())
        .filter_map(|facts| node.images.resolve(&facts.current.as_ref()?.image_id).ok().flatten())
        .map(|image| image.id.clone())
        .collect();
    if let Err(error) = node.images.collect_garbage(&in_use, policy).await {
        node.events.node_event(crate::node::EventType::Warning, "ImageGCFailed", error.to_string());
    }
}
