//! The creator: a child of the shim that lives for milliseconds and is the only caller of libcontainer.
//!
//! Whatever libcontainer leaks or changes in its caller (descriptors, working directory, dumpable flag,
//! oom_score_adj) ends with this process. Containers are made as siblings, so their parent is the shim. Further processes
//! of a container ([`tenant`]) are forked by the shim itself.

mod answer;
mod executor;
mod isolate;
mod mounts;
mod resolve;
mod seccomp;
mod spec;
mod streams;
pub(super) mod tenant;
mod terminal;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use self::answer::{receive_fd, send, shortened};
use self::executor::{Plan, PodExecutor};
use self::seccomp::Filter;
use super::bundle::Setup;
use super::protocol::CreateRequest;
use super::record::process_stat;
use crate::sys::confine::reset_signals;
use crate::sys::fork::{Fork, close_other_fds, exit_now, fork};

/// Where libcontainer keeps its own files, inside a container's directory.
pub(super) const STATE_DIR: &str = "libcontainer";
const BUNDLE_DIR: &str = "bundle";
const FILTER_FILE: &str = "seccomp.bpf";

/// What a creator tells the shim, in one message.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Outcome {
    pub(super) pid: i32,
    pub(super) start_time: u64,
    pub(super) error: Option<String>,
}

/// The three streams of a process; unused with a terminal.
#[derive(Debug)]
pub(super) struct Stdio {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// What a creator should do.
#[derive(Debug)]
pub(super) enum Task<'a> {
    Create { request: &'a CreateRequest, stdio: Stdio, report: OwnedFd },
    Start { request: &'a CreateRequest },
}

/// Forks a creator. Its [`Outcome`] (and a pty's master) arrives on the socket whose other end is `result`.
pub(super) fn spawn(task: Task<'_>, result: OwnedFd) -> io::Result<nix::unistd::Pid> {
    match fork()? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            let ended = catch_unwind(AssertUnwindSafe(|| run(task, &result)));
            exit_now(if ended.is_ok() { 0 } else { 101 })
        }
    }
}

fn run(task: Task<'_>, result: &OwnedFd) {
    close_other_fds(&descriptors(&task, result));
    reset_signals();
    // A group of its own, so that a deadline ends this process and its intermediate one together.
    let _own_already = nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0));
    let detail = Detail::install();
    let done = match task {
        Task::Create { request, stdio, report } => create(request, stdio, report),
        Task::Start { request } => start(request),
    };
    let (outcome, console) = match done {
        Ok((outcome, console)) => (outcome, console),
        Err(error) => (Outcome { error: Some(shortened(detail.explain(error))), ..Outcome::default() }, None),
    };
    let _shim_gone = send(result, &outcome, console.as_ref());
}

fn descriptors(task: &Task<'_>, result: &OwnedFd) -> Vec<RawFd> {
    let mut keep = vec![result.as_raw_fd()];
    if let Task::Create { stdio, report, .. } = task {
        keep.extend([&stdio.stdin, &stdio.stdout, &stdio.stderr, report].map(AsRawFd::as_raw_fd));
    }
    keep
}

type Done = Result<(Outcome, Option<OwnedFd>), String>;

fn state_root(container_dir: &Path) -> PathBuf {
    container_dir.join(STATE_DIR)
}

fn builder(
    container_dir: &Path,
    id: &str,
    stdio: Stdio,
    console: Option<&Console>,
    executor: PodExecutor,
) -> Result<ContainerBuilder, String> {
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(state_root(container_dir))
        .map_err(chain)?
        .with_executor(executor);
    Ok(match console {
        Some(console) => builder.with_console_socket(Some(&console.path)),
        None => builder.with_stdin(stdio.stdin).with_stdout(stdio.stdout).with_stderr(stdio.stderr),
    })
}

