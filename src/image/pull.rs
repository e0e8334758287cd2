//! Pulls: from a name to an image on disk.
//!
//! A layer is hashed, decompressed and unpacked while it comes in, so a pull takes as long as the slower of network and
//! disk. Pulls of the same name with the same credentials are one pull; pulls that share a layer share its download. All
//! of it runs in futures that their callers own: when the last caller is gone, the work stops and its files go.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};

use super::credentials::Credential;
use super::digest::Digest;
use super::error::ImageError;
use super::layer::{Piece, PieceReader, StagedLayer, drain, open_blob, unpack_blob};
use super::manifest::{Descriptor, Document, Manifest, architecture, select};
use super::progress::{Counter, INTERVAL, LayerState, ProgressSender, PullProgress};
use super::reference::{Reference, Target};
use super::registry::{ATTEMPTS, Session, pause};
use super::store::{Image, ImageStore, lock};
use crate::sys::heap;

/// Pieces of a download that wait for the unpacker: with pieces of at most some hundred KiB, a few MiB per layer.
const PIECES: usize = 16;
/// Progress that makes a broken connection worth another round of tries.
const PROGRESS: u64 = 64 << 10;
/// An index may point at indexes, but not for ever.
pub(super) const MAX_NESTING: usize = 3;

/// A finished pull.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The image.
    pub image: Image,
    /// Bytes that came over the network for it: 0 if all of it was here.
    pub bytes: u64,
    /// How long it took.
    pub duration: Duration,
}

type PullFuture = BoxFuture<'static, Result<Pulled, ImageError>>;
type LayerFuture = BoxFuture<'static, Result<Ready, ImageError>>;

/// A pull that others may join.
struct PullHandle {
    future: WeakShared<PullFuture>,
    counters: Weak<Counters>,
}

type Counters = std::sync::Mutex<Vec<Arc<Counter>>>;

/// Pulls in flight, by name and credentials: who may not see an image must not get it by asking at the right moment.
#[derive(Default)]
pub(super) struct Pulls(HashMap<(String, Vec<Credential>), PullHandle>);

/// Layers in flight, by chain ID and blob.
#[derive(Default)]
pub(super) struct LayerJobs(HashMap<(Digest, Digest), (WeakShared<LayerFuture>, Arc<Counter>)>);

/// A layer that can be used once it is in its place.
#[derive(Clone, Debug)]
pub(super) enum Ready {
    /// Was there before.
    Present,
    /// Is unpacked and waits for the commit.
    Staged(Arc<StagedLayer>),
}

/// What to fetch for one layer.
#[derive(Clone)]
struct LayerSpec {
    descriptor: Descriptor,
    diff_id: Digest,
    chain_id: Digest,
}

impl ImageStore {
    /// Makes sure that the newest image of that name is here.
    ///
    /// `credentials` are tried in order ([`super::Keyring::lookup`]), then nobody's. A name that is here already costs one
    /// HEAD request if it has not moved. Transient failures are tried again a few times before they become an error.
    /// Dropping the future stops the pull and removes what it has begun, unless another caller waits for the same pull.
    pub async fn pull(
        self: &Arc<Self>,
        reference: &str,
        credentials: &[Credential],
        progress: Option<ProgressSender>,
    ) -> Result<Pulled, ImageError> {
        let reference: Reference = reference.parse()?;
        let (future, counters) = self.join_pull(&reference, credentials);
        let publish = publish_for_ever(progress, &counters);
        let result = tokio::select! {
            result = future => result,
            never = publish => match never {},
        };
        lock(&self.pulls).0.retain(|_, pull| pull.future.upgrade().is_some_and(|f| f.peek().is_none()));
        result
    }

