//! Kubelet's flags and `KubeletConfiguration`, read once into one validated, immutable [`Config`].

mod duration;
mod flag_table;
mod flags;
mod gate_table;
mod gates;
mod k3s;
mod kubelet;
mod leave;
mod load;
pub(crate) mod names;
mod validate;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde_json::Value;

pub use duration::{Duration, InvalidDuration};
pub use flags::{FlagError, Flags, command, normalize};
pub use gates::{FeatureGates, GateError, Stage};
pub use k3s::{K3s, Secret};
pub use kubelet::*;
pub use leave::{Leave, StatefulSetName};
pub use load::LoadError;

use crate::network::cni::CniConfig;

/// The Kubernetes version whose kubelet behaviour we implement; what the Node reports as `kubeletVersion`.
pub const KUBERNETES_VERSION: &str = "v1.37.2";

/// Everything that was configured, validated; nothing in it changes while the agent runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of our Node object.
    pub node_name: String,
    /// The host's name as the Node reports it (`kubernetes.io/hostname`); equals the node's name.
    pub hostname: String,
    /// Addresses given with `--node-ip`: none, one, or one per family.
    pub node_ips: Vec<IpAddr>,
    /// Credentials for the API server; none in standalone mode.
    pub kubeconfig: Option<PathBuf>,
    /// Credentials to ask for others with.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// The k3s server to join by its own protocol.
    pub k3s: Option<K3s>,
    /// A cloud controller manager completes our Node.
    pub external_cloud_provider: bool,
    /// Labels of a Node we create, beside the default ones.
    pub node_labels: BTreeMap<String, String>,
    /// Where everything is kept.
    pub paths: Paths,
    /// Registries to speak plain HTTP with.
    pub insecure_registries: Vec<String>,
    /// Bridge of the built-in network.
    pub bridge_name: String,
    /// Networks that are never masqueraded.
    pub cluster_cidrs: Vec<IpNet>,
    /// The node is a container of another node.
    pub nested: bool,
    /// What this node's Pod belongs to, and how it leaves with it.
    pub leave: Option<Leave>,
    /// CNI plugins.
    pub cni: CniConfig,
    /// Credential provider configuration file or directory.
    pub image_credential_provider_config: Option<PathBuf>,
    /// Directory of credential provider plugins.
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    /// File to lock while running.
    pub lock_file: Option<PathBuf>,
    /// Exit when somebody else opens the lock file.
    pub exit_on_lock_contention: bool,
    /// Least age of a dead container before it is removed.
    pub minimum_container_ttl: Duration,
    /// Most dead instances kept of one container.
    pub maximum_dead_containers_per_container: i32,
    /// Most dead containers kept; negative for no limit.
    pub maximum_dead_containers: i32,
    /// Hard eviction thresholds do not lessen allocatable.
    pub allocatable_ignores_eviction: bool,
    /// Which features are on.
    pub feature_gates: FeatureGates,
    /// kubelet's own configuration.
    pub kubelet: KubeletConfiguration,
    /// What was accepted without having an effect, and why; to be logged once.
    pub warnings: Vec<String>,
}

/// Directories, all absolute or relative to where the agent was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Volumes and plugin sockets: `/var/lib/kubelet`.
    pub root_dir: PathBuf,
    /// Images and container file systems: `/var/lib/gantry`.
    pub data_dir: PathBuf,
    /// State of running Pods, gone at reboot: `/run/gantry`.
    pub state_dir: PathBuf,
    /// Certificates: `/var/lib/kubelet/pki`.
    pub cert_dir: PathBuf,
    /// CRI log files: `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// Links to them: `/var/log/containers`.
    pub container_logs_dir: PathBuf,
    /// Localhost seccomp profiles: `seccomp` in the root directory.
    pub seccomp_dir: PathBuf,
}

