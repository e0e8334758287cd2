//! `gantry agent`: configuration and logging, then the agent itself.

use std::process::ExitCode;

use clap::{ArgMatches, Command};

use super::log;
use crate::config::{self, Config, ConfigError, Flags, Host};

pub(super) const NAME: &str = "agent";

pub(super) fn command() -> Command {
    config::command(NAME)
}

/// Reads the configuration, starts logging, says what holds, and hands over.
pub(super) fn run(matches: &ArgMatches, run_agent: fn(Config) -> ExitCode) -> ExitCode {
    let config = match load(matches) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("Error: {error}");
            return ExitCode::FAILURE;
        }
    };
    log::start(&config.kubelet.logging);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        kubernetes = config::KUBERNETES_VERSION,
        node = config.node_name,
        paths = ?config.paths,
        config = %config.configz()["kubeletconfig"],
        "Effective KubeletConfiguration"
    );
    run_agent(config)
}

fn load(matches: &ArgMatches) -> Result<Config, ConfigError> {
    let host = Host::read().map_err(|error| {
        ConfigError::Invalid(vec![format!("cannot read /sys/fs/cgroup: {error}: mount a cgroup file system there")])
    })?;
    Config::load(Flags::from_matches(matches)?, &host)
}
