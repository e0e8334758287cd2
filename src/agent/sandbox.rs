//! A Pod's sandbox: cgroup, namespaces and addresses, the files that describe them, and the shim.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::sync::broadcast;

use super::logs::Rotations;
use super::node::{Node, blocking};
use super::termination;
use crate::image::unmount_rootfs;
use crate::network::dns::{ResolvConf, Subject, pod_dns};
use crate::network::hostname::pod_hostname;
use crate::network::{Bandwidth, HostPort, NetworkError, PodNetworkRequest, Protocol, hosts};
use crate::node::events::EventType;
use crate::pod::effects::{Failure, Request, RuntimeEvent};
use crate::pod::features::unsupported;
use crate::pod::fold::Found;
use crate::pod::model::{Desired, Instance, Observed};
use crate::pod::plan::TEAR_DOWN_FAILED;
use crate::resources::cgroup::Enforced;
use crate::resources::quantity;
use crate::runtime::client::{ContainerRecord, Shim, ShimError, ShimEvent, ShimOptions, read_records};
use crate::sys::heap;
use crate::volume::{is_mount_point, remove_tree};

/// File in a container's directory: the [`Instance`] as it was before it was created.
pub(super) const INSTANCE_FILE: &str = "instance.json";

/// Pods often go in company.
const MEMORY_DELAY: Duration = Duration::from_secs(5);

/// A Pod's directory below the state directory, part by part.
#[derive(Clone, Debug)]
pub struct PodDir(pub PathBuf);

impl PodDir {
    /// `/dev/shm` of all containers.
    #[must_use]
    pub fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    /// `/etc/resolv.conf` of all containers.
    #[must_use]
    pub fn resolv_conf(&self) -> PathBuf {
        self.0.join("resolv.conf")
    }

    /// `/etc/hostname` of all containers.
    #[must_use]
    pub fn hostname(&self) -> PathBuf {
        self.0.join("hostname")
    }

    /// The directories of all containers.
    #[must_use]
    pub fn containers(&self) -> PathBuf {
        self.0.join(crate::shim::record::CONTAINERS_DIR)
    }

    /// The directory of one instance.
    #[must_use]
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }
}

impl Node {
    /// A Pod's directory.
    #[must_use]
    pub fn pod_dir(&self, uid: &str) -> PodDir {
        PodDir(self.records.pod_dir(uid))
    }

    pub(super) async fn mount_volumes(&self, request: &Request) -> Result<(), Failure> {
        let desired = &request.desired;
        self.objects.register_pod(&desired.pod);
        let context = self.field_context(&request.observed);
        self.volumes
            .mount(&desired.pod, &context)
            .await
            .map(|_| ())
            .map_err(|error| Failure::new("FailedMount", error.to_string()))
    }

