//! `gantry retire`: the end of all nodes of a StatefulSet, before what they need to leave by is deleted.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command, value_parser};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::Api;
use kube::api::{Patch, PatchParams};
use tokio::time::{Instant, sleep};

use super::client::{CliError, block_on};
use crate::config::StatefulSetName;
use crate::node::client::{ApiClient, Credentials, Limits, REQUEST_TIMEOUT};

pub(super) const NAME: &str = "retire";

/// How often the StatefulSet is looked at; watching it would take rights to all of its namespace.
const LOOK: Duration = Duration::from_secs(1);

pub(super) fn command() -> Command {
    let kubeconfig = Arg::new("kubeconfig").long("kubeconfig").value_name("FILE").required(true);
    let set = Arg::new("stateful-set").long("stateful-set").value_name("NAMESPACE/NAME").required(true);
    let timeout = Arg::new("timeout").long("timeout").value_name("SECONDS").value_parser(value_parser!(u64));
    Command::new(NAME)
        .about("Scale a StatefulSet of nodes to none, and wait until its nodes have left the cluster")
        .arg(kubeconfig.help("Credentials that may get the StatefulSet and patch its scale"))
        .arg(set.help("The StatefulSet whose Pods are nodes").value_parser(stateful_set))
        .arg(timeout.help("How long to wait").default_value("300"))
}

fn stateful_set(text: &str) -> Result<StatefulSetName, String> {
    StatefulSetName::parse(text).ok_or_else(|| "write NAMESPACE/NAME".to_owned())
}

pub(super) fn run(matches: &ArgMatches) -> ExitCode {
    block_on(retire(matches))
}

async fn retire(matches: &ArgMatches) -> Result<ExitCode, CliError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| CliError::Other(format!("{what}: {error}"));
    let kubeconfig = matches.get_one::<String>("kubeconfig").map(String::as_str).unwrap_or_default();
    let Some(set) = matches.get_one::<StatefulSetName>("stateful-set") else { return Ok(ExitCode::FAILURE) };
    let timeout = Duration::from_secs(matches.get_one("timeout").copied().unwrap_or_default());
    let credentials = Credentials { kubeconfig: kubeconfig.into(), rotated: None };
    let client = ApiClient::new(credentials, Limits::heartbeat(REQUEST_TIMEOUT)).await;
    let client = client.map_err(|error| failed("--kubeconfig", &error))?.client();
    let sets: Api<StatefulSet> = Api::namespaced(client, &set.namespace);
    let none = Patch::Merge(serde_json::json!({"spec": {"replicas": 0}}));
    match sets.patch_scale(&set.name, &PatchParams::default(), &none).await {
        Ok(_) => println!("statefulset {set} scaled to none"),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            println!("statefulset {set} does not exist: nothing to do");
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => return Err(failed(&format!("scale StatefulSet {set}"), &error)),
    }
    let deadline = Instant::now() + timeout;
    loop {
        match sets.get_opt(&set.name).await {
            Ok(Some(found)) if is_empty(&found) => break,
            Ok(None) => break,
            Ok(Some(_)) if Instant::now() < deadline => {}
            Ok(Some(_)) => {
                let problem = format!(
                    "not all nodes of StatefulSet {set} have left within {} s: kubectl -n {} get pods shows which, their logs say why",
                    timeout.as_secs(),
                    set.namespace
                );
                return Err(CliError::Other(problem));
            }
            Err(error) if Instant::now() < deadline => eprintln!("get StatefulSet {set}: {error}, will retry"),
            Err(error) => return Err(failed(&format!("get StatefulSet {set}"), &error)),
        }
        sleep(LOOK).await;
    }
    println!("all nodes of statefulset {set} have left");
    Ok(ExitCode::SUCCESS)
}

/// The controller has seen that there shall be none, and there is none.
fn is_empty(set: &StatefulSet) -> bool {
    let status = set.status.as_ref();
    let seen = status.and_then(|status| status.observed_generation) >= set.metadata.generation;
    seen && status.is_some_and(|status| status.replicas == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_news_do_not_count() {
        let set = |observed: i64, replicas: i32| {
            serde_json::from_value::<StatefulSet>(serde_json::json!({
                "metadata": {"generation": 2}, "status": {"observedGeneration": observed, "replicas": replicas}
            }))
            .unwrap()
        };
        assert!(is_empty(&set(2, 0)));
        assert!(!is_empty(&set(1, 0)) && !is_empty(&set(2, 1)));
        assert!(!is_empty(&serde_json::from_str(r#"{"metadata": {"generation": 1}}"#).unwrap()));
    }
}
