//! From a manifest's text to static Pods.
//!
//! Source: `pkg/kubelet/config/common.go`. Two deviations: the UID is the SHA-256 of the manifest's Pod and its
//! origin, cut to kubelet's length (kubelet's FNV hash runs over Go's memory layout), and fields that do not exist
//! are named in the log instead of passed over.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Toleration};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::defaults::set_defaults;
use super::validate::{api_reference, problems};
use super::{HASH, Origin, SEEN, SOURCE};

/// Largest manifest.
pub(super) const MAX_MANIFEST: usize = 10 << 20;

/// A manifest that makes no Pod; terminal until its author changes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Neither YAML nor JSON, or more than one document.
    #[error("{origin}: couldn't parse as pod: {message}")]
    Syntax {
        /// File or URL.
        origin: String,
        /// Where and why.
        message: String,
    },
    /// Something else than a Pod or a list of Pods.
    #[error("{origin}: apiVersion {version:?}, kind {kind:?} is no Pod: write apiVersion: v1 and kind: Pod")]
    Kind {
        /// File or URL.
        origin: String,
        /// `apiVersion`.
        version: String,
        /// `kind`.
        kind: String,
    },
    /// A field has a wrong value.
    #[error("{origin}: invalid pod: [{}]", .problems.join(", "))]
    Invalid {
        /// File or URL.
        origin: String,
        /// One sentence per field, with its path.
        problems: Vec<String>,
    },
    /// Nobody can give a static Pod objects of the API.
    #[error("{origin}: static pods may not reference {resource}: use a hostPath volume or plain values")]
    Reference {
        /// File or URL.
        origin: String,
        /// The kind of object.
        resource: &'static str,
    },
    /// Larger than 10 MB.
    #[error("{origin}: larger than {MAX_MANIFEST} bytes")]
    TooLarge {
        /// File or URL.
        origin: String,
    },
}

/// The Pods of one manifest (a Pod, a `List` or a `PodList`), as they shall run on this node. `name` is the path or
/// URL; it goes into the Pods' identity.
pub fn parse_manifest(text: &str, source: Origin, name: &str, node_name: &str) -> Result<Vec<Pod>, ManifestError> {
    let origin = || name.to_owned();
    if text.len() > MAX_MANIFEST {
        return Err(ManifestError::TooLarge { origin: origin() });
    }
    let value: Value = serde_saphyr::from_str(text)
        .map_err(|error| ManifestError::Syntax { origin: origin(), message: error.to_string() })?;
    let word = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    let (version, kind) = (word(&value, "apiVersion"), word(&value, "kind"));
    let wrong_kind = |value: &Value| {
        let (version, kind) = (word(value, "apiVersion"), word(value, "kind"));
        ManifestError::Kind { origin: origin(), version, kind }
    };
    match (version.as_str(), kind.as_str()) {
        ("v1", "Pod") => Ok(vec![static_pod(value, source, name, node_name)?]),
        ("v1", "List" | "PodList") => {
            let items = value.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
            let pod = |item: Value| {
                // items of a PodList need not repeat what they are
                let stated = item.get("kind").is_some() || kind == "List";
                if stated && (word(&item, "apiVersion"), word(&item, "kind")) != ("v1".to_owned(), "Pod".to_owned()) {
                    return Err(wrong_kind(&item));
                }
                static_pod(item, source, name, node_name)
            };
            items.into_iter().map(pod).collect()
        }
        _ => Err(wrong_kind(&value)),
    }
}

