//! Processes run in containers that are there already.

use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use gantry::runtime::client::{ExecStdio, ShimError};
use serde_json::json;

use crate::harness::{Draft, Pod, eventually};

async fn sleeper(pod: &Pod) -> Draft {
    let draft = pod.draft("app", "sleep 1000");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    draft
}

#[tokio::test]
async fn output_exit_code_and_environment() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let (output, code) = pod.exec(&draft, "e1", "env; pwd; echo oops >&2; exit 9").await;
    assert_eq!(code, 9);
    // Without a HOME that somebody guessed.
    assert!(output.contains("ZZZ=1") && !output.contains("HOME="), "{output}");
    assert!(output.contains("oops"), "{output}");
    let exit = pod.shim.exec_state("e1").await.expect("remembered").expect("ended");
    assert_eq!(exit.exit_code, 9);
    assert!(matches!(pod.shim.exec_state("e2").await, Err(ShimError::NotFound(_))));
}

#[tokio::test]
async fn stdin_goes_straight_to_the_process() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let (stdin, mut to_process) = std::io::pipe().expect("pipe");
    let (mut from_process, stdout) = std::io::pipe().expect("pipe");
    let stdio = ExecStdio { stdin: Some(stdin.into()), stdout: Some(stdout.into()), stderr: None };
    let mut handle = pod.shim.exec(pod.exec_request(&draft, "cat", "cat"), stdio).await.expect("exec");
    to_process.write_all(b"through").expect("write");
    drop(to_process);
    let mut text = String::new();
    from_process.read_to_string(&mut text).expect("read");
    assert_eq!((text.as_str(), handle.wait().await.expect("wait").exit_code), ("through", 0));
}

#[tokio::test]
async fn errors_name_what_is_wrong() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let mut request = pod.exec_request(&draft, "e1", "");
    request.process.set_args(Some(vec!["nope".to_owned()]));
    let Err(ShimError::Start(text)) = pod.shim.exec(request, ExecStdio::default()).await else { panic!("started") };
    assert_eq!(text, r#"exec: "nope": executable file not found in $PATH"#);
    let mut request = pod.exec_request(&draft, "e2", "true");
    request.process.set_cwd("/not/there".into());
    let Err(ShimError::Start(text)) = pod.shim.exec(request, ExecStdio::default()).await else { panic!("started") };
    assert!(text.contains("/not/there") && text.contains("no such file or directory"), "{text}");
    let mut request = pod.exec_request(&draft, "long", "");
    request.process.set_args(Some(vec!["\u{1}".repeat(200_000)]));
    let Err(ShimError::Start(text)) = pod.shim.exec(request, ExecStdio::default()).await else { panic!("started") };
    assert!(text.starts_with("exec: \"\\u{1}") && text.len() <= 2048, "{text}");
    let mut request = pod.exec_request(&draft, "e3", "true");
    request.container_id = "f".repeat(64);
    assert!(matches!(pod.shim.exec(request, ExecStdio::default()).await, Err(ShimError::NotFound(_))));
}

#[tokio::test]
async fn a_deadline_kills_the_whole_tree() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let mut request = pod.exec_request(&draft, "slow", "(setsid sleep 555 &); sleep 556");
    request.timeout_ms = Some(400);
    let began = Instant::now();
    let mut handle = pod.shim.exec(request, ExecStdio::default()).await.expect("exec");
    let exit = handle.wait().await.expect("wait");
    assert!(exit.timed_out && exit.exit_code == 137, "{exit:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
    let (left, _) = pod.exec(&draft, "look", "ps").await;
    assert!(!left.contains("sleep 556"), "{left}");
    assert!(left.contains("sleep 1000"), "the container itself goes on: {left}");
}

#[tokio::test]
async fn many_at_once_leave_nothing_behind() {
    let mut pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let mut handles = Vec::new();
    for n in 0..12 {
        let request = pod.exec_request(&draft, &format!("e{n}"), &format!("exit {n}"));
        let shim = pod.shim.clone();
        handles.push(tokio::spawn(async move {
            let mut handle = shim.exec(request, ExecStdio::default()).await.expect("exec");
            handle.wait().await.expect("wait").exit_code
        }));
    }
    for (n, handle) in handles.into_iter().enumerate() {
        assert_eq!(usize::try_from(handle.await.expect("join")).expect("code"), n);
    }
    let mut left: Vec<String> = Vec::new();
    for dir in [
        draft.request.container_dir.join("libcontainer"),
        draft.request.container_dir.join("libcontainer").join(draft.id()),
    ] {
        left.extend(
            fs::read_dir(dir).expect("state").map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()),
        );
    }
    assert!(!left.iter().any(|name| name.starts_with("tenant-") || name.starts_with("exec-")), "{left:?}");
    pod.shim.signal(draft.id(), 9, true).await.expect("kill");
    assert_eq!(pod.exit_of(draft.id()).await.exit_code, 137);
    let request = pod.exec_request(&draft, "late", "true");
    assert!(matches!(pod.shim.exec(request, ExecStdio::default()).await, Err(ShimError::Conflict(_))));
}

