//! Making containers: from a request to a process that waits for `start`.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::fcntl::OFlag;
use nix::sys::epoll::EpollFlags;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, pipe2};

use super::jobs::{null, outcome_socket};
use super::{Answer, JobKind, Server, Source, io_error, refuse};
use crate::shim::cgroup::is_valid_path;
use crate::shim::container::{Container, Input, Output, Phase, ReplyTo, Watched, set_nonblocking};
use crate::shim::creator::{self, Outcome, STATE_DIR, Stdio, Task};
use crate::shim::journal::note;
use crate::shim::logfile::{LogFile, Stream};
use crate::shim::protocol::{CreateRequest, Created, ErrorKind};
use crate::shim::record::{CONTAINER_FILE, CONTAINERS_DIR, ContainerRecord};

const CREATE_DEADLINE: Duration = Duration::from_secs(120);

impl Server {
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

    fn container_pipes(&mut self, id: &Rc<str>, container: &mut Container) -> io::Result<Stdio> {
        let mut writers = Vec::with_capacity(2);
        for stream in [Stream::Stdout, Stream::Stderr] {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&reader)?;
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

    pub(super) fn created(&mut self, reply: ReplyTo, id: &Rc<str>, outcome: Outcome, console: Option<OwnedFd>) {
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

    pub(super) fn create_failed(&mut self, reply: ReplyTo, id: &Rc<str>, kind: ErrorKind, error: &str) {
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
    pub(super) fn forget(&self, request: &CreateRequest) {
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
}

fn null_stdio() -> io::Result<Stdio> {
    Ok(Stdio { stdin: null()?, stdout: null()?, stderr: null()? })
}
