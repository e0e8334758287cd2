//! Specification files, strictly read.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

/// Largest file that is read, bytes.
const MAX_FILE: u64 = 4 << 20;

/// A specification and where it was found.
pub(super) struct File {
    pub path: PathBuf,
    pub spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    #[serde(rename = "cdiVersion")]
    _version: String,
    /// `vendor.com/class`.
    pub kind: String,
    #[serde(rename = "annotations", default)]
    _annotations: Value,
    #[serde(default)]
    pub devices: Vec<Device>,
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Device {
    pub name: String,
    #[serde(rename = "annotations", default)]
    _annotations: Value,
    pub container_edits: ContainerEdits,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ContainerEdits {
    pub env: Vec<String>,
    pub device_nodes: Vec<DeviceNode>,
    pub net_devices: Vec<Value>,
    pub hooks: Vec<Value>,
    pub mounts: Vec<CdiMount>,
    pub intel_rdt: Option<Value>,
    #[serde(rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct DeviceNode {
    pub path: String,
    #[serde(default)]
    pub host_path: String,
    #[serde(rename = "type", default)]
    pub typ: String,
    #[serde(default)]
    pub major: i64,
    #[serde(default)]
    pub minor: i64,
    #[serde(default)]
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub permissions: String,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct CdiMount {
    pub host_path: String,
    pub container_path: String,
    #[serde(default)]
    pub options: Vec<String>,
    #[serde(rename = "type", default)]
    pub typ: String,
}

/// The specifications of a directory, by name; a text for each that is none.
pub(super) fn read_all(directory: &Path) -> impl Iterator<Item = Result<File, String>> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_spec = |path: &PathBuf| matches!(path.extension().and_then(|e| e.to_str()), Some("json" | "yaml"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_spec).collect();
    paths.sort();
    paths.into_iter().map(|path| match read(&path) {
        Ok(spec) => Ok(File { path, spec }),
        Err(error) => Err(format!("{}: {error}", path.display())),
    })
}

fn read(path: &Path) -> Result<Spec, String> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("it exceeds {MAX_FILE} bytes"));
    }
    serde_saphyr::from_str(&text).map_err(|error| error.to_string())
}
