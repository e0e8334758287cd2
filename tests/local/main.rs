//! `gantry run` and the commands on the local socket, for real: a node in a network namespace of its own, an image from
//! a registry in it, containers. Needs root and a static busybox.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "a test starts programs, and looks again and again at what they write")]

mod registry;
mod terminal;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use terminal::Terminal;

const GANTRY: &str = env!("CARGO_BIN_EXE_gantry");
const PATIENCE: Duration = Duration::from_secs(60);

/// A place for one node: namespaces of the calling thread, directories, cgroups.
struct Place {
    dir: tempfile::TempDir,
    registry: String,
    cgroup: String,
}

fn tool(args: &[&str]) {
    let status = Command::new("/bin/busybox").args(args).status().expect("busybox");
    assert!(status.success(), "busybox {args:?}");
}

impl Place {
    fn new(name: &str) -> Self {
        Self::with_registry(name, None)
    }

    /// `pause`: between the parts of what the registry sends.
    fn with_registry(name: &str, pause: Option<Duration>) -> Self {
        // of this thread, and so of what it starts: links, rules and mounts end with it
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private");
        tool(&["ip", "link", "set", "lo", "up"]);
        tool(&["ip", "addr", "add", "10.99.0.1/24", "dev", "lo"]);
        let dir = tempfile::Builder::new().prefix("gantry-local-test-").tempdir_in("/tmp").expect("directory");
        let cgroup = format!("/gantry-local-{name}-{}", std::process::id());
        Self { dir, registry: registry::start(pause), cgroup }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn state_dir(&self) -> String {
        format!("--state-dir={}", self.path("run").display())
    }

    /// `gantry run`, to be started.
    fn command(&self, manifest: &Path) -> Command {
        let config = self.path("config.yaml");
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nfailCgroupV1: false\n\
             podLogsDir: {}\n",
            self.path("pods").display()
        );
        fs::write(&config, text).unwrap();
        let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
        let mut command = Command::new(GANTRY);
        command.arg("run").arg(manifest).args([
            self.state_dir(),
            flag("data-dir", &self.path("data")),
            flag("root-dir", &self.path("kubelet")),
            flag("cert-dir", &self.path("pki")),
            flag("config", &config),
            flag("container-logs-dir", &self.path("links")),
            format!("--cgroup-root={}", self.cgroup),
            format!("--insecure-registry={}", self.registry),
            "--node-ip=10.99.0.1".to_owned(),
            "--hostname-override=here".to_owned(),
        ]);
        command
    }

    /// Starts `gantry run`; its output goes to files.
    fn run(&self, manifest: &Path) -> Child {
        self.command(manifest)
            .stdin(Stdio::null())
            .stdout(fs::File::create(self.path("stdout")).unwrap())
            .stderr(fs::File::create(self.path("stderr")).unwrap())
            .spawn()
            .expect("start gantry")
    }

    /// A command on the node's socket.
    fn gantry(&self, args: &[&str]) -> Output {
        let (command, rest) = args.split_first().unwrap();
        Command::new(GANTRY)
            .arg(command)
            .arg(self.state_dir())
            .args(rest)
            .stdin(Stdio::null())
            .output()
            .expect("gantry")
    }

    fn manifest(&self, script: &str) -> PathBuf {
        let path = self.path("pod.yaml");
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  restartPolicy: Never\n  containers:\n  \
             - {{name: main, image: \"{}/busybox:1\", command: [sh, -c, {script:?}]}}\n",
            self.registry
        );
        fs::write(&path, text).unwrap();
        path
    }

    /// What was started with this place's directory among its arguments.
    fn own_processes(&self) -> Vec<i32> {
        let own = self.dir.path().to_string_lossy().into_owned();
        let of = |entry: fs::DirEntry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let arguments = fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&arguments).contains(&own).then_some(pid)
        };
        fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(of).collect()
    }

    fn shown(&self) -> (String, String) {
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        (read("stdout"), read("stderr"))
    }
}

/// A test that fails in the middle leaves nothing either; one that succeeds has looked at what there was before.
impl Drop for Place {
    fn drop(&mut self) {
        let cgroups: Vec<PathBuf> = hierarchies().iter().map(|root| root.join(&self.cgroup[1..])).collect();
        if std::thread::panicking() {
            // the node and its shims first, or they would go on
            self.own_processes().into_iter().for_each(end);
            cgroups.iter().for_each(|path| end_members(path));
            std::thread::sleep(Duration::from_millis(500));
        }
        cgroups.iter().for_each(|path| remove_cgroups(path));
    }
}

