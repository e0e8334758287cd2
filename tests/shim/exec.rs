//! Processes run in containers that are there already.

use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use gantry::runtime::client::{ExecStdio, ShimError};
use serde_json::json;

use crate::harness::{Draft, Pod};

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
    let mut text = Vec::new();
    let mut chunk = [0; 256];
    while let Ok(read @ 1..) = tty.read(&mut chunk) {
        text.extend_from_slice(&chunk[..read]);
    }
    assert!(String::from_utf8_lossy(&text).contains("23 91"), "{text:?}");
}
