//! Disks.

use std::path::Path;

use super::finding::Finding;

const CHECK: &str = "disk";
/// `f_type` of tmpfs (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;
/// Below this part of the disk, in percent, kubelet's default threshold evicts Pods (`nodefs.available<10%`).
const EVICTION_PERCENT: u64 = 10;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a directory is for.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// The flag that names it.
    pub flag: &'static str,
    /// Bytes without which nothing sensible fits.
    pub least: u64,
    /// What does not work then.
    pub lost: &'static str,
    /// Whether Pods are evicted when it becomes full.
    pub evicts: bool,
}

/// Images, and what containers write.
pub const DATA: Use = Use { flag: "--data-dir", least: 512 * MIB, lost: "images cannot be pulled", evicts: true };
/// Volumes.
pub const ROOT: Use =
    Use { flag: "--root-dir", least: 512 * MIB, lost: "volumes of Pods cannot be written", evicts: true };
/// Records of running Pods: some kilobytes each.
pub const STATE: Use = Use { flag: "--state-dir", least: 16 * MIB, lost: "Pods cannot be started", evicts: false };

/// What a file system has.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Inodes in all; none for those that make them as they need them.
    pub inodes: u64,
    /// Inodes that are free.
    pub free_inodes: u64,
}

/// Asks the kernel about the nearest directory that exists.
pub fn space(path: &Path) -> std::io::Result<(Space, bool)> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)?;
    let tmpfs = rustix::fs::statfs(existing)?.f_type == TMPFS;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    let space = Space {
        bytes: bytes(stat.f_blocks),
        free: bytes(stat.f_bavail),
        inodes: stat.f_files,
        free_inodes: stat.f_favail,
    };
    Ok((space, tmpfs))
}

/// The disk of a directory.
pub fn disk(path: &Path, of: Use, space: Space) -> Finding {
    let (name, flag) = (path.display(), of.flag);
    let percent = |free: u64, all: u64| {
        if all == 0 { 100 } else { u64::try_from(u128::from(free) * 100 / u128::from(all)).unwrap_or(100) }
    };
    let (free, inodes) = (percent(space.free, space.bytes), percent(space.free_inodes, space.inodes));
    let remedy = format!("remove what is not needed, or move it to a larger disk with {flag}");
    let message = format!("{name}: {} free, {free} %", size(space.free));
    if space.free < of.least {
        let message = format!("{message}, and {} are needed: {}", size(of.least), of.lost);
        return Finding::fatal(CHECK, message, remedy);
    }
    if inodes < 5 {
        let message = format!("{name}: {inodes} % of inodes are free");
        return Finding::warning(
            CHECK,
            message,
            format!("remove small files, or move it to another file system with {flag}"),
        );
    }
    if of.evicts && free < EVICTION_PERCENT {
        return Finding::warning(
            CHECK,
            format!("{message}: Pods may be evicted (evictionHard nodefs.available)"),
            remedy,
        );
    }
    Finding::ok(CHECK, message)
}

fn size(bytes: u64) -> String {
    match bytes {
        0..GIB => format!("{} MiB", bytes / MIB),
        _ => format!("{}.{} GiB", bytes / GIB, bytes % GIB * 10 / GIB),
    }
}

/// The directory of running Pods.
pub fn state(path: &Path, tmpfs: bool) -> Finding {
    match tmpfs {
        true => Finding::ok("state", format!("{} is on a tmpfs", path.display())),
        false => Finding::warning(
            "state",
            format!("{} is on a disk: a reboot leaves records of Pods that no longer run", path.display()),
            "mount a tmpfs there, or set --state-dir to a directory in /run",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn full_disks_are_told() {
        let plenty = Space { bytes: 100 * GIB, free: 50 * GIB, inodes: 1000, free_inodes: 900 };
        let path = Path::new("/var/lib/gantry");
        let ok = disk(path, DATA, plenty);
        assert_eq!(ok.level, Level::Ok);
        assert_eq!(ok.message, "/var/lib/gantry: 50.0 GiB free, 50 %");
        let full = disk(path, DATA, Space { free: 1 << 20, ..plenty });
        assert_eq!(full.level, Level::Fatal);
        assert_eq!(full.message, "/var/lib/gantry: 1 MiB free, 0 %, and 512 MiB are needed: images cannot be pulled");
        assert!(full.remedy.contains("--data-dir"));
        let volumes = disk(path, ROOT, Space { free: 1 << 20, ..plenty });
        assert!(volumes.message.contains("volumes of Pods") && volumes.remedy.contains("--root-dir"));
        assert_eq!(disk(path, STATE, Space { bytes: GIB, free: GIB / 20, ..plenty }).level, Level::Ok);
        let nearly = disk(path, DATA, Space { free: 9 * GIB, ..plenty });
        assert_eq!(nearly.level, Level::Warning);
        assert!(nearly.message.contains("evictionHard"));
        let files = disk(path, DATA, Space { free_inodes: 10, ..plenty });
        assert_eq!(files.message, "/var/lib/gantry: 1 % of inodes are free");
        assert_eq!(disk(path, DATA, Space { inodes: 0, free_inodes: 0, ..plenty }).level, Level::Ok);
    }

    #[test]
    fn the_kernel_answers_for_what_does_not_exist_yet() {
        let (space, tmpfs) = space(Path::new("/proc/nothing/here")).unwrap();
        assert!(!tmpfs);
        assert_eq!(space.bytes, 0);
        assert_eq!(state(Path::new("/x"), false).level, Level::Warning);
        assert_eq!(state(Path::new("/x"), true).level, Level::Ok);
    }
}