    /// Makes everything a Pod's containers share. Repeating it changes nothing.
    pub(super) async fn set_up_sandbox(
        self: &Arc<Self>,
        request: &Request,
    ) -> Result<(Vec<String>, Enforced), Failure> {
        let desired = &request.desired;
        let failed = |what: &str, error: String| {
            Failure::new("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {what}: {error}"))
        };
        let pod = desired.pod.clone();
        let spec = pod.spec.clone().unwrap_or_default();
        if let Some(failure) = unsupported(&pod) {
            return Err(failure);
        }
        self.runtime_class(&spec).await.map_err(|error| failed("failed to get sandbox runtime", error))?;
        let host_network = spec.host_network == Some(true);
        if !host_network {
            self.network
                .ready()
                .map_err(|why| Failure::new("NetworkNotReady", format!("network is not ready: {why}")))?;
        }
        let names = pod_hostname(&pod, &self.config.kubelet.cluster_domain)
            .map_err(|error| failed("set up the hostname", error.to_string()))?;
        // the machine's own UTS namespace has the machine's name, whatever --hostname-override says
        let machine = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        let kernel_name = if host_network { machine() } else { names.kernel.clone() };
        let resolver = self.resolver(&pod);
        let network_request = network_request(desired.uid(), &pod, &spec, kernel_name.clone(), resolver.clone())
            .map_err(|error| failed("set up the network", error))?;
        let dir = self.pod_dir(desired.uid());
        let (cgroups, cgroup_pod, log_dir) = (self.cgroups.clone(), pod.clone(), self.log_dir(&pod));
        let kubelet_dir = self.kubelet_dir(desired.uid());
        let (shm, containers) = (dir.shm(), dir.containers());
        let host_ipc = spec.host_ipc == Some(true);
        let files = blocking(move || -> Result<Enforced, String> {
            let enforced = cgroups
                .ensure_pod(&cgroup_pod, false)
                .and_then(|()| cgroups.enforced(&cgroups.pod_path(&cgroup_pod)))
                .map_err(|error| error.to_string())?;
            for path in [&log_dir, &kubelet_dir, &shm, &containers] {
                fs::create_dir_all(path).map_err(|error| format!("create {}: {error}", path.display()))?;
            }
            if !host_ipc {
                mount_shm(&shm).map_err(|error| format!("mount {}: {error}", shm.display()))?;
            }
            Ok(enforced)
        });
        let network = async {
            self.network.set_up(&network_request).await.map_err(|error| match error {
                NetworkError::NotReady { .. } => {
                    Failure::new("NetworkNotReady", format!("network is not ready: {error}"))
                }
                error => failed("set up the network", error.to_string()),
            })
        };
        let shim = async {
            self.ensure_shim(desired.uid()).await.map_err(|error| failed("start the shim", error.to_string()))
        };
        let files = async { files.await.map_err(|error| failed("prepare cgroup and directories", error)) };
        let (enforced, network, shim) = tokio::try_join!(files, network, shim)?;
        if spec.share_process_namespace == Some(true) {
            shim.pid_namespace()
                .await
                .map_err(|error| failed("make the shared process namespace", error.to_string()))?;
        }
        let ips = if host_network { self.addresses.clone() } else { network.ips.clone() };
        self.write_files(desired, &spec, &resolver, &ips, &names.hostname, &names.domain, &kernel_name)
            .map_err(|error| failed("write the Pod's files", error.to_string()))?;
        Ok((ips.iter().map(ToString::to_string).collect(), enforced))
    }

    /// What a Pod's `/etc/resolv.conf` says; tells what is wrong with it.
    fn resolver(&self, pod: &Pod) -> ResolvConf {
        let (resolver, events) = pod_dns(pod, &self.dns);
        for event in events {
            match event.subject {
                Subject::Pod => self.events.pod_event(pod, EventType::Warning, event.reason, event.message, None),
                Subject::Node => self.events.node_event(EventType::Warning, event.reason, event.message),
            }
        }
        resolver
    }

    /// `/etc/resolv.conf`, `/etc/hostname` and `/etc/hosts`.
    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of three small files; a struct would name them a second time"
    )]
    fn write_files(
        &self,
        desired: &Desired,
        spec: &PodSpec,
        resolver: &ResolvConf,
        ips: &[IpAddr],
        hostname: &str,
        domain: &str,
        kernel_name: &str,
    ) -> io::Result<()> {
        let dir = self.pod_dir(desired.uid());
        fs::write(dir.resolv_conf(), resolver.render())?;
        fs::write(dir.hostname(), format!("{kernel_name}\n"))?;
        let aliases = spec.host_aliases.as_deref().unwrap_or_default();
        let hosts = if spec.host_network == Some(true) {
            hosts::host_network(&fs::read_to_string("/etc/hosts").unwrap_or_default(), aliases)
        } else {
            hosts::managed(ips, hostname, domain, aliases)
        };
        fs::write(self.kubelet_dir(desired.uid()).join("etc-hosts"), hosts)
    }

    /// The Pod's shim: the one that is known, one that an earlier life left, or a new one.
    async fn ensure_shim(self: &Arc<Self>, uid: &str) -> Result<Shim, ShimError> {
        if let Some(shim) = self.shim(uid) {
            return Ok(shim);
        }
        let dir = self.pod_dir(uid).0;
        let shim = match Shim::connect(&dir).await {
            Ok(shim) => shim,
            Err(_) => {
                fs::create_dir_all(&dir)?;
                self.launcher.launch(&dir, &ShimOptions::default()).await?
            }
        };
        self.keep_shim(uid, &shim);
        Ok(shim)
    }

    fn keep_shim(self: &Arc<Self>, uid: &str, shim: &Shim) {
        self.shims().insert(uid.to_owned(), shim.clone());
        let (node, uid, events) = (self.clone(), uid.to_owned(), shim.events());
        tokio::spawn(async move { node.forward(&uid, events).await });
    }

    /// Passes what a shim tells on to the Pod's worker, until the shim is gone.
    async fn forward(self: &Arc<Self>, uid: &str, mut events: broadcast::Receiver<ShimEvent>) {
        let mut rotations = Rotations::new(self.config.kubelet.container_log_monitor_interval.into());
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                never = rotations.compress() => match never {},
            };
            match event {
                Ok(ShimEvent::Exited(record)) => self.pods.runtime_event(uid, self.exited(uid, &record)),
                Ok(ShimEvent::LogRotated { rotated, .. }) => rotations.add(rotated),
                Ok(ShimEvent::ExecExited { .. }) => {}
                Ok(ShimEvent::Disconnected) | Err(broadcast::error::RecvError::Closed) => break,
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    // some exits were missed: the truth is on disk
                    for record in read_records(&self.pod_dir(uid).0).unwrap_or_default() {
                        if record.exit.is_some() {
                            self.pods.runtime_event(uid, self.exited(uid, &record));
                        }
                    }
                }
            }
        }
        tokio::spawn(rotations.finish());
        // tear_down takes the shim out of the map before it ends it: one that is still there was lost
        if self.shims().remove(uid).is_some() {
            tracing::error!(pod = uid, "the Pod's shim is gone");
            for record in read_records(&self.pod_dir(uid).0).unwrap_or_default() {
                if record.exit.is_some() {
                    self.pods.runtime_event(uid, self.exited(uid, &record));
                }
            }
            self.pods.runtime_event(uid, RuntimeEvent::SandboxLost);
        }
    }

    fn exited(&self, uid: &str, record: &ContainerRecord) -> RuntimeEvent {
        let container = self
            .pods
            .view(uid)
            .and_then(|view| view.desired.container(&record.request.name).map(|spec| spec.container.clone()));
        RuntimeEvent::Exited(termination::exit(record, container.as_ref()))
    }

    /// Removes a sandbox that was lost, so that a new one can be made; volumes stay.
    pub(super) async fn clear_sandbox(self: &Arc<Self>, desired: &Desired) -> Result<(), Failure> {
        self.end_containers(desired.uid()).await.map_err(|error| Failure::new(TEAR_DOWN_FAILED, error))?;
        let network = self.network.tear_down(desired.uid()).await;
        network.map_err(|error| Failure::new(TEAR_DOWN_FAILED, format!("error killing pod: network: {error}")))
    }

    /// Removes everything of a Pod but its logs and its record. Repeating it is harmless.
    pub(super) async fn tear_down(self: &Arc<Self>, desired: &Desired) -> Result<(), Failure> {
        let uid = desired.uid();
        self.clear_sandbox(desired).await?;
        let failed = |error: String| Failure::new(TEAR_DOWN_FAILED, format!("error killing pod: {error}"));
        self.volumes.unmount(uid).await.map_err(|error| failed(format!("volumes: {error}")))?;
        self.objects.unregister_pod(uid);
        let (cgroups, owned) = (self.cgroups.clone(), uid.to_owned());
        let writable = self.writable_dir(uid);
        blocking(move || -> Result<(), String> {
            cgroups.remove_pod(&owned).map_err(|error| error.to_string())?;
            remove_tree(&writable).map_err(|error| format!("remove {}: {error}", writable.display()))
        })
        .await
        .map_err(failed)
    }

    /// Ends the shim and with it whatever still runs, and unmounts what the containers had.
    async fn end_containers(self: &Arc<Self>, uid: &str) -> Result<(), String> {
        let known = self.shims().remove(uid);
        let dir = self.pod_dir(uid);
        let shim = match known {
            Some(shim) => Some(shim),
            None => Shim::connect(&dir.0).await.ok(),
        };
        if let Some(shim) = shim {
            match shim.shutdown(true).await {
                Ok(()) | Err(ShimError::Disconnected) => {}
                Err(error) => return Err(format!("end the shim: {error}")),
            }
        }
        let (cgroups, owned) = (self.cgroups.clone(), uid.to_owned());
        blocking(move || -> Result<(), String> {
            // what a shim that died left running
            cgroups.remove_pod(&owned).map_err(|error| error.to_string())?;
            for entry in entries(&dir.containers()).map_err(|error| error.to_string())? {
                unmount_rootfs(&entry.join("rootfs")).map_err(|error| error.to_string())?;
            }
            unmount(&dir.shm()).map_err(|error| format!("unmount {}: {error}", dir.shm().display()))?;
            unmount(&dir.0.join("ns/pid")).map_err(|error| format!("unpin the process namespace: {error}"))?;
            remove_tree(&dir.containers()).map_err(|error| format!("remove {}: {error}", dir.containers().display()))
        })
        .await
    }

    /// Removes the last traces of a Pod that no longer exists.
    pub(super) async fn forget(self: &Arc<Self>, desired: &Desired) {
        let uid = desired.uid().to_owned();
        let (log_dir, links, node) =
            (self.log_dir(&desired.pod), self.config.paths.container_logs_dir.clone(), self.clone());
        let done = blocking(move || -> io::Result<()> {
            super::logs::remove_links(&links, &log_dir)?;
            remove_tree(&log_dir)?;
            remove_tree(&node.kubelet_dir(&uid))?;
            node.records.remove(&uid)
        });
        if let Err(error) = done.await {
            tracing::warn!(pod = desired.uid(), error, "traces of the Pod stay behind");
        }
        self.give_back_memory();
    }

    /// Gives back the memory of Pods that are gone, once no more follow.
    fn give_back_memory(self: &Arc<Self>) {
        if self.memory_due.swap(true, Ordering::Relaxed) {
            return;
        }
        let node = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(MEMORY_DELAY).await;
            node.memory_due.store(false, Ordering::Relaxed);
            tokio::task::spawn_blocking(heap::release);
        });
    }

    /// Finds what of a Pod is on the node, and brings its record up to date.
    pub(super) async fn adopt(self: &Arc<Self>, desired: &Desired, observed: &mut Observed) {
        let uid = desired.uid();
        let dir = self.pod_dir(uid);
        let mut records = read_records(&dir.0).unwrap_or_default();
        let shim = Shim::connect(&dir.0).await.ok();
        if let Some(shim) = &shim {
            self.keep_shim(uid, shim);
            if let Ok(state) = shim.state().await {
                records = state;
            }
        }
        let mut found = Vec::new();
        for record in &records {
            let start_error = record.exit.as_ref().is_some_and(|exit| exit.start_error.is_some());
            if record.started_at.is_none() && !start_error {
                // created and never started: no run of the container, the next start removes it
                continue;
            }
            let path = dir.container(&record.request.container_id).join(INSTANCE_FILE);
            let Some(mut instance) =
                fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Instance>(&bytes).ok())
            else {
                continue;
            };
            let container = desired.container(&record.request.name).map(|spec| &spec.container);
            instance.started_at = record.started_at;
            instance.exit = record.exit.is_some().then(|| termination::exit(record, container));
            found.push(Found { name: record.request.name.clone(), instance });
        }
        crate::pod::fold::adopt(desired, observed, &found, shim.is_some(), Timestamp::now());
    }
}

