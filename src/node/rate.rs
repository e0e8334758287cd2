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

    #[tokio::test]
    async fn no_rate_is_no_limit() {
        let bucket = TokenBucket::new(0.0, 0.0);
        assert!((0..1000).all(|_| bucket.try_acquire()));
    }
}
