//! Creators at work: what they say, and what becomes of those that say nothing in time.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{Answer, Job, JobKind, Server, Source};
use crate::shim::container::ReplyTo;
use crate::shim::creator::{self, Outcome};
use crate::shim::protocol::ErrorKind;

impl Server {
    pub(super) fn add_job(
        &mut self,
        kind: JobKind,
        creator: Pid,
        result: OwnedFd,
        reply: ReplyTo,
        until: Instant,
    ) -> io::Result<()> {
        let watched = self.watch(result, EpollFlags::EPOLLIN, Source::Job)?;
        if let Some(key) = watched.token {
            self.jobs.insert(key, Job { kind, creator, result: watched.fd, reply, until });
        }
        Ok(())
    }

    /// A creator has a message, or has ended without one.
    pub(super) fn on_job(&mut self, key: u64) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if let JobKind::Exec(exec) = &mut job.kind {
            let Some(made) = Server::hear(exec, &job.result) else { return };
            return self.finish_exec(key, made);
        }
        let outcome = match creator::receive_outcome(&job.result) {
            Ok(Some(outcome)) => outcome,
            Ok(None) => (failed("the creator died before it could say why"), None),
            Err(error) => (failed(&format!("the creator's answer: {error}")), None),
        };
        let Some(job) = self.take_job(key) else { return };
        self.finish_job(job, outcome);
    }

    pub(super) fn take_job(&mut self, key: u64) -> Option<Job> {
        let job = self.jobs.remove(&key)?;
        self.sources.remove(&key);
        let _gone_already = self.epoll.delete(&job.result);
        Some(job)
    }

    fn finish_job(&mut self, job: Job, (outcome, console): (Outcome, Option<OwnedFd>)) {
        let pid = outcome.pid;
        match job.kind {
            JobKind::Create(id) => self.created(job.reply, &id, outcome, console),
            JobKind::Start(id) => match outcome.error {
                Some(error) => self.start_failed(&id, ErrorKind::Io, &error),
                None => {
                    if let Some(starting) = self.containers.get_mut(&id).and_then(|c| c.starting.as_mut()) {
                        starting.released = true;
                    }
                    self.answer_start(&id);
                }
            },
            JobKind::Exec(_) => {} // heard of in another way
        }
        self.claim_early_exit(pid);
    }

    fn finish_exec(&mut self, key: u64, made: Answer<()>) {
        let Some(job) = self.take_job(key) else { return };
        if let JobKind::Exec(exec) = job.kind {
            self.exec_made(job.reply, *exec, job.creator, made);
        }
        self.claim_early_exit(job.creator.as_raw());
    }

    pub(super) fn job_timed_out(&mut self, key: u64) {
        let Some(job) = self.take_job(key) else { return };
        let error = "the deadline passed";
        match job.kind {
            JobKind::Create(id) => {
                kill_creator(job.creator);
                self.create_failed(job.reply, &id, ErrorKind::Timeout, error);
            }
            JobKind::Start(id) => {
                kill_creator(job.creator);
                self.start_failed(&id, ErrorKind::Timeout, error);
            }
            JobKind::Exec(exec) => self.exec_timed_out(job.reply, &exec, job.creator, error),
        }
        self.claim_early_exit(0);
    }
}

/// Ends a creator and its intermediate process.
fn kill_creator(creator: Pid) {
    let _gone = kill(Pid::from_raw(-creator.as_raw()), Signal::SIGKILL);
    // It may not have made its group yet.
    let _gone = kill(creator, Signal::SIGKILL);
}

fn failed(error: &str) -> Outcome {
    Outcome { error: Some(error.to_owned()), ..Outcome::default() }
}

/// Ours to read, a creator's to write.
pub(super) fn outcome_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

pub(super) fn null() -> io::Result<OwnedFd> {
    Ok(fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}
