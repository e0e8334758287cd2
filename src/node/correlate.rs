//! What becomes of an event that resembles earlier ones: counted up, combined, or dropped.
//!
//! Source: client-go `tools/record/events_cache.go` with its default figures. Pure: time comes in, nothing goes out.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

/// Similar events within the interval that stay apart; more are combined.
const MAX_SIMILAR: usize = 10;
const SIMILAR_SECONDS: i64 = 600;
/// Events about one object at once, and seconds until one more is allowed.
const SPAM_BURST: f64 = 25.0;
const SPAM_SECONDS: f64 = 300.0;
/// Keys remembered in each table.
const REMEMBERED: usize = 2048;

/// A table that forgets what was not used for longest.
struct Recent<K, V> {
    entries: HashMap<K, (V, u64)>,
    clock: u64,
}

impl<K: Eq + Hash + Clone, V> Recent<K, V> {
    fn new() -> Self {
        Self { entries: HashMap::new(), clock: 0 }
    }

    fn entry(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        self.clock += 1;
        if self.entries.len() >= REMEMBERED && !self.entries.contains_key(&key) {
            // forget an eighth at a time: cheaper than the single oldest
            let mut ages: Vec<u64> = self.entries.values().map(|(_, age)| *age).collect();
            ages.sort_unstable();
            let limit = ages[REMEMBERED / 8];
            self.entries.retain(|_, (_, age)| *age > limit);
        }
        let slot = self.entries.entry(key).or_insert_with(|| (make(), 0));
        slot.1 = self.clock;
        &mut slot.0
    }
}

/// An event sent before, to be counted up.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Earlier {
    pub(super) name: String,
    pub(super) count: i32,
    pub(super) first: Timestamp,
}

/// What to do with an event.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Verdict {
    /// Send it as it is.
    Create(Box<Event>),
    /// Count up the earlier one, whose name this event carries.
    Update(Box<Event>),
    /// Too many about this object.
    Drop,
}

/// Remembers what was sent.
pub(super) struct Correlator {
    similar: Recent<String, (BTreeSet<String>, Timestamp)>,
    sent: Recent<String, Option<Earlier>>,
    spam: Recent<String, (f64, Timestamp)>,
}

impl Correlator {
    pub(super) fn new() -> Self {
        Self { similar: Recent::new(), sent: Recent::new(), spam: Recent::new() }
    }

    /// Decides about an event that happened now.
    pub(super) fn judge(&mut self, mut event: Event, now: Timestamp) -> Verdict {
        let object = &event.involved_object;
        let about = [&object.kind, &object.namespace, &object.name, &object.uid, &object.api_version, &event.type_]
            .map(|part| part.as_deref().unwrap_or(""))
            .join("\0");
        let (tokens, last) = self.spam.entry(about.clone(), || (SPAM_BURST, now));
        *tokens = (*tokens + seconds(*last, now) / SPAM_SECONDS).min(SPAM_BURST);
        *last = now;
        if *tokens < 1.0 {
            return Verdict::Drop;
        }
        *tokens -= 1.0;

        let field = event.involved_object.field_path.as_deref().unwrap_or("");
        let message = event.message.clone().unwrap_or_default();
        let kind = format!("{about}\0{field}\0{}", event.reason.as_deref().unwrap_or(""));
        let (messages, since) = self.similar.entry(kind.clone(), || (BTreeSet::new(), now));
        if seconds(*since, now) > f64::from(i32::try_from(SIMILAR_SECONDS).unwrap_or(i32::MAX)) {
            messages.clear();
        }
        *since = now;
        let combined = messages.len() >= MAX_SIMILAR && !messages.contains(&message) || messages.len() > MAX_SIMILAR;
        if messages.len() <= MAX_SIMILAR {
            messages.insert(message.clone());
        }
        let key = if combined {
            event.message = Some(format!("(combined from similar events): {message}"));
            kind
        } else {
            format!("{kind}\0{message}")
        };
        match self.sent.entry(key, || None) {
            Some(earlier) => {
                earlier.count += 1;
                event.metadata.name = Some(earlier.name.clone());
                event.count = Some(earlier.count);
                event.first_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(earlier.first));
                Verdict::Update(Box::new(event))
            }
            slot => {
                let name = event.metadata.name.clone().unwrap_or_default();
                *slot = Some(Earlier { name, count: 1, first: now });
                Verdict::Create(Box::new(event))
            }
        }
    }
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ObjectReference;

    fn event(object: &str, reason: &str, message: &str) -> Event {
        Event {
            involved_object: ObjectReference { name: Some(object.to_owned()), ..ObjectReference::default() },
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                name: Some(format!("{object}.{message}")),
                ..Default::default()
            },
            ..Event::default()
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    #[test]
    fn the_same_event_is_counted() {
        let mut correlator = Correlator::new();
        assert!(matches!(correlator.judge(event("p", "BackOff", "m"), at(0)), Verdict::Create(_)));
        for count in 2..5 {
            let Verdict::Update(updated) = correlator.judge(event("p", "BackOff", "m"), at(count)) else { panic!() };
            assert_eq!((updated.count, updated.metadata.name.as_deref()), (i32::try_from(count).ok(), Some("p.m")));
            assert_eq!(updated.first_timestamp.unwrap().0, at(0));
        }
        assert!(matches!(correlator.judge(event("q", "BackOff", "m"), at(9)), Verdict::Create(_)));
    }

    #[test]
    fn many_similar_events_are_combined() {
        let mut correlator = Correlator::new();
        for number in 0..10 {
            assert!(matches!(
                correlator.judge(event("p", "Failed", &number.to_string()), at(number)),
                Verdict::Create(_)
            ));
        }
        let Verdict::Create(combined) = correlator.judge(event("p", "Failed", "ten"), at(10)) else { panic!() };
        assert_eq!(combined.message.as_deref(), Some("(combined from similar events): ten"));
        assert!(matches!(correlator.judge(event("p", "Failed", "eleven"), at(11)), Verdict::Update(_)));
    }

    #[test]
    fn one_object_cannot_flood() {
        let mut correlator = Correlator::new();
        let dropped = (0..40).filter(|_| correlator.judge(event("p", "R", "m"), at(0)) == Verdict::Drop).count();
        assert_eq!(dropped, 15);
        assert_ne!(correlator.judge(event("other", "R", "m"), at(0)), Verdict::Drop);
        assert_ne!(correlator.judge(event("p", "R", "m"), at(301)), Verdict::Drop);
        assert_eq!(correlator.judge(event("p", "R", "m"), at(302)), Verdict::Drop);
    }

    #[test]
    fn memory_is_bounded() {
        let mut correlator = Correlator::new();
        for number in 0..3 * REMEMBERED {
            correlator.judge(event(&number.to_string(), "R", "m"), at(0));
        }
        for size in [correlator.sent.entries.len(), correlator.spam.entries.len(), correlator.similar.entries.len()] {
            assert!(size <= REMEMBERED);
        }
    }
}
