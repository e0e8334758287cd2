//! Create, start, signal, exit, remove.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::fcntl::OFlag;
use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, pipe2};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{Answer, Job, JobKind, Removal, Server, Source, io_error, read_available, refuse};
use crate::shim::cgroup::is_valid_path;
use crate::shim::container::{Container, Input, Output, Phase, ReplyTo, Starting, Watched, set_nonblocking};
use crate::shim::creator::{self, Outcome, STATE_DIR, Stdio, Task};
use crate::shim::journal::note;
use crate::shim::logfile::{LogFile, Stream};
use crate::shim::protocol::{
    ContainerRef, CreateRequest, Created, ErrorBody, ErrorKind, Event, SignalRequest, Started,
};
use crate::shim::record::{
    CONTAINER_FILE, CONTAINERS_DIR, ContainerRecord, EXIT_FILE, ExitRecord, container_dirs, write_json,
};

const CREATE_DEADLINE: Duration = Duration::from_secs(120);
pub(super) const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a grandchild may hold a dead container's pipes.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);
const REMOVE_RETRY: Duration = Duration::from_millis(10);
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
/// Longest StartError text.
const REPORT_LIMIT: usize = 4 << 10;
/// Kernel memory for a stream that prints faster than it is read.
const PIPE_SIZE: usize = 256 << 10;

/// The exit code of a container whose shim died before it: as kubelet's ContainerStatusUnknown.
const LOST_EXIT_CODE: i32 = 137;

impl Server {
    /// What an earlier shim of this Pod left behind. Its containers have lost their parent and their pipes: they are
    /// ended, and recorded as lost.
    pub(super) fn recover(&mut self) -> io::Result<()> {
        for dir in container_dirs(&self.pod_dir)? {
            let Some(mut record) = ContainerRecord::read(&dir)? else { continue };
            record.request.container_dir.clone_from(&dir);
            self.hierarchies.signal(&record.request.cgroup_path, Signal::SIGKILL);
            let Some(pid) = record.pid else {
                // Intended, but never made: as if it had not been asked for.
                self.forget(&record.request);
                continue;
            };
            if record.exit.is_none() {
                let exit = ExitRecord {
                    pid,
                    exit_code: LOST_EXIT_CODE,
                    signal: None,
                    finished_at: Timestamp::now(),
                    oom_killed: false,
                    timed_out: false,
                    lost: true,
                    start_error: None,
                };
                write_json(&dir, EXIT_FILE, &exit)?;
                record.exit = Some(exit);
            }
            let id = Rc::from(record.request.container_id.as_str());
            self.containers.insert(id, Container::new(record, Phase::Exited));
        }
        Ok(())
    }

    pub(super) fn create(&mut self, reply: ReplyTo, request: CreateRequest) -> Answer<()> {
        self.check_create(&request)?;
        let id: Rc<str> = Rc::from(request.container_id.as_str());
        let dir = request.container_dir.clone();
        let record =
            ContainerRecord { request, pid: None, start_time: 0, created_at: None, started_at: None, exit: None };
        let mut container = Container::new(record, Phase::Creating);
        let request = &container.record.request;
        if !request.log_path.as_os_str().is_empty() {
            let log = LogFile::open(&request.log_path, request.max_log_size, request.max_log_files)
                .map_err(io_error(format_args!("log {}", request.log_path.display())))?;
            container.log = Some(log);
        }
        container.record.write().map_err(io_error(format_args!("record in {}", dir.display())))?;
        let until = Instant::now() + container.record.request.timeout_ms.map_or(CREATE_DEADLINE, Duration::from_millis);
        match self.spawn_create(reply, &id, &mut container, until) {
            Ok(()) => {
                self.containers.insert(id, container);
                Ok(())
            }
            Err(error) => {
                self.close_streams(container.outputs, container.input, container.report);
                self.forget(&container.record.request);
                Err(io_error("start the creator")(error))
            }
        }
    }

