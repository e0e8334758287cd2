//! `/healthz` and its parts, in the format of Kubernetes components, and `/metrics/slis`.

use http::StatusCode;
use warp::reply::Response;

use super::{
    api::NodeApi,
    exposition::{Exposition, Kind, Values},
    query::Query,
    respond,
};

/// The checks, in the order in which they are listed.
const CHECKS: [&str; 3] = ["ping", "log", "syncloop"];

/// Results of checks, as metrics.
pub(super) struct HealthMetrics {
    latest: Values<2>,
    total: Values<3>,
}

impl HealthMetrics {
    pub(super) const fn new() -> Self {
        Self {
            latest: Values::new(
                "kubernetes_healthcheck",
                "[STABLE] This metric records the result of a single healthcheck.",
                Kind::Gauge,
                ["name", "type"],
            ),
            total: Values::new(
                "kubernetes_healthchecks_total",
                "[STABLE] This metric records the results of all healthcheck.",
                Kind::Counter,
                ["name", "status", "type"],
            ),
        }
    }

    fn observe(&self, name: &str, healthy: bool) {
        self.latest.set([name, "healthz"], f64::from(u8::from(healthy)));
        self.total.add([name, if healthy { "success" } else { "error" }, "healthz"], 1.0);
    }

    pub(super) fn collect(&self, out: &mut Exposition) {
        self.latest.collect(out);
        self.total.collect(out);
    }
}

fn check(name: &str, node: &dyn NodeApi, metrics: &HealthMetrics) -> Result<(), String> {
    // Being able to answer is what `ping` and `log` check.
    let outcome = if name == "syncloop" { node.health() } else { Ok(()) };
    metrics.observe(name, outcome.is_ok());
    outcome
}

/// `/healthz`: all checks; `?verbose` lists them, `?exclude=name` leaves one out.
pub(super) fn all(node: &dyn NodeApi, metrics: &HealthMetrics, query: &Query) -> Response {
    let mut lines = String::new();
    let mut failed = false;
    for name in CHECKS {
        if query.all("exclude").any(|excluded| excluded == name) {
            lines += &format!("[+]{name} excluded: ok\n");
        } else if let Err(error) = check(name, node, metrics) {
            tracing::warn!(check = name, error, "healthz check failed");
            failed = true;
            lines += &format!("[-]{name} failed: reason withheld\n");
        } else {
            lines += &format!("[+]{name} ok\n");
        }
    }
    let unknown: Vec<_> =
        query.all("exclude").filter(|name| !CHECKS.contains(name)).map(|name| format!("{name:?}")).collect();
    if !unknown.is_empty() {
        lines += &format!("warn: some health checks cannot be excluded: no matches for {}\n", unknown.join(", "));
    }
    if failed {
        return respond::text(StatusCode::INTERNAL_SERVER_ERROR, lines + "healthz check failed\n");
    }
    let body = if query.first("verbose").is_some() { lines + "healthz check passed\n" } else { "ok".into() };
    respond::text(StatusCode::OK, body)
}

/// `/healthz/<name>`: one check.
pub(super) fn one(name: &str, node: &dyn NodeApi, metrics: &HealthMetrics) -> Response {
    if !CHECKS.contains(&name) {
        return respond::not_found();
    }
    match check(name, node, metrics) {
        Ok(()) => respond::text(StatusCode::OK, "ok"),
        Err(error) => respond::text(StatusCode::INTERNAL_SERVER_ERROR, format!("internal server error: {error}\n")),
    }
}
