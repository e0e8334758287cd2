//! What a request is authorised as: a verb on a subresource of this node.

use http::Method;

/// Subresources of `nodes` to ask for, in order; the first one that is allowed is enough.
///
/// The table is the kubelet's `pkg/kubelet/server/auth.go` with KubeletFineGrainedAuthz (GA in 1.36).
pub fn subresources(path: &str) -> &'static [&'static str] {
    let below = |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match () {
        () if below("/pods") || below("/allocatedPods") || below("/runningpods") => &["pods", "proxy"],
        () if below("/healthz") => &["healthz", "proxy"],
        () if below("/configz") => &["configz", "proxy"],
        () if below("/stats") => &["stats"],
        () if below("/metrics") => &["metrics"],
        () if below("/logs") => &["log"],
        () if below("/checkpoint") => &["checkpoint"],
        () if below("/statusz") => &["statusz"],
        () if below("/flagz") => &["configz"],
        () => &["proxy"],
    }
}

/// Whether a request to this path runs something in a container or reaches into its network.
pub fn is_interactive(path: &str) -> bool {
    ["/exec/", "/attach/", "/portForward/", "/run/"].iter().any(|root| path.starts_with(root))
}

/// The verb of a request; empty for methods that have none.
///
/// The kubelet takes the verb of an exec over WebSocket from its method, so that `get nodes/proxy` is enough to run
/// commands (kubernetes/kubernetes#136550). Here whatever is [interactive](is_interactive) needs `create`; the API
/// server's own client has every verb.
pub fn verb(method: &Method, path: &str) -> &'static str {
    if is_interactive(path) {
        return "create";
    }
    match *method {
        Method::POST => "create",
        Method::GET => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let cases: [(&str, &[&str]); 16] = [
            ("/pods", &["pods", "proxy"]),
            ("/pods/", &["pods", "proxy"]),
            ("/podsx", &["proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz/syncloop", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/stats/summary", &["stats"]),
            ("/metrics", &["metrics"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/logs/", &["log"]),
            ("/checkpoint/a/b/c", &["checkpoint"]),
            ("/statusz", &["statusz"]),
            ("/flagz", &["configz"]),
            ("/containerLogs/a/b/c", &["proxy"]),
            ("/exec/a/b/c", &["proxy"]),
            ("/", &["proxy"]),
        ];
        for (path, expected) in cases {
            assert_eq!(subresources(path), expected, "{path}");
        }
    }

    #[test]
    fn verbs() {
        assert_eq!(verb(&Method::GET, "/pods"), "get");
        assert_eq!(verb(&Method::HEAD, "/pods"), "");
        assert_eq!(verb(&Method::DELETE, "/logs/x"), "delete");
        for path in ["/exec/a/b/c", "/attach/a/b/c", "/portForward/a/b", "/run/a/b/c"] {
            assert_eq!(verb(&Method::GET, path), "create", "{path}");
        }
        assert_eq!(verb(&Method::GET, "/containerLogs/a/b/c"), "get");
    }
}
