//! Who gets room first when several Pods wait for it.
//!
//! Source: `sortPendingResizes` in `pkg/kubelet/allocation/allocation_manager.go`.

use std::cmp::Reverse;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use crate::resources::amounts::{CPU, MEMORY, pod_requests};
use crate::resources::qos::{QosClass, qos_class};

/// A Pod's place in the queue; the smallest is first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// What asks for no more than it has always fits.
    increases: bool,
    priority: Reverse<i32>,
    burstable: bool,
    /// Who waits longest is first, who has not been told to wait is last.
    since: Reverse<Option<Reverse<Timestamp>>>,
}

impl Place {
    /// Of a Pod that has `allocated` and wants to be `wanted`, deferred `since` then.
    #[must_use]
    pub fn of(allocated: &Pod, wanted: &Pod, since: Option<Timestamp>) -> Self {
        Self {
            increases: is_larger(wanted, allocated),
            priority: Reverse(wanted.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)),
            burstable: qos_class(wanted) != QosClass::Guaranteed,
            since: Reverse(since.map(Reverse)),
        }
    }
}

/// Whether a Pod requests more cpu or memory than another.
#[must_use]
pub fn is_larger(one: &Pod, other: &Pod) -> bool {
    let (one, other) = (pod_requests(one), pod_requests(other));
    [CPU, MEMORY].into_iter().any(|name| one.nanos(name) > other.nanos(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::fixture::{container, pod};

    fn sized(cpu: &str, priority: i32, guaranteed: bool) -> Pod {
        let full = [("cpu", cpu), ("memory", "1Mi")];
        let mut p = pod(vec![container("a", &full, if guaranteed { &full } else { &[] })]);
        p.spec.as_mut().unwrap().priority = Some(priority);
        p
    }

    #[test]
    fn follows_kubelets_order() {
        let at = |second| Some(Timestamp::from_second(second).unwrap());
        let place = |cpu: &str, priority, guaranteed, since| {
            Place::of(&sized("1", priority, guaranteed), &sized(cpu, priority, guaranteed), since)
        };
        let queue = [
            place("500m", 0, false, None),
            place("2", 10, false, at(9)),
            place("2", 0, true, at(9)),
            place("2", 0, false, at(5)),
            place("2", 0, false, at(7)),
            place("2", 0, false, None),
        ];
        assert!(queue.is_sorted() && queue.windows(2).all(|pair| pair[0] != pair[1]), "{queue:?}");
    }
}
