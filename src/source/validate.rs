//! Rules for static Pods, which no API server checks: those of `pkg/apis/core/validation` that keep a Pod from
//! being started wrongly, and `HasAPIObjectReference` of `pkg/api/pod/util.go`.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Probe, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::Value;

use crate::config::names;
use crate::resources::quantity;

/// Collects `path: what` in the API server's words.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn required(&mut self, path: &str, value: &str) -> bool {
        if value.is_empty() {
            self.0.push(format!("{path}: Required value"));
        }
        !value.is_empty()
    }

    fn invalid(&mut self, path: &str, value: &str, problem: Option<String>) {
        if let Some(problem) = problem {
            self.0.push(format!("{path}: Invalid value: {value:?}: {problem}"));
        }
    }

    fn one_of(&mut self, path: &str, value: Option<&str>, allowed: &[&str]) {
        let value = value.unwrap_or("");
        if !value.is_empty() && !allowed.contains(&value) {
            let list: Vec<String> = allowed.iter().map(|word| format!("{word:?}")).collect();
            self.0.push(format!("{path}: Unsupported value: {value:?}: supported values: {}", list.join(", ")));
        }
    }

    fn range(&mut self, path: &str, value: i32, low: i32, high: i32) {
        let problem = (!(low..=high).contains(&value)).then(|| format!("must be between {low} and {high}, inclusive"));
        self.invalid(path, &value.to_string(), problem);
    }
}

/// Everything that is wrong with a defaulted Pod; empty if it may run.
pub(super) fn problems(pod: &Pod) -> Vec<String> {
    let mut problems = Problems::default();
    let name = pod.metadata.name.as_deref().unwrap_or("");
    problems.invalid("metadata.name", name, names::dns_subdomain(name));
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("");
    problems.invalid("metadata.namespace", namespace, names::dns_label(namespace));
    for (key, value) in pod.metadata.labels.iter().flatten() {
        problems.invalid("metadata.labels", key, names::qualified_name(key));
        problems.invalid("metadata.labels", value, names::label_value(value));
    }
    // it becomes part of paths
    let uid = pod.metadata.uid.as_deref().unwrap_or("");
    problems.invalid("metadata.uid", uid, names::dns_subdomain(uid));
    match &pod.spec {
        Some(spec) => check_spec(spec, &mut problems),
        None => problems.0.push("spec: Required value".to_owned()),
    }
    problems.0
}

fn check_spec(spec: &PodSpec, problems: &mut Problems) {
    problems.one_of("spec.restartPolicy", spec.restart_policy.as_deref(), &["Always", "OnFailure", "Never"]);
    let dns = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    problems.one_of("spec.dnsPolicy", spec.dns_policy.as_deref(), &dns);
    let servers = spec.dns_config.as_ref().and_then(|config| config.nameservers.as_ref()).map_or(0, Vec::len);
    if spec.dns_policy.as_deref() == Some("None") && servers == 0 {
        problems.0.push("spec.dnsConfig.nameservers: Required value: must provide at least one DNS nameserver when `dnsPolicy` is None".to_owned());
    }
    if let Some(hostname) = spec.hostname.as_deref().filter(|name| !name.is_empty()) {
        problems.invalid("spec.hostname", hostname, names::dns_label(hostname));
    }
    if spec.ephemeral_containers.as_ref().is_some_and(|list| !list.is_empty()) {
        problems.0.push("spec.ephemeralContainers: Forbidden: ephemeral containers not allowed in create".to_owned());
    }
    if spec.containers.is_empty() {
        problems.0.push("spec.containers: Required value".to_owned());
    }
    let volumes = check_volumes(spec.volumes.as_deref().unwrap_or_default(), problems);
    let mut names = BTreeSet::new();
    let mut host_ports = BTreeSet::new();
    let init = spec.init_containers.iter().flatten().enumerate().map(|(index, container)| (true, index, container));
    let all = init.chain(spec.containers.iter().enumerate().map(|(index, container)| (false, index, container)));
    for (is_init, index, container) in all {
        let path = format!("spec.{}[{index}]", if is_init { "initContainers" } else { "containers" });
        if !names.insert(container.name.as_str()) {
            problems.0.push(format!("{path}.name: Duplicate value: {:?}", container.name));
        }
        check_container(container, &path, &volumes, problems);
        if is_init {
            problems.one_of(
                &format!("{path}.restartPolicy"),
                container.restart_policy.as_deref(),
                &["Always", "OnFailure", "Never"],
            );
            continue;
        }
        for (number, port) in container.ports.iter().flatten().enumerate() {
            let host = port.host_port.unwrap_or(0);
            let taken = (host, port.protocol.as_deref(), port.host_ip.as_deref());
            if host != 0 && !host_ports.insert(taken) {
                problems.0.push(format!("{path}.ports[{number}].hostPort: Duplicate value: {host}"));
            }
        }
    }
}

