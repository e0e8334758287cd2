//! What a container's processes may do, and what they do not inherit.

use std::fs;

use gantry::shim::bundle::{CapabilitySets, Setup};
use serde_json::json;

use crate::harness::{DEFAULT_CAPS, Pod, caps, eventually, launcher};

const STATUS: &str = "grep -E '^(Cap|Seccomp:|NoNewPrivs|SigIgn|SigBlk|Groups|Uid|Umask)' /proc/self/status";

fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.trim_start_matches("stdout:").strip_prefix(name));
    line.unwrap_or_else(|| panic!("{name} in {text}")).trim_start_matches(':').trim().to_owned()
}

fn mask(names: &[&str]) -> String {
    let bits = names.iter().map(|n| n.parse::<caps::Capability>().expect("capability").bitmask());
    format!("{:016x}", bits.fold(0, |all, bit| all | bit))
}

fn profile() -> serde_json::Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_NATIVE"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 1, "value": 15, "valueTwo": 9, "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    })
}

#[tokio::test]
async fn nothing_lent_is_left_for_root() {
    let mut pod = Pod::new().await;
    // No shell: it changes signal dispositions itself.
    let args = ["grep", "-E", "^(Cap|Seccomp:|NoNewPrivs|SigIgn|SigBlk|Groups|Umask)", "/proc/self/status"];
    let mut draft = pod.draft("app", "");
    draft.spec["process"]["args"] = json!(args);
    pod.run(&draft).await;
    let sleeper = pod.draft("sleeper", "sleep 1000");
    pod.create(&sleeper).await.expect("create");
    pod.shim.start(sleeper.id()).await.expect("start");
    let (exec, _) = pod.exec_args(&sleeper, "e", &args).await;
    for text in [pod.log(&draft).join("\n"), exec] {
        let wanted = mask(&DEFAULT_CAPS);
        for set in ["CapBnd", "CapEff", "CapPrm"] {
            assert_eq!(field(&text, set), wanted, "{set} in {text}");
        }
        assert_eq!(field(&text, "CapInh"), "0000000000000000");
        assert_eq!(field(&text, "CapAmb"), "0000000000000000");
        assert_eq!((field(&text, "NoNewPrivs"), field(&text, "Seccomp")), ("0".into(), "0".into()));
        assert_eq!(field(&text, "SigIgn"), "0000000000000000", "SIGPIPE and friends");
        assert_eq!(field(&text, "SigBlk"), "0000000000000000");
        assert_eq!(field(&text, "Groups"), "", "the agent's groups");
        assert_eq!(field(&text, "Umask"), "0022");
    }
}

#[tokio::test]
async fn seccomp_holds_for_any_user_and_for_exec() {
    let mut pod = Pod::new().await;
    for (uid, no_new_privs) in [(0, false), (1000, false), (0, true), (1000, true)] {
        let probe = format!("{STATUS}; mkdir /tmp/d 2>&1; for s in 9 11; do kill -$s 9999 2>&1; done");
        let mut draft = pod.draft(&format!("u{uid}-{no_new_privs}"), &format!("{probe}; sleep 1000"));
        draft.spec["process"]["user"] = json!({"uid": uid, "gid": uid, "additionalGids": [77]});
        draft.setup = Setup {
            capabilities: caps(&["CAP_NET_BIND_SERVICE", "CAP_KILL"]),
            no_new_privs,
            seccomp: Some(serde_json::from_value(profile()).expect("profile")),
            mounts: Vec::new(),
        };
        fs::set_permissions(draft.rootfs().join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o777))
            .expect("tmp");
        pod.create(&draft).await.expect("create");
        pod.shim.start(draft.id()).await.expect("start");
        let (exec, _) = pod.exec(&draft, &format!("e{uid}{no_new_privs}"), &probe).await;
        // On a busy machine the exec may overtake the container's own shell.
        let kills = |lines: Vec<String>| lines.iter().filter(|line| line.contains("9999")).count();
        eventually("the container's output", || kills(pod.log(&draft)) == 2);
        pod.shim.signal(draft.id(), 9, false).await.expect("kill");
        pod.exit_of(draft.id()).await;
        for text in [pod.log(&draft).join("\n"), exec] {
            let context = format!("uid {uid} nnp {no_new_privs}: {text}");
            assert_eq!(field(&text, "Seccomp"), "2", "{context}");
            assert_eq!(field(&text, "NoNewPrivs"), if no_new_privs { "1" } else { "0" }, "{context}");
            assert_eq!(field(&text, "CapBnd"), mask(&["CAP_NET_BIND_SERVICE", "CAP_KILL"]), "{context}");
            let effective = if uid == 0 { mask(&["CAP_NET_BIND_SERVICE", "CAP_KILL"]) } else { mask(&[]) };
            assert_eq!(field(&text, "CapEff"), effective, "{context}");
            assert_eq!(field(&text, "Groups"), "77", "{context}");
            assert!(text.contains("Operation not supported") || text.contains("Not supported"), "mkdir: {context}");
            // 9 & 15 == 9 is refused, 11 & 15 is not: there is no such process.
            let kills: Vec<&str> = text.lines().filter(|l| l.contains("9999")).collect();
            assert!(kills[0].contains("not permitted") && kills[1].contains("No such process"), "{context}");
        }
    }
}

