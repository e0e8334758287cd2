use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{ContainerPort, ExecAction, GRPCAction, HTTPGetAction, HTTPHeader, TCPSocketAction};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

const LOOPBACK: &str = "127.0.0.1";

/// For probes that run no command.
struct NoExec;

impl Exec for NoExec {
    async fn exec(&self, _: &[String], _: Duration) -> Result<ExecEnd, String> {
        panic!("this probe runs no command")
    }
}

/// Answers requests in turn, with texts that may name the server as `{port}`; keeps what it was asked.
async fn server(answers: Vec<&'static str>) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = requests.clone();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                let n = stream.read(&mut buffer).await.unwrap();
                request.extend_from_slice(&buffer[..n]);
            }
            seen.lock().unwrap().push(String::from_utf8(request).unwrap());
            let _ = stream.write_all(answer.replace("{port}", &port.to_string()).as_bytes()).await;
        }
    });
    (port, requests)
}

fn http(port: u16) -> HTTPGetAction {
    HTTPGetAction { port: IntOrString::Int(i32::from(port)), path: Some("/healthz".into()), ..HTTPGetAction::default() }
}

async fn run(probe: Probe) -> Result<Answer, ProbeError> {
    super::probe(&probe, &Container::default(), Some(LOOPBACK), &NoExec).await
}

async fn run_http(action: HTTPGetAction) -> Result<Answer, ProbeError> {
    run(Probe { http_get: Some(action), ..Probe::default() }).await
}

fn answer(verdict: Verdict, output: &str) -> Result<Answer, ProbeError> {
    Ok(Answer { verdict, output: output.to_owned() })
}

#[tokio::test]
async fn statuses_are_judged() {
    for (response, verdict, output) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Verdict::Success, "ok"),
        ("HTTP/1.1 204 No Content\r\n\r\n", Verdict::Success, ""),
        ("HTTP/1.1 304 Not Modified\r\n\r\n", Verdict::Warning, "Probe terminated redirects, Response body: "),
        (
            "HTTP/1.1 500 Oops\r\nContent-Length: 6\r\n\r\nsecret",
            Verdict::Failure,
            "HTTP probe failed with statuscode: 500",
        ),
        (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            Verdict::Failure,
            "HTTP probe failed with statuscode: 404",
        ),
    ] {
        let (port, _) = server(vec![response]).await;
        assert_eq!(run_http(http(port)).await, answer(verdict, output), "{response}");
    }
}

#[tokio::test]
async fn requests_look_like_a_kubelets() {
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    let (port, requests) = server(vec![ok, ok]).await;
    run_http(http(port)).await.unwrap();
    let header = |name: &str, value: &str| HTTPHeader { name: name.into(), value: value.into() };
    let mut action = http(port);
    action.http_headers = Some(vec![
        header("Host", "example.com"),
        header("X-Twice", "1"),
        header("X-Twice", "2"),
        header("Accept", ""),
        header("user-agent", "mine"),
    ]);
    run_http(action).await.unwrap();
    let requests = requests.lock().unwrap();
    assert!(requests[0].starts_with("GET /healthz HTTP/1.1\r\n"), "{}", requests[0]);
    for line in [&format!("Host: {LOOPBACK}:{port}"), "User-Agent: kube-probe/1.37", "Accept: */*", "Connection: close"]
    {
        assert!(requests[0].contains(&format!("{line}\r\n")), "{line}\n{}", requests[0]);
    }
    for line in ["Host: example.com", "X-Twice: 1", "X-Twice: 2", "User-Agent: mine"] {
        assert!(requests[1].contains(&format!("{line}\r\n")), "{line}\n{}", requests[1]);
    }
    assert!(!requests[1].contains("Accept") && !requests[1].contains(LOOPBACK), "{}", requests[1]);
}

#[tokio::test]
async fn redirects_are_followed_on_the_same_host_only() {
    let to_self = "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}/next\r\nContent-Length: 0\r\n\r\n";
    let relative = "HTTP/1.1 307 X\r\nLocation: last\r\nContent-Length: 0\r\n\r\n";
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone";
    let (port, requests) = server(vec![to_self, relative, ok]).await;
    assert_eq!(run_http(http(port)).await, answer(Verdict::Success, "done"));
    let lines: Vec<_> = requests.lock().unwrap().iter().map(|r| r.lines().next().unwrap().to_owned()).collect();
    assert_eq!(lines, ["GET /healthz HTTP/1.1", "GET /next HTTP/1.1", "GET /last HTTP/1.1"]);

    let away = "HTTP/1.1 301 X\r\nLocation: http://example.com/\r\nContent-Length: 3\r\n\r\nbye";
    let (port, _) = server(vec![away]).await;
    assert_eq!(run_http(http(port)).await, answer(Verdict::Warning, "Probe terminated redirects, Response body: bye"));

    let (port, requests) = server(vec![to_self; 20]).await;
    let endless = run_http(http(port)).await.unwrap();
    assert!(endless.output.ends_with("stopped after 10 redirects"), "{endless:?}");
    assert_eq!(requests.lock().unwrap().len(), 11);
}