    fn check_create(&self, request: &CreateRequest) -> Answer<()> {
        let id = &request.container_id;
        let invalid = |field: &str, value: &dyn std::fmt::Debug, remedy: &str| {
            refuse(ErrorKind::Invalid, format!("{field} {value:?}: {remedy}"))
        };
        if self.stopping.is_some() {
            return refuse(ErrorKind::Conflict, "the shim is shutting down");
        }
        if id.len() != 64 || !id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return invalid("container_id", id, "must be 64 hexadecimal digits");
        }
        if request.container_dir.parent() != Some(&self.pod_dir.join(CONTAINERS_DIR)) {
            let parent = self.pod_dir.join(CONTAINERS_DIR);
            return invalid(
                "container_dir",
                &request.container_dir,
                &format!("must be a directory in {}", parent.display()),
            );
        }
        if !is_valid_path(&request.cgroup_path) {
            return invalid("cgroup_path", &request.cgroup_path, "must be absolute, without `..`, and not the root");
        }
        if self.hierarchies.processes(&request.cgroup_path).contains(&Pid::this().as_raw()) {
            return invalid("cgroup_path", &request.cgroup_path, "is the shim's own; a container needs another");
        }
        let in_use = |c: &Container| {
            let other = &c.record.request;
            other.cgroup_path.starts_with(&request.cgroup_path) || request.cgroup_path.starts_with(&other.cgroup_path)
        };
        if let Some(other) = self.containers.values().find(|c| in_use(c)) {
            let text = format!("is that of container {}; each needs its own", other.record.request.container_id);
            return invalid("cgroup_path", &request.cgroup_path, &text);
        }
        if self.containers.contains_key(id.as_str()) {
            return refuse(ErrorKind::Conflict, format!("container {id} exists already"));
        }
        match ContainerRecord::read(&request.container_dir) {
            Ok(Some(record)) if record.pid.is_some() => {
                let dir = request.container_dir.display();
                refuse(ErrorKind::Conflict, format!("{dir} has the record of a container that was made already"))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(io_error("read the record")(error)),
        }
    }

    fn spawn_create(
        &mut self,
        reply: ReplyTo,
        id: &Rc<str>,
        container: &mut Container,
        until: Instant,
    ) -> io::Result<()> {
        let request = container.record.request.clone();
        let _none_yet = fs::remove_dir_all(request.container_dir.join(STATE_DIR));
        let stdio = if request.terminal { null_stdio()? } else { self.container_pipes(id, container)? };
        let (report, report_writer) = pipe2(OFlag::O_CLOEXEC)?;
        set_nonblocking(&report)?;
        let (result, result_writer) = outcome_socket()?;
        let task = Task::Create { request: &request, stdio, report: report_writer };
        let creator = creator::spawn(task, result_writer)?;
        // The shim's copies of the other ends went with the task: end of file means what it says.
        container.report = Some(self.watch(report, EpollFlags::EPOLLIN, Source::Report(id.clone()))?);
        self.add_job(JobKind::Create(id.clone()), creator, result, reply, until)
    }

    pub(super) fn add_job(
        &mut self,
        kind: JobKind,
        creator: Pid,
        result: OwnedFd,
        reply: ReplyTo,
        until: Instant,
    ) -> io::Result<()> {
        let watched = self.watch(result, EpollFlags::EPOLLIN, Source::Job)?;
        if let Some(key) = watched.token {
            self.jobs.insert(key, Job { kind, creator, result: watched.fd, reply, until });
        }
        Ok(())
    }

