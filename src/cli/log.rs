//! Our log: lines on stderr, text or JSON, with klog's verbosity.

use tracing_subscriber::EnvFilter;

use crate::config::Logging;

/// Directives for a klog verbosity. Libraries stay quieter than we do: their traces hold whole requests.
pub(super) fn directives(verbosity: u32) -> &'static str {
    match verbosity {
        0..=2 => "info",
        3..=4 => "info,gantry=debug",
        5..=7 => "info,gantry=trace",
        _ => "debug,gantry=trace",
    }
}

/// Starts logging; `RUST_LOG` wins over the verbosity. A second call changes nothing.
pub(super) fn start(logging: &Logging) {
    start_with(logging, directives(logging.verbosity));
}

/// Logging of a command whose output is for a person: warnings only, until `-v` asks for more.
pub(super) fn start_quiet(logging: &Logging) {
    start_with(logging, if logging.verbosity == 0 { "warn" } else { directives(logging.verbosity) });
}

fn start_with(logging: &Logging, directives: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(directives));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // an error says that a logger is there already, as in tests
    let _ = if logging.format == "json" {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init()
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verbosity_is_a_filter() {
        for verbosity in [0, 2, 4, 6, 10, u32::MAX] {
            assert!(EnvFilter::try_new(directives(verbosity)).is_ok());
        }
    }
}
