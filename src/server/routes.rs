//! The ordinary endpoints.

use std::{convert::Infallible, sync::Arc};

use http::{Method, StatusCode};
use jiff::Timestamp;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ListMeta};
use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio_stream::wrappers::ReceiverStream;
use warp::{Filter, Rejection, Reply, filters::BoxedFilter, reject::Reject, reply::Response};

use super::{
    Server,
    api::{ApiError, ExecOptions, MetricsEndpoint},
    exposition::Exposition,
    health, host_logs, local,
    logs::{
        follow, instance,
        options::{LogOptions, OptionsError},
    },
    query::{self, Query},
    resource_metrics, respond,
    streaming::{find_container, find_pod},
};

const GET: &[Method] = &[Method::GET];
const POST: &[Method] = &[Method::POST];
const GET_OR_POST: &[Method] = &[Method::GET, Method::POST];

/// Output of `/run` that is kept, in bytes; a command that writes more is stopped being listened to.
const MAX_RUN_OUTPUT: u64 = 16 << 20;

/// The path exists, the method does not.
#[derive(Debug)]
struct WrongMethod(&'static [Method]);

impl Reject for WrongMethod {}

fn only(methods: &'static [Method]) -> impl Filter<Extract = (), Error = Rejection> + Clone {
    warp::method()
        .and_then(move |method: Method| async move {
            if methods.contains(&method) { Ok(()) } else { Err(warp::reject::custom(WrongMethod(methods))) }
        })
        .untuple_one()
}

pub(super) fn parsed_query() -> impl Filter<Extract = (Query,), Error = Infallible> + Clone {
    warp::query::raw().or(warp::any().map(String::new)).unify().map(|raw: String| Query::parse(&raw))
}

/// A path segment, decoded.
pub(super) fn segment() -> impl Filter<Extract = (String,), Error = Rejection> + Clone {
    warp::path::param::<String>().map(|text: String| query::decode_segment(&text))
}

async fn explain(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(match rejection.find::<WrongMethod>() {
        Some(WrongMethod(methods)) => respond::method_not_allowed(methods),
        None => respond::not_found(),
    })
}

/// All of them; nothing is rejected, unknown paths are answered with 404.
pub(super) fn all(server: Arc<Server>) -> impl Filter<Extract = (impl Reply,), Error = Infallible> + Clone {
    every(&server).recover(explain).unify()
}

/// All of them, and those that only the local socket has.
pub(super) fn with_local(
    server: Arc<Server>,
    api: Arc<dyn local::LocalApi>,
) -> impl Filter<Extract = (impl Reply,), Error = Infallible> + Clone {
    local::routes(api).or(every(&server)).unify().recover(explain).unify()
}

fn every(server: &Arc<Server>) -> BoxedFilter<(Response,)> {
    health_routes(server)
        .or(pod_routes(server))
        .unify()
        .or(statistics_routes(server))
        .unify()
        .or(container_routes(server))
        .unify()
        .or(system_routes(server))
        .unify()
        .boxed()
}

/// Those of the health port.
pub(super) fn health_only(server: Arc<Server>) -> impl Filter<Extract = (impl Reply,), Error = Infallible> + Clone {
    health_routes(&server).recover(explain).unify()
}

fn with(server: &Arc<Server>) -> impl Filter<Extract = (Arc<Server>,), Error = Infallible> + Clone + use<> {
    let server = Arc::clone(server);
    warp::any().map(move || Arc::clone(&server))
}

fn health_routes(server: &Arc<Server>) -> BoxedFilter<(Response,)> {
    let root = warp::path("healthz");
    let all = root
        .and(warp::path::end())
        .and(with(server))
        .and(parsed_query())
        .map(|server: Arc<Server>, query: Query| health::all(&*server.node, &server.metrics.health, &query));
    let one = root
        .and(segment())
        .and(warp::path::end())
        .and(with(server))
        .map(|name: String, server: Arc<Server>| health::one(&name, &*server.node, &server.metrics.health));
    all.or(one).unify().boxed()
}

fn pod_routes(server: &Arc<Server>) -> BoxedFilter<(Response,)> {
    let pods = warp::path("pods").and(warp::path::end()).and(only(GET)).and(with(server)).map(|server: Arc<Server>| {
        let pods = server.node.pods();
        pod_list(pods.iter().map(|pod| &**pod).collect())
    });
    let running = warp::path("runningpods").and(warp::path::end()).and(only(GET)).and(with(server)).then(
        async |server: Arc<Server>| match server.node.running_pods().await {
            Ok(pods) => pod_list(pods.iter().collect()),
            Err(error) => error.into(),
        },
    );
    pods.or(running).unify().boxed()
}

/// A `v1.PodList`, without copying the Pods.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodList<'a> {
    kind: &'static str,
    api_version: &'static str,
    metadata: ListMeta,
    items: Vec<&'a Pod>,
}