/// The volumes' names.
fn check_volumes<'a>(volumes: &'a [Volume], problems: &mut Problems) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for (index, volume) in volumes.iter().enumerate() {
        let path = format!("spec.volumes[{index}]");
        if problems.required(&format!("{path}.name"), &volume.name) {
            problems.invalid(&format!("{path}.name"), &volume.name, names::dns_label(&volume.name));
        }
        if !names.insert(volume.name.as_str()) {
            problems.0.push(format!("{path}.name: Duplicate value: {:?}", volume.name));
        }
        // beside the name there is one source
        let fields = serde_json::to_value(volume).ok().and_then(|value| value.as_object().map(serde_json::Map::len));
        if fields.is_some_and(|fields| fields > 2) {
            problems.0.push(format!("{path}: Forbidden: may not specify more than 1 volume type"));
        }
        if let Some(host) = &volume.host_path {
            problems.required(&format!("{path}.hostPath.path"), &host.path);
            let backwards = host.path.split('/').any(|part| part == "..");
            problems.invalid(
                &format!("{path}.hostPath.path"),
                &host.path,
                backwards.then(|| "must not contain '..'".to_owned()),
            );
            let types =
                ["DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];
            problems.one_of(&format!("{path}.hostPath.type"), host.type_.as_deref(), &types);
        }
    }
    names
}

fn check_container(container: &Container, path: &str, volumes: &BTreeSet<&str>, problems: &mut Problems) {
    if problems.required(&format!("{path}.name"), &container.name) {
        problems.invalid(&format!("{path}.name"), &container.name, names::dns_label(&container.name));
    }
    let image = container.image.as_deref().unwrap_or("");
    if problems.required(&format!("{path}.image"), image) {
        let padded = image.trim() != image;
        problems.invalid(
            &format!("{path}.image"),
            image,
            padded.then(|| "must not have leading or trailing whitespace".to_owned()),
        );
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    problems.one_of(&format!("{path}.imagePullPolicy"), container.image_pull_policy.as_deref(), &policies);
    let messages = ["File", "FallbackToLogsOnError"];
    let policy = container.termination_message_policy.as_deref();
    problems.one_of(&format!("{path}.terminationMessagePolicy"), policy, &messages);
    for (index, port) in container.ports.iter().flatten().enumerate() {
        let path = format!("{path}.ports[{index}]");
        problems.range(&format!("{path}.containerPort"), port.container_port, 1, 65535);
        problems.range(&format!("{path}.hostPort"), port.host_port.unwrap_or(0), 0, 65535);
        problems.one_of(&format!("{path}.protocol"), port.protocol.as_deref(), &["TCP", "UDP", "SCTP"]);
    }
    for (index, variable) in container.env.iter().flatten().enumerate() {
        let path = format!("{path}.env[{index}]");
        problems.required(&format!("{path}.name"), &variable.name);
        let odd = variable.name.contains('=') || variable.name.contains('\0');
        problems.invalid(&format!("{path}.name"), &variable.name, odd.then(|| "must not contain '='".to_owned()));
        if variable.value.as_deref().is_some_and(|value| !value.is_empty()) && variable.value_from.is_some() {
            problems
                .0
                .push(format!("{path}.valueFrom: Invalid value: \"\": may not be specified when `value` is not empty"));
        }
    }
    let mut targets = BTreeSet::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let path = format!("{path}.volumeMounts[{index}]");
        problems.required(&format!("{path}.mountPath"), &mount.mount_path);
        if problems.required(&format!("{path}.name"), &mount.name) && !volumes.contains(mount.name.as_str()) {
            problems.0.push(format!("{path}.name: Not found: {:?}", mount.name));
        }
        if !targets.insert(mount.mount_path.as_str()) {
            problems.invalid(&format!("{path}.mountPath"), &mount.mount_path, Some("must be unique".to_owned()));
        }
        for (field, value) in [("subPath", &mount.sub_path), ("subPathExpr", &mount.sub_path_expr)] {
            let value = value.as_deref().unwrap_or("");
            let escapes = value.starts_with('/') || value.split('/').any(|part| part == "..");
            problems.invalid(
                &format!("{path}.{field}"),
                value,
                escapes.then(|| "must be a relative path without '..'".to_owned()),
            );
        }
    }
    if let Some(resources) = &container.resources {
        check_resources(resources.limits.as_ref(), resources.requests.as_ref(), &format!("{path}.resources"), problems);
    }
    for (field, probe) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        if let Some(probe) = probe {
            check_probe(probe, field, &format!("{path}.{field}"), problems);
        }
    }
}

type Amounts = BTreeMap<String, Quantity>;

