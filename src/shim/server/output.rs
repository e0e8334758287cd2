//! What containers print, and who is attached to it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use super::{Answer, READ_BUFFER, Server, Source, io_error, poll, refuse, unpoll};
use crate::shim::container::{Attach, BUSY_PIPE, Phase, Watched, set_nonblocking};
use crate::shim::logfile::Stream;
use crate::shim::protocol::{AttachRequest, ErrorBody, ErrorKind, Event, ResizeRequest};

/// Kernel memory between the shim and an attached client; one that falls further behind is dropped.
const ATTACH_PIPE: usize = 1 << 20;
/// Until a stream is polled again that the kernel refused to poll.
const REFUSED: Duration = Duration::from_secs(1);
/// Full reads of one stream in a row.
const READS: usize = 8;
/// Bytes taken from an attached client at a time.
const INPUT_CHUNK: usize = 16 << 10;

impl Server {
    /// Logs what is there, but only so much that no container starves another.
    pub(super) fn on_output(&mut self, id: &Rc<str>, stream: Stream) {
        let mut left = READS;
        while left > 0 && self.read_output(id, stream) == READ_BUFFER {
            left -= 1;
        }
        let Some(container) = self.containers.get_mut(id) else { return };
        let is_pipe = container.console.is_none();
        let Some(output) = container.outputs.iter_mut().find(|output| output.stream == stream) else { return };
        // with more to read it goes on in the next round
        if is_pipe && left > 0 && output.pace.read(&output.source.fd, Instant::now()) {
            unpoll(&self.epoll, &mut self.sources, &mut output.source);
        }
    }

    /// Polls streams again that were left alone long enough.
    pub(super) fn resume_outputs(&mut self, now: Instant) {
        for (id, container) in &mut self.containers {
            for output in &mut container.outputs {
                if output.pace.resume_at.take_if(|at| *at <= now).is_some() {
                    let source = Source::Output(id.clone(), output.stream);
                    self.next_key += 1;
                    let watched = &mut output.source;
                    poll(&self.epoll, &mut self.sources, watched, EpollFlags::EPOLLIN, self.next_key, source);
                    if watched.token.is_none() {
                        output.pace.resume_at = Some(now + REFUSED); // the kernel has no memory for it now
                    }
                }
            }
        }
    }

    /// Logs what a stream's pipe holds, and no more: something may go on writing.
    pub(super) fn drain_output(&mut self, id: &Rc<str>, stream: Stream) {
        for _ in 0..BUSY_PIPE / READ_BUFFER {
            if self.read_output(id, stream) == 0 {
                break;
            }
        }
    }

