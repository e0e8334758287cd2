//! `KubeletConfiguration` of `kubelet.config.k8s.io/v1beta1`, every field of v1.37, with kubelet's defaults.
//!
//! Source: `kubelet/config/v1beta1/types.go` and `pkg/kubelet/apis/config/v1beta1/defaults.go`. Field names are
//! kubelet's, in Rust's spelling. All fields have a value: where kubelet keeps "not set" after defaulting, so do
//! we (`Option`, empty string, empty map).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::duration::{Duration, string_or_nanos};

/// `apiVersion` of the configuration file.
pub const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";
/// `kind` of the configuration file.
pub const KIND: &str = "KubeletConfiguration";

/// Declares a struct once for its fields, their JSON names and their defaults.
macro_rules! config_struct {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$field_meta:meta])* $field:ident ($json:literal): $type:ty = $default:expr;)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(rename = $json)] pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

type Map = BTreeMap<String, String>;

config_struct! {
    /// What kubelet reads from `--config` and `--config-dir`; see kubelet's reference for each field.
    KubeletConfiguration {
        /// Always `kubelet.config.k8s.io/v1beta1`.
        api_version("apiVersion"): String = API_VERSION.into();
        /// Always `KubeletConfiguration`.
        kind("kind"): String = KIND.into();
        /// Serve HTTPS on `address:port`.
        enable_server("enableServer"): bool = true;
        /// File or directory of static Pod manifests; empty for none.
        static_pod_path("staticPodPath"): String = String::new();
        /// Root of the Pod logs.
        pod_logs_dir("podLogsDir"): String = "/var/log/pods".into();
        /// Longest time between two looks at a Pod.
        sync_frequency("syncFrequency"): Duration = Duration::from_secs(60);
        /// Time between two looks at `static_pod_path` beside inotify.
        file_check_frequency("fileCheckFrequency"): Duration = Duration::from_secs(20);
        /// Time between two requests to `static_pod_url`.
        http_check_frequency("httpCheckFrequency"): Duration = Duration::from_secs(20);
        /// Where static Pods are fetched; empty for none.
        static_pod_url("staticPodURL"): String = String::new();
        /// Headers of these requests; may hold credentials, never logged.
        static_pod_url_header("staticPodURLHeader"): BTreeMap<String, Vec<String>> = BTreeMap::new();
        /// Address to serve on.
        address("address"): String = "0.0.0.0".into();
        /// Port to serve on.
        port("port"): i32 = 10250;
        /// Port without authentication; 0 for none.
        read_only_port("readOnlyPort"): i32 = 0;
        /// Serving certificate; empty for one of our own.
        tls_cert_file("tlsCertFile"): String = String::new();
        /// Its key.
        tls_private_key_file("tlsPrivateKeyFile"): String = String::new();
        /// Cipher suites by Go's names; empty for the library's.
        tls_cipher_suites("tlsCipherSuites"): Vec<String> = Vec::new();
        /// Key exchange groups by their IANA numbers; empty for the library's.
        tls_curve_preferences("tlsCurvePreferences"): Vec<i32> = Vec::new();
        /// `VersionTLS12` or `VersionTLS13`; empty for 1.2.
        tls_min_version("tlsMinVersion"): String = String::new();
        /// Renew the client certificate before it expires.
        rotate_certificates("rotateCertificates"): bool = false;
        /// Ask the cluster for the serving certificate.
        server_tls_bootstrap("serverTLSBootstrap"): bool = false;
        /// Who may speak to the server.
        authentication("authentication"): Authentication = Authentication::default();
        /// What they may do.
        authorization("authorization"): Authorization = Authorization::default();
        /// Image pulls a second; 0 for no limit.
        registry_pull_qps("registryPullQPS"): i32 = 5;
        /// Pulls at once above that.
        registry_burst("registryBurst"): i32 = 10;
        /// Whether a present image needs proof of credentials.
        image_pull_credentials_verification_policy("imagePullCredentialsVerificationPolicy"): String = String::new();
        /// Images exempt from it.
        preloaded_images_verification_allowlist("preloadedImagesVerificationAllowlist"): Vec<String> = Vec::new();
        /// Events a second; 0 for no limit.
        event_record_qps("eventRecordQPS"): i32 = 50;
        /// Events at once above that.
        event_burst("eventBurst"): i32 = 100;
        /// Serve logs, exec, attach and port-forward.
        enable_debugging_handlers("enableDebuggingHandlers"): bool = true;
        /// Go only.
        enable_contention_profiling("enableContentionProfiling"): bool = false;
        /// Port of `/healthz`; 0 for none.
        healthz_port("healthzPort"): i32 = 10248;
        /// Address of `/healthz`.
        healthz_bind_address("healthzBindAddress"): String = "127.0.0.1".into();
        /// The agent's `oom_score_adj`.
        oom_score_adj("oomScoreAdj"): i32 = -999;
        /// DNS domain of the cluster.
        cluster_domain("clusterDomain"): String = String::new();
        /// DNS servers of the cluster.
        cluster_dns("clusterDNS"): Vec<String> = Vec::new();
        /// Exec, attach and port-forward end after this much silence.
        streaming_connection_idle_timeout("streamingConnectionIdleTimeout"): Duration = Duration::from_secs(4 * 3600);
        /// Time between two computations of the Node's status.
        node_status_update_frequency("nodeStatusUpdateFrequency"): Duration = Duration::from_secs(10);
        /// Time between two reports when nothing changed.
        node_status_report_frequency("nodeStatusReportFrequency"): Duration = Duration::from_secs(300);
        /// How long the node counts as alive without renewal.
        node_lease_duration_seconds("nodeLeaseDurationSeconds"): i32 = 40;
        /// Unused images younger than this stay.
        image_minimum_gc_age("imageMinimumGCAge"): Duration = Duration::from_secs(120);
        /// Unused images older than this go; 0 for no limit.
        image_maximum_gc_age("imageMaximumGCAge"): Duration = Duration::ZERO;
        /// Disk use that starts image collection, in percent.
        image_gc_high_threshold_percent("imageGCHighThresholdPercent"): i32 = 85;
        /// Disk use at which it stops, in percent.
        image_gc_low_threshold_percent("imageGCLowThresholdPercent"): i32 = 80;
        /// Time between two measurements of volumes; negative for none.
        volume_stats_agg_period("volumeStatsAggPeriod"): Duration = Duration::from_secs(60);
        /// Cgroup for the agent itself.
        kubelet_cgroups("kubeletCgroups"): String = String::new();
        /// Cgroup for all other system processes.
        system_cgroups("systemCgroups"): String = String::new();
        /// Cgroup under which Pods live.
        cgroup_root("cgroupRoot"): String = String::new();
        /// One cgroup per QoS class.
        cgroups_per_qos("cgroupsPerQOS"): bool = true;
        /// `cgroupfs` or `systemd`.
        cgroup_driver("cgroupDriver"): String = "cgroupfs".into();
        /// `none` or `static`.
        cpu_manager_policy("cpuManagerPolicy"): String = "none".into();
        /// On out of memory kill one process, not the container; `None` for the platform's habit.
        single_process_oom_kill("singleProcessOOMKill"): Option<bool> = None;
        /// Options of the policy.
        cpu_manager_policy_options("cpuManagerPolicyOptions"): Map = Map::new();
        /// Time between two checks of CPU sets.
        cpu_manager_reconcile_period("cpuManagerReconcilePeriod"): Duration = Duration::from_secs(10);
        /// `None` or `Static`.
        memory_manager_policy("memoryManagerPolicy"): String = "None".into();
        /// `none`, `best-effort`, `restricted` or `single-numa-node`.
        topology_manager_policy("topologyManagerPolicy"): String = "none".into();
        /// `container` or `pod`.
        topology_manager_scope("topologyManagerScope"): String = "container".into();
        /// Options of the policy.
        topology_manager_policy_options("topologyManagerPolicyOptions"): Map = Map::new();
        /// Share of requests reserved per QoS class, in percent.
        qos_reserved("qosReserved"): Map = Map::new();
        /// Longest runtime call.
        runtime_request_timeout("runtimeRequestTimeout"): Duration = Duration::from_secs(120);
        /// `promiscuous-bridge`, `hairpin-veth` or `none`.
        hairpin_mode("hairpinMode"): String = "promiscuous-bridge".into();
        /// Most Pods on this node.
        max_pods("maxPods"): i32 = 110;
        /// Pod addresses when there is no API server.
        pod_cidr("podCIDR"): String = String::new();
        /// Most processes in a Pod; -1 for the node's own limit.
        pod_pids_limit("podPidsLimit"): i64 = -1;
        /// Basis of the Pods' resolv.conf; empty for none.
        resolver_config("resolvConf"): String = "/etc/resolv.conf".into();
        /// Removed from kubelet; must stay false.
        run_once("runOnce"): bool = false;
        /// Enforce CPU limits.
        cpu_cfs_quota("cpuCFSQuota"): bool = true;
        /// Period of that quota.
        cpu_cfs_quota_period("cpuCFSQuotaPeriod"): Duration = Duration::from_millis(100);
        /// Most images in the Node's status; -1 for all.
        node_status_max_images("nodeStatusMaxImages"): i32 = 50;
        /// Most open files of the agent.
        max_open_files("maxOpenFiles"): i64 = 1_000_000;
        /// Content type of API requests.
        content_type("contentType"): String = "application/vnd.kubernetes.protobuf".into();
        /// API requests a second; 0 for client-go's default.
        kube_api_qps("kubeAPIQPS"): i32 = 50;
        /// API requests at once above that.
        kube_api_burst("kubeAPIBurst"): i32 = 100;
        /// Pull one image at a time.
        serialize_image_pulls("serializeImagePulls"): bool = true;
        /// Most pulls at a time; `None` for no limit.
        max_parallel_image_pulls("maxParallelImagePulls"): Option<i32> = None;
        /// Hard eviction thresholds.
        eviction_hard("evictionHard"): Map = Map::new();
        /// Soft eviction thresholds.
        eviction_soft("evictionSoft"): Map = Map::new();
        /// How long soft thresholds must hold.
        eviction_soft_grace_period("evictionSoftGracePeriod"): Map = Map::new();
        /// How long pressure stays reported.
        eviction_pressure_transition_period("evictionPressureTransitionPeriod"): Duration = Duration::from_secs(300);
        /// Longest grace period in a soft eviction, seconds.
        eviction_max_pod_grace_period("evictionMaxPodGracePeriod"): i32 = 0;
        /// Least amounts to free.
        eviction_minimum_reclaim("evictionMinimumReclaim"): Map = Map::new();
        /// Keep the default hard thresholds that are not named.
        merge_default_eviction_settings("mergeDefaultEvictionSettings"): bool = false;
        /// Most Pods per core; 0 for no limit.
        pods_per_core("podsPerCore"): i32 = 0;
        /// Leave attaching volumes to the controller.
        enable_controller_attach_detach("enableControllerAttachDetach"): bool = true;
        /// Refuse to start if kernel tunables differ.
        protect_kernel_defaults("protectKernelDefaults"): bool = false;
        /// iptables marker chains.
        make_iptables_util_chains("makeIPTablesUtilChains"): bool = true;
        /// Bit of the masquerade mark.
        iptables_masquerade_bit("iptablesMasqueradeBit"): i32 = 14;
        /// Bit of the drop mark.
        iptables_drop_bit("iptablesDropBit"): i32 = 15;
        /// Feature gates as written; [`super::FeatureGates`] knows their effect.
        feature_gates("featureGates"): BTreeMap<String, bool> = BTreeMap::new();
        /// Refuse to start with swap on.
        fail_swap_on("failSwapOn"): bool = true;
        /// How Pods may use swap.
        memory_swap("memorySwap"): MemorySwap = MemorySwap::default();
        /// Size at which a container log is rotated.
        container_log_max_size("containerLogMaxSize"): String = "10Mi".into();
        /// Most files of a container log.
        container_log_max_files("containerLogMaxFiles"): i32 = 5;
        /// Rotations at a time.
        container_log_max_workers("containerLogMaxWorkers"): i32 = 1;
        /// Time between two looks at log sizes.
        container_log_monitor_interval("containerLogMonitorInterval"): Duration = Duration::from_secs(10);
        /// `Get`, `Cache` or `Watch`.
        config_map_and_secret_change_detection_strategy("configMapAndSecretChangeDetectionStrategy"): String = "Watch".into();
        /// Resources kept for the system.
        system_reserved("systemReserved"): Map = Map::new();
        /// Resources kept for Kubernetes' own daemons.
        kube_reserved("kubeReserved"): Map = Map::new();
        /// CPUs kept for both, as a CPU list.
        reserved_system_cpus("reservedSystemCPUs"): String = String::new();
        /// Show metrics hidden since this version.
        show_hidden_metrics_for_version("showHiddenMetricsForVersion"): String = String::new();
        /// Cgroup in which `system_reserved` is enforced.
        system_reserved_cgroup("systemReservedCgroup"): String = String::new();
        /// Cgroup in which `kube_reserved` is enforced.
        kube_reserved_cgroup("kubeReservedCgroup"): String = String::new();
        /// Which reservations are enforced.
        enforce_node_allocatable("enforceNodeAllocatable"): Vec<String> = vec!["pods".into()];
        /// Unsafe sysctls that Pods may set.
        allowed_unsafe_sysctls("allowedUnsafeSysctls"): Vec<String> = Vec::new();
        /// Sysctls that every Pod gets.
        default_pod_sysctls("defaultPodSysctls"): Map = Map::new();
        /// Directory of flex volume plugins.
        volume_plugin_dir("volumePluginDir"): String = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/".into();
        /// The node's identity with its provider.
        provider_id("providerID"): String = String::new();
        /// Kernel notifications instead of polling for memory pressure.
        kernel_memcg_notification("kernelMemcgNotification"): bool = false;
        /// Format and verbosity of our log.
        logging("logging"): Logging = Logging::default();
        /// Serve `/logs/`.
        enable_system_log_handler("enableSystemLogHandler"): bool = true;
        /// Serve `/logs/` queries.
        enable_system_log_query("enableSystemLogQuery"): bool = false;
        /// Time for Pods when the machine shuts down.
        shutdown_grace_period("shutdownGracePeriod"): Duration = Duration::ZERO;
        /// The part of it kept for critical Pods.
        shutdown_grace_period_critical_pods("shutdownGracePeriodCriticalPods"): Duration = Duration::ZERO;
        /// The same by Pod priority.
        shutdown_grace_period_by_pod_priority("shutdownGracePeriodByPodPriority"): Vec<ShutdownGracePeriodByPodPriority> = Vec::new();
        /// Restart back-off.
        crash_loop_back_off("crashLoopBackOff"): CrashLoopBackOff = CrashLoopBackOff::default();
        /// Memory kept per NUMA node.
        reserved_memory("reservedMemory"): Vec<MemoryReservation> = Vec::new();
        /// Serve profiles.
        enable_profiling_handler("enableProfilingHandler"): bool = true;
        /// Serve `/debug/flags/v`.
        enable_debug_flags_handler("enableDebugFlagsHandler"): bool = true;
        /// `RuntimeDefault` seccomp profile when none is asked for.
        seccomp_default("seccompDefault"): bool = false;
        /// Factor of memory.high; `None` leaves memory.high alone.
        memory_throttling_factor("memoryThrottlingFactor"): Option<f64> = None;
        /// `None` or `TieredReservation`.
        memory_reservation_policy("memoryReservationPolicy"): String = "None".into();
        /// Taints of a Node we create.
        #[serde(deserialize_with = "strict_taints")]
        register_with_taints("registerWithTaints"): Vec<Taint> = Vec::new();
        /// Create our Node.
        register_node("registerNode"): bool = true;
        /// OpenTelemetry export; `None` for none.
        tracing("tracing"): Option<Tracing> = None;
        /// Track local storage of Pods.
        local_storage_capacity_isolation("localStorageCapacityIsolation"): bool = true;
        /// Socket of a CRI runtime, which we are ourselves.
        container_runtime_endpoint("containerRuntimeEndpoint"): String = "unix:///run/containerd/containerd.sock".into();
        /// Socket of a CRI image service, which we are ourselves.
        image_service_endpoint("imageServiceEndpoint"): String = String::new();
        /// Refuse to start on a cgroup v1 host.
        fail_cgroup_v1("failCgroupV1"): bool = true;
        /// User ID ranges of Pods.
        user_namespaces("userNamespaces"): Option<UserNamespaces> = None;
    }
}

