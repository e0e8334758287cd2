//! Kubelet's rules for its configuration, in its words.
//!
//! Source: `pkg/kubelet/apis/config/validation/validation{,_linux,_reserved_memory}.go`, component-base
//! `logs/api/v1/options.go`, `tracing/api/v1/config.go` and `metrics/api/v1/config.go`,
//! `ValidateKubeletFlags` in `cmd/kubelet/app/options/options.go`.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;

use super::duration::Duration;
use super::flags::Flags;
use super::gates::FeatureGates;
use super::kubelet::{KubeletConfiguration, Logging, Tracing};
use super::names;
use crate::resources::quantity;

/// Labels in Kubernetes' own domains that a node may give itself (`pkg/apis/well_known_labels.go`).
const KUBELET_LABELS: [&str; 11] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];
const KUBELET_LABEL_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

fn is_in(namespace: &str, domain: &str) -> bool {
    namespace == domain || namespace.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
}

/// Problems of values that only flags carry.
pub(super) fn flags(flags: &Flags) -> Vec<String> {
    let mut errors = Vec::new();
    let namespace = |key: &str| key.split_once('/').map_or(String::new(), |(namespace, _)| namespace.to_owned());
    let unknown: Vec<&str> = flags
        .node_labels
        .keys()
        .filter(|key| {
            let namespace = namespace(key);
            let reserved = is_in(&namespace, "kubernetes.io") || is_in(&namespace, "k8s.io");
            let allowed = KUBELET_LABELS.contains(&key.as_str())
                || KUBELET_LABEL_NAMESPACES.iter().any(|domain| is_in(&namespace, domain));
            reserved && !allowed
        })
        .map(String::as_str)
        .collect();
    if !unknown.is_empty() {
        errors.push(format!(
            "unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: [{}]\n--node-labels in the \
             'kubernetes.io' namespace must begin with an allowed prefix ({}) or be in the specifically allowed set ({})",
            unknown.join(" "),
            KUBELET_LABEL_NAMESPACES.join(", "),
            KUBELET_LABELS.join(", ")
        ));
    }
    let problems: Vec<String> = flags
        .node_labels
        .iter()
        .flat_map(|(key, value)| {
            let key_problem = names::qualified_name(key).map(|problem| format!("'{key}' - {problem}"));
            let value_problem = names::label_value(value).map(|problem| format!("'{value}' - {problem}"));
            [key_problem, value_problem]
        })
        .flatten()
        .collect();
    if !problems.is_empty() {
        errors.push(format!("invalid node labels: {}", problems.join("; ")));
    }
    let provider = (&flags.image_credential_provider_config, &flags.image_credential_provider_bin_dir);
    if matches!(provider, (Some(_), None) | (None, Some(_))) {
        errors.push(
            "--image-credential-provider-config and --image-credential-provider-bin-dir must be set together"
                .to_owned(),
        );
    }
    if flags.exit_on_lock_contention && flags.lock_file.is_none() {
        errors.push("cannot exit on lock file contention: no lock file specified".to_owned());
    }
    errors
}

/// Problems of the node's name, which must be an object name.
pub(super) fn node_name(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("empty hostname is invalid: set --hostname-override or the host's name".to_owned());
    }
    let problem = names::dns_subdomain(name)?;
    Some(format!("node name {name:?} is invalid: {problem}: set --hostname-override"))
}

/// Collects problems; every message says `invalid configuration:` first, as kubelet's do.
struct Errors(Vec<String>);

impl Errors {
    fn when(&mut self, wrong: bool, message: impl Display) {
        if wrong {
            self.0.push(format!("invalid configuration: {message}"));
        }
    }

    fn range(&mut self, name: &str, value: i32, range: RangeInclusive<i32>) {
        let (low, high) = (range.start(), range.end());
        let message = format!("{name} {value} must be between {low} and {high}, inclusive");
        self.when(!range.contains(&value), message);
    }

    fn not_negative(&mut self, name: &str, value: i64) {
        self.when(value < 0, format!("{name} {value} must not be a negative number"));
    }
}

