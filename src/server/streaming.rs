//! `/exec`, `/attach` and `/portForward`: requests that become streams.

use std::{io, sync::Arc};

use futures::{FutureExt, future::BoxFuture};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use warp::reply::Response;

use super::{
    Connection, Server,
    api::{ApiError, AttachOptions, ContainerTarget, ExecOptions},
    logs::instance,
    query::{self, Query},
    respond,
};
use crate::stream::{
    portforward::{self, Forwarder, PodConnection},
    remotecommand::{self, Outcome, Process, StreamOptions},
    upgrade::{self, Transport, Upgrade},
};

const METHODS: &[Method] = &[Method::GET, Method::POST];

/// A request for a stream.
enum Target {
    Exec(ContainerTarget),
    Attach(ContainerTarget),
    PortForward(Arc<Pod>),
}

/// Whether the path belongs here.
pub(super) fn is_streaming(path: &str) -> bool {
    ["/exec/", "/attach/", "/portForward/"].iter().any(|root| path.starts_with(root))
}

/// Answers a request for which [`is_streaming`] holds; an upgraded connection is served in the background.
pub(super) fn respond(server: &Arc<Server>, connection: &Arc<Connection>, request: Request<Incoming>) -> Response {
    if !METHODS.contains(request.method()) {
        return respond::method_not_allowed(METHODS);
    }
    match find(server, request.uri().path()) {
        Ok(Target::PortForward(pod)) => port_forward(server, connection, request, pod),
        Ok(target) => remote_command(server, connection, request, target),
        Err(response) => *response,
    }
}

/// The Pod of a path and, if one is named, its container.
fn find(server: &Server, path: &str) -> Result<Target, Box<Response>> {
    let segments: Vec<_> = path.trim_matches('/').split('/').map(query::decode_segment).collect();
    let segments: Vec<_> = segments.iter().map(String::as_str).collect();
    let (kind, namespace, name, uid, container) = match segments[..] {
        [kind @ "portForward", namespace, name] => (kind, namespace, name, None, None),
        [kind @ "portForward", namespace, name, uid] => (kind, namespace, name, Some(uid), None),
        [kind @ ("exec" | "attach"), namespace, name, container] => (kind, namespace, name, None, Some(container)),
        [kind @ ("exec" | "attach"), namespace, name, uid, container] => {
            (kind, namespace, name, Some(uid), Some(container))
        }
        _ => return Err(Box::new(respond::not_found())),
    };
    let pod = find_pod(server, namespace, name, uid).map_err(|error| Box::new(error.into()))?;
    let Some(container) = container else { return Ok(Target::PortForward(pod)) };
    let target = find_container(pod, container).map_err(|error| Box::new(error.into()))?;
    Ok(if kind == "exec" { Target::Exec(target) } else { Target::Attach(target) })
}

/// The Pod of a request, with the kubelet's texts for what is missing.
pub(super) fn find_pod(server: &Server, namespace: &str, name: &str, uid: Option<&str>) -> Result<Arc<Pod>, ApiError> {
    let pod = server.node.pod(namespace, name).ok_or_else(|| ApiError::NotFound("pod does not exist".into()))?;
    match uid {
        Some(uid) if pod.metadata.uid.as_deref() != Some(uid) => Err(ApiError::NotFound("pod not found".into())),
        _ => Ok(pod),
    }
}

/// A container of a Pod.
pub(super) fn find_container(pod: Arc<Pod>, container: &str) -> Result<ContainerTarget, ApiError> {
    if instance::has_container(&pod, container) {
        Ok(ContainerTarget { pod, container: container.to_owned() })
    } else {
        Err(ApiError::NotFound(format!("container not found ({container:?})")))
    }
}

/// Negotiates, and serves the upgraded connection with `serve` in the background.
fn upgraded<F>(
    server: &Arc<Server>,
    connection: &Arc<Connection>,
    mut request: Request<Incoming>,
    protocols: [&'static [&'static str]; 2],
    subresource: &'static str,
    serve: impl FnOnce(TokioIo<hyper::upgrade::Upgraded>, Upgrade) -> F + Send + 'static,
) -> Response
where
    F: Future<Output = io::Result<()>> + Send,
{
    let [spdy, websocket] = protocols;
    let upgrade = match upgrade::negotiate(request.headers(), spdy, websocket) {
        Ok(upgrade) => upgrade,
        Err(refusal) => return refusal.into(),
    };
    let modern = upgrade.protocol.starts_with("v5.") || upgrade.protocol == portforward::TUNNEL_PROTOCOL;
    if upgrade.transport == Transport::WebSocket && modern {
        server.metrics.websocket_requests.add([subresource], 1.0);
    }
    let response = upgrade.response();
    let on_upgrade = hyper::upgrade::on(&mut request);
    // An upgraded connection counts among the connections as long as it lives.
    let (connection, shutdown) = (Arc::clone(connection), server.shutdown.clone());
    tokio::spawn(async move {
        let work = async {
            let io = TokioIo::new(on_upgrade.await.map_err(io::Error::other)?);
            serve(io, upgrade).await
        };
        tokio::select! {
            outcome = work => if let Err(error) = outcome {
                tracing::debug!(subresource, %error, "Streaming connection ended early");
            },
            () = shutdown.cancelled() => {}
        }
        drop(connection);
    });
    response
}

