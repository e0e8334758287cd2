//! What an API server would have filled in, for Pods that never passed one.
//!
//! Source: `pkg/apis/core/v1/defaults.go` and `SetObjectDefaults_Pod` in `zz_generated.defaults.go`, with the
//! feature gates of v1.37. Idempotent.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EnvVar, HTTPGetAction, ObjectFieldSelector, Pod, PodSpec, Probe, ResourceRequirements,
    Volume,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::resources::quantity;

/// Mode of files in secret, configMap, downwardAPI and projected volumes.
const FILE_MODE: i32 = 0o644;

/// Fills in what a manifest leaves out.
pub fn set_defaults(pod: &mut Pod) {
    let Some(spec) = &mut pod.spec else { return };
    spec_defaults(spec);
    for volume in spec.volumes.iter_mut().flatten() {
        volume_defaults(volume);
    }
    let host_network = spec.host_network == Some(true);
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        container_defaults(container, host_network);
    }
    if let Some(resources) = &mut spec.resources {
        round(&mut resources.limits);
        round(&mut resources.requests);
    }
    spec.overhead.iter_mut().for_each(round_all);
}

fn spec_defaults(spec: &mut PodSpec) {
    if spec.service_account_name.as_deref().unwrap_or("").is_empty() {
        spec.service_account_name = spec.service_account.clone();
    }
    spec.service_account = spec.service_account_name.clone();
    fill(&mut spec.dns_policy, "ClusterFirst");
    fill(&mut spec.restart_policy, "Always");
    fill(&mut spec.scheduler_name, "default-scheduler");
    spec.security_context.get_or_insert_default();
    spec.enable_service_links.get_or_insert(true);
    match &mut spec.termination_grace_period_seconds {
        Some(seconds) if *seconds < 0 => *seconds = 1,
        seconds => {
            seconds.get_or_insert(30);
        }
    }
}

/// Absent and empty are the same to Go.
fn fill(field: &mut Option<String>, default: &str) {
    if field.as_deref().unwrap_or("").is_empty() {
        *field = Some(default.to_owned());
    }
}

/// `Always` for an image without tag or with `latest`; a digest alone pins it.
fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        // a tag before the digest counts
        let tagged = image.split('@').next().is_some_and(|name| tag(name) == Some("latest"));
        return if tagged { "Always" } else { "IfNotPresent" };
    }
    if matches!(tag(image), None | Some("latest")) { "Always" } else { "IfNotPresent" }
}

/// The tag of a reference without digest; the colon of a registry's port is none.
fn tag(name: &str) -> Option<&str> {
    let last = name.rsplit('/').next()?;
    last.split_once(':').map(|(_, tag)| tag)
}

fn container_defaults(container: &mut Container, host_network: bool) {
    let policy = pull_policy(container.image.as_deref().unwrap_or(""));
    fill(&mut container.image_pull_policy, policy);
    fill(&mut container.termination_message_path, "/dev/termination-log");
    fill(&mut container.termination_message_policy, "File");
    for port in container.ports.iter_mut().flatten() {
        port_defaults(port, host_network);
    }
    for variable in container.env.iter_mut().flatten() {
        env_defaults(variable);
    }
    if let Some(resources) = &mut container.resources {
        resource_defaults(resources);
    }
    for probe in [&mut container.liveness_probe, &mut container.readiness_probe, &mut container.startup_probe] {
        probe.iter_mut().for_each(probe_defaults);
    }
    if let Some(lifecycle) = &mut container.lifecycle {
        for hook in [&mut lifecycle.post_start, &mut lifecycle.pre_stop].into_iter().flatten() {
            hook.http_get.iter_mut().for_each(http_defaults);
        }
    }
}

fn port_defaults(port: &mut ContainerPort, host_network: bool) {
    fill(&mut port.protocol, "TCP");
    if host_network && port.host_port.unwrap_or(0) == 0 {
        port.host_port = Some(port.container_port);
    }
}

fn env_defaults(variable: &mut EnvVar) {
    let Some(source) = &mut variable.value_from else { return };
    source.field_ref.iter_mut().for_each(field_defaults);
    if let Some(key) = &mut source.file_key_ref {
        key.optional.get_or_insert(false);
    }
}

fn field_defaults(field: &mut ObjectFieldSelector) {
    fill(&mut field.api_version, "v1");
}

fn resource_defaults(resources: &mut ResourceRequirements) {
    round(&mut resources.limits);
    round(&mut resources.requests);
    if let Some(limits) = &resources.limits {
        let requests = resources.requests.get_or_insert_default();
        for (name, amount) in limits {
            requests.entry(name.clone()).or_insert_with(|| amount.clone());
        }
    }
}

/// Amounts finer than a thousandth are rounded up; what is no amount is validation's to report.
fn round(amounts: &mut Option<BTreeMap<String, Quantity>>) {
    amounts.iter_mut().for_each(round_all);
}

fn round_all(amounts: &mut BTreeMap<String, Quantity>) {
    for amount in amounts.values_mut() {
        if quantity::nanos(&amount.0).is_ok_and(|nanos| nanos % 1_000_000 != 0)
            && let Ok(milli) = quantity::milli_value(amount)
        {
            *amount = quantity::from_milli(milli);
        }
    }
}