config_struct! {
    /// How callers prove who they are.
    Authentication {
        /// Client certificates.
        x509("x509"): X509 = X509::default();
        /// Bearer tokens, by TokenReview.
        webhook("webhook"): WebhookAuthentication = WebhookAuthentication::default();
        /// Neither.
        anonymous("anonymous"): Anonymous = Anonymous::default();
    }
}

config_struct! {
    /// Client certificate authentication.
    X509 {
        /// PEM file of the authorities; empty for no such authentication.
        client_ca_file("clientCAFile"): String = String::new();
    }
}

config_struct! {
    /// Bearer token authentication.
    WebhookAuthentication {
        /// Ask the API server.
        enabled("enabled"): bool = true;
        /// How long answers hold.
        cache_ttl("cacheTTL"): Duration = Duration::from_secs(120);
    }
}

config_struct! {
    /// Requests without credentials.
    Anonymous {
        /// Let them in as `system:anonymous`.
        enabled("enabled"): bool = false;
    }
}

config_struct! {
    /// How requests are authorized.
    Authorization {
        /// `AlwaysAllow` or `Webhook`.
        mode("mode"): String = "Webhook".into();
        /// SubjectAccessReview.
        webhook("webhook"): WebhookAuthorization = WebhookAuthorization::default();
    }
}

