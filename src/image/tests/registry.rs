//! A registry on loopback. Written on bare sockets, because most of its replies are ones that an HTTP library refuses to send.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::super::digest::Digest;
use super::super::manifest::{OCI_INDEX, OCI_MANIFEST};
use super::{Layer, TestImage};

/// How one request is answered instead of rightly.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// With this status.
    Status(u16),
    /// With the right head and only so many bytes.
    Truncate(usize),
    /// With so many bytes, and then silence.
    Stall(usize),
    /// Ignoring a range.
    NoRange,
    /// Rightly, but elsewhere.
    Redirect(String),
    /// Rightly, but only after this.
    Delay(Duration),
}

#[derive(Default)]
struct State {
    documents: HashMap<String, (String, Vec<u8>)>,
    faults: HashMap<String, VecDeque<Fault>>,
    log: Vec<String>,
    login: Option<(String, String)>,
}

/// A running registry; stops when dropped.
pub(super) struct TestRegistry {
    pub host: String,
    state: Arc<Mutex<State>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl TestRegistry {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let (served, address) = (Arc::clone(&state), host.clone());
        let server = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                tokio::spawn(serve(stream, Arc::clone(&served), address.clone()));
            }
        });
        Self { host, state, server }
    }

    /// The full name of a repository and tag.
    pub fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.host)
    }

    pub fn put(&self, path: &str, media_type: &str, bytes: &[u8]) {
        self.state.lock().unwrap().documents.insert(path.into(), (media_type.into(), bytes.into()));
    }

    pub fn put_layer(&self, repository: &str, layer: &Layer) {
        self.put(&blob(repository, &layer.digest), "application/octet-stream", &layer.blob);
    }

    /// Puts everything of an image, under a tag and its digest.
    pub fn push(&self, repository: &str, tag: &str, image: &TestImage, layers: &[&Layer]) {
        for reference in [tag, image.digest().as_str()] {
            self.put(&manifest(repository, reference), OCI_MANIFEST, &image.manifest);
        }
        self.put(&blob(repository, &Digest::sha256(&image.config)), "application/octet-stream", &image.config);
        for layer in layers {
            self.put_layer(repository, layer);
        }
    }

    /// Lets a tag point at an index with the image.
    pub fn push_index(&self, repository: &str, tag: &str, image: &TestImage, layers: &[&Layer]) -> Digest {
        self.push(repository, tag, image, layers);
        let (index, digest) = (image.index(), Digest::sha256(&image.index()));
        for reference in [tag, digest.as_str()] {
            self.put(&manifest(repository, reference), OCI_INDEX, &index);
        }
        digest
    }

    pub fn fault(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        self.state.lock().unwrap().faults.entry(path.into()).or_default().extend(faults);
    }

    /// From now on only this user gets in, by a token.
    pub fn require_login(&self, user: &str, password: &str) {
        self.state.lock().unwrap().login = Some((user.into(), password.into()));
    }

    /// Requests so far, as `GET path` and the range if there was one.
    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    pub fn count(&self, request: &str) -> usize {
        self.log().iter().filter(|line| line.as_str() == request).count()
    }

    pub fn clear_log(&self) {
        self.state.lock().unwrap().log.clear();
    }
}

pub(super) fn blob(repository: &str, digest: &Digest) -> String {
    format!("/v2/{repository}/blobs/{digest}")
}

pub(super) fn manifest(repository: &str, reference: &str) -> String {
    format!("/v2/{repository}/manifests/{reference}")
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>, host: String) {
    let mut stream = BufReader::new(stream);
    while let Some((method, path, headers)) = read_request(&mut stream).await {
        if answer(&mut stream, &state, &host, &method, &path, &headers).await.is_none() {
            return;
        }
    }
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<(String, String, HashMap<String, String>)> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok().filter(|length| *length > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok().filter(|length| *length > 0)?;
        let Some((key, value)) = line.trim().split_once(':') else { break };
        headers.insert(key.to_lowercase(), value.trim().to_owned());
    }
    if let Some(length) = headers.get("content-length").and_then(|l| l.parse().ok()) {
        stream.read_exact(&mut vec![0; length]).await.ok()?;
    }
    Some((method, path, headers))
}

