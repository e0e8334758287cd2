//! Which Pod and container a command means.

use clap::{Arg, ArgMatches};
use k8s_openapi::List;
use k8s_openapi::api::core::v1::Pod;

use super::client::{CliError, Client};

/// Annotation that names the container a command means if none is given.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

pub(super) fn namespace_arg() -> Arg {
    Arg::new("namespace").short('n').long("namespace").help("Namespace of the Pod, if its name is not unique here")
}

pub(super) fn pod_arg() -> Arg {
    Arg::new("pod").value_name("POD").required(true).help("Name of the Pod, or namespace/name")
}

pub(super) fn container_arg() -> Arg {
    Arg::new("container").short('c').long("container").help("Container; by default the Pod's first one")
}

/// All Pods of the node, sorted.
pub(super) async fn pods(client: &Client) -> Result<Vec<Pod>, CliError> {
    let list: List<Pod> = client.get("/pods").await?;
    let mut pods = list.items;
    pods.sort_by(|a, b| names(a).cmp(&names(b)));
    Ok(pods)
}

/// Namespace and name.
pub(super) fn names(pod: &Pod) -> (&str, &str) {
    let meta = &pod.metadata;
    (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// The Pod that the arguments mean.
pub(super) async fn find_pod(client: &Client, matches: &ArgMatches) -> Result<Pod, CliError> {
    let written = matches.get_one::<String>("pod").map_or("", String::as_str);
    let flag = matches.get_one::<String>("namespace").map(String::as_str);
    choose(pods(client).await?, written, flag)
}

fn choose(pods: Vec<Pod>, written: &str, flag: Option<&str>) -> Result<Pod, CliError> {
    let (namespace, name) = match written.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (flag, written),
    };
    let fits = |pod: &Pod| names(pod).1 == name && namespace.is_none_or(|namespace| names(pod).0 == namespace);
    let mut found: Vec<Pod> = pods.into_iter().filter(fits).collect();
    // without a namespace, "default" is meant if it has one of that name
    if found.len() > 1 && namespace.is_none() && found.iter().any(|pod| names(pod).0 == "default") {
        found.retain(|pod| names(pod).0 == "default");
    }
    match found.len() {
        0 => Err(CliError::Other(format!("pod {written:?} is not on this node: gantry ps lists those that are"))),
        1 => Ok(found.remove(0)),
        _ if namespace.is_some() => {
            // one of them is ending; the newer is meant
            let newest = found.into_iter().max_by_key(|pod| pod.metadata.creation_timestamp.clone());
            newest.ok_or_else(|| CliError::Other(format!("pod {written:?} is not on this node")))
        }
        _ => {
            let namespaces: Vec<_> = found.iter().map(|pod| names(pod).0).collect();
            let text = format!("pod {written:?} is in {}: say which with --namespace", namespaces.join(", "));
            Err(CliError::Other(text))
        }
    }
}

/// The container that the arguments mean.
pub(super) fn container(pod: &Pod, matches: &ArgMatches) -> Result<String, CliError> {
    let given = matches.get_one::<String>("container").map(String::as_str);
    let annotated = || pod.metadata.annotations.as_ref().and_then(|all| all.get(DEFAULT_CONTAINER)).map(String::as_str);
    let all = containers(pod);
    match given.or_else(annotated) {
        Some(name) if all.iter().any(|known| known == name) => Ok(name.to_owned()),
        Some(name) => {
            let text = format!("container {name:?} is not in pod {:?}, which has: {}", names(pod).1, all.join(", "));
            Err(CliError::Other(text))
        }
        None => {
            let first = pod.spec.as_ref().and_then(|spec| spec.containers.first());
            first.map(|first| first.name.clone()).ok_or_else(|| CliError::Other("the Pod has no container".to_owned()))
        }
    }
}

fn containers(pod: &Pod) -> Vec<String> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let plain = spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|one| one.name.clone());
    plain.chain(spec.ephemeral_containers.iter().flatten().map(|one| one.name.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.namespace = Some(namespace.to_owned());
        pod.metadata.name = Some(name.to_owned());
        pod
    }

    #[test]
    fn a_name_is_enough_if_it_is_unique_or_in_default() {
        let pods = || vec![pod("a", "one"), pod("a", "web"), pod("default", "web"), pod("b", "db"), pod("c", "db")];
        let chosen = |written: &str, flag: Option<&str>| {
            choose(pods(), written, flag).map(|pod| format!("{}/{}", names(&pod).0, names(&pod).1))
        };
        assert_eq!(chosen("one", None).unwrap(), "a/one");
        assert_eq!(chosen("web", None).unwrap(), "default/web");
        assert_eq!(chosen("web", Some("a")).unwrap(), "a/web");
        assert_eq!(chosen("c/db", None).unwrap(), "c/db");
        assert!(chosen("db", None).unwrap_err().to_string().contains("b, c"));
        assert!(chosen("one", Some("default")).is_err() && chosen("none", None).is_err());
    }
}
