//! What agent and shim say to each other on `<pod_dir>/shim.sock`.
//!
//! A stream of frames: four bytes of little-endian length, then one JSON object. File descriptors travel with the
//! first byte of the frame that announces them in `fds`. An old shim must serve a newer agent: unknown fields are
//! ignored, an unknown command is answered with [`ErrorKind::UnknownCommand`], and [`PROTOCOL_VERSION`] grows only
//! when a meaning changes.

use std::path::PathBuf;

use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::{ContainerRecord, ExitRecord};

/// Version that both sides put into every frame.
pub const PROTOCOL_VERSION: u32 = 1;
/// Longest frame in bytes; longer ones end the connection. An exec's arguments are the largest thing inside.
pub const MAX_FRAME: usize = 4 << 20;
/// Most file descriptors that may wait for their frame.
pub const MAX_FDS: usize = 16;

/// Agent to shim.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Request {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub v: u32,
    /// Chosen by the sender; the reply repeats it.
    pub id: u64,
    /// A name of [`command`].
    pub command: String,
    /// Arguments of the command.
    #[serde(default)]
    pub args: Value,
    /// How many file descriptors belong to this frame.
    #[serde(default)]
    pub fds: usize,
}

/// Names of the commands.
pub mod command {
    /// No arguments; answers with [`super::Hello`].
    pub const HELLO: &str = "hello";
    /// No arguments; answers with a list of [`super::ContainerRecord`].
    pub const STATE: &str = "state";
    /// [`super::CreateRequest`] to [`super::Created`].
    pub const CREATE: &str = "create";
    /// [`super::ContainerRef`] to [`super::Started`].
    pub const START: &str = "start";
    /// [`super::SignalRequest`].
    pub const SIGNAL: &str = "signal";
    /// [`super::ExecRequest`] and stdio descriptors to [`super::ExecStarted`].
    pub const EXEC: &str = "exec";
    /// [`super::ExecSignalRequest`].
    pub const EXEC_SIGNAL: &str = "exec_signal";
    /// [`super::ExecRef`] to [`super::ExecState`].
    pub const EXEC_STATE: &str = "exec_state";
    /// [`super::AttachRequest`] and its descriptors.
    pub const ATTACH: &str = "attach";
    /// [`super::ResizeRequest`].
    pub const RESIZE: &str = "resize";
    /// [`super::ContainerRef`].
    pub const REMOVE: &str = "remove";
    /// No arguments; [`super::Event`]s follow on this connection.
    pub const SUBSCRIBE: &str = "subscribe";
    /// No arguments; answers with [`super::PidNamespace`].
    pub const PID_NAMESPACE: &str = "pid_namespace";
    /// [`super::ShutdownRequest`].
    pub const SHUTDOWN: &str = "shutdown";
}

/// Shim to agent: a reply (with `id`) or an event (with `event`).
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Message {
    /// [`PROTOCOL_VERSION`] of the sender.
    #[serde(default)]
    pub v: u32,
    /// Which request this answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<Value>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// Something that happened; left as a value because a newer shim may know more kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<Value>,
    /// How many file descriptors belong to this frame.
    #[serde(default)]
    pub fds: usize,
}

/// A refused or failed command.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct ErrorBody {
    /// What sort of failure.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
}

/// Sorts of failures; [`crate::runtime::client::ShimError`] says which may be tried again.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The shim is older than the command.
    UnknownCommand,
    /// The request itself is wrong.
    Invalid,
    /// No such container or exec.
    NotFound,
    /// Not in this state (exists already, runs, does not run).
    Conflict,
    /// The container or process could not be made.
    Create,
    /// `execve` failed; the message is what users see as StartError.
    Start,
    /// The deadline passed.
    Timeout,
    /// The node refused something: file system, memory, cgroup.
    Io,
    /// A kind that this side does not know.
    #[serde(other)]
    Other,
}

/// Answer to `hello`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Hello {
    /// Crate version of the shim.
    pub version: String,
    /// Pid of the shim.
    pub pid: i32,
    /// Start time of the shim in clock ticks since boot.
    pub start_time: u64,
}

/// A container to make.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct CreateRequest {
    /// 64 hexadecimal digits.
    pub container_id: String,
    /// Name in the Pod.
    pub name: String,
    /// How often this container has been restarted.
    pub attempt: u32,
    /// `<pod_dir>/containers/<any name>`: `config.json`, `setup.json` and the mounted `rootfs`.
    pub container_dir: PathBuf,
    /// Absolute path inside every hierarchy, this container's alone.
    pub cgroup_path: PathBuf,
    /// `/var/log/pods/<ns>_<pod>_<uid>/<container>/<attempt>.log`; empty for no log.
    pub log_path: PathBuf,
    /// Bytes after which the log is rotated; 0 for never.
    pub max_log_size: u64,
    /// Log files kept in all, the current one included.
    pub max_log_files: u32,
    /// Keep a stdin that attach can write to.
    pub stdin: bool,
    /// Close that stdin when the first attach ends.
    pub stdin_once: bool,
    /// A pty instead of three pipes.
    pub terminal: bool,
    /// Deadline in milliseconds; 120 s if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// Answer to `create`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Created {
    /// Pid of the container's init in the node's pid namespace.
    pub pid: i32,
    /// When it was made.
    #[serde(with = "super::record::time")]
    pub created_at: jiff::Timestamp,
}

/// Names a container.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ContainerRef {
    /// Which.
    pub container_id: String,
}

