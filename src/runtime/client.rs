//! The agent's side of a Pod's shim: launch it, adopt it after a restart, and ask it for things.
//!
//! One connection carries every request in flight, the events, and the descriptors of exec and attach, whose bytes
//! then go straight between container and agent.

mod launcher;
mod link;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::termios::{Winsize, tcsetwinsize};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::unix::pipe;
use tokio::sync::broadcast;

pub use self::launcher::{ShimLauncher, ShimOptions};
use self::link::Link;
use crate::shim::protocol::{
    AttachRequest, ContainerRef, ErrorBody, ErrorKind, Event, ExecRef, ExecSignalRequest, ExecStarted, ExecState,
    PidNamespace, ResizeRequest, ShutdownRequest, SignalRequest, command,
};
pub use crate::shim::protocol::{CreateRequest, Created, ExecRequest, Hello, Started};
pub use crate::shim::record::{ContainerRecord, ExitRecord, process_start_time, read_records};

/// Deadline of requests that only need the shim to be alive.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of requests that make something; the shim's own deadlines are shorter and answer first.
const WORK_DEADLINE: Duration = Duration::from_secs(130);

/// Why a shim did not do what it was asked.
///
/// Retryable: [`Timeout`](Self::Timeout), [`Io`](Self::Io). After [`Disconnected`](Self::Disconnected) reconnect, or
/// read the truth from disk with [`read_records`] and launch a new shim. The rest is terminal for the request:
/// the request, the Pod or the state must change.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// No shim answers at the socket, or it went away.
    #[error("the Pod's shim is not there")]
    Disconnected,
    /// Nothing was heard in time.
    #[error("the shim did not answer `{0}` in time")]
    Timeout(String),
    /// The shim could not be started; its own words.
    #[error("launch the shim: {0}")]
    Launch(String),
    /// `execve` failed: the text that users see as StartError.
    #[error("{0}")]
    Start(String),
    /// The container or process could not be made.
    #[error("{0}")]
    Create(String),
    /// No such container or exec.
    #[error("{0}")]
    NotFound(String),
    /// Not in this state.
    #[error("{0}")]
    Conflict(String),
    /// The request is wrong, or newer than the shim.
    #[error("{0}")]
    Invalid(String),
    /// The node refused something.
    #[error("{0}")]
    Io(String),
}

impl From<ErrorBody> for ShimError {
    fn from(error: ErrorBody) -> ShimError {
        let text = error.message;
        match error.kind {
            ErrorKind::UnknownCommand | ErrorKind::Invalid => ShimError::Invalid(text),
            ErrorKind::NotFound => ShimError::NotFound(text),
            ErrorKind::Conflict => ShimError::Conflict(text),
            ErrorKind::Create => ShimError::Create(text),
            ErrorKind::Start => ShimError::Start(text),
            ErrorKind::Timeout => ShimError::Timeout(text),
            ErrorKind::Io | ErrorKind::Other => ShimError::Io(text),
        }
    }
}

impl From<io::Error> for ShimError {
    fn from(error: io::Error) -> ShimError {
        ShimError::Io(error.to_string())
    }
}

/// What a shim tells by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum ShimEvent {
    /// A container ended; the record has its exit.
    Exited(Box<ContainerRecord>),
    /// An exec'd process ended.
    ExecExited {
        /// Which.
        exec_id: String,
        /// How.
        exit: ExitRecord,
    },
    /// A log file is finished and may be compressed.
    LogRotated {
        /// Whose.
        container_id: String,
        /// The finished file.
        rotated: PathBuf,
    },
    /// The connection is gone; nothing follows.
    Disconnected,
}

impl From<Event> for ShimEvent {
    fn from(event: Event) -> ShimEvent {
        match event {
            Event::Exited { container } => ShimEvent::Exited(container),
            Event::ExecExited { exec_id, exit } => ShimEvent::ExecExited { exec_id, exit },
            Event::LogRotated { container_id, rotated } => ShimEvent::LogRotated { container_id, rotated },
        }
    }
}

/// A Pod's shim. Clones share one connection, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct Shim {
    link: Arc<Link>,
}

impl Shim {
    /// Connects to the shim of a Pod and subscribes to its events. [`ShimError::Disconnected`] if there is none.
    pub async fn connect(pod_dir: &Path) -> Result<Shim, ShimError> {
        let shim = Shim { link: Arc::new(Link::open(pod_dir).await?) };
        shim.ask::<_, Hello>(command::HELLO, &no_args(), REQUEST_DEADLINE).await?;
        shim.ask::<_, ()>(command::SUBSCRIBE, &no_args(), REQUEST_DEADLINE).await?;
        Ok(shim)
    }

