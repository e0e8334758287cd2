//! Starting and signalling one container: image, environment, bundle, shim.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use oci_spec::runtime::LinuxDevice;
use tokio::sync::broadcast;

use super::devices::Equipment;
use super::node::{Node, blocking};
use super::sandbox::{INSTANCE_FILE, PodDir};
use super::{logs, termination};
use crate::image::{Image, ImageError, Keyring, Reference, mount_rootfs, unmount_rootfs};
use crate::pod::effects::{Failure, Outcome, Request};
use crate::pod::env::{EnvSources, expand_all, make_environment};
use crate::pod::model::{ContainerSpec, Desired, Exit, Instance};
use crate::resources::limits::container_limits;
use crate::runtime::client::{CreateRequest, Shim, ShimError, ShimEvent};
use crate::runtime::spec::{self, ContainerInput, Namespaces, UserFiles};
use crate::shim::bundle::{Access, BindMount, SETUP_FILE};
use crate::volume::{MountedVolumes, container_mounts, remove_tree};

/// How long a killed process may take to end.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Why a container did not start; with an exit if there is an instance that could not be executed.
enum StartFailure {
    Failed(Failure),
    NotExecuted(Box<Instance>),
    Cancelled,
}

impl From<Failure> for StartFailure {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn config_error(error: impl std::fmt::Display) -> Failure {
    Failure::new("CreateContainerConfigError", error.to_string())
}

fn create_error(error: impl std::fmt::Display) -> Failure {
    Failure::new("CreateContainerError", error.to_string())
}

/// What a container is made from.
struct Material {
    id: String,
    attempt: u32,
    image: Image,
    env: BTreeMap<String, String>,
    mounts: Vec<BindMount>,
    equipment: Equipment,
}

impl Node {
    /// Starts the next instance of a container.
    pub(super) async fn start_container(self: &Arc<Self>, request: &Request, name: &str) -> Outcome {
        let Some(spec) = request.desired.container(name).cloned() else {
            return Outcome::Failed(Failure::new(
                "CreateContainerConfigError",
                format!("container {name} is not in the Pod"),
            ));
        };
        match self.try_start(request, &spec).await {
            Ok(instance) => {
                self.container_event(&request.desired, name, false, "Started", "Container started".to_owned());
                Outcome::Started(Box::new(instance))
            }
            Err(StartFailure::Cancelled) => Outcome::Cancelled,
            Err(StartFailure::Failed(failure)) => Outcome::Failed(failure),
            Err(StartFailure::NotExecuted(instance)) => {
                let message = instance.exit.as_ref().map(|exit| exit.message.clone()).unwrap_or_default();
                self.container_event(&request.desired, name, true, "Failed", format!("Error: {message}"));
                Outcome::StartError(instance)
            }
        }
    }

    async fn try_start(self: &Arc<Self>, request: &Request, spec: &ContainerSpec) -> Result<Instance, StartFailure> {
        let desired = &request.desired;
        let image = tokio::select! {
            image = self.ensure_image(desired, spec) => image?,
            () = request.cancel.cancelled() => return Err(StartFailure::Cancelled),
        };
        let shim = self.shim(desired.uid()).ok_or_else(|| create_error("the Pod's shim is not there"))?;
        let facts = request.observed.containers.get(spec.name()).cloned().unwrap_or_default();
        self.remove_dead(request, spec.name(), &shim, facts.next_attempt).await.map_err(create_error)?;
        let context = self.field_context(&request.observed);
        let volumes = self.volumes.mount(&desired.pod, &context).await.map_err(config_error)?;
        let mut equipment = tokio::select! {
            equipment = self.equip(&desired.pod, &spec.container) => equipment?,
            () = request.cancel.cancelled() => return Err(StartFailure::Cancelled),
        };
        let own = self.environment(request, spec, &volumes).await?;
        let mounts = mounts(spec, volumes, &own).await?;
        let mut env = std::mem::take(&mut equipment.env);
        env.extend(own);
        let material = Material { id: new_id(), attempt: facts.next_attempt, image, env, mounts, equipment };
        if request.cancel.is_cancelled() {
            return Err(StartFailure::Cancelled);
        }
        let namespaces = self.namespaces(request, spec, &shim).await?;
        self.create_and_start(request, spec, material, namespaces, &shim).await
    }

