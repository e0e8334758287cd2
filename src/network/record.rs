//! A Pod's network on disk: `<state_dir>/pods/<uid>/network.json`.
//!
//! The file is written before anything it describes is made and removed after all of it is gone. It is the address
//! lease, the list of host ports and the intent in one: whoever reads all records knows which addresses are taken and
//! what may have to be cleaned up. It is renamed into place, not fsynced: the namespaces it describes do not survive a
//! power cut either, and a killed agent loses nothing that the page cache holds.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::HostPort;
use super::namespace::Kind;

const FILE: &str = "network.json";
/// A record is a few hundred bytes; anything larger is not ours.
const MAX_BYTES: u64 = 1024 * 1024;

/// How far a Pod's network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Being made (or the agent died meanwhile): anything may or may not exist.
    Preparing,
    /// Complete.
    Ready,
}

/// An address of a Pod and the podCIDR it is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodAddress {
    pub address: IpAddr,
    /// The podCIDR, which may have changed on the Node since.
    #[serde(with = "display")]
    pub cidr: IpNet,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub phase: Phase,
    pub hostname: String,
    pub host_network: bool,
    #[serde(rename = "hostIPC")]
    pub host_ipc: bool,
    pub addresses: Vec<PodAddress>,
    pub host_ports: Vec<HostPort>,
    /// The network is that of CNI plugins, and these are its addresses (once it is ready). `addresses` is empty then.
    #[serde(rename = "pluginIPs", default, skip_serializing_if = "Option::is_none")]
    pub plugin_ips: Option<Vec<IpAddr>>,
}

impl Record {
    /// The Pod's addresses, whoever gave them.
    pub fn ips(&self) -> Vec<IpAddr> {
        let own = || self.addresses.iter().map(|entry| entry.address).collect();
        self.plugin_ips.clone().unwrap_or_else(own)
    }

    /// The namespaces of its own that the Pod has.
    pub fn kinds(&self) -> Vec<Kind> {
        let own = |kind: &Kind| match kind {
            Kind::Net | Kind::Uts => !self.host_network,
            Kind::Ipc => !self.host_ipc,
        };
        Kind::ALL.into_iter().filter(own).collect()
    }

    /// Makes the Pod's directory if needed and replaces the record.
    pub fn write(&self, pod_dir: &Path) -> io::Result<()> {
        fs::create_dir_all(pod_dir)?;
        let temporary = pod_dir.join(".network.json.tmp");
        fs::write(&temporary, serde_json::to_vec(self)?)?;
        fs::rename(&temporary, pod_dir.join(FILE))
    }
}

/// Removes the record, and the Pod's directory if nothing else is in it.
pub fn remove(pod_dir: &Path) -> io::Result<()> {
    for file in [FILE, ".network.json.tmp"] {
        match fs::remove_file(pod_dir.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    match fs::remove_dir(pod_dir) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Err(error),
        _ => Ok(()),
    }
}

/// All records below `pods`, the one written last at the end.
///
/// A record that cannot be read is an error: to ignore it would be to give its address away.
pub fn read_all(pods: &Path) -> io::Result<Vec<Record>> {
    let mut found: Vec<(SystemTime, Record)> = Vec::new();
    for directory in subdirectories(pods)? {
        let path = directory.join(FILE);
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let invalid = |reason: String| {
            let text = format!("{}: {reason}: remove the file if the Pod is gone", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        if metadata.len() > MAX_BYTES {
            return Err(invalid(format!("larger than {MAX_BYTES} bytes")));
        }
        let record: Record = serde_json::from_slice(&fs::read(&path)?).map_err(|error| invalid(error.to_string()))?;
        if directory.file_name().is_none_or(|name| name != record.uid.as_str()) {
            return Err(invalid(format!("it is the record of the Pod with uid {:?}", record.uid)));
        }
        found.push((metadata.modified()?, record));
    }
    found.sort_by_key(|(modified, _)| *modified);
    Ok(found.into_iter().map(|(_, record)| record).collect())
}

/// Pods' directories with pinned namespaces: the uid and the path.
pub fn directories_with_pins(pods: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let uid = |directory: PathBuf| Some((directory.file_name()?.to_str()?.to_owned(), directory));
    let pinned = |(_, directory): &(String, PathBuf)| directory.join("ns").exists();
    Ok(subdirectories(pods)?.into_iter().filter_map(uid).filter(pinned).collect())
}

fn subdirectories(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| entry.map(|entry| entry.path())).collect(),
    }
}

/// Serde through `Display` and `FromStr`.
mod display {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str) -> Record {
        Record {
            uid: uid.into(),
            namespace: "default".into(),
            name: "web".into(),
            phase: Phase::Preparing,
            hostname: "web".into(),
            host_network: false,
            host_ipc: false,
            addresses: vec![PodAddress { address: "10.0.0.7".parse().unwrap(), cidr: "10.0.0.0/24".parse().unwrap() }],
            host_ports: Vec::new(),
            plugin_ips: None,
        }
    }

    #[test]
    fn records_come_back_in_the_order_of_writing() {
        let directory = tempfile::tempdir().unwrap();
        let pods = directory.path();
        assert!(read_all(&pods.join("none")).unwrap().is_empty());
        for uid in ["b", "a"] {
            record(uid).write(&pods.join(uid)).unwrap();
            #[allow(clippy::disallowed_methods, reason = "file times have to differ")]
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
        fs::create_dir(pods.join("unrelated")).unwrap();
        assert_eq!(read_all(pods).unwrap(), [record("b"), record("a")]);
        remove(&pods.join("a")).unwrap();
        remove(&pods.join("a")).unwrap();
        assert!(!pods.join("a").exists());
        fs::write(pods.join("b/volume"), "").unwrap();
        remove(&pods.join("b")).unwrap();
        assert!(pods.join("b/volume").exists());
    }

    #[test]
    fn an_unreadable_record_is_not_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let pods = directory.path();
        record("a").write(&pods.join("a")).unwrap();
        fs::write(pods.join("a/network.json"), "{").unwrap();
        let error = read_all(pods).unwrap_err().to_string();
        assert!(error.contains("a/network.json") && error.contains("remove the file"), "{error}");
        record("other").write(&pods.join("a")).unwrap();
        assert!(read_all(pods).unwrap_err().to_string().contains("other"));
    }
}
