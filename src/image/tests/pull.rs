//! Pulls, good and bad.

use std::time::Duration;

use super::super::{Credential, ImageError, LayerState, PullProgress};
use super::registry::{Fault, TestRegistry, blob, manifest};
use super::{Compression, Layer, Member, TestImage, TestStore, tar_of};
use crate::image::digest::Digest;

fn read(image: &crate::image::Image, layer: usize, path: &str) -> Vec<u8> {
    std::fs::read(image.layers[layer].join(path)).unwrap()
}

/// Random bytes: they do not compress, so blobs have the size that a test wants.
fn noise(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulls_every_compression_and_finds_it_again() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layers = [
        Layer::file("a", b"gzip", Compression::Gzip),
        Layer::file("b", b"zstd", Compression::Zstd),
        Layer::file("c", &noise(3 << 20), Compression::Plain),
    ];
    let layers: Vec<&Layer> = layers.iter().collect();
    let image = TestImage::new(&layers);
    let index = registry.push_index("team/app", "v1", &image, &layers);
    let name = registry.name("team/app:v1");

    let pulled = node.store.pull(&name, &[], None).await.unwrap();
    assert_eq!(read(&pulled.image, 0, "a"), b"gzip");
    assert_eq!(read(&pulled.image, 1, "b"), b"zstd");
    assert_eq!(read(&pulled.image, 2, "c"), noise(3 << 20));
    assert_eq!(pulled.image.id, image.id());
    assert_eq!(pulled.image.repo_digest, registry.name(&format!("team/app@{index}")));
    assert_eq!(pulled.image.manifest_digest, image.digest().to_string());
    assert_eq!(pulled.image.config.config().as_ref().unwrap().cmd().as_ref().unwrap(), &["/app"]);
    assert!(pulled.bytes > 3 << 20 && pulled.image.size > 3 << 20);
    assert!(node.names("tmp").is_empty());

    let by_index = registry.name(&format!("team/app@{index}"));
    let by_manifest = registry.name(&format!("team/app:other@{}", image.digest()));
    for reference in [name.as_str(), &image.id(), &image.id()[7..], &by_index, &by_manifest] {
        let found = node.store.resolve(reference).unwrap().unwrap_or_else(|| panic!("{reference}"));
        assert_eq!(found.id, image.id());
    }
    let elsewhere = registry.name(&format!("team/elsewhere@{index}"));
    assert!(node.store.resolve(&elsewhere).unwrap().is_none());
    let listed = node.store.list();
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].repo_tags, &listed[0].repo_digests), (&vec![name.clone()], &vec![by_index]));

    // Nothing has moved: one question, no download.
    registry.clear_log();
    let again = node.store.pull(&name, &[], None).await.unwrap();
    assert_eq!(again.bytes, 0);
    assert_eq!(registry.log(), [format!("HEAD {}", manifest("team/app", "v1"))]);
}

#[tokio::test]
async fn a_moved_tag_keeps_the_old_image_by_digest() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let (one, two) = (Layer::file("a", b"1", Compression::Gzip), Layer::file("a", b"2", Compression::Gzip));
    let (old, new) = (TestImage::new(&[&one]), TestImage::new(&[&two, &two]));
    registry.push("app", "v", &old, &[&one]);
    let name = registry.name("app:v");
    let first = node.store.pull(&name, &[], None).await.unwrap().image;
    registry.push("app", "v", &new, &[&two]);
    let second = node.store.pull(&name, &[], None).await.unwrap().image;
    assert_eq!((read(&first, 0, "a"), read(&second, 1, "a")), (b"1".to_vec(), b"2".to_vec()));
    assert_eq!(node.store.resolve(&name).unwrap().unwrap().id, new.id());
    assert_eq!(node.store.resolve(&first.repo_digest).unwrap().unwrap().id, old.id());
    // The same blob twice in one image came once, and became two layers.
    assert_eq!(registry.count(&format!("GET {}", blob("app", &two.digest))), 1);
    assert_ne!(second.layers[0], second.layers[1]);
}

