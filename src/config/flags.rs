//! Kubelet's command line: parsing with pflag's habits, and the typed values of flags that are no file fields.
//!
//! pflag: `_` and `-` are the same, booleans take a value only after `=`, values may begin with a dash, the last
//! of several wins, lists and maps collect.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};
use ipnet::IpNet;
use serde_json::{Map as JsonMap, Value, json};

use super::duration::Duration;
use super::flag_table::{FLAGS, Flag, Kind, VARIABLES};
use super::k3s::{self, K3s};
use super::leave::{self, Leave};
use crate::network::cni::{CniConfig, CniUse, DEADLINE};

/// A flag whose value is wrong; terminal: the command line must be mended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid argument {value:?} for \"--{flag}\" flag: {message}")]
pub struct FlagError {
    /// Name without dashes.
    pub flag: &'static str,
    /// What was given.
    pub value: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Values of the flags that have no field in the configuration file, and the file fields that flags set.
#[derive(Clone, Debug, PartialEq)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--config-dir`.
    pub config_dir: Option<PathBuf>,
    /// `--kubeconfig`; none means standalone.
    pub kubeconfig: Option<PathBuf>,
    /// `--bootstrap-kubeconfig`.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// `--k3s-*`.
    pub k3s: Option<K3s>,
    /// `--hostname-override`.
    pub hostname_override: Option<String>,
    /// `--node-ip`, at most one per family.
    pub node_ips: Vec<IpAddr>,
    /// `--cert-dir`; by default `pki` in kubelet's root.
    pub cert_dir: PathBuf,
    /// `--cloud-provider=external`.
    pub external_cloud_provider: bool,
    /// `--root-dir`.
    pub root_dir: PathBuf,
    /// `--node-labels`.
    pub node_labels: BTreeMap<String, String>,
    /// `--lock-file`.
    pub lock_file: Option<PathBuf>,
    /// `--exit-on-lock-contention`.
    pub exit_on_lock_contention: bool,
    /// `--image-credential-provider-config`.
    pub image_credential_provider_config: Option<PathBuf>,
    /// `--image-credential-provider-bin-dir`.
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    /// `--data-dir`.
    pub data_dir: PathBuf,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--container-logs-dir`.
    pub container_logs_dir: PathBuf,
    /// `--insecure-registry`.
    pub insecure_registries: Vec<String>,
    /// `--bridge-name`.
    pub bridge_name: String,
    /// `--cluster-cidr`.
    pub cluster_cidrs: Vec<IpNet>,
    /// `--nested`.
    pub nested: bool,
    /// `--leave-*`.
    pub leave: Option<Leave>,
    /// `--network-plugin` and `--cni-*`.
    pub cni: CniConfig,
    /// `--minimum-container-ttl-duration`.
    pub minimum_container_ttl: Duration,
    /// `--maximum-dead-containers-per-container`.
    pub maximum_dead_containers_per_container: i32,
    /// `--maximum-dead-containers`.
    pub maximum_dead_containers: i32,
    /// `--experimental-allocatable-ignore-eviction`.
    pub allocatable_ignores_eviction: bool,
    /// Fields of the configuration file that flags set, by dotted path.
    pub(super) fields: Vec<(&'static str, Value)>,
    /// Names of all flags on the command line.
    pub(super) given: Vec<&'static str>,
}

/// The clap command that knows every flag; `name` is what usage shows.
#[must_use]
pub fn command(name: &'static str) -> Command {
    let mut command = Command::new(name)
        .about("Run the node agent: everything kubelet and a container runtime do, with kubelet's flags")
        .args_override_self(true)
        .after_help("Flags win over files in --config-dir, these over --config.");
    for flag in FLAGS {
        let mut arg = Arg::new(flag.name).long(flag.name).help(flag.help).action(ArgAction::Append);
        arg = match flag.kind {
            Kind::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("bool"),
            _ => arg.num_args(1).allow_hyphen_values(true).value_name(value_name(flag.kind)),
        };
        if flag.name == "v" {
            arg = arg.short('v');
        }
        if let Some((_, variable)) = VARIABLES.iter().find(|(name, _)| *name == flag.name) {
            // a token is in one of them
            arg = arg.env(variable).hide_env_values(true);
        }
        command = command.arg(arg);
    }
    command
}

fn value_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Duration => "duration",
        Kind::Int32 | Kind::Int64 | Kind::Unsigned => "int",
        Kind::Ip => "ip",
        Kind::List => "strings",
        Kind::Map | Kind::BoolMap | Kind::LessMap | Kind::Headers => "map",
        _ => "string",
    }
}

/// `_` for `-` in flag names, as pflag's normalization does.
pub fn normalize(args: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.into_iter().map(|arg| match arg.to_str() {
        Some(text) if text.starts_with("--") => {
            let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
            let name = name.replace('_', "-");
            value.map_or_else(|| name.clone(), |value| format!("{name}={value}")).into()
        }
        _ => arg,
    })
}

impl Flags {
    /// For a node by itself that a user starts by hand: no API server, and cgroup v1 is good enough unless a flag or
    /// file says otherwise.
    #[must_use]
    pub fn standalone(mut self) -> Self {
        self.kubeconfig = None;
        self.bootstrap_kubeconfig = None;
        self.k3s = None;
        self.leave = None;
        if self.config.is_none() && self.config_dir.is_none() {
            // what flags say comes later and wins
            self.fields.insert(0, ("failCgroupV1", false.into()));
        }
        if !self.given.contains(&"network-plugin") {
            // a Pod that is tried out is no part of the network of a cluster that happens to be here
            self.cni.policy = CniUse::Never;
        }
        self
    }

    /// The typed values of parsed arguments.
    pub fn from_matches(matches: &ArgMatches) -> Result<Self, FlagError> {
        let mut values: BTreeMap<&str, Value> = BTreeMap::new();
        let (mut fields, mut given) = (Vec::new(), Vec::new());
        for flag in FLAGS {
            let Some(texts) = matches.get_many::<String>(flag.name) else { continue };
            let texts: Vec<&str> = texts.map(String::as_str).collect();
            let value = parse(flag, &texts)?;
            given.push(flag.name);
            if flag.field.is_empty() {
                values.insert(flag.name, value);
            } else {
                fields.push((flag.field, value));
            }
        }
        let text = |name| values.get(name).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
        let path = |name| text(name).map(PathBuf::from);
        let list = |name: &str| -> Vec<String> {
            let items = values.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
            items.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let flag = |name| values.get(name).and_then(Value::as_bool).unwrap_or(false);
        let int = |name, default| {
            values.get(name).and_then(Value::as_i64).and_then(|value| i32::try_from(value).ok()).unwrap_or(default)
        };
        let cloud = text("cloud-provider").unwrap_or_default();
        if !matches!(cloud.as_str(), "" | "external") {
            let message =
                format!("unsupported value {cloud:?}: in-tree cloud providers are gone, use external or nothing");
            return Err(FlagError { flag: "cloud-provider", value: cloud, message });
        }
        let root_dir = path("root-dir").unwrap_or_else(|| "/var/lib/kubelet".into());
        let data_dir = path("data-dir").unwrap_or_else(|| "/var/lib/gantry".into());
        let cni = CniConfig {
            policy: network_plugin(text("network-plugin").unwrap_or_default())?,
            conf_dir: path("cni-conf-dir").unwrap_or_else(|| "/etc/cni/net.d".into()),
            bin_dirs: match list("cni-bin-dir") {
                none if none.is_empty() => vec!["/opt/cni/bin".into()],
                some => some.into_iter().map(PathBuf::from).collect(),
            },
            cache_dir: path("cni-cache-dir").unwrap_or_else(|| data_dir.join("cni")),
            deadline: DEADLINE,
        };
        let labels = values.get("node-labels").and_then(Value::as_object).cloned().unwrap_or_default();
        let label = |(key, value): (String, Value)| (key, value.as_str().unwrap_or("").to_owned());
        Ok(Self {
            config: path("config"),
            config_dir: path("config-dir"),
            kubeconfig: path("kubeconfig"),
            bootstrap_kubeconfig: path("bootstrap-kubeconfig"),
            k3s: k3s::from_flags(&text)?,
            hostname_override: text("hostname-override"),
            node_ips: node_ips(&text("node-ip").unwrap_or_default(), cloud == "external")?,
            cert_dir: path("cert-dir").unwrap_or_else(|| "/var/lib/kubelet/pki".into()),
            external_cloud_provider: cloud == "external",
            root_dir,
            node_labels: labels.into_iter().map(label).collect(),
            lock_file: path("lock-file"),
            exit_on_lock_contention: flag("exit-on-lock-contention"),
            image_credential_provider_config: path("image-credential-provider-config"),
            image_credential_provider_bin_dir: path("image-credential-provider-bin-dir"),
            data_dir,
            nested: flag("nested"),
            leave: leave::from_flags(
                text("leave-stateful-set"),
                path("leave-kubeconfig"),
                text("leave-timeout").and_then(|text| text.parse().ok()),
            )?,
            cni,
            state_dir: path("state-dir").unwrap_or_else(|| "/run/gantry".into()),
            container_logs_dir: path("container-logs-dir").unwrap_or_else(|| "/var/log/containers".into()),
            insecure_registries: list("insecure-registry"),
            bridge_name: bridge_name(text("bridge-name").unwrap_or_else(|| "gantry0".into()))?,
            cluster_cidrs: list("cluster-cidr").into_iter().map(cidr).collect::<Result<_, _>>()?,
            minimum_container_ttl: text("minimum-container-ttl-duration")
                .and_then(|text| text.parse().ok())
                .unwrap_or_default(),
            maximum_dead_containers_per_container: int("maximum-dead-containers-per-container", 1),
            maximum_dead_containers: int("maximum-dead-containers", -1),
            allocatable_ignores_eviction: flag("experimental-allocatable-ignore-eviction"),
            fields,
            given,
        })
    }
}

fn cidr(value: String) -> Result<IpNet, FlagError> {
    let network: Result<IpNet, _> = value.parse();
    network.map_err(|error| FlagError {
        flag: "cluster-cidr",
        message: format!("{error}: write a network such as 10.244.0.0/16"),
        value,
    })
}

fn network_plugin(value: String) -> Result<CniUse, FlagError> {
    match value.as_str() {
        "" => Ok(CniUse::IfConfigured),
        "cni" => Ok(CniUse::Required),
        "builtin" => Ok(CniUse::Never),
        _ => {
            let message = "write cni, builtin or nothing".to_owned();
            Err(FlagError { flag: "network-plugin", value, message })
        }
    }
}

/// Interface names are at most 15 bytes without white space and slashes (kernel `dev_valid_name`).
fn bridge_name(value: String) -> Result<String, FlagError> {
    let good = (1..=15).contains(&value.len())
        && value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':')
        && value != "."
        && value != "..";
    if good {
        return Ok(value);
    }
    let message = "an interface name has 1 to 15 printable characters without '/' and ':'".to_owned();
    Err(FlagError { flag: "bridge-name", value, message })
}

/// At most two addresses, then of both families, none of them unspecified unless alone
/// (`component-helpers/node/util/ips.go`).
fn node_ips(value: &str, external_cloud: bool) -> Result<Vec<IpAddr>, FlagError> {
    let error = |message: String| FlagError { flag: "node-ip", value: value.to_owned(), message };
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for part in value.split(',').map(str::trim) {
        addresses.push(part.parse().map_err(|_| error(format!("could not parse {part:?}: write an IP address")))?);
    }
    let families = |v4: bool| addresses.iter().filter(|address| address.is_ipv4() == v4).count();
    if addresses.len() > 2 || families(true) > 1 || families(false) > 1 {
        return Err(error("must contain either a single IP or a dual-stack pair of IPs".to_owned()));
    }
    if addresses.len() == 2 && addresses.iter().any(IpAddr::is_unspecified) {
        return Err(error("dual-stack node IP cannot include '0.0.0.0' or '::'".to_owned()));
    }
    if addresses.len() == 2 && !external_cloud && addresses[0] == addresses[1] {
        return Err(error("both addresses are the same".to_owned()));
    }
    Ok(addresses)
}

/// The JSON value that stands for one flag's occurrences.
fn parse(flag: &Flag, texts: &[&str]) -> Result<Value, FlagError> {
    let last = texts.last().copied().unwrap_or("");
    let error = |value: &str, message: String| FlagError { flag: flag.name, value: value.to_owned(), message };
    Ok(match flag.kind {
        Kind::Text => last.into(),
        Kind::Bool => match last {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => true.into(),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => false.into(),
            _ => return Err(error(last, "write true or false".to_owned())),
        },
        Kind::Int32 => last.parse::<i32>().map_err(|e| error(last, e.to_string()))?.into(),
        Kind::Int64 => last.parse::<i64>().map_err(|e| error(last, e.to_string()))?.into(),
        Kind::Unsigned => last.parse::<u32>().map_err(|e| error(last, e.to_string()))?.into(),
        Kind::Duration => last.parse::<Duration>().map_err(|e| error(last, e.to_string()))?.to_string().into(),
        Kind::Ip => last.parse::<IpAddr>().map_err(|e| error(last, e.to_string()))?.to_string().into(),
        Kind::Quantity => {
            crate::resources::quantity::nanos(last).map_err(|e| error(last, e.to_string()))?;
            last.into()
        }
        Kind::List => split(texts).map(Value::from).collect::<Vec<_>>().into(),
        Kind::Map => pairs(flag, texts, '=', |value| Ok(value.into()))?,
        Kind::LessMap => pairs(flag, texts, '<', |value| Ok(value.into()))?,
        Kind::BoolMap => pairs(flag, texts, '=', |value| {
            value.parse::<bool>().map(Value::from).map_err(|_| error(value, "write name=true or name=false".to_owned()))
        })?,
        Kind::Headers => {
            let mut headers = JsonMap::new();
            for part in split(texts) {
                // the value may be a credential and stays out of the message
                let Some((name, value)) = part.split_once(':') else {
                    return Err(error("", "malformed pair, expect name:value".to_owned()));
                };
                let values = headers.entry(name.trim()).or_insert_with(|| json!([]));
                if let Value::Array(values) = values {
                    values.push(value.trim().into());
                }
            }
            Value::Object(headers)
        }
        Kind::Taints => split(&[last])
            .map(|text| taint(text).ok_or_else(|| error(text, "write key=value:effect".to_owned())))
            .collect::<Result<Vec<_>, _>>()?
            .into(),
        Kind::ReservedMemory => texts
            .iter()
            .flat_map(|text| text.split(';'))
            .filter(|text| !text.is_empty())
            .map(|text| {
                let wrong = || "expected numaNodeID:type=quantity[,type=quantity...]".to_owned();
                reserved_memory(text).ok_or_else(|| error(text, wrong()))
            })
            .collect::<Result<Vec<_>, _>>()?
            .into(),
        Kind::VModule => {
            let mut items = Vec::new();
            for part in split(texts) {
                let level = part.split_once('=').and_then(|(name, level)| Some((name, level.parse::<u32>().ok()?)));
                let Some((pattern, level)) = level else {
                    return Err(error(part, "expected pattern=N".to_owned()));
                };
                items.push(json!({"filePattern": pattern, "verbosity": level}));
            }
            items.into()
        }
    })
}

fn split<'a>(texts: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    texts.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|part| !part.is_empty())
}

fn pairs(
    flag: &Flag,
    texts: &[&str],
    separator: char,
    convert: impl Fn(&str) -> Result<Value, FlagError>,
) -> Result<Value, FlagError> {
    let mut map = JsonMap::new();
    for part in split(texts) {
        let (key, value) = match part.split_once(separator) {
            Some(pair) => pair,
            // a label without a value is an empty one
            None if flag.name == "node-labels" => (part, ""),
            None => {
                let message = format!("malformed pair, expect name{separator}value");
                return Err(FlagError { flag: flag.name, value: part.to_owned(), message });
            }
        };
        map.insert(key.trim().to_owned(), convert(value.trim())?);
    }
    Ok(Value::Object(map))
}

fn taint(text: &str) -> Option<Value> {
    let (rest, effect) = text.split_once(':').unwrap_or((text, ""));
    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
    let plain = !key.is_empty() && !effect.contains(':') && !value.contains('=');
    plain.then(|| json!({"key": key, "value": value, "effect": effect}))
}

fn reserved_memory(text: &str) -> Option<Value> {
    let (node, limits) = text.split_once(':')?;
    let node: i32 = node.parse().ok()?;
    let mut map = JsonMap::new();
    for limit in limits.split(',') {
        let (kind, amount) = limit.split_once('=')?;
        crate::resources::quantity::nanos(amount).ok()?;
        if kind != "memory" && !kind.starts_with("hugepages-") {
            return None;
        }
        map.insert(kind.to_owned(), amount.into());
    }
    Some(json!({"numaNode": node, "limits": map}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Result<Flags, FlagError> {
        let args = std::iter::once("kubelet").chain(args.iter().copied()).map(OsString::from);
        Flags::from_matches(&command("kubelet").try_get_matches_from(normalize(args)).unwrap())
    }

    #[test]
    fn the_command_is_well_formed() {
        command("kubelet").debug_assert();
        assert!(FLAGS.iter().all(|flag| !flag.help.is_empty()));
    }

    #[test]
    fn every_field_of_the_table_exists() {
        for flag in FLAGS.iter().filter(|flag| !flag.field.is_empty()) {
            let config = serde_json::to_value(super::super::KubeletConfiguration::default()).unwrap();
            let pointer = format!("/{}", flag.field.replace('.', "/"));
            assert!(config.pointer(&pointer).is_some(), "--{}: {}", flag.name, flag.field);
        }
    }

    #[test]
    fn what_kubeadm_and_kind_pass_is_understood() {
        let flags = flags(&[
            "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf",
            "--kubeconfig=/etc/kubernetes/kubelet.conf",
            "--config=/var/lib/kubelet/config.yaml",
            "--node-ip=172.18.0.3,fd00::3",
            "--node-labels=",
            "--provider-id=kind://docker/c/n",
            "--runtime-cgroups=/system.slice/containerd.service",
            "--pod-infra-container-image=pause:3.10",
            "--register-with-taints=a=b:NoSchedule,c:NoExecute",
            "--fail_swap_on=false",
            "--eviction-hard",
            "memory.available<1%,nodefs.available<0",
            "--oom-score-adj",
            "-5",
            "-v=4",
            "--insecure-registry=127.0.0.1:5000",
            "--insecure-registry=[::1]:5000",
            "--rotate-certificates",
            "--feature-gates=AllAlpha=false",
        ])
        .unwrap();
        assert_eq!(flags.node_ips.len(), 2);
        assert_eq!(flags.insecure_registries, ["127.0.0.1:5000", "[::1]:5000"]);
        let field = |path: &str| flags.fields.iter().find(|(field, _)| *field == path).map(|(_, value)| value.clone());
        assert_eq!(field("failSwapOn"), Some(false.into()));
        assert_eq!(field("oomScoreAdj"), Some((-5).into()));
        assert_eq!(field("logging.verbosity"), Some(4.into()));
        assert_eq!(field("rotateCertificates"), Some(true.into()));
        assert_eq!(field("evictionHard").unwrap()["memory.available"], "1%");
        assert_eq!(field("registerWithTaints").unwrap()[1], json!({"key": "c", "value": "", "effect": "NoExecute"}));
        assert!(flags.given.contains(&"runtime-cgroups"));
    }

    #[test]
    fn cni_directories() {
        let flags = |args: &[&str]| flags(args).unwrap().cni;
        let default = flags(&["--data-dir=/d"]);
        assert_eq!(default.policy, CniUse::IfConfigured);
        assert_eq!(default.conf_dir, PathBuf::from("/etc/cni/net.d"));
        assert_eq!(default.bin_dirs, [PathBuf::from("/opt/cni/bin")]);
        assert_eq!(default.cache_dir, PathBuf::from("/d/cni"));
        let all = flags(&["--network-plugin=cni", "--cni-bin-dir=/a,/b", "--cni-bin-dir=/c", "--cni-cache-dir=/e"]);
        assert_eq!((all.policy, all.bin_dirs.len()), (CniUse::Required, 3));
        assert_eq!(all.cache_dir, PathBuf::from("/e"));
    }

    #[test]
    fn the_last_of_several_wins() {
        let flags = flags(&["--port=1", "--port=2", "--cluster-dns=a", "--cluster-dns=b,c"]).unwrap();
        assert_eq!(flags.fields, [("port", 2.into()), ("clusterDNS", json!(["a", "b", "c"]))]);
    }

    #[test]
    fn wrong_values_name_the_flag() {
        for (arg, flag) in [
            ("--port=x", "port"),
            ("--sync-frequency=10", "sync-frequency"),
            ("--node-ip=1.2.3.4,5.6.7.8", "node-ip"),
            ("--node-ip=1.2.3", "node-ip"),
            ("--cluster-cidr=10.0.0.0/99", "cluster-cidr"),
            ("--bridge-name=much-too-long-name", "bridge-name"),
            ("--cloud-provider=aws", "cloud-provider"),
            ("--network-plugin=kubenet", "network-plugin"),
            ("--reserved-memory=0:disk=1Gi", "reserved-memory"),
            ("--enable-server=maybe", "enable-server"),
            ("--feature-gates=A=yes", "feature-gates"),
        ] {
            assert_eq!(flags(&[arg]).unwrap_err().flag, flag, "{arg}");
        }
        let header = flags(&["--manifest-url-header=secret"]).unwrap_err();
        assert!(!header.to_string().contains("secret"));
    }
}