#[tokio::test]
async fn ambient_capabilities_reach_a_user() {
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("app", STATUS);
    draft.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let names = vec!["CAP_NET_BIND_SERVICE".to_owned()];
    draft.setup.capabilities = CapabilitySets {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names.clone(),
        inheritable: names.clone(),
        ambient: names,
    };
    pod.run(&draft).await;
    assert_eq!(field(&pod.log(&draft).join("\n"), "CapEff"), mask(&["CAP_NET_BIND_SERVICE"]));
}

#[tokio::test]
async fn what_the_node_lacks_is_left_out_with_a_warning() {
    let mut pod = Pod::new().await;
    let node = fs::read_to_string("/proc/self/status").expect("status");
    let bounding = u64::from_str_radix(&field(&node, "CapBnd"), 16).expect("mask");
    let all: Vec<String> = caps::all().into_iter().map(|c| c.to_string()).collect();
    let names: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut draft = pod.draft("app", STATUS);
    draft.setup.capabilities = caps(&names);
    // Lower than the shim's own, which only CAP_SYS_RESOURCE may set.
    draft.spec["process"]["oomScoreAdj"] = json!(-999);
    let exit = pod.run(&draft).await;
    assert_eq!(exit.exit_code, 0);
    assert_eq!(field(&pod.log(&draft).join("\n"), "CapBnd"), format!("{bounding:016x}"));
    if bounding & caps::Capability::CAP_SYS_RESOURCE.bitmask() == 0 {
        let log = fs::read_to_string(pod.dir.path().join("shim.log")).expect("shim.log");
        assert!(log.contains("CAP_SYS_RESOURCE"), "{log}");
        assert!(log.contains("oomScoreAdj -999"), "{log}");
    }
}

#[tokio::test]
async fn the_shim_keeps_its_own_oom_score() {
    let mut pod = Pod::new().await;
    let pid = pod.shim.hello().await.expect("hello").pid;
    let score = || fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("score");
    let before = score();
    let mut draft = pod.draft("app", "cat /proc/self/oom_score_adj");
    draft.spec["process"]["oomScoreAdj"] = json!(400);
    pod.run(&draft).await;
    assert_eq!(pod.log(&draft), ["stdout:400"]);
    assert_eq!(score(), before);
}

#[tokio::test]
async fn no_descriptor_and_no_environment_leaks() {
    let mut pod = Pod::new().await;
    let draft = pod.draft("fds", "ls /proc/self/fd");
    pod.run(&draft).await;
    // 3 is the directory that ls reads.
    assert_eq!(pod.log(&draft), ["stdout:0", "stdout:1", "stdout:2", "stdout:3"]);
    let mut draft = pod.draft("env", "");
    draft.spec["process"]["args"] = json!(["env"]);
    pod.run(&draft).await;
    assert_eq!(pod.log(&draft), ["stdout:PATH=/usr/bin:/bin", "stdout:ZZZ=1", "stdout:AAA=2"]);
}

