//! The HTTPS endpoints of the node: authentication, authorization, logs, exec, statistics.
//!
//! A request is authenticated and authorised ([`auth`], [`attributes`]) before anything else happens. Requests that
//! become streams are taken from hyper (`streaming`), everything else goes through warp (`routes`). What the node
//! has to provide is [`api::NodeApi`].

pub mod api;
pub mod attributes;
pub mod auth;
mod cache;
pub mod client_ca;
pub mod exposition;
mod health;
mod host_logs;
mod listener;
pub mod local;
pub mod logs;
mod metrics;
pub mod query;
pub mod resource_metrics;
mod respond;
pub mod reviews;
mod routes;
mod streaming;
pub mod summary;
pub mod tls;

#[cfg(test)]
mod tests;

use std::{io, path::PathBuf, sync::Arc, time::Instant};

use http::{Request, StatusCode};
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tower::Service;
use warp::reply::Response;

pub use self::listener::Connection;
use self::{api::NodeApi, auth::Auth, logs::watch::LogWatcher, metrics::ServerMetrics};
use crate::stream::Limits;

/// Settings of the server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// `enableDebuggingHandlers`: without it, nothing of [`DEBUG_PATHS`] is served.
    pub debugging_handlers: bool,
    /// `enableSystemLogHandler`: serve [`Self::log_directory`] at `/logs/`.
    pub system_logs: bool,
    /// The node's logs, normally `/var/log`.
    pub log_directory: PathBuf,
    /// Bounds on streams; holds `streamingConnectionIdleTimeout`.
    pub stream_limits: Limits,
    /// Connections served at once, streams included; more wait to be accepted.
    pub max_connections: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            debugging_handlers: true,
            system_logs: true,
            log_directory: "/var/log".into(),
            stream_limits: Limits::default(),
            max_connections: 4096,
        }
    }
}

/// Answered with 405 if `enableDebuggingHandlers` is false.
pub const DEBUG_PATHS: [&str; 8] =
    ["/run/", "/exec/", "/attach/", "/portForward/", "/containerLogs/", "/runningpods/", "/debug/pprof/", "/logs/"];

/// The node's HTTP server.
pub struct Server {
    node: Arc<dyn NodeApi>,
    auth: Auth,
    options: ServerOptions,
    log_watcher: LogWatcher,
    metrics: ServerMetrics,
    shutdown: CancellationToken,
}

impl Server {
    /// A server that answers nothing yet; see [`serve`](Self::serve). Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the kernel has no inotify instance left.
    pub fn new(node: Arc<dyn NodeApi>, auth: Auth, options: ServerOptions) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            node,
            auth,
            options,
            log_watcher: LogWatcher::new()?,
            metrics: ServerMetrics::new(),
            shutdown: CancellationToken::new(),
        }))
    }

    /// Stops accepting, lets requests finish, and ends streams.
    pub fn shutdown(&self) {
        self.shutdown.cancel();
    }

    async fn handle<S>(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        mut routes: S,
        request: Request<Incoming>,
    ) -> Response
    where
        S: Service<Request<Incoming>, Response = Response, Error = std::convert::Infallible>,
    {
        let began = Instant::now();
        let measured = self.metrics.begin(request.method(), request.uri().path());
        let response = self.admit_and_answer(connection, &mut routes, request).await;
        self.metrics.end(&measured, began.elapsed());
        response
    }

    async fn admit_and_answer<S>(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        routes: &mut S,
        request: Request<Incoming>,
    ) -> Response
    where
        S: Service<Request<Incoming>, Response = Response, Error = std::convert::Infallible>,
    {
        let path = request.uri().path();
        if !connection.is_local() {
            let admitted = self.auth.admit(connection.peer(), request.headers(), request.method(), path).await;
            if let Err(denied) = admitted {
                tracing::debug!(path, status = denied.status.as_u16(), "Request denied");
                return denied.into();
            }
        }
        if !connection.is_local()
            && !self.options.debugging_handlers
            && DEBUG_PATHS.iter().any(|root| path.starts_with(root))
        {
            return respond::text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.\n");
        }
        if streaming::is_streaming(path) {
            return streaming::respond(self, connection, request);
        }
        match routes.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}
