//! The whole network in action, as root: every test has network and mount namespaces of its own, in which it is the
//! node, and a second network namespace that is the world outside.

use std::collections::HashSet;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};

use super::link::{Links, new_address, new_route, raise};
use super::namespace::{self, Kind, Pins};
use super::netlink::{NetlinkSocket, Request};
use super::nft::{Nftables, Transaction};
use super::record::{Phase, Record};
use super::*;

const TIMEOUT: Duration = Duration::from_secs(3);
/// For connections that must not come about.
const SHORT: Duration = Duration::from_millis(300);

/// Runs a test on a thread with its own network and mount namespaces; all that it makes goes with them.
fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce(Node) -> F + Send + 'static) {
    let body = move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        Links::open().unwrap().configure_pod(&[], [0; 6]).unwrap();
        runtime.block_on(test(Node { state_dir: directory.path().to_owned() }));
    };
    std::thread::spawn(body).join().unwrap();
}

struct Node {
    state_dir: PathBuf,
}

impl Node {
    fn config(&self) -> NetworkConfig {
        NetworkConfig::new(&self.state_dir)
    }

    async fn network(&self, cidrs: &[&str]) -> Network {
        let network = Network::open(self.config()).await.unwrap();
        network.set_pod_cidrs(&nets(cidrs)).await.unwrap();
        network
    }

    /// A namespace joined to the node by a cable: the node is `.1`, the world is `.2` of 192.0.2.0/24 and fd99::/64.
    async fn outside(&self) -> PathBuf {
        let pins = Pins::of_pod(&self.state_dir.join("outside"));
        let path = pins.path(Kind::Net);
        let node = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        let work = move || {
            pins.create(&[Kind::Net], "outside").unwrap();
            Links::open().unwrap().configure_pod(&[], [0; 6]).unwrap();
            let mut peer = LinkMessage::default();
            peer.attributes = vec![LinkAttribute::IfName("uplink".into()), LinkAttribute::NetNsFd(node.as_raw_fd())];
            let mut pair = LinkMessage::default();
            let data = InfoData::Veth(InfoVeth::Peer(peer));
            let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)];
            pair.attributes = vec![LinkAttribute::IfName("world".into()), LinkAttribute::LinkInfo(info)];
            let create = Request::route(&RouteNetlinkMessage::NewLink(pair), NLM_F_CREATE | NLM_F_EXCL);
            NetlinkSocket::open(0).unwrap().execute(&[create]).unwrap();
            plug("world", &["192.0.2.2/24", "fd99::2/64"]);
        };
        namespace::on_fresh_thread("outside", work).await.unwrap();
        plug("uplink", &["192.0.2.1/24", "fd99::1/64"]);
        path
    }
}

fn plug(interface: &str, addresses: &[&str]) {
    let index = Links::open().unwrap().find(interface).unwrap().unwrap().index;
    let mut requests: Vec<Request> = addresses.iter().map(|net| new_address(index, net.parse().unwrap())).collect();
    requests.push(raise(interface));
    NetlinkSocket::open(0).unwrap().execute(&requests).unwrap();
}

