//! New certificates before the old ones expire: our client certificate, and the serving one if the cluster
//! issues it (`serverTLSBootstrap`).
//!
//! Source: client-go `util/certificate/certificate_manager.go` (times), `pkg/kubelet/certificate/kubelet.go`
//! (names of the serving certificate).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::NodeAddress;
use kube::Client;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio::sync::watch;

use super::bootstrap;
use super::certs::{CertStore, Pair};
use super::csr::{CLIENT_SIGNER, SERVING_SIGNER, Template, request_certificate};
use super::status::NodeFacts;
use crate::config::Config;

/// How long one request may wait for its certificate.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// First and longest pause after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// Rotates one certificate for ever.
pub struct Rotation {
    config: Arc<Config>,
    client: Client,
    store: CertStore,
    /// Where the serving certificate's names come from; none for the client certificate.
    facts: Option<watch::Receiver<Arc<NodeFacts>>>,
    /// Counts the certificates that came.
    rotated: watch::Sender<u64>,
}

impl Rotation {
    /// Rotation of our client certificate; clients follow `rotated` ([`super::ApiClient::follow`]).
    #[must_use]
    pub fn client(config: Arc<Config>, client: Client, rotated: watch::Sender<u64>) -> Self {
        let store = CertStore::client(&config.paths.cert_dir);
        Self { config, client, store, facts: None, rotated }
    }

    /// The serving certificate for the addresses that `facts` has; the server reads
    /// [`CertStore::serving`] again when `rotated` changes.
    #[must_use]
    pub fn serving(
        config: Arc<Config>,
        client: Client,
        facts: watch::Receiver<Arc<NodeFacts>>,
        rotated: watch::Sender<u64>,
    ) -> Self {
        let store = CertStore::serving(&config.paths.cert_dir);
        Self { config, client, store, facts: Some(facts), rotated }
    }