fn create(request: &CreateRequest, stdio: Stdio, report: OwnedFd) -> Done {
    let dir = request.container_dir.as_path();
    let setup = spec::read_setup(dir)?;
    let masks = spec::capability_masks(&setup.capabilities)?;
    let (spec, process) = spec::adapt(spec::read_spec(dir)?, request, &masks)?;
    let filter = setup.seccomp.as_ref().map(seccomp::compile).transpose().map_err(|e| e.to_string())?;
    let bundle = state_root(dir).join(BUNDLE_DIR);
    fs::create_dir_all(&bundle).map_err(|e| format!("make {}: {e}", bundle.display()))?;
    save_filter(dir, filter.as_ref())?;

    let trees = mounts::clone_all(&setup.mounts)?;
    leave_other_mounts(dir)?;
    let rootfs = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let config_mounts: Vec<PathBuf> = spec.mounts().iter().flatten().map(|m| m.destination().clone()).collect();
    mounts::make_mount_points(&rootfs, &trees, &config_mounts)?;
    make_cwd_on_node(&rootfs, process.cwd(), &config_mounts, &setup)?;
    spec.save(bundle.join("config.json")).map_err(|e| format!("save the bundle: {}", chain(e)))?;

    let console = request.terminal.then(|| Console::listen(dir, "console.sock")).transpose()?;
    let plan = Plan::new(&process, masks, setup.no_new_privs, filter)?;
    let owner = streams::Users::of_spec(&spec).on_node(process.user().uid());
    for stream in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
        streams::give_to(stream, owner);
    }
    let executor = PodExecutor { plan: Rc::new(plan), report: Rc::new(report) };
    let container = builder(dir, &request.container_id, stdio, console.as_ref(), executor)?
        .as_init(&bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(chain)?;
    let pid = container.pid().ok_or("libcontainer made a container without a pid")?.as_raw();
    // Before the mount namespace changes, where /proc is the container's.
    let start_time = process_stat(pid).map(|stat| stat.start_time).unwrap_or_default();
    let console = console.map(Console::accept).transpose()?;
    if let Some(master) = &console {
        terminal::give_slave_to(master, owner).map_err(|e| format!("give the terminal to its user: {e}"))?;
    }
    enter_and_attach(pid, trees, process.cwd())?;
    Ok((Outcome { pid, start_time, error: None }, console))
}

/// The volumes are to be cloned before: what others mount below them may propagate to the container.
fn leave_other_mounts(container_dir: &Path) -> Result<(), String> {
    // <Pod>/containers/<id>
    let Some(pod_dir) = container_dir.ancestors().nth(2) else { return Ok(()) };
    isolate::leave_other_mounts(pod_dir).map_err(|e| format!("leave the mounts of other Pods: {e}"))
}

/// libcontainer changes to a directory before our volumes are there, and fails if it is missing; runc makes it.
/// In a read-only root only the node can.
fn make_cwd_on_node(rootfs: &Path, cwd: &Path, config: &[PathBuf], setup: &Setup) -> Result<(), String> {
    let volumes = setup.mounts.iter().map(|mount| &mount.destination);
    if config.iter().chain(volumes).any(|mount| mount != Path::new("/") && cwd.starts_with(mount)) {
        return Ok(());
    }
    let root = File::open(rootfs).map_err(|e| format!("open {}: {e}", rootfs.display()))?;
    resolve::ensure_in_root(root.as_fd(), cwd, resolve::Kind::Directory)
        .map(drop)
        .map_err(|e| format!("mkdir {}: {e}", cwd.display()))
}

fn enter_and_attach(pid: i32, trees: Vec<mounts::Tree>, cwd: &Path) -> Result<(), String> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt")).map_err(|e| format!("open the mount namespace: {e}"))?;
    // This makes the container's root our root as well.
    setns(&namespace, CloneFlags::CLONE_NEWNS).map_err(|e| format!("enter the mount namespace: {e}"))?;
    let root = File::open("/").map_err(|e| format!("open the container's root: {e}"))?;
    mounts::attach_all(root.as_fd(), trees)?;
    if resolve::open_in_root(root.as_fd(), cwd).is_err() {
        resolve::ensure_in_root(root.as_fd(), cwd, resolve::Kind::Directory)
            .map_err(|e| format!("mkdir {}: {e}", cwd.display()))?;
    }
    Ok(())
}

