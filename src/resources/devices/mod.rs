//! Device plugins: who has registered, what they offer, which container has what.
//!
//! A plugin registers on `<root_dir>/device-plugins/kubelet.sock`, or is found by its socket in
//! `<root_dir>/plugins_registry`. It lists its devices and says when they change; the node's capacity follows. A Pod
//! gets devices when it is admitted, and they are in the checkpoint before it is: they are its own until it ends,
//! whatever becomes of the plugin and of the agent.
//!
//! | module | what it does |
//! |---|---|
//! | `manager` | the plugins' connections, allocation, the checkpoint's turn |
//! | `registration`, `registry` | the two ways in |
//! | `inventory`, `holdings` | what is offered, and what is allocated |
//! | `choose` | which devices a container gets |
//! | `options` | what a container gets with them |
//! | `pod_resources` | tells monitoring agents who has what |
//! | `checkpoint` | allocations on disk, in kubelet's format |
//! | `api` | the messages |
//!
//! Source: `pkg/kubelet/cm/devicemanager`. There is no topology policy: devices are chosen without regard to NUMA
//! nodes, which are noted in the checkpoint.

mod api;
mod checkpoint;
mod choose;
mod error;
mod holdings;
mod inventory;
mod manager;
mod name;
mod options;
mod pod_resources;
mod registration;
mod registry;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

pub use api::{PluginDevice, PluginMount};
pub use error::DeviceError;
pub use inventory::{DeviceHealth, Totals};
pub use manager::DeviceManager;
pub use name::is_extended_resource;
pub use options::ContainerDevices;

impl DeviceManager {
    /// Opens the door to plugins: the socket they register on, and the directory of the sockets they are found by.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn serve(self: &Arc<Self>, registry_dir: PathBuf) -> io::Result<()> {
        registration::serve(self)?;
        tokio::spawn(registry::follow(self.clone(), registry_dir));
        Ok(())
    }

    /// Tells monitoring agents on a socket in `dir` who has which devices. `pods` are the node's Pods: those that go on,
    /// or, asked for false, all that are known.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn tell_pod_resources(
        self: &Arc<Self>,
        dir: &Path,
        pods: impl Fn(bool) -> Vec<Arc<Pod>> + Send + Sync + 'static,
    ) -> io::Result<()> {
        pod_resources::serve(self, dir, Arc::new(pods))
    }
}
