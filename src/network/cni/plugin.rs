//! One call of a plugin: a program that reads JSON, answers JSON, and may do anything in between (CNI specification,
//! section 2).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::CniError;
use crate::sys::child::end_with_this_thread;

/// Longest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// What is kept of the standard error, in bytes.
const MAX_COMPLAINT: usize = 4 << 10;

/// What a plugin is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// See whether the attachment works.
    Check,
    /// Detach it.
    Del,
    /// Forget attachments that are gone.
    Gc,
    /// Tell whether ADD would work.
    Status,
    /// Tell the supported versions.
    Version,
}

impl Verb {
    /// The value of `CNI_COMMAND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// A call.
pub struct Call<'a> {
    /// What to do.
    pub verb: Verb,
    /// The program's name.
    pub plugin: &'a str,
    /// Where programs are, in the order of search; also `CNI_PATH`.
    pub bin_dirs: &'a [PathBuf],
    /// `CNI_*` besides command and path.
    pub environment: &'a [(&'static str, OsString)],
    /// What it reads.
    pub request: &'a Map<String, Value>,
    /// When it is killed.
    pub until: Instant,
}

/// What a plugin says when it fails.
#[derive(Deserialize)]
struct Complaint {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

impl Call<'_> {
    /// Runs the plugin in the calling thread's namespaces and returns what it wrote.
    ///
    /// It has a process group of its own, which is killed at the deadline. It dies with this thread; what it did until
    /// then, DEL undoes.
    pub fn execute(&self) -> Result<Vec<u8>, CniError> {
        let program = self.find()?;
        let failed = |source| CniError::Start { plugin: self.plugin.to_owned(), source };
        #[allow(clippy::disallowed_methods, reason = "CNI plugins are programs")]
        let mut command = Command::new(program);
        command
            .env("CNI_COMMAND", self.verb.as_str())
            .env("CNI_PATH", std::env::join_paths(self.bin_dirs).map_err(|error| failed(io::Error::other(error)))?)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(self.input().map_err(failed)?)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        end_with_this_thread(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        let pid = Pid::from_child(&child);
        let conversation = Conversation::new(&mut child, pid).and_then(|mut talk| {
            let end = talk.listen(self.until);
            end.map(|end| (end, talk))
        });
        let (end, talk) = match conversation {
            Ok((End::Exited, talk)) => (None, Some(talk)),
            Ok((end, _)) => (Some(Ok(end)), None),
            Err(error) => (Some(Err(error)), None),
        };
        if end.is_some() {
            // also what it started itself; the leader is not reaped yet, so the group is still this one
            let _gone = kill_process_group(pid, Signal::KILL);
        }
        let status = child.wait().map_err(failed)?;
        match (end, talk) {
            (None, Some(talk)) => self.judge(status, talk),
            (Some(Err(error)), _) => Err(failed(error)),
            (Some(Ok(End::TooMuch)), _) => Err(self.nonsense(format!("answered more than {MAX_ANSWER} bytes"))),
            _ => Err(CniError::Deadline { plugin: self.plugin.to_owned(), verb: self.verb }),
        }
    }

    fn find(&self) -> Result<PathBuf, CniError> {
        let found = self.bin_dirs.iter().map(|directory| directory.join(self.plugin)).find(|path| path.is_file());
        found.ok_or_else(|| CniError::Missing {
            plugin: self.plugin.to_owned(),
            searched: self.bin_dirs.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
        })
    }

    /// A file in memory: a plugin that never reads cannot make us wait.
    fn input(&self) -> io::Result<File> {
        let mut file = File::from(rustix::fs::memfd_create("cni-request", MemfdFlags::CLOEXEC)?);
        file.write_all(&serde_json::to_vec(self.request)?)?;
        file.rewind()?;
        Ok(file)
    }

    fn judge(&self, status: ExitStatus, talk: Conversation) -> Result<Vec<u8>, CniError> {
        let Conversation { answer, complaint, .. } = talk;
        let complaint = String::from_utf8_lossy(&complaint).trim().to_owned();
        if status.success() {
            if !complaint.is_empty() {
                tracing::debug!(plugin = self.plugin, verb = self.verb.as_str(), complaint, "a CNI plugin's stderr");
            }
            return Ok(answer);
        }
        if let Ok(error) = serde_json::from_slice::<Complaint>(&answer) {
            let Complaint { code, msg, details } = error;
            return Err(CniError::Plugin { plugin: self.plugin.to_owned(), verb: self.verb, code, msg, details });
        }
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exited with status {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        };
        let said = match (complaint.as_str(), String::from_utf8_lossy(&answer[..answer.len().min(200)]).trim()) {
            ("", "") => " without a word".to_owned(),
            ("", answer) => format!(": {answer}"),
            (complaint, _) => format!(": {complaint}"),
        };
        Err(self.nonsense(format!("{how}{said}")))
    }

    /// The error of an answer that cannot be used.
    pub fn nonsense(&self, reason: String) -> CniError {
        CniError::Answer { plugin: self.plugin.to_owned(), verb: self.verb, reason }
    }
}

enum End {
    Exited,
    Deadline,
    TooMuch,
}

struct Conversation {
    exit: OwnedFd,
    stdout: Option<File>,
    stderr: Option<File>,
    answer: Vec<u8>,
    complaint: Vec<u8>,
}

impl Conversation {
    fn new(child: &mut std::process::Child, pid: Pid) -> io::Result<Self> {
        let pipe = |fd: Option<OwnedFd>| -> io::Result<Option<File>> {
            let Some(fd) = fd else { return Ok(None) };
            rustix::io::ioctl_fionbio(&fd, true)?;
            Ok(Some(File::from(fd)))
        };
        Ok(Self {
            exit: pidfd_open(pid, PidfdFlags::empty())?,
            stdout: pipe(child.stdout.take().map(OwnedFd::from))?,
            stderr: pipe(child.stderr.take().map(OwnedFd::from))?,
            answer: Vec::new(),
            complaint: Vec::new(),
        })
    }

    /// Reads until the plugin exits. What it leaves running may keep the pipes; it is not waited for.
    fn listen(&mut self, until: Instant) -> io::Result<End> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(End::Deadline);
            }
            let exited = self.wait(left)?;
            self.read()?;
            if self.answer.len() > MAX_ANSWER {
                return Ok(End::TooMuch);
            }
            if exited {
                return Ok(End::Exited);
            }
        }
    }

    /// Waits for a line or the end; true at the end.
    fn wait(&self, left: Duration) -> io::Result<bool> {
        let mut events = vec![PollFd::new(self.exit.as_fd(), PollFlags::POLLIN)];
        for pipe in [&self.stdout, &self.stderr].into_iter().flatten() {
            events.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
        }
        // rounded up, so that the deadline has passed when it passes
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut events, timeout) {
            Ok(_) => Ok(events[0].any().unwrap_or(false)),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&mut self) -> io::Result<()> {
        if drain(self.stdout.as_mut(), &mut self.answer, MAX_ANSWER + 1)? {
            self.stdout = None;
        }
        if drain(self.stderr.as_mut(), &mut self.complaint, MAX_COMPLAINT)? {
            self.stderr = None;
        }
        Ok(())
    }
}

/// Reads what is there, keeping at most `limit` bytes; true at the end of the stream.
fn drain(pipe: Option<&mut File>, into: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
    let Some(pipe) = pipe else { return Ok(false) };
    let mut buffer = [0; 8192];
    // a plugin that writes faster than we read must not keep us here
    for _ in 0..64 {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(count) => into.extend_from_slice(&buffer[..count.min(limit.saturating_sub(into.len()))]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}