config_struct! {
    /// SubjectAccessReview caching.
    WebhookAuthorization {
        /// How long a yes holds.
        cache_authorized_ttl("cacheAuthorizedTTL"): Duration = Duration::from_secs(300);
        /// How long a no holds.
        cache_unauthorized_ttl("cacheUnauthorizedTTL"): Duration = Duration::from_secs(30);
    }
}

config_struct! {
    /// Swap use by Pods.
    MemorySwap {
        /// Empty, `NoSwap` or `LimitedSwap`.
        swap_behavior("swapBehavior"): String = String::new();
    }
}

config_struct! {
    /// Grace period of Pods of one priority and above.
    ShutdownGracePeriodByPodPriority {
        /// Least priority of the class.
        priority("priority"): i32 = 0;
        /// Seconds they get.
        shutdown_grace_period_seconds("shutdownGracePeriodSeconds"): i64 = 0;
    }
}

config_struct! {
    /// Container restart back-off.
    CrashLoopBackOff {
        /// Longest back-off; `None` for 5 minutes.
        max_container_restart_period("maxContainerRestartPeriod"): Option<Duration> = None;
    }
}

config_struct! {
    /// Memory kept on one NUMA node.
    MemoryReservation {
        /// NUMA node number.
        numa_node("numaNode"): i32 = 0;
        /// Amounts of `memory` and `hugepages-<size>`.
        #[serde(deserialize_with = "quantities")]
        limits("limits"): BTreeMap<String, Quantity> = BTreeMap::new();
    }
}

