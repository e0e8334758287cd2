//! API servers for tests: one in memory under a [`kube::Client`], one on a loopback port.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;

/// One request as the server saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) content_type: String,
    pub(crate) body: Value,
}

type Handler = Box<dyn Fn(&Seen) -> Option<(u16, Value)> + Send + Sync>;

/// Keeps objects by path; GET, POST, PUT, PATCH (merged as JSON) and DELETE work. A handler may answer first.
#[derive(Clone, Default)]
pub(crate) struct FakeApi {
    state: Arc<Mutex<State>>,
    handler: Arc<Mutex<Option<Handler>>>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    seen: Vec<Seen>,
    version: u64,
}

pub(crate) fn failure(code: u16, reason: &str) -> (u16, Value) {
    let status = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": reason, "code": code, "message": reason});
    (code, status)
}

impl FakeApi {
    pub(crate) fn client(&self) -> Client {
        let this = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let this = this.clone();
            async move {
                let (parts, body) = request.into_parts();
                let bytes = body.collect().await?.to_bytes();
                let seen = Seen {
                    method: parts.method.to_string(),
                    path: parts.uri.path().to_owned(),
                    query: parts.uri.query().unwrap_or("").to_owned(),
                    content_type: parts.headers.get("content-type").map_or("", |v| v.to_str().unwrap_or("")).to_owned(),
                    body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
                };
                let (code, value) = this.answer(seen);
                let response = Response::builder().status(code).header("content-type", "application/json");
                Ok::<_, tower::BoxError>(response.body(Body::from(value.to_string().into_bytes()))?)
            }
        });
        Client::new(service, "default")
    }

    /// Answers before the store does.
    pub(crate) fn on(&self, handler: impl Fn(&Seen) -> Option<(u16, Value)> + Send + Sync + 'static) {
        *self.handler.lock().unwrap() = Some(Box::new(handler));
    }

    pub(crate) fn put(&self, path: &str, value: Value) {
        self.state.lock().unwrap().objects.insert(path.to_owned(), value);
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.state.lock().unwrap().objects.get(path).cloned()
    }

    pub(crate) fn remove(&self, path: &str) {
        self.state.lock().unwrap().objects.remove(path);
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.lock().unwrap().seen.clone()
    }

    pub(crate) fn count(&self, method: &str, path: &str) -> usize {
        self.seen().iter().filter(|seen| seen.method == method && seen.path == path).count()
    }

    fn answer(&self, seen: Seen) -> (u16, Value) {
        self.state.lock().unwrap().seen.push(seen.clone());
        if let Some(handler) = &*self.handler.lock().unwrap()
            && let Some(answer) = handler(&seen)
        {
            return answer;
        }
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        let version = state.version;
        let path = seen.path.strip_suffix("/status").unwrap_or(&seen.path).to_owned();
        let stamp = |mut object: Value| {
            object["metadata"]["resourceVersion"] = version.to_string().into();
            if object["metadata"].get("uid").is_none() {
                object["metadata"]["uid"] = format!("uid-{version}").into();
            }
            object
        };
        match seen.method.as_str() {
            "POST" => {
                let name = seen.body["metadata"]["name"].as_str().unwrap_or("").to_owned();
                let path = format!("{path}/{name}");
                if state.objects.contains_key(&path) {
                    return failure(409, "AlreadyExists");
                }
                let object = stamp(seen.body);
                state.objects.insert(path, object.clone());
                (201, object)
            }
            "GET" if state.objects.contains_key(&path) => (200, state.objects[&path].clone()),
            "GET" => {
                let below = format!("{path}/");
                let inside: Vec<Value> = state
                    .objects
                    .iter()
                    .filter(|(key, _)| key.starts_with(&below))
                    .map(|(_, value)| value.clone())
                    .collect();
                if inside.is_empty() && !seen.query.contains("Selector") {
                    return failure(404, "NotFound");
                }
                (
                    200,
                    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version.to_string()}, "items": inside}),
                )
            }
            "PUT" | "PATCH" => {
                let Some(mut object) = state.objects.get(&path).cloned() else { return failure(404, "NotFound") };
                if seen.method == "PUT" {
                    object = seen.body;
                } else {
                    merge(&mut object, &seen.body);
                }
                let object = stamp(object);
                state.objects.insert(path, object.clone());
                (200, object)
            }
            "DELETE" => match state.objects.remove(&path) {
                Some(object) => (200, object),
                None => failure(404, "NotFound"),
            },
            _ => failure(405, "MethodNotAllowed"),
        }
    }
}

/// Strategic merge as far as Nodes need it: conditions and addresses merge by `type`.
fn merge(target: &mut Value, patch: &Value) {
    let (Value::Object(fields), true) = (patch, target.is_object()) else {
        *target = patch.clone();
        return;
    };
    for (key, value) in fields {
        if key.starts_with('$') {
            continue;
        }
        let slot = target.as_object_mut().unwrap().entry(key.clone()).or_insert(Value::Null);
        match value {
            Value::Null => {
                target.as_object_mut().unwrap().remove(key);
            }
            Value::Array(items) if key == "conditions" && slot.is_array() => {
                for item in items {
                    let list = slot.as_array_mut().unwrap();
                    match list.iter_mut().find(|old| old["type"] == item["type"]) {
                        Some(old) => merge(old, item),
                        None => list.push(item.clone()),
                    }
                }
            }
            _ => merge(slot, value),
        }
    }
}

/// A real server on a loopback port; ends with the test's runtime.
pub(crate) struct HttpServer {
    pub(crate) port: u16,
}

impl HttpServer {
    pub(crate) async fn start(
        handler: impl Fn(&Request<Incoming>) -> (u16, Value) + Clone + Send + Sync + 'static,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let handler = handler.clone();
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let (code, value) = handler(&request);
                    let body = Full::new(Bytes::from(value.to_string()));
                    let mut response = Response::new(body);
                    *response.status_mut() = StatusCode::from_u16(code).unwrap();
                    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
                    async move { Ok::<_, Infallible>(response) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { port }
    }
}
