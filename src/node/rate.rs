//! A token bucket, as client-go's flow control: so many requests a second, so many at once.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// Admits `burst` requests at once and `rate` a second after that.
#[derive(Debug)]
pub struct TokenBucket {
    rate: f64,
    burst: f64,
    state: Mutex<(f64, Instant)>,
}

impl TokenBucket {
    /// A full bucket; a rate of 0 or less admits everything.
    #[must_use]
    pub fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, state: Mutex::new((burst, Instant::now())) }
    }

    fn take(&self, may_wait: bool) -> Option<Duration> {
        if self.rate <= 0.0 {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (tokens, last) = *state;
        let tokens = (tokens + now.saturating_duration_since(last).as_secs_f64() * self.rate).min(self.burst);
        if tokens < 1.0 && !may_wait {
            *state = (tokens, now);
            return None;
        }
        *state = (tokens - 1.0, now);
        Some(Duration::from_secs_f64(((1.0 - tokens) / self.rate).max(0.0)))
    }

    /// Waits for a turn; turns come in the order of the calls.
    pub async fn acquire(&self) {
        if let Some(wait) = self.take(true)
            && !wait.is_zero()
        {
            tokio::time::sleep(wait).await;
        }
    }

    /// Waits, up to `longest`, until at least half of the burst is left, and takes nothing: for work that should not be in
    /// the way of other work.
    pub async fn wait_for_spare(&self, longest: Duration) {
        let until = Instant::now() + longest;
        while let Some(wait) = self.until_spare() {
            let now = Instant::now();
            if now >= until {
                return;
            }
            tokio::time::sleep_until((now + wait).min(until)).await;
        }
    }

    /// Whether less than half of the burst is left.
    pub fn is_scarce(&self) -> bool {
        self.until_spare().is_some()
    }

    fn until_spare(&self) -> Option<Duration> {
        if self.rate <= 0.0 {
            return None;
        }
        let state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (tokens, last) = *state;
        let missing = self.burst / 2.0 - (tokens + last.elapsed().as_secs_f64() * self.rate);
        // a bit more than nothing, or rounding would make it turn round on the spot
        (missing > 1e-6).then(|| Duration::from_secs_f64(missing / self.rate).max(Duration::from_millis(1)))
    }

    /// Takes a turn if there is one at once.
    pub fn try_acquire(&self) -> bool {
        self.take(false).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bursts_then_paces() {
        let bucket = TokenBucket::new(10.0, 3.0);
        let start = Instant::now();
        for _ in 0..3 {
            bucket.acquire().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(!bucket.try_acquire());
        for _ in 0..5 {
            bucket.acquire().await;
        }
        let elapsed = start.elapsed();
        assert!((Duration::from_millis(499)..Duration::from_millis(510)).contains(&elapsed), "{elapsed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn spare_is_what_others_leave() {
        let bucket = TokenBucket::new(10.0, 10.0);
        let start = Instant::now();
        bucket.wait_for_spare(Duration::from_secs(5)).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..8 {
            bucket.acquire().await;
        }
        assert!(bucket.is_scarce());
        bucket.wait_for_spare(Duration::from_secs(5)).await;
        assert!(!bucket.is_scarce());
        let elapsed = start.elapsed();
        assert!((Duration::from_millis(299)..Duration::from_millis(310)).contains(&elapsed), "{elapsed:?}");
        for _ in 0..100 {
            bucket.take(true);
        }
        bucket.wait_for_spare(Duration::from_secs(5)).await;
        let waited = start.elapsed() - elapsed;
        assert_eq!(waited, Duration::from_secs(5), "it waits no longer than it was told to");
    }

    #[tokio::test]
    async fn no_rate_is_no_limit() {
        let bucket = TokenBucket::new(0.0, 0.0);
        bucket.wait_for_spare(Duration::MAX / 4).await;
        assert!((0..1000).all(|_| bucket.try_acquire()));
    }
}