/// Problems of the file's values, flags merged in, on a host with or without cgroup v2.
pub(super) fn kubelet(config: &KubeletConfiguration, cgroup_v2: bool) -> Vec<String> {
    let mut errors = Errors(Vec::new());
    let gates = match FeatureGates::new(&config.feature_gates) {
        Ok(gates) => gates,
        Err(problems) => {
            errors.0.extend(problems.iter().map(ToString::to_string));
            FeatureGates::default()
        }
    };
    numbers(config, &mut errors);
    images(config, &gates, &mut errors);
    gated(config, &gates, &mut errors);
    choices(config, &mut errors);
    reservations(config, &mut errors);
    for taint in &config.register_with_taints {
        let valid = names::qualified_name(&taint.key).is_none()
            && names::label_value(taint.value.as_deref().unwrap_or("")).is_none()
            && matches!(taint.effect.as_str(), "" | "NoSchedule" | "PreferNoSchedule" | "NoExecute");
        if !valid {
            let (key, value, effect) = (&taint.key, taint.value.as_deref().unwrap_or(""), &taint.effect);
            errors.0.push(format!("invalid taint: {key}={value}:{effect}"));
        }
        errors.when(taint.time_added.is_some(), "taint.TimeAdded is not nil");
    }
    logs(config, &mut errors);
    if !matches!(config.show_hidden_metrics_for_version.as_str(), "" | "1.36") {
        errors.0.push(format!(
            "invalid showHiddenMetricsForVersion: showHiddenMetricsForVersion: Invalid value: {:?}: must be omitted or \
             have the value '1.36'; only the previous minor version is allowed",
            config.show_hidden_metrics_for_version
        ));
    }
    logging(&config.logging, &gates, &mut errors);
    if let Some(tracing) = &config.tracing {
        self::tracing(tracing, &mut errors);
    }
    host(config, cgroup_v2, &mut errors);
    errors.0
}

fn numbers(config: &KubeletConfiguration, errors: &mut Errors) {
    errors.when(config.node_lease_duration_seconds <= 0, "nodeLeaseDurationSeconds must be greater than 0");
    errors.when(
        !config.system_cgroups.is_empty() && config.cgroup_root.is_empty(),
        "systemCgroups (--system-cgroups) was specified and cgroupRoot (--cgroup-root) was not specified",
    );
    for (name, value) in [
        ("eventBurst (--event-burst)", config.event_burst),
        ("eventRecordQPS (--event-qps)", config.event_record_qps),
        ("kubeAPIBurst (--kube-api-burst)", config.kube_api_burst),
        ("kubeAPIQPS (--kube-api-qps)", config.kube_api_qps),
        ("maxPods (--max-pods)", config.max_pods),
        ("podsPerCore (--pods-per-core)", config.pods_per_core),
        ("registryBurst (--registry-burst)", config.registry_burst),
        ("registryPullQPS (--registry-qps)", config.registry_pull_qps),
    ] {
        errors.not_negative(name, i64::from(value));
    }
    errors.not_negative("maxOpenFiles (--max-open-files)", config.max_open_files);
    if config.healthz_port != 0 {
        errors.range("healthzPort (--healthz-port)", config.healthz_port, 1..=65535);
    }
    errors.range("port (--port)", config.port, 1..=65535);
    errors.range("readOnlyPort (--read-only-port)", config.read_only_port, 0..=65535);
    errors.range("oomScoreAdj (--oom-score-adj)", config.oom_score_adj, -1000..=1000);
    errors.range("iptablesDropBit (--iptables-drop-bit)", config.iptables_drop_bit, 0..=31);
    errors.range("iptablesMasqueradeBit (--iptables-masquerade-bit)", config.iptables_masquerade_bit, 0..=31);
    let most = config.node_status_max_images;
    errors.when(most < -1, format!("nodeStatusMaxImages (--node-status-max-images) {most} must be -1 or greater"));
    for (name, address) in [
        ("address (--address)", &config.address),
        ("healthzBindAddress (--healthz-bind-address)", &config.healthz_bind_address),
    ] {
        let wrong = address.parse::<std::net::IpAddr>().is_err();
        errors.when(wrong, format!("{name} {address:?} is not a valid IP address"));
    }
    for server in &config.cluster_dns {
        let wrong = server.parse::<std::net::IpAddr>().is_err();
        errors.when(wrong, format!("clusterDNS (--cluster-dns) {server:?} is not a valid IP address"));
    }
    let pair = (config.tls_cert_file.is_empty(), config.tls_private_key_file.is_empty());
    errors.when(
        pair.0 != pair.1,
        "tlsCertFile (--tls-cert-file) and tlsPrivateKeyFile (--tls-private-key-file) must be set together",
    );
    errors.when(
        !matches!(
            config.tls_min_version.as_str(),
            "" | "VersionTLS10" | "VersionTLS11" | "VersionTLS12" | "VersionTLS13"
        ),
        format!("unknown tls version {:?}: write VersionTLS12 or VersionTLS13", config.tls_min_version),
    );
}