/// A configuration the agent cannot start with; terminal, each variant says what to change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read or has a wrong field.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A flag has a wrong value.
    #[error(transparent)]
    Flag(#[from] FlagError),
    /// Values that do not fit each other or the host, in kubelet's words.
    #[error("failed to validate kubelet configuration, error: {}", list(.0))]
    Invalid(Vec<String>),
}

/// One message as it is, several as Go's aggregate writes them.
fn list(messages: &[String]) -> String {
    match messages {
        [one] => one.clone(),
        several => format!("[{}]", several.join(", ")),
    }
}

/// Facts about the host that a configuration must fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The kernel's host name.
    pub hostname: String,
    /// The unified hierarchy is mounted at `/sys/fs/cgroup`.
    pub cgroup_v2: bool,
}

impl Host {
    /// Asks the kernel.
    pub fn read() -> std::io::Result<Self> {
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        /// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
        const CGROUP2: i64 = 0x6367_7270;
        let magic = rustix::fs::statfs("/sys/fs/cgroup")?.f_type;
        Ok(Self { hostname, cgroup_v2: magic == CGROUP2 })
    }
}

impl Config {
    /// Reads the files that the flags name, merges, defaults and validates everything.
    ///
    /// Without `--config` the defaults are those of the file (authenticated and authorized), not the open ones
    /// that kubelet keeps for the sake of its oldest flags.
    pub fn load(flags: Flags, host: &Host) -> Result<Self, ConfigError> {
        let (kubelet, skipped) = load::load(flags.config.as_deref(), flags.config_dir.as_deref(), &flags.fields)?;
        let mut errors = validate::flags(&flags);
        errors.extend(validate::kubelet(&kubelet, host.cgroup_v2));
        let node_name = flags.hostname_override.as_deref().unwrap_or(&host.hostname).trim().to_lowercase();
        errors.extend(validate::node_name(&node_name));
        if !errors.is_empty() {
            return Err(ConfigError::Invalid(errors));
        }
        let feature_gates = FeatureGates::new(&kubelet.feature_gates)
            .map_err(|errors| ConfigError::Invalid(errors.iter().map(ToString::to_string).collect()))?;
        let mut warnings = warnings(&flags, &kubelet, &feature_gates);
        for path in skipped {
            warnings.push(format!("skipped {} in the drop-in directory: it does not end in .conf", path.display()));
        }
        Ok(Self {
            hostname: node_name.clone(),
            node_name,
            node_ips: flags.node_ips,
            // a k3s server tells what to write there
            kubeconfig: flags.kubeconfig.or_else(|| flags.k3s.as_ref().map(|_| flags.root_dir.join("kubeconfig"))),
            bootstrap_kubeconfig: flags.bootstrap_kubeconfig,
            k3s: flags.k3s,
            external_cloud_provider: flags.external_cloud_provider,
            node_labels: flags.node_labels,
            paths: Paths {
                seccomp_dir: flags.root_dir.join("seccomp"),
                root_dir: flags.root_dir,
                data_dir: flags.data_dir,
                state_dir: flags.state_dir,
                cert_dir: flags.cert_dir,
                pod_logs_dir: PathBuf::from(&kubelet.pod_logs_dir),
                container_logs_dir: flags.container_logs_dir,
            },
            insecure_registries: flags.insecure_registries,
            bridge_name: flags.bridge_name,
            cluster_cidrs: flags.cluster_cidrs,
            nested: flags.nested,
            leave: flags.leave,
            cni: flags.cni,
            image_credential_provider_config: flags.image_credential_provider_config,
            image_credential_provider_bin_dir: flags.image_credential_provider_bin_dir,
            lock_file: flags.lock_file,
            exit_on_lock_contention: flags.exit_on_lock_contention,
            minimum_container_ttl: flags.minimum_container_ttl,
            maximum_dead_containers_per_container: flags.maximum_dead_containers_per_container,
            maximum_dead_containers: flags.maximum_dead_containers,
            allocatable_ignores_eviction: flags.allocatable_ignores_eviction,
            feature_gates,
            kubelet,
            warnings,
        })
    }

