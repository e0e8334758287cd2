//! Volumes: access, propagation, subPath, read-only roots, and paths that try to get out.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use gantry::runtime::client::ShimError;
use gantry::shim::bundle::{Access, BindMount, Propagation};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::harness::Pod;

fn bind(source: &Path, destination: &str) -> BindMount {
    BindMount {
        source: source.to_owned(),
        sub_path: None,
        destination: PathBuf::from(destination),
        access: Access::ReadWrite,
        propagation: Propagation::Private,
    }
}

/// A shared tmpfs with another tmpfs inside, as a volume that the node mounts things into.
fn shared_volume(pod: &Pod) -> PathBuf {
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume).expect("volume");
    mount(Some("tmpfs"), &volume, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("tmpfs");
    mount(None::<&str>, &volume, None::<&str>, MsFlags::MS_SHARED, None::<&str>).expect("shared");
    fs::create_dir(volume.join("inner")).expect("inner");
    mount(Some("tmpfs"), &volume.join("inner"), Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("inner tmpfs");
    volume
}

#[tokio::test]
async fn access_and_propagation_are_per_mount() {
    let mut pod = Pod::new().await;
    let volume = shared_volume(&pod);
    let mut draft = pod.draft(
        "app",
        "grep ' /v-' /proc/self/mountinfo; \
         for d in rw ro rro; do for s in '' /inner; do touch /v-$d$s/f 2>/dev/null && echo $d$s=w || echo $d$s=r; done; done; \
         sleep 1000",
    );
    draft.setup.mounts = vec![
        BindMount { propagation: Propagation::Shared, ..bind(&volume, "/v-rw") },
        BindMount { access: Access::ReadOnly, propagation: Propagation::Slave, ..bind(&volume, "/v-ro") },
        BindMount { access: Access::RecursiveReadOnly, ..bind(&volume, "/v-rro") },
    ];
    pod.create(&draft).await.expect("create");
    pod.shim.start(draft.id()).await.expect("start");
    let (text, _) = pod.exec(&draft, "look", "grep ' /v-' /proc/self/mountinfo; for d in rw ro rro; do for s in '' /inner; do touch /v-$d$s/f 2>/dev/null && echo $d$s=w || echo $d$s=r; done; done").await;
    let writable: Vec<&str> = text.lines().filter(|l| l.ends_with("=w") || l.ends_with("=r")).collect();
    assert_eq!(writable, ["rw=w", "rw/inner=w", "ro=r", "ro/inner=w", "rro=r", "rro/inner=r"], "{text}");
    let optional = |point: &str| {
        text.lines()
            .find(|l| l.contains(&format!(" {point} ")))
            .expect(point)
            .split(" - ")
            .next()
            .expect("fields")
            .to_owned()
    };
    assert!(optional("/v-rw").contains("shared:"), "{text}");
    assert!(optional("/v-ro").contains("master:") && !optional("/v-ro").contains("shared:"), "{text}");
    assert!(!optional("/v-rro").contains("shared:") && !optional("/v-rro").contains("master:"), "{text}");

    // What the node mounts later travels to the first two only.
    fs::create_dir(volume.join("late")).expect("late");
    mount(Some("tmpfs"), &volume.join("late"), Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("late tmpfs");
    let (text, _) = pod
        .exec(&draft, "late", "for d in rw ro rro; do grep -q \" /v-$d/late \" /proc/self/mountinfo && echo $d; done")
        .await;
    assert_eq!(text, "rw\nro\n");
    // And what the container mounts into the first comes back.
    pod.shim.signal(draft.id(), 9, false).await.expect("kill");
    pod.exit_of(draft.id()).await;
    for inner in ["late", "inner"] {
        umount2(&volume.join(inner), MntFlags::MNT_DETACH).expect("umount");
    }
}

#[tokio::test]
async fn bidirectional_needs_a_shared_source() {
    let pod = Pod::new().await;
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume).expect("volume");
    mount(Some("tmpfs"), &volume, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("tmpfs");
    mount(None::<&str>, &volume, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).expect("private");
    for (propagation, text) in
        [(Propagation::Shared, "not a shared mount"), (Propagation::Slave, "not a shared or slave mount")]
    {
        let mut draft = pod.draft("app", "true");
        draft.setup.mounts = vec![BindMount { propagation, ..bind(&volume, "/v") }];
        let Err(ShimError::Create(error)) = pod.create(&draft).await else { panic!("created") };
        assert!(error.contains(text) && error.contains("/v"), "{error}");
    }
}

#[tokio::test]
async fn sub_paths_files_and_missing_parents() {
    let mut pod = Pod::new().await;
    let volume = pod.dir.path().join("volume");
    fs::create_dir_all(volume.join("data")).expect("volume");
    fs::write(volume.join("data/key"), "value").expect("file");
    let mut draft =
        pod.draft("app", "cat /etc/app/key; cat /deep/er/dir/key; echo x > /made/f; cat /dev/log-here; pwd; ls");
    draft.setup.mounts = vec![
        BindMount { sub_path: Some("data/key".into()), ..bind(&volume, "/etc/app/key") },
        BindMount { sub_path: Some("data".into()), access: Access::ReadOnly, ..bind(&volume, "/deep/er/dir") },
        BindMount { sub_path: Some("new/one".into()), ..bind(&volume, "/made") },
        bind(&volume.join("data/key"), "/dev/log-here"),
    ];
    // The working directory is inside a volume, which is there only after libcontainer is done.
    draft.spec["process"]["cwd"] = json!("/deep/er/dir");
    let exit = pod.run(&draft).await;
    assert_eq!(pod.log(&draft), ["stdout:valuevaluevalue/deep/er/dir", "stdout:key"]);
    assert_eq!(exit.exit_code, 0);
    assert_eq!(fs::read_to_string(volume.join("new/one/f")).expect("written"), "x\n");
}

#[tokio::test]
async fn sub_paths_cannot_leave_the_volume() {
    let pod = Pod::new().await;
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume).expect("volume");
    fs::write(pod.dir.path().join("secret"), "s").expect("secret");
    symlink("../secret", volume.join("link")).expect("link");
    symlink("/etc", volume.join("absolute")).expect("link");
    for sub_path in ["link", "absolute", "../secret", "absolute/passwd"] {
        let mut draft = pod.draft("app", "true");
        draft.setup.mounts = vec![BindMount { sub_path: Some(sub_path.into()), ..bind(&volume, "/v") }];
        let Err(ShimError::Create(error)) = pod.create(&draft).await else { panic!("{sub_path} got out") };
        assert!(error.contains(sub_path), "{error}");
    }
}

#[tokio::test]
async fn symlinks_of_an_image_stay_inside() {
    let mut pod = Pod::new().await;
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume).expect("volume");
    fs::write(volume.join("f"), "inside").expect("file");
    let mut draft = pod.draft("app", "cat /outside/target/f");
    let outside = pod.dir.path().join("outside");
    fs::create_dir(&outside).expect("outside");
    symlink("../../../../../../../outside", draft.rootfs().join("escape")).expect("link");
    draft.setup.mounts = vec![bind(&volume, "/escape/target")];
    pod.run(&draft).await;
    assert_eq!(pod.log(&draft), ["stdout:inside"]);
    assert!(!Path::new("/outside").exists());
    assert_eq!(fs::read_dir(&outside).expect("outside").count(), 0);
}

