//! The node's network made by upstream's CNI plugins: needs root and `hack/build-tools cni/bridge cni/ptp …` (`make
//! integration` builds them).
//!
//! Every test has network and mount namespaces of its own, in which it is the node.
#![allow(clippy::disallowed_methods, reason = "tests run tools and wait as they like")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::fs;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry::network::cni::{CniConfig, CniUse};
use gantry::network::dns::ResolvConf;
use gantry::network::{
    Bandwidth, HostPort, Network, NetworkConfig, NetworkError, PodNetwork, PodNetworkRequest, Protocol, in_namespace,
};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use serde_json::{Value, json};
use tempfile::TempDir;

const TIMEOUT: Duration = Duration::from_secs(5);

struct Node {
    root: TempDir,
}

/// Runs a test on a thread that is a node; all that it makes goes with its namespaces.
fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce(Node) -> F + Send + 'static) {
    let body = move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("net.d")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Node { root }));
    };
    std::thread::spawn(body).join().unwrap();
}

fn run(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Node {
    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn configure(&self, version: &str, plugins: Value) {
        let text = json!({ "cniVersion": version, "name": "net", "plugins": plugins }).to_string();
        let temporary = self.path("net.d/.new");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.path("net.d/10-net.conflist")).unwrap();
    }

    async fn network(&self, policy: CniUse) -> Network {
        let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/bin/cni");
        assert!(bin.join("bridge").is_file(), "{} has no plugins: run `make integration`", bin.display());
        let mut config = NetworkConfig::new(self.path("state"));
        config.cni = CniConfig {
            policy,
            conf_dir: self.path("net.d"),
            bin_dirs: vec![bin],
            cache_dir: self.path("cache"),
            deadline: Duration::from_secs(60),
        };
        Network::open(config).await.unwrap()
    }

    fn leases(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("leases/net")).map(Iterator::collect::<Vec<_>>).unwrap_or_default();
        let names = entries.into_iter().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.parse::<IpAddr>().is_ok()).collect()
    }

    fn host_local(&self) -> Value {
        json!({ "type": "host-local", "dataDir": self.path("leases"), "routes": [{ "dst": "0.0.0.0/0" }],
            "ranges": [[{ "subnet": "10.77.0.0/24" }]] })
    }
}

fn pod(uid: &str) -> PodNetworkRequest {
    PodNetworkRequest {
        uid: uid.into(),
        namespace: "default".into(),
        name: format!("pod-{uid}"),
        hostname: format!("host-{uid}"),
        host_network: false,
        host_ipc: false,
        host_ports: Vec::new(),
        sysctls: Vec::new(),
        bandwidth: Bandwidth::default(),
        dns: ResolvConf::default(),
    }
}

async fn listen(network: &PodNetwork, port: u16) -> TcpListener {
    in_namespace(network.net_ns.as_deref().unwrap(), move || TcpListener::bind(("0.0.0.0", port)))
        .await
        .unwrap()
        .unwrap()
}

/// Says hello to a server through `address`, from a Pod or from the node.
async fn talks(from: Option<&PodNetwork>, address: SocketAddr, server: &TcpListener) -> bool {
    let connect = move || TcpStream::connect_timeout(&address, TIMEOUT);
    let client = match from {
        Some(pod) => in_namespace(pod.net_ns.as_deref().unwrap(), connect).await.unwrap(),
        None => connect(),
    };
    let Ok(mut client) = client else { return false };
    let (mut accepted, _) = server.accept().unwrap();
    accepted.write_all(b"hello").unwrap();
    drop(accepted);
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer == "hello"
}

