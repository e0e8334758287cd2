//! What the machine is: processors, memory, identities, system. Read from the kernel's files below a root
//! directory, so that tests can bring their own machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Facts about the machine that do not change while it runs, save hot-plugged CPUs and memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineInfo {
    /// Online processors.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of swap.
    pub swap: i64,
    /// Bytes of huge pages by resource name (`hugepages-2Mi`).
    pub huge_pages: BTreeMap<String, i64>,
    /// Bytes of the file system that holds kubelet's root directory; none if it cannot be measured.
    pub ephemeral_storage: Option<i64>,
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// The firmware's UUID.
    pub system_uuid: String,
    /// Changes at every boot.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel_version: String,
    /// `PRETTY_NAME` of os-release.
    pub os_image: String,
    /// We do not run in the initial user namespace.
    pub in_user_namespace: bool,
}

/// The machine cannot be described; retryable, `/proc` and `/sys` may not be mounted yet.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what}: {problem}: /proc and /sys must be mounted")]
pub struct MachineError {
    what: &'static str,
    problem: String,
}

impl MachineInfo {
    /// Reads the machine below `root` (normally `/`), with the file system of `root_dir` for ephemeral storage.
    pub fn read(root: &Path, root_dir: &Path) -> Result<Self, MachineError> {
        let text = |path: &str| fs::read_to_string(root.join(path)).map(|text| text.trim().to_owned()).ok();
        let missing = |what| move || MachineError { what, problem: "missing or malformed".to_owned() };
        let meminfo = text("proc/meminfo").ok_or_else(missing("/proc/meminfo"))?;
        let machine_id =
            ["etc/machine-id", "var/lib/dbus/machine-id"].iter().find_map(|path| text(path)).unwrap_or_default();
        let uuid_files = ["sys/class/dmi/id/product_uuid", "proc/device-tree/vm,uuid"];
        let system_uuid =
            uuid_files.iter().find_map(|path| text(path)).map(|uuid| uuid.trim_end_matches('\0').to_owned());
        let cpus = text("sys/devices/system/cpu/online").and_then(|list| count(&list));
        let os = ["etc/os-release", "usr/lib/os-release"].iter().find_map(|path| text(path)).unwrap_or_default();
        let storage = rustix::fs::statvfs(root_dir).ok();
        Ok(Self {
            cpus: cpus.ok_or_else(missing("/sys/devices/system/cpu/online"))?,
            memory: kilobytes(&meminfo, "MemTotal:").ok_or_else(missing("MemTotal in /proc/meminfo"))?,
            swap: kilobytes(&meminfo, "SwapTotal:").unwrap_or(0),
            huge_pages: huge_pages(&root.join("sys/kernel/mm/hugepages")),
            ephemeral_storage: storage.and_then(|fs| i64::try_from(fs.f_blocks.saturating_mul(fs.f_frsize)).ok()),
            system_uuid: system_uuid.unwrap_or_else(|| machine_id.clone()),
            machine_id,
            boot_id: text("proc/sys/kernel/random/boot_id").ok_or_else(missing("/proc/sys/kernel/random/boot_id"))?,
            kernel_version: text("proc/sys/kernel/osrelease").ok_or_else(missing("/proc/sys/kernel/osrelease"))?,
            os_image: pretty_name(&os),
            in_user_namespace: text("proc/self/uid_map")
                .is_some_and(|map| map.split_whitespace().ne(["0", "0", "4294967295"])),
        })
    }
}

/// The number of CPUs in a kernel list such as `0-3,7`.
fn count(list: &str) -> Option<u32> {
    list.split(',').try_fold(0_u32, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// The number of CPUs in a validated list; 0 if it is none.
pub(super) fn count_cpus(list: &str) -> u32 {
    count(list).unwrap_or(0)
}

fn kilobytes(meminfo: &str, key: &str) -> Option<i64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    let number: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

fn huge_pages(directory: &Path) -> BTreeMap<String, i64> {
    let Ok(entries) = fs::read_dir(directory) else { return BTreeMap::new() };
    let pages = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let size: i64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let size = size.checked_mul(1024)?;
        let count: i64 = fs::read_to_string(entry.path().join("nr_hugepages")).ok()?.trim().parse().ok()?;
        Some((format!("hugepages-{}", crate::resources::quantity::from_bytes(size).0), count.checked_mul(size)?))
    };
    entries.flatten().filter_map(pages).collect()
}

fn pretty_name(os_release: &str) -> String {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name = value.unwrap_or("").trim().trim_matches(['"', '\'']);
    if name.is_empty() { "Linux".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_of_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:       16374548 kB\nMemFree: 1 kB\nSwapTotal:       2048 kB\n");
        write("sys/devices/system/cpu/online", "0-2,5\n");
        write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "3\n");
        write("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n");
        write("etc/machine-id", "abc\n");
        write("proc/sys/kernel/random/boot_id", "boot\n");
        write("proc/sys/kernel/osrelease", "6.18.0\n");
        write("proc/self/uid_map", "         0       1000          1\n");
        write("usr/lib/os-release", "NAME=x\nPRETTY_NAME=\"Some Linux 1\"\n");
        let machine = MachineInfo::read(root.path(), root.path()).unwrap();
        assert_eq!((machine.cpus, machine.memory, machine.swap), (4, 16_374_548 * 1024, 2 << 20));
        assert_eq!(machine.huge_pages["hugepages-2Mi"], 6 << 20);
        assert_eq!(machine.huge_pages["hugepages-1Gi"], 0);
        assert_eq!((machine.system_uuid.as_str(), machine.os_image.as_str()), ("abc", "Some Linux 1"));
        assert!(machine.in_user_namespace);
        assert!(machine.ephemeral_storage.unwrap() > 0);
        fs::remove_file(root.path().join("proc/meminfo")).unwrap();
        assert!(MachineInfo::read(root.path(), root.path()).is_err());
    }

    #[test]
    fn this_machine() {
        let machine = MachineInfo::read(Path::new("/"), Path::new("/")).unwrap();
        assert!(machine.cpus > 0 && machine.memory > 1 << 20 && !machine.boot_id.is_empty());
        assert!(!machine.in_user_namespace);
    }
}