    async fn ask<A: Serialize, T: DeserializeOwned>(
        &self,
        name: &str,
        args: &A,
        deadline: Duration,
    ) -> Result<T, ShimError> {
        let (value, _) = self.link.request(name, args, Vec::new(), deadline).await?;
        decode(value)
    }

    /// Who the shim is.
    pub async fn hello(&self) -> Result<Hello, ShimError> {
        self.ask(command::HELLO, &no_args(), REQUEST_DEADLINE).await
    }

    /// Every container that the shim holds, those that have ended included until they are removed.
    pub async fn state(&self) -> Result<Vec<ContainerRecord>, ShimError> {
        self.ask(command::STATE, &no_args(), REQUEST_DEADLINE).await
    }

    /// Makes a container from its bundle: everything but `execve`. Refused if its directory has a record already.
    pub async fn create(&self, request: CreateRequest) -> Result<Created, ShimError> {
        let deadline = request.timeout_ms.map_or(WORK_DEADLINE, |ms| Duration::from_millis(ms) + REQUEST_DEADLINE);
        self.ask(command::CREATE, &request, deadline).await
    }

    /// Lets a created container go. [`ShimError::Start`] if `execve` failed: then its exit is recorded with code 128.
    pub async fn start(&self, id: &str) -> Result<Started, ShimError> {
        self.ask(command::START, &ContainerRef { container_id: id.to_owned() }, WORK_DEADLINE).await
    }

    /// Signals a container's init, or `all` processes in its cgroup.
    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<(), ShimError> {
        let request = SignalRequest { container_id: id.to_owned(), signal, all };
        self.ask(command::SIGNAL, &request, REQUEST_DEADLINE).await
    }

    /// Runs a process in a container. The stdio flags of `request` are set from `stdio`.
    pub async fn exec(&self, mut request: ExecRequest, stdio: ExecStdio) -> Result<ExecHandle, ShimError> {
        let terminal = request.process.terminal().unwrap_or(false);
        let mut fds = Vec::new();
        (request.stdin, request.stdout, request.stderr) = (false, false, false);
        if !terminal {
            for (fd, flag) in [
                (stdio.stdin, &mut request.stdin),
                (stdio.stdout, &mut request.stdout),
                (stdio.stderr, &mut request.stderr),
            ] {
                *flag = fd.is_some();
                fds.extend(fd);
            }
        }
        // Before the request: the process may end before the answer is read.
        let events = self.link.events();
        let (value, fds) = self.link.request(command::EXEC, &request, fds, WORK_DEADLINE).await?;
        let started: ExecStarted = decode(value)?;
        let tty = fds.into_iter().next();
        Ok(ExecHandle { shim: self.clone(), exec_id: request.exec_id, pid: started.pid, tty, events })
    }

    /// How an exec ended; `None` while it runs. For execs of an agent before a restart.
    pub async fn exec_state(&self, exec_id: &str) -> Result<Option<ExitRecord>, ShimError> {
        let request = ExecRef { exec_id: exec_id.to_owned() };
        Ok(self.ask::<_, ExecState>(command::EXEC_STATE, &request, REQUEST_DEADLINE).await?.exit)
    }

    /// Copies of what a container prints from now on, and its stdin if `stdin` (and it was created with one).
    pub async fn attach(&self, id: &str, stdin: bool, stdout: bool, stderr: bool) -> Result<AttachHandle, ShimError> {
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut handle = AttachHandle { stdin: None, stdout: None, stderr: None };
        if stdin {
            let (sender, receiver) = pipe::pipe()?;
            fds.push(receiver.into_blocking_fd()?);
            handle.stdin = Some(sender);
        }
        for (wanted, end) in [(stdout, &mut handle.stdout), (stderr, &mut handle.stderr)] {
            if wanted {
                let (sender, receiver) = pipe::pipe()?;
                fds.push(sender.into_blocking_fd()?);
                *end = Some(receiver);
            }
        }
        let request = AttachRequest { container_id: id.to_owned(), stdin, stdout, stderr };
        let (value, _) = self.link.request(command::ATTACH, &request, fds, REQUEST_DEADLINE).await?;
        decode::<()>(value)?;
        Ok(handle)
    }

