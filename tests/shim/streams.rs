//! Logs, attach, terminals.

use std::fs;
use std::time::{Duration, Instant};

use gantry::runtime::client::{ShimError, ShimEvent};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Pod, read_log};

#[tokio::test]
async fn much_output_is_complete_and_in_order() {
    let mut pod = Pod::new().await;
    let draft = pod.draft("app", "seq 1 300000");
    let began = Instant::now();
    pod.run(&draft).await;
    println!("300000 lines in {:?}", began.elapsed());
    let log = pod.log(&draft);
    assert_eq!(log.len(), 300_000);
    assert!(log.iter().enumerate().all(|(n, line)| *line == format!("stdout:{}", n + 1)));
}

#[tokio::test]
async fn rotation_loses_nothing() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("app", "seq 1 20000");
    draft.request.max_log_size = 300_000;
    draft.request.max_log_files = 50;
    let mut events = pod.shim.events();
    pod.run(&draft).await;
    let dir = draft.request.log_path.parent().expect("directory");
    let mut files: Vec<_> = fs::read_dir(dir).expect("logs").map(|e| e.expect("entry").path()).collect();
    // The current file has the shortest name but the newest records.
    files.sort_by_key(|path| (path == &draft.request.log_path, path.clone()));
    assert!(files.len() > 2, "{files:?}");
    let mut next = 1;
    for file in &files {
        assert!(fs::metadata(file).expect("file").len() <= 300_000, "{file:?}");
        for line in read_log(file) {
            assert_eq!(line, format!("stdout:{next}"), "{file:?}");
            next += 1;
        }
    }
    assert_eq!(next, 20_001);
    let mut told = 0;
    while let Ok(event) = events.try_recv() {
        told += usize::from(matches!(event, ShimEvent::LogRotated { .. }));
    }
    assert_eq!(told, files.len() - 1);
}

#[tokio::test]
async fn rotation_keeps_few_files() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("app", "seq 1 20000");
    draft.request.max_log_size = 100_000;
    draft.request.max_log_files = 3;
    pod.run(&draft).await;
    assert_eq!(fs::read_dir(draft.request.log_path.parent().expect("directory")).expect("logs").count(), 3);
    assert_eq!(pod.log(&draft).last().map(String::as_str), Some("stdout:20000"));
}

#[tokio::test]
async fn attach_copies_output_and_gives_input_once() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("app", "while read line; do echo got $line; echo err $line >&2; done; echo bye");
    draft.request.stdin = true;
    draft.request.stdin_once = true;
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let mut attached = pod.shim.attach(draft.id(), true, true, true).await.expect("attach");
    let mut stdin = attached.stdin.take().expect("stdin");
    stdin.write_all(b"one\ntwo\n").await.expect("write");
    drop(stdin);
    let (mut out, mut err) = (String::new(), String::new());
    attached.stdout.take().expect("stdout").read_to_string(&mut out).await.expect("read");
    attached.stderr.take().expect("stderr").read_to_string(&mut err).await.expect("read");
    assert_eq!((out.as_str(), err.as_str()), ("got one\ngot two\nbye\n", "err one\nerr two\n"));
    assert_eq!(pod.exit_of(draft.id()).await.exit_code, 0);
    assert_eq!(pod.log(&draft).len(), 5, "the log has it as well");
    assert!(matches!(pod.shim.attach(draft.id(), false, true, false).await, Err(ShimError::Conflict(_))));
}

#[tokio::test]
async fn much_input_waits_for_a_slow_reader() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("app", "sleep 1; wc -c");
    draft.request.stdin = true;
    draft.request.stdin_once = true;
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let mut stdin = pod.shim.attach(draft.id(), true, false, false).await.expect("attach").stdin.expect("stdin");
    stdin.write_all(&vec![b'x'; 3_000_000]).await.expect("write");
    drop(stdin);
    pod.exit_of(draft.id()).await;
    assert_eq!(pod.log(&draft), ["stdout:3000000"]);
}

#[tokio::test]
async fn a_slow_client_does_not_hold_up_the_container() {
    let mut pod = Pod::new().await;
    let draft = pod.draft("app", "sleep 0.2; seq 1 600000");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let mut attached = pod.shim.attach(draft.id(), false, true, false).await.expect("attach");
    pod.exit_of(draft.id()).await;
    assert_eq!(pod.log(&draft).len(), 600_000);
    let mut got = Vec::new();
    attached.stdout.take().expect("stdout").read_to_end(&mut got).await.expect("read");
    assert!(got.starts_with(b"1\n2\n") && got.len() < 4_000_000, "{}", got.len());
}

#[tokio::test]
async fn a_terminal_is_logged_resized_and_typed_into() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("app", "read x; stty size; echo typed $x; exit 3");
    draft.request.terminal = true;
    draft.request.stdin = true;
    draft.spec["process"]["terminal"] = json!(true);
    pod.create(&draft).await.expect("create");
    pod.shim.resize(draft.id(), 100, 40).await.expect("resize");
    pod.shim.start(draft.id()).await.expect("start");
    let mut attached = pod.shim.attach(draft.id(), true, true, false).await.expect("attach");
    let mut stdin = attached.stdin.take().expect("stdin");
    stdin.write_all(b"hello\n").await.expect("write");
    let mut out = String::new();
    tokio::time::timeout(Duration::from_secs(10), attached.stdout.take().expect("stdout").read_to_string(&mut out))
        .await
        .expect("in time")
        .expect("read");
    assert!(out.contains("40 100\r\n") && out.contains("typed hello\r\n"), "{out:?}");
    assert_eq!(pod.exit_of(draft.id()).await.exit_code, 3);
    assert!(pod.log(&draft).iter().any(|line| line.starts_with("stdout:typed hello")));
    let plain = pod.draft("plain", "sleep 1000");
    pod.create(&plain).await.expect("create");
    assert!(matches!(pod.shim.resize(plain.id(), 1, 1).await, Err(ShimError::Conflict(_))));
}