fn nets(cidrs: &[&str]) -> Vec<IpNet> {
    cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn request(uid: &str) -> PodNetworkRequest {
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

fn host_port(protocol: Protocol, host_ip: Option<&str>, host_port: u16, container_port: u16) -> HostPort {
    HostPort { protocol, host_ip: host_ip.map(ip), host_port, container_port }
}

/// Runs in a namespace, or on the node without one.
async fn inside<T: Send + 'static>(ns: Option<&Path>, work: impl FnOnce() -> T + Send + 'static) -> T {
    match ns {
        Some(ns) => in_namespace(ns, work).await.unwrap(),
        None => namespace::on_fresh_thread("node", work).await.unwrap(),
    }
}

async fn listen(ns: Option<&Path>, address: &str) -> TcpListener {
    let address: SocketAddr = address.parse().unwrap();
    inside(ns, move || TcpListener::bind(address)).await.unwrap()
}

/// Connects, and returns the address that the server sees.
async fn connect(ns: Option<&Path>, to: IpAddr, port: u16, server: &TcpListener) -> io::Result<IpAddr> {
    let target = SocketAddr::new(to, port);
    let mut client = inside(ns, move || TcpStream::connect_timeout(&target, TIMEOUT)).await?;
    let (mut accepted, peer) = server.accept()?;
    client.set_read_timeout(Some(TIMEOUT))?;
    accepted.write_all(b"hello")?;
    let mut answer = [0; 5];
    client.read_exact(&mut answer)?;
    assert_eq!(&answer, b"hello");
    Ok(peer.ip())
}

async fn refused(ns: Option<&Path>, to: IpAddr, port: u16) -> bool {
    let target = SocketAddr::new(to, port);
    inside(ns, move || TcpStream::connect_timeout(&target, SHORT)).await.is_err()
}

fn pod_interfaces() -> Vec<String> {
    let links = Links::open().unwrap().all().unwrap();
    links.into_iter().map(|link| link.name).filter(|name| name.starts_with("gv")).collect()
}

#[test]
fn pods_reach_each_other_the_node_and_the_world() {
    on_a_node(|node| async move {
        let outside = node.outside().await;
        let network = node.network(&["10.77.0.0/24"]).await;
        let a = network.set_up(&request("a")).await.unwrap();
        let b = network.set_up(&request("b")).await.unwrap();
        assert_eq!((&a.ips, &b.ips), (&vec![ip("10.77.0.2")], &vec![ip("10.77.0.3")]));

        let server = listen(b.net_ns.as_deref(), "0.0.0.0:80").await;
        assert_eq!(connect(a.net_ns.as_deref(), b.ips[0], 80, &server).await.unwrap(), a.ips[0]);
        assert_eq!(connect(None, b.ips[0], 80, &server).await.unwrap(), ip("10.77.0.1"));

        let server = listen(None, "0.0.0.0:81").await;
        assert_eq!(connect(a.net_ns.as_deref(), ip("10.77.0.1"), 81, &server).await.unwrap(), a.ips[0]);
        assert_eq!(connect(a.net_ns.as_deref(), ip("192.0.2.1"), 81, &server).await.unwrap(), a.ips[0]);

        // The world knows no way back to Pods: it answers because it sees the node.
        let server = listen(Some(&outside), "0.0.0.0:82").await;
        assert_eq!(connect(a.net_ns.as_deref(), ip("192.0.2.2"), 82, &server).await.unwrap(), ip("192.0.2.1"));
    });
}

#[test]
fn the_clusters_own_networks_see_pod_addresses() {
    on_a_node(|node| async move {
        let outside = node.outside().await;
        let route = || {
            let index = Links::open().unwrap().find("world").unwrap().unwrap().index;
            let route = new_route(index, Some("10.77.0.0/24".parse().unwrap()), Some(ip("192.0.2.1")));
            NetlinkSocket::open(0).unwrap().execute(&[route]).unwrap();
        };
        inside(Some(&outside), route).await;
        let config = NetworkConfig { cluster_cidrs: nets(&["192.0.2.0/24"]), ..node.config() };
        let network = Network::open(config).await.unwrap();
        network.set_pod_cidrs(&nets(&["10.77.0.0/24"])).await.unwrap();
        let pod = network.set_up(&request("a")).await.unwrap();
        let server = listen(Some(&outside), "0.0.0.0:82").await;
        assert_eq!(connect(pod.net_ns.as_deref(), ip("192.0.2.2"), 82, &server).await.unwrap(), pod.ips[0]);
    });
}

#[test]
fn host_ports_lead_to_the_pod_from_everywhere() {
    check_host_ports(|| {});
}

/// `br_netfilter` lets packets between Pods bypass the node's routing; it is on by default where it is loaded.
#[test]
fn host_ports_do_not_need_br_netfilter() {
    check_host_ports(|| {
        for name in ["net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"] {
            if sysctl::read(name).is_ok() {
                sysctl::write(name, "0").unwrap();
            }
        }
    });
}

fn check_host_ports(prepare: fn()) {
    on_a_node(move |node| async move {
        prepare();
        let outside = node.outside().await;
        let network = node.network(&["10.77.0.0/24", "fd77::/64"]).await;
        let ports = vec![
            host_port(Protocol::Tcp, None, 8080, 80),
            host_port(Protocol::Udp, None, 8080, 53),
            host_port(Protocol::Tcp, Some("192.0.2.1"), 8081, 80),
            host_port(Protocol::Tcp, Some("0.0.0.0"), 8082, 80),
        ];
        let a = network.set_up(&PodNetworkRequest { host_ports: ports, ..request("a") }).await.unwrap();
        let b = network.set_up(&request("b")).await.unwrap();
        let (a_ns, b_ns) = (a.net_ns.as_deref(), b.net_ns.as_deref());
        let (uplink, uplink6, loopback) = (ip("192.0.2.1"), ip("fd99::1"), ip("127.0.0.1"));

        let server = listen(a_ns, "[::]:80").await;
        let v4 = |address: &str| IpAddr::V6(address.parse::<std::net::Ipv4Addr>().unwrap().to_ipv6_mapped());
        // From the world and from other Pods the Pod sees who it is.
        assert_eq!(connect(Some(&outside), uplink, 8080, &server).await.unwrap(), v4("192.0.2.2"));
        assert_eq!(connect(Some(&outside), uplink6, 8080, &server).await.unwrap(), ip("fd99::2"));
        assert_eq!(connect(b_ns, uplink, 8080, &server).await.unwrap(), v4("10.77.0.3"));
        assert_eq!(connect(b_ns, ip("10.77.0.1"), 8080, &server).await.unwrap(), v4("10.77.0.3"));
        // From the node, also through its loopback.
        connect(None, uplink, 8080, &server).await.unwrap();
        assert_eq!(connect(None, loopback, 8080, &server).await.unwrap(), v4("10.77.0.1"));
        // A Pod to itself: it must not see its own address as the source.
        assert_eq!(connect(a_ns, uplink, 8080, &server).await.unwrap(), v4("10.77.0.1"));
        assert_eq!(connect(a_ns, uplink6, 8080, &server).await.unwrap(), ip("fd77::1"));
        // Only where it was asked for.
        connect(Some(&outside), uplink, 8081, &server).await.unwrap();
        assert!(refused(None, loopback, 8081).await);
        connect(None, loopback, 8082, &server).await.unwrap();
        assert!(refused(Some(&outside), uplink6, 8082).await);

        let datagrams = inside(a_ns, || UdpSocket::bind("0.0.0.0:53")).await.unwrap();
        datagrams.set_read_timeout(Some(TIMEOUT)).unwrap();
        let client = inside(Some(&outside), || UdpSocket::bind("0.0.0.0:0")).await.unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        client.send_to(b"ask", (uplink, 8080)).unwrap();
        let mut buffer = [0; 8];
        let (length, from) = datagrams.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"ask"[..], ip("192.0.2.2")));
        datagrams.send_to(b"answer", from).unwrap();
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (6, SocketAddr::new(uplink, 8080)));

        network.tear_down("a").await.unwrap();
        for port in [8080, 8081, 8082] {
            assert!(refused(Some(&outside), uplink, port).await, "{port}");
        }
        // The port is free for the next Pod.
        let ports = vec![host_port(Protocol::Tcp, None, 8080, 80)];
        let c = network.set_up(&PodNetworkRequest { host_ports: ports, ..request("c") }).await.unwrap();
        let server = listen(c.net_ns.as_deref(), "0.0.0.0:80").await;
        connect(Some(&outside), uplink, 8080, &server).await.unwrap();
    });
}

