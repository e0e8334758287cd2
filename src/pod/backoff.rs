//! Exponential delays with reset, as client-go's `flowcontrol.Backoff` that kubelet uses for restarts and pulls.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// First delay, seconds (`containerBackOffPeriod` and `imageBackOffPeriod` in kubelet).
pub const INITIAL_SECONDS: i64 = 10;
/// Longest delay by default, seconds (`MaxCrashLoopBackOff`).
pub const MAX_SECONDS: i64 = 300;

/// The delay before a thing that failed is tried again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Backoff {
    /// Seconds; 0 before the first failure.
    pub delay: i64,
    /// When `delay` was last raised.
    pub raised_at: Option<Timestamp>,
}

impl Backoff {
    /// The earliest time for the next try after a failure at `failed_at`; `None`: at once, or it has begun.
    #[must_use]
    pub fn until(&self, failed_at: Timestamp, max: i64) -> Option<Timestamp> {
        let begun = self.raised_at.is_some_and(|raised| raised > failed_at);
        if self.delay == 0 || begun || self.expired(failed_at, max) {
            return None;
        }
        Some(failed_at + SignedDuration::from_secs(self.delay))
    }

    /// Raises the delay for the failure after this one; called when a try begins.
    pub fn raise(&mut self, failed_at: Timestamp, now: Timestamp, max: i64) {
        let initial = INITIAL_SECONDS.min(max);
        self.delay = if self.delay == 0 || self.expired(failed_at, max) {
            initial
        } else {
            self.delay.saturating_mul(2).min(max)
        };
        self.raised_at = Some(now);
    }

    /// The try after a failure at `failed_at` begins without a wait of its own, and does not raise the delay.
    pub fn waive(&mut self, failed_at: Timestamp) {
        let begun = failed_at + SignedDuration::from_millis(1);
        self.raised_at = Some(self.raised_at.map_or(begun, |raised| raised.max(begun)));
    }

    /// Twice the longest delay without a failure resets the table.
    fn expired(&self, failed_at: Timestamp, max: i64) -> bool {
        self.raised_at.is_some_and(|raised| failed_at.duration_since(raised) > SignedDuration::from_secs(2 * max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    #[test]
    fn follows_kubelets_table() {
        let mut backoff = Backoff::default();
        let mut now = at(0);
        assert_eq!(backoff.until(now, MAX_SECONDS), None, "the first restart is at once");
        for delay in [10, 20, 40, 80, 160, 300, 300] {
            let begun = now + SignedDuration::from_secs(1);
            backoff.raise(now, begun, MAX_SECONDS);
            assert_eq!(backoff.until(now, MAX_SECONDS), None, "the try for this failure has begun");
            let failed = begun + SignedDuration::from_secs(1);
            let next = backoff.until(failed, MAX_SECONDS).unwrap();
            assert_eq!(next.duration_since(failed).as_secs(), delay);
            now = next;
        }
    }

    #[test]
    fn a_long_healthy_run_resets_it() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.raise(at(0), at(0), MAX_SECONDS);
        }
        assert!(backoff.until(at(600), MAX_SECONDS).is_some());
        assert_eq!(backoff.until(at(601), MAX_SECONDS), None);
        backoff.raise(at(601), at(601), MAX_SECONDS);
        assert_eq!(backoff.delay, 10);
    }

    #[test]
    fn the_nodes_maximum_caps_the_first_delay_too() {
        let mut backoff = Backoff::default();
        backoff.raise(at(0), at(0), 2);
        assert_eq!(backoff.delay, 2);
    }
}
