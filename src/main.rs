//! Argument dispatch, nothing else.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // Before anything can start a thread: a shim has exactly one.
    if args.get(1).is_some_and(|arg| arg == "shim") {
        return gantry::shim::main(args.into_iter().skip(2));
    }
    gantry::cli::main(args, gantry::agent::main)
}
