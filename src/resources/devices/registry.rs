//! Plugins that are found by their sockets in `plugins_registry`.
//!
//! Source: `pkg/kubelet/pluginmanager`. The directory and those below it are watched; what is there is compared with
//! what was there.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::future::select_all;
use tokio::task::JoinHandle;

use super::api::{Empty, PluginInfo, RegistrationStatus, VERSION};
use super::manager::DeviceManager;
use super::name::is_extended_resource;
use crate::stream::grpc::{Channel, Status};
use crate::sys::watch::Watch;

/// How long a socket may take to answer.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// How long a plugin may take to say what it is.
const INFO_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take to hear what came of it.
const NOTIFY_LIMIT: Duration = Duration::from_secs(5);
/// First and longest pause after a try that failed (`goroutinemap/exponentialbackoff`).
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(122));
/// When a directory is looked at again that could not be watched (too many inotify instances, for example).
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How deep directories are searched.
const MAX_DEPTH: usize = 4;

/// One socket, told from a later one of the same name.
type Identity = (u64, Option<SystemTime>);

/// A socket that was found.
struct Found {
    identity: Identity,
    task: JoinHandle<()>,
}

/// Why a plugin is not registered.
#[derive(Debug, thiserror::Error)]
enum RegistryError {
    /// It does not answer, or cannot be connected to now: retryable.
    #[error("{0}")]
    Failed(String),
    /// It is not one for this node: terminal for the socket. The plugin knows.
    #[error("{0}")]
    Refused(String),
}

/// Follows the directory, for ever.
pub(super) async fn follow(manager: Arc<DeviceManager>, dir: PathBuf) {
    if let Err(error) = fs::create_dir_all(&dir) {
        tracing::error!(dir = %dir.display(), %error, "plugins cannot be found by their sockets");
        return;
    }
    let mut known: HashMap<PathBuf, Found> = HashMap::new();
    loop {
        // watches first: what comes while we look is seen by them
        let mut sockets = HashMap::new();
        let mut watches = Vec::new();
        let complete = look(&dir, 0, &mut sockets, &mut watches);
        known.retain(|path, found| {
            let same = sockets.get(path) == Some(&found.identity);
            if !same {
                found.task.abort();
            }
            same
        });
        for (path, identity) in sockets {
            known.entry(path.clone()).or_insert_with(|| {
                let task = tokio::spawn(keep(manager.clone(), path));
                Found { identity, task }
            });
        }
        let again =
            async { if complete { std::future::pending().await } else { tokio::time::sleep(LOOK_AGAIN).await } };
        let changed = async {
            if watches.is_empty() {
                std::future::pending().await
            } else {
                select_all(watches.iter().map(|watch| Box::pin(Watch::changed(Some(watch))))).await;
            }
        };
        tokio::select! {
            () = changed => {}
            () = again => {}
        }
    }
}

/// Whether all of it is watched.
fn look(dir: &Path, depth: usize, sockets: &mut HashMap<PathBuf, Identity>, watches: &mut Vec<Watch>) -> bool {
    let mut complete = true;
    match Watch::start(dir) {
        Ok(watch) => watches.push(watch),
        Err(error) => {
            complete = false;
            tracing::error!(dir = %dir.display(), %error, "plugins in it are noticed late");
        }
    }
    let Ok(entries) = fs::read_dir(dir) else { return complete };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() && depth < MAX_DEPTH {
            complete &= look(&path, depth + 1, sockets, watches);
        } else if metadata.file_type().is_socket() {
            sockets.insert(path, (metadata.ino(), metadata.created().ok()));
        }
    }
    complete
}

/// Ends a registration with the task that made it.
struct Registered {
    manager: Arc<DeviceManager>,
    resource: String,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.manager.disconnect(&self.resource, self.number);
    }
}

