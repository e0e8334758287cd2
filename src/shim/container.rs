//! One container as the shim holds it: its record, its streams, its log and who is attached.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::OFlags;

use super::journal::note;
use super::logfile::{LogFile, Splitter, Stream, record_prefix};
use super::record::{ContainerRecord, ExitRecord};

/// Who waits for an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplyTo {
    pub(super) connection: u64,
    pub(super) id: u64,
}

/// A descriptor in the poll set.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) fd: OwnedFd,
    /// `None` while it is not polled.
    pub(super) token: Option<u64>,
}

/// Where a container is in its life.
#[derive(Debug)]
pub(super) enum Phase {
    Creating,
    Created,
    Running,
    /// Its init is reaped; its pipes are being emptied until the deadline.
    Draining {
        exit: ExitRecord,
        until: Instant,
    },
    Exited,
}

/// An unanswered `start`: done when libcontainer has written its state and the executor's report has ended.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) reply: ReplyTo,
    pub(super) until: Instant,
    pub(super) released: bool,
}

/// A container's stdout or stderr.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) stream: Stream,
    pub(super) source: Watched,
    pub(super) pace: Pace,
    splitter: Splitter,
}

impl Output {
    pub(super) fn new(stream: Stream, source: Watched) -> Output {
        Output { stream, source, pace: Pace::default(), splitter: Splitter::default() }
    }
}

/// A stream that has been read twice within so long is busy.
const BUSY: Duration = Duration::from_millis(4);
/// How long a busy stream is left alone: what comes meanwhile is read at once.
const PAUSE: Duration = Duration::from_millis(1);
/// What a busy stream's pipe holds: more than comes within a pause.
pub(super) const BUSY_PIPE: usize = 1 << 20;
/// What the others hold, a pipe's default. All pipes of a user together are limited (`pipe-user-pages-soft`).
const IDLE_PIPE: usize = 64 << 10;

/// When a stream is read. A program that writes lines one by one would wake the shim for each: twice the processor
/// time for both. So the first line is read at once, and while more follow, a millisecond's lines together.
#[derive(Debug, Default)]
pub(super) struct Pace {
    read_at: Option<Instant>,
    /// The stream is not polled until then.
    pub(super) resume_at: Option<Instant>,
    large: bool,
}

impl Pace {
    /// Notes that the pipe `fd` has been read; true if it is to be left alone until [`Self::resume_at`].
    pub(super) fn read(&mut self, fd: impl AsFd, now: Instant) -> bool {
        let busy = self.read_at.is_some_and(|last| now.duration_since(last) <= BUSY);
        self.read_at = Some(now);
        if busy {
            self.resume_at = Some(now + PAUSE);
            if !self.large {
                // best effort: a smaller one makes the writer wait sooner
                let _refused = rustix::pipe::fcntl_setpipe_size(fd, BUSY_PIPE);
                self.large = true;
            }
        }
        busy
    }

    /// Gives back what a busy stream needed.
    pub(super) fn rest(&mut self, fd: impl AsFd) {
        if std::mem::take(&mut self.large) {
            // best effort: refused as long as it holds more
            let _refused = rustix::pipe::fcntl_setpipe_size(fd, IDLE_PIPE);
        }
    }
}

/// A container's stdin.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) sink: Watched,
    pub(super) pending: Vec<u8>,
    pub(super) close_when_flushed: bool,
}

/// One attached client.
#[derive(Debug)]
pub(super) struct Attach {
    pub(super) key: u64,
    pub(super) stdin: Option<Watched>,
    pub(super) stdout: Option<Watched>,
    pub(super) stderr: Option<Watched>,
}

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) record: ContainerRecord,
    pub(super) phase: Phase,
    pub(super) outputs: Vec<Output>,
    pub(super) input: Option<Input>,
    /// The pty's master, for resizing.
    pub(super) console: Option<OwnedFd>,
    pub(super) attaches: Vec<Attach>,
    pub(super) log: Option<LogFile>,
    pub(super) log_failing: bool,
    /// Read end of the executor's report; gone once `execve` is done or failed.
    pub(super) report: Option<Watched>,
    pub(super) report_text: Vec<u8>,
    pub(super) starting: Option<Starting>,
}

impl Container {
    pub(super) fn new(record: ContainerRecord, phase: Phase) -> Container {
        Container {
            record,
            phase,
            outputs: Vec::new(),
            input: None,
            console: None,
            attaches: Vec::new(),
            log: None,
            log_failing: false,
            report: None,
            report_text: Vec::new(),
            starting: None,
        }
    }

