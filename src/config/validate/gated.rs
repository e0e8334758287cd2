//! Fields that need a feature gate, and those whose rules change with one.

use std::collections::BTreeSet;

use super::Errors;
use crate::config::duration::Duration;
use crate::config::gates::FeatureGates;
use crate::config::kubelet::KubeletConfiguration;

/// Rules that depend on feature gates.
pub(super) fn gated(config: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Errors) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_in_both_spellings() {
        assert_eq!(dotted_sysctl("net/ipv4/conf/eno2.100/rp_filter"), "net.ipv4.conf.eno2/100.rp_filter");
        assert_eq!(dotted_sysctl("net.ipv4.conf.eno2/100.rp_filter"), "net.ipv4.conf.eno2/100.rp_filter");
        assert!(is_sysctl("net.ipv4.ip_local_port_range") && !is_sysctl("Net.x") && !is_sysctl("a..b"));
    }
}