fn probe_defaults(probe: &mut Probe) {
    let number = |field: &mut Option<i32>, default| {
        if field.unwrap_or(0) == 0 {
            *field = Some(default);
        }
    };
    number(&mut probe.timeout_seconds, 1);
    number(&mut probe.period_seconds, 10);
    number(&mut probe.success_threshold, 1);
    number(&mut probe.failure_threshold, 3);
    probe.http_get.iter_mut().for_each(http_defaults);
    if let Some(grpc) = &mut probe.grpc {
        grpc.service.get_or_insert_default();
    }
}

fn http_defaults(action: &mut HTTPGetAction) {
    fill(&mut action.path, "/");
    fill(&mut action.scheme, "HTTP");
}

fn volume_defaults(volume: &mut Volume) {
    // a volume without a source is an emptyDir
    let sources = serde_json::to_value(&*volume).ok().and_then(|value| value.as_object().map(serde_json::Map::len));
    if sources == Some(1) {
        volume.empty_dir = Some(Default::default());
    }
    if let Some(image) = &mut volume.image {
        let policy = pull_policy(image.reference.as_deref().unwrap_or(""));
        fill(&mut image.pull_policy, policy);
    }
    if let Some(path) = &mut volume.host_path {
        path.type_.get_or_insert_default();
    }
    if let Some(secret) = &mut volume.secret {
        secret.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(map) = &mut volume.config_map {
        map.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(downward) = &mut volume.downward_api {
        downward.default_mode.get_or_insert(FILE_MODE);
        downward.items.iter_mut().flatten().flat_map(|item| &mut item.field_ref).for_each(field_defaults);
    }
    if let Some(projected) = &mut volume.projected {
        projected.default_mode.get_or_insert(FILE_MODE);
        for source in projected.sources.iter_mut().flatten() {
            if let Some(downward) = &mut source.downward_api {
                downward.items.iter_mut().flatten().flat_map(|item| &mut item.field_ref).for_each(field_defaults);
            }
            if let Some(token) = &mut source.service_account_token {
                token.expiration_seconds.get_or_insert(3600);
            }
        }
    }
    if let Some(disk) = &mut volume.iscsi {
        fill(&mut disk.iscsi_interface, "default");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn defaulted(spec: Value) -> Value {
        let mut pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        set_defaults(&mut pod);
        let once = serde_json::to_value(&pod).unwrap();
        set_defaults(&mut pod);
        assert_eq!(once, serde_json::to_value(&pod).unwrap(), "idempotent");
        once["spec"].clone()
    }

    #[test]
    fn the_least_pod() {
        assert_eq!(
            defaulted(json!({"containers": [{"name": "c", "image": "busybox"}]})),
            json!({
                "containers": [{
                    "name": "c", "image": "busybox", "imagePullPolicy": "Always",
                    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"
                }],
                "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "restartPolicy": "Always",
                "schedulerName": "default-scheduler", "securityContext": {}, "terminationGracePeriodSeconds": 30
            })
        );
    }

    #[test]
    fn images_and_their_policies() {
        for (image, policy) in [
            ("busybox", "Always"),
            ("busybox:latest", "Always"),
            ("busybox:1.36", "IfNotPresent"),
            ("host:5000/busybox", "Always"),
            ("host:5000/a/b:1", "IfNotPresent"),
            ("busybox@sha256:00", "IfNotPresent"),
            ("busybox:latest@sha256:00", "Always"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn everything_else() {
        let spec = defaulted(json!({
            "hostNetwork": true, "terminationGracePeriodSeconds": -5,
            "volumes": [
                {"name": "e"}, {"name": "h", "hostPath": {"path": "/x"}}, {"name": "s", "secret": {"secretName": "x"}},
                {"name": "p", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "t"}},
                    {"downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}}
                ]}}
            ],
            "initContainers": [{"name": "i", "image": "x:1", "resources": {"limits": {"cpu": "1.0005", "memory": "1Gi"}, "requests": {"memory": "1Mi"}}}],
            "containers": [{
                "name": "c", "image": "x:1", "ports": [{"containerPort": 80}],
                "env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                "livenessProbe": {"httpGet": {"port": 80}, "periodSeconds": 0}, "readinessProbe": {"grpc": {"port": 1}},
                "lifecycle": {"preStop": {"httpGet": {"port": 1}}}
            }]
        }));
        assert_eq!(spec["terminationGracePeriodSeconds"], 1);
        assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
        assert_eq!(spec["volumes"][1]["hostPath"]["type"], "");
        assert_eq!(spec["volumes"][2]["secret"]["defaultMode"], 420);
        assert_eq!(spec["volumes"][3]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"], 3600);
        assert_eq!(
            spec["volumes"][3]["projected"]["sources"][1]["downwardAPI"]["items"][0]["fieldRef"]["apiVersion"],
            "v1"
        );
        assert_eq!(spec["initContainers"][0]["resources"]["requests"], json!({"cpu": "1001m", "memory": "1Mi"}));
        let container = &spec["containers"][0];
        assert_eq!(container["ports"][0], json!({"containerPort": 80, "hostPort": 80, "protocol": "TCP"}));
        assert_eq!(container["env"][0]["valueFrom"]["fieldRef"]["apiVersion"], "v1");
        assert_eq!(
            container["livenessProbe"],
            json!({"failureThreshold": 3, "httpGet": {"path": "/", "port": 80, "scheme": "HTTP"}, "periodSeconds": 10, "successThreshold": 1, "timeoutSeconds": 1})
        );
        assert_eq!(container["readinessProbe"]["grpc"]["service"], "");
        assert_eq!(container["lifecycle"]["preStop"]["httpGet"]["path"], "/");
    }
}