fn images(config: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Errors) {
    let (high, low) = (config.image_gc_high_threshold_percent, config.image_gc_low_threshold_percent);
    errors.range("imageGCHighThresholdPercent (--image-gc-high-threshold)", high, 0..=100);
    errors.range("imageGCLowThresholdPercent (--image-gc-low-threshold)", low, 0..=100);
    errors.when(
        low >= high,
        format!(
            "imageGCLowThresholdPercent (--image-gc-low-threshold) {low} must be less than imageGCHighThresholdPercent \
             (--image-gc-high-threshold) {high}"
        ),
    );
    let (least, most) = (config.image_minimum_gc_age, config.image_maximum_gc_age);
    errors.when(
        !most.is_zero() && !gates.enabled("ImageMaximumGCAge"),
        "ImageMaximumGCAge feature gate is required for Kubelet configuration option imageMaximumGCAge",
    );
    errors.when(least < Duration::ZERO, format!("imageMinimumGCAge {least} must not be negative"));
    errors.when(most < Duration::ZERO, format!("imageMaximumGCAge {most} must not be negative"));
    errors.when(
        most > Duration::ZERO && most <= least,
        format!("imageMaximumGCAge {most} must be greater than imageMinimumGCAge {least}"),
    );
    if let Some(pulls) = config.max_parallel_image_pulls {
        errors.when(pulls < 1, format!("maxParallelImagePulls {pulls} must be a positive number"));
        errors.when(
            config.serialize_image_pulls && pulls > 1,
            "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set \
             to false",
        );
    }
    let policy = config.image_pull_credentials_verification_policy.as_str();
    let allowlist = &config.preloaded_images_verification_allowlist;
    if !gates.enabled("KubeletEnsureSecretPulledImages") {
        const NEEDED: &str = "must not be set if KubeletEnsureSecretPulledImages feature gate is not enabled";
        errors.when(!policy.is_empty(), format!("`imagePullCredentialsVerificationPolicy` {NEEDED}"));
        errors.when(!allowlist.is_empty(), format!("`preloadedImagesVerificationAllowlist` {NEEDED}"));
        return;
    }
    one_of(
        errors,
        "imagePullCredentialsVerificationPolicy",
        policy,
        &["NeverVerify", "NeverVerifyPreloadedImages", "NeverVerifyAllowlistedImages", "AlwaysVerify"],
    );
    errors.when(
        !allowlist.is_empty() && policy != "NeverVerifyAllowlistedImages",
        "can't set `preloadedImagesVerificationAllowlist` if `imagePullCredentialsVertificationPolicy` is not \
         \"NeverVerifyAllowlistedImages\"",
    );
    for pattern in allowlist {
        // a registry and repository, with /* for everything below; neither tag nor digest
        let path = pattern.strip_suffix("/*").unwrap_or(pattern);
        let last = path.rsplit('/').next().unwrap_or("");
        let wrong = path.is_empty() || path.contains(['*', '@', ' ']) || (path.contains('/') && last.contains(':'));
        errors.when(
            wrong,
            format!("invalid image pattern in `preloadedImagesVerificationAllowlist`: {pattern:?}: write host/repository or host/path/*"),
        );
    }
}

/// Rules that depend on feature gates.
fn gated(config: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Errors) {
    let period = config.cpu_cfs_quota_period;
    if gates.enabled("CustomCPUCFSQuotaPeriod") {
        errors.when(
            !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&period),
            format!("cpuCFSQuotaPeriod (--cpu-cfs-quota-period) {period} must be between 1ms and 1sec, inclusive"),
        );
    } else {
        errors.when(
            period != Duration::from_millis(100),
            format!(
                "cpuCFSQuotaPeriod (--cpu-cfs-quota-period) {period} requires feature gate CustomCPUCFSQuotaPeriod"
            ),
        );
    }
    default_sysctls(config, gates, errors);
    errors.when(
        config.server_tls_bootstrap && !gates.enabled("RotateKubeletServerCertificate"),
        "serverTLSBootstrap true requires feature gate RotateKubeletServerCertificate",
    );
    errors.when(config.run_once, "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set");
    shutdown(config, gates, errors);
    let swap = config.memory_swap.swap_behavior.as_str();
    if gates.enabled("NodeSwap") {
        errors.when(
            !matches!(swap, "" | "NoSwap" | "LimitedSwap"),
            format!("memorySwap.swapBehavior {swap:?} must be one of: \"\", \"LimitedSwap\" or \"NoSwap\""),
        );
    } else {
        errors.when(!swap.is_empty(), "memorySwap.swapBehavior cannot be set when NodeSwap feature flag is disabled");
    }
    match (gates.enabled("KubeletCrashLoopBackOffMax"), config.crash_loop_back_off.max_container_restart_period) {
        (true, None) => errors.when(
            true,
            "FeatureGate KubeletCrashLoopBackOffMax is enabled, CrashLoopBackOff.MaxContainerRestartPeriod must be set",
        ),
        (true, Some(most)) => errors.when(
            !(Duration::from_secs(1)..=Duration::from_secs(300)).contains(&most),
            format!(
                "CrashLoopBackOff.MaxContainerRestartPeriod (got: {} seconds) must be set between 1s and 300s",
                most.as_nanos() / 1_000_000_000
            ),
        ),
        (false, Some(_)) => errors.when(
            true,
            "FeatureGate KubeletCrashLoopBackOffMax not enabled, CrashLoopBackOff.MaxContainerRestartPeriod must not be set",
        ),
        (false, None) => {}
    }
    let factor = config.memory_throttling_factor;
    let qos = gates.enabled("MemoryQoS");
    errors.when(
        !qos && factor.is_some_and(|factor| (factor - 0.9).abs() > f64::EPSILON),
        "memoryThrottlingFactor must not be set when MemoryQoS feature gate is disabled",
    );
    if let Some(factor) = factor {
        let wrong = !(factor > 0.0 && factor <= 1.0);
        let message = format!("memoryThrottlingFactor {factor} must be greater than 0 and less than or equal to 1.0");
        errors.when(wrong, message);
    }
    errors.when(
        !qos && config.memory_reservation_policy == "TieredReservation",
        "memoryReservationPolicy \"TieredReservation\" requires MemoryQoS feature gate to be enabled",
    );
    errors.when(
        config.enable_system_log_query && !gates.enabled("NodeLogQuery"),
        "NodeLogQuery feature gate is required for enableSystemLogQuery",
    );
    errors.when(
        config.enable_system_log_query && !config.enable_system_log_handler,
        "enableSystemLogHandler is required for enableSystemLogQuery",
    );
}

