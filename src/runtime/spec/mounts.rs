//! File systems that every container has.
//!
//! Source: containerd's default mounts for Pods. The Pod's own volumes are in [`crate::shim::bundle::Setup`] and
//! are mounted after these, so that a volume at the same path covers them.

use std::path::Path;

use k8s_openapi::api::core::v1::PodSpec;
use oci_spec::runtime::{Mount, MountBuilder};

use super::{ContainerInput, Security, SpecError, host};

const HARDENED: [&str; 3] = ["nosuid", "noexec", "nodev"];

pub(super) fn default_mounts(
    input: &ContainerInput<'_>,
    pod: &PodSpec,
    security: &Security<'_>,
) -> Result<Vec<Mount>, SpecError> {
    let access = if security.privileged { "rw" } else { "ro" };
    let shm = if host(pod.host_ipc) { Path::new("/dev/shm") } else { input.shm };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &[])?,
        mount("/dev", "tmpfs", "tmpfs", &["strictatime", "mode=755", "size=65536k"])?,
        mount("/dev/pts", "devpts", "devpts", &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &[])?,
        mount("/sys", "sysfs", "sysfs", &[access])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["relatime", access])?,
    ];
    let shm_options = ["rbind", "rw"].into_iter().chain(HARDENED).map(str::to_owned).collect::<Vec<_>>();
    let shm = MountBuilder::default().destination("/dev/shm").typ("bind").source(shm).options(shm_options).build()?;
    mounts.push(shm);
    Ok(mounts)
}

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Result<Mount, SpecError> {
    // devices and terminals are what these two are for
    let hardening = HARDENED.iter().filter(|option| match destination {
        "/dev" => **option == "nosuid",
        "/dev/pts" => **option != "nodev",
        _ => true,
    });
    let options: Vec<String> = hardening.chain(options).map(|option| (*option).to_owned()).collect();
    Ok(MountBuilder::default().destination(destination).typ(typ).source(source).options(options).build()?)
}