    fn container_pipes(&mut self, id: &Rc<str>, container: &mut Container) -> io::Result<Stdio> {
        let mut writers = Vec::with_capacity(2);
        for stream in [Stream::Stdout, Stream::Stderr] {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&reader)?;
            if let Err(error) = rustix::pipe::fcntl_setpipe_size(&reader, PIPE_SIZE) {
                note!("warning: pipes stay small: {error}");
            }
            let source = self.watch(reader, EpollFlags::EPOLLIN, Source::Output(id.clone(), stream))?;
            container.outputs.push(Output::new(stream, source));
            writers.push(writer);
        }
        let stdin = if container.record.request.stdin {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&writer)?;
            let sink = Watched { fd: writer, token: None };
            container.input = Some(Input { sink, pending: Vec::new(), close_when_flushed: false });
            reader
        } else {
            null()?
        };
        match (writers.pop(), writers.pop()) {
            (Some(stderr), Some(stdout)) => Ok(Stdio { stdin, stdout, stderr }),
            _ => Err(io::Error::other("no pipes")),
        }
    }

    /// A creator has a message, or has ended without one.
    pub(super) fn on_job(&mut self, key: u64) {
        let Some(job) = self.jobs.get(&key) else { return };
        let outcome = match creator::receive_outcome(&job.result) {
            Ok(Some(outcome)) => outcome,
            Ok(None) => (failed("the creator died before it could say why"), None),
            Err(error) => (failed(&format!("the creator's answer: {error}")), None),
        };
        let Some(job) = self.take_job(key) else { return };
        self.finish_job(job, outcome);
    }

    pub(super) fn take_job(&mut self, key: u64) -> Option<Job> {
        let job = self.jobs.remove(&key)?;
        self.sources.remove(&key);
        let _gone_already = self.epoll.delete(&job.result);
        Some(job)
    }

    fn finish_job(&mut self, job: Job, (outcome, console): (Outcome, Option<OwnedFd>)) {
        let pid = outcome.pid;
        match job.kind {
            JobKind::Create(id) => self.created(job.reply, &id, outcome, console),
            JobKind::Start(id) => match outcome.error {
                Some(error) => self.start_failed(&id, ErrorKind::Io, &error),
                None => {
                    if let Some(starting) = self.containers.get_mut(&id).and_then(|c| c.starting.as_mut()) {
                        starting.released = true;
                    }
                    self.answer_start(&id);
                }
            },
            JobKind::Exec(exec) => self.exec_made(job.reply, *exec, outcome, console),
        }
        self.claim_early_exit(pid);
    }

    pub(super) fn job_timed_out(&mut self, key: u64) {
        let Some(job) = self.take_job(key) else { return };
        kill_creator(job.creator);
        let error = "the deadline passed";
        match job.kind {
            JobKind::Create(id) => self.create_failed(job.reply, &id, ErrorKind::Timeout, error),
            JobKind::Start(id) => self.start_failed(&id, ErrorKind::Timeout, error),
            JobKind::Exec(exec) => self.exec_failed(job.reply, *exec, ErrorKind::Timeout, error),
        }
        self.claim_early_exit(0);
    }

    fn created(&mut self, reply: ReplyTo, id: &Rc<str>, outcome: Outcome, console: Option<OwnedFd>) {
        if let Some(error) = &outcome.error {
            return self.create_failed(reply, id, ErrorKind::Create, error);
        }
        if let Some(console) = console
            && let Err(error) = self.adopt_console(id, console)
        {
            return self.create_failed(reply, id, ErrorKind::Io, &format!("terminal: {error}"));
        }
        let Some(container) = self.containers.get_mut(id) else { return };
        let created_at = Timestamp::now();
        container.record.pid = Some(outcome.pid);
        container.record.start_time = outcome.start_time;
        container.record.created_at = Some(created_at);
        container.phase = Phase::Created;
        if let Err(error) = container.record.write() {
            return self.create_failed(reply, id, ErrorKind::Io, &format!("record: {error}"));
        }
        self.reply(reply, Ok(Created { pid: outcome.pid, created_at }));
    }

    fn adopt_console(&mut self, id: &Rc<str>, console: OwnedFd) -> io::Result<()> {
        set_nonblocking(&console)?;
        let output = console.try_clone()?;
        let source = self.watch(output, EpollFlags::EPOLLIN, Source::Output(id.clone(), Stream::Stdout))?;
        if let Some(container) = self.containers.get_mut(id) {
            container.outputs.push(Output::new(Stream::Stdout, source));
            if container.record.request.stdin {
                let sink = Watched { fd: console.try_clone()?, token: None };
                container.input = Some(Input { sink, pending: Vec::new(), close_when_flushed: false });
            }
            container.console = Some(console);
        }
        Ok(())
    }

    fn create_failed(&mut self, reply: ReplyTo, id: &Rc<str>, kind: ErrorKind, error: &str) {
        if let Some(container) = self.containers.remove(id) {
            let request = &container.record.request;
            // Half-made processes joined the cgroup before anything else.
            self.hierarchies.signal(&request.cgroup_path, Signal::SIGKILL);
            self.forget(request);
            self.close_streams(container.outputs, container.input, container.report);
            if let Err(error) = self.hierarchies.remove(&request.cgroup_path)
                && error.kind() != io::ErrorKind::WouldBlock
            {
                note!("warning: remove cgroup: {error}");
            }
        }
        self.reply::<()>(reply, refuse(kind, error));
    }

    /// Undoes the record of a container that was not made.
    fn forget(&self, request: &CreateRequest) {
        let dir = &request.container_dir;
        let removed = match fs::remove_dir_all(dir.join(STATE_DIR)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::remove_file(dir.join(CONTAINER_FILE)),
        };
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            note!("warning: clean {}: {error}", dir.display());
        }
    }

    fn close_streams(&mut self, outputs: Vec<Output>, input: Option<Input>, report: Option<Watched>) {
        for watched in outputs.into_iter().map(|o| o.source).chain(input.map(|i| i.sink)).chain(report) {
            self.close(watched);
        }
    }

    fn find(&mut self, id: &str) -> Answer<&mut Container> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| ErrorBody { kind: ErrorKind::NotFound, message: format!("no container {id}") })
    }

    pub(super) fn start(&mut self, reply: ReplyTo, request: &ContainerRef) -> Answer<()> {
        let container = self.find(&request.container_id)?;
        if container.record.started_at.is_some() || !matches!(container.phase, Phase::Created) {
            return refuse(ErrorKind::Conflict, format!("container {} is not in state created", request.container_id));
        }
        // Recorded first: after a crash it must not be started a second time.
        container.record.started_at = Some(Timestamp::now());
        container.record.write().map_err(io_error("record"))?;
        container.phase = Phase::Running;
        let until = Instant::now() + START_DEADLINE;
        container.starting = Some(Starting { reply, until, released: false });
        let request = container.record.request.clone();
        let id: Rc<str> = Rc::from(request.container_id.as_str());
        let spawned = outcome_socket().and_then(|(result, writer)| {
            let creator = creator::spawn(Task::Start { request: &request }, writer)?;
            // The container's own report is what decides; this deadline only ends a stuck creator, after it.
            self.add_job(JobKind::Start(id.clone()), creator, result, reply, until + Duration::from_secs(1))
        });
        if let Err(error) = spawned {
            self.start_failed(&id, ErrorKind::Io, &format!("start the creator: {error}"));
        }
        Ok(())
    }

    /// libcontainer could not let it go, or it hangs before `execve`: it will not run any more.
    fn start_failed(&mut self, id: &Rc<str>, kind: ErrorKind, error: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(starting) = container.starting.take() else { return };
        self.hierarchies.signal(&container.record.request.cgroup_path, Signal::SIGKILL);
        self.reply::<()>(starting.reply, refuse(kind, format!("start: {error}")));
    }

    /// The executor's pipe: text is why `execve` failed, its end without text is success.
    pub(super) fn on_report(&mut self, id: &Rc<str>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(report) = &container.report else { return };
        if !read_available(&report.fd, &mut container.report_text, REPORT_LIMIT) {
            return;
        }
        if let Some(report) = container.report.take() {
            self.close(report);
        }
        self.answer_start(id);
    }

    /// With a text in the report, the answer waits for the exit record of the process, which is about to end.
    fn answer_start(&mut self, id: &Rc<str>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let reported = container.report.is_none() && container.report_text.is_empty();
        if reported
            && let Some(starting) = container.starting.take_if(|starting| starting.released)
            && let Some(started_at) = container.record.started_at
        {
            self.reply(starting.reply, Ok(Started { started_at }));
        }
    }

    pub(super) fn signal(&mut self, request: &SignalRequest) -> Answer<()> {
        let signal = Signal::try_from(request.signal).map_err(|_| ErrorBody {
            kind: ErrorKind::Invalid,
            message: format!("signal {}: must be the number of a signal, 1 to 31", request.signal),
        })?;
        let container = self.find(&request.container_id)?;
        let Some(pid) = container.live_pid() else {
            return refuse(ErrorKind::Conflict, format!("container {} is not running", request.container_id));
        };
        let cgroup = container.record.request.cgroup_path.clone();
        if request.all {
            self.hierarchies.signal(&cgroup, signal);
        }
        // Not reaped yet, so the pid is still its own.
        kill(Pid::from_raw(pid), signal).map_err(|e| io_error("kill")(e.into()))
    }

    /// A container's init was reaped.
    pub(super) fn container_exited(&mut self, id: &Rc<str>, status: WaitStatus) {
        self.on_report(id);
        let Some(container) = self.containers.get_mut(id) else { return };
        let cgroup = container.record.request.cgroup_path.clone();
        let mut exit = exit_record(status);
        exit.oom_killed = exit.exit_code == 128 + libc_sigkill() && self.hierarchies.oom_kills(&cgroup) > 0;
        if !container.report_text.is_empty() {
            exit.start_error = Some(String::from_utf8_lossy(&container.report_text).into_owned());
        }
        container.phase = Phase::Draining { exit, until: Instant::now() + DRAIN_DEADLINE };
        let input = container.input.take();
        // What shares the pid namespace of the Pod does not end by itself.
        self.hierarchies.signal(&cgroup, Signal::SIGKILL);
        if let Some(input) = input {
            self.close(input.sink);
        }
        self.finish_exit_if_drained(id);
    }

    pub(super) fn finish_exit_if_drained(&mut self, id: &Rc<str>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if container.outputs.is_empty() && matches!(container.phase, Phase::Draining { .. }) {
            self.finish_exit(id);
        }
    }

    /// Makes the exit durable, then tells.
    fn finish_exit(&mut self, id: &Rc<str>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Phase::Draining { exit, .. } = std::mem::replace(&mut container.phase, Phase::Exited) else { return };
        if let Err(error) = write_json(&container.record.request.container_dir, EXIT_FILE, &exit) {
            note!("error: the exit of {id} is not recorded: {error}");
        }
        let start_error = exit.start_error.clone();
        container.record.exit = Some(exit);
        container.log = None;
        container.console = None;
        let starting = container.starting.take();
        let report = container.report.take();
        let started_at = container.record.started_at;
        let attaches: Vec<u64> = container.attaches.iter().map(|attach| attach.key).collect();
        let event = Event::Exited { container: Box::new(container.record.clone()) };
        attaches.into_iter().for_each(|key| self.drop_attach(id, key));
        if let Some(report) = report {
            self.close(report);
        }
        if let (Some(starting), Some(started_at)) = (starting, started_at) {
            let answer = start_error.map_or(Ok(Started { started_at }), |text| refuse(ErrorKind::Start, text));
            self.reply(starting.reply, answer);
        }
        self.publish(&event, None);
    }

    pub(super) fn container_deadlines(&mut self, id: &Rc<str>, now: Instant) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if container.starting.as_ref().is_some_and(|starting| now >= starting.until) {
            self.start_failed(id, ErrorKind::Timeout, "the process did not get to execve in time");
            return;
        }
        if matches!(&container.phase, Phase::Draining { until, .. } if now >= *until) {
            let streams: Vec<Stream> = container.outputs.iter().map(|output| output.stream).collect();
            note!("warning: container {id} ended, but something outside of it holds its output open");
            streams.into_iter().for_each(|stream| self.end_output(id, stream));
            self.finish_exit_if_drained(id);
        }
    }

    pub(super) fn remove(&mut self, reply: ReplyTo, request: &ContainerRef) -> Answer<()> {
        let container = self.find(&request.container_id)?;
        if !matches!(container.phase, Phase::Exited) {
            return refuse(ErrorKind::Conflict, format!("container {} has not exited", request.container_id));
        }
        let now = Instant::now();
        let id = Rc::from(request.container_id.as_str());
        self.try_remove(Removal { id, reply, again: now, until: now + REMOVE_DEADLINE });
        Ok(())
    }

    pub(super) fn try_remove(&mut self, removal: Removal) {
        let Some(container) = self.containers.get(&removal.id) else {
            return self.reply(removal.reply, Ok(())); // a second `remove` was faster
        };
        let request = &container.record.request;
        self.hierarchies.signal(&request.cgroup_path, Signal::SIGKILL);
        match self.hierarchies.remove(&request.cgroup_path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < removal.until => {
                return self.removals.push(Removal { again: Instant::now() + REMOVE_RETRY, ..removal });
            }
            Err(error) => return self.reply::<()>(removal.reply, Err(io_error("remove cgroup")(error))),
        }
        match fs::remove_dir_all(request.container_dir.join(STATE_DIR)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return self.reply::<()>(removal.reply, Err(io_error("remove libcontainer's state")(error)));
            }
            _ => {}
        }
        self.containers.remove(&removal.id);
        self.reply(removal.reply, Ok(()));
    }
}

