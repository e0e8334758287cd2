//! One life of the agent: effects that take their time, fail, and are cut off where they are by the next life.

use std::future::{Future, pending};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PodStatus;
use tokio::time::sleep;

use super::properties::{check_sizes, check_transition};
use super::world::{Fake, World};
use crate::pod::effects::{ApiAnswer, Effects, Failure, Outcome, Request};
use crate::pod::model::{Admission, Desired, Exit, Instance, Observed};
use crate::pod::plan::Action;
use crate::pod::resize::{self, Actuation, Decision, Verdict};
use crate::pod::resources::Resources;
use crate::pod::worker::Message;

/// One life of the agent.
pub(super) struct Life {
    pub(super) world: Arc<World>,
    pub(super) number: u32,
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
            resources: request.desired.container(name).map(|c| c.size),
            resizing: false,
        };
        world.state().sizes.insert(instance.id.clone(), instance.resources.unwrap());
        let mut fate = world.fate(name, instance.attempt);
        // as the node does: what an interrupted life created and never started goes first
        {
            let mut state = world.state();
            state.containers.retain(|c| c.name != name || c.instance.started_at.is_some());
            let ignores_term = fate.u8(0..4) == 0;
            let fake = Fake { name: name.to_owned(), instance: instance.clone(), ignores_term, termed_at: None };
            state.containers.push(fake);
        }
        self.step(30).await;
        if fate.u8(0..100) < 3 {
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
            let code = *[0, 0, 1, 3].get(fate.usize(0..4)).unwrap();
            let long = !name.starts_with("init") && fate.u8(0..3) == 0;
            let seconds = if long { fate.u64(100..1500) } else { fate.u64(0..20) };
            // how often one is restarted while others run is a matter of time
            let seconds = if world.fated && name.starts_with("sidecar") { 1 << 30 } else { seconds };
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
            let delay = if world.fated { 0 } else { state.rng.u64(0..3000) };
            let Some(fake) = state.containers.iter_mut().find(|c| c.instance.id == id) else { return Outcome::Done };
            if kill && fake.instance.exit.is_none() {
                let stop = request.observed.containers[name].current.as_ref().and_then(|i| i.stop.clone()).unwrap();
                let late = now.duration_since(stop.kill_at().expect("TERM comes before KILL"));
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
                // a container may be over before its hook fails, or not
                if self.world.fated { Outcome::Done } else { flaky(self, reason).unwrap_or(Outcome::Done) }
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

    fn is_busy(&self) -> bool {
        self.now().as_second() % 3 == 0
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
