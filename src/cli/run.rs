//! `gantry run`: a manifest on this machine, without an API server.
//!
//! If an agent serves the local socket, it gets the Pod. Otherwise a node is started in this process, and asked over the
//! same socket. Either way the Pod is one more static Pod.

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use bytes::Bytes;
use clap::{Arg, ArgAction, ArgMatches, Command};
use futures::future::try_join_all;
use http::{Method, StatusCode};
use tokio::signal::unix::{SignalKind, signal};

use super::client::{CliError, Client, block_on, encode};
use super::follow::{End, Screen, follow};
use super::log;
use crate::agent::Standalone;
use crate::config::{self, Config, Flags, Host};
use crate::server::local::PodRef;
use crate::source::{Origin, parse_manifest};

pub(super) const NAME: &str = "run";

/// Flags of the agent that the help shows here; the others work as well.
const SHOWN: [&str; 8] =
    ["state-dir", "data-dir", "root-dir", "bridge-name", "cgroup-root", "insecure-registry", "pod-cidr", "v"];

pub(super) fn command() -> Command {
    config::command(NAME)
        .mut_args(|arg| {
            let shown = SHOWN.contains(&arg.get_id().as_str());
            arg.hide(!shown)
        })
        .about("Run a Pod manifest on this machine, with no API server, until it ends or Ctrl-C")
        .arg(
            Arg::new("manifest")
                .value_name("POD.yaml")
                .required(true)
                .help("Manifest of a Pod (or a List of them), - for stdin"),
        )
        .arg(
            Arg::new("detach")
                .short('d')
                .long("detach")
                .action(ArgAction::SetTrue)
                .help("Leave the Pod to the agent that runs here, and return"),
        )
        .after_help(
            "If an agent runs here it gets the Pod, and only --state-dir is of interest. Otherwise a node runs in this \
             process for as long; all flags of gantry agent set it up.",
        )
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let config = match configuration(matches) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("Error: {error}");
            return ExitCode::FAILURE;
        }
    };
    log::start_quiet(&config.kubelet.logging);
    let detach = matches.get_flag("detach");
    let manifest = matches.get_one::<String>("manifest").cloned().unwrap_or_default();
    block_on(run_manifest(config, manifest, detach))
}

fn configuration(matches: &ArgMatches) -> Result<Config, CliError> {
    let host = Host::read().map_err(|error| CliError::Other(format!("cannot read /sys/fs/cgroup: {error}")))?;
    let other = |error: &dyn std::fmt::Display| CliError::Other(error.to_string());
    let flags = Flags::from_matches(matches).map_err(|error| other(&error))?;
    Config::load(flags.standalone(), &host).map_err(|error| other(&error))
}

