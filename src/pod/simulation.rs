//! The real worker on a virtual clock, with a runtime and an API server that fail, stall and crash the agent.
//!
//! Every history comes from a seed that is printed when a property breaks; `GANTRY_SIM_SEED` replays one.

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    Container, ContainerResizePolicy, ContainerRestartRule, ContainerRestartRuleOnExitCodes, Lifecycle,
    LifecycleHandler, Pod, PodSpec, PodStatus, Probe, ResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::effects::{ApiAnswer, Effects, Failure, Outcome, Request, RuntimeEvent};
use super::fold::{self, Found};
use super::model::{Admission, Desired, Exit, Instance, Observed};
use super::plan::Action;
use super::resize::{self, Actuation, Decision, Verdict};
use super::resources::{CpuMemory, Resources};
use super::worker::{Message, Worker};

const EPOCH: i64 = 1_800_000_000;

/// One Pod's world: what is really on the node and in the API server, whatever the agent believes.
struct World {
    seed: u64,
    origin: Instant,
    state: Mutex<State>,
}

struct State {
    rng: Rng,
    life: u32,
    record: Option<Observed>,
    containers: Vec<Fake>,
    worker: Option<mpsc::Sender<Message>>,
    pod: Option<Pod>,
    version: u64,
    sandbox: bool,
    torn_down: bool,
    crashes: BTreeMap<String, Vec<(Timestamp, Timestamp)>>,
    /// Steps that workers took, in all lives.
    steps: u64,
    lost: bool,
    /// What the kernel has for each instance's cgroup.
    sizes: BTreeMap<String, CpuMemory>,
    resized_at: Timestamp,
    deferrals: u32,
    over: bool,
}

struct Fake {
    name: String,
    instance: Instance,
    ignores_term: bool,
    termed_at: Option<Timestamp>,
}