fn end(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

fn end_members(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            end_members(&entry.path());
        }
    }
    let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    members.lines().filter_map(|line| line.parse().ok()).for_each(end);
}

/// Every writable cgroup hierarchy: that of version 2, or those of the controllers.
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return vec![root];
    }
    let entries = fs::read_dir(&root).expect("cgroups").flatten();
    // links are second names
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn remove_cgroups(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    // one that still has processes shows in the assertions
    let _ = fs::remove_dir(path);
}

fn wait(child: &mut Child) -> i32 {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().expect("exited");
        }
        if began.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("gantry run does not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn until(what: &str, place: &Place, child: &mut Child, done: impl FnMut() -> bool) {
    await_or(what, child, done, || format!("{:?}", place.shown()));
}

fn await_or(what: &str, child: &mut Child, mut done: impl FnMut() -> bool, shown: impl Fn() -> String) {
    let began = Instant::now();
    while !done() {
        if began.elapsed() > PATIENCE || child.try_wait().unwrap().is_some() {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{what}: {}", shown());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_pod_that_ends_gives_its_logs_and_its_exit_code_and_leaves_nothing() {
    let place = Place::new("ends");
    let mut child = place.run(&place.manifest("echo hello; exit 3"));
    assert_eq!(wait(&mut child), 1, "{:?}", place.shown());
    let (stdout, stderr) = place.shown();
    assert_eq!(stdout, "main | hello\n", "{stderr}");
    for words in
        ["pulling ", "pod default/web has address 10.88.", "pod default/web failed: container main Error, exit code 3"]
    {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    assert_eq!(fs::read_dir(place.path("run/pods")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(place.path("pods")).unwrap().count(), 0, "logs");
    // the image is there, the exit code is the Pod's
    let mut child = place.run(&place.manifest("echo again"));
    assert_eq!(wait(&mut child), 0, "{:?}", place.shown());
    let (stdout, stderr) = place.shown();
    assert!(stdout == "main | again\n" && !stderr.contains("pulling "), "{stdout} {stderr}");
}

#[test]
fn the_other_commands_see_the_pod_and_an_interrupt_ends_it_with_grace() {
    let place = Place::new("serves");
    let refused = place.gantry(&["ps"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("run/gantry.sock") && text.contains("--state-dir"), "{text}");
    let mut child = place.run(&place.manifest("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"));
    until("the Pod runs", &place, &mut child, || place.shown().0.contains("main | up\n"));

    let text = |args: &[&str]| {
        let output = place.gantry(args);
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, ps, error) = text(&["ps"]);
    let row: Vec<_> = ps.lines().nth(1).unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    assert_eq!(
        (code, &row[..5]),
        (Some(0), &["default", "web", "1/1", "Running", "0"].map(str::to_owned)[..]),
        "{ps} {error}"
    );
    assert_eq!(text(&["logs", "web"]), (Some(0), "up\n".to_owned(), String::new()));
    assert_eq!(text(&["logs", "web", "-c", "other"]).0, Some(1));
    let (code, out, error) = text(&["exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((code, out.as_str(), error.as_str()), (Some(7), "out\n", "err\n"));
    let (_, images, _) = text(&["images"]);
    assert!(images.contains(&format!("{}/busybox:1", place.registry)), "{images}");
    let in_use = text(&["images", "--rm", &format!("{}/busybox:1", place.registry)]);
    assert_eq!(in_use.0, Some(1), "{in_use:?}");
    assert!(text(&["rm", "none"]).2.contains("gantry ps"));

    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(wait(&mut child), 130, "{:?}", place.shown());
    let (stdout, stderr) = place.shown();
    assert_eq!(stdout, "main | up\nmain | bye\n", "{stderr}");
    assert!(!place.path("run/gantry.sock").exists());
    assert_eq!(fs::read_dir(place.path("run/pods")).unwrap().count(), 0);
}

#[test]
fn a_second_run_uses_the_first_ones_node_and_a_second_interrupt_kills() {
    let place = Place::new("kills");
    let mut child = place.run(&place.manifest("trap 'echo no' TERM; echo up; while :; do sleep 0.1; done"));
    until("the Pod runs", &place, &mut child, || place.shown().0.contains("main | up\n"));
    let other = fs::read_to_string(place.path("pod.yaml")).unwrap().replace("name: web", "name: other");
    let path = place.path("other.yaml");
    fs::write(&path, other).unwrap();
    let taken = place.gantry(&["run", "-d", &place.path("pod.yaml").display().to_string()]);
    assert!(String::from_utf8_lossy(&taken.stderr).contains("default/web is on this node already"), "{taken:?}");
    let detached = place.gantry(&["run", "-d", &path.display().to_string()]);
    assert!(detached.status.success(), "{detached:?}");
    let began = Instant::now();
    let removed = place.gantry(&["rm", "--grace-period=0", "other"]);
    assert!(removed.status.success() && began.elapsed() < Duration::from_secs(10), "{removed:?}");
    assert!(!String::from_utf8_lossy(&place.gantry(&["ps"]).stdout).contains("other"));

    let pid = Pid::from_raw(child.id().cast_signed());
    kill(pid, Signal::SIGINT).unwrap();
    until("the Pod refuses to end", &place, &mut child, || place.shown().0.contains("main | no\n"));
    let began = Instant::now();
    kill(pid, Signal::SIGINT).unwrap();
    assert_eq!(wait(&mut child), 130, "{:?}", place.shown());
    assert!(began.elapsed() < Duration::from_secs(10), "its grace is 30 s");
}

#[test]
fn on_a_terminal_there_are_bars_and_colours_and_ctrl_c_ends_it_with_grace() {
    let place = Place::with_registry("terminal", Some(Duration::from_millis(50)));
    let manifest = place.manifest("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done");
    let (mut terminal, mut child) = Terminal::start(&place.command(&manifest));
    let prefix = "\x1b[36mmain |\x1b[0m ";
    let up = format!("{prefix}up\r\n");
    await_or("the Pod runs", &mut child, || terminal.shown().contains(&up), || terminal.shown());
    let shown = terminal.shown();
    // the bar is drawn again and again, with more and more bytes
    let bars: Vec<_> = shown.match_indices(&format!("{}/busybox:1 █", place.registry)).map(|(at, _)| at).collect();
    let drawn = |at: &usize| shown[*at..].split_once(' ').unwrap().1.trim_start_matches(['█', '░', ' ']);
    let sizes: BTreeSet<_> = bars.iter().filter_map(|at| drawn(at).split_once('/').map(|(bytes, _)| bytes)).collect();
    assert!(sizes.len() > 3 && shown.contains("0/1 layers"), "{sizes:?} {shown:?}");
    let address = shown.find("pod default/web has address 10.88.").unwrap_or_else(|| panic!("{shown:?}"));
    let output = shown.find(&up).unwrap();
    assert!(bars.iter().all(|bar| *bar < output) && address < output, "a bar stays: {shown:?}");

    terminal.press(b"\x03");
    assert_eq!(wait(&mut child), 130, "{:?}", terminal.shown());
    assert!(terminal.shown().contains(&format!("{prefix}bye\r\n")), "{:?}", terminal.shown());
    assert_eq!(fs::read_dir(place.path("run/pods")).unwrap().count(), 0);
}

#[test]
fn a_wrong_manifest_names_file_field_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pod.yaml");
    let container = |field: &str| {
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {{containers: [{{name: c, {field}}}]}}\n")
    };
    let refused = |path: &Path| {
        let output = Command::new(GANTRY).arg("run").arg(path).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for (manifest, words) in [
        (container("imag: x"), "spec.containers[0].imag: unknown field: correct its spelling or remove it"),
        (container("image: 5"), "spec.containers[0].image: invalid type"),
        (container("image: i, env: [{name: A, valueFrom: {configMapKeyRef: {name: m, key: k}}}]"), "plain values"),
        ("apiVersion: apps/v1\nkind: Deployment\n".to_owned(), "write apiVersion: v1 and kind: Pod"),
        ("a: b: c\n".to_owned(), "couldn't parse as pod"),
    ] {
        fs::write(&path, &manifest).unwrap();
        let text = refused(&path);
        assert!(text.contains("pod.yaml: ") && text.contains(words), "{manifest}{text}");
    }
    let text = refused(&dir.path().join("none.yaml"));
    assert!(text.contains("none.yaml") && text.contains("No such file"), "{text}");
}

#[test]
fn an_image_that_cannot_be_had_is_named() {
    let place = Place::new("no-image");
    let manifest = place.manifest("true");
    let text = fs::read_to_string(&manifest).unwrap().replace("/busybox:1", "/no/such:7");
    fs::write(&manifest, text).unwrap();
    let mut child = place.run(&manifest);
    let image = format!("{}/no/such:7", place.registry);
    until("the reason is shown", &place, &mut child, || {
        let (_, stderr) = place.shown();
        stderr.lines().any(|line| line.starts_with("container main: ErrImagePull: ") && line.contains(&image))
    });
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(wait(&mut child), 143, "{:?}", place.shown());
}
