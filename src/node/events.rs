//! Events about Pods and our Node, as `kubectl describe` shows them.
//!
//! Recording never waits: a bounded queue takes the event, a task sends it. What the queue cannot hold, or what
//! repeats itself too much, is dropped. Source: client-go `tools/record`, `FilterEventRecorder` in
//! `pkg/kubelet/container/helpers.go`.
//!
//! Events that only tell how things go give way to the things themselves: they are sent when there was nothing new
//! for [`QUIET`], after [`LONGEST`] at the latest. A Pod's start makes three of them, which is half of what it asks of
//! the API server. kubelet sends them at once, beside the requests that its Pods wait for.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::correlate::{Correlator, Verdict};
use super::rate::TokenBucket;
use super::register::is;
use crate::config::KubeletConfiguration;

/// Events that wait to be sent; client-go's queue length.
const QUEUE: usize = 1000;
/// Attempts and pause for an API server that is away.
const TRIES: usize = 12;
const PAUSE: Duration = Duration::from_secs(10);
/// Pause after which what was happening is over, and longest time that an event is held back.
const QUIET: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(2);
/// The API server takes 1024 bytes of message.
const MAX_MESSAGE: usize = 1024;

/// Whether an event is news or trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// As it should be.
    Normal,
    /// Somebody should look.
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// Takes events; cheap to clone, never blocks.
#[derive(Clone, Debug)]
pub struct EventRecorder {
    node_name: Arc<str>,
    node_uid: Arc<RwLock<Option<String>>>,
    queue: Option<mpsc::Sender<Item>>,
}

/// What the sending task is told.
#[derive(Debug)]
enum Item {
    Event(Box<Event>),
    /// Hold nothing back, and say when all before it are sent.
    Flush(oneshot::Sender<()>),
}

impl EventRecorder {
    /// A recorder and the task that sends; spawn the latter. It ends when all recorders are gone.
    pub fn new(
        node_name: &str,
        client: Client,
        config: &KubeletConfiguration,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        // 0 is no limit, negative was refused
        let bucket = TokenBucket::new(f64::from(config.event_record_qps), f64::from(config.event_burst.max(1)));
        let recorder = Self { queue: Some(sender), ..Self::log_only(node_name) };
        (recorder, send_all(client, receiver, bucket))
    }

    /// A recorder that only logs: without an API server nobody could read events.
    #[must_use]
    pub fn log_only(node_name: &str) -> Self {
        Self { node_name: node_name.into(), node_uid: Arc::default(), queue: None }
    }

    /// Events about the Node carry its UID once it is known.
    pub fn set_node_uid(&self, uid: Option<String>) {
        *self.node_uid.write().unwrap_or_else(PoisonError::into_inner) = uid;
    }

    /// An event about a Pod, or about a part of it (`spec.containers{name}`).
    pub fn pod_event(&self, pod: &Pod, kind: EventType, reason: &str, message: String, field_path: Option<String>) {
        let metadata = &pod.metadata;
        let object = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
            resource_version: metadata.resource_version.clone(),
            field_path,
        };
        self.record(object, kind, reason, message);
    }

    /// An event about our Node.
    pub fn node_event(&self, kind: EventType, reason: &str, message: String) {
        let object = ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.node_name.to_string()),
            uid: self.node_uid.read().unwrap_or_else(PoisonError::into_inner).clone(),
            ..ObjectReference::default()
        };
        self.record(object, kind, reason, message);
    }

    fn record(&self, object: ObjectReference, kind: EventType, reason: &str, mut message: String) {
        let name = object.name.clone().unwrap_or_default();
        tracing::info!(
            object = format!("{}/{name}", object.namespace.as_deref().unwrap_or("")),
            kind = object.kind,
            field_path = object.field_path,
            event = kind.as_str(),
            reason,
            message,
            "Event occurred"
        );
        let Some(queue) = &self.queue else { return };
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
            message.truncate(end);
        }
        let now = Timestamp::now();
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{name}.{:x}", now.as_nanosecond())),
                // events about cluster-wide objects live here
                namespace: Some(object.namespace.clone().unwrap_or_else(|| "default".to_owned())),
                ..ObjectMeta::default()
            },
            involved_object: object,
            reason: Some(reason.to_owned()),
            message: Some(message),
            type_: Some(kind.as_str().to_owned()),
            count: Some(1),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(self.node_name.to_string()) }),
            reporting_component: Some("kubelet".to_owned()),
            reporting_instance: Some(self.node_name.to_string()),
            ..Event::default()
        };
        if queue.try_send(Item::Event(Box::new(event))).is_err() {
            tracing::warn!(reason, "event dropped: too many wait for the API server");
        }
    }

    /// Sends what is held back, before the process ends. Does not wait longer than `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(queue) = &self.queue else { return };
        let (sent, all_sent) = oneshot::channel();
        let flushed = async {
            if queue.send(Item::Flush(sent)).await.is_ok() {
                // an error is a task that has ended: nothing is held back
                let _ = all_sent.await;
            }
        };
        if tokio::time::timeout(limit, flushed).await.is_err() {
            tracing::warn!("events are lost: the API server did not take them in time");
        }
    }
}