#[test]
fn udp_clients_follow_a_host_port_to_its_next_pod() {
    on_a_node(|node| async move {
        let outside = node.outside().await;
        let network = node.network(&["10.77.0.0/24"]).await;
        let client = inside(Some(&outside), || UdpSocket::bind("0.0.0.0:0")).await.unwrap();
        // Before there is a Pod, and again from the same socket while Pods come and go.
        client.send_to(b"early", "192.0.2.1:5300").unwrap();
        for uid in ["a", "b", "c"] {
            let ports = vec![host_port(Protocol::Udp, None, 5300, 53)];
            let pod = network.set_up(&PodNetworkRequest { host_ports: ports, ..request(uid) }).await.unwrap();
            let server = inside(pod.net_ns.as_deref(), || UdpSocket::bind("0.0.0.0:53")).await.unwrap();
            server.set_read_timeout(Some(TIMEOUT)).unwrap();
            // The first send reports the port that was unreachable before.
            let _ = client.send_to(b"ask", "192.0.2.1:5300");
            client.send_to(b"ask", "192.0.2.1:5300").unwrap();
            let mut buffer = [0; 8];
            let length = server.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"ask", "{uid}");
            network.tear_down(uid).await.unwrap();
        }
    });
}

#[test]
fn a_host_port_belongs_to_one_pod() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let with = |uid: &str, port: HostPort| PodNetworkRequest { host_ports: vec![port], ..request(uid) };
        let taken = host_port(Protocol::Tcp, None, 8080, 80);
        network.set_up(&with("a", taken)).await.unwrap();
        let error = network.set_up(&with("b", taken)).await.unwrap_err();
        assert_eq!(error.to_string(), "host port 8080/TCP is in use by Pod default/pod-a");
        assert!(matches!(
            network.set_up(&with("b", host_port(Protocol::Tcp, Some("0.0.0.0"), 8080, 80))).await,
            Err(NetworkError::HostPortInUse { .. })
        ));
        // Other protocols and specific addresses do not conflict (conformance has a test for it).
        network.set_up(&with("c", host_port(Protocol::Udp, None, 8080, 80))).await.unwrap();
        network.set_up(&with("d", host_port(Protocol::Tcp, Some("127.0.0.1"), 8080, 80))).await.unwrap();
        network.set_up(&with("e", host_port(Protocol::Tcp, Some("127.0.0.2"), 8080, 80))).await.unwrap();
        network.set_up(&with("f", host_port(Protocol::Sctp, None, 8080, 80))).await.unwrap();
        network.tear_down("a").await.unwrap();
        network.set_up(&with("b", taken)).await.unwrap();
        let twice = vec![host_port(Protocol::Tcp, None, 90, 1), host_port(Protocol::Tcp, Some("::"), 90, 2)];
        let error = network.set_up(&PodNetworkRequest { host_ports: twice, ..request("g") }).await.unwrap_err();
        assert_eq!(error.to_string(), "host port [::]:90/TCP is in use by Pod default/pod-g");
        let both = vec![host_port(Protocol::Tcp, Some("0.0.0.0"), 90, 1), host_port(Protocol::Tcp, Some("::"), 90, 2)];
        network.set_up(&PodNetworkRequest { host_ports: both, ..request("g") }).await.unwrap();
    });
}