config_struct! {
    /// OpenTelemetry export.
    Tracing {
        /// OTLP gRPC endpoint.
        endpoint("endpoint"): Option<String> = None;
        /// Spans sampled of a million.
        sampling_rate_per_million("samplingRatePerMillion"): Option<i32> = None;
    }
}

config_struct! {
    /// User ID ranges.
    UserNamespaces {
        /// IDs per Pod, a multiple of 65536.
        ids_per_pod("idsPerPod"): Option<i64> = None;
    }
}

config_struct! {
    /// Format and verbosity of the log (component-base `logs/api/v1`).
    Logging {
        /// `text` or `json`.
        format("format"): String = "text".into();
        /// Accepted; we write lines at once.
        #[serde(deserialize_with = "string_or_nanos")]
        flush_frequency("flushFrequency"): Duration = Duration::from_secs(5);
        /// klog level.
        verbosity("verbosity"): u32 = 0;
        /// Levels by source file.
        vmodule("vmodule"): Vec<VModuleItem> = Vec::new();
        /// Alpha options of the formats.
        options("options"): FormatOptions = FormatOptions::default();
    }
}

config_struct! {
    /// Level of one group of files.
    VModuleItem {
        /// File name pattern without `.go`.
        file_pattern("filePattern"): String = String::new();
        /// klog level.
        verbosity("verbosity"): u32 = 0;
    }
}

