//! Argument dispatch, nothing else.

fn main() {}
