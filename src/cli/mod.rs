//! The command line: one file per subcommand.
//!
//! Called as `kubelet` (a link to our file), the program behaves as `gantry agent`, so that units, images and
//! tools made for kubelet work unchanged. Called as `ctr`, `crictl` or `containerd` it does the little that `kind` asks of them.

mod agent;
mod client;
mod doctor;
mod exec;
mod follow;
mod images;
mod log;
mod logs;
mod ps;
mod retire;
mod rm;
mod run;
mod stand_in;
mod table;
mod target;
mod version;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::{ArgMatches, Command};

use crate::config::{Config, normalize};

/// Exit status of a command line that cannot be understood, clap's own.
const USAGE: u8 = 2;

/// One subcommand: how it is written and what it does.
struct Subcommand {
    name: &'static str,
    command: fn() -> Command,
    run: fn(&ArgMatches) -> ExitCode,
}

/// All subcommands but `agent`, which main gives its body, and `shim`, which main takes before us.
const SUBCOMMANDS: &[Subcommand] = &[
    Subcommand { name: doctor::NAME, command: doctor::command, run: doctor::run },
    Subcommand { name: run::NAME, command: run::command, run: run::run },
    Subcommand { name: ps::NAME, command: ps::command, run: ps::run },
    Subcommand { name: logs::NAME, command: logs::command, run: logs::run },
    Subcommand { name: exec::NAME, command: exec::command, run: exec::run },
    Subcommand { name: images::NAME, command: images::command, run: images::run },
    Subcommand { name: rm::NAME, command: rm::command, run: rm::run },
    Subcommand { name: retire::NAME, command: retire::command, run: retire::run },
    Subcommand { name: version::NAME, command: version::command, run: version::run },
];

/// Runs what the arguments (with the program's name first) ask for; `run_agent` is the agent's body.
pub fn main(args: Vec<OsString>, run_agent: fn(Config) -> ExitCode) -> ExitCode {
    let program = args.first().map(Path::new).and_then(Path::file_name);
    if program.is_some_and(|name| name == "kubelet") {
        return kubelet(args, run_agent);
    }
    if let Some(program) = program.and_then(OsStr::to_str) {
        let arguments: Option<Vec<&str>> = args.iter().skip(1).map(|argument| argument.to_str()).collect();
        if let Some(code) = stand_in::run(program, &arguments.unwrap_or_default()) {
            return code;
        }
    }
    let mut command = Command::new("gantry")
        .about("A complete Kubernetes node: kubelet, container runtime, image store and Pod network")
        .version(version::TEXT)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(agent::command());
    for subcommand in SUBCOMMANDS {
        command = command.subcommand((subcommand.command)());
    }
    let matches = match command.try_get_matches_from(normalize_agent(args)) {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    match matches.subcommand() {
        Some((agent::NAME, matches)) => agent::run(matches, run_agent),
        Some((name, matches)) => {
            let known = SUBCOMMANDS.iter().find(|subcommand| subcommand.name == name);
            known.map_or(ExitCode::from(USAGE), |subcommand| (subcommand.run)(matches))
        }
        None => ExitCode::from(USAGE),
    }
}

/// Flags are written in two ways only for the agent, and for who is told what it is told.
fn normalize_agent(args: Vec<OsString>) -> Vec<OsString> {
    if args.get(1).is_some_and(|word| word == agent::NAME || word == doctor::NAME) {
        normalize(args).collect()
    } else {
        args
    }
}

/// `kubelet [flags]`. `--version` prints exactly what kubeadm parses.
fn kubelet(args: Vec<OsString>, run_agent: fn(Config) -> ExitCode) -> ExitCode {
    if args.iter().skip(1).any(|arg| matches!(arg.to_str(), Some("--version" | "--version=true" | "--version=raw"))) {
        println!("{}", version::kubelet_text());
        return ExitCode::SUCCESS;
    }
    match agent::command().name("kubelet").try_get_matches_from(normalize(args)) {
        Ok(matches) => agent::run(&matches, run_agent),
        Err(error) => usage(&error),
    }
}

/// Help goes to stdout with success, a wrong command line to stderr.
fn usage(error: &clap::Error) -> ExitCode {
    // nobody is left to tell if the terminal is gone
    let _ = error.print();
    u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(config: Config) -> ExitCode {
        assert_eq!(config.kubelet.port, 1234);
        ExitCode::from(42)
    }

    fn run(args: &[&str]) -> String {
        let code = main(args.iter().map(OsString::from).collect(), fake);
        format!("{code:?}")
    }

    #[test]
    fn the_agent_runs_under_both_names() {
        let expected = format!("{:?}", ExitCode::from(42));
        for args in [
            &["gantry", "agent", "--port=1234", "--fail_cgroupv1=false", "--hostname-override=n"][..],
            &["/usr/bin/kubelet", "--port=1234", "--fail-cgroupv1=false", "--hostname-override=n"],
        ] {
            assert_eq!(run(args), expected, "{args:?}");
        }
    }

    #[test]
    fn wrong_command_lines_fail() {
        for args in [&["gantry", "agent", "--no-such-flag"][..], &["gantry", "nothing"], &["kubelet", "word"]] {
            assert_eq!(run(args), format!("{:?}", ExitCode::from(USAGE)), "{args:?}");
        }
        let failed = format!("{:?}", ExitCode::FAILURE);
        assert_eq!(run(&["kubelet", "--port=70000", "--fail-cgroupv1=false"]), failed);
        assert_eq!(run(&["kubelet", "--config=/does/not/exist"]), failed);
    }

    #[test]
    fn versions_are_printed() {
        let success = format!("{:?}", ExitCode::SUCCESS);
        for args in [
            &["gantry", "version"][..],
            &["gantry", "--version"],
            &["kubelet", "--version"],
            &["gantry", "agent", "-h"],
        ] {
            assert_eq!(run(args), success, "{args:?}");
        }
    }
}
