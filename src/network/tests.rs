//! The whole network in action, as root: every test has network and mount namespaces of its own, in which it is the
//! node, and a second network namespace that is the world outside.

use std::collections::HashSet;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
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
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        Links::open().unwrap().configure_pod(&[]).unwrap();
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
            Links::open().unwrap().configure_pod(&[]).unwrap();
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