/// Answer to `start`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Started {
    /// When it was let go.
    #[serde(with = "super::record::time")]
    pub started_at: jiff::Timestamp,
}

/// A signal to a container.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SignalRequest {
    /// Which.
    pub container_id: String,
    /// Signal number.
    pub signal: i32,
    /// To every process in the container's cgroup, not only its init.
    #[serde(default)]
    pub all: bool,
}

/// A process to run in a container. Descriptors in this order, those that are `true`: stdin, stdout, stderr.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExecRequest {
    /// Where.
    pub container_id: String,
    /// Chosen by the agent, unique in this Pod: letters, digits, `-`.
    pub exec_id: String,
    /// Arguments, environment, user, terminal; capabilities and so on come from the container's `setup.json`.
    pub process: Process,
    /// A descriptor for stdin follows; otherwise `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// A descriptor for stdout follows; otherwise `/dev/null`.
    #[serde(default)]
    pub stdout: bool,
    /// A descriptor for stderr follows; otherwise `/dev/null`.
    #[serde(default)]
    pub stderr: bool,
    /// The process and its descendants are killed after so many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// Answer to `exec`; with a terminal, the pty's master is the one descriptor of the frame.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExecStarted {
    /// Pid in the node's pid namespace.
    pub pid: i32,
}

/// Names an exec.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExecRef {
    /// Which.
    pub exec_id: String,
}

/// Answer to `exec_state`. Exits are kept for a bounded number of execs.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExecState {
    /// `None` while it runs.
    pub exit: Option<ExitRecord>,
}

/// A signal to an exec.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExecSignalRequest {
    /// Which.
    pub exec_id: String,
    /// Signal number.
    pub signal: i32,
    /// Also to its descendants.
    #[serde(default)]
    pub all: bool,
}

/// Copies of a container's output and a way to its stdin. Descriptors in this order, those that are `true`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct AttachRequest {
    /// Where.
    pub container_id: String,
    /// A pipe's read end follows; its bytes go to the container.
    #[serde(default)]
    pub stdin: bool,
    /// A pipe's write end follows; what the container prints (terminal included) goes there.
    #[serde(default)]
    pub stdout: bool,
    /// A pipe's write end follows.
    #[serde(default)]
    pub stderr: bool,
}

/// A new size of a container's terminal.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ResizeRequest {
    /// Where.
    pub container_id: String,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Answer to `pid_namespace`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PidNamespace {
    /// Where the Pod's pid namespace is pinned.
    pub path: PathBuf,
}

/// Ends the shim.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ShutdownRequest {
    /// Kill what still runs; otherwise that is a conflict.
    #[serde(default)]
    pub force: bool,
}

/// What the shim tells unasked.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A container's init ended; `exit.json` is on disk.
    Exited {
        /// The container as it is now, `exit` included.
        container: Box<ContainerRecord>,
    },
    /// An exec'd process ended.
    ExecExited {
        /// Which.
        exec_id: String,
        /// How.
        exit: ExitRecord,
    },
    /// A log file was renamed to `rotated`; compressing it is up to the agent.
    LogRotated {
        /// Whose.
        container_id: String,
        /// The finished file.
        rotated: PathBuf,
    },
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    #[error("a frame of {0} bytes is longer than the limit of {MAX_FRAME}")]
    TooLong(usize),
    /// Not the JSON expected.
    #[error("malformed frame: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// One frame as bytes.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let len = frame.len() - 4;
    let prefix = u32::try_from(len).ok().filter(|_| len <= MAX_FRAME).ok_or(FrameError::TooLong(len))?;
    frame[..4].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

/// Length of the first frame's JSON in `bytes` (after its four bytes of prefix), once it is completely there.
pub fn complete(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(prefix) = bytes.first_chunk::<4>() else { return Ok(None) };
    let len = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
    if len > MAX_FRAME {
        return Err(FrameError::TooLong(len));
    }
    Ok((bytes.len() - 4 >= len).then_some(len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_newer_agents_fields_are_ignored() -> Result<(), serde_json::Error> {
        let request: Request =
            serde_json::from_value(json!({"v": 9, "id": 1, "command": "dance", "args": {"x": 1}, "colour": "red"}))?;
        assert_eq!((request.v, request.command.as_str(), request.fds), (9, "dance", 0));
        let error: ErrorBody = serde_json::from_value(json!({"kind": "newer", "message": "m"}))?;
        assert_eq!(error.kind, ErrorKind::Other);
        Ok(())
    }

    #[test]
    fn an_endless_frame_is_refused_by_its_prefix() {
        assert!(matches!(complete(&[0xff, 0xff, 0xff, 0xff]), Err(FrameError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn frames_come_back(command in ".{0,200}", id: u64, cut in 0usize..50) {
            let request = Request { v: 1, id, command: command.clone(), args: Value::Null, fds: 0 };
            let frame = encode(&request).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let part = &frame[..frame.len() - cut.min(frame.len()).max(1)];
            prop_assert!(matches!(complete(part), Ok(None)));
            let Ok(Some(len)) = complete(&frame) else { return Err(TestCaseError::fail("incomplete")) };
            let back: Request = serde_json::from_slice(&frame[4..4 + len]).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(back.command, command);
            prop_assert_eq!(back.id, id);
        }

        #[test]
        fn hostile_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(Some(len)) = complete(&bytes) {
                let _ = serde_json::from_slice::<Request>(&bytes[4..4 + len]);
            }
        }
    }
}
