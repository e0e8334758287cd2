use super::*;
use crate::objects::CertificateOptions;
use crate::objects::fake_api::FakeApi;
use crate::volume::mounts::Scratch;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::ImageVolumeSource;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;

const CONFIG_MAPS: &str = "/api/v1/namespaces/ns/configmaps";
const SECRETS: &str = "/api/v1/namespaces/ns/secrets";

struct Node {
    scratch: Scratch,
    api: FakeApi,
    objects: Arc<ObjectCache>,
    manager: VolumeManager,
}

fn config_map(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "ns", "name": name}, "data": data})
}

impl Node {
    fn new() -> Self {
        let (scratch, api) = (Scratch::new(), FakeApi::new());
        api.put(CONFIG_MAPS, &config_map("cm", json!({"a": "1"})));
        api.put(SECRETS, &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": "ns", "name": "sec"}, "data": {"s": "eA=="}}));
        api.on_token(|_, body| {
            let status = json!({"token": "tok", "expirationTimestamp": "2999-01-01T00:00:00Z"});
            Ok(json!({"metadata": {}, "spec": body["spec"], "status": status}))
        });
        let objects = Arc::new(ObjectCache::new(api.client()));
        let tokens = Arc::new(TokenManager::new(api.client()));
        let config = VolumeConfig { root_dir: scratch.0.path().to_owned() };
        let manager = VolumeManager::new(config, objects.clone(), tokens);
        Self { scratch, api, objects, manager }
    }

    /// A registered Pod whose container mounts every volume.
    fn pod(&self, volumes: Value, security_context: Value) -> Pod {
        let mounts: Vec<Value> = volumes.as_array().unwrap().iter()
            .map(|volume| json!({"name": volume["name"], "mountPath": format!("/m/{}", volume["name"].as_str().unwrap())})).collect();
        let pod = serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": "p", "uid": "uid-1", "labels": {"k": "v"}},
            "spec": {"securityContext": security_context, "volumes": volumes, "containers": [{"name": "c", "volumeMounts": mounts}]}
        })).unwrap();
        self.objects.register_pod(&pod);
        pod
    }

    fn path(&self, path: &str) -> PathBuf {
        self.scratch.0.path().join("pods/uid-1/volumes").join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }
}

fn context() -> FieldContext {
    FieldContext::default()
}

fn every_kind() -> Value {
    json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "cm", "configMap": {"name": "cm"}},
        {"name": "sec", "secret": {"secretName": "sec", "defaultMode": 256}},
        {"name": "down", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"name": "proj", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
            {"configMap": {"name": "cm", "items": [{"key": "a", "path": "deep/a"}]}}]}}
    ])
}

