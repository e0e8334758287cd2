//! Argument dispatch, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    // Before anything can start a thread: a shim has exactly one.
    if args.next_if(|arg| arg == "shim").is_some() {
        return gantry::shim::main(args);
    }
    ExitCode::SUCCESS
}
