//! Start, signal, exit, remove; and what an earlier shim left behind.

use std::fs;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::jobs::outcome_socket;
use super::{Answer, JobKind, Removal, Server, io_error, read_available, refuse};
use crate::shim::container::{Container, Phase, ReplyTo, Starting};
use crate::shim::creator::{self, STATE_DIR, Task};
use crate::shim::journal::note;
use crate::shim::logfile::Stream;
use crate::shim::protocol::{ContainerRef, ErrorBody, ErrorKind, Event, SignalRequest, Started};
use crate::shim::record::{ContainerRecord, EXIT_FILE, ExitRecord, container_dirs, write_json};

pub(super) const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a grandchild may hold a dead container's pipes.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);
const REMOVE_RETRY: Duration = Duration::from_millis(10);
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
/// Longest StartError text.
const REPORT_LIMIT: usize = 4 << 10;

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
    pub(super) fn start_failed(&mut self, id: &Rc<str>, kind: ErrorKind, error: &str) {
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
    pub(super) fn answer_start(&mut self, id: &Rc<str>) {
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
        exit.oom_killed = exit.exit_code == 128 + Signal::SIGKILL as i32 && self.hierarchies.oom_kills(&cgroup) > 0;
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
            for stream in streams {
                self.drain_output(id, stream);
                self.end_output(id, stream);
            }
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
