//! What cgroups, file systems and the node use, read on demand.
//!
//! The fields are those of `/stats/summary` (`kubelet/pkg/apis/stats/v1alpha1/types.go`) and `/metrics/resource`;
//! how they follow from the kernel's files is as in cAdvisor. Nothing is cached here: rates need two readings,
//! see [`nano_cores`].

use std::collections::BTreeMap;
use std::path::Path;

use jiff::Timestamp;

use super::cgroup::{CgroupError, Hierarchy};
use super::machine;

/// Use of one cgroup. A part whose controller the node does not have is `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct CgroupStats {
    /// When the files were read.
    pub time: Timestamp,
    /// Processor time.
    pub cpu: Option<CpuStats>,
    /// Memory.
    pub memory: Option<MemoryStats>,
    /// Swap, where the kernel accounts it.
    pub swap: Option<SwapStats>,
    /// Block devices.
    pub io: Option<IoStats>,
    /// Number of tasks.
    pub tasks: Option<u64>,
}

/// Processor time since the cgroup was made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CpuStats {
    /// Nanoseconds on any processor.
    pub usage: u64,
    /// Nanoseconds in user mode.
    pub user: u64,
    /// Nanoseconds in the kernel.
    pub system: u64,
    /// Periods in which the limit was enforced.
    pub periods: u64,
    /// Periods in which it was reached.
    pub throttled_periods: u64,
    /// Nanoseconds spent waiting for the next period.
    pub throttled: u64,
    /// Pressure; version 2 only.
    pub psi: Option<Psi>,
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MemoryStats {
    /// All that is charged, page cache included.
    pub usage: u64,
    /// What cannot be dropped under pressure: usage without inactive file pages.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page cache.
    pub cache: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// Memory of the kernel on behalf of the cgroup.
    pub kernel: u64,
    /// The limit; `None` when there is none.
    pub limit: Option<u64>,
    /// Largest usage since the cgroup was made, if the kernel keeps it.
    pub peak: Option<u64>,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that had to read from a device.
    pub major_page_faults: u64,
    /// How often an allocation failed at the limit.
    pub limit_hits: u64,
    /// Processes killed for lack of memory, if the kernel counts them.
    pub oom_kills: Option<u64>,
    /// Pressure; version 2 only.
    pub psi: Option<Psi>,
}

impl MemoryStats {
    /// What may still be allocated, when there is a limit.
    #[must_use]
    pub fn available(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.working_set))
    }
}

/// Swap in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapStats {
    /// In use.
    pub usage: u64,
    /// The limit; `None` when there is none.
    pub limit: Option<u64>,
}

/// Transfers from and to block devices since the cgroup was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IoStats {
    /// By device, `major:minor`.
    pub devices: BTreeMap<String, DeviceIo>,
    /// Pressure; version 2 only.
    pub psi: Option<Psi>,
}

/// Transfers of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Read operations.
    pub reads: u64,
    /// Write operations.
    pub writes: u64,
}

/// Pressure stall information.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Psi {
    /// At least one task waited.
    pub some: PsiLine,
    /// All tasks waited at once.
    pub full: PsiLine,
}

/// One line of pressure stall information.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PsiLine {
    /// Share of the last 10 seconds in percent.
    pub avg10: f64,
    /// Share of the last 60 seconds in percent.
    pub avg60: f64,
    /// Share of the last 300 seconds in percent.
    pub avg300: f64,
    /// Microseconds in all.
    pub total: u64,
}

/// Billionths of a core used between two readings of the same cgroup; `None` if it was made anew or no time passed.
#[must_use]
pub fn nano_cores(earlier: (Timestamp, u64), later: (Timestamp, u64)) -> Option<u64> {
    let elapsed = later.0.as_nanosecond() - earlier.0.as_nanosecond();
    let used = i128::from(later.1.checked_sub(earlier.1)?);
    if elapsed <= 0 {
        return None;
    }
    u64::try_from(used * 1_000_000_000 / elapsed).ok()
}

/// Reads a cgroup. That it is gone shows as an error of the kind `ENOENT` or `ENODEV`.
pub(super) fn read(hierarchy: &Hierarchy, path: &str) -> Result<CgroupStats, CgroupError> {
    let time = Timestamp::now();
    let Some(directory) = hierarchy.directory("cpu", path) else {
        return Err(CgroupError::MissingController { controller: "cpu".into(), path: path.into() });
    };
    std::fs::metadata(&directory).map_err(|source| CgroupError::Io {
        action: "read",
        path: directory.clone(),
        source,
    })?;
    if hierarchy.is_unified() {
        let d = Files(Some(directory));
        let root = path.trim_matches('/').is_empty();
        return Ok(CgroupStats {
            time,
            cpu: d.unified_cpu(),
            memory: d.unified_memory(root),
            swap: d.unified_swap(root),
            io: d.unified_io(),
            tasks: d.number("pids.current"),
        });
    }
    let files = |controller: &str| Files(hierarchy.directory(controller, path));
    let memory = files("memory").legacy_memory();
    Ok(CgroupStats {
        time,
        cpu: Files::legacy_cpu(&files("cpuacct"), &files("cpu")),
        memory,
        swap: memory.and_then(|m| files("memory").legacy_swap(m.usage)),
        io: files("blkio").legacy_io(),
        tasks: files("pids").number("pids.current"),
    })
}

