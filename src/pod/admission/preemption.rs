//! Which Pods make room for a critical one.
//!
//! Source: `pkg/kubelet/preemption/preemption.go`, `Preemptable` in `pkg/kubelet/types/pod_update.go`. As few Guaranteed
//! Pods as possible end, then as few Burstable ones, then as few BestEffort ones; of each class those whose requests
//! come closest to what is missing.

use std::fmt::Write as _;

use k8s_openapi::api::core::v1::Pod;

use super::fit::{Insufficient, request_of};
use crate::resources::qos::{self, QosClass};

/// Reason of a Pod that was ended for a critical one, and of the event about it.
pub const PREEMPTING_REASON: &str = "Preempting";
/// Its message.
pub const PREEMPTING_MESSAGE: &str = "Preempted in order to admit critical pod";
/// Message of its `DisruptionTarget` condition.
pub const PREEMPTED_MESSAGE: &str = "Pod was preempted by Kubelet to accommodate a critical pod.";

/// What is missing of one resource: cpu in thousandths, others in units.
#[derive(Clone, Debug)]
struct Missing<'a> {
    resource: &'a str,
    amount: i64,
}

/// The Pods that have to end so that `pod` finds room, of all that hold resources on the node.
///
/// # Errors
/// If there would not be enough room although every Pod that may end did; the text says what is still missing.
pub fn victims<'a>(pod: &Pod, others: &[&'a Pod], shortages: &[Insufficient]) -> Result<Vec<&'a Pod>, String> {
    let missing: Vec<Missing<'_>> = shortages
        .iter()
        .map(|s| Missing {
            resource: &s.resource,
            amount: s.requested.saturating_sub(s.capacity.saturating_sub(s.used)),
        })
        .collect();
    let of_class = |class: QosClass| -> Vec<&'a Pod> {
        let others = others.iter().copied();
        others.filter(|other| may_preempt(pod, other) && qos::qos_class(other) == class).collect()
    };
    let best_effort = of_class(QosClass::BestEffort);
    let burstable = of_class(QosClass::Burstable);
    let guaranteed = of_class(QosClass::Guaranteed);
    let all = [best_effort.as_slice(), &burstable, &guaranteed].concat();
    let left = without(&missing, &all);
    if !left.is_empty() {
        return Err(format!("no set of running pods found to reclaim resources: {}", list(&left)));
    }
    let from_guaranteed = closest(guaranteed, without(&missing, &[best_effort.as_slice(), &burstable].concat()))?;
    let rest = without(&missing, &[best_effort.as_slice(), &from_guaranteed].concat());
    let from_burstable = closest(burstable, rest)?;
    let rest = without(&missing, &[from_burstable.as_slice(), &from_guaranteed].concat());
    let from_best_effort = closest(best_effort, rest)?;
    Ok([from_best_effort, from_burstable, from_guaranteed].concat())
}

fn may_preempt(preemptor: &Pod, other: &Pod) -> bool {
    if qos::is_critical(preemptor) && !qos::is_critical(other) {
        return true;
    }
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.priority);
    matches!((priority(preemptor), priority(other)), (Some(ours), Some(theirs)) if ours > theirs)
}

/// What is still missing when these Pods have ended.
fn without<'a>(missing: &[Missing<'a>], pods: &[&Pod]) -> Vec<Missing<'a>> {
    let freed = |resource: &str| pods.iter().map(|pod| request_of(pod, resource)).fold(0, i64::saturating_add);
    missing
        .iter()
        .map(|m| Missing { amount: m.amount.saturating_sub(freed(m.resource)), ..*m })
        .filter(|m| m.amount > 0)
        .collect()
}

/// Takes the Pod that comes closest to what is missing, until nothing is.
fn closest<'a>(mut pods: Vec<&'a Pod>, mut missing: Vec<Missing<'_>>) -> Result<Vec<&'a Pod>, String> {
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let best = (0..pods.len()).reduce(|best, i| {
            let (ours, theirs) = (distance(&missing, pods[i]), distance(&missing, pods[best]));
            if ours < theirs || (ours == theirs && is_smaller(pods[i], pods[best])) { i } else { best }
        });
        let Some(best) = best else {
            return Err(format!("no set of running pods found to reclaim resources: {}", list(&missing)));
        };
        let pod = pods.swap_remove(best);
        missing = without(&missing, &[pod]);
        chosen.push(pod);
    }
    Ok(chosen)
}