#[test]
fn pods_cannot_reach_the_nodes_loopback() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let pod = network.set_up(&request("a")).await.unwrap();
        let server = listen(None, "127.0.0.1:6000").await;
        // A container with CAP_NET_ADMIN can do this to its own namespace.
        let divert = || {
            sysctl::write("net.ipv4.conf.all.route_localnet", "1").unwrap();
            let message = link::address(1, "127.0.0.1/8".parse().unwrap());
            let delete = Request::route(&RouteNetlinkMessage::DelAddress(message), 0);
            NetlinkSocket::open(0).unwrap().execute(&[delete]).unwrap();
        };
        inside(pod.net_ns.as_deref(), divert).await;
        assert!(refused(pod.net_ns.as_deref(), ip("127.0.0.1"), 6000).await);
        // Without the rules it is possible: the guard is what prevents it.
        remove_rules();
        connect(pod.net_ns.as_deref(), ip("127.0.0.1"), 6000, &server).await.unwrap();
    });
}

#[test]
fn a_pod_cannot_take_anothers_traffic() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let victim = network.set_up(&request("victim")).await.unwrap();
        let thief = network.set_up(&request("thief")).await.unwrap();
        let other = network.set_up(&request("other")).await.unwrap();
        let address = victim.ips[0];
        let pretend = move || {
            let mut links = Links::open().unwrap();
            let index = links.find("eth0").unwrap().unwrap().index;
            let mut message = LinkMessage::default();
            let mac = vec![0x0a, 0x58, 10, 77, 0, 2];
            message.attributes = vec![LinkAttribute::IfName("eth0".into()), LinkAttribute::Address(mac)];
            let requests =
                [Request::route(&RouteNetlinkMessage::SetLink(message), 0), new_address(index, IpNet::from(address))];
            NetlinkSocket::open(0).unwrap().execute(&requests).unwrap();
            // The kernel announces the new address by itself; these frames have the victim's addresses as source.
            let socket = UdpSocket::bind((address, 0)).unwrap();
            for _ in 0..20 {
                socket.send_to(b"I am the victim", "10.77.0.1:9").unwrap();
            }
        };
        inside(thief.net_ns.as_deref(), pretend).await;
        let _trap = listen(thief.net_ns.as_deref(), "0.0.0.0:80").await;
        let server = listen(victim.net_ns.as_deref(), "0.0.0.0:80").await;
        server.set_nonblocking(true).unwrap();
        for from in [None, other.net_ns.as_deref()] {
            connect(from, address, 80, &server).await.unwrap();
        }
    });
}

