//! The bugs of libcontainer that `src/shim` works around, shown on the library itself. A failure here is good
//! news: upstream has mended something, and the work-around that it names (and its entry in `docs/upstream.md`) can
//! go. Needs root and a static busybox (Debian: busybox-static).
#![allow(clippy::disallowed_methods, reason = "tests run tools and wait as they like")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, setgroups};
use serde_json::{Value, json};

type Facts = BTreeMap<String, String>;

/// One bug: what it is, the fact that shows it, what that fact contains while the bug is there, and what can go
/// when it does not any more.
const BUGS: [(&str, &str, &str, &str); 10] = [
    // (11 & 15) == 9 is false, and yet the rule that refuses 9 refuses 11.
    ("SCMP_CMP_MASKED_EQ has its operands swapped", "masked_equal_11", "EPERM", "src/shim/creator/seccomp.rs: compile"),
    ("an exec has no seccomp filter", "exec_seccomp", "Seccomp:\t0", "src/shim/creator/tenant.rs: enter"),
    (
        "seccomp with an explicit noNewPrivileges: false fails",
        "explicit_no_new_privileges",
        "failed to load seccomp context",
        "src/shim/creator/spec.rs: set_no_new_privileges(None)",
    ),
    ("an exec leaves its socket", "left_behind", "tenant-notify-", "src/shim/creator/tenant.rs"),
    ("an exec does not join the user namespace", "exec_uid_map", "0 0 4294967295", "src/shim/creator/tenant.rs: enter"),
    ("propagation of a mount is ignored", "private_mount", "master:", "src/shim/creator/mounts.rs"),
    ("SIGPIPE stays ignored", "init_signals", "1000", "src/sys/confine.rs: reset_signals"),
    ("groups of the caller are inherited", "init_groups", "4242", "src/shim/daemon.rs: setgroups"),
    (
        "the caller's own oom_score_adj is changed",
        "own_oom_score_adj",
        "300",
        "nothing: creators are short-lived for other reasons as well",
    ),
    ("a missing cwd is an error", "missing_cwd", "ExecError", "src/shim/creator/mod.rs: make_cwd_on_node"),
];

/// No test harness: it runs tests on threads, and libcontainer must be called from a process with one.
fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    assert_eq!(fs::read_dir("/proc/self/task").expect("task").count(), 1, "libcontainer needs a single thread");
    let facts = probe();
    let mut code = ExitCode::SUCCESS;
    for (bug, fact, sign, work_around) in BUGS {
        let got = facts.get(fact).map_or("nothing", String::as_str);
        if got.contains(sign) {
            println!("still there: {bug}");
        } else {
            println!("MENDED: {bug}: {fact} is {got:?}, not {sign:?}. This can go: {work_around}");
            code = ExitCode::FAILURE;
        }
    }
    code
}

fn probe() -> Facts {
    let scene = Scene::new();
    setgroups(&[Gid::from_raw(4242)]).expect("setgroups");
    let mut facts = Facts::new();
    scene.first(&mut facts);
    scene.user_namespace(&mut facts);
    scene.refused(&mut facts);
    drop(scene);
    masked_equal(&mut facts);
    facts
}

/// Loads a filter into this process: last.
fn masked_equal(facts: &mut Facts) {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 1, "value": 15, "valueTwo": 9, "op": "SCMP_CMP_MASKED_EQ"}]}],
    });
    libcontainer::seccomp::initialize_seccomp(&serde_json::from_value(profile).expect("profile")).expect("load");
    // No process has this pid (the largest possible is 2^22), so what is not refused is ESRCH.
    let result = kill(Pid::from_raw(1 << 24), Signal::try_from(11).expect("signal"));
    facts.insert("masked_equal_11".into(), format!("{result:?}"));
}

