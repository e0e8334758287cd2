//! A process in a container that is there already (`exec`).
//!
//! Not by libcontainer, whose way of doing this costs two more processes and several reads of the node's mounts and the
//! container's configuration, and leaves out the user namespace, the seccomp filter and much else (`docs/upstream.md`).
//! The shim forks the process straight into the container's pid namespace; all else it joins by itself.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::User;
use rustix::process::{PidfdFlags, pidfd_open};

use super::answer::{receive, send, shortened};
use super::executor::{Plan, START_FAILED};
use super::{Stdio, load_filter, spec, streams, terminal};
use crate::shim::cgroup::Hierarchies;
use crate::shim::protocol::{ErrorBody, ErrorKind, ExecRequest};
use crate::shim::record::{ContainerRecord, process_start_time};
use crate::sys::fork::{Fork, close_other_fds, exit_now, fork_beside};

/// What a process has to say before its `execve`, which it ends with: a pty's master comes with `None`.
type Word = Option<ErrorBody>;

/// A process to be.
#[derive(Debug)]
pub(in crate::shim) struct Tenant<'a> {
    pub(in crate::shim) container: &'a ContainerRecord,
    pub(in crate::shim) hierarchies: &'a Hierarchies,
    pub(in crate::shim) request: &'a ExecRequest,
    pub(in crate::shim) stdio: Stdio,
}

/// What was heard of a process that is on its way to `execve`.
#[derive(Debug)]
pub(in crate::shim) enum Heard {
    /// Its terminal; it is not there yet.
    Console(OwnedFd),
    /// It is there, or died on the way by somebody's signal.
    Executed,
    /// It ended by itself: why.
    Refused(ErrorBody),
}

/// Forks the process; what becomes of it is [`heard`] from the other end of `word`.
pub(in crate::shim) fn spawn(tenant: &Tenant<'_>, word: &OwnedFd) -> io::Result<Pid> {
    let record = tenant.container;
    let gone = || io::Error::new(io::ErrorKind::NotFound, "the container has ended");
    let init = record.pid.ok_or_else(gone)?;
    let init_fd = rustix::process::Pid::from_raw(init)
        .ok_or_else(gone)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from))?;
    // After the descriptor, which stays with the process that it was made for. 0 is a start that could not be read.
    match process_start_time(init) {
        Ok(start) if record.start_time == 0 || start == record.start_time => {}
        _ => return Err(gone()),
    }
    match fork_beside(&init_fd)? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            let stdio = [&tenant.stdio.stdin, &tenant.stdio.stdout, &tenant.stdio.stderr];
            close_other_fds(
                &[stdio.map(AsRawFd::as_raw_fd).as_slice(), &[word.as_raw_fd(), init_fd.as_raw_fd()]].concat(),
            );
            let refused = catch_unwind(AssertUnwindSafe(|| tenant.enter(init, init_fd.as_fd(), word)))
                .unwrap_or_else(|_| refuse(ErrorKind::Create, "the process panicked on its way into the container"));
            let Err(ErrorBody { kind, message }) = refused;
            let body = ErrorBody { kind, message: shortened(message) };
            let _shim_gone = send(word, &Word::Some(body), None);
            exit_now(START_FAILED)
        }
    }
}

/// Reads what a process said.
pub(in crate::shim) fn heard(word: &OwnedFd) -> Heard {
    match receive::<Word>(word) {
        Ok(None) => Heard::Executed,
        Ok(Some((None, Some(console)))) => Heard::Console(console),
        Ok(Some((Some(body), _))) => Heard::Refused(body),
        Ok(Some((None, None))) => Heard::Refused(error(ErrorKind::Create, "no terminal came with its announcement")),
        Err(failure) => Heard::Refused(error(ErrorKind::Create, format!("the answer of the process: {failure}"))),
    }
}

fn error(kind: ErrorKind, message: impl Into<String>) -> ErrorBody {
    ErrorBody { kind, message: message.into() }
}

fn refuse<T>(kind: ErrorKind, message: impl Into<String>) -> Result<T, ErrorBody> {
    Err(error(kind, message))
}

