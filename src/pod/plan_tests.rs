//! Tests of [`super`].

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Lifecycle, LifecycleHandler, Pod, PodSpec, Probe};

use super::*;
use crate::pod::effects::{Outcome, RuntimeEvent};
use crate::pod::fold;
use crate::pod::model::{Blocked, Phase};
use crate::pod::testing::{at, end, instance, ready};

fn named(name: &str) -> Container {
    Container { name: name.to_owned(), image: Some("image".to_owned()), ..Container::default() }
}

fn sidecar(name: &str) -> Container {
    let startup_probe = Some(Probe::default());
    Container { restart_policy: Some("Always".to_owned()), startup_probe, ..named(name) }
}

fn desired(init: Vec<Container>, main: Vec<Container>, policy: &str) -> Desired {
    let spec = PodSpec {
        init_containers: Some(init),
        containers: main,
        restart_policy: Some(policy.to_owned()),
        ..PodSpec::default()
    };
    Desired::new(Arc::new(Pod { spec: Some(spec), ..Pod::default() }))
}

fn running(observed: &mut Observed, name: &str) {
    let facts = observed.containers.entry(name.to_owned()).or_default();
    facts.current = Some(instance(name, 0, at(0)));
    facts.next_attempt = 1;
}

fn exited(observed: &mut Observed, name: &str, code: i32) {
    running(observed, name);
    end(observed, name, code, at(1));
}

fn starts(desired: &Desired, observed: &Observed) -> Vec<String> {
    let plan = plan(desired, observed, &BTreeSet::new(), at(10));
    let name = |action: Action| if let Action::Start(name) = action { Some(name) } else { None };
    plan.actions.into_iter().filter_map(name).collect()
}

#[test]
fn init_containers_and_sidecars_gate_what_comes_after_them() {
    let desired = desired(vec![named("i0"), sidecar("s1"), named("i2")], vec![named("main")], "Always");
    let mut observed = ready();
    assert_eq!(starts(&desired, &observed), ["i0"]);
    running(&mut observed, "i0");
    assert!(starts(&desired, &observed).is_empty());
    exited(&mut observed, "i0", 0);
    assert_eq!(starts(&desired, &observed), ["s1"]);
    running(&mut observed, "s1");
    assert!(starts(&desired, &observed).is_empty(), "its startup probe has not succeeded");
    observed.containers.get_mut("s1").unwrap().probes.startup.verdict = Some(true);
    assert_eq!(starts(&desired, &observed), ["i2"]);
    exited(&mut observed, "i2", 0);
    assert_eq!(starts(&desired, &observed), ["main"]);
}

