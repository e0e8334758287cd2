//! `hostPath` volumes. Source: `pkg/volume/hostpath/host_path.go`.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path};

use super::error::SetUpError;

/// Checks that `path` is what `type` says, and makes it if `type` allows.
pub(super) fn set_up(path: &str, kind: Option<&str>) -> Result<(), SetUpError> {
    let file = Path::new(path);
    if file.components().any(|component| component == Component::ParentDir) {
        return Err(SetUpError::HostPath(format!("invalid HostPath `{path}`: must not contain '..'")));
    }
    if !file.is_absolute() {
        return Err(SetUpError::HostPath(format!("invalid HostPath `{path}`: must be an absolute path")));
    }
    let missing = || matches!(fs::metadata(file), Err(error) if error.kind() == io::ErrorKind::NotFound);
    match kind.unwrap_or_default() {
        "" => Ok(()),
        "DirectoryOrCreate" if missing() => make_directory(file),
        "FileOrCreate" if missing() => make_file(file),
        "DirectoryOrCreate" | "Directory" => expect(path, "Directory", "directory"),
        "FileOrCreate" | "File" => expect(path, "File", "file"),
        "Socket" => expect(path, "Socket", "socket file"),
        "CharDevice" => expect(path, "CharDevice", "character device"),
        "BlockDevice" => expect(path, "BlockDevice", "block device"),
        other => Err(SetUpError::Invalid(format!("{other} is an invalid volume type"))),
    }
}

/// Makes the directory that a container mounts if nothing is there, as container runtimes do for a `hostPath` without
/// a type.
pub(super) fn make_directory(path: &Path) -> Result<(), SetUpError> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(SetUpError::io("mkdir", path))
}

fn make_file(path: &Path) -> Result<(), SetUpError> {
    match fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(SetUpError::io("open", path)(error)),
    }
}

fn expect(path: &str, wanted: &str, name: &str) -> Result<(), SetUpError> {
    let refuse = |reason: String| Err(SetUpError::HostPath(reason));
    match file_type(path) {
        Ok(kind) if kind == wanted => Ok(()),
        Ok(kind) => refuse(format!("hostPath type check failed: {path} is not a {name}, it's a {kind}")),
        Err(reason) => refuse(format!(
            "hostPath type check failed, {path} is not a {name}, unable to determine its type: {reason}"
        )),
    }
}

fn file_type(path: &str) -> Result<&'static str, String> {
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("path {path:?} does not exist"),
        _ => format!("stat {path}: {error}"),
    })?;
    let kind = metadata.file_type();
    [
        (kind.is_dir(), "Directory"),
        (kind.is_file(), "File"),
        (kind.is_socket(), "Socket"),
        (kind.is_char_device(), "CharDevice"),
        (kind.is_block_device(), "BlockDevice"),
    ]
    .into_iter()
    .find_map(|(is, name)| is.then_some(name))
    .ok_or_else(|| "only recognise file, directory, socket, block device and character device".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn checks_every_type_and_makes_what_may_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let _socket = std::os::unix::net::UnixListener::bind(at("sock")).unwrap();
        set_up(&at("made/deep"), Some("DirectoryOrCreate")).unwrap();
        set_up(&at("made/file"), Some("FileOrCreate")).unwrap();
        assert_eq!(fs::metadata(at("made/file")).unwrap().permissions().mode() & 0o777, 0o644);
        for (name, kind) in [
            ("made", "Directory"),
            ("made", "DirectoryOrCreate"),
            ("made/file", "File"),
            ("made/file", "FileOrCreate"),
            ("sock", "Socket"),
            ("none", ""),
        ] {
            set_up(&at(name), Some(kind)).unwrap_or_else(|error| panic!("{name} {kind}: {error}"));
        }
        assert!(!dir.path().join("none").exists(), "no type means no check and no change");
        set_up("/dev/null", Some("CharDevice")).unwrap();
        for (name, kind, text) in [
            ("sock", "Directory", "hostPath type check failed: {} is not a directory, it's a Socket"),
            ("made", "FileOrCreate", "hostPath type check failed: {} is not a file, it's a Directory"),
            ("made", "BlockDevice", "hostPath type check failed: {} is not a block device, it's a Directory"),
            (
                "none",
                "Socket",
                "hostPath type check failed, {} is not a socket file, unable to determine its type: path \"{}\" does not exist",
            ),
            ("none", "Dir", "Dir is an invalid volume type"),
        ] {
            let error = set_up(&at(name), Some(kind)).unwrap_err().to_string();
            assert_eq!(error, text.replace("{}", &at(name)));
        }
        let error = set_up("/a/../b", None).unwrap_err().to_string();
        assert_eq!(error, "invalid HostPath `/a/../b`: must not contain '..'");
        assert!(set_up("relative", None).is_err());
    }
}