    fn join_pull(
        self: &Arc<Self>,
        reference: &Reference,
        credentials: &[Credential],
    ) -> (Shared<PullFuture>, Arc<Counters>) {
        let key = (reference.to_string(), credentials.to_vec());
        let mut pulls = lock(&self.pulls);
        if let Some(pull) = pulls.0.get(&key)
            && let (Some(future), Some(counters)) = (pull.future.upgrade(), pull.counters.upgrade())
            && future.peek().is_none()
        {
            return (future, counters);
        }
        let counters = Arc::new(Counters::default());
        let pull = Pull {
            store: Arc::clone(self),
            reference: reference.clone(),
            credentials: credentials.to_vec(),
            counters: Arc::clone(&counters),
        };
        let future = pull.run().boxed().shared();
        if let Some(weak) = future.downgrade() {
            pulls.0.insert(key, PullHandle { future: weak, counters: Arc::downgrade(&counters) });
        }
        (future, counters)
    }

    /// The job for a layer: the one in flight, or a new one. `true` if it was in flight.
    fn join_layer(
        self: &Arc<Self>,
        session: &Arc<Session>,
        spec: &LayerSpec,
        anew: bool,
    ) -> (Shared<LayerFuture>, Arc<Counter>, bool) {
        let key = (spec.chain_id.clone(), spec.descriptor.digest.clone());
        let mut jobs = lock(&self.layer_jobs);
        jobs.0.retain(|_, (job, _)| job.upgrade().is_some());
        if !anew
            && let Some((job, counter)) = jobs.0.get(&key)
            && let Some(job) = job.upgrade()
        {
            return (job, Arc::clone(counter), true);
        }
        let counter = Counter::new(spec.descriptor.digest.to_string(), spec.descriptor.size);
        let job = fetch_layer(Arc::clone(self), Arc::clone(session), spec.clone(), Arc::clone(&counter));
        let job = job.boxed().shared();
        if let Some(weak) = job.downgrade() {
            jobs.0.insert(key, (weak, Arc::clone(&counter)));
        }
        (job, counter, false)
    }

    fn blob_lock(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = lock(&self.blob_locks);
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(digest).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        locks.insert(digest.clone(), Arc::downgrade(&lock));
        lock
    }
}

async fn publish_for_ever(progress: Option<ProgressSender>, counters: &Counters) -> Infallible {
    let Some(sender) = progress else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        let layers: Vec<_> = lock(counters).iter().map(|counter| counter.snapshot()).collect();
        sender.send_if_modified(|shown| {
            let changed = shown.layers != layers;
            *shown = PullProgress { layers };
            changed
        });
    }
}

struct Pull {
    store: Arc<ImageStore>,
    reference: Reference,
    credentials: Vec<Credential>,
    counters: Arc<Counters>,
}

/// What a name points at in its registry.
enum Resolved {
    /// What is here already.
    Here(Image),
    /// Something to fetch.
    There { session: Arc<Session>, resolved: Digest, digest: Digest, bytes: bytes::Bytes, manifest: Box<Manifest> },
}

impl Pull {
    async fn run(self) -> Result<Pulled, ImageError> {
        let started = Instant::now();
        let name = self.reference.to_string();
        let (session, resolved, digest, manifest_bytes, manifest) = match self.resolve().await? {
            Resolved::Here(image) => return Ok(Pulled { image, bytes: 0, duration: started.elapsed() }),
            Resolved::There { session, resolved, digest, bytes, manifest } => {
                (session, resolved, digest, bytes, manifest)
            }
        };
        let store = &self.store;
        let blobs = manifest.layers.iter().map(|layer| layer.digest.clone());
        let _blobs = store.pin(blobs.chain([digest.clone(), manifest.config.digest.clone()]), std::iter::empty());
        let (config, mut bytes) = self.config(&session, &manifest).await?;
        bytes += manifest_bytes.len() as u64;
        let describe =
            |name: &str| store.describe(name, &resolved, &digest, manifest_bytes.len() as u64, &manifest, &config);
        let image = describe(&name).map_err(|detail| session.corrupt(detail))?;
        let by_digest = self.reference.with_digest(&resolved).to_string();
        let images = match by_digest == name {
            true => vec![image.clone()],
            false => vec![image.clone(), describe(&by_digest).map_err(|detail| session.corrupt(detail))?],
        };
        let _layers = store.pin(std::iter::empty(), image.chain.iter().cloned());
        let (layers, downloaded) = self.layers(&session, &manifest, &image).await?;
        let committing = Arc::clone(store);
        let committed = image.clone();
        // Both together: this goes on when the callers give the pull up.
        let publish = move || {
            publish_image(&committing, &committed, images, &layers, &manifest_bytes, &config)?;
            committing.settle_soon();
            Ok(())
        };
        spawn_blocking(publish)
            .await
            .map_err(|e| ImageError::pull(&name, format!("the commit was interrupted: {e}")))??;
        drop(spawn_blocking(heap::release));
        Ok(Pulled { image, bytes: bytes + downloaded, duration: started.elapsed() })
    }

