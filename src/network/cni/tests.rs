//! Plugins that are shell scripts: they note what they are asked and do what a test wants. (Upstream's real ones are in
//! `tests/cni.rs`.)

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::network::dns::ResolvConf;
use crate::network::{Bandwidth, HostPort, PodNetworkRequest, Protocol};

/// A node with plugin directories of its own.
struct Machine {
    root: TempDir,
}

/// One noted call: `CNI_COMMAND`, the plugin, `CNI_*`, and what it read.
struct Noted {
    verb: String,
    plugin: String,
    environment: String,
    request: Value,
}

impl Machine {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("bin")).unwrap();
        fs::create_dir(root.path().join("net.d")).unwrap();
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Installs plugins that behave well.
    fn install(&self, names: &[&str]) {
        let script = format!(
            r#"#!/bin/sh
dir={dir}
name=${{0##*/}}
request=$(cat)
printf '%s|%s|%s|%s\n' "$CNI_COMMAND" "$name" "$CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS" "$request" >> $dir/calls
[ ! -f $dir/$name.$CNI_COMMAND ] || . $dir/$name.$CNI_COMMAND
case $CNI_COMMAND in
  VERSION) echo '{{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}}' ;;
  ADD) echo '{{"interfaces": [{{"name": "eth0", "sandbox": "/n"}}], "by": "'$name'",
    "ips": [{{"address": "10.1.0.5/24", "interface": 0}}]}}' ;;
esac
"#,
            dir = self.root.path().display()
        );
        for name in names {
            let path = self.path("bin").join(name);
            fs::write(&path, &script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    /// What a plugin does first when it is asked so.
    fn on(&self, plugin: &str, verb: &str, script: &str) {
        fs::write(self.path(&format!("{plugin}.{verb}")), script).unwrap();
    }

    fn behave(&self, plugin: &str, verb: &str) {
        fs::remove_file(self.path(&format!("{plugin}.{verb}"))).unwrap();
    }

    fn configure(&self, version: &str, plugins: Value) {
        let text = json!({ "cniVersion": version, "name": "net", "plugins": plugins }).to_string();
        fs::write(self.path("net.d/10-net.conflist"), text).unwrap();
    }

    fn cni(&self, policy: CniUse) -> Cni {
        let cni = Cni::new(CniConfig {
            policy,
            conf_dir: self.path("net.d"),
            bin_dirs: vec![self.path("none"), self.path("bin")],
            cache_dir: self.path("cache"),
            deadline: Duration::from_secs(20),
        });
        cni.refresh();
        cni
    }

    fn calls(&self) -> Vec<Noted> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        text.lines()
            .map(|line| {
                let mut parts = line.splitn(4, '|').map(str::to_owned);
                let mut next = || parts.next().unwrap();
                let (verb, plugin, environment) = (next(), next(), next());
                Noted { verb, plugin, environment, request: serde_json::from_str(&next()).unwrap() }
            })
            .collect()
    }
}

fn names(calls: &[Noted]) -> Vec<String> {
    calls.iter().map(|call| format!("{} {}", call.verb, call.plugin)).collect()
}

fn pod() -> PodNetworkRequest {
    PodNetworkRequest {
        uid: "uid-1".into(),
        namespace: "default".into(),
        name: "web".into(),
        hostname: "web".into(),
        host_network: false,
        host_ipc: false,
        host_ports: vec![HostPort { protocol: Protocol::Udp, host_ip: None, host_port: 53, container_port: 5353 }],
        sysctls: Vec::new(),
        bandwidth: Bandwidth { ingress: None, egress: Some(1_000_000) },
        dns: ResolvConf { nameservers: vec!["10.96.0.10".into()], ..ResolvConf::default() },
    }
}

fn attachment(cni: &Cni) -> Attachment {
    let Mode::Plugins(network) = cni.mode() else { panic!("{:?}", cni.mode()) };
    Attachment::of_pod(&pod(), &network, "/run/n".into(), &["10.244.1.0/24".parse().unwrap()])
}

