//! `/logs/`: files below the node's log directory.
//!
//! Pods may write below that directory (a `hostPath` volume on `/var/log` is common), so a path is resolved by the
//! kernel such that no link in it leads out, and only regular files and directories are served.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use rustix::{
    fs::{Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use warp::{Reply, reply::Response};

use super::respond;

const CHUNK: usize = 256 << 10;
const PENDING_CHUNKS: usize = 2;

enum Found {
    Directory(String),
    File(File, u64),
}

/// Answers with a file, or with a list of the files in a directory.
pub(super) async fn serve(root: PathBuf, path: String) -> Response {
    let found = tokio::task::spawn_blocking(move || find(&root, &path)).await;
    match found.unwrap_or_else(|error| Err(io::Error::other(error))) {
        Ok(Found::Directory(html)) => warp::reply::html(html).into_response(),
        Ok(Found::File(file, size)) => {
            let (sender, chunks) = mpsc::channel(PENDING_CHUNKS);
            tokio::task::spawn_blocking(move || send(file, size, &sender));
            let mut response = warp::reply::stream(ReceiverStream::new(chunks)).into_response();
            let kind = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Err(error) => match error.kind() {
            io::ErrorKind::PermissionDenied => respond::text(StatusCode::FORBIDDEN, "403 Forbidden\n"),
            // A path that leads out of the directory (EXDEV, ELOOP) does not exist as far as clients are concerned.
            _ => respond::text(StatusCode::NOT_FOUND, "404 page not found\n"),
        },
    }
}

fn open(root: &Path, path: &str) -> io::Result<OwnedFd> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = path.trim_matches('/');
    let path = if path.is_empty() { "." } else { path };
    // Without O_NONBLOCK, opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    loop {
        match crate::sys::openat2::openat2(&root, path, flags, Mode::empty(), resolve) {
            // Something was renamed while the kernel looked.
            Err(Errno::AGAIN | Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

fn find(root: &Path, path: &str) -> io::Result<Found> {
    let fd = open(root, path)?;
    let stat = rustix::fs::fstat(&fd)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Found::File(File::from(fd), u64::try_from(stat.st_size).unwrap_or(0))),
        FileType::Directory => list(&fd).map(Found::Directory),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

fn list(directory: &OwnedFd) -> io::Result<String> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let mut name = entry.file_name().to_string_lossy().into_owned();
        if name == "." || name == ".." {
            continue;
        }
        if entry.file_type() == FileType::Directory {
            name.push('/');
        }
        names.push(name);
    }
    names.sort_unstable();
    let mut html = "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n".to_owned();
    for name in names {
        html += &format!("<a href=\"{}\">{}</a>\n", escape_href(&name), escape_html(&name));
    }
    Ok(html + "</pre>\n")
}

fn escape_html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;").replace('\'', "&#39;")
}

fn escape_href(name: &str) -> String {
    let mut escaped = String::from("./");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped += &format!("%{byte:02X}");
        }
    }
    escaped
}

/// Sends what the file held when it was opened; it may be growing.
fn send(file: File, size: u64, sender: &mpsc::Sender<io::Result<Bytes>>) {
    let mut file = file.take(size);
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let outcome = file.by_ref().take(u64::try_from(CHUNK).unwrap_or(u64::MAX)).read_to_end(&mut chunk);
        let item = match outcome {
            Ok(0) => return,
            Ok(_) => Ok(Bytes::from(chunk)),
            Err(error) => Err(error),
        };
        let failed = item.is_err();
        if sender.blocking_send(item).is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn get(root: &Path, path: &str) -> (u16, String) {
        let response = serve(root.to_owned(), path.to_owned()).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("body").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn nothing_leads_out() {
        let (root, outside) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        std::fs::write(outside.path().join("secret"), "secret").expect("write");
        std::fs::write(root.path().join("syslog"), "text").expect("write");
        std::fs::create_dir(root.path().join("pods<&")).expect("mkdir");
        let link =
            |target: &Path, name: &str| std::os::unix::fs::symlink(target, root.path().join(name)).expect("symlink");
        link(outside.path(), "absolute");
        link(Path::new("../"), "up");
        link(Path::new("syslog"), "inside");
        rustix::fs::mknodat(rustix::fs::CWD, root.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .expect("mkfifo");
        assert_eq!(get(root.path(), "syslog").await, (200, "text".into()));
        assert_eq!(get(root.path(), "inside").await, (200, "text".into()));
        for path in ["absolute/secret", "../", "up", "/etc/passwd", "missing", "fifo"] {
            assert_eq!(get(root.path(), path).await.0, 404, "{path}");
        }
        let (status, html) = get(root.path(), "").await;
        assert_eq!(status, 200);
        assert!(html.contains("<a href=\"./pods%3C%26/\">pods&lt;&amp;/</a>\n"), "{html}");
    }
}
