//! Which devices a container gets: values in, values out.
//!
//! Source: `devicesToAllocate` in `pkg/kubelet/cm/devicemanager/manager.go`, for a node without a topology policy.

use std::collections::BTreeSet;

use super::error::DeviceError;

type Ids = BTreeSet<String>;

/// What is known when a container asks for devices of one resource.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    /// UID of the Pod.
    pub pod: &'a str,
    /// Name of the container.
    pub container: &'a str,
    /// Name of the resource.
    pub resource: &'a str,
    /// How many it asks for.
    pub required: usize,
    /// Those it has already.
    pub has: Option<&'a Ids>,
    /// Those that work; `None` if nobody offers the resource.
    pub healthy: Option<&'a Ids>,
    /// Those that some container has.
    pub in_use: &'a Ids,
    /// Those that the Pod's init containers leave to it.
    pub reusable: Option<&'a Ids>,
}

/// The answer so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// It has what it asks for.
    Nothing,
    /// These.
    These(Ids),
    /// The plugin may say which; then [`Question::answer`].
    Ask(Question),
}

/// What a plugin is asked: GetPreferredAllocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// Those to choose from.
    pub available: Ids,
    /// Those that are chosen already.
    pub must_include: Ids,
    /// How many there are to be.
    pub size: usize,
}

impl Question {
    /// What is preferred, as far as it is available, and others for the rest.
    pub fn answer(self, preferred: &[String]) -> Ids {
        let mut chosen = self.must_include;
        let wanted = preferred.iter().filter(|id| self.available.contains(*id)).chain(&self.available);
        for id in wanted {
            if chosen.len() >= self.size {
                break;
            }
            chosen.insert(id.clone());
        }
        chosen
    }
}

/// Decides for one container and one resource.
///
/// # Errors
/// When the devices are not there, or do not work. What the container has already is checked as well: this is asked
/// before a Pod starts.
pub(super) fn choose(request: &Request<'_>) -> Result<Choice, DeviceError> {
    let Request { resource, required, .. } = *request;
    let none = Ids::new();
    if let Some(has) = request.has.filter(|has| has.len() != required) {
        return Err(DeviceError::Changed {
            pod: request.pod.to_owned(),
            container: request.container.to_owned(),
            resource: resource.to_owned(),
            had: has.len(),
            wanted: required,
        });
    }
    let healthy = request.healthy.ok_or_else(|| DeviceError::Unregistered(resource.to_owned()))?;
    if healthy.is_empty() {
        return Err(DeviceError::NoneHealthy(resource.to_owned()));
    }
    if !healthy.is_superset(request.has.unwrap_or(&none)) {
        return Err(DeviceError::NoLongerHealthy(resource.to_owned()));
    }
    if request.has.is_some() || required == 0 {
        return Ok(Choice::Nothing);
    }
    let chosen: Ids = request.reusable.unwrap_or(&none).iter().take(required).cloned().collect();
    if chosen.len() == required {
        return Ok(Choice::These(chosen));
    }
    let available: Ids = healthy.difference(request.in_use).cloned().collect();
    let missing = required - chosen.len();
    if available.len() < missing {
        return Err(DeviceError::Unavailable {
            resource: resource.to_owned(),
            requested: missing,
            available: available.len(),
        });
    }
    Ok(Choice::Ask(Question { available: &available | &chosen, must_include: chosen, size: required }))
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    fn ids(list: &[&str]) -> Ids {
        list.iter().map(|id| (*id).to_owned()).collect()
    }

    fn request<'a>(required: usize, healthy: Option<&'a Ids>, in_use: &'a Ids) -> Request<'a> {
        Request { pod: "u", container: "c", resource: "r/x", required, has: None, healthy, in_use, reusable: None }
    }

    #[test]
    fn refusals_say_why() {
        let (none, two) = (Ids::new(), ids(&["1", "2"]));
        let text = |request: &Request<'_>| choose(request).unwrap_err().to_string();
        assert_eq!(text(&request(1, None, &none)), "cannot allocate unregistered device r/x");
        assert_eq!(
            text(&request(1, Some(&none), &none)),
            "no healthy devices present; cannot allocate unhealthy devices r/x"
        );
        let used = ids(&["1"]);
        assert_eq!(
            text(&request(2, Some(&two), &used)),
            "requested number of devices unavailable for r/x. Requested: 2, Available: 1"
        );
        let gone = ids(&["9"]);
        assert_eq!(
            text(&Request { has: Some(&gone), ..request(1, Some(&two), &gone) }),
            "previously allocated devices are no longer healthy; cannot allocate unhealthy devices r/x"
        );
        assert_eq!(
            text(&Request { has: Some(&gone), ..request(2, Some(&two), &gone) }),
            "pod \"u\" container \"c\" changed request for resource \"r/x\" from 1 to 2"
        );
    }

    #[test]
    fn what_a_container_has_it_keeps() {
        let two = ids(&["1", "2"]);
        let has = ids(&["1"]);
        let kept = Request { has: Some(&has), ..request(1, Some(&two), &has) };
        assert_eq!(choose(&kept).unwrap(), Choice::Nothing);
    }

    #[test]
    fn devices_of_init_containers_come_first() {
        let (all, used) = (ids(&["1", "2", "3"]), ids(&["2"]));
        let reuse = ids(&["2"]);
        let one = Request { reusable: Some(&reuse), ..request(1, Some(&all), &used) };
        assert_eq!(choose(&one).unwrap(), Choice::These(ids(&["2"])));
        let two = Request { required: 2, ..one };
        let Choice::Ask(question) = choose(&two).unwrap() else { panic!("one more is needed") };
        assert_eq!(question.must_include, ids(&["2"]));
        assert_eq!(question.clone().answer(&[]), ids(&["1", "2"]));
        assert_eq!(question.answer(&["3".to_owned(), "9".to_owned()]), ids(&["2", "3"]));
    }

    proptest! {
        /// Whatever a plugin prefers: as many as asked for, none twice, all free or the Pod's own.
        #[test]
        fn a_choice_is_right(
            healthy in btree_set("[a-h]", 0..8),
            in_use in btree_set("[a-h]", 0..8),
            reuse in btree_set("[a-h]", 0..3),
            preferred in vec("[a-k]", 0..8),
            required in 0_usize..6,
        ) {
            let reuse: Ids = reuse.intersection(&in_use).cloned().collect();
            let asked = Request { reusable: Some(&reuse), ..request(required, Some(&healthy), &in_use) };
            let chosen = match choose(&asked) {
                Ok(Choice::Nothing) => { prop_assert_eq!(required, 0); return Ok(()); }
                Ok(Choice::These(ids)) => ids,
                Ok(Choice::Ask(question)) => question.answer(&preferred),
                Err(_) => {
                    let free = healthy.difference(&in_use).count();
                    prop_assert!(healthy.is_empty() || free + reuse.len() < required);
                    return Ok(());
                }
            };
            prop_assert_eq!(chosen.len(), required);
            for id in &chosen {
                prop_assert!(reuse.contains(id) || (healthy.contains(id) && !in_use.contains(id)));
            }
            if required >= reuse.len() {
                prop_assert!(chosen.is_superset(&reuse));
            }
        }
    }
}
