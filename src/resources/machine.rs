//! The machine's processors, memory and swap.

use std::fs;
use std::io;

/// Amounts of `/proc/meminfo`, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// Usable memory.
    pub total: u64,
    /// Memory that nothing uses.
    pub free: u64,
    /// What can be used without swapping, by the kernel's estimate.
    pub available: u64,
    /// Swap space.
    pub swap_total: u64,
    /// Swap space that nothing uses.
    pub swap_free: u64,
}

/// Reads `/proc/meminfo`.
pub fn meminfo() -> io::Result<MemInfo> {
    Ok(parse_meminfo(&fs::read_to_string("/proc/meminfo")?))
}

fn parse_meminfo(text: &str) -> MemInfo {
    let mut info = MemInfo::default();
    for line in text.lines() {
        let Some((name, rest)) = line.split_once(':') else { continue };
        let kib = rest.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        let field = match name {
            "MemTotal" => &mut info.total,
            "MemFree" => &mut info.free,
            "MemAvailable" => &mut info.available,
            "SwapTotal" => &mut info.swap_total,
            "SwapFree" => &mut info.swap_free,
            _ => continue,
        };
        *field = kib.saturating_mul(1024);
    }
    info
}

/// Processors that are online.
pub fn online_cpus() -> io::Result<usize> {
    let list = fs::read_to_string("/sys/devices/system/cpu/online")?;
    count_list(list.trim()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/sys/devices/system/cpu/online: {list:?} is no list"))
    })
}

/// Members of a kernel list such as `0-3,8`.
fn count_list(list: &str) -> Option<usize> {
    list.split(',').try_fold(0_usize, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// Members of the list in `/sys/devices/system/cpu/possible`, empty if there is none.
#[must_use]
pub fn possible_cpus() -> Vec<usize> {
    let list = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            // the kernel's NR_CPUS is at most 8192
            cpus.extend(first..=last.min(first.saturating_add(8192)));
        }
    }
    cpus
}

/// How many tasks the kernel allows at all, the smaller of `kernel.pid_max` and `kernel.threads-max`; none if it says
/// neither.
#[must_use]
pub fn max_tasks() -> Option<i64> {
    let read = |path| fs::read_to_string(path).ok()?.trim().parse().ok();
    ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].into_iter().filter_map(read).min()
}

/// Whether the kernel uses swap: `/proc/swaps` lists more than its title. A kernel without swap has no such file.
pub fn swap_is_on() -> io::Result<bool> {
    match fs::read_to_string("/proc/swaps") {
        Ok(text) => Ok(lists_swap(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn lists_swap(swaps: &str) -> bool {
    swaps.trim().lines().count() > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let info = parse_meminfo("MemTotal:  8 kB\nMemFree: 2 kB\nSwapTotal: 1 kB\nHugePages_Total: 9\nodd\n");
        assert_eq!((info.total, info.free, info.swap_total), (8192, 2048, 1024));
        assert!(meminfo().unwrap().total > 0);
    }

    #[test]
    fn counts_processors() {
        for (list, count) in [("0", Some(1)), ("0-3,8", Some(5)), ("3-1", None), ("", None), ("a", None)] {
            assert_eq!(count_list(list), count, "{list:?}");
        }
        assert!(online_cpus().unwrap() > 0);
        assert!(possible_cpus().len() >= online_cpus().unwrap());
    }
    #[test]
    fn swap_is_what_follows_the_title() {
        let title = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        for (text, on) in [("", false), (title, false), (&format!("{title}/dev/sda2 partition 1 0 -2\n"), true)] {
            assert_eq!(lists_swap(text), on, "{text:?}");
        }
        assert_eq!(swap_is_on().unwrap(), meminfo().unwrap().swap_total > 0);
        assert!(max_tasks().is_some_and(|most| most > 0));
    }
}
