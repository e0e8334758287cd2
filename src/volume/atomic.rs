//! Files that change all at once: the layout that kubelet gives to configMap, secret, downwardAPI and projected volumes.
//!
//! Source: `pkg/volume/util/atomic_writer.go`.
//!
//! ```text
//! <volume>/..2026_01_31_12_00_00.0123456789/app/config   the data
//! <volume>/..data -> ..2026_01_31_12_00_00.0123456789    replaced by rename, which is atomic
//! <volume>/app -> ..data/app                             what the container looks at
//! ```
//!
//! Unlike kubelet, a write also removes what an interrupted one left behind: it looks at the directory, not at what it
//! believes to have written before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

/// Name of the link that is switched.
const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";
const NAME_MAX: usize = 255;
const PATH_MAX: usize = 4096;

/// One file of a volume. `Debug` shows its size, not its content.
#[derive(Clone, PartialEq, Eq)]
pub struct FileProjection {
    /// The content.
    pub data: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// The owner, if it is not root.
    pub user: Option<u32>,
}

impl fmt::Debug for FileProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileProjection({} bytes, mode {:o}, user {:?})", self.data.len(), self.mode, self.user)
    }
}

/// The files of a volume, by path relative to it.
pub type Payload = BTreeMap<String, FileProjection>;

/// A payload that could not be written. [`AtomicWriteError::Path`] is terminal, the rest is retryable.
#[derive(Debug, thiserror::Error)]
pub enum AtomicWriteError {
    /// A path that could leave the volume or collide with the layout.
    #[error("invalid path: {reason}: {path}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A system call.
    #[error("{action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AtomicWriteError {
    let path = path.to_owned();
    move |source| AtomicWriteError::Io { action, path, source }
}

/// Makes `payload` the content of the directory `target`, which exists. `set_permissions` is called on `target` after
/// new files are written and before they are visible. Returns whether the content changed.
///
/// Calls for the same directory must not overlap.
pub fn write(
    target: &Path,
    payload: &Payload,
    set_permissions: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<bool, AtomicWriteError> {
    let payload = clean(payload)?;
    let current = match fs::read_link(target.join(DATA)) {
        Ok(link) => Some(link),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(io_error("read link", &target.join(DATA))(error)),
    };
    let fresh = match &current {
        Some(current) => is_current(&target.join(current), &payload)?,
        None => false,
    };
    if !fresh {
        publish(target, &payload, set_permissions)?;
    }
    link_names(target, &payload)?;
    sweep(target, &payload)?;
    Ok(!fresh)
}

/// Checks every path and brings it into its shortest form.
fn clean(payload: &Payload) -> Result<BTreeMap<String, &FileProjection>, AtomicWriteError> {
    let mut cleaned = BTreeMap::new();
    for (path, file) in payload {
        let refuse = |reason| AtomicWriteError::Path { path: path.clone(), reason };
        if path.is_empty() {
            return Err(refuse("must not be empty"));
        }
        if path.len() > PATH_MAX {
            return Err(refuse("must be less than or equal to 4096 characters"));
        }
        if path.contains('\0') {
            return Err(refuse("must not contain a NUL byte"));
        }
        let mut names = Vec::new();
        for component in Path::new(path).components() {
            match component {
                Component::RootDir | Component::Prefix(_) => return Err(refuse("must be relative path")),
                Component::ParentDir => return Err(refuse("must not contain '..'")),
                Component::CurDir => {}
                // The path is a str, so its parts are.
                Component::Normal(name) => names.push(name.to_str().unwrap_or_default()),
            }
        }
        if names.iter().any(|name| name.len() > NAME_MAX) {
            return Err(refuse("filenames must be less than or equal to 255 characters"));
        }
        match names.first() {
            None => return Err(refuse("must name a file")),
            Some(first) if first.starts_with("..") => return Err(refuse("must not start with '..'")),
            Some(_) => {}
        }
        cleaned.insert(names.join("/"), file);
    }
    for path in cleaned.keys() {
        let mut parents = path.match_indices('/').map(|(end, _)| &path[..end]);
        if let Some(parent) = parents.find(|parent| cleaned.contains_key(*parent)) {
            return Err(AtomicWriteError::Path {
                path: parent.to_owned(),
                reason: "must not be a file and a directory",
            });
        }
    }
    Ok(cleaned)
}

/// Whether `directory` holds exactly the files of `payload`.
fn is_current(directory: &Path, payload: &BTreeMap<String, &FileProjection>) -> Result<bool, AtomicWriteError> {
    for (path, file) in payload {
        match fs::read(directory.join(path)) {
            Ok(data) if data == file.data => {}
            Ok(_) => return Ok(false),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory
                ) =>
            {
                return Ok(false);
            }
            Err(error) => return Err(io_error("read", &directory.join(path))(error)),
        }
    }
    let mut present = BTreeSet::new();
    match list_files(directory, Path::new(""), &mut present) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io_error("read directory", directory)(error)),
    }
    Ok(present.len() == payload.len())
}