    /// Sets the size of a container's terminal.
    pub async fn resize(&self, id: &str, width: u16, height: u16) -> Result<(), ShimError> {
        let request = ResizeRequest { container_id: id.to_owned(), width, height };
        self.ask(command::RESIZE, &request, REQUEST_DEADLINE).await
    }

    /// Removes what is left of a container that has exited: cgroup and runtime state. Its directory stays.
    pub async fn remove(&self, id: &str) -> Result<(), ShimError> {
        self.ask(command::REMOVE, &ContainerRef { container_id: id.to_owned() }, REQUEST_DEADLINE).await
    }

    /// The path of the pid namespace that the Pod's containers share; made on first use.
    pub async fn pid_namespace(&self) -> Result<PathBuf, ShimError> {
        Ok(self.ask::<_, PidNamespace>(command::PID_NAMESPACE, &no_args(), REQUEST_DEADLINE).await?.path)
    }

    /// Ends the shim. Refused while containers run, unless `force`, which kills them.
    pub async fn shutdown(&self, force: bool) -> Result<(), ShimError> {
        self.ask(command::SHUTDOWN, &ShutdownRequest { force }, REQUEST_DEADLINE * 2).await
    }

    /// What happens from now on. A receiver that lags behind loses events and is told so: ask [`state`](Self::state).
    pub fn events(&self) -> broadcast::Receiver<ShimEvent> {
        self.link.events()
    }
}

fn no_args() -> Value {
    Value::Object(serde_json::Map::new())
}

fn decode<T: DeserializeOwned>(value: Value) -> Result<T, ShimError> {
    serde_json::from_value(value).map_err(|e| ShimError::Io(format!("the shim's answer: {e}")))
}

/// Descriptors for an exec without a terminal; `/dev/null` for those that are missing.
#[derive(Debug, Default)]
pub struct ExecStdio {
    /// Read by the process.
    pub stdin: Option<OwnedFd>,
    /// Written by the process.
    pub stdout: Option<OwnedFd>,
    /// Written by the process.
    pub stderr: Option<OwnedFd>,
}

/// A process that runs in a container. Dropping the handle does not end it.
#[derive(Debug)]
pub struct ExecHandle {
    shim: Shim,
    exec_id: String,
    /// Pid in the node's pid namespace.
    pub pid: i32,
    /// The pty's master, if a terminal was asked for.
    pub tty: Option<OwnedFd>,
    events: broadcast::Receiver<ShimEvent>,
}

impl ExecHandle {
    /// Waits for its end.
    pub async fn wait(&mut self) -> Result<ExitRecord, ShimError> {
        loop {
            match self.events.recv().await {
                Ok(ShimEvent::ExecExited { exec_id, exit }) if exec_id == self.exec_id => return Ok(exit),
                Ok(ShimEvent::Disconnected) | Err(broadcast::error::RecvError::Closed) => {
                    return Err(ShimError::Disconnected);
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    if let Some(exit) = self.shim.exec_state(&self.exec_id).await? {
                        return Ok(exit);
                    }
                }
                Ok(_) => {}
            }
        }
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), ShimError> {
        let tty = self.tty.as_ref().ok_or_else(|| ShimError::Conflict("the process has no terminal".to_owned()))?;
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(tty.as_fd(), size).map_err(|e| ShimError::Io(format!("resize: {e}")))
    }

    /// Signals the process and, if `all`, its descendants.
    pub async fn signal(&self, signal: i32, all: bool) -> Result<(), ShimError> {
        let request = ExecSignalRequest { exec_id: self.exec_id.clone(), signal, all };
        self.shim.ask(command::EXEC_SIGNAL, &request, REQUEST_DEADLINE).await
    }

    /// Kills the process and its descendants.
    pub async fn kill(&self) -> Result<(), ShimError> {
        self.signal(nix::libc::SIGKILL, true).await
    }
}

/// An attached client's ends. A client that does not read what the container prints is dropped: end of file.
#[derive(Debug)]
pub struct AttachHandle {
    /// To the container's stdin; dropping it is end of file (and closes the container's stdin if `stdinOnce`).
    pub stdin: Option<pipe::Sender>,
    /// What the container prints; everything, for one with a terminal.
    pub stdout: Option<pipe::Receiver>,
    /// What the container prints to stderr.
    pub stderr: Option<pipe::Receiver>,
}
