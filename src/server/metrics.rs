//! Metrics of the server itself, under the kubelet's names.

use std::time::Duration;

use http::Method;

use super::{
    exposition::{Durations, Exposition, Kind, Values},
    health::HealthMetrics,
};

/// First segments of paths that are counted by name; everything else is `other`, so that clients cannot make series.
const PATHS: [&str; 14] = [
    "attach",
    "checkpoint",
    "configz",
    "containerLogs",
    "exec",
    "healthz",
    "logs",
    "metrics",
    "metrics/cadvisor",
    "metrics/probes",
    "metrics/resource",
    "pods",
    "portForward",
    "run",
];
const MORE_PATHS: [&str; 2] = ["runningpods", "stats"];

pub(super) struct ServerMetrics {
    requests: Values<4>,
    inflight: Values<4>,
    durations: Durations<4>,
    pub(super) websocket_requests: Values<1>,
    pub(super) health: HealthMetrics,
}

/// Labels of a request: `long_running`, `method`, `path`, `server_type`.
pub(super) type RequestLabels = [&'static str; 4];

const LABELS: [&str; 4] = ["long_running", "method", "path", "server_type"];

impl ServerMetrics {
    pub(super) const fn new() -> Self {
        Self {
            requests: Values::new(
                "kubelet_http_requests_total",
                "[ALPHA] Number of the http requests received since the server started",
                Kind::Counter,
                LABELS,
            ),
            inflight: Values::new(
                "kubelet_http_inflight_requests",
                "[ALPHA] Number of the inflight http requests",
                Kind::Gauge,
                LABELS,
            ),
            durations: Durations::new(
                "kubelet_http_requests_duration_seconds",
                "[ALPHA] Duration in seconds to serve http requests",
                LABELS,
            ),
            websocket_requests: Values::new(
                "kubelet_websocket_streaming_requests_total",
                "[ALPHA] Number of WebSocket streaming requests handled without the API server's translation",
                Kind::Counter,
                ["subresource"],
            ),
            health: HealthMetrics::new(),
        }
    }

    pub(super) fn begin(&self, method: &Method, path: &str) -> RequestLabels {
        let labels = labels(method, path);
        self.inflight.add(labels, 1.0);
        labels
    }

    pub(super) fn end(&self, labels: &RequestLabels, took: Duration) {
        self.inflight.add(*labels, -1.0);
        self.requests.add(*labels, 1.0);
        self.durations.observe(*labels, took.as_secs_f64());
    }

    pub(super) fn collect(&self, out: &mut Exposition) {
        self.requests.collect(out);
        self.inflight.collect(out);
        self.durations.collect(out);
        self.websocket_requests.collect(out);
    }
}

fn labels(method: &Method, path: &str) -> RequestLabels {
    let path = path.trim_start_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    let second = path.splitn(3, '/').take(2).map(str::len).sum::<usize>();
    let two = if first == "metrics" { path.get(..second + 1).unwrap_or(path) } else { first };
    let known = |name: &str| PATHS.iter().chain(&MORE_PATHS).copied().find(|known| *known == name);
    let path = known(two.trim_end_matches('/')).unwrap_or("other");
    let long_running = if matches!(path, "exec" | "attach" | "portForward") { "true" } else { "false" };
    let method = match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::TRACE => "TRACE",
        Method::CONNECT => "CONNECT",
        _ => "other",
    };
    [long_running, method, path, "readwrite"]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_make_few_series() {
        let path = |path: &str| labels(&Method::GET, path)[2];
        assert_eq!(path("/metrics"), "metrics");
        assert_eq!(path("/metrics/"), "metrics");
        assert_eq!(path("/metrics/resource"), "metrics/resource");
        assert_eq!(path("/metrics/evil"), "other");
        assert_eq!(path("/exec/a/b/c"), "exec");
        assert_eq!(path("/stats/summary"), "stats");
        assert_eq!(path("/"), "other");
        assert_eq!(labels(&Method::PATCH, "/attach/a/b/c"), ["true", "other", "attach", "readwrite"]);
    }
}
