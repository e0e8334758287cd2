//! Nodes of k3s clusters: joining by the server's own protocol, and the tunnel through which its API server reaches us.
//!
//! A k3s server gives its nodes certificates on its own endpoints ([`join`]) instead of by CertificateSigningRequests,
//! and its API server reaches a kubelet only through a WebSocket that the node has opened ([`Tunnel`]).

mod authority;
mod connection;
mod join;
mod password;
mod renewal;
mod settings;
mod supervisor;
#[cfg(test)]
mod tests;
mod token;
mod tunnel;

pub use authority::AuthorityError;
pub use connection::Endpoint;
pub use join::{JoinError, check, join};
pub use renewal::Renewal;
pub use settings::ServerConfig;
pub use supervisor::SupervisorError;
pub use token::{Token, TokenError};
pub use tunnel::Tunnel;
