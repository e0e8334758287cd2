//! `fieldRef` and `resourceFieldRef`: values of a Pod's own fields, for env and downward API volumes.
//!
//! Sources: `pkg/fieldpath/fieldpath.go`, `pkg/apis/core/pods/helpers.go` (`ConvertDownwardAPIFieldLabel`),
//! `pkg/kubelet/kubelet_pods.go` (`podFieldSelectorRuntimeValue`), `pkg/api/v1/resource/helpers.go`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::resources::quantity::{self, InvalidQuantity};

/// What fields of a Pod depend on beside the Pod itself.
#[derive(Clone, Debug, Default)]
pub struct FieldContext {
    /// The Node's name.
    pub node_name: String,
    /// The Node's addresses, the primary family first.
    pub host_ips: Vec<String>,
    /// The Pod's addresses, the Node's primary family first; empty before its network is set up.
    pub pod_ips: Vec<String>,
    /// `status.allocatable` of the Node: what a container without a limit may use.
    pub node_allocatable: BTreeMap<String, Quantity>,
}

/// A field that has no value. Terminal: the manifest is wrong, except [`FieldError::NoHostIp`], which is retryable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// `fieldRef.apiVersion` is not `v1`.
    #[error("unsupported pod version: {0}")]
    PodVersion(String),
    /// The path takes no `['key']`.
    #[error("field label does not support subscript: {0}")]
    Subscript(String),
    /// The path is none of those that a Pod exposes.
    #[error("field label not supported: {0}")]
    Label(String),
    /// The path cannot be used in a volume.
    #[error("unsupported fieldPath: {0}")]
    Path(String),
    /// The key is no qualified name.
    #[error("invalid key subscript in {path}: {reason}")]
    Key {
        /// The whole path.
        path: String,
        /// What is wrong with the key.
        reason: &'static str,
    },
    /// The Node has no address yet.
    #[error("host IP unknown; the node has no address yet")]
    NoHostIp,
    /// `resourceFieldRef.resource` names nothing that can be asked for.
    #[error("unsupported container resource : {0}")]
    Resource(String),
    /// `resourceFieldRef.containerName` names no container of the Pod.
    #[error("container {0} not found")]
    Container(String),
    /// A volume's item has neither `fieldRef` nor `resourceFieldRef.containerName`.
    #[error("resourceFieldRef.containerName is required in a volume: name the container whose {0} is meant")]
    ContainerNameRequired(String),
    /// A resource or the divisor is no number.
    #[error(transparent)]
    Quantity(#[from] InvalidQuantity),
    /// The divisor rounds to zero or is negative.
    #[error("divisor {0:?} of resourceFieldRef must be positive")]
    Divisor(String),
}

/// Splits `metadata.labels['key']` into path and key; `None` if there is no subscript.
#[must_use]
pub fn split_subscript(path: &str) -> Option<(&str, &str)> {
    let (path, key) = path.strip_suffix("']")?.split_once("['")?;
    (!path.is_empty()).then_some((path, key))
}

/// The value of a `fieldRef` of an environment variable.
pub fn env_field(pod: &Pod, selector: &ObjectFieldSelector, context: &FieldContext) -> Result<String, FieldError> {
    let version = selector.api_version.as_deref().unwrap_or("v1");
    if version != "v1" {
        return Err(FieldError::PodVersion(version.to_owned()));
    }
    let path = selector.field_path.as_str();
    if let Some((parent, _)) = split_subscript(path) {
        return match parent {
            "metadata.annotations" | "metadata.labels" => pod_volume_field(pod, path),
            _ => Err(FieldError::Subscript(path.to_owned())),
        };
    }
    let host_ip = || context.host_ips.first().ok_or(FieldError::NoHostIp);
    Ok(match path {
        "spec.nodeName" | "spec.host" => {
            pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_else(|| context.node_name.clone())
        }
        "spec.serviceAccountName" => {
            pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.hostIP" => host_ip()?.clone(),
        "status.hostIPs" => host_ip().map(|_| context.host_ips.join(","))?,
        "status.podIP" => context.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => context.pod_ips.join(","),
        path if path.starts_with("metadata.") => {
            return pod_volume_field(pod, path).map_err(|_| FieldError::Label(path.to_owned()));
        }
        _ => return Err(FieldError::Label(path.to_owned())),
    })
}

/// The value of a `fieldRef.fieldPath` in a volume: `metadata` only.
pub fn pod_volume_field(pod: &Pod, path: &str) -> Result<String, FieldError> {
    let metadata = &pod.metadata;
    if let Some((parent, key)) = split_subscript(path) {
        let (map, checked) = match parent {
            "metadata.annotations" => (&metadata.annotations, key.to_lowercase()),
            "metadata.labels" => (&metadata.labels, key.to_owned()),
            _ => return Err(FieldError::Subscript(path.to_owned())),
        };
        qualified_name(&checked).map_err(|reason| FieldError::Key { path: path.to_owned(), reason })?;
        return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.annotations" => format_map(metadata.annotations.as_ref()),
        "metadata.labels" => format_map(metadata.labels.as_ref()),
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        _ => return Err(FieldError::Path(path.to_owned())),
    })
}