fn start(request: &CreateRequest) -> Done {
    let mut container =
        Container::load(state_root(&request.container_dir).join(&request.container_id)).map_err(chain)?;
    container.start().map_err(chain)?;
    Ok((Outcome::default(), None))
}

/// The compiled filter, for execs to come. An empty file is "unconfined".
fn save_filter(dir: &Path, filter: Option<&Filter>) -> Result<(), String> {
    let mut bytes = Vec::new();
    if let Some(filter) = filter {
        bytes.extend(filter.flags.to_ne_bytes());
        bytes.extend(&filter.program);
    }
    let path = state_root(dir).join(FILTER_FILE);
    fs::write(&path, bytes).map_err(|e| format!("write {}: {e}", path.display()))
}

fn load_filter(dir: &Path, setup: &Setup) -> Result<Option<Filter>, String> {
    let Some(profile) = &setup.seccomp else { return Ok(None) };
    let bytes = fs::read(state_root(dir).join(FILTER_FILE)).unwrap_or_default();
    match bytes.split_first_chunk::<8>() {
        Some((flags, program)) if !program.is_empty() && program.len() % 8 == 0 => {
            Ok(Some(Filter { program: program.to_vec(), flags: u64::from_ne_bytes(*flags) }))
        }
        _ => seccomp::compile(profile).map(Some).map_err(|e| e.to_string()),
    }
}

/// Receives a pty's master from the container.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn listen(dir: &Path, name: &str) -> Result<Console, String> {
        let bind = || {
            // Paths of sockets are short (108 bytes), ours may not be; this process may go where it likes.
            std::env::set_current_dir(state_root(dir))?;
            match fs::remove_file(name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(name)?;
            std::env::set_current_dir("/")?;
            Ok(Console { listener, path: state_root(dir).join(name) })
        };
        bind().map_err(|e| format!("console socket: {e}"))
    }

    fn accept(self) -> Result<OwnedFd, String> {
        let receive = || {
            let (stream, _) = self.listener.accept()?;
            receive_fd(&stream)?.1.ok_or_else(|| io::Error::other("no descriptor arrived"))
        };
        receive().map_err(|e| format!("receive the terminal: {e}"))
    }
}

/// Reads a creator's message; `None` if it ended without one.
pub(super) fn receive_outcome(socket: &OwnedFd) -> io::Result<Option<(Outcome, Option<OwnedFd>)>> {
    answer::receive(socket)
}

/// An error with all its causes.
fn chain(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// libcontainer's errors are short ("failed to unix syscall"); what failed is in its log, which goes to memory here.
struct Detail(Option<File>);

impl Detail {
    fn install() -> Detail {
        let file = rustix::fs::memfd_create("creator-log", rustix::fs::MemfdFlags::CLOEXEC).map(File::from).ok();
        if let Some(writer) = file.as_ref().and_then(|f| f.try_clone().ok()) {
            tracing_subscriber::fmt()
                .with_max_level(tracing::Level::ERROR)
                .with_ansi(false)
                .without_time()
                .with_target(false)
                .with_level(false)
                .with_writer(std::sync::Mutex::new(writer))
                .init();
        }
        Detail(file)
    }

    /// Adds the first thing that went wrong, which is the cause of the rest.
    fn explain(self, error: String) -> String {
        let mut log = String::new();
        if let Some(mut file) = self.0 {
            let _unreadable = file.rewind().and_then(|()| file.take(4096).read_to_string(&mut log));
        }
        match log.lines().next() {
            Some(first) if !error.contains(first) => format!("{error} ({})", first.trim()),
            _ => error,
        }
    }
}
