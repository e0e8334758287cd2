//! The manager with a plugin that is made of its own messages.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{Container, Pod};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::api::{
    AllocateRequest, AllocateResponse, ContainerResponse, DeviceIds, Empty, ListedDevice, Listing, PluginOptions,
    PreferenceRequest, PreferenceResponse, RegisterRequest,
};
use super::*;
use crate::resources::amounts::Amounts;
use crate::resources::fixture::{container, pod};
use crate::stream::grpc::{Channel, Status};

const RESOURCE: &str = "r.test/x";
const LIMIT: Duration = Duration::from_secs(5);

/// A plugin on a socket: it lists what `devices` says, prefers the last ones, and notes what it is asked.
struct Plugin {
    devices: watch::Sender<Vec<(&'static str, &'static str)>>,
    asked: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
}

type Frames = futures::stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>;

fn framed(message: &impl Message) -> Frame<Bytes> {
    let bytes = message.encode_to_vec();
    let mut data = BytesMut::new();
    data.put_u8(0);
    data.put_u32(u32::try_from(bytes.len()).unwrap());
    data.put_slice(&bytes);
    Frame::data(data.freeze())
}

impl Plugin {
    fn start(socket: &Path, devices: &[(&'static str, &'static str)]) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (devices, _) = watch::channel(devices.to_vec());
        let plugin = Self { devices, asked: Arc::default(), stop: CancellationToken::new() };
        let (listed, asked, stop) = (plugin.devices.subscribe(), plugin.asked.clone(), plugin.stop.clone());
        tokio::spawn(async move {
            loop {
                let (stream, _) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    () = stop.cancelled() => return,
                };
                let (listed, asked, stop) = (listed.clone(), asked.clone(), stop.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(request, listed.clone(), asked.clone()));
                    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    tokio::select! {
                        _ = builder.serve_connection(TokioIo::new(stream), service) => {}
                        () = stop.cancelled() => {}
                    }
                });
            }
        });
        plugin
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(
    request: Request<Incoming>,
    listed: watch::Receiver<Vec<(&'static str, &'static str)>>,
    asked: Arc<Mutex<Vec<String>>>,
) -> Result<Response<StreamBody<Frames>>, Infallible> {
    let path = request.uri().path().to_owned();
    let bytes = request.into_body().collect().await.unwrap().to_bytes().slice(5..);
    let method = path.rsplit('/').next().unwrap();
    let done = |message: Frame<Bytes>| {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        futures::stream::iter([Ok(message), Ok(Frame::trailers(trailers))]).boxed()
    };
    let note = |what: String| asked.lock().unwrap().push(what);
    let frames: Frames = match method {
        "GetDevicePluginOptions" => {
            done(framed(&PluginOptions { pre_start_required: true, preferred_allocation: true }))
        }
        "ListAndWatch" => tokio_stream::wrappers::WatchStream::new(listed)
            .map(|devices| {
                let device = |(id, health): (&str, &str)| ListedDevice {
                    id: id.to_owned(),
                    health: health.to_owned(),
                    topology: None,
                };
                Ok(framed(&Listing { devices: devices.into_iter().map(device).collect() }))
            })
            .boxed(),
        "GetPreferredAllocation" => {
            let mut wanted = PreferenceRequest::decode(bytes).unwrap().containers.remove(0);
            wanted.available.sort();
            let size = usize::try_from(wanted.size).unwrap();
            let ids = wanted.available.into_iter().rev().take(size).collect();
            done(framed(&PreferenceResponse { containers: vec![DeviceIds { ids }] }))
        }
        "Allocate" => {
            let ids = AllocateRequest::decode(bytes).unwrap().containers.remove(0).ids.join(",");
            note(format!("allocate {ids}"));
            let envs = BTreeMap::from([("IDS".to_owned(), ids)]);
            done(framed(&AllocateResponse { containers: vec![ContainerResponse { envs, ..Default::default() }] }))
        }
        "PreStartContainer" => {
            note(format!("prepare {}", DeviceIds::decode(bytes).unwrap().ids.join(",")));
            done(framed(&Empty {}))
        }
        other => panic!("{other}"),
    };
    let mut response = Response::new(StreamBody::new(frames));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    Ok(response)
}

