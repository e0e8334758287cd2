use serde_json::{Value, json};

use super::*;
use crate::image::{Image, ImageError, is_called};

/// What `docker save` writes; newer versions write a layout as well.
fn docker_archive(image: &TestImage, layers: &[&Layer], tags: &Value) -> Vec<Member> {
    let names: Vec<_> = (0..layers.len()).map(|at| format!("{at}/layer.tar")).collect();
    let list = json!([{"Config": "config.json", "RepoTags": tags, "Layers": names}]);
    let mut members = vec![Member::dir("0/"), Member::file("./manifest.json", list.to_string().as_bytes())];
    members.extend(layers.iter().zip(&names).map(|(layer, name)| Member::file(name, &layer.blob)));
    members.push(Member::file("config.json", &image.config));
    members
}

/// An OCI layout with one entry, which is the image itself or an index with it.
fn oci_archive(image: &TestImage, layers: &[&Layer], indexed: bool, annotations: &Value) -> Vec<Member> {
    let blob = |bytes: &[u8]| Member::file(&format!("blobs/sha256/{}", Digest::sha256(bytes).hex()), bytes);
    let (top, media_type) = if indexed { (image.index(), OCI_INDEX) } else { (image.manifest.clone(), OCI_MANIFEST) };
    let entry = json!({
        "mediaType": media_type, "digest": Digest::sha256(&top), "size": top.len(), "annotations": annotations,
    });
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    let mut members = vec![blob(&top), blob(&image.manifest), blob(&image.config)];
    members.extend(layers.iter().map(|layer| blob(&layer.blob)));
    members.push(Member::file("index.json", index.as_bytes()));
    members
}

fn two_layers() -> (Layer, Layer) {
    let below = Layer::file("a", b"below", Compression::Plain);
    (below, Layer::file("b", b"above", Compression::Gzip))
}

fn import(node: &TestStore, members: &[Member]) -> Result<Vec<Image>, ImageError> {
    node.store.import(tar_of(members).as_slice())
}

fn refused(members: &[Member]) -> String {
    let node = TestStore::new();
    let error = import(&node, members).unwrap_err();
    assert!(matches!(error, ImageError::Archive { .. }), "{error:?}");
    node.assert_empty();
    error.to_string()
}

#[test]
fn what_docker_saves_is_an_image_with_all_its_names() {
    let node = TestStore::new();
    let (below, above) = two_layers();
    let image = TestImage::new(&[&below, &above]);
    let mut members = docker_archive(&image, &[&below, &above], &json!(["app:v1", "registry.test/app:v2"]));
    // the same content once more is a link, as old versions write it
    members[2] = Member::symlink("0/layer.tar", "../real/layer.tar");
    members.push(Member::file("real/layer.tar", &below.blob));
    let imported = import(&node, &members).unwrap();
    let names: Vec<_> = imported.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, ["docker.io/library/app:v1", "registry.test/app:v2"]);
    assert_eq!(imported[0].id, image.id());
    assert_eq!(std::fs::read(imported[0].layers[0].join("a")).unwrap(), b"below");
    assert_eq!(std::fs::read(imported[0].layers[1].join("b")).unwrap(), b"above");
    assert!(node.names("tmp").is_empty());
    drop(imported);
    // it survives a restart, and comes once more without harm
    let TestStore { store, dir } = node;
    drop(store);
    let node = TestStore { store: open(dir.path()), dir };
    assert_eq!(node.store.list()[0].repo_tags.len(), 2);
    assert_eq!(import(&node, &members).unwrap().len(), 2);
    let by_digest = node.store.list()[0].repo_digests[0].clone();
    assert_eq!(node.store.resolve(&by_digest).unwrap().unwrap().id, image.id());
}

#[test]
fn a_layout_is_an_image_of_this_machine() {
    let (below, above) = two_layers();
    let image = TestImage::new(&[&below, &above]);
    for (indexed, annotations) in [
        (false, json!({"org.opencontainers.image.ref.name": "app:v1"})),
        (
            true,
            json!({"org.opencontainers.image.ref.name": "v1", "io.containerd.image.name": "docker.io/library/app:v1"}),
        ),
    ] {
        let node = TestStore::new();
        let mut members = oci_archive(&image, &[&below, &above], indexed, &annotations);
        // where both forms are there, the layout counts
        members.push(Member::file("manifest.json", b"[]"));
        let packed = zstd::encode_all(tar_of(&members).as_slice(), 1).unwrap();
        let imported = node.store.import(packed.as_slice()).unwrap();
        assert_eq!((imported.len(), imported[0].id.clone()), (1, image.id()));
        let top = if indexed { Digest::sha256(&image.index()) } else { image.digest() };
        assert_eq!(imported[0].repo_digest, format!("docker.io/library/app@{top}"));
        assert_eq!(imported[0].manifest_digest, image.digest().to_string());
    }
}