#[test]
fn a_pod_is_attached_checked_and_detached() {
    let machine = Machine::new();
    machine.install(&["main", "meta"]);
    let capabilities = json!({ "portMappings": true, "bandwidth": true, "ipRanges": true, "dns": true, "mac": true });
    machine.configure("1.1.0", json!([{ "type": "main", "mtu": 9 }, { "type": "meta", "capabilities": capabilities }]));
    let cni = machine.cni(CniUse::IfConfigured);
    assert_eq!(names(&machine.calls()), ["VERSION main", "VERSION meta", "STATUS main", "STATUS meta"]);

    let ips = cni.attach(attachment(&cni)).unwrap();
    assert_eq!(ips, ["10.1.0.5".parse::<IpAddr>().unwrap()]);
    assert!(cni.knows("uid-1"));
    cni.check("uid-1").unwrap();
    // the configuration of today does not matter to those of yesterday
    machine.configure("1.0.0", json!([{ "type": "other" }]));
    cni.refresh();
    cni.detach("uid-1", true).unwrap();
    cni.detach("uid-1", true).unwrap();
    assert!(!cni.knows("uid-1"));

    let calls: Vec<Noted> = machine.calls();
    let expected = ["ADD main", "ADD meta", "CHECK main", "CHECK meta", "DEL meta", "DEL main"];
    assert_eq!(names(&calls), expected);
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=uid-1;\
        K8S_POD_UID=uid-1";
    assert!(calls.iter().all(|call| call.environment == format!("uid-1 /run/n eth0 {args}")));
    assert_eq!(calls[0].request, json!({ "cniVersion": "1.1.0", "name": "net", "type": "main", "mtu": 9 }));
    let second = &calls[1].request;
    assert_eq!(second["prevResult"]["by"], "main");
    assert_eq!(second["prevResult"]["cniVersion"], "1.1.0");
    let arguments = json!({
        "portMappings": [{ "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "" }],
        "bandwidth": { "egressRate": 1_000_000, "egressBurst": u32::MAX },
        "ipRanges": [[{ "subnet": "10.244.1.0/24" }]],
        "dns": { "servers": ["10.96.0.10"], "searches": [], "options": [] },
    });
    assert_eq!(second["runtimeConfig"], arguments);
    assert!(second.get("capabilities").is_none());
    for call in &calls[2..] {
        assert_eq!(call.request["prevResult"]["by"], "meta", "{}", call.verb);
    }
}

#[test]
fn a_plugins_own_error_comes_through() {
    let machine = Machine::new();
    machine.install(&["main", "meta"]);
    machine.configure("1.0.0", json!([{ "type": "main" }, { "type": "meta" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    machine.calls();
    machine.on(
        "meta",
        "ADD",
        r#"echo '{"cniVersion": "1.0.0", "code": 11, "msg": "no luck", "details": "later"}'; exit 1"#,
    );
    let error = cni.attach(attachment(&cni)).unwrap_err().to_string();
    assert_eq!(error, r#"plugin type="meta" failed (ADD): no luck; later (code 11)"#);
    // an agent that was killed here would find the same
    let after_restart = machine.cni(CniUse::IfConfigured);
    assert!(after_restart.knows("uid-1"));
    machine.calls();
    after_restart.detach("uid-1", false).unwrap();
    let calls = machine.calls();
    assert_eq!(names(&calls), ["DEL meta", "DEL main"]);
    assert!(calls.iter().all(|call| call.request.get("prevResult").is_none()));
    assert!(calls[0].environment.starts_with("uid-1  eth0 "), "{}", calls[0].environment);
    assert!(!after_restart.knows("uid-1"));
}

#[test]
fn a_del_that_fails_is_not_forgotten() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("0.4.0", json!([{ "type": "main" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    cni.attach(attachment(&cni)).unwrap();
    machine.on("main", "DEL", "echo broken >&2; exit 3");
    let error = cni.detach("uid-1", true).unwrap_err().to_string();
    assert_eq!(error, r#"plugin type="main" (DEL) exited with status 3: broken"#);
    machine.behave("main", "DEL");
    cni.detach("uid-1", true).unwrap();
}

#[test]
fn nonsense_is_an_error_that_says_what_came() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("0.3.1", json!([{ "type": "main" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    for (script, expected) in [
        ("exit 0", "answered nothing"),
        ("echo hello; exit 0", "answered no result"),
        ("echo '{}'; exit 0", "without an address for eth0"),
        ("exit 7", "exited with status 7 without a word"),
        ("echo '{\"half\":'; exit 1", "exited with status 1: {\"half\":"),
        ("kill -SEGV $$", "was killed by signal 11"),
        ("head -c 3000000 /dev/zero; exit 0", "answered more than 1048576 bytes"),
        ("head -c 3000000 /dev/zero >&2; exit 1", "exited with status 1"),
    ] {
        machine.on("main", "ADD", script);
        let error = cni.attach(attachment(&cni)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("main"), "{script}: {error}");
    }
    fs::set_permissions(machine.path("bin/main"), fs::Permissions::from_mode(0o644)).unwrap();
    let error = cni.attach(attachment(&cni)).unwrap_err().to_string();
    assert!(error.contains("cannot be run"), "{error}");
    fs::remove_file(machine.path("bin/main")).unwrap();
    let error = cni.attach(attachment(&cni)).unwrap_err().to_string();
    assert!(error.contains("failed to find plugin \"main\"") && error.contains("--cni-bin-dir"), "{error}");
}

#[test]
fn a_plugin_that_hangs_is_killed_with_all_it_started() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("1.0.0", json!([{ "type": "main" }]));
    let mut cni = machine.cni(CniUse::IfConfigured);
    cni.config.deadline = Duration::from_millis(400);
    machine.on("main", "ADD", "sleep 600 & echo $! > $dir/child; wait");
    let began = Instant::now();
    let error = cni.attach(attachment(&cni)).unwrap_err().to_string();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(error.contains("did not end before its deadline and was killed"), "{error}");
    let child = fs::read_to_string(machine.path("child")).unwrap();
    let stat = PathBuf::from(format!("/proc/{}/stat", child.trim()));
    // killed means gone soon; whose child it is now, reaps it
    let gone = || fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "));
    assert!((0..100).any(|_| gone() || pause()), "the plugin's own child lives on");
}

#[test]
fn what_a_plugin_leaves_running_is_not_waited_for() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("1.0.0", json!([{ "type": "main" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    machine.on("main", "ADD", "sleep 15 &");
    let began = Instant::now();
    cni.attach(attachment(&cni)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[allow(clippy::disallowed_methods, reason = "the kernel needs a moment")]
fn pause() -> bool {
    std::thread::sleep(Duration::from_millis(20));
    false
}

fn waiting(cni: &Cni) -> String {
    match cni.mode() {
        Mode::Waiting(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_mode_follows_the_configuration() {
    let machine = Machine::new();
    machine.install(&["main"]);
    assert_eq!(machine.cni(CniUse::IfConfigured).mode(), Mode::BuiltIn);
    let waits = machine.cni(CniUse::Required);
    assert!(waiting(&waits).contains("cni plugin not initialized"));
    let cni = machine.cni(CniUse::IfConfigured);
    assert!(!cni.refresh());
    machine.configure("1.1.0", json!([{ "type": "main" }]));
    for cni in [&cni, &waits] {
        assert!(cni.refresh());
        assert!(matches!(cni.mode(), Mode::Plugins(_)));
    }
    assert_eq!(machine.cni(CniUse::Never).mode(), Mode::BuiltIn);
    machine.calls();
    assert!(!cni.refresh());
    assert!(machine.calls().is_empty(), "nothing new, nothing asked");
    // a wrong file does not send Pods to the bridge, nor does one that vanishes
    fs::write(machine.path("net.d/10-net.conflist"), "{").unwrap();
    assert!(cni.refresh());
    assert!(waiting(&cni).contains("10-net.conflist"));
    fs::remove_file(machine.path("net.d/10-net.conflist")).unwrap();
    assert!(cni.refresh());
    assert!(waiting(&cni).contains("no network config found in"));
}

#[test]
fn pods_in_a_network_keep_a_restarted_node_from_the_bridge() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("1.0.0", json!([{ "type": "main" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    cni.attach(attachment(&cni)).unwrap();
    fs::remove_file(machine.path("net.d/10-net.conflist")).unwrap();
    let restarted = machine.cni(CniUse::IfConfigured);
    assert!(waiting(&restarted).contains("no network config found"));
    restarted.detach("uid-1", true).unwrap();
    assert!(restarted.refresh());
    assert_eq!(restarted.mode(), Mode::BuiltIn);
    cni.refresh();
    assert!(waiting(&cni).contains("no network config found"), "one that saw the configuration waits for it");
}

#[test]
fn a_plugin_may_say_that_it_is_not_ready() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("1.1.0", json!([{ "type": "main" }]));
    machine.on("main", "STATUS", r#"echo '{"code": 50, "msg": "no daemon"}'; exit 1"#);
    let cni = machine.cni(CniUse::IfConfigured);
    assert_eq!(waiting(&cni), r#"plugin type="main" failed (STATUS): no daemon (code 50)"#);
    machine.behave("main", "STATUS");
    assert!(cni.refresh());
    assert!(matches!(cni.mode(), Mode::Plugins(_)));
}

#[test]
fn the_newest_common_version_is_spoken() {
    let machine = Machine::new();
    machine.install(&["new", "old"]);
    machine.on("old", "VERSION", r#"echo '{"supportedVersions": ["0.1.0", "0.3.1", "0.4.0"]}'; exit"#);
    let text = json!({ "cniVersion": "1.0.0", "cniVersions": ["0.3.1", "0.4.0", "1.1.0"], "name": "n",
        "plugins": [{ "type": "new" }, { "type": "old" }] });
    fs::write(machine.path("net.d/a.conflist"), text.to_string()).unwrap();
    let cni = machine.cni(CniUse::IfConfigured);
    cni.attach(attachment(&cni)).unwrap();
    let add = machine.calls().into_iter().find(|call| call.verb == "ADD").unwrap();
    assert_eq!(add.request["cniVersion"], "0.4.0");

    fs::remove_file(machine.path("net.d/a.conflist")).unwrap();
    machine.configure("1.0.0", json!([{ "type": "new" }, { "type": "old" }]));
    cni.refresh();
    let expected =
        r#"plugin type="old" knows cniVersion 0.1.0, 0.3.1, 0.4.0, the configuration of network "net" wants 1.0.0"#;
    assert_eq!(waiting(&cni), expected);
    machine.on("old", "VERSION", "exit 0");
    cni.refresh();
    assert!(waiting(&cni).contains("without supportedVersions"));
}

#[test]
fn check_needs_version_0_4() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("0.3.1", json!([{ "type": "main" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    cni.attach(attachment(&cni)).unwrap();
    machine.on("main", "CHECK", "exit 1");
    cni.check("uid-1").unwrap();
    cni.detach("uid-1", true).unwrap();
    machine.configure("0.4.0", json!([{ "type": "main" }]));
    cni.refresh();
    cni.attach(attachment(&cni)).unwrap();
    assert!(cni.check("uid-1").is_err());
    assert!(cni.check("never attached").unwrap_err().to_string().contains("never attached"));
}

#[test]
fn garbage_is_what_we_do_not_know() {
    let machine = Machine::new();
    machine.install(&["a", "b"]);
    machine.configure("1.1.0", json!([{ "type": "a" }, { "type": "b" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    cni.attach(attachment(&cni)).unwrap();
    machine.calls();
    machine.on("a", "GC", "exit 1");
    assert!(cni.collect().is_err());
    let calls = machine.calls();
    assert_eq!(names(&calls), ["GC a", "GC b"], "one that fails does not keep others from it");
    let valid = json!([{ "containerID": "uid-1", "ifname": "eth0" }]);
    assert_eq!(calls[1].request["cni.dev/valid-attachments"], valid);
    assert_eq!(calls[1].request["cni.dev/attachments"], valid);
    assert_eq!(cni.orphans(|uid| uid == "uid-1").unwrap(), Vec::<String>::new());
    assert_eq!(cni.orphans(|_| false).unwrap(), ["uid-1"]);

    machine.configure("1.0.0", json!([{ "type": "a" }]));
    cni.refresh();
    machine.calls();
    cni.collect().unwrap();
    assert!(machine.calls().is_empty());
}

#[test]
fn attachments_are_for_root_only_and_unreadable_ones_are_errors() {
    let machine = Machine::new();
    machine.install(&["main"]);
    machine.configure("1.0.0", json!([{ "type": "main" }]));
    let cni = machine.cni(CniUse::IfConfigured);
    cni.attach(attachment(&cni)).unwrap();
    let file: &Path = &machine.path("cache/uid-1.json");
    assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    fs::write(file, "{").unwrap();
    let error = cni.detach("uid-1", true).unwrap_err().to_string();
    assert!(error.contains("uid-1") && error.contains("cache"), "{error}");
}
