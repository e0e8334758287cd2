//! Argument dispatch, nothing else.

use std::ffi::OsString;
use std::process::ExitCode;

use gantry::config::Config;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    gantry::cli::main(args, agent)
}

fn agent(config: Config) -> ExitCode {
    eprintln!("gantry: node {}: this build has no agent", config.node_name);
    ExitCode::FAILURE
}
