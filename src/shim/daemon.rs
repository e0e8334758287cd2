//! From `gantry shim ...` to a daemon: hygiene, the lock that makes it the only one of its Pod, and the socket.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};

use super::cgroup::Hierarchies;
use super::journal::note;
use super::server::Server;
use crate::sys::confine::{clear_environment, ignore_signal, reset_signals};
use crate::sys::fork::{Fork, close_other_fds, exit_now, fork};

/// Control socket in a Pod's directory.
pub const SOCKET_FILE: &str = "shim.sock";
/// Locked by the Pod's only shim.
pub const LOCK_FILE: &str = "shim.lock";
/// What the shim has to say, bounded.
pub const LOG_FILE: &str = "shim.log";

const LOCK_PATIENCE: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(10);

struct Options {
    pod_dir: PathBuf,
    oom_score_adj: i32,
    cgroup: Option<PathBuf>,
    /// Soft and hard limit of open files, for the shim and its containers; the agent's if `None`.
    open_files: Option<(u64, u64)>,
}

impl Options {
    fn parse(args: impl Iterator<Item = OsString>) -> Result<Options, String> {
        let mut args = args;
        let (mut pod_dir, mut oom_score_adj, mut cgroup, mut open_files) = (None, -998, None, None);
        while let Some(name) = args.next() {
            let name = name.to_string_lossy().into_owned();
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--pod-dir" => pod_dir = Some(PathBuf::from(value)),
                "--cgroup" => cgroup = Some(PathBuf::from(value)),
                "--oom-score-adj" => {
                    oom_score_adj =
                        value.to_str().and_then(|v| v.parse().ok()).ok_or("--oom-score-adj needs a number")?;
                }
                "--open-files" => {
                    let limits = value.to_str().and_then(|v| v.split_once(':'));
                    let limits = limits.and_then(|(soft, hard)| Some((soft.parse().ok()?, hard.parse().ok()?)));
                    open_files = Some(limits.ok_or("--open-files needs two numbers, soft:hard")?);
                }
                _ => {
                    return Err(format!(
                        "unknown option {name}; known are --pod-dir, --cgroup, --oom-score-adj and --open-files"
                    ));
                }
            }
        }
        let pod_dir = pod_dir.filter(|dir| dir.is_absolute()).ok_or("--pod-dir needs an absolute path")?;
        Ok(Options { pod_dir, oom_score_adj, cgroup, open_files })
    }
}

/// Runs a shim: returns once it serves in the background (or could not start, with a message on stderr).
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let started = Options::parse(args).and_then(|options| start(&options));
    match started {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("gantry shim: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that can fail is done before the fork, so that whoever starts a shim hears of it.
fn start(options: &Options) -> Result<(), String> {
    close_other_fds(&[]);
    clear_environment();
    reset_signals();
    umask(Mode::from_bits_truncate(0o022));
    std::env::set_current_dir(&options.pod_dir).map_err(|e| format!("enter {}: {e}", options.pod_dir.display()))?;
    let lock = lock().map_err(|e| format!("{}/{LOCK_FILE}: {e}", options.pod_dir.display()))?;
    let listener = listen().map_err(|e| format!("{}/{SOCKET_FILE}: {e}", options.pod_dir.display()))?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(LOG_FILE)
        .map_err(|e| format!("{}/{LOG_FILE}: {e}", options.pod_dir.display()))?;
    std::env::set_current_dir("/").map_err(|e| format!("enter /: {e}"))?;
    match fork().map_err(|e| format!("fork: {e}"))? {
        Fork::Parent(_) => exit_now(0),
        Fork::Child => {
            let served = serve(options, listener, log);
            if let Err(error) = &served {
                note!("error: {error}");
            }
            drop(lock);
            exit_now(i32::from(served.is_err()));
        }
    }
}

/// A shim that was just killed has closed its socket before its lock: worth a moment's patience.
fn lock() -> Result<Flock<File>, String> {
    let until = Instant::now() + LOCK_PATIENCE;
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(LOCK_FILE)
        .map_err(|e| e.to_string())?;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() >= until => {
                return Err("another shim serves this Pod".to_owned());
            }
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
            Err((_, error)) => return Err(error.to_string()),
        };
        #[allow(clippy::disallowed_methods, reason = "a shim has one thread and nothing else to do yet")]
        std::thread::sleep(LOCK_RETRY);
    }
}

/// The path of a socket is at most 108 bytes; a name in the working directory always fits. The lock is held, so
/// a socket that is there belongs to nobody.
fn listen() -> io::Result<UnixListener> {
    match fs::remove_file(SOCKET_FILE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(SOCKET_FILE)?;
    fs::set_permissions(SOCKET_FILE, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn serve(options: &Options, listener: UnixListener, log: File) -> io::Result<()> {
    nix::unistd::setsid()?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&log)?;
    drop((null, log));
    nix::unistd::setgroups(&[])?;
    nix::sys::prctl::set_child_subreaper(true)?;
    nix::sys::prctl::set_name(c"gantry-shim")?;
    for signal in [Signal::SIGPIPE, Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        ignore_signal(signal as i32);
    }
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGCHLD);
    blocked.thread_block()?;

    if let Err(error) = fs::write("/proc/self/oom_score_adj", options.oom_score_adj.to_string()) {
        note!("warning: oom_score_adj {} refused: {error}", options.oom_score_adj);
    }
    if let Some((soft, hard)) = options.open_files
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, soft, hard)
    {
        note!("warning: limit of {soft} open files (hard: {hard}) refused: {error}");
    }
    let hierarchies = Hierarchies::discover()?;
    if let Some(cgroup) = &options.cgroup
        && let Err(error) = hierarchies.enter(cgroup)
    {
        note!("warning: enter cgroup {}: {error}", cgroup.display());
    }
    Server::new(options.pod_dir.clone(), listener, hierarchies)?.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        Options::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn options_say_what_is_wrong() {
        assert!(parse(&["--pod-dir", "/p", "--oom-score-adj", "-500"]).is_ok_and(|o| o.oom_score_adj == -500));
        let files = parse(&["--pod-dir", "/p", "--open-files", "1024:4096"]);
        assert!(files.is_ok_and(|o| o.open_files == Some((1024, 4096))));
        for (args, text) in [
            (&["--pod-dir", "p"][..], "absolute"),
            (&["--pod-dir"][..], "needs a value"),
            (&["--verbose", "1"][..], "--verbose"),
            (&["--pod-dir", "/p", "--open-files", "1024"][..], "soft:hard"),
            (&[][..], "--pod-dir"),
        ] {
            assert!(parse(args).err().is_some_and(|e| e.contains(text)), "{args:?}");
        }
    }
}
