//! Answers of the API server, kept for a while.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// A bounded map whose entries expire. When it is full, the oldest entry makes room.
pub struct TtlCache<K, V> {
    entries: Mutex<Entries<K, V>>,
    capacity: usize,
}

struct Entries<K, V> {
    by_key: HashMap<K, (V, Instant)>,
    /// Every key once, in the order of insertion.
    order: VecDeque<K>,
}

impl<K: Clone + Eq + Hash, V: Clone> TtlCache<K, V> {
    /// An empty cache for at most `capacity` entries.
    pub fn new(capacity: usize) -> Self {
        let entries = Entries { by_key: HashMap::new(), order: VecDeque::new() };
        Self { entries: Mutex::new(entries), capacity: capacity.max(1) }
    }

    fn lock(&self) -> MutexGuard<'_, Entries<K, V>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of a key that has not expired.
    pub fn get(&self, key: &K) -> Option<V> {
        let entries = self.lock();
        let (value, expires) = entries.by_key.get(key)?;
        (*expires > Instant::now()).then(|| value.clone())
    }

    /// Keeps a value for `ttl`; a zero `ttl` keeps nothing.
    pub fn insert(&self, key: K, value: V, ttl: Duration) {
        if ttl.is_zero() {
            return;
        }
        let mut entries = self.lock();
        if entries.by_key.insert(key.clone(), (value, Instant::now() + ttl)).is_none() {
            entries.order.push_back(key);
        }
        while entries.by_key.len() > self.capacity {
            let Some(oldest) = entries.order.pop_front() else { break };
            entries.by_key.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn entries_expire_and_make_room() {
        let cache = TtlCache::new(2);
        cache.insert(1, 'a', Duration::from_millis(20));
        cache.insert(1, 'b', Duration::from_secs(60));
        cache.insert(2, 'c', Duration::from_millis(20));
        cache.insert(3, 'd', Duration::ZERO);
        assert_eq!((cache.get(&1), cache.get(&2), cache.get(&3)), (Some('b'), Some('c'), None));
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(cache.get(&2), None);
        cache.insert(4, 'e', Duration::from_secs(60));
        assert_eq!((cache.get(&1), cache.get(&4)), (None, Some('e')));
    }
}
