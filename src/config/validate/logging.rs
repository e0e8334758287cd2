//! Containers' logs, our own log and traces. Source: component-base `logs/api/v1/options.go`,
//! `tracing/api/v1/config.go`.

use std::fmt::Display;
use std::path::Path;

use super::Errors;
use crate::config::duration::Duration;
use crate::config::gates::FeatureGates;
use crate::config::kubelet::{KubeletConfiguration, Logging, Tracing};
use crate::resources::quantity;

pub(super) fn logs(config: &KubeletConfiguration, errors: &mut Errors) {
    errors.when(config.container_log_max_workers < 1, "containerLogMaxWorkers must be greater than or equal to 1");
    errors.when(
        config.container_log_monitor_interval < Duration::from_secs(3),
        "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s",
    );
    errors.when(config.container_log_max_files <= 1, "containerLogMaxFiles must be greater than 1");
    let size = &config.container_log_max_size;
    if let Err(error) = quantity::nanos(size) {
        errors.when(true, format!("containerLogMaxSize (--container-log-max-size): {error}"));
    }
    let dir = &config.pod_logs_dir;
    errors.when(!Path::new(dir).is_absolute(), format!("pod logs path {dir:?} must be absolute path"));
    let clean =
        dir == "/" || (!dir.ends_with('/') && !dir.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")));
    // kubelet's own documentation writes a slash at the end
    let slash = dir.strip_suffix('/').is_some_and(|rest| !rest.ends_with('/'));
    errors.when(!clean && !slash, format!("pod logs path {dir:?} must be normalized"));
    errors.when(!dir.is_ascii(), format!("pod logs path {dir:?} mut contains ASCII characters only"));
}

pub(super) fn logging(logging: &Logging, gates: &FeatureGates, errors: &mut Errors) {
    let mut field = |wrong: bool, path: &str, value: &dyn Display, detail: &str| {
        if wrong {
            errors.0.push(format!("logging.{path}: Invalid value: {value}: {detail}"));
        }
    };
    let flush = logging.flush_frequency;
    field(flush <= Duration::ZERO, "flushFrequency", &flush, "Must be greater than zero");
    let format = &logging.format;
    let known = matches!(format.as_str(), "text" | "json");
    field(!known, "format", &format!("{format:?}"), "Unsupported log format: write text or json");
    let most = i32::MAX.unsigned_abs();
    field(logging.verbosity > most, "verbosity", &logging.verbosity, "Must be <= 2147483647");
    let text_only = !logging.vmodule.is_empty() && format != "text";
    field(text_only, "vmodule", &"[...]", "Only supported for text log format");
    for (index, item) in logging.vmodule.iter().enumerate() {
        let path = format!("vmodule[{index}]");
        let pattern = &item.file_pattern;
        field(pattern.is_empty(), &path, &"\"\"", "File pattern must not be empty");
        let punctuation = pattern.contains(['=', ',']);
        field(punctuation, &path, pattern, "File pattern must not contain equal sign or comma");
        field(item.verbosity > most, &path, &item.verbosity, "Must be <= 2147483647");
    }
    let alpha = gates.enabled("LoggingAlphaOptions");
    for (name, options) in [("text", &logging.options.text), ("json", &logging.options.json)] {
        let path = format!("options.{name}");
        let needs = "Feature LoggingAlphaOptions is disabled";
        field(options.split_stream && !alpha, &path, &"splitStream", needs);
        let buffered = quantity::nanos(&options.info_buffer_size.0).is_ok_and(|size| size != 0);
        field(buffered && !alpha, &path, &"infoBufferSize", needs);
    }
}

pub(super) fn tracing(tracing: &Tracing, errors: &mut Errors) {
    if let Some(rate) = tracing.sampling_rate_per_million {
        let path = format!("tracing.samplingRatePerMillion: Invalid value: {rate}");
        if rate < 0 {
            errors.0.push(format!("{path}: sampling rate must be positive"));
        }
        if rate > 1_000_000 {
            errors.0.push(format!("{path}: sampling rate per million must be less than or equal to one million"));
        }
    }
    let scheme = tracing.endpoint.as_deref().and_then(|endpoint| endpoint.split_once("//"));
    if let (Some((scheme, _)), Some(endpoint)) = (scheme, &tracing.endpoint) {
        let scheme = scheme.trim_end_matches(':');
        if !matches!(scheme, "dns" | "unix" | "unix-abstract") {
            errors.0.push(format!(
                "tracing.endpoint: Invalid value: {endpoint:?}: unsupported scheme: {scheme}.  Options are none, dns, unix, \
                 or unix-abstract.  See https://github.com/grpc/grpc/blob/master/doc/naming.md"
            ));
        }
    }
}
