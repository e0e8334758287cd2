//! Takes a cgroup and everything in it away.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::hierarchy::read;
use super::{CgroupError, is_absent};

/// How deep containers may nest cgroups before removal gives up.
const MAX_DEPTH: usize = 64;
/// The kernel detaches a process from its cgroup shortly before or after its exit shows: how long to wait for that
/// when nobody is left to wait for.
const SETTLE: Duration = Duration::from_millis(5);

/// Kills what is left in one cgroup (its directories in all trees), waits for the exits, removes bottom-up.
///
/// Processes may fork while they are killed, so this repeats until the directories are gone or `deadline` has passed.
pub(super) fn remove(directories: &[PathBuf], deadline: Instant) -> Result<(), CgroupError> {
    loop {
        let mut doomed = BTreeMap::new();
        for directory in directories {
            kill(directory, 0, &mut doomed)?;
        }
        wait_for_exit(doomed.into_values().collect(), deadline);
        let busy = match directories.iter().try_for_each(|directory| remove_tree(directory, 0)) {
            Err(error) if error.is_busy() => error,
            result => return result,
        };
        let now = Instant::now();
        if now >= deadline {
            return Err(busy);
        }
        wait(&mut [], SETTLE.min(deadline - now));
    }
}

fn subdirectories(directory: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(|e| CgroupError::io("list", directory, e))?,
    };
    let entries = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    Ok(entries.map(|e| e.path()).collect())
}

fn remove_tree(directory: &Path, depth: usize) -> Result<(), CgroupError> {
    if depth > MAX_DEPTH {
        return Err(CgroupError::TooDeep { path: directory.to_owned() });
    }
    for child in subdirectories(directory)? {
        remove_tree(&child, depth + 1)?;
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|e| CgroupError::io("remove", directory, e)),
    }
}

/// Sends SIGKILL to every process of a directory and below; collects what can be waited for.
fn kill(directory: &Path, depth: usize, doomed: &mut BTreeMap<i32, OwnedFd>) -> Result<(), CgroupError> {
    if depth > MAX_DEPTH {
        return Err(CgroupError::TooDeep { path: directory.to_owned() });
    }
    let processes = directory.join("cgroup.procs");
    for pid in pids(&processes)? {
        if let Some(handle) = kill_one(pid, &processes) {
            doomed.insert(pid, handle);
        }
    }
    for child in subdirectories(directory)? {
        kill(&child, depth + 1, doomed)?;
    }
    // version 2, from kernel 5.14: what has forked meanwhile, all at once
    let rest = directory.join("cgroup.kill");
    if depth == 0 && rest.exists() {
        match super::hierarchy::write(&rest, "1") {
            Err(error) if is_absent(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

fn pids(processes: &Path) -> Result<Vec<i32>, CgroupError> {
    match read(processes) {
        Err(error) if is_absent(&error) => Ok(Vec::new()),
        result => Ok(result?.lines().filter_map(|line| line.parse().ok()).collect()),
    }
}

/// The number of a process may pass to another one at any time: hold the process, look again, then kill.
fn kill_one(pid: i32, processes: &Path) -> Option<OwnedFd> {
    let target = Pid::from_raw(pid).filter(|target| *target != rustix::process::getpid())?;
    let handle = pidfd_open(target, PidfdFlags::empty()).ok()?;
    if !pids(processes).is_ok_and(|now| now.contains(&pid)) {
        return None;
    }
    // the only failure is that it has exited
    let _ = pidfd_send_signal(&handle, Signal::KILL);
    Some(handle)
}

fn wait_for_exit(mut handles: Vec<OwnedFd>, deadline: Instant) {
    while !handles.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let mut fds: Vec<PollFd<'_>> = handles.iter().map(|handle| PollFd::new(handle, PollFlags::IN)).collect();
        wait(&mut fds, left);
        let exited: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut exited = exited.into_iter();
        handles.retain(|_| exited.next() != Some(true));
    }
}

/// An interrupted wait is a short one: callers look at the clock.
fn wait(fds: &mut [PollFd<'_>], limit: Duration) {
    let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    let _ = poll(fds, Some(&limit));
}
