//! From files and flags to one [`KubeletConfiguration`]: parse, merge, default.
//!
//! Source: `cmd/kubelet/app/server.go` (order and merging), `pkg/kubelet/kubeletconfig/configfiles` and
//! `pkg/kubelet/apis/config/v1beta1/defaults.go`. Unlike kubelet, which falls back to a lenient reading, an
//! unknown field is always an error: a misspelt setting must not be taken for set.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::gates::FeatureGates;
use super::kubelet::{API_VERSION, KIND, KubeletConfiguration};

/// Largest configuration file read; kubelet's own are a few kilobytes.
const MAX_FILE: u64 = 4 << 20;

/// A configuration that cannot be read; terminal: somebody has to mend the named file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file or directory cannot be read.
    #[error("failed to load kubelet config {}: {source}: check the path and its permissions", .path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Neither YAML nor JSON.
    #[error("failed to load kubelet config {}: no valid YAML or JSON: {message}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// Another object than a KubeletConfiguration.
    #[error(
        "failed to load kubelet config {}: unknown apiVersion/kind: {found}: write apiVersion: {API_VERSION} and kind: {KIND}",
        .path.display()
    )]
    Kind {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
    },
    /// A field that does not exist or has a wrong value.
    #[error("failed to load kubelet config {origin}: {field}: {message}: correct or remove this field")]
    Field {
        /// The file, or the flags.
        origin: String,
        /// Path of the field.
        field: String,
        /// What is wrong with it.
        message: String,
    },
}

/// kubelet's hard eviction thresholds on Linux (`pkg/kubelet/eviction/defaults_linux.go`).
const DEFAULT_EVICTION_HARD: [(&str, &str); 5] = [
    ("imagefs.available", "15%"),
    ("imagefs.inodesFree", "5%"),
    ("memory.available", "100Mi"),
    ("nodefs.available", "10%"),
    ("nodefs.inodesFree", "5%"),
];

/// The configuration of `--config`, then `--config-dir`, then flags (`fields`: path in the file's own terms and
/// value), with all defaults. Also returns the files of the directory that were skipped.
pub fn load(
    file: Option<&Path>,
    directory: Option<&Path>,
    fields: &[(&str, Value)],
) -> Result<(KubeletConfiguration, Vec<PathBuf>), LoadError> {
    let base = match file {
        Some(path) => read(path)?,
        None => Value::Object(Map::new()),
    };
    let origin = file.map_or_else(|| "defaults".to_owned(), |path| path.display().to_string());
    let mut config = decode(base, &origin)?;
    let mut skipped = Vec::new();
    if let Some(directory) = directory {
        for path in walk(directory)? {
            if path.extension().is_none_or(|extension| extension != "conf") {
                skipped.push(path);
                continue;
            }
            let patch = read(&path)?;
            // a wrong field is reported with the drop-in's name, not as part of the whole
            decode(patch.clone(), &path.display().to_string())?;
            let mut merged = encode(&config);
            merge_patch(&mut merged, patch);
            config = decode(merged, &path.display().to_string())?;
        }
    }
    if !fields.is_empty() {
        let mut merged = encode(&config);
        for (path, value) in fields {
            set(&mut merged, path, value.clone());
        }
        // defaults that follow other settings were fixed by the files, as in kubelet
        config = decode(merged, "flags")?;
    }
    Ok((config, skipped))
}