fn static_pod(value: Value, source: Origin, name: &str, node_name: &str) -> Result<Pod, ManifestError> {
    let origin = || name.to_owned();
    let mut pod: Pod = serde_path_to_error::deserialize(&value).map_err(|error| ManifestError::Invalid {
        origin: origin(),
        problems: vec![format!("{}: {}", error.path(), error.inner())],
    })?;
    let read = serde_json::to_value(&pod).unwrap_or_default();
    let unknown = unknown_fields(&value, &read);
    if source == Origin::Local && !unknown.is_empty() {
        // who waits for the Pod can mend the manifest now
        let problem = |path: &String| format!("{path}: unknown field: correct its spelling or remove it");
        return Err(ManifestError::Invalid { origin: origin(), problems: unknown.iter().map(problem).collect() });
    }
    for path in unknown {
        tracing::warn!(manifest = name, field = path, "unknown field in static Pod ignored: correct or remove it");
    }
    // server-side facts in an exported manifest are not the author's wish
    pod.status = None;
    pod.metadata.resource_version = None;
    pod.metadata.managed_fields = None;
    pod.metadata.creation_timestamp = None;
    pod.metadata.deletion_timestamp = None;
    let base = pod.metadata.name.clone().unwrap_or_default();
    if base.is_empty() {
        let problems = vec!["metadata.name: Required value: name is needed for the pod".to_owned()];
        return Err(ManifestError::Invalid { origin: origin(), problems });
    }
    set_defaults(&mut pod);
    let uid = match pod.metadata.uid.take().filter(|uid| !uid.is_empty()) {
        Some(uid) => uid,
        None => identity(&pod, source, name, node_name),
    };
    pod.metadata.uid = Some(uid.clone());
    // a local Pod has no mirror: its name need not differ from other nodes'
    pod.metadata.name =
        Some(if source == Origin::Local { base } else { format!("{base}-{}", node_name.to_lowercase()) });
    if pod.metadata.namespace.as_deref().unwrap_or("").is_empty() {
        pod.metadata.namespace = Some("default".to_owned());
    }
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(HASH.to_owned(), uid);
    annotations.insert(SOURCE.to_owned(), source.as_str().to_owned());
    annotations.insert(SEEN.to_owned(), Timestamp::now().to_string());
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some(node_name.to_owned());
        if matches!(source, Origin::File | Origin::Local) {
            tolerate_everything(spec.tolerations.get_or_insert_default());
        }
    }
    let problems = problems(&pod);
    if !problems.is_empty() {
        return Err(ManifestError::Invalid { origin: origin(), problems });
    }
    match api_reference(&pod) {
        Some(resource) => Err(ManifestError::Reference { origin: origin(), resource }),
        None => Ok(pod),
    }
}

/// Static Pods stay when their node is tainted.
fn tolerate_everything(tolerations: &mut Vec<Toleration>) {
    let all = Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    };
    if !tolerations.contains(&all) {
        tolerations.push(all);
    }
}

/// 32 hexadecimal digits that change with the Pod, the node and the manifest's place.
fn identity(pod: &Pod, source: Origin, name: &str, node_name: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(pod).unwrap_or_default());
    match source {
        Origin::File => hash.update(format!("host:{node_name}file:{name}")),
        Origin::Local => hash.update(format!("host:{node_name}local:{name}")),
        _ => hash.update(format!("url:{name}")),
    }
    hex::encode(&hash.finalize()[..16])
}