/// The files of one directory, if there is one.
struct Files(Option<std::path::PathBuf>);

impl Files {
    fn text(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.0.as_ref()?.join(file)).ok()
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// A file of `name value` lines.
    fn table(&self, file: &str) -> Option<BTreeMap<String, u64>> {
        Some(parse_table(&self.text(file)?))
    }

    fn psi(&self, file: &str) -> Option<Psi> {
        parse_psi(&self.text(file)?)
    }

    /// A limit file; `max`, and the largest number of pages on version 1, are no limit.
    fn limit(&self, file: &str) -> Option<u64> {
        self.number(file).filter(|limit| *limit < (1 << 62))
    }

    fn unified_cpu(&self) -> Option<CpuStats> {
        let stat = self.table("cpu.stat")?;
        let micros = |name: &str| get(&stat, name).saturating_mul(1000);
        Some(CpuStats {
            usage: micros("usage_usec"),
            user: micros("user_usec"),
            system: micros("system_usec"),
            periods: get(&stat, "nr_periods"),
            throttled_periods: get(&stat, "nr_throttled"),
            throttled: micros("throttled_usec"),
            psi: self.psi("cpu.pressure"),
        })
    }

    fn unified_memory(&self, root: bool) -> Option<MemoryStats> {
        let stat = self.table("memory.stat")?;
        let events = self.table("memory.events").unwrap_or_default();
        let usage = match self.number("memory.current") {
            Some(usage) => usage,
            // the root has no usage of its own
            None if root => machine::meminfo().map(|m| m.total.saturating_sub(m.free)).ok()?,
            None => return None,
        };
        Some(MemoryStats {
            usage,
            working_set: usage.saturating_sub(get(&stat, "inactive_file")),
            rss: get(&stat, "anon"),
            cache: get(&stat, "file"),
            mapped_file: get(&stat, "file_mapped"),
            kernel: get(&stat, "kernel"),
            limit: self.limit("memory.max"),
            peak: self.number("memory.peak"),
            page_faults: get(&stat, "pgfault"),
            major_page_faults: get(&stat, "pgmajfault"),
            limit_hits: get(&events, "max"),
            oom_kills: events.get("oom_kill").copied(),
            psi: self.psi("memory.pressure"),
        })
    }

    fn unified_swap(&self, root: bool) -> Option<SwapStats> {
        if root {
            let info = machine::meminfo().ok()?;
            return Some(SwapStats { usage: info.swap_total.saturating_sub(info.swap_free), limit: None });
        }
        Some(SwapStats { usage: self.number("memory.swap.current")?, limit: self.limit("memory.swap.max") })
    }

    fn unified_io(&self) -> Option<IoStats> {
        Some(IoStats { devices: parse_io_stat(&self.text("io.stat")?), psi: self.psi("io.pressure") })
    }

    fn legacy_cpu(cpuacct: &Self, cpu: &Self) -> Option<CpuStats> {
        let stat = cpu.table("cpu.stat").unwrap_or_default();
        Some(CpuStats {
            usage: cpuacct.number("cpuacct.usage")?,
            user: cpuacct.number("cpuacct.usage_user").unwrap_or(0),
            system: cpuacct.number("cpuacct.usage_sys").unwrap_or(0),
            periods: get(&stat, "nr_periods"),
            throttled_periods: get(&stat, "nr_throttled"),
            throttled: get(&stat, "throttled_time"),
            psi: None,
        })
    }

    fn legacy_memory(&self) -> Option<MemoryStats> {
        let stat = self.table("memory.stat")?;
        let usage = self.number("memory.usage_in_bytes")?;
        Some(MemoryStats {
            usage,
            working_set: usage.saturating_sub(get(&stat, "total_inactive_file")),
            rss: get(&stat, "total_rss"),
            cache: get(&stat, "total_cache"),
            mapped_file: get(&stat, "total_mapped_file"),
            kernel: self.number("memory.kmem.usage_in_bytes").unwrap_or(0),
            limit: self.limit("memory.limit_in_bytes"),
            peak: self.number("memory.max_usage_in_bytes"),
            page_faults: get(&stat, "total_pgfault"),
            major_page_faults: get(&stat, "total_pgmajfault"),
            limit_hits: self.number("memory.failcnt").unwrap_or(0),
            oom_kills: self.table("memory.oom_control").and_then(|t| t.get("oom_kill").copied()),
            psi: None,
        })
    }

