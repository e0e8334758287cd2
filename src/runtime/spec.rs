//! One container of a Pod as an OCI runtime configuration and the [`Setup`] that goes with it.
//!
//! What a kubelet and containerd decide between them is decided here: who the process runs as, what it may do, what
//! it sees. Sources: `pkg/kubelet/kuberuntime/{kuberuntime_container_linux,security_context}.go`,
//! `pkg/securitycontext`, and the OCI runtime specification. The configuration keeps the rules that go around
//! libcontainer's bugs (`docs/upstream.md`): no seccomp, no `noNewPrivileges`, two capabilities lent; the
//! rest is in [`Setup`] and is applied by the executor.

mod apparmor;
mod capabilities;
mod devices;
mod error;
mod mounts;
mod node;
mod process;
mod resources;
pub mod seccomp;
mod user;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, SecurityContext};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Mount, Root, Spec,
};

use crate::resources::limits::Limits;
use crate::shim::bundle::{BindMount, Setup};

pub use devices::{DeviceGrant, DeviceGrantError, device_at, host_devices};
pub use error::SpecError;
pub use node::NodeTraits;
pub use process::{ExecOptions, exec_process};
pub use user::{Identity, UserFiles};

/// Everything that one container's configuration follows from.
#[derive(Clone, Copy, Debug)]
pub struct ContainerInput<'a> {
    /// The Pod.
    pub pod: &'a Pod,
    /// The container; an ephemeral one is converted to this type.
    pub container: &'a Container,
    /// The configuration of its image.
    pub image: &'a ImageConfiguration,
    /// `command` with its variables expanded; empty takes the image's entrypoint.
    pub command: &'a [String],
    /// `args` with their variables expanded; empty takes the image's, unless there is a `command`.
    pub args: &'a [String],
    /// The Pod's variables in order, later ones win; they override the image's.
    pub env: &'a [(String, String)],
    /// Volumes, devices' mounts, the termination log and the node's files, in the order in which they are mounted.
    pub mounts: &'a [BindMount],
    /// Namespaces of the Pod to join.
    pub namespaces: &'a Namespaces,
    /// The container's root file system on the node.
    pub rootfs: &'a Path,
    /// The Pod's shared memory, a tmpfs on the node that all its containers see at `/dev/shm`.
    pub shm: &'a Path,
    /// The container's cgroup within the hierarchies, absolute
    /// ([`crate::resources::cgroup::CgroupTree::container_path`]).
    pub cgroup_path: &'a str,
    /// The Pod's hostname; the node's for Pods on the host's network.
    pub hostname: &'a str,
    /// Kernel limits ([`crate::resources::limits::container_limits`]).
    pub limits: &'a Limits,
    /// Devices that plugins have allocated, or CDI describes.
    pub devices: &'a [DeviceGrant],
    /// Mounts that CDI describes.
    pub device_mounts: &'a [Mount],
    /// Annotations that plugins ask for.
    pub annotations: &'a BTreeMap<String, String>,
    /// The node's devices ([`host_devices`]), all of which a privileged container gets; unused for others.
    pub host_devices: &'a [LinuxDevice],
    /// Supplementary groups that volumes ask for (annotation `pv.beta.kubernetes.io/gid`).
    pub volume_groups: &'a [i64],
    /// `/etc/passwd` and `/etc/group` of the image.
    pub users: &'a UserFiles,
    /// What the node offers and how it is configured.
    pub node: &'a NodeTraits,
}

/// Paths of namespaces to join. Where there is none, the container gets the node's namespace if the Pod asks for
/// that (`hostNetwork`, `hostIPC`, `hostPID`), and a new one otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Network.
    pub network: Option<PathBuf>,
    /// System V and POSIX message queues, shared memory.
    pub ipc: Option<PathBuf>,
    /// Host name.
    pub uts: Option<PathBuf>,
    /// Processes: the Pod's with `shareProcessNamespace`, another container's for an ephemeral container's target.
    pub pid: Option<PathBuf>,
}