/// Paths of what was written but not understood.
fn unknown_fields(written: &Value, read: &Value) -> Vec<String> {
    fn walk(written: &Value, read: Option<&Value>, path: &str, found: &mut Vec<String>) {
        match (written, read) {
            // what is empty may be left out when written again
            (Value::Null, None) => {}
            (_, None) => found.push(path.trim_start_matches('.').to_owned()),
            (Value::Object(fields), Some(Value::Object(known))) => {
                for (key, value) in fields {
                    walk(value, known.get(key), &format!("{path}.{key}"), found);
                }
            }
            (Value::Array(items), Some(Value::Array(known))) => {
                for (index, value) in items.iter().enumerate() {
                    walk(value, known.get(index), &format!("{path}[{index}]"), found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(written, Some(read), "", &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const MANIFEST: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: sys}\nspec:\n  containers:\n  - {name: c, image: \"nginx:1\"}\n";

    fn one(text: &str) -> Result<Pod, ManifestError> {
        parse_manifest(text, Origin::File, "/m/web.yaml", "Node1").map(|mut pods| pods.remove(0))
    }

    #[test]
    fn a_pod_of_this_node() {
        let pod = one(MANIFEST).unwrap();
        assert_eq!((pod.metadata.name.as_deref(), pod.metadata.namespace.as_deref()), (Some("web-node1"), Some("sys")));
        let uid = pod.metadata.uid.clone().unwrap();
        assert!(uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let annotations = pod.metadata.annotations.as_ref().unwrap();
        assert_eq!((annotations[HASH].as_str(), annotations[SOURCE].as_str()), (uid.as_str(), "file"));
        annotations[SEEN].parse::<Timestamp>().unwrap();
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.node_name.as_deref(), Some("Node1"));
        assert_eq!(
            serde_json::to_value(&spec.tolerations).unwrap(),
            json!([{"operator": "Exists", "effect": "NoExecute"}])
        );
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        assert!(super::super::is_static(&pod) && !super::super::is_mirror(&pod));
    }

    #[test]
    fn identity_is_stable_and_follows_content_node_and_place() {
        let uid = |text: &str, name: &str, node: &str, source| {
            parse_manifest(text, source, name, node).unwrap()[0].metadata.uid.clone().unwrap()
        };
        let first = uid(MANIFEST, "/m/web.yaml", "n", Origin::File);
        assert_eq!(first, uid(MANIFEST, "/m/web.yaml", "n", Origin::File));
        let changed = MANIFEST.replace("nginx:1", "nginx:2");
        for other in [
            uid(&changed, "/m/web.yaml", "n", Origin::File),
            uid(MANIFEST, "/m/other.yaml", "n", Origin::File),
            uid(MANIFEST, "/m/web.yaml", "o", Origin::File),
            uid(MANIFEST, "/m/web.yaml", "n", Origin::Url),
        ] {
            assert_ne!(first, other);
        }
        let given = MANIFEST.replace("name: web,", "name: web, uid: mine,");
        assert_eq!(uid(&given, "x", "n", Origin::File), "mine");
    }

    #[test]
    fn lists_json_and_other_kinds() {
        let item =
            "{\"metadata\": {\"name\": \"a\"}, \"spec\": {\"containers\": [{\"name\": \"c\", \"image\": \"i\"}]}}";
        let list = format!("{{\"apiVersion\": \"v1\", \"kind\": \"PodList\", \"items\": [{item}]}}");
        let pods = parse_manifest(&list, Origin::Url, "http://x/", "n").unwrap();
        assert_eq!(pods[0].metadata.namespace.as_deref(), Some("default"));
        assert_eq!(pods[0].spec.as_ref().unwrap().tolerations, None);
        assert_eq!(pods[0].metadata.annotations.as_ref().unwrap()[SOURCE], "http");
        assert!(matches!(one("apiVersion: apps/v1\nkind: Deployment\n"), Err(ManifestError::Kind { .. })));
        assert!(matches!(one("a: b: c"), Err(ManifestError::Syntax { .. })));
        assert!(matches!(one(&" ".repeat(MAX_MANIFEST + 1)), Err(ManifestError::TooLarge { .. })));
    }

    #[test]
    fn errors_name_file_and_field() {
        for (from, to, words) in [
            ("name: web,", "", "metadata.name: Required value"),
            ("name: c,", "name: C_,", "spec.containers[0].name: Invalid value"),
            ("image: \"nginx:1\"", "image: 5", "spec.containers[0].image: invalid type"),
            ("name: c,", "name: c, envFrom: [{secretRef: {name: s}}],", "static pods may not reference secrets"),
        ] {
            let error = one(&MANIFEST.replace(from, to)).unwrap_err().to_string();
            assert!(error.starts_with("/m/web.yaml: ") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_local_pod_keeps_its_name_and_its_author_is_told_of_misspelt_fields() {
        let local = |text: &str| parse_manifest(text, Origin::Local, "pod.yaml", "n");
        let pod = local(MANIFEST).unwrap().remove(0);
        assert_eq!(pod.metadata.name.as_deref(), Some("web"));
        assert_eq!(super::super::origin(&pod), Origin::Local);
        assert!(super::super::is_static(&pod));
        let error = local(&MANIFEST.replace("name: c,", "name: c, imag: x,")).unwrap_err().to_string();
        assert_eq!(
            error,
            "pod.yaml: invalid pod: [spec.containers[0].imag: unknown field: correct its spelling or remove it]"
        );
    }

    #[test]
    fn misspelt_fields_are_found() {
        let written =
            json!({"spec": {"containers": [{"name": "c", "imagePulPolicy": "Never"}], "hostNet": true, "x": null}});
        let pod: Pod = serde_json::from_value(written.clone()).unwrap();
        let found = unknown_fields(&written, &serde_json::to_value(pod).unwrap());
        assert_eq!(found, ["spec.containers[0].imagePulPolicy", "spec.hostNet"]);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_manifests_never_panic(text in "\\PC{0,200}") {
            let _ = one(&text);
        }

        #[test]
        fn arbitrary_specs_never_panic(key in "(containers|volumes|restartPolicy|securityContext|tolerations)", value in "[-\\[\\]{}:a-z0-9 ,\"']{0,40}") {
            let _ = one(&format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {{{key}: {value}}}\n"));
        }
    }
}