fn check_resources(limits: Option<&Amounts>, requests: Option<&Amounts>, path: &str, problems: &mut Problems) {
    for (field, amounts) in [("limits", limits), ("requests", requests)] {
        for (name, amount) in amounts.into_iter().flatten() {
            let path = format!("{path}.{field}[{name}]");
            match quantity::nanos(&amount.0) {
                Ok(nanos) if nanos < 0 => {
                    problems.invalid(&path, &amount.0, Some("must be greater than or equal to 0".to_owned()));
                }
                Ok(_) => {}
                Err(error) => problems.invalid(&path, &amount.0, Some(error.to_string())),
            }
        }
    }
    for (name, request) in requests.into_iter().flatten() {
        let limit = limits.and_then(|limits| limits.get(name)).and_then(|limit| quantity::nanos(&limit.0).ok());
        if let (Some(limit), Ok(request_nanos)) = (limit, quantity::nanos(&request.0))
            && request_nanos > limit
        {
            let problem = format!("must be less than or equal to {name} limit");
            problems.invalid(&format!("{path}.requests"), &request.0, Some(problem));
        }
    }
}

fn check_probe(probe: &Probe, field: &str, path: &str, problems: &mut Problems) {
    let handlers = [probe.exec.is_some(), probe.http_get.is_some(), probe.tcp_socket.is_some(), probe.grpc.is_some()];
    match handlers.iter().filter(|given| **given).count() {
        0 => problems.0.push(format!("{path}: Required value: must specify a handler type")),
        1 => {}
        _ => problems.0.push(format!("{path}: Forbidden: may not specify more than 1 handler type")),
    }
    for (name, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        let value = value.unwrap_or(0);
        let problem = (value < 0).then(|| "must be greater than or equal to 0".to_owned());
        problems.invalid(&format!("{path}.{name}"), &value.to_string(), problem);
    }
    let successes = probe.success_threshold.unwrap_or(1);
    if field != "readinessProbe" && successes != 1 {
        problems.invalid(&format!("{path}.successThreshold"), &successes.to_string(), Some("must be 1".to_owned()));
    }
}

/// The kind of API object that a Pod needs; nothing if it needs none.
pub(super) fn api_reference(pod: &Pod) -> Option<&'static str> {
    let spec = pod.spec.as_ref()?;
    if spec.service_account_name.as_deref().is_some_and(|name| !name.is_empty()) {
        return Some("serviceaccounts");
    }
    if spec.image_pull_secrets.as_ref().is_some_and(|list| !list.is_empty()) {
        return Some("secrets");
    }
    let containers = || spec.init_containers.iter().flatten().chain(&spec.containers);
    let mut from = containers().flat_map(|container| container.env_from.iter().flatten());
    let mut sources =
        containers().flat_map(|container| container.env.iter().flatten()).filter_map(|env| env.value_from.as_ref());
    if from.any(|from| from.secret_ref.is_some()) || sources.any(|source| source.secret_key_ref.is_some()) {
        return Some("secrets");
    }
    let mut from = containers().flat_map(|container| container.env_from.iter().flatten());
    let mut sources =
        containers().flat_map(|container| container.env.iter().flatten()).filter_map(|env| env.value_from.as_ref());
    if from.any(|from| from.config_map_ref.is_some()) || sources.any(|source| source.config_map_key_ref.is_some()) {
        return Some("configmaps");
    }
    if spec.resource_claims.as_ref().is_some_and(|list| !list.is_empty()) {
        return Some("resourceclaims");
    }
    spec.volumes.iter().flatten().find_map(volume_reference)
}

