//! Crashes, removal and garbage collection.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use super::super::{GcPolicy, ImageError, ImageStore, StoreConfig};
use super::registry::{TestRegistry, blob};
use super::{Compression, Layer, TestImage, TestStore, open};

/// Always over the threshold, and never satisfied.
const EVERYTHING: GcPolicy = GcPolicy { high_percent: 0, low_percent: 0, min_age: Duration::ZERO, max_age: None };

/// Pulls `app:<tag>` with a shared layer and one of its own.
async fn pull(registry: &TestRegistry, node: &TestStore, tag: &str) -> String {
    let (base, own) =
        (Layer::file("base", b"base", Compression::Gzip), Layer::file("own", tag.as_bytes(), Compression::Gzip));
    let image = TestImage::new(&[&base, &own]);
    registry.push("app", tag, &image, &[&base, &own]);
    node.store.pull(&registry.name(&format!("app:{tag}")), &[], None).await.unwrap();
    image.id()
}

fn reopen(node: TestStore) -> TestStore {
    let TestStore { store, dir } = node;
    drop(store);
    TestStore { store: open(dir.path()), dir }
}

/// Names in one of the store's two indexes.
fn named_in(node: &TestStore, file: &str) -> Vec<String> {
    let Ok(bytes) = std::fs::read(node.images().join(file)) else { return Vec::new() };
    let index: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let name = |entry: &serde_json::Value| {
        let name = entry["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap();
        name.rsplit_once('/').unwrap().1.to_owned()
    };
    index["manifests"].as_array().unwrap().iter().map(name).filter(|name| !name.contains('@')).collect()
}

/// A store that leaves pulled images where a crash right after the pull would find them.
fn unsettled() -> TestStore {
    let node = TestStore::new();
    node.store.settling.store(true, std::sync::atomic::Ordering::Release);
    node
}

fn settled(node: &TestStore) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    let busy = || node.store.settling.load(std::sync::atomic::Ordering::Acquire);
    while node.images().join("unsynced.json").exists() || busy() {
        assert!(std::time::Instant::now() < until, "not settled");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn a_pulled_image_comes_into_the_index_when_it_is_on_the_disk() {
    let (registry, node) = (TestRegistry::start().await, unsettled());
    let id = pull(&registry, &node, "v1").await;
    assert_eq!((named_in(&node, "index.json"), named_in(&node, "unsynced.json")), (vec![], vec!["app:v1".to_owned()]));
    // The agent is killed, and is there again.
    let node = reopen(node);
    assert_eq!(node.store.resolve(&registry.name("app:v1")).unwrap().unwrap().id, id);
    settled(&node);
    assert_eq!(named_in(&node, "index.json"), ["app:v1"]);
    assert_eq!((node.names("blobs/sha256").len(), node.names("layers/sha256").len()), (4, 2));
    // Killed between the two writes.
    let index = std::fs::read(node.images().join("index.json")).unwrap();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let mut both: serde_json::Value = serde_json::from_slice(&index).unwrap();
    both["bootId"] = boot_id.trim().into();
    std::fs::write(node.images().join("unsynced.json"), both.to_string()).unwrap();
    let node = reopen(node);
    assert_eq!((node.store.list().len(), named_in(&node, "index.json")), (1, vec!["app:v1".to_owned()]));
}

#[tokio::test]
async fn a_power_failure_takes_only_what_was_not_on_the_disk() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    pull(&registry, &node, "v1").await;
    settled(&node);
    node.store.settling.store(true, std::sync::atomic::Ordering::Release);
    pull(&registry, &node, "v2").await;
    let file = node.images().join("unsynced.json");
    let mut unsynced: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    unsynced["bootId"] = "00000000-0000-0000-0000-000000000000".into();
    std::fs::write(&file, unsynced.to_string()).unwrap();
    let node = reopen(node);
    assert!(node.store.resolve(&registry.name("app:v1")).unwrap().is_some());
    assert!(node.store.resolve(&registry.name("app:v2")).unwrap().is_none(), "its files may be torn");
    assert_eq!((node.names("blobs/sha256").len(), node.names("layers/sha256").len()), (4, 2));
}

#[tokio::test]
async fn a_name_that_moves_is_in_the_index_at_once() {
    let (registry, node) = (TestRegistry::start().await, unsettled());
    pull(&registry, &node, "v1").await;
    let layer = Layer::file("other", b"other", Compression::Gzip);
    let image = TestImage::new(&[&layer]);
    registry.push("app", "v1", &image, &[&layer]);
    node.store.pull(&registry.name("app:v1"), &[], None).await.unwrap();
    assert_eq!((named_in(&node, "index.json"), named_in(&node, "unsynced.json")), (vec!["app:v1".to_owned()], vec![]));
    assert_eq!(reopen(node).store.resolve(&registry.name("app:v1")).unwrap().unwrap().id, image.id());
}

#[tokio::test]
async fn an_image_can_go_before_it_is_on_the_disk() {
    let (registry, node) = (TestRegistry::start().await, unsettled());
    pull(&registry, &node, "v1").await;
    assert!(node.store.remove(&registry.name("app:v1"), &HashSet::new()).unwrap());
    assert!(!node.images().join("unsynced.json").exists());
    node.store.settle().unwrap();
    assert!(named_in(&node, "index.json").is_empty() && node.names("layers/sha256").is_empty());
}

#[tokio::test]
async fn survives_a_restart_and_sweeps_what_a_crash_left() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let id = pull(&registry, &node, "v1").await;
    let (blobs, layers) = (node.names("blobs/sha256"), node.names("layers/sha256"));
    assert_eq!((blobs.len(), layers.len()), (4, 2));
    let images = node.images();
    std::fs::create_dir_all(images.join("tmp/half/diff/etc")).unwrap();
    std::fs::write(images.join("tmp/download"), "half").unwrap();
    std::fs::write(images.join("blobs/sha256").join("0".repeat(64)), "orphan").unwrap();
    std::fs::create_dir_all(images.join("layers/sha256").join("1".repeat(64)).join("diff")).unwrap();
    let node = reopen(node);
    assert_eq!((node.names("blobs/sha256"), node.names("layers/sha256")), (blobs, layers));
    assert!(node.names("tmp").is_empty());
    let image = node.store.resolve(&registry.name("app:v1")).unwrap().unwrap();
    assert_eq!((&image.id, node.store.list()[0].repo_digests.len()), (&id, 1));
    registry.clear_log();
    assert_eq!(node.store.pull(&registry.name("app:v1"), &[], None).await.unwrap().bytes, 0);
}

