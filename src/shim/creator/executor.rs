//! The last code before `execve`, run inside the container: by libcontainer's init process, and by every exec.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::unistd;
use oci_spec::runtime::{Process, Spec};

use super::seccomp::Filter;
use crate::sys::confine::{self, CapabilityMasks};
use crate::sys::fork::exit_now;

/// containerd's and Docker's PATH for images that set none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Exit code of a container whose process could not be started (kubelet's reason StartError).
pub(super) const START_FAILED: i32 = 128;

/// Everything that is needed between "start" and `execve`, made ready before the process is.
#[derive(Debug)]
pub(super) struct Plan {
    program: String,
    candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    capabilities: CapabilityMasks,
    no_new_privs: bool,
    filter: Option<Filter>,
}

fn c_string(text: impl AsRef<OsStr>, what: &str) -> Result<CString, String> {
    CString::new(text.as_ref().as_bytes()).map_err(|_| format!("{what} contains a NUL byte"))
}

impl Plan {
    pub(super) fn new(
        process: &Process,
        capabilities: CapabilityMasks,
        no_new_privs: bool,
        filter: Option<Filter>,
    ) -> Result<Plan, String> {
        let args = process.args().as_deref().unwrap_or_default();
        let program = args.first().filter(|p| !p.is_empty()).ok_or("process.args is empty")?.clone();
        let env = process.env().as_deref().unwrap_or_default();
        // The last one wins, as with runc, which sets them one after the other.
        let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
        let candidates = if program.contains('/') {
            vec![c_string(&program, "process.args[0]")?]
        } else {
            path.split(':')
                .map(|dir| c_string(Path::new(if dir.is_empty() { "." } else { dir }).join(&program), "PATH"))
                .collect::<Result<_, _>>()?
        };
        let cwd = if process.cwd().as_os_str().is_empty() { Path::new("/") } else { process.cwd().as_path() };
        Ok(Plan {
            candidates,
            args: args.iter().map(|a| c_string(a, "process.args")).collect::<Result<_, _>>()?,
            env: env.iter().map(|e| c_string(e, "process.env")).collect::<Result<_, _>>()?,
            cwd: c_string(cwd, "process.cwd")?,
            program,
            capabilities,
            no_new_privs,
            filter,
        })
    }

    /// Returns only if something failed: why.
    pub(super) fn run(&self) -> String {
        confine::reset_signals();
        // Here and not in libcontainer: the volumes are attached only now, and the directory may be in one.
        if let Err(error) = unistd::chdir(self.cwd.as_c_str()) {
            let cwd = self.cwd.to_string_lossy();
            return format!("chdir to cwd ({cwd:?}) set in config.json failed: {}", reason(error));
        }
        // A link in the image (to a descriptor in /proc, for one) must not lead out of the container's root.
        if let Err(error) = unistd::getcwd()
            .map_err(reason)
            .and_then(|cwd| cwd.is_absolute().then_some(()).ok_or_else(|| "it is outside of the container".to_owned()))
        {
            return format!("current working directory {:?}: {error}", self.cwd.to_string_lossy());
        }
        if let Err(text) = self.confine() {
            return text;
        }
        self.execute()
    }

    /// With `no_new_privs` anybody may load a filter, so it comes last and need not allow what precedes it;
    /// without, CAP_SYS_ADMIN is needed, which is lent and taken back after it.
    fn confine(&self) -> Result<(), String> {
        if self.no_new_privs {
            nix::sys::prctl::set_no_new_privs().map_err(|e| format!("set no_new_privs: {e}"))?;
        } else {
            self.load_filter()?;
        }
        confine::set_capabilities(&self.capabilities).map_err(|e| format!("set capabilities: {e}"))?;
        if self.no_new_privs {
            self.load_filter()?;
        }
        Ok(())
    }

    fn load_filter(&self) -> Result<(), String> {
        let Some(filter) = &self.filter else { return Ok(()) };
        confine::load_seccomp(&filter.program, filter.flags).map_err(|e| format!("load the seccomp filter: {e}"))
    }

    /// The texts are those that users of runc and containerd know (Go's `exec.LookPath`).
    fn execute(&self) -> String {
        let named = self.program.contains('/');
        let mut denied = false;
        for candidate in &self.candidates {
            let path = Path::new(OsStr::from_bytes(candidate.to_bytes()));
            match path.metadata() {
                Ok(meta) if meta.is_dir() => {
                    if named {
                        return format!("exec: {:?}: is a directory", self.program);
                    }
                    continue;
                }
                Ok(_) => {}
                Err(error) if named => {
                    let why = error.raw_os_error().map_or_else(|| error.to_string(), |e| reason(Errno::from_raw(e)));
                    return format!("exec: {:?}: stat {}: {why}", self.program, self.program);
                }
                Err(_) => continue,
            }
            let Err(errno) = unistd::execve(candidate, &self.args, &self.env);
            match errno {
                Errno::EACCES if named => return format!("exec: {:?}: permission denied", self.program),
                Errno::EACCES => denied = true,
                // The file is there: its interpreter or format is what is wrong.
                other => return format!("exec {}: {}", path.display(), reason(other)),
            }
        }
        if denied {
            return format!("exec: {:?}: permission denied", self.program);
        }
        format!("exec: {:?}: executable file not found in $PATH", self.program)
    }
}

/// The words that Go prints for an errno.
fn reason(errno: Errno) -> String {
    let text = errno.desc();
    let mut characters = text.chars();
    characters.next().map(|first| first.to_lowercase().chain(characters).collect()).unwrap_or_default()
}

/// [`Plan`] in the shape that libcontainer takes.
#[derive(Clone)]
pub(super) struct PodExecutor {
    pub(super) plan: Rc<Plan>,
    /// Close-on-exec pipe: text is a failure, end of file is success.
    pub(super) report: Rc<OwnedFd>,
}

impl Executor for PodExecutor {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let text = self.plan.run();
        let _reader_gone = write_report(&self.report, &text);
        exit_now(START_FAILED)
    }
}

fn write_report(report: &OwnedFd, text: &str) -> io::Result<()> {
    std::fs::File::from(report.try_clone()?).write_all(text.as_bytes())
}