#[test]
fn a_tag_is_one_more_name() {
    let node = TestStore::new();
    let (below, above) = two_layers();
    let image = TestImage::new(&[&below, &above]);
    import(&node, &docker_archive(&image, &[&below, &above], &json!(["app:v1"]))).unwrap();
    assert!(node.store.tag("nothing:v1", "x:v1").unwrap().is_none());
    assert!(node.store.tag("app:v1", "No Name").is_err());
    let tagged = node.store.tag(&image.id(), "registry.test/app:new").unwrap().unwrap();
    assert_eq!((tagged.name.as_str(), tagged.id.clone()), ("registry.test/app:new", image.id()));
    assert_eq!(node.store.list()[0].repo_tags, ["docker.io/library/app:v1", "registry.test/app:new"]);
}

#[test]
fn wrong_archives_are_refused_and_leave_nothing() {
    let (below, above) = two_layers();
    let image = TestImage::new(&[&below, &above]);
    let layers = [&below, &above];
    let docker = |tags: Value| docker_archive(&image, &layers, &tags);
    let named = json!({"org.opencontainers.image.ref.name": "app:v1"});

    assert!(refused(&[]).contains("neither index.json nor manifest.json"));
    assert!(refused(&docker(json!(null))).contains("save it by name"));
    assert!(refused(&oci_archive(&image, &layers, false, &json!({}))).contains("has no name"));
    assert!(
        refused(&oci_archive(&image, &layers, false, &json!({"org.opencontainers.image.ref.name": "v1"})))
            .contains("only the tag \"v1\"")
    );
    for gone in [1, 2, 3] {
        let mut members = oci_archive(&image, &layers, true, &named);
        members.remove(gone);
        assert!(refused(&members).contains("is missing"), "{gone}");
    }
    let mut members = oci_archive(&image, &layers, false, &named);
    members[3].content.push(0);
    assert!(refused(&members).contains("has digest"));
    let mut members = docker(json!(["app:v1"]));
    members.remove(3);
    assert!(refused(&members).contains("1/layer.tar is named in it, but not there"));
    for path in ["../x", "a/../../x", "/../etc/passwd"] {
        assert!(refused(&[Member::file(path, b"")]).contains("leads out of the archive"), "{path}");
    }
    assert!(refused(&[Member::file(&"a".repeat(600), b"")]).contains("600 bytes"));
    assert!(refused(&[Member::new("null", tar::EntryType::Char)]).contains("device"));
    assert!(refused(&[Member::symlink("manifest.json", "manifest.json")]).contains("neither"));
    assert!(refused(&[Member::file("index.json", &vec![b' '; 5 << 20])]).contains("the limit is"));
    let node = TestStore::new();
    let whole = tar_of(&docker(json!(["app:v1"])));
    assert!(node.store.import(&whole[..1700]).is_err());
    node.assert_empty();
}

#[test]
fn a_wrong_layer_is_refused_by_its_diff_id() {
    let (below, above) = two_layers();
    let image = TestImage::new(&[&below, &above]);
    let other = Layer::file("b", b"other", Compression::Gzip);
    let node = TestStore::new();
    let error = import(&node, &docker_archive(&image, &[&below, &other], &json!(["app:v1"]))).unwrap_err();
    assert!(error.to_string().contains("the image configuration says"), "{error}");
    node.assert_empty();
}

#[test]
fn images_are_called_by_name_and_by_id() {
    let id = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let names = ["docker.io/library/app:v1".to_owned()];
    for text in ["app:v1", "docker.io/library/app:v1", &id, &id[7..], &id[7..19], &id[..19]] {
        assert!(is_called(text, &id, &names), "{text}");
    }
    for text in ["app", "app:v2", "", "0123", "0123456789abcdee", "No Name"] {
        assert!(!is_called(text, &id, &names), "{text}");
    }
}
