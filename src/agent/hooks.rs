//! Lifecycle hooks, and commands that are run in a container for the node itself.
//!
//! Source: `pkg/kubelet/lifecycle/handlers.go`.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::LifecycleHandler;
use oci_spec::runtime::Spec;
use tokio::io::AsyncReadExt;

use super::node::Node;
use crate::pod::effects::{Failure, Outcome, Request};
use crate::pod::model::ContainerSpec;
use crate::runtime::client::{ExecRequest, ExecStdio, ShimError};
use crate::runtime::spec::{ExecOptions, exec_process};
use crate::stream::fd::FdReader;

/// Which hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// After the start, before the container counts as running.
    PostStart,
    /// Before the stop signal; takes from the grace period.
    PreStop,
}

/// Output of a command, for events and probe results, bytes (kubelet's `maxReadLength`).
const MAX_OUTPUT: usize = 10 << 10;
/// How long output that was written just before the end may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// How a command in a container ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit code.
    pub code: i32,
    /// The beginning of what it wrote to both outputs.
    pub output: String,
    /// It was killed because its time was over.
    pub timed_out: bool,
}

impl Node {
    /// Runs a hook to its end, or until the worker gives it up.
    pub(super) async fn run_hook(self: &Arc<Self>, request: &Request, name: &str, hook: Hook) -> Outcome {
        let Some(spec) = request.desired.container(name) else { return Outcome::Done };
        let lifecycle = spec.container.lifecycle.as_ref();
        let handler = match hook {
            Hook::PostStart => lifecycle.and_then(|l| l.post_start.as_ref()),
            Hook::PreStop => lifecycle.and_then(|l| l.pre_stop.as_ref()),
        };
        let Some(handler) = handler else { return Outcome::Done };
        let result = tokio::select! {
            result = self.handle(request, spec, handler) => result,
            () = request.cancel.cancelled() => return Outcome::Cancelled,
        };
        let (reason, word) = match hook {
            Hook::PostStart => ("FailedPostStartHook", "PostStartHook failed"),
            Hook::PreStop => ("FailedPreStopHook", "PreStopHook failed"),
        };
        match result {
            Ok(()) => Outcome::Done,
            Err(error) => {
                tracing::warn!(pod = request.desired.uid(), container = name, error, "{word}");
                Outcome::Failed(Failure::new(reason, word))
            }
        }
    }

    async fn handle(&self, request: &Request, spec: &ContainerSpec, handler: &LifecycleHandler) -> Result<(), String> {
        if let Some(exec) = &handler.exec {
            let command = exec.command.clone().unwrap_or_default();
            let finished = self.exec_capture(request, spec.name(), &command, None).await.map_err(|e| e.to_string())?;
            return match finished.code {
                0 => Ok(()),
                code => Err(format!("command {command:?} exited with {code}: {}", finished.output)),
            };
        }
        if let Some(sleep) = &handler.sleep {
            tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
            return Ok(());
        }
        if let Some(get) = &handler.http_get {
            let pod_ip = request.observed.pod_ips.first().map(String::as_str);
            return self.hook_request(&spec.container, get, pod_ip).await;
        }
        // tcpSocket is accepted by the API for old manifests, and kubelet does not run it either
        Err("invalid handler: it has neither exec, httpGet nor sleep".to_owned())
    }

    /// Runs a command in the newest instance of a container and collects the beginning of its output. Nothing of it
    /// is left when this returns or is dropped.
    pub(super) async fn exec_capture(
        &self,
        request: &Request,
        name: &str,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<Finished, ShimError> {
        let uid = request.desired.uid();
        let instance = request.observed.containers.get(name).and_then(|facts| facts.current.as_ref());
        let id = instance.map(|i| i.id.clone()).ok_or_else(|| ShimError::NotFound(format!("container {name} does not run")))?;
        let shim = self.shim(uid).ok_or(ShimError::Disconnected)?;
        let process = self.process(uid, &id, command, false)?;
        let (reader, writer) = io::pipe()?;
        let mut output = FdReader::new(OwnedFd::from(reader))?;
        let stdio = ExecStdio { stdin: None, stdout: Some(OwnedFd::from(writer.try_clone()?)), stderr: Some(OwnedFd::from(writer)) };
        let exec = ExecRequest {
            container_id: id,
            exec_id: uuid::Uuid::new_v4().to_string(),
            process,
            stdin: false,
            stdout: true,
            stderr: true,
            timeout_ms: timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        };
        let mut handle = KillOnDrop(Some(shim.exec(exec, stdio).await?));
        let Some(running) = handle.0.as_mut() else { return Err(ShimError::Disconnected) };
        let mut bytes = Vec::new();
        let exit = {
            let exited = running.wait();
            tokio::pin!(exited);
            loop {
                // the process may leave a child behind that keeps the pipe open: its own end is what counts
                tokio::select! {
                    biased;
                    more = read_some(&mut output, &mut bytes) => if !more { break exited.await? },
                    exit = &mut exited => break exit?,
                }
            }
        };
        while let Ok(true) = tokio::time::timeout(LAST_WORDS, read_some(&mut output, &mut bytes)).await {}
        handle.0 = None;
        Ok(Finished {
            code: exit.exit_code,
            output: String::from_utf8_lossy(&bytes).into_owned(),
            timed_out: exit.timed_out,
        })
    }

    /// A command as a process of that container: its user, environment, limits.
    pub(super) fn process(
        &self,
        uid: &str,
        id: &str,
        command: &[String],
        tty: bool,
    ) -> Result<oci_spec::runtime::Process, ShimError> {
        let path = self.pod_dir(uid).container(id).join("config.json");
        let spec: Spec = serde_json::from_slice(&fs::read(path)?).map_err(|error| ShimError::Io(error.to_string()))?;
        exec_process(&spec, ExecOptions { command, tty }).map_err(|error| ShimError::Invalid(error.to_string()))
    }
}

/// Reads once and keeps what is within the limit; false at the end. May be dropped at any time.
async fn read_some(reader: &mut FdReader, bytes: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 4096];
    let Ok(read @ 1..) = reader.read(&mut buffer).await else { return false };
    // what comes after the limit is thrown away, so that the process does not block on a full pipe
    let room = MAX_OUTPUT.saturating_sub(bytes.len()).min(read);
    bytes.extend_from_slice(&buffer[..room]);
    true
}

/// A command whose caller is gone is killed.
struct KillOnDrop(Option<crate::runtime::client::ExecHandle>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            tokio::spawn(async move { handle.kill().await });
        }
    }
}