/// Registers a plugin, and keeps it as long as its socket is there: until the task is aborted.
async fn keep(manager: Arc<DeviceManager>, socket: PathBuf) {
    let mut pause = RETRY.0;
    loop {
        match register(&manager, &socket).await {
            Ok(_registered) => std::future::pending::<()>().await,
            Err(error @ RegistryError::Refused(_)) => {
                tracing::warn!(socket = %socket.display(), %error, "a plugin is refused");
                return;
            }
            Err(error) => tracing::warn!(socket = %socket.display(), %error, "a plugin is not registered, will retry"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn register(manager: &Arc<DeviceManager>, socket: &Path) -> Result<Registered, RegistryError> {
    let failed = |status: Status| RegistryError::Failed(format!("RegisterPlugin error -- {status}"));
    let channel = Channel::connect(socket, DIAL_LIMIT).await.map_err(failed)?;
    let info: PluginInfo =
        channel.unary("/pluginregistration.Registration/GetInfo", &Empty {}, INFO_LIMIT).await.map_err(failed)?;
    if let Err(error) = validate(&info, socket) {
        notify(&channel, Some(&error)).await.map_err(failed)?;
        return Err(RegistryError::Refused(error));
    }
    let endpoint = if info.endpoint.is_empty() { socket.to_owned() } else { PathBuf::from(&info.endpoint) };
    let number = match manager.connect(&info.name, &endpoint).await {
        Ok(number) => number,
        Err(error) => {
            let error = format!("RegisterPlugin error -- plugin registration failed with err: {error}");
            notify(&channel, Some(&error)).await.map_err(failed)?;
            return Err(RegistryError::Failed(error));
        }
    };
    let registered = Registered { manager: manager.clone(), resource: info.name, number };
    notify(&channel, None).await.map_err(failed)?;
    Ok(registered)
}

/// What is wrong with a plugin, in kubelet's words.
fn validate(info: &PluginInfo, socket: &Path) -> Result<(), String> {
    let PluginInfo { kind, name, versions, .. } = info;
    if kind != "DevicePlugin" {
        let socket = socket.display();
        return Err(format!(
            "RegisterPlugin error -- no handler registered for plugin type: {kind} at socket {socket}"
        ));
    }
    let failed = |why: String| Err(format!("RegisterPlugin error -- plugin validation failed with err: {why}"));
    if !versions.iter().any(|version| version == VERSION) {
        let versions = versions.join(" ");
        return failed(format!("manager version, {VERSION}, is not among plugin supported versions [{versions}]"));
    }
    if !is_extended_resource(name) {
        return failed(format!("invalid name of device plugin socket: the ResourceName {name:?} is invalid"));
    }
    Ok(())
}

async fn notify(channel: &Channel, error: Option<&str>) -> Result<(), Status> {
    let status = RegistrationStatus { registered: error.is_none(), error: error.unwrap_or_default().to_owned() };
    let path = "/pluginregistration.Registration/NotifyRegistrationStatus";
    channel.unary::<_, Empty>(path, &status, NOTIFY_LIMIT).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_plugins_are_told_what_is_wrong() {
        let good = PluginInfo {
            kind: "DevicePlugin".to_owned(),
            name: "r.test/x".to_owned(),
            endpoint: String::new(),
            versions: vec!["v1".to_owned(), "v1beta1".to_owned()],
        };
        let socket = Path::new("/r/s");
        validate(&good, socket).unwrap();
        assert_eq!(
            validate(&PluginInfo { kind: "CSIPlugin".to_owned(), ..good.clone() }, socket).unwrap_err(),
            "RegisterPlugin error -- no handler registered for plugin type: CSIPlugin at socket /r/s"
        );
        assert_eq!(
            validate(&PluginInfo { versions: vec!["v1".to_owned(), "v2".to_owned()], ..good.clone() }, socket)
                .unwrap_err(),
            "RegisterPlugin error -- plugin validation failed with err: manager version, v1beta1, is not among plugin \
             supported versions [v1 v2]"
        );
        assert!(validate(&PluginInfo { name: "cpu".to_owned(), ..good }, socket).is_err());
    }
}