#[tokio::test]
async fn wrong_content_is_refused_and_leaves_nothing() {
    let layer = Layer::file("a", &noise(100_000), Compression::Gzip);
    let image = TestImage::new(&[&layer]);
    let mut flipped = layer.blob.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut longer = layer.blob.clone();
    longer.push(0);
    for (bytes, expected) in [(flipped, "sha256:"), (longer, "longer than"), (b"not a tar".to_vec(), "9 of")] {
        let (registry, node) = (TestRegistry::start().await, TestStore::new());
        registry.push("app", "v", &image, &[&layer]);
        registry.put(&blob("app", &layer.digest), "x", &bytes);
        let error = node.store.pull(&registry.name("app:v"), &[], None).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        node.assert_empty();
        assert!(node.names("blobs/sha256").is_empty());
    }
}

#[tokio::test]
async fn documents_are_checked() {
    let layer = Layer::file("a", b"x", Compression::Gzip);
    let lying = Layer { diff_id: Digest::sha256(b"something else"), ..Layer::file("a", b"x", Compression::Gzip) };
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    registry.push("lying", "v", &TestImage::new(&[&lying]), &[&lying]);
    let error = node.store.pull(&registry.name("lying:v"), &[], None).await.unwrap_err();
    assert!(matches!(&error, ImageError::Layer { .. }) && error.to_string().contains("uncompressed"), "{error}");
    assert_eq!(error.reason(), "ErrImagePull");

    let image = TestImage::new(&[&layer]);
    registry.push("swapped", "v", &image, &[&layer]);
    registry.put(&manifest("swapped", image.digest().as_str()), "x", b"{}");
    let by_digest = registry.name(&format!("swapped@{}", image.digest()));
    let error = node.store.pull(&by_digest, &[], None).await.unwrap_err();
    assert!(error.to_string().contains("sent something else for manifest"), "{error}");

    registry.put(&manifest("huge", "v"), "x", &vec![b' '; 5 << 20]);
    let error = node.store.pull(&registry.name("huge:v"), &[], None).await.unwrap_err();
    assert!(error.to_string().contains("larger than the limit"), "{error}");
    registry.put(&manifest("odd", "v"), "x", b"<html>");
    let error = node.store.pull(&registry.name("odd:v"), &[], None).await.unwrap_err();
    assert!(error.to_string().contains("manifest is not valid") && !error.is_transient(), "{error}");
    node.assert_empty();
}

#[tokio::test]
async fn broken_downloads_go_on_where_they_stopped() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", &noise(400_000), Compression::Plain);
    let image = TestImage::new(&[&layer]);
    registry.push("app", "v", &image, &[&layer]);
    let path = blob("app", &layer.digest);
    registry.fault(&path, [Fault::Truncate(100_000), Fault::Status(503), Fault::NoRange, Fault::Truncate(1)]);
    // The third reply is whole although a part was asked for; what is known already is skipped.
    let pulled = node.store.pull(&registry.name("app:v"), &[], None).await.unwrap();
    assert_eq!(read(&pulled.image, 0, "a"), noise(400_000));
    let from = format!("GET {path} from 100000");
    assert_eq!(registry.count(&from), 2, "{:?}", registry.log());
    assert_eq!(registry.count(&format!("GET {path}")), 1);
}

#[tokio::test]
async fn silence_becomes_registry_unavailable() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", &noise(10_000), Compression::Plain);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    registry.fault(&blob("app", &layer.digest), vec![Fault::Stall(1000); 5]);
    let name = registry.name("app:v");
    let error = node.store.pull(&name, &[], None).await.unwrap_err();
    assert_eq!(error.reason(), "RegistryUnavailable", "{error}");
    assert!(error.is_transient() && error.to_string().contains(&name));
    node.assert_empty();
}

#[tokio::test]
async fn server_errors_are_tried_again() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", b"a", Compression::Plain);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    let name = registry.name("app:v");
    registry.fault(&manifest("app", "v"), vec![Fault::Status(503); 5]);
    let error = node.store.pull(&name, &[], None).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with(&format!("image pull failed for {name} because the registry is unavailable: 503"))
    );
    registry.fault(&manifest("app", "v"), [Fault::Status(500), Fault::Status(429)]);
    node.store.pull(&name, &[], None).await.unwrap();
}

