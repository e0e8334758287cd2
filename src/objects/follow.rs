//! The watch of one object, and what is known of it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_objects};
use kube::{Api, Client};
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::cache::Change;
use super::error::ObjectError;
use super::references::ObjectKey;
use super::secret::SecretObject;

/// How long the first answer to a list may take before it is asked again.
pub(super) const LIST_DEADLINE: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub(super) enum Object {
    ConfigMap(Arc<ConfigMap>),
    Secret(Arc<SecretObject>),
}

#[derive(Clone, Debug)]
pub(super) enum State {
    /// Not read yet, with what went wrong at the last try.
    Pending(Option<ObjectError>),
    Missing,
    Found {
        object: Object,
        version: Option<String>,
    },
}

/// What the cache, the object's watch and its readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) key: ObjectKey,
    pub(super) state: watch::Sender<State>,
    pub(super) phase: Mutex<Phase>,
}

#[derive(Debug)]
pub(super) struct Phase {
    pub(super) accessed: Instant,
    /// Pods whose volumes show the object.
    pub(super) live: usize,
    /// The watch, while it runs.
    pub(super) task: Option<AbortHandle>,
    /// The object is immutable: what was read stays true.
    pub(super) frozen: bool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An API type that can be cached.
pub(super) trait Cached:
    kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
    + Clone
    + fmt::Debug
    + serde::de::DeserializeOwned
    + Send
    + 'static
{
    fn immutable(&self) -> bool;
    fn into_object(self) -> Object;
}

impl Cached for ConfigMap {
    fn immutable(&self) -> bool {
        self.immutable == Some(true)
    }

    fn into_object(mut self) -> Object {
        // Neither is of use on a node, and both can be as large as the data.
        self.metadata.managed_fields = None;
        self.metadata.annotations = None;
        Object::ConfigMap(Arc::new(self))
    }
}

impl Cached for Secret {
    fn immutable(&self) -> bool {
        self.immutable == Some(true)
    }

    fn into_object(self) -> Object {
        Object::Secret(Arc::new(self.into()))
    }
}

/// Pauses between tries: they start well below a reader's deadline, because a refusal right after binding is over in
/// milliseconds, and grow to 30 s.
#[derive(Debug, Default)]
pub(super) struct Retry {
    failures: u32,
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = Duration::from_millis(100 << self.failures.min(9)).min(Duration::from_secs(30));
        self.failures = self.failures.saturating_add(1);
        // Up to half as much again, so that the watches of a node do not come back all at once.
        Some(pause.mul_f64(1.0 + fastrand::f64() / 2.0))
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Watches one object until it is immutable or nobody has wanted it for `idle`.
pub(super) async fn follow<K: Cached>(
    client: Client,
    shared: Arc<Shared>,
    changes: broadcast::Sender<Change>,
    idle: Duration,
) {
    let api: Api<K> = Api::namespaced(client, &shared.key.namespace);
    loop {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", shared.key.name));
        let mut events = std::pin::pin!(watch_objects(api.clone(), config).backoff(Retry::default()));
        let mut listed = None;
        loop {
            let pending = matches!(*shared.state.borrow(), State::Pending(None));
            let wake = if pending { Instant::now() + LIST_DEADLINE } else { lock(&shared.phase).accessed + idle };
            let event = match tokio::time::timeout_at(wake, events.next()).await {
                Ok(Some(event)) => event,
                Ok(None) => break,
                // Never answered: the connection may be dead.
                Err(_) if pending => break,
                Err(_) if shared.rest(idle) => return,
                Err(_) => continue,
            };
            match event {
                Ok(Event::Init) => listed = None,
                Ok(Event::InitApply(object)) => listed = Some(object),
                Ok(Event::InitDone) => {
                    if shared.publish(listed.take(), &changes) {
                        return;
                    }
                }
                Ok(Event::Apply(object)) => {
                    if shared.publish(Some(object), &changes) {
                        return;
                    }
                }
                Ok(Event::Delete(_)) => {
                    shared.publish::<K>(None, &changes);
                }
                Err(error) => shared.failed(&error),
            }
        }
    }
}

impl Shared {
    /// An object of which nothing is known yet.
    pub(super) fn new(key: ObjectKey) -> Self {
        let phase = Phase { accessed: Instant::now(), live: 0, task: None, frozen: false };
        Self { key, state: watch::Sender::new(State::Pending(None)), phase: Mutex::new(phase) }
    }

    /// Stops the watch if nobody has wanted the object for `idle`; the next reader starts it again.
    fn rest(&self, idle: Duration) -> bool {
        let mut phase = lock(&self.phase);
        if phase.live > 0 {
            // A volume shows it. Counts as wanted, so that the timer starts anew.
            phase.accessed = Instant::now();
            return false;
        }
        if phase.accessed.elapsed() < idle {
            return false;
        }
        phase.task = None;
        self.state.send_replace(State::Pending(None));
        true
    }

    /// Makes what was read known; `true` if it will never change again.
    fn publish<K: Cached>(&self, object: Option<K>, changes: &broadcast::Sender<Change>) -> bool {
        let immutable = object.as_ref().is_some_and(Cached::immutable);
        let new = match object {
            Some(object) => {
                State::Found { version: object.meta().resource_version.clone(), object: object.into_object() }
            }
            None => State::Missing,
        };
        if immutable {
            let mut phase = lock(&self.phase);
            phase.frozen = true;
            phase.task = None;
        }
        let changed = self.state.send_if_modified(|state| {
            let same = match (&*state, &new) {
                (State::Missing, State::Missing) => true,
                (State::Found { version: Some(old), .. }, State::Found { version: Some(new), .. }) => old == new,
                _ => false,
            };
            *state = new;
            !same
        });
        if changed {
            // Nobody may be listening, which is fine.
            let _ = changes.send(Change::Object(self.key.clone()));
        }
        immutable
    }

    /// What was read stays readable while the API server is away; an error matters to those who still wait.
    fn failed(&self, error: &watcher::Error) {
        tracing::debug!(object = ?self.key, %error, "Failed to watch object");
        let refused = match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status))
            | watcher::Error::WatchError(status) => Some(status),
            _ => None,
        };
        let error = match refused {
            Some(status) if status.code == 403 => ObjectError::Forbidden { message: status.message.clone() },
            Some(status) => ObjectError::Unavailable { kind: self.key.kind, reason: status.message.clone() },
            None => ObjectError::Unavailable { kind: self.key.kind, reason: error.to_string() },
        };
        self.state.send_if_modified(|state| {
            if let State::Pending(last) = state {
                *last = Some(error);
            }
            false
        });
    }
}