fn network_request(
    uid: &str,
    pod: &Pod,
    spec: &PodSpec,
    hostname: String,
    dns: ResolvConf,
) -> Result<PodNetworkRequest, String> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let host_ports = containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            Some(HostPort {
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    _ => Protocol::Tcp,
                },
                host_ip: port.host_ip.as_deref().and_then(|ip| ip.parse().ok()),
                host_port: u16::try_from(port.host_port?).ok().filter(|port| *port != 0)?,
                container_port: u16::try_from(port.container_port).ok()?,
            })
        })
        .collect();
    let sysctls = spec.security_context.iter().flat_map(|context| context.sysctls.iter().flatten());
    Ok(PodNetworkRequest {
        uid: uid.to_owned(),
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        hostname,
        host_network: spec.host_network == Some(true),
        host_ipc: spec.host_ipc == Some(true),
        host_ports,
        sysctls: sysctls.map(|s| (s.name.clone(), s.value.clone())).collect(),
        bandwidth: bandwidth(pod)?,
        dns,
    })
}

/// The limits of a Pod's traffic; an error names the annotation (`pkg/util/bandwidth/utils.go`).
fn bandwidth(pod: &Pod) -> Result<Bandwidth, String> {
    /// 1 k and 1 P bit/s.
    const RANGE: std::ops::RangeInclusive<i64> = 1_000..=1_000_000_000_000_000;
    let rate = |direction: &str| {
        let name = format!("kubernetes.io/{direction}-bandwidth");
        let Some(text) = pod.metadata.annotations.as_ref().and_then(|all| all.get(&name)) else { return Ok(None) };
        match quantity::value(&Quantity(text.clone())) {
            Ok(rate) if RANGE.contains(&rate) => Ok(u64::try_from(rate).ok()),
            Ok(_) => Err(format!("annotation {name}: {text:?} must be between 1k and 1P (bit/s)")),
            Err(error) => Err(format!("annotation {name}: {error}")),
        }
    };
    Ok(Bandwidth { ingress: rate("ingress")?, egress: rate("egress")? })
}

/// The Pod's shared memory: 64 MiB, as every CRI runtime gives.
fn mount_shm(path: &Path) -> io::Result<()> {
    if is_mount_point(path)? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(Some("shm"), path, Some("tmpfs"), flags, Some("mode=1777,size=65536k"))?)
}

fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_read_from_annotations() {
        let pod = |ingress: &str| {
            let mut pod = Pod::default();
            let name = "kubernetes.io/ingress-bandwidth".to_owned();
            pod.metadata.annotations = Some([(name, ingress.to_owned())].into());
            pod
        };
        assert_eq!(bandwidth(&pod("10M")).unwrap(), Bandwidth { ingress: Some(10_000_000), egress: None });
        assert_eq!(bandwidth(&Pod::default()).unwrap(), Bandwidth::default());
        for wrong in ["10", "2000P", "fast"] {
            let error = bandwidth(&pod(wrong)).unwrap_err();
            assert!(error.contains("kubernetes.io/ingress-bandwidth") && error.contains(wrong), "{error}");
        }
    }
}
