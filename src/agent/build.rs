//! Makes the parts of a node from its configuration.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::images;
use super::node::Node;
use super::pods::Pods;
use super::progress::Pulls;
use super::records::Records;
use super::run::Cluster;
use crate::config::Config;
use crate::image::{self, ImageError, ImageStore, Keyring, StoreConfig};
use crate::network::dns::{NodeDns, ResolvConf};
use crate::network::{Network, NetworkConfig};
use crate::node::{NodeFacts, status};
use crate::objects::{CertificateManager, CertificateOptions, ObjectCache, ServiceCache, TokenManager, WarningSink};
use crate::pod::admission::SysctlAllowlist;
use crate::resources::amounts::{Amounts, MEMORY};
use crate::resources::cgroup::{CgroupConfig, CgroupError, CgroupTree, Driver};
use crate::resources::devices::DeviceManager;
use crate::resources::limits::{LimitPolicy, MemoryQos, SwapBehavior};
use crate::runtime::client::ShimLauncher;
use crate::runtime::spec::NodeTraits;
use crate::sys::spread::spread;
use crate::volume::{VolumeConfig, VolumeManager};

/// Features whose meaning for other components this node has (`status.declaredFeatures`).
pub(super) const DECLARED_FEATURES: [&str; 4] = [
    "ExtendWebSocketsToKubelet",
    "InPlacePodLevelResourcesVerticalScaling",
    "InPlacePodVerticalScalingInitContainers",
    "RestartAllContainersOnContainerExits",
];

/// Every part that does not need the API server to answer; the error says what is wrong.
pub(super) async fn build(config: &Arc<Config>, cluster: &Cluster) -> Result<Arc<Node>, String> {
    let facts = cluster.facts.borrow().clone();
    let addresses: Vec<IpAddr> =
        facts.addresses.iter().filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    // every container would fail at it, one by one
    image::probe_overlay().map_err(|error| {
        format!("the kernel does not give overlayfs, on which containers run: {error}; {}", image::OVERLAY_REMEDY)
    })?;
    let records =
        Records::open(&config.paths.state_dir).map_err(|error| format!("open the state directory: {error}"))?;
    if let Err(error) = records.mount_apart() {
        tracing::warn!(%error, "the directory of the Pods cannot be a mount of its own; containers start slower");
    }
    let paths = &config.paths;
    for dir in [&paths.data_dir.join("containers"), &paths.root_dir.join("pods"), &paths.pod_logs_dir] {
        // one that cannot be made is complained of by whoever needs it
        if fs::create_dir_all(dir).is_ok() {
            spread(dir);
        }
    }
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
    let enabled = |gate| config.feature_gates.enabled(gate);
    let objects = if enabled("ClusterTrustBundleProjection") { objects } else { objects.without_trust_bundles() };
    let certificates = match &cluster.api {
        _ if !enabled("PodCertificateRequest") => CertificateManager::off(),
        None => CertificateManager::standalone(),
        Some(api) => {
            let events = cluster.events.clone();
            let warn: WarningSink = Box::new(move |pod, reason, message| {
                events.pod_event(pod, crate::node::EventType::Warning, reason, message, None);
            });
            let object = cluster.object.subscribe();
            CertificateManager::new(api.client(), &config.node_name, object, warn, CertificateOptions::default())
        }
    };
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
        devices: Arc::new(DeviceManager::open(&config.paths.root_dir)),
        sources_ready: AtomicBool::new(false),
        steps: AtomicUsize::new(0),
        shims: Mutex::new(HashMap::new()),
        shutting_down: AtomicBool::new(false),
        memory_due: AtomicBool::new(false),
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
