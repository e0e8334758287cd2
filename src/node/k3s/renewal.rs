//! New certificates before the old ones end, from the supervisor.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;

use super::join::{attempt, renewal_time};
use crate::config::Config;
use crate::node::certs::CertStore;
use crate::node::status::NodeFacts;

/// First and longest pause after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// Wall clocks jump: look again at least this often.
const LOOK: Duration = Duration::from_secs(3600);

/// Renews both certificates for ever.
pub struct Renewal {
    /// With `--k3s-server`.
    pub config: Arc<Config>,
    /// Where the serving certificate's addresses come from.
    pub facts: watch::Receiver<Arc<NodeFacts>>,
    /// Counts what came; clients, server and Lease read their files again when it changes.
    pub rotated: watch::Sender<u64>,
}

impl Renewal {
    /// Runs until dropped.
    pub async fn run(mut self) {
        let mut pause = PAUSE.0;
        // at random moments: not all nodes at once
        let mut part = random_part();
        loop {
            let wait = self.due(part).duration_since(Timestamp::now());
            if wait.is_positive() && !self.lacks_address() {
                let wait = wait.unsigned_abs().min(LOOK);
                let before = addresses(&self.facts.borrow());
                let moved = self.facts.wait_for(|facts| addresses(facts) != before);
                tokio::select! { () = tokio::time::sleep(wait) => {}, Ok(_) = moved => {} }
                continue;
            }
            match attempt(&self.config).await {
                Ok(joined) if joined.changed => {
                    (pause, part) = (PAUSE.0, random_part());
                    self.rotated.send_modify(|count| *count += 1);
                    continue;
                }
                // the addresses are not those that the server was told
                Ok(_) => tracing::warn!("the k3s server was asked for new certificates and none were needed"),
                Err(error) => tracing::error!(%error, "certificates are not renewed, will retry"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// When the first of the certificates is to be renewed; now if one is not there.
    fn due(&self, part: f64) -> Timestamp {
        let directory = &self.config.paths.cert_dir;
        let of = |store: CertStore| match store.current() {
            Ok(Some(pair)) => renewal_time(&store, &pair, part),
            _ => Timestamp::MIN,
        };
        of(CertStore::client(directory)).min(of(CertStore::serving(directory)))
    }

    fn lacks_address(&self) -> bool {
        let wanted = addresses(&self.facts.borrow());
        let serving = CertStore::serving(&self.config.paths.cert_dir).current().ok().flatten();
        serving.is_none_or(|pair| wanted.iter().any(|address| !pair.addresses.contains(address)))
    }
}

fn random_part() -> f64 {
    0.7 + 0.2 * fastrand::f64()
}

fn addresses(facts: &NodeFacts) -> Vec<IpAddr> {
    let internal = facts.addresses.iter().filter(|address| address.type_ == "InternalIP");
    internal.filter_map(|address| address.address.parse().ok()).collect()
}
