//! Takes a cgroup and everything in it away.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::hierarchy::read;
use super::{CgroupError, is_absent};

/// How deep containers may nest cgroups before removal gives up.
const MAX_DEPTH: usize = 64;

/// Kills what is left in a directory and below, and removes it bottom-up.
///
/// A killed process leaves its cgroup only when it has exited, and nothing on version 1 tells when: so the
/// removal is tried again, with growing pauses, until `deadline`.
pub(super) fn remove(directory: &Path, deadline: Instant) -> Result<(), CgroupError> {
    let mut pause = Duration::from_millis(1);
    loop {
        match remove_tree(directory, 0) {
            Err(error) if error.is_busy() => {
                kill(directory, 0)?;
                if Instant::now() + pause > deadline {
                    return Err(error);
                }
                thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            result => return result,
        }
    }
}

fn subdirectories(directory: &Path) -> Result<Vec<std::path::PathBuf>, CgroupError> {
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
    match fs::remove_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
        result => return result.map_err(|e| CgroupError::io("remove", directory, e)),
    }
    for child in subdirectories(directory)? {
        remove_tree(&child, depth + 1)?;
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|e| CgroupError::io("remove", directory, e)),
    }
}

/// Sends SIGKILL to every process of a directory and below.
pub(super) fn kill(directory: &Path, depth: usize) -> Result<(), CgroupError> {
    if depth > MAX_DEPTH {
        return Err(CgroupError::TooDeep { path: directory.to_owned() });
    }
    let all_at_once = directory.join("cgroup.kill");
    if all_at_once.exists() {
        return match super::hierarchy::write(&all_at_once, "1") {
            Err(error) if is_absent(&error) => Ok(()),
            result => result,
        };
    }
    let processes = directory.join("cgroup.procs");
    for pid in pids(&processes)? {
        kill_one(pid, &processes);
    }
    for child in subdirectories(directory)? {
        kill(&child, depth + 1)?;
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
fn kill_one(pid: i32, processes: &Path) {
    let Some(target) = Pid::from_raw(pid).filter(|target| *target != rustix::process::getpid()) else { return };
    let Ok(handle) = pidfd_open(target, PidfdFlags::empty()) else { return };
    if pids(processes).is_ok_and(|now| now.contains(&pid)) {
        // the only failure is that it has exited
        let _ = pidfd_send_signal(handle.as_fd(), Signal::KILL);
    }
}