#[tokio::test]
async fn an_image_that_lost_a_file_is_pulled_again() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    pull(&registry, &node, "v1").await;
    let image = node.store.resolve(&registry.name("app:v1")).unwrap().unwrap();
    std::fs::remove_dir_all(image.layers[1].parent().unwrap()).unwrap();
    drop(image);
    let node = reopen(node);
    assert!(node.store.resolve(&registry.name("app:v1")).unwrap().is_none());
    assert!(node.names("layers/sha256").is_empty(), "what nobody reaches is gone");
    pull(&registry, &node, "v1").await;
    // A damaged configuration is noticed by its digest.
    let config = &node.store.list()[0].id[7..];
    std::fs::write(node.images().join("blobs/sha256").join(config), "{}").unwrap();
    assert!(reopen(node).store.list().is_empty());
}

#[tokio::test]
async fn a_damaged_blob_without_its_layer_is_downloaded_again() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", b"content", Compression::Gzip);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    std::fs::write(node.images().join("blobs/sha256").join(layer.digest.hex()), "damaged").unwrap();
    let image = node.store.pull(&registry.name("app:v"), &[], None).await.unwrap().image;
    assert_eq!(std::fs::read(image.layers[0].join("a")).unwrap(), b"content");
    assert_eq!(registry.count(&format!("GET {}", blob("app", &layer.digest))), 1);
}

#[test]
fn only_one_process_has_the_store() {
    let node = TestStore::new();
    let error = ImageStore::open(StoreConfig::new(node.dir.path())).err().unwrap();
    assert!(error.to_string().contains("another gantry uses this image store"), "{error}");
}

#[tokio::test]
async fn removal_keeps_what_others_share() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let (first, second) = (pull(&registry, &node, "v1").await, pull(&registry, &node, "v2").await);
    let none = HashSet::new();
    let name = registry.name("app:v1");
    assert!(matches!(node.store.remove(&name, &HashSet::from([first.clone()])), Err(ImageError::InUse { .. })));
    let handle = node.store.resolve(&name).unwrap();
    assert!(matches!(node.store.remove(&name, &none), Err(ImageError::InUse { .. })));
    drop(handle);
    assert!(node.store.remove(&name, &none).unwrap());
    assert!(!node.store.remove(&name, &none).unwrap());
    assert_eq!(node.names("layers/sha256").len(), 2);
    assert_eq!(node.names("blobs/sha256").len(), 4);
    let rest = node.store.resolve(&second).unwrap().unwrap();
    assert!(rest.layers.iter().all(|layer| layer.is_dir()));
    assert!(node.store.resolve(&first).unwrap().is_none());
    drop(rest);
    assert!(node.store.remove(&second, &none).unwrap());
    node.assert_empty();
    assert!(node.names("blobs/sha256").is_empty());
    assert!(reopen(node).store.list().is_empty());
}

