//! The life of the agent: start every part in order, run until a signal, let go of the Pods.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node as NodeObject, NodeRuntimeHandler, NodeRuntimeHandlerFeatures};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::build::{DECLARED_FEATURES, build};
use super::mirrors::Mirrors;
use super::node::{Node, NodeEffects};
use super::shutdown::{Shutdown, ended_by_shutdown};
use super::upkeep::{follow_pod_cidrs, keep_images, read_pod_cidrs, refresh_volumes, set_pod_cidrs};
use super::{allocatable, devices, leave, local, process, serving, sources};
use crate::config::Config;
use crate::network::Network;
use crate::node::client::Credentials;
use crate::node::k3s::{self, Renewal, Tunnel};
use crate::node::lease::{self, LeaseSettings};
use crate::node::rotation::Rotation;
use crate::node::{
    ApiClient, EventRecorder, Limits, MachineInfo, NodeFacts, NodeHealth, NodeKeeper, address, bootstrap,
};
use crate::pod::model::Desired;
use crate::resources::cgroup::enter_own_cgroup;
use crate::source::{Origin, PodChange, api as api_source, origin};
use crate::sys::heap;

/// How long a standalone node waits for its Pod network.
const NETWORK_WAIT: Duration = Duration::from_secs(10);
/// Longest wait at the end for the API server to take the last events.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Runs the agent; returns when it is told to stop.
#[must_use]
pub fn main(config: Config) -> ExitCode {
    heap::limit();
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
pub(super) struct Cluster {
    pub(super) api: Option<Arc<ApiClient>>,
    pub(super) events: EventRecorder,
    pub(super) rotated: watch::Sender<u64>,
    pub(super) object: watch::Sender<Option<Arc<NodeObject>>>,
    pub(super) facts: watch::Sender<Arc<NodeFacts>>,
    pub(super) health: watch::Sender<NodeHealth>,
    pub(super) cancel: CancellationToken,
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
        self.cluster.events.flush(LAST_EVENTS).await;
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
    // before the Node is reported: resources of plugins are zero until they come back
    devices::show(&node, &cluster.facts);
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
    tokio::spawn(devices::follow(node.clone(), cluster.facts.clone()));
    if role == Role::Agent {
        devices::serve(&node)?;
    }
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
            let (events, send) = EventRecorder::new(&config.node_name, api.background(), &config.kubelet);
            tokio::spawn(send);
            (Some(Arc::new(api)), events)
        }
        None => (None, EventRecorder::log_only(&config.node_name)),
    };
    Ok(Cluster { api, events, rotated, object, facts, health, cancel: CancellationToken::new() })
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