/// Collects the files below `root`; the depth is bounded by that of the payload that was written.
fn list_files(root: &Path, below: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list_files(root, &path, found)?;
        } else {
            found.insert(path);
        }
    }
    Ok(())
}

/// Writes the payload into a new directory and switches `..data` to it.
fn publish(
    target: &Path,
    payload: &BTreeMap<String, &FileProjection>,
    set_permissions: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), AtomicWriteError> {
    let name = new_directory(target).map_err(io_error("create data directory in", target))?;
    let directory = target.join(&name);
    for (path, file) in payload {
        let full = directory.join(path);
        write_file(&directory, &full, file).map_err(io_error("write", &full))?;
    }
    set_permissions(target).map_err(io_error("set ownership of", target))?;
    let link = target.join(NEW_DATA);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &link)(error)),
        _ => {}
    }
    std::os::unix::fs::symlink(&name, &link).map_err(io_error("create link", &link))?;
    fs::rename(&link, target.join(DATA)).map_err(io_error("rename link", &link))
}

/// A directory whose name is the time and a random number, mode 0755 whatever the umask.
fn new_directory(target: &Path) -> io::Result<String> {
    let now = jiff::Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S").to_string();
    loop {
        let name = format!("{now}.{:010}", fastrand::u32(..));
        match fs::create_dir(target.join(&name)) {
            Ok(()) => {
                fs::set_permissions(target.join(&name), fs::Permissions::from_mode(0o755))?;
                return Ok(name);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

fn write_file(root: &Path, full: &Path, file: &FileProjection) -> io::Result<()> {
    if let Some(parent) = full.parent().filter(|parent| *parent != root) {
        fs::DirBuilder::new().recursive(true).mode(0o777).create(parent)?;
    }
    // Not readable by others before mode and owner are right.
    let mut out = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(full)?;
    out.write_all(&file.data)?;
    if let Some(user) = file.user {
        std::os::unix::fs::fchown(&out, Some(user), None)?;
    }
    out.set_permissions(fs::Permissions::from_mode(file.mode))
}

fn first_name(path: &str) -> &str {
    path.split_once('/').map_or(path, |(first, _)| first)
}

/// Links every top-level name of the payload into `..data`. A name that is taken, by the mount point of a nested
/// volume, is left alone.
fn link_names(target: &Path, payload: &BTreeMap<String, &FileProjection>) -> Result<(), AtomicWriteError> {
    for (path, file) in payload {
        let name = first_name(path);
        let link = target.join(name);
        match std::os::unix::fs::symlink(Path::new(DATA).join(name), &link) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(io_error("create link", &link)(error)),
        }
        if let Some(user) = file.user {
            std::os::unix::fs::lchown(&link, Some(user), None).map_err(io_error("change owner of", &link))?;
        }
    }
    Ok(())
}

/// Removes links to names that are gone, and data directories that are not the current one.
fn sweep(target: &Path, payload: &BTreeMap<String, &FileProjection>) -> Result<(), AtomicWriteError> {
    let data = fs::read_link(target.join(DATA)).map_err(io_error("read link", &target.join(DATA)))?;
    let names: BTreeSet<&str> = payload.keys().map(|path| first_name(path)).collect();
    for entry in fs::read_dir(target).map_err(io_error("read directory", target))? {
        let entry = entry.map_err(io_error("read directory", target))?;
        let (name, path) = (entry.file_name(), entry.path());
        let kind = entry.file_type().map_err(io_error("stat", &path))?;
        let text = name.to_str().unwrap_or_default();
        if kind.is_dir() && text.starts_with("..") && data != Path::new(&name) {
            fs::remove_dir_all(&path).map_err(io_error("remove old data directory", &path))?;
        } else if kind.is_symlink() && text != DATA && !names.contains(text) {
            let ours = fs::read_link(&path).is_ok_and(|link| link.starts_with(DATA)) || text == NEW_DATA;
            if ours {
                fs::remove_file(&path).map_err(io_error("remove old link", &path))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn file(data: &str, mode: u32) -> FileProjection {
        FileProjection { data: data.into(), mode, user: None }
    }

    fn payload(files: &[(&str, &str)]) -> Payload {
        files.iter().map(|(path, data)| ((*path).to_owned(), file(data, 0o644))).collect()
    }

    fn put(target: &Path, payload: &Payload) -> bool {
        write(target, payload, |_| Ok(())).unwrap()
    }

    /// What a container sees: path and content of every file that is not hidden.
    fn visible(target: &Path) -> BTreeMap<String, String> {
        fn walk(root: &Path, below: &Path, out: &mut BTreeMap<String, String>) {
            for entry in fs::read_dir(root.join(below)).unwrap() {
                let path = below.join(entry.unwrap().file_name());
                if path.to_str().unwrap().starts_with("..") {
                    continue;
                }
                let metadata = fs::metadata(root.join(&path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                if metadata.is_dir() {
                    walk(root, &path, out);
                } else {
                    out.insert(path.to_str().unwrap().to_owned(), fs::read_to_string(root.join(&path)).unwrap());
                }
            }
        }
        let mut out = BTreeMap::new();
        walk(target, Path::new(""), &mut out);
        out
    }

    fn data_directories(target: &Path) -> usize {
        let names = fs::read_dir(target).unwrap().map(|entry| entry.unwrap());
        names
            .filter(|entry| {
                entry.file_type().unwrap().is_dir() && entry.file_name().to_str().unwrap().starts_with("..")
            })
            .count()
    }

    #[test]
    fn lays_files_out_as_kubelet_does() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path();
        let mut files = payload(&[("a", "1"), ("k/b", "2"), ("./k/c//d", "3")]);
        files.get_mut("a").unwrap().mode = 0o400;
        files.get_mut("a").unwrap().user = Some(1234);
        assert!(put(target, &files));
        let data = fs::read_link(target.join("..data")).unwrap();
        assert!(data.to_str().unwrap().starts_with("..20"), "{data:?}");
        assert_eq!(fs::read_link(target.join("a")).unwrap(), Path::new("..data/a"));
        assert_eq!(fs::read_link(target.join("k")).unwrap(), Path::new("..data/k"));
        assert_eq!(
            visible(target),
            [("a", "1"), ("k/b", "2"), ("k/c/d", "3")].map(|(k, v)| (k.into(), v.into())).into()
        );
        let a = fs::metadata(target.join("a")).unwrap();
        assert_eq!((a.mode() & 0o7777, a.uid()), (0o400, 1234));
        assert_eq!(fs::symlink_metadata(target.join("a")).unwrap().uid(), 1234);
        assert_eq!(fs::metadata(target.join(&data)).unwrap().mode() & 0o7777, 0o755);
        assert!(!put(target, &files), "unchanged content must not be written again");
        assert_eq!(fs::read_link(target.join("..data")).unwrap(), data);
    }

    #[test]
    fn refuses_paths_that_leave_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(256);
        for path in ["", "/a", "..", "a/../b", "../a", "..a", "..data", ".", "a\0b", &long, &"a/".repeat(2500)] {
            let error = write(dir.path(), &payload(&[(path, "")]), |_| Ok(())).unwrap_err();
            assert!(matches!(error, AtomicWriteError::Path { .. }), "{path:?}: {error}");
        }
        assert!(write(dir.path(), &payload(&[("a", ""), ("a.b", ""), ("a/b", "")]), |_| Ok(())).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(put(dir.path(), &payload(&[("a..b", "x"), ("a/..b", "y")])));
    }

    #[test]
    fn keeps_the_mount_points_of_nested_volumes() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("nested")).unwrap();
        put(dir.path(), &payload(&[("a", "1"), ("nested/x", "2")]));
        put(dir.path(), &payload(&[("b", "1")]));
        assert!(dir.path().join("nested").is_dir());
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn permissions_are_set_before_files_are_visible() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &payload(&[("a", "1")]));
        let seen = |target: &Path| {
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "1");
            assert_eq!(data_directories(target), 2);
            Ok(())
        };
        assert!(write(dir.path(), &payload(&[("a", "2")]), seen).unwrap());
        let failing = write(dir.path(), &payload(&[("a", "3")]), |_| Err(io::Error::other("no")));
        assert!(failing.is_err());
        assert_eq!(visible(dir.path())["a"], "2");
        put(dir.path(), &payload(&[("a", "3")]));
        assert_eq!((visible(dir.path())["a"].as_str(), data_directories(dir.path())), ("3", 1));
    }

    #[test]
    fn debug_shows_no_content() {
        assert_eq!(format!("{:?}", file("hunter2", 0o600)), "FileProjection(7 bytes, mode 600, user None)");
    }

    fn any_payload() -> impl Strategy<Value = Payload> {
        let path = prop::sample::select(vec!["a", "b", "c", "d/x", "d/y", "e/f/g", "e/f/h", "e/i"]);
        prop::collection::btree_map(path, "[a-c]{0,2}", 0..6)
            .prop_map(|files| files.into_iter().map(|(path, data)| (path.to_owned(), file(&data, 0o644))).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever was there before, and wherever a write was cut off, the next write leaves exactly its payload.
        #[test]
        fn shows_the_last_payload_and_nothing_else(steps in prop::collection::vec((any_payload(), 0_u8..5), 1..6)) {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path();
            for (payload, crash) in steps {
                let before = target.join(DATA).exists().then(|| visible(target));
                match crash {
                    // A write that dies before the switch changes nothing that can be seen.
                    1 => {
                        let _ = write(target, &payload, |_| Err(io::Error::other("crash")));
                        if let Some(before) = before { prop_assert_eq!(visible(target), before); }
                        continue;
                    }
                    2 => {
                        std::os::unix::fs::symlink("..gone", target.join(NEW_DATA)).unwrap();
                        fs::create_dir(target.join("..2020_01_01_00_00_00.1")).unwrap();
                    }
                    // After the switch, before the links.
                    3 => { let cleaned = clean(&payload).unwrap(); publish(target, &cleaned, |_| Ok(())).unwrap(); }
                    _ => {}
                }
                put(target, &payload);
                let expected: BTreeMap<String, String> = payload.iter()
                    .map(|(path, file)| (path.clone(), String::from_utf8(file.data.clone()).unwrap())).collect();
                prop_assert_eq!(visible(target), expected);
                prop_assert_eq!(data_directories(target), 1);
                prop_assert!(fs::symlink_metadata(target.join(NEW_DATA)).is_err());
            }
        }

        #[test]
        fn any_path_is_written_inside_or_refused(path in "[a./\\\\\0-]{0,12}") {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("v");
            fs::create_dir(&target).unwrap();
            let written = write(&target, &payload(&[(&path, "x")]), |_| Ok(())).is_ok();
            prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
            prop_assert!(!written || visible(&target).len() <= 1);
        }
    }
}
