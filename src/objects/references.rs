//! Which ConfigMaps and Secrets a Pod refers to.
//!
//! Source: `pkg/api/v1/pod/util.go` (`VisitPodSecretNames`, `VisitPodConfigmapNames`). References that go through a
//! claim or a driver are not the Pod's own and are left to those who follow them.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::{EnvFromSource, EnvVar, Pod};

/// The kinds of objects that a Pod can refer to by name.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ObjectKind {
    /// `v1/ConfigMap`
    ConfigMap,
    /// `v1/Secret`
    Secret,
}

impl fmt::Display for ObjectKind {
    /// Singular and lower case, as the API server's own "not found" errors name the resource to kubelet's users.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        })
    }
}

/// The identity of one referenced object.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ObjectKey {
    /// What it is.
    pub kind: ObjectKind,
    /// The namespace, which is the Pod's.
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
}

/// The objects one Pod refers to; the value says whether a volume needs the object, which has to follow its changes.
pub type References = BTreeMap<ObjectKey, bool>;

/// Collects the references of `pod`.
#[must_use]
pub fn references(pod: &Pod) -> References {
    let mut found =
        Collector { namespace: pod.metadata.namespace.as_deref().unwrap_or("default"), found: BTreeMap::new() };
    let Some(spec) = &pod.spec else { return found.found };
    for secret in spec.image_pull_secrets.iter().flatten() {
        found.add(ObjectKind::Secret, &secret.name, false);
    }
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        found.environment(container.env_from.as_deref(), container.env.as_deref());
    }
    for container in spec.ephemeral_containers.iter().flatten() {
        found.environment(container.env_from.as_deref(), container.env.as_deref());
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(source) = &volume.config_map {
            found.add(ObjectKind::ConfigMap, &source.name, true);
        }
        if let Some(source) = &volume.secret {
            found.add(ObjectKind::Secret, source.secret_name.as_deref().unwrap_or_default(), true);
        }
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            if let Some(source) = &source.config_map {
                found.add(ObjectKind::ConfigMap, &source.name, true);
            }
            if let Some(source) = &source.secret {
                found.add(ObjectKind::Secret, &source.name, true);
            }
        }
    }
    found.found
}

struct Collector<'a> {
    namespace: &'a str,
    found: References,
}

impl Collector<'_> {
    fn add(&mut self, kind: ObjectKind, name: &str, live: bool) {
        if !name.is_empty() {
            let key = ObjectKey { kind, namespace: self.namespace.to_owned(), name: name.to_owned() };
            *self.found.entry(key).or_default() |= live;
        }
    }

    fn environment(&mut self, from: Option<&[EnvFromSource]>, env: Option<&[EnvVar]>) {
        for source in from.unwrap_or_default() {
            if let Some(source) = &source.config_map_ref {
                self.add(ObjectKind::ConfigMap, &source.name, false);
            }
            if let Some(source) = &source.secret_ref {
                self.add(ObjectKind::Secret, &source.name, false);
            }
        }
        for source in env.unwrap_or_default().iter().filter_map(|variable| variable.value_from.as_ref()) {
            if let Some(source) = &source.config_map_key_ref {
                self.add(ObjectKind::ConfigMap, &source.name, false);
            }
            if let Some(source) = &source.secret_key_ref {
                self.add(ObjectKind::Secret, &source.name, false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_every_reference_and_says_which_are_live() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "ns"},
            "spec": {
                "imagePullSecrets": [{"name": "pull"}, {"name": ""}],
                "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "from"}}, {"secretRef": {"name": "fromsecret"}}]}],
                "containers": [{"name": "c", "env": [
                    {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "both", "key": "k"}}},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}}]}],
                "ephemeralContainers": [{"name": "e", "envFrom": [{"configMapRef": {"name": "debug"}}]}],
                "volumes": [
                    {"name": "v1", "configMap": {"name": "both"}},
                    {"name": "v2", "secret": {"secretName": "vol"}},
                    {"name": "v3", "projected": {"sources": [{"configMap": {"name": "pcm"}}, {"secret": {"name": "psec"}}]}}]
            }
        })).unwrap();
        let found: Vec<(String, bool)> = references(&pod)
            .into_iter()
            .map(|(key, live)| (format!("{}/{}/{}", key.kind, key.namespace, key.name), live))
            .collect();
        let expected = [
            ("configmap/ns/both", true),
            ("configmap/ns/debug", false),
            ("configmap/ns/from", false),
            ("configmap/ns/pcm", true),
            ("secret/ns/fromsecret", false),
            ("secret/ns/key", false),
            ("secret/ns/psec", true),
            ("secret/ns/pull", false),
            ("secret/ns/vol", true),
        ];
        assert_eq!(found, expected.map(|(key, live)| (key.to_owned(), live)));
    }
}
