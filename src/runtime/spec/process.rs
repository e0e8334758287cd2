//! The process: what runs, with which variables, where and as whom.

use std::collections::BTreeSet;
use std::path::PathBuf;

use oci_spec::runtime::{Process, Spec, User};

use super::{ContainerInput, Identity, Security, SpecError, apparmor, capabilities};
use crate::resources::qos;

/// Where programs are searched when neither image nor Pod says so.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) fn process(
    input: &ContainerInput<'_>,
    security: &Security<'_>,
    identity: &Identity,
    wanted: &BTreeSet<String>,
) -> Result<Process, SpecError> {
    let terminal = input.container.tty == Some(true);
    let mut user = User::default();
    user.set_uid(identity.uid);
    user.set_gid(identity.gid);
    user.set_additional_gids(Some(identity.groups.clone()));

    let mut process = Process::default();
    process.set_terminal(Some(terminal));
    process.set_user(user);
    process.set_args(Some(args(input)?));
    process.set_env(Some(env(input, &identity.home, terminal)?));
    process.set_cwd(cwd(input)?);
    process.set_capabilities(Some(capabilities::with_lent(wanted)));
    // those of the shim, as with any other runtime
    process.set_rlimits(None);
    // the executor sets it, after the filter is loaded
    process.set_no_new_privileges(None);
    process.set_oom_score_adj(Some(oom_score_adj(input)));
    process.set_apparmor_profile(apparmor::profile(input, security)?);
    Ok(process)
}

fn oom_score_adj(input: &ContainerInput<'_>) -> i32 {
    let wanted = qos::oom_score_adj(input.pod, input.container, input.node.memory_capacity);
    input.node.min_oom_score_adj.map_or(wanted, |min| wanted.max(min))
}

/// `command` replaces entrypoint and arguments of the image, `args` alone only the arguments.
fn args(input: &ContainerInput<'_>) -> Result<Vec<String>, SpecError> {
    let config = input.image.config().as_ref();
    let entrypoint = config.and_then(|c| c.entrypoint().as_deref()).unwrap_or_default();
    let cmd = config.and_then(|c| c.cmd().as_deref()).unwrap_or_default();
    let (command, args) = match (input.command, input.args) {
        ([], []) => (entrypoint, cmd),
        ([], args) => (entrypoint, args),
        (command, args) => (command, args),
    };
    let all: Vec<String> = command.iter().chain(args).cloned().collect();
    if all.is_empty() {
        return Err(SpecError::NoCommand);
    }
    match all.iter().find(|arg| arg.contains('\0')) {
        Some(arg) => Err(SpecError::InvalidString { what: "an argument of the command", value: arg.clone() }),
        None => Ok(all),
    }
}

/// Later variables win, in the place of the first of their name.
fn env(input: &ContainerInput<'_>, home: &str, terminal: bool) -> Result<Vec<String>, SpecError> {
    let mut env = Environment::default();
    env.set("PATH", DEFAULT_PATH);
    env.set("HOSTNAME", input.hostname);
    if terminal {
        env.set("TERM", "xterm");
    }
    let of_image = input.image.config().as_ref().and_then(|c| c.env().as_deref()).unwrap_or_default();
    for (name, value) in of_image.iter().filter_map(|pair| pair.split_once('=')).filter(|(name, _)| !name.is_empty()) {
        env.set(name, value);
    }
    for (name, value) in input.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(SpecError::InvalidString { what: "an environment variable", value: name.clone() });
        }
        env.set(name, value);
    }
    if env.get("HOME").is_none_or(str::is_empty) {
        env.set("HOME", home);
    }
    Ok(env.0.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

#[derive(Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: &str, value: &str) {
        match self.0.iter_mut().find(|(own, _)| own == name) {
            Some((_, own)) => value.clone_into(own),
            None => self.0.push((name.to_owned(), value.to_owned())),
        }
    }
}

fn cwd(input: &ContainerInput<'_>) -> Result<PathBuf, SpecError> {
    let of_image = input.image.config().as_ref().and_then(|c| c.working_dir().as_deref());
    let own = input.container.working_dir.as_deref().filter(|cwd| !cwd.is_empty());
    let cwd = own.or(of_image).filter(|cwd| !cwd.is_empty()).unwrap_or("/");
    if !cwd.starts_with('/') || cwd.contains('\0') {
        return Err(SpecError::WorkingDirectory(cwd.to_owned()));
    }
    Ok(PathBuf::from(cwd))
}

/// What an exec'd process differs in from the container's first one.
#[derive(Clone, Copy, Debug)]
pub struct ExecOptions<'a> {
    /// Program and arguments.
    pub command: &'a [String],
    /// Whether it gets a terminal.
    pub tty: bool,
}

/// The process of `kubectl exec`, of an exec probe or of an exec hook: user, groups, variables, directory,
/// capabilities and limits are those of the container.
pub fn exec_process(spec: &Spec, options: ExecOptions<'_>) -> Result<Process, SpecError> {
    let mut process = spec.process().clone().ok_or(SpecError::NoCommand)?;
    if options.command.is_empty() {
        return Err(SpecError::NoCommand);
    }
    if let Some(arg) = options.command.iter().find(|arg| arg.contains('\0')) {
        return Err(SpecError::InvalidString { what: "an argument of the command", value: arg.clone() });
    }
    process.set_args(Some(options.command.to_vec()));
    process.set_terminal(Some(options.tty));
    if options.tty {
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|pair| pair.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        process.set_env(Some(env));
    }
    Ok(process)
}