    async fn create_and_start(
        self: &Arc<Self>,
        request: &Request,
        spec: &ContainerSpec,
        material: Material,
        namespaces: Namespaces,
        shim: &Shim,
    ) -> Result<Instance, StartFailure> {
        let desired = &request.desired;
        let dir = self.pod_dir(desired.uid());
        let container_dir = dir.container(&material.id);
        let cgroup_path = self.cgroups.container_path(&desired.pod, &material.id);
        let log_path = self.log_dir(&desired.pod).join(spec.name()).join(format!("{}.log", material.attempt));
        let mut instance = Instance {
            id: material.id.clone(),
            attempt: material.attempt,
            requested_image: spec.image().to_owned(),
            image: material.image.name.clone(),
            image_id: material.image.repo_digest.clone(),
            started_at: None,
            post_started: false,
            stop: None,
            exit: None,
            user: None,
            resources: Some(spec.size),
            resizing: false,
        };
        let (node, pod, owned_spec, draft) = (self.clone(), desired.pod.clone(), spec.clone(), instance.clone());
        let (owned_cgroup, owned_log) = (cgroup_path.clone(), log_path.clone());
        let identity = tokio::task::spawn_blocking(move || {
            node.write_bundle(&pod, &owned_spec, &material, &namespaces, &draft, &dir, &owned_cgroup, &owned_log)
        })
        .await
        .map_err(create_error)??;
        instance.user = Some((
            i64::from(identity.uid),
            i64::from(identity.gid),
            identity.groups.iter().map(|group| i64::from(*group)).collect(),
        ));
        let config = &self.config.kubelet;
        let create = CreateRequest {
            container_id: instance.id.clone(),
            name: spec.name().to_owned(),
            attempt: instance.attempt,
            container_dir,
            cgroup_path: cgroup_path.into(),
            log_path,
            max_log_size: crate::resources::quantity::nanos(&config.container_log_max_size)
                .map_or(10 << 20, |nanos| u64::try_from(nanos / 1_000_000_000).unwrap_or(10 << 20)),
            max_log_files: u32::try_from(config.container_log_max_files).unwrap_or(5),
            stdin: spec.container.stdin == Some(true),
            stdin_once: spec.container.stdin_once == Some(true),
            terminal: spec.container.tty == Some(true),
            timeout_ms: None,
        };
        shim.create(create).await.map_err(create_error)?;
        self.container_event(desired, spec.name(), false, "Created", "Container created".to_owned());
        match shim.start(&instance.id).await {
            Ok(started) => {
                instance.started_at = Some(started.started_at);
                Ok(instance)
            }
            Err(ShimError::Start(message)) => {
                instance.exit = Some(Exit {
                    id: instance.id.clone(),
                    code: 128,
                    signal: 0,
                    reason: "StartError".to_owned(),
                    message: format!("failed to start container {:?}: {message}", spec.name()),
                    started_at: None,
                    finished_at: Some(jiff::Timestamp::now()),
                });
                Err(StartFailure::NotExecuted(Box::new(instance)))
            }
            Err(error) => Err(Failure::new("RunContainerError", error.to_string()).into()),
        }
    }

