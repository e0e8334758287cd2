//! How a container ended, in the words of the API: reason, exit code and termination message.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use k8s_openapi::api::core::v1::Container;

use super::sandbox::INSTANCE_FILE;
use crate::pod::model::Exit;
use crate::runtime::client::ContainerRecord;

/// Name of the file that is mounted at `terminationMessagePath`, in the container's directory.
pub(super) const MESSAGE_FILE: &str = "termination-log";

/// Longest message from the file, bytes (`MaxContainerTerminationMessageLength`).
const MAX_MESSAGE: usize = 4096;
/// With `FallbackToLogsOnError`: the last so many bytes and lines of the log.
const MAX_LOG_BYTES: usize = 2048;
const MAX_LOG_LINES: usize = 80;

/// The end of a container from its record. The container's specification says where its message is; without it there
/// is none.
pub(super) fn exit(record: &ContainerRecord, container: Option<&Container>) -> Exit {
    let id = record.request.container_id.clone();
    let Some(exit) = &record.exit else {
        return crate::pod::fold::lost(id, record.started_at);
    };
    let reason = match exit {
        _ if exit.start_error.is_some() => "StartError",
        _ if exit.lost => "ContainerStatusUnknown",
        _ if exit.oom_killed => "OOMKilled",
        _ if exit.exit_code == 0 => "Completed",
        _ => "Error",
    };
    let message = match &exit.start_error {
        Some(error) => error.clone(),
        None => container.and_then(|c| message(record, c)).unwrap_or_default(),
    };
    Exit {
        id,
        code: exit.exit_code,
        signal: 0,
        reason: reason.to_owned(),
        message,
        started_at: record.started_at,
        finished_at: Some(exit.finished_at),
    }
}

fn message(record: &ContainerRecord, container: &Container) -> Option<String> {
    let dir = &record.request.container_dir;
    if !dir.join(INSTANCE_FILE).exists() {
        return None;
    }
    let text = read_end(&dir.join(MESSAGE_FILE), MAX_MESSAGE).unwrap_or_default();
    let failed = record.exit.as_ref().is_some_and(|exit| exit.exit_code != 0);
    let fallback = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if text.is_empty() && failed && fallback {
        return log_tail(&record.request.log_path).ok();
    }
    Some(text)
}

/// The last `limit` bytes of a file as text (`pkg/util/tail`).
fn read_end(path: &Path, limit: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if length > limit {
        let back = i64::try_from(limit).unwrap_or(i64::MAX);
        file.seek(SeekFrom::End(-back))?;
    }
    let mut bytes = Vec::with_capacity(length.min(limit));
    file.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The content of the last lines of a CRI log, without its prefixes.
fn log_tail(path: &Path) -> io::Result<String> {
    // a line's prefix (time, stream, tag) is under 64 bytes
    let raw = read_end(path, MAX_LOG_BYTES + 64 * MAX_LOG_LINES)?;
    let mut text = String::new();
    for line in raw.lines().filter(|line| line.len() > 20 && line.as_bytes()[4] == b'-') {
        let mut fields = line.splitn(4, ' ');
        let (Some(tag), Some(content)) = (fields.nth(2), fields.next()) else { continue };
        text.push_str(content);
        if tag.starts_with('F') {
            text.push('\n');
        }
    }
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let tail = lines[lines.len().saturating_sub(MAX_LOG_LINES)..].concat();
    let mut start = tail.len().saturating_sub(MAX_LOG_BYTES);
    while !tail.is_char_boundary(start) {
        start += 1;
    }
    Ok(tail[start..].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_has_no_prefixes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = String::new();
        for i in 0..100 {
            log.push_str(&format!("2026-11-22T19:00:00.000000001Z stdout F line {i}\n"));
        }
        log.push_str("2026-11-22T19:00:00.000000001Z stderr P half \n2026-11-22T19:00:00.000000001Z stderr F whole\n");
        std::fs::write(&path, log).unwrap();
        let tail = log_tail(&path).unwrap();
        assert!(tail.ends_with("line 99\nhalf whole\n"), "{tail}");
        assert_eq!(tail.lines().count(), MAX_LOG_LINES);
        assert!(tail.starts_with("line 21\n"), "{tail}");
    }
}
