//! A Pod directory with a shim, containers made of busybox, and a cgroup of their own; all gone afterwards.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use gantry::runtime::client::{
    ContainerRecord, CreateRequest, ExecRequest, ExecStdio, ExitRecord, Shim, ShimEvent, ShimLauncher, ShimOptions,
};
use gantry::shim::bundle::{CapabilitySets, Setup};
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// containerd's default capabilities.
pub const DEFAULT_CAPS: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

pub fn caps(names: &[&str]) -> CapabilitySets {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    CapabilitySets { bounding: names.clone(), effective: names.clone(), permitted: names, ..Default::default() }
}

pub struct Pod {
    pub dir: tempfile::TempDir,
    pub shim: Shim,
    pub events: Receiver<ShimEvent>,
    pub cgroup: PathBuf,
}

/// A container to be: change what the test is about, then `create`.
pub struct Draft {
    pub request: CreateRequest,
    pub spec: Value,
    pub setup: Setup,
}

pub fn launcher() -> ShimLauncher {
    ShimLauncher::from_binary(Path::new(env!("CARGO_BIN_EXE_gantry"))).expect("launcher")
}

impl Pod {
    pub async fn new() -> Pod {
        Pod::from(&launcher()).await
    }

    pub async fn from(launcher: &ShimLauncher) -> Pod {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::Builder::new().prefix("gantry-shim-test-").tempdir_in("/tmp").expect("pod directory");
        fs::create_dir(dir.path().join("containers")).expect("containers");
        let shim = launcher.launch(dir.path(), &ShimOptions::default()).await.expect("launch");
        let events = shim.events();
        let cgroup = PathBuf::from(format!("/gantry-test-{}-{number}", std::process::id()));
        Pod { dir, shim, events, cgroup }
    }

    /// A container that runs `/bin/sh -c script`.
    pub fn draft(&self, name: &str, script: &str) -> Draft {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let container_dir = self.dir.path().join("containers").join(format!("{name}-{number}"));
        make_rootfs(&container_dir.join("rootfs"));
        let id = format!("{:064x}", (u128::from(std::process::id()) << 32) + u128::from(number));
        let request = CreateRequest {
            container_id: id.clone(),
            name: name.to_owned(),
            cgroup_path: self.cgroup.join(&id),
            log_path: self.dir.path().join("logs").join(name).join("0.log"),
            max_log_size: 0,
            max_log_files: 5,
            container_dir,
            ..Default::default()
        };
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/usr/bin:/bin", "ZZZ=1", "AAA=2"],
                "cwd": "/",
            },
            "root": {"path": "rootfs", "readonly": false},
            "hostname": "box",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            ],
            "linux": {
                "resources": {},
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
            },
        });
        Draft { request, spec, setup: Setup { capabilities: caps(&DEFAULT_CAPS), ..Default::default() } }
    }

    pub async fn create(&self, draft: &Draft) -> Result<i32, gantry::runtime::client::ShimError> {
        draft.save();
        self.shim.create(draft.request.clone()).await.map(|created| created.pid)
    }

    pub async fn run(&mut self, draft: &Draft) -> ExitRecord {
        self.create(draft).await.expect("create");
        self.shim.start(&draft.request.container_id).await.expect("start");
        self.exit_of(&draft.request.container_id).await
    }

    /// Waits for a container's end.
    pub async fn exit_of(&mut self, id: &str) -> ExitRecord {
        tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                let known = self.record(id).await;
                if let Some(exit) = known.exit {
                    return exit;
                }
                match self.events.recv().await.expect("event") {
                    ShimEvent::Exited(record) if record.request.container_id == id => {
                        return record.exit.expect("exit");
                    }
                    ShimEvent::Disconnected => panic!("the shim is gone"),
                    _ => {}
                }
            }
        })
        .await
        .expect("container ends in time")
    }

    pub async fn record(&self, id: &str) -> ContainerRecord {
        let records = self.shim.state().await.expect("state");
        records.into_iter().find(|r| r.request.container_id == id).expect("container is known")
    }

    /// The texts of a container's log, stream by stream as `stdout:text`.
    pub fn log(&self, draft: &Draft) -> Vec<String> {
        read_log(&draft.request.log_path)
    }

    /// Runs a script in a container; its output and exit code.
    pub async fn exec(&self, draft: &Draft, exec_id: &str, script: &str) -> (String, i32) {
        self.exec_args(draft, exec_id, &["/bin/sh", "-c", script]).await
    }

    /// Runs a program in a container; its output and exit code.
    pub async fn exec_args(&self, draft: &Draft, exec_id: &str, args: &[&str]) -> (String, i32) {
        let mut request = self.exec_request(draft, exec_id, "");
        request.process.set_args(Some(args.iter().map(|arg| (*arg).to_owned()).collect()));
        request.timeout_ms = Some(10_000);
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let stdio = ExecStdio {
            stdin: None,
            stdout: Some(writer.try_clone().expect("dup").into()),
            stderr: Some(writer.into()),
        };
        let mut handle = self.shim.exec(request, stdio).await.expect("exec");
        let exit = handle.wait().await.expect("wait");
        let mut output = String::new();
        std::io::Read::read_to_string(&mut reader, &mut output).expect("read");
        (output, exit.exit_code)
    }

    pub fn exec_request(&self, draft: &Draft, exec_id: &str, script: &str) -> ExecRequest {
        let mut process = draft.spec["process"].clone();
        process["args"] = json!(["/bin/sh", "-c", script]);
        ExecRequest {
            container_id: draft.request.container_id.clone(),
            exec_id: exec_id.to_owned(),
            process: serde_json::from_value(process).expect("process"),
            stdin: false,
            stdout: false,
            stderr: false,
            timeout_ms: None,
        }
    }

    /// Every directory of this Pod's cgroups.
    pub fn cgroup_dirs(&self) -> Vec<PathBuf> {
        let relative = self.cgroup.strip_prefix("/").expect("absolute");
        let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
        roots.extend(
            fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()),
        );
        roots.into_iter().map(|root| root.join(relative)).filter(|dir| dir.is_dir()).collect()
    }
}

