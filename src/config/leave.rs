//! Nodes that are Pods of a StatefulSet, and leave the cluster when it becomes smaller.

use std::path::PathBuf;
use std::time::Duration;

use super::flags::FlagError;

/// `--leave-*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leave {
    /// Who this node's Pod belongs to.
    pub stateful_set: StatefulSetName,
    /// What may look at it, and delete the Node.
    pub kubeconfig: PathBuf,
    /// How long Pods may take to move; less than the Pod's own grace period.
    pub timeout: Duration,
}

/// Name of a StatefulSet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatefulSetName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl StatefulSetName {
    /// `NAMESPACE/NAME`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        let good = |part: &str| super::names::dns_subdomain(part).is_none();
        (good(namespace) && good(name)).then(|| Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// The ordinal in a Pod's name.
    #[must_use]
    pub fn ordinal(&self, pod: &str) -> Option<i32> {
        pod.strip_prefix(&self.name)?.strip_prefix('-')?.parse().ok().filter(|ordinal| *ordinal >= 0)
    }
}

impl std::fmt::Display for StatefulSetName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// From the flags' texts.
pub(super) fn from_flags(
    stateful_set: Option<String>,
    kubeconfig: Option<PathBuf>,
    timeout: Option<super::Duration>,
) -> Result<Option<Leave>, FlagError> {
    let Some(text) = stateful_set else { return Ok(None) };
    let error = |flag, value: &str, message: &str| FlagError { flag, value: value.to_owned(), message: message.into() };
    let stateful_set = StatefulSetName::parse(&text)
        .ok_or_else(|| error("leave-stateful-set", &text, "write NAMESPACE/NAME of the StatefulSet"))?;
    let kubeconfig = kubeconfig.ok_or_else(|| {
        let message = "--leave-stateful-set needs it: a kubeconfig that may get the StatefulSet and delete this Node";
        error("leave-kubeconfig", "", message)
    })?;
    let timeout = timeout.map_or(Duration::from_secs(60), super::Duration::std);
    Ok(Some(Leave { stateful_set, kubeconfig, timeout }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ordinals() {
        let set = StatefulSetName::parse("nodes/edge-gantry").unwrap();
        assert_eq!(set.to_string(), "nodes/edge-gantry");
        for (pod, ordinal) in
            [("edge-gantry-0", Some(0)), ("edge-gantry-12", Some(12)), ("edge-gantry", None), ("edge-gantry--1", None)]
        {
            assert_eq!(set.ordinal(pod), ordinal, "{pod}");
        }
        for wrong in ["", "nodes", "/x", "x/", "a/b/c", "A/b"] {
            assert_eq!(StatefulSetName::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(from_flags(None, None, None), Ok(None));
        assert_eq!(from_flags(some("x"), Some("/k".into()), None).unwrap_err().flag, "leave-stateful-set");
        assert_eq!(from_flags(some("n/x"), None, None).unwrap_err().flag, "leave-kubeconfig");
        let leave = from_flags(some("n/x"), Some("/k".into()), "90s".parse().ok()).unwrap().unwrap();
        assert_eq!(leave.timeout, Duration::from_secs(90));
    }
}