#[tokio::test]
async fn long_answers_are_cut() {
    let body: &'static str = Box::leak("x".repeat(40_000).into_boxed_str());
    let response: &'static str =
        Box::leak(format!("HTTP/1.1 200 OK\r\nContent-Length: 40000\r\n\r\n{body}").into_boxed_str());
    let (port, _) = server(vec![response]).await;
    assert_eq!(run_http(http(port)).await.unwrap().output.len(), MAX_OUTPUT);
}

#[tokio::test]
async fn silence_is_a_failure_in_time() {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let silent = tokio::spawn(async move {
        let _connection = listener.accept().await.unwrap();
        pending::<()>().await;
    });
    let began = std::time::Instant::now();
    let answer = run_http(http(port)).await.unwrap();
    assert_eq!(answer.verdict, Verdict::Failure);
    assert!(answer.output.contains("Client.Timeout exceeded"), "{answer:?}");
    assert!(began.elapsed() < Duration::from_secs(3));
    silent.abort();
}

#[tokio::test]
async fn a_body_that_ends_early_is_an_error_and_tried_again() {
    let short = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort";
    let (port, requests) = server(vec![short, short, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"]).await;
    assert_eq!(run_http(http(port)).await, answer(Verdict::Success, "ok"));
    assert_eq!(requests.lock().unwrap().len(), 3);
    let (port, _) = server(vec![short; 3]).await;
    let (reason, message) = run_http(http(port)).await.unwrap_err().event(ProbeKind::Liveness);
    assert_eq!(reason, "Unhealthy");
    assert!(message.starts_with("Liveness probe errored and resulted in unknown state: "), "{message}");
}

async fn closed_port() -> u16 {
    TcpListener::bind((LOOPBACK, 0)).await.unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn refused_connections_are_failures_in_gos_words() {
    let port = closed_port().await;
    let answer = run_http(http(port)).await.unwrap();
    let dial = format!("dial tcp {LOOPBACK}:{port}: connect: connection refused");
    assert_eq!(answer.output, format!("Get \"http://{LOOPBACK}:{port}/healthz\": {dial}"));
    assert_eq!(
        answer.event(ProbeKind::Readiness),
        Some(("Unhealthy", format!("Readiness probe failed: {}", answer.output)))
    );
    let tcp = TCPSocketAction { port: IntOrString::Int(i32::from(port)), host: None };
    assert_eq!(run(Probe { tcp_socket: Some(tcp), ..Probe::default() }).await.unwrap(), Answer::failure(dial));
}

#[tokio::test]
async fn open_ports_are_found_by_name() {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let port = i32::from(listener.local_addr().unwrap().port());
    let named = ContainerPort { name: Some("web".into()), container_port: port, ..ContainerPort::default() };
    let container = Container { ports: Some(vec![named]), ..Container::default() };
    let tcp = |name: &str| TCPSocketAction { port: IntOrString::String(name.into()), host: None };
    let probe = |name: &str| Probe { tcp_socket: Some(tcp(name)), ..Probe::default() };
    assert_eq!(super::probe(&probe("web"), &container, Some(LOOPBACK), &NoExec).await, Ok(Answer::success("")));
    let unknown = super::probe(&probe("nope"), &container, Some(LOOPBACK), &NoExec).await;
    assert_eq!(unknown, Err(ProbeError::UnknownPort("nope".into())));
    assert_eq!(super::probe(&probe("web"), &container, None, &NoExec).await, Err(ProbeError::NoAddress));
    assert_eq!(run(Probe::default()).await, Err(ProbeError::NoAction(String::new())));
}

/// A TLS server with a certificate that nobody would trust.
async fn tls_server(alpn: &[&[u8]]) -> SocketAddr {
    let key = rcgen::generate_simple_self_signed(vec!["wrong.example".into()]).unwrap();
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            tokio::spawn(serve(stream, http2));
        }
    });
    address
}

async fn serve<S>(stream: S, http2: bool)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| async move {
        Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(format!("{:?}", request.version())))))
    });
    let io = TokioIo::new(stream);
    if http2 {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
    }
}

#[tokio::test]
async fn certificates_are_not_checked_and_http2_is_negotiated() {
    for (alpn, version) in
        [(&[&b"h2"[..], b"http/1.1"][..], "HTTP/2.0"), (&[b"http/1.1"], "HTTP/1.1"), (&[], "HTTP/1.1")]
    {
        let mut action = http(tls_server(alpn).await.port());
        action.scheme = Some("HTTPS".into());
        assert_eq!(run_http(action).await, answer(Verdict::Success, version));
    }
}