    /// Reads once and logs what came; how much that was.
    fn read_output(&mut self, id: &Rc<str>, stream: Stream) -> usize {
        let Some(container) = self.containers.get_mut(id) else { return 0 };
        let Some(output) = container.outputs.iter().find(|output| output.stream == stream) else { return 0 };
        self.scratch_used = Some(Instant::now());
        let (input, records) = self.scratch.bytes().split_at_mut(READ_BUFFER);
        let read = match rustix::io::read(&output.source.fd, &mut *input) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return 0,
            Err(_) => 0, // a pty says EIO when its last user is gone
        };
        if read == 0 {
            self.end_output(id, stream);
            self.finish_exit_if_drained(id);
            return 0;
        }
        let input = &input[..read];
        let rotated = container.log(stream, input, records);
        let slow: Vec<u64> = container
            .attaches
            .iter()
            .filter_map(|attach| {
                let sink = match stream {
                    Stream::Stdout => attach.stdout.as_ref()?,
                    Stream::Stderr => attach.stderr.as_ref()?,
                };
                // All of it or not at all: a client that is behind must not hold up the container.
                let written = rustix::io::write(&sink.fd, input);
                (written != Ok(input.len())).then_some(attach.key)
            })
            .collect();
        slow.into_iter().for_each(|key| self.drop_attach(id, key));
        for rotated in rotated {
            self.publish(&Event::LogRotated { container_id: id.to_string(), rotated }, None);
        }
        read
    }

    /// A stream's end: what is left of its last line becomes a record.
    pub(super) fn end_output(&mut self, id: &Rc<str>, stream: Stream) {
        let Some(container) = self.containers.get_mut(id) else { return };
        self.scratch_used = Some(Instant::now());
        let (_, records) = self.scratch.bytes().split_at_mut(READ_BUFFER);
        let Some((output, rotated)) = container.end_log(stream, records) else { return };
        self.close(output.source);
        for rotated in rotated {
            self.publish(&Event::LogRotated { container_id: id.to_string(), rotated }, None);
        }
    }

    pub(super) fn attach(&mut self, request: &AttachRequest, fds: Vec<OwnedFd>) -> Answer<()> {
        let wanted = [request.stdin, request.stdout, request.stderr];
        if wanted.iter().filter(|w| **w).count() != fds.len() {
            return refuse(ErrorKind::Invalid, format!("{} descriptors came for {wanted:?}", fds.len()));
        }
        let Some((id, container)) = self.containers.get_key_value(request.container_id.as_str()) else {
            return refuse(ErrorKind::NotFound, format!("no container {}", request.container_id));
        };
        if !matches!(container.phase, Phase::Created | Phase::Running) {
            return refuse(ErrorKind::Conflict, format!("container {id} is not running"));
        }
        let id = id.clone();
        let key = self.key();
        let mut fds = fds.into_iter();
        let mut next =
            |server: &mut Server, wanted: bool, flags: EpollFlags, source: Source| -> Answer<Option<Watched>> {
                let Some(fd) = wanted.then(|| fds.next()).flatten() else { return Ok(None) };
                set_nonblocking(&fd).map_err(io_error("attach"))?;
                if !flags.contains(EpollFlags::EPOLLIN) {
                    // Best effort: what is refused leaves the pipe at its default of 64 KiB.
                    let _smaller = rustix::pipe::fcntl_setpipe_size(&fd, ATTACH_PIPE);
                }
                server.watch(fd, flags, source).map(Some).map_err(io_error("attach"))
            };
        // Errors (the reader is gone) are reported without being asked for.
        let closed = EpollFlags::empty();
        let stdin = next(self, request.stdin, EpollFlags::EPOLLIN, Source::AttachInput(id.clone(), key))?;
        let stdout = next(self, request.stdout, closed, Source::AttachOutput(id.clone(), key))?;
        let stderr = next(self, request.stderr, closed, Source::AttachOutput(id.clone(), key))?;
        if let Some(container) = self.containers.get_mut(&id) {
            container.attaches.push(Attach { key, stdin, stdout, stderr });
        }
        Ok(())
    }

    /// Bytes from a client for the container's stdin.
    pub(super) fn on_attach_input(&mut self, id: &Rc<str>, key: u64) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(source) = container.attaches.iter().find(|a| a.key == key).and_then(|a| a.stdin.as_ref()) else {
            return;
        };
        let mut chunk = [0; INPUT_CHUNK];
        match rustix::io::read(&source.fd, &mut chunk) {
            Ok(read) if read > 0 => {
                if let Some(input) = &mut container.input {
                    input.pending.extend_from_slice(&chunk[..read]);
                    self.on_input_writable(id);
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok(_) | Err(_) => self.end_attach_input(id, key),
        }
    }

    fn end_attach_input(&mut self, id: &Rc<str>, key: u64) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(attach) = container.attaches.iter_mut().find(|a| a.key == key) else { return };
        let stdin = attach.stdin.take();
        if container.record.request.stdin_once
            && let Some(input) = &mut container.input
        {
            input.close_when_flushed = true;
        }
        if let Some(stdin) = stdin {
            self.close(stdin);
        }
        self.on_input_writable(id);
    }

    /// Writes what waits; while something waits, no more is taken from clients.
    pub(super) fn on_input_writable(&mut self, id: &Rc<str>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(mut input) = container.input.take() else { return };
        let mut attaches = std::mem::take(&mut container.attaches);
        let open = flush(&input.sink.fd, &mut input.pending);
        let blocked = open && !input.pending.is_empty();
        for attach in &mut attaches {
            let Some(stdin) = &mut attach.stdin else { continue };
            if blocked {
                self.unwatch(stdin);
            } else {
                self.rewatch(stdin, EpollFlags::EPOLLIN, Source::AttachInput(id.clone(), attach.key));
            }
        }
        if blocked {
            self.rewatch(&mut input.sink, EpollFlags::EPOLLOUT, Source::Input(id.clone()));
        } else {
            self.unwatch(&mut input.sink);
        }
        let keep = open && (blocked || !input.close_when_flushed);
        if let Some(container) = self.containers.get_mut(id) {
            container.attaches = attaches;
            if keep {
                container.input = Some(input);
            }
        }
    }

    pub(super) fn drop_attach(&mut self, id: &Rc<str>, key: u64) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(at) = container.attaches.iter().position(|attach| attach.key == key) else { return };
        if container.record.request.stdin_once
            && container.attaches[at].stdin.is_some()
            && let Some(input) = &mut container.input
        {
            input.close_when_flushed = true;
        }
        let attach = container.attaches.remove(at);
        for watched in [attach.stdin, attach.stdout, attach.stderr].into_iter().flatten() {
            self.close(watched);
        }
        self.on_input_writable(id);
    }

    pub(super) fn resize(&mut self, request: &ResizeRequest) -> Answer<()> {
        let container = self.containers.get(request.container_id.as_str()).ok_or_else(|| ErrorBody {
            kind: ErrorKind::NotFound,
            message: format!("no container {}", request.container_id),
        })?;
        let Some(console) = &container.console else {
            return refuse(ErrorKind::Conflict, format!("container {} has no terminal", request.container_id));
        };
        let size = Winsize { ws_row: request.height, ws_col: request.width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(console, size).map_err(|e| io_error("resize")(e.into()))
    }
}

/// Writes as much as fits. `false` once nobody reads any more.
fn flush(sink: impl AsFd, pending: &mut Vec<u8>) -> bool {
    while !pending.is_empty() {
        match rustix::io::write(&sink, pending) {
            Ok(written) => drop(pending.drain(..written)),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return true,
            Err(error) => {
                let _gone: io::Error = error.into();
                return false;
            }
        }
    }
    *pending = Vec::new();
    true
}
