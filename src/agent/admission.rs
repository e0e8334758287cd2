//! The node's decision about a Pod, from what the agent knows.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use super::node::Node;
use crate::node::EventType;
use crate::node::shutdown::{REJECTED_MESSAGE, REJECTED_REASON};
use crate::pod::admission::preemption::{PREEMPTED_MESSAGE, PREEMPTING_MESSAGE, PREEMPTING_REASON, victims};
use crate::pod::admission::{NodeInfo, Rejection, admit};
use crate::pod::effects::{Outcome, Request};
use crate::pod::model::{Admission, ContainerSpec, Desired, Verdict};
use crate::pod::resize::{self, Decision};
use crate::pod::resources::Resources;
use crate::pod::rules::grace_seconds;
use crate::pod::worker::Message;
use crate::resources::amounts::{self, Amounts, MEMORY};
use crate::resources::limits::{LimitPolicy, swaps};
use crate::resources::qos;

/// The feature gate of resizes of a Pod as a whole.
const POD_LEVEL_GATE: &str = "InPlacePodLevelResourcesVerticalScaling";
/// With this one it is the scheduler that makes room for resizes.
const SCHEDULER_PREEMPTION_GATE: &str = "InPlacePodVerticalScalingSchedulerPreemption";
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
                let pod = &request.desired.pod;
                if let Err(rejection) = self.allocate_devices(pod).await {
                    self.release_devices(request.desired.uid()).await;
                    return reject(&rejection.reason, &rejection.message);
                }
                let refused = match self.try_admit(&request.desired) {
                    Ok(()) => return Admission::Admitted,
                    Err(refused) => refused,
                };
                if !self.make_room(&refused.victims).await {
                    self.release_devices(request.desired.uid()).await;
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
        let pod = &desired.pod;
        self.pods.admit(desired.uid(), |others| {
            self.fits(pod, others).map_err(|rejection| {
                let others: Vec<&Pod> = others.iter().map(AsRef::as_ref).collect();
                refusal(pod, &others, rejection)
            })
        })
    }

    /// Decides about the resources that a Pod wants now; for a critical one, other Pods are ended if that makes room.
    pub(super) async fn allocate(&self, request: &Request) -> Outcome {
        let desired = &request.desired;
        let decide = async {
            loop {
                let (verdict, victims) = self.try_allocate(desired);
                if !self.make_room(&victims).await {
                    return verdict;
                }
            }
        };
        let verdict = tokio::select! {
            verdict = decide => verdict,
            () = request.cancel.cancelled() => return Outcome::Cancelled,
        };
        let generation = desired.wanted.metadata.generation;
        Outcome::Allocated(Box::new(Decision { wanted: Resources::of(&desired.wanted), generation, verdict }))
    }

    /// One look, and the Pods that would have to end for another answer.
    fn try_allocate(&self, desired: &Desired) -> (resize::Verdict, Vec<String>) {
        let gates = &self.config.feature_gates;
        let of_pod = !Resources::of(&desired.wanted).same_for_pod(&Resources::of(&desired.pod));
        let victims = RefCell::new(Vec::new());
        let fits = |pod: &Pod, others: &[Arc<Pod>]| {
            self.fits(pod, others).map_err(|rejection| {
                let message = rejection.message.clone();
                // others whose turn is before this one's are asked as well
                if pod.metadata.uid == desired.wanted.metadata.uid && !gates.enabled(SCHEDULER_PREEMPTION_GATE) {
                    let others: Vec<&Pod> = others.iter().map(AsRef::as_ref).collect();
                    *victims.borrow_mut() = refusal(pod, &others, rejection).victims;
                }
                message
            })
        };
        let verdict = if swap_is_in_the_way(desired, self.cgroups.policy()) {
            resize::Verdict::Infeasible("In-place resize of containers with swap is not supported.".to_owned())
        } else if of_pod && !gates.enabled(POD_LEVEL_GATE) {
            resize::Verdict::Infeasible(format!("{POD_LEVEL_GATE} is disabled"))
        } else {
            self.pods.allocate(desired, fits)
        };
        (verdict, victims.into_inner())
    }

    /// Whether the node takes a Pod beside others.
    fn fits(&self, pod: &Pod, others: &[Arc<Pod>]) -> Result<(), Rejection> {
        let object = self.object.borrow().clone();
        let mut allocatable = Amounts::of(Some(&self.allocatable()));
        self.devices.count_in(pod.metadata.uid.as_deref().unwrap_or_default(), &mut allocatable);
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
        admit(pod, others.iter().map(AsRef::as_ref), &node)
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

/// Swap follows from the memory request and cannot be changed while a container runs
/// (`disallowResizeForSwappableContainers`).
fn swap_is_in_the_way(desired: &Desired, policy: &LimitPolicy) -> bool {
    let wanted = Desired::new(desired.wanted.clone());
    desired.containers.iter().any(|has| {
        let Some(wants) = wanted.container(has.name()) else { return false };
        let request = |spec: &ContainerSpec| amounts::requests(spec.container.resources.as_ref()).value(MEMORY);
        let mut policies = has.container.resize_policy.iter().flatten();
        let restarts = policies.any(|p| p.resource_name == MEMORY && p.restart_policy == "RestartContainer");
        request(has) != request(wants)
            && !restarts
            && (swaps(&desired.pod, &has.container, policy) || swaps(&desired.wanted, &wants.container, policy))
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ContainerResizePolicy;

    use super::*;
    use crate::resources::fixture::{container, pod};
    use crate::resources::limits::SwapBehavior;

    fn sized(memory: &str, limit: &str) -> Pod {
        pod(vec![container("a", &[("memory", memory)], &[("memory", limit)])])
    }

    #[test]
    fn memory_of_a_container_that_may_swap_stays() {
        let policy = LimitPolicy {
            swap_behavior: SwapBehavior::LimitedSwap,
            swap_controller: true,
            memory_capacity: 8 << 30,
            ..LimitPolicy::default()
        };
        let in_the_way = |from: Pod, to: Pod, policy: &LimitPolicy| {
            let allocated = Resources::of(&from);
            swap_is_in_the_way(&Desired::new(Arc::new(to)).with_allocation(Some(&allocated)), policy)
        };
        assert!(in_the_way(sized("1Mi", "4Mi"), sized("2Mi", "4Mi"), &policy));
        assert!(!in_the_way(sized("1Mi", "4Mi"), sized("1Mi", "8Mi"), &policy), "the request decides");
        assert!(!in_the_way(sized("1Mi", "4Mi"), sized("2Mi", "4Mi"), &LimitPolicy::default()));
        let restarting = |mut pod: Pod| {
            let policy = ContainerResizePolicy {
                resource_name: "memory".to_owned(),
                restart_policy: "RestartContainer".to_owned(),
            };
            pod.spec.as_mut().unwrap().containers[0].resize_policy = Some(vec![policy]);
            pod
        };
        assert!(!in_the_way(restarting(sized("1Mi", "4Mi")), restarting(sized("2Mi", "4Mi")), &policy));
    }
}
