//! What goes wrong between a Pod and its devices.

use crate::stream::grpc::Status;

/// Why a container does not get its devices, in kubelet's words (`pkg/kubelet/cm/devicemanager/manager.go`).
///
/// At admission every one is terminal for the Pod (`UnexpectedAdmissionError`). At a container's start they are
/// retryable: a plugin may come back.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// The container has another number of devices than it asks for.
    #[error("pod {pod:?} container {container:?} changed request for resource {resource:?} from {had} to {wanted}")]
    Changed {
        /// UID of the Pod.
        pod: String,
        /// Name of the container.
        container: String,
        /// Name of the resource.
        resource: String,
        /// Devices it has.
        had: usize,
        /// Devices it asks for.
        wanted: usize,
    },
    /// Devices were allocated once, but no plugin offers the resource now.
    #[error("cannot allocate unregistered device {0}")]
    Unregistered(String),
    /// The plugin is away, or none of its devices works.
    #[error("no healthy devices present; cannot allocate unhealthy devices {0}")]
    NoneHealthy(String),
    /// A device that the container had before does not work any more.
    #[error("previously allocated devices are no longer healthy; cannot allocate unhealthy devices {0}")]
    NoLongerHealthy(String),
    /// Others have them.
    #[error("requested number of devices unavailable for {resource}. Requested: {requested}, Available: {available}")]
    Unavailable {
        /// Name of the resource.
        resource: String,
        /// Devices that are still missing.
        requested: usize,
        /// Devices that are free.
        available: usize,
    },
    /// The plugin has gone between the choice and the call.
    #[error("unknown Device Plugin {0}")]
    NoPlugin(String),
    /// Nobody answers for a resource that has been offered.
    #[error("endpoint not found in cache for a registered resource: {0}")]
    NoEndpoint(String),
    /// The plugin's connection has ended; it may come back.
    #[error("endpoint {0} has been stopped")]
    Stopped(String),
    /// Allocate failed.
    #[error(transparent)]
    Allocate(Status),
    /// GetPreferredAllocation failed.
    #[error("device plugin GetPreferredAllocation rpc failed with err: {0}")]
    Preferred(Status),
    /// PreStartContainer failed.
    #[error("device plugin PreStartContainer rpc failed with err: {0}")]
    PreStart(Status),
    /// The plugin answered for no container.
    #[error("no containers return in allocation response")]
    NoResponse,
    /// A container is to be prepared whose devices nobody knows.
    #[error("no devices found allocated in local cache for pod {pod}, container {container}, resource {resource}")]
    NotAllocated {
        /// UID of the Pod.
        pod: String,
        /// Name of the container.
        container: String,
        /// Name of the resource.
        resource: String,
    },
    /// What was allocated cannot be written down.
    #[error("failed to write checkpoint file \"kubelet_internal_checkpoint\": {0}")]
    Checkpoint(String),
}

/// Why a plugin is not taken; it is told. It may register again.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum RegisterError {
    /// Another version of the API.
    #[error("requested API version {0:?} is not supported by kubelet. Supported version is [\"v1beta1\"]")]
    Version(String),
    /// Not a name that a device can have.
    #[error("the ResourceName {0:?} is invalid")]
    Name(String),
    /// Its socket cannot be reached.
    #[error("failed to dial device plugin: {0}")]
    Dial(Status),
    /// It does not say what it wants.
    #[error("failed to get device plugin options: {0}")]
    Options(Status),
}