#[test]
fn nothing_starts_before_sandbox_and_volumes() {
    let desired = desired(vec![], vec![named("main")], "Always");
    let observed = Observed { sandbox: Sandbox::Absent, volumes_mounted: false, ..ready() };
    let plan = plan(&desired, &observed, &BTreeSet::new(), at(10));
    assert_eq!(plan.actions, [Action::MountVolumes, Action::SetUpSandbox]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let desired = desired(vec![named("init")], vec![named("main")], "Never");
    let mut observed = ready();
    exited(&mut observed, "init", 1);
    settle(&desired, &mut observed, &BTreeSet::new(), at(10));
    assert_eq!(observed.final_phase, Some(Phase::Failed));
    let plan = plan(&desired, &observed, &BTreeSet::new(), at(10));
    assert_eq!(plan.actions, [Action::TearDown]);
}

#[test]
fn sidecars_stop_last_and_from_the_last_to_the_first() {
    let desired = desired(vec![sidecar("s0"), sidecar("s1")], vec![named("main")], "Never");
    let mut observed = Observed { initialized: true, ..ready() };
    for name in ["s0", "s1"] {
        running(&mut observed, name);
    }
    exited(&mut observed, "main", 0);
    let mut stopped = Vec::new();
    while observed.final_phase.is_none() {
        settle(&desired, &mut observed, &BTreeSet::new(), at(10));
        let terms = plan(&desired, &observed, &BTreeSet::new(), at(10)).actions;
        for action in terms {
            let Action::Term(name) = action else { continue };
            exited(&mut observed, &name, 143);
            stopped.push(name);
        }
    }
    assert_eq!(stopped, ["s1", "s0"]);
    assert_eq!(observed.final_phase, Some(Phase::Succeeded), "exit codes of sidecars do not count");
}

#[test]
fn a_second_delete_shortens_the_grace_and_never_lengthens_it() {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    let with_grace = |grace: i64| {
        let base = desired(vec![], vec![named("main")], "Always");
        let mut pod = (*base.pod).clone();
        pod.metadata.deletion_timestamp = Some(Time(at(100)));
        pod.metadata.deletion_grace_period_seconds = Some(grace);
        Desired::new(Arc::new(pod))
    };
    let mut observed = Observed { initialized: true, ..ready() };
    running(&mut observed, "main");
    let deadline = |observed: &Observed| observed.termination.as_ref().unwrap().deadline;
    settle(&with_grace(30), &mut observed, &BTreeSet::new(), at(0));
    assert_eq!(deadline(&observed), at(30));
    settle(&with_grace(5), &mut observed, &BTreeSet::new(), at(2));
    assert_eq!(deadline(&observed), at(7));
    settle(&with_grace(60), &mut observed, &BTreeSet::new(), at(3));
    assert_eq!(deadline(&observed), at(7));
    fold::begin(&with_grace(5), &mut observed, &Action::Term("main".to_owned()), at(3));
    assert_eq!(plan(&with_grace(5), &observed, &BTreeSet::new(), at(6)).wake_at, Some(at(7)));
    let plan = plan(&with_grace(5), &observed, &BTreeSet::new(), at(7));
    assert_eq!(plan.actions, [Action::Kill("main".to_owned())]);
}

#[test]
fn whatever_used_up_the_grace_leaves_two_seconds_from_the_stop_signal() {
    let mut container = named("main");
    container.lifecycle = Some(Lifecycle { pre_stop: Some(LifecycleHandler::default()), ..Lifecycle::default() });
    let desired = desired(vec![], vec![container], "Always");
    let mut observed = Observed { initialized: true, ..ready() };
    running(&mut observed, "main");
    let instance = observed.containers.get_mut("main").unwrap().current.as_mut().unwrap();
    begin_stop(instance, at(0), at(10), String::new());
    let (hook, term) = (Action::PreStop("main".to_owned()), Action::Term("main".to_owned()));
    let hooked = BTreeSet::from([hook.clone()]);
    assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(1)).actions, std::slice::from_ref(&hook));
    let late = plan(&desired, &observed, &hooked, at(10));
    assert_eq!((late.actions, late.cancel), (vec![term.clone()], vec![hook]));
    fold::begin(&desired, &mut observed, &term, at(10));
    assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(10)).wake_at, Some(at(12)));
    assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(12)).actions, [Action::Kill("main".to_owned())]);
}

#[test]
fn a_deadline_that_passes_while_a_finished_pod_stops_wakes_nobody() {
    let base = desired(vec![sidecar("s")], vec![named("main")], "Never");
    let mut pod = (*base.pod).clone();
    pod.spec.as_mut().unwrap().active_deadline_seconds = Some(5);
    let desired = Desired::new(Arc::new(pod));
    let mut observed = Observed { initialized: true, ..ready() };
    running(&mut observed, "s");
    exited(&mut observed, "main", 0);
    settle(&desired, &mut observed, &BTreeSet::new(), at(10));
    let plan = plan(&desired, &observed, &BTreeSet::new(), at(10));
    assert!(plan.wake_at.is_none_or(|wake| wake > at(10)), "the worker would spin: {plan:?}");
}