/// One file as JSON, checked for `apiVersion` and `kind`.
fn read(path: &Path) -> Result<Value, LoadError> {
    let failed = |source| LoadError::Read { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > MAX_FILE {
        let message = format!("{length} bytes, more than {MAX_FILE}");
        return Err(LoadError::Syntax { path: path.to_owned(), message });
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    parse(&text, path)
}

/// YAML or JSON text to a configuration object.
pub(super) fn parse(text: &str, path: &Path) -> Result<Value, LoadError> {
    let value: Value = serde_saphyr::from_str(text)
        .map_err(|error| LoadError::Syntax { path: path.to_owned(), message: error.to_string() })?;
    let word = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    let (version, kind) = (word("apiVersion"), word("kind"));
    if version != API_VERSION || kind != KIND {
        let found = format!("apiVersion {version:?}, kind {kind:?}");
        return Err(LoadError::Kind { path: path.to_owned(), found });
    }
    Ok(value)
}

/// All regular files below a directory in lexical order, as Go's `filepath.WalkDir` finds them.
fn walk(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Read { path: directory.to_owned(), source };
    let mut entries = std::fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>())
        .map_err(failed)?;
    entries.sort();
    let mut files = Vec::new();
    for path in entries {
        // symbolic links to directories are not followed
        if std::fs::symlink_metadata(&path).map_err(failed)?.is_dir() {
            files.extend(walk(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

fn encode(config: &KubeletConfiguration) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// RFC 7386, with which kubelet merges drop-ins: objects merge, null removes, everything else replaces.
fn merge_patch(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge_patch(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Sets the field at a dotted path.
fn set(target: &mut Value, path: &str, value: Value) {
    let mut node = target;
    for key in path.split('.') {
        if !node.is_object() {
            *node = Value::Object(Map::new());
        }
        let Value::Object(map) = node else { return };
        node = map.entry(key).or_insert(Value::Null);
    }
    *node = value;
}

/// JSON null means "not set" wherever it stands.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// JSON to the typed configuration, strictly, then kubelet's defaults.
pub(super) fn decode(mut value: Value, origin: &str) -> Result<KubeletConfiguration, LoadError> {
    strip_nulls(&mut value);
    let given = |key: &str| value.get(key).is_some();
    let (report, serialize, hard) =
        (given("nodeStatusReportFrequency"), given("serializeImagePulls"), given("evictionHard"));
    let update = given("nodeStatusUpdateFrequency");
    let mut config: KubeletConfiguration = serde_path_to_error::deserialize(value).map_err(|error| {
        let (field, message) = (error.path().to_string(), error.inner().to_string());
        LoadError::Field { origin: origin.to_owned(), field, message }
    })?;
    let defaults = KubeletConfiguration::default();
    if update && !config.node_status_update_frequency.is_zero() && !report {
        config.node_status_report_frequency = config.node_status_update_frequency;
    }
    fill_zeros(&mut config, defaults);
    if !serialize {
        config.serialize_image_pulls = config.max_parallel_image_pulls.is_none_or(|pulls| pulls < 2);
    }
    if !hard || config.merge_default_eviction_settings {
        for (signal, threshold) in DEFAULT_EVICTION_HARD {
            config.eviction_hard.entry(signal.to_owned()).or_insert_with(|| threshold.to_owned());
        }
    }
    if config.pod_pids_limit < 0 {
        config.pod_pids_limit = -1;
    }
    // an invalid set of gates is validation's to report
    let gates = FeatureGates::new(&config.feature_gates).unwrap_or_default();
    if gates.enabled("KubeletCrashLoopBackOffMax") {
        let period = &mut config.crash_loop_back_off.max_container_restart_period;
        period.get_or_insert(super::Duration::from_secs(300));
    }
    if gates.enabled("KubeletEnsureSecretPulledImages") && config.image_pull_credentials_verification_policy.is_empty()
    {
        config.image_pull_credentials_verification_policy = "NeverVerifyPreloadedImages".to_owned();
    }
    Ok(config)
}

/// Fields for which Go cannot tell zero from "not set" get their default.
fn fill_zeros(config: &mut KubeletConfiguration, defaults: KubeletConfiguration) {
    macro_rules! fill {
        ($is_zero:expr => $($($field:ident).+),* $(,)?) => {
            $(if $is_zero(&config.$($field).+) { config.$($field).+ = defaults.$($field).+; })*
        };
    }
    fill!(super::Duration::is_zero_ref =>
        sync_frequency, file_check_frequency, http_check_frequency, authentication.webhook.cache_ttl,
        authorization.webhook.cache_authorized_ttl, authorization.webhook.cache_unauthorized_ttl,
        streaming_connection_idle_timeout, node_status_report_frequency, node_status_update_frequency,
        image_minimum_gc_age, volume_stats_agg_period, cpu_manager_reconcile_period, runtime_request_timeout,
        eviction_pressure_transition_period, logging.flush_frequency,
    );
    fill!(String::is_empty =>
        api_version, kind, address, authorization.mode, healthz_bind_address, cgroup_driver, cpu_manager_policy,
        memory_manager_policy, topology_manager_policy, topology_manager_scope, hairpin_mode, content_type,
        container_log_max_size, config_map_and_secret_change_detection_strategy, volume_plugin_dir,
        memory_reservation_policy, container_runtime_endpoint, pod_logs_dir, logging.format,
    );
    fill!(|number: &i32| *number == 0 =>
        port, registry_burst, event_burst, node_lease_duration_seconds, max_pods, kube_api_burst,
    );
    fill!(|number: &i64| *number == 0 => max_open_files);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(body: &str) -> String {
        format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{body}")
    }

    fn from_text(body: &str) -> Result<KubeletConfiguration, LoadError> {
        decode(parse(&file(body), Path::new("config.yaml"))?, "config.yaml")
    }

    #[test]
    fn an_empty_file_is_all_defaults() {
        let config = from_text("").unwrap();
        assert_eq!(config.port, 10250);
        assert_eq!(config.node_status_report_frequency.to_string(), "5m0s");
        assert_eq!(config.eviction_hard["memory.available"], "100Mi");
        assert!(config.serialize_image_pulls);
        assert_eq!(config.image_pull_credentials_verification_policy, "NeverVerifyPreloadedImages");
        assert_eq!(config.memory_throttling_factor, None);
    }

    #[test]
    fn what_kubeadm_writes_is_read() {
        let config = from_text(include_str!("testdata/kubeadm.yaml").split_once("---\n").unwrap().1).unwrap();
        assert_eq!(config.static_pod_path, "/etc/kubernetes/manifests");
        assert_eq!(config.cluster_dns, ["10.96.0.10"]);
        assert_eq!(config.authentication.webhook.cache_ttl.to_string(), "2m0s", "0s means default");
        assert_eq!(config.cgroup_driver, "systemd");
        assert_eq!(config.healthz_port, 10248);
        assert_eq!(config.eviction_pressure_transition_period.to_string(), "5m0s");
    }

    #[test]
    fn dependent_defaults() {
        let config = from_text("nodeStatusUpdateFrequency: 3s\nmaxParallelImagePulls: 4\n").unwrap();
        assert_eq!(config.node_status_report_frequency.to_string(), "3s");
        assert!(!config.serialize_image_pulls);
        let config = from_text("evictionHard: {memory.available: 1Gi}\n").unwrap();
        assert_eq!(config.eviction_hard.len(), 1);
        let config = from_text("evictionHard: {memory.available: 1Gi}\nmergeDefaultEvictionSettings: true\n").unwrap();
        assert_eq!((config.eviction_hard.len(), config.eviction_hard["memory.available"].as_str()), (5, "1Gi"));
        let config = from_text("healthzPort: 0\nport: 0\npodPidsLimit: -7\nregistryPullQPS: 0\n").unwrap();
        assert_eq!(
            (config.healthz_port, config.port, config.pod_pids_limit, config.registry_pull_qps),
            (0, 10250, -1, 0)
        );
    }

    #[test]
    fn wrong_fields_are_named() {
        for (body, field, words) in [
            ("maxPod: 3\n", "maxPod", "unknown field `maxPod`"),
            (
                "authentication: {anonymous: {enable: true}}\n",
                "authentication.anonymous.enable",
                "unknown field `enable`",
            ),
            ("port: ten\n", "port", "invalid type: string \"ten\""),
            ("port: 99999999999\n", "port", "99999999999"),
            ("syncFrequency: 20\n", "syncFrequency", "invalid type: integer `20`"),
            ("syncFrequency: 20 s\n", "syncFrequency", "invalid duration \"20 s\""),
            ("evictionHard: {memory.available: 100}\n", "evictionHard.memory.available", "invalid type: integer"),
            (
                "registerWithTaints: [{key: a, effct: NoSchedule}]\n",
                "registerWithTaints[0].effct",
                "unknown field `effct`",
            ),
        ] {
            let error = from_text(body).unwrap_err();
            let LoadError::Field { field: at, message, origin } = &error else { panic!("{error}") };
            assert_eq!((at.as_str(), origin.as_str()), (field, "config.yaml"));
            assert!(message.contains(words), "{message}");
        }
        assert!(matches!(
            parse("apiVersion: v1\nkind: Pod\n", Path::new("x")),
            Err(LoadError::Kind { found, .. }) if found == "apiVersion \"v1\", kind \"Pod\""
        ));
    }

    #[test]
    fn flags_win_over_drop_ins_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, body: &str| std::fs::write(dir.path().join(name), file(body)).unwrap();
        std::fs::create_dir_all(dir.path().join("drop/sub")).unwrap();
        write(
            "config.yaml",
            "maxPods: 1\nport: 1\npodsPerCore: 1\nclusterDNS: [a, b]\nevictionHard: {nodefs.available: 1%}\n",
        );
        write("drop/20.conf", "maxPods: 3\nclusterDNS: [c]\n");
        write(
            "drop/10.conf",
            "maxPods: 2\nport: 2\nnodeStatusUpdateFrequency: 7s\nevictionHard: {memory.available: 2%}\n",
        );
        write("drop/sub/30.conf", "podsPerCore: 9\nclusterDomain: null\n");
        std::fs::write(dir.path().join("drop/README"), "no configuration").unwrap();
        let (config, skipped) = load(
            Some(&dir.path().join("config.yaml")),
            Some(&dir.path().join("drop")),
            &[("port", 4.into()), ("authentication.anonymous.enabled", true.into())],
        )
        .unwrap();
        assert_eq!((config.max_pods, config.port, config.pods_per_core), (3, 4, 9));
        assert_eq!(config.cluster_dns, ["c"]);
        assert!(config.authentication.anonymous.enabled);
        assert_eq!(config.eviction_hard.len(), 2, "maps merge");
        // the base file had fixed the report frequency already
        assert_eq!(config.node_status_report_frequency.to_string(), "5m0s");
        assert_eq!(skipped, [dir.path().join("drop/README")]);
    }

    #[test]
    fn drop_ins_must_say_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("1.conf"), "maxPods: 1\n").unwrap();
        let error = load(None, Some(dir.path()), &[]).unwrap_err().to_string();
        assert!(error.contains("1.conf") && error.contains("unknown apiVersion/kind"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
            let _ = parse(&text, Path::new("x"));
            let _ = from_text(&text);
        }

        #[test]
        fn arbitrary_values_never_panic(key in "(port|syncFrequency|logging|evictionHard|registerWithTaints|reservedMemory|tracing)", value in "[-\\[\\]{}:a-z0-9 ,\"']{0,40}") {
            let _ = from_text(&format!("{key}: {value}\n"));
        }
    }
}