/// Answers one request; `None` closes the connection.
async fn answer(
    stream: &mut BufReader<TcpStream>,
    state: &Mutex<State>,
    host: &str,
    method: &str,
    path: &str,
    headers: &HashMap<String, String>,
) -> Option<()> {
    let range = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let (document, fault, login) = {
        let mut state = state.lock().unwrap();
        let range = range.map_or(String::new(), |start| format!(" from {start}"));
        state.log.push(format!("{method} {}{range}", path.split('?').next().unwrap()));
        let fault = state.faults.get_mut(path).and_then(VecDeque::pop_front);
        (state.documents.get(path).cloned(), fault, state.login.clone())
    };
    let authorization = headers.get("authorization").map_or("", String::as_str);
    if let Some((user, password)) = login {
        let basic = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        if path.starts_with("/token?") {
            let allowed = authorization == format!("Basic {basic}") && path.contains("scope=repository%3A");
            return match allowed {
                true => reply(stream, 200, "", br#"{"token": "t0ken", "expires_in": 300}"#).await,
                false => {
                    reply(stream, 401, "", br#"{"errors": [{"code": "UNAUTHORIZED", "message": "wrong user"}]}"#).await
                }
            };
        }
        if authorization != "Bearer t0ken" {
            let challenge = format!(
                "www-authenticate: Bearer realm=\"http://{host}/token\",service=\"test\",scope=\"repository:any:pull\"\r\n"
            );
            return reply(stream, 401, &challenge, b"").await;
        }
    }
    let Some((media_type, bytes)) = document else {
        return match fault {
            Some(Fault::Status(status)) => reply(stream, status, "", b"").await,
            _ => reply(stream, 404, "", br#"{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "unknown"}]}"#).await,
        };
    };
    let head = format!("content-type: {media_type}\r\ndocker-content-digest: {}\r\n", Digest::sha256(&bytes));
    if method == "HEAD" {
        return match fault {
            Some(Fault::Status(status)) => reply(stream, status, "", b"").await,
            _ => send(stream, &format!("HTTP/1.1 200 OK\r\n{head}content-length: {}\r\n\r\n", bytes.len())).await,
        };
    }
    let start = range.filter(|_| !matches!(fault, Some(Fault::NoRange))).unwrap_or(0).min(bytes.len());
    let status = if start > 0 { 206 } else { 200 };
    let part = &bytes[start..];
    match fault {
        Some(Fault::Status(status)) => reply(stream, status, "", b"").await,
        Some(Fault::Redirect(to)) => reply(stream, 307, &format!("location: {to}\r\n"), b"").await,
        Some(Fault::Truncate(length) | Fault::Stall(length)) => {
            send(stream, &format!("HTTP/1.1 {status} X\r\n{head}content-length: {}\r\n\r\n", part.len())).await?;
            stream.write_all(&part[..length.min(part.len())]).await.ok()?;
            stream.flush().await.ok()?;
            if matches!(fault, Some(Fault::Stall(_))) {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            None
        }
        Some(Fault::Delay(pause)) => {
            tokio::time::sleep(pause).await;
            reply(stream, status, &head, part).await
        }
        Some(Fault::NoRange) | None => reply(stream, status, &head, part).await,
    }
}

async fn reply(stream: &mut BufReader<TcpStream>, status: u16, head: &str, body: &[u8]) -> Option<()> {
    send(stream, &format!("HTTP/1.1 {status} X\r\n{head}content-length: {}\r\n\r\n", body.len())).await?;
    stream.write_all(body).await.ok()?;
    stream.flush().await.ok()
}

async fn send(stream: &mut BufReader<TcpStream>, text: &str) -> Option<()> {
    stream.write_all(text.as_bytes()).await.ok()?;
    stream.flush().await.ok()
}