fn volume_reference(volume: &Volume) -> Option<&'static str> {
    for (present, resource) in [
        (volume.config_map.is_some(), "configmaps (via configmap volumes)"),
        (volume.secret.is_some(), "secrets (via secret volumes)"),
        (volume.csi.is_some(), "csidrivers (via CSI volumes)"),
        (volume.glusterfs.is_some(), "endpoints (via glusterFS volumes)"),
        (volume.persistent_volume_claim.is_some(), "persistentvolumeclaims"),
        (volume.ephemeral.is_some(), "persistentvolumeclaims (via ephemeral volumes)"),
        (volume.azure_file.is_some(), "secrets (via azureFile volumes)"),
    ] {
        if present {
            return Some(resource);
        }
    }
    // drivers that name a secret of their own, whatever the driver
    let names_secret = serde_json::to_value(volume)
        .ok()
        .and_then(|value| value.as_object().cloned())
        .is_some_and(|fields| fields.values().any(|source| source.get("secretRef").is_some_and(Value::is_object)));
    if names_secret {
        return Some("secrets");
    }
    volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()).find_map(|source| {
        [
            (source.config_map.is_some(), "configmaps (via projected volumes)"),
            (source.secret.is_some(), "secrets (via projected volumes)"),
            (source.service_account_token.is_some(), "serviceaccounts (via projected volumes)"),
            (source.cluster_trust_bundle.is_some(), "clustertrustbundles"),
            (source.pod_certificate.is_some(), "podcertificates"),
        ]
        .into_iter()
        .find_map(|(present, resource)| present.then_some(resource))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u"}, "spec": spec})).unwrap()
    }

    fn with(container: Value) -> Value {
        let mut base = json!({"name": "c", "image": "i"});
        base.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
        json!({"containers": [base], "volumes": [{"name": "v", "emptyDir": {}}]})
    }

    #[test]
    fn a_good_pod_has_no_problems() {
        let spec = with(
            json!({"volumeMounts": [{"name": "v", "mountPath": "/x"}], "ports": [{"containerPort": 1, "hostPort": 1}]}),
        );
        assert_eq!(problems(&pod(spec)), Vec::<String>::new());
    }

    #[test]
    fn each_problem_names_its_field() {
        for (spec, start) in [
            (json!({"containers": []}), "spec.containers: Required value"),
            (
                json!({"containers": [{"name": "c", "image": "i"}, {"name": "c", "image": "i"}]}),
                "spec.containers[1].name: Duplicate value: \"c\"",
            ),
            (with(json!({"image": ""})), "spec.containers[0].image: Required value"),
            (
                with(json!({"imagePullPolicy": "Sometimes"})),
                "spec.containers[0].imagePullPolicy: Unsupported value: \"Sometimes\"",
            ),
            (
                with(json!({"volumeMounts": [{"name": "w", "mountPath": "/x"}]})),
                "spec.containers[0].volumeMounts[0].name: Not found: \"w\"",
            ),
            (
                with(json!({"volumeMounts": [{"name": "v", "mountPath": "/x", "subPath": "../y"}]})),
                "spec.containers[0].volumeMounts[0].subPath: Invalid value",
            ),
            (
                with(json!({"ports": [{"containerPort": 0}]})),
                "spec.containers[0].ports[0].containerPort: Invalid value: \"0\": must be between 1",
            ),
            (with(json!({"livenessProbe": {}})), "spec.containers[0].livenessProbe: Required value"),
            (
                with(json!({"livenessProbe": {"exec": {}, "successThreshold": 2}})),
                "spec.containers[0].livenessProbe.successThreshold: Invalid value",
            ),
            (
                with(json!({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}})),
                "spec.containers[0].resources.requests: Invalid value: \"2\": must be less",
            ),
            (
                with(json!({"resources": {"limits": {"cpu": "much"}}})),
                "spec.containers[0].resources.limits[cpu]: Invalid value",
            ),
            (with(json!({"env": [{"name": "A=B"}]})), "spec.containers[0].env[0].name: Invalid value"),
            (
                json!({"containers": [{"name": "c", "image": "i"}], "dnsPolicy": "None"}),
                "spec.dnsConfig.nameservers: Required value",
            ),
            (
                json!({"containers": [{"name": "c", "image": "i"}], "volumes": [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]}),
                "spec.volumes[0]: Forbidden",
            ),
            (
                json!({"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Maybe"}),
                "spec.restartPolicy: Unsupported value",
            ),
        ] {
            let found = problems(&pod(spec.clone()));
            assert!(found.len() == 1 && found[0].starts_with(start), "{spec}: {found:?}");
        }
    }

    #[test]
    fn identities_that_would_leave_their_directory_are_refused() {
        let mut evil = pod(with(json!({})));
        evil.metadata.uid = Some("../../etc".into());
        assert_eq!(problems(&evil).len(), 1);
    }

    #[test]
    fn references_to_the_api() {
        for (spec, resource) in [
            (json!({"serviceAccountName": "x"}), "serviceaccounts"),
            (json!({"imagePullSecrets": [{"name": "x"}]}), "secrets"),
            (json!({"containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": "x"}}]}]}), "configmaps"),
            (
                json!({"containers": [{"name": "c", "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "x", "key": "k"}}}]}]}),
                "secrets",
            ),
            (json!({"resourceClaims": [{"name": "x"}]}), "resourceclaims"),
            (
                json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "x"}}]}),
                "persistentvolumeclaims",
            ),
            (json!({"volumes": [{"name": "v", "cephfs": {"monitors": [], "secretRef": {"name": "x"}}}]}), "secrets"),
            (
                json!({"volumes": [{"name": "v", "projected": {"sources": [{"secret": {"name": "x"}}]}}]}),
                "secrets (via projected volumes)",
            ),
        ] {
            let mut full = json!({"containers": []});
            full.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
            assert_eq!(api_reference(&pod(full)), Some(resource));
        }
        let plain = json!({"containers": [], "volumes": [{"name": "v", "hostPath": {"path": "/"}}, {"name": "d", "downwardAPI": {}}]});
        assert_eq!(api_reference(&pod(plain)), None);
    }
}