    /// A configuration of defaults for the tests of other modules; directories lie below `root`.
    #[must_use]
    pub fn for_tests(root: &Path) -> Self {
        let (kubelet, _) = load::load(None, None, &[]).unwrap_or_default();
        Self {
            node_name: "node".into(),
            hostname: "node".into(),
            node_ips: Vec::new(),
            kubeconfig: None,
            bootstrap_kubeconfig: None,
            k3s: None,
            external_cloud_provider: false,
            node_labels: BTreeMap::new(),
            paths: Paths {
                root_dir: root.join("kubelet"),
                data_dir: root.join("data"),
                state_dir: root.join("run"),
                cert_dir: root.join("kubelet/pki"),
                pod_logs_dir: root.join("pods"),
                container_logs_dir: root.join("containers"),
                seccomp_dir: root.join("kubelet/seccomp"),
            },
            insecure_registries: Vec::new(),
            bridge_name: "gantry0".into(),
            cluster_cidrs: Vec::new(),
            nested: false,
            leave: None,
            cni: CniConfig::never(root.join("cni")),
            image_credential_provider_config: None,
            image_credential_provider_bin_dir: None,
            lock_file: None,
            exit_on_lock_contention: false,
            minimum_container_ttl: Duration::ZERO,
            maximum_dead_containers_per_container: 1,
            maximum_dead_containers: -1,
            allocatable_ignores_eviction: false,
            feature_gates: FeatureGates::default(),
            kubelet,
            warnings: Vec::new(),
        }
    }

    /// Whether the cluster issues the serving certificate, which is then kept in [`Paths::cert_dir`].
    #[must_use]
    pub fn serves_with_cluster_certificate(&self) -> bool {
        self.kubelet.server_tls_bootstrap || self.k3s.is_some()
    }

    /// What `/configz` answers: the effective configuration under `kubeletconfig`, without credentials.
    #[must_use]
    pub fn configz(&self) -> Value {
        let mut config = serde_json::to_value(&self.kubelet).unwrap_or_default();
        if let Some(Value::Object(headers)) = config.get_mut("staticPodURLHeader") {
            headers.values_mut().for_each(|values| *values = serde_json::json!(["<masked>"]));
        }
        if let Value::Object(fields) = &mut config {
            // kubelet leaves empty values out
            fields.retain(|_, value| match value {
                Value::Null => false,
                Value::String(text) => !text.is_empty(),
                Value::Array(items) => !items.is_empty(),
                Value::Object(items) => !items.is_empty(),
                _ => true,
            });
        }
        serde_json::json!({ "kubeletconfig": config })
    }
}

