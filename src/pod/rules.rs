//! The rules that both [`super::plan`] and [`super::status`] follow: restarts, the end of a Pod, grace periods.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ContainerRestartRule;

use super::model::{ContainerFacts, ContainerKind, ContainerSpec, Desired, Exit, Observed, Phase, RestartPolicy};

/// kubelet grants at least one second between TERM and KILL (`calculateEffectiveGracePeriod`).
pub const MIN_GRACE_SECONDS: i64 = 1;
/// After preStop the container has at least this long for its own end (`minimumGracePeriodInSeconds`).
pub const MIN_GRACE_SECONDS_AFTER_TERM: i64 = 2;

const RESTART_ALL: &str = "RestartAllContainers";

/// The first of a container's `restartPolicyRules` that an exit code meets (`FindMatchingContainerRestartRule`).
fn rule_for(spec: &ContainerSpec, code: i32) -> Option<&ContainerRestartRule> {
    spec.container.restart_policy_rules.iter().flatten().find(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|listed| *listed == code);
            match codes.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                _ => false,
            }
        })
    })
}

/// Whether this end of a container restarts all containers of its Pod (KEP-5532).
#[must_use]
pub fn restarts_all(spec: &ContainerSpec, exit: &Exit) -> bool {
    spec.kind != ContainerKind::Ephemeral && rule_for(spec, exit.code).is_some_and(|rule| rule.action == RESTART_ALL)
}

/// Whether a rule of the Pod can restart all its containers (`AllContainersCouldRestart`).
#[must_use]
pub fn could_restart_all(desired: &Desired) -> bool {
    let rules = desired.containers.iter().flat_map(|spec| spec.container.restart_policy_rules.iter().flatten());
    rules.into_iter().any(|rule| rule.action == RESTART_ALL)
}

/// Whether a container that ended like this is started again, by itself or with all others.
///
/// Source: `ShouldContainerBeRestarted` in `pkg/kubelet/container/helpers.go`, `ContainerShouldRestart` in
/// `pkg/api/v1/pod/util.go`; container-level policy and rules from KEP-5307.
#[must_use]
pub fn restarts(desired: &Desired, spec: &ContainerSpec, exit: &Exit) -> bool {
    match spec.kind {
        ContainerKind::Sidecar => return true,
        ContainerKind::Ephemeral => return false,
        ContainerKind::Init | ContainerKind::Main => {}
    }
    // an action that this node does not know leaves the decision to the policy
    if rule_for(spec, exit.code).is_some_and(|rule| rule.action == "Restart" || rule.action == RESTART_ALL) {
        return true;
    }
    let policy = match spec.container.restart_policy.as_deref() {
        Some("Never") => RestartPolicy::Never,
        Some("OnFailure") => RestartPolicy::OnFailure,
        Some("Always") => RestartPolicy::Always,
        _ => desired.restart_policy(),
    };
    match policy {
        RestartPolicy::Always => spec.kind == ContainerKind::Main || exit.code != 0,
        RestartPolicy::OnFailure => exit.code != 0,
        RestartPolicy::Never => false,
    }
}

/// The phase in which the Pod has ended by itself: nothing of it will run again. Sidecars do not count.
#[must_use]
pub fn finished(desired: &Desired, observed: &Observed) -> Option<Phase> {
    // what was killed for the restart has not come to its own end
    if observed.restarting_all.is_some() {
        return None;
    }
    if !observed.initialized {
        let failed = desired
            .of_kind(ContainerKind::Init)
            .any(|spec| exit_of(observed, spec).is_some_and(|exit| exit.code != 0 && !restarts(desired, spec, exit)));
        return failed.then_some(Phase::Failed);
    }
    let mut all_zero = true;
    for spec in desired.of_kind(ContainerKind::Main) {
        let exit = exit_of(observed, spec)?;
        if restarts(desired, spec, exit) {
            return None;
        }
        all_zero &= exit.code == 0;
    }
    Some(if all_zero { Phase::Succeeded } else { Phase::Failed })
}

/// The phase of a Pod that was made to end: restart policies no longer count.
#[must_use]
pub fn phase_when_ended(desired: &Desired, observed: &Observed) -> Phase {
    if observed.termination.as_ref().is_some_and(|t| t.verdict.is_some()) {
        return Phase::Failed;
    }
    let all_zero =
        desired.of_kind(ContainerKind::Main).all(|spec| exit_of(observed, spec).is_some_and(|exit| exit.code == 0));
    if all_zero { Phase::Succeeded } else { Phase::Failed }
}