    fn legacy_swap(&self, memory: u64) -> Option<SwapStats> {
        let both = self.number("memory.memsw.usage_in_bytes")?;
        let limit = self.limit("memory.memsw.limit_in_bytes").zip(self.limit("memory.limit_in_bytes"));
        Some(SwapStats { usage: both.saturating_sub(memory), limit: limit.map(|(both, own)| both.saturating_sub(own)) })
    }

    fn legacy_io(&self) -> Option<IoStats> {
        let bytes = self
            .text("blkio.throttle.io_service_bytes_recursive")
            .or_else(|| self.text("blkio.throttle.io_service_bytes"))?;
        let operations =
            self.text("blkio.throttle.io_serviced_recursive").or_else(|| self.text("blkio.throttle.io_serviced"));
        let mut devices = BTreeMap::new();
        fold_blkio(&bytes, &mut devices, |d| (&mut d.read_bytes, &mut d.write_bytes));
        fold_blkio(&operations.unwrap_or_default(), &mut devices, |d| (&mut d.reads, &mut d.writes));
        Some(IoStats { devices, psi: None })
    }
}

fn get(table: &BTreeMap<String, u64>, name: &str) -> u64 {
    table.get(name).copied().unwrap_or(0)
}

fn parse_table(text: &str) -> BTreeMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?))).collect()
}