fn read_manifest(path: &str) -> Result<(String, String), CliError> {
    if path == "-" {
        let mut text = String::new();
        let read = std::io::stdin().lock().read_to_string(&mut text);
        return read
            .map(|_| (text, "stdin".to_owned()))
            .map_err(|error| CliError::Other(format!("read stdin: {error}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| CliError::Other(format!("read {path}: {error}")))?;
    // the Pod's identity holds where it came from, wherever this was started
    let absolute = Path::new(path).canonicalize().map_or_else(|_| path.to_owned(), |path| path.display().to_string());
    Ok((text, absolute))
}

async fn run_manifest(config: Config, path: String, detach: bool) -> Result<ExitCode, CliError> {
    let (text, origin) = read_manifest(&path)?;
    // wrong manifests are found before anything is started
    parse_manifest(&text, Origin::Local, &origin, &config.node_name)
        .map_err(|error| CliError::Other(error.to_string()))?;
    let client = Client::new(&config.paths.state_dir);
    let node = match client.connect().await {
        Ok(_) => None,
        Err(error @ CliError::NoAgent(_)) if detach => return Err(error),
        Err(CliError::NoAgent(_)) => Some(start(config).await?),
        Err(error) => return Err(error),
    };
    let result = run_pods(&client, text, &origin, detach).await;
    if let Some(node) = node {
        node.stop().await;
    }
    result
}

async fn start(config: Config) -> Result<Standalone, CliError> {
    if !rustix::process::geteuid().is_root() {
        return Err(CliError::Other("no agent runs here, and starting Pods needs root: run this with sudo".to_owned()));
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    Standalone::start(config).await.map_err(CliError::Other)
}

async fn run_pods(client: &Client, text: String, origin: &str, detach: bool) -> Result<ExitCode, CliError> {
    let mut stop = Stop::new()?;
    let path = format!("/pods?manifest={}", encode(origin));
    let pods: Vec<PodRef> = client.post(&path, Bytes::from(text)).await?;
    let screen = Screen::new();
    if detach {
        for pod in &pods {
            screen.say(&format!("pod {}/{} runs; gantry rm ends it", pod.namespace, pod.name));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let followed = pods.iter().map(|pod| follow(client.clone(), screen.clone(), pod.clone(), pods.len() > 1));
    let mut all = std::pin::pin!(try_join_all(followed));
    let mut stopped = None;
    let ends = loop {
        tokio::select! {
            ends = &mut all => break ends?,
            code = stop.wanted() => {
                let again = stopped.replace(code).is_some();
                screen.say(if again { "killing" } else { "stopping; Ctrl-C again kills" });
                for pod in &pods {
                    remove(client, pod, again).await?;
                }
            }
        }
    };
    let mut code = ExitCode::SUCCESS;
    for (pod, end) in pods.iter().zip(&ends) {
        let name = format!("pod {}/{}", pod.namespace, pod.name);
        match end {
            End::Succeeded => screen.say(&format!("{name} succeeded")),
            End::Failed(why) => {
                screen.say(&format!("{name} failed: {why}"));
                code = ExitCode::FAILURE;
            }
            End::Removed => {
                screen.say(&format!("{name} removed"));
                code = ExitCode::FAILURE;
            }
        }
        clear_away(client, pod).await?;
    }
    Ok(stopped.map_or(code, ExitCode::from))
}

/// Ends a Pod; one that is gone is fine.
async fn remove(client: &Client, pod: &PodRef, now: bool) -> Result<(), CliError> {
    let grace = if now { "?grace=0" } else { "" };
    let path = format!("/pods/{}/{}{grace}", encode(&pod.namespace), encode(&pod.name));
    match client.send(Method::DELETE, &path, Bytes::new()).await {
        Ok(_) => Ok(()),
        Err(CliError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what is left of a Pod that has ended, and waits until nothing is.
async fn clear_away(client: &Client, pod: &PodRef) -> Result<(), CliError> {
    let watch = format!("/pods/{}/{}/watch", encode(&pod.namespace), encode(&pod.name));
    match client.lines(&watch).await {
        Ok(mut news) => {
            remove(client, pod, false).await?;
            while news.next().await?.is_some() {}
            Ok(())
        }
        Err(CliError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Ctrl-C and its like.
struct Stop {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|error| CliError::Other(format!("listen for signals: {error}")));
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// The exit status that a shell expects after the signal that came.
    async fn wanted(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_by_itself_needs_no_flags() {
        let matches = command().try_get_matches_from(["run", "pod.yaml", "--kubeconfig=/k", "--state-dir=/s"]).unwrap();
        let config = configuration(&matches).unwrap();
        assert_eq!((config.kubeconfig, config.paths.state_dir.as_path()), (None, Path::new("/s")));
        let strict = command().try_get_matches_from(["run", "p", "--fail-cgroupv1=true"]).unwrap();
        assert_eq!(configuration(&strict).is_err(), !Host::read().unwrap().cgroup_v2);
    }

    #[test]
    fn a_wrong_manifest_is_refused_before_anything_starts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pod.yaml");
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: C, image: i}]}\n",
        )
        .unwrap();
        let matches = command().try_get_matches_from(["run", "p", "--state-dir=/does/not/exist"]).unwrap();
        let config = configuration(&matches).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(run_manifest(config, path.display().to_string(), false)).unwrap_err().to_string();
        assert!(error.contains("pod.yaml: invalid pod: [spec.containers[0].name: Invalid value: \"C\""), "{error}");
        assert!(!Path::new("/does/not/exist").exists());
    }
}