#[tokio::test]
async fn nobody_listens() {
    let node = TestStore::new();
    let error = node.store.pull("127.0.0.1:1/app:v", &[], None).await.unwrap_err();
    assert_eq!(error.reason(), "RegistryUnavailable", "{error}");
}

#[tokio::test]
async fn missing_names_read_as_with_containerd() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let name = registry.name("nothing:here");
    let error = node.store.pull(&name, &[], None).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "failed to pull and unpack image \"{name}\": failed to resolve reference \"{name}\": {name}: not found"
        )
    );
    assert_eq!(error.reason(), "ErrImagePull");
    assert_eq!(node.store.pull("In/valid:", &[], None).await.unwrap_err().reason(), "InvalidImageName");
    assert!(registry.log().iter().all(|line| line.contains("nothing")));
}

#[tokio::test]
async fn credentials_are_tried_in_order() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", b"secret", Compression::Gzip);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    registry.require_login("user", "hunter2");
    let name = registry.name("app:v");
    let wrong = Credential::basic("user", "letmein");
    for credentials in [vec![], vec![wrong.clone()]] {
        let error = node.store.pull(&name, &credentials, None).await.unwrap_err();
        assert!(matches!(error, ImageError::AccessDenied { .. }), "{error}");
        assert!(error.to_string().contains("pull access denied") && error.to_string().contains("imagePullSecrets"));
        assert!(!format!("{error} {error:?}").contains("letmein"));
        node.assert_empty();
    }
    registry.clear_log();
    node.store.pull(&name, &[wrong, Credential::basic("user", "hunter2")], None).await.unwrap();
    // One token serves manifest, configuration and layer.
    assert_eq!(registry.count("GET /token"), 2);
    // Present or not: who has no credentials is not told that the name has not moved.
    assert!(node.store.pull(&name, &[], None).await.is_err());
}

