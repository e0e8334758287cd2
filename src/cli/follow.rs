//! What `gantry run` shows of a Pod: progress of pulls, its address, what keeps it waiting, and its logs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use tokio::task::JoinSet;

use super::client::{CliError, Client, encode};
use super::target::names;
use crate::server::local::{PodNews, PodRef, Pull};

/// ANSI colours of prefixes, one container after the other.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 31];
/// What a container wrote last may take so long to come, once it has ended.
const LAST_LINES: Duration = Duration::from_secs(5);

/// The terminal, shared by all Pods of a run.
#[derive(Clone)]
pub(super) struct Screen {
    bars: MultiProgress,
    colours: bool,
    bars_shown: bool,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            // hidden by itself where stderr is no terminal
            bars: MultiProgress::new(),
            colours: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
            bars_shown: std::io::stderr().is_terminal(),
        }
    }

    /// A line about the run, on stderr: stdout is the containers'.
    pub(super) fn say(&self, text: &str) {
        self.bars.suspend(|| eprintln!("{text}"));
    }

    /// A line of a container. False if nobody reads any more.
    fn print(&self, prefix: &str, colour: u8, line: &[u8]) -> bool {
        let (on, off) = if self.colours { (format!("\x1b[{colour}m"), "\x1b[0m") } else { (String::new(), "") };
        self.bars.suspend(|| {
            let mut out = Vec::with_capacity(line.len() + 40);
            out.extend_from_slice(format!("{on}{prefix} |{off} ").as_bytes());
            out.extend_from_slice(line);
            out.push(b'\n');
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&out).and_then(|()| stdout.flush()).is_ok()
        })
    }
}

/// How a Pod ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// All containers succeeded.
    Succeeded,
    /// It failed; what the status says about it.
    Failed(String),
    /// It was removed before it ended by itself.
    Removed,
}

/// Follows a Pod until it has ended for good or is gone.
pub(super) async fn follow(client: Client, screen: Screen, pod: PodRef, with_pod: bool) -> Result<End, CliError> {
    let path = format!("{}/{}", encode(&pod.namespace), encode(&pod.name));
    let mut news = client.lines(&format!("/pods/{path}/watch")).await?;
    let mut view = View { screen, client, pod, with_pod, ..View::empty() };
    while let Some(line) = news.next().await? {
        let news: PodNews = serde_json::from_slice(&line).map_err(|error| CliError::Broken(error.to_string()))?;
        view.show(&news);
        if let Some(end) = ended(&news.pod) {
            view.finish().await;
            return Ok(end);
        }
    }
    view.finish().await;
    Ok(End::Removed)
}

/// Whether the Pod will never run again.
fn ended(pod: &Pod) -> Option<End> {
    let status = pod.status.as_ref()?;
    match status.phase.as_deref() {
        Some("Succeeded") => Some(End::Succeeded),
        Some("Failed") => {
            let mut why: Vec<String> = [&status.reason, &status.message].into_iter().flatten().cloned().collect();
            let all = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
            for container in all {
                let ended = container.state.as_ref().and_then(|state| state.terminated.as_ref());
                if let Some(ended) = ended.filter(|ended| ended.exit_code != 0) {
                    let reason = ended.reason.as_deref().unwrap_or("Error");
                    let message = ended.message.as_deref().map(|text| format!(": {}", text.trim())).unwrap_or_default();
                    why.push(format!("container {} {reason}, exit code {}{message}", container.name, ended.exit_code));
                }
            }
            Some(End::Failed(why.join("; ")))
        }
        _ => None,
    }
}

/// What was shown of a Pod.
struct View {
    screen: Screen,
    client: Client,
    pod: PodRef,
    with_pod: bool,
    bars: BTreeMap<String, ProgressBar>,
    address: Option<String>,
    reasons: HashMap<String, String>,
    /// Container instances whose logs are followed.
    followed: HashSet<String>,
    logs: JoinSet<()>,
}

impl View {
    fn empty() -> Self {
        Self {
            screen: Screen::new(),
            client: Client::new(std::path::Path::new("")),
            pod: PodRef { namespace: String::new(), name: String::new() },
            with_pod: false,
            bars: BTreeMap::new(),
            address: None,
            reasons: HashMap::new(),
            followed: HashSet::new(),
            logs: JoinSet::new(),
        }
    }

