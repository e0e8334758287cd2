//! `/metrics/resource`: CPU and memory of node, Pods and containers for the metrics server.
//!
//! Names, labels and stability are those of the kubelet's `resource_metrics.go`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{
    api::ApiError,
    exposition::{Exposition, Kind},
    summary::{ContainerStats, CpuStats, MemoryStats, PodStats, Summary, SwapStats},
};

struct Sample<'a> {
    labels: &'a [(&'a str, &'a str)],
    value: f64,
    time: Option<&'a Time>,
}

/// Large counters lose their lowest digits here, as they do in Prometheus, which knows only floats.
#[expect(clippy::cast_precision_loss, reason = "Prometheus values are floats")]
fn float(value: u64) -> f64 {
    value as f64
}

fn cpu<'a>(stats: Option<&'a CpuStats>, labels: &'a [(&'a str, &'a str)]) -> Option<Sample<'a>> {
    let stats = stats?;
    let value = float(stats.usage_core_nano_seconds?) / 1e9;
    Some(Sample { labels, value, time: Some(&stats.time) })
}

fn memory<'a>(stats: Option<&'a MemoryStats>, labels: &'a [(&'a str, &'a str)]) -> Option<Sample<'a>> {
    let stats = stats?;
    Some(Sample { labels, value: float(stats.working_set_bytes?), time: Some(&stats.time) })
}

fn swap<'a>(stats: Option<&'a SwapStats>, labels: &'a [(&'a str, &'a str)]) -> Option<Sample<'a>> {
    let stats = stats?;
    Some(Sample { labels, value: float(stats.swap_usage_bytes?), time: Some(&stats.time) })
}

fn swap_limit<'a>(stats: Option<&'a SwapStats>, labels: &'a [(&'a str, &'a str)]) -> Option<Sample<'a>> {
    let stats = stats?;
    let limit = stats.swap_available_bytes?.saturating_add(stats.swap_usage_bytes.unwrap_or(0));
    Some(Sample { labels, value: float(limit), time: Some(&stats.time) })
}

fn start<'a>(stats: &'a ContainerStats, labels: &'a [(&'a str, &'a str)]) -> Option<Sample<'a>> {
    let seconds = stats.start_time.0.as_duration().as_secs_f64();
    (seconds >= 1.0).then_some(Sample { labels, value: seconds, time: None })
}

fn emit(out: &mut Exposition, name: &str, sample: Option<Sample<'_>>) {
    if let Some(sample) = sample {
        let millis = sample.time.map(|time| time.0.as_millisecond());
        out.sample(name, sample.labels, sample.value, millis);
    }
}

/// Writes the endpoint. A failed measurement is a metric too: scrapers see it instead of a gap.
pub fn collect(summary: &Result<Summary, ApiError>, out: &mut Exposition) {
    if let Ok(summary) = summary {
        node(summary, out);
        containers(&summary.pods, out);
        pods(&summary.pods, out);
    }
    let failed = f64::from(u8::from(summary.is_err()));
    out.family(
        "resource_scrape_error",
        "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise",
        Kind::Gauge,
    );
    out.sample("resource_scrape_error", &[], failed, None);
}

fn node(summary: &Summary, out: &mut Exposition) {
    let node = &summary.node;
    let name = "node_cpu_usage_seconds_total";
    out.family(name, "[STABLE] Cumulative cpu time consumed by the node in core-seconds", Kind::Counter);
    emit(out, name, cpu(node.cpu.as_ref(), &[]));
    let name = "node_memory_working_set_bytes";
    out.family(name, "[STABLE] Current working set of the node in bytes", Kind::Gauge);
    emit(out, name, memory(node.memory.as_ref(), &[]));
    let name = "node_swap_usage_bytes";
    out.family(name, "[ALPHA] Current swap usage of the node in bytes", Kind::Gauge);
    emit(out, name, swap(node.swap.as_ref(), &[]));
}

type ContainerSample = for<'a> fn(&'a ContainerStats, &'a [(&'a str, &'a str)]) -> Option<Sample<'a>>;

fn containers(pods: &[PodStats], out: &mut Exposition) {
    let families: [(&str, &str, Kind, ContainerSample); 5] = [
        (
            "container_start_time_seconds",
            "[STABLE] Start time of the container since unix epoch in seconds",
            Kind::Gauge,
            start,
        ),
        (
            "container_cpu_usage_seconds_total",
            "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
            Kind::Counter,
            |stats, labels| cpu(stats.cpu.as_ref(), labels),
        ),
        (
            "container_memory_working_set_bytes",
            "[STABLE] Current working set of the container in bytes",
            Kind::Gauge,
            |stats, labels| memory(stats.memory.as_ref(), labels),
        ),
        (
            "container_swap_usage_bytes",
            "[ALPHA] Current amount of the container swap usage in bytes",
            Kind::Gauge,
            |stats, labels| swap(stats.swap.as_ref(), labels),
        ),
        (
            "container_swap_limit_bytes",
            "[ALPHA] Current amount of the container swap limit in bytes",
            Kind::Gauge,
            |stats, labels| swap_limit(stats.swap.as_ref(), labels),
        ),
    ];
    for (name, help, kind, sample) in families {
        out.family(name, help, kind);
        for pod in pods {
            for container in &pod.containers {
                let labels = [
                    ("container", &*container.name),
                    ("pod", &*pod.pod_ref.name),
                    ("namespace", &*pod.pod_ref.namespace),
                ];
                emit(out, name, sample(container, &labels));
            }
        }
    }
}

type PodSample = for<'a> fn(&'a PodStats, &'a [(&'a str, &'a str)]) -> Option<Sample<'a>>;

fn pods(pods: &[PodStats], out: &mut Exposition) {
    let families: [(&str, &str, Kind, PodSample); 3] = [
        (
            "pod_cpu_usage_seconds_total",
            "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
            Kind::Counter,
            |pod, labels| cpu(pod.cpu.as_ref(), labels),
        ),
        (
            "pod_memory_working_set_bytes",
            "[STABLE] Current working set of the pod in bytes",
            Kind::Gauge,
            |pod, labels| memory(pod.memory.as_ref(), labels),
        ),
        (
            "pod_swap_usage_bytes",
            "[ALPHA] Current amount of the pod swap usage in bytes",
            Kind::Gauge,
            |pod, labels| swap(pod.swap.as_ref(), labels),
        ),
    ];
    for (name, help, kind, sample) in families {
        out.family(name, help, kind);
        for pod in pods {
            let labels = [("pod", &*pod.pod_ref.name), ("namespace", &*pod.pod_ref.namespace)];
            emit(out, name, sample(pod, &labels));
        }
    }
}