#[tokio::test]
async fn failed_execs_do_not_keep_the_container_from_ending() {
    let mut pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    for n in 0..3 {
        let mut request = pod.exec_request(&draft, &format!("bad{n}"), "");
        request.process.set_args(Some(vec!["/nope".to_owned()]));
        assert!(pod.shim.exec(request, ExecStdio::default()).await.is_err());
    }
    pod.shim.signal(draft.id(), 9, false).await.expect("kill");
    assert_eq!(pod.exit_of(draft.id()).await.exit_code, 137);
}

#[tokio::test]
async fn a_terminal_comes_as_a_descriptor() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let mut request = pod.exec_request(&draft, "tty", "");
    request.process = serde_json::from_value(json!({
        "terminal": true, "user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", "read x; stty size; exit 5"],
        "env": ["PATH=/bin"], "cwd": "/",
    }))
    .expect("process");
    let mut handle = pod.shim.exec(request, ExecStdio::default()).await.expect("exec");
    handle.resize(91, 23).expect("resize");
    let mut tty = std::fs::File::from(handle.tty.take().expect("tty"));
    tty.write_all(b"go\n").expect("write");
    assert_eq!(handle.wait().await.expect("wait").exit_code, 5);
    let text = all_of(tty);
    assert!(text.contains("23 91"), "{text:?}");
}

/// As with runc: programs that log to /dev/stdout open it again, also when their user is not root.
#[tokio::test]
async fn streams_and_terminals_belong_to_the_user() {
    const PROBE: &str = "echo out >/dev/stdout; echo err >/dev/stderr; echo all >/proc/self/fd/1";
    const ON_TERMINAL: &str = "echo here >$(readlink /proc/self/fd/0); echo there >/dev/tty; id -u";
    let mut pod = Pod::new().await;
    let user = json!({"uid": 1000, "gid": 1000});
    let mut draft = pod.draft("user", &format!("{PROBE}; sleep 1000"));
    draft.spec["process"]["user"] = user.clone();
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let (exec, code) = pod.exec(&draft, "e", PROBE).await;
    assert_eq!((exec.as_str(), code), ("out\nerr\nall\n", 0));
    let mut request = pod.exec_request(&draft, "tty", ON_TERMINAL);
    request.process.set_terminal(Some(true));
    let mut handle = pod.shim.exec(request, ExecStdio::default()).await.expect("exec");
    let tty = std::fs::File::from(handle.tty.take().expect("tty"));
    assert_eq!(handle.wait().await.expect("wait").exit_code, 0);
    assert_eq!(all_of(tty), "here\r\nthere\r\n1000\r\n");

    let mut on_terminal = pod.draft("terminal", ON_TERMINAL);
    on_terminal.spec["process"]["user"] = user;
    on_terminal.request.terminal = true;
    assert_eq!(pod.run(&on_terminal).await.exit_code, 0);
    assert_eq!(pod.log(&on_terminal), ["stdout:here", "stdout:there", "stdout:1000"]);
    pod.shim.signal(draft.id(), 9, true).await.expect("kill");
    pod.exit_of(draft.id()).await;
    let mut log = pod.log(&draft);
    log.sort(); // streams have no order among each other
    assert_eq!(log, ["stderr:err", "stdout:all", "stdout:out"]);
}

#[tokio::test]
async fn it_is_where_the_container_is() {
    const PROBE: &str =
        "for n in /proc/self/ns/*; do readlink $n; done; cut -d: -f2- /proc/self/cgroup; pwd; ls /proc/self/fd";
    let pod = Pod::new().await;
    let mut draft = pod.draft("app", &format!("{{ {PROBE}; }} >/tmp/new; ln /tmp/new /tmp/init; sleep 1000"));
    draft.spec["process"]["cwd"] = json!("/tmp");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    eventually("the container has written", || draft.rootfs().join("tmp/init").exists());
    let (exec, _) = pod.exec(&draft, "e", &format!("{{ {PROBE}; }} >/tmp/exec; cat /tmp/exec")).await;
    assert!(exec.contains("pid:[") && exec.contains(draft.id()) && exec.contains("/tmp\n"), "{exec}");
    assert_eq!(exec, fs::read_to_string(draft.rootfs().join("tmp/init")).expect("init"));
}

