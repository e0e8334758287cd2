use k8s_openapi::api::core::v1::{Container, ContainerResizePolicy, Pod, PodSpec};

use super::*;
use crate::pod::model::{ContainerFacts, Exit, Stop};
use crate::pod::plan::{self, plan as next};
use crate::pod::status::status as status_of;
use crate::pod::testing::{at, instance, ready};
use crate::resources::fixture::container;

const MIB: i64 = 1 << 20;

fn sized(name: &str, cpu: &str, restarts: bool) -> Container {
    let restart_policy = "RestartContainer".to_owned();
    let policy = ContainerResizePolicy { resource_name: "cpu".to_owned(), restart_policy };
    let full = [("cpu", cpu), ("memory", "1Mi")];
    Container {
        resize_policy: restarts.then(|| vec![policy]),
        image: Some("image".to_owned()),
        ..container(name, &full, &full)
    }
}

fn wanting(containers: Vec<Container>, generation: i64) -> Desired {
    let mut pod = Pod {
        spec: Some(PodSpec { containers, restart_policy: Some("Never".to_owned()), ..PodSpec::default() }),
        ..Pod::default()
    };
    pod.metadata.generation = Some(generation);
    pod.metadata.uid = Some("u".to_owned());
    Desired::new(Arc::new(pod))
}

fn running_instance(desired: &Desired, name: &str) -> Instance {
    let spec = desired.container(name).unwrap();
    let resources = Some(spec.size);
    Instance { resources, ..instance(&format!("{name}-0"), 0, at(0)) }
}

/// A Pod that runs with what `desired` wants.
fn running_pod(desired: &Desired) -> Observed {
    let resources = Resources::of(&desired.wanted);
    let mut observed = Observed { initialized: true, ..ready() };
    (observed.resize.allocated, observed.resize.actuated) = (Some(resources.clone()), Some(resources));
    for spec in desired.containers.iter() {
        let current = Some(running_instance(desired, spec.name()));
        let facts = ContainerFacts { current, next_attempt: 1, ..ContainerFacts::default() };
        observed.containers.insert(spec.name().to_owned(), facts);
    }
    observed
}

fn actions(desired: &Desired, observed: &mut Observed, now: Timestamp) -> Vec<Action> {
    plan::settle(desired, observed, &BTreeSet::new(), now);
    next(desired, observed, &BTreeSet::new(), now).actions
}

fn decide(desired: &Desired, observed: &mut Observed, verdict: Verdict, now: Timestamp) -> (Desired, Vec<Notice>) {
    let generation = desired.wanted.metadata.generation;
    let decision = Decision { wanted: Resources::of(&desired.wanted), generation, verdict };
    let notices = decided(desired, observed, &decision, now);
    (desired.with_allocation(observed.resize.allocated.as_ref()), notices)
}

/// A condition: type, reason, observedGeneration.
type Shown = (String, Option<String>, Option<i64>);

/// What the API shows of resizes, and the Pod's observedGeneration.
fn shown(desired: &Desired, observed: &Observed) -> (Vec<Shown>, Option<i64>) {
    let base = PodStatus { observed_generation: Some(1), ..PodStatus::default() };
    let status = status_of(desired, observed, &base, at(100));
    let of_resize = |c: &k8s_openapi::api::core::v1::PodCondition| c.type_.starts_with("PodResize");
    let conditions = status.conditions.unwrap().into_iter().filter(of_resize);
    (conditions.map(|c| (c.type_, c.reason, c.observed_generation)).collect(), status.observed_generation)
}

#[test]
fn a_change_is_allocated_then_actuated_then_forgotten() {
    let old = wanting(vec![sized("a", "1", false), sized("b", "1", false)], 1);
    let mut observed = running_pod(&old);
    assert_eq!(actions(&old, &mut observed, at(1)), []);
    let desired = wanting(vec![sized("a", "2", false), sized("b", "1", false)], 2)
        .with_allocation(observed.resize.allocated.as_ref());
    assert_eq!(Resources::of(&desired.pod), Resources::of(&old.pod), "it runs with what it had");
    assert_eq!(actions(&desired, &mut observed, at(2)), [Action::Allocate]);
    assert_eq!(shown(&desired, &observed), (vec![], Some(1)), "nothing is said before there is an answer");
    let (desired, notices) = decide(&desired, &mut observed, Verdict::Granted, at(3));
    assert_eq!(notices[0].reason, "ResizeStarted");
    assert_eq!(
        notices[0].message,
        "Pod resize started: {\"containers\":[{\"name\":\"a\",\"resources\":{\"limits\":{\"cpu\":\"2\",\"memory\":\"1Mi\"},\
         \"requests\":{\"cpu\":\"2\",\"memory\":\"1Mi\"}}},{\"name\":\"b\",\"resources\":{\"limits\":{\"cpu\":\"1\",\
         \"memory\":\"1Mi\"},\"requests\":{\"cpu\":\"1\",\"memory\":\"1Mi\"}}}],\"generation\":2}"
    );
    assert_eq!(actions(&desired, &mut observed, at(3)), [Action::Resize]);
    let in_progress = ("PodResizeInProgress".to_owned(), None, Some(2));
    assert_eq!(shown(&desired, &observed), (vec![in_progress], Some(2)));
    let changed = changes(&desired, &observed);
    assert_eq!(changed.iter().map(|(spec, ..)| spec.name()).collect::<Vec<_>>(), ["a"]);
    let wants = changed[0].3;
    let pod = Some(Resources::of(&desired.pod));
    let actuation = Actuation { pod, containers: vec![("a-0".to_owned(), wants)], ..Actuation::default() };
    assert_eq!(actuated(&desired, &mut observed, &actuation, at(4)), []);
    assert_eq!(actions(&desired, &mut observed, at(4)), []);
    assert_eq!(shown(&desired, &observed), (vec![], Some(2)));
}