fn parse_psi(text: &str) -> Option<Psi> {
    let mut psi = Psi::default();
    for line in text.lines() {
        let (kind, values) = line.split_once(' ')?;
        let line = match kind {
            "some" => &mut psi.some,
            "full" => &mut psi.full,
            _ => continue,
        };
        for (name, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
            match name {
                "avg10" => line.avg10 = value.parse().ok()?,
                "avg60" => line.avg60 = value.parse().ok()?,
                "avg300" => line.avg300 = value.parse().ok()?,
                "total" => line.total = value.parse().ok()?,
                _ => {}
            }
        }
    }
    Some(psi)
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`
fn parse_io_stat(text: &str) -> BTreeMap<String, DeviceIo> {
    let mut devices = BTreeMap::new();
    for line in text.lines() {
        let Some((device, values)) = line.split_once(' ') else { continue };
        let values: BTreeMap<&str, u64> = values
            .split(' ')
            .filter_map(|p| p.split_once('='))
            .filter_map(|(n, v)| Some((n, v.parse().ok()?)))
            .collect();
        let value = |name: &str| values.get(name).copied().unwrap_or(0);
        let io = DeviceIo {
            read_bytes: value("rbytes"),
            write_bytes: value("wbytes"),
            reads: value("rios"),
            writes: value("wios"),
        };
        devices.insert(device.to_owned(), io);
    }
    devices
}

/// `8:0 Read 4096`
fn fold_blkio(
    text: &str,
    devices: &mut BTreeMap<String, DeviceIo>,
    fields: impl Fn(&mut DeviceIo) -> (&mut u64, &mut u64),
) {
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(device), Some(kind), Some(value)) = (words.next(), words.next(), words.next()) else { continue };
        let Ok(value) = value.parse::<u64>() else { continue };
        let (read, write) = fields(devices.entry(device.to_owned()).or_default());
        match kind {
            "Read" => *read = value,
            "Write" => *write = value,
            _ => {}
        }
    }
}

/// Pressure of the whole node, from `/proc/pressure`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NodePressure {
    /// Of processors.
    pub cpu: Option<Psi>,
    /// Of memory.
    pub memory: Option<Psi>,
    /// Of block devices.
    pub io: Option<Psi>,
}

/// Use of the whole node: the root cgroup, with pressure from `/proc/pressure` where the cgroup has none.
pub fn node(hierarchy: &Hierarchy) -> Result<CgroupStats, CgroupError> {
    let mut stats = read(hierarchy, "/")?;
    let pressure = node_pressure();
    if let Some(cpu) = &mut stats.cpu {
        cpu.psi = cpu.psi.or(pressure.cpu);
    }
    if let Some(memory) = &mut stats.memory {
        memory.psi = memory.psi.or(pressure.memory);
        // the root's limit is the machine
        memory.limit = machine::meminfo().ok().map(|m| m.total);
    }
    if let Some(io) = &mut stats.io {
        io.psi = io.psi.or(pressure.io);
    }
    Ok(stats)
}

/// Reads `/proc/pressure`; a kernel without it, or with `psi=0`, has none.
#[must_use]
pub fn node_pressure() -> NodePressure {
    let files = Files(Some("/proc/pressure".into()));
    NodePressure { cpu: files.psi("cpu"), memory: files.psi("memory"), io: files.psi("io") }
}

/// Use of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsStats {
    /// When it was read.
    pub time: Timestamp,
    /// Size in bytes.
    pub capacity: u64,
    /// Bytes that an unprivileged process can still write.
    pub available: u64,
    /// Bytes in use.
    pub used: u64,
    /// Number of inodes; zero for file systems that have no fixed number.
    pub inodes: u64,
    /// Inodes that are free.
    pub inodes_free: u64,
    /// Inodes in use.
    pub inodes_used: u64,
}

/// The file system that holds `path`. Can block on network file systems.
pub fn filesystem(path: &Path) -> std::io::Result<FsStats> {
    let s = rustix::fs::statvfs(path)?;
    Ok(FsStats {
        time: Timestamp::now(),
        capacity: s.f_blocks.saturating_mul(s.f_frsize),
        available: s.f_bavail.saturating_mul(s.f_frsize),
        used: s.f_blocks.saturating_sub(s.f_bfree).saturating_mul(s.f_frsize),
        inodes: s.f_files,
        inodes_free: s.f_ffree,
        inodes_used: s.f_files.saturating_sub(s.f_ffree),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn reads_version_2_files() {
        let d = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 1\nthrottled_usec 9\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
            ),
            ("memory.stat", "anon 10\nfile 20\ninactive_file 15\npgfault 4\npgmajfault 2\n"),
            ("memory.current", "40\n"),
            ("memory.max", "100\n"),
            ("memory.events", "low 0\nmax 3\noom_kill 1\n"),
            ("memory.swap.current", "6\n"),
            ("memory.swap.max", "max\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
            ("pids.current", "12\n"),
        ] {
            fs::write(d.path().join(file), text).unwrap();
        }
        let stats = read(&Hierarchy::Unified { mount: d.path().to_owned() }, "/.").unwrap();
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.usage, cpu.user, cpu.throttled), (5000, 3000, 9000));
        assert_eq!(cpu.psi.unwrap().some, PsiLine { avg10: 1.5, avg60: 0.0, avg300: 0.25, total: 77 });
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage, memory.working_set, memory.rss, memory.available()), (40, 25, 10, Some(75)));
        assert_eq!((memory.limit_hits, memory.oom_kills), (3, Some(1)));
        assert_eq!(stats.swap, Some(SwapStats { usage: 6, limit: None }));
        assert_eq!(stats.io.unwrap().devices["8:0"], DeviceIo { read_bytes: 1, write_bytes: 2, reads: 3, writes: 4 });
        assert_eq!(stats.tasks, Some(12));
    }

    #[test]
    fn folds_version_1_block_counters() {
        let mut devices = BTreeMap::new();
        fold_blkio("8:0 Read 5\n8:0 Write 6\n8:0 Total 11\nTotal 11\n", &mut devices, |d| {
            (&mut d.read_bytes, &mut d.write_bytes)
        });
        assert_eq!(devices["8:0"], DeviceIo { read_bytes: 5, write_bytes: 6, reads: 0, writes: 0 });
    }

    #[test]
    fn reads_this_node() {
        let hierarchy = Hierarchy::discover().unwrap();
        let stats = node(&hierarchy).unwrap();
        assert!(stats.cpu.unwrap().usage > 0);
        let memory = stats.memory.unwrap();
        assert!(memory.working_set > 0 && memory.working_set <= memory.usage && memory.limit.is_some());
        let fs = filesystem(Path::new("/")).unwrap();
        assert!(fs.capacity > 0 && fs.used <= fs.capacity);
    }

    #[test]
    fn a_missing_cgroup_is_an_error() {
        let error = read(&Hierarchy::discover().unwrap(), "/no-such-cgroup").unwrap_err();
        assert!(matches!(error, CgroupError::Io { .. }), "{error}");
    }

    #[test]
    fn rates_need_two_readings() {
        let at = |ms: i64| Timestamp::from_millisecond(ms).unwrap();
        assert_eq!(nano_cores((at(0), 0), (at(2000), 1_000_000_000)), Some(500_000_000));
        assert_eq!(nano_cores((at(0), 5), (at(0), 9)), None);
        assert_eq!(nano_cores((at(0), 9), (at(1), 5)), None);
    }

    proptest::proptest! {
        #[test]
        fn kernel_files_never_panic(text in "([a-z0-9=:. ]{0,30}\n){0,6}") {
            parse_table(&text);
            parse_psi(&text);
            parse_io_stat(&text);
            fold_blkio(&text, &mut BTreeMap::new(), |d| (&mut d.reads, &mut d.writes));
        }
    }
}
