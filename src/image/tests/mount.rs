//! Images under real overlay mounts.

use std::path::{Path, PathBuf};

use super::super::{Image, mount_read_only, mount_rootfs, unmount_rootfs};
use super::registry::TestRegistry;
use super::{Compression, Layer, Member, TestImage, TestStore, tar_of};

/// Unmounts also when a test fails.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount_rootfs(&self.0);
    }
}

struct Node {
    node: TestStore,
    _registry: TestRegistry,
    image: Image,
}

async fn node(layers: &[Layer]) -> Node {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layers: Vec<&Layer> = layers.iter().collect();
    registry.push("app", "v", &TestImage::new(&layers), &layers);
    let image = node.store.pull(&registry.name("app:v"), &[], None).await.unwrap().image;
    Node { node, _registry: registry, image }
}

fn target(node: &Node) -> (PathBuf, PathBuf, Mounted) {
    let base = node.node.dir.path();
    let target = base.join("rootfs");
    std::fs::create_dir_all(&target).unwrap();
    (base.join("container"), target.clone(), Mounted(target))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn stacked() -> [Layer; 3] {
    let lower = tar_of(&[
        Member::dir("./").mode(0o750).owner(11, 12),
        Member::file("keep", b"lower"),
        Member::file("gone", b"lower"),
        Member::file("dir/old", b"lower"),
        Member::file("merged/low", b"lower"),
    ]);
    let middle = tar_of(&[
        Member::file(".wh.gone", b""),
        Member::file("dir/.wh..wh..opq", b""),
        Member::file("dir/new", b"middle"),
        Member::file("merged/high", b"middle"),
    ]);
    let top = tar_of(&[Member::file("keep", b"top")]);
    [
        Layer::new(&lower, Compression::Gzip),
        Layer::new(&middle, Compression::Zstd),
        Layer::new(&top, Compression::Plain),
    ]
}

#[tokio::test]
async fn rootfs_is_the_sum_of_the_layers() {
    let node = node(&stacked()).await;
    let (writable, target, _mounted) = target(&node);
    mount_rootfs(&node.image, &writable, &target).unwrap();
    // Again, as after a crash.
    mount_rootfs(&node.image, &writable, &target).unwrap();
    assert_eq!(names(&target), ["dir", "keep", "merged"]);
    assert_eq!(names(&target.join("dir")), ["new"]);
    assert_eq!(names(&target.join("merged")), ["high", "low"]);
    assert_eq!(std::fs::read(target.join("keep")).unwrap(), b"top");
    let root = rustix::fs::stat(&target).unwrap();
    assert_eq!((root.st_mode & 0o7777, root.st_uid, root.st_gid), (0o750, 11, 12));

    std::fs::write(target.join("keep"), "written").unwrap();
    std::fs::remove_file(target.join("merged/low")).unwrap();
    unmount_rootfs(&target).unwrap();
    assert!(names(&target).is_empty());
    unmount_rootfs(&target).unwrap();
    unmount_rootfs(&target.join("missing")).unwrap();
    // The image is as before, the container's changes are its own and stay.
    assert_eq!(std::fs::read(node.image.layers[2].join("keep")).unwrap(), b"top");
    mount_rootfs(&node.image, &writable, &target).unwrap();
    assert_eq!(std::fs::read(target.join("keep")).unwrap(), b"written");
    assert_eq!(names(&target.join("merged")), ["high"]);
}

#[tokio::test]
async fn a_busy_rootfs_is_detached() {
    let node = node(&stacked()).await;
    let (writable, target, _mounted) = target(&node);
    mount_rootfs(&node.image, &writable, &target).unwrap();
    let open = std::fs::File::open(target.join("keep")).unwrap();
    unmount_rootfs(&target).unwrap();
    assert!(names(&target).is_empty());
    drop(open);
}

#[tokio::test]
async fn image_volumes_are_read_only() {
    for layers in [&stacked()[..], &stacked()[..1], &[]] {
        let node = node(layers).await;
        let (_, target, _mounted) = target(&node);
        mount_read_only(&node.image, &target).unwrap();
        let error = std::fs::write(target.join("x"), "").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(names(&target).is_empty(), layers.is_empty());
        let flags = rustix::fs::statvfs(&target).unwrap().f_flag;
        assert!(flags.contains(rustix::fs::StatVfsMountFlags::NOEXEC | rustix::fs::StatVfsMountFlags::NOSUID));
        unmount_rootfs(&target).unwrap();
    }
}

#[tokio::test]
async fn an_image_without_layers_gives_an_empty_rootfs() {
    let node = node(&[]).await;
    let (writable, target, _mounted) = target(&node);
    mount_rootfs(&node.image, &writable, &target).unwrap();
    std::fs::write(target.join("made"), "here").unwrap();
    assert_eq!(names(&writable.join("upper")), ["made"]);
}

#[tokio::test]
async fn many_layers_stack() {
    let layers: Vec<Layer> = (0..130).map(|at| Layer::file(&format!("f{at}"), b"x", Compression::Plain)).collect();
    let node = node(&layers).await;
    let (writable, target, _mounted) = target(&node);
    mount_rootfs(&node.image, &writable, &target).unwrap();
    assert_eq!(names(&target).len(), 130);
    unmount_rootfs(&target).unwrap();
    // The way of older kernels gives the same.
    let lower = node.image.layers.iter().rev().cloned().collect();
    super::super::mount::classic_for_tests(lower, &writable, &target);
    assert_eq!(names(&target).len(), 130);
    mount_rootfs(&node.image, &writable, &target).unwrap();
}

#[tokio::test]
async fn errors_name_image_and_place() {
    let node = node(&stacked()).await;
    let (writable, target, _mounted) = target(&node);
    let error = mount_rootfs(&node.image, &writable, &target.join("missing")).unwrap_err().to_string();
    assert!(error.contains(&node.image.name) && error.contains("missing"), "{error}");
    std::fs::remove_dir_all(node.image.layers[1].parent().unwrap()).unwrap();
    let error = mount_rootfs(&node.image, &writable, &target).unwrap_err().to_string();
    assert!(error.contains("lowerdir") && error.contains("No such file"), "{error}");
}
