//! When a probe is due and what its results mean: the thresholds of liveness, readiness and startup probes.
//!
//! Source: `pkg/kubelet/prober/worker.go`. Facts live in [`ProbeFacts`], part of the container's record, so that a
//! restart of the agent loses no count and flips no condition.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Probe};
use serde::{Deserialize, Serialize};

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ProbeKind {
    /// Holds the other two back until it succeeds once.
    Startup,
    /// Restarts the container.
    Liveness,
    /// Takes the container out of service.
    Readiness,
}

impl ProbeKind {
    /// All, in the order in which they matter.
    pub const ALL: [ProbeKind; 3] = [ProbeKind::Startup, ProbeKind::Liveness, ProbeKind::Readiness];

    /// As events say it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ProbeKind::Startup => "Startup",
            ProbeKind::Liveness => "Liveness",
            ProbeKind::Readiness => "Readiness",
        }
    }

    /// The container's probe of this kind.
    #[must_use]
    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            ProbeKind::Startup => container.startup_probe.as_ref(),
            ProbeKind::Liveness => container.liveness_probe.as_ref(),
            ProbeKind::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// What one probe has found on the newest instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Findings {
    /// The verdict, once a threshold was reached.
    pub verdict: Option<bool>,
    /// The last result.
    pub last: Option<bool>,
    /// How often in a row.
    pub run: i32,
    /// When the last one began.
    pub probed_at: Option<Timestamp>,
}

/// Findings of the three probes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProbeFacts {
    /// Of `startupProbe`.
    pub startup: Findings,
    /// Of `livenessProbe`.
    pub liveness: Findings,
    /// Of `readinessProbe`.
    pub readiness: Findings,
}

impl ProbeFacts {
    /// The findings of one kind.
    #[must_use]
    pub fn get(&self, kind: ProbeKind) -> &Findings {
        match kind {
            ProbeKind::Startup => &self.startup,
            ProbeKind::Liveness => &self.liveness,
            ProbeKind::Readiness => &self.readiness,
        }
    }

    fn get_mut(&mut self, kind: ProbeKind) -> &mut Findings {
        match kind {
            ProbeKind::Startup => &mut self.startup,
            ProbeKind::Liveness => &mut self.liveness,
            ProbeKind::Readiness => &mut self.readiness,
        }
    }

    /// `started`: no startup probe, or it has succeeded.
    #[must_use]
    pub fn is_started(&self, container: &Container) -> bool {
        container.startup_probe.is_none() || self.startup.verdict == Some(true)
    }

    /// `ready`: started, and no readiness probe or its verdict is success.
    #[must_use]
    pub fn is_ready(&self, container: &Container) -> bool {
        self.is_started(container) && (container.readiness_probe.is_none() || self.readiness.verdict == Some(true))
    }

    /// The liveness or startup probe that has condemned the instance.
    #[must_use]
    pub fn condemned_by(&self) -> Option<ProbeKind> {
        [ProbeKind::Startup, ProbeKind::Liveness].into_iter().find(|kind| self.get(*kind).verdict == Some(false))
    }

    /// When the probe is next due on an instance that started at `started_at`; `None`: not in this state.
    #[must_use]
    pub fn due(&self, kind: ProbeKind, container: &Container, started_at: Timestamp) -> Option<Timestamp> {
        let probe = kind.of(container)?;
        if self.is_started(container) == (kind == ProbeKind::Startup) || self.condemned_by().is_some() {
            return None;
        }
        let earliest = started_at + seconds(probe.initial_delay_seconds, 0);
        let next = self.get(kind).probed_at.map(|at| at + seconds(probe.period_seconds, 10));
        Some(next.map_or(earliest, |next| next.max(earliest)))
    }