fn default_sysctls(config: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Errors) {
    if config.default_pod_sysctls.is_empty() {
        return;
    }
    if !gates.enabled("DefaultPodSysctls") {
        errors.when(
            true,
            "DefaultPodSysctls feature gate is required for Kubelet configuration option defaultPodSysctls",
        );
        return;
    }
    let mut seen = BTreeSet::new();
    for name in config.default_pod_sysctls.keys() {
        if !is_sysctl(name) {
            errors.when(true, format!("{name:?} is not a valid sysctl name for defaultPodSysctls"));
            continue;
        }
        let dotted = dotted_sysctl(name);
        let ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|prefix| dotted.starts_with(prefix));
        let namespaced = ipc || dotted == "kernel.sem" || dotted.starts_with("net.");
        errors.when(!namespaced, format!("{name:?} is not known to be namespaced for defaultPodSysctls"));
        errors.when(seen.contains(&dotted), format!("duplicate sysctl {dotted:?} found in defaultPodSysctls"));
        seen.insert(dotted);
    }
}

/// `([a-z0-9]([-_a-z0-9]*[a-z0-9])?[./])*` and one more such word, at most 253 bytes.
fn is_sysctl(name: &str) -> bool {
    let word = |word: &str| {
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = word.as_bytes();
        bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes.iter().all(|byte| alphanumeric(byte) || matches!(byte, b'-' | b'_'))
    };
    name.len() <= 253 && name.split(['.', '/']).all(word)
}

/// `net/ipv4/conf/eno2.100/x` is `net.ipv4.conf.eno2/100.x`.
fn dotted_sysctl(name: &str) -> String {
    if name.find(['.', '/']).is_none_or(|at| name.as_bytes()[at] == b'.') {
        return name.to_owned();
    }
    let swap = |letter| match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    name.chars().map(swap).collect()
}

fn shutdown(config: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Errors) {
    let (all, critical) = (config.shutdown_grace_period, config.shutdown_grace_period_critical_pods);
    let by_priority = !config.shutdown_grace_period_by_pod_priority.is_empty();
    let some = all > Duration::ZERO || critical > Duration::ZERO;
    if gates.enabled("GracefulNodeShutdown") {
        errors.when(
            critical > all,
            format!("shutdownGracePeriodCriticalPods {critical} must be <= shutdownGracePeriod {all}"),
        );
        for (name, period) in [("shutdownGracePeriod", all), ("shutdownGracePeriodCriticalPods", critical)] {
            let wrong = !period.is_zero() && period < Duration::from_secs(1);
            errors.when(wrong, format!("{name} {period} must be either zero or otherwise >= 1 sec"));
        }
    } else {
        errors.when(
            some,
            "specifying shutdownGracePeriod or shutdownGracePeriodCriticalPods requires feature gate GracefulNodeShutdown",
        );
    }
    if gates.enabled("GracefulNodeShutdownBasedOnPodPriority") {
        errors.when(
            by_priority && some,
            "Cannot specify both shutdownGracePeriodByPodPriority and shutdownGracePeriod at the same time",
        );
    } else {
        errors.when(
            by_priority,
            "Specifying shutdownGracePeriodByPodPriority requires feature gate GracefulNodeShutdownBasedOnPodPriority",
        );
    }
}

