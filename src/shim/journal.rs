//! The shim's own log: `<pod_dir>/shim.log`, which is its stderr. Rarely written, and bounded.

use std::fmt;
use std::io::{self, Write};

use jiff::Timestamp;
use rustix::fs::{fstat, ftruncate};

/// Bytes after which the file starts anew.
const LIMIT: i64 = 256 << 10;

/// Writes one line. Nothing can be done if that fails.
pub(super) fn write(text: fmt::Arguments<'_>) {
    let mut stderr = io::stderr().lock();
    // The file is open for appending, so the next write lands at the new end.
    if fstat(&stderr).is_ok_and(|stat| stat.st_size > LIMIT) && ftruncate(&stderr, 0).is_err() {
        return;
    }
    let _unwritable = writeln!(stderr, "{:.6} [{}] {text}", Timestamp::now(), std::process::id());
}

macro_rules! note {
    ($($argument:tt)*) => { $crate::shim::journal::write(format_args!($($argument)*)) };
}
pub(super) use note;