impl World {
    fn now(&self) -> Timestamp {
        let elapsed = i64::try_from(self.origin.elapsed().as_millis()).unwrap();
        Timestamp::from_second(EPOCH).unwrap() + SignedDuration::from_millis(elapsed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    #[track_caller]
    fn check(&self, holds: bool, property: &str) {
        assert!(holds, "seed {}: {property}", self.seed);
    }

    /// The container's process ends, once.
    fn end(self: &Arc<Self>, id: &str, code: i32, signal: i32) {
        let now = self.now();
        let (exit, worker) = {
            let mut state = self.state();
            let Some(fake) = state.containers.iter_mut().find(|c| c.instance.id == id) else { return };
            if fake.instance.exit.is_some() {
                return;
            }
            let exit = Exit {
                id: id.to_owned(),
                code,
                signal,
                reason: if code == 0 { "Completed" } else { "Error" }.to_owned(),
                message: String::new(),
                started_at: fake.instance.started_at,
                finished_at: Some(now),
            };
            fake.instance.exit = Some(exit.clone());
            (exit, state.worker.clone())
        };
        if let Some(worker) = worker {
            // the worker of a dead life does not read: its successor finds the exit on disk
            let _ = worker.try_send(Message::Runtime(RuntimeEvent::Exited(exit)));
        }
    }
}

/// One life of the agent.
struct Life {
    world: Arc<World>,
    number: u32,
}

impl Life {
    async fn alive(&self) {
        if self.world.state().life != self.number {
            pending::<()>().await;
        }
    }

    /// A step of the world that takes a while and may be cut short by a crash.
    async fn step(&self, longest_ms: u64) {
        let ms = self.world.state().rng.u64(0..=longest_ms);
        sleep(Duration::from_millis(ms)).await;
        self.alive().await;
    }

    fn chance(&self, percent: u32) -> bool {
        self.world.state().rng.u32(0..100) < percent
    }

    async fn start(&self, request: &Request, name: &str) -> Outcome {
        let pull_ms = if self.chance(20) { 30_000 } else { 400 };
        tokio::select! {
            () = self.step(pull_ms) => {}
            () = request.cancel.cancelled() => return Outcome::Cancelled,
        }
        if self.chance(8) {
            return Outcome::Failed(Failure::new("ErrImagePull", "no such image"));
        }
        if self.chance(4) {
            return Outcome::Failed(Failure::new("CreateContainerConfigError", "configmap \"x\" not found"));
        }
        let world = &self.world;
        let facts = request.observed.containers.get(name).cloned().unwrap_or_default();
        let mut instance = Instance {
            id: format!("{:016x}", world.state().rng.u64(..)),
            attempt: facts.next_attempt,
            requested_image: "image".to_owned(),
            image: "image".to_owned(),
            image_id: "image@sha256:0".to_owned(),
            started_at: None,
            post_started: false,
            stop: None,
            exit: None,
            user: None,
            resources: request.desired.container(name).map(|c| CpuMemory::of(&request.desired.pod, &c.container)),
        };
        world.state().sizes.insert(instance.id.clone(), instance.resources.unwrap());
        // as the node does: what an interrupted life created and never started goes first
        {
            let mut state = world.state();
            state.containers.retain(|c| c.name != name || c.instance.started_at.is_some());
            let ignores_term = state.rng.u8(0..4) == 0;
            let fake = Fake { name: name.to_owned(), instance: instance.clone(), ignores_term, termed_at: None };
            state.containers.push(fake);
        }
        self.step(30).await;
        if self.chance(3) {
            let exit = Exit {
                id: instance.id.clone(),
                code: 128,
                signal: 0,
                reason: "StartError".to_owned(),
                message: "no such file".to_owned(),
                started_at: None,
                finished_at: Some(world.now()),
            };
            instance.exit = Some(exit);
            let mut state = world.state();
            if let Some(fake) = state.containers.iter_mut().find(|c| c.instance.id == instance.id) {
                fake.instance = instance.clone();
            }
            return Outcome::StartError(Box::new(instance));
        }
        let now = world.now();
        instance.started_at = Some(now);
        let (code, seconds) = {
            let mut state = world.state();
            if state.lost && !state.sandbox {
                state.containers.retain(|c| c.instance.id != instance.id);
                return Outcome::Failed(Failure::new("CreateContainerError", "the shim is gone"));
            }
            let twice = state
                .containers
                .iter()
                .any(|c| c.name == name && c.instance.started_at.is_some() && c.instance.exit.is_none());
            assert!(!twice, "seed {}: {name} runs twice", world.seed);
            assert!(state.sandbox && !state.torn_down, "seed {}: start without a sandbox", world.seed);
            let exits: Vec<_> = state
                .containers
                .iter()
                .filter(|c| c.name == name)
                .filter_map(|c| c.instance.exit.as_ref()?.finished_at)
                .collect();
            // one that the node stopped to start it anew is no crash
            if let Some(finished) = exits.last().filter(|_| facts.current.is_some()) {
                state.crashes.entry(name.to_owned()).or_default().push((*finished, now));
            }
            if let Some(fake) = state.containers.iter_mut().find(|c| c.instance.id == instance.id) {
                fake.instance.started_at = Some(now);
            }
            let init = name.starts_with("init");
            let code = *[0, 0, 1, 3].get(state.rng.usize(0..4)).unwrap();
            let long = !init && state.rng.u8(0..3) == 0;
            let seconds = if long { state.rng.u64(100..1500) } else { state.rng.u64(0..20) };
            (code, seconds)
        };
        let (world, id) = (self.world.clone(), instance.id.clone());
        tokio::spawn(async move {
            sleep(Duration::from_secs(seconds)).await;
            world.end(&id, code, 0);
        });
        self.step(20).await;
        Outcome::Started(Box::new(instance))
    }

    /// There is no room now and then, but not for ever.
    async fn allocate(&self, request: &Request) -> Outcome {
        self.step(30).await;
        let mut state = self.world.state();
        let verdict = if state.deferrals < 2 && state.rng.u8(0..5) == 0 {
            state.deferrals += 1;
            Verdict::Deferred("no room".to_owned())
        } else {
            Verdict::Granted
        };
        let wanted = &request.desired.wanted;
        let generation = wanted.metadata.generation;
        Outcome::Allocated(Box::new(Decision { wanted: Resources::of(wanted), generation, verdict }))
    }

    /// Container by container; it may fail, or the agent may die, after any of them.
    async fn resize(&self, request: &Request) -> Outcome {
        let mut actuation = Actuation::default();
        for (_, instance, _, wants) in resize::changes(&request.desired, &request.observed) {
            self.step(20).await;
            if self.chance(15) {
                actuation.error = Some("cannot decrease memory limits".to_owned());
                return Outcome::Resized(Box::new(actuation));
            }
            self.world.state().sizes.insert(instance.id.clone(), wants);
            actuation.containers.push((instance.id.clone(), wants));
        }
        self.step(20).await;
        actuation.pod = Some(Resources::of(&request.desired.pod));
        Outcome::Resized(Box::new(actuation))
    }

    fn signal(&self, request: &Request, name: &str, kill: bool) -> Outcome {
        let world = self.world.clone();
        let Some(id) = request.observed.containers.get(name).and_then(|f| f.current.as_ref()).map(|i| i.id.clone())
        else {
            return Outcome::Done;
        };
        let now = world.now();
        let (ignores, delay) = {
            let mut state = world.state();
            let delay = state.rng.u64(0..3000);
            let Some(fake) = state.containers.iter_mut().find(|c| c.instance.id == id) else { return Outcome::Done };
            if kill && fake.instance.exit.is_none() {
                let stop = request.observed.containers[name].current.as_ref().and_then(|i| i.stop.clone()).unwrap();
                let late = now.duration_since(stop.deadline);
                assert!(
                    late >= SignedDuration::ZERO && late < SignedDuration::from_secs(1),
                    "seed {}: {name} killed {late} after its deadline",
                    world.seed
                );
            } else if !kill {
                fake.termed_at.get_or_insert(now);
            }
            (fake.ignores_term, delay)
        };
        if kill {
            world.end(&id, 137, 9);
        } else if !ignores {
            tokio::spawn(async move {
                sleep(Duration::from_millis(delay)).await;
                world.end(&id, 143, 15);
            });
        }
        Outcome::Done
    }
}

impl Effects for Life {
    async fn perform(&self, request: Request) -> Outcome {
        self.alive().await;
        let flaky = |life: &Life, reason: &str| {
            life.chance(10).then(|| Outcome::Failed(Failure::new(reason, "the world is not ready")))
        };
        match &request.action {
            Action::Admit => Outcome::Admitted(Admission::Admitted),
            Action::MountVolumes => {
                self.step(200).await;
                flaky(self, "FailedMount").unwrap_or(Outcome::Done)
            }
            Action::SetUpSandbox => {
                self.step(100).await;
                if let Some(failed) = flaky(self, "FailedCreatePodSandBox") {
                    return failed;
                }
                self.world.state().sandbox = true;
                Outcome::SandboxUp { pod_ips: vec!["10.0.0.2".to_owned()], enforced: None }
            }
            Action::Allocate => self.allocate(&request).await,
            Action::Resize => self.resize(&request).await,
            Action::ClearSandbox => {
                if let Some(failed) = flaky(self, "FailedKillPod") {
                    return failed;
                }
                self.world.state().sandbox = false;
                Outcome::Done
            }
            Action::Start(name) => self.start(&request, name).await,
            Action::PostStart(_) | Action::PreStop(_) => {
                tokio::select! {
                    () = self.step(40_000) => {}
                    () = request.cancel.cancelled() => return Outcome::Cancelled,
                }
                let reason = if matches!(request.action, Action::PostStart(_)) {
                    "FailedPostStartHook"
                } else {
                    "FailedPreStopHook"
                };
                flaky(self, reason).unwrap_or(Outcome::Done)
            }
            Action::Term(name) => self.signal(&request, name, false),
            Action::Kill(name) => flaky(self, "FailedKillPod").unwrap_or_else(|| self.signal(&request, name, true)),
            Action::Probe(..) => {
                let began = self.world.now();
                self.step(900).await;
                let success =
                    [Some(true), Some(true), Some(true), Some(false), None][self.world.state().rng.usize(0..5)];
                Outcome::Probed { began, success, message: "probe".to_owned() }
            }
            Action::TearDown => {
                self.step(500).await;
                if let Some(failed) = flaky(self, "FailedKillPod") {
                    return failed;
                }
                let mut state = self.world.state();
                let left =
                    state.containers.iter().any(|c| c.instance.started_at.is_some() && c.instance.exit.is_none());
                assert!(!left, "seed {}: torn down while a container runs", self.world.seed);
                state.torn_down = true;
                state.sandbox = false;
                Outcome::Done
            }
        }
    }

    fn save(&self, _: &Desired, observed: &Observed) {
        let mut state = self.world.state();
        if state.life == self.number {
            state.record = Some(observed.clone());
        }
    }

    async fn report(&self, _: Arc<Desired>, _: PodStatus, status: PodStatus) -> ApiAnswer {
        self.step(50).await;
        if self.chance(10) {
            return ApiAnswer::Failed("connection refused".to_owned());
        }
        let answer = {
            let mut state = self.world.state();
            state.version += 1;
            let version = state.version.to_string();
            let Some(pod) = state.pod.as_mut() else { return ApiAnswer::Gone };
            let old = pod.status.replace(status.clone()).unwrap_or_default();
            pod.metadata.resource_version = Some(version.clone());
            check_transition(self.world.seed, &old, &status);
            check_sizes(self.world.seed, &state, &status);
            ApiAnswer::Accepted { status: Box::new(status), resource_version: Some(version) }
        };
        // the answer may be lost on its way although the server has it
        self.step(20).await;
        if self.chance(5) { ApiAnswer::Failed("timeout".to_owned()) } else { answer }
    }

    async fn delete(&self, _: Arc<Desired>) -> ApiAnswer {
        self.step(50).await;
        let mut state = self.world.state();
        let phase = state.pod.as_ref().and_then(|p| p.status.as_ref()).and_then(|s| s.phase.clone());
        self.world.check(
            matches!(phase.as_deref(), None | Some("Succeeded" | "Failed")),
            "deleted before the terminal phase was reported",
        );
        state.pod = None;
        if let Some(worker) = &state.worker {
            let _ = worker.try_send(Message::Removed);
        }
        ApiAnswer::Gone
    }

    async fn forget(&self, _: Arc<Desired>) {
        self.alive().await;
        self.world.state().over = true;
    }

    fn publish(&self, _: &Arc<Desired>, _: &Arc<Observed>, _: &PodStatus) {
        let passed = self.world.origin.elapsed().as_secs();
        let mut state = self.world.state();
        state.steps += 1;
        // probes every two seconds, hooks, reports and restarts come to a few steps a second
        let most = 2_000 + 40 * passed;
        assert!(state.steps <= most, "seed {}: the worker spins: {:?}", self.world.seed, state.record);
    }

    fn event(&self, _: &Desired, _: bool, _: &str, _: &str, _: Option<String>) {}

    fn now(&self) -> Timestamp {
        self.world.now()
    }

    fn sleep_until(&self, at: Timestamp) -> impl Future<Output = ()> + Send {
        let wait = at.duration_since(self.world.now());
        sleep(Duration::try_from(wait).unwrap_or_default())
    }

    fn host_ips(&self) -> Vec<String> {
        vec!["192.0.2.1".to_owned()]
    }
}

/// A status of the newest generation without a word on a resize means that every container has what is wanted.
fn check_sizes(seed: u64, state: &State, status: &PodStatus) {
    let Some(pod) = &state.pod else { return };
    let ending = pod.metadata.deletion_timestamp.is_some()
        || state.record.as_ref().is_none_or(|r| r.termination.is_some() || r.final_phase.is_some());
    let resizes = [resize::status::PENDING, resize::status::IN_PROGRESS];
    let told = status.conditions.iter().flatten().any(|c| resizes.contains(&&*c.type_));
    if ending || told || status.observed_generation != pod.metadata.generation {
        return;
    }
    for (name, has, wants) in sizes(state, pod) {
        assert!(has == wants, "seed {seed}: {name} has {has:?} instead of {wants:?}, and the status says nothing");
    }
}

/// Running containers with what they have and what is wanted for them.
fn sizes<'a>(state: &'a State, pod: &Pod) -> Vec<(&'a str, CpuMemory, CpuMemory)> {
    let desired = Desired::new(Arc::new(pod.clone()));
    let running = state.containers.iter().filter(|c| c.instance.started_at.is_some() && c.instance.exit.is_none());
    let sized = running.filter_map(|c| {
        let wants = CpuMemory::of(pod, &desired.container(&c.name)?.container);
        Some((c.name.as_str(), state.sizes[&c.instance.id], wants))
    });
    sized.collect()
}

/// Somebody patches the `resize` subresource.
fn request_resize(world: &Arc<World>) {
    let now = world.now();
    let mut state = world.state();
    state.version += 1;
    let (version, cpu, which) = (state.version.to_string(), state.rng.u32(1..9) * 100, state.rng.usize(0..8));
    let Some(pod) = state.pod.as_mut().filter(|pod| pod.metadata.deletion_timestamp.is_none()) else { return };
    let spec = pod.spec.as_mut().unwrap();
    let mut containers: Vec<_> = spec.init_containers.iter_mut().flatten().chain(&mut spec.containers).collect();
    let index = which % containers.len();
    containers[index].resources = Some(cpu_request(cpu));
    pod.metadata.generation = pod.metadata.generation.map(|generation| generation + 1);
    pod.metadata.resource_version = Some(version);
    let desired = Desired::new(Arc::new(pod.clone()));
    state.resized_at = now;
    if let Some(worker) = &state.worker {
        let _ = worker.try_send(Message::Desired(Box::new(desired)));
    }
}

fn cpu_request(milli: u32) -> ResourceRequirements {
    let requests = [("cpu".to_owned(), Quantity(format!("{milli}m")))].into();
    ResourceRequirements { requests: Some(requests), ..ResourceRequirements::default() }
}

fn check_transition(seed: u64, old: &PodStatus, new: &PodStatus) {
    let terminal = |s: &PodStatus| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"));
    assert!(!terminal(old) || old.phase == new.phase, "seed {seed}: left phase {:?} for {:?}", old.phase, new.phase);
    let ready = |s: &PodStatus| s.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    assert!(!(terminal(new) && ready(new)), "seed {seed}: terminal and ready");
    for before in old.container_statuses.iter().flatten() {
        let after = new.container_statuses.iter().flatten().find(|c| c.name == before.name);
        let after = after.unwrap_or_else(|| panic!("seed {seed}: no status for {}", before.name));
        assert!(after.restart_count >= before.restart_count, "seed {seed}: restart count of {} fell", before.name);
    }
    assert!(old.start_time.is_none() || old.start_time == new.start_time, "seed {seed}: start time changed");
}

fn generate(rng: &mut Rng) -> Pod {
    let probe = |rng: &mut Rng| {
        rng.bool().then(|| Probe {
            period_seconds: Some(rng.i32(5..40)),
            failure_threshold: Some(rng.i32(1..4)),
            initial_delay_seconds: Some(rng.i32(0..5)),
            ..Probe::default()
        })
    };
    let container = |rng: &mut Rng, name: String| {
        let hook = |rng: &mut Rng| (rng.u8(0..5) == 0).then(LifecycleHandler::default);
        Container {
            name,
            image: Some("image".to_owned()),
            liveness_probe: probe(rng),
            readiness_probe: probe(rng),
            startup_probe: (rng.u8(0..4) == 0).then(|| probe(rng)).flatten(),
            lifecycle: Some(Lifecycle { post_start: hook(rng), pre_stop: hook(rng), stop_signal: None }),
            resources: Some(cpu_request(100)),
            resize_policy: (rng.u8(0..4) == 0).then(|| {
                let restart_policy = "RestartContainer".to_owned();
                vec![ContainerResizePolicy { resource_name: "cpu".to_owned(), restart_policy }]
            }),
            ..Container::default()
        }
    };
    let mut init = Vec::new();
    for i in 0..rng.usize(0..3) {
        let sidecar = rng.bool();
        let name = if sidecar { format!("sidecar{i}") } else { format!("init{i}") };
        let mut one = container(rng, name);
        if sidecar {
            one.restart_policy = Some("Always".to_owned());
        } else {
            (one.liveness_probe, one.readiness_probe, one.startup_probe, one.lifecycle) = (None, None, None, None);
            one.resize_policy = None;
        }
        init.push(one);
    }
    let mut main: Vec<_> = (0..rng.usize(1..4)).map(|i| container(rng, format!("main{i}"))).collect();
    if rng.u8(0..5) == 0 {
        let exit_codes = ContainerRestartRuleOnExitCodes { operator: "In".to_owned(), values: Some(vec![3]) };
        let rule = ContainerRestartRule { action: "RestartAllContainers".to_owned(), exit_codes: Some(exit_codes) };
        main[0].restart_policy_rules = Some(vec![rule]);
    }
    let policy = ["Always", "OnFailure", "Never"][rng.usize(0..3)];
    Pod {
        metadata: ObjectMeta {
            name: Some("pod".to_owned()),
            namespace: Some("default".to_owned()),
            uid: Some("uid".to_owned()),
            resource_version: Some("1".to_owned()),
            generation: Some(1),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            init_containers: Some(init),
            containers: main,
            restart_policy: Some(policy.to_owned()),
            termination_grace_period_seconds: Some(rng.i64(0..60)),
            active_deadline_seconds: (rng.u8(0..6) == 0).then(|| rng.i64(1..1000)),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// Lives one history: the Pod starts, the agent crashes now and then, the Pod is deleted, and in the end it is gone.
async fn live(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let pod = generate(&mut rng);
    let restarts_all = super::rules::could_restart_all(&Desired::new(Arc::new(pod.clone())));
    let crash_every = [0_u64, 4, 30, 300][rng.usize(0..4)];
    // some are long enough for delays to reach their maximum and to be reset; frequent crashes come in short ones, so
    // that no seed costs much more than another
    let longest = match crash_every {
        4 => 40,
        _ if rng.u8(0..30) == 0 => 1_500,
        _ => 100,
    };
    let delete_after = rng.u64(0..longest);
    let shorten = rng.u8(0..4) == 0;
    let resizes = rng.u8(0..2) == 0;
    let world = Arc::new(World {
        seed,
        origin: Instant::now(),
        state: Mutex::new(State {
            rng: rng.fork(),
            life: 0,
            record: None,
            containers: Vec::new(),
            worker: None,
            pod: Some(pod),
            version: 1,
            sandbox: false,
            torn_down: false,
            crashes: BTreeMap::new(),
            steps: 0,
            lost: false,
            sizes: BTreeMap::new(),
            resized_at: Timestamp::UNIX_EPOCH,
            deferrals: 0,
            over: false,
        }),
    });
    begin_life(&world);
    let deadline = world.origin + Duration::from_secs(delete_after);
    let mut shortened = false;
    let limit = world.origin + Duration::from_secs(delete_after + 3_600);
    loop {
        let pause = if crash_every == 0 { 30_000 } else { rng.u64(1..=crash_every * 1000) };
        sleep(Duration::from_millis(pause)).await;
        if world.state().over {
            break;
        }
        if Instant::now() >= limit {
            let state = world.state();
            panic!("seed {seed}: a deleted Pod does not end: {:?} {:?}", state.record, state.pod);
        }
        // the agent dies for a while, but not for ever: grace is judged from when it looks
        let quiet = Instant::now() > deadline;
        if crash_every != 0 && !(quiet && rng.bool()) {
            begin_life(&world);
        }
        if !world.state().lost && rng.u8(0..20) == 0 {
            lose_sandbox(&world);
        }
        // the first third is for changes: by the end they are through
        if resizes && world.origin.elapsed() < Duration::from_secs(delete_after / 3) && rng.u8(0..3) == 0 {
            request_resize(&world);
        }
        if quiet {
            check_settled(&world, crash_every);
            let grace = world.state().pod.as_ref().and_then(|p| p.spec.as_ref()?.termination_grace_period_seconds);
            let grace = if shortened || shorten { 1 } else { grace.unwrap_or(30) };
            shortened |= shorten;
            request_deletion(&world, grace);
        }
    }
    let state = world.state();
    world.check(
        state.containers.iter().all(|c| c.instance.started_at.is_none() || c.instance.exit.is_some()),
        "a container outlived its Pod",
    );
    world.check(!state.sandbox, "the sandbox outlived the Pod");
    // who is restarted with all others waits for the one that was the cause, and has no table of its own
    for (name, restarts) in state.crashes.iter().filter(|_| !restarts_all) {
        check_back_off(seed, name, restarts);
    }
}

/// Without crashes, what was wanted ten minutes ago has come about.
fn check_settled(world: &Arc<World>, crash_every: u64) {
    let state = world.state();
    let Some(pod) = state.pod.as_ref().filter(|pod| pod.metadata.deletion_timestamp.is_none()) else { return };
    let ending = state.record.as_ref().is_none_or(|r| r.termination.is_some() || r.final_phase.is_some());
    if crash_every != 0 || ending || world.now().duration_since(state.resized_at) < SignedDuration::from_mins(10) {
        return;
    }
    let termed = |name: &str| state.containers.iter().any(|c| c.name == name && c.termed_at.is_some());
    for (name, has, wants) in sizes(&state, pod).into_iter().filter(|(name, ..)| !termed(name)) {
        assert!(has == wants, "seed {}: {name} has {has:?} instead of {wants:?} for ten minutes", world.seed);
    }
}

/// Restarts of one container, each as (end of the run before, start): no sooner than the table allows.
fn check_back_off(seed: u64, name: &str, restarts: &[(Timestamp, Timestamp)]) {
    let mut delay = 0;
    let mut last: Option<Timestamp> = None;
    for (finished, started) in restarts {
        if last.is_some_and(|last| finished.duration_since(last).as_secs() >= 600) {
            delay = 0;
        }
        let waited = started.duration_since(*finished).as_secs_f64();
        assert!(
            waited + 0.001 >= f64::from(delay),
            "seed {seed}: {name} restarted after {waited} s instead of {delay} s"
        );
        delay = if delay == 0 { 10 } else { (delay * 2).min(300) };
        // the table is entered when a try begins, which pulls may keep from being a start for long
        last = Some(*finished);
    }
}

/// The shim is killed, once in a history, and every container with it.
fn lose_sandbox(world: &World) {
    let now = world.now();
    let mut state = world.state();
    state.lost = true;
    if !std::mem::take(&mut state.sandbox) {
        return;
    }
    for fake in &mut state.containers {
        if fake.instance.started_at.is_some() && fake.instance.exit.is_none() {
            let exit = fold::lost(fake.instance.id.clone(), fake.instance.started_at);
            fake.instance.exit = Some(Exit { finished_at: Some(now), ..exit });
        }
    }
    if let Some(worker) = &state.worker {
        let _ = worker.try_send(Message::Runtime(RuntimeEvent::SandboxLost));
    }
}

fn request_deletion(world: &Arc<World>, grace: i64) {
    let now = world.now();
    let mut state = world.state();
    state.version += 1;
    let version = state.version.to_string();
    let Some(pod) = state.pod.as_mut() else { return };
    if pod.metadata.deletion_grace_period_seconds.is_some_and(|old| old <= grace) {
        return;
    }
    pod.metadata.deletion_timestamp = Some(Time(now + SignedDuration::from_secs(grace)));
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    pod.metadata.resource_version = Some(version);
    let desired = Desired::new(Arc::new(pod.clone()));
    if let Some(worker) = &state.worker {
        let _ = worker.try_send(Message::Desired(Box::new(desired)));
    }
}

/// The agent starts (again): whatever an earlier life was doing is cut off where it is.
fn begin_life(world: &Arc<World>) {
    let now = world.now();
    let mut state = world.state();
    state.life += 1;
    let life = Arc::new(Life { world: world.clone(), number: state.life });
    let gone = state.pod.is_none();
    let pod = state.pod.clone().unwrap_or_else(|| Pod {
        metadata: ObjectMeta { uid: Some("uid".to_owned()), ..ObjectMeta::default() },
        spec: Some(PodSpec::default()),
        status: None,
    });
    let desired = Desired::new(Arc::new(pod));
    let record = state.record.as_ref().map(|record| {
        // through the file format, as on a real node
        let text = serde_json::to_string(record).unwrap();
        let mut record: Observed = serde_json::from_str(&text).unwrap();
        let found: Vec<Found> =
            state.containers.iter().map(|c| Found { name: c.name.clone(), instance: c.instance.clone() }).collect();
        fold::adopt(&desired, &mut record, &found, state.sandbox, now);
        record
    });
    let (worker, sender) = Worker::new(life, desired, record);
    if gone {
        sender.try_send(Message::Removed).unwrap();
    }
    if let Some(old) = state.worker.replace(sender) {
        let _ = old.try_send(Message::Detach);
    }
    drop(state);
    tokio::spawn(worker.run());
}

#[test]
fn ten_thousand_histories() {
    let base = match std::env::var("GANTRY_SIM_SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            run(seed..seed + 1);
            return;
        }
        Err(_) => fastrand::u64(..) >> 16,
    };
    println!("simulation seeds {base}..{}", base + 10_000);
    // each batch is a clock of its own, so they can run side by side
    let batches = std::sync::Mutex::new((0..100).map(|batch| base + batch * 100));
    let next = || batches.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(first) = next() {
                    run(first..first + 100);
                }
            });
        }
    });
}

/// A batch takes a second or two. One that hangs says which it is instead of holding up everything after it.
const LONGEST_BATCH: Duration = Duration::from_secs(300);

fn run(seeds: std::ops::Range<u64>) {
    // the worker's warnings about failures that are made on purpose would fill the disk
    let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
    let (done, over) = std::sync::mpsc::channel::<()>();
    let (first, last) = (seeds.start, seeds.end);
    std::thread::spawn(move || {
        if over.recv_timeout(LONGEST_BATCH) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("simulation: one of the seeds {first}..{last} hangs");
            std::process::abort();
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut histories = tokio::task::JoinSet::new();
        for seed in seeds {
            histories.spawn(live(seed));
        }
        while let Some(result) = histories.join_next().await {
            result.unwrap();
        }
    });
    drop(done);
}
