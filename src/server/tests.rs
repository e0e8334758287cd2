//! The whole server on loopback: TLS with authorities made here, and a node made of constants.

use std::{io, net::SocketAddr, path::PathBuf, sync::Mutex, time::Duration};

use futures::{FutureExt, SinkExt, StreamExt, future::BoxFuture};
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::Pod;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

use super::{
    api::*,
    auth::{AccessReview, Auth, AuthConfig, ReviewError, Reviewer, UserInfo},
    client_ca::ClientCa,
    exposition::{Exposition, Kind},
    summary::*,
    tls::{ServingCertificate, TlsOptions, server_config},
    *,
};
use crate::stream::{
    fd::{FdReader, FdWriter},
    portforward::PodConnection,
    remotecommand::Process,
};

struct Node {
    logs: tempfile::TempDir,
    complete: watch::Sender<bool>,
    sick: Mutex<bool>,
    /// What was executed.
    executed: Mutex<Vec<ExecOptions>>,
}

fn the_pod() -> Arc<Pod> {
    let pod = serde_json::json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u-1"},
        "spec": {"containers": [{"name": "app"}]},
        "status": {"containerStatuses": [{"name": "app", "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "containerID": "gantry://1", "state": {"running": {}}}]},
    });
    Arc::new(serde_json::from_value(pod).expect("pod"))
}

impl NodeApi for Node {
    fn pods(&self) -> Vec<Arc<Pod>> {
        vec![the_pod()]
    }

    fn running_pods(&self) -> BoxFuture<'_, Result<Vec<Pod>, ApiError>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn log_source<'a>(
        &'a self,
        target: &'a ContainerTarget,
        id: &'a str,
    ) -> BoxFuture<'a, Result<LogSource, ApiError>> {
        assert_eq!((target.container.as_str(), id), ("app", "gantry://1"));
        let directory = self.logs.path().to_owned();
        async move { Ok(LogSource { directory, attempt: 0, complete: self.complete.subscribe() }) }.boxed()
    }

    /// `cat` copies input to output; anything else says its name on both outputs and exits with 3.
    fn exec<'a>(
        &'a self,
        _target: &'a ContainerTarget,
        options: ExecOptions,
    ) -> BoxFuture<'a, Result<Process, ApiError>> {
        self.executed.lock().expect("lock").push(options.clone());
        async move {
            if options.command == ["missing"] {
                return Err(ApiError::Internal("no such file".into()));
            }
            let pipe = || rustix::pipe::pipe().expect("pipe");
            let (in_read, in_write) = pipe();
            let (out_read, out_write) = pipe();
            let (err_read, err_write) = pipe();
            let cat = options.command == ["cat"];
            let exit = tokio::spawn(async move {
                let mut stdout = FdWriter::new(out_write).expect("stdout");
                let mut stderr = FdWriter::new(err_write).expect("stderr");
                if cat {
                    tokio::io::copy(&mut FdReader::new(in_read).expect("stdin"), &mut stdout).await.expect("copy");
                    return 0;
                }
                stdout.write_all(b"out").await.expect("write");
                stderr.write_all(b"err").await.expect("write");
                3
            });
            Ok(Process {
                stdin: options.stdin.then(|| Box::new(FdWriter::new(in_write).expect("fd")) as _),
                stdout: Some(Box::new(FdReader::new(out_read).expect("fd"))),
                stderr: Some(Box::new(FdReader::new(err_read).expect("fd"))),
                resize: None,
                exit: exit.map(|code| code.map_err(io::Error::other)).boxed(),
            })
        }
        .boxed()
    }

    fn attach<'a>(
        &'a self,
        target: &'a ContainerTarget,
        options: AttachOptions,
    ) -> BoxFuture<'a, Result<Process, ApiError>> {
        let AttachOptions { stdin, stdout, stderr, tty } = options;
        self.exec(target, ExecOptions { command: vec!["attached".into()], stdin, stdout, stderr, tty })
    }

    fn port_forward<'a>(&'a self, _pod: &'a Arc<Pod>, port: u16) -> BoxFuture<'a, io::Result<PodConnection>> {
        async move { Ok(Box::new(TcpStream::connect(("127.0.0.1", port)).await?) as PodConnection) }.boxed()
    }

    fn summary(&self, only_cpu_and_memory: bool) -> BoxFuture<'_, Result<Summary, ApiError>> {
        async move {
            if *self.sick.lock().expect("lock") {
                return Err(ApiError::Internal("sick".into()));
            }
            let time =
                k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::from_second(1000).expect("time"));
            let cpu = CpuStats {
                time: time.clone(),
                usage_nano_cores: None,
                usage_core_nano_seconds: Some(2_500_000_000),
                psi: None,
            };
            let memory = MemoryStats {
                time: time.clone(),
                available_bytes: None,
                usage_bytes: None,
                working_set_bytes: Some(4096),
                rss_bytes: None,
                page_faults: None,
                major_page_faults: None,
                psi: None,
            };
            let container = ContainerStats {
                name: "app".into(),
                start_time: time.clone(),
                cpu: Some(cpu.clone()),
                memory: Some(memory.clone()),
                io: None,
                rootfs: None,
                logs: None,
                swap: None,
            };
            let pod = PodStats {
                pod_ref: PodReference { name: "web".into(), namespace: "shop".into(), uid: "u-1".into() },
                start_time: time.clone(),
                containers: vec![container],
                cpu: Some(cpu.clone()),
                memory: None,
                io: None,
                network: None,
                volumes: Vec::new(),
                ephemeral_storage: None,
                process_stats: (!only_cpu_and_memory).then_some(ProcessStats { process_count: Some(1) }),
                swap: None,
            };
            let node = NodeStats {
                node_name: "node-1".into(),
                system_containers: Vec::new(),
                start_time: time,
                cpu: Some(cpu),
                memory: Some(memory),
                io: None,
                network: None,
                fs: None,
                runtime: None,
                rlimit: None,
                swap: None,
            };
            Ok(Summary { node, pods: vec![pod] })
        }
        .boxed()
    }

    fn configz(&self) -> serde_json::Value {
        serde_json::json!({"kind": "KubeletConfiguration"})
    }

    fn health(&self) -> Result<(), String> {
        if *self.sick.lock().expect("lock") { Err("stuck".into()) } else { Ok(()) }
    }

    fn collect(&self, endpoint: MetricsEndpoint, out: &mut Exposition) {
        out.family("from_node", &format!("{endpoint:?}"), Kind::Gauge);
        out.sample("from_node", &[], 1.0, None);
    }
}