/// What every chain must do, with the interface that `main` makes.
async fn pods_talk(node: Node, version: &'static str, main: Value) {
    let mut main = main;
    main["ipam"] = node.host_local();
    // the range is the Node's podCIDR
    main["ipam"].as_object_mut().unwrap().remove("ranges");
    main["capabilities"] = json!({ "ipRanges": true });
    let capabilities = json!({ "portMappings": true });
    node.configure(version, json!([main, { "type": "portmap", "snat": true, "capabilities": capabilities }]));
    let network = node.network(CniUse::IfConfigured).await;
    network.reconcile(&HashSet::new()).await.unwrap();
    network.set_pod_cidrs(&["10.77.0.0/24".parse().unwrap()]).await.unwrap();
    network.ready().unwrap();
    let mut one = pod("one");
    one.host_ports = vec![HostPort { protocol: Protocol::Tcp, host_ip: None, host_port: 8080, container_port: 80 }];
    one.sysctls = vec![("net.ipv4.conf.eth0.log_martians".into(), "1".into())];
    let one_network = network.set_up(&one).await.unwrap();
    let two_network = network.set_up(&pod("two")).await.unwrap();
    assert_eq!(one_network.ips.len(), 1);
    assert_eq!(node.leases().len(), 2);
    assert!(!run("ip", &["-br", "link"]).contains("gantry0"), "the bridge is not needed");
    let own = listen(&one_network, 90).await;
    assert!(talks(Some(&one_network), "127.0.0.1:90".parse().unwrap(), &own).await, "lo is up");
    let server = listen(&one_network, 80).await;
    assert!(talks(None, SocketAddr::new(one_network.ips[0], 80), &server).await, "from the node");
    assert!(talks(Some(&two_network), SocketAddr::new(one_network.ips[0], 80), &server).await, "from a Pod");
    let host_port: SocketAddr = "10.77.0.1:8080".parse().unwrap();
    assert!(talks(Some(&two_network), host_port, &server).await, "through the host port");

    // a second life of the agent, for which CHECK says that all is well
    drop(network);
    let network = node.network(CniUse::IfConfigured).await;
    network.reconcile(&HashSet::from(["one".to_owned(), "two".to_owned()])).await.unwrap();
    assert_eq!(network.lookup("one").unwrap(), one_network);
    assert_eq!(network.set_up(&one).await.unwrap(), one_network);
    // the configuration of those that are there is remembered
    fs::remove_file(node.path("net.d/10-net.conflist")).unwrap();
    for uid in ["one", "two"] {
        network.tear_down(uid).await.unwrap();
        network.tear_down(uid).await.unwrap();
    }
    assert_eq!(node.leases(), Vec::<String>::new());
    assert!(fs::read_dir(node.path("cache")).unwrap().next().is_none());
    assert!(!run("ip", &["-br", "link"]).contains("veth"), "no interface stays");
}

#[test]
fn bridge_with_the_newest_version() {
    on_a_node(|node| pods_talk(node, "1.1.0", json!({ "type": "bridge", "isGateway": true, "ipMasq": true })));
}

#[test]
fn bridge_with_version_0_4() {
    on_a_node(|node| pods_talk(node, "0.4.0", json!({ "type": "bridge", "isGateway": true, "ipMasq": true })));
}

/// What kindnet writes.
#[test]
fn ptp_with_version_0_3_1() {
    on_a_node(|node| async move {
        run("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        pods_talk(node, "0.3.1", json!({ "type": "ptp", "ipMasq": false })).await;
    });
}

#[test]
fn a_pod_whose_interface_is_gone_gets_another() {
    on_a_node(|node| async move {
        node.configure("1.0.0", json!([{ "type": "bridge", "isGateway": true, "ipam": node.host_local() }]));
        let network = node.network(CniUse::IfConfigured).await;
        let before = network.set_up(&pod("one")).await.unwrap();
        in_namespace(before.net_ns.as_deref().unwrap(), || run("ip", &["link", "delete", "eth0"])).await.unwrap();
        let after = network.set_up(&pod("one")).await.unwrap();
        let links = in_namespace(after.net_ns.as_deref().unwrap(), || run("ip", &["-br", "link"])).await.unwrap();
        assert!(links.contains("eth0"), "{links}");
        assert_eq!(node.leases().len(), 1);
    });
}

#[test]
fn an_exhausted_range_is_the_plugins_own_error_and_leaves_nothing() {
    on_a_node(|node| async move {
        let mut ipam = node.host_local();
        ipam["ranges"][0][0]["rangeStart"] = "10.77.0.9".into();
        ipam["ranges"][0][0]["rangeEnd"] = "10.77.0.9".into();
        node.configure("1.0.0", json!([{ "type": "bridge", "isGateway": true, "ipam": ipam }]));
        let network = node.network(CniUse::IfConfigured).await;
        network.set_up(&pod("one")).await.unwrap();
        let error = network.set_up(&pod("two")).await.unwrap_err();
        assert!(matches!(error, NetworkError::Cni(_)));
        let text = error.to_string();
        assert!(text.contains("type=\"bridge\" failed (ADD)") && text.contains("no IP addresses available"), "{text}");
        let links = run("ip", &["-o", "link"]);
        assert_eq!(links.matches("veth").count(), 1, "{links}");
        // what frees the address lets the next try through
        network.tear_down("one").await.unwrap();
        network.set_up(&pod("two")).await.unwrap();
    });
}

#[test]
fn leases_do_not_outlive_a_reboot() {
    on_a_node(|node| async move {
        node.configure("1.0.0", json!([{ "type": "bridge", "isGateway": true, "ipam": node.host_local() }]));
        let network = node.network(CniUse::IfConfigured).await;
        let gone = network.set_up(&pod("gone")).await.unwrap();
        let back = network.set_up(&pod("static")).await.unwrap();
        drop(network);
        for pod in [gone, back] {
            for ns in [pod.net_ns, pod.ipc_ns, pod.uts_ns].into_iter().flatten() {
                nix::mount::umount(&ns).unwrap();
            }
        }
        fs::remove_dir_all(node.path("state")).unwrap();
        let network = node.network(CniUse::IfConfigured).await;
        network.set_up(&pod("static")).await.unwrap();
        assert_eq!(node.leases().len(), 2);
        network.reconcile(&HashSet::from(["static".to_owned()])).await.unwrap();
        let follower = tokio::spawn(network.clone().follow_plugins());
        let alone = async {
            while node.leases().len() != 1 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), alone).await.expect("the lease of the Pod that is gone");
        follower.abort();
    });
}