fn remove_rules() {
    let mut transaction = Transaction::new("gantry-gantry0");
    transaction.remove_table();
    Nftables::open().unwrap().commit(transaction).unwrap();
}

#[test]
fn both_families_work_and_the_first_cidr_is_the_primary_one() {
    on_a_node(|node| async move {
        let outside = node.outside().await;
        let network = node.network(&["fd77::/64", "10.77.0.0/24"]).await;
        let a = network.set_up(&request("a")).await.unwrap();
        let b = network.set_up(&request("b")).await.unwrap();
        assert_eq!(b.ips, [ip("fd77::3"), ip("10.77.0.3")]);
        let server = listen(b.net_ns.as_deref(), "[fd77::3]:80").await;
        assert_eq!(connect(a.net_ns.as_deref(), b.ips[0], 80, &server).await.unwrap(), a.ips[0]);
        assert_eq!(connect(None, b.ips[0], 80, &server).await.unwrap(), ip("fd77::1"));
        let server = listen(Some(&outside), "[::]:82").await;
        assert_eq!(connect(a.net_ns.as_deref(), ip("fd99::2"), 82, &server).await.unwrap(), ip("fd99::1"));
    });
}

#[test]
fn teardown_leaves_nothing_and_may_be_repeated() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/29"]).await;
        let ports = vec![host_port(Protocol::Tcp, None, 8080, 80)];
        let wanted = PodNetworkRequest { host_ports: ports, ..request("a") };
        for _ in 0..12 {
            let pod = network.set_up(&wanted).await.unwrap();
            assert_eq!(network.lookup("a"), Some(pod.clone()));
            assert_eq!(pod_interfaces().len(), 1);
            network.tear_down("a").await.unwrap();
            assert_eq!(network.lookup("a"), None);
            assert!(pod_interfaces().is_empty());
            assert!(!pod.net_ns.unwrap().exists());
            assert!(!node.state_dir.join("pods/a").exists());
            assert!(!mounts().contains("/pods/a/"));
        }
        network.tear_down("a").await.unwrap();
        network.tear_down("never-seen").await.unwrap();
        network.set_pod_cidrs(&[]).await.unwrap();
        assert!(network.ready().is_err());
    });
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}

#[test]
fn exhaustion_names_the_cidr_and_ends() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/30"]).await;
        let first = network.set_up(&request("a")).await.unwrap();
        let error = network.set_up(&request("b")).await.unwrap_err();
        assert_eq!(error.to_string(), "no free Pod address: all 1 of podCIDR 10.77.0.0/30 are in use");
        assert!(!node.state_dir.join("pods/b").exists());
        network.tear_down("a").await.unwrap();
        assert_eq!(network.set_up(&request("b")).await.unwrap().ips, first.ips);
    });
}