#[tokio::test]
async fn collection_takes_the_longest_unused_first() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let mut ids = Vec::new();
    for tag in ["v1", "v2", "v3", "v4"] {
        ids.push(pull(&registry, &node, tag).await);
    }
    // Used in the order 2, 4, 1, 3.
    for at in [1, 3, 0, 2] {
        node.store.note_use(&ids[at]).unwrap();
        #[allow(clippy::disallowed_methods, reason = "file times have to differ")]
        std::thread::sleep(Duration::from_millis(15));
    }
    // Times of use survive a restart.
    let node = reopen(node);
    let order = || {
        let mut all = node.store.list();
        all.sort_by_key(|image| image.last_used);
        all.into_iter().map(|image| image.id).collect::<Vec<_>>()
    };
    assert_eq!(order(), [1, 3, 0, 2].map(|at: usize| ids[at].clone()));

    let usage = node.store.disk_usage().unwrap();
    assert!(usage.used > 0 && usage.inodes_used >= 5 && usage.capacity >= usage.available);
    let idle = GcPolicy { high_percent: 100, ..EVERYTHING };
    assert!(node.store.collect_garbage(&HashSet::new(), idle).await.unwrap().by_space.is_empty());
    let young = GcPolicy { min_age: Duration::from_secs(3600), ..EVERYTHING };
    let error = node.store.collect_garbage(&HashSet::new(), young).await.unwrap_err();
    assert!(matches!(error, ImageError::FreeDiskSpaceFailed { .. }), "{error}");
    assert_eq!(node.store.list().len(), 4);

    // Enough is free already: over the high threshold, but the low one is reached without removing anything.
    let reached = GcPolicy { low_percent: 100, ..EVERYTHING };
    assert!(node.store.collect_garbage(&HashSet::new(), reached).await.unwrap().by_space.is_empty());

    let in_use = HashSet::from([ids[1].clone()]);
    let handle = node.store.resolve(&ids[3]).unwrap().unwrap();
    // The disk never gets empty, so this removes all it may and says so.
    node.store.collect_garbage(&in_use, EVERYTHING).await.unwrap_err();
    let mut left = order();
    left.sort();
    let mut expected = vec![ids[1].clone(), ids[3].clone()];
    expected.sort();
    assert_eq!(left, expected);
    drop(handle);
    let removed = node.store.remove_unused(&in_use, Duration::ZERO).await.unwrap();
    assert_eq!(removed.by_space, [ids[3].clone()]);
    assert_eq!(node.names("layers/sha256").len(), 2);
}

#[tokio::test]
async fn collection_by_age() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let (old, new) = (pull(&registry, &node, "v1").await, pull(&registry, &node, "v2").await);
    let digest = old.parse().unwrap();
    node.store.layout.touch(&digest, SystemTime::now() - Duration::from_secs(60)).unwrap();
    let policy = GcPolicy { high_percent: 100, max_age: Some(Duration::from_secs(30)), ..EVERYTHING };
    // Not before the store has been open for that long: nothing had a chance to be used.
    assert!(node.store.collect_garbage(&HashSet::new(), policy).await.unwrap().by_age.is_empty());
    let policy = GcPolicy { max_age: Some(Duration::from_millis(1)), ..policy };
    tokio::time::sleep(Duration::from_millis(5)).await;
    let collected = node.store.collect_garbage(&HashSet::from([new.clone()]), policy).await.unwrap();
    assert_eq!(collected.by_age, [old]);
    assert!(node.store.resolve(&new).unwrap().is_some());
}

#[tokio::test]
async fn a_pull_in_flight_is_not_swept() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    pull(&registry, &node, "v1").await;
    let image = node.store.resolve(&registry.name("app:v1")).unwrap().unwrap();
    let (blobs, chain) = (image.layer_digests.clone(), image.chain.clone());
    drop(image);
    let pins = node.store.pin(blobs.into_iter(), chain.into_iter());
    assert!(node.store.remove(&registry.name("app:v1"), &HashSet::new()).unwrap());
    assert_eq!((node.names("blobs/sha256").len(), node.names("layers/sha256").len()), (2, 2));
    drop(pins);
    node.store
        .collect_garbage(&HashSet::new(), GcPolicy { high_percent: 100, low_percent: 100, ..GcPolicy::default() })
        .await
        .unwrap();
    assert!(node.names("blobs/sha256").is_empty() && node.names("layers/sha256").is_empty());
}