    /// Everything on disk that the shim needs to make the container. Blocking.
    #[allow(clippy::too_many_arguments, reason = "the parts of one bundle; a struct would only rename them")]
    fn write_bundle(
        &self,
        pod: &Pod,
        spec: &ContainerSpec,
        material: &Material,
        namespaces: &Namespaces,
        instance: &Instance,
        dir: &PodDir,
        cgroup_path: &str,
        log_path: &Path,
    ) -> Result<spec::Identity, Failure> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let container_dir = dir.container(&material.id);
        let rootfs = container_dir.join("rootfs");
        let made = || -> Result<(), std::io::Error> {
            fs::create_dir_all(&rootfs)?;
            fs::write(container_dir.join(termination::MESSAGE_FILE), "")?;
            set_mode(&container_dir.join(termination::MESSAGE_FILE), 0o666)?;
            fs::write(container_dir.join(INSTANCE_FILE), serde_json::to_vec(instance)?)?;
            if let Some(parent) = log_path.parent() {
                fs::create_dir_all(parent)?;
            }
            Ok(())
        };
        made().map_err(|error| create_error(format!("prepare {}: {error}", container_dir.display())))?;
        let writable = self.writable_dir(uid).join(&material.id);
        mount_rootfs(&material.image, &writable, &rootfs).map_err(create_error)?;
        let users =
            UserFiles::read(&rootfs).map_err(|error| create_error(format!("read the image's users: {error}")))?;
        let command = expand_all(spec.container.command.as_deref().unwrap_or_default(), &material.env);
        let args = expand_all(spec.container.args.as_deref().unwrap_or_default(), &material.env);
        let equipment = &material.equipment;
        let mut env: Vec<(String, String)> = material.env.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        env.extend(equipment.cdi_env.iter().cloned());
        let hostname = fs::read_to_string(dir.hostname()).unwrap_or_default();
        let privileged = spec.container.security_context.as_ref().is_some_and(|s| s.privileged == Some(true));
        let host_devices: Vec<LinuxDevice> = if privileged {
            spec::host_devices().map_err(|error| create_error(format!("list the node's devices: {error}")))?
        } else {
            Vec::new()
        };
        let mut mounts = self.own_mounts(pod, &spec.container, dir, &container_dir);
        mounts.extend(equipment.mounts.iter().cloned());
        let elsewhere: Vec<_> = equipment.grants.iter().filter(|grant| !grant.is_in_dev()).collect();
        let nodes = writable.join("devices");
        mounts.extend(elsewhere.iter().enumerate().map(|(index, grant)| BindMount {
            source: nodes.join(index.to_string()),
            sub_path: None,
            destination: grant.device.path().clone(),
            access: Access::ReadWrite,
            propagation: crate::shim::bundle::Propagation::Private,
        }));
        // the Pod's own mounts come last: one of them may hide a file of the node's on purpose
        mounts.extend(material.mounts.iter().cloned());
        let bundle = spec::build(&ContainerInput {
            pod,
            container: &spec.container,
            image: &material.image.config,
            command: &command,
            args: &args,
            env: &env,
            mounts: &mounts,
            namespaces,
            rootfs: &rootfs,
            shm: &dir.shm(),
            cgroup_path,
            hostname: hostname.trim(),
            limits: &container_limits(pod, &spec.container, self.cgroups.policy(), false),
            devices: &equipment.grants,
            device_mounts: &equipment.cdi_mounts,
            annotations: &equipment.annotations,
            host_devices: &host_devices,
            volume_groups: &equipment.groups,
            users: &users,
            node: &self.traits,
        })
        .map_err(|error| Failure::new(error.reason(), error.to_string()))?;
        let written = || -> Result<(), std::io::Error> {
            if !elsewhere.is_empty() {
                fs::create_dir_all(&nodes)?;
            }
            for (index, grant) in elsewhere.iter().enumerate() {
                grant.make_at(&nodes.join(index.to_string()), bundle.identity.uid, bundle.identity.gid)?;
            }
            fs::write(container_dir.join("config.json"), serde_json::to_vec(&bundle.spec)?)?;
            fs::write(container_dir.join(SETUP_FILE), serde_json::to_vec(&bundle.setup)?)?;
            logs::link(&self.config.paths.container_logs_dir, pod, spec.name(), &material.id, log_path)
        };
        written().map_err(|error| create_error(format!("write the bundle: {error}")))?;
        Ok(bundle.identity)
    }