/// Ends a creator and its intermediate process.
fn kill_creator(creator: Pid) {
    let _gone = kill(Pid::from_raw(-creator.as_raw()), Signal::SIGKILL);
    // It may not have made its group yet.
    let _gone = kill(creator, Signal::SIGKILL);
}

fn libc_sigkill() -> i32 {
    Signal::SIGKILL as i32
}

/// How a process ended, by `waitpid`.
pub(super) fn exit_record(status: WaitStatus) -> ExitRecord {
    let (pid, exit_code, signal) = match status {
        WaitStatus::Exited(pid, code) => (pid, code, None),
        WaitStatus::Signaled(pid, signal, _) => (pid, 128 + signal as i32, Some(signal as i32)),
        other => (other.pid().unwrap_or(Pid::from_raw(0)), 255, None),
    };
    ExitRecord {
        pid: pid.as_raw(),
        exit_code,
        signal,
        finished_at: Timestamp::now(),
        oom_killed: false,
        timed_out: false,
        lost: false,
        start_error: None,
    }
}

fn failed(error: &str) -> Outcome {
    Outcome { error: Some(error.to_owned()), ..Outcome::default() }
}

/// Ours to read, a creator's to write.
pub(super) fn outcome_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

pub(super) fn null() -> io::Result<OwnedFd> {
    Ok(fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

fn null_stdio() -> io::Result<Stdio> {
    Ok(Stdio { stdin: null()?, stdout: null()?, stderr: null()? })
}
