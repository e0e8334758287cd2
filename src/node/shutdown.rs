//! How long Pods get when the node shuts down, by priority: the low ones end first, the critical ones last.
//!
//! Source: `pkg/kubelet/nodeshutdown/nodeshutdown_manager.go` (`migrateConfig`, `groupByPriority`).

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use crate::config::KubeletConfiguration;
use crate::resources::qos::SYSTEM_CRITICAL_PRIORITY;

/// Reason of a Pod that the shutdown ended.
pub const TERMINATED_REASON: &str = "Terminated";
/// Its message, and that of its `DisruptionTarget` condition.
pub const TERMINATED_MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// Reason of a Pod that came too late.
pub const REJECTED_REASON: &str = "NodeShutdown";
/// Its message.
pub const REJECTED_MESSAGE: &str = "Pod was rejected as the node is shutting down.";

/// Pods from one priority up to the next group's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Least priority; the first group also has everything below.
    pub priority: i32,
    /// Seconds until the next group's turn.
    pub seconds: i64,
}

/// The groups of a node's configuration, lowest priority first; none: shutdowns are not handled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Periods(Vec<Group>);

impl Periods {
    /// Reads `shutdownGracePeriodByPodPriority`, or `shutdownGracePeriod` and `shutdownGracePeriodCriticalPods`, both
    /// validated before.
    #[must_use]
    pub fn new(kubelet: &KubeletConfiguration) -> Self {
        let by_priority = kubelet.shutdown_grace_period_by_pod_priority.iter();
        let mut groups: Vec<Group> =
            by_priority.map(|p| Group { priority: p.priority, seconds: p.shutdown_grace_period_seconds }).collect();
        if groups.is_empty() {
            let seconds = |period: Duration| i64::try_from(period.as_secs()).unwrap_or(i64::MAX);
            let all = seconds(kubelet.shutdown_grace_period.std());
            let critical = seconds(kubelet.shutdown_grace_period_critical_pods.std());
            if all > 0 && critical <= all {
                groups.push(Group { priority: 0, seconds: all - critical });
                groups.push(Group { priority: SYSTEM_CRITICAL_PRIORITY, seconds: critical });
            }
        }
        groups.sort_by_key(|group| group.priority);
        Self(groups)
    }

    /// Whether shutdowns are handled.
    #[must_use]
    pub fn is_configured(&self) -> bool {
        !self.0.is_empty()
    }

    /// How long all groups take at most.
    #[must_use]
    pub fn total(&self) -> Duration {
        let seconds = self.0.iter().map(|group| u64::try_from(group.seconds).unwrap_or(0)).fold(0, u64::saturating_add);
        Duration::from_secs(seconds)
    }

    /// The groups in the order in which they end.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.0.iter()
    }

    /// A Pod's group.
    #[must_use]
    pub fn group_of(&self, pod: &Pod) -> Option<&Group> {
        let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
        self.0.iter().rev().find(|group| group.priority <= priority).or_else(|| self.0.first())
    }

    /// The grace of a Pod in that group: its own, if that is shorter.
    #[must_use]
    pub fn grace(group: &Group, pod: &Pod) -> i64 {
        let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        own.map_or(group.seconds, |own| own.min(group.seconds))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(priority: i32, grace: i64) -> Pod {
        let spec = json!({"containers": [], "priority": priority, "terminationGracePeriodSeconds": grace});
        serde_json::from_value(json!({"spec": spec})).unwrap()
    }

    fn periods(groups: &[(i32, i64)]) -> Periods {
        let group = |(priority, seconds): &(i32, i64)| crate::config::ShutdownGracePeriodByPodPriority {
            priority: *priority,
            shutdown_grace_period_seconds: *seconds,
        };
        Periods::new(&KubeletConfiguration {
            shutdown_grace_period_by_pod_priority: groups.iter().map(group).collect(),
            ..KubeletConfiguration::default()
        })
    }

    #[test]
    fn the_two_simple_fields_are_two_groups() {
        let mut kubelet = KubeletConfiguration::default();
        assert!(!Periods::new(&kubelet).is_configured());
        kubelet.shutdown_grace_period = crate::config::Duration::from_secs(30);
        kubelet.shutdown_grace_period_critical_pods = crate::config::Duration::from_secs(10);
        let periods = Periods::new(&kubelet);
        let groups: Vec<_> = periods.groups().map(|group| (group.priority, group.seconds)).collect();
        assert_eq!(groups, [(0, 20), (SYSTEM_CRITICAL_PRIORITY, 10)]);
        assert_eq!(periods.total(), Duration::from_secs(30));
    }

    /// The table of kubelet's documentation, and what lies outside it.
    #[test]
    fn a_pod_belongs_to_the_group_below_it() {
        let periods = periods(&[(100_000, 10), (1000, 120), (10_000, 180), (0, 60)]);
        for (priority, group) in
            [(-5, 0), (0, 0), (999, 0), (1000, 1000), (9999, 1000), (10_000, 10_000), (2_000_001_000, 100_000)]
        {
            assert_eq!(periods.group_of(&pod(priority, 30)).unwrap().priority, group, "{priority}");
        }
        assert_eq!(periods.groups().map(|group| group.priority).collect::<Vec<_>>(), [0, 1000, 10_000, 100_000]);
    }

    #[test]
    fn a_pod_gets_no_more_than_it_asks_for() {
        let group = Group { priority: 0, seconds: 20 };
        assert_eq!(Periods::grace(&group, &pod(0, 5)), 5);
        assert_eq!(Periods::grace(&group, &pod(0, 60)), 20);
        assert_eq!(Periods::grace(&group, &Pod::default()), 20);
    }
}
