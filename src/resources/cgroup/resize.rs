//! Changing the limits of a Pod and its containers while they run.
//!
//! Source: `doPodResizeAction` in `pkg/kubelet/kuberuntime/kuberuntime_manager.go`. What grows, grows from the outside
//! in, what shrinks, from the inside out: at no moment may the containers together have more than their Pod.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::hierarchy::{Hierarchy, read};
use super::{CgroupError, CgroupTree};
use crate::resources::limits::{Limits, weight_to_shares};

/// Memory limits from here on are none: version 1 shows the largest number of whole pages.
const NO_LIMIT: i64 = 1 << 62;

/// The limits that the kernel has for a cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Enforced {
    /// Weight, as `cpu.shares`; on cgroup v2 converted from `cpu.weight`, which is coarser.
    pub cpu_shares: u64,
    /// Microseconds of processor time in a period; `None` is no limit.
    pub cpu_quota: Option<i64>,
    /// Length of the period in microseconds.
    pub cpu_period: u64,
    /// Bytes; `None` is no limit.
    pub memory: Option<i64>,
}

/// New limits of one container.
#[derive(Clone, Debug)]
pub struct ContainerChange {
    /// Its cgroup.
    pub path: String,
    /// The limits: those of [`Limits::of_cpu`] or [`Limits::of_memory`].
    pub limits: Limits,
    /// Whether it gets less than it has; these come first, to make room for the others.
    pub shrinks: bool,
}

impl CgroupTree {
    /// Reads the limits of a cgroup.
    pub fn enforced(&self, path: &str) -> Result<Enforced, CgroupError> {
        match self.hierarchy() {
            Hierarchy::Unified { .. } => {
                let directory = &self.hierarchy().directories(path)[0];
                let max = read(&directory.join("cpu.max"))?;
                let mut words = max.split_whitespace();
                let quota = words.next().and_then(|quota| quota.parse().ok());
                Ok(Enforced {
                    cpu_shares: weight_to_shares(number(directory, "cpu.weight")?),
                    cpu_quota: quota,
                    cpu_period: words.next().and_then(|period| period.parse().ok()).unwrap_or_default(),
                    memory: read(&directory.join("memory.max"))?.trim().parse().ok(),
                })
            }
            Hierarchy::Legacy { .. } => {
                let directory = |controller: &str| {
                    self.hierarchy().directory(controller, path).ok_or_else(|| CgroupError::MissingController {
                        controller: controller.to_owned(),
                        path: path.into(),
                    })
                };
                let (cpu, memory) = (directory("cpu")?, directory("memory")?);
                let quota: i64 = number(&cpu, "cpu.cfs_quota_us")?;
                let limit: i64 = number(&memory, "memory.limit_in_bytes")?;
                Ok(Enforced {
                    cpu_shares: number(&cpu, "cpu.shares")?,
                    cpu_quota: (quota >= 0).then_some(quota),
                    cpu_period: number(&cpu, "cpu.cfs_period_us")?,
                    memory: (limit < NO_LIMIT).then_some(limit),
                })
            }
        }
    }

    /// Changes memory limits of a Pod and of its containers; `done` is told the index of each container whose limits
    /// the kernel has taken.
    pub fn resize_memory(
        &self,
        pod: &str,
        limits: &Limits,
        containers: &[ContainerChange],
        done: impl FnMut(usize),
    ) -> Result<(), CgroupError> {
        let limits = limits.of_memory();
        let has = self.enforced(pod)?.memory;
        let shrinks = limits.memory.is_some_and(|wanted| is_less(Some(wanted).filter(|bytes| *bytes >= 0), has));
        let (before, after) = if shrinks { (None, Some(limits)) } else { (Some(limits), None) };
        self.in_order(pod, [before, None], containers, [None, after], done)
    }

