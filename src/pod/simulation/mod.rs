//! The real worker on a virtual clock, with a runtime and an API server that fail, stall and crash the agent.
//!
//! Every history comes from a seed that is printed when a property breaks; `GANTRY_SIM_SEED` replays one.

mod generate;
mod history;
mod life;
mod properties;
mod world;

use std::ops::Range;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

/// Histories that share a clock.
const BATCH: u64 = 100;
/// A batch takes a second or two. One that hangs says which it is instead of holding up everything after it.
const LONGEST_BATCH: Duration = Duration::from_secs(300);

#[test]
fn ten_thousand_histories() {
    for_seeds(10_000, history::live);
}

/// Agents that are killed every few seconds come to the same ends as one that is left alone.
#[test]
fn crashes_change_no_end() {
    for_seeds(300, history::live_twice);
}

/// One history for each of so many seeds (`GANTRY_SIM_HISTORIES` at most), or for `GANTRY_SIM_SEED` alone.
fn for_seeds<F: Future<Output = ()> + Send + 'static>(count: u64, history: fn(u64) -> F) {
    if let Ok(seed) = std::env::var("GANTRY_SIM_SEED") {
        let seed = seed.parse().unwrap();
        run(seed..seed + 1, history);
        return;
    }
    let most = std::env::var("GANTRY_SIM_HISTORIES").map_or(count, |most| most.parse().unwrap());
    let count = count.min(most);
    let base = fastrand::u64(..) >> 16;
    println!("simulation seeds {base}..{}", base + count);
    // each batch is a clock of its own, so they can run side by side
    let batches = Mutex::new((base..base + count).step_by(usize::try_from(BATCH).unwrap()));
    let next = || batches.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(first) = next() {
                    run(first..first + BATCH, history);
                }
            });
        }
    });
}

fn run<F: Future<Output = ()> + Send + 'static>(seeds: Range<u64>, history: fn(u64) -> F) {
    // the worker's warnings about failures that are made on purpose would fill the disk
    let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
    let (done, over) = mpsc::channel::<()>();
    let (first, last) = (seeds.start, seeds.end);
    std::thread::spawn(move || {
        if over.recv_timeout(LONGEST_BATCH) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("simulation: one of the seeds {first}..{last} hangs");
            std::process::abort();
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut histories = tokio::task::JoinSet::new();
        for seed in seeds {
            histories.spawn(history(seed));
        }
        while let Some(result) = histories.join_next().await {
            result.unwrap();
        }
    });
    drop(done);
}
