//! Who has which devices, for monitoring agents: `v1.PodResourcesLister` on `<root_dir>/pod-resources/kubelet.sock`.
//!
//! Source: `pkg/kubelet/apis/podresources/server_v1.go` and `k8s.io/kubelet/pkg/apis/podresources/v1/api.proto`. No
//! container has CPUs or memory of its own here, nor dynamic resources: what tells of them is empty.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use k8s_openapi::api::core::v1::Pod;
use prost::Message;

use super::api::{NumaNode, Topology};
use super::inventory::DevicePlace;
use super::manager::DeviceManager;
use super::registration::listen;
use crate::resources::amounts::is_sidecar;
use crate::stream::grpc::Status;

#[derive(Clone, PartialEq, Message)]
struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pods: Vec<PodResources>,
}

#[derive(Clone, PartialEq, Message)]
struct GetRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct GetResponse {
    #[prost(message, optional, tag = "1")]
    pod: Option<PodResources>,
}

#[derive(Clone, PartialEq, Message)]
struct AllocatableResponse {
    #[prost(message, repeated, tag = "1")]
    devices: Vec<ContainerDevices>,
}

#[derive(Clone, PartialEq, Message)]
struct PodResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(message, repeated, tag = "3")]
    containers: Vec<ContainerResources>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    devices: Vec<ContainerDevices>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerDevices {
    #[prost(string, tag = "1")]
    resource: String,
    #[prost(string, repeated, tag = "2")]
    ids: Vec<String>,
    #[prost(message, optional, tag = "3")]
    topology: Option<Topology>,
}

/// The node's Pods: those that go on, or all that are known.
pub(super) type Pods = dyn Fn(bool) -> Vec<Arc<Pod>> + Send + Sync;

/// Begins to serve.
///
/// # Errors
/// The directory cannot be made, or the socket not be bound.
pub(super) fn serve(manager: &Arc<DeviceManager>, dir: &Path, pods: Arc<Pods>) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
    let socket = dir.join("kubelet.sock");
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let manager = manager.clone();
    listen(&socket, move |path: String, message: Bytes| {
        let answer = answer(&manager, &*pods, &path, message);
        async move { answer }
    })
}

fn answer(manager: &DeviceManager, pods: &Pods, path: &str, message: Bytes) -> Result<Bytes, Status> {
    match path {
        "/v1.PodResourcesLister/List" => {
            let pods = pods(true).iter().map(|pod| of_pod(manager, pod)).collect();
            Ok(ListResponse { pods }.encode_to_vec().into())
        }
        "/v1.PodResourcesLister/GetAllocatableResources" => {
            Ok(AllocatableResponse { devices: devices(manager.allocatable()) }.encode_to_vec().into())
        }
        "/v1.PodResourcesLister/Get" => {
            let GetRequest { name, namespace } =
                GetRequest::decode(message).map_err(|error| Status::new(Status::INTERNAL, error))?;
            let is_it = |pod: &Arc<Pod>| {
                let meta = &pod.metadata;
                meta.name.as_ref() == Some(&name) && meta.namespace.as_ref() == Some(&namespace)
            };
            let pod = pods(false).into_iter().find(is_it).ok_or_else(|| {
                Status::new(Status::UNKNOWN, format!("pod {name} in namespace {namespace} not found"))
            })?;
            Ok(GetResponse { pod: Some(of_pod(manager, &pod)) }.encode_to_vec().into())
        }
        _ => Err(Status::new(Status::UNIMPLEMENTED, format!("unknown method {path}"))),
    }
}

/// Sidecars and main containers: those that go on.
fn of_pod(manager: &DeviceManager, pod: &Pod) -> PodResources {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let sidecars = spec.into_iter().flat_map(|spec| spec.init_containers.iter().flatten()).filter(|c| is_sidecar(c));
    let main = spec.into_iter().flat_map(|spec| &spec.containers);
    let uid = text(&pod.metadata.uid);
    let containers = sidecars.chain(main).map(|container| ContainerResources {
        name: container.name.clone(),
        devices: devices(manager.devices_of(&uid, &container.name)),
    });
    PodResources {
        name: text(&pod.metadata.name),
        namespace: text(&pod.metadata.namespace),
        containers: containers.collect(),
    }
}

/// One entry for each device, as kubelet has it.
fn devices(places: Vec<DevicePlace>) -> Vec<ContainerDevices> {
    let entry = |place: DevicePlace| ContainerDevices {
        resource: place.resource,
        ids: vec![place.id],
        topology: Some(Topology { nodes: place.numa.into_iter().map(|id| NumaNode { id }).collect() }),
    };
    places.into_iter().map(entry).collect()
}
