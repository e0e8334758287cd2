//! What the node and its Pods use, for `/stats/summary`, `/metrics/resource` and `/metrics`: read when asked for.

use std::path::Path;

use jiff::Timestamp;

use super::node::Node;
use super::pods::PodView;
use crate::pod::status::api_time;
use crate::resources::cgroup::CgroupError;
use crate::resources::stats::{self as read, CgroupStats, Psi, PsiLine};
use crate::server::api::MetricsEndpoint;
use crate::server::exposition::{Exposition, Kind};
use crate::server::summary::{
    ContainerStats, CpuStats, FsStats, MemoryStats, NodeStats, PodReference, PodStats, ProcessStats, PsiData, PsiStats,
    RuntimeStats, Summary, SwapStats,
};

/// Statistics of the node and its Pods. Blocking: cgroup files and file systems are read.
pub(super) fn summary(node: &Node, only_cpu_and_memory: bool) -> Result<Summary, CgroupError> {
    let whole = read::node(node.cgroups.hierarchy())?;
    let fs = |path: &Path| (!only_cpu_and_memory).then(|| read::filesystem(path).ok().map(|fs| fs_stats(&fs))).flatten();
    let image_fs = fs(&node.config.paths.data_dir);
    Ok(Summary {
        node: NodeStats {
            node_name: node.config.node_name.clone(),
            system_containers: Vec::new(),
            start_time: api_time(boot_time()),
            cpu: Some(cpu(&whole)),
            memory: Some(memory(&whole)),
            io: None,
            network: None,
            fs: fs(&node.config.paths.root_dir),
            runtime: image_fs.map(|fs| RuntimeStats { image_fs: Some(fs.clone()), container_fs: Some(fs) }),
            rlimit: None,
            swap: whole.swap.as_ref().map(|s| swap(&whole, s)),
        },
        pods: node.pods.views().iter().filter(|view| view.is_active()).filter_map(|view| pod(node, view)).collect(),
    })
}

fn pod(node: &Node, view: &PodView) -> Option<PodStats> {
    let pod = &view.desired.pod;
    let whole = node.cgroups.stats(&node.cgroups.pod_path(pod)).ok()?;
    let mut containers = Vec::new();
    for (name, facts) in &view.observed.containers {
        let Some(instance) = facts.current.as_ref().filter(|instance| instance.is_running()) else { continue };
        // a container may end between the look at the record and the look at its cgroup
        let Ok(stats) = node.cgroups.stats(&node.cgroups.container_path(pod, &instance.id)) else { continue };
        containers.push(ContainerStats {
            name: name.clone(),
            start_time: api_time(instance.started_at.unwrap_or(stats.time)),
            cpu: Some(cpu(&stats)),
            memory: Some(memory(&stats)),
            io: None,
            rootfs: None,
            logs: None,
            swap: stats.swap.as_ref().map(|s| swap(&stats, s)),
        });
    }
    Some(PodStats {
        pod_ref: PodReference {
            name: pod.metadata.name.clone().unwrap_or_default(),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            uid: view.desired.uid().to_owned(),
        },
        start_time: api_time(view.observed.start_time.unwrap_or(whole.time)),
        containers,
        cpu: Some(cpu(&whole)),
        memory: Some(memory(&whole)),
        io: None,
        network: None,
        volumes: Vec::new(),
        ephemeral_storage: None,
        process_stats: whole.tasks.map(|tasks| ProcessStats { process_count: Some(tasks) }),
        swap: whole.swap.as_ref().map(|s| swap(&whole, s)),
    })
}

/// `/metrics` and its like: what the agent counts about itself.
pub(super) fn collect(node: &Node, endpoint: MetricsEndpoint, out: &mut Exposition) {
    if endpoint != MetricsEndpoint::Node {
        return;
    }
    let views = node.pods.views();
    let running = views.iter().filter(|view| view.is_active()).count();
    let containers =
        views.iter().flat_map(|view| view.observed.containers.values()).filter(|facts| facts.is_running()).count();
    let mut gauge = |name: &str, help: &str, value: usize| {
        out.family(name, help, Kind::Gauge);
        #[allow(clippy::cast_precision_loss, reason = "counts of Pods are far below 2^52")]
        out.sample(name, &[], value as f64, None);
    };
    gauge("kubelet_running_pods", "Number of pods that have a running pod sandbox", running);
    gauge("kubelet_desired_pods", "The number of pods the kubelet is being instructed to run", views.len());
    gauge("kubelet_running_containers", "Number of containers currently running", containers);
}

fn cpu(stats: &CgroupStats) -> CpuStats {
    CpuStats {
        time: api_time(stats.time),
        usage_nano_cores: None,
        usage_core_nano_seconds: stats.cpu.as_ref().map(|cpu| cpu.usage),
        psi: stats.cpu.as_ref().and_then(|cpu| cpu.psi.as_ref()).map(psi),
    }
}

fn memory(stats: &CgroupStats) -> MemoryStats {
    let memory = stats.memory.as_ref();
    MemoryStats {
        time: api_time(stats.time),
        available_bytes: memory.and_then(read::MemoryStats::available),
        usage_bytes: memory.map(|m| m.usage),
        working_set_bytes: memory.map(|m| m.working_set),
        rss_bytes: memory.map(|m| m.rss),
        page_faults: memory.map(|m| m.page_faults),
        major_page_faults: memory.map(|m| m.major_page_faults),
        psi: memory.and_then(|m| m.psi.as_ref()).map(psi),
    }
}

fn swap(stats: &CgroupStats, swap: &read::SwapStats) -> SwapStats {
    SwapStats {
        time: api_time(stats.time),
        swap_available_bytes: swap.limit.map(|limit| limit.saturating_sub(swap.usage)),
        swap_usage_bytes: Some(swap.usage),
    }
}

fn psi(psi: &Psi) -> PsiStats {
    let line = |line: &PsiLine| PsiData {
        // the kernel counts microseconds
        total: line.total,
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    PsiStats { full: line(&psi.full), some: line(&psi.some) }
}

fn fs_stats(fs: &read::FsStats) -> FsStats {
    FsStats {
        time: api_time(fs.time),
        available_bytes: Some(fs.available),
        capacity_bytes: Some(fs.capacity),
        used_bytes: Some(fs.used),
        inodes_free: Some(fs.inodes_free),
        inodes: Some(fs.inodes),
        inodes_used: Some(fs.inodes_used),
    }
}

/// When the machine was started.
fn boot_time() -> Timestamp {
    let uptime = rustix::system::sysinfo().uptime;
    Timestamp::now() - jiff::SignedDuration::from_secs(uptime)
}