impl Draft {
    pub fn id(&self) -> &str {
        &self.request.container_id
    }

    pub fn save(&self) {
        fs::write(self.request.container_dir.join("config.json"), self.spec.to_string()).expect("config.json");
        let setup = serde_json::to_vec(&self.setup).expect("setup");
        fs::write(self.request.container_dir.join("setup.json"), setup).expect("setup.json");
    }

    pub fn rootfs(&self) -> PathBuf {
        self.request.container_dir.join("rootfs")
    }
}

pub fn read_log(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).expect("log");
    text.lines()
        .map(|line| {
            let mut fields = line.splitn(4, ' ');
            fields.next().expect("time").parse::<jiff::Timestamp>().expect("RFC 3339");
            let (stream, tag) = (fields.next().expect("stream"), fields.next().expect("tag"));
            assert!(tag == "F" || tag == "P", "{line}");
            format!("{stream}:{}", fields.next().expect("text"))
        })
        .collect()
}

fn make_rootfs(rootfs: &Path) {
    for dir in ["bin", "proc", "dev", "tmp", "etc", "root", "sys"] {
        fs::create_dir_all(rootfs.join(dir)).expect("rootfs");
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("install busybox-static");
    for applet in [
        "sh", "cat", "echo", "sleep", "true", "false", "id", "env", "ls", "grep", "mkdir", "mount", "kill", "tail",
        "head", "touch", "pwd", "stty", "tr", "seq", "yes", "unshare", "ps", "wc", "ln", "sed", "umount", "setsid",
        "rm", "readlink", "cut", "mkfifo",
    ] {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("applet");
    }
}

/// Waits until something is so.
pub fn eventually(what: &str, check: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for dir in self.cgroup_dirs() {
            clear(&dir);
        }
        // Whoever holds the lock is this Pod's shim.
        let mine = self.dir.path().to_string_lossy().into_owned();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let cmdline = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            if cmdline.contains("--pod-dir") && cmdline.contains(&mine) {
                let _ = Command::new("kill").args(["-9", &entry.file_name().to_string_lossy()]).status();
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points: Vec<&str> =
            mounts.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&mine)).collect();
        points.reverse();
        for point in points {
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.dir.path().join("shim.log")).unwrap_or_default());
        }
    }
}

fn clear(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        clear(&entry.path());
    }
    for _ in 0..200 {
        for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
        if fs::remove_dir(dir).is_ok() || !dir.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
