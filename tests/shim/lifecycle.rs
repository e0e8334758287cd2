//! Create, start, log, signal, exit, remove.

use std::fs;

use gantry::runtime::client::{Shim, ShimError, ShimOptions, read_records};
use serde_json::json;

use crate::harness::{Pod, launcher};

#[tokio::test]
async fn a_container_lives_and_dies() {
    let mut pod = Pod::new().await;
    let draft = pod.draft("app", "echo out; echo err >&2; printf tail; exit 42");
    pod.create(&draft).await.expect("create");
    let created = pod.record(draft.id()).await;
    assert!(created.is_alive() && created.started_at.is_none());

    let started = pod.shim.start(draft.id()).await.expect("start");
    let exit = pod.exit_of(draft.id()).await;
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (42, None, false));
    let mut log = pod.log(&draft);
    log.sort();
    assert_eq!(log, ["stderr:err", "stdout:out", "stdout:tail"]);

    let on_disk = read_records(pod.dir.path()).expect("records");
    assert_eq!(on_disk.len(), 1);
    assert_eq!(on_disk[0].exit, Some(exit));
    assert_eq!(on_disk[0].started_at, Some(started.started_at));
    assert_eq!(on_disk, pod.shim.state().await.expect("state"));

    pod.shim.remove(draft.id()).await.expect("remove");
    assert!(pod.shim.state().await.expect("state").is_empty());
    assert!(pod.cgroup_dirs().iter().all(|dir| !dir.join(draft.id()).exists()));
    assert!(!draft.request.container_dir.join("libcontainer").exists());
}

#[tokio::test]
async fn nothing_happens_twice() {
    let mut pod = Pod::new().await;
    let draft = pod.draft("app", "sleep 100");
    pod.create(&draft).await.expect("create");
    assert!(matches!(pod.create(&draft).await, Err(ShimError::Invalid(_) | ShimError::Conflict(_))));
    pod.shim.start(draft.id()).await.expect("start");
    assert!(matches!(pod.shim.start(draft.id()).await, Err(ShimError::Conflict(_))));
    assert!(matches!(pod.shim.remove(draft.id()).await, Err(ShimError::Conflict(_))));
    assert!(matches!(pod.shim.shutdown(false).await, Err(ShimError::Conflict(_))));
    let second = launcher().launch(pod.dir.path(), &ShimOptions::default()).await;
    let Err(ShimError::Launch(text)) = second else { panic!("a second shim") };
    assert!(text.contains("another shim serves this Pod"), "{text}");

    pod.shim.signal(draft.id(), 9, false).await.expect("signal");
    let exit = pod.exit_of(draft.id()).await;
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (137, Some(9), false));
    pod.shim.remove(draft.id()).await.expect("remove");
    assert!(matches!(pod.create(&draft).await, Err(ShimError::Conflict(_))), "the record is still there");
    pod.shim.shutdown(false).await.expect("shutdown");
    assert!(matches!(Shim::connect(pod.dir.path()).await, Err(ShimError::Disconnected)));
}

#[tokio::test]
async fn start_errors_are_those_people_know() {
    let mut pod = Pod::new().await;
    for (args, text) in [
        (json!(["nope"]), r#"exec: "nope": executable file not found in $PATH"#),
        (json!(["/nope"]), r#"exec: "/nope": stat /nope: no such file or directory"#),
        (json!(["/etc/plain"]), r#"exec: "/etc/plain": permission denied"#),
        (json!(["/etc"]), r#"exec: "/etc": is a directory"#),
        (json!(["/etc/noformat"]), "exec /etc/noformat: exec format error"),
        (json!(["/etc/nointerpreter"]), "exec /etc/nointerpreter: no such file or directory"),
    ] {
        let mut draft = pod.draft("bad", "");
        let etc = draft.rootfs().join("etc");
        fs::write(etc.join("plain"), "x").expect("file");
        for (name, content) in [("noformat", "garbage"), ("nointerpreter", "#!/not/there\n")] {
            fs::write(etc.join(name), content).expect("file");
            fs::set_permissions(etc.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
        }
        draft.spec["process"]["args"] = args;
        pod.create(&draft).await.expect("create");
        let Err(ShimError::Start(got)) = pod.shim.start(draft.id()).await else { panic!("{text}") };
        assert_eq!(got, text);
        let exit = pod.exit_of(draft.id()).await;
        assert_eq!((exit.exit_code, exit.start_error.as_deref()), (128, Some(text)));
    }
}

#[tokio::test]
async fn create_errors_leave_nothing_behind() {
    let pod = Pod::new().await;
    let mut draft = pod.draft("bad", "true");
    draft.spec["mounts"][0]["type"] = json!("nosuchfs");
    let Err(ShimError::Create(text)) = pod.create(&draft).await else { panic!("created") };
    assert!(text.contains("nosuchfs") || text.contains("/proc") || text.contains("ENODEV"), "{text}");
    assert!(pod.shim.state().await.expect("state").is_empty());
    assert!(!draft.request.container_dir.join("container.json").exists());
    // The same again, mended: nothing is in its way.
    draft.spec["mounts"][0]["type"] = json!("proc");
    pod.create(&draft).await.expect("create");
}