#[tokio::test]
async fn the_shim_is_small_and_has_one_thread() {
    let mut pod = Pod::new().await;
    let hello = pod.shim.hello().await.expect("hello");
    let draft = pod.draft("app", "echo hello; sleep 1000");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    pod.exec(&draft, "e", "true").await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(fs::read_dir(format!("/proc/{}/task", hello.pid)).expect("task").count(), 1);
    assert!(fs::read(format!("/proc/{}/environ", hello.pid)).expect("environ").is_empty());
    let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", hello.pid)).expect("smaps");
    // Not Private_Dirty: pages of a binary that was linked a moment ago are dirty as well.
    let own = smaps
        .lines()
        .find_map(|l| l.strip_prefix("Anonymous:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let own = own.expect("Anonymous");
    println!("memory of its own: {own} kB");
    assert!(own <= 300, "{own} kB: {smaps}");
    pod.shim.signal(draft.id(), 9, false).await.expect("kill");
    pod.exit_of(draft.id()).await;
}

#[tokio::test]
async fn the_binary_cannot_be_written_through_proc() {
    let mut pod = Pod::new().await;
    let pid = pod.shim.hello().await.expect("hello").pid;
    // Opening it for writing says "text file busy" while it runs, whatever the mount; so ask the mount.
    let mount = rustix::fs::statvfs(format!("/proc/{pid}/exe")).expect("statvfs");
    assert!(mount.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    let plain = rustix::fs::statvfs(env!("CARGO_BIN_EXE_gantry")).expect("statvfs");
    assert!(!plain.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY), "this test would prove nothing");
    let draft = pod.draft("app", "true");
    assert_eq!(pod.run(&draft).await.exit_code, 0);
}

#[tokio::test]
async fn an_exec_joins_the_user_namespace() {
    const PROBE: &str = "cat /proc/self/uid_map | tr -s ' '; id -u; id -G; touch /root/x && echo wrote; grep CapEff /proc/self/status; grep Seccomp: /proc/self/status";
    let mut pod = Pod::new().await;
    let mut draft = pod.draft("users", &format!("{PROBE}; sleep 1000"));
    let mapping = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
    draft.spec["linux"]["namespaces"].as_array_mut().expect("list").push(json!({"type": "user"}));
    draft.spec["linux"]["uidMappings"] = mapping.clone();
    draft.spec["linux"]["gidMappings"] = mapping;
    draft.setup.seccomp = Some(serde_json::from_value(profile()).expect("profile"));
    // The agent mounts roots shifted; here the files are.
    shift(&draft.rootfs());
    fs::set_permissions(pod.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).expect("mode");
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let (exec, _) = pod.exec(&draft, "e", PROBE).await;
    let expected = format!(" 0 200000 65536\n0\n0\nwrote\nCapEff:\t{}\nSeccomp:\t2\n", mask(&DEFAULT_CAPS));
    assert_eq!(exec, expected);
    draft.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [77]});
    let (exec, _) = pod.exec(&draft, "u", PROBE).await;
    assert!(exec.contains("\n1000\n1000 77\n") && !exec.contains("wrote"), "{exec}");
    assert_eq!(field(&exec, "CapEff"), mask(&[]), "{exec}");
    pod.shim.signal(draft.id(), 9, false).await.expect("kill");
    pod.exit_of(draft.id()).await;
    assert_eq!(pod.log(&draft).join("\n").replace("stdout:", "") + "\n", expected);
}

fn shift(path: &std::path::Path) {
    std::os::unix::fs::lchown(path, Some(200_000), Some(200_000)).expect("chown");
    if path.is_dir() && !path.is_symlink() {
        fs::read_dir(path).expect("dir").for_each(|entry| shift(&entry.expect("entry").path()));
    }
}

/// The agent changes its own limit once it is made; programs in containers get what the machine's administrator set.
#[tokio::test]
async fn the_agents_own_limit_of_open_files_is_not_the_containers() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let launcher = launcher();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, soft - 1, hard).expect("limit");
    let mut pod = Pod::from(&launcher).await;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("limit");
    let draft = pod.draft("app", "ulimit -Sn; ulimit -Hn");
    pod.run(&draft).await;
    let limits = [soft, hard].map(|limit| format!("stdout:{limit}"));
    assert_eq!(pod.log(&draft), limits);
}
