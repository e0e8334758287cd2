//! An API server in memory, for tests: lists and watches with field selectors and resource versions, and TokenRequests.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

type Reply = http::Response<UnsyncBoxBody<Bytes, Infallible>>;
type TokenHandler = Box<dyn Fn(&str, Value) -> Result<Value, u16> + Send>;

/// A request that was made.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub query: BTreeMap<String, String>,
}

struct Change {
    version: u64,
    path: String,
    kind: &'static str,
    object: Value,
}

struct Watch {
    path: String,
    name: Option<String>,
    events: UnboundedSender<Bytes>,
}

#[derive(Default)]
struct Inner {
    version: u64,
    objects: BTreeMap<(String, String, String), Value>,
    history: Vec<Change>,
    watches: Vec<Watch>,
    failures: HashMap<String, (u16, usize)>,
    seen: Vec<Seen>,
    tokens: Option<TokenHandler>,
}

#[derive(Clone, Default)]
pub(crate) struct FakeApi(Arc<Mutex<Inner>>);

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

fn line(change: &Change) -> Bytes {
    format!("{}\n", json!({"type": change.kind, "object": change.object})).into()
}

impl FakeApi {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Creates or replaces an object of the collection at `path`.
    pub fn put(&self, path: &str, object: &Value) {
        let mut inner = self.0.lock().unwrap();
        inner.version += 1;
        let version = inner.version;
        let mut object = object.clone();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let key = (path.to_owned(), namespace, name_of(&object).to_owned());
        let kind = if inner.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        inner.record(Change { version, path: path.to_owned(), kind, object });
    }

    fn create(&self, path: &str, mut object: Value) -> Value {
        let version = self.0.lock().unwrap().version;
        if let Some(prefix) = object["metadata"]["generateName"].as_str() {
            object["metadata"]["name"] = json!(format!("{prefix}{version}"));
        }
        self.put(path, &object);
        object
    }

    /// The objects of the collection at `path`.
    pub fn list(&self, path: &str) -> Vec<Value> {
        let inner = self.0.lock().unwrap();
        inner.objects.iter().filter(|((place, _, _), _)| place == path).map(|(_, object)| object.clone()).collect()
    }

    pub fn delete(&self, path: &str, namespace: &str, name: &str) {
        let mut inner = self.0.lock().unwrap();
        inner.version += 1;
        let version = inner.version;
        let mut object = inner.objects.remove(&(path.into(), namespace.into(), name.into())).unwrap();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        inner.record(Change { version, path: path.to_owned(), kind: "DELETED", object });
    }

    /// Answers the next `times` requests for `path` with `code`.
    pub fn fail(&self, path: &str, code: u16, times: usize) {
        self.0.lock().unwrap().failures.insert(path.to_owned(), (code, times));
    }

    pub fn on_token(&self, handler: impl Fn(&str, Value) -> Result<Value, u16> + Send + 'static) {
        self.0.lock().unwrap().tokens = Some(Box::new(handler));
    }

    pub fn requests(&self) -> Vec<Seen> {
        self.0.lock().unwrap().seen.clone()
    }

    /// Watches whose client is still there.
    pub fn watches(&self) -> usize {
        let mut inner = self.0.lock().unwrap();
        inner.watches.retain(|watch| !watch.events.is_closed());
        inner.watches.len()
    }

    pub fn close_watches(&self) {
        self.0.lock().unwrap().watches.clear();
    }

    /// Waits for `condition`, at most 10 s.
    pub async fn until(&self, condition: impl Fn() -> bool) {
        for _ in 0..2000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("condition not met in time; requests: {:?}", self.requests());
    }

    async fn answer(&self, request: http::Request<Body>) -> Reply {
        let (path, method) = (request.uri().path().to_owned(), request.method().clone());
        let query: BTreeMap<String, String> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), decode(value)))
            .collect();
        let body = request.into_body().collect_bytes().await.unwrap_or_default();
        let mut inner = self.0.lock().unwrap();
        inner.seen.push(Seen { query: query.clone() });
        if let Some((code, times)) = inner.failures.get_mut(&path).filter(|(_, times)| *times > 0) {
            *times = times.saturating_sub(1);
            return failure(*code);
        }
        if path.ends_with("/token") {
            let handler = inner.tokens.as_ref().expect("no token handler");
            return match handler(&path, serde_json::from_slice(&body).unwrap()) {
                Ok(value) => reply(201, &value),
                Err(code) => failure(code),
            };
        }
        if method == http::Method::POST {
            drop(inner);
            return reply(201, &self.create(&path, serde_json::from_slice(&body).unwrap()));
        }
        let (collection, last) = path.rsplit_once('/').unwrap_or_default();
        if let Some((_, one)) = inner.objects.iter().find(|((place, _, name), _)| place == collection && name == last) {
            return reply(200, one);
        }
        let mut fields = query.get("fieldSelector").into_iter().flat_map(|selector| selector.split(','));
        let name = fields.find_map(|field| field.strip_prefix("metadata.name=")).map(str::to_owned);
        if query.get("watch").is_some_and(|watch| watch == "true") {
            return stream(inner.watch(path, name, query["resourceVersion"].parse().unwrap()));
        }
        let items: Vec<&Value> = inner
            .objects
            .iter()
            .filter(|((collection, _, object), _)| *collection == path && name.as_ref().is_none_or(|n| n == object))
            .map(|(_, object)| object)
            .collect();
        reply(
            200,
            &json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": inner.version.to_string()}, "items": items}),
        )
    }
}

impl Inner {
    fn record(&mut self, change: Change) {
        for watch in &self.watches {
            if watch.path == change.path && watch.name.as_deref().is_none_or(|name| name == name_of(&change.object)) {
                let _ = watch.events.send(line(&change));
            }
        }
        self.history.push(change);
    }

    fn watch(&mut self, path: String, name: Option<String>, since: u64) -> UnboundedReceiver<Bytes> {
        let (events, receiver) = unbounded_channel();
        for change in self.history.iter().filter(|change| change.version > since && change.path == path) {
            if name.as_deref().is_none_or(|name| name == name_of(&change.object)) {
                let _ = events.send(line(change));
            }
        }
        self.watches.push(Watch { path, name, events });
        receiver
    }
}

fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let hex: String = bytes.by_ref().take(2).map(char::from).collect();
                out.push(u8::from_str_radix(&hex, 16).unwrap());
            }
            b'+' => out.push(b' '),
            byte => out.push(byte),
        }
    }
    String::from_utf8(out).unwrap()
}

fn reply(code: u16, body: &Value) -> Reply {
    let body = Full::new(Bytes::from(body.to_string())).boxed_unsync();
    http::Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}

fn failure(code: u16) -> Reply {
    reply(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("fake {code}"), "reason": "Fake", "code": code}),
    )
}

fn stream(events: UnboundedReceiver<Bytes>) -> Reply {
    let frames = futures::stream::unfold(events, |mut events| async move { Some((events.recv().await?, events)) })
        .map(|bytes| Ok(Frame::data(bytes)));
    http::Response::builder().status(200).body(StreamBody::new(frames).boxed_unsync()).unwrap()
}