struct Rig {
    dir: tempfile::TempDir,
    manager: Arc<DeviceManager>,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let manager = Self::life(&dir);
        Self { dir, manager }
    }

    /// One life of the agent.
    fn life(dir: &tempfile::TempDir) -> Arc<DeviceManager> {
        let manager = Arc::new(DeviceManager::open(dir.path()));
        manager.serve(dir.path().join("plugins_registry")).unwrap();
        manager
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("device-plugins/p.sock")
    }

    async fn register(&self, version: &str, resource: &str) -> Result<(), Status> {
        let channel = Channel::connect(&self.dir.path().join("device-plugins/kubelet.sock"), LIMIT).await.unwrap();
        let request = RegisterRequest {
            version: version.to_owned(),
            endpoint: "p.sock".to_owned(),
            resource_name: resource.to_owned(),
        };
        channel.unary::<_, Empty>("/v1beta1.Registration/Register", &request, LIMIT).await.map(|_| ())
    }

    async fn until(&self, capacity: usize, allocatable: usize) {
        let mut changes = self.manager.changes();
        let wanted = |totals: &Totals| {
            totals.capacity.get(RESOURCE) == Some(&capacity) && totals.allocatable.get(RESOURCE) == Some(&allocatable)
        };
        let seen = async {
            while !wanted(&self.manager.totals().0) {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(LIMIT, seen).await.unwrap_or_else(|_| panic!("{:?}", self.manager.totals()));
    }
}

fn user(uid: &str, containers: &[(&str, &str)]) -> Pod {
    let containers: Vec<Container> =
        containers.iter().map(|(name, count)| container(name, &[], &[(RESOURCE, count)])).collect();
    let mut pod = pod(containers);
    pod.metadata.uid = Some(uid.to_owned());
    pod
}

async fn ids(manager: &DeviceManager, pod: &Pod, index: usize) -> String {
    let container = &pod.spec.as_ref().unwrap().containers[index];
    let devices = manager.start(pod, container, |_| true).await.unwrap();
    devices.env.get("IDS").cloned().unwrap_or_default()
}

#[tokio::test]
async fn devices_are_given_kept_and_taken_back() {
    let rig = Rig::new();
    let error = rig.register("v2", RESOURCE).await.unwrap_err();
    assert_eq!(
        error.message,
        "requested API version \"v2\" is not supported by kubelet. Supported version is [\"v1beta1\"]"
    );
    assert_eq!(rig.register("v1beta1", "cpu").await.unwrap_err().message, "the ResourceName \"cpu\" is invalid");

    // one that serves only after it has registered is waited for
    let late = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        Plugin::start(&rig.socket(), &[("1", "Healthy"), ("2", "Healthy"), ("3", "Healthy"), ("4", "Bad")])
    };
    let (registered, plugin) = tokio::join!(rig.register("v1beta1", RESOURCE), late);
    registered.unwrap();
    rig.until(4, 3).await;
    let (first, second) = (user("u1", &[("a", "1"), ("b", "1")]), user("u2", &[("a", "2")]));
    rig.manager.allocate(&first, |_| true).await.unwrap();
    rig.manager.allocate(&first, |_| true).await.unwrap();
    assert_eq!(plugin.asked(), ["allocate 3", "allocate 2"], "once, and as preferred");
    assert_eq!((ids(&rig.manager, &first, 0).await, ids(&rig.manager, &first, 1).await), ("3".into(), "2".into()));
    assert_eq!(plugin.asked()[2..], ["prepare 3", "prepare 2"]);
    let error = rig.manager.allocate(&second, |_| true).await.unwrap_err();
    assert!(matches!(error, DeviceError::Unavailable { requested: 2, available: 1, .. }), "{error}");
    let mut offered = Amounts::default();
    rig.manager.count_in("u2", &mut offered);
    assert_eq!(offered.value(RESOURCE), 0, "it has none");
    rig.manager.count_in("u1", &mut offered);
    assert_eq!(offered.value(RESOURCE), 2);

    plugin.devices.send_replace(vec![("1", "Healthy"), ("2", "Healthy"), ("3", "Bad")]);
    rig.until(3, 2).await;
    assert_eq!(rig.manager.health()["u1"]["a"][RESOURCE], [("3".to_owned(), false)].into());

    // the next life of the agent; this one has written everything before
    assert_eq!(ids(&rig.manager, &first, 1).await, "2");
    let rig = Rig { manager: Rig::life(&rig.dir), ..rig };
    assert!(!rig.socket().exists(), "the plugin shall notice");
    rig.until(0, 0).await;
    assert_eq!(ids(&rig.manager, &first, 0).await, "3", "what was given is given");
    let error = rig.manager.allocate(&second, |_| true).await.unwrap_err();
    assert_eq!(error, DeviceError::NoneHealthy(RESOURCE.to_owned()));
    drop(plugin);
    let plugin = Plugin::start(&rig.socket(), &[("1", "Healthy"), ("2", "Healthy"), ("3", "Healthy")]);
    rig.register("v1beta1", RESOURCE).await.unwrap();
    rig.until(3, 3).await;
    rig.manager.allocate(&second, |uid| uid != "u1").await.unwrap();
    assert_eq!(ids(&rig.manager, &second, 0).await, "2,3", "the first Pod has ended");
    rig.manager.release(|_| false).await;
    assert!(rig.manager.health().is_empty());
    let (holdings, _) = checkpoint::read(&rig.dir.path().join("device-plugins")).unwrap().unwrap();
    assert_eq!(holdings.pods().count(), 0);

    plugin.stop.cancel();
    rig.until(3, 0).await;
}