fn exit_of<'a>(observed: &'a Observed, spec: &ContainerSpec) -> Option<&'a Exit> {
    observed.containers.get(spec.name()).and_then(ContainerFacts::exit)
}

/// Seconds of grace the Pod's end gets: the API's word on a deleted Pod, the Pod's own otherwise; at least one.
#[must_use]
pub fn grace_seconds(desired: &Desired) -> i64 {
    let own = desired.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
    desired
        .pod
        .metadata
        .deletion_grace_period_seconds
        .filter(|_| desired.is_deleted())
        .unwrap_or(own)
        .max(MIN_GRACE_SECONDS)
}

/// When the Pod's `activeDeadlineSeconds` run out.
#[must_use]
pub fn active_deadline(desired: &Desired, observed: &Observed) -> Option<Timestamp> {
    let seconds = desired.pod.spec.as_ref()?.active_deadline_seconds?;
    Some(observed.start_time? + SignedDuration::from_secs(seconds))
}

/// When a container that has ended, or could not be started, may be tried again; `None`: at once.
#[must_use]
pub fn next_try(desired: &Desired, facts: &ContainerFacts) -> Option<Timestamp> {
    let after_failure = facts.waiting.as_ref().map(|waiting| waiting.retry_at);
    let after_exit = facts.last_exit().and_then(|exit| {
        facts.restart_backoff.until(exit.finished_at.unwrap_or(Timestamp::UNIX_EPOCH), desired.max_restart_delay)
    });
    after_failure.max(after_exit)
}

/// A duration as Go prints it: `10s`, `1m20s`, `5m0s`.
#[must_use]
pub fn go_seconds(seconds: i64) -> String {
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}h{minutes}m{rest}s")
    } else if minutes > 0 {
        format!("{minutes}m{rest}s")
    } else {
        format!("{rest}s")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    use super::*;

    fn restarted(policy: &str, list: &str, container: Value, code: i32) -> bool {
        let mut container = container;
        container["name"] = json!("c");
        let mut spec = json!({"restartPolicy": policy, "containers": []});
        spec[list] = json!([container]);
        let pod: Pod = serde_json::from_value(json!({ "spec": spec })).unwrap();
        let desired = Desired::new(Arc::new(pod));
        let exit = Exit { code, ..super::super::fold::lost(String::new(), None) };
        restarts(&desired, &desired.containers[0], &exit)
    }

    #[test]
    fn the_containers_own_policy_comes_first() {
        for (own, code, expected) in
            [("Always", 0, true), ("OnFailure", 0, false), ("OnFailure", 1, true), ("Never", 1, false)]
        {
            for pod in ["Always", "OnFailure", "Never"] {
                let container = json!({ "restartPolicy": own });
                assert_eq!(restarted(pod, "containers", container, code), expected, "{own} in {pod}, {code}");
            }
        }
        assert!(!restarted("Always", "initContainers", json!({}), 0), "an init container that is done is done");
        assert!(restarted("Never", "initContainers", json!({"restartPolicy": "Always"}), 0), "a sidecar");
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rule = |action: &str, operator: &str, codes: &[i32]| json!({"action": action, "exitCodes": {"operator": operator, "values": codes}});
        let with = |rules: Value| json!({"restartPolicy": "Never", "restartPolicyRules": rules});
        for (rules, code, expected) in [
            (json!([rule("Restart", "In", &[42])]), 42, true),
            (json!([rule("Restart", "In", &[42])]), 1, false),
            (json!([rule("Restart", "NotIn", &[0, 1])]), 2, true),
            (json!([rule("Restart", "NotIn", &[0, 1])]), 1, false),
            (json!([rule("RestartAllContainers", "In", &[42])]), 42, true),
            // what this node does not know leaves the decision to the policy
            (json!([rule("Ignore", "In", &[42]), rule("Restart", "In", &[42])]), 42, false),
            (json!([rule("Restart", "Near", &[42])]), 42, false),
        ] {
            assert_eq!(restarted("Always", "containers", with(rules.clone()), code), expected, "{rules} {code}");
        }
    }
}