    /// Finds a credential that may see the name, and what it points at.
    async fn resolve(&self) -> Result<Resolved, ImageError> {
        let mut first_refusal = None;
        for credential in self.credentials.iter().cloned().map(Some).chain([None]) {
            let session = Session::new(Arc::clone(&self.store.registry), &self.reference, credential);
            match self.resolve_as(Arc::new(session)).await {
                // Registries hide what one may not see behind any of these.
                Err(error @ (ImageError::AccessDenied { .. } | ImageError::NotFound { .. })) => {
                    first_refusal.get_or_insert(error);
                }
                result => return result,
            }
        }
        Err(first_refusal
            .unwrap_or_else(|| ImageError::pull(&self.reference.to_string(), "no way to ask the registry")))
    }

    async fn resolve_as(&self, session: Arc<Session>) -> Result<Resolved, ImageError> {
        let target = self.reference.target();
        if let Some(image) = self.store.resolve(session.name())? {
            match session.resolve(target).await {
                Ok(Some(digest)) if digest == image.resolved => return Ok(Resolved::Here(image)),
                // A registry without HEAD, or without the header: ask in full.
                Ok(_) | Err(ImageError::Pull { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let (mut bytes, resolved) = session.manifest(target).await?;
        let mut digest = resolved.clone();
        for _ in 0..MAX_NESTING {
            match Document::parse(&bytes).map_err(|detail| session.corrupt(detail))? {
                Document::Manifest(manifest) => {
                    return Ok(Resolved::There { session, resolved, digest, bytes, manifest: Box::new(manifest) });
                }
                Document::Index(entries) => {
                    let entry = select(&entries, architecture()).ok_or_else(|| {
                        session.corrupt(format!(
                            "no match for platform linux/{} in index {resolved}: not found",
                            architecture()
                        ))
                    })?;
                    (bytes, digest) = session.manifest(&Target::Digest(entry.digest.clone())).await?;
                }
            }
        }
        Err(session.corrupt(format!("index {resolved} points at indexes more than {MAX_NESTING} levels deep")))
    }

    /// The configuration and how many bytes it took.
    async fn config(&self, session: &Session, manifest: &Manifest) -> Result<(bytes::Bytes, u64), ImageError> {
        let digest = manifest.config.digest.clone();
        let store = Arc::clone(&self.store);
        let wanted = digest.clone();
        if let Ok(Some(bytes)) = spawn_blocking(move || store.layout.read_blob(&wanted)).await {
            return Ok((bytes.into(), 0));
        }
        let bytes = session.small_blob(&digest).await?;
        let length = bytes.len() as u64;
        Ok((bytes, length))
    }

    /// Fetches all layers, in parallel. Returns them bottom to top, with the bytes that came in.
    async fn layers(
        &self,
        session: &Arc<Session>,
        manifest: &Manifest,
        image: &Image,
    ) -> Result<(Vec<Ready>, u64), ImageError> {
        let mut tasks = JoinSet::new();
        let diff_ids = image.config.rootfs().diff_ids();
        let mut counters = Vec::new();
        for (at, descriptor) in manifest.layers.iter().enumerate() {
            let diff_id = diff_ids[at].parse().map_err(|_| session.corrupt("rootfs.diff_ids".to_owned()))?;
            let spec = LayerSpec { descriptor: descriptor.clone(), diff_id, chain_id: image.chain[at].clone() };
            let (job, counter, joined) = self.store.join_layer(session, &spec, false);
            counters.push(counter);
            let (store, session) = (Arc::clone(&self.store), Arc::clone(session));
            tasks.spawn(async move {
                let result = match job.await {
                    // Another pull's failure may be its credentials' fault: once more with ours.
                    Err(_) if joined => store.join_layer(&session, &spec, true).0.await,
                    result => result,
                };
                (at, result)
            });
        }
        *lock(&self.counters) = counters.clone();
        let mut ready: Vec<Option<Ready>> = vec![None; manifest.layers.len()];
        while let Some(done) = tasks.join_next().await {
            let (at, result) =
                done.map_err(|e| ImageError::pull(session.name(), format!("a download was interrupted: {e}")))?;
            ready[at] = Some(result?);
        }
        let downloaded = counters.iter().map(|counter| counter.downloaded()).sum();
        Ok((ready.into_iter().flatten().collect(), downloaded))
    }
}

/// Puts a pull's files in their places and its names in the index. Blocking.
pub(super) fn publish_image(
    store: &ImageStore,
    image: &Image,
    images: Vec<Image>,
    layers: &[Ready],
    manifest: &[u8],
    config: &[u8],
) -> Result<(), ImageError> {
    store.commit(|| {
        let layout = &store.layout;
        // A pull that its callers have given up has no pins any more, and the collector may have been here.
        if let Some(digest) = image.layer_digests.iter().find(|digest| !layout.blob(digest).is_file()) {
            return Err(vanished(image, digest));
        }
        layout.write_blob(&image.manifest, manifest)?;
        layout.write_blob(&image.config_digest, config)?;
        // Top first, as a look-up goes.
        let mut lower = Vec::new();
        for (layer, place) in layers.iter().zip(&image.layers) {
            let mut now = place.clone();
            // Another pull may have moved a shared layer to its place already.
            if let Ready::Staged(staged) = layer
                && staged.staging.path.exists()
            {
                staged.adopt_lower_attributes(&lower)?;
                now = staged.staging.path.join("diff");
            }
            lower.insert(0, now);
        }
        for (layer, chain_id) in layers.iter().zip(&image.chain) {
            let place = layout.layer(chain_id);
            if let Ready::Staged(staged) = layer {
                staged.staging.commit(&place)?;
            }
            if !place.is_dir() {
                return Err(vanished(image, chain_id));
            }
        }
        let now = SystemTime::now();
        layout.touch(&image.manifest, now)?;
        layout.touch(&image.config_digest, now)?;
        Ok(images)
    })
}

fn vanished(image: &Image, layer: &Digest) -> ImageError {
    ImageError::Pull {
        name: image.name.clone(),
        detail: format!("layer {layer} went away during the pull"),
        transient: true,
    }
}

async fn fetch_layer(
    store: Arc<ImageStore>,
    session: Arc<Session>,
    spec: LayerSpec,
    counter: Arc<Counter>,
) -> Result<Ready, ImageError> {
    let digest = &spec.descriptor.digest;
    // Before the permit: who waits for somebody else's download needs none.
    let blob_lock = store.blob_lock(digest);
    let _blob = blob_lock.lock().await;
    let _permit =
        store.downloads.acquire().await.map_err(|_| ImageError::pull(session.name(), "the store is closing"))?;
    let have_blob = store.layout.blob(digest).is_file();
    let have_layer = store.layout.layer(&spec.chain_id).is_dir();
    let mut ready = None;
    if have_blob && have_layer {
        ready = Some(Ready::Present);
    } else if have_blob {
        counter.set(LayerState::Extracting);
        ready = unpack_stored(&store, &session, &spec).await?;
    }
    let ready = match ready {
        Some(ready) => ready,
        None => download_layer(&store, &session, &spec, have_layer, &counter).await?,
    };
    counter.set(LayerState::Done);
    Ok(ready)
}

/// Unpacks a blob that is here. `None` if it turns out to be damaged: it is removed, and must be downloaded.
async fn unpack_stored(
    store: &Arc<ImageStore>,
    session: &Session,
    spec: &LayerSpec,
) -> Result<Option<Ready>, ImageError> {
    let (store, spec, name) = (Arc::clone(store), spec.clone(), session.name().to_owned());
    let interrupted = ImageError::pull(&name, "unpacking was interrupted");
    spawn_blocking(move || {
        let path = store.layout.blob(&spec.descriptor.digest);
        let reader = open_blob(&path)?;
        match unpack_blob(&store.layout, reader, &spec.diff_id, &name, &spec.descriptor.digest) {
            Ok(staged) => Ok(Some(Ready::Staged(Arc::new(staged)))),
            Err(error @ ImageError::Layer { .. }) => {
                tracing::warn!(%error, "a stored layer is damaged; it is downloaded again");
                std::fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    })
    .await
    .map_err(|_| interrupted)?
}

async fn download_layer(
    store: &Arc<ImageStore>,
    session: &Session,
    spec: &LayerSpec,
    have_layer: bool,
    counter: &Counter,
) -> Result<Ready, ImageError> {
    let (sender, receiver) = mpsc::channel(PIECES);
    let unpacking = {
        let (store, spec, name) = (Arc::clone(store), spec.clone(), session.name().to_owned());
        spawn_blocking(move || {
            let copy = store.layout.staging();
            let file = File::create_new(&copy.path).map_err(ImageError::io("create", &copy.path))?;
            let mut reader = PieceReader::new(receiver, file);
            let digest = &spec.descriptor.digest;
            let ready = match have_layer {
                true => Ready::Present,
                false => {
                    Ready::Staged(Arc::new(unpack_blob(&store.layout, &mut reader, &spec.diff_id, &name, digest)?))
                }
            };
            // Only here is the blob known to be complete and right.
            drain(&mut reader).map_err(ImageError::io("write", &copy.path))?;
            copy.commit(&store.layout.blob(digest))?;
            Ok(ready)
        })
    };
    counter.set(LayerState::Downloading);
    let fed = feed(session, &spec.descriptor, &sender, counter).await;
    drop(sender);
    counter.set(LayerState::Extracting);
    let unpacked: Result<Ready, ImageError> =
        unpacking.await.map_err(|e| ImageError::pull(session.name(), format!("unpacking was interrupted: {e}")))?;
    match fed {
        // The unpacker hung up: it knows why.
        Ok(()) | Err(None) => unpacked,
        Err(Some(error)) => Err(error),
    }
}

/// Downloads a blob into `sender`, across broken connections, and checks its size and digest. `Err(None)` if the receiver
/// is gone.
async fn feed(
    session: &Session,
    descriptor: &Descriptor,
    sender: &mpsc::Sender<Piece>,
    counter: &Counter,
) -> Result<(), Option<ImageError>> {
    let Descriptor { digest, size, .. } = descriptor;
    let mut hash = digest.hasher();
    let mut received = 0;
    let mut attempt = 0;
    let mut progress_at = 0;
    while received < *size || attempt == 0 {
        let mut body = session.blob(digest, received).await?;
        let broken = loop {
            match body.next().await {
                Ok(Some(bytes)) => {
                    received += bytes.len() as u64;
                    if received > *size {
                        return Err(Some(session.corrupt(format!("blob {digest} is longer than its {size} bytes"))));
                    }
                    hash.update(&bytes);
                    counter.add(bytes.len() as u64);
                    sender.send(Piece::Data(bytes)).await.map_err(|_| None)?;
                }
                Ok(None) => break format!("the connection ended after {received} of {size} bytes of blob {digest}"),
                Err(error) => break error,
            }
        };
        attempt += 1;
        if received - progress_at > PROGRESS {
            (attempt, progress_at) = (1, received);
        }
        if received < *size {
            if attempt >= ATTEMPTS {
                return Err(Some(session.unavailable(broken)));
            }
            pause(attempt, None).await;
        }
    }
    let actual = hash.finish();
    if actual != *digest {
        return Err(Some(session.corrupt(format!("blob {digest} arrived with digest {actual}"))));
    }
    sender.send(Piece::End).await.map_err(|_| None)
}
