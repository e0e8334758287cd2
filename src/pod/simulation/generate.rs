//! Pods of every kind, from a seed.

use fastrand::Rng;
use k8s_openapi::api::core::v1::{
    Container, ContainerResizePolicy, ContainerRestartRule, ContainerRestartRuleOnExitCodes, Lifecycle,
    LifecycleHandler, Pod, PodSpec, Probe, ResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub(super) fn cpu_request(milli: u32) -> ResourceRequirements {
    let requests = [("cpu".to_owned(), Quantity(format!("{milli}m")))].into();
    ResourceRequirements { requests: Some(requests), ..ResourceRequirements::default() }
}

pub(super) fn generate(rng: &mut Rng) -> Pod {
    let probe = |rng: &mut Rng| {
        rng.bool().then(|| Probe {
            period_seconds: Some(rng.i32(10..60)),
            failure_threshold: Some(rng.i32(1..4)),
            initial_delay_seconds: Some(rng.i32(0..5)),
            ..Probe::default()
        })
    };
    let container = |rng: &mut Rng, name: String| {
        let hook = |rng: &mut Rng| (rng.u8(0..5) == 0).then(LifecycleHandler::default);
        Container {
            name,
            image: Some("image".to_owned()),
            liveness_probe: probe(rng),
            readiness_probe: probe(rng),
            startup_probe: (rng.u8(0..4) == 0).then(|| probe(rng)).flatten(),
            lifecycle: Some(Lifecycle { post_start: hook(rng), pre_stop: hook(rng), stop_signal: None }),
            resources: Some(cpu_request(100)),
            resize_policy: (rng.u8(0..4) == 0).then(|| {
                let restart_policy = "RestartContainer".to_owned();
                vec![ContainerResizePolicy { resource_name: "cpu".to_owned(), restart_policy }]
            }),
            ..Container::default()
        }
    };
    let mut init = Vec::new();
    for i in 0..rng.usize(0..3) {
        let sidecar = rng.bool();
        let name = if sidecar { format!("sidecar{i}") } else { format!("init{i}") };
        let mut one = container(rng, name);
        if sidecar {
            one.restart_policy = Some("Always".to_owned());
        } else {
            (one.liveness_probe, one.readiness_probe, one.startup_probe, one.lifecycle) = (None, None, None, None);
            one.resize_policy = None;
        }
        init.push(one);
    }
    let mut main: Vec<_> = (0..rng.usize(1..4)).map(|i| container(rng, format!("main{i}"))).collect();
    if rng.u8(0..5) == 0 {
        let exit_codes = ContainerRestartRuleOnExitCodes { operator: "In".to_owned(), values: Some(vec![3]) };
        let rule = ContainerRestartRule { action: "RestartAllContainers".to_owned(), exit_codes: Some(exit_codes) };
        main[0].restart_policy_rules = Some(vec![rule]);
    }
    let policy = ["Always", "OnFailure", "Never"][rng.usize(0..3)];
    Pod {
        metadata: ObjectMeta {
            name: Some("pod".to_owned()),
            namespace: Some("default".to_owned()),
            uid: Some("uid".to_owned()),
            resource_version: Some("1".to_owned()),
            generation: Some(1),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            init_containers: Some(init),
            containers: main,
            restart_policy: Some(policy.to_owned()),
            termination_grace_period_seconds: Some(rng.i64(0..60)),
            active_deadline_seconds: (rng.u8(0..6) == 0).then(|| rng.i64(1..1000)),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// A Pod whose end does not depend on the moments at which things happen to it.
pub(super) fn generate_fated(rng: &mut Rng) -> Pod {
    let mut pod = generate(rng);
    let spec = pod.spec.as_mut().unwrap();
    let policy = if rng.bool() { "Never" } else { "OnFailure" };
    spec.restart_policy = Some(policy.to_owned());
    spec.active_deadline_seconds = None;
    spec.termination_grace_period_seconds = Some(rng.i64(5..60));
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        (container.liveness_probe, container.startup_probe, container.restart_policy_rules) = (None, None, None);
    }
    pod
}
