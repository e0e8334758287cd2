//! The node's end: Pods end in the order of their priority while the machine's shutdown is held back.
//!
//! Source: `pkg/kubelet/nodeshutdown`. Where there is a logind (systemd's, or elogind), it tells of a shutdown and waits
//! for the inhibitor lock. Where there is neither that nor systemd, SIGTERM is how an init ends what runs; it then means
//! the node's end, if periods are configured, and SIGINT and SIGKILL end the agent alone. Under systemd SIGTERM only
//! ever stops the unit, as an upgrade does, and Pods run on.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;

use super::node::Node;
use super::pods::PodView;
use crate::node::logind::{Logind, LogindError};
use crate::node::shutdown::{Group, Periods, TERMINATED_MESSAGE, TERMINATED_REASON};
use crate::node::{EventType, NodeHealth};
use crate::pod::model::{Observed, Verdict};
use crate::pod::worker::Message;

/// There if and only if systemd is the init (`sd_booted`).
const SYSTEMD: &str = "/run/systemd/system";
/// First and longest pause before the bus is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Ends the node's Pods when the machine shuts down.
pub(super) struct Shutdown {
    node: Arc<Node>,
    health: watch::Sender<NodeHealth>,
    periods: Periods,
    /// logind tells of a shutdown, and waits for us.
    inhibits: AtomicBool,
}

impl Shutdown {
    pub(super) fn new(node: Arc<Node>, health: watch::Sender<NodeHealth>) -> Self {
        let periods = Periods::new(&node.config.kubelet);
        Self { node, health, periods, inhibits: AtomicBool::new(false) }
    }

    /// Whether shutdowns are handled at all.
    pub(super) fn is_configured(&self) -> bool {
        self.periods.is_configured()
    }

    /// Whether a SIGTERM to the agent says that the node ends; see the module.
    pub(super) fn is_meant_by_sigterm(&self) -> bool {
        self.is_configured() && !self.inhibits.load(Ordering::Acquire) && !Path::new(SYSTEMD).exists()
    }

    /// Hears of shutdowns from logind, for ever; returns where there can be none.
    pub(super) async fn follow_logind(self: Arc<Self>) {
        let mut pause = RETRY.0;
        loop {
            let result = match Logind::connect().await {
                Ok(logind) => self.follow(&logind).await,
                Err(error) if !Path::new(SYSTEMD).exists() => {
                    tracing::info!(%error, "no logind here: SIGTERM ends the Pods in order, SIGINT lets them run on");
                    return;
                }
                Err(error) => Err(error),
            };
            if self.inhibits.swap(false, Ordering::AcqRel) {
                pause = RETRY.0;
            }
            match result {
                Ok(()) => tracing::warn!("logind is gone, will connect again"),
                Err(error) => tracing::warn!(%error, "a shutdown of the machine would not wait for Pods, will retry"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    async fn follow(&self, logind: &Logind) -> Result<(), LogindError> {
        if let Err(error) = logind.ensure_delay(self.periods.total()).await {
            // less time is better than none
            tracing::warn!(%error, "a shutdown of the machine may not wait for all Pods");
        }
        let mut shutdowns = pin!(logind.shutdowns().await?);
        let mut lock = Some(logind.inhibit().await?);
        self.inhibits.store(true, Ordering::Release);
        while let Some(begins) = shutdowns.next().await {
            if begins {
                self.run().await;
                // the machine goes down now
                drop(lock.take());
            } else {
                self.call_off();
                lock = Some(logind.inhibit().await?);
            }
        }
        Ok(())
    }

    fn announce(&self, shutting_down: bool, message: &str) {
        tracing::warn!("{message}");
        self.node.shutting_down.store(shutting_down, Ordering::Release);
        self.node.events.node_event(EventType::Normal, "Shutdown", message.to_owned());
        self.health.send_modify(|health| health.shutting_down = shutting_down);
    }

    fn call_off(&self) {
        self.announce(false, "Shutdown manager detected shutdown cancellation");
    }

    /// Ends all Pods, one priority after the other; each has its time, and no more.
    pub(super) async fn run(&self) {
        self.announce(true, "Shutdown manager detected shutdown event");
        for group in self.periods.groups() {
            let views = self.node.pods.views().into_iter();
            let of_group = |view: &PodView| view.is_active() && self.periods.group_of(&view.desired.pod) == Some(group);
            self.end(group, &views.filter(of_group).collect::<Vec<_>>()).await;
        }
    }

    async fn end(&self, group: &Group, members: &[PodView]) {
        if members.is_empty() {
            return;
        }
        let pods = &self.node.pods;
        for view in members {
            let verdict = Verdict {
                reason: TERMINATED_REASON.to_owned(),
                message: TERMINATED_MESSAGE.to_owned(),
                disruption: true,
                disruption_message: None,
            };
            let grace = Some(Periods::grace(group, &view.desired.pod));
            pods.send(view.desired.uid(), Message::Terminate { verdict, grace }).await;
        }
        let limit = Duration::from_secs(u64::try_from(group.seconds).unwrap_or(0));
        let over = pods.until(|| members.iter().all(|view| pods.is_over(view.desired.uid())));
        if tokio::time::timeout(limit, over).await.is_err() {
            tracing::warn!(
                priority = group.priority,
                seconds = group.seconds,
                "some Pods have not ended in their time"
            );
        }
    }
}

/// Whether a shutdown ended this Pod. A static one begins anew when the node is back: nobody else would replace it.
pub(super) fn ended_by_shutdown(observed: &Observed) -> bool {
    let verdict = observed.termination.as_ref().and_then(|termination| termination.verdict.as_ref());
    observed.torn_down && verdict.is_some_and(|verdict| verdict.reason == TERMINATED_REASON)
}
