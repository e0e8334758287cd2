//! The shim's loop: one thread, one epoll, no timers but the deadlines of what is under way.

mod create;
mod exec;
mod jobs;
mod lifecycle;
mod output;
mod requests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use self::exec::{Exec, ExecJob};
use super::cgroup::Hierarchies;
use super::connection::Connection;
use super::container::{Container, Phase, ReplyTo, Watched};
use super::journal::note;
use super::logfile::Stream;
use super::pidns;
use super::protocol::{ErrorBody, ErrorKind, PidNamespace, ShutdownRequest};
use super::record::ExitRecord;
use crate::sys::scratch::Scratch;

/// Bytes read from a stream per wake-up, and room for the records made of them.
const READ_BUFFER: usize = 64 << 10;
const WRITE_BUFFER: usize = 192 << 10;
/// After so long without output the buffers' memory goes back to the kernel.
const BUFFER_IDLE: Duration = Duration::from_secs(1);
/// Exits of execs that are remembered for who asks late.
const REMEMBERED_EXITS: usize = 128;
/// Exits of unknown processes that are remembered while a creator is at work.
const MAX_UNCLAIMED: usize = 1024;
/// How long a forced shutdown waits for killed containers.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

/// What a descriptor in the poll set is.
#[derive(Clone, Debug)]
enum Source {
    Listener,
    Signals,
    Connection,
    Job,
    Report(Rc<str>),
    Output(Rc<str>, Stream),
    Input(Rc<str>),
    AttachInput(Rc<str>, u64),
    AttachOutput(Rc<str>, u64),
}

/// A creator at work, or a process on its way into a container. Its key is the token of `result`.
#[derive(Debug)]
struct Job {
    kind: JobKind,
    creator: Pid,
    result: OwnedFd,
    reply: ReplyTo,
    until: Instant,
}

#[derive(Debug)]
enum JobKind {
    Create(Rc<str>),
    Start(Rc<str>),
    Exec(Box<ExecJob>),
}

/// A `remove` that waits for the last processes of a cgroup.
#[derive(Debug)]
struct Removal {
    id: Rc<str>,
    reply: ReplyTo,
    again: Instant,
    until: Instant,
}

#[derive(Debug)]
struct Stopping {
    reply: ReplyTo,
    until: Instant,
}

type Answer<T> = Result<T, ErrorBody>;

fn refuse<T>(kind: ErrorKind, message: impl Into<String>) -> Answer<T> {
    Err(ErrorBody { kind, message: message.into() })
}

