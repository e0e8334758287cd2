//! Processes of other programs that must not outlive who waits for them.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Lets the kernel kill the process when the thread that starts it ends, also by the death of its whole process.
///
/// So call `spawn` on a thread that then waits for it.
pub fn end_with_this_thread(command: &mut Command) {
    let parent = Pid::this();
    let before_exec = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // the parent may have died before the kernel knew
        if getppid() == parent { Ok(()) } else { Err(io::Error::from(nix::errno::Errno::ESRCH)) }
    };
    // SAFETY: both calls are plain system calls; nothing is allocated and no lock is taken between fork and exec.
    unsafe { command.pre_exec(before_exec) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods, reason = "a process that would run for long")]
    fn it_ends_with_the_thread() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            end_with_this_thread(command.arg("600"));
            command.spawn().unwrap()
        })
        .join()
        .unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }
}
