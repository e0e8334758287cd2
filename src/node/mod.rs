//! The node towards the cluster: credentials, the Node object, its Lease, events.

pub mod address;
pub mod bootstrap;
pub mod certs;
pub mod client;
mod correlate;
mod csr;
pub mod events;
#[cfg(test)]
pub(crate) mod fake;
pub mod heartbeat;
pub mod k3s;
pub mod lease;
pub mod logind;
pub mod machine;
mod rate;
pub mod register;
pub mod resolve;
pub mod rotation;
pub mod shutdown;
pub mod status;

pub use client::{ApiClient, Limits};
pub use events::{EventRecorder, EventType};
pub use heartbeat::NodeKeeper;
pub use machine::MachineInfo;
pub use rate::TokenBucket;
pub use status::{DeviceResources, NodeFacts, NodeHealth};