fn io_error(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> ErrorBody {
    move |error| ErrorBody { kind: ErrorKind::Io, message: format!("{what}: {error}") }
}

type Sources = BTreeMap<u64, Source>;

/// Puts a descriptor back into the poll set, unless it is there.
fn poll(epoll: &Epoll, sources: &mut Sources, watched: &mut Watched, flags: EpollFlags, token: u64, source: Source) {
    if watched.token.is_none() && epoll.add(&watched.fd, EpollEvent::new(flags, token)).is_ok() {
        sources.insert(token, source);
        watched.token = Some(token);
    }
}

/// Takes a descriptor out of the poll set.
fn unpoll(epoll: &Epoll, sources: &mut Sources, watched: &mut Watched) {
    if let Some(token) = watched.token.take() {
        sources.remove(&token);
        // Explicitly: a copy of the descriptor in a forked child would keep the registration alive.
        let _gone_already = epoll.delete(&watched.fd);
    }
}

/// The shim of one Pod.
#[derive(Debug)]
pub(super) struct Server {
    pod_dir: PathBuf,
    epoll: Epoll,
    signals: SignalFd,
    listener: UnixListener,
    hierarchies: Hierarchies,
    sources: Sources,
    next_key: u64,
    connections: BTreeMap<u64, Connection>,
    containers: BTreeMap<Rc<str>, Container>,
    execs: BTreeMap<String, Exec>,
    exec_exits: VecDeque<(String, ExitRecord)>,
    jobs: BTreeMap<u64, Job>,
    /// Reaped while a creator was at work that may yet say whose they are.
    unclaimed: Vec<(i32, WaitStatus)>,
    removals: Vec<Removal>,
    pid_namespace: Option<pidns::PidNamespace>,
    stopping: Option<Stopping>,
    stopped: bool,
    scratch: Scratch,
    scratch_used: Option<Instant>,
}

impl Server {
    pub(super) fn new(pod_dir: PathBuf, listener: UnixListener, hierarchies: Hierarchies) -> io::Result<Server> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        let size = NonZeroUsize::new(READ_BUFFER + WRITE_BUFFER).unwrap_or(NonZeroUsize::MIN);
        let mut server = Server {
            pod_dir,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            signals: SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
            listener,
            hierarchies,
            sources: BTreeMap::new(),
            next_key: 0,
            connections: BTreeMap::new(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            exec_exits: VecDeque::new(),
            jobs: BTreeMap::new(),
            unclaimed: Vec::new(),
            removals: Vec::new(),
            pid_namespace: None,
            stopping: None,
            stopped: false,
            scratch: Scratch::new(size)?,
            scratch_used: None,
        };
        for source in [Source::Listener, Source::Signals] {
            let key = server.key();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, key);
            match source {
                Source::Listener => server.epoll.add(&server.listener, event)?,
                _ => server.epoll.add(&server.signals, event)?,
            }
            server.sources.insert(key, source);
        }
        server.recover()?;
        Ok(server)
    }

    /// Serves until `shutdown`.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 32];
        while !self.stopped {
            let count = match self.epoll.wait(&mut events, self.patience()) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..count] {
                // A source may be gone because of an earlier event of this round.
                if let Some(source) = self.sources.get(&event.data()).cloned() {
                    self.handle(event.data(), source, event.events());
                }
            }
            self.deadlines();
        }
        Ok(())
    }

    fn handle(&mut self, token: u64, source: Source, flags: EpollFlags) {
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.reap(),
            Source::Connection => self.on_connection(token, flags),
            Source::Job => self.on_job(token),
            Source::Report(id) => self.on_report(&id),
            Source::Output(id, stream) => self.on_output(&id, stream),
            Source::Input(id) => self.on_input_writable(&id),
            Source::AttachInput(id, key) => self.on_attach_input(&id, key),
            Source::AttachOutput(id, key) => self.drop_attach(&id, key),
        }
    }

    fn key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    /// Puts a descriptor into the poll set.
    fn watch(&mut self, fd: OwnedFd, flags: EpollFlags, source: Source) -> io::Result<Watched> {
        let token = self.key();
        self.epoll.add(&fd, EpollEvent::new(flags, token))?;
        self.sources.insert(token, source);
        Ok(Watched { fd, token: Some(token) })
    }

    fn rewatch(&mut self, watched: &mut Watched, flags: EpollFlags, source: Source) {
        let token = self.key();
        poll(&self.epoll, &mut self.sources, watched, flags, token, source);
    }

    fn unwatch(&mut self, watched: &mut Watched) {
        unpoll(&self.epoll, &mut self.sources, watched);
    }

    fn close(&mut self, mut watched: Watched) {
        self.unwatch(&mut watched);
    }

    /// How long nothing needs to happen by itself.
    fn patience(&self) -> EpollTimeout {
        let jobs = self.jobs.values().map(|job| job.until);
        let containers = self.containers.values().flat_map(|container| {
            let draining = match &container.phase {
                Phase::Draining { until, .. } => Some(*until),
                _ => None,
            };
            let paused = container.outputs.iter().filter_map(|output| output.pace.resume_at);
            [draining, container.starting.as_ref().map(|s| s.until)].into_iter().flatten().chain(paused)
        });
        let execs = self.execs.values().filter_map(|exec| exec.until);
        let removals = self.removals.iter().map(|removal| removal.again);
        let rest = [self.scratch_used.map(|t| t + BUFFER_IDLE), self.stopping.as_ref().map(|s| s.until)];
        let next = jobs.chain(containers).chain(execs).chain(removals).chain(rest.into_iter().flatten()).min();
        let Some(next) = next else { return EpollTimeout::NONE };
        // Rounded up, so that a wake-up is not too early and repeated.
        let millis = next.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
        EpollTimeout::try_from(i32::try_from(millis).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::NONE)
    }

    fn deadlines(&mut self) {
        let now = Instant::now();
        self.resume_outputs(now);
        if self.scratch_used.is_some_and(|used| now >= used + BUFFER_IDLE) {
            self.scratch.release();
            self.scratch_used = None;
            for output in self.containers.values_mut().flat_map(|container| &mut container.outputs) {
                output.pace.rest(&output.source.fd);
            }
        }
        let late: Vec<u64> = self.jobs.iter().filter(|(_, job)| now >= job.until).map(|(key, _)| *key).collect();
        late.into_iter().for_each(|key| self.job_timed_out(key));
        let ids: Vec<Rc<str>> = self.containers.keys().cloned().collect();
        for id in ids {
            self.container_deadlines(&id, now);
        }
        self.exec_deadlines(now);
        for removal in std::mem::take(&mut self.removals) {
            if now >= removal.again { self.try_remove(removal) } else { self.removals.push(removal) }
        }
        self.try_stop(now);
    }

    /// Reaps everything: also processes that nobody waits for, whose zombies would keep a pid namespace from ending.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(status) => status,
            };
            let Some(pid) = status.pid().map(Pid::as_raw) else { continue };
            if !self.claim_exit(pid, status) && !self.jobs.is_empty() {
                if self.unclaimed.len() == MAX_UNCLAIMED {
                    self.unclaimed.remove(0);
                }
                self.unclaimed.push((pid, status));
            }
        }
    }

    /// Finds whose end this is.
    fn claim_exit(&mut self, pid: i32, status: WaitStatus) -> bool {
        let container = self.containers.iter().find(|(_, c)| c.live_pid() == Some(pid)).map(|(id, _)| id.clone());
        if let Some(id) = container {
            self.container_exited(&id, status);
            return true;
        }
        let exec = self.execs.iter().find(|(_, exec)| exec.pid == pid).map(|(id, _)| id.clone());
        if let Some(id) = exec {
            self.exec_exited(&id, status);
            return true;
        }
        if self.pid_namespace.as_ref().is_some_and(|namespace| namespace.init.as_raw() == pid) {
            note!("error: the init of the Pod's pid namespace ended: {status:?}");
            if let Some(namespace) = self.pid_namespace.take()
                && let Err(error) = namespace.destroy()
            {
                note!("warning: unpin the pid namespace: {error}");
            }
            return true;
        }
        false
    }

    /// Whether a child has ended that nobody has asked after yet.
    fn is_unclaimed(&self, pid: Pid) -> bool {
        self.unclaimed.iter().any(|(unclaimed, _)| *unclaimed == pid.as_raw())
    }

    /// The exit of a process that a creator has only now told us about.
    fn claim_early_exit(&mut self, pid: i32) {
        if let Some(at) = self.unclaimed.iter().position(|(unclaimed, _)| *unclaimed == pid) {
            let (pid, status) = self.unclaimed.swap_remove(at);
            self.claim_exit(pid, status);
        }
        if self.jobs.is_empty() {
            self.unclaimed = Vec::new();
        }
    }

    fn pid_namespace(&mut self) -> Answer<PidNamespace> {
        if self.pid_namespace.is_none() {
            let made = pidns::PidNamespace::create(&self.pod_dir).map_err(io_error("make the pid namespace"))?;
            self.pid_namespace = Some(made);
        }
        let path = self.pid_namespace.as_ref().map(|namespace| namespace.path.clone()).unwrap_or_default();
        Ok(PidNamespace { path })
    }

    fn shutdown(&mut self, to: ReplyTo, request: &ShutdownRequest) -> Answer<()> {
        let running = self.containers.values().filter(|c| !matches!(c.phase, Phase::Exited)).count();
        if running > 0 && !request.force {
            return refuse(
                ErrorKind::Conflict,
                format!("{running} containers are not finished; stop them or use force"),
            );
        }
        for container in self.containers.values().filter(|c| !matches!(c.phase, Phase::Exited)) {
            self.hierarchies.signal(&container.record.request.cgroup_path, Signal::SIGKILL);
        }
        self.stopping = Some(Stopping { reply: to, until: Instant::now() + SHUTDOWN_PATIENCE });
        Ok(())
    }

    fn try_stop(&mut self, now: Instant) {
        let Some(stopping) = &self.stopping else { return };
        let finished = self.jobs.is_empty() && self.containers.values().all(|c| matches!(c.phase, Phase::Exited));
        if !finished && now < stopping.until {
            return;
        }
        let reply = stopping.reply;
        self.stopping = None;
        if !finished {
            let text = "killed containers have not ended; try again";
            return self.reply::<()>(reply, refuse(ErrorKind::Timeout, text));
        }
        if let Some(namespace) = self.pid_namespace.take()
            && let Err(error) = namespace.destroy()
        {
            note!("warning: unpin the pid namespace: {error}");
        }
        let socket = self.pod_dir.join(super::SOCKET_FILE);
        if let Err(error) = std::fs::remove_file(&socket) {
            note!("warning: remove {}: {error}", socket.display());
        }
        self.reply(reply, Ok(()));
        self.stopped = true;
    }
}

/// Reads what a pipe has, without waiting. `true` at its end.
fn read_available(fd: impl AsFd, into: &mut Vec<u8>, limit: usize) -> bool {
    let mut chunk = [0; 4096];
    loop {
        match rustix::io::read(&fd, &mut chunk) {
            Ok(0) => return true,
            Ok(read) => into.extend_from_slice(&chunk[..read.min(limit.saturating_sub(into.len()))]),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return false,
            Err(_) => return true,
        }
    }
}