    /// The files that the node gives to every container: hosts, resolver, host name, termination message.
    fn own_mounts(&self, pod: &Pod, container: &Container, dir: &PodDir, container_dir: &Path) -> Vec<BindMount> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let taken = |path: &str| container.volume_mounts.iter().flatten().any(|mount| mount.mount_path == path);
        let bind = |source: std::path::PathBuf, destination: &str| BindMount {
            source,
            sub_path: None,
            destination: destination.into(),
            access: Access::ReadWrite,
            propagation: crate::shim::bundle::Propagation::Private,
        };
        let mut mounts = vec![bind(dir.resolv_conf(), "/etc/resolv.conf"), bind(dir.hostname(), "/etc/hostname")];
        if !taken("/etc/hosts") {
            mounts.push(bind(self.kubelet_dir(uid).join("etc-hosts"), "/etc/hosts"));
        }
        mounts.retain(|mount| mount.destination.to_str().is_none_or(|path| !taken(path)));
        let path = container.termination_message_path.as_deref().filter(|path| !path.is_empty());
        if let Some(path) = path.or(Some("/dev/termination-log")) {
            mounts.push(bind(container_dir.join(termination::MESSAGE_FILE), path));
        }
        mounts
    }

    async fn environment(
        &self,
        request: &Request,
        spec: &ContainerSpec,
        volumes: &MountedVolumes,
    ) -> Result<BTreeMap<String, String>, Failure> {
        let context = self.field_context(&request.observed);
        let volume_path = |name: &str| volumes.get(name).map(|volume| volume.path.clone());
        let sources = EnvSources { objects: &self.objects, services: &self.services, volume_path: &volume_path };
        make_environment(&request.desired.pod, (&spec.container).into(), &context, sources).await.map_err(config_error)
    }

    async fn namespaces(&self, request: &Request, spec: &ContainerSpec, shim: &Shim) -> Result<Namespaces, Failure> {
        let desired = &request.desired;
        let network =
            self.network.lookup(desired.uid()).ok_or_else(|| create_error("the Pod's network is not there"))?;
        let pod_spec = desired.pod.spec.as_ref();
        let mut pid = None;
        if pod_spec.and_then(|s| s.share_process_namespace) == Some(true) {
            pid = Some(shim.pid_namespace().await.map_err(create_error)?);
        } else if let Some(target) = &spec.target {
            let instance = request.observed.containers.get(target).and_then(|facts| facts.current.as_ref());
            let id = instance.filter(|i| i.is_running()).map(|i| i.id.clone());
            let records = shim.state().await.map_err(create_error)?;
            let record = records.iter().find(|record| Some(&record.request.container_id) == id.as_ref());
            let process = record
                .and_then(|record| record.pid)
                .ok_or_else(|| config_error(format!("unable to find target container {target:?}: it does not run")))?;
            pid = Some(format!("/proc/{process}/ns/pid").into());
        }
        Ok(Namespaces { network: network.net_ns, ipc: network.ipc_ns, uts: network.uts_ns, pid })
    }

    /// Removes what earlier instances of a container left, except the log of the last one.
    async fn remove_dead(&self, request: &Request, name: &str, shim: &Shim, next_attempt: u32) -> Result<(), String> {
        let uid = request.desired.uid();
        let mut events = shim.events();
        let records = shim.state().await.map_err(|error| error.to_string())?;
        for record in records.into_iter().filter(|record| record.request.name == name) {
            let id = record.request.container_id;
            if record.exit.is_none() {
                // created by a life of the agent that did not come to start it
                shim.signal(&id, nix::libc::SIGKILL, true).await.map_err(|error| error.to_string())?;
                tokio::time::timeout(END_DEADLINE, ended(&mut events, &id))
                    .await
                    .map_err(|_| format!("container {id}, which was never started, does not end"))?;
            }
            shim.remove(&id).await.map_err(|error| format!("remove the last instance: {error}"))?;
            let (dir, writable) = (self.pod_dir(uid).container(&id), self.writable_dir(uid).join(&id));
            blocking(move || -> Result<(), String> {
                unmount_rootfs(&dir.join("rootfs")).map_err(|error| error.to_string())?;
                remove_tree(&dir).map_err(|error| error.to_string())?;
                remove_tree(&writable).map_err(|error| error.to_string())
            })
            .await?;
        }
        let log_dir = self.log_dir(&request.desired.pod).join(name);
        let links = self.config.paths.container_logs_dir.clone();
        blocking(move || {
            if next_attempt > 0 && log_dir.exists() {
                logs::remove_links(&links, &log_dir)?;
                logs::remove_old(&log_dir, next_attempt)?;
            }
            Ok::<(), std::io::Error>(())
        })
        .await
    }

    /// The image, pulled if the policy asks for it (`EnsureImageExists` in kubelet's `image_manager.go`).
    async fn ensure_image(&self, desired: &Desired, spec: &ContainerSpec) -> Result<Image, Failure> {
        let requested = spec.image();
        let event = |warning: bool, reason: &str, message: String| {
            self.container_event(desired, spec.name(), warning, reason, message);
        };
        let failed = |error: ImageError| {
            event(true, "Failed", format!("Failed to pull image {requested:?}: {error}"));
            Failure::new(error.reason(), error.to_string())
        };
        let present = self.images.resolve(requested).map_err(|error| {
            event(true, "InspectFailed", error.to_string());
            Failure::new(error.reason(), error.to_string())
        })?;
        let policy = spec.container.image_pull_policy.as_deref().unwrap_or(default_policy(requested));
        match (policy, present) {
            ("Never", None) => {
                let message = format!("Container image {requested:?} is not present with pull policy of Never");
                event(true, "ErrImageNeverPull", message.clone());
                return Err(Failure::new("ErrImageNeverPull", message));
            }
            ("Never" | "IfNotPresent", Some(image)) => {
                event(
                    false,
                    "Pulled",
                    format!("Container image {requested:?} already present on machine and can be accessed by the pod"),
                );
                return Ok(image);
            }
            _ => {}
        }
        event(false, "Pulling", format!("Pulling image {requested:?}"));
        let reference: Reference = requested.parse().map_err(failed)?;
        let keyring = self.pull_secrets(&desired.pod).await;
        let (progress, _shown) = self.pulls.begin(desired.uid(), spec.name(), requested);
        let pulled = self.images.pull(requested, &keyring.lookup(&reference), Some(progress)).await.map_err(failed)?;
        let took = format!("{:.3}s", pulled.duration.as_secs_f64());
        event(
            false,
            "Pulled",
            format!(
                "Successfully pulled image {requested:?} in {took} ({took} including waiting). Image size: {} bytes.",
                pulled.image.size
            ),
        );
        Ok(pulled.image)
    }

    /// The Pod's `imagePullSecrets`, before the node's own credentials. One that cannot be read is passed over, as
    /// kubelet does: the pull says whether it was needed.
    async fn pull_secrets(&self, pod: &Pod) -> Keyring {
        let mut keyring = Keyring::new();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let references = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
        for reference in references.filter(|reference| !reference.name.is_empty()) {
            let name = &reference.name;
            let added = match self.objects.secret(namespace, name).await {
                Ok(secret) => match (secret.data.get(".dockerconfigjson"), secret.data.get(".dockercfg")) {
                    (Some(json), _) => keyring.add_docker_config_json(name, json).map_err(|error| error.to_string()),
                    (None, Some(json)) => keyring.add_dockercfg(name, json).map_err(|error| error.to_string()),
                    (None, None) => Err("it has neither .dockerconfigjson nor .dockercfg".to_owned()),
                },
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = added {
                let message = format!("Unable to retrieve image pull secret {namespace}/{name}: {error}");
                tracing::warn!(pod = pod.metadata.uid, "{message}");
            }
        }
        keyring.extend(self.keyring.clone());
        keyring
    }

    /// Sends the stop signal, or KILL to everything in the container.
    pub(super) async fn signal(&self, request: &Request, name: &str, kill: bool) -> Result<(), Failure> {
        let instance = request.observed.containers.get(name).and_then(|facts| facts.current.as_ref());
        let (Some(instance), Some(shim)) = (instance, self.shim(request.desired.uid())) else { return Ok(()) };
        let signal = if kill { nix::libc::SIGKILL } else { self.stop_signal(&request.desired, name, instance) };
        match shim.signal(&instance.id, signal, kill).await {
            Ok(()) | Err(ShimError::NotFound(_) | ShimError::Conflict(_) | ShimError::Disconnected) => Ok(()),
            Err(error) => Err(Failure::new("FailedKillPod", error.to_string())),
        }
    }

    /// `lifecycle.stopSignal`, then the image's `StopSignal`, then TERM.
    fn stop_signal(&self, desired: &Desired, name: &str, instance: &Instance) -> i32 {
        let own = desired.container(name).and_then(|spec| spec.container.lifecycle.as_ref()?.stop_signal.clone());
        let image = || {
            let image = self.images.resolve(&instance.image_id).ok().flatten()?;
            image.config.config().as_ref()?.stop_signal().clone()
        };
        own.or_else(image).and_then(|text| parse_signal(&text)).unwrap_or(nix::libc::SIGTERM)
    }
}

