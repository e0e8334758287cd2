//! Static Pods from a URL (`staticPodURL`), asked for every `httpCheckFrequency`.
//!
//! Source: `pkg/kubelet/config/http.go`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request};
use http_body_util::{BodyExt, Limited};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::client::Body;
use tokio::sync::mpsc;

use super::manifest::{MAX_MANIFEST, parse_manifest};
use super::{Origin, PodChange, PodKey};
use crate::node::client::{ClientError, plain};

/// Longest request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// After so many failures in a row they are logged as debug messages only.
const LOUD_FAILURES: u32 = 3;

/// A wrong URL or header; terminal.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// `staticPodURL` is no http or https URL.
    #[error("staticPodURL {0:?} is no http or https URL: correct it")]
    Url(String),
    /// A header's name or value; the value is not shown.
    #[error("staticPodURLHeader {0:?} is no valid header: correct it")]
    Header(String),
    /// No TLS.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Where to ask, and how.
pub struct UrlSource {
    url: String,
    target: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    client: Client,
}

impl UrlSource {
    /// From `staticPodURL` and `staticPodURLHeader`. Must run inside the runtime that will drive it.
    pub fn new(url: &str, headers: &BTreeMap<String, Vec<String>>) -> Result<Self, UrlError> {
        let wrong = || UrlError::Url(url.to_owned());
        let uri: http::Uri = url.parse().map_err(|_| wrong())?;
        let (Some("http" | "https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(wrong());
        };
        let base = format!("{}://{authority}", uri.scheme_str().unwrap_or("https")).parse().map_err(|_| wrong())?;
        let target = uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
        let mut parsed = Vec::new();
        for (name, values) in headers {
            for value in values {
                let wrong = || UrlError::Header(name.clone());
                let mut value = HeaderValue::from_str(value).map_err(|_| wrong())?;
                value.set_sensitive(true);
                parsed.push((name.parse().map_err(|_| wrong())?, value));
            }
        }
        Ok(Self { url: url.to_owned(), target, headers: parsed, client: plain(base)? })
    }

    async fn fetch(&self) -> Result<Bytes, String> {
        let mut request = Request::get(&self.target).body(Body::empty()).map_err(|error| error.to_string())?;
        request.headers_mut().extend(self.headers.iter().cloned());
        let answer = async {
            let response = self.client.send(request).await.map_err(|error| error.to_string())?;
            if response.status() != http::StatusCode::OK {
                return Err(format!("{}: {}", self.url, response.status()));
            }
            let body = Limited::new(response.into_body(), MAX_MANIFEST).collect().await;
            Ok(body.map_err(|error| error.to_string())?.to_bytes())
        };
        tokio::time::timeout(TIMEOUT, answer).await.unwrap_or_else(|_| Err(format!("{}: no answer in time", self.url)))
    }
}

/// Announces the Pods at the URL until the receiver goes away. What was there last stays while the URL fails.
pub async fn watch_url(source: UrlSource, node_name: String, frequency: Duration, changes: mpsc::Sender<PodChange>) {
    let mut last = Bytes::new();
    let mut pods: BTreeMap<PodKey, Arc<Pod>> = BTreeMap::new();
    let (mut failures, mut synced) = (0_u32, false);
    let mut tick = tokio::time::interval(frequency.max(Duration::from_secs(1)));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! { _ = tick.tick() => {}, () = changes.closed() => return }
        let news = match source.fetch().await {
            // no news, and nothing to say about Pods
            Ok(bytes) if bytes == last && synced => continue,
            Ok(bytes) => parse(&bytes, &source.url, &node_name).map(|pods| (bytes, pods)),
            Err(error) => Err(error),
        };
        let (bytes, found) = match news {
            Ok(news) => news,
            Err(error) => {
                failures = failures.saturating_add(1);
                if failures <= LOUD_FAILURES {
                    tracing::warn!(error, "failed to read pods from URL");
                } else {
                    tracing::debug!(error, "failed to read pods from URL");
                }
                continue;
            }
        };
        failures = 0;
        let mut news: Vec<PodChange> = Vec::new();
        for key in pods.keys().filter(|key| !found.contains_key(key)) {
            news.push(PodChange::Removed(Origin::Url, key.clone()));
        }
        for (key, pod) in &found {
            if !pods.contains_key(key) || bytes != last {
                news.push(PodChange::Set(Origin::Url, Arc::clone(pod)));
            }
        }
        if !synced {
            news.push(PodChange::Synced(Origin::Url));
        }
        (last, pods, synced) = (bytes, found, true);
        for change in news {
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }
}

/// Nothing at all is no Pods.
fn parse(bytes: &Bytes, url: &str, node_name: &str) -> Result<BTreeMap<PodKey, Arc<Pod>>, String> {
    if bytes.is_empty() {
        return Ok(BTreeMap::new());
    }
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let pods = parse_manifest(text, Origin::Url, url, node_name).map_err(|error| error.to_string())?;
    Ok(pods.into_iter().map(|pod| (PodKey::of(&pod), Arc::new(pod))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::fake::HttpServer;
    use serde_json::json;
    use std::sync::atomic::{AtomicU16, Ordering};

    #[tokio::test]
    async fn pods_come_with_headers_and_stay_through_failures() {
        let round = Arc::new(AtomicU16::new(0));
        let count = Arc::clone(&round);
        let server = HttpServer::start(move |request| {
            assert_eq!((request.uri().path(), request.uri().query()), ("/pods", Some("a=b")));
            assert_eq!(request.headers()["x-token"], "s3cret");
            let pod = |name: &str| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
            match count.fetch_add(1, Ordering::Relaxed) {
                0 | 1 => (200, pod("a")),
                2 => (500, json!({})),
                _ => (200, pod("b")),
            }
        })
        .await;
        let headers = [("X-Token".to_owned(), vec!["s3cret".to_owned()])].into();
        let source = UrlSource::new(&format!("http://127.0.0.1:{}/pods?a=b", server.port), &headers).unwrap();
        let (tx, mut rx) = mpsc::channel(8);
        tokio::spawn(watch_url(source, "n".into(), Duration::from_secs(1), tx));
        let mut words = Vec::new();
        for _ in 0..4 {
            words.push(match rx.recv().await.unwrap() {
                PodChange::Set(Origin::Url, pod) => format!("set {}", pod.metadata.name.as_deref().unwrap()),
                PodChange::Removed(_, key) => format!("removed {}", key.name),
                other => format!("{other:?}"),
            });
        }
        assert_eq!(words, ["set a-n", "Synced(Url)", "removed a-n", "set b-n"]);
        assert_eq!(round.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn wrong_urls_and_headers_are_refused() {
        for url in ["", "ftp://x/", "/path", "http://"] {
            assert!(matches!(UrlSource::new(url, &BTreeMap::new()), Err(UrlError::Url(_))), "{url}");
        }
        let headers = [("X".to_owned(), vec!["a\nb".to_owned()])].into();
        let Err(error) = UrlSource::new("http://x/", &headers) else { panic!() };
        assert!(error.to_string().contains("\"X\"") && !error.to_string().contains("a\nb"));
    }
}