fn pod_list(items: Vec<&Pod>) -> Response {
    respond::json(&PodList { kind: "PodList", api_version: "v1", metadata: ListMeta::default(), items })
}

fn statistics_routes(server: &Arc<Server>) -> BoxedFilter<(Response,)> {
    let summary = warp::path!("stats" / "summary").and(only(GET_OR_POST)).and(with(server)).and(parsed_query()).then(
        async |server: Arc<Server>, query: Query| {
            let only_cpu_and_memory = query.first("only_cpu_and_memory") == Some("true");
            match server.node.summary(only_cpu_and_memory).await {
                Ok(summary) => respond::json(&summary),
                Err(ApiError::Internal(error)) => {
                    respond::text(StatusCode::INTERNAL_SERVER_ERROR, format!("Internal Error: {error}"))
                }
                Err(error) => error.into(),
            }
        },
    );
    let resource = warp::path!("metrics" / "resource").and(with(server)).then(async |server: Arc<Server>| {
        let summary = server.node.summary(true).await;
        if let Err(error) = &summary {
            tracing::error!(%error, "Error getting summary for resourceMetric prometheus endpoint");
        }
        exposition(|out| resource_metrics::collect(&summary, out))
    });
    let endpoint = |path: &'static str, endpoint: MetricsEndpoint| {
        warp::path("metrics")
            .and(warp::path(path))
            .and(warp::path::end())
            .and(with(server))
            .map(move |server: Arc<Server>| exposition(|out| server.node.collect(endpoint, out)))
    };
    let slis = warp::path!("metrics" / "slis")
        .and(with(server))
        .map(|server: Arc<Server>| exposition(|out| server.metrics.health.collect(out)));
    let node = warp::path("metrics").and(warp::path::end()).and(with(server)).map(|server: Arc<Server>| {
        exposition(|out| {
            server.metrics.collect(out);
            server.node.collect(MetricsEndpoint::Node, out);
        })
    });
    let own = endpoint("cadvisor", MetricsEndpoint::Cadvisor).or(endpoint("probes", MetricsEndpoint::Probes)).unify();
    summary.or(resource).unify().or(own).unify().or(slis).unify().or(node).unify().boxed()
}

fn exposition(collect: impl FnOnce(&mut Exposition)) -> Response {
    let mut out = Exposition::default();
    collect(&mut out);
    respond::metrics(out.into_string())
}

fn container_routes(server: &Arc<Server>) -> BoxedFilter<(Response,)> {
    let logs = warp::path("containerLogs")
        .and(segment())
        .and(segment())
        .and(segment())
        .and(warp::path::end())
        .and(only(GET))
        .and(with(server))
        .and(parsed_query())
        .then(async |namespace: String, pod: String, container: String, server: Arc<Server>, query: Query| {
            container_logs(&server, &namespace, &pod, &container, &query).await.unwrap_or_else(|response| *response)
        });
    let run_tail = || warp::path::end().and(only(POST)).and(with(server)).and(parsed_query());
    let run = warp::path("run").and(segment()).and(segment()).and(segment()).and(run_tail()).then(
        async |namespace: String, pod: String, container: String, server: Arc<Server>, query: Query| {
            run(&server, &namespace, &pod, None, &container, &query).await
        },
    );
    let run_uid = warp::path("run").and(segment()).and(segment()).and(segment()).and(segment()).and(run_tail()).then(
        async |namespace: String, pod: String, uid: String, container: String, server: Arc<Server>, query: Query| {
            self::run(&server, &namespace, &pod, Some(&uid), &container, &query).await
        },
    );
    logs.or(run).unify().or(run_uid).unify().boxed()
}

