//! `RestartAllContainers` (KEP-5532): a container that ended by such a rule takes all others with it, without hooks and
//! grace, and the Pod begins anew in its sandbox with its volumes.
//!
//! Source: `computePodActions` and `SyncPod` in `kuberuntime_manager.go`. Two things go by the proposal where kubelet
//! 1.37 has them otherwise: a container that does so again and again waits in `CrashLoopBackOff` like any other (the
//! others run on until its time has come), and its last state keeps the exit code that was the cause.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use super::model::{ContainerKind, ContainerSpec, Desired, Instance, Observed};
use super::plan::{Action, begin_stop};
use super::probes::ProbeFacts;
use super::rules::{MIN_GRACE_SECONDS_AFTER_TERM, next_try, restarts_all};
use super::status::{RESTARTING_ALL, RESTARTING_ALL_MESSAGE};

/// Notes that the restart begins, what has to stop for it, and that it is over.
pub(super) fn settle(desired: &Desired, observed: &mut Observed, running: &BTreeSet<Action>, now: Timestamp) {
    let starting = running.iter().any(|action| matches!(action, Action::Start(_) | Action::PostStart(_)));
    if observed.restarting_all.is_none() {
        let causes: Vec<String> = causes(desired, observed, now).map(|spec| spec.name().to_owned()).collect();
        // kubelet has started all containers that it can before it looks at how one of them ended
        if causes.is_empty() || starting || is_starting_main_containers(desired, observed) {
            return;
        }
        observed.restarting_all = Some(now);
        for name in causes {
            let Some(facts) = observed.containers.get_mut(&name) else { continue };
            let failed_at = facts.exit().and_then(|exit| exit.finished_at).unwrap_or(now);
            facts.restart_backoff.raise(failed_at, now, desired.max_restart_delay);
        }
    }
    let deadline = now + SignedDuration::from_secs(MIN_GRACE_SECONDS_AFTER_TERM);
    let mut left = false;
    for spec in desired.containers.iter().filter(|spec| spec.kind != ContainerKind::Ephemeral) {
        let instance = observed.containers.get_mut(spec.name()).and_then(|facts| facts.current.as_mut());
        let Some(instance) = instance.filter(|instance| instance.is_running()) else { continue };
        left = true;
        begin_stop(instance, now, deadline, format!("Stopping container {}", spec.name()));
        if let Some(stop) = &mut instance.stop {
            stop.pre_stopped = true;
        }
    }
    if !left && !starting {
        begin_anew(desired, observed);
    }
}

/// Containers whose end restarts all others, and that need not wait any longer.
fn causes<'a>(desired: &'a Desired, observed: &Observed, now: Timestamp) -> impl Iterator<Item = &'a ContainerSpec> {
    desired.containers.iter().filter(move |spec| {
        observed.containers.get(spec.name()).is_some_and(|facts| {
            facts.exit().is_some_and(|exit| restarts_all(spec, exit))
                && next_try(desired, facts).is_none_or(|at| at <= now)
        })
    })
}

/// One main container has run, and another's turn has not come yet.
fn is_starting_main_containers(desired: &Desired, observed: &Observed) -> bool {
    observed.initialized
        && desired.of_kind(ContainerKind::Main).any(|spec| {
            observed.containers.get(spec.name()).is_none_or(|facts| facts.current.is_none() && facts.waiting.is_none())
        })
}