fn quoted(options: &[&str]) -> String {
    let quoted: Vec<String> = options.iter().map(|option| format!("{option:?}")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.join(""),
    }
}

fn one_of(errors: &mut Errors, name: &str, value: &str, options: &[&str]) {
    let wrong = !options.contains(&value);
    errors.when(wrong, format!("option {value:?} specified for {name}. Valid options are {}", quoted(options)));
}

/// Fields that are one of a few words. Some of these kubelet checks later, when it starts the part concerned.
fn choices(config: &KubeletConfiguration, errors: &mut Errors) {
    let policies = ["none", "best-effort", "restricted", "single-numa-node"];
    let policy = &config.topology_manager_policy;
    errors.when(
        !policies.contains(&policy.as_str()),
        format!(
            "topologyManagerPolicy (--topology-manager-policy) {policy:?} must be one of: [{}]",
            policies.map(|policy| format!("{policy:?}")).join(" ")
        ),
    );
    let scope = &config.topology_manager_scope;
    errors.when(
        !matches!(scope.as_str(), "container" | "pod"),
        format!("topologyManagerScope (--topology-manager-scope) {scope:?} must be one of: \"container\", or \"pod\""),
    );
    let modes = ["none", "hairpin-veth", "promiscuous-bridge"];
    one_of(errors, "hairpinMode (--hairpin-mode)", &config.hairpin_mode, &modes);
    one_of(errors, "memoryReservationPolicy", &config.memory_reservation_policy, &["None", "TieredReservation"]);
    one_of(errors, "cgroupDriver (--cgroup-driver)", &config.cgroup_driver, &["cgroupfs", "systemd"]);
    one_of(errors, "cpuManagerPolicy (--cpu-manager-policy)", &config.cpu_manager_policy, &["none", "static"]);
    one_of(errors, "memoryManagerPolicy (--memory-manager-policy)", &config.memory_manager_policy, &["None", "Static"]);
    one_of(
        errors,
        "authorization.mode (--authorization-mode)",
        &config.authorization.mode,
        &["AlwaysAllow", "Webhook"],
    );
    one_of(
        errors,
        "configMapAndSecretChangeDetectionStrategy",
        &config.config_map_and_secret_change_detection_strategy,
        &["Get", "Cache", "Watch"],
    );
}

fn reservations(config: &KubeletConfiguration, errors: &mut Errors) {
    const NAME: &str = "enforceNodeAllocatable (--enforce-node-allocatable)";
    let enforced = &config.enforce_node_allocatable;
    for pair in [["system-reserved", "system-reserved-compressible"], ["kube-reserved", "kube-reserved-compressible"]] {
        let both = pair.iter().all(|key| enforced.iter().any(|value| value == key));
        errors.when(both, format!("both {:?} and {:?} cannot be specified together in {NAME}", pair[0], pair[1]));
    }
    let mut seen = BTreeSet::new();
    for key in enforced {
        if !seen.insert(key) {
            errors.when(true, format!("duplicated enforcements {key:?} in {NAME}"));
            continue;
        }
        let needs = |cgroup: &str, field: &str, flag: &str, errors: &mut Errors| {
            errors
                .when(cgroup.is_empty(), format!("{field} ({flag}) must be specified when {key:?} included in {NAME}"));
        };
        match key.as_str() {
            "pods" => {}
            "system-reserved" | "system-reserved-compressible" => {
                needs(&config.system_reserved_cgroup, "systemReservedCgroup", "--system-reserved-cgroup", errors);
            }
            "kube-reserved" | "kube-reserved-compressible" => {
                needs(&config.kube_reserved_cgroup, "kubeReservedCgroup", "--kube-reserved-cgroup", errors);
            }
            "none" => {
                let message = format!("{NAME} may not contain additional enforcements when \"none\" is specified");
                errors.when(enforced.len() > 1, message);
                continue;
            }
            _ => {
                let options = [
                    "pods",
                    "system-reserved",
                    "system-reserved-compressible",
                    "kube-reserved",
                    "kube-reserved-compressible",
                    "none",
                ];
                one_of(errors, NAME, key, &options);
                continue;
            }
        }
        errors.when(
            !config.cgroups_per_qos,
            format!("cgroupsPerQOS (--cgroups-per-qos) must be set to true when {key:?} contained in {NAME}"),
        );
    }
    if !config.reserved_system_cpus.is_empty() {
        errors.when(
            !config.system_reserved_cgroup.is_empty() || !config.kube_reserved_cgroup.is_empty(),
            "can't use reservedSystemCPUs (--reserved-cpus) with systemReservedCgroup (--system-reserved-cgroup) or \
             kubeReservedCgroup (--kube-reserved-cgroup)",
        );
        let cpus = &config.reserved_system_cpus;
        errors.when(
            !is_cpu_list(cpus),
            format!("unable to parse reservedSystemCPUs (--reserved-cpus) {cpus}, error: write a list such as 0-3,7"),
        );
    }
    for (name, reserved) in [
        ("systemReserved (--system-reserved)", &config.system_reserved),
        ("kubeReserved (--kube-reserved)", &config.kube_reserved),
    ] {
        for (resource, amount) in reserved {
            let known = matches!(resource.as_str(), "cpu" | "memory" | "ephemeral-storage" | "pid");
            errors.when(!known, format!("{name}: cannot reserve {resource:?} resource"));
            match quantity::nanos(amount) {
                Ok(nanos) => errors.when(
                    nanos < 0,
                    format!("{name}: resource quantity for {resource:?} cannot be negative: {amount}"),
                ),
                Err(error) => errors.when(true, format!("{name}: {resource}: {error}")),
            }
        }
    }
    let mut seen = BTreeSet::new();
    for reservation in &config.reserved_memory {
        let node = reservation.numa_node;
        for (kind, amount) in &reservation.limits {
            errors.when(
                kind != "memory" && !kind.starts_with("hugepages-"),
                format!(
                    "the limit type {kind:?} for NUMA node {node} is not supported, only [memory hugepages-<HugePageSize>] is accepted"
                ),
            );
            errors.when(
                quantity::nanos(&amount.0) == Ok(0),
                format!("reserved memory may not be zero for NUMA node {node} and resource {kind:?}"),
            );
            errors.when(
                !seen.insert((node, kind)),
                format!("the reserved memory has a duplicate value for NUMA node {node} and resource {kind:?}"),
            );
        }
    }
}