    /// Changes cpu weights and limits; otherwise as [`CgroupTree::resize_memory`].
    pub fn resize_cpu(
        &self,
        pod: &str,
        limits: &Limits,
        containers: &[ContainerChange],
        done: impl FnMut(usize),
    ) -> Result<(), CgroupError> {
        let has = self.enforced(pod)?;
        let quota = Limits { cpu_quota: limits.cpu_quota, cpu_period: limits.cpu_period, ..Limits::default() };
        let shares = Limits { cpu_shares: limits.cpu_shares, ..Limits::default() };
        let quota_shrinks =
            limits.cpu_quota.is_some_and(|wanted| is_less(Some(wanted).filter(|quota| *quota >= 0), has.cpu_quota));
        let shares_shrink = limits.cpu_shares.is_some_and(|wanted| wanted < has.cpu_shares);
        let split = |limits: Limits, shrinks: bool| if shrinks { (None, Some(limits)) } else { (Some(limits), None) };
        let (quota_before, quota_after) = split(quota, quota_shrinks);
        let (shares_before, shares_after) = split(shares, shares_shrink);
        self.in_order(pod, [quota_before, shares_before], containers, [shares_after, quota_after], done)
    }

    fn in_order(
        &self,
        pod: &str,
        before: [Option<Limits>; 2],
        containers: &[ContainerChange],
        after: [Option<Limits>; 2],
        mut done: impl FnMut(usize),
    ) -> Result<(), CgroupError> {
        for limits in before.iter().flatten() {
            self.update(pod, limits)?;
        }
        for shrinks in [true, false] {
            for (index, change) in containers.iter().enumerate().filter(|(_, change)| change.shrinks == shrinks) {
                self.update(&change.path, &change.limits)?;
                done(index);
            }
        }
        for limits in after.iter().flatten() {
            self.update(pod, limits)?;
        }
        Ok(())
    }
}

/// Whether a limit is lower than another; no limit is the highest.
fn is_less(wanted: Option<i64>, has: Option<i64>) -> bool {
    match (wanted, has) {
        (Some(wanted), Some(has)) => wanted < has,
        (Some(_), None) => true,
        (None, _) => false,
    }
}

