//! Host names to addresses without the C library, whose resolver wants shared objects at run time.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hyper_util::client::legacy::connect::dns::Name;
use tower::Service;

/// Longest look-up.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Resolves by `/etc/hosts` and the servers of `/etc/resolv.conf`, both read anew for every look-up: they may
/// change while the agent runs, and connections are few.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostResolver;

/// All addresses of a name.
pub async fn lookup(name: &str) -> io::Result<Vec<IpAddr>> {
    let resolver = TokioResolver::builder_tokio().and_then(|builder| builder.build()).map_err(io::Error::other)?;
    let found = tokio::time::timeout(TIMEOUT, resolver.lookup_ip(name))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer about {name} within 10s")))?
        .map_err(io::Error::other)?;
    Ok(found.iter().collect())
}

impl Service<Name> for HostResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move {
            let addresses = lookup(name.as_str()).await?;
            let sockets: Vec<_> = addresses.into_iter().map(|address| SocketAddr::new(address, 0)).collect();
            Ok(sockets.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_the_hosts_file() {
        assert!(lookup("localhost").await.unwrap().iter().all(IpAddr::is_loopback));
    }
}
