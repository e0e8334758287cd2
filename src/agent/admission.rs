//! The node's decision about a Pod, from what the agent knows.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use super::node::Node;
use crate::node::EventType;
use crate::node::shutdown::{REJECTED_MESSAGE, REJECTED_REASON};
use crate::pod::admission::preemption::{PREEMPTED_MESSAGE, PREEMPTING_MESSAGE, PREEMPTING_REASON, victims};
use crate::pod::admission::{NodeInfo, Rejection, admit};
use crate::pod::effects::{Outcome, Request};
use crate::pod::model::{Admission, Desired, Verdict};
use crate::pod::rules::grace_seconds;
use crate::pod::worker::Message;
use crate::resources::amounts::Amounts;
use crate::resources::qos;

/// A Pod that makes room may take half as long again as its grace says, and at least this (`killPodNow`).
const LEAST_WAIT: Duration = Duration::from_secs(10);

/// What stands in the way of a Pod, and the Pods that would have to end for it.
struct Refused {
    rejection: Rejection,
    victims: Vec<String>,
}

fn reject(reason: &str, message: impl std::fmt::Display) -> Admission {
    Admission::Rejected { reason: reason.to_owned(), message: format!("Pod was rejected: {message}") }
}

impl Node {
    /// Admits or rejects a Pod; for a critical one, other Pods are ended if that makes room.
    pub(super) async fn admit(&self, request: &Request) -> Outcome {
        let decide = async {
            loop {
                if self.is_shutting_down() {
                    return reject(REJECTED_REASON, REJECTED_MESSAGE);
                }
                let refused = match self.try_admit(&request.desired) {
                    Ok(()) => return Admission::Admitted,
                    Err(refused) => refused,
                };
                if !self.make_room(&refused.victims).await {
                    return reject(&refused.rejection.reason, &refused.rejection.message);
                }
            }
        };
        tokio::select! {
            admission = decide => Outcome::Admitted(admission),
            () = request.cancel.cancelled() => Outcome::Cancelled,
        }
    }

    /// One look: an admitted Pod counts at once, so that no two are let in for the same free CPU.
    fn try_admit(&self, desired: &Desired) -> Result<(), Refused> {
        let object = self.object.borrow().clone();
        let allocatable = Amounts::of(Some(&self.allocatable()));
        let none = BTreeMap::new();
        let node = NodeInfo {
            name: &self.config.node_name,
            labels: object.as_ref().and_then(|node| node.metadata.labels.as_ref()).unwrap_or(&none),
            taints: object.as_ref().and_then(|node| node.spec.as_ref()?.taints.as_deref()).unwrap_or_default(),
            allocatable: &allocatable,
            declared_features: &self.declared_features,
            supplemental_groups_policy: true,
            sysctls: &self.sysctls,
            apparmor: self.traits.apparmor,
            pod_level_resources: true,
        };
        let pod = &desired.pod;
        self.pods.admit(desired.uid(), |others| {
            let others: Vec<&Pod> = others.iter().map(AsRef::as_ref).collect();
            admit(pod, others.iter().copied(), &node).map_err(|rejection| refusal(pod, &others, rejection))
        })
    }

    /// Ends Pods and waits for their end; false if there are none to end, or they do not.
    async fn make_room(&self, victims: &[String]) -> bool {
        if victims.is_empty() {
            return false;
        }
        let mut wait = LEAST_WAIT;
        for view in victims.iter().filter_map(|uid| self.pods.view(uid)) {
            let desired = &view.desired;
            tracing::warn!(pod = desired.uid(), "ending the Pod to make room for a critical one");
            self.events.pod_event(
                &desired.pod,
                EventType::Warning,
                PREEMPTING_REASON,
                PREEMPTING_MESSAGE.to_owned(),
                None,
            );
            let verdict = Verdict {
                reason: PREEMPTING_REASON.to_owned(),
                message: PREEMPTING_MESSAGE.to_owned(),
                disruption: true,
                disruption_message: Some(PREEMPTED_MESSAGE.to_owned()),
            };
            self.pods.send(desired.uid(), Message::Terminate { verdict, grace: None }).await;
            wait = wait.max(Duration::from_secs(u64::try_from(grace_seconds(desired)).unwrap_or(0)) * 3 / 2);
        }
        let ended = |uid: &String| self.pods.view(uid).is_none_or(|view| view.observed.final_phase.is_some());
        tokio::time::timeout(wait, self.pods.until(|| victims.iter().all(ended))).await.is_ok()
    }
}

/// A critical Pod for which nothing but room is missing gets what others have.
fn refusal(pod: &Pod, others: &[&Pod], rejection: Rejection) -> Refused {
    if rejection.insufficient.is_empty() || !qos::is_critical(pod) {
        return Refused { rejection, victims: Vec::new() };
    }
    match victims(pod, others, &rejection.insufficient) {
        Ok(victims) => {
            let victims = victims.iter().filter_map(|victim| victim.metadata.uid.clone()).collect();
            Refused { rejection, victims }
        }
        Err(missing) => {
            let message = format!(
                "Unexpected error while attempting to recover from admission failure: preemption: error finding a set of pods to preempt: {missing}"
            );
            let rejection =
                Rejection { reason: "UnexpectedAdmissionError".to_owned(), message, insufficient: Vec::new() };
            Refused { rejection, victims: Vec::new() }
        }
    }
}
