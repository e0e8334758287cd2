//! The agent goes away, the shim goes away, the kernel takes processes away.

use std::fs;
use std::process::Command;
use std::time::Duration;

use gantry::runtime::client::{ExecStdio, Shim, ShimError, ShimEvent, ShimOptions, read_records};
use serde_json::json;

use crate::harness::{Pod, eventually, launcher};

#[tokio::test]
async fn an_agents_restart_changes_nothing() {
    let mut pod = Pod::new().await;
    let draft = pod.draft("app", "sleep 0.5; echo still here; exit 6");
    let pid = pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    // All clones: the connection ends.
    let placeholder = Shim::connect(pod.dir.path()).await.expect("second connection");
    drop(std::mem::replace(&mut pod.shim, placeholder.clone()));
    pod.events = placeholder.events();
    assert_eq!(pod.record(draft.id()).await.pid, Some(pid));
    assert_eq!(pod.exit_of(draft.id()).await.exit_code, 6);
    assert_eq!(pod.log(&draft), ["stdout:still here"]);
}

#[tokio::test]
async fn an_exit_that_nobody_hears_is_on_disk() {
    let pod = Pod::new().await;
    let draft = pod.draft("app", "exit 4");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let exit_file = draft.request.container_dir.join("exit.json");
    eventually("exit.json", || exit_file.exists());
    let records = read_records(pod.dir.path()).expect("records");
    assert_eq!(records[0].exit.as_ref().map(|e| e.exit_code), Some(4));
}

#[tokio::test]
async fn a_lost_shim_leaves_lost_containers() {
    let mut pod = Pod::new().await;
    let (ended, running) = (pod.draft("ended", "exit 1"), pod.draft("running", "sleep 1000"));
    pod.run(&ended).await;
    let pid = pod.create(&running).await.expect("create");
    pod.shim.start(running.id()).await.expect("start");
    let shim = pod.shim.hello().await.expect("hello").pid;
    assert!(Command::new("kill").args(["-9", &shim.to_string()]).status().expect("kill").success());
    loop {
        if pod.events.recv().await.expect("event") == ShimEvent::Disconnected {
            break;
        }
    }
    assert!(matches!(pod.shim.state().await, Err(ShimError::Disconnected)));
    let records = read_records(pod.dir.path()).expect("records");
    let left = records.iter().find(|r| r.request.name == "running").expect("record");
    assert!(left.is_alive() && left.pid == Some(pid));

    pod.shim = launcher().launch(pod.dir.path(), &ShimOptions::default()).await.expect("a new shim");
    pod.events = pod.shim.events();
    let exit = pod.record(running.id()).await.exit.expect("recorded");
    assert!(exit.lost && exit.exit_code == 137, "{exit:?}");
    assert_eq!(pod.record(ended.id()).await.exit.expect("kept").exit_code, 1);
    eventually("the process is gone", || !left.is_alive());
    pod.shim.remove(running.id()).await.expect("remove");
}

#[tokio::test]
async fn an_oom_kill_is_told_from_others() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("hungry", "tail /dev/zero");
    draft.spec["linux"]["resources"] = json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}});
    draft.spec["linux"]["devices"] = json!([]);
    let exit = pod.run(&draft).await;
    assert!(exit.oom_killed && exit.exit_code == 137, "{exit:?}; {:?}", pod.log(&draft));
}

#[tokio::test]
async fn an_unwritten_start_deadline_kills_a_stuck_creator() {
    let pod = Pod::new().await;
    let mut draft = pod.draft("stuck", "true");
    // A hook that does not end keeps libcontainer, and so the creator, waiting.
    draft.spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "777"]}]});
    draft.request.timeout_ms = Some(700);
    assert!(matches!(pod.create(&draft).await, Err(ShimError::Timeout(_))));
    assert!(pod.shim.state().await.expect("state").is_empty());
    draft.spec["hooks"] = json!({});
    draft.request.timeout_ms = None;
    pod.create(&draft).await.expect("the same again");
    eventually("the hook is dead", || {
        let ps = Command::new("ps").args(["-eo", "args"]).output().expect("ps");
        !String::from_utf8_lossy(&ps.stdout).lines().any(|line| line == "sleep 777")
    });
}