#[test]
fn without_a_cidr_only_host_network_pods_start() {
    on_a_node(|node| async move {
        let network = Network::open(node.config()).await.unwrap();
        assert!(network.ready().unwrap_err().starts_with("container runtime network not ready: NetworkReady=false"));
        assert!(matches!(network.set_up(&request("a")).await, Err(NetworkError::NotReady(_))));
        let wanted = PodNetworkRequest { host_network: true, ..request("h") };
        let pod = network.set_up(&wanted).await.unwrap();
        assert!(pod.ips.is_empty() && pod.net_ns.is_none() && pod.uts_ns.is_none());
        assert!(pod.ipc_ns.as_ref().unwrap().exists());
        assert_eq!(network.set_up(&wanted).await.unwrap(), pod);
        network.tear_down("h").await.unwrap();
        let wanted = PodNetworkRequest { host_ipc: true, ..wanted };
        assert_eq!(network.set_up(&wanted).await.unwrap().ipc_ns, None);
        network.tear_down("h").await.unwrap();
        assert!(!node.state_dir.join("pods/h").exists());
    });
}

#[test]
fn a_restarted_agent_keeps_pods_and_restores_what_is_missing() {
    on_a_node(|node| async move {
        let outside = node.outside().await;
        let network = node.network(&["10.77.0.0/24"]).await;
        let ports = vec![host_port(Protocol::Tcp, None, 8080, 80)];
        let wanted = PodNetworkRequest { host_ports: ports, ..request("a") };
        let a = network.set_up(&wanted).await.unwrap();
        network.set_up(&request("gone")).await.unwrap();
        drop(network);
        remove_rules();

        let network = Network::open(node.config()).await.unwrap();
        assert_eq!(network.lookup("a"), Some(a.clone()));
        network.reconcile(&HashSet::from(["a".to_owned()])).await.unwrap();
        network.set_pod_cidrs(&nets(&["10.77.0.0/24"])).await.unwrap();
        assert_eq!(network.set_up(&wanted).await.unwrap(), a);
        assert_eq!((network.lookup("gone"), pod_interfaces().len()), (None, 1));
        let server = listen(a.net_ns.as_deref(), "0.0.0.0:80").await;
        connect(Some(&outside), ip("192.0.2.1"), 8080, &server).await.unwrap();
        // The address of the Pod that is gone is free, but not the next to be used again.
        let next = network.set_up(&request("b")).await.unwrap();
        assert_ne!(next.ips, a.ips);
        // Rules that someone flushed come back with the next Pod that has host ports.
        remove_rules();
        let ports = vec![host_port(Protocol::Tcp, None, 8090, 80)];
        network.set_up(&PodNetworkRequest { host_ports: ports, ..request("c") }).await.unwrap();
        connect(Some(&outside), ip("192.0.2.1"), 8080, &server).await.unwrap();
    });
}

/// Every state that a kill in the middle of a set-up can leave.
#[test]
fn interrupted_set_ups_are_repeated_or_removed() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let ports = vec![host_port(Protocol::Tcp, None, 8080, 80)];
        let wanted = PodNetworkRequest { host_ports: ports, ..request("a") };
        let pod_dir = node.state_dir.join("pods/a");
        let damages: [fn(&Path); 5] = [
            |_| {},
            |pod_dir| nix::mount::umount(&pod_dir.join("ns/uts")).unwrap(),
            |pod_dir| Pins::of_pod(pod_dir).unpin().unwrap(),
            |_| pod_interfaces().iter().for_each(|name| Links::open().unwrap().delete(name).unwrap()),
            |_| remove_rules(),
        ];
        for damage in damages {
            for repeat in [true, false] {
                let before = network.set_up(&wanted).await.unwrap();
                let mut record: Record =
                    serde_json::from_slice(&std::fs::read(pod_dir.join("network.json")).unwrap()).unwrap();
                record.phase = Phase::Preparing;
                record.write(&pod_dir).unwrap();
                damage(&pod_dir);

                let restarted = Network::open(node.config()).await.unwrap();
                restarted.set_pod_cidrs(&nets(&["10.77.0.0/24"])).await.unwrap();
                assert_eq!(restarted.lookup("a"), None);
                if repeat {
                    assert_eq!(restarted.set_up(&wanted).await.unwrap(), before);
                    let server = listen(before.net_ns.as_deref(), "0.0.0.0:80").await;
                    connect(None, ip("127.0.0.1"), 8080, &server).await.unwrap();
                }
                restarted.tear_down("a").await.unwrap();
                assert!(pod_interfaces().is_empty() && !pod_dir.exists() && !mounts().contains("/pods/a/"));
                network.tear_down("a").await.unwrap();
            }
        }
    });
}

