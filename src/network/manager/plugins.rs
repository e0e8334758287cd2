//! The part of the network that CNI plugins make: following their configuration, and what is left of Pods that are gone.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Network, Shared, Work, lock};
use crate::network::cni::{Attachment, Conflist, Mode};
use crate::network::ipam::Subnet;
use crate::network::{NetworkError, PodNetworkRequest};
use crate::sys::watch::Watch;

/// A plugin's answer that the node is not ready has no event when it changes: it is asked again this often, as
/// kubelet asks its runtime.
const STATUS_PERIOD: Duration = Duration::from_secs(5);
/// Writers of a configuration finish within this time, mostly.
const SETTLE: Duration = Duration::from_millis(100);

impl Network {
    /// Wakes when [`Self::ready`] may answer differently because of plugins.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.changes.subscribe()
    }

    /// Keeps up with the CNI configuration and with what plugins say of themselves, for ever.
    pub async fn follow_plugins(self) {
        self.collect_in_background();
        if self.shared.cni.is_off() {
            return std::future::pending().await;
        }
        loop {
            let directory = self.shared.cni.conf_dir();
            // watch first, then look: what happens in between is seen by one of them
            let watch = Watch::start(directory)
                .map_err(|error| warn!(%error, directory = %directory.display(), "no inotify"))
                .ok();
            match self.run("reading the CNI configuration", Work::Slow, Shared::follow_mode).await {
                Ok(true) => self.collect_in_background(),
                Ok(false) => {}
                Err(error) => warn!(%error, "the Pod network is not up to date"),
            }
            let again = match self.shared.cni.mode() {
                Mode::Waiting(_) => STATUS_PERIOD,
                Mode::BuiltIn | Mode::Plugins(_) => Duration::MAX,
            };
            let changed = tokio::time::timeout(again, Watch::changed(watch.as_ref()));
            if changed.await.is_ok() {
                tokio::time::sleep(SETTLE).await;
            }
        }
    }

    /// Plugins that hang must not keep us from hearing of a configuration that mends them.
    fn collect_in_background(&self) {
        let network = self.clone();
        tokio::spawn(async move { network.collect_attachments().await });
    }

    /// Detaches Pods that are gone, then lets plugins clean up. What fails is tried again at the next change.
    async fn collect_attachments(&self) {
        let orphans = lock(&self.shared.state).attached_orphans.clone();
        for uid in orphans {
            let gone = uid.clone();
            let work = move |shared: &Shared| shared.tear_down_orphan(&gone);
            if let Err(error) = self.run("tearing down a Pod's network", Work::SlowPod(&uid), work).await {
                warn!(uid, %error, "the network of a Pod that is gone stays");
            }
        }
        let collect = |shared: &Shared| {
            shared.collect_attachments();
            Ok(())
        };
        if let Err(error) = self.run("collecting garbage of CNI plugins", Work::Slow, collect).await {
            warn!(%error, "CNI plugins may hold more than they should");
        }
    }
}

impl Shared {
    /// Looks at the CNI configuration and does what a change asks for; true if there was one.
    fn follow_mode(&self) -> Result<bool, NetworkError> {
        if !self.cni.refresh() {
            return Ok(false);
        }
        let mode = self.cni.mode();
        match &mode {
            Mode::Plugins(network) => info!(network = network.name, "Pods get their network from CNI plugins"),
            Mode::Waiting(why) => warn!(why, "the Pod network is not ready"),
            Mode::BuiltIn => info!("Pods get their network from the built-in bridge"),
        }
        let synchronized = {
            let mut host = lock(&self.host);
            let mut state = lock(&self.state);
            state.plugins = mode != Mode::BuiltIn;
            let bridged = state.pods.values().filter(|pod| !pod.addresses.is_empty()).count();
            drop(state);
            if bridged > 0 && matches!(mode, Mode::Plugins(_)) {
                warn!(
                    bridged,
                    "Pods of the built-in bridge keep their addresses: drain the node if plugins use the same"
                );
            }
            self.synchronize(&mut host)
        };
        self.changes.send_replace(());
        synchronized.map(|()| true)
    }

    /// Detaches Pods that nobody knows any more (their records went with a reboot), then lets plugins clean up.
    fn collect_attachments(&self) {
        let known: HashSet<String> = lock(&self.state).pods.keys().cloned().collect();
        let orphans = self.cni.orphans(|uid| known.contains(uid)).unwrap_or_else(|error| {
            warn!(%error, "the CNI attachments cannot be listed");
            Vec::new()
        });
        for uid in orphans {
            // a Pod that is being set up this moment has its lock
            let pod = self.pod_lock(&uid);
            let Ok(_held) = pod.try_lock() else { continue };
            if !lock(&self.state).pods.contains_key(&uid)
                && let Err(error) = self.cni.detach(&uid, false)
            {
                warn!(uid, %error, "a Pod that is gone stays attached");
            }
        }
        if let Err(error) = self.cni.collect() {
            warn!(%error, "CNI plugins could not collect garbage");
        }
    }

    /// A Pod's part in a network of plugins.
    pub(super) fn attachment(&self, request: &PodNetworkRequest, network: &Conflist, netns: PathBuf) -> Attachment {
        let pod_cidrs: Vec<IpNet> = lock(&self.state).subnets.iter().map(Subnet::net).collect();
        Attachment::of_pod(request, network, netns, &pod_cidrs)
    }

    fn tear_down_orphan(&self, uid: &str) -> Result<(), NetworkError> {
        if lock(&self.state).attached_orphans.iter().any(|orphan| orphan == uid) {
            self.tear_down(uid)?;
            lock(&self.state).attached_orphans.retain(|orphan| orphan != uid);
        }
        Ok(())
    }
}