/// The Pod's volumes as mounts of this container; makes missing `subPath` directories.
async fn mounts(
    spec: &ContainerSpec,
    volumes: MountedVolumes,
    env: &BTreeMap<String, String>,
) -> Result<Vec<BindMount>, Failure> {
    let (container, env) = (spec.container.clone(), env.clone());
    blocking(move || {
        container_mounts(&container.name, container.volume_mounts.as_deref().unwrap_or_default(), &volumes, &env)
    })
    .await
    .map_err(config_error)
}

/// Waits until the shim tells of a container's end, or is gone.
async fn ended(events: &mut broadcast::Receiver<ShimEvent>, id: &str) {
    loop {
        match events.recv().await {
            Ok(ShimEvent::Exited(record)) if record.request.container_id == id => return,
            Ok(ShimEvent::Disconnected) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

fn parse_signal(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = if text.starts_with("SIG") { text.to_owned() } else { format!("SIG{text}") };
    if let Some(offset) = name.strip_prefix("SIGRTMIN+") {
        return offset.parse().ok().filter(|n| (0..=30).contains(n)).map(|n: i32| 34 + n);
    }
    name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

/// `Always` for `:latest` or no tag, otherwise `IfNotPresent`; the API server sets it, static manifests may not.
pub(super) fn default_policy(image: &str) -> &'static str {
    let last = image.rsplit('/').next().unwrap_or(image);
    let latest = !image.contains('@') && (!last.contains(':') || last.ends_with(":latest"));
    if latest { "Always" } else { "IfNotPresent" }
}

/// 64 hexadecimal digits.
fn new_id() -> String {
    let words: [u128; 2] = [uuid::Uuid::new_v4().as_u128(), uuid::Uuid::new_v4().as_u128()];
    format!("{:032x}{:032x}", words[0], words[1])
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for (text, number) in [("SIGTERM", 15), ("QUIT", 3), ("9", 9), ("SIGRTMIN+3", 37)] {
            assert_eq!(parse_signal(text), Some(number), "{text}");
        }
        for text in ["", "SIGFOO", "0", "65", "SIGRTMIN+31"] {
            assert_eq!(parse_signal(text), None, "{text}");
        }
    }

    #[test]
    fn pull_policy_by_tag() {
        for (image, policy) in [
            ("busybox", "Always"),
            ("host:5000/busybox", "Always"),
            ("busybox:latest", "Always"),
            ("busybox:1.37", "IfNotPresent"),
            ("busybox@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(default_policy(image), policy, "{image}");
        }
    }
}
