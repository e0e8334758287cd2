//! The conditions of a Pod's status that the node owns.
//!
//! Source: `pkg/kubelet/status/generate.go`; who owns which: `kubetypes.PodConditionByKubelet`.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodStatus};

use super::model::{ContainerKind, Desired, Observed, Phase, Sandbox};
use super::resize;
use super::rules::could_restart_all;
use super::status::api_time;

struct Draft {
    kind: &'static str,
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Draft {
    fn yes(kind: &'static str) -> Self {
        Self { kind, status: true, reason: None, message: None }
    }

    fn no(kind: &'static str, reason: &'static str, message: Option<String>) -> Self {
        Self { kind, status: false, reason: Some(reason), message }
    }
}

/// All conditions: the node's own, computed anew, and those of others as they stand in `base`.
pub(super) fn conditions(
    desired: &Desired,
    observed: &Observed,
    status: &PodStatus,
    base: &PodStatus,
    phase: Phase,
    now: Timestamp,
) -> Vec<PodCondition> {
    let old = base.conditions.as_deref().unwrap_or_default();
    let ready = containers_ready(desired, status, phase);
    let gates = readiness_gates(desired, old);
    let pod_ready = match (&ready.status, gates) {
        (true, Some(message)) => Draft::no("Ready", "ReadinessGatesNotReady", Some(message)),
        _ => Draft { kind: "Ready", status: ready.status, reason: ready.reason, message: ready.message.clone() },
    };
    let mut drafts = vec![
        sandbox_ready(observed),
        initialized(desired, observed, status, phase, old),
        pod_ready,
        ready,
        Draft::yes("PodScheduled"),
    ];
    if could_restart_all(desired) {
        drafts.push(restarting_all(observed, phase));
    }
    let verdict = observed.termination.as_ref().and_then(|t| t.verdict.as_ref());
    if let Some(verdict) = verdict.filter(|v| v.disruption && phase.is_terminal()) {
        drafts.push(Draft {
            kind: "DisruptionTarget",
            status: true,
            reason: Some("TerminationByKubelet"),
            message: Some(verdict.disruption_message.as_ref().unwrap_or(&verdict.message).clone()),
        });
    }
    let generation = status.observed_generation;
    let mut list: Vec<PodCondition> = drafts.iter().map(|draft| build(draft, old, generation, now)).collect();
    let resizes = [resize::status::PENDING, resize::status::IN_PROGRESS];
    let own = |c: &&PodCondition| drafts.iter().any(|draft| draft.kind == c.type_) || resizes.contains(&&*c.type_);
    list.extend(old.iter().filter(|c| !own(c)).cloned());
    list.extend(resize::status::conditions(observed));
    list
}

fn build(draft: &Draft, old: &[PodCondition], generation: Option<i64>, now: Timestamp) -> PodCondition {
    let word = if draft.status { "True" } else { "False" };
    let before = old.iter().find(|c| c.type_ == draft.kind && c.status == word);
    PodCondition {
        type_: draft.kind.to_owned(),
        status: word.to_owned(),
        reason: draft.reason.map(str::to_owned),
        message: draft.message.clone(),
        last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or_else(|| Some(api_time(now))),
        last_probe_time: None,
        observed_generation: generation,
    }
}

fn sandbox_ready(observed: &Observed) -> Draft {
    const KIND: &str = "PodReadyToStartContainers";
    const REASON: &str = "PodSandboxNotReady";
    let up = observed.sandbox == Sandbox::Ready && !observed.torn_down;
    if up && observed.volumes_mounted {
        Draft::yes(KIND)
    } else if observed.torn_down || observed.sandbox == Sandbox::Lost {
        Draft::no(KIND, REASON, Some("pod sandbox is not ready".to_owned()))
    } else {
        Draft::no(KIND, REASON, Some("no pod sandbox exists".to_owned()))
    }
}

fn find<'a>(list: Option<&'a Vec<ContainerStatus>>, name: &str) -> Option<&'a ContainerStatus> {
    list.into_iter().flatten().find(|c| c.name == name)
}

fn go_list(names: &[&str]) -> String {
    format!("[{}]", names.join(" "))
}

/// Source: `GenerateAllContainersRestartingCondition`.
fn restarting_all(observed: &Observed, phase: Phase) -> Draft {
    const KIND: &str = "AllContainersRestarting";
    match phase {
        Phase::Succeeded => Draft::no(KIND, "PodCompleted", None),
        Phase::Failed => Draft::no(KIND, "PodFailed", None),
        _ if observed.restarting_all.is_some() => Draft {
            kind: KIND,
            status: true,
            reason: Some("RestartAllContainersStarted"),
            message: Some("container exited with restart policy rule".to_owned()),
        },
        _ => Draft { kind: KIND, status: false, reason: None, message: None },
    }
}

