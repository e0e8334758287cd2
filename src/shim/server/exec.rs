//! Processes run in a container that is there already.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::jobs::{null, outcome_socket};
use super::lifecycle::{START_DEADLINE, exit_record};
use super::{Answer, JobKind, REMEMBERED_EXITS, Server, io_error, refuse};
use crate::shim::container::{Phase, ReplyTo};
use crate::shim::creator::Stdio;
use crate::shim::creator::tenant::{self, Heard, Tenant};
use crate::shim::protocol::{
    ErrorBody, ErrorKind, Event, ExecRef, ExecRequest, ExecSignalRequest, ExecStarted, ExecState,
};
use crate::shim::record::{ProcessStat, process_stat};

/// Most rounds in which new descendants of an exec are looked for while it is killed.
const KILL_ROUNDS: usize = 16;

/// A running exec.
#[derive(Debug)]
pub(super) struct Exec {
    container: Rc<str>,
    pub(super) pid: i32,
    owner: u64,
    pub(super) until: Option<Instant>,
    timed_out: bool,
}

/// An exec that is being made.
#[derive(Debug)]
pub(super) struct ExecJob {
    exec_id: String,
    container: Rc<str>,
    timeout: Option<Duration>,
    console: Option<OwnedFd>,
}

impl Server {
    pub(super) fn exec(&mut self, reply: ReplyTo, request: ExecRequest, fds: Vec<OwnedFd>) -> Answer<()> {
        let wanted = [request.stdin, request.stdout, request.stderr];
        let exec_id = &request.exec_id;
        if wanted.iter().filter(|w| **w).count() != fds.len() {
            return refuse(ErrorKind::Invalid, format!("{} descriptors came for {wanted:?}", fds.len()));
        }
        if exec_id.is_empty() || exec_id.len() > 64 || !exec_id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        {
            return refuse(ErrorKind::Invalid, format!("exec_id {exec_id:?}: must be 1 to 64 letters, digits or `-`"));
        }
        let in_the_making = |job: &super::Job| matches!(&job.kind, JobKind::Exec(other) if other.exec_id == *exec_id);
        if self.execs.contains_key(exec_id) || self.jobs.values().any(in_the_making) {
            return refuse(ErrorKind::Conflict, format!("exec {exec_id} exists already"));
        }
        let Some((id, container)) = self.containers.get_key_value(request.container_id.as_str()) else {
            return refuse(ErrorKind::NotFound, format!("no container {}", request.container_id));
        };
        let (Phase::Running, None) = (&container.phase, &container.starting) else {
            return refuse(ErrorKind::Conflict, format!("container {id} is not running"));
        };
        let mut fds = fds.into_iter();
        let mut stream = |wanted: bool| match wanted.then(|| fds.next()).flatten() {
            Some(fd) => Ok(fd),
            None => null(),
        };
        let mut spawn = || -> io::Result<(Pid, OwnedFd)> {
            let stdio = Stdio {
                stdin: stream(request.stdin)?,
                stdout: stream(request.stdout)?,
                stderr: stream(request.stderr)?,
            };
            let (heard, word) = outcome_socket()?;
            let tenant =
                Tenant { container: &container.record, hierarchies: &self.hierarchies, request: &request, stdio };
            Ok((tenant::spawn(&tenant, &word)?, heard))
        };
        let (pid, heard) = spawn().or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => refuse(ErrorKind::Conflict, format!("container {id} is not running")),
            _ => Err(io_error("start the process")(error)),
        })?;
        let timeout = request.timeout_ms.map(Duration::from_millis);
        let job = ExecJob { exec_id: request.exec_id, container: id.clone(), timeout, console: None };
        let until = Instant::now() + timeout.map_or(START_DEADLINE, |t| t.min(START_DEADLINE));
        self.add_job(JobKind::Exec(Box::new(job)), pid, heard, reply, until).map_err(|error| {
            let _gone = kill(pid, Signal::SIGKILL);
            io_error("watch the process")(error)
        })
    }

    /// Something was heard of an exec that is being made. `Some` if that was all.
    pub(super) fn hear(job: &mut ExecJob, heard: &OwnedFd) -> Option<Answer<()>> {
        match tenant::heard(heard) {
            Heard::Console(console) => {
                job.console = Some(console);
                None
            }
            Heard::Executed => Some(Ok(())),
            Heard::Refused(body) => Some(Err(body)),
        }
    }

    pub(super) fn exec_made(&mut self, reply: ReplyTo, job: ExecJob, pid: Pid, made: Answer<()>) {
        if let Err(error) = made {
            return self.reply::<()>(reply, Err(error));
        }
        let pid = pid.as_raw();
        let exec = Exec {
            container: job.container,
            pid,
            owner: reply.connection,
            until: job.timeout.map(|timeout| Instant::now() + timeout),
            timed_out: false,
        };
        self.execs.insert(job.exec_id, exec);
        self.reply_with_fd(reply, Ok(ExecStarted { pid }), job.console);
    }

    /// Ends one that was not made in time, and what it may have started meanwhile.
    pub(super) fn exec_timed_out(&mut self, reply: ReplyTo, job: &ExecJob, pid: Pid, error: &str) {
        if !self.is_unclaimed(pid) {
            self.kill_tree(&job.container, pid.as_raw(), Signal::SIGKILL);
            let _gone = kill(pid, Signal::SIGKILL);
        }
        self.reply::<()>(reply, refuse(ErrorKind::Timeout, error));
    }

    /// Signals a process and what descends from it. It has a session of its own; descendants that made another are
    /// found by their parents.
    fn kill_tree(&self, id: &Rc<str>, pid: i32, signal: Signal) {
        let Some(container) = self.containers.get(id) else { return };
        let cgroup = &container.record.request.cgroup_path;
        let rounds = if signal == Signal::SIGKILL { KILL_ROUNDS } else { 1 };
        let mut done: Vec<i32> = Vec::new();
        for _ in 0..rounds {
            let found = descendants(pid, self.hierarchies.processes(cgroup));
            let new: Vec<i32> = found.into_iter().filter(|found| !done.contains(found)).collect();
            for pid in &new {
                let _gone = kill(Pid::from_raw(*pid), signal);
            }
            if new.is_empty() {
                break;
            }
            done.extend(new);
        }
    }

    pub(super) fn exec_exited(&mut self, id: &str, status: WaitStatus) {
        let Some(exec) = self.execs.remove(id) else { return };
        let mut exit = exit_record(status);
        exit.timed_out = exec.timed_out;
        self.exec_exits.push_back((id.to_owned(), exit.clone()));
        if self.exec_exits.len() > REMEMBERED_EXITS {
            self.exec_exits.pop_front();
        }
        self.publish(&Event::ExecExited { exec_id: id.to_owned(), exit }, Some(exec.owner));
    }

    pub(super) fn exec_state(&self, request: &ExecRef) -> Answer<ExecState> {
        if self.execs.contains_key(&request.exec_id) {
            return Ok(ExecState { exit: None });
        }
        let remembered = self.exec_exits.iter().rev().find(|(id, _)| *id == request.exec_id);
        remembered.map(|(_, exit)| ExecState { exit: Some(exit.clone()) }).ok_or_else(|| not_found(&request.exec_id))
    }

    pub(super) fn exec_signal(&mut self, request: &ExecSignalRequest) -> Answer<()> {
        let signal = Signal::try_from(request.signal).map_err(|_| ErrorBody {
            kind: ErrorKind::Invalid,
            message: format!("signal {}: must be the number of a signal, 1 to 31", request.signal),
        })?;
        let exec = self.execs.get(&request.exec_id).ok_or_else(|| not_found(&request.exec_id))?;
        if request.all {
            self.kill_tree(&exec.container, exec.pid, signal);
        }
        // Not reaped yet, so the pid is still its own.
        kill(Pid::from_raw(exec.pid), signal).map_err(|e| io_error("kill")(e.into()))
    }

    pub(super) fn exec_deadlines(&mut self, now: Instant) {
        let mut late = Vec::new();
        for exec in self.execs.values_mut().filter(|exec| exec.until.is_some_and(|until| now >= until)) {
            exec.until = None;
            exec.timed_out = true;
            late.push((exec.container.clone(), exec.pid));
        }
        for (container, pid) in late {
            self.kill_tree(&container, pid, Signal::SIGKILL);
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn not_found(exec_id: &str) -> ErrorBody {
    ErrorBody { kind: ErrorKind::NotFound, message: format!("no exec {exec_id}") }
}

/// Of `processes`, those in the session of `root` or descending from it.
fn descendants(root: i32, processes: BTreeSet<i32>) -> Vec<i32> {
    let stats: BTreeMap<i32, ProcessStat> =
        processes.into_iter().filter_map(|pid| Some((pid, process_stat(pid).ok()?))).collect();
    let belongs = |pid: i32| {
        let mut at = pid;
        // Parents form a tree; the bound is for one that changes while it is read.
        for _ in 0..stats.len() + 1 {
            let Some(stat) = stats.get(&at) else { return false };
            if at == root || stat.session == root {
                return true;
            }
            at = stat.parent;
        }
        false
    };
    stats.keys().copied().filter(|pid| belongs(*pid)).collect()
}