config_struct! {
    /// Alpha options of the formats.
    FormatOptions {
        /// Of `text`.
        text("text"): OutputRouting = OutputRouting::default();
        /// Of `json`.
        json("json"): OutputRouting = OutputRouting::default();
    }
}

config_struct! {
    /// Alpha options of one format.
    OutputRouting {
        /// Errors to stderr, the rest to stdout.
        split_stream("splitStream"): bool = false;
        /// Buffer for the latter.
        #[serde(deserialize_with = "quantity")]
        info_buffer_size("infoBufferSize"): Quantity = Quantity("0".into());
    }
}

/// A quantity is a string or, as Go reads it, a plain number.
fn quantity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Quantity, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(serde_json::Number),
        Text(String),
    }
    let text = match Either::deserialize(deserializer)? {
        Either::Number(number) => number.to_string(),
        Either::Text(text) => text,
    };
    crate::resources::quantity::nanos(&text).map_err(de::Error::custom)?;
    Ok(Quantity(text))
}

fn quantities<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Quantity>, D::Error> {
    #[derive(Deserialize)]
    struct One(#[serde(deserialize_with = "quantity")] Quantity);
    let map = BTreeMap::<String, One>::deserialize(deserializer)?;
    Ok(map.into_iter().map(|(name, One(amount))| (name, amount)).collect())
}

/// Taints with unknown fields refused, which the generated type would drop.
fn strict_taints<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Taint>, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Strict {
        key: String,
        #[serde(default)]
        value: Option<String>,
        #[serde(default)]
        effect: String,
        #[serde(default)]
        time_added: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    }
    let taints = Vec::<Strict>::deserialize(deserializer)?;
    let convert = |Strict { key, value, effect, time_added }| Taint { key, value, effect, time_added };
    Ok(taints.into_iter().map(convert).collect())
}