fn number<T: FromStr>(directory: &Path, file: &str) -> Result<T, CgroupError> {
    let path = directory.join(file);
    let text = fs::read_to_string(&path).map_err(|error| CgroupError::io("read", &path, error))?;
    text.trim().parse().map_err(|_| {
        let error = std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{:?} is no number", text.trim()));
        CgroupError::io("read", &path, error)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Scratch, example};
    use super::super::{Driver, hierarchy};
    use super::*;

    fn cpu(milli: i64) -> Limits {
        Limits {
            cpu_shares: Some(u64::try_from(milli).unwrap()),
            cpu_quota: Some(milli * 100),
            cpu_period: Some(100_000),
            ..Limits::default()
        }
    }

    fn memory(mebibytes: i64) -> Limits {
        Limits { memory: Some(mebibytes << 20), ..Limits::default() }
    }

    /// A Pod with two containers, each of 100 thousandths of a core and 32 MiB.
    fn pod(scratch: &Scratch) -> (String, [String; 2]) {
        let tree = &scratch.0;
        let p = example("8888");
        tree.ensure_pod(&p, false).unwrap();
        let (path, containers) = (tree.pod_path(&p), ["c1", "c2"].map(|id| tree.container_path(&p, id)));
        tree.update(&path, &cpu(200)).unwrap();
        tree.update(&path, &memory(64)).unwrap();
        for container in &containers {
            tree.hierarchy().create(container).unwrap();
            tree.update(container, &cpu(100)).unwrap();
            tree.update(container, &memory(32)).unwrap();
        }
        (path, containers)
    }

    fn changes(containers: &[String; 2], limits: [Limits; 2], shrinks: [bool; 2]) -> Vec<ContainerChange> {
        let parts = containers.iter().zip(limits).zip(shrinks);
        parts.map(|((path, limits), shrinks)| ContainerChange { path: path.clone(), limits, shrinks }).collect()
    }

    // version 1 refuses a container that may use more of the processors than its Pod: the order matters
    #[test]
    fn grows_from_the_outside_in_and_shrinks_from_the_inside_out() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        let tree = &scratch.0;
        let (path, containers) = pod(&scratch);
        for (pod, each) in [(1000, [700, 300]), (150, [50, 100]), (400, [350, 50]), (400, [50, 350])] {
            let shrinks = [false, false];
            let mut done = Vec::new();
            tree.resize_cpu(&path, &cpu(pod), &changes(&containers, each.map(cpu), shrinks), |i| done.push(i)).unwrap();
            assert_eq!(done, [0, 1]);
            assert_eq!(tree.enforced(&path).unwrap().cpu_quota, Some(pod * 100));
            for (container, milli) in containers.iter().zip(each) {
                let enforced = tree.enforced(container).unwrap();
                assert_eq!((enforced.cpu_quota, enforced.cpu_period), (Some(milli * 100), 100_000));
            }
        }
        for (pod, each) in [(256, [192, 64]), (48, [16, 32])] {
            let changes = changes(&containers, each.map(memory), [true, false]);
            tree.resize_memory(&path, &memory(pod), &changes, |_| {}).unwrap();
            assert_eq!(tree.enforced(&path).unwrap().memory, Some(pod << 20));
            assert_eq!(containers.clone().map(|c| tree.enforced(&c).unwrap().memory), each.map(|m| Some(m << 20)));
        }
    }

    #[test]
    fn what_shrinks_comes_first_and_a_refusal_stops() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        let (path, containers) = pod(&scratch);
        let mut done = Vec::new();
        let mut all = changes(&containers, [200, 50].map(cpu), [false, true]);
        scratch.0.resize_cpu(&path, &cpu(250), &all, |i| done.push(i)).unwrap();
        assert_eq!(done, [1, 0]);
        all[0].path = format!("{path}/missing");
        done.clear();
        let error = scratch.0.resize_cpu(&path, &cpu(100), &all, |i| done.push(i)).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
        assert_eq!(done, [1]);
        assert_eq!(scratch.0.enforced(&path).unwrap().cpu_quota, Some(25_000), "the Pod shrinks last");
    }

    #[test]
    fn limits_can_be_added_to_what_has_none() {
        let scratch = Scratch::new(Driver::Cgroupfs);
        let tree = &scratch.0;
        let (path, containers) = pod(&scratch);
        let unlimited = Limits { cpu_quota: Some(-1), memory: Some(-1), ..Limits::default() };
        for cgroup in [&path, &containers[0], &containers[1]] {
            tree.update(cgroup, &unlimited).unwrap();
        }
        assert_eq!(tree.enforced(&path).unwrap().memory, None);
        let all = changes(&containers, [50, 50].map(cpu), [true, true]);
        tree.resize_cpu(&path, &cpu(100), &all, |_| {}).unwrap();
        tree.resize_memory(&path, &memory(64), &[], |_| {}).unwrap();
        let enforced = tree.enforced(&path).unwrap();
        assert_eq!((enforced.cpu_quota, enforced.memory), (Some(10_000), Some(64 << 20)));
    }

    #[test]
    fn reads_version_2_files() {
        let root = tempfile::tempdir().unwrap();
        let files = [("cpu.weight", "39\n"), ("cpu.max", "max 100000\n"), ("memory.max", "max\n")];
        for (file, text) in files {
            fs::write(root.path().join(file), text).unwrap();
        }
        let hierarchy = hierarchy::Hierarchy::Unified { mount: root.path().to_owned() };
        let tree = Scratch::around(hierarchy);
        let none = Enforced { cpu_shares: 998, cpu_quota: None, cpu_period: 100_000, memory: None };
        assert_eq!(tree.enforced("/").unwrap(), none);
        fs::write(root.path().join("cpu.max"), "5000 20000\n").unwrap();
        fs::write(root.path().join("memory.max"), "4096\n").unwrap();
        let some = Enforced { cpu_quota: Some(5000), cpu_period: 20_000, memory: Some(4096), ..none };
        assert_eq!(tree.enforced("/").unwrap(), some);
    }
}