#[test]
fn what_does_not_fit_waits_and_says_so_once() {
    let mut observed = running_pod(&wanting(vec![sized("a", "1", false)], 1));
    let desired = |cpu: &str, generation| {
        let allocated = observed.resize.allocated.clone();
        wanting(vec![sized("a", cpu, false)], generation).with_allocation(allocated.as_ref())
    };
    let (big, same) = (desired("8", 2), desired("1", 3));
    let deferred = || Verdict::Deferred("Node didn't have enough resource: cpu".to_owned());
    let (big, notices) = decide(&big, &mut observed, deferred(), at(1));
    assert_eq!((notices[0].reason.as_str(), notices[0].warning), ("ResizeDeferred", true));
    assert!(notices[0].message.contains("\"error\":\"Node didn't have enough resource: cpu\""), "{:?}", notices[0]);
    let pending = ("PodResizePending".to_owned(), Some("Deferred".to_owned()), Some(2));
    assert_eq!(shown(&big, &observed), (vec![pending], Some(2)));
    assert_eq!(actions(&big, &mut observed, at(2)), [], "nothing is tried without room");
    room(&mut observed, at(3));
    assert_eq!(actions(&big, &mut observed, at(3)), [Action::Allocate]);
    let (big, notices) = decide(&big, &mut observed, deferred(), at(3));
    assert_eq!(notices, [], "it was told before");
    assert_eq!(observed.resize.pending.as_ref().unwrap().since, at(1));
    assert_eq!(actions(&big, &mut observed, at(3 + 180)), [Action::Allocate]);
    // taken back
    assert_eq!(actions(&same, &mut observed, at(10)), []);
    assert_eq!(shown(&same, &observed), (vec![], Some(3)));
}

#[test]
fn what_can_never_be_is_not_tried_again() {
    let mut observed = running_pod(&wanting(vec![sized("a", "1", false)], 1));
    let desired = wanting(vec![sized("a", "2", false)], 2).with_allocation(observed.resize.allocated.as_ref());
    let (desired, notices) = decide(&desired, &mut observed, Verdict::Infeasible("swap".to_owned()), at(1));
    assert_eq!(notices[0].reason, "ResizeInfeasible");
    room(&mut observed, at(2));
    assert_eq!(actions(&desired, &mut observed, at(2_000)), []);
    let other = wanting(vec![sized("a", "3", false)], 3).with_allocation(observed.resize.allocated.as_ref());
    assert_eq!(actions(&other, &mut observed, at(2_000)), [Action::Allocate], "another wish is another question");
}

#[test]
fn a_failure_is_shown_and_tried_again_and_does_not_keep_containers_from_starting() {
    let mut observed = running_pod(&wanting(vec![sized("a", "1", false)], 1));
    let desired = wanting(vec![sized("a", "2", false)], 2).with_allocation(observed.resize.allocated.as_ref());
    let (desired, _) = decide(&desired, &mut observed, Verdict::Granted, at(1));
    let failed = Actuation { error: Some("below current usage".to_owned()), ..Actuation::default() };
    assert_eq!(actuated(&desired, &mut observed, &failed, at(2))[0].reason, "ResizeError");
    assert_eq!(actuated(&desired, &mut observed, &failed, at(2)), [], "it was told before");
    let error = ("PodResizeInProgress".to_owned(), Some("Error".to_owned()), Some(2));
    assert_eq!(shown(&desired, &observed), (vec![error], Some(2)));
    assert_eq!(actions(&desired, &mut observed, at(3)), []);
    assert_eq!(actions(&desired, &mut observed, at(12)), [Action::Resize]);
    // back to what it has: nothing has to be done
    let back = wanting(vec![sized("a", "1", false)], 3).with_allocation(observed.resize.allocated.as_ref());
    let (back, _) = decide(&back, &mut observed, Verdict::Granted, at(13));
    assert_eq!(actions(&back, &mut observed, at(13)), []);
    assert_eq!(shown(&back, &observed), (vec![], Some(3)));
}

