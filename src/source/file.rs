//! Static Pods from a manifest file or a directory of them.
//!
//! Source: `pkg/kubelet/config/file.go` and `file_linux.go`. inotify tells of changes at once, a look every
//! `fileCheckFrequency` finds what it missed. Unlike kubelet, a manifest that cannot be read any more leaves the
//! Pod it made before running: an editor that has written half a file must not stop an API server.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;

use super::manifest::{MAX_MANIFEST, parse_manifest};
use super::{Origin, PodChange, PodKey, SEEN};
use crate::sys::watch::Watch;

/// Writers finish within this time, mostly.
const SETTLE: Duration = Duration::from_millis(100);

/// Announces the Pods below `path` until the receiver goes away. A path that does not exist has no Pods, yet.
pub async fn watch_files(path: PathBuf, node_name: String, frequency: Duration, changes: mpsc::Sender<PodChange>) {
    let mut pods = Manifests::default();
    let mut synced = false;
    loop {
        // watch first, then look: what happens in between is seen by one of them
        let watch =
            Watch::start(&path).map_err(|error| tracing::warn!(%error, path = %path.display(), "no inotify")).ok();
        let directory = path.clone();
        let scanned = tokio::task::spawn_blocking(move || scan(&directory)).await;
        match scanned.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(files) => {
                for change in pods.update(files, &node_name) {
                    if changes.send(change).await.is_err() {
                        return;
                    }
                }
                if !synced && changes.send(PodChange::Synced(Origin::File)).await.is_err() {
                    return;
                }
                synced = true;
            }
            Err(error) => tracing::error!(%error, path = %path.display(), "unable to read config path"),
        }
        tokio::select! {
            () = changes.closed() => return,
            () = Watch::changed(watch.as_ref()) => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(frequency) => {}
        }
    }
}

/// The text of every manifest; hidden files, directories and other things are passed over. A file that vanishes
/// while we look is none.
fn scan(path: &Path) -> io::Result<BTreeMap<PathBuf, io::Result<String>>> {
    let mut files = BTreeMap::new();
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        other => other?,
    };
    let mut paths = vec![path.to_owned()];
    if metadata.is_dir() {
        paths = std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
        paths.retain(|path| path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b".")));
    }
    for path in paths {
        match read(&path) {
            Ok(Some(text)) => drop(files.insert(path, Ok(text))),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => drop(files.insert(path, Err(error))),
        }
    }
    Ok(files)
}