async fn send_all(client: Client, mut queue: mpsc::Receiver<Item>, bucket: TokenBucket) {
    let mut sender = Sender { client, bucket, correlator: Correlator::new() };
    while let Some(first) = queue.recv().await {
        let latest = Instant::now() + LONGEST;
        let mut held = Vec::new();
        let mut item = first;
        let flushed = loop {
            match item {
                Item::Flush(sent) => break Some(sent),
                Item::Event(event) => {
                    let is_urgent = event.type_.as_deref() != Some(EventType::Normal.as_str());
                    held.push(event);
                    if is_urgent || held.len() == QUEUE {
                        break None;
                    }
                }
            }
            // on time, and at the end of the recorders
            let Ok(Some(next)) = tokio::time::timeout_at(latest.min(Instant::now() + QUIET), queue.recv()).await else {
                break None;
            };
            item = next;
        };
        for event in held {
            sender.send(*event).await;
        }
        if let Some(sent) = flushed {
            // who asked may have lost patience
            let _ = sent.send(());
        }
    }
}

struct Sender {
    client: Client,
    bucket: TokenBucket,
    correlator: Correlator,
}

impl Sender {
    async fn send(&mut self, event: Event) {
        let happened = event.last_timestamp.as_ref().map_or_else(Timestamp::now, |time| time.0);
        let verdict = self.correlator.judge(event, happened);
        if verdict == Verdict::Drop {
            return;
        }
        for attempt in 1..=TRIES {
            self.bucket.acquire().await;
            match send(&self.client, &verdict).await {
                Ok(()) => break,
                // an answer is final: the namespace may be going away
                Err(error @ kube::Error::Api(_)) => {
                    tracing::warn!(%error, "server rejected event, will not retry");
                    break;
                }
                Err(error) if attempt == TRIES => tracing::error!(%error, "unable to write event, giving up"),
                Err(error) => {
                    tracing::debug!(%error, "unable to write event, will retry");
                    tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                }
            }
        }
    }
}