    /// Notes a result of a probe that began at `began`; true if the verdict changed.
    pub fn note(&mut self, kind: ProbeKind, probe: &Probe, success: bool, began: Timestamp) -> bool {
        let findings = self.get_mut(kind);
        findings.probed_at = Some(began);
        if findings.last == Some(success) {
            findings.run = findings.run.saturating_add(1);
        } else {
            findings.last = Some(success);
            findings.run = 1;
        }
        let threshold =
            if success { probe.success_threshold.unwrap_or(1) } else { probe.failure_threshold.unwrap_or(3) };
        if findings.run < threshold.max(1) {
            return false;
        }
        let changed = findings.verdict != Some(success);
        findings.verdict = Some(success);
        changed
    }

    /// Notes that a probe could not be carried out: the verdict stands.
    pub fn note_unknown(&mut self, kind: ProbeKind, began: Timestamp) {
        self.get_mut(kind).probed_at = Some(began);
    }
}

fn seconds(value: Option<i32>, default: i32) -> SignedDuration {
    SignedDuration::from_secs(i64::from(value.unwrap_or(default).max(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Container {
        let probe = |failures| Probe { failure_threshold: Some(failures), period_seconds: Some(5), ..Probe::default() };
        Container {
            startup_probe: Some(probe(2)),
            liveness_probe: Some(probe(3)),
            readiness_probe: Some(probe(1)),
            ..Container::default()
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn startup_holds_the_others_back() {
        let (container, mut facts) = (container(), ProbeFacts::default());
        assert_eq!(facts.due(ProbeKind::Startup, &container, at(100)), Some(at(100)));
        assert_eq!(facts.due(ProbeKind::Liveness, &container, at(100)), None);
        facts.note(ProbeKind::Startup, container.startup_probe.as_ref().unwrap(), true, at(100));
        assert!(facts.is_started(&container) && !facts.is_ready(&container));
        assert_eq!(facts.due(ProbeKind::Startup, &container, at(100)), None);
        assert_eq!(facts.due(ProbeKind::Readiness, &container, at(100)), Some(at(100)));
    }

    #[test]
    fn a_verdict_takes_as_many_results_in_a_row_as_the_threshold_says() {
        let (container, mut facts) = (container(), ProbeFacts::default());
        facts.note(ProbeKind::Startup, container.startup_probe.as_ref().unwrap(), true, at(0));
        let liveness = container.liveness_probe.as_ref().unwrap();
        for (second, success) in [(1, false), (2, false), (3, true), (4, false), (5, false)] {
            facts.note(ProbeKind::Liveness, liveness, success, at(second));
            assert_eq!(facts.condemned_by(), None);
        }
        assert!(facts.note(ProbeKind::Liveness, liveness, false, at(6)));
        assert_eq!(facts.condemned_by(), Some(ProbeKind::Liveness));
        assert_eq!(facts.due(ProbeKind::Liveness, &container, at(0)), None, "on hold until the restart");
    }

    #[test]
    fn an_error_of_the_probe_itself_changes_no_verdict() {
        let (container, mut facts) = (container(), ProbeFacts::default());
        facts.note(ProbeKind::Startup, container.startup_probe.as_ref().unwrap(), true, at(0));
        facts.note(ProbeKind::Readiness, container.readiness_probe.as_ref().unwrap(), true, at(0));
        facts.note_unknown(ProbeKind::Readiness, at(5));
        assert!(facts.is_ready(&container));
        assert_eq!(facts.due(ProbeKind::Readiness, &container, at(0)), Some(at(10)));
    }

    #[test]
    fn the_first_probe_waits_for_its_delay_and_the_next_for_the_period() {
        let probe = Probe { initial_delay_seconds: Some(7), period_seconds: Some(5), ..Probe::default() };
        let container = Container { liveness_probe: Some(probe.clone()), ..Container::default() };
        let mut facts = ProbeFacts::default();
        assert_eq!(facts.due(ProbeKind::Liveness, &container, at(100)), Some(at(107)));
        facts.note(ProbeKind::Liveness, &probe, true, at(108));
        assert_eq!(facts.due(ProbeKind::Liveness, &container, at(100)), Some(at(113)), "from the begin of the last");
    }
}