/// On its way in a process is among the container's already, and still the node's root.
#[tokio::test]
async fn nobody_gets_at_a_process_on_its_way_in() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    let cgroup = pod
        .cgroup_dirs()
        .into_iter()
        .map(|dir| dir.join(draft.id()))
        .find(|dir| ["freezer.state", "cgroup.freeze"].iter().any(|file| dir.join(file).exists()) && has_processes(dir))
        .expect("a cgroup that can be frozen");
    let set_frozen = |frozen: bool| match cgroup.join("freezer.state") {
        v1 if v1.exists() => fs::write(v1, if frozen { "FROZEN" } else { "THAWED" }).expect("freezer.state"),
        _ => fs::write(cgroup.join("cgroup.freeze"), if frozen { "1" } else { "0" }).expect("cgroup.freeze"),
    };
    let before = processes(&cgroup);
    set_frozen(true);
    let (shim, request) = (pod.shim.clone(), pod.exec_request(&draft, "stopped", "exit 3"));
    let stopped = tokio::spawn(async move {
        let mut handle = shim.exec(request, ExecStdio::default()).await.expect("exec");
        handle.wait().await.expect("wait").exit_code
    });
    let until = Instant::now() + Duration::from_secs(10);
    let new = loop {
        let new = processes(&cgroup).into_iter().find(|pid| !before.contains(pid));
        if let Some(pid) = new {
            break pid;
        }
        assert!(Instant::now() < until, "no process came");
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    // Frozen as soon as it was in. Stopped, it stays there while others of the container run.
    nix::sys::signal::kill(new, nix::sys::signal::Signal::SIGSTOP).expect("stop");
    set_frozen(false);
    let node = fs::read_link(format!("/proc/{new}/ns/mnt")).expect("namespace");
    assert_eq!(node, fs::read_link("/proc/self/ns/mnt").expect("namespace"), "it has not entered yet");
    const LOOK: &str = "for p in /proc/[0-9]*; do grep -q ^State:.T $p/status && \
         { echo found; ls $p/root/; cat $p/environ; readlink $p/exe; readlink $p/root; readlink $p/fd/0; }; done 2>&1";
    let (seen, _) = pod.exec(&draft, "look", LOOK).await;
    nix::sys::signal::kill(new, nix::sys::signal::Signal::SIGCONT).expect("continue");
    let lines: Vec<&str> = seen.lines().collect();
    assert!(
        matches!(lines[..], ["found", root, environ] if [root, environ].iter().all(|l| l.contains("Permission denied"))),
        "{seen}"
    );
    assert_eq!(stopped.await.expect("join"), 3);
}

fn processes(cgroup: &std::path::Path) -> Vec<nix::unistd::Pid> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).expect("cgroup.procs");
    text.lines().map(|line| nix::unistd::Pid::from_raw(line.parse().expect("pid"))).collect()
}

fn has_processes(cgroup: &std::path::Path) -> bool {
    !processes(cgroup).is_empty()
}

#[tokio::test]
async fn a_terminal_is_no_other_file() {
    let pod = Pod::new().await;
    let draft = sleeper(&pod).await;
    for (name, replace) in [("pipe", "mkfifo /dev/ptmx"), ("null", "ln -s null /dev/ptmx"), ("none", "true")] {
        let (text, code) = pod.exec(&draft, name, &format!("rm -f /dev/ptmx; {replace}")).await;
        assert_eq!(code, 0, "{text}");
        let mut request = pod.exec_request(&draft, "tty", "true");
        request.process.set_terminal(Some(true));
        let Err(ShimError::Create(text)) = pod.shim.exec(request, ExecStdio::default()).await else {
            panic!("{name}: started")
        };
        let expected = if name == "none" { "No such file" } else { "/dev/ptmx is not that of a devpts" };
        assert!(text.contains(expected), "{name}: {text}");
    }
}

fn all_of(mut tty: std::fs::File) -> String {
    let mut text = Vec::new();
    let mut chunk = [0; 256];
    // At its end a terminal says EIO.
    while let Ok(read @ 1..) = tty.read(&mut chunk) {
        text.extend_from_slice(&chunk[..read]);
    }
    String::from_utf8(text).expect("text")
}