fn remote_command(
    server: &Arc<Server>,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
    target: Target,
) -> Response {
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let options = match StreamOptions::from_query(query.pairs()) {
        Ok(options) => options,
        Err(message) => return respond::text(StatusCode::BAD_REQUEST, message),
    };
    let command: Vec<String> = query.all("command").map(str::to_owned).collect();
    let subresource = if matches!(target, Target::Exec(_)) { "exec" } else { "attach" };
    if matches!(target, Target::Exec(_)) && command.is_empty() {
        return respond::text(StatusCode::BAD_REQUEST, "query parameter \"command\" is required");
    }
    let protocols = [remotecommand::SPDY_PROTOCOLS, remotecommand::WEBSOCKET_PROTOCOLS];
    let server_of_stream = Arc::clone(server);
    upgraded(server, connection, request, protocols, subresource, async move |io, upgrade| {
        let server = server_of_stream;
        let start = || start(&server, &target, options, command);
        let outcome = remotecommand::serve(io, &upgrade, options, server.options.stream_limits, start).await?;
        if let Some(Outcome::Failed(error)) = outcome {
            tracing::warn!(subresource, error, "Unable to run in container");
        }
        Ok(())
    })
}

async fn start(
    server: &Server,
    target: &Target,
    options: StreamOptions,
    command: Vec<String>,
) -> Result<Process, String> {
    let StreamOptions { stdin, stdout, stderr, tty } = options;
    match target {
        Target::Exec(target) => {
            let options = ExecOptions { command, stdin, stdout, stderr, tty };
            let started = server.node.exec(target, options).await;
            started.map_err(|error| format!("error executing command in container: {error}"))
        }
        Target::Attach(target) => {
            let options = AttachOptions { stdin, stdout, stderr, tty };
            let attached = server.node.attach(target, options).await;
            let mut process = attached.map_err(|error| format!("error attaching to container: {error}"))?;
            // To an attached client the end of the container is a success, whatever its exit code.
            process.exit = process.exit.map(|exit| exit.map(|_| 0)).boxed();
            Ok(process)
        }
        Target::PortForward(_) => Err("port-forward is not a command".into()),
    }
}

struct PodPorts {
    server: Arc<Server>,
    pod: Arc<Pod>,
    description: String,
}

impl Forwarder for PodPorts {
    fn connect(&self, port: u16) -> BoxFuture<'_, io::Result<PodConnection>> {
        self.server.node.port_forward(&self.pod, port)
    }

    fn pod(&self) -> &str {
        &self.description
    }
}

fn port_forward(
    server: &Arc<Server>,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
    pod: Arc<Pod>,
) -> Response {
    let names_protocol = |value: &http::HeaderValue| {
        value.to_str().is_ok_and(|list| list.split(',').any(|name| name.trim() == portforward::TUNNEL_PROTOCOL))
    };
    let tunnel = request.headers().get_all("sec-websocket-protocol").iter().any(names_protocol);
    // Over SPDY, tunnelled or not, every stream names its port.
    let ports = if upgrade::is_websocket(request.headers()) && !tunnel {
        let query = Query::parse(request.uri().query().unwrap_or_default());
        match portforward::ports_from_query(query.pairs()) {
            Ok(ports) => ports,
            Err(message) => return respond::text(StatusCode::BAD_REQUEST, message),
        }
    } else {
        Vec::new()
    };
    let metadata = &pod.metadata;
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (namespace, name, uid) = (text(&metadata.namespace), text(&metadata.name), text(&metadata.uid));
    let description = format!("{namespace}/{name}, uid {uid}");
    let limits = server.options.stream_limits;
    let forwarder = PodPorts { server: Arc::clone(server), pod, description };
    let protocols = [portforward::SPDY_PROTOCOLS, portforward::WEBSOCKET_PROTOCOLS];
    upgraded(server, connection, request, protocols, "portforward", async move |io, upgrade| {
        portforward::serve(io, &upgrade, &ports, limits, &forwarder).await
    })
}