/// The kernel's list form: `0-3,7`.
fn is_cpu_list(text: &str) -> bool {
    text.split(',').all(|range| match range.split_once('-') {
        Some((first, last)) => match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => first <= last,
            _ => false,
        },
        None => range.parse::<u32>().is_ok(),
    })
}

fn logs(config: &KubeletConfiguration, errors: &mut Errors) {
    errors.when(config.container_log_max_workers < 1, "containerLogMaxWorkers must be greater than or equal to 1");
    errors.when(
        config.container_log_monitor_interval < Duration::from_secs(3),
        "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s",
    );
    errors.when(config.container_log_max_files <= 1, "containerLogMaxFiles must be greater than 1");
    let size = &config.container_log_max_size;
    if let Err(error) = quantity::nanos(size) {
        errors.when(true, format!("containerLogMaxSize (--container-log-max-size): {error}"));
    }
    let dir = &config.pod_logs_dir;
    errors.when(!Path::new(dir).is_absolute(), format!("pod logs path {dir:?} must be absolute path"));
    let clean =
        dir == "/" || (!dir.ends_with('/') && !dir.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")));
    // kubelet's own documentation writes a slash at the end
    let slash = dir.strip_suffix('/').is_some_and(|rest| !rest.ends_with('/'));
    errors.when(!clean && !slash, format!("pod logs path {dir:?} must be normalized"));
    errors.when(!dir.is_ascii(), format!("pod logs path {dir:?} mut contains ASCII characters only"));
}

fn logging(logging: &Logging, gates: &FeatureGates, errors: &mut Errors) {
    let mut field = |wrong: bool, path: &str, value: &dyn Display, detail: &str| {
        if wrong {
            errors.0.push(format!("logging.{path}: Invalid value: {value}: {detail}"));
        }
    };
    let flush = logging.flush_frequency;
    field(flush <= Duration::ZERO, "flushFrequency", &flush, "Must be greater than zero");
    let format = &logging.format;
    let known = matches!(format.as_str(), "text" | "json");
    field(!known, "format", &format!("{format:?}"), "Unsupported log format: write text or json");
    let most = i32::MAX.unsigned_abs();
    field(logging.verbosity > most, "verbosity", &logging.verbosity, "Must be <= 2147483647");
    let text_only = !logging.vmodule.is_empty() && format != "text";
    field(text_only, "vmodule", &"[...]", "Only supported for text log format");
    for (index, item) in logging.vmodule.iter().enumerate() {
        let path = format!("vmodule[{index}]");
        let pattern = &item.file_pattern;
        field(pattern.is_empty(), &path, &"\"\"", "File pattern must not be empty");
        let punctuation = pattern.contains(['=', ',']);
        field(punctuation, &path, pattern, "File pattern must not contain equal sign or comma");
        field(item.verbosity > most, &path, &item.verbosity, "Must be <= 2147483647");
    }
    let alpha = gates.enabled("LoggingAlphaOptions");
    for (name, options) in [("text", &logging.options.text), ("json", &logging.options.json)] {
        let path = format!("options.{name}");
        let needs = "Feature LoggingAlphaOptions is disabled";
        field(options.split_stream && !alpha, &path, &"splitStream", needs);
        let buffered = quantity::nanos(&options.info_buffer_size.0).is_ok_and(|size| size != 0);
        field(buffered && !alpha, &path, &"infoBufferSize", needs);
    }
}

fn tracing(tracing: &Tracing, errors: &mut Errors) {
    if let Some(rate) = tracing.sampling_rate_per_million {
        let path = format!("tracing.samplingRatePerMillion: Invalid value: {rate}");
        if rate < 0 {
            errors.0.push(format!("{path}: sampling rate must be positive"));
        }
        if rate > 1_000_000 {
            errors.0.push(format!("{path}: sampling rate per million must be less than or equal to one million"));
        }
    }
    let scheme = tracing.endpoint.as_deref().and_then(|endpoint| endpoint.split_once("//"));
    if let (Some((scheme, _)), Some(endpoint)) = (scheme, &tracing.endpoint) {
        let scheme = scheme.trim_end_matches(':');
        if !matches!(scheme, "dns" | "unix" | "unix-abstract") {
            errors.0.push(format!(
                "tracing.endpoint: Invalid value: {endpoint:?}: unsupported scheme: {scheme}.  Options are none, dns, unix, \
                 or unix-abstract.  See https://github.com/grpc/grpc/blob/master/doc/naming.md"
            ));
        }
    }
}

fn host(config: &KubeletConfiguration, cgroup_v2: bool, errors: &mut Errors) {
    if config.fail_cgroup_v1 && !cgroup_v2 {
        errors.0.push(
            "kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported and will be \
             removed in a future release: boot with systemd.unified_cgroup_hierarchy=1, or set failCgroupV1: false \
             (--fail-cgroupv1=false)"
                .to_owned(),
        );
        return;
    }
    errors.when(
        !cgroup_v2 && config.single_process_oom_kill == Some(false),
        "singleProcessOOMKill must not be explicitly set to false when using cgroup v1",
    );
    if let Some(ids) = config.user_namespaces.as_ref().and_then(|namespaces| namespaces.ids_per_pod) {
        errors.when(ids < 65536, "userNamespaces.idsPerPod must not be less than 65536");
        errors.when(ids % 65536 != 0, "userNamespaces.idsPerPod must be a multiple of 65536");
        errors.when(ids > i64::from(u32::MAX), "userNamespaces.idsPerPod must not be more than 4294967295");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::{decode, parse};
    use crate::config::{API_VERSION, KIND};

    fn problems(body: &str) -> Vec<String> {
        let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{body}");
        kubelet(&decode(parse(&text, Path::new("x")).unwrap(), "x").unwrap(), true)
    }

    #[test]
    fn defaults_are_valid() {
        assert_eq!(problems(""), Vec::<String>::new());
        assert_eq!(problems("podLogsDir: /var/log/pods/\n"), Vec::<String>::new());
        assert_eq!(problems("reservedSystemCPUs: 0-3,7\nenforceNodeAllocatable: [none]\n"), Vec::<String>::new());
    }

    #[test]
    fn each_rule_in_kubelets_words() {
        for (body, message) in [
            ("nodeLeaseDurationSeconds: -1", "nodeLeaseDurationSeconds must be greater than 0"),
            (
                "systemCgroups: /s",
                "systemCgroups (--system-cgroups) was specified and cgroupRoot (--cgroup-root) was not specified",
            ),
            ("eventRecordQPS: -1", "eventRecordQPS (--event-qps) -1 must not be a negative number"),
            ("healthzPort: 65536", "healthzPort (--healthz-port) 65536 must be between 1 and 65535, inclusive"),
            (
                "cpuCFSQuotaPeriod: 2s",
                "cpuCFSQuotaPeriod (--cpu-cfs-quota-period) 2s must be between 1ms and 1sec, inclusive",
            ),
            (
                "featureGates: {CustomCPUCFSQuotaPeriod: false}\ncpuCFSQuotaPeriod: 200ms",
                "cpuCFSQuotaPeriod (--cpu-cfs-quota-period) 200ms requires feature gate CustomCPUCFSQuotaPeriod",
            ),
            (
                "imageGCHighThresholdPercent: 101",
                "imageGCHighThresholdPercent (--image-gc-high-threshold) 101 must be between 0 and 100, inclusive",
            ),
            (
                "imageGCLowThresholdPercent: 85",
                "imageGCLowThresholdPercent (--image-gc-low-threshold) 85 must be less than imageGCHighThresholdPercent (--image-gc-high-threshold) 85",
            ),
            ("imageMaximumGCAge: 1m", "imageMaximumGCAge 1m0s must be greater than imageMinimumGCAge 2m0s"),
            ("maxPods: -4", "maxPods (--max-pods) -4 must not be a negative number"),
            ("oomScoreAdj: 1001", "oomScoreAdj (--oom-score-adj) 1001 must be between -1000 and 1000, inclusive"),
            ("maxParallelImagePulls: 0", "maxParallelImagePulls 0 must be a positive number"),
            ("runOnce: true", "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set"),
            (
                "topologyManagerScope: x",
                "topologyManagerScope (--topology-manager-scope) \"x\" must be one of: \"container\", or \"pod\"",
            ),
            (
                "shutdownGracePeriodCriticalPods: 3s",
                "shutdownGracePeriodCriticalPods 3s must be <= shutdownGracePeriod 0s",
            ),
            (
                "memorySwap: {swapBehavior: Lots}",
                "memorySwap.swapBehavior \"Lots\" must be one of: \"\", \"LimitedSwap\" or \"NoSwap\"",
            ),
            (
                "enforceNodeAllocatable: [pods, pods]",
                "duplicated enforcements \"pods\" in enforceNodeAllocatable (--enforce-node-allocatable)",
            ),
            (
                "hairpinMode: x",
                "option \"x\" specified for hairpinMode (--hairpin-mode). Valid options are \"none\", \"hairpin-veth\" or \"promiscuous-bridge\"",
            ),
            (
                "memoryThrottlingFactor: 1.5",
                "memoryThrottlingFactor 1.5 must be greater than 0 and less than or equal to 1.0",
            ),
            ("containerLogMaxFiles: 1", "containerLogMaxFiles must be greater than 1"),
            ("podLogsDir: a/b", "pod logs path \"a/b\" must be absolute path"),
            (
                "defaultPodSysctls: {kernel.sem: x}",
                "DefaultPodSysctls feature gate is required for Kubelet configuration option defaultPodSysctls",
            ),
            ("userNamespaces: {idsPerPod: 65537}", "userNamespaces.idsPerPod must be a multiple of 65536"),
        ] {
            let expected = format!("invalid configuration: {message}");
            assert!(problems(&format!("{body}\n")).contains(&expected), "{body}: {:?}", problems(&format!("{body}\n")));
        }
    }

    #[test]
    fn other_rules() {
        for body in [
            "registerWithTaints: [{key: a b, effect: NoSchedule}]",
            "registerWithTaints: [{key: a, effect: Sometimes}]",
            "showHiddenMetricsForVersion: '1.35'",
            "logging: {format: xml}",
            "tracing: {endpoint: 'http://x', samplingRatePerMillion: 1}",
            "tracing: {samplingRatePerMillion: 1000001}",
            "featureGates: {Nope: true}",
            "featureGates: {DefaultPodSysctls: true}\ndefaultPodSysctls: {vm.swappiness: '1'}",
            "reservedMemory: [{numaNode: 0, limits: {memory: 0}}]",
            "reservedSystemCPUs: 3-1",
            "kubeReserved: {gpu: '1'}",
            "clusterDNS: [here]",
            "tlsCertFile: /x",
        ] {
            assert_eq!(problems(&format!("{body}\n")).len(), 1, "{body}: {:?}", problems(&format!("{body}\n")));
        }
    }

    #[test]
    fn cgroup_v1_is_refused_unless_allowed() {
        let mut config = KubeletConfiguration::default();
        let refused = kubelet(&config, false);
        assert!(refused.iter().any(|problem| problem.contains("--fail-cgroupv1=false")), "{refused:?}");
        config.fail_cgroup_v1 = false;
        assert!(!kubelet(&config, false).iter().any(|problem| problem.contains("cgroup")));
        config.single_process_oom_kill = Some(false);
        assert!(kubelet(&config, false).iter().any(|problem| problem.contains("singleProcessOOMKill")));
    }

    #[test]
    fn sysctl_names_in_both_spellings() {
        assert_eq!(dotted_sysctl("net/ipv4/conf/eno2.100/rp_filter"), "net.ipv4.conf.eno2/100.rp_filter");
        assert_eq!(dotted_sysctl("net.ipv4.conf.eno2/100.rp_filter"), "net.ipv4.conf.eno2/100.rp_filter");
        assert!(is_sysctl("net.ipv4.ip_local_port_range") && !is_sysctl("Net.x") && !is_sysctl("a..b"));
    }
}
