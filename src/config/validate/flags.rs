//! What only flags carry: labels and the node's name. Source: `ValidateKubeletFlags`.

use crate::config::flags::Flags;
use crate::config::names;

/// Labels in Kubernetes' own domains that a node may give itself (`pkg/apis/well_known_labels.go`).
const KUBELET_LABELS: [&str; 11] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];
const KUBELET_LABEL_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

fn is_in(namespace: &str, domain: &str) -> bool {
    namespace == domain || namespace.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
}

/// Problems of values that only flags carry.
pub(in crate::config) fn flags(flags: &Flags) -> Vec<String> {
    let mut errors = Vec::new();
    let namespace = |key: &str| key.split_once('/').map_or(String::new(), |(namespace, _)| namespace.to_owned());
    let unknown: Vec<&str> = flags
        .node_labels
        .keys()
        .filter(|key| {
            let namespace = namespace(key);
            let reserved = is_in(&namespace, "kubernetes.io") || is_in(&namespace, "k8s.io");
            let allowed = KUBELET_LABELS.contains(&key.as_str())
                || KUBELET_LABEL_NAMESPACES.iter().any(|domain| is_in(&namespace, domain));
            reserved && !allowed
        })
        .map(String::as_str)
        .collect();
    if !unknown.is_empty() {
        errors.push(format!(
            "unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: [{}]\n--node-labels in the \
             'kubernetes.io' namespace must begin with an allowed prefix ({}) or be in the specifically allowed set ({})",
            unknown.join(" "),
            KUBELET_LABEL_NAMESPACES.join(", "),
            KUBELET_LABELS.join(", ")
        ));
    }
    let problems: Vec<String> = flags
        .node_labels
        .iter()
        .flat_map(|(key, value)| {
            let key_problem = names::qualified_name(key).map(|problem| format!("'{key}' - {problem}"));
            let value_problem = names::label_value(value).map(|problem| format!("'{value}' - {problem}"));
            [key_problem, value_problem]
        })
        .flatten()
        .collect();
    if !problems.is_empty() {
        errors.push(format!("invalid node labels: {}", problems.join("; ")));
    }
    let provider = (&flags.image_credential_provider_config, &flags.image_credential_provider_bin_dir);
    if matches!(provider, (Some(_), None) | (None, Some(_))) {
        errors.push(
            "--image-credential-provider-config and --image-credential-provider-bin-dir must be set together"
                .to_owned(),
        );
    }
    if flags.exit_on_lock_contention && flags.lock_file.is_none() {
        errors.push("cannot exit on lock file contention: no lock file specified".to_owned());
    }
    if flags.k3s.is_some() && flags.bootstrap_kubeconfig.is_some() {
        errors.push(
            "--k3s-server and --bootstrap-kubeconfig are two ways to join: give the one, or empty the other".to_owned(),
        );
    }
    errors
}

/// Problems of the node's name, which must be an object name.
pub(in crate::config) fn node_name(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("empty hostname is invalid: set --hostname-override or the host's name".to_owned());
    }
    let problem = names::dns_subdomain(name)?;
    Some(format!("node name {name:?} is invalid: {problem}: set --hostname-override"))
}