#[test]
fn the_network_moves_from_the_bridge_to_plugins_when_a_configuration_appears() {
    on_a_node(|node| async move {
        let network = node.network(CniUse::IfConfigured).await;
        network.set_pod_cidrs(&["10.77.0.0/24".parse().unwrap()]).await.unwrap();
        network.ready().unwrap();
        let old = network.set_up(&pod("old")).await.unwrap();
        let mut changes = network.changes();
        let follower = tokio::spawn(network.clone().follow_plugins());
        tokio::task::yield_now().await;
        let mut ipam = node.host_local();
        ipam["ranges"] = json!([[{ "subnet": "10.78.0.0/24" }]]);
        node.configure("1.1.0", json!([{ "type": "ptp", "ipam": ipam }]));
        tokio::time::timeout(Duration::from_secs(20), changes.changed()).await.expect("inotify tells").unwrap();
        let new = network.set_up(&pod("new")).await.unwrap();
        assert!(new.ips[0].to_string().starts_with("10.78."));
        assert_eq!(network.lookup("old").unwrap(), old, "it stays as it is");
        assert!(run("ip", &["-br", "link"]).contains("gantry0"));
        network.tear_down("old").await.unwrap();
        assert!(!run("ip", &["-br", "link"]).contains("gantry0"), "nobody needs the bridge any more");
        network.tear_down("new").await.unwrap();
        follower.abort();
    });
}

#[test]
fn a_node_that_waits_for_a_network_is_not_ready() {
    on_a_node(|node| async move {
        let network = node.network(CniUse::Required).await;
        network.set_pod_cidrs(&["10.77.0.0/24".parse().unwrap()]).await.unwrap();
        let why = network.ready().unwrap_err();
        assert!(why.contains("NetworkReady=false") && why.contains("cni plugin not initialized"), "{why}");
        assert!(matches!(network.set_up(&pod("one")).await, Err(NetworkError::NotReady(_))));
        // the daemon that will bring the network is a Pod of the host's
        let mut daemon = pod("daemon");
        daemon.host_network = true;
        network.set_up(&daemon).await.unwrap();
        assert!(!run("ip", &["-br", "link"]).contains("gantry0"));
    });
}

#[test]
fn bandwidth_is_limited() {
    on_a_node(|node| async move {
        let capabilities = json!({ "bandwidth": true });
        let main = json!({ "type": "bridge", "isGateway": true, "ipam": node.host_local() });
        node.configure("1.0.0", json!([main, { "type": "bandwidth", "capabilities": capabilities }]));
        let network = node.network(CniUse::IfConfigured).await;
        let mut limited = pod("one");
        limited.bandwidth = Bandwidth { ingress: Some(8_000_000), egress: Some(16_000_000) };
        network.set_up(&limited).await.unwrap();
        let disciplines = run("tc", &["qdisc", "show"]);
        assert!(disciplines.contains("8Mbit") && disciplines.contains("16Mbit"), "{disciplines}");
        network.tear_down("one").await.unwrap();
    });
}