/// One line per entry, sorted: `key="value"`, the value quoted as Go's `strconv.Quote` does.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let mut text = String::new();
    for (key, value) in map.into_iter().flatten() {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(key);
        text.push('=');
        quote(value, &mut text);
    }
    text
}

fn quote(value: &str, out: &mut String) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x0b' => out.push_str("\\v"),
            c if is_printable(c) => out.push(c),
            // Writing to a String cannot fail.
            c if u32::from(c) < 0x80 => drop(write!(out, "\\x{:02x}", u32::from(c))),
            c if u32::from(c) < 0x10000 => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => drop(write!(out, "\\U{:08x}", u32::from(c))),
        }
    }
    out.push('"');
}

/// Go's `strconv.IsPrint`: letters, marks, numbers, punctuation, symbols and the ASCII space. The standard library
/// knows the same table, but escapes a mark that nothing precedes: hence the letter in front.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return (' '..='~').contains(&c);
    }
    let mut buffer = [0_u8; 8];
    buffer[0] = b'a';
    let length = c.encode_utf8(&mut buffer[1..]).len();
    std::str::from_utf8(&buffer[..=length]).is_ok_and(|text| text.escape_debug().count() == 2)
}

/// `validation.IsQualifiedName`: an optional DNS subdomain, a slash, and a name of at most 63 characters.
fn qualified_name(key: &str) -> Result<(), &'static str> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if let Some(prefix) = prefix {
        let label = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if prefix.len() > 253 || !prefix.split('.').all(label) {
            return Err("prefix part must be a lowercase DNS subdomain of at most 253 characters");
        }
    }
    if name.is_empty() {
        return Err("name part must be non-empty");
    }
    if name.len() > 63 {
        return Err("name part must be no more than 63 characters");
    }
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    if !edge(bytes.first())
        || !edge(bytes.last())
        || !bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
        );
    }
    Ok(())
}

/// The value of a `resourceFieldRef` of an environment variable of the container whose resources are `own`.
///
/// A missing limit of CPU, memory or ephemeral storage is the Pod's own limit, else what the Node can allocate
/// (`defaultPodLimitsForDownwardAPI`); a named init container gets no such default, as with kubelet.
pub fn env_resource(
    pod: &Pod,
    own: Option<&ResourceRequirements>,
    selector: &ResourceFieldSelector,
    context: &FieldContext,
) -> Result<String, FieldError> {
    let pod_limits = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref()).and_then(|r| r.limits.as_ref());
    let ceiling = |resource: &str| -> Option<&Quantity> {
        let node = context.node_allocatable.get(resource)?;
        let limit = match resource {
            "cpu" | "memory" => pod_limits.and_then(|limits| limits.get(resource)).filter(|q| !is_zero(q)),
            _ => None,
        };
        Some(limit.unwrap_or(node))
    };
    match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        None => extract(selector, own, ceiling),
        Some(name) => match find_container(pod, name)? {
            (container, ContainerSort::Main) => extract(selector, container.resources.as_ref(), ceiling),
            (container, ContainerSort::Init) => extract(selector, container.resources.as_ref(), |_| None),
        },
    }
}

/// The value of a `resourceFieldRef` of a volume: a missing limit is what the Node can allocate.
pub fn pod_volume_resource(
    pod: &Pod,
    selector: &ResourceFieldSelector,
    context: &FieldContext,
) -> Result<String, FieldError> {
    let name = selector
        .container_name
        .as_deref()
        .ok_or_else(|| FieldError::ContainerNameRequired(selector.resource.clone()))?;
    let (container, _) = find_container(pod, name)?;
    extract(selector, container.resources.as_ref(), |resource| context.node_allocatable.get(resource))
}

enum ContainerSort {
    Main,
    Init,
}

fn find_container<'a>(pod: &'a Pod, name: &str) -> Result<(&'a Container, ContainerSort), FieldError> {
    let spec = pod.spec.as_ref();
    let main = spec.and_then(|spec| spec.containers.iter().find(|container| container.name == name));
    let init = || spec.and_then(|spec| spec.init_containers.iter().flatten().find(|container| container.name == name));
    main.map(|container| (container, ContainerSort::Main))
        .or_else(|| init().map(|container| (container, ContainerSort::Init)))
        .ok_or_else(|| FieldError::Container(name.to_owned()))
}