/// A regular file's text; nothing for other things.
fn read(path: &Path) -> io::Result<Option<String>> {
    use std::io::Read;
    // by the path, not by opening: a fifo would block us
    if !std::fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut text = String::new();
    let limit = u64::try_from(MAX_MANIFEST).unwrap_or(u64::MAX) + 1;
    std::fs::File::open(path)?.take(limit).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// What every file said last.
#[derive(Default)]
struct Manifests {
    files: HashMap<PathBuf, Manifest>,
}

#[derive(Default)]
struct Manifest {
    text: String,
    pods: Vec<Arc<Pod>>,
}

impl Manifests {
    /// Takes in what was found, and tells what changed.
    fn update(&mut self, found: BTreeMap<PathBuf, io::Result<String>>, node_name: &str) -> Vec<PodChange> {
        let before = self.pods();
        self.files.retain(|path, _| found.contains_key(path));
        for (path, text) in found {
            let manifest = self.files.entry(path.clone()).or_default();
            let text = match text {
                Ok(text) if text == manifest.text && !manifest.text.is_empty() => continue,
                Ok(text) => text,
                Err(error) => {
                    tracing::error!(%error, path = %path.display(), "can't read static Pod, keeping what it was");
                    continue;
                }
            };
            match parse_manifest(&text, Origin::File, &path.to_string_lossy(), node_name) {
                Ok(mut pods) => {
                    for pod in &mut pods {
                        keep_first_sight(pod, &before);
                    }
                    manifest.pods = pods.into_iter().map(Arc::new).collect();
                }
                Err(error) => tracing::error!(%error, "can't process static Pod, keeping what it was"),
            }
            // also a wrong text is looked at only once
            manifest.text = text;
        }
        let after = self.pods();
        let gone = before.keys().filter(|key| !after.contains_key(key));
        let mut changes: Vec<_> = gone.map(|key| PodChange::Removed(Origin::File, key.clone())).collect();
        let new = after.iter().filter(|(key, pod)| before.get(key).is_none_or(|old| !Arc::ptr_eq(old, pod)));
        changes.extend(new.map(|(_, pod)| PodChange::Set(Origin::File, Arc::clone(pod))));
        changes
    }

    fn pods(&self) -> BTreeMap<PodKey, Arc<Pod>> {
        let mut pods = BTreeMap::new();
        let mut files: Vec<_> = self.files.iter().collect();
        // of two files with one Pod the first by name counts, always
        files.sort_by(|(a, _), (b, _)| b.cmp(a));
        for pod in files.into_iter().flat_map(|(_, manifest)| &manifest.pods) {
            pods.insert(PodKey::of(pod), Arc::clone(pod));
        }
        pods
    }
}

/// A Pod that we knew was seen when we saw it first.
fn keep_first_sight(pod: &mut Pod, before: &BTreeMap<PodKey, Arc<Pod>>) {
    let seen = before.get(&PodKey::of(pod)).and_then(|old| super::annotation(old, SEEN));
    if let (Some(seen), Some(annotations)) = (seen, &mut pod.metadata.annotations) {
        annotations.insert(SEEN.to_owned(), seen.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn manifest(name: &str, image: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: c, image: \"{image}\"}}]}}\n"
        )
    }

    async fn next(rx: &mut mpsc::Receiver<PodChange>) -> String {
        let change = tokio::time::timeout(Duration::from_secs(5), rx.recv()).await.expect("no news").unwrap();
        match change {
            PodChange::Set(_, pod) => {
                let image = pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
                format!("set {} {image}", pod.metadata.name.as_deref().unwrap())
            }
            PodChange::Removed(_, key) => format!("removed {}", key.name),
            PodChange::Synced(_) => "synced".to_owned(),
        }
    }

    fn start(path: PathBuf) -> mpsc::Receiver<PodChange> {
        let (tx, rx) = mpsc::channel(16);
        // only inotify can be as quick as the tests want it
        tokio::spawn(watch_files(path, "n".into(), Duration::from_secs(3600), tx));
        rx
    }

    #[tokio::test]
    async fn a_directory_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifests");
        let mut rx = start(path.clone());
        assert_eq!(next(&mut rx).await, "synced");
        // made after we began to look for it
        fs::create_dir(&path).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        fs::write(path.join("a.yaml"), manifest("a", "x:1")).unwrap();
        assert_eq!(next(&mut rx).await, "set a-n x:1");
        // replaced by a rename, as careful editors do; hidden until then
        fs::write(path.join(".a.tmp"), manifest("a", "x:2")).unwrap();
        fs::rename(path.join(".a.tmp"), path.join("a.yaml")).unwrap();
        assert_eq!(next(&mut rx).await, "removed a-n", "another identity is another Pod");
        assert_eq!(next(&mut rx).await, "set a-n x:2");
        fs::write(path.join("a.yaml"), "apiVersion: v1\nkind: Po").unwrap();
        fs::create_dir(path.join("sub")).unwrap();
        fs::write(path.join("b.json"), manifest("b", "y:1")).unwrap();
        assert_eq!(next(&mut rx).await, "set b-n y:1", "a is broken but stays");
        fs::remove_file(path.join("a.yaml")).unwrap();
        assert_eq!(next(&mut rx).await, "removed a-n");
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(next(&mut rx).await, "removed b-n");
    }

    #[tokio::test]
    async fn one_file_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pod.yaml");
        fs::write(&path, manifest("a", "x:1")).unwrap();
        let mut rx = start(path.clone());
        assert_eq!([next(&mut rx).await, next(&mut rx).await], ["set a-n x:1", "synced"]);
        fs::write(dir.path().join("new"), manifest("a", "x:2")).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert_eq!([next(&mut rx).await, next(&mut rx).await], ["removed a-n", "set a-n x:2"]);
    }

    #[test]
    fn a_given_uid_keeps_its_first_sight_through_changes() {
        let with_uid = |image: &str| manifest("a", image).replace("name: a", "name: a, uid: mine");
        let mut manifests = Manifests::default();
        let mut update = |text: String| {
            let found = [(PathBuf::from("/m"), Ok(text))].into();
            let changes = manifests.update(found, "n");
            assert_eq!(changes.len(), 1);
            let PodChange::Set(_, pod) = &changes[0] else { panic!() };
            super::super::annotation(pod, SEEN).unwrap().to_owned()
        };
        let first = update(with_uid("x:1"));
        assert_eq!(first, update(with_uid("x:2")));
    }

    #[test]
    fn fifos_do_not_block_and_large_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        fs::write(dir.path().join("big"), vec![b' '; MAX_MANIFEST + 100]).unwrap();
        let found = scan(dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(Manifests::default().update(found, "n").is_empty());
    }
}