#[tokio::test]
async fn a_plugin_that_registers_anew_replaces_the_one_before() {
    let rig = Rig::new();
    let plugin = Plugin::start(&rig.socket(), &[("1", "Healthy")]);
    rig.register("v1beta1", RESOURCE).await.unwrap();
    rig.until(1, 1).await;
    std::fs::remove_file(rig.socket()).unwrap();
    let newer = Plugin::start(&rig.socket(), &[("1", "Healthy"), ("2", "Healthy")]);
    rig.register("v1beta1", RESOURCE).await.unwrap();
    rig.until(2, 2).await;
    plugin.stop.cancel();
    // what the first one says, or its end, changes nothing
    rig.manager.allocate(&user("u", &[("a", "2")]), |_| true).await.unwrap();
    assert_eq!((plugin.asked().len(), newer.asked().len()), (0, 1));
    rig.until(2, 2).await;
}

#[tokio::test]
async fn resources_that_no_plugin_has_are_left_alone() {
    let rig = Rig::new();
    let pod = user("u", &[("a", "1")]);
    rig.manager.allocate(&pod, |_| true).await.unwrap();
    let container = &pod.spec.as_ref().unwrap().containers[0];
    assert_eq!(rig.manager.start(&pod, container, |_| true).await.unwrap(), ContainerDevices::default());
    // a plugin that comes later has it ready for the next start
    let _plugin = Plugin::start(&rig.socket(), &[("1", "Healthy")]);
    rig.register("v1beta1", RESOURCE).await.unwrap();
    rig.until(1, 1).await;
    let error = rig.manager.start(&pod, container, |_| true).await.unwrap_err();
    assert!(matches!(error, DeviceError::NotAllocated { .. }), "preparing comes first, as in kubelet: {error}");
}
