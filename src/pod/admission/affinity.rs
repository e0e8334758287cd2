//! Node selectors, node affinity, taints.
//!
//! Source: `component-helpers/scheduling/corev1`, `apimachinery/pkg/labels/selector.go`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration};

type Labels = BTreeMap<String, String>;

/// Whether a node is one that the Pod may run on, by `nodeSelector` and required node affinity.
pub(super) fn matches(spec: &PodSpec, node_name: &str, labels: &Labels) -> bool {
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selected && required.is_none_or(|r| r.node_selector_terms.iter().any(|term| term_matches(term, node_name, labels)))
}

/// All requirements of a term; a term without any matches nothing.
fn term_matches(term: &NodeSelectorTerm, node_name: &str, labels: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|r| is_met(r, labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(|r| field_matches(r, node_name))
}

/// A requirement on a label; one that makes no sense is never met.
fn is_met(requirement: &NodeSelectorRequirement, label: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let is_listed = label.is_some_and(|label| values.iter().any(|value| value == label));
    let number = |text: &str| text.parse::<i64>().ok();
    let bound = || match values {
        [value] => Some((number(label?)?, number(value)?)),
        _ => None,
    };
    match requirement.operator.as_str() {
        "In" => is_listed,
        "NotIn" => !values.is_empty() && !is_listed,
        "Exists" => values.is_empty() && label.is_some(),
        "DoesNotExist" => values.is_empty() && label.is_none(),
        "Gt" => bound().is_some_and(|(label, value)| label > value),
        "Lt" => bound().is_some_and(|(label, value)| label < value),
        _ => false,
    }
}

/// The only field is `metadata.name`, with one value.
fn field_matches(requirement: &NodeSelectorRequirement, node_name: &str) -> bool {
    let [value] = requirement.values.as_deref().unwrap_or_default() else { return false };
    match (requirement.key.as_str(), requirement.operator.as_str()) {
        ("metadata.name", "In") => value == node_name,
        ("metadata.name", "NotIn") => value != node_name,
        _ => false,
    }
}

/// Whether a `NoExecute` taint would drive the Pod away at once.
pub(super) fn has_untolerated_taint(spec: &PodSpec, taints: &[Taint]) -> bool {
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let mut taints = taints.iter().filter(|taint| taint.effect == "NoExecute");
    taints.any(|taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let is_or_empty = |own: Option<&str>, taint: &str| own.is_none_or(|own| own.is_empty() || own == taint);
    if !is_or_empty(toleration.effect.as_deref(), &taint.effect) || !is_or_empty(toleration.key.as_deref(), &taint.key)
    {
        return false;
    }
    match toleration.operator.as_deref() {
        None | Some("" | "Equal") => {
            toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        Some("Exists") => true,
        // Gt and Lt are behind a feature gate that is off
        Some(_) => false,
    }
}