/// All containers but ephemeral ones begin anew in the sandbox that there is (`RestartAllContainers`); nothing runs.
fn begin_anew(desired: &Desired, observed: &mut Observed) {
    let Some(since) = observed.restarting_all.take() else { return };
    observed.initialized = false;
    for spec in desired.containers.iter().filter(|spec| spec.kind != ContainerKind::Ephemeral) {
        let Some(facts) = observed.containers.get_mut(spec.name()) else { continue };
        facts.waiting = None;
        facts.probes = ProbeFacts::default();
        let Some(Instance { exit: Some(mut exit), stop, .. }) = facts.current.take() else { continue };
        // who was the cause has waited for all
        facts.restart_backoff.waive(exit.finished_at.unwrap_or(since));
        if stop.is_some() && exit.finished_at.is_some_and(|at| at >= since) {
            exit.reason = RESTARTING_ALL.to_owned();
            exit.message = RESTARTING_ALL_MESSAGE.to_owned();
        }
        facts.previous = Some(exit);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::{Pod, PodStatus};
    use serde_json::{Value, json};

    use super::*;
    use crate::pod::fold;
    use crate::pod::model::Phase;
    use crate::pod::plan::plan;
    use crate::pod::status::{phase, status};
    use crate::pod::testing::{at, end, instance, ready};

    /// An init container, a sidecar, and two main containers of which "source" restarts all with exit code 42.
    fn desired() -> Desired {
        let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
        let container = |name: &str, more: Value| {
            let mut base = json!({"name": name, "image": "image"});
            base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            base
        };
        let spec = json!({
            "restartPolicy": "Never",
            "initContainers": [container("init", json!({})), container("sidecar", json!({"restartPolicy": "Always"}))],
            "containers": [
                container("source", json!({"restartPolicy": "Never", "restartPolicyRules": rules})),
                container("regular", json!({"lifecycle": {"preStop": {"sleep": {"seconds": 60}}}})),
            ],
        });
        let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": spec})).unwrap();
        Desired::new(Arc::new(pod))
    }

    fn start(desired: &Desired, observed: &mut Observed, name: &str, second: i64) {
        let action = Action::Start(name.to_owned());
        fold::begin(desired, observed, &action, at(second));
        let attempt = observed.containers.get(name).map_or(0, |facts| facts.next_attempt);
        let instance = instance(&format!("{name}{attempt}"), attempt, at(second));
        let outcome = crate::pod::effects::Outcome::Started(Box::new(instance));
        fold::outcome(desired, observed, &action, &outcome, at(second));
    }

    fn exit(observed: &mut Observed, name: &str, code: i32, second: i64) {
        end(observed, name, code, at(second));
    }

    fn running(desired: &Desired) -> Observed {
        let mut observed = ready();
        start(desired, &mut observed, "init", 0);
        exit(&mut observed, "init", 0, 1);
        for name in ["sidecar", "source", "regular"] {
            start(desired, &mut observed, name, 1);
        }
        observed
    }

    fn look(desired: &Desired, observed: &mut Observed, second: i64) -> Vec<Action> {
        crate::pod::plan::settle(desired, observed, &BTreeSet::new(), at(second));
        plan(desired, observed, &BTreeSet::new(), at(second)).actions
    }

    fn condition(desired: &Desired, observed: &Observed, kind: &str) -> (String, Option<String>) {
        let status = status(desired, observed, &PodStatus::default(), at(100));
        let condition = status.conditions.unwrap().into_iter().find(|c| c.type_ == kind).unwrap();
        (condition.status, condition.reason)
    }

    #[test]
    fn one_exit_restarts_all_containers_in_order() {
        let desired = desired();
        let mut observed = running(&desired);
        assert!(look(&desired, &mut observed, 5).is_empty());
        assert_eq!(condition(&desired, &observed, "AllContainersRestarting"), ("False".to_owned(), None));
        exit(&mut observed, "source", 42, 10);
        // no hooks, no order, two seconds of grace
        let terms: Vec<Action> = ["regular", "sidecar"].map(|name| Action::Term(name.to_owned())).into();
        assert_eq!(look(&desired, &mut observed, 10), terms);
        assert_eq!(observed.containers["regular"].current.as_ref().unwrap().stop.as_ref().unwrap().deadline, at(12));
        let started = ("True".to_owned(), Some("RestartAllContainersStarted".to_owned()));
        assert_eq!(condition(&desired, &observed, "AllContainersRestarting"), started);
        exit(&mut observed, "sidecar", 143, 11);
        assert!(!look(&desired, &mut observed, 11).iter().any(|a| matches!(a, Action::Start(_))), "one still runs");
        exit(&mut observed, "regular", 137, 12);
        assert_eq!(look(&desired, &mut observed, 12), [Action::Start("init".to_owned())]);
        assert_eq!(phase(&desired, &observed), Phase::Pending);
        assert_eq!(condition(&desired, &observed, "AllContainersRestarting"), ("False".to_owned(), None));
        let last = |name: &str| observed.containers[name].previous.as_ref().map(|e| (e.code, e.reason.as_str()));
        assert_eq!(last("source"), Some((42, "Error")));
        assert_eq!(last("init"), Some((0, "Completed")));
        assert_eq!(last("regular"), Some((137, RESTARTING_ALL)));
        start(&desired, &mut observed, "init", 13);
        exit(&mut observed, "init", 0, 14);
        for name in ["sidecar", "source", "regular"] {
            assert_eq!(look(&desired, &mut observed, 14), [Action::Start(name.to_owned())]);
            start(&desired, &mut observed, name, 14);
        }
        assert!(look(&desired, &mut observed, 15).is_empty());
        assert_eq!(phase(&desired, &observed), Phase::Running);
        assert!(observed.containers.values().all(|facts| facts.restart_count() == 1));
    }

    #[test]
    fn a_pod_that_restarts_again_and_again_waits_longer_and_longer() {
        let desired = desired();
        let mut observed = running(&desired);
        exit(&mut observed, "source", 42, 10);
        look(&desired, &mut observed, 10);
        exit(&mut observed, "sidecar", 143, 10);
        exit(&mut observed, "regular", 143, 10);
        look(&desired, &mut observed, 10);
        start(&desired, &mut observed, "init", 11);
        exit(&mut observed, "init", 0, 11);
        for name in ["sidecar", "source", "regular"] {
            start(&desired, &mut observed, name, 11);
        }
        exit(&mut observed, "source", 42, 12);
        assert!(look(&desired, &mut observed, 12).is_empty(), "the others run on meanwhile");
        assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(12)).wake_at, Some(at(22)));
        let shown = status(&desired, &observed, &PodStatus::default(), at(12)).container_statuses.unwrap();
        let waiting = shown.iter().find(|c| c.name == "source").unwrap().state.as_ref().unwrap().waiting.as_ref();
        assert_eq!(waiting.unwrap().reason.as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(look(&desired, &mut observed, 22).len(), 2, "now they end");
        for name in ["sidecar", "regular"] {
            exit(&mut observed, name, 143, 23);
        }
        // the wait was for all: none of them waits once more
        for name in ["init", "sidecar", "source", "regular"] {
            assert_eq!(look(&desired, &mut observed, 23), [Action::Start(name.to_owned())]);
            start(&desired, &mut observed, name, 23);
            if name == "init" {
                exit(&mut observed, name, 0, 23);
            }
        }
        exit(&mut observed, "source", 42, 24);
        assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(24)).wake_at, Some(at(44)), "twice as long");
    }

    #[test]
    fn containers_whose_turn_has_not_come_are_started_first() {
        let desired = desired();
        let mut observed = running(&desired);
        observed.containers.remove("regular");
        exit(&mut observed, "source", 42, 2);
        assert_eq!(look(&desired, &mut observed, 2), [Action::Start("regular".to_owned())]);
        start(&desired, &mut observed, "regular", 2);
        look(&desired, &mut observed, 2);
        assert!(observed.restarting_all.is_some());
    }

    #[test]
    fn a_crash_of_the_agent_does_not_bring_the_cause_back() {
        let desired = desired();
        let mut observed = running(&desired);
        exit(&mut observed, "source", 42, 10);
        look(&desired, &mut observed, 10);
        exit(&mut observed, "sidecar", 143, 10);
        exit(&mut observed, "regular", 143, 10);
        let found: Vec<fold::Found> = observed
            .containers
            .iter()
            .map(|(name, facts)| fold::Found { name: name.clone(), instance: facts.current.clone().unwrap() })
            .collect();
        look(&desired, &mut observed, 10);
        assert!(observed.restarting_all.is_none());
        let before = observed.clone();
        // what ended is still on the node: it goes when its successor starts
        fold::adopt(&desired, &mut observed, &found, true, at(20));
        assert_eq!(observed, before);
        assert_eq!(look(&desired, &mut observed, 20), [Action::Start("init".to_owned())]);
    }

    #[test]
    fn a_deleted_pod_is_not_restarted() {
        let desired = desired();
        let mut observed = running(&desired);
        exit(&mut observed, "source", 42, 10);
        look(&desired, &mut observed, 10);
        let mut pod = (*desired.pod).clone();
        pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(10)));
        let desired = Desired::new(Arc::new(pod));
        for name in ["sidecar", "regular"] {
            exit(&mut observed, name, 143, 11);
        }
        assert_eq!(look(&desired, &mut observed, 11), [Action::TearDown]);
        assert_eq!(observed.final_phase, Some(Phase::Failed));
        let failed = ("False".to_owned(), Some("PodFailed".to_owned()));
        assert_eq!(condition(&desired, &observed, "AllContainersRestarting"), failed);
    }
}
