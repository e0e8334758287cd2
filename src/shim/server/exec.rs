//! Processes run in a container that is there already.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, pipe2};

use super::jobs::{null, outcome_socket};
use super::lifecycle::{START_DEADLINE, exit_record};
use super::{Answer, JobKind, REMEMBERED_EXITS, Server, io_error, read_available, refuse};
use crate::shim::container::{Phase, ReplyTo, set_nonblocking};
use crate::shim::creator::{self, Outcome, Stdio, Task};
use crate::shim::protocol::{
    ErrorBody, ErrorKind, Event, ExecRef, ExecRequest, ExecSignalRequest, ExecStarted, ExecState,
};
use crate::shim::record::{ProcessStat, process_stat};

/// Longest text of a failed `execve`.
const REPORT_LIMIT: usize = 4 << 10;
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
    /// The executor's pipe. libcontainer waits for `execve`, so what there is to read is there when it is done.
    report: OwnedFd,
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
        let (Phase::Running, None, Some(init)) = (&container.phase, &container.starting, container.record.pid) else {
            return refuse(ErrorKind::Conflict, format!("container {id} is not running"));
        };
        let (id, container) = (id.clone(), container.record.request.clone());
        let mut fds = fds.into_iter();
        let mut stream = |wanted: bool| match wanted.then(|| fds.next()).flatten() {
            Some(fd) => Ok(fd),
            None => null(),
        };
        let spawned = (|| -> io::Result<()> {
            let stdio = Stdio {
                stdin: stream(request.stdin)?,
                stdout: stream(request.stdout)?,
                stderr: stream(request.stderr)?,
            };
            let (report, report_writer) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&report)?;
            let (result, result_writer) = outcome_socket()?;
            let task = Task::Exec { container: &container, init, request: &request, stdio, report: report_writer };
            let creator = creator::spawn(task, result_writer)?;
            let timeout = request.timeout_ms.map(Duration::from_millis);
            let job = ExecJob { exec_id: exec_id.clone(), container: id, timeout, report };
            let until = Instant::now() + timeout.map_or(START_DEADLINE, |t| t.min(START_DEADLINE));
            self.add_job(JobKind::Exec(Box::new(job)), creator, result, reply, until)
        })();
        spawned.map_err(io_error("start the creator"))
    }

    pub(super) fn exec_made(&mut self, reply: ReplyTo, job: ExecJob, outcome: Outcome, console: Option<OwnedFd>) {
        self.sweep(&job.container);
        if let Some(error) = outcome.error {
            return self.reply::<()>(reply, refuse(ErrorKind::Create, error));
        }
        let mut text = Vec::new();
        read_available(&job.report, &mut text, REPORT_LIMIT);
        if !text.is_empty() {
            let text = String::from_utf8_lossy(&text).into_owned();
            return self.reply::<()>(reply, refuse(ErrorKind::Start, text));
        }
        let exec = Exec {
            container: job.container,
            pid: outcome.pid,
            owner: reply.connection,
            until: job.timeout.map(|timeout| Instant::now() + timeout),
            timed_out: false,
        };
        self.execs.insert(job.exec_id, exec);
        self.reply_with_fd(reply, Ok(ExecStarted { pid: outcome.pid }), console);
    }

    /// The creator is dead; what it made, if anything, is named by its pid file.
    pub(super) fn exec_failed(&mut self, reply: ReplyTo, job: ExecJob, kind: ErrorKind, error: &str) {
        if let Some(container) = self.containers.get(&job.container) {
            let request = &container.record.request;
            let file = creator::exec_pid_file(&request.container_dir, &job.exec_id);
            if let Some(pid) = fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<i32>().ok()) {
                self.kill_tree(&job.container, pid, Signal::SIGKILL);
            }
        }
        self.sweep(&job.container);
        self.reply::<()>(reply, refuse(kind, error));
    }

    /// Removes what execs leave behind, unless another one is being made.
    fn sweep(&self, id: &Rc<str>) {
        let busy = self.jobs.values().any(|job| matches!(&job.kind, JobKind::Exec(exec) if exec.container == *id));
        if let Some(container) = self.containers.get(id)
            && !busy
        {
            creator::sweep_exec_leftovers(&container.record.request);
        }
    }

    /// Signals a process and what descends from it. libcontainer gave it a session of its own; descendants that
    /// made another are found by their parents.
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
