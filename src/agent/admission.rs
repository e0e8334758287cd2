//! The node's decision about a Pod, from what the agent knows.

use std::collections::BTreeMap;

use super::node::Node;
use crate::pod::admission::{NodeInfo, admit};
use crate::pod::model::{Admission, Desired};
use crate::resources::amounts::Amounts;

impl Node {
    /// Admits or rejects a Pod; an admitted one counts at once, so that no two are let in for the same free CPU.
    pub(super) fn admit(&self, desired: &Desired) -> Admission {
        let object = self.object.borrow().clone();
        let allocatable = Amounts::of(Some(&self.allocatable()));
        let none = BTreeMap::new();
        let node = NodeInfo {
            name: &self.config.node_name,
            labels: object.as_ref().and_then(|node| node.metadata.labels.as_ref()).unwrap_or(&none),
            taints: object.as_ref().and_then(|node| node.spec.as_ref()?.taints.as_deref()).unwrap_or_default(),
            allocatable: &allocatable,
            declared_features: &self.declared_features,
            supplemental_groups_policy: true,
            sysctls: &self.sysctls,
            apparmor: self.traits.apparmor,
            pod_level_resources: true,
        };
        self.pods.admit(desired.uid(), |others| {
            match admit(&desired.pod, others.iter().map(AsRef::as_ref), &node) {
                Ok(()) => Admission::Admitted,
                Err(rejection) => Admission::Rejected { message: rejection.status_message(), reason: rejection.reason },
            }
        })
    }
}