async fn send(client: &Client, verdict: &Verdict) -> kube::Result<()> {
    let event = match verdict {
        Verdict::Create(event) | Verdict::Update(event) => event,
        Verdict::Drop => return Ok(()),
    };
    let events: Api<Event> = Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or("default"));
    if let Verdict::Update(event) = verdict {
        let patch = json!({"count": event.count, "lastTimestamp": event.last_timestamp, "message": event.message});
        let name = event.metadata.name.as_deref().unwrap_or("");
        match events.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(_) => return Ok(()),
            // it has expired: make it anew
            Err(error) if is(&error, 404) => {}
            Err(error) => return Err(error),
        }
    }
    events.create(&PostParams::default(), event).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeApi, failure};
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(
            json!({"metadata": {"namespace": "ns", "name": "p", "uid": "u", "resourceVersion": "7"}}),
        )
        .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn events_are_created_then_counted() {
        let api = FakeApi::default();
        let config = KubeletConfiguration::default();
        let (recorder, task) = EventRecorder::new("n", api.client(), &config);
        for _ in 0..3 {
            let path = Some("spec.containers{c}".to_owned());
            recorder.pod_event(&pod(), EventType::Warning, "BackOff", "Back-off restarting".to_owned(), path);
        }
        recorder.set_node_uid(Some("nu".into()));
        recorder.node_event(EventType::Normal, "NodeReady", "Node n status is now: NodeReady".to_owned());
        drop(recorder);
        task.await;
        let seen = api.seen();
        assert_eq!(
            seen.iter().map(|seen| seen.method.as_str()).collect::<Vec<_>>(),
            ["POST", "PATCH", "PATCH", "POST"]
        );
        assert_eq!(seen[0].path, "/api/v1/namespaces/ns/events");
        let event = &seen[0].body;
        assert_eq!(event["source"], json!({"component": "kubelet", "host": "n"}));
        assert_eq!(event["involvedObject"]["fieldPath"], "spec.containers{c}");
        assert_eq!((event["type"].as_str(), event["count"].as_i64()), (Some("Warning"), Some(1)));
        assert_eq!(seen[2].body["count"], 3);
        assert_eq!(seen[3].path, "/api/v1/namespaces/default/events");
        assert_eq!(seen[3].body["involvedObject"], json!({"kind": "Node", "name": "n", "uid": "nu"}));
    }

    #[tokio::test(start_paused = true)]
    async fn refused_events_are_not_sent_again_and_expired_ones_made_anew() {
        let api = FakeApi::default();
        let (recorder, task) = EventRecorder::new("n", api.client(), &KubeletConfiguration::default());
        api.on(|seen| match seen.method.as_str() {
            "PATCH" => Some(failure(404, "NotFound")),
            _ if seen.body["reason"] == "Refused" => Some(failure(403, "Forbidden")),
            _ => None,
        });
        recorder.pod_event(&pod(), EventType::Normal, "Refused", "x".repeat(3000), None);
        recorder.pod_event(&pod(), EventType::Normal, "Pulled", "same".to_owned(), None);
        recorder.pod_event(&pod(), EventType::Normal, "Pulled", "same".to_owned(), None);
        drop(recorder);
        task.await;
        let methods: Vec<_> = api.seen().into_iter().map(|seen| seen.method).collect();
        assert_eq!(methods, ["POST", "POST", "PATCH", "POST"]);
        assert_eq!(api.seen()[0].body["message"].as_str().unwrap().len(), MAX_MESSAGE);
    }

    /// When each of the requests came, in milliseconds, with one event recorded every `pace` until `until`.
    async fn sent_at(kind: EventType, pace: Duration, until: Duration) -> Vec<u128> {
        let api = FakeApi::default();
        let (recorder, task) = EventRecorder::new("n", api.client(), &KubeletConfiguration::default());
        let start = Instant::now();
        let times = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = times.clone();
        api.on(move |_| {
            seen.lock().unwrap().push(start.elapsed().as_millis());
            None
        });
        let task = tokio::spawn(task);
        let mut recorded = 0;
        while start.elapsed() < until {
            recorded += 1;
            recorder.node_event(kind, "R", format!("message {recorded}"));
            tokio::time::sleep(pace).await;
        }
        drop(recorder);
        task.await.unwrap();
        assert_eq!(api.seen().len(), recorded);
        std::mem::take(&mut *times.lock().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn news_waits_for_a_quiet_moment_and_trouble_does_not() {
        let (pace, until) = (Duration::from_millis(300), Duration::from_secs(1));
        assert_eq!(sent_at(EventType::Normal, pace, until).await, [250, 550, 850, 1150]);
        let pace = Duration::from_millis(110);
        let times = sent_at(EventType::Normal, pace, Duration::from_millis(2400)).await;
        // the rest at the end of the recorder
        assert_eq!((times[0], times[18], times[19]), (2000, 2000, 2420), "{times:?}");
        assert_eq!(sent_at(EventType::Warning, pace, Duration::from_millis(150)).await, [0, 110]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_held_back_is_sent_before_the_end() {
        let api = FakeApi::default();
        let (recorder, task) = EventRecorder::new("n", api.client(), &KubeletConfiguration::default());
        let _sending = tokio::spawn(task);
        let start = Instant::now();
        recorder.node_event(EventType::Normal, "R", "m".to_owned());
        recorder.flush(Duration::from_secs(1)).await;
        assert_eq!((api.seen().len(), start.elapsed()), (1, Duration::ZERO));
        let (stuck, _task) = EventRecorder::new("n", api.client(), &KubeletConfiguration::default());
        stuck.flush(Duration::from_secs(1)).await;
        assert_eq!(start.elapsed(), Duration::from_secs(1));
    }

    #[tokio::test]
    async fn recording_never_waits() {
        let api = FakeApi::default();
        let (recorder, _task) = EventRecorder::new("n", api.client(), &KubeletConfiguration::default());
        for _ in 0..2 * QUEUE {
            recorder.node_event(EventType::Normal, "R", "m".to_owned());
        }
    }
}