fn is_zero(quantity: &Quantity) -> bool {
    quantity::nanos(&quantity.0) == Ok(0)
}

fn extract<'a>(
    selector: &ResourceFieldSelector,
    resources: Option<&'a ResourceRequirements>,
    ceiling: impl Fn(&str) -> Option<&'a Quantity>,
) -> Result<String, FieldError> {
    let unsupported = || FieldError::Resource(selector.resource.clone());
    let (list, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let plain = matches!(resource, "cpu" | "memory" | "ephemeral-storage");
    if !plain && !resource.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let of = |list: Option<&'a BTreeMap<String, Quantity>>| list.and_then(|list| list.get(resource));
    let quantity = match list {
        "requests" => of(resources.and_then(|r| r.requests.as_ref())),
        "limits" => {
            let limit = of(resources.and_then(|r| r.limits.as_ref()));
            if plain { limit.filter(|q| !is_zero(q)).or_else(|| ceiling(resource)) } else { limit }
        }
        _ => return Err(unsupported()),
    };
    let unit = if resource == "cpu" { quantity::milli_value } else { quantity::value };
    let one = Quantity("1".to_owned());
    let divisor =
        selector.divisor.as_ref().filter(|divisor| !divisor.0.is_empty() && !is_zero(divisor)).unwrap_or(&one);
    let amount = quantity.map_or(Ok(0), unit)?;
    let by = unit(divisor)?;
    if by <= 0 {
        return Err(FieldError::Divisor(divisor.0.clone()));
    }
    let quotient = amount.div_euclid(by);
    Ok((if amount.rem_euclid(by) == 0 { quotient } else { quotient.saturating_add(1) }).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u-1",
                "labels": {"b": "2", "a": "1\n\"x\"", "example.com/tier": "front"},
                "annotations": {"Example.com/Note": "hi", "uni": "é\u{301}\u{200b}\u{1f600}\u{7f}\u{e0001}\u{7}"}
            },
            "spec": {
                "nodeName": "n1", "serviceAccountName": "robot",
                "initContainers": [{"name": "init"}],
                "containers": [
                    {"name": "a", "resources": {
                        "limits": {"cpu": "1500m", "memory": "64Mi", "hugepages-2Mi": "4Mi"},
                        "requests": {"cpu": "250m", "memory": "32Mi", "ephemeral-storage": "1Gi"}}},
                    {"name": "b", "resources": {"limits": {"cpu": "0"}}}
                ]
            }
        }))
        .unwrap()
    }

    fn context() -> FieldContext {
        FieldContext {
            node_name: "n1".into(),
            host_ips: vec!["192.0.2.1".into(), "2001:db8::1".into()],
            pod_ips: vec!["10.0.0.5".into(), "fd00::5".into()],
            node_allocatable: [("cpu", "4"), ("memory", "8Gi"), ("ephemeral-storage", "100Gi")]
                .map(|(k, v)| (k.to_owned(), Quantity(v.to_owned())))
                .into(),
        }
    }

    fn field(path: &str) -> Result<String, FieldError> {
        let selector = ObjectFieldSelector { api_version: Some("v1".into()), field_path: path.into() };
        env_field(&pod(), &selector, &context())
    }

    #[test]
    fn gives_every_field_an_environment_may_ask_for() {
        for (path, value) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "shop"),
            ("metadata.uid", "u-1"),
            ("metadata.labels['b']", "2"),
            ("metadata.labels['example.com/tier']", "front"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['Example.com/Note']", "hi"),
            ("metadata.labels", "a=\"1\\n\\\"x\\\"\"\nb=\"2\"\nexample.com/tier=\"front\""),
            ("spec.nodeName", "n1"),
            ("spec.host", "n1"),
            ("spec.serviceAccountName", "robot"),
            ("status.hostIP", "192.0.2.1"),
            ("status.hostIPs", "192.0.2.1,2001:db8::1"),
            ("status.podIP", "10.0.0.5"),
            ("status.podIPs", "10.0.0.5,fd00::5"),
        ] {
            assert_eq!(field(path).as_deref(), Ok(value), "{path}");
        }
    }

    /// The expected text is what Go prints for the same string.
    #[test]
    fn quotes_as_go_does() {
        let expected = "Example.com/Note=\"hi\"\nuni=\"é\u{301}\\u200b\u{1f600}\\x7f\\U000e0001\\a\"";
        assert_eq!(field("metadata.annotations").unwrap(), expected);
    }

    #[test]
    fn refuses_other_fields_by_name() {
        assert_eq!(field("status.qosClass").unwrap_err().to_string(), "field label not supported: status.qosClass");
        assert_eq!(
            field("spec.x['y']").unwrap_err().to_string(),
            "field label does not support subscript: spec.x['y']"
        );
        assert!(matches!(field("metadata.labels['-bad']"), Err(FieldError::Key { .. })));
        assert!(matches!(field("metadata.labels['Bad.Prefix/x']"), Err(FieldError::Key { .. })));
        assert!(matches!(field("metadata.labels['']"), Err(FieldError::Key { .. })));
        assert_eq!(pod_volume_field(&pod(), "spec.nodeName"), Err(FieldError::Path("spec.nodeName".into())));
        let v2 = ObjectFieldSelector { api_version: Some("v2".into()), field_path: "metadata.name".into() };
        assert_eq!(env_field(&pod(), &v2, &context()), Err(FieldError::PodVersion("v2".into())));
        let none = FieldContext::default();
        let host = ObjectFieldSelector { api_version: None, field_path: "status.hostIPs".into() };
        assert_eq!(env_field(&pod(), &host, &none), Err(FieldError::NoHostIp));
    }

    fn resource(container: &str, resource: &str, divisor: &str) -> Result<String, FieldError> {
        let selector = ResourceFieldSelector {
            container_name: Some(container.into()),
            resource: resource.into(),
            divisor: Some(Quantity(divisor.into())),
        };
        env_resource(&pod(), None, &selector, &context())
    }

    #[test]
    fn rounds_resources_up_to_the_divisor() {
        for (container, name, divisor, value) in [
            ("a", "limits.cpu", "0", "2"),
            ("a", "limits.cpu", "1m", "1500"),
            ("a", "requests.cpu", "", "1"),
            ("a", "limits.memory", "1Mi", "64"),
            ("a", "limits.memory", "1", "67108864"),
            ("a", "requests.memory", "1Gi", "1"),
            ("a", "requests.ephemeral-storage", "1Mi", "1024"),
            ("a", "limits.ephemeral-storage", "1Gi", "100"),
            ("a", "limits.hugepages-2Mi", "1Mi", "4"),
            ("a", "requests.hugepages-2Mi", "1Mi", "0"),
            ("b", "limits.cpu", "1", "4"),
            ("b", "limits.memory", "1Gi", "8"),
            ("b", "requests.memory", "1", "0"),
            ("init", "limits.memory", "1", "0"),
        ] {
            assert_eq!(resource(container, name, divisor).as_deref(), Ok(value), "{container} {name} {divisor}");
        }
        assert_eq!(resource("x", "limits.cpu", "1"), Err(FieldError::Container("x".into())));
        for bad in ["limits.gpu", "limits", "cpu", "limit.cpu", ""] {
            assert_eq!(resource("a", bad, "1"), Err(FieldError::Resource(bad.into())));
        }
        assert!(matches!(resource("a", "limits.cpu", "-1"), Err(FieldError::Divisor(_))));
        assert!(matches!(resource("a", "limits.cpu", "abc"), Err(FieldError::Quantity(_))));
    }

    #[test]
    fn a_pod_level_limit_replaces_what_the_node_has_in_env_but_not_in_volumes() {
        let mut pod = pod();
        let limits = json!({"limits": {"memory": "1Gi"}});
        pod.spec.as_mut().unwrap().resources = Some(serde_json::from_value(limits).unwrap());
        let selector = |name: Option<&str>| ResourceFieldSelector {
            container_name: name.map(str::to_owned),
            resource: "limits.memory".into(),
            divisor: Some(Quantity("1Mi".into())),
        };
        assert_eq!(env_resource(&pod, None, &selector(None), &context()).unwrap(), "1024");
        assert_eq!(pod_volume_resource(&pod, &selector(Some("b")), &context()).unwrap(), "8192");
        assert_eq!(pod_volume_resource(&pod, &selector(Some("init")), &context()).unwrap(), "8192");
        assert!(matches!(
            pod_volume_resource(&pod, &selector(None), &context()),
            Err(FieldError::ContainerNameRequired(_))
        ));
    }

    proptest::proptest! {
        #[test]
        fn paths_never_panic(path in "(metadata\\.(labels|annotations))?.{0,20}(\\['.{0,5}'\\])?") {
            let _ = field(&path);
            let _ = pod_volume_field(&pod(), &path);
        }

        /// What is quoted is one line and JSON reads it back, as far as the two notations agree.
        #[test]
        fn quoting_loses_nothing(value in "[ -~\n\tà-ü\u{4e00}-\u{4e20}]{0,40}") {
            let mut text = String::new();
            quote(&value, &mut text);
            proptest::prop_assert!(!text.contains('\n'));
            proptest::prop_assert_eq!(serde_json::from_str::<String>(&text).unwrap(), value);
        }
    }
}
