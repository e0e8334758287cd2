//! Starts shims from a read-only mount of the agent's own file.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::{Shim, ShimError};
use crate::sys::mountattr::{MountAttributes, mount_setattr};

/// From fork to a listening socket.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(10);
/// Longest complaint of a shim that could not start.
const COMPLAINT_LIMIT: usize = 4 << 10;

/// How a shim runs.
#[derive(Clone, Debug)]
pub struct ShimOptions {
    /// `oom_score_adj` of the shim itself; a node without CAP_SYS_RESOURCE may not lower its own.
    pub oom_score_adj: i32,
    /// Cgroup for the shim, absolute in every hierarchy; the agent's if `None`.
    pub cgroup: Option<PathBuf>,
}

impl Default for ShimOptions {
    fn default() -> ShimOptions {
        ShimOptions { oom_score_adj: -998, cgroup: None }
    }
}

/// Holds the binary that shims are made of, as it was when the agent started.
#[derive(Clone, Debug)]
pub struct ShimLauncher {
    binary: Arc<OwnedFd>,
    /// Soft and hard limit of open files when this was made. The agent raises its own later; containers would inherit
    /// that, and programs that close all possible descriptors would take seconds to start.
    open_files: (u64, u64),
}

impl ShimLauncher {
    /// From the running binary. An upgrade of the file does not change what this launches.
    pub fn new() -> io::Result<ShimLauncher> {
        ShimLauncher::from_binary(Path::new("/proc/self/exe"))
    }

    /// From another binary that understands `shim`.
    pub fn from_binary(path: &Path) -> io::Result<ShimLauncher> {
        // No container may write to the binary that made it (CVE-2019-5736): what it can reach through
        // /proc/<pid>/exe is this mount, which is read-only and attached nowhere.
        let binary = match read_only_mount(path) {
            Ok(binary) => binary,
            Err(error) => {
                tracing::warn!(%error, "no read-only mount of our own binary: a root container could write to it");
                open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?
            }
        };
        let open_files = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(ShimLauncher { binary: Arc::new(binary), open_files })
    }

    /// Starts the shim of a Pod and connects to it. An error if one is there already.
    pub async fn launch(&self, pod_dir: &Path, options: &ShimOptions) -> Result<Shim, ShimError> {
        #[allow(clippy::disallowed_methods, reason = "this is no tool: it is our own binary as a shim")]
        let mut command = Command::new(format!("/proc/self/fd/{}", self.binary.as_raw_fd()));
        command
            .arg0("gantry")
            .arg("shim")
            .arg("--pod-dir")
            .arg(pod_dir)
            .arg("--oom-score-adj")
            .arg(options.oom_score_adj.to_string())
            .arg("--open-files")
            .arg(format!("{}:{}", self.open_files.0, self.open_files.1))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(cgroup) = &options.cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let binary = self.binary.clone();
        tokio::task::spawn_blocking(move || {
            let spawned = spawn(command);
            drop(binary);
            spawned
        })
        .await
        .map_err(|e| ShimError::Launch(e.to_string()))?
        .map_err(ShimError::Launch)?;
        Shim::connect(pod_dir).await
    }
}

fn read_only_mount(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(rustix::fs::CWD, path, flags)?;
    mount_setattr(&mount, &MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() })?;
    Ok(mount)
}

/// The process that is started forks the shim once its socket listens, and ends; then its stderr ends as well.
fn spawn(mut command: Command) -> Result<(), String> {
    let mut child = command.spawn().map_err(|e| e.to_string())?;
    let stderr = child.stderr.take().map(OwnedFd::from).ok_or("no stderr")?;
    let complaint = read_until_closed(stderr);
    if complaint.is_err() {
        // It may have ended by itself; then there is nothing to kill.
        let _gone = child.kill();
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    let complaint = complaint?;
    if status.success() { Ok(()) } else { Err(complaint.trim().to_owned()) }
}

fn read_until_closed(stderr: OwnedFd) -> Result<String, String> {
    let until = Instant::now() + LAUNCH_DEADLINE;
    let mut stderr = File::from(stderr);
    let mut complaint = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let left = PollTimeout::try_from(until.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Err(format!("not ready after {} s", LAUNCH_DEADLINE.as_secs())),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.to_string()),
            Ok(_) => {}
        }
        match stderr.read(&mut chunk).map_err(|e| e.to_string())? {
            0 => return Ok(String::from_utf8_lossy(&complaint).into_owned()),
            read => complaint.extend_from_slice(&chunk[..read.min(COMPLAINT_LIMIT.saturating_sub(complaint.len()))]),
        }
    }
}