#[tokio::test]
async fn mounts_every_kind_where_kubelet_does_and_takes_all_down() {
    let node = Node::new();
    let pod = node.pod(every_kind(), json!({"fsGroup": 4321}));
    for _ in 0..2 {
        let mounted = node.manager.mount(&pod, &context()).await.unwrap();
        assert_eq!(mounted.len(), 6);
        assert_eq!(
            mounted["cm"],
            MountedVolume {
                path: node.path("kubernetes.io~configmap/cm"),
                read_only: true,
                kind: VolumeKind::ConfigMap
            }
        );
        assert!(!mounted["disk"].read_only && mounted["proj"].read_only);
        for (path, content) in [
            ("kubernetes.io~configmap/cm/a", "1"),
            ("kubernetes.io~secret/sec/s", "x"),
            ("kubernetes.io~downward-api/down/labels", "k=\"v\""),
            ("kubernetes.io~projected/proj/token", "tok"),
            ("kubernetes.io~projected/proj/deep/a", "1"),
        ] {
            assert_eq!(node.read(path), content);
            assert_eq!(fs::metadata(node.path(path)).unwrap().gid(), 4321, "{path}");
        }
        let mode = |path: &str| fs::metadata(node.path(path)).unwrap().mode() & 0o7777;
        assert_eq!(mode("kubernetes.io~secret/sec/s"), 0o440);
        assert_eq!(mode("kubernetes.io~projected/proj/token"), 0o640);
        assert_eq!(mode("kubernetes.io~empty-dir/disk"), 0o2777);
        for (path, is) in [
            ("secret/sec", true),
            ("projected/proj", true),
            ("downward-api/down", true),
            ("empty-dir/mem", true),
            ("configmap/cm", false),
            ("empty-dir/disk", false),
        ] {
            assert_eq!(mounts::is_mount_point(&node.path(&format!("kubernetes.io~{path}"))).unwrap(), is, "{path}");
        }
    }
    assert!(node.manager.next_refresh(&pod).is_some());
    assert_eq!(node.manager.orphans().unwrap(), ["uid-1"]);
    for _ in 0..2 {
        node.manager.unmount("uid-1").await.unwrap();
        assert_eq!(node.manager.orphans().unwrap(), Vec::<String>::new());
    }
    assert_eq!(mounts::mounts_below(node.scratch.0.path()).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(node.manager.next_refresh(&pod), None);
    assert!(node.manager.locks.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_new_agent_takes_down_what_an_old_one_mounted() {
    let node = Node::new();
    let pod = node.pod(every_kind(), json!({}));
    node.manager.mount(&pod, &context()).await.unwrap();
    let config = VolumeConfig { root_dir: node.scratch.0.path().to_owned() };
    let next = VolumeManager::new(config, Arc::new(ObjectCache::standalone()), Arc::new(TokenManager::standalone()));
    assert_eq!(next.orphans().unwrap(), ["uid-1"]);
    next.unmount("uid-1").await.unwrap();
    assert!(next.orphans().unwrap().is_empty());
    assert!(matches!(next.unmount("../x").await, Err(VolumeError::PodUid(_))));
    assert!(matches!(next.unmount("").await, Err(VolumeError::PodUid(_))));
}

#[tokio::test]
async fn content_follows_the_api_server() {
    let node = Node::new();
    let mut pod = node.pod(every_kind(), json!({}));
    let mut changes = node.objects.subscribe();
    node.manager.refresh(&pod, &context()).await.unwrap();
    assert!(!node.path("kubernetes.io~configmap/cm").exists(), "a refresh mounts nothing");
    node.manager.mount(&pod, &context()).await.unwrap();
    while changes.try_recv().is_ok() {}
    node.api.put(CONFIG_MAPS, &config_map("cm", json!({"a": "2", "b": "3"})));
    assert!(changes.recv().await.unwrap().concerns(&pod));
    pod.metadata.labels.as_mut().unwrap().insert("k".into(), "w".into());
    node.manager.refresh(&pod, &context()).await.unwrap();
    assert_eq!(node.read("kubernetes.io~configmap/cm/a"), "2");
    assert_eq!(node.read("kubernetes.io~configmap/cm/b"), "3");
    assert_eq!(node.read("kubernetes.io~projected/proj/deep/a"), "2");
    assert_eq!(node.read("kubernetes.io~downward-api/down/labels"), "k=\"w\"");
    node.api.delete(CONFIG_MAPS, "ns", "cm");
    changes.recv().await.unwrap();
    let error = node.manager.refresh(&pod, &context()).await.unwrap_err();
    assert!(error.to_string().contains("volume \"cm\" : configmap \"cm\" not found"), "{error}");
    assert_eq!(node.read("kubernetes.io~configmap/cm/a"), "2", "the old content stays");
}

#[tokio::test]
async fn trust_bundles_are_shown_and_followed() {
    const BUNDLES: &str = "/apis/certificates.k8s.io/v1/clustertrustbundles";
    let node = Node::new();
    let bundle = |name: &str, body: &str| {
        let pem = format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        json!({"kind": "ClusterTrustBundle", "metadata": {"name": name}, "spec": {"signerName": "ex.org/s", "trustBundle": pem}})
    };
    node.api.put(BUNDLES, &bundle("ex.org:s:1", "AAAA"));
    let volumes = json!([{"name": "v", "projected": {"sources": [
        {"clusterTrustBundle": {"signerName": "ex.org/s", "labelSelector": {}, "path": "all.pem", "user": 0}},
        {"clusterTrustBundle": {"name": "ex.org:s:1", "path": "one.pem", "user": 0}},
        {"clusterTrustBundle": {"name": "none", "optional": true, "path": "none.pem", "user": 0}}]}}]);
    let mut changes = node.objects.subscribe();
    let pod = node.pod(volumes, json!({"runAsUser": 1000}));
    node.manager.mount(&pod, &context()).await.unwrap();
    assert!(changes.recv().await.unwrap().concerns(&pod));
    let [all, one, none] = ["all", "one", "none"].map(|name| format!("kubernetes.io~projected/v/{name}.pem"));
    let pem = node.read(&one);
    assert!(pem.contains("AAAA") && node.read(&all) == pem);
    assert_eq!(fs::metadata(node.path(&none)).unwrap().len(), 0);
    let owner = fs::metadata(node.path(&one)).unwrap();
    assert_eq!((owner.uid(), owner.mode() & 0o777), (0, 0o600), "the source's user wins over the container's");
    node.api.put(BUNDLES, &bundle("ex.org:s:2", "BBBB"));
    assert!(changes.recv().await.unwrap().concerns(&pod));
    node.manager.refresh(&pod, &context()).await.unwrap();
    assert!(node.read(&all).contains("BBBB") && node.read(&one) == pem);
    node.manager.unmount("uid-1").await.unwrap();
}

#[tokio::test]
async fn certificates_are_written_and_renewed() {
    const REQUESTS: &str = "/apis/certificates.k8s.io/v1/namespaces/ns/podcertificaterequests";
    let node = Node::new();
    node.api.put("/api/v1/namespaces/ns/serviceaccounts", &json!({"metadata": {"namespace": "ns", "name": "default"}}));
    let object = serde_json::from_value(json!({"metadata": {"uid": "n"}})).unwrap();
    let known = tokio::sync::watch::channel(Some(Arc::new(object))).1;
    let options = CertificateOptions { jitter: Duration::ZERO, pause: Duration::ZERO };
    let certificates = CertificateManager::new(node.api.client(), "n", known, Box::new(|_, _, _| {}), options);
    let manager = VolumeManager::new(
        VolumeConfig { root_dir: node.scratch.0.path().to_owned() },
        node.objects.clone(),
        Arc::new(TokenManager::standalone()),
    )
    .with_certificates(Arc::new(certificates));
    let both =
        json!({"signerName": "ex.org/s", "keyType": "ED25519", "keyPath": "key", "certificateChainPath": "chain"});
    let bundle = json!({"signerName": "ex.org/s", "keyType": "ECDSAP256", "credentialBundlePath": "bundle", "user": 0});
    let volumes =
        json!([{"name": "v", "projected": {"sources": [{"podCertificate": both}, {"podCertificate": bundle}]}}]);
    let pod = node.pod(volumes, json!({}));
    let sign = |body: &str, refresh: &str| {
        for mut request in node.api.list(REQUESTS).into_iter().filter(|request| request["status"].is_null()) {
            request["status"] = json!({"conditions": [{"type": "Issued", "status": "True", "reason": "r", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}], "notAfter": "2999-01-02T00:00:00Z", "beginRefreshAt": refresh,
                "certificateChain": format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")});
            node.api.put(REQUESTS, &request);
        }
    };
    assert!(manager.is_inherited("uid-1"));
    let mut renewed = manager.new_certificates();
    let fields = context();
    let (mounted, ()) = tokio::join!(manager.mount(&pod, &fields), async {
        node.api.until(|| node.api.list(REQUESTS).len() == 2).await;
        sign("AAAA", "2026-01-01T00:00:00Z");
    });
    mounted.unwrap();
    assert!(!manager.is_inherited("uid-1"));
    let [key, chain, both] = ["key", "chain", "bundle"].map(|name| format!("kubernetes.io~projected/v/{name}"));
    let old = node.read(&key);
    assert!(old.starts_with("-----BEGIN PRIVATE KEY-----") && node.read(&chain).contains("AAAA"));
    assert!(node.read(&both).starts_with("-----BEGIN PRIVATE KEY-----") && node.read(&both).contains("AAAA"));
    let mode = |path: &str| fs::metadata(node.path(path)).unwrap().mode() & 0o777;
    assert_eq!((mode(&key), mode(&both)), (0o644, 0o600), "only its owner may read a file that has one");
    for _ in 0..2 {
        assert_eq!(renewed.recv().await.unwrap(), "uid-1");
    }
    node.api.until(|| node.api.list(REQUESTS).len() == 4).await;
    manager.refresh(&pod, &context()).await.unwrap();
    assert_eq!(node.read(&key), old, "the old one serves until there is a new one");
    sign("BBBB", "2999-01-01T00:00:00Z");
    for _ in 0..2 {
        assert_eq!(renewed.recv().await.unwrap(), "uid-1");
    }
    manager.refresh(&pod, &context()).await.unwrap();
    assert!(node.read(&key) != old && node.read(&chain).contains("BBBB") && node.read(&both).contains("BBBB"));
    manager.unmount("uid-1").await.unwrap();
    assert!(manager.is_inherited("uid-1"));
}

#[tokio::test]
async fn failures_name_each_volume_and_the_others_are_mounted() {
    let node = Node::new();
    let volumes = json!([
        {"name": "a", "configMap": {"name": "none"}},
        {"name": "b", "configMap": {"name": "none", "optional": true}},
        {"name": "c", "persistentVolumeClaim": {"claimName": "x"}},
        {"name": "d", "projected": {"sources": [{"secret": {"name": "none"}}, {"clusterTrustBundle": {"path": "p"}}]}},
        {"name": "e", "hostPath": {"path": "/nonexistent", "type": "Directory"}},
        {"name": "f", "image": {"reference": "img"}},
        {"name": "g", "emptyDir": {}}]);
    let pod = node.pod(volumes, json!({}));
    let VolumeError::SetUp(failures) = node.manager.mount(&pod, &context()).await.unwrap_err() else { panic!() };
    let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
    assert_eq!(texts[0], "MountVolume.SetUp failed for volume \"a\" : configmap \"none\" not found");
    assert!(texts[1].starts_with(
        "MountVolume.SetUp failed for volume \"c\" : this node cannot mount volumes of kind persistentVolumeClaim"
    ));
    assert!(
        texts[2].contains(
            "[secret \"none\" not found, ClusterTrustBundle projection requires either name or signerName to be set]"
        ),
        "{}",
        texts[2]
    );
    assert!(texts[3].contains("hostPath type check failed"));
    assert!(texts[4].contains("volumes[].image \"img\""));
    assert_eq!(texts.len(), 5);
    assert!(node.path("kubernetes.io~configmap/b").is_dir() && node.path("kubernetes.io~empty-dir/g").is_dir());
    node.manager.unmount("uid-1").await.unwrap();
}

#[tokio::test]
async fn volumes_that_no_container_uses_are_left_alone() {
    let node = Node::new();
    let mut pod = node.pod(every_kind(), json!({}));
    pod.spec.as_mut().unwrap().containers[0].volume_mounts.as_mut().unwrap().retain(|mount| mount.name == "disk");
    let mounted = node.manager.mount(&pod, &context()).await.unwrap();
    assert_eq!(mounted.keys().collect::<Vec<_>>(), ["disk"]);
    node.manager.unmount("uid-1").await.unwrap();
}

#[tokio::test]
async fn host_data_survives() {
    let node = Node::new();
    let precious = node.scratch.dir("precious");
    fs::write(precious.join("data"), "keep").unwrap();
    let volumes =
        json!([{"name": "h", "hostPath": {"path": precious.to_str().unwrap()}}, {"name": "e", "emptyDir": {}}]);
    let pod = node.pod(volumes, json!({"fsGroup": 99}));
    let mounted = node.manager.mount(&pod, &context()).await.unwrap();
    assert_eq!((mounted["h"].path.as_path(), mounted["h"].read_only), (precious.as_path(), false));
    // A container with Bidirectional propagation can mount things into its emptyDir.
    let point = mounted["e"].path.join("mnt");
    fs::create_dir(&point).unwrap();
    rustix::mount::mount_bind(&precious, &point).unwrap();
    node.manager.unmount("uid-1").await.unwrap();
    assert_eq!(fs::read_to_string(precious.join("data")).unwrap(), "keep");
    assert_eq!(fs::metadata(&precious).unwrap().gid(), 0, "fsGroup is not for hostPath");
}

struct Images;

impl ImageVolumes for Images {
    fn mount<'a>(
        &'a self,
        _: &'a Pod,
        volume: &'a str,
        source: &'a ImageVolumeSource,
        target: PathBuf,
    ) -> BoxFuture<'a, Result<PathBuf, String>> {
        Box::pin(async move {
            assert_eq!((volume, source.reference.as_deref()), ("i", Some("img")));
            mounts::mount_tmpfs(&target, None).map_err(|error| error.to_string())?;
            Ok(target)
        })
    }

    fn release(&self, uid: &str) {
        assert_eq!(uid, "uid-1");
    }
}

#[tokio::test]
async fn image_volumes_go_through_the_seam() {
    let node = Node::new();
    let config = VolumeConfig { root_dir: node.scratch.0.path().to_owned() };
    let manager = VolumeManager::new(config, node.objects.clone(), Arc::new(TokenManager::standalone()))
        .with_image_volumes(Arc::new(Images));
    let pod = node.pod(json!([{"name": "i", "image": {"reference": "img"}}]), json!({}));
    let mounted = manager.mount(&pod, &context()).await.unwrap();
    assert!(mounted["i"].read_only && mounts::is_mount_point(&mounted["i"].path).unwrap());
    manager.unmount("uid-1").await.unwrap();
    assert!(!mounted["i"].path.exists());
}

#[test]
fn nested_mount_points_are_the_outermost_ones() {
    let spec: PodSpec = serde_json::from_value(json!({"containers": [
        {"name": "a", "volumeMounts": [
            {"name": "v", "mountPath": "/dir"}, {"name": "w", "mountPath": "/dir/nested/"}, {"name": "w", "mountPath": "/dir/nested-vol"},
            {"name": "w", "mountPath": "/dir/nested/double"}, {"name": "w", "mountPath": "/directory"}, {"name": "w", "mountPath": "/dir/../dir/x/y"}]},
        {"name": "b", "volumeMounts": [{"name": "w", "mountPath": "/dir/other"}, {"name": "v", "mountPath": "/v"}]}]})).unwrap();
    let expected = ["nested", "nested-vol", "x/y"].map(PathBuf::from);
    assert_eq!(nested_mount_points("v", &spec), expected);
}