#[tokio::test]
async fn containers_can_share_a_pid_namespace() {
    let mut pod = Pod::new().await;
    let path = pod.shim.pid_namespace().await.expect("pid namespace");
    assert_eq!(pod.shim.pid_namespace().await.expect("again"), path);
    let mut drafts = [pod.draft("one", "(sleep 4321 &); sleep 1234"), pod.draft("two", "sleep 5678")];
    for draft in &mut drafts {
        draft.spec["linux"]["namespaces"][0]["path"] = json!(path);
        pod.create(draft).await.expect("create");
        pod.shim.start(draft.id()).await.expect("start");
    }
    let (ps, _) = pod.exec(&drafts[1], "ps", "ps").await;
    assert!(["sleep 4321", "sleep 1234", "sleep 5678"].iter().all(|p| ps.contains(p)), "{ps}");
    // The init has nothing to take: another user, an empty root, no capabilities.
    let (init, _) =
        pod.exec(&drafts[1], "init", "grep -E '^(Name|Uid|CapPrm|CapBnd)' /proc/1/status; ls /proc/1/root/ 2>&1").await;
    assert!(init.contains("pause") && init.contains("65535"), "{init}");
    assert_eq!(init.matches("0000000000000000").count(), 2, "{init}");

    pod.shim.signal(drafts[0].id(), 9, false).await.expect("kill");
    pod.exit_of(drafts[0].id()).await;
    let (ps, _) = pod.exec(&drafts[1], "ps2", "sleep 0.2; ps").await;
    assert!(!ps.contains("sleep 4321") && ps.contains("sleep 5678"), "{ps}");
    pod.shim.shutdown(true).await.expect("shutdown");
    assert!(!path.exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!mounts.contains(&*path.to_string_lossy()));
}

#[tokio::test]
async fn a_forced_shutdown_records_exits() {
    let pod = Pod::new().await;
    let draft = pod.draft("app", "sleep 1000");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let _running =
        pod.shim.exec(pod.exec_request(&draft, "e", "sleep 1000"), ExecStdio::default()).await.expect("exec");
    tokio::time::timeout(Duration::from_secs(5), pod.shim.shutdown(true)).await.expect("in time").expect("shutdown");
    assert_eq!(read_records(pod.dir.path()).expect("records")[0].exit.as_ref().map(|e| e.exit_code), Some(137));
}

#[tokio::test]
async fn an_old_shim_answers_what_it_does_not_know() {
    use std::io::{Read, Write};
    let pod = Pod::new().await;
    let mut stream = std::os::unix::net::UnixStream::connect(pod.dir.path().join("shim.sock")).expect("connect");
    let body = json!({"v": 99, "id": 5, "command": "teleport", "args": {"to": "mars"}, "mood": "good"}).to_string();
    stream.write_all(&u32::try_from(body.len()).expect("length").to_le_bytes()).expect("write");
    stream.write_all(body.as_bytes()).expect("write");
    let mut len = [0; 4];
    stream.read_exact(&mut len).expect("read");
    let mut answer = vec![0; usize::try_from(u32::from_le_bytes(len)).expect("length")];
    stream.read_exact(&mut answer).expect("read");
    let answer: serde_json::Value = serde_json::from_slice(&answer).expect("json");
    assert_eq!((&answer["id"], &answer["error"]["kind"]), (&json!(5), &json!("unknown_command")));
    // Nonsense ends that connection and nothing else.
    stream.write_all(&[0xff; 64]).expect("write");
    assert_eq!(stream.read(&mut [0; 8]).unwrap_or(0), 0);
    pod.shim.state().await.expect("others are served");
}
