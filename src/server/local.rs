//! What only the local socket serves: images, pulls, and Pods that somebody at this machine wants.
//!
//! Beside it the socket has every endpoint of the HTTPS server, so that logs, exec and the list of Pods are the same
//! code for `kubectl` and for `gantry`.
//!
//! | request | answer |
//! |---|---|
//! | `GET /images` | array of [`LocalImage`] |
//! | `POST /images` with an archive | array of the names that were imported; 400 with what is wrong |
//! | `POST /images/<reference>/tag?name=<name>` | array with the new name; 404 |
//! | `DELETE /images/<reference>` | 204; 404; 409 while a container has it |
//! | `GET /pulls` | array of [`Pull`] |
//! | `POST /pods?manifest=<path>` with the manifest | array of [`PodRef`]; 400 with what is wrong; 409 if the name is taken |
//! | `DELETE /pods/<namespace>/<name>[?grace=<seconds>]` | 202: it ends; 404; 409 if another source wants it |
//! | `GET /pods/<namespace>/<name>/watch` | a [`PodNews`] on each line, until the Pod is gone |

use std::sync::Arc;

use bytes::{Buf, Bytes};
use futures::{StreamExt, future::BoxFuture, stream::BoxStream};
use http::StatusCode;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use warp::{Filter, Reply, filters::BoxedFilter, reply::Response};

use super::{
    query::Query,
    respond,
    routes::{parsed_query, segment},
};

/// Largest manifest, as for static Pods.
const MAX_MANIFEST: u64 = 10 << 20;

/// An image of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalImage {
    /// Image ID: digest of its configuration.
    pub id: String,
    /// Names with a tag.
    pub tags: Vec<String>,
    /// Names with a digest.
    pub digests: Vec<String>,
    /// Bytes.
    pub size: u64,
    /// Last use or pull, seconds since the epoch.
    pub last_used: i64,
}

/// A pull that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pull {
    /// The Pod that waits for it.
    pub uid: String,
    /// Its container.
    pub container: String,
    /// The image as the Pod names it.
    pub image: String,
    /// Layers; 0 until the manifest is known.
    pub layers: usize,
    /// Layers that are there.
    pub layers_done: usize,
    /// Compressed bytes that are there.
    pub downloaded: u64,
    /// Compressed bytes in all.
    pub total: u64,
}

/// A Pod's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRef {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

/// A Pod's state, complete every time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodNews {
    /// The Pod with its status.
    pub pod: Pod,
    /// The pulls it waits for.
    pub pulls: Vec<Pull>,
}

/// Why a local request is refused. The texts are for people; none is worth an unchanged try.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// 404.
    #[error("{0}")]
    NotFound(String),
    /// 400.
    #[error("{0}")]
    Invalid(String),
    /// 409: something else stands in the way.
    #[error("{0}")]
    Conflict(String),
    /// 500.
    #[error("{0}")]
    Internal(String),
}

impl From<LocalError> for Response {
    fn from(error: LocalError) -> Self {
        let status = match &error {
            LocalError::NotFound(_) => StatusCode::NOT_FOUND,
            LocalError::Invalid(_) => StatusCode::BAD_REQUEST,
            LocalError::Conflict(_) => StatusCode::CONFLICT,
            LocalError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        respond::text(status, error.to_string())
    }
}

/// The bytes of an archive, as they come in.
pub type Archive = BoxStream<'static, std::io::Result<Bytes>>;

/// The node, as seen by somebody at this machine.
pub trait LocalApi: Send + Sync + 'static {
    /// All images, largest first.
    fn images(&self) -> Vec<LocalImage>;

    /// Imports an archive of images; returns their names. The body is read no faster than it is written to disk.
    fn import_images(&self, archive: Archive) -> BoxFuture<'_, Result<Vec<String>, LocalError>>;

    /// Gives an image one more name; returns it in full.
    fn tag_image(&self, reference: String, name: String) -> BoxFuture<'_, Result<String, LocalError>>;

    /// Removes an image with all its names.
    fn remove_image(&self, reference: String) -> BoxFuture<'_, Result<(), LocalError>>;

    /// All pulls that run.
    fn pulls(&self) -> Vec<Pull>;

    /// Runs the Pods of a manifest; `origin` is its path, for messages and the Pods' identity. Returns when the node
    /// has taken them.
    fn run(&self, manifest: String, origin: String) -> BoxFuture<'_, Result<Vec<PodRef>, LocalError>>;

    /// Ends a Pod that came from here, with its own grace or at most `grace` seconds.
    fn remove_pod(&self, pod: PodRef, grace: Option<i64>) -> BoxFuture<'_, Result<(), LocalError>>;