fn failed<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> ErrorBody {
    move |failure| error(ErrorKind::Create, format!("{what}: {failure}"))
}

impl Tenant<'_> {
    /// From a copy of the shim to the program. Until the mount namespace changes, all paths are the node's.
    fn enter(&self, init: i32, init_fd: BorrowedFd<'_>, word: &OwnedFd) -> Result<Infallible, ErrorBody> {
        let request = &self.container.request;
        let dir = request.container_dir.as_path();
        let process = &self.request.process;
        let text = |message: String| error(ErrorKind::Create, message);
        if process.rlimits().as_ref().is_some_and(|limits| !limits.is_empty()) {
            return refuse(ErrorKind::Invalid, "process.rlimits: not supported for an exec; leave it out");
        }
        let setup = spec::read_setup(dir).map_err(text)?;
        let masks = spec::capability_masks(&setup.capabilities).map_err(text)?;
        let filter = load_filter(dir, &setup).map_err(text)?;
        let plan = Plan::new(process, masks, setup.no_new_privs, filter).map_err(text)?;
        let users = streams::Users::of_process(init).map_err(failed("the container's user namespace"))?;
        let owner = users.on_node(process.user().uid());

        // A session of its own, by which it and what descends from it can be found.
        setsid().map_err(failed("setsid"))?;
        self.hierarchies.join(&request.cgroup_path, init).map_err(failed("join the container's cgroup"))?;
        if let Some(wanted) = process.oom_score_adj() {
            spec::adjust_oom_score(wanted, dir).map_err(text)?;
        }
        if let Some(profile) = process.apparmor_profile() {
            confine_by_apparmor(profile).map_err(failed(format_args!("AppArmor profile {profile:?}")))?;
        }
        // All in one call, so that one never is half inside.
        let namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP;
        setns(init_fd, namespaces).map_err(failed("enter the container's namespaces"))?;

        if process.terminal().unwrap_or(false) {
            let (master, slave) = terminal::open(owner).map_err(failed("open a terminal"))?;
            send(word, &Word::None, Some(&master)).map_err(failed("hand over the terminal"))?;
            connect(&slave, &slave, &slave).map_err(failed("connect the terminal"))?;
            rustix::process::ioctl_tiocsctty(&slave).map_err(failed("control the terminal"))?;
        } else {
            let Stdio { stdin, stdout, stderr } = &self.stdio;
            for stream in [stdin, stdout, stderr] {
                streams::give_to(stream, owner);
            }
            connect(stdin, stdout, stderr).map_err(failed("connect the streams"))?;
        }
        if let Some(bits) = process.user().umask() {
            let mode =
                Mode::from_bits(bits).ok_or_else(|| text(format!("process.user.umask {bits:#o}: not a mode")))?;
            umask(mode);
        }
        if users.are_mapped() {
            // Until now it was the node's root, which may do everything that joining needs.
            setns(init_fd, CloneFlags::CLONE_NEWUSER).map_err(failed("join the container's user namespace"))?;
        }
        assume(process.user()).map_err(failed("change the user"))?;
        refuse(ErrorKind::Start, plan.run())
    }
}

fn connect(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> nix::Result<()> {
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    dup2_stderr(stderr)
}

/// Becomes the user, and keeps all capabilities, for what is still to be done before they are given up.
fn assume(user: &User) -> Result<(), Errno> {
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups)?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid)?;
    // `execve` takes this back.
    caps::securebits::set_keepcaps(true).map_err(|_| Errno::EPERM)?;
    setresuid(uid, uid, uid)?;
    let permitted = caps::read(None, caps::CapSet::Permitted).map_err(|_| Errno::EPERM)?;
    caps::set(None, caps::CapSet::Effective, &permitted).map_err(|_| Errno::EPERM)
}

/// The profile holds from `execve` on. Source: kernel, `Documentation/admin-guide/LSM/apparmor.rst` and `security/apparmor/lsm.c`.
fn confine_by_apparmor(profile: &str) -> io::Result<()> {
    let own = Path::new("/proc/self/attr/apparmor/exec");
    let file = if own.exists() { own } else { Path::new("/proc/self/attr/exec") };
    fs::write(file, format!("exec {profile}"))
}
