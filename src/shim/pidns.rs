//! The pid namespace that a Pod's containers share (`shareProcessNamespace`), and its init.
//!
//! The init does what the pause container does elsewhere: it exists and reaps. Containers can see it, and one with
//! CAP_SYS_PTRACE could take it over, so it has nothing worth taking: an empty root, no capabilities, no descriptors,
//! the Pod's own network, user 65535 (as pause has).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid, setsid};

use crate::sys::confine::{CapabilityMasks, reset_signals, set_capabilities};
use crate::sys::fork::{Fork, close_other_fds, exit_now, fork_with};

const NOBODY: u32 = 65535;

/// The Pod's pid namespace.
#[derive(Debug)]
pub(super) struct PidNamespace {
    pub(super) init: Pid,
    pub(super) path: PathBuf,
}

impl PidNamespace {
    /// Makes the namespace and pins it at `<pod_dir>/ns/pid`.
    pub(super) fn create(pod_dir: &Path) -> io::Result<PidNamespace> {
        let dir = pod_dir.join("ns");
        fs::create_dir_all(&dir)?;
        let path = dir.join("pid");
        let network = match File::open(dir.join("net")) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None, // the node's own network
            Err(error) => return Err(error),
        };
        unpin(&path)?;
        File::create(&path)?;
        let (mut report, to_us) = io::pipe()?;
        let init = match fork_with(libc::CLONE_NEWPID | libc::CLONE_NEWNS)? {
            Fork::Parent(pid) => pid,
            Fork::Child => exit_now(run(&dir, network.as_ref(), to_us)),
        };
        drop(to_us);
        let mut failure = String::new();
        report.read_to_string(&mut failure)?;
        if !failure.is_empty() {
            return Err(io::Error::other(failure));
        }
        let pinned = mount(
            Some(&PathBuf::from(format!("/proc/{init}/ns/pid"))),
            &path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        );
        if let Err(error) = pinned {
            let _gone = kill(init, Signal::SIGKILL);
            return Err(error.into());
        }
        Ok(PidNamespace { init, path })
    }

    /// Kills everything in the namespace (the kernel does, when its init dies) and removes the pin.
    pub(super) fn destroy(&self) -> io::Result<()> {
        match kill(self.init, Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
        unpin(&self.path)?;
        fs::remove_file(&self.path)
    }
}

/// Removes what an earlier shim may have pinned.
fn unpin(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// `report` is closed by `confine` when all went well.
fn run(dir: &Path, network: Option<&File>, mut report: io::PipeWriter) -> i32 {
    match confine(dir, network) {
        Ok(()) => reap(),
        Err(error) => {
            let _reader_gone = write!(report, "confine the init of the pid namespace: {error}");
            1
        }
    }
}

fn confine(dir: &Path, network: Option<&File>) -> io::Result<()> {
    setsid()?;
    if let Some(network) = network {
        setns(network, CloneFlags::CLONE_NEWNET)?;
    }
    nix::sys::prctl::set_name(c"pause")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some("size=4k,mode=555"))?;
    chdir(dir)?;
    // Both roots in one place, then the old one off the top of it: needs no directory in the empty root.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    close_other_fds(&[]);
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(gid, gid, gid)?;
    // Capabilities first: dropping the bounding set needs one.
    set_capabilities(&CapabilityMasks {
        effective: 1 << 7, // CAP_SETUID, for the next line, which clears it
        permitted: 1 << 7,
        ..CapabilityMasks::default()
    })?;
    setresuid(uid, uid, uid)?;
    nix::sys::prctl::set_no_new_privs()?;
    nix::sys::prctl::set_dumpable(false)?;
    Ok(())
}

fn reap() -> i32 {
    // As init of the namespace it gets no signal that it does not ask for; SIGCHLD is waited for.
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGCHLD);
    let _always_works = wanted.thread_block();
    reset_signals_except_mask(&wanted);
    loop {
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
        let _interrupted = wanted.wait();
    }
}

fn reset_signals_except_mask(mask: &SigSet) {
    reset_signals();
    let _always_works = mask.thread_block();
}
