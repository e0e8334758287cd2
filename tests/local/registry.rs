//! A registry on loopback with one image: a static busybox. Only what a pull asks for; `src/image/tests` has one that
//! misbehaves.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

/// Path to media type and content.
type Documents = HashMap<String, (&'static str, Vec<u8>)>;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn busybox_layer() -> Vec<u8> {
    let busybox = std::fs::read("/bin/busybox").expect("a static busybox (Debian: busybox-static)");
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(busybox.len() as u64);
    tar.append_data(&mut header, "bin/busybox", &*busybox).expect("tar");
    for applet in ["sh", "sleep", "cat", "echo", "ip"] {
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        tar.append_link(&mut link, format!("bin/{applet}"), "busybox").expect("tar");
    }
    tar.into_inner().expect("tar")
}

/// Bytes that are sent at once, with a pause after them.
const CHUNK: usize = 64 << 10;

/// Serves `busybox:1` from the calling thread's network namespace for as long as the process lives; returns host:port.
/// A pause after each 64 KiB makes pulls slow enough to be looked at.
pub fn start(pause: Option<Duration>) -> String {
    let layer = busybox_layer();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture, "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len()}],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut documents = Documents::new();
    for reference in ["1".to_owned(), digest(&manifest)] {
        documents.insert(format!("/v2/busybox/manifests/{reference}"), (MANIFEST, manifest.clone()));
    }
    for blob in [layer, config] {
        documents.insert(format!("/v2/busybox/blobs/{}", digest(&blob)), ("application/octet-stream", blob));
    }
    documents.insert("/v2/".to_owned(), ("application/json", b"{}".to_vec()));
    let documents = Arc::new(documents);
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let host = listener.local_addr().expect("address").to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let documents = documents.clone();
            std::thread::spawn(move || serve(&stream, &documents, pause));
        }
    });
    host
}

/// Answers one request and closes.
fn serve(stream: &TcpStream, documents: &Documents, pause: Option<Duration>) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    while !lines.next()?.ok()?.is_empty() {}
    let mut words = request.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    let mut stream = stream;
    let Some((media_type, bytes)) = documents.get(path) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").ok();
    };
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\nDocker-Content-Digest: {}\r\nConnection: close\r\n\r\n",
        bytes.len(),
        digest(bytes)
    );
    stream.write_all(head.as_bytes()).ok()?;
    if method == "HEAD" {
        return Some(());
    }
    for chunk in bytes.chunks(CHUNK) {
        stream.write_all(chunk).ok()?;
        if let Some(pause) = pause {
            std::thread::sleep(pause);
        }
    }
    Some(())
}