#[tokio::test]
async fn a_read_only_root_still_gets_its_mounts() {
    let mut pod = Pod::new().await;
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume).expect("volume");
    let mut draft = pod.draft("app", "pwd; touch /x && echo writable; touch /data/sub/ok && echo volume");
    draft.spec["root"]["readonly"] = json!(true);
    draft.spec["process"]["cwd"] = json!("/made/for/me");
    draft.setup.mounts = vec![bind(&volume, "/data/sub")];
    pod.run(&draft).await;
    let mut log = pod.log(&draft);
    log.retain(|line| line.starts_with("stdout"));
    assert_eq!(log, ["stdout:/made/for/me", "stdout:volume"]);
}

#[tokio::test]
async fn proc_is_not_a_mount_point() {
    let pod = Pod::new().await;
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume).expect("volume");
    let mut draft = pod.draft("app", "true");
    draft.setup.mounts = vec![bind(&volume, "/proc/sys")];
    let Err(ShimError::Create(error)) = pod.create(&draft).await else { panic!("created") };
    assert!(error.contains("inside /proc"), "{error}");
    let mut draft = pod.draft("app", "true");
    draft.setup.mounts = vec![bind(Path::new("/not/on/this/node"), "/v")];
    let Err(ShimError::Create(error)) = pod.create(&draft).await else { panic!("created") };
    assert!(error.contains("/not/on/this/node") && error.contains("/v"), "{error}");
}