    /// Follows a Pod until it is gone. Dropping the receiver ends that.
    fn watch(&self, pod: PodRef) -> Result<mpsc::Receiver<PodNews>, LocalError>;
}

pub(super) fn routes(api: Arc<dyn LocalApi>) -> BoxedFilter<(Response,)> {
    image_routes(&api).or(pod_routes(&api)).unify().boxed()
}

fn with(
    api: &Arc<dyn LocalApi>,
) -> impl Filter<Extract = (Arc<dyn LocalApi>,), Error = std::convert::Infallible> + Clone + use<> {
    let api = Arc::clone(api);
    warp::any().map(move || Arc::clone(&api))
}

fn answer<T>(result: Result<T, LocalError>, done: impl FnOnce(T) -> Response) -> Response {
    result.map_or_else(Response::from, done)
}

fn image_routes(api: &Arc<dyn LocalApi>) -> BoxedFilter<(Response,)> {
    let list = warp::path!("images")
        .and(warp::get())
        .and(with(api))
        .map(|api: Arc<dyn LocalApi>| respond::json(&api.images()));
    let import = warp::path!("images").and(warp::post()).and(warp::body::stream()).and(with(api)).then(
        async |body, api: Arc<dyn LocalApi>| {
            answer(api.import_images(archive(body)).await, |names| respond::json(&names))
        },
    );
    let tag = warp::path("images")
        .and(segment())
        .and(warp::path("tag"))
        .and(warp::path::end())
        .and(warp::post())
        .and(parsed_query())
        .and(with(api))
        .then(async |reference: String, query: Query, api: Arc<dyn LocalApi>| {
            let Some(name) = query.first("name") else {
                return LocalError::Invalid("name: the new name is missing".into()).into();
            };
            answer(api.tag_image(reference, name.to_owned()).await, |name| respond::json(&[name]))
        });
    let remove = warp::path("images").and(segment()).and(warp::path::end()).and(warp::delete()).and(with(api)).then(
        async |reference: String, api: Arc<dyn LocalApi>| {
            answer(api.remove_image(reference).await, |()| StatusCode::NO_CONTENT.into_response())
        },
    );
    let pulls =
        warp::path!("pulls").and(warp::get()).and(with(api)).map(|api: Arc<dyn LocalApi>| respond::json(&api.pulls()));
    list.or(import).unify().or(tag).unify().or(remove).unify().or(pulls).unify().boxed()
}

fn archive(body: impl futures::Stream<Item = Result<impl Buf, warp::Error>> + Send + 'static) -> Archive {
    body.map(|piece| piece.map(|mut piece| piece.copy_to_bytes(piece.remaining())).map_err(std::io::Error::other))
        .boxed()
}

fn pod_routes(api: &Arc<dyn LocalApi>) -> BoxedFilter<(Response,)> {
    let run = warp::path!("pods")
        .and(warp::post())
        .and(warp::body::content_length_limit(MAX_MANIFEST))
        .and(warp::body::bytes())
        .and(parsed_query())
        .and(with(api))
        .then(async |manifest: Bytes, query: Query, api: Arc<dyn LocalApi>| {
            let origin = query.first("manifest").unwrap_or("manifest").to_owned();
            match String::from_utf8(manifest.into()) {
                Ok(manifest) => answer(api.run(manifest, origin).await, |pods| respond::json(&pods)),
                Err(error) => LocalError::Invalid(format!("{origin}: not UTF-8: {error}")).into(),
            }
        });
    let named = || warp::path("pods").and(segment()).and(segment());
    let remove = named().and(warp::path::end()).and(warp::delete()).and(parsed_query()).and(with(api)).then(
        async |namespace: String, name: String, query: Query, api: Arc<dyn LocalApi>| {
            let grace = match query.first("grace").map(str::parse::<i64>) {
                None => None,
                Some(Ok(grace)) if grace >= 0 => Some(grace),
                Some(_) => return LocalError::Invalid("grace: must be a number of seconds, 0 or more".into()).into(),
            };
            answer(api.remove_pod(PodRef { namespace, name }, grace).await, |()| StatusCode::ACCEPTED.into_response())
        },
    );
    let watch = named().and(warp::path("watch")).and(warp::path::end()).and(warp::get()).and(with(api)).map(
        |namespace: String, name: String, api: Arc<dyn LocalApi>| {
            answer(api.watch(PodRef { namespace, name }), |news| {
                let lines = ReceiverStream::new(news).map(|news| line(&news));
                warp::reply::stream(lines).into_response()
            })
        },
    );
    run.or(remove).unify().or(watch).unify().boxed()
}

fn line(news: &PodNews) -> std::io::Result<Bytes> {
    let mut line = serde_json::to_vec(news).map_err(std::io::Error::other)?;
    line.push(b'\n');
    Ok(line.into())
}
