//! The local socket, and the node as somebody at this machine sees it ([`LocalApi`]).

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::{BoxFuture, select_all};
use rustix::fs::FlockOperation;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use super::node::Node;
use super::pods::PodView;
use crate::image::ImageError;
use crate::pod::model::Verdict;
use crate::pod::worker::Message;
use crate::server::Server;
use crate::server::local::{Archive, LocalApi, LocalError, LocalImage, PodNews, PodRef, Pull};
use crate::source::{Origin, PodChange, PodKey, origin, parse_manifest};

/// How long an agent that is just ending may keep the state directory.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// How long the registry may take for a Pod it was sent.
const TAKE_WAIT: Duration = Duration::from_secs(10);
/// News that may wait for a slow reader; older ones are not needed, each is complete.
const PENDING_NEWS: usize = 1;

/// The local socket of the agent with that state directory.
#[must_use]
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("gantry.sock")
}

/// Takes the state directory for this process, as long as the file is open.
pub(super) async fn lock(state_dir: &Path) -> Result<File, String> {
    let path = state_dir.join("agent.lock");
    let failed = |error: std::io::Error| format!("lock {}: {error}", path.display());
    let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
    let began = tokio::time::Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // the kernel has no lock that async code could wait for
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < LOCK_WAIT => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(format!(
                    "another gantry uses the state directory {}: stop it, or give this one its own --state-dir, \
                     --data-dir, --root-dir, --bridge-name and --cgroup-root",
                    state_dir.display()
                ));
            }
            Err(error) => return Err(failed(error.into())),
        }
    }
}

/// Serves the local socket.
pub(super) fn serve(node: &Arc<Node>, server: Arc<Server>, changes: mpsc::Sender<PodChange>) -> Result<(), String> {
    let path = socket_path(&node.config.paths.state_dir);
    // complete before it has its name: nobody finds it with other permissions
    let temporary = path.with_extension("new");
    let listener = (|| {
        let _ = fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
        fs::rename(&temporary, &path)?;
        Ok::<_, std::io::Error>(listener)
    })();
    let listener = listener.map_err(|error| format!("listen on {}: {error}", path.display()))?;
    tokio::spawn(server.serve_local(listener, Arc::new(LocalNode { node: node.clone(), changes })));
    Ok(())
}

/// Removes the socket's name, so that nobody waits for an answer.
pub(super) fn close(state_dir: &Path) {
    let path = socket_path(state_dir);
    if let Err(error) = fs::remove_file(&path) {
        tracing::warn!(path = %path.display(), %error, "the local socket stays behind");
    }
}

struct LocalNode {
    node: Arc<Node>,
    changes: mpsc::Sender<PodChange>,
}

impl LocalNode {
    fn find(&self, pod: &PodRef) -> Result<PodView, LocalError> {
        self.node.pods.find(&pod.namespace, &pod.name).ok_or_else(|| {
            LocalError::NotFound(format!(
                "pod {}/{} is not on this node: gantry ps lists them",
                pod.namespace, pod.name
            ))
        })
    }

    async fn send(&self, change: PodChange) -> Result<(), LocalError> {
        self.changes.send(change).await.map_err(|_| LocalError::Internal("the agent is stopping".to_owned()))
    }