/// How much of what is missing a Pod would leave: each resource as a fraction, so that all weigh the same.
#[allow(clippy::cast_precision_loss, reason = "fractions that are only compared")]
fn distance(missing: &[Missing<'_>], pod: &Pod) -> f64 {
    let left = |m: &Missing<'_>| (m.amount.saturating_sub(request_of(pod, m.resource))).max(0) as f64 / m.amount as f64;
    missing.iter().map(|m| left(m).powi(2)).sum()
}

fn is_smaller(one: &Pod, other: &Pod) -> bool {
    ["memory", "cpu"]
        .into_iter()
        .map(|resource| request_of(one, resource).cmp(&request_of(other, resource)))
        .find(|order| order.is_ne())
        .is_none_or(std::cmp::Ordering::is_lt)
}

fn list(missing: &[Missing<'_>]) -> String {
    let mut text = "[".to_owned();
    for Missing { resource, amount } in missing {
        // a String takes everything
        let _ = write!(text, "(res: {resource}, q: {amount}), ");
    }
    text + "]"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::fixture::{container, pod};

    fn named(name: &str, priority: Option<i32>, requests: &[(&str, &str)], limits: &[(&str, &str)]) -> Pod {
        let mut pod = pod(vec![container("c", requests, limits)]);
        pod.metadata.name = Some(name.to_owned());
        if let Some(spec) = &mut pod.spec {
            spec.priority = priority;
        }
        pod
    }

    fn critical() -> Pod {
        named("critical", Some(2_000_000_000), &[], &[])
    }

    fn short(resource: &str, amount: i64) -> Insufficient {
        Insufficient { resource: resource.to_owned(), requested: amount, used: 0, capacity: 0 }
    }

    fn names(pod: &Pod, others: &[Pod], shortages: &[Insufficient]) -> Result<Vec<String>, String> {
        let others: Vec<&Pod> = others.iter().collect();
        let mut names: Vec<_> =
            victims(pod, &others, shortages)?.iter().filter_map(|pod| pod.metadata.name.clone()).collect();
        names.sort();
        Ok(names)
    }

    fn node() -> Vec<Pod> {
        let amounts = |cpu, memory| [("cpu", cpu), ("memory", memory)];
        vec![
            named("best-effort", None, &[], &[]),
            named("burstable-low", None, &amounts("100m", "100"), &[]),
            named("burstable-high", None, &amounts("300m", "300"), &[]),
            named("guaranteed-low", None, &amounts("100m", "100"), &amounts("100m", "100")),
            named("guaranteed-high", None, &amounts("300m", "300"), &amounts("300m", "300")),
            named("system", Some(2_000_000_001), &amounts("1", "1000"), &amounts("1", "1000")),
        ]
    }

    #[test]
    fn as_few_as_possible_of_the_cheapest_class() {
        let others = node();
        for (shortages, expected) in [
            (vec![], vec![]),
            (vec![short("pods", 1)], vec!["best-effort"]),
            (vec![short("cpu", 50)], vec!["burstable-low"]),
            (vec![short("cpu", 250)], vec!["burstable-high"]),
            (vec![short("memory", 350)], vec!["burstable-high", "burstable-low"]),
            // one Guaranteed Pod with all others, rather than a larger one by itself
            (vec![short("memory", 450)], vec!["burstable-high", "burstable-low", "guaranteed-low"]),
            (vec![short("cpu", 50), short("memory", 260)], vec!["burstable-high"]),
            (vec![short("pods", 2)], vec!["best-effort", "burstable-low"]),
        ] {
            assert_eq!(names(&critical(), &others, &shortages).unwrap(), expected, "{shortages:?}");
        }
    }

    #[test]
    fn says_what_nobody_can_free() {
        let error = names(&critical(), &node(), &[short("memory", 900), short("cpu", 10)]).unwrap_err();
        assert_eq!(error, "no set of running pods found to reclaim resources: [(res: memory, q: 100), ]");
    }

    #[test]
    fn of_two_critical_pods_the_one_with_more_priority_stays() {
        let others = [named("system", Some(2_000_000_000), &[("cpu", "1")], &[])];
        assert!(names(&critical(), &others, &[short("cpu", 1)]).is_err());
        let higher = named("higher", Some(2_000_001_000), &[], &[]);
        assert_eq!(names(&higher, &others, &[short("cpu", 1)]).unwrap(), ["system"]);
    }
}
