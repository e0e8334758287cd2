//! Connections to what is probed.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::host_port;

/// Why there is no connection, in the words of Go's dialer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dial tcp {address}: {reason}")]
pub(super) struct DialError {
    address: String,
    reason: String,
    /// The time was over.
    pub(super) timed_out: bool,
}

/// Opens a connection from the node to an address or name.
pub(super) async fn connect(host: &str, port: u16, limit: Duration) -> Result<TcpStream, DialError> {
    let address = host_port(host, port);
    let error = |reason: String, timed_out| DialError { address: address.clone(), reason, timed_out };
    let connecting = async {
        let stream = TcpStream::connect((host, port)).await?;
        // requests are small and are waited for
        stream.set_nodelay(true)?;
        Ok::<_, std::io::Error>(stream)
    };
    match timeout(limit, connecting).await {
        Err(_) => Err(error("i/o timeout".to_owned(), true)),
        Ok(Err(cause)) => Err(error(describe(&cause), false)),
        Ok(Ok(stream)) => Ok(stream),
    }
}

/// `connect: connection refused`, without Rust's `(os error 111)`.
fn describe(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => format!("connect: {}", nix::errno::Errno::from_raw(code).desc().to_lowercase()),
        None => error.to_string(),
    }
}