#[test]
fn only_a_failed_tear_down_makes_a_tear_down_wait() {
    let desired = desired(vec![], vec![named("main")], "Always");
    let blocked = |reason: &str| {
        let retry_at = at(100);
        let blocked = Blocked { reason: reason.to_owned(), message: String::new(), retry_at, failures: 1 };
        Observed { blocked: Some(blocked), final_phase: Some(Phase::Failed), ..ready() }
    };
    let plan = |observed: &Observed| plan(&desired, observed, &BTreeSet::new(), at(10));
    assert_eq!(plan(&blocked("FailedMount")).actions, [Action::TearDown], "volumes are not wanted any more");
    let failed = plan(&blocked(TEAR_DOWN_FAILED));
    assert_eq!((failed.actions, failed.wake_at), (vec![], Some(at(100))));
    let rejected = Admission::Rejected { reason: "OutOfcpu".to_owned(), message: String::new() };
    let rejected = Observed { admission: Some(rejected), final_phase: None, ..blocked(TEAR_DOWN_FAILED) };
    assert_eq!(plan(&rejected).wake_at, Some(at(100)), "one that was refused does not spin either");
}

#[test]
fn the_active_deadline_ends_a_pod_with_its_reason() {
    let base = desired(vec![], vec![named("main")], "Always");
    let mut pod = (*base.pod).clone();
    pod.spec.as_mut().unwrap().active_deadline_seconds = Some(5);
    let desired = Desired::new(Arc::new(pod));
    let mut observed = Observed { initialized: true, ..ready() };
    running(&mut observed, "main");
    assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(1)).wake_at, Some(at(5)));
    settle(&desired, &mut observed, &BTreeSet::new(), at(5));
    let verdict = observed.termination.unwrap().verdict.unwrap();
    assert_eq!(verdict.reason, "DeadlineExceeded");
}

#[test]
fn another_image_is_tried_at_once_whatever_became_of_the_first() {
    use crate::pod::effects::{Failure, Outcome};
    let with_image = |image: &str| {
        let mut container = named("main");
        container.image = Some(image.to_owned());
        desired(vec![], vec![container], "Always")
    };
    let (wrong, right) = (with_image("wrong"), with_image("right"));
    let start = Action::Start("main".to_owned());
    let mut observed = ready();
    fold::begin(&wrong, &mut observed, &start, at(0));
    let pulls = BTreeSet::from([start.clone()]);
    // the pull of an image that nobody wants any more is given up
    settle(&right, &mut observed, &pulls, at(1));
    assert_eq!(plan(&right, &observed, &pulls, at(1)).cancel, std::slice::from_ref(&start));
    fold::outcome(&wrong, &mut observed, &start, &Outcome::Failed(Failure::new("ErrImagePull", "no")), at(2));
    assert!(starts(&wrong, &observed).is_empty(), "it waits");
    settle(&right, &mut observed, &BTreeSet::new(), at(3));
    assert_eq!(starts(&right, &observed), ["main"]);
    assert_eq!(observed.containers["main"].pull_backoff, Backoff::default());
}

#[test]
fn crash_loop_back_off_ends_with_another_image() {
    let base = desired(vec![], vec![named("main")], "Always");
    let mut observed = Observed { initialized: true, ..ready() };
    exited(&mut observed, "main", 1);
    let start = Action::Start("main".to_owned());
    fold::begin(&base, &mut observed, &start, at(1));
    exited(&mut observed, "main", 1);
    let facts = observed.containers.get_mut("main").unwrap();
    facts.current.as_mut().and_then(|i| i.exit.as_mut()).unwrap().finished_at = Some(at(9));
    assert!(starts(&base, &observed).is_empty(), "ten seconds from the end of the second run");
    let mut container = named("main");
    container.image = Some("fixed".to_owned());
    let fixed = desired(vec![], vec![container], "Always");
    settle(&fixed, &mut observed, &BTreeSet::new(), at(10));
    assert_eq!(starts(&fixed, &observed), ["main"]);
}

