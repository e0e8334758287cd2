//! Image manifests and indexes as registries send them (OCI image specification; Docker manifest v2, schema 2).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// Largest manifest, index or image configuration: the limit that registries and containerd use.
pub(super) const MAX_MANIFEST: u64 = 4 << 20;
/// Most layers: overlayfs stacks 500.
pub(super) const MAX_LAYERS: usize = 500;
/// Largest announced size of one layer.
const MAX_LAYER: u64 = 1 << 40;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Where content is, and what it is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// What an image runs on.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub(super) struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// A document that a manifest URL may return.
#[derive(Debug)]
pub(super) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// One image for one platform.
#[derive(Debug)]
pub(super) struct Manifest {
    pub media_type: String,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
}

fn null_is_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

impl Document {
    /// Parses a manifest or an index. The error says which field is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let raw: Raw = serde_json::from_slice(bytes).map_err(|e| format!("the manifest is not valid: {e}"))?;
        if raw.schema_version != Some(2) {
            return Err(format!(
                "schemaVersion {} is not supported: push the image again with a current tool (schema 2 or OCI)",
                raw.schema_version.map_or("(missing)".to_owned(), |v| v.to_string())
            ));
        }
        let kind = raw.media_type.as_deref();
        match (raw.manifests, raw.layers, raw.config) {
            (Some(manifests), None, None) if matches!(kind, None | Some(OCI_INDEX | DOCKER_LIST)) => {
                Ok(Self::Index(manifests))
            }
            (None, layers, Some(config)) if matches!(kind, None | Some(OCI_MANIFEST | DOCKER_MANIFEST)) => {
                let layers = layers.unwrap_or_default();
                if layers.len() > MAX_LAYERS {
                    return Err(format!("{} layers; overlayfs can stack {MAX_LAYERS}", layers.len()));
                }
                if config.size > MAX_MANIFEST {
                    return Err(format!("config.size {} is over the limit of {MAX_MANIFEST}", config.size));
                }
                for layer in &layers {
                    check_layer(layer)?;
                }
                let media_type = kind.unwrap_or(OCI_MANIFEST).to_owned();
                Ok(Self::Manifest(Manifest { media_type, config, layers }))
            }
            // A document that is both is read differently by different tools (CVE-2021-41190).
            _ => Err(format!("mediaType {} does not go with the fields present", kind.unwrap_or("(missing)"))),
        }
    }
}

fn check_layer(layer: &Descriptor) -> Result<(), String> {
    let known = matches!(
        layer.media_type.as_str(),
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
    );
    if !known {
        return Err(format!(
            "layer {} has media type {:?}: only tar, tar+gzip and tar+zstd layers are supported",
            layer.digest, layer.media_type
        ));
    }
    if layer.size > MAX_LAYER {
        return Err(format!("layer {} announces {} bytes; the limit is {MAX_LAYER}", layer.digest, layer.size));
    }
    Ok(())
}

/// The entry of an index that runs here: Linux, this machine's architecture, its best variant.
pub(super) fn select<'a>(manifests: &'a [Descriptor], arch: &str) -> Option<&'a Descriptor> {
    let is_image = |d: &&Descriptor| !d.annotations.contains_key("vnd.docker.reference.type");
    let variants: &[Option<&str>] = match arch {
        "arm64" => &[Some("v8"), None],
        "arm" => &[Some("v7"), None, Some("v6"), Some("v5")],
        // v2 and above ask for more than every machine has.
        "amd64" => &[None, Some("v1")],
        _ => &[None],
    };
    let matching = |variant: &Option<&str>| {
        manifests.iter().filter(is_image).find(|d| {
            d.platform.as_ref().is_some_and(|p| {
                p.os == "linux" && p.architecture == arch && p.variant.as_deref().filter(|v| !v.is_empty()) == *variant
            })
        })
    };
    variants.iter().find_map(matching).or_else(|| manifests.iter().filter(is_image).find(|d| d.platform.is_none()))
}

/// This machine's architecture as Go and OCI spell it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(arch: &str, variant: Option<&str>) -> Descriptor {
        Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::sha256(format!("{arch}{variant:?}").as_bytes()),
            size: 1,
            annotations: BTreeMap::new(),
            platform: Some(Platform {
                architecture: arch.into(),
                os: "linux".into(),
                variant: variant.map(str::to_owned),
            }),
        }
    }

    #[test]
    fn selects_the_platform() {
        let all = [descriptor("arm64", Some("v8")), descriptor("amd64", Some("v3")), descriptor("amd64", None)];
        assert_eq!(select(&all, "amd64"), Some(&all[2]));
        assert_eq!(select(&all, "arm64"), Some(&all[0]));
        assert_eq!(select(&all, "s390x"), None);
        let mut bare = descriptor("x", None);
        bare.platform = None;
        assert_eq!(select(std::slice::from_ref(&bare), "s390x"), Some(&bare));
    }

    #[test]
    fn refuses_ambiguous_and_old_documents() {
        let d = serde_json::to_value(descriptor("amd64", None)).unwrap();
        let parse = |value: serde_json::Value| Document::parse(value.to_string().as_bytes());
        assert!(parse(serde_json::json!({"schemaVersion": 2, "manifests": [], "layers": [], "config": d})).is_err());
        assert!(
            parse(serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "layers": [], "config": d})).is_err()
        );
        assert!(parse(serde_json::json!({"schemaVersion": 1, "config": d})).unwrap_err().contains("schemaVersion 1"));
        assert!(parse(serde_json::json!({"schemaVersion": 2, "config": d, "layers": null})).is_ok());
        let mut layer = d.clone();
        layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+encrypted".into();
        assert!(
            parse(serde_json::json!({"schemaVersion": 2, "config": d, "layers": [layer]}))
                .unwrap_err()
                .contains("encrypted")
        );
    }
}
