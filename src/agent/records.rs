//! The Pods' records on disk: `<state_dir>/pods/<uid>/{pod.json,record.json}`.
//!
//! The state directory is a tmpfs that ends with the boot, as the containers do; a rename makes a write whole, and no
//! fsync is needed because a crash of the machine takes the containers along.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use nix::libc;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::pod::model::{Desired, Observed};
use crate::sys::mountattr::{MountAttributes, mount_setattr};
use crate::volume::mounts_below;

/// File of the Pod as last wanted.
const POD_FILE: &str = "pod.json";
/// File of [`Observed`].
const RECORD_FILE: &str = "record.json";

/// A Pod that an earlier life of the agent left.
#[derive(Debug)]
pub struct Leftover {
    /// As it was wanted then.
    pub pod: Pod,
    /// What had happened by then.
    pub observed: Observed,
}

/// Reads and writes records.
#[derive(Debug)]
pub struct Records {
    pods_dir: PathBuf,
    /// The resource version of the Pod that is in `pod.json`, by UID, so that it is written only when it changes.
    written: Mutex<HashMap<String, Option<String>>>,
}

impl Records {
    /// Records below `state_dir`; the directory is made, readable to root alone (a Pod's spec can hold secrets).
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let pods_dir = state_dir.join("pods");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&pods_dir)?;
        Ok(Self { pods_dir, written: Mutex::default() })
    }

    /// Makes the directory of all Pods a mount of its own, so that whoever needs only one Pod's mounts can do away with all
    /// others at once. Blocking.
    ///
    /// It is a peer of no other mount, or what is mounted in it would be mounted twice; but containers that watch the
    /// node's mounts (hostPath with HostToContainer) hear of those that go, and hold none of a Pod that is gone.
    ///
    /// Not if something is mounted there already, in the life of an agent that did not do this: those mounts would be
    /// hidden. Then all works as well, only slower.
    pub fn mount_apart(&self) -> io::Result<()> {
        let directory = fs::canonicalize(&self.pods_dir)?;
        if !mounts_below(&directory)?.is_empty() {
            return Ok(());
        }
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let apart = open_tree(CWD, &directory, flags)?;
        for propagation in [libc::MS_PRIVATE, libc::MS_SHARED] {
            mount_setattr(&apart, &MountAttributes { propagation, ..Default::default() })?;
        }
        Ok(move_mount(&apart, "", CWD, &directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    }

    /// The directory of one Pod.
    #[must_use]
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.pods_dir.join(uid)
    }

    /// Writes a Pod's record.
    pub fn save(&self, desired: &Desired, observed: &Observed) -> io::Result<()> {
        let dir = self.pod_dir(desired.uid());
        fs::create_dir_all(&dir)?;
        let version = desired.pod.metadata.resource_version.clone();
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.get(desired.uid()) != Some(&version) {
            write(&dir, POD_FILE, &serde_json::to_vec(&*desired.wanted)?)?;
            written.insert(desired.uid().to_owned(), version);
        }
        drop(written);
        write(&dir, RECORD_FILE, &serde_json::to_vec(observed)?)
    }

    /// Forgets a Pod; its directory must hold no mounts any more.
    pub fn remove(&self, uid: &str) -> io::Result<()> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        match fs::remove_dir_all(self.pod_dir(uid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What an earlier life left. A directory without readable records is returned by its name alone: something of
    /// the Pod may be on the node and has to be cleared away.
    pub fn load(&self) -> io::Result<(HashMap<String, Leftover>, Vec<String>)> {
        let (mut known, mut unknown) = (HashMap::new(), Vec::new());
        for entry in fs::read_dir(&self.pods_dir)? {
            let entry = entry?;
            let Ok(uid) = entry.file_name().into_string() else { continue };
            match read(&entry.path()) {
                Ok(leftover) => {
                    known.insert(uid, leftover);
                }
                Err(error) => {
                    tracing::warn!(pod = uid, %error, "the Pod's record cannot be read, what is left of it is cleared away");
                    unknown.push(uid);
                }
            }
        }
        Ok((known, unknown))
    }
}

fn read(dir: &Path) -> io::Result<Leftover> {
    let pod = serde_json::from_slice(&fs::read(dir.join(POD_FILE))?)?;
    let observed = serde_json::from_slice(&fs::read(dir.join(RECORD_FILE))?)?;
    Ok(Leftover { pod, observed })
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!(".{name}.tmp"));
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, dir.join(name))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::mount::{MsFlags, mount};

    use super::*;

    #[test]
    fn a_record_survives_and_a_torn_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let mut pod = Pod::default();
        pod.metadata.uid = Some("a".to_owned());
        let desired = Desired::new(Arc::new(pod));
        let observed = Observed { volumes_mounted: true, ..Observed::default() };
        records.save(&desired, &observed).unwrap();
        fs::create_dir(records.pod_dir("b")).unwrap();
        let (known, unknown) = Records::open(dir.path()).unwrap().load().unwrap();
        assert_eq!(known["a"].observed, observed);
        assert_eq!(unknown, ["b"]);
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert!(!records.pod_dir("a").exists());
    }

    #[test]
    fn the_pods_get_a_mount_of_their_own_once() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let mounted = || mounts_below(&dir.path().canonicalize().unwrap()).unwrap();
        let unmount = |path: &Path| nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        // what an agent that knew nothing of this left
        let left = records.pod_dir("a").join("shm");
        fs::create_dir_all(&left).unwrap();
        mount(Some("tmpfs"), &left, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        records.mount_apart().unwrap();
        assert_eq!(mounted().len(), 1, "it must not be hidden");
        unmount(&left);
        records.mount_apart().unwrap();
        records.mount_apart().unwrap();
        let points = mounted();
        unmount(&dir.path().join("pods"));
        assert_eq!(points, [dir.path().canonicalize().unwrap().join("pods")]);
    }
}
