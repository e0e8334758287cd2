//! Writes [`Limits`] to a cgroup's files.
//!
//! Source: `opencontainers/cgroups` `fs` and `fs2`. Device rules are left alone: they belong to containers, whose
//! creator sets them.

use std::path::{Path, PathBuf};

use super::hierarchy::{Hierarchy, read, write};
use super::{CgroupError, is_absent};
use crate::resources::limits::{Limits, shares_to_weight};

const UNLIMITED: &str = "max";

/// Applies every value that is set. The order within a cgroup is such that raising and lowering both work; between
/// a Pod and its containers the caller raises the Pod first and lowers it last.
pub(super) fn apply(hierarchy: &Hierarchy, path: &str, limits: &Limits) -> Result<(), CgroupError> {
    match hierarchy {
        Hierarchy::Unified { .. } => unified(&hierarchy.directories(path)[0], limits),
        Hierarchy::Legacy { .. } => Legacy { hierarchy, path }.apply(limits),
    }
}

fn limit(value: i64) -> String {
    if value < 0 { UNLIMITED.to_owned() } else { value.to_string() }
}

/// `2MB`, `1GB`: the page size in the names of `hugetlb` files.
pub(crate) fn page_size_name(bytes: i64) -> String {
    let (mut size, mut unit) = (bytes, "B");
    for next in ["KB", "MB", "GB"] {
        if size % 1024 != 0 || size < 1024 {
            break;
        }
        size /= 1024;
        unit = next;
    }
    format!("{size}{unit}")
}

fn unified(directory: &Path, limits: &Limits) -> Result<(), CgroupError> {
    let set = |file: &str, value: &str| write(&directory.join(file), value);
    if let Some(shares) = limits.cpu_shares {
        set("cpu.weight", &shares_to_weight(shares).to_string())?;
    }
    match (limits.cpu_quota, limits.cpu_period) {
        (Some(quota), Some(period)) => set("cpu.max", &format!("{} {period}", limit(quota)))?,
        (Some(quota), None) => set("cpu.max", &limit(quota))?,
        _ => {}
    }
    if let Some(cpus) = &limits.cpuset_cpus {
        set("cpuset.cpus", cpus)?;
    }
    if let Some(mems) = &limits.cpuset_mems {
        set("cpuset.mems", mems)?;
    }
    if let Some(memory) = limits.memory {
        set("memory.max", &limit(memory))?;
    }
    if let Some(pids) = limits.pids {
        set("pids.max", &limit(pids))?;
    }
    for (size, bytes) in &limits.huge_pages {
        set(&format!("hugetlb.{}.max", page_size_name(*size)), &bytes.to_string())?;
        // reservations exist from kernel 5.7 on, if at all
        ignore_absent(set(&format!("hugetlb.{}.rsvd.max", page_size_name(*size)), &bytes.to_string()))?;
    }
    for (file, value) in &limits.unified {
        if file.contains('/') {
            return Err(CgroupError::BadName { name: file.clone() });
        }
        set(file, value)?;
    }
    Ok(())
}

fn ignore_absent(result: Result<(), CgroupError>) -> Result<(), CgroupError> {
    result.or_else(|error| if is_absent(&error) { Ok(()) } else { Err(error) })
}

struct Legacy<'a> {
    hierarchy: &'a Hierarchy,
    path: &'a str,
}

