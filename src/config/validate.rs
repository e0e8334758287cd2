//! Kubelet's rules for its configuration, in its words.
//!
//! Source: `pkg/kubelet/apis/config/validation/validation{,_linux,_reserved_memory}.go`, component-base
//! `logs/api/v1/options.go`, `tracing/api/v1/config.go` and `metrics/api/v1/config.go`,
//! `ValidateKubeletFlags` in `cmd/kubelet/app/options/options.go`.

mod flags;
mod gated;
mod images;
mod logging;
mod reservations;

use std::fmt::Display;
use std::ops::RangeInclusive;

pub(super) use flags::{flags, node_name};
use gated::gated;
use images::images;
use logging::{logging, logs};
use reservations::reservations;

use super::gates::FeatureGates;
use super::kubelet::KubeletConfiguration;
use super::names;

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
        logging::tracing(tracing, &mut errors);
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
    use std::path::Path;

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
}