/// A container's bundle, and who it turned out to run as (`containerStatuses[].user.linux`).
#[derive(Clone, Debug)]
pub struct Bundle {
    /// `config.json`.
    pub spec: Spec,
    /// `setup.json`.
    pub setup: Setup,
    /// User and groups of the first process.
    pub identity: Identity,
}

/// Builds a container's configuration. Reads nothing but the seccomp profile, if the Pod names one of the node's.
pub fn build(input: &ContainerInput<'_>) -> Result<Bundle, SpecError> {
    let pod = input.pod.spec.as_ref().ok_or(SpecError::NoSpec)?;
    refuse_unsupported(input, pod)?;
    let security = Security::of(pod, input.container);
    let identity = user::resolve(input, pod, &security)?;
    let wanted = capabilities::wanted(&security, &input.node.capabilities);
    let seccomp = seccomp::profile(pod, &security, &wanted, input.node)?;

    let mut spec = Spec::default();
    let mut root = Root::default();
    root.set_path(input.rootfs.to_owned());
    root.set_readonly(Some(security.read_only_root));
    spec.set_version("1.2.0".to_owned());
    spec.set_root(Some(root));
    let mut mounts = mounts::default_mounts(input, pod, &security)?;
    mounts.extend_from_slice(input.device_mounts);
    spec.set_mounts(Some(mounts));
    spec.set_process(Some(process::process(input, &security, &identity, &wanted)?));
    spec.set_hostname(None);
    if input.namespaces.uts.is_none() && !host(pod.host_network) {
        spec.set_hostname(Some(input.hostname.to_owned()));
    }
    spec.set_annotations(Some(annotations(input)));
    spec.set_linux(Some(linux(input, pod, &security, &identity)?));

    let setup = Setup {
        capabilities: capabilities::sets(&wanted),
        no_new_privs: security.no_new_privileges,
        seccomp,
        mounts: input.mounts.to_vec(),
    };
    Ok(Bundle { spec, setup, identity })
}

fn host(flag: Option<bool>) -> bool {
    flag == Some(true)
}

fn refuse_unsupported(input: &ContainerInput<'_>, pod: &PodSpec) -> Result<(), SpecError> {
    if !input.cgroup_path.starts_with('/') || input.cgroup_path.len() < 2 {
        return Err(SpecError::CgroupPath(input.cgroup_path.to_owned()));
    }
    if pod.host_users == Some(false) {
        return Err(SpecError::Unsupported {
            field: "spec.hostUsers",
            value: "false".to_owned(),
            remedy: "remove the field: this node has no user namespaces for Pods",
        });
    }
    let pod_selinux = pod.security_context.as_ref().and_then(|s| s.se_linux_options.as_ref());
    let own_selinux = input.container.security_context.as_ref().and_then(|s| s.se_linux_options.as_ref());
    if input.node.selinux && pod_selinux.or(own_selinux).is_some() {
        return Err(SpecError::Unsupported {
            field: "securityContext.seLinuxOptions",
            value: "set".to_owned(),
            remedy: "remove the field: this node cannot label processes",
        });
    }
    Ok(())
}

/// The security context in force: the container's fields before the Pod's
/// (`securitycontext.DetermineEffectiveSecurityContext`).
#[derive(Clone, Debug)]
struct Security<'a> {
    container: Option<&'a SecurityContext>,
    run_as_user: Option<i64>,
    run_as_group: Option<i64>,
    run_as_non_root: bool,
    privileged: bool,
    read_only_root: bool,
    no_new_privileges: bool,
    unmasked_proc: bool,
}

impl<'a> Security<'a> {
    fn of(pod: &'a PodSpec, container: &'a Container) -> Self {
        let own = container.security_context.as_ref();
        let pod = pod.security_context.as_ref();
        Self {
            container: own,
            run_as_user: own.and_then(|s| s.run_as_user).or(pod.and_then(|s| s.run_as_user)),
            run_as_group: own.and_then(|s| s.run_as_group).or(pod.and_then(|s| s.run_as_group)),
            run_as_non_root: own.and_then(|s| s.run_as_non_root).or(pod.and_then(|s| s.run_as_non_root)) == Some(true),
            privileged: own.is_some_and(|s| s.privileged == Some(true)),
            read_only_root: own.is_some_and(|s| s.read_only_root_filesystem == Some(true)),
            no_new_privileges: own.is_some_and(|s| s.allow_privilege_escalation == Some(false)),
            unmasked_proc: own.is_some_and(|s| s.proc_mount.as_deref() == Some("Unmasked")),
        }
    }
}