#[test]
fn a_container_is_started_anew_if_its_policy_says_so() {
    let mut observed = running_pod(&wanting(vec![sized("a", "1", true), sized("b", "1", false)], 1));
    let desired = wanting(vec![sized("a", "500m", true), sized("b", "1", false)], 2)
        .with_allocation(observed.resize.allocated.as_ref());
    let (desired, _) = decide(&desired, &mut observed, Verdict::Granted, at(1));
    assert_eq!(actions(&desired, &mut observed, at(1)), [Action::Term("a".to_owned())]);
    let instance = observed.containers.get_mut("a").and_then(|facts| facts.current.as_mut()).unwrap();
    let Some(Stop { message, restart: true, .. }) = &instance.stop else { panic!("{:?}", instance.stop) };
    assert_eq!(message, "Container a resize requires restart");
    instance.exit = Some(Exit {
        id: "a-0".to_owned(),
        code: 0,
        signal: 0,
        reason: "Completed".to_owned(),
        message: String::new(),
        started_at: Some(at(0)),
        finished_at: Some(at(2)),
    });
    // the Pod's cgroup first: what starts must fit into it. The restart policy "Never" is no obstacle
    assert_eq!(actions(&desired, &mut observed, at(2)), [Action::Resize]);
    assert_eq!(observed.containers["a"].restart_count(), 0);
    assert_eq!(status_of(&desired, &observed, &PodStatus::default(), at(2)).phase.as_deref(), Some("Running"));
    let actuation = Actuation { pod: Some(Resources::of(&desired.pod)), ..Actuation::default() };
    actuated(&desired, &mut observed, &actuation, at(3));
    assert_eq!(actions(&desired, &mut observed, at(3)), [Action::Start("a".to_owned())]);
    assert_eq!(shown(&desired, &observed).0.len(), 1, "it is not done before the container runs");
    let next = Instance { id: "a-1".to_owned(), attempt: 1, ..running_instance(&desired, "a") };
    let started = crate::pod::effects::Outcome::Started(Box::new(next));
    crate::pod::fold::outcome(&desired, &mut observed, &Action::Start("a".to_owned()), &started, at(4));
    assert_eq!(actions(&desired, &mut observed, at(4)), []);
    assert_eq!((observed.containers["a"].restart_count(), shown(&desired, &observed)), (1, (vec![], Some(2))));
}

#[test]
fn the_pod_as_a_whole_is_resized_and_with_it_containers_without_limits() {
    let of_pod = |memory: &str, generation| {
        let plain = Container { image: Some("image".to_owned()), ..container("a", &[], &[]) };
        let mut pod = (*wanting(vec![plain], generation).pod).clone();
        pod.spec.as_mut().unwrap().resources = container("", &[("cpu", "1")], &[("memory", memory)]).resources;
        Desired::new(Arc::new(pod))
    };
    let mut observed = running_pod(&of_pod("64Mi", 1));
    let desired = of_pod("32Mi", 2).with_allocation(observed.resize.allocated.as_ref());
    assert_eq!(actions(&desired, &mut observed, at(1)), [Action::Allocate]);
    let (desired, _) = decide(&desired, &mut observed, Verdict::Granted, at(1));
    let changed = changes(&desired, &observed);
    assert_eq!((changed[0].2.memory_limit, changed[0].3.memory_limit), (64 * MIB, 32 * MIB));
}

#[test]
fn a_machine_that_was_restarted_knows_what_was_set_aside_while_a_change_waits() {
    let old = wanting(vec![sized("a", "1", false)], 1);
    let mut observed = running_pod(&old);
    let desired = wanting(vec![sized("a", "8", false)], 2).with_allocation(observed.resize.allocated.as_ref());
    let (desired, _) = decide(&desired, &mut observed, Verdict::Deferred("no room".to_owned()), at(1));
    let known = status_of(&desired, &observed, &PodStatus::default(), at(2));
    let fresh = Desired::new(desired.wanted.clone());
    assert!(from_status(&fresh, &known).unwrap().same(&Resources::of(&old.pod)));
    assert_eq!(from_status(&fresh, &PodStatus::default()), None);
}

#[test]
fn what_a_killed_agent_may_have_written_is_written_again() {
    let old = wanting(vec![sized("a", "1", false)], 1);
    let mut observed = running_pod(&old);
    let (granted, _) = decide(&wanting(vec![sized("a", "3", false)], 2), &mut observed, Verdict::Granted, at(1));
    assert_eq!(actions(&granted, &mut observed, at(1)), [Action::Resize]);
    crate::pod::fold::begin(&granted, &mut observed, &Action::Resize, at(1));
    // the agent is killed, and the old resources are wanted again
    let (back, _) = decide(&wanting(vec![sized("a", "1", false)], 3), &mut observed, Verdict::Granted, at(2));
    assert_eq!(actions(&back, &mut observed, at(2)), [Action::Resize], "the record says 1, the kernel may have 3");
    let has = changes(&back, &observed)[0].3;
    let done = Actuation {
        pod: Some(Resources::of(&back.pod)),
        containers: vec![("a-0".to_owned(), has)],
        ..Actuation::default()
    };
    actuated(&back, &mut observed, &done, at(3));
    assert!(actions(&back, &mut observed, at(3)).is_empty());
    assert!(observed.resize.progress.is_none());
}
