//! Pods for the tests of this folder.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

type List<'a> = &'a [(&'a str, &'a str)];

/// A container with requests and limits.
pub fn container(name: &str, requests: List<'_>, limits: List<'_>) -> Container {
    let list = |l: List<'_>| {
        (!l.is_empty()).then(|| l.iter().map(|(n, q)| ((*n).to_owned(), Quantity((*q).to_owned()))).collect())
    };
    Container {
        name: name.to_owned(),
        resources: Some(ResourceRequirements { requests: list(requests), limits: list(limits), ..Default::default() }),
        ..Default::default()
    }
}

/// A Pod of these containers.
pub fn pod(containers: Vec<Container>) -> Pod {
    Pod { spec: Some(PodSpec { containers, ..Default::default() }), ..Default::default() }
}
