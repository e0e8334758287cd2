//! `gantry ps`.

use std::process::ExitCode;

use clap::{ArgMatches, Command};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};

use super::client::{CliError, Client, block_on, state_dir_arg};
use super::table;
use super::target::{names, pods};
use crate::server::local::Pull;

pub(super) const NAME: &str = "ps";

pub(super) fn command() -> Command {
    Command::new(NAME).about("List the Pods of this node and their containers").arg(state_dir_arg())
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    let client = Client::from_matches(matches);
    block_on(async {
        let (pods, pulls): (Vec<Pod>, Vec<Pull>) = tokio::try_join!(pods(&client), client.get("/pulls"))?;
        print!("{}", table::render(&rows(&pods, &pulls, Timestamp::now())));
        Ok::<_, CliError>(ExitCode::SUCCESS)
    })
}

fn rows(pods: &[Pod], pulls: &[Pull], now: Timestamp) -> Vec<Vec<String>> {
    let head = ["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let since = |time: Option<Timestamp>| time.map_or("-".to_owned(), |t| table::age(now.as_second() - t.as_second()));
    for pod in pods {
        let (namespace, name) = names(pod);
        let all = statuses(pod);
        let main: Vec<_> = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten()).collect();
        let ready = main.iter().filter(|container| container.ready).count();
        let wanted = pod.spec.as_ref().map_or(0, |spec| spec.containers.len());
        let restarts: i32 = all.iter().map(|container| container.restart_count).sum();
        let began = pod.status.as_ref().and_then(|s| s.start_time.as_ref()).map(|time| time.0);
        rows.push(vec![
            namespace.to_owned(),
            name.to_owned(),
            format!("{ready}/{wanted}"),
            pod_status(pod),
            restarts.to_string(),
            since(began),
            pod.status.as_ref().and_then(|s| s.pod_ip.clone()).unwrap_or_else(|| "-".to_owned()),
        ]);
        for container in all {
            let pull = pulls
                .iter()
                .find(|pull| Some(&pull.uid) == pod.metadata.uid.as_ref() && pull.container == container.name);
            let (status, began) = container_status(container.state.as_ref());
            rows.push(vec![
                String::new(),
                format!("  {}", container.name),
                if container.ready { "ready" } else { "" }.to_owned(),
                pull.map_or(status, pulling),
                container.restart_count.to_string(),
                since(began),
            ]);
        }
    }
    rows
}

fn pulling(pull: &Pull) -> String {
    if pull.layers == 0 {
        return "Pulling".to_owned();
    }
    format!("Pulling {} of {}", table::size(pull.downloaded), table::size(pull.total))
}

fn statuses(pod: &Pod) -> Vec<&ContainerStatus> {
    let Some(status) = &pod.status else { return Vec::new() };
    let init = status.init_container_statuses.iter().flatten();
    let main = status.container_statuses.iter().flatten();
    init.chain(main).chain(status.ephemeral_container_statuses.iter().flatten()).collect()
}

/// What a container does, and since when.
fn container_status(state: Option<&ContainerState>) -> (String, Option<Timestamp>) {
    let Some(state) = state else { return ("Waiting".to_owned(), None) };
    if let Some(running) = &state.running {
        return ("Running".to_owned(), running.started_at.as_ref().map(|time| time.0));
    }
    if let Some(ended) = &state.terminated {
        let reason = ended.reason.as_deref().unwrap_or("Terminated");
        return (format!("{reason} ({})", ended.exit_code), ended.finished_at.as_ref().map(|time| time.0));
    }
    (state.waiting.as_ref().and_then(|waiting| waiting.reason.clone()).unwrap_or_else(|| "Waiting".to_owned()), None)
}

/// The one word that `kubectl get pods` shows: the reason that keeps a container from running, if there is one.
fn pod_status(pod: &Pod) -> String {
    let Some(status) = &pod.status else { return "Pending".to_owned() };
    if pod.metadata.deletion_timestamp.is_some() {
        return "Terminating".to_owned();
    }
    let phase = status.reason.clone().or_else(|| status.phase.clone()).unwrap_or_else(|| "Pending".to_owned());
    if matches!(status.phase.as_deref(), Some("Succeeded")) {
        return "Completed".to_owned();
    }
    let reason = |container: &&ContainerStatus| {
        let state = container.state.as_ref()?;
        let waiting = state.waiting.as_ref().and_then(|waiting| waiting.reason.clone());
        waiting.or_else(|| {
            let ended = state.terminated.as_ref().filter(|ended| ended.exit_code != 0)?;
            Some(ended.reason.clone().unwrap_or_else(|| format!("ExitCode:{}", ended.exit_code)))
        })
    };
    let init: Vec<_> = status.init_container_statuses.iter().flatten().collect();
    let waits = |name: &str| matches!(name, "PodInitializing" | "ContainerCreating");
    if let Some(reason) = init.iter().filter_map(reason).find(|reason| !waits(reason)) {
        return format!("Init:{reason}");
    }
    status.container_statuses.iter().flatten().filter_map(|container| reason(&container)).next().unwrap_or(phase)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_and_containers_with_what_they_wait_for() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web", "uid": "u"},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}]},
            "status": {"phase": "Pending", "podIP": "10.0.0.2", "startTime": "2026-01-01T00:00:00Z",
                "containerStatuses": [
                    {"name": "a", "ready": true, "restartCount": 2, "image": "", "imageID": "",
                     "state": {"running": {"startedAt": "2026-01-01T00:01:00Z"}}},
                    {"name": "b", "ready": false, "restartCount": 0, "image": "", "imageID": "",
                     "state": {"waiting": {"reason": "ContainerCreating"}}}]}
        }))
        .unwrap();
        let pull = Pull {
            uid: "u".into(),
            container: "b".into(),
            image: "i".into(),
            layers: 2,
            layers_done: 1,
            downloaded: 1_000_000,
            total: 4_000_000,
        };
        let now = "2026-01-01T00:02:00Z".parse().unwrap();
        let rows = rows(&[pod], &[pull], now);
        assert_eq!(rows[1], ["default", "web", "1/2", "ContainerCreating", "2", "2m", "10.0.0.2"]);
        assert_eq!(rows[2], ["", "  a", "ready", "Running", "2", "60s"]);
        assert_eq!(rows[3], ["", "  b", "", "Pulling 1.0 MB of 4.0 MB", "0", "-"]);
    }

    #[test]
    fn the_status_is_the_one_word_of_kubectl() {
        let word = |status: serde_json::Value| {
            pod_status(&serde_json::from_value(json!({"metadata": {}, "status": status})).unwrap())
        };
        let container = |state: serde_json::Value| json!([{"name": "a", "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": state}]);
        assert_eq!(word(json!({"phase": "Running"})), "Running");
        assert_eq!(word(json!({"phase": "Succeeded"})), "Completed");
        assert_eq!(word(json!({"phase": "Failed", "reason": "Evicted"})), "Evicted");
        let failed = container(json!({"terminated": {"exitCode": 3, "reason": "Error"}}));
        assert_eq!(word(json!({"phase": "Failed", "containerStatuses": failed})), "Error");
        let waiting = container(json!({"waiting": {"reason": "ImagePullBackOff"}}));
        assert_eq!(word(json!({"phase": "Pending", "initContainerStatuses": waiting})), "Init:ImagePullBackOff");
    }
}