/// `admin` may everything, `viewer` may only `get`; the token `viewer-token` is the viewer's.
struct Reviews;

impl Reviewer for Reviews {
    fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<UserInfo>, ReviewError>> {
        let viewer = UserInfo { name: "viewer".into(), ..UserInfo::default() };
        async move { Ok((token == "viewer-token").then_some(viewer)) }.boxed()
    }

    fn access<'a>(&'a self, review: &'a AccessReview) -> BoxFuture<'a, Result<bool, ReviewError>> {
        let AccessReview { user, verb, .. } = review;
        let admin = user.name == "admin" && user.groups == ["ops", "system:authenticated"];
        async move { Ok(admin || user.name == "viewer" && *verb == "get") }.boxed()
    }
}

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(Vec::new()).expect("params");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("authority")
}

/// A certificate and its key, in PEM.
fn issue(authority: &Authority, name: &str, organisation: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
    let mut params = CertificateParams::new(vec!["node.test".to_owned()]).expect("params");
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, organisation);
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate().expect("key");
    (params.signed_by(&key, authority).expect("certificate").pem(), key.serialize_pem())
}

struct Running {
    address: SocketAddr,
    server: Arc<Server>,
    node: Arc<Node>,
    serving_ca: Authority,
    client_ca: Authority,
    accepted_cas: Arc<ClientCa>,
    certificate: Arc<ServingCertificate>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.server.shutdown();
    }
}

async fn start(options: ServerOptions) -> Running {
    let (serving_ca, client_ca) = (authority("serving"), authority("clients"));
    let accepted_cas = Arc::new(ClientCa::none());
    accepted_cas.replace(client_ca.pem().as_bytes()).expect("client CA");
    let (certificate, key) = issue(&serving_ca, "first", "", ExtendedKeyUsagePurpose::ServerAuth);
    let certificate = ServingCertificate::from_pem(certificate.as_bytes(), key.as_bytes()).expect("certificate");
    let tls = server_config(Arc::clone(&certificate), &TlsOptions::default()).expect("tls");
    let node = Arc::new(Node {
        logs: tempfile::tempdir().expect("dir"),
        complete: watch::Sender::new(false),
        sick: Mutex::new(false),
        executed: Mutex::default(),
    });
    let auth = Auth::new(AuthConfig::default(), Arc::clone(&accepted_cas), Arc::new(Reviews)).expect("auth");
    let server = Server::new(Arc::clone(&node) as _, auth, options).expect("server");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(Arc::clone(&server).serve(listener, tls));
    Running { address, server, node, serving_ca, client_ca, accepted_cas, certificate }
}

