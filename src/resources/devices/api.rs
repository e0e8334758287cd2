//! The messages of `v1beta1` device plugins and of plugin registration.
//!
//! Source: `k8s.io/kubelet/pkg/apis/{deviceplugin/v1beta1,pluginregistration/v1}/api.proto`.

use std::collections::BTreeMap;

use prost::Message;

/// The only version of the device plugin API.
pub(super) const VERSION: &str = "v1beta1";
/// What a plugin says of a device that works.
pub(super) const HEALTHY: &str = "Healthy";

/// Of methods whose message says nothing.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Empty {}

/// A plugin announces itself.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub version: String,
    /// Name of its socket in the plugins' directory.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    #[prost(string, tag = "3")]
    pub resource_name: String,
}

/// What a plugin wants to be asked.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct PluginOptions {
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub preferred_allocation: bool,
}

/// All devices of a plugin.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Listing {
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<ListedDevice>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ListedDevice {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub health: String,
    #[prost(message, optional, tag = "3")]
    pub topology: Option<Topology>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Topology {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NumaNode>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct NumaNode {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DeviceIds {
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<DeviceIds>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<ContainerResponse>,
}

/// How a container gets at its devices.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerResponse {
    /// Environment variables.
    #[prost(btree_map = "string, string", tag = "1")]
    pub envs: BTreeMap<String, String>,
    /// Directories and files.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<PluginMount>,
    /// Device nodes, or directories of them.
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<PluginDevice>,
    /// Annotations for the runtime.
    #[prost(btree_map = "string, string", tag = "4")]
    pub annotations: BTreeMap<String, String>,
    /// Names of CDI devices.
    #[prost(message, repeated, tag = "5")]
    pub cdi_devices: Vec<CdiDevice>,
}

/// A tree of the node's in a container.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PluginMount {
    /// Where.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// What.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Whether the container may only read it.
    #[prost(bool, tag = "3")]
    pub read_only: bool,
}

/// A device of the node's in a container.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PluginDevice {
    /// Where.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// What.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Of `r`, `w` and `m`.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

/// A device that a CDI specification describes.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CdiDevice {
    /// `vendor.com/class=device`.
    #[prost(string, tag = "1")]
    pub name: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PreferenceRequest {
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<Preference>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Preference {
    #[prost(string, repeated, tag = "1")]
    pub available: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub must_include: Vec<String>,
    #[prost(int32, tag = "3")]
    pub size: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PreferenceResponse {
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<DeviceIds>,
}

/// What a plugin in `plugins_registry` is.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PluginInfo {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where it serves, if not on the socket that it was found by.
    #[prost(string, tag = "3")]
    pub endpoint: String,
    #[prost(string, repeated, tag = "4")]
    pub versions: Vec<String>,
}

/// What came of its registration.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RegistrationStatus {
    #[prost(bool, tag = "1")]
    pub registered: bool,
    #[prost(string, tag = "2")]
    pub error: String,
}