    /// The pid to signal: known and not reaped.
    pub(super) fn live_pid(&self) -> Option<i32> {
        matches!(self.phase, Phase::Created | Phase::Running).then_some(self.record.pid).flatten()
    }

    /// Writes what came from a stream to the log, through `buffer` (room for at least one record). Returns the files
    /// that were rotated.
    pub(super) fn log(&mut self, stream: Stream, bytes: &[u8], buffer: &mut [u8]) -> Vec<PathBuf> {
        let Some(output) = self.outputs.iter_mut().find(|output| output.stream == stream) else { return Vec::new() };
        let mut writer = RecordWriter::new(self.log.as_mut(), stream, buffer);
        output.splitter.feed(bytes, &mut |tag, head, tail| writer.record(tag, head, tail));
        let (rotated, failed) = writer.finish();
        self.report_log_failure(failed);
        rotated
    }

    /// Ends a stream: what has no newline yet is logged as well.
    pub(super) fn end_log(&mut self, stream: Stream, buffer: &mut [u8]) -> Option<(Output, Vec<PathBuf>)> {
        let at = self.outputs.iter().position(|output| output.stream == stream)?;
        let mut output = self.outputs.remove(at);
        let mut writer = RecordWriter::new(self.log.as_mut(), stream, buffer);
        output.splitter.finish(&mut |tag, head, tail| writer.record(tag, head, tail));
        let (rotated, failed) = writer.finish();
        self.report_log_failure(failed);
        Some((output, rotated))
    }

    /// Once when it begins, once when it ends.
    fn report_log_failure(&mut self, failed: Option<io::Error>) {
        let path = self.record.request.log_path.display();
        match &failed {
            Some(error) if !self.log_failing => note!("error: {path}: records are lost: {error}"),
            None if self.log_failing => note!("{path} can be written again"),
            _ => {}
        }
        self.log_failing = failed.is_some();
    }
}

/// Collects records and writes them with few system calls.
struct RecordWriter<'a> {
    log: Option<&'a mut LogFile>,
    prefix: Vec<u8>,
    buffer: &'a mut [u8],
    used: usize,
    rotated: Vec<PathBuf>,
    failed: Option<io::Error>,
}

impl<'a> RecordWriter<'a> {
    fn new(log: Option<&'a mut LogFile>, stream: Stream, buffer: &'a mut [u8]) -> RecordWriter<'a> {
        let prefix = record_prefix(Timestamp::now(), stream);
        RecordWriter { log, prefix, buffer, used: 0, rotated: Vec::new(), failed: None }
    }

    fn record(&mut self, tag: u8, head: &[u8], tail: &[u8]) {
        let len = self.prefix.len() + 2 + head.len() + tail.len() + 1;
        if self.used + len > self.buffer.len() {
            self.flush();
        }
        for part in [&self.prefix, &[tag, b' '][..], head, tail, b"\n"] {
            self.buffer[self.used..self.used + part.len()].copy_from_slice(part);
            self.used += part.len();
        }
    }

    fn flush(&mut self) {
        if self.used > 0
            && let Some(log) = self.log.as_mut()
        {
            match log.append(&self.buffer[..self.used]) {
                Ok(rotated) => self.rotated.extend(rotated),
                Err(error) => self.failed = Some(error),
            }
        }
        self.used = 0;
    }

    fn finish(mut self) -> (Vec<PathBuf>, Option<io::Error>) {
        self.flush();
        (self.rotated, self.failed)
    }
}

/// Makes reads and writes of our end return at once.
pub(super) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use rustix::pipe::fcntl_getpipe_size;

    use super::*;

    #[test]
    fn only_a_busy_stream_is_left_alone() -> io::Result<()> {
        let (reader, _writer) = rustix::pipe::pipe()?;
        let mut pace = Pace::default();
        let start = Instant::now();
        assert!(!pace.read(&reader, start), "the first line is not delayed, nor is the next");
        assert!(!pace.read(&reader, start + BUSY * 2));
        assert_eq!((pace.resume_at, fcntl_getpipe_size(&reader)?), (None, IDLE_PIPE));
        let again = start + BUSY * 3;
        assert!(pace.read(&reader, again));
        assert_eq!((pace.resume_at, fcntl_getpipe_size(&reader)?), (Some(again + PAUSE), BUSY_PIPE));
        pace.rest(&reader);
        assert_eq!(fcntl_getpipe_size(&reader)?, IDLE_PIPE);
        Ok(())
    }
}