/// What log collectors and debuggers find in a bundle, with the names that containerd uses.
fn annotations(input: &ContainerInput<'_>) -> HashMap<String, String> {
    let meta = &input.pod.metadata;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let own = [
        ("io.kubernetes.cri.container-name", input.container.name.clone()),
        ("io.kubernetes.cri.container-type", "container".to_owned()),
        ("io.kubernetes.cri.sandbox-name", text(&meta.name)),
        ("io.kubernetes.cri.sandbox-namespace", text(&meta.namespace)),
        ("io.kubernetes.cri.sandbox-uid", text(&meta.uid)),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value));
    input.annotations.clone().into_iter().chain(own).collect()
}

fn linux(
    input: &ContainerInput<'_>,
    pod: &PodSpec,
    security: &Security<'_>,
    identity: &Identity,
) -> Result<Linux, SpecError> {
    let mut linux = Linux::default();
    let hidden = !security.privileged && !security.unmasked_proc;
    let paths = |list: &[String]| Some(if hidden { list.to_vec() } else { Vec::new() });
    linux.set_masked_paths(paths(&input.node.masked_paths));
    linux.set_readonly_paths(paths(&input.node.read_only_paths));
    linux.set_cgroups_path(Some(PathBuf::from(input.cgroup_path)));
    linux.set_namespaces(Some(namespaces(input, pod, security)));
    linux.set_devices(Some(devices::nodes(input, security, identity)));
    let mut resources = resources::to_oci(input.limits);
    resources.set_devices(Some(devices::rules(input, security)));
    linux.set_resources(Some(resources));
    linux.set_sysctl(sysctls(pod)?);
    Ok(linux)
}

fn namespace(typ: LinuxNamespaceType, path: Option<&PathBuf>) -> Result<LinuxNamespace, SpecError> {
    let mut builder = LinuxNamespaceBuilder::default().typ(typ);
    if let Some(path) = path {
        builder = builder.path(path.clone());
    }
    Ok(builder.build()?)
}

fn namespaces(input: &ContainerInput<'_>, pod: &PodSpec, security: &Security<'_>) -> Vec<LinuxNamespace> {
    use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    let paths = input.namespaces;
    let network = host(pod.host_network);
    let mut wanted = vec![(Mount, None, false)];
    wanted.push((Network, paths.network.as_ref(), network));
    wanted.push((Uts, paths.uts.as_ref(), network));
    wanted.push((Ipc, paths.ipc.as_ref(), host(pod.host_ipc)));
    wanted.push((Pid, paths.pid.as_ref(), host(pod.host_pid)));
    // hides the rest of the hierarchy; a privileged container sees all of it
    wanted.push((Cgroup, None, security.privileged || !input.node.cgroup_v2));
    let own = wanted.into_iter().filter(|(_, path, of_host)| path.is_some() || !of_host);
    own.filter_map(|(typ, path, _)| namespace(typ, path).ok()).collect()
}

/// The Pod's sysctls. Every container of the Pod writes them to the namespaces that they share.
fn sysctls(pod: &PodSpec) -> Result<Option<HashMap<String, String>>, SpecError> {
    let mut result = HashMap::new();
    for sysctl in pod.security_context.iter().flat_map(|s| s.sysctls.iter().flatten()) {
        // libcontainer takes every dot for a separator
        if sysctl.name.contains('/') && sysctl.name.contains('.') {
            return Err(SpecError::Unsupported {
                field: "spec.securityContext.sysctls[].name",
                value: sysctl.name.clone(),
                remedy: "set it on the node: names with dots between slashes cannot be set for a Pod here",
            });
        }
        result.insert(sysctl.name.replace('/', "."), sysctl.value.clone());
    }
    Ok((!result.is_empty()).then_some(result))
}

#[cfg(test)]
mod tests;
