//! What the server needs from the node.

use std::{io, path::PathBuf, sync::Arc};

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::{exposition::Exposition, summary::Summary};
use crate::stream::{portforward::PodConnection, remotecommand::Process};

/// Why a request cannot be answered. Each variant is one HTTP status; none is retryable by the server itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// 404: the Pod or container is not on this node.
    #[error("{0}")]
    NotFound(String),
    /// 400: the request cannot be served as it is (also what the kubelet answers when there are no logs yet).
    #[error("{0}")]
    BadRequest(String),
    /// 500: the node failed.
    #[error("{0}")]
    Internal(String),
}

/// A container of a Pod on this node.
#[derive(Clone, Debug)]
pub struct ContainerTarget {
    /// Its Pod.
    pub pod: Arc<Pod>,
    /// Its name: a container, init container or ephemeral container of the Pod's spec.
    pub container: String,
}

/// What to run in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOptions {
    /// Program and arguments, not interpreted by a shell.
    pub command: Vec<String>,
    /// Give it input; otherwise it reads `/dev/null`.
    pub stdin: bool,
    /// Its output is wanted.
    pub stdout: bool,
    /// Its error output is wanted; false with `tty`.
    pub stderr: bool,
    /// Give it a terminal.
    pub tty: bool,
}

/// Which streams of a running container to attach to. The container's own `stdin`, `stdinOnce` and `tty` decide
/// what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// Send it input.
    pub stdin: bool,
    /// Take its output.
    pub stdout: bool,
    /// Take its error output.
    pub stderr: bool,
    /// The client believes that the container has a terminal.
    pub tty: bool,
}

/// The log files of one container instance.
#[derive(Clone, Debug)]
pub struct LogSource {
    /// Directory of the container's logs: `/var/log/pods/<namespace>_<name>_<uid>/<container>`.
    pub directory: PathBuf,
    /// Number of the instance: its file is `<attempt>.log`, rotated ones are `<attempt>.log.<time>[.gz]`.
    pub attempt: u32,
    /// True once the instance has ended *and* all it wrote is in the files. A closed channel means the same.
    pub complete: watch::Receiver<bool>,
}

/// The endpoints that expose Prometheus metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsEndpoint {
    /// `/metrics`: of the agent itself. The server adds its own.
    Node,
    /// `/metrics/cadvisor`: of containers and the machine.
    Cadvisor,
    /// `/metrics/probes`: of probes.
    Probes,
}

/// The node, as seen by its HTTP endpoints.
pub trait NodeApi: Send + Sync + 'static {
    /// The Pods that should run here, with their current status.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// One of them by name.
    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        let matches = |pod: &Arc<Pod>| {
            pod.metadata.name.as_deref() == Some(name) && pod.metadata.namespace.as_deref() == Some(namespace)
        };
        self.pods().into_iter().find(matches)
    }

    /// The Pods that do run here, whether they should or not, with as much of spec and status as is known.
    fn running_pods(&self) -> BoxFuture<'_, Result<Vec<Pod>, ApiError>>;

    /// Where the logs of a container instance are. `container_id` is `<runtime>://<id>` from the Pod's status.
    fn log_source<'a>(
        &'a self,
        target: &'a ContainerTarget,
        container_id: &'a str,
    ) -> BoxFuture<'a, Result<LogSource, ApiError>>;

    /// Starts a process in a running container. The future may be dropped at any time (the client left): what it
    /// began must end then. Dropping the [`Process`] closes its streams and leaves the process alone.
    fn exec<'a>(
        &'a self,
        target: &'a ContainerTarget,
        options: ExecOptions,
    ) -> BoxFuture<'a, Result<Process, ApiError>>;

    /// Attaches to the main process of a running container. [`Process::exit`] completes when the container ends.
    fn attach<'a>(
        &'a self,
        target: &'a ContainerTarget,
        options: AttachOptions,
    ) -> BoxFuture<'a, Result<Process, ApiError>>;

    /// Connects to `localhost:port` (IPv4, then IPv6) in the Pod's network.
    fn port_forward<'a>(&'a self, pod: &'a Arc<Pod>, port: u16) -> BoxFuture<'a, io::Result<PodConnection>>;

    /// Statistics of the node and its Pods; with `only_cpu_and_memory` just these two (and swap), which is cheap.
    fn summary(&self, only_cpu_and_memory: bool) -> BoxFuture<'_, Result<Summary, ApiError>>;

    /// The effective `KubeletConfiguration`, with `kind` and `apiVersion`.
    fn configz(&self) -> serde_json::Value;

    /// Whether the node's main loop makes progress; the text says what does not.
    fn health(&self) -> Result<(), String>;

    /// Writes the metrics of an endpoint.
    fn collect(&self, endpoint: MetricsEndpoint, out: &mut Exposition);
}