#[tokio::test]
async fn redirects_are_followed_but_not_into_the_clear() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", b"x", Compression::Gzip);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    registry.put("/storage/object?signature=s3cret", "x", &layer.blob);
    let path = blob("app", &layer.digest);
    registry.fault(&path, [Fault::Redirect("http://192.0.2.1/object?signature=s3cret".into())]);
    let name = registry.name("app:v");
    let error = node.store.pull(&name, &[], None).await.unwrap_err();
    assert!(error.to_string().contains("redirect") && !error.to_string().contains("s3cret"), "{error}");
    registry.fault(&path, [Fault::Redirect(format!("http://{}/storage/object?signature=s3cret", registry.host))]);
    node.store.pull(&name, &[], None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_pulls_fetch_each_blob_once() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let shared = Layer::file("shared", &noise(200_000), Compression::Gzip);
    let (a, b) = (Layer::file("a", b"a", Compression::Gzip), Layer::file("b", b"b", Compression::Zstd));
    registry.push("one", "v", &TestImage::new(&[&shared, &a]), &[&shared, &a]);
    registry.push("two", "v", &TestImage::new(&[&shared, &b]), &[&shared, &b]);
    for repository in ["one", "two"] {
        registry.fault(&blob(repository, &shared.digest), [Fault::Delay(Duration::from_millis(150))]);
    }
    let names = [registry.name("one:v"), registry.name("two:v")];
    let pulls = (0..10).map(|at| {
        let (store, name) = (node.store.clone(), names[at % 2].clone());
        tokio::spawn(async move { store.pull(&name, &[], None).await })
    });
    for pull in futures::future::join_all(pulls).await {
        let image = pull.unwrap().unwrap().image;
        assert_eq!(read(&image, 0, "shared"), noise(200_000));
    }
    let gets = |repository: &str| registry.count(&format!("GET {}", blob(repository, &shared.digest)));
    assert_eq!(gets("one") + gets("two"), 1, "{:?}", registry.log());
    assert_eq!(registry.count(&format!("GET {}", manifest("one", "v"))), 1);
    assert_eq!(node.store.list().len(), 2);
    assert!(node.names("tmp").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_pull_leaves_nothing_unless_somebody_else_waits() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", &noise(200_000), Compression::Plain);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    let path = blob("app", &layer.digest);
    registry.fault(&path, [Fault::Stall(150_000)]);
    let name = registry.name("app:v");
    let mut pull = Box::pin(node.store.pull(&name, &[], None));
    let early = tokio::time::timeout(Duration::from_millis(250), &mut pull).await;
    assert!(early.is_err());
    assert!(!node.names("tmp").is_empty(), "the pull has begun");
    drop(pull);
    // The blocking thread notices that its download is gone.
    for _ in 0..100 {
        if node.names("tmp").is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.assert_empty();
    assert!(node.names("blobs/sha256").is_empty());

    registry.clear_log();
    registry.fault(&path, [Fault::Delay(Duration::from_millis(250))]);
    let mut first = Box::pin(node.store.pull(&name, &[], None));
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut first).await.is_err());
    let second = {
        let (store, name) = (node.store.clone(), name.clone());
        tokio::spawn(async move { store.pull(&name, &[], None).await })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(first);
    assert_eq!(read(&second.await.unwrap().unwrap().image, 0, "a"), noise(200_000));
    assert_eq!(registry.count(&format!("GET {path}")), 1);
}

#[tokio::test]
async fn progress_is_told() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let layer = Layer::file("a", &noise(100_000), Compression::Plain);
    registry.push("app", "v", &TestImage::new(&[&layer]), &[&layer]);
    registry.fault(&blob("app", &layer.digest), [Fault::Truncate(50_000), Fault::Delay(Duration::from_millis(250))]);
    let (sender, mut receiver) = tokio::sync::watch::channel(PullProgress::default());
    let (store, name) = (node.store.clone(), registry.name("app:v"));
    let pull = tokio::spawn(async move { store.pull(&name, &[], Some(sender)).await });
    let half =
        receiver.wait_for(|p| p.layers.first().is_some_and(|layer| layer.downloaded == 50_000)).await.unwrap().clone();
    assert_eq!(half.layers[0].state, LayerState::Downloading);
    assert_eq!(half.layers[0].digest, layer.digest.to_string());
    assert_eq!(half.layers[0].total, layer.blob.len() as u64);
    pull.await.unwrap().unwrap();
}

#[tokio::test]
async fn directories_that_a_layer_only_implies_keep_their_attributes() {
    let (registry, node) = (TestRegistry::start().await, TestStore::new());
    let lower = tar_of(&[
        Member::dir("./").mode(0o711).owner(3, 4),
        Member::dir("tmp").mode(0o1777),
        Member::dir("home").owner(5, 6),
        Member::dir("home/user").mode(0o700).owner(1000, 1000).pax("SCHILY.xattr.user.k", b"v"),
    ]);
    let upper = tar_of(&[Member::file("tmp/x", b""), Member::file("home/user/bin/tool", b"")]);
    let layers = [Layer::new(&lower, Compression::Gzip), Layer::new(&upper, Compression::Gzip)];
    let layers: Vec<&Layer> = layers.iter().collect();
    registry.push("app", "v", &TestImage::new(&layers), &layers);
    let image = node.store.pull(&registry.name("app:v"), &[], None).await.unwrap().image;
    let stat = |path: &str| {
        let stat = rustix::fs::stat(image.layers[1].join(path)).unwrap();
        (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid)
    };
    assert_eq!(stat("."), (0o711, 3, 4));
    assert_eq!(stat("tmp"), (0o1777, 0, 0));
    assert_eq!(stat("home"), (0o755, 5, 6));
    assert_eq!(stat("home/user"), (0o700, 1000, 1000));
    assert_eq!(stat("home/user/bin"), (0o755, 0, 0));
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(image.layers[1].join("home/user"), "user.k", &mut value).unwrap();
    assert_eq!(&value[..length], b"v");
}