/// Who a client is.
enum As<'a> {
    Nobody,
    Token(&'a str),
    Certificate(&'a (String, String)),
}

impl Running {
    fn admin(&self) -> (String, String) {
        issue(&self.client_ca, "admin", "ops", ExtendedKeyUsagePurpose::ClientAuth)
    }

    async fn connect(&self, who: &As<'_>, alpn: &[u8]) -> TlsStream<TcpStream> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.serving_ca.der().clone()).expect("root");
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let mut config = match who {
            As::Certificate((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("certificate")];
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("key");
                builder.with_client_auth_cert(chain, key).expect("client certificate")
            }
            _ => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(self.address).await.expect("connect");
        let name = ServerName::try_from("node.test").expect("name");
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("handshake")
    }

    async fn send(&self, who: As<'_>, alpn: &[u8], method: Method, path: &str) -> (u16, HeaderMap, String) {
        let io = TokioIo::new(self.connect(&who, alpn).await);
        let mut request = Request::builder().method(method).uri(format!("https://node.test{path}"));
        if let As::Token(token) = who {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut request = request.body(Empty::<bytes::Bytes>::new()).expect("request");
        let response = if alpn == b"h2" {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.expect("handshake");
            tokio::spawn(connection);
            sender.send_request(request).await
        } else {
            request.headers_mut().insert("host", http::HeaderValue::from_static("node.test"));
            *request.uri_mut() = path.parse().expect("uri");
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("handshake");
            tokio::spawn(connection);
            sender.send_request(request).await
        };
        let (parts, body) = response.expect("response").into_parts();
        let body = body.collect().await.expect("body").to_bytes();
        (parts.status.as_u16(), parts.headers, String::from_utf8(body.to_vec()).expect("text"))
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let admin = self.admin();
        let (status, _, body) = self.send(As::Certificate(&admin), b"http/1.1", Method::GET, path).await;
        (status, body)
    }
}

#[tokio::test]
async fn who_may_what() {
    let running = start(ServerOptions::default()).await;
    let admin = running.admin();
    let stranger = issue(&authority("strangers"), "admin", "ops", ExtendedKeyUsagePurpose::ClientAuth);
    let server_only = issue(&running.client_ca, "admin", "ops", ExtendedKeyUsagePurpose::ServerAuth);
    for alpn in [&b"http/1.1"[..], b"h2"] {
        let status = async |who| running.send(who, alpn, Method::GET, "/pods").await.0;
        assert_eq!(status(As::Nobody).await, 401);
        assert_eq!(status(As::Token("wrong")).await, 401);
        assert_eq!(status(As::Token("viewer-token")).await, 200);
        assert_eq!(status(As::Certificate(&admin)).await, 200);
        assert_eq!(status(As::Certificate(&stranger)).await, 401);
        assert_eq!(status(As::Certificate(&server_only)).await, 401);
    }
    // Running something needs `create`, whatever the method.
    let exec = "/exec/shop/web/app?command=id&output=1";
    let (status, _, body) = running.send(As::Token("viewer-token"), b"http/1.1", Method::GET, exec).await;
    let expected = "Forbidden (user=viewer, verb=create, resource=nodes, subresource(s)=[proxy])\n";
    assert_eq!((status, body.as_str()), (403, expected));
    assert!(running.node.executed.lock().expect("lock").is_empty());
}

#[tokio::test]
async fn authorities_and_certificate_change_while_serving() {
    let running = start(ServerOptions::default()).await;
    let admin = running.admin();
    let shown = async |running: &Running| {
        let stream = running.connect(&As::Nobody, b"http/1.1").await;
        stream.get_ref().1.peer_certificates().expect("certificates")[0].clone()
    };
    let first = shown(&running).await;
    // An open connection feels the change of authorities.
    let io = TokioIo::new(running.connect(&As::Certificate(&admin), b"h2").await);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.expect("handshake");
    tokio::spawn(connection);
    let mut status = async || {
        let request = Request::get("https://node.test/healthz").body(Empty::<bytes::Bytes>::new()).expect("request");
        sender.send_request(request).await.expect("response").status().as_u16()
    };
    assert_eq!(status().await, 200);
    running.accepted_cas.replace(authority("others").pem().as_bytes()).expect("replace");
    assert_eq!(status().await, 401);
    assert!(running.accepted_cas.replace(b"nothing").is_err());
    let (certificate, key) = issue(&running.serving_ca, "second", "", ExtendedKeyUsagePurpose::ServerAuth);
    running.certificate.replace(certificate.as_bytes(), key.as_bytes()).expect("replace");
    assert_ne!(first, shown(&running).await);
}

#[tokio::test]
async fn ordinary_endpoints() {
    let running = start(ServerOptions::default()).await;
    assert_eq!(running.get("/healthz").await, (200, "ok".into()));
    let verbose = "[+]ping ok\n[+]log excluded: ok\n[+]syncloop ok\nhealthz check passed\n";
    assert_eq!(running.get("/healthz?verbose&exclude=log").await, (200, verbose.into()));
    assert_eq!(running.get("/healthz/ping").await, (200, "ok".into()));
    assert_eq!(running.get("/healthz/nonsense").await.0, 404);
    for path in ["/pods", "/pods/"] {
        let (status, body) = running.get(path).await;
        let list: serde_json::Value = serde_json::from_str(&body).expect("json");
        assert_eq!((status, &list["kind"], &list["apiVersion"]), (200, &"PodList".into(), &"v1".into()));
        assert_eq!(list["items"][0]["metadata"]["name"], "web");
    }
    assert_eq!(running.get("/runningpods/").await.0, 200);
    let (_, body) = running.get("/configz").await;
    assert_eq!(body, r#"{"kubeletconfig":{"kind":"KubeletConfiguration"}}"#);
    let (_, body) = running.get("/stats/summary").await;
    let summary: serde_json::Value = serde_json::from_str(&body).expect("json");
    assert_eq!(summary["node"]["cpu"]["usageCoreNanoSeconds"], 2_500_000_000_u64);
    assert_eq!(summary["pods"][0]["process_stats"]["process_count"], 1);
    let (_, body) = running.get("/stats/summary?only_cpu_and_memory=true").await;
    assert!(!body.contains("process_stats"));
    let (_, body) = running.get("/metrics/resource").await;
    for line in [
        "node_cpu_usage_seconds_total 2.5 1000000\n",
        "container_memory_working_set_bytes{container=\"app\",pod=\"web\",namespace=\"shop\"} 4096 1000000\n",
        "container_start_time_seconds{container=\"app\",pod=\"web\",namespace=\"shop\"} 1000\n",
        "pod_cpu_usage_seconds_total{pod=\"web\",namespace=\"shop\"} 2.5 1000000\n",
        "resource_scrape_error 0\n",
    ] {
        assert!(body.contains(line), "{line} not in {body}");
    }
    assert!(running.get("/metrics/probes").await.1.contains("# HELP from_node Probes\n"));
    assert!(running.get("/metrics/cadvisor").await.1.contains("# HELP from_node Cadvisor\n"));
    assert!(
        running.get("/metrics/slis").await.1.contains("kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1\n")
    );
    let (_, body) = running.get("/metrics").await;
    assert!(body.contains("kubelet_http_requests_total{long_running=\"false\",method=\"GET\",path=\"configz\",server_type=\"readwrite\"} 1\n"), "{body}");
    assert!(body.contains("from_node 1\n"));
    assert_eq!(running.get("/nonsense").await.0, 404);
    *running.node.sick.lock().expect("lock") = true;
    let failed = "[+]ping ok\n[+]log ok\n[-]syncloop failed: reason withheld\nhealthz check failed\n";
    assert_eq!(running.get("/healthz").await, (500, failed.into()));
    let (status, body) = running.get("/metrics/resource").await;
    assert_eq!(status, 200);
    assert!(body.ends_with("resource_scrape_error 1\n"));
    assert_eq!(running.get("/stats/summary").await, (500, "Internal Error: sick".into()));
}

#[tokio::test]
async fn methods_and_disabled_endpoints() {
    let directory = tempfile::tempdir().expect("dir");
    std::fs::write(directory.path().join("messages"), "hello\n").expect("write");
    let options = ServerOptions { log_directory: directory.path().to_owned(), ..ServerOptions::default() };
    let running = start(options.clone()).await;
    let admin = running.admin();
    for path in ["/pods", "/runningpods/", "/containerLogs/shop/web/app", "/logs/"] {
        let (status, headers, _) = running.send(As::Certificate(&admin), b"http/1.1", Method::POST, path).await;
        assert_eq!((status, headers["allow"].to_str().expect("text")), (405, "GET"), "{path}");
    }
    let (status, headers, _) =
        running.send(As::Certificate(&admin), b"http/1.1", Method::PUT, "/exec/shop/web/app").await;
    assert_eq!((status, headers["allow"].to_str().expect("text")), (405, "GET, POST"));
    let (status, _, body) =
        running.send(As::Certificate(&admin), b"http/1.1", Method::POST, "/checkpoint/shop/web/app").await;
    assert!(status == 404 && body.contains("not supported"), "{status} {body}");
    assert_eq!(running.get("/logs/messages").await, (200, "hello\n".into()));
    assert_eq!(running.get("/logs/%2e%2e/%2e%2e/etc/passwd").await.0, 404);
    assert_eq!(running.get("/logs/?query=gantry").await.0, 501);
    let without = start(ServerOptions { debugging_handlers: false, ..options.clone() }).await;
    for path in ["/exec/shop/web/app?command=id&output=1", "/containerLogs/shop/web/app", "/logs/", "/runningpods/"] {
        assert_eq!(without.get(path).await, (405, "Debug endpoints are disabled.\n".into()), "{path}");
    }
    assert_eq!(without.get("/pods").await.0, 200);
    let without = start(ServerOptions { system_logs: false, ..options }).await;
    assert_eq!(without.get("/logs/").await, (405, "logs endpoint is disabled.".into()));
}

#[tokio::test]
async fn container_logs() {
    let running = start(ServerOptions::default()).await;
    let line = |text: &str| format!("2024-01-01T00:00:00.000000000Z stdout F {text}\n");
    std::fs::write(running.node.logs.path().join("0.log"), line("one") + &line("two")).expect("write");
    std::fs::write(running.node.logs.path().join("0.log.20230101-000000"), line("old")).expect("write");
    let logs = "/containerLogs/shop/web/app";
    assert_eq!(running.get(logs).await, (200, "old\none\ntwo\n".into()));
    assert_eq!(
        running.get(&format!("{logs}?tailLines=1&timestamps=true")).await,
        (200, line("two").replace("stdout F ", ""))
    );
    assert_eq!(running.get(&format!("{logs}?tailLines=x")).await.0, 400);
    assert_eq!(running.get(&format!("{logs}?limitBytes=0")).await.0, 422);
    let missing = running.get(&format!("{logs}?previous=true")).await;
    assert_eq!(missing, (400, "previous terminated container \"app\" in pod \"web\" not found".into()));
    assert_eq!(
        running.get("/containerLogs/shop/web/x").await,
        (404, "container \"x\" not found in pod \"web\"".into())
    );
    assert_eq!(running.get("/containerLogs/shop/x/app").await, (404, "pod \"x\" does not exist".into()));
    // Following ends with the container.
    let (file, complete) = (running.node.logs.path().join("0.log"), running.node.complete.clone());
    let more = line("three");
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut log = std::fs::File::options().append(true).open(file).expect("open");
        io::Write::write_all(&mut log, more.as_bytes()).expect("write");
        complete.send_replace(true);
    });
    assert_eq!(running.get(&format!("{logs}?follow=true&tailLines=1")).await, (200, "two\nthree\n".into()));
}

#[tokio::test]
async fn run_and_refusals_of_streams() {
    let running = start(ServerOptions::default()).await;
    let admin = running.admin();
    let post = async |path: &str| {
        let (status, _, body) = running.send(As::Certificate(&admin), b"http/1.1", Method::POST, path).await;
        (status, body)
    };
    assert_eq!(post("/run/shop/web/app?cmd=ls%20-l").await, (500, "command 'ls -l' exited with 3: outerr".into()));
    assert_eq!(running.node.executed.lock().expect("lock")[0].command, ["ls", "-l"]);
    assert_eq!(post("/run/shop/web/u-2/app?cmd=ls").await, (404, "pod not found".into()));
    assert_eq!(post("/exec/shop/web/app?command=id").await.0, 400, "no stream is asked for");
    assert_eq!(post("/exec/shop/web/app?output=1").await.0, 400, "no command");
    assert_eq!(post("/exec/shop/none/app?output=1&command=id").await, (404, "pod does not exist".into()));
    assert_eq!(post("/exec/shop/web/u-9/app?output=1&command=id").await, (404, "pod not found".into()));
    assert_eq!(post("/exec/shop/web/x?output=1&command=id").await, (404, "container not found (\"x\")".into()));
    let (status, body) = post("/exec/shop/web/u-1/app?output=1&command=id").await;
    assert!(
        status == 400 && body.starts_with("unable to upgrade: header X-Stream-Protocol-Version"),
        "{status} {body}"
    );
    assert_eq!(post("/portForward/shop/web").await.0, 400);
}

#[tokio::test]
async fn exec_over_websocket() {
    let running = start(ServerOptions::default()).await;
    let admin = running.admin();
    let io = running.connect(&As::Certificate(&admin), b"http/1.1").await;
    let mut request = tokio_tungstenite::tungstenite::client::IntoClientRequest::into_client_request(
        "wss://node.test/exec/shop/web/app?command=cat&input=1&output=1&error=1",
    )
    .expect("request");
    request.headers_mut().insert("sec-websocket-protocol", http::HeaderValue::from_static("v5.channel.k8s.io"));
    let (mut socket, response) = tokio_tungstenite::client_async(request, io).await.expect("upgrade");
    assert_eq!(response.headers()["sec-websocket-protocol"], "v5.channel.k8s.io");
    let payload = vec![b'z'; 300_000];
    for piece in payload.chunks(30_000) {
        socket.send(Message::binary([&[0], piece].concat())).await.expect("send");
    }
    socket.send(Message::binary(&b"\xff\x00"[..])).await.expect("send");
    let (mut echoed, mut status) = (Vec::new(), Vec::new());
    while let Some(Ok(message)) = socket.next().await {
        let data = message.into_data();
        match data.first() {
            Some(1) => echoed.extend_from_slice(&data[1..]),
            Some(3) if data.get(1) == Some(&b'{') => status.extend_from_slice(&data[1..]),
            _ => {}
        }
    }
    assert_eq!(echoed, payload);
    assert_eq!(status, br#"{"status":"Success"}"#);
    let (_, metrics) = running.get("/metrics").await;
    assert!(metrics.contains("kubelet_websocket_streaming_requests_total{subresource=\"exec\"} 1\n"));
}

#[tokio::test]
async fn spdy_upgrade_answers_the_documented_headers() {
    let running = start(ServerOptions::default()).await;
    let admin = running.admin();
    for (path, offered, chosen) in [
        ("/exec/shop/web/app?command=id&output=1", "v5.channel.k8s.io,v4.channel.k8s.io", "v4.channel.k8s.io"),
        ("/attach/shop/web/u-1/app?output=1", "v2.channel.k8s.io", "v2.channel.k8s.io"),
        ("/portForward/shop/web/u-1", "portforward.k8s.io", "portforward.k8s.io"),
    ] {
        let mut io = running.connect(&As::Certificate(&admin), b"http/1.1").await;
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: node.test\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: {offered}\r\n\r\n"
        );
        io.write_all(request.as_bytes()).await.expect("write");
        // A SPDY ping right behind the request: it must not get lost in HTTP's buffers.
        io.write_all(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]).await.expect("write");
        let mut received = Vec::new();
        while !received.ends_with(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]) {
            assert_ne!(io.read_buf(&mut received).await.expect("read"), 0, "{}", String::from_utf8_lossy(&received));
        }
        let text = String::from_utf8_lossy(&received).to_ascii_lowercase();
        assert!(text.starts_with("http/1.1 101 switching protocols\r\n"), "{text}");
        for header in
            ["connection: upgrade\r\n", "upgrade: spdy/3.1\r\n", &format!("x-stream-protocol-version: {chosen}\r\n")]
        {
            assert!(text.contains(header), "{header} not in {text}");
        }
    }
}

#[tokio::test]
async fn health_port() {
    let running = start(ServerOptions::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let task = tokio::spawn(Arc::clone(&running.server).serve_healthz(listener));
    let get = async |path: &str| {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    };
    assert!(get("/healthz").await.ends_with("\r\n\r\nok"));
    assert!(get("/pods").await.starts_with("HTTP/1.1 404"));
    running.server.shutdown();
    tokio::time::timeout(Duration::from_secs(5), task).await.expect("in time").expect("join");
}

#[test]
fn options_have_the_kubelets_defaults() {
    let options = ServerOptions::default();
    assert_eq!(options.log_directory, PathBuf::from("/var/log"));
    assert_eq!(options.stream_limits.idle_timeout, Duration::from_secs(4 * 3600));
}
