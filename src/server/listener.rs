//! Accepting connections: TLS, HTTP/1.1 and HTTP/2, bounds and timeouts.

use std::{convert::Infallible, future::poll_fn, io, sync::Arc, time::Duration};

use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustix::net::sockopt;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::Service;

use super::{Server, client_ca::PeerCertificates, local::LocalApi, routes};

/// For the TLS handshake; as long as Go's client gives it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// An idle connection is closed after this time, the kubelet's, and so is one that does not finish its headers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// For requests that are being answered when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// The kubelet's limit on headers, in bytes.
const MAX_HEADERS: u32 = 1 << 20;
/// Requests at once on one HTTP/2 connection; Go's default.
const MAX_H2_STREAMS: u32 = 250;
/// Pause after the system is out of descriptors or memory for connections.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Keep-alive probes on TCP, as Go sends them.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A client's connection.
pub struct Connection {
    peer: PeerCertificates,
    local: bool,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// The certificates that the client showed.
    pub fn peer(&self) -> &PeerCertificates {
        &self.peer
    }

    /// Whether it came over the unix socket, whose peers are allowed everything.
    pub fn is_local(&self) -> bool {
        self.local
    }
}

/// A socket that connections come from.
trait Listener {
    type Stream;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.accept().await?;
        tune(&stream);
        Ok(stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// Root, and who runs this program, may use the unix socket.
fn is_trusted(stream: &UnixStream) -> bool {
    let peer = stream.peer_cred().map(|peer| peer.uid());
    peer.is_ok_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw())
}

impl Server {
    /// Serves HTTPS until [`shutdown`](Self::shutdown).
    pub async fn serve(self: Arc<Self>, listener: TcpListener, tls: ServerConfig) {
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let routes = warp::service(routes::all(Arc::clone(&self)));
        let server = Arc::clone(&self);
        let handle = move |stream: TcpStream, permit: OwnedSemaphorePermit| {
            let (server, acceptor, routes) = (Arc::clone(&server), acceptor.clone(), routes.clone());
            async move {
                let stream = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
                    Err(_) => return tracing::debug!("TLS handshake timed out"),
                };
                let peer = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec).unwrap_or_default();
                let connection = Arc::new(Connection { peer, local: false, _permit: permit });
                let handler = Arc::clone(&server);
                let service = service_fn(move |request: Request<Incoming>| {
                    let (handler, connection, routes) = (Arc::clone(&handler), Arc::clone(&connection), routes.clone());
                    async move { Ok::<_, Infallible>(handler.handle(&connection, routes, request).await) }
                });
                http(&server, stream, service).await;
            }
        };
        self.accept(listener, handle).await;
    }

    /// Serves `/healthz` over plain HTTP, without authentication, until [`shutdown`](Self::shutdown). For the
    /// health port on the loopback interface.
    pub async fn serve_healthz(self: Arc<Self>, listener: TcpListener) {
        let routes = warp::service(routes::health_only(Arc::clone(&self)));
        let server = Arc::clone(&self);
        let handle = move |stream: TcpStream, permit: OwnedSemaphorePermit| {
            let (server, routes) = (Arc::clone(&server), routes.clone());
            async move {
                let service = service_fn(move |request: Request<Incoming>| routes.clone().call(request));
                http(&server, stream, service).await;
                drop(permit);
            }
        };
        self.accept(listener, handle).await;
    }

    /// Serves every endpoint and the node's [`LocalApi`] on a unix socket until [`shutdown`](Self::shutdown): to root
    /// and our own user, by their peer credentials, without TLS or an authorizer.
    pub async fn serve_local(self: Arc<Self>, listener: UnixListener, local: Arc<dyn LocalApi>) {
        let routes = warp::service(routes::with_local(Arc::clone(&self), local));
        let server = Arc::clone(&self);
        let handle = move |stream: UnixStream, permit: OwnedSemaphorePermit| {
            let (server, routes) = (Arc::clone(&server), routes.clone());
            async move {
                if !is_trusted(&stream) {
                    return tracing::warn!("a user who is not root was refused at the local socket");
                }
                let connection =
                    Arc::new(Connection { peer: PeerCertificates::default(), local: true, _permit: permit });
                let handler = Arc::clone(&server);
                let service = service_fn(move |request: Request<Incoming>| {
                    let (handler, connection, routes) = (Arc::clone(&handler), Arc::clone(&connection), routes.clone());
                    async move { Ok::<_, Infallible>(handler.handle(&connection, routes, request).await) }
                });
                http(&server, stream, service).await;
            }
        };
        self.accept(listener, handle).await;
    }

    async fn accept<L, F>(&self, listener: L, handle: impl Fn(L::Stream, OwnedSemaphorePermit) -> F)
    where
        L: Listener,
        F: Future<Output = ()> + Send + 'static,
    {
        let places = Arc::new(Semaphore::new(self.options.max_connections));
        loop {
            let next = async {
                let permit = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
                let stream = listener.next().await?;
                Ok::<_, io::Error>((stream, permit))
            };
            let accepted = tokio::select! {
                accepted = next => accepted,
                () = self.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((stream, permit)) => {
                    tokio::spawn(handle(stream, permit));
                }
                Err(error) => {
                    tracing::warn!(%error, "Unable to accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn tune(stream: &TcpStream) {
    // Without these the connection works all the same, only later.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, KEEP_ALIVE);
    let _ = sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE);
}

async fn http<T, S, B>(server: &Server, stream: T, service: S)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: hyper::service::Service<Request<Incoming>, Response = http::Response<B>, Error = Infallible> + Send,
    S::Future: Send + 'static,
    B: hyper::body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .max_buf_size(usize::try_from(MAX_HEADERS).unwrap_or(usize::MAX));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_H2_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(IDLE_TIMEOUT)
        .keep_alive_timeout(HANDSHAKE_TIMEOUT);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = server.shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(DRAIN_TIMEOUT, poll_fn(|cx| connection.as_mut().poll(cx))).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(error, "Connection ended early");
    }
}
