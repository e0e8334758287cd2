//! What has to be known for DEL: the network as it was at ADD, its arguments and its result.
//!
//! A file for each Pod in a directory that survives a reboot, written before ADD and removed after DEL. Plugins keep
//! leases on disk too (host-local: `/var/lib/cni/networks`): were this forgotten at a reboot with the namespaces, every
//! reboot would eat addresses.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conflist::{Conflist, Plugin};
use crate::network::{HostPort, PodNetworkRequest};

/// The interface that every Pod has.
pub const INTERFACE: &str = "eth0";
/// A few kilobytes are usual.
const MAX_FILE: u64 = 8 << 20;

/// A Pod in a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// `CNI_CONTAINERID`: the Pod's uid.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// `CNI_ARGS`.
    pub args: Vec<(String, String)>,
    /// Arguments of capabilities, by name.
    pub capabilities: Map<String, Value>,
    /// The network.
    pub network: Conflist,
    /// What the last plugin answered; none as long as ADD has not succeeded.
    pub result: Option<Map<String, Value>>,
}

impl Attachment {
    /// A Pod's part in a network. The node's `pod_cidrs` are what plugins may take addresses from.
    pub fn of_pod(request: &PodNetworkRequest, network: &Conflist, netns: PathBuf, pod_cidrs: &[IpNet]) -> Self {
        // the names that containerd, and with it every plugin, uses
        let args = [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", &request.namespace),
            ("K8S_POD_NAME", &request.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &request.uid),
            ("K8S_POD_UID", &request.uid),
        ];
        Self {
            container_id: request.uid.clone(),
            netns,
            args: args.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            capabilities: capabilities(request, pod_cidrs),
            network: network.clone(),
            result: None,
        }
    }

    /// What one plugin reads.
    pub fn request(&self, plugin: &Plugin, previous: Option<&Map<String, Value>>) -> Map<String, Value> {
        let mut request = plugin.request();
        request.insert("cniVersion".into(), self.network.version.as_str().into());
        request.insert("name".into(), self.network.name.clone().into());
        let wanted = self.capabilities.iter().filter(|(name, _)| plugin.wants(name));
        let arguments: Map<String, Value> = wanted.map(|(name, value)| (name.clone(), value.clone())).collect();
        if !arguments.is_empty() {
            request.insert("runtimeConfig".into(), arguments.into());
        }
        if let Some(previous) = previous {
            request.insert("prevResult".into(), previous.clone().into());
        }
        request
    }

    /// `CNI_*` for its calls; a namespace that is gone is named by nothing.
    pub fn environment(&self, alive: bool) -> Vec<(&'static str, OsString)> {
        let args: Vec<String> = self.args.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let netns = if alive { self.netns.clone().into_os_string() } else { OsString::new() };
        vec![
            ("CNI_CONTAINERID", self.container_id.clone().into()),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", INTERFACE.into()),
            ("CNI_ARGS", args.join(";").into()),
        ]
    }
}

/// Arguments of capabilities by name (CNI's CONVENTIONS.md); plugins get those that their configuration asks for.
fn capabilities(request: &PodNetworkRequest, pod_cidrs: &[IpNet]) -> Map<String, Value> {
    let mut all = Map::new();
    if !request.host_ports.is_empty() {
        let mapping = |port: &HostPort| {
            json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.to_string().to_lowercase(),
                "hostIP": port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        };
        all.insert("portMappings".into(), request.host_ports.iter().map(mapping).collect());
    }
    let limits = request.bandwidth;
    let mut bandwidth = Map::new();
    for (direction, rate) in [("ingress", limits.ingress), ("egress", limits.egress)] {
        if let Some(rate) = rate {
            bandwidth.insert(format!("{direction}Rate"), rate.into());
            // no limit of its own: the most that the plugin takes, as containerd has it
            bandwidth.insert(format!("{direction}Burst"), u32::MAX.into());
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".into(), bandwidth.into());
    }
    if !pod_cidrs.is_empty() {
        let set = |cidr: &IpNet| json!([{ "subnet": cidr.to_string() }]);
        all.insert("ipRanges".into(), pod_cidrs.iter().map(set).collect());
    }
    let dns = &request.dns;
    let dns = json!({ "servers": dns.nameservers, "searches": dns.searches, "options": dns.options });
    all.insert("dns".into(), dns);
    all
}

/// The directory of attachments.
#[derive(Debug)]
pub struct Attachments {
    directory: PathBuf,
}

impl Attachments {
    /// Below `directory`, which is made when it is needed.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.directory.join(format!("{uid}.json"))
    }

    /// Whether a Pod is attached, or perhaps half.
    pub fn exists(&self, uid: &str) -> bool {
        self.path(uid).exists()
    }

    /// A Pod's attachment, if there is one.
    pub fn read(&self, uid: &str) -> io::Result<Option<Attachment>> {
        let path = self.path(uid);
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata?,
        };
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        if metadata.len() > MAX_FILE {
            return Err(invalid(format!("larger than {MAX_FILE} bytes")));
        }
        let attachment = serde_json::from_slice(&fs::read(&path)?).map_err(|error| invalid(error.to_string()))?;
        Ok(Some(attachment))
    }

    /// Replaces it, and returns when the disk has it.
    pub fn write(&self, attachment: &Attachment) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let temporary = self.directory.join(format!(".{}.tmp", attachment.container_id));
        let mut options = File::options();
        // arguments may hold what not everybody should read
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(attachment)?)?;
        file.sync_all()?;
        fs::rename(&temporary, self.path(&attachment.container_id))
    }

    /// Forgets it.
    pub fn remove(&self, uid: &str) -> io::Result<()> {
        match fs::remove_file(self.path(uid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The uids of all attached Pods.
    pub fn uids(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut uids = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let uid = name.to_str().filter(|name| !name.starts_with('.')).and_then(|name| name.strip_suffix(".json"));
            uids.extend(uid.map(str::to_owned));
        }
        Ok(uids)
    }
}