struct Scene {
    dir: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::Builder::new().prefix("gantry-upstream-test-").tempdir_in("/tmp").expect("directory");
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
        fs::create_dir(dir.path().join("state")).expect("state");
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).expect("volume");
        mount(Some("tmpfs"), &volume, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("tmpfs");
        mount(None::<&str>, &volume, None::<&str>, MsFlags::MS_SHARED, None::<&str>).expect("shared");
        Scene { dir, cgroup: PathBuf::from(format!("/gantry-upstream-{}", std::process::id())) }
    }

    fn bundle(&self, name: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let bundle = self.dir.path().join(name);
        for dir in ["bin", "proc", "dev", "v"] {
            fs::create_dir_all(bundle.join("rootfs").join(dir)).expect("rootfs");
        }
        fs::copy("/bin/busybox", bundle.join("rootfs/bin/busybox")).expect("install busybox-static");
        for applet in ["sh", "cat", "grep", "sleep", "echo"] {
            symlink("busybox", bundle.join("rootfs/bin").join(applet)).expect("applet");
        }
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin", "HOME=/"], "oomScoreAdj": 300,
                "args": ["/bin/sh", "-c", "cat /proc/self/status /proc/self/mountinfo; echo END; sleep 1000"],
            },
            "root": {"path": bundle.join("rootfs")},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            ],
            "linux": {
                "cgroupsPath": self.cgroup.join(name),
                "resources": {},
                "namespaces": [{"type": "pid"}, {"type": "mount"}],
            },
        });
        change(&mut spec);
        fs::write(bundle.join("config.json"), spec.to_string()).expect("config.json");
        bundle
    }

    fn builder(&self, name: &str) -> ContainerBuilder {
        ContainerBuilder::new(name.to_owned(), SyscallType::default())
            .with_root_path(self.dir.path().join("state"))
            .expect("root path")
    }

    /// Creates, starts and reads what init prints.
    fn run(&self, name: &str, bundle: &Path) -> (libcontainer::container::Container, String) {
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let mut container =
            self.builder(name).with_stdout(writer).as_init(bundle).with_systemd(false).build().expect("create");
        container.start().expect("start");
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        while !text.ends_with(b"END\n") {
            let read = reader.read(&mut chunk).expect("read");
            assert!(read > 0, "{}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&chunk[..read]);
        }
        (container, String::from_utf8_lossy(&text).into_owned())
    }

    fn exec(&self, name: &str, args: Value) -> String {
        let file = self.dir.path().join(format!("{name}-process.json"));
        let process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin", "HOME=/"], "args": args});
        fs::write(&file, process.to_string()).expect("process.json");
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let built =
            self.builder(name).with_stdout(writer).as_tenant().with_process(Some(file)).with_detach(true).build();
        built.expect("exec");
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        text
    }

    fn first(&self, facts: &mut Facts) {
        let volume = self.dir.path().join("volume");
        let bundle = self.bundle("first", |spec| {
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]});
            let bind = json!({"destination": "/v", "type": "bind", "source": volume, "options": ["rbind", "rprivate"]});
            spec["mounts"].as_array_mut().expect("mounts").push(bind);
        });
        let (container, text) = self.run("first", &bundle);
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        facts.insert("init_seccomp".into(), line("Seccomp:"));
        facts.insert("init_signals".into(), line("SigIgn:"));
        facts.insert("init_groups".into(), line("Groups:"));
        let private = text.lines().find(|line| line.contains(" /v ")).unwrap_or_default();
        facts.insert("private_mount".into(), private.to_owned());
        facts.insert("own_oom_score_adj".into(), fs::read_to_string("/proc/self/oom_score_adj").expect("score"));
        facts.insert("exec_seccomp".into(), self.exec("first", json!(["/bin/grep", "Seccomp:", "/proc/self/status"])));
        let left: Vec<String> = fs::read_dir(self.dir.path().join("state/first"))
            .expect("state")
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .collect();
        facts.insert("left_behind".into(), left.join(" "));
        end(container);
    }

    fn user_namespace(&self, facts: &mut Facts) {
        let bundle = self.bundle("users", |spec| {
            spec["linux"]["namespaces"].as_array_mut().expect("list").push(json!({"type": "user"}));
            let mapping = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
            spec["linux"]["uidMappings"] = mapping.clone();
            spec["linux"]["gidMappings"] = mapping;
        });
        let (container, _) = self.run("users", &bundle);
        let map = self.exec("users", json!(["/bin/cat", "/proc/self/uid_map"]));
        facts.insert("exec_uid_map".into(), map.split_whitespace().collect::<Vec<_>>().join(" "));
        end(container);
    }

    fn refused(&self, facts: &mut Facts) {
        let bundle = self.bundle("cwd", |spec| spec["process"]["cwd"] = json!("/not/there"));
        let error = self.builder("cwd").as_init(bundle).with_systemd(false).build().err();
        facts.insert("missing_cwd".into(), format!("{error:?}"));
        let bundle = self.bundle("nnp", |spec| {
            spec["process"]["noNewPrivileges"] = json!(false);
            spec["process"]["capabilities"] = json!({"bounding": [], "effective": [], "permitted": []});
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]});
        });
        let error = self.builder("nnp").as_init(bundle).with_systemd(false).build().err();
        facts.insert("explicit_no_new_privileges".into(), format!("{error:?}"));
    }
}

fn end(mut container: libcontainer::container::Container) {
    let pid = Pid::from_raw(container.pid().expect("pid").as_raw());
    kill(pid, Signal::SIGKILL).expect("kill");
    while nix::sys::wait::waitpid(None, None).is_ok() {}
    container.delete(true).expect("delete");
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = umount2(&self.dir.path().join("volume"), MntFlags::MNT_DETACH);
        while nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)).is_ok_and(|s| s.pid().is_some())
        {
        }
        let relative = self.cgroup.strip_prefix("/").expect("absolute");
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let dir = hierarchy.path().join(relative);
            for child in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(child.path());
            }
            let _ = fs::remove_dir(dir);
        }
    }
}
