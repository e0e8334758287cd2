//! Processes made without `execve`: only ever from a process that has exactly one thread.

use std::io;
use std::os::fd::{AsFd, RawFd};

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::unistd::Pid;

/// Which side of [`fork`] this is.
pub enum Fork {
    /// The caller; the child's pid.
    Parent(Pid),
    /// The new process. It must end in [`exit_now`] or `execve`.
    Child,
}

/// Forks. Refuses in a process with more than one thread: the child could inherit a lock that nobody holds.
pub fn fork() -> io::Result<Fork> {
    fork_with(0)
}

/// Forks into new namespaces (`CLONE_NEW*` flags of clone(2)). Same conditions as [`fork`].
pub fn fork_with(namespaces: libc::c_int) -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("fork in a process with {threads} threads")));
    }
    let result = if namespaces == 0 {
        // SAFETY: there is one thread, so the child's copy of memory is consistent.
        libc::c_long::from(unsafe { libc::fork() })
    } else {
        let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
        // SAFETY: one thread, no shared memory flags and no new stack: this is fork into namespaces.
        unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) }
    };
    match result {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forks a child into the pid namespace of `process`, a pid descriptor. Same conditions as [`fork`].
///
/// The child cannot be inspected by its new neighbours, which is what they would need to get at this process' memory and
/// root directory: it is not dumpable (prctl(2)).
pub fn fork_beside(process: impl AsFd) -> io::Result<Fork> {
    let own = std::fs::File::open("/proc/self/ns/pid")?;
    let dumpable = prctl::get_dumpable()?;
    prctl::set_dumpable(false)?;
    let forked = setns(process, CloneFlags::CLONE_NEWPID).map_err(io::Error::from).and_then(|()| fork());
    if matches!(forked, Ok(Fork::Child)) {
        return forked;
    }
    if setns(&own, CloneFlags::CLONE_NEWPID).is_err() {
        // Every later child would be born there. Cannot happen: it is where this process is.
        std::process::abort();
    }
    // A child may be there: this must not hide it. Nothing depends on it but who may look into the shim.
    let _stays_as_it_is = prctl::set_dumpable(dumpable);
    forked
}

/// Ends the process at once: no destructors, no exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor from 3 up that is not in `keep`, which must be what this process still uses:
/// values that own the others must never be dropped (a forked child that ends in [`exit_now`] drops nothing).
pub fn close_other_fds(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    keep.push(u32::MAX);
    let mut from = 3;
    for next in keep {
        if next > from {
            // SAFETY: the caller gave up the descriptors in this range.
            unsafe { libc::syscall(libc::SYS_close_range, from, next - 1, 0) };
        }
        from = next.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_to_fork_with_threads() {
        // The test harness itself runs tests on threads of their own.
        let refused = fork().err().map(|e| e.to_string());
        assert!(refused.is_some_and(|text| text.contains("threads")));
    }
}