#[tokio::test]
async fn https_to_a_plain_port_is_explained() {
    let (port, _) = plain_chatter().await;
    let mut action = http(port);
    action.scheme = Some("HTTPS".into());
    let answer = run_http(action).await.unwrap();
    assert!(answer.output.ends_with("server gave HTTP response to HTTPS client"), "{answer:?}");
}

/// Says something in plain HTTP to whoever connects.
async fn plain_chatter() -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 512]).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
        }
    });
    (port, task)
}

#[tokio::test]
async fn cleartext_http2_is_spoken_on_request() {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { serve(listener.accept().await.unwrap().0, true).await });
    let mut action = http(port);
    action.protocol = Some("HTTP2".into());
    assert_eq!(run_http(action).await, answer(Verdict::Success, "HTTP/2.0"));
}

/// A health server: what it answers depends on the service asked for.
async fn health_server() -> u16 {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| async move {
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let service = String::from_utf8_lossy(body.get(7..).unwrap_or_default()).into_owned();
        if service == "hangs" {
            pending::<()>().await;
        }
        let (status, code, text) = match service.as_str() {
            "sick" => (Some(2), "0", ""),
            "unknown" => (None, "5", "unknown%20service"),
            "old" => (None, "12", "unknown service grpc.health.v1.Health"),
            _ => (Some(1), "0", ""),
        };
        let data = status.map(|s| Ok(Frame::data(Bytes::from(vec![0, 0, 0, 0, 2, 8, s]))));
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", code.parse().unwrap());
        trailers.insert("grpc-message", text.parse().unwrap());
        let frames = data.into_iter().chain([Ok::<_, Infallible>(Frame::trailers(trailers))]);
        Ok::<_, Infallible>(http::Response::new(StreamBody::new(futures::stream::iter(frames.collect::<Vec<_>>()))))
    });
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
        }
    });
    port
}

#[tokio::test]
async fn grpc_health_is_judged() {
    let port = i32::from(health_server().await);
    for (service, verdict, output) in [
        (None, Verdict::Success, "service healthy"),
        (Some("sick"), Verdict::Failure, "service unhealthy (responded with \"NOT_SERVING\")"),
        (
            Some("unknown"),
            Verdict::Failure,
            "error: health rpc probe failed: rpc error: code = NotFound desc = unknown service",
        ),
        (
            Some("old"),
            Verdict::Failure,
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): \
             unknown service grpc.health.v1.Health",
        ),
        (Some("hangs"), Verdict::Failure, "timeout: health rpc did not complete within 1s"),
    ] {
        let grpc = GRPCAction { port, service: service.map(str::to_owned), mode: None };
        assert_eq!(run(Probe { grpc: Some(grpc), ..Probe::default() }).await, answer(verdict, output), "{service:?}");
    }
    let port = i32::from(closed_port().await);
    let grpc = GRPCAction { port, service: None, mode: None };
    let refused = run(Probe { grpc: Some(grpc), ..Probe::default() }).await.unwrap();
    assert!(refused.output.starts_with("error: failed to connect service at \"127.0.0.1:"), "{refused:?}");
}

/// Ends as told, after as many errors as told.
struct Scripted(Mutex<Vec<Result<ExecEnd, String>>>);

impl Exec for Scripted {
    async fn exec(&self, command: &[String], timeout: Duration) -> Result<ExecEnd, String> {
        assert_eq!((command, timeout), (&["cat".to_owned(), "/x y".to_owned()][..], Duration::from_secs(75)));
        self.0.lock().unwrap().remove(0)
    }
}

#[tokio::test]
async fn commands_are_judged_by_their_exit_code() {
    let command = Some(vec!["cat".to_owned(), "/x y".to_owned()]);
    let probe = Probe { exec: Some(ExecAction { command }), timeout_seconds: Some(75), ..Probe::default() };
    let exited = |code, output: &[u8]| Ok(ExecEnd::Exited { code, output: output.to_vec() });
    let no_container = || Err("container not running".to_owned());
    for (script, expected) in [
        (vec![exited(0, b"fine")], answer(Verdict::Success, "fine")),
        (vec![exited(1, b"no \xff")], answer(Verdict::Failure, "no \u{fffd}")),
        (vec![exited(0, &[b'x'; 20_000])], answer(Verdict::Success, &"x".repeat(MAX_OUTPUT))),
        (
            vec![Ok(ExecEnd::TimedOut)],
            answer(Verdict::Failure, "command timed out: \"cat /x y\" timed out after 1m15s"),
        ),
        (vec![no_container(), no_container(), exited(0, b"")], answer(Verdict::Success, "")),
        (vec![no_container(), no_container(), no_container()], Err(ProbeError::Exec("container not running".into()))),
    ] {
        let exec = Scripted(Mutex::new(script));
        assert_eq!(super::probe(&probe, &Container::default(), None, &exec).await, expected);
        assert!(exec.0.lock().unwrap().is_empty());
    }
}