    /// Waits until `done` holds for the Pod of that name.
    async fn wait(&self, pod: &PodRef, limit: Duration, done: impl Fn(Option<&PodView>) -> bool) -> bool {
        let mut changes = self.node.pods.changes();
        let wait = async {
            loop {
                changes.mark_unchanged();
                if done(self.node.pods.find(&pod.namespace, &pod.name).as_ref()) || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }

    /// No Pod of that name may be there; one that is ending is waited for.
    async fn free_name(&self, pod: &PodRef) -> Result<(), LocalError> {
        let taken = |why: &str| {
            let PodRef { namespace, name } = pod;
            LocalError::Conflict(format!("pod {namespace}/{name} is on this node already ({why}): choose another name"))
        };
        let Some(view) = self.node.pods.find(&pod.namespace, &pod.name) else { return Ok(()) };
        if !self.node.pods.is_ending(view.desired.uid()) {
            return Err(match origin(&view.desired.pod) {
                Origin::Local => taken("gantry rm removes it"),
                other => taken(&format!("source: {}", other.as_str())),
            });
        }
        let grace = view.desired.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        let limit = Duration::from_secs(u64::try_from(grace).unwrap_or(0)) + TAKE_WAIT;
        if self.wait(pod, limit, |view| view.is_none()).await { Ok(()) } else { Err(taken("and does not end")) }
    }

    async fn run_manifest(&self, manifest: String, origin: String) -> Result<Vec<PodRef>, LocalError> {
        let pods = parse_manifest(&manifest, Origin::Local, &origin, &self.node.config.node_name)
            .map_err(|error| LocalError::Invalid(error.to_string()))?;
        if pods.is_empty() {
            return Err(LocalError::Invalid(format!("{origin}: no Pod in it: add one to the list")));
        }
        let keys: Vec<_> = pods.iter().map(PodKey::of).collect();
        let name = |key: &PodKey| PodRef { namespace: key.namespace.clone(), name: key.name.clone() };
        let names: Vec<_> = keys.iter().map(name).collect();
        for pod in &names {
            self.free_name(pod).await?;
        }
        for pod in pods {
            self.send(PodChange::Set(Origin::Local, Arc::new(pod))).await?;
        }
        for (pod, key) in names.iter().zip(&keys) {
            if !self.wait(pod, TAKE_WAIT, |view| view.is_some_and(|view| view.desired.uid() == key.uid)).await {
                return Err(LocalError::Internal(format!("pod {}/{} was not taken in time", pod.namespace, pod.name)));
            }
        }
        Ok(names)
    }

    async fn end(&self, pod: PodRef, grace: Option<i64>) -> Result<(), LocalError> {
        let view = self.find(&pod)?;
        let PodRef { namespace, name } = &pod;
        let config = &self.node.config.kubelet;
        match origin(&view.desired.pod) {
            Origin::Local => {}
            Origin::Api => {
                let text = format!(
                    "pod {namespace}/{name} came from the API server, which would start it again: \
                     kubectl delete pod --namespace {namespace} {name}"
                );
                return Err(LocalError::Conflict(text));
            }
            Origin::File => {
                let text =
                    format!("pod {namespace}/{name} is static: remove its manifest from {}", config.static_pod_path);
                return Err(LocalError::Conflict(text));
            }
            Origin::Url => {
                let text = format!("pod {namespace}/{name} is static: remove it at {}", config.static_pod_url);
                return Err(LocalError::Conflict(text));
            }
        }
        let uid = view.desired.uid();
        if let Some(grace) = grace {
            let message = format!("removed with a grace of {grace} s");
            let verdict =
                Verdict { reason: "Removed".to_owned(), message, disruption: false, disruption_message: None };
            self.node.pods.send(uid, Message::Terminate { verdict, grace: Some(grace) }).await;
        }
        self.send(PodChange::Removed(Origin::Local, PodKey::of(&view.desired.pod))).await
    }

    /// Removes an image that no container has.
    async fn drop_image(&self, reference: String) -> Result<(), LocalError> {
        let in_use = self.node.images_in_use();
        let (images, name) = (self.node.images.clone(), reference.clone());
        let removed = tokio::task::spawn_blocking(move || images.remove(&name, &in_use)).await;
        match removed.map_err(|error| LocalError::Internal(error.to_string()))? {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(LocalError::NotFound(format!("image {reference:?} is not here: gantry images lists them")))
            }
            Err(error @ ImageError::InUse { .. }) => Err(LocalError::Conflict(error.to_string())),
            Err(error) => Err(LocalError::Internal(error.to_string())),
        }
    }
}

/// Sends a Pod's state whenever it or one of its pulls changes, until it is gone or nobody listens.
async fn tell(node: Arc<Node>, uid: String, news: mpsc::Sender<PodNews>) {
    let (mut pods, mut pulls) = (node.pods.changes(), node.pulls.changes());
    let mut last = None;
    loop {
        pods.mark_unchanged();
        pulls.mark_unchanged();
        let Some(view) = node.pods.view(&uid) else { return };
        let (summaries, mut receivers) = node.pulls.of(&uid);
        let now = PodNews { pod: view.pod(), pulls: summaries };
        if last.as_ref() != Some(&now) {
            if news.send(now.clone()).await.is_err() {
                return;
            }
            last = Some(now);
        }
        let progress = async {
            if receivers.is_empty() {
                return std::future::pending().await;
            }
            // a pull that ends is told by the other channel
            let (changed, ..) = select_all(receivers.iter_mut().map(|receiver| Box::pin(receiver.changed()))).await;
            if changed.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            changed = pods.changed() => if changed.is_err() { return },
            changed = pulls.changed() => if changed.is_err() { return },
            () = progress => {}
            () = news.closed() => return,
        }
    }
}

impl LocalApi for LocalNode {
    fn images(&self) -> Vec<LocalImage> {
        let seconds = |time: std::time::SystemTime| {
            time.duration_since(UNIX_EPOCH).ok().and_then(|age| i64::try_from(age.as_secs()).ok()).unwrap_or_default()
        };
        let images = self.node.images.list().into_iter().map(|image| LocalImage {
            id: image.id,
            tags: image.repo_tags,
            digests: image.repo_digests,
            size: image.size,
            last_used: seconds(image.last_used),
        });
        images.collect()
    }

    fn import_images(&self, archive: Archive) -> BoxFuture<'_, Result<Vec<String>, LocalError>> {
        super::images::import(self.node.images.clone(), archive).boxed()
    }

    fn tag_image(&self, reference: String, name: String) -> BoxFuture<'_, Result<String, LocalError>> {
        super::images::tag(self.node.images.clone(), reference, name).boxed()
    }

    fn remove_image(&self, reference: String) -> BoxFuture<'_, Result<(), LocalError>> {
        self.drop_image(reference).boxed()
    }

    fn pulls(&self) -> Vec<Pull> {
        self.node.pulls.list()
    }

    fn run(&self, manifest: String, origin: String) -> BoxFuture<'_, Result<Vec<PodRef>, LocalError>> {
        self.run_manifest(manifest, origin).boxed()
    }

    fn remove_pod(&self, pod: PodRef, grace: Option<i64>) -> BoxFuture<'_, Result<(), LocalError>> {
        self.end(pod, grace).boxed()
    }

    fn watch(&self, pod: PodRef) -> Result<mpsc::Receiver<PodNews>, LocalError> {
        let uid = self.find(&pod)?.desired.uid().to_owned();
        let (sender, news) = mpsc::channel(PENDING_NEWS);
        tokio::spawn(tell(self.node.clone(), uid, sender));
        Ok(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_state_directory_has_one_user() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).await.unwrap();
        let began = tokio::time::Instant::now();
        let error = lock(dir.path()).await.unwrap_err();
        assert!(began.elapsed() >= LOCK_WAIT && error.contains(&dir.path().display().to_string()), "{error}");
        drop(first);
        lock(dir.path()).await.unwrap();
    }
}