impl Legacy<'_> {
    fn apply(&self, limits: &Limits) -> Result<(), CgroupError> {
        if let Some(shares) = limits.cpu_shares {
            self.set("cpu", "cpu.shares", shares)?;
        }
        self.cpu_quota(limits)?;
        if let Some(cpus) = &limits.cpuset_cpus {
            self.set("cpuset", "cpuset.cpus", cpus)?;
        }
        if let Some(mems) = &limits.cpuset_mems {
            self.set("cpuset", "cpuset.mems", mems)?;
        }
        self.memory(limits)?;
        if let Some(pids) = limits.pids {
            self.set("pids", "pids.max", limit(pids))?;
        }
        for (size, bytes) in &limits.huge_pages {
            self.set("hugetlb", &format!("hugetlb.{}.limit_in_bytes", page_size_name(*size)), bytes)?;
        }
        Ok(())
    }

    fn file(&self, controller: &str, file: &str) -> Result<PathBuf, CgroupError> {
        let directory = self.hierarchy.directory(controller, self.path).ok_or_else(|| {
            CgroupError::MissingController { controller: controller.to_owned(), path: PathBuf::from(self.path) }
        })?;
        Ok(directory.join(file))
    }

    fn set(&self, controller: &str, file: &str, value: impl ToString) -> Result<(), CgroupError> {
        write(&self.file(controller, file)?, &value.to_string())
    }

    /// The kernel checks quota over period against the parent and the children at each of the two writes; one of
    /// the orders works (`opencontainers/cgroups` `fs/cpu.go`).
    fn cpu_quota(&self, limits: &Limits) -> Result<(), CgroupError> {
        let mut quota_first = false;
        if let Some(period) = limits.cpu_period {
            match self.set("cpu", "cpu.cfs_period_us", period) {
                Err(error) if limits.cpu_quota.is_some() && error.is_invalid_value() => quota_first = true,
                result => result?,
            }
        }
        if let Some(quota) = limits.cpu_quota {
            self.set("cpu", "cpu.cfs_quota_us", quota)?;
        }
        match limits.cpu_period.filter(|_| quota_first) {
            Some(period) => self.set("cpu", "cpu.cfs_period_us", period),
            None => Ok(()),
        }
    }

    /// Memory must never exceed memory and swap: raise the outer limit first, lower the inner one first.
    fn memory(&self, limits: &Limits) -> Result<(), CgroupError> {
        let Some(memory) = limits.memory else { return Ok(()) };
        let with_swap = self.file("memory", "memory.memsw.limit_in_bytes")?;
        // a limit left by an earlier configuration would refuse the new one
        let wanted = limits.memory_and_swap.or_else(|| with_swap.exists().then_some(-1));
        let Some(wanted) = wanted else { return self.set("memory", "memory.limit_in_bytes", memory) };
        let current: u64 = read(&self.file("memory", "memory.limit_in_bytes")?)?.trim().parse().unwrap_or(u64::MAX);
        let raising = memory < 0 || u64::try_from(memory).is_ok_and(|memory| memory > current);
        if raising {
            write(&with_swap, &wanted.to_string())?;
            return self.set("memory", "memory.limit_in_bytes", memory);
        }
        self.set("memory", "memory.limit_in_bytes", memory)?;
        write(&with_swap, &wanted.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn names_page_sizes_as_the_kernel_does() {
        for (bytes, name) in [(64 << 10, "64KB"), (2 << 20, "2MB"), (1 << 30, "1GB"), (16 << 30, "16GB")] {
            assert_eq!(page_size_name(bytes), name);
        }
    }

    #[test]
    fn writes_version_2_files() {
        let root = tempfile::tempdir().unwrap();
        let files = ["cpu.weight", "cpu.max", "memory.max", "pids.max", "memory.oom.group", "hugetlb.2MB.max"];
        for file in files {
            fs::write(root.path().join(file), "").unwrap();
        }
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota: Some(-1),
            cpu_period: Some(100_000),
            memory: Some(-1),
            pids: Some(100),
            huge_pages: [(2 << 20, 0)].into(),
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Limits::default()
        };
        apply(&Hierarchy::Unified { mount: root.path().to_owned() }, "/", &limits).unwrap();
        let written: Vec<_> = files.iter().map(|f| fs::read_to_string(root.path().join(f)).unwrap()).collect();
        assert_eq!(written, ["39", "max 100000", "max", "100", "1", "0"]);
    }

    #[test]
    fn refuses_names_that_leave_the_directory() {
        let root = tempfile::tempdir().unwrap();
        let limits = Limits { unified: [("../escape".to_owned(), "1".to_owned())].into(), ..Limits::default() };
        let error = apply(&Hierarchy::Unified { mount: root.path().to_owned() }, "/", &limits).unwrap_err();
        assert!(matches!(error, CgroupError::BadName { .. }), "{error}");
    }

    #[test]
    fn a_missing_file_is_an_error_that_names_it() {
        let root = tempfile::tempdir().unwrap();
        let limits = Limits { pids: Some(5), ..Limits::default() };
        let error = apply(&Hierarchy::Unified { mount: root.path().to_owned() }, "/", &limits).unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
    }
}
