//! The node as its HTTP endpoints see it ([`NodeApi`]).

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::node::Node;
use super::pods::PodView;
use crate::network::dial_in_namespace;
use crate::pod::model::Instance;
use crate::runtime::client::{ExecHandle, ExecRequest, ExecStdio, Shim, ShimError, ShimEvent};
use crate::server::api::{ApiError, AttachOptions, ContainerTarget, ExecOptions, LogSource, MetricsEndpoint, NodeApi};
use crate::server::exposition::Exposition;
use crate::server::summary::Summary;
use crate::stream::fd::{FdReader, FdWriter, Terminal};
use crate::stream::portforward::PodConnection;
use crate::stream::remotecommand::Process;

/// [`NodeApi`] of a running node.
pub struct Endpoints(pub Arc<Node>);

fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::Internal(error.to_string())
}

impl Endpoints {
    fn view(&self, target: &ContainerTarget) -> Result<PodView, ApiError> {
        let uid = target.pod.metadata.uid.as_deref().unwrap_or_default();
        self.0.pods.view(uid).ok_or_else(|| {
            ApiError::NotFound(format!(
                "pod {:?} does not exist",
                target.pod.metadata.name.as_deref().unwrap_or_default()
            ))
        })
    }

    /// The running instance of a container, and its Pod's shim.
    fn running(&self, target: &ContainerTarget) -> Result<(Shim, Instance), ApiError> {
        let view = self.view(target)?;
        let instance = view
            .observed
            .containers
            .get(&target.container)
            .and_then(|facts| facts.current.clone())
            .filter(Instance::is_running)
            .ok_or_else(|| ApiError::NotFound(format!("container not found ({:?})", target.container)))?;
        let shim = self.0.shim(view.desired.uid()).ok_or_else(|| internal("the Pod's shim is not there"))?;
        Ok((shim, instance))
    }

    async fn start_exec(&self, target: &ContainerTarget, options: ExecOptions) -> Result<Process, ApiError> {
        let (shim, instance) = self.running(target)?;
        let uid = target.pod.metadata.uid.as_deref().unwrap_or_default();
        let process = self.0.process(uid, &instance.id, &options.command, options.tty).map_err(internal)?;
        let piped = |wanted: bool| wanted && !options.tty;
        let stdin = piped(options.stdin).then(io::pipe).transpose().map_err(internal)?;
        let stdout = piped(options.stdout).then(io::pipe).transpose().map_err(internal)?;
        let stderr = piped(options.stderr).then(io::pipe).transpose().map_err(internal)?;
        let request = ExecRequest {
            container_id: instance.id,
            exec_id: uuid::Uuid::new_v4().to_string(),
            process,
            stdin: stdin.is_some(),
            stdout: stdout.is_some(),
            stderr: stderr.is_some(),
            timeout_ms: None,
        };
        let (stdin, stdin_writer) = split(stdin);
        let (stdout_reader, stdout) = split(stdout);
        let (stderr_reader, stderr) = split(stderr);
        let mut handle = shim.exec(request, ExecStdio { stdin, stdout, stderr }).await.map_err(exec_error)?;
        let mut made = Process { stdin: None, stdout: None, stderr: None, resize: None, exit: wait_dummy() };
        if let Some(master) = handle.tty.take() {
            let terminal = Terminal::new(master).map_err(internal)?;
            let resizer = terminal.resizer;
            made.stdin = options.stdin.then(|| Box::new(terminal.writer) as _);
            made.stdout = Some(Box::new(terminal.reader));
            made.resize = Some(Box::new(move |size| {
                if let Err(error) = resizer.resize(size) {
                    tracing::debug!(%error, "the terminal's size stays as it is");
                }
            }));
        } else {
            made.stdin = writer(stdin_writer).map_err(internal)?;
            made.stdout = reader(stdout_reader).map_err(internal)?;
            made.stderr = reader(stderr_reader).map_err(internal)?;
        }
        made.exit = exited(handle).boxed();
        Ok(made)
    }

    async fn start_attach(&self, target: &ContainerTarget, options: AttachOptions) -> Result<Process, ApiError> {
        let (shim, instance) = self.running(target)?;
        let view = self.view(target)?;
        let container =
            view.desired.container(&target.container).map(|spec| spec.container.clone()).unwrap_or_default();
        let tty = container.tty == Some(true);
        let stdin = options.stdin && container.stdin == Some(true);
        let mut events = shim.events();
        let attached =
            shim.attach(&instance.id, stdin, options.stdout, options.stderr && !tty).await.map_err(exec_error)?;
        let id = instance.id.clone();
        let resize_shim = shim.clone();
        let resize_id = id.clone();
        let exit = async move {
            loop {
                match events.recv().await {
                    Ok(ShimEvent::Exited(record)) if record.request.container_id == id => {
                        return Ok(record.exit.as_ref().map_or(0, |exit| exit.exit_code));
                    }
                    Ok(ShimEvent::Disconnected) | Err(tokio::sync::broadcast::error::RecvError::Closed) => {
                        return Err(io::Error::other("the Pod's shim is gone"));
                    }
                    Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                }
            }
        };
        Ok(Process {
            stdin: attached.stdin.map(|pipe| Box::new(pipe) as _),
            stdout: attached.stdout.map(|pipe| Box::new(pipe) as _),
            stderr: attached.stderr.map(|pipe| Box::new(pipe) as _),
            resize: tty.then(|| {
                Box::new(move |size: crate::stream::remotecommand::TerminalSize| {
                    let (shim, id) = (resize_shim.clone(), resize_id.clone());
                    tokio::spawn(async move { shim.resize(&id, size.width, size.height).await });
                }) as _
            }),
            exit: exit.boxed(),
        })
    }
}

