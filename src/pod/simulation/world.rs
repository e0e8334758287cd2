//! What is really on the node and in the API server, whatever the agent believes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use fastrand::Rng;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::pod::effects::RuntimeEvent;
use crate::pod::model::{Exit, Instance, Observed};
use crate::pod::resources::CpuMemory;
use crate::pod::worker::Message;

const EPOCH: i64 = 1_800_000_000;

/// One Pod's world.
pub(super) struct World {
    pub(super) seed: u64,
    /// What containers do is decided by their names and attempts, not by when they do it: see [`World::fate`].
    pub(super) fated: bool,
    pub(super) origin: Instant,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) rng: Rng,
    pub(super) life: u32,
    pub(super) record: Option<Observed>,
    pub(super) containers: Vec<Fake>,
    pub(super) worker: Option<mpsc::Sender<Message>>,
    pub(super) pod: Option<Pod>,
    pub(super) version: u64,
    pub(super) sandbox: bool,
    pub(super) torn_down: bool,
    pub(super) crashes: BTreeMap<String, Vec<(Timestamp, Timestamp)>>,
    /// Steps that workers took, in all lives.
    pub(super) steps: u64,
    pub(super) lost: bool,
    /// What the kernel has for each instance's cgroup.
    pub(super) sizes: BTreeMap<String, CpuMemory>,
    pub(super) resized_at: Timestamp,
    pub(super) deferrals: u32,
    pub(super) over: bool,
}

pub(super) struct Fake {
    pub(super) name: String,
    pub(super) instance: Instance,
    pub(super) ignores_term: bool,
    pub(super) termed_at: Option<Timestamp>,
}

impl World {
    pub(super) fn new(seed: u64, fated: bool, rng: Rng, pod: Pod) -> Arc<Self> {
        let state = State {
            rng,
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
        };
        Arc::new(Self { seed, fated, origin: Instant::now(), state: Mutex::new(state) })
    }

    pub(super) fn now(&self) -> Timestamp {
        let elapsed = i64::try_from(self.origin.elapsed().as_millis()).unwrap();
        Timestamp::from_second(EPOCH).unwrap() + SignedDuration::from_millis(elapsed)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Decides what one attempt of a container comes to. In a fated world that is the same in every history of the
    /// seed, whatever the agent goes through meanwhile.
    pub(super) fn fate(&self, name: &str, attempt: u32) -> Rng {
        if !self.fated {
            return self.state().rng.fork();
        }
        let text = format!("{} {name} {attempt}", self.seed);
        Rng::with_seed(
            text.bytes()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)),
        )
    }

    #[track_caller]
    pub(super) fn check(&self, holds: bool, property: &str) {
        assert!(holds, "seed {}: {property}", self.seed);
    }

    /// The container's process ends, once.
    pub(super) fn end(self: &Arc<Self>, id: &str, code: i32, signal: i32) {
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
