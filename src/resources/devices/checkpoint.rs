//! Allocations on disk, in kubelet's own format: a node can change between kubelet and Gantry and keep them.
//!
//! Source: `pkg/kubelet/cm/devicemanager/checkpoint/checkpoint.go` and
//! `pkg/kubelet/checkpointmanager/checksum/checksum.go`. The checksum is FNV-1a (32 bits) of the data as Go's spew
//! prints it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::api::ContainerResponse;
use super::holdings::{Grant, Holdings};
use super::inventory::Inventory;

/// Name of the file in the plugins' directory.
pub(super) const FILE: &str = "kubelet_internal_checkpoint";

/// Why a checkpoint is not used; terminal for the file, the next one replaces it.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckpointError {
    /// It cannot be read.
    #[error("read it: {0}")]
    Io(#[from] io::Error),
    /// It is no checkpoint.
    #[error("decode it: {0}")]
    Format(String),
    /// It was changed, or written by something else.
    #[error("checkpoint is corrupted: the checksum is {found}, not {expected}")]
    Checksum {
        /// Of what is in the file.
        found: u32,
        /// In the file.
        expected: u64,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Checkpoint {
    data: Data,
    checksum: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    /// Go writes an empty list that was never made as null.
    pod_device_entries: Option<Vec<Entry>>,
    registered_devices: Option<BTreeMap<String, Option<Vec<String>>>>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(rename = "PodUID")]
    pod: String,
    #[serde(rename = "ContainerName")]
    container: String,
    #[serde(rename = "ResourceName")]
    resource: String,
    #[serde(rename = "DeviceIDs")]
    devices: Option<BTreeMap<i64, Option<Vec<String>>>>,
    #[serde(rename = "AllocResp")]
    response: Option<String>,
}

/// The file's bytes.
pub(super) fn encode(inventory: &Inventory) -> Result<Vec<u8>, serde_json::Error> {
    let entries: Vec<Entry> = inventory
        .holdings
        .iter()
        .map(|(pod, container, resource, grant)| Entry {
            pod: pod.to_owned(),
            container: container.to_owned(),
            resource: resource.to_owned(),
            devices: Some(grant.devices.iter().map(|(node, ids)| (*node, Some(ids.clone()))).collect()),
            response: Some(STANDARD.encode(grant.response.encode_to_vec())),
        })
        .collect();
    let registered =
        inventory.registered().map(|(resource, ids)| (resource.to_owned(), Some(ids.iter().cloned().collect())));
    let data = Data {
        pod_device_entries: (!entries.is_empty()).then_some(entries),
        registered_devices: Some(registered.collect()),
    };
    let checksum = u64::from(checksum(&data).unwrap_or_default());
    serde_json::to_vec(&Checkpoint { data, checksum })
}

/// What is allocated, and the resources that were offered.
pub(super) fn decode(bytes: &[u8]) -> Result<(Holdings, Vec<String>), CheckpointError> {
    let format = |error: &dyn std::fmt::Display| CheckpointError::Format(error.to_string());
    let Checkpoint { data, checksum: expected } = serde_json::from_slice(bytes).map_err(|error| format(&error))?;
    let found = checksum(&data).map_err(|error| format(&error))?;
    if u64::from(found) != expected {
        return Err(CheckpointError::Checksum { found, expected });
    }
    let mut holdings = Holdings::default();
    for entry in data.pod_device_entries.into_iter().flatten() {
        let response = STANDARD.decode(entry.response.unwrap_or_default()).map_err(|error| format(&error))?;
        let response = match ContainerResponse::decode(response.as_slice()) {
            Ok(response) => response,
            Err(error) => {
                tracing::error!(pod = entry.pod, container = entry.container, resource = entry.resource, %error,
                    "an allocation of devices cannot be read");
                continue;
            }
        };
        let devices = entry.devices.into_iter().flatten().map(|(node, ids)| (node, ids.unwrap_or_default())).collect();
        holdings.insert(&entry.pod, &entry.container, &entry.resource, Grant { devices, response });
    }
    Ok((holdings, data.registered_devices.into_iter().flatten().map(|(resource, _)| resource).collect()))
}

/// Reads the checkpoint of a directory; `None` if there is none.
pub(super) fn read(dir: &Path) -> Result<Option<(Holdings, Vec<String>)>, CheckpointError> {
    match fs::read(dir.join(FILE)) {
        Ok(bytes) => decode(&bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Replaces the checkpoint. It is on the disk, under a name that nobody reads, before it is under its own: it has to
/// outlive the machine's boot. Blocking.
pub(super) fn write(dir: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!(".{FILE}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(FILE))
}

fn checksum(data: &Data) -> Result<u32, base64::DecodeError> {
    Ok(fnv1a(printed(data)?.as_bytes()))
}

fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// The data as spew's `%#v` shows it, with sorted keys.
fn printed(data: &Data) -> Result<String, base64::DecodeError> {
    let mut text = String::from("(checkpoint.checkpointData){PodDeviceEntries:([]checkpoint.PodDevicesEntry)");
    match &data.pod_device_entries {
        None => text.push_str("<nil>"),
        Some(entries) => {
            text.push('[');
            for (index, entry) in entries.iter().enumerate() {
                if index > 0 {
                    text.push(' ');
                }
                entry.print(&mut text)?;
            }
            text.push(']');
        }
    }
    text.push_str(" RegisteredDevices:(map[string][]string)");
    print_map(&mut text, data.registered_devices.as_ref(), |text, resource| text.push_str(resource));
    text.push('}');
    Ok(text)
}

impl Entry {
    fn print(&self, text: &mut String) -> Result<(), base64::DecodeError> {
        let Self { pod, container, resource, .. } = self;
        let _ = write!(
            text,
            "{{PodUID:(string){pod} ContainerName:(string){container} ResourceName:(string){resource} \
             DeviceIDs:(checkpoint.DevicesPerNUMA)"
        );
        print_map(text, self.devices.as_ref(), |text, node| {
            let _ = write!(text, "{node}");
        });
        text.push_str(" AllocResp:([]uint8)");
        match &self.response {
            None => text.push_str("<nil>"),
            Some(encoded) => {
                let bytes = STANDARD.decode(encoded)?;
                let list: Vec<String> = bytes.iter().map(ToString::to_string).collect();
                let _ = write!(text, "[{}]", list.join(" "));
            }
        }
        text.push('}');
        Ok(())
    }
}

fn print_map<K>(
    text: &mut String,
    map: Option<&BTreeMap<K, Option<Vec<String>>>>,
    print_key: impl Fn(&mut String, &K),
) {
    let Some(map) = map else {
        text.push_str("<nil>");
        return;
    };
    text.push_str("map[");
    for (index, (key, list)) in map.iter().enumerate() {
        if index > 0 {
            text.push(' ');
        }
        print_key(text, key);
        text.push(':');
        match list {
            None => text.push_str("<nil>"),
            Some(list) => {
                let _ = write!(text, "[{}]", list.join(" "));
            }
        }
    }
    text.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by kubelet's own package (`checkpoint.New(…).MarshalCheckpoint()`, v1.37.2).
    const OF_KUBELET: [&str; 4] = [
        r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":3467439661}"#,
        r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":null},"Checksum":1944006890}"#,
        r#"{"Data":{"PodDeviceEntries":[],"RegisteredDevices":{"a/x":null,"b/x":[]}},"Checksum":173040470}"#,
        r#"{"Data":{"PodDeviceEntries":[{"PodUID":"u-1","ContainerName":"c","ResourceName":"example.com/gpu","DeviceIDs":{"-1":["d 1","d-2"],"0":null,"10":["x"],"2":["z"]},"AllocResp":"CgYKAUESAUI="},{"PodUID":"u-2","ContainerName":"c","ResourceName":"example.com/gpu","DeviceIDs":{},"AllocResp":""},{"PodUID":"u-3","ContainerName":"","ResourceName":"r","DeviceIDs":null,"AllocResp":null}],"RegisteredDevices":{"a/x":["x"],"example.com/gpu":["d 1","d-2"]}},"Checksum":3056780560}"#,
    ];

    #[test]
    fn checkpoints_of_kubelet_are_understood() {
        for text in OF_KUBELET {
            decode(text.as_bytes()).unwrap();
        }
        let (holdings, registered) = decode(OF_KUBELET[3].as_bytes()).unwrap();
        assert_eq!(registered, ["a/x", "example.com/gpu"]);
        let grant = holdings.get("u-1", "c", "example.com/gpu").unwrap();
        assert_eq!(grant.ids(), ["d 1", "d-2", "x", "z"].map(str::to_owned).into());
        assert_eq!(grant.response.envs, [("A".to_owned(), "B".to_owned())].into());
    }

    #[test]
    fn what_is_written_is_what_kubelet_writes() {
        let now = tokio::time::Instant::now();
        let empty = Inventory::restored(Holdings::default(), [], now);
        assert_eq!(encode(&empty).unwrap(), OF_KUBELET[0].as_bytes());
        let mut holdings = Holdings::default();
        let response = ContainerResponse { envs: [("A".to_owned(), "B".to_owned())].into(), ..Default::default() };
        let devices = [(-1, vec!["d".to_owned()])].into();
        holdings.insert("u", "c", "r/x", Grant { devices, response });
        let bytes = encode(&Inventory::restored(holdings.clone(), ["r/x".to_owned()], now)).unwrap();
        let (read, registered) = decode(&bytes).unwrap();
        assert_eq!((read, registered), (holdings, vec!["r/x".to_owned()]));
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(r#""DeviceIDs":{"-1":["d"]},"AllocResp":"CgYKAUESAUI=""#), "{text}");
    }

    #[test]
    fn a_changed_file_is_not_believed() {
        let changed = OF_KUBELET[3].replace("u-1", "u-9");
        assert!(matches!(decode(changed.as_bytes()), Err(CheckpointError::Checksum { .. })));
        assert!(matches!(decode(b"{"), Err(CheckpointError::Format(_))));
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap().is_none());
        write(dir.path(), OF_KUBELET[0].as_bytes()).unwrap();
        assert!(read(dir.path()).unwrap().is_some());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    proptest::proptest! {
        #[test]
        fn hostile_files_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), at in 0_usize..400) {
            let _ = decode(&bytes);
            let mut torn = OF_KUBELET[3].as_bytes().to_vec();
            torn.truncate(at.min(torn.len()));
            let _ = decode(&torn);
        }
    }
}
