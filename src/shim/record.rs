//! The durable truth about a container: `container.json` and `exit.json` in its directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::protocol::CreateRequest;

/// Directory of a Pod that holds one directory per container.
pub const CONTAINERS_DIR: &str = "containers";
/// File name of [`ContainerRecord`].
pub const CONTAINER_FILE: &str = "container.json";
/// File name of [`ExitRecord`].
pub const EXIT_FILE: &str = "exit.json";

/// Times on the wire and on disk: RFC 3339 with nanoseconds.
pub mod time {
    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// As text.
    pub fn serialize<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(time)
    }

    /// From text.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }

    /// The same for a time that may be missing.
    pub mod option {
        use super::{Deserialize, Deserializer, Error, Serializer, Timestamp};

        /// As text.
        pub fn serialize<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
            match time {
                Some(time) => serializer.collect_str(time),
                None => serializer.serialize_none(),
            }
        }

        /// From text.
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
            Option::<String>::deserialize(deserializer)?.map(|t| t.parse().map_err(D::Error::custom)).transpose()
        }
    }
}

/// What is known about one container.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ContainerRecord {
    /// What the agent asked for.
    #[serde(flatten)]
    pub request: CreateRequest,
    /// Pid of its init in the node's pid namespace; `None` while it is being made.
    #[serde(default)]
    pub pid: Option<i32>,
    /// Start time of that process in clock ticks since boot: a pid alone may have been reused.
    #[serde(default)]
    pub start_time: u64,
    /// When it was made.
    #[serde(default, with = "time::option")]
    pub created_at: Option<Timestamp>,
    /// When it was let go; recorded before it is done, so that nothing starts twice.
    #[serde(default, with = "time::option")]
    pub started_at: Option<Timestamp>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitRecord>,
}

/// How a container's init or an exec'd process ended.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct ExitRecord {
    /// Pid it had.
    pub pid: i32,
    /// Exit status, or 128 + the signal that ended it.
    pub exit_code: i32,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// When the shim saw it.
    #[serde(with = "time")]
    pub finished_at: Timestamp,
    /// The kernel's OOM killer was at work in its cgroup and it died by SIGKILL.
    #[serde(default)]
    pub oom_killed: bool,
    /// An exec whose deadline passed.
    #[serde(default)]
    pub timed_out: bool,
    /// The shim that was its parent is gone, so its real end is unknown (kubelet's ContainerStatusUnknown).
    #[serde(default)]
    pub lost: bool,
    /// Why `execve` failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_error: Option<String>,
}

/// Writes `value` as JSON to `<dir>/<name>`: temporary file, fsync, rename, fsync of the directory.
pub fn write_json<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    let temporary = dir.join(format!(".{name}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

/// Reads a file that [`write_json`] wrote; `None` if there is none.
pub fn read_json<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<Option<T>> {
    let path = dir.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))
}

impl ContainerRecord {
    /// The record in a container's directory, its exit included; `None` if none was begun there.
    pub fn read(container_dir: &Path) -> io::Result<Option<ContainerRecord>> {
        let Some(mut record) = read_json::<ContainerRecord>(container_dir, CONTAINER_FILE)? else { return Ok(None) };
        record.exit = read_json(container_dir, EXIT_FILE)?;
        Ok(Some(record))
    }

    /// Makes the record durable (all but `exit`, which has a file of its own).
    pub fn write(&self) -> io::Result<()> {
        let without_exit = ContainerRecord { exit: None, ..self.clone() };
        write_json(&self.request.container_dir, CONTAINER_FILE, &without_exit)
    }

    /// Whether its init is alive: the same pid with the same start time, and not a zombie.
    pub fn is_alive(&self) -> bool {
        self.exit.is_none() && self.pid.is_some_and(|pid| process_start_time(pid).is_ok_and(|t| t == self.start_time))
    }
}

/// Every container of a Pod, from disk: the truth when its shim is gone.
pub fn read_records(pod_dir: &Path) -> io::Result<Vec<ContainerRecord>> {
    let mut records = Vec::new();
    for dir in container_dirs(pod_dir)? {
        records.extend(ContainerRecord::read(&dir)?);
    }
    Ok(records)
}

/// The directories of a Pod's containers, in no particular order.
pub(crate) fn container_dirs(pod_dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(pod_dir.join(CONTAINERS_DIR)) {
        Ok(entries) => entries.map(|entry| entry.map(|e| e.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Fields of `/proc/<pid>/stat` that we use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessStat {
    pub(crate) state: u8,
    pub(crate) parent: i32,
    pub(crate) session: i32,
    pub(crate) start_time: u64,
}

pub(crate) fn process_stat(pid: i32) -> io::Result<ProcessStat> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not as expected")))
}

/// The second field is the command's name in parentheses and may hold anything: count from the last parenthesis.
fn parse_stat(text: &[u8]) -> Option<ProcessStat> {
    let end = text.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    let start_time = fields.nth(15)?.parse().ok()?;
    Some(ProcessStat { state, parent, session, start_time })
}

/// Start time of a process in clock ticks since boot; an error if there is none or it is a zombie.
pub fn process_start_time(pid: i32) -> io::Result<u64> {
    let stat = process_stat(pid)?;
    if matches!(stat.state, b'Z' | b'X') {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {pid} is a zombie")));
    }
    Ok(stat.start_time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_disk() -> io::Result<()> {
        let pod = tempfile::tempdir()?;
        let dir = pod.path().join(CONTAINERS_DIR).join("c");
        fs::create_dir_all(&dir)?;
        let request = CreateRequest { container_id: "a".repeat(64), container_dir: dir.clone(), ..Default::default() };
        let now = Timestamp::now();
        let record = ContainerRecord {
            request,
            pid: Some(7),
            start_time: 9,
            created_at: Some(now),
            started_at: None,
            exit: None,
        };
        record.write()?;
        let exit = ExitRecord {
            pid: 7,
            exit_code: 137,
            signal: Some(9),
            finished_at: now,
            oom_killed: true,
            timed_out: false,
            lost: false,
            start_error: None,
        };
        write_json(&dir, EXIT_FILE, &exit)?;
        assert_eq!(read_records(pod.path())?, vec![ContainerRecord { exit: Some(exit), ..record }]);
        assert!(read_records(&pod.path().join("nowhere"))?.is_empty());
        Ok(())
    }

    #[test]
    fn a_hostile_command_name_does_not_shift_the_fields() {
        let text = b"12 (x) R 1 (y) S 5 6 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(parse_stat(text), Some(ProcessStat { state: b'S', parent: 5, session: 7, start_time: 4711 }));
        assert_eq!(parse_stat(b"12 (x"), None);
    }

    #[test]
    fn own_start_time_is_stable() -> io::Result<()> {
        let me = std::process::id().cast_signed();
        assert_eq!(process_start_time(me)?, process_start_time(me)?);
        Ok(())
    }
}
