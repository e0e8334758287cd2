//! What happens to a Pod: changes, crashes of the agent and of the shim, deletion.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use tokio::time::{Instant, sleep};

use super::generate::{cpu_request, generate, generate_fated};
use super::life::Life;
use super::properties::{check_adopted, check_back_off, check_settled, ending, is_over};
use super::world::World;
use crate::pod::effects::RuntimeEvent;
use crate::pod::fold::{self, Found};
use crate::pod::model::{Desired, Exit, Observed};
use crate::pod::worker::{Message, Worker};

/// Lives one history: the Pod starts, the agent crashes now and then, the Pod is deleted, and in the end it is gone.
pub(super) async fn live(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let pod = generate(&mut rng);
    let restarts_all = crate::pod::rules::could_restart_all(&Desired::new(Arc::new(pod.clone())));
    let crash_every = [0_u64, 4, 30, 300][rng.usize(0..4)];
    // some are long enough for delays to reach their maximum and to be reset; frequent crashes come in short ones, so
    // that no seed costs much more than another
    let longest = match crash_every {
        4 => 40,
        _ if rng.u8(0..60) == 0 => 1_500,
        _ => 60,
    };
    let delete_after = rng.u64(0..longest);
    let shorten = rng.u8(0..4) == 0;
    let resizes = rng.u8(0..2) == 0;
    let world = World::new(seed, false, rng.fork(), pod);
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
        let before = record.clone();
        fold::adopt(&desired, &mut record, &found, state.sandbox, now);
        check_adopted(world.seed, &desired, &before, &record, &found, state.sandbox, now);
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

/// The same Pod without a crash of the agent and with many: it comes to the same end.
pub(super) async fn live_twice(seed: u64) {
    let calm = end_of(seed, None).await;
    let crashed = end_of(seed, Some(3_000)).await;
    assert_eq!(calm, crashed, "seed {seed}: the end with crashes (right) is not that without (left)");
}

/// Lives until the Pod has ended by itself, with a crash every so many milliseconds on average.
async fn end_of(seed: u64, crash_every: Option<u64>) -> Vec<String> {
    let mut rng = Rng::with_seed(seed);
    let pod = generate_fated(&mut rng);
    let world = World::new(seed, true, rng.fork(), pod);
    begin_life(&world);
    let limit = world.origin + Duration::from_hours(24);
    loop {
        // containers run for many minutes: crashes are of interest while something begins
        let lived = u64::try_from(world.origin.elapsed().as_millis()).unwrap();
        sleep(Duration::from_millis(crash_every.map_or(10_000, |every| rng.u64(1..=2 * every + lived / 10)))).await;
        {
            let state = world.state();
            let status = state.pod.as_ref().and_then(|pod| pod.status.as_ref());
            if let Some(status) = status.filter(|status| is_over(status)) {
                return ending(status);
            }
            assert!(Instant::now() < limit, "seed {seed}: the Pod does not end: {:?}", state.record);
        }
        if crash_every.is_some() {
            begin_life(&world);
        }
    }
}