#[test]
fn a_probes_own_grace_is_used() {
    let mut container = named("main");
    container.liveness_probe =
        Some(Probe { failure_threshold: Some(1), termination_grace_period_seconds: Some(3), ..Probe::default() });
    let desired = desired(vec![], vec![container], "Always");
    let mut observed = Observed { initialized: true, ..ready() };
    running(&mut observed, "main");
    let action = Action::Probe("main".to_owned(), ProbeKind::Liveness);
    let message = String::new();
    let outcome = crate::pod::effects::Outcome::Probed { began: at(20), success: Some(false), message };
    fold::outcome(&desired, &mut observed, &action, &outcome, at(20));
    settle(&desired, &mut observed, &BTreeSet::new(), at(20));
    let stop = observed.containers["main"].current.as_ref().unwrap().stop.as_ref().unwrap();
    assert_eq!(stop.deadline, at(23));
    assert_eq!(stop.message, "Container main failed liveness probe, will be restarted");
}

/// What is planned for a container with these hooks, in this state.
fn hooked(lifecycle: Lifecycle, post_started: bool, running: &BTreeSet<Action>) -> Vec<Action> {
    let desired = desired(vec![], vec![Container { lifecycle: Some(lifecycle), ..named("a") }, named("b")], "Always");
    let mut observed = Observed { initialized: true, ..ready() };
    self::running(&mut observed, "a");
    observed.containers.get_mut("a").and_then(|facts| facts.current.as_mut()).unwrap().post_started = post_started;
    plan(&desired, &observed, running, at(1)).actions
}

#[test]
fn the_next_container_waits_for_post_start() {
    let lifecycle = || Lifecycle { post_start: Some(LifecycleHandler::default()), ..Lifecycle::default() };
    let hook = Action::PostStart("a".to_owned());
    assert_eq!(hooked(lifecycle(), false, &BTreeSet::new()), std::slice::from_ref(&hook));
    assert!(hooked(lifecycle(), false, &BTreeSet::from([hook])).is_empty());
    assert_eq!(hooked(lifecycle(), true, &BTreeSet::new()), [Action::Start("b".to_owned())]);
}

#[test]
fn pre_stop_comes_before_the_stop_signal() {
    let lifecycle = Lifecycle { pre_stop: Some(LifecycleHandler::default()), ..Lifecycle::default() };
    let desired = desired(vec![], vec![Container { lifecycle: Some(lifecycle), ..named("main") }], "Always");
    let mut observed = Observed { initialized: true, ..ready() };
    running(&mut observed, "main");
    let instance = observed.containers.get_mut("main").unwrap().current.as_mut().unwrap();
    begin_stop(instance, at(0), at(30), String::new());
    let hook = Action::PreStop("main".to_owned());
    assert_eq!(plan(&desired, &observed, &BTreeSet::new(), at(0)).actions, std::slice::from_ref(&hook));
    assert!(plan(&desired, &observed, &BTreeSet::from([hook.clone()]), at(1)).actions.is_empty());
    fold::outcome(&desired, &mut observed, &hook, &crate::pod::effects::Outcome::Done, at(5));
    let next = plan(&desired, &observed, &BTreeSet::new(), at(5));
    assert_eq!((next.actions, next.wake_at), (vec![Action::Term("main".to_owned())], Some(at(30))));
}

#[test]
fn a_start_that_is_told_of_after_the_sandbox_is_lost_is_over() {
    let desired = desired(vec![named("init")], vec![named("main")], "Never");
    let late = |name: &str| {
        let mut observed = ready();
        fold::runtime_event(&desired, &mut observed, &RuntimeEvent::SandboxLost, at(1));
        let outcome = Outcome::Started(Box::new(instance(name, 0, at(0))));
        fold::outcome(&desired, &mut observed, &Action::Start(name.to_owned()), &outcome, at(2));
        observed
    };
    let observed = late("main");
    let exit = observed.containers["main"].current.as_ref().and_then(|instance| instance.exit.as_ref()).unwrap();
    assert_eq!((exit.reason.as_str(), exit.finished_at), ("ContainerStatusUnknown", Some(at(2))));
    assert!(!observed.initialized, "the next sandbox needs init containers");
    let observed = late("init");
    assert!(observed.containers["init"].current.is_none(), "the Pod would fail");
    assert!(observed.containers["init"].previous.is_some());
}