/// Settings that are accepted so that existing command lines work, with the reason why they change nothing.
fn warnings(flags: &Flags, config: &KubeletConfiguration, gates: &FeatureGates) -> Vec<String> {
    const FLAGS_WITHOUT_EFFECT: [(&str, &str); 9] = [
        ("container-runtime-endpoint", "the container runtime is the agent itself"),
        ("image-service-endpoint", "the image service is the agent itself"),
        ("pod-infra-container-image", "Pods have no pause container"),
        ("runtime-cgroups", "the container runtime is the agent itself"),
        ("experimental-mounter-path", "mounts are made with system calls"),
        ("housekeeping-interval", "statistics are read when they are asked for"),
        ("cloud-config", "cloud providers are external"),
        ("contention-profiling", "it profiles Go's mutexes"),
        ("log-flush-frequency", "log lines are written at once"),
    ];
    let mut warnings: Vec<String> = FLAGS_WITHOUT_EFFECT
        .iter()
        .filter(|(name, _)| flags.given.contains(name))
        .map(|(name, why)| format!("--{name} has no effect: {why}; remove it"))
        .collect();
    let defaults = KubeletConfiguration::default();
    let mut field = |differs: bool, name: &str, why: &str| {
        if differs {
            warnings.push(format!("{name} has no effect: {why}; remove it"));
        }
    };
    let endpoint = config.container_runtime_endpoint != defaults.container_runtime_endpoint;
    if !flags.given.contains(&"container-runtime-endpoint") {
        field(endpoint, "containerRuntimeEndpoint", "the container runtime is the agent itself");
    }
    field(
        config.make_iptables_util_chains != defaults.make_iptables_util_chains
            || config.iptables_masquerade_bit != defaults.iptables_masquerade_bit
            || config.iptables_drop_bit != defaults.iptables_drop_bit,
        "makeIPTablesUtilChains, iptablesMasqueradeBit and iptablesDropBit",
        "the built-in network uses nftables rules of its own",
    );
    field(config.enable_contention_profiling, "enableContentionProfiling", "it profiles Go's mutexes");
    field(config.content_type != defaults.content_type, "contentType", "the agent speaks JSON with the API server");
    field(!config.logging.vmodule.is_empty(), "logging.vmodule", "it names Go source files; use RUST_LOG");
    field(
        config.logging.options != defaults.logging.options,
        "logging.options",
        "log lines go to stderr at once, in both formats",
    );
    for (name, stage) in gates.fading() {
        let stage = if stage == Stage::Ga { "GA" } else { "deprecated" };
        warnings.push(format!("setting {stage} feature gate {name}: it will be removed in a future release"));
    }
    let (agent, reserved) = (&config.kubelet_cgroups, &config.kube_reserved_cgroup);
    if !agent.is_empty() && !reserved.is_empty() && !agent.starts_with(reserved.as_str()) {
        warnings.push("unsupported configuration: kubeletCgroups is not within kubeReservedCgroup".to_owned());
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        let args = std::iter::once("kubelet").chain(args.iter().copied()).map(OsString::from);
        let matches = command("kubelet").try_get_matches_from(normalize(args)).unwrap();
        Config::load(Flags::from_matches(&matches)?, &Host { hostname: "Host.Example ".into(), cgroup_v2: true })
    }

    #[test]
    fn names_and_paths() {
        let config = config(&["--root-dir=/r", "--data-dir=/d"]).unwrap();
        assert_eq!(config.node_name, "host.example");
        assert_eq!(config.paths.seccomp_dir, Path::new("/r/seccomp"));
        assert_eq!(config.paths.pod_logs_dir, Path::new("/var/log/pods"));
        assert_eq!(config.paths.data_dir, Path::new("/d"));
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        assert!(!config.kubelet.authentication.anonymous.enabled);
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let config = config(&["--pod-infra-container-image=x", "--container-runtime-endpoint=unix:///x"]).unwrap();
        assert_eq!(config.warnings.len(), 2);
        assert!(config.warnings.iter().any(|warning| warning.contains("no pause container")));
    }

    #[test]
    fn configz_is_kubelets_and_keeps_secrets() {
        let config =
            config(&["--manifest-url-header=Authorization:Bearer s3cret", "--manifest-url=http://x/"]).unwrap();
        let configz = config.configz();
        assert_eq!(configz["kubeletconfig"]["port"], 10250);
        assert_eq!(configz["kubeletconfig"]["syncFrequency"], "1m0s");
        assert!(configz["kubeletconfig"].get("tlsCertFile").is_none());
        assert!(!configz.to_string().contains("s3cret"));
    }

    #[test]
    fn several_errors_come_at_once() {
        let error = config(&["--max-pods=-1", "--hairpin-mode=x", "--node-labels=kubernetes.io/foo=1"]).unwrap_err();
        let ConfigError::Invalid(messages) = &error else { panic!("{error}") };
        assert_eq!(messages.len(), 3, "{error}");
    }

    #[test]
    fn the_host_is_read() {
        assert!(!Host::read().unwrap().hostname.is_empty());
    }
}