#[test]
fn a_dropped_future_does_not_stop_the_work_or_confuse_the_next_call() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        for microseconds in [0, 50, 200, 1000, 5000, 20_000] {
            let wanted = request("a");
            let abandoned = network.set_up(&wanted);
            let _ = tokio::time::timeout(Duration::from_micros(microseconds), abandoned).await;
            network.tear_down("a").await.unwrap();
            assert!(pod_interfaces().is_empty() && !node.state_dir.join("pods/a").exists());
        }
    });
}

#[test]
fn a_changed_cidr_leaves_existing_pods_alone() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let old = network.set_up(&request("old")).await.unwrap();
        network.set_pod_cidrs(&nets(&["10.88.0.0/24"])).await.unwrap();
        let new = network.set_up(&request("new")).await.unwrap();
        assert_eq!(new.ips, [ip("10.88.0.2")]);
        let server = listen(old.net_ns.as_deref(), "0.0.0.0:80").await;
        assert_eq!(connect(new.net_ns.as_deref(), old.ips[0], 80, &server).await.unwrap(), new.ips[0]);
        network.tear_down("old").await.unwrap();
        assert!(inside(None, || TcpListener::bind("10.77.0.1:0")).await.is_err());
        listen(None, "10.88.0.1:0").await;
    });
}

#[test]
fn a_deleted_bridge_is_made_again() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let a = network.set_up(&request("a")).await.unwrap();
        Links::open().unwrap().delete("gantry0").unwrap();
        let b = network.set_up(&request("b")).await.unwrap();
        let server = listen(a.net_ns.as_deref(), "0.0.0.0:80").await;
        assert_eq!(connect(b.net_ns.as_deref(), a.ips[0], 80, &server).await.unwrap(), b.ips[0]);
    });
}

#[test]
fn two_agents_share_a_namespace() {
    on_a_node(|node| async move {
        let first = node.network(&["10.77.0.0/24"]).await;
        let state_dir = node.state_dir.join("second");
        let second = Network::open(NetworkConfig { bridge: "gantry1".into(), ..NetworkConfig::new(state_dir) });
        let second = second.await.unwrap();
        second.set_pod_cidrs(&nets(&["10.88.0.0/24"])).await.unwrap();
        let one = first.set_up(&request("a")).await.unwrap();
        let two = second.set_up(&request("a")).await.unwrap();
        first.reconcile(&HashSet::from(["a".to_owned()])).await.unwrap();
        second.reconcile(&HashSet::from(["a".to_owned()])).await.unwrap();
        let server = listen(two.net_ns.as_deref(), "0.0.0.0:80").await;
        connect(one.net_ns.as_deref(), two.ips[0], 80, &server).await.unwrap();
        first.reconcile(&HashSet::new()).await.unwrap();
        assert_eq!(pod_interfaces().len(), 1);
        connect(None, two.ips[0], 80, &server).await.unwrap();
    });
}

#[test]
fn namespaces_have_hostname_sysctls_and_ipc_of_their_own() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let sysctls = [
            ("net.core.somaxconn", "77"),
            ("kernel.shm_rmid_forced", "1"),
            ("fs.mqueue.msg_max", "33"),
            ("net.ipv4.conf.eth0.rp_filter", "2"),
            ("net.ipv4.ip_unprivileged_port_start", "80"),
        ];
        let sysctls = sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let on_node = |name: &str| sysctl::read(name).unwrap();
        let before = (on_node("net.core.somaxconn"), on_node("kernel.shm_rmid_forced"), on_node("fs.mqueue.msg_max"));
        let pod = network.set_up(&PodNetworkRequest { sysctls, ..request("a") }).await.unwrap();
        let (ipc, uts) = (pod.ipc_ns.clone().unwrap(), pod.uts_ns.clone().unwrap());
        let look = move || {
            nix::sched::setns(std::fs::File::open(ipc).unwrap(), CloneFlags::CLONE_NEWIPC).unwrap();
            nix::sched::setns(std::fs::File::open(uts).unwrap(), CloneFlags::CLONE_NEWUTS).unwrap();
            let names = [
                "net.core.somaxconn",
                "kernel.shm_rmid_forced",
                "fs.mqueue.msg_max",
                "net.ipv4.conf.eth0.rp_filter",
                "net.ipv4.ip_unprivileged_port_start",
                "net.ipv4.ping_group_range",
            ];
            let values = names.map(|name| sysctl::read(name).unwrap());
            (values, nix::unistd::gethostname().unwrap().into_string().unwrap())
        };
        let (values, hostname) = inside(pod.net_ns.as_deref(), look).await;
        assert_eq!(values, ["77", "1", "33", "2", "80", "0\t2147483647"]);
        assert_eq!(hostname, "host-a");
        let after = (on_node("net.core.somaxconn"), on_node("kernel.shm_rmid_forced"), on_node("fs.mqueue.msg_max"));
        assert_eq!(before, after);

        let refused = PodNetworkRequest { sysctls: vec![("net.core.nonsense".into(), "1".into())], ..request("b") };
        assert!(network.set_up(&refused).await.unwrap_err().to_string().contains("net.core.nonsense=1"));
        network.tear_down("b").await.unwrap();
        assert_eq!(pod_interfaces().len(), 1);
    });
}

