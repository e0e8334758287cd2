//! `gantry version`.

use std::process::ExitCode;

use clap::{ArgMatches, Command};

use crate::config::KUBERNETES_VERSION;

pub(super) const NAME: &str = "version";

pub(super) fn command() -> Command {
    Command::new(NAME).about("Print Gantry's version and the Kubernetes version it implements")
}

pub(super) fn run(_: &ArgMatches) -> ExitCode {
    println!("gantry {TEXT}");
    ExitCode::SUCCESS
}

/// Behind the program's name.
pub(super) const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), " (Kubernetes v1.37.2)");

/// What `kubelet --version` prints; kubeadm matches `^\s*Kubernetes v(...)\s*$`.
pub(super) fn kubelet_text() -> String {
    format!("Kubernetes {KUBERNETES_VERSION}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_texts_name_the_same_kubernetes() {
        assert!(TEXT.ends_with(&format!("({})", kubelet_text())));
    }
}