fn wait_dummy() -> BoxFuture<'static, io::Result<i32>> {
    std::future::pending().boxed()
}

fn exec_error(error: ShimError) -> ApiError {
    match error {
        ShimError::NotFound(text) => ApiError::NotFound(text),
        ShimError::Start(text) | ShimError::Create(text) => {
            ApiError::Internal(format!("failed to exec in container: {text}"))
        }
        error => internal(error),
    }
}

type Pipe = (io::PipeReader, io::PipeWriter);

fn split(pipe: Option<Pipe>) -> (Option<OwnedFd>, Option<OwnedFd>) {
    pipe.map_or((None, None), |(reader, writer)| (Some(reader.into()), Some(writer.into())))
}

fn reader(fd: Option<OwnedFd>) -> io::Result<Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>>> {
    fd.map(|fd| Ok(Box::new(FdReader::new(fd)?) as _)).transpose()
}

fn writer(fd: Option<OwnedFd>) -> io::Result<Option<Box<dyn tokio::io::AsyncWrite + Send + Unpin>>> {
    fd.map(|fd| Ok(Box::new(FdWriter::new(fd)?) as _)).transpose()
}

/// The exit code of an exec'd process. A client that goes away takes its process along: an interactive shell would
/// otherwise stay for ever.
async fn exited(handle: ExecHandle) -> io::Result<i32> {
    struct Kill(Option<ExecHandle>);
    impl Drop for Kill {
        fn drop(&mut self) {
            if let Some(handle) = self.0.take() {
                tokio::spawn(async move { handle.kill().await });
            }
        }
    }
    let mut guard = Kill(Some(handle));
    let Some(running) = guard.0.as_mut() else { return Ok(0) };
    let exit = running.wait().await.map_err(io::Error::other)?;
    guard.0 = None;
    Ok(exit.exit_code)
}

impl NodeApi for Endpoints {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.0.pods.views().iter().map(|view| Arc::new(view.pod())).collect()
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.0.pods.find(namespace, name).map(|view| Arc::new(view.pod()))
    }

    fn running_pods(&self) -> BoxFuture<'_, Result<Vec<Pod>, ApiError>> {
        let running = |view: &PodView| view.observed.containers.values().any(|facts| facts.is_running());
        let pods = self.0.pods.views().iter().filter(|view| running(view)).map(PodView::pod).collect();
        std::future::ready(Ok(pods)).boxed()
    }

    fn log_source<'a>(
        &'a self,
        target: &'a ContainerTarget,
        container_id: &'a str,
    ) -> BoxFuture<'a, Result<LogSource, ApiError>> {
        let found = self.view(target).map(|view| {
            let bare = container_id.split_once("://").map_or(container_id, |(_, id)| id);
            let facts = view.observed.containers.get(&target.container);
            let current = facts.and_then(|facts| facts.current.as_ref());
            let (attempt, running) = match current {
                Some(instance) if instance.id == bare => (instance.attempt, instance.is_running()),
                Some(instance) => (instance.attempt.saturating_sub(1), false),
                None => (facts.map_or(0, |facts| facts.next_attempt.saturating_sub(1)), false),
            };
            let directory: PathBuf = self.0.log_dir(&view.desired.pod).join(&target.container);
            let (sender, complete) = watch::channel(!running);
            if running {
                let (pods, uid, name, id) =
                    (self.0.pods.clone(), view.desired.uid().to_owned(), target.container.clone(), bare.to_owned());
                tokio::spawn(async move {
                    let mut changes = pods.changes();
                    loop {
                        let runs = pods.view(&uid).is_some_and(|view| {
                            let current = view.observed.containers.get(&name).and_then(|facts| facts.current.as_ref());
                            current.is_some_and(|instance| instance.id == id && instance.is_running())
                        });
                        if !runs {
                            let _ = sender.send(true);
                            return;
                        }
                        tokio::select! {
                            changed = changes.changed() => if changed.is_err() { return },
                            () = sender.closed() => return,
                        }
                    }
                });
            }
            LogSource { directory, attempt, complete }
        });
        std::future::ready(found).boxed()
    }

    fn exec<'a>(
        &'a self,
        target: &'a ContainerTarget,
        options: ExecOptions,
    ) -> BoxFuture<'a, Result<Process, ApiError>> {
        self.start_exec(target, options).boxed()
    }

    fn attach<'a>(
        &'a self,
        target: &'a ContainerTarget,
        options: AttachOptions,
    ) -> BoxFuture<'a, Result<Process, ApiError>> {
        self.start_attach(target, options).boxed()
    }

    fn port_forward<'a>(&'a self, pod: &'a Arc<Pod>, port: u16) -> BoxFuture<'a, io::Result<PodConnection>> {
        async move {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            let network = self.0.network.lookup(uid).ok_or_else(|| io::Error::other("the Pod has no network"))?;
            let stream = dial_in_namespace(network.net_ns.as_deref(), port).await?;
            Ok(Box::new(stream) as PodConnection)
        }
        .boxed()
    }

    fn summary(&self, only_cpu_and_memory: bool) -> BoxFuture<'_, Result<Summary, ApiError>> {
        let node = self.0.clone();
        async move {
            tokio::task::spawn_blocking(move || super::stats::summary(&node, only_cpu_and_memory))
                .await
                .map_err(internal)?
                .map_err(internal)
        }
        .boxed()
    }

    fn configz(&self) -> serde_json::Value {
        self.0.config.configz()
    }

    fn health(&self) -> Result<(), String> {
        Ok(())
    }

    fn collect(&self, endpoint: MetricsEndpoint, out: &mut Exposition) {
        super::stats::collect(&self.0, endpoint, out);
    }
}