#[test]
fn port_forward_dials_inside_the_pod() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        let pod = network.set_up(&request("a")).await.unwrap();
        let ns = pod.net_ns.as_deref();
        let (four, six) = (listen(ns, "127.0.0.1:4000").await, listen(ns, "[::1]:6000").await);
        for (server, port) in [(four, 4000), (six, 6000)] {
            let stream = dial_in_namespace(ns, port).await.unwrap();
            assert_eq!(stream.local_addr().unwrap(), server.accept().unwrap().1);
        }
        assert_eq!(dial_in_namespace(ns, 5000).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(dial_in_namespace(None, 4000).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let missing = dial_in_namespace(Some(Path::new("/nonexistent")), 1).await.unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    });
}

#[test]
fn hostile_names_are_refused() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24"]).await;
        for uid in ["", ".", "..", "../x", "a/b", "a\0", &"x".repeat(129)] {
            assert!(matches!(network.set_up(&request(uid)).await, Err(NetworkError::InvalidUid(_))), "{uid:?}");
            assert!(matches!(network.tear_down(uid).await, Err(NetworkError::InvalidUid(_))), "{uid:?}");
        }
        for bridge in ["", "a/b", "..", "sixteen-letters-"] {
            let config = NetworkConfig { bridge: bridge.into(), ..node.config() };
            assert!(matches!(Network::open(config).await, Err(NetworkError::InvalidBridge(_))), "{bridge:?}");
        }
        let config = NetworkConfig { bridge: "lo".into(), ..node.config() };
        let network = Network::open(config).await.unwrap();
        let error = network.set_pod_cidrs(&nets(&["10.77.0.0/24"])).await.unwrap_err();
        assert!(matches!(error, NetworkError::NotABridge { .. }), "{error}");
        assert!(network.ready().is_err());
    });
}

#[test]
fn fifty_pods_at_once() {
    on_a_node(|node| async move {
        let network = node.network(&["10.77.0.0/24", "fd77::/64"]).await;
        let start = Instant::now();
        let requests: Vec<_> = (0..50).map(|n| request(&format!("pod{n}"))).collect();
        let pods = futures::future::try_join_all(requests.iter().map(|request| network.set_up(request))).await.unwrap();
        let set_up = start.elapsed();
        let addresses: HashSet<IpAddr> = pods.iter().flat_map(|pod| pod.ips.clone()).collect();
        assert_eq!((addresses.len(), pod_interfaces().len()), (100, 50));
        let server = listen(pods[49].net_ns.as_deref(), "0.0.0.0:80").await;
        connect(pods[0].net_ns.as_deref(), pods[49].ips[0], 80, &server).await.unwrap();
        let start = Instant::now();
        futures::future::try_join_all(requests.iter().map(|request| network.tear_down(&request.uid))).await.unwrap();
        println!("50 Pods: set up in {set_up:?}, torn down in {:?}", start.elapsed());
        assert!(pod_interfaces().is_empty());
        let start = Instant::now();
        network.set_up(&request("one")).await.unwrap();
        println!("one Pod: set up in {:?}", start.elapsed());
    });
}