    /// Runs until dropped.
    pub async fn run(mut self) {
        let mut pause = PAUSE.0;
        let mut planned: Option<(Timestamp, Timestamp)> = None;
        loop {
            let (dns_names, addresses) = self.names();
            if self.facts.is_some() && addresses.is_empty() {
                // a serving certificate needs at least one address
                self.names_change().await;
                continue;
            }
            let current = self.store.current().unwrap_or_else(|error| {
                tracing::warn!(%error, "the current certificate cannot be used");
                None
            });
            let fits =
                |pair: &Pair| self.facts.is_none() || (pair.dns_names == dns_names && pair.addresses == addresses);
            if let Some(pair) = current.as_ref().filter(|pair| fits(pair)) {
                let at = match planned {
                    Some((end, at)) if end == pair.not_after => at,
                    _ => rotation_time(pair),
                };
                planned = Some((pair.not_after, at));
                let wait = at.duration_since(Timestamp::now());
                if wait.is_positive() {
                    tracing::info!(certificate = %self.store.current_path().display(), at = %at, "next rotation");
                    // wall clocks jump: look again at least hourly
                    let wait = wait.unsigned_abs().min(Duration::from_secs(3600));
                    tokio::select! { () = tokio::time::sleep(wait) => {}, () = self.names_change() => {} }
                    continue;
                }
            }
            let expired = current.as_ref().is_some_and(|pair| pair.not_after <= Timestamp::now());
            match self.rotate(dns_names, addresses, expired).await {
                Ok(()) => {
                    pause = PAUSE.0;
                    self.rotated.send_modify(|count| *count += 1);
                }
                Err(error) => {
                    tracing::error!(%error, "certificate rotation failed, will retry");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
    }

    async fn rotate(
        &self,
        dns_names: Vec<String>,
        addresses: Vec<IpAddr>,
        expired: bool,
    ) -> Result<(), bootstrap::BootstrapError> {
        if expired && self.facts.is_none() && self.config.bootstrap_kubeconfig.is_some() {
            // an expired certificate cannot ask for its successor
            return bootstrap::ensure_kubeconfig(&self.config).await;
        }
        let signer = if self.facts.is_some() { SERVING_SIGNER } else { CLIENT_SIGNER };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(super::csr::CsrError::from)?;
        let template = Template { node_name: &self.config.node_name, signer, dns_names, addresses };
        let chain = request_certificate(self.client.clone(), &template, &key, None, ISSUE_TIMEOUT).await?;
        self.store.update(&chain, &key.serialize_pem())?;
        tracing::info!(certificate = %self.store.current_path().display(), "certificate rotated");
        Ok(())
    }

    fn names(&self) -> (Vec<String>, Vec<IpAddr>) {
        self.facts.as_ref().map_or_else(Default::default, |facts| split(&facts.borrow().addresses))
    }

    /// Waits for other addresses; for ever if there are none to come.
    async fn names_change(&mut self) {
        let before = self.names();
        if let Some(facts) = &mut self.facts
            && facts.wait_for(|facts| split(&facts.addresses) != before).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}

/// Names and addresses for the certificate, each sorted and once.
fn split(addresses: &[NodeAddress]) -> (Vec<String>, Vec<IpAddr>) {
    let (mut names, mut numbers) = (Vec::new(), Vec::new());
    for address in addresses.iter().filter(|address| !address.address.is_empty()) {
        match (address.address.parse(), address.type_.as_str()) {
            (Ok(number), "Hostname" | "InternalIP" | "ExternalIP") => numbers.push(number),
            (Err(_), "Hostname") | (_, "InternalDNS" | "ExternalDNS") => names.push(address.address.clone()),
            _ => {}
        }
    }
    names.sort();
    names.dedup();
    numbers.sort();
    numbers.dedup();
    (names, numbers)
}

/// A random moment between 70 and 90 percent of the lifetime.
fn rotation_time(pair: &Pair) -> Timestamp {
    let life = pair.not_after.duration_since(pair.not_before);
    pair.not_before + life.mul_f64(0.7 + 0.2 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::super::certs::tests::pair;
    use super::*;

    #[test]
    fn between_70_and_90_percent() {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = pair(0, 1000, &[]);
        let pair = CertStore::client(dir.path()).update(&certificate, &key).unwrap();
        for _ in 0..100 {
            let at = rotation_time(&pair).duration_since(pair.not_before).as_secs();
            assert!((700..=900).contains(&at), "{at}");
        }
    }

    #[test]
    fn names_of_addresses() {
        let list = [
            ("Hostname", "n"),
            ("InternalIP", "10.0.0.2"),
            ("InternalIP", "10.0.0.1"),
            ("ExternalDNS", "n"),
            ("InternalDNS", "a"),
        ]
        .map(|(kind, address)| NodeAddress { type_: kind.into(), address: address.into() });
        let (names, numbers) = split(&list);
        assert_eq!(names, ["a", "n"]);
        assert_eq!(numbers, ["10.0.0.1".parse::<IpAddr>().unwrap(), "10.0.0.2".parse().unwrap()]);
    }

    #[tokio::test]
    async fn a_young_certificate_is_left_alone_and_an_old_one_asked_for() {
        use super::super::fake::FakeApi;
        for (before, requests) in [(0, false), (950, true)] {
            let dir = tempfile::tempdir().unwrap();
            let config = Arc::new(Config::for_tests(dir.path()));
            let (certificate, key) = pair(before, 1000, &[]);
            CertStore::client(&config.paths.cert_dir).update(&certificate, &key).unwrap();
            let api = FakeApi::default();
            let rotation = Rotation::client(config, api.client(), watch::channel(0).0);
            let _ = tokio::time::timeout(Duration::from_millis(300), rotation.run()).await;
            let asked = api.seen().iter().any(|seen| {
                seen.method == "POST"
                    && seen.body["spec"]["signerName"] == CLIENT_SIGNER
                    && seen.body["metadata"]["generateName"] == "csr-"
            });
            assert_eq!(asked, requests);
        }
    }
}
