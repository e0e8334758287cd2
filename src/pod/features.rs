//! What of a Pod's specification this node cannot honour, and the check that none of it is silently ignored.
//!
//! `docs/pod-features.md` says of every field whether it is supported, refused (and with which message) or none of a
//! node's business. The test below reads that page: a field that Kubernetes adds is missed there, and fails it.

use k8s_openapi::api::core::v1::Pod;

use super::effects::Failure;

/// Why a Pod cannot be set up on this node whatever happens; it waits, as with a kubelet that lacks the same.
///
/// Container fields are looked at when the container is made (`crate::runtime::spec`), volumes when they are mounted
/// (`crate::volume`).
#[must_use]
pub fn unsupported(pod: &Pod) -> Option<Failure> {
    let spec = pod.spec.as_ref()?;
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let mut claims = containers.flat_map(|c| c.resources.iter()).flat_map(|r| r.claims.iter().flatten());
    let claim = spec.resource_claims.iter().flatten().next().map(|claim| &claim.name);
    claim.or_else(|| claims.next().map(|claim| &claim.name)).map(|name| {
        Failure::new(
            "FailedPrepareDynamicResources",
            format!(
                "Failed to prepare dynamic resources: spec.resourceClaims: {name}: this node has no drivers for dynamic resource allocation; schedule the Pod to a node that runs the kubelet, for example with a nodeSelector"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::Path;

    use k8s_openapi::api::core::v1;
    use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
    use serde_json::json;

    use super::*;

    /// A source that has nothing to give but hears which fields a type would take.
    struct FieldsOf<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for FieldsOf<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom("no struct"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            Err(Self::Error::custom("that is all"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    fn fields<T: for<'de> Deserialize<'de>>() -> BTreeSet<String> {
        let mut fields: &'static [&'static str] = &[];
        let _ = T::deserialize(FieldsOf(&mut fields));
        assert!(!fields.is_empty());
        fields.iter().map(|field| (*field).to_owned()).collect()
    }

    /// State and tests of each field, by the heading of its table.
    fn tables(page: &str) -> BTreeMap<String, BTreeMap<String, (String, String)>> {
        let mut tables: BTreeMap<String, BTreeMap<String, (String, String)>> = BTreeMap::new();
        let mut heading = String::new();
        for line in page.lines() {
            if let Some(title) = line.strip_prefix("## ") {
                heading = title.trim().to_owned();
            }
            let cells: Vec<&str> = line.trim().trim_matches('|').split(" | ").map(str::trim).collect();
            if let ([field, state, _, test], true) = (cells.as_slice(), line.starts_with("| `")) {
                let row = ((*state).to_owned(), (*test).to_owned());
                let twice = tables.entry(heading.clone()).or_default().insert(field.trim_matches('`').to_owned(), row);
                assert!(twice.is_none(), "{heading}: {field} is there twice");
            }
        }
        tables
    }

    #[test]
    fn every_field_is_in_the_table() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = fs::read_to_string(root.join("docs/pod-features.md")).unwrap();
        let tables = tables(&page);
        for (heading, fields) in [
            ("PodSpec", fields::<v1::PodSpec>()),
            ("Container", fields::<v1::Container>()),
            ("PodSecurityContext", fields::<v1::PodSecurityContext>()),
            ("SecurityContext", fields::<v1::SecurityContext>()),
            ("ResourceRequirements", fields::<v1::ResourceRequirements>()),
            ("ContainerPort", fields::<v1::ContainerPort>()),
            ("ContainerRestartRule", fields::<v1::ContainerRestartRule>()),
            ("EnvVarSource", fields::<v1::EnvVarSource>()),
            ("Probe", fields::<v1::Probe>()),
            ("HTTPGetAction", fields::<v1::HTTPGetAction>()),
            ("GRPCAction", fields::<v1::GRPCAction>()),
            ("Lifecycle", fields::<v1::Lifecycle>()),
            ("LifecycleHandler", fields::<v1::LifecycleHandler>()),
            ("VolumeMount", fields::<v1::VolumeMount>()),
            ("Volume", fields::<v1::Volume>()),
            ("EmptyDirVolumeSource", fields::<v1::EmptyDirVolumeSource>()),
            ("VolumeProjection", fields::<v1::VolumeProjection>()),
            ("ClusterTrustBundleProjection", fields::<v1::ClusterTrustBundleProjection>()),
            ("PodCertificateProjection", fields::<v1::PodCertificateProjection>()),
            ("PodDNSConfig", fields::<v1::PodDNSConfig>()),
        ] {
            let listed: BTreeSet<String> = tables.get(heading).into_iter().flat_map(BTreeMap::keys).cloned().collect();
            assert_eq!(listed, fields, "docs/pod-features.md, {heading}");
        }
        // an ephemeral container is a container with a target
        let mut ephemeral = fields::<v1::EphemeralContainer>();
        assert!(ephemeral.remove("targetContainerName"));
        assert_eq!(ephemeral, fields::<v1::Container>());
    }

    #[test]
    fn every_field_has_a_state_and_its_test_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = fs::read_to_string(root.join("docs/pod-features.md")).unwrap();
        for (heading, rows) in tables(&page) {
            for (field, (state, test)) in rows {
                let place = format!("{heading}.{field}");
                assert!(["supported", "refused", "not applicable"].contains(&state.as_str()), "{place}: {state:?}");
                if state == "not applicable" {
                    continue;
                }
                let (file, name) = test.split_once(": ").unwrap_or_else(|| panic!("{place}: no test in {test:?}"));
                let text = fs::read_to_string(root.join(file.trim_matches('`')))
                    .unwrap_or_else(|error| panic!("{place}: {file}: {error}"));
                let name = name.trim_matches('`');
                assert!(text.contains(name), "{place}: {file} has no {name:?}");
            }
        }
    }

    #[test]
    fn dynamic_resources_are_refused_by_name() {
        let pod = |spec| -> Pod { serde_json::from_value(json!({ "spec": spec })).unwrap() };
        assert_eq!(unsupported(&pod(json!({"containers": [{"name": "c"}]}))), None);
        let claims = json!([{"name": "gpu", "resourceClaimName": "x"}]);
        let failure = unsupported(&pod(json!({"containers": [], "resourceClaims": claims}))).unwrap();
        assert_eq!(failure.reason, "FailedPrepareDynamicResources");
        assert!(failure.message.contains("spec.resourceClaims: gpu"), "{}", failure.message);
    }
}
