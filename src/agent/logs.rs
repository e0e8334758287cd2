//! Log files beyond the one that is written: the symbolic links that log collectors follow, and old rotations.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use k8s_openapi::api::core::v1::Pod;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};

/// `/var/log/containers/<pod>_<namespace>_<container>-<id>.log` (`legacyLogSymlink` in kubelet).
pub(super) fn link(dir: &Path, pod: &Pod, container: &str, id: &str, log: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let name = format!(
        "{}_{}_{container}",
        pod.metadata.name.as_deref().unwrap_or_default(),
        pod.metadata.namespace.as_deref().unwrap_or_default()
    );
    let link = dir.join(format!("{name}-{id}.log"));
    match std::os::unix::fs::symlink(log, &link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Removes the links into a Pod's log directory.
pub(super) fn remove_links(dir: &Path, log_dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|target| target.starts_with(log_dir)) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Removes the logs of instances before `attempt - 1`: the newest and `--previous` stay.
pub(super) fn remove_old(dir: &Path, attempt: u32) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.split_once(".log")?.0.parse::<u32>().ok());
        if number.is_some_and(|number| number + 1 < attempt) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Rotated files that are to be compressed once it has become quieter: in a flood of lines most are gone before that, and
/// need not be compressed. One batch at a time, so that no two of them write the same file.
#[derive(Debug)]
pub(super) struct Rotations {
    /// `containerLogMonitorInterval`.
    interval: Duration,
    /// The newest of each log.
    newest: BTreeMap<PathBuf, PathBuf>,
    due: Option<Instant>,
    running: Option<JoinHandle<()>>,
}

impl Rotations {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, newest: BTreeMap::new(), due: None, running: None }
    }

    /// A file has been rotated.
    pub(super) fn add(&mut self, rotated: PathBuf) {
        self.due.get_or_insert_with(|| Instant::now() + self.interval);
        // without the time
        self.newest.insert(rotated.with_extension(""), rotated);
    }

    /// Begins to compress when it is time; for ever, and it may be dropped at any moment.
    pub(super) async fn compress(&mut self) -> Infallible {
        loop {
            match self.due {
                Some(due) => sleep_until(due).await,
                None => pending().await,
            }
            if self.running.as_ref().is_some_and(|batch| !batch.is_finished()) {
                self.due = Some(Instant::now() + self.interval);
                continue;
            }
            self.begin();
        }
    }

    /// Compresses what is left, behind the batch that runs: nothing more will be rotated.
    pub(super) async fn finish(mut self) {
        if let Some(batch) = self.running.take() {
            let _panicked = batch.await;
        }
        self.begin();
    }

    fn begin(&mut self) {
        self.due = None;
        let batch = std::mem::take(&mut self.newest);
        if batch.is_empty() {
            return;
        }
        self.running = Some(spawn_blocking(move || batch.values().for_each(|rotated| compress_older(rotated))));
    }
}

/// Compresses rotated files older than `rotated`, the newest one, which readers are most likely to want as it is.
fn compress_older(rotated: &Path) {
    if let Err(error) = try_compress_older(rotated) {
        tracing::warn!(file = %rotated.display(), %error, "older rotations of the log stay uncompressed");
    }
}

fn try_compress_older(rotated: &Path) -> io::Result<()> {
    let (Some(dir), Some(name)) = (rotated.parent(), rotated.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    let Some((stem, _)) = name.split_once(".log.") else { return Ok(()) };
    let prefix = format!("{stem}.log.");
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(other) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if other.starts_with(&prefix) && other < name && !other.ends_with(".gz") && !other.ends_with(".tmp") {
            compress(&path)?;
        }
    }
    Ok(())
}

fn compress(path: &Path) -> io::Result<()> {
    let with = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let temporary = with(".tmp");
    let mut encoder = GzEncoder::new(File::create(&temporary)?, Compression::fast());
    io::copy(&mut File::open(path)?, &mut encoder)?;
    encoder.finish()?.sync_all()?;
    fs::rename(&temporary, with(".gz"))?;
    fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_rotations_are_compressed_and_the_newest_is_not() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["0.log", "0.log.20260101-000000", "0.log.20260101-000001", "1.log.20260101-000000"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        compress_older(&dir.path().join("0.log.20260101-000001"));
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.20260101-000000.gz", "0.log.20260101-000001", "1.log.20260101-000000"]);
    }

    #[test]
    fn only_the_newest_two_instances_keep_their_logs() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["0.log", "0.log.20260101-000000.gz", "1.log", "2.log"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        remove_old(dir.path(), 2).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["1.log", "2.log"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_flood_leaves_is_compressed_when_it_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut rotations = Rotations::new(Duration::from_secs(10));
        let started = Instant::now();
        for (name, gone) in
            [("0.log.20260101-000000", true), ("0.log.20260101-000000-0001", false), ("0.log.20260101-000001", false)]
        {
            if !gone {
                fs::write(path(name), name).unwrap();
            }
            rotations.add(path(name));
        }
        fs::write(path("1.log.20260101-000000"), "another container").unwrap();
        let begun = async {
            tokio::select! {
                never = rotations.compress() => match never {},
                () = tokio::time::sleep(Duration::from_secs(11)) => {}
            }
        };
        begun.await;
        assert_eq!(started.elapsed(), Duration::from_secs(11));
        rotations.running.take().unwrap().await.unwrap();
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["0.log.20260101-000000-0001.gz", "0.log.20260101-000001", "1.log.20260101-000000"]);
        assert!(rotations.due.is_none() && rotations.newest.is_empty());
    }

    #[tokio::test]
    async fn what_a_pod_leaves_at_its_end_is_compressed_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let mut rotations = Rotations::new(Duration::from_secs(3600));
        for name in ["0.log.20260101-000000", "0.log.20260101-000001"] {
            fs::write(dir.path().join(name), name).unwrap();
            rotations.add(dir.path().join(name));
        }
        rotations.finish().await;
        let compressed = dir.path().join("0.log.20260101-000000.gz");
        tokio::time::timeout(Duration::from_secs(10), async {
            while !compressed.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert!(dir.path().join("0.log.20260101-000001").exists(), "the newest stays as it is");
    }
}
