//! A container's cgroup: kill what is in it, count its OOM kills, remove it. Both cgroup versions.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The mounted hierarchies of this node.
#[derive(Debug, Default)]
pub(super) struct Hierarchies {
    mounts: Vec<Mount>,
}

#[derive(Debug)]
struct Mount {
    path: PathBuf,
    /// Mounted options, which name the controllers of a v1 hierarchy; empty on v2.
    controllers: Vec<String>,
}

impl Hierarchies {
    /// From `/proc/self/mountinfo`. On a hybrid node both versions are there, and the same path is looked up in each. In a
    /// container with version 1 each mount shows a part of its hierarchy, and paths are those below that.
    pub(super) fn discover() -> io::Result<Hierarchies> {
        Ok(Hierarchies::parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(mountinfo: &str) -> Hierarchies {
        let mut mounts: Vec<Mount> = Vec::new();
        let mut seen = BTreeSet::new();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let (mut left, mut right) = (left.split(' '), right.split(' '));
            let (Some(kind), Some(options)) = (right.next(), right.nth(1)) else { continue };
            let (Some(device), Some(path)) = (left.nth(2), left.nth(1)) else { continue };
            let controllers = match kind {
                "cgroup2" => Vec::new(),
                "cgroup" => options.split(',').map(str::to_owned).collect(),
                _ => continue,
            };
            // What is mounted later of the same hierarchy is somebody's bind mount.
            if path.starts_with("/sys/fs/cgroup") && seen.insert(device) {
                mounts.push(Mount { path: PathBuf::from(path), controllers });
            }
        }
        Hierarchies { mounts }
    }

    fn dirs(&self, cgroup: &Path) -> impl Iterator<Item = PathBuf> {
        let relative = cgroup.strip_prefix("/").unwrap_or(cgroup).to_owned();
        self.mounts.iter().map(move |mount| mount.path.join(&relative)).filter(|dir| dir.is_dir())
    }

    /// Every process in the cgroup and those below it.
    pub(super) fn processes(&self, cgroup: &Path) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        for dir in self.dirs(cgroup) {
            walk(&dir, &mut |dir| {
                // A threaded v2 cgroup refuses to be read; its processes are listed by its domain.
                let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
            });
        }
        pids
    }

    /// Sends a signal to every process in the cgroup; returns how many there were.
    pub(super) fn signal(&self, cgroup: &Path, signal: Signal) -> usize {
        if signal == Signal::SIGKILL {
            for dir in self.dirs(cgroup) {
                // Kills atomically, but exists only on v2 since kernel 5.14: the loop below covers the rest.
                let _absent = fs::write(dir.join("cgroup.kill"), "1");
            }
        }
        let pids = self.processes(cgroup);
        for pid in &pids {
            let _gone = kill(Pid::from_raw(*pid), signal);
        }
        pids.len()
    }

    /// Removes the cgroup and those below it, deepest first, in every hierarchy. `WouldBlock` while processes
    /// in it are still exiting.
    pub(super) fn remove(&self, cgroup: &Path) -> io::Result<()> {
        let mut failure = Ok(());
        for dir in self.dirs(cgroup) {
            walk(&dir, &mut |dir| match fs::remove_dir(dir) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    failure = Err(io::Error::new(io::ErrorKind::WouldBlock, format!("{}: {error}", dir.display())));
                }
                Err(error) => failure = Err(io::Error::new(error.kind(), format!("{}: {error}", dir.display()))),
            });
        }
        failure
    }

    /// How many of the cgroup's processes the OOM killer has taken so far.
    pub(super) fn oom_kills(&self, cgroup: &Path) -> u64 {
        let relative = cgroup.strip_prefix("/").unwrap_or(cgroup);
        self.mounts
            .iter()
            .filter_map(|mount| {
                let file = if mount.controllers.is_empty() {
                    "memory.events"
                } else if mount.controllers.iter().any(|c| c == "memory") {
                    "memory.oom_control"
                } else {
                    return None;
                };
                counter(&fs::read_to_string(mount.path.join(relative).join(file)).ok()?, "oom_kill")
            })
            .max()
            .unwrap_or(0)
    }

    /// Moves this process into a container's cgroup, in every hierarchy in which it has one; `init` is in it.
    ///
    /// A container on cgroup v2 that made cgroups of its own has no room for processes in its outermost one. Then it is
    /// that of `init`, as with runc.
    pub(super) fn join(&self, cgroup: &Path, init: i32) -> io::Result<()> {
        let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("no cgroup {}", cgroup.display()));
        let mut joined = false;
        for mount in &self.mounts {
            let result = match mount.join(cgroup) {
                Err(error) if mount.controllers.is_empty() && is_occupied(&error) => {
                    own_cgroup(init).and_then(|c| mount.join(&c))
                }
                other => other,
            };
            match result {
                Ok(()) => joined = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => failure = error,
                Err(error) => return Err(error),
            }
        }
        if joined { Ok(()) } else { Err(failure) }
    }

    /// Moves this process into `cgroup` in every hierarchy, which is made if needed.
    pub(super) fn enter(&self, cgroup: &Path) -> io::Result<()> {
        for mount in &self.mounts {
            let dir = mount.path.join(cgroup.strip_prefix("/").unwrap_or(cgroup));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join("cgroup.procs"), "0")?;
        }
        Ok(())
    }
}

