//! [`Network`]: the operations on Pods' networks and on the node's.

mod plugins;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

use super::cni::{Cni, Conflist, Mode};
use super::host::{CreateVethError, Host, gateway_mac};
use super::ipam::{Pool, Subnet};
use super::link::Links;
use super::namespace::{self, Behind, Kind, Pins};
use super::record::{self, Phase, PodAddress, Record};
use super::{Context, HostPort, NetworkConfig, NetworkError, PodNetwork, PodNetworkRequest, sysctl};

/// The kernel serializes most network changes; more threads would only wait.
const MAX_THREADS: usize = 16;
/// Far more than any operation takes, also behind a burst of others; and more than DEL, ADD and DEL of plugins.
const DEADLINE: Duration = Duration::from_secs(200);

/// Set in every new network namespace before interfaces exist in it. Pods have one router, the gateway, and do not
/// take orders from others.
const NAMESPACE_SYSCTLS: [(&str, &str); 6] = [
    ("net.ipv4.conf.all.accept_redirects", "0"),
    ("net.ipv4.conf.default.accept_redirects", "0"),
    ("net.ipv6.conf.all.accept_ra", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
    ("net.ipv6.conf.all.accept_redirects", "0"),
    ("net.ipv6.conf.default.accept_redirects", "0"),
];
/// What containerd gives every Pod by default (`enable_unprivileged_ports`, `enable_unprivileged_icmp`): ports below
/// 1024 and ping without capabilities.
const POD_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// The node's Pod network: the built-in one, or that of CNI plugins. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

struct Shared {
    config: NetworkConfig,
    /// The agent's network namespace, for threads that write `/proc/sys`.
    namespace: File,
    /// Taken before `state` when both are needed, so that rules are always made from the latest state.
    host: Mutex<Host>,
    state: Mutex<State>,
    /// One lock for each Pod with an operation under way.
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    threads: Arc<Semaphore>,
    cni: Arc<Cni>,
    /// Operations that wait for plugins. Others do not wait behind them: a plugin's own daemon is a Pod too.
    plugin_threads: Arc<Semaphore>,
    /// Tells that [`Network::ready`] may answer differently.
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    /// Of the node's present podCIDRs.
    subnets: Vec<Subnet>,
    /// New Pods get their network from plugins: the bridge is there only for older ones.
    plugins: bool,
    pool: Pool,
    pods: HashMap<String, Record>,
    /// Pods that were gone at start and that plugins still have to detach.
    attached_orphans: Vec<String>,
    /// Pods being torn down: their addresses are still taken, their host ports are not opened again.
    leaving: HashSet<String>,
}

impl State {
    /// The present podCIDRs, unless they belong to plugins, and those that Pods still have addresses of.
    fn served_subnets(&self) -> Vec<Subnet> {
        let mut subnets = if self.plugins { Vec::new() } else { self.subnets.clone() };
        for address in self.pods.values().flat_map(|pod| &pod.addresses) {
            if let Ok(subnet) = Subnet::new(address.cidr)
                && !subnets.contains(&subnet)
            {
                subnets.push(subnet);
            }
        }
        subnets
    }

    /// The Pods that have (or are getting) rules and interfaces of ours.
    fn staying(&self) -> HashMap<String, Record> {
        let staying = |(uid, pod): &(&String, &Record)| !pod.addresses.is_empty() && !self.leaving.contains(*uid);
        self.pods.iter().filter(staying).map(|(uid, pod)| (uid.clone(), pod.clone())).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every operation may be repeated from any state, so a panic in another thread changes nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Network {
    /// Reads the records and opens sockets in the calling thread's network namespace; changes nothing.
    ///
    /// A record that cannot be read is an error.
    pub async fn open(config: NetworkConfig) -> Result<Self, NetworkError> {
        let name = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        let bridge = &config.bridge;
        if !(1..=15).contains(&bridge.len()) || !bridge.chars().all(name) || bridge.chars().all(|c| c == '.') {
            return Err(NetworkError::InvalidBridge(bridge.clone()));
        }
        let namespace = File::open("/proc/thread-self/ns/net").context(|| "open the network namespace".into())?;
        let inherited = namespace.try_clone().context(|| "duplicate a file descriptor".into())?;
        let work = move || {
            namespace::enter(&inherited).context(|| "enter the agent's network namespace".into())?;
            Shared::open(config, namespace)
        };
        let shared = namespace::on_fresh_thread("network-open", work).await;
        let shared = shared.context(|| "start a thread".into())??;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Sets the node's `spec.podCIDRs`: makes the bridge, its gateways, forwarding and NAT.
    ///
    /// Does nothing when they have not changed. After a change, existing Pods keep their addresses and their gateway.
    pub async fn set_pod_cidrs(&self, cidrs: &[IpNet]) -> Result<(), NetworkError> {
        let subnets = Subnet::of_node(cidrs)?;
        self.run("setting the podCIDRs", Work::Quick, move |shared| shared.set_subnets(subnets)).await
    }

    /// Whether Pods can get a network; the error is the text that kubelet has in the node's Ready condition.
    pub fn ready(&self) -> Result<(), String> {
        let why = match self.shared.cni.mode() {
            Mode::Plugins(_) => return Ok(()),
            Mode::BuiltIn if !lock(&self.shared.state).subnets.is_empty() => return Ok(()),
            Mode::BuiltIn => "no podCIDR assigned to the node yet".to_owned(),
            Mode::Waiting(why) => format!("Network plugin returns error: {why}"),
        };
        Err(format!(
            "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:{why}"
        ))
    }

    /// Gives a Pod its namespaces, addresses and host ports.
    ///
    /// Idempotent for each uid, also after a restart of the agent: a Pod that has a network keeps it, and what an
    /// interrupted call left behind is replaced.
    pub async fn set_up(&self, request: &PodNetworkRequest) -> Result<PodNetwork, NetworkError> {
        check_uid(&request.uid)?;
        sysctl::check(&request.sysctls, request.host_network, request.host_ipc)?;
        let request = request.clone();
        let uid = request.uid.clone();
        let slow = self.shared.is_slow(&uid) || (!request.host_network && self.shared.cni.mode() != Mode::BuiltIn);
        self.run("setting up a Pod's network", Work::of_pod(&uid, slow), move |shared| shared.set_up(&request)).await
    }

    /// Removes a Pod's network; it may be incomplete or gone. Afterwards its addresses are free.
    pub async fn tear_down(&self, uid: &str) -> Result<(), NetworkError> {
        check_uid(uid)?;
        let gone = uid.to_owned();
        let work = Work::of_pod(uid, self.shared.is_slow(uid));
        self.run("tearing down a Pod's network", work, move |shared| shared.tear_down(&gone)).await
    }

    /// Removes what belongs to no Pod of `live` (uids) and restores what live Pods miss in interfaces and rules.
    ///
    /// To be called at start, before the first [`Self::set_up`].
    pub async fn reconcile(&self, live: &HashSet<String>) -> Result<(), NetworkError> {
        let gone = {
            let mut state = lock(&self.shared.state);
            let gone = |(uid, _): &(&String, &Record)| !live.contains(*uid);
            let (attached, ours): (Vec<_>, Vec<_>) =
                state.pods.iter().filter(gone).partition(|(_, record)| record.plugin_ips.is_some());
            let uids = |pods: Vec<(&String, &Record)>| pods.into_iter().map(|(uid, _)| uid.clone()).collect::<Vec<_>>();
            let (attached, ours) = (uids(attached), uids(ours));
            // plugins that hang must not keep the agent from starting: it runs the Pods that mend them
            state.attached_orphans = attached;
            ours
        };
        futures::future::try_join_all(gone.iter().map(|uid| {
            debug!(uid, "removing the network of a Pod that is gone");
            self.tear_down(uid)
        }))
        .await?;
        self.run("reconciling the network", Work::Quick, Shared::reconcile).await
    }

    /// A Pod's network if it is complete.
    pub fn lookup(&self, uid: &str) -> Option<PodNetwork> {
        let state = lock(&self.shared.state);
        let record = state.pods.get(uid).filter(|record| record.phase == Phase::Ready)?;
        (!state.leaving.contains(uid)).then(|| self.shared.answer(record))
    }

    /// Runs `work` in the agent's network namespace, on a thread that it may take into others; for a Pod, after all
    /// operations on it that were called before, even if nobody waits for them any more.
    async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        place: Work<'_>,
        work: impl FnOnce(&Shared) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let shared = self.shared.clone();
        let operation = async {
            let (pod, threads) = match place {
                Work::Pod(uid) => (Some(shared.pod_lock(uid).lock_owned().await), &shared.threads),
                Work::SlowPod(uid) => (Some(shared.pod_lock(uid).lock_owned().await), &shared.plugin_threads),
                Work::Quick => (None, &shared.threads),
                Work::Slow => (None, &shared.plugin_threads),
            };
            let threads = threads.clone();
            let permit = threads.acquire_owned().await.map_err(std::io::Error::other).context(|| what.into())?;
            let body = move || {
                // Released when the thread ends, not when the caller stops waiting.
                let _held = (pod, permit);
                namespace::enter(&shared.namespace).context(|| "enter the agent's network namespace".into())?;
                work(&shared)
            };
            namespace::on_fresh_thread("pod-network", body).await.context(|| what.into())?
        };
        match tokio::time::timeout(DEADLINE, operation).await {
            Ok(result) => result,
            Err(_) => Err(NetworkError::Deadline(what, DEADLINE.as_secs())),
        }
    }
}

/// What an operation has to wait for.
#[derive(Clone, Copy)]
enum Work<'a> {
    /// A thread.
    Quick,
    /// A thread of those that wait for plugins.
    Slow,
    /// Earlier operations on the Pod, and a thread.
    Pod(&'a str),
    /// Earlier operations on the Pod, and a thread of those that wait for plugins.
    SlowPod(&'a str),
}

impl<'a> Work<'a> {
    fn of_pod(uid: &'a str, slow: bool) -> Self {
        if slow { Self::SlowPod(uid) } else { Self::Pod(uid) }
    }
}

impl Shared {
    fn open(config: NetworkConfig, namespace: File) -> Result<Self, NetworkError> {
        let pods = config.state_dir.join("pods");
        let records = record::read_all(&pods).context(|| format!("read the Pods' networks in {}", pods.display()))?;
        let mut state = State::default();
        for record in records {
            for entry in &record.addresses {
                state.pool.reserve(entry.cidr, entry.address);
            }
            state.pods.insert(record.uid.clone(), record);
        }
        let host = Mutex::new(Host::open(&config)?);
        let (state, locks) = (Mutex::new(state), Mutex::default());
        let (threads, plugin_threads) = (Arc::new(Semaphore::new(MAX_THREADS)), Arc::new(Semaphore::new(MAX_THREADS)));
        let cni = Arc::new(Cni::new(config.cni.clone()));
        cni.refresh();
        let (changes, _) = watch::channel(());
        lock(&state).plugins = cni.mode() != Mode::BuiltIn;
        Ok(Self { config, namespace, host, state, locks, threads, cni, plugin_threads, changes })
    }

    /// Whether plugins have something to do with a Pod.
    fn is_slow(&self, uid: &str) -> bool {
        lock(&self.state).pods.get(uid).is_some_and(|record| record.plugin_ips.is_some()) || self.cni.knows(uid)
    }

    fn pods_dir(&self) -> PathBuf {
        self.config.state_dir.join("pods")
    }

    fn pod_dir(&self, uid: &str) -> PathBuf {
        self.pods_dir().join(uid)
    }

    /// The lock of one Pod; locks that nobody holds are forgotten on the way.
    fn pod_lock(&self, uid: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = lock(&self.locks);
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(uid.to_owned()).or_default().clone()
    }

    fn answer(&self, record: &Record) -> PodNetwork {
        let pins = Pins::of_pod(&self.pod_dir(&record.uid));
        let kinds = record.kinds();
        let path = |kind| kinds.contains(&kind).then(|| pins.path(kind));
        PodNetwork { ips: record.ips(), net_ns: path(Kind::Net), ipc_ns: path(Kind::Ipc), uts_ns: path(Kind::Uts) }
    }

    fn set_subnets(&self, subnets: Vec<Subnet>) -> Result<(), NetworkError> {
        let mut host = lock(&self.host);
        let before = std::mem::replace(&mut lock(&self.state).subnets, subnets.clone());
        if before == subnets {
            return Ok(());
        }
        let result = self.synchronize(&mut host);
        if result.is_err() {
            // Not ready, and the next call tries again.
            lock(&self.state).subnets = before;
        }
        result
    }

    fn synchronize(&self, host: &mut Host) -> Result<(), NetworkError> {
        let (subnets, pods, plugins) = {
            let state = lock(&self.state);
            (state.served_subnets(), state.staying(), state.plugins)
        };
        host.synchronize(&subnets, &pods)?;
        if subnets.is_empty() && plugins {
            // its gateway address would be in the way of theirs
            return host.remove_bridge();
        }
        host.reconcile_veths(&pods)
    }

    fn replace_rules(&self, host: &mut Host) -> Result<(), NetworkError> {
        let (subnets, pods) = {
            let state = lock(&self.state);
            (state.served_subnets(), state.staying())
        };
        host.replace_rules(&subnets, &pods)
    }

    fn set_up(&self, request: &PodNetworkRequest) -> Result<PodNetwork, NetworkError> {
        let known = {
            let mut state = lock(&self.state);
            // it is back: a static Pod keeps its uid
            state.attached_orphans.retain(|uid| *uid != request.uid);
            state.pods.get(&request.uid).cloned()
        };
        if let Some(record) = &known {
            if record.phase == Phase::Ready && self.is_complete(record)? {
                return Ok(self.answer(record));
            }
            debug!(uid = request.uid, "replacing an incomplete Pod network");
            self.dismantle(record)?;
        } else if self.cni.knows(&request.uid) {
            // attached before a reboot
            self.cni.detach(&request.uid, false)?;
        }
        let network = match self.cni.mode() {
            _ if request.host_network => None,
            Mode::BuiltIn => None,
            Mode::Plugins(network) => Some(network),
            Mode::Waiting(why) => return Err(NetworkError::NotReady(why)),
        };
        let mut record = self.reserve(request, known, network.is_some())?;
        if let Some(ips) = self.build(&record, request, network.as_deref())? {
            record.plugin_ips = Some(ips);
        }
        record.phase = Phase::Ready;
        self.store(&record)?;
        Ok(self.answer(&record))
    }

    fn is_complete(&self, record: &Record) -> Result<bool, NetworkError> {
        let pins = Pins::of_pod(&self.pod_dir(&record.uid));
        let pinned = record.kinds().into_iter().all(|kind| pins.is_pinned(kind));
        if record.plugin_ips.is_some() {
            let checked = if pinned { self.cni.check(&record.uid) } else { Ok(()) };
            return Ok(pinned && checked.inspect_err(|error| warn!(uid = record.uid, %error, "replacing it")).is_ok());
        }
        Ok(pinned && (record.addresses.is_empty() || lock(&self.host).has_veth(&record.uid)?))
    }

    /// Takes addresses and host ports and records them. An address once recorded is the Pod's until it is torn down.
    fn reserve(
        &self,
        request: &PodNetworkRequest,
        known: Option<Record>,
        plugins: bool,
    ) -> Result<Record, NetworkError> {
        let mut state = lock(&self.state);
        let mut host_ports = Vec::new();
        if !request.host_network {
            check_host_ports(request, &state)?;
            host_ports.clone_from(&request.host_ports);
        }
        let ours = !request.host_network && !plugins;
        let addresses = match known {
            Some(known) if ours && !known.addresses.is_empty() => known.addresses,
            Some(known) if !ours => {
                known.addresses.iter().for_each(|entry| state.pool.release(entry.address));
                Vec::new()
            }
            _ if ours => allocate(&mut state)?,
            _ => Vec::new(),
        };
        let record = Record {
            uid: request.uid.clone(),
            namespace: request.namespace.clone(),
            name: request.name.clone(),
            phase: Phase::Preparing,
            hostname: request.hostname.clone(),
            host_network: request.host_network,
            host_ipc: request.host_ipc,
            addresses,
            host_ports,
            plugin_ips: plugins.then(Vec::new),
        };
        let newly_taken = !state.pods.contains_key(&record.uid);
        if let Err(error) = record.write(&self.pod_dir(&record.uid)) {
            if newly_taken {
                record.addresses.iter().for_each(|entry| state.pool.release(entry.address));
            }
            return Err(error).context(|| format!("record the network of Pod {}", record.uid));
        }
        state.leaving.remove(&record.uid);
        state.pods.insert(record.uid.clone(), record.clone());
        Ok(record)
    }

    fn store(&self, record: &Record) -> Result<(), NetworkError> {
        record.write(&self.pod_dir(&record.uid)).context(|| format!("record the network of Pod {}", record.uid))?;
        lock(&self.state).pods.insert(record.uid.clone(), record.clone());
        Ok(())
    }

    /// Makes namespaces and interfaces and opens host ports; takes the calling thread into the namespaces. The answer is
    /// the addresses that plugins gave, if `network` is theirs.
    fn build(
        &self,
        record: &Record,
        request: &PodNetworkRequest,
        network: Option<&Conflist>,
    ) -> Result<Option<Vec<IpAddr>>, NetworkError> {
        // plugins run in the node's namespaces; its UTS namespace too, as some look for their Node by the host's name
        let behind = network.map(|_| Behind::new("pod-cni")).transpose().context(|| "start a thread".into())?;
        let mut plugin_ips = None;
        let pins = Pins::of_pod(&self.pod_dir(&record.uid));
        let kinds = record.kinds();
        if !kinds.is_empty() {
            let action = || format!("create the namespaces of Pod {}/{}", record.namespace, record.name);
            pins.create(&kinds, &record.hostname).context(action)?;
        }
        if !record.host_network {
            if let (Some(behind), Some(network)) = (behind, network) {
                let pod = || format!("configure the network of Pod {}/{}", record.namespace, record.name);
                Links::open().and_then(|mut links| links.configure_pod(&[], [0; 6])).context(pod)?;
                let attachment = self.attachment(request, network, pins.path(Kind::Net));
                let cni = self.cni.clone();
                plugin_ips = Some(behind.run(move || cni.attach_or_detach(attachment)).context(pod)??);
            } else {
                self.connect(record)?;
            }
            for (name, value) in POD_SYSCTLS {
                // Refused in a user namespace without these groups; Pods then have the kernel's own default.
                if let Err(error) = sysctl::write(name, value) {
                    warn!(uid = record.uid, "{error}");
                }
            }
        }
        for (name, value) in &request.sysctls {
            sysctl::write(name, value)?;
        }
        if record.host_ports.is_empty() || plugin_ips.is_some() {
            return Ok(plugin_ips);
        }
        let mut host = lock(&self.host);
        if !host.open_host_ports(record)? {
            self.replace_rules(&mut host)?;
        }
        namespace::enter(&self.namespace).context(|| "return to the agent's network namespace".into())?;
        host.forget_udp_flows(record)?;
        Ok(None)
    }

    /// From inside a new network namespace: interfaces, addresses, routes.
    fn connect(&self, record: &Record) -> Result<(), NetworkError> {
        let pod = || format!("configure the network of Pod {}/{}", record.namespace, record.name);
        for (name, value) in NAMESPACE_SYSCTLS {
            // A kernel without IPv6 has none of its parameters.
            if let Err(error) = sysctl::write(name, value) {
                debug!(uid = record.uid, "{error}");
            }
        }
        let addresses = record.addresses.iter().map(|entry| Ok((entry.address, Subnet::new(entry.cidr)?)));
        let addresses: Vec<(IpAddr, Subnet)> = addresses.collect::<Result<_, NetworkError>>()?;
        if !addresses.is_empty() {
            let own = File::open("/proc/thread-self/ns/net").context(pod)?;
            let mut host = lock(&self.host);
            let mut created = host.create_veth(record, own.as_fd());
            if matches!(created, Err(CreateVethError::BridgeMissing)) {
                namespace::enter(&self.namespace).context(pod)?;
                let restored = self.synchronize(&mut host);
                namespace::enter(&own).context(pod)?;
                restored?;
                created = host.create_veth(record, own.as_fd());
            }
            created.map_err(|error| match error {
                CreateVethError::Other(error) => error,
                CreateVethError::BridgeMissing => {
                    NetworkError::NotReady(format!("bridge {} disappeared", self.config.bridge))
                }
            })?;
        }
        let gateway_mac = gateway_mac(&self.config.bridge);
        Links::open().and_then(|mut links| links.configure_pod(&addresses, gateway_mac)).context(pod)
    }

    fn tear_down(&self, uid: &str) -> Result<(), NetworkError> {
        let pod_dir = self.pod_dir(uid);
        let Some(record) = lock(&self.state).pods.get(uid).cloned() else {
            // Never set up, or torn down before. Pins without a record are possible only if someone removed it.
            return Pins::of_pod(&pod_dir).unpin().context(|| format!("release the namespaces of Pod {uid}"));
        };
        lock(&self.state).leaving.insert(uid.to_owned());
        self.dismantle(&record)?;
        record::remove(&pod_dir).context(|| format!("remove the network record of Pod {uid}"))?;
        let retired = {
            let mut state = lock(&self.state);
            let before = state.served_subnets().len();
            state.pods.remove(uid);
            state.leaving.remove(uid);
            record.addresses.iter().for_each(|entry| state.pool.release(entry.address));
            state.served_subnets().len() < before
        };
        if retired {
            // The last Pod with an address of a former podCIDR is gone, and with it the reason for its gateway.
            self.synchronize(&mut lock(&self.host))?;
        }
        Ok(())
    }

    /// Removes everything of a Pod but its record.
    fn dismantle(&self, record: &Record) -> Result<(), NetworkError> {
        let pins = Pins::of_pod(&self.pod_dir(&record.uid));
        if record.plugin_ips.is_some() {
            self.cni.detach(&record.uid, pins.is_pinned(Kind::Net))?;
        } else {
            let mut host = lock(&self.host);
            if !record.host_ports.is_empty() {
                if !host.close_host_ports(record)? {
                    self.replace_rules(&mut host)?;
                }
                host.forget_udp_flows(record)?;
            }
            if !record.addresses.is_empty() {
                host.delete_veth(record)?;
            }
        }
        pins.unpin().context(|| format!("release the namespaces of Pod {}/{}", record.namespace, record.name))
    }

    fn reconcile(&self) -> Result<(), NetworkError> {
        let pods_dir = self.pods_dir();
        let pinned = record::directories_with_pins(&pods_dir).context(|| format!("list {}", pods_dir.display()))?;
        // Looked up after listing: a Pod has its record before it has pins.
        let known = lock(&self.state).pods.clone();
        let orphans = pinned.into_iter().filter(|(uid, _)| !known.contains_key(uid));
        for (uid, directory) in orphans {
            Pins::of_pod(&directory).unpin().context(|| format!("release the namespaces of Pod {uid}"))?;
        }
        self.synchronize(&mut lock(&self.host))
    }
}

/// One address of each podCIDR, in their order.
fn allocate(state: &mut State) -> Result<Vec<PodAddress>, NetworkError> {
    if state.subnets.is_empty() {
        return Err(NetworkError::NotReady("no podCIDR assigned to the node yet".into()));
    }
    let mut addresses: Vec<PodAddress> = Vec::with_capacity(state.subnets.len());
    for subnet in &state.subnets {
        match state.pool.allocate(subnet) {
            Some(address) => addresses.push(PodAddress { address, cidr: subnet.net() }),
            None => {
                addresses.iter().for_each(|entry| state.pool.release(entry.address));
                let in_use = state.pool.in_use(subnet);
                return Err(NetworkError::Exhausted { cidr: subnet.net(), in_use });
            }
        }
    }
    Ok(addresses)
}

/// Refuses ports that another Pod has, or that the Pod wants twice. (The API server and the scheduler avoid both; static
/// Pods and Pods bound by hand do not ask them.)
fn check_host_ports(request: &PodNetworkRequest, state: &State) -> Result<(), NetworkError> {
    let in_use = |port: &HostPort, namespace: &str, name: &str| {
        Err(NetworkError::HostPortInUse { port: *port, owner: format!("{namespace}/{name}") })
    };
    for (position, port) in request.host_ports.iter().enumerate() {
        if request.host_ports[..position].iter().any(|earlier| earlier.conflicts_with(port)) {
            return in_use(port, &request.namespace, &request.name);
        }
        let taken = |other: &&Record| {
            other.uid != request.uid && other.host_ports.iter().any(|taken| taken.conflicts_with(port))
        };
        if let Some(owner) = state.pods.values().find(taken) {
            return in_use(port, &owner.namespace, &owner.name);
        }
    }
    Ok(())
}

fn check_uid(uid: &str) -> Result<(), NetworkError> {
    let letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match (1..=128).contains(&uid.len()) && uid.chars().all(letter) && uid != "." && uid != ".." {
        true => Ok(()),
        false => Err(NetworkError::InvalidUid(uid.to_owned())),
    }
}