fn initialized(
    desired: &Desired,
    observed: &Observed,
    status: &PodStatus,
    phase: Phase,
    old: &[PodCondition],
) -> Draft {
    const KIND: &str = "Initialized";
    if phase == Phase::Succeeded {
        return Draft { reason: Some("PodCompleted"), ..Draft::yes(KIND) };
    }
    // a Pod that was initialized once stays so, also while its init containers run again
    if observed.initialized || old.iter().any(|c| c.type_ == KIND && c.status == "True") {
        return Draft::yes(KIND);
    }
    let list = status.init_container_statuses.as_ref();
    let incomplete: Vec<&str> = desired
        .containers
        .iter()
        .filter(|spec| match spec.kind {
            ContainerKind::Init => find(list, spec.name()).is_none_or(|c| !c.ready),
            ContainerKind::Sidecar => find(list, spec.name()).is_none_or(|c| c.started != Some(true)),
            ContainerKind::Main | ContainerKind::Ephemeral => false,
        })
        .map(|spec| spec.name())
        .collect();
    if incomplete.is_empty() {
        return Draft::yes(KIND);
    }
    Draft::no(
        KIND,
        "ContainersNotInitialized",
        Some(format!("containers with incomplete status: {}", go_list(&incomplete))),
    )
}

fn containers_ready(desired: &Desired, status: &PodStatus, phase: Phase) -> Draft {
    const KIND: &str = "ContainersReady";
    match phase {
        Phase::Succeeded => return Draft::no(KIND, "PodCompleted", None),
        Phase::Failed => return Draft::no(KIND, "PodFailed", None),
        Phase::Pending | Phase::Running => {}
    }
    let unready: Vec<&str> = desired
        .containers
        .iter()
        .filter(|spec| match spec.kind {
            ContainerKind::Sidecar => {
                find(status.init_container_statuses.as_ref(), spec.name()).is_none_or(|c| !c.ready)
            }
            ContainerKind::Main => find(status.container_statuses.as_ref(), spec.name()).is_none_or(|c| !c.ready),
            ContainerKind::Init | ContainerKind::Ephemeral => false,
        })
        .map(|spec| spec.name())
        .collect();
    if unready.is_empty() {
        return Draft::yes(KIND);
    }
    Draft::no(KIND, "ContainersNotReady", Some(format!("containers with unready status: {}", go_list(&unready))))
}

/// The message of a gate that is not open, if there is one.
fn readiness_gates(desired: &Desired, conditions: &[PodCondition]) -> Option<String> {
    let gates = desired.pod.spec.as_ref()?.readiness_gates.as_ref()?;
    let closed: Vec<String> = gates
        .iter()
        .filter_map(|gate| match conditions.iter().find(|c| c.type_ == gate.condition_type) {
            None => {
                Some(format!("corresponding condition of pod readiness gate {:?} does not exist.", gate.condition_type))
            }
            Some(c) if c.status != "True" => Some(format!(
                "the status of pod readiness gate {:?} is not \"True\", but {}",
                gate.condition_type, c.status
            )),
            Some(_) => None,
        })
        .collect();
    (!closed.is_empty()).then(|| closed.join(", "))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;

    #[test]
    fn gates_are_asked_of_others() {
        let spec = json!({"containers": [], "readinessGates": [{"conditionType": "a"}, {"conditionType": "b"}]});
        let pod: Pod = serde_json::from_value(json!({ "spec": spec })).unwrap();
        let desired = Desired::new(Arc::new(pod));
        let condition = |kind: &str, status: &str| PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            ..PodCondition::default()
        };
        assert_eq!(
            readiness_gates(&desired, &[condition("a", "False")]).unwrap(),
            "the status of pod readiness gate \"a\" is not \"True\", but False, corresponding condition of pod readiness gate \"b\" does not exist."
        );
        assert_eq!(readiness_gates(&desired, &[condition("a", "True"), condition("b", "True")]), None);
    }

    #[test]
    fn once_initialized_always_initialized() {
        let spec = json!({"initContainers": [{"name": "i"}], "containers": [{"name": "c"}]});
        let pod: Pod = serde_json::from_value(json!({"metadata": {"generation": 3}, "spec": spec})).unwrap();
        let desired = Desired::new(Arc::new(pod));
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let of = |observed: &Observed, base: &PodStatus| {
            let status = PodStatus { observed_generation: Some(3), ..PodStatus::default() };
            let list = conditions(&desired, observed, &status, base, Phase::Pending, now);
            assert!(list.iter().all(|c| c.observed_generation == Some(3)));
            list.into_iter().find(|c| c.type_ == "Initialized").unwrap()
        };
        let mut observed = Observed::default();
        let before = of(&observed, &PodStatus::default());
        assert_eq!((before.status.as_str(), before.reason.as_deref()), ("False", Some("ContainersNotInitialized")));
        observed.initialized = true;
        let base = PodStatus { conditions: Some(vec![of(&observed, &PodStatus::default())]), ..PodStatus::default() };
        observed.initialized = false;
        assert_eq!(of(&observed, &base).status, "True", "all containers are restarted, or the sandbox was lost");
    }
}