async fn container_logs(
    server: &Arc<Server>,
    namespace: &str,
    name: &str,
    container: &str,
    query: &Query,
) -> Result<Response, Box<Response>> {
    let refuse = |status: StatusCode, text: String| Box::new(respond::text(status, text));
    let options = LogOptions::from_query(query.pairs(), Timestamp::now()).map_err(|error| match error {
        OptionsError::Undecodable { .. } => refuse(StatusCode::BAD_REQUEST, error.to_string()),
        OptionsError::Invalid(_) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
    })?;
    let missing = || refuse(StatusCode::NOT_FOUND, format!("pod {name:?} does not exist"));
    let pod = server.node.pod(namespace, name).ok_or_else(missing)?;
    let missing = |_| refuse(StatusCode::NOT_FOUND, format!("container {container:?} not found in pod {name:?}"));
    let target = find_container(Arc::clone(&pod), container).map_err(missing)?;
    let failed = |error: ApiError| Box::new(Response::from(error));
    let id = instance::container_id(&pod, container, options.previous).map_err(failed)?;
    let source = server.node.log_source(&target, id).await.map_err(failed)?;
    let chunks = follow::read(source, options, &server.log_watcher)
        .await
        .map_err(|error| refuse(StatusCode::BAD_REQUEST, format!("failed to read logs: {error}")))?;
    let mut response = warp::reply::stream(ReceiverStream::new(chunks)).into_response();
    let kind = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    Ok(response)
}

async fn run(
    server: &Arc<Server>,
    namespace: &str,
    name: &str,
    uid: Option<&str>,
    container: &str,
    query: &Query,
) -> Response {
    let target = match find_pod(server, namespace, name, uid).and_then(|pod| find_container(pod, container)) {
        Ok(target) => target,
        Err(error) => return error.into(),
    };
    let command: Vec<String> = query.first("cmd").unwrap_or_default().split(' ').map(str::to_owned).collect();
    let shown = command.join(" ");
    let options = ExecOptions { command, stdin: false, stdout: true, stderr: true, tty: false };
    let process = match server.node.exec(&target, options).await {
        Ok(process) => process,
        Err(error) => return error.into(),
    };
    let (stdout, stderr, exit) =
        futures::join!(read_bounded(process.stdout), read_bounded(process.stderr), process.exit);
    let mut output = stdout;
    output.extend(stderr);
    match exit {
        Ok(0) => respond::json_bytes(output),
        Ok(code) => {
            let output = String::from_utf8_lossy(&output);
            let text = format!("command '{shown}' exited with {code}: {output}");
            respond::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        }
        Err(error) => respond::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn read_bounded(from: Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>>) -> Vec<u8> {
    let mut output = Vec::new();
    if let Some(from) = from {
        // An error ends the output like its end does.
        let _ = from.take(MAX_RUN_OUTPUT).read_to_end(&mut output).await;
    }
    output
}

fn system_routes(server: &Arc<Server>) -> BoxedFilter<(Response,)> {
    let configz = warp::path("configz")
        .and(warp::path::end())
        .and(with(server))
        .map(|server: Arc<Server>| respond::json(&serde_json::json!({ "kubeletconfig": server.node.configz() })));
    let logs = warp::path("logs").and(only(GET)).and(warp::path::tail()).and(with(server)).and(parsed_query()).then(
        async |path: warp::path::Tail, server: Arc<Server>, query: Query| {
            if !server.options.system_logs {
                return respond::text(StatusCode::METHOD_NOT_ALLOWED, "logs endpoint is disabled.");
            }
            if query.first("query").is_some() {
                let text = "query: reading logs of services (NodeLogQuery) is not supported; name a file below /logs/";
                return respond::text(StatusCode::NOT_IMPLEMENTED, text);
            }
            let path = query::decode_segment(path.as_str());
            host_logs::serve(server.options.log_directory.clone(), path).await
        },
    );
    let checkpoint = warp::path!("checkpoint" / ..).and(only(POST)).and(warp::path::tail()).map(|_| {
        let text = "checkpoint is not supported by this node: its runtime does not implement container checkpoints";
        respond::text(StatusCode::NOT_FOUND, text)
    });
    configz.or(logs).unify().or(checkpoint).unify().boxed()
}