impl Mount {
    fn join(&self, cgroup: &Path) -> io::Result<()> {
        let file = self.path.join(cgroup.strip_prefix("/").unwrap_or(cgroup)).join("cgroup.procs");
        // Not `fs::write`: a cgroup that is gone must not become a file.
        let written = fs::OpenOptions::new().write(true).open(&file).and_then(|mut file| file.write_all(b"0"));
        written.map_err(|error| match error.raw_os_error() {
            Some(code @ (libc::EBUSY | libc::EOPNOTSUPP)) => io::Error::from_raw_os_error(code),
            _ => io::Error::new(error.kind(), format!("{}: {error}", file.display())),
        })
    }
}

/// A cgroup with controllers for those below it takes no processes, and a threaded one no whole ones.
fn is_occupied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EOPNOTSUPP))
}

/// Where a process is in the v2 hierarchy.
fn own_cgroup(pid: i32) -> io::Result<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = table.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(PathBuf::from).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "init is in no cgroup of version 2"))
}

/// Whether a path can be one container's cgroup: absolute, not the root, no `..`.
pub(super) fn is_valid_path(cgroup: &Path) -> bool {
    let mut components = cgroup.components();
    components.next() == Some(Component::RootDir)
        && cgroup.file_name().is_some()
        && components.all(|c| matches!(c, Component::Normal(_)))
}

fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Visits a directory's descendants and then itself.
fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    if let Ok(entries) = fs::read_dir(dir) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), visit);
            }
        }
    }
    visit(dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_hybrid_and_unified_mounts() {
        let hierarchies = Hierarchies::parse(
            "30 24 0:26 / /sys/fs/cgroup rw shared:4 - tmpfs tmpfs ro,mode=755\n\
             31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
             34 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             35 30 0:30 /pod /sys/fs/cgroup/bind rw - cgroup cgroup rw,memory\n",
        );
        let paths: Vec<_> = hierarchies.mounts.iter().map(|m| m.path.display().to_string()).collect();
        assert_eq!(paths, ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"]);
        let nested = Hierarchies::parse(
            "31 30 0:29 /pods/node /sys/fs/cgroup/cpu rw master:3 - cgroup cgroup rw,cpu\n\
             34 30 0:30 /pods/node /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        );
        let paths: Vec<_> = nested.mounts.iter().map(|m| m.path.display().to_string()).collect();
        assert_eq!(paths, ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/memory"]);
    }

    #[test]
    fn counts_kills_not_events() {
        assert_eq!(counter("low 0\noom 3\noom_kill 2\noom_group_kill 1\n", "oom_kill"), Some(2));
        assert_eq!(counter("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", "oom_kill"), Some(5));
    }

    #[test]
    fn joins_where_there_is_a_cgroup_and_makes_none() {
        let dir = tempfile::tempdir().unwrap();
        let mount = |name: &str| Mount { path: dir.path().join(name), controllers: vec![name.to_owned()] };
        let hierarchies = Hierarchies { mounts: vec![mount("cpu"), mount("pids"), mount("named")] };
        let refused = hierarchies.join(Path::new("/pod/c"), 1).unwrap_err();
        assert!(refused.kind() == io::ErrorKind::NotFound && refused.to_string().contains("named/pod/c"), "{refused}");
        for name in ["cpu", "pids", "named"] {
            fs::create_dir_all(dir.path().join(name).join("pod")).unwrap();
        }
        for name in ["cpu", "pids"] {
            fs::create_dir(dir.path().join(name).join("pod/c")).unwrap();
            fs::write(dir.path().join(name).join("pod/c/cgroup.procs"), "").unwrap();
        }
        hierarchies.join(Path::new("/pod/c"), 1).unwrap();
        for name in ["cpu", "pids"] {
            assert_eq!(fs::read_to_string(dir.path().join(name).join("pod/c/cgroup.procs")).unwrap(), "0");
        }
        assert!(!dir.path().join("named/pod/c").exists());
    }

    #[test]
    fn only_a_cgroup_of_its_own_is_valid() {
        assert!(is_valid_path(Path::new("/kubepods/pod1/c1")));
        for bad in ["/", "", "kubepods/x", "/kubepods/../..", "/a/.."] {
            assert!(!is_valid_path(Path::new(bad)), "{bad}");
        }
    }
}