    fn show(&mut self, news: &PodNews) {
        self.show_pulls(&news.pulls);
        let Some(status) = &news.pod.status else { return };
        if status.pod_ip.is_some() && status.pod_ip != self.address {
            self.address.clone_from(&status.pod_ip);
            let (namespace, name) = names(&news.pod);
            let ip = status.pod_ip.as_deref().unwrap_or_default();
            self.screen.say(&format!("pod {namespace}/{name} has address {ip}"));
        }
        let init = status.init_container_statuses.iter().flatten();
        for (index, container) in init.chain(status.container_statuses.iter().flatten()).enumerate() {
            self.show_reason(container);
            self.follow_logs(index, container);
        }
    }

    fn show_pulls(&mut self, pulls: &[Pull]) {
        for pull in pulls {
            let bar = self.bars.entry(pull.image.clone()).or_insert_with(|| {
                if !self.screen.bars_shown {
                    eprintln!("pulling {}", pull.image);
                }
                let bar = self.screen.bars.add(ProgressBar::new(0).with_message(pull.image.clone()));
                if let Ok(style) =
                    ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {prefix}")
                {
                    bar.set_style(style);
                }
                bar
            });
            bar.set_length(pull.total);
            bar.set_position(pull.downloaded);
            if pull.layers > 0 {
                bar.set_prefix(format!("{}/{} layers", pull.layers_done, pull.layers));
            }
        }
        self.bars.retain(|image, bar| {
            let runs = pulls.iter().any(|pull| &pull.image == image);
            if !runs {
                bar.finish_and_clear();
            }
            runs
        });
    }

    /// What keeps a container from running, when it changes.
    fn show_reason(&mut self, container: &ContainerStatus) {
        let state = container.state.as_ref();
        let waiting = state.and_then(|state| state.waiting.as_ref());
        let text = waiting.and_then(|waiting| {
            let reason = waiting
                .reason
                .as_deref()
                .filter(|reason| !matches!(*reason, "ContainerCreating" | "PodInitializing"))?;
            Some(match &waiting.message {
                Some(message) => format!("{reason}: {message}"),
                None => reason.to_owned(),
            })
        });
        match text {
            Some(text) if self.reasons.get(&container.name) != Some(&text) => {
                self.screen.say(&format!("container {}: {text}", container.name));
                self.reasons.insert(container.name.clone(), text);
            }
            Some(_) => {}
            None => drop(self.reasons.remove(&container.name)),
        }
    }

    /// Each instance's log is read once, from its beginning to its end.
    fn follow_logs(&mut self, index: usize, container: &ContainerStatus) {
        let state = container.state.as_ref();
        let id = state.and_then(|state| {
            let ended = state.terminated.as_ref().map(|ended| ended.container_id.clone());
            ended.unwrap_or_else(|| state.running.as_ref().and(container.container_id.clone()))
        });
        let Some(id) = id else { return };
        if !self.followed.insert(id) {
            return;
        }
        let (namespace, name, container) = (&self.pod.namespace, &self.pod.name, &container.name);
        let path = format!("/containerLogs/{}/{}/{}?follow=true", encode(namespace), encode(name), encode(container));
        let prefix = if self.with_pod { format!("{name}/{container}") } else { container.clone() };
        let (client, screen, colour) = (self.client.clone(), self.screen.clone(), COLOURS[index % COLOURS.len()]);
        self.logs.spawn(async move {
            let copy = async {
                let mut lines = client.lines(&path).await?;
                while let Some(line) = lines.next().await? {
                    if !screen.print(&prefix, colour, &line) {
                        break;
                    }
                }
                Ok::<_, CliError>(())
            };
            if let Err(error) = copy.await {
                screen.say(&format!("logs of {prefix}: {error}"));
            }
        });
    }

    async fn finish(mut self) {
        for bar in self.bars.values() {
            bar.finish_and_clear();
        }
        let all = async { while self.logs.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_LINES, all).await.is_err() {
            self.screen.say("the end of the logs did not come in time: gantry logs shows them");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_final_phase_is_an_end() {
        let of = |status: serde_json::Value| {
            ended(&serde_json::from_value(json!({"metadata": {}, "status": status})).unwrap())
        };
        assert_eq!(of(json!({"phase": "Running"})), None);
        assert_eq!(of(json!({"phase": "Succeeded"})), Some(End::Succeeded));
        let status = json!({"phase": "Failed", "containerStatuses": [
            {"name": "a", "ready": false, "restartCount": 0, "image": "", "imageID": "",
             "state": {"terminated": {"exitCode": 3, "reason": "Error"}}}]});
        assert_eq!(of(status), Some(End::Failed("container a Error, exit code 3".to_owned())));
    }
}
