//! Durations as Go writes them (`1m0s`, `300ms`, `1.5h`): signed nanoseconds.
//!
//! Source: Go `time.ParseDuration` and `Duration.String`; `metav1.Duration` is a JSON string in this form.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const MICROSECOND: i64 = 1_000;
const MILLISECOND: i64 = 1_000_000;
const SECOND: i64 = 1_000_000_000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;

/// A signed span of time with the range of Go's `time.Duration` (about ±292 years).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(i64);

/// Text that is no duration: terminal, the configuration is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("time: invalid duration {0:?}: write numbers with units (ns, us, ms, s, m, h), for example 20s or 1m30s")]
pub struct InvalidDuration(pub String);

impl Duration {
    /// No time at all; kubelet's sign for "not set" in most fields.
    pub const ZERO: Self = Self(0);

    /// A duration of whole seconds.
    #[must_use]
    pub const fn from_secs(seconds: i64) -> Self {
        Self(seconds.saturating_mul(SECOND))
    }

    /// A duration of whole milliseconds.
    #[must_use]
    pub const fn from_millis(milliseconds: i64) -> Self {
        Self(milliseconds.saturating_mul(MILLISECOND))
    }

    /// A duration of nanoseconds.
    #[must_use]
    pub const fn from_nanos(nanoseconds: i64) -> Self {
        Self(nanoseconds)
    }

    /// Nanoseconds, negative if the duration is.
    #[must_use]
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// True for zero, which most fields take for "not set".
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    pub(super) fn is_zero_ref(&self) -> bool {
        self.is_zero()
    }

    /// The duration as std knows it; negative ones, which std has not, become zero.
    #[must_use]
    pub fn std(self) -> std::time::Duration {
        std::time::Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }
}

impl From<Duration> for std::time::Duration {
    fn from(duration: Duration) -> Self {
        duration.std()
    }
}

impl FromStr for Duration {
    type Err = InvalidDuration;

    fn from_str(text: &str) -> Result<Self, InvalidDuration> {
        let invalid = || InvalidDuration(text.to_owned());
        let (negative, mut rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        if rest == "0" {
            return Ok(Self::ZERO);
        }
        if rest.is_empty() {
            return Err(invalid());
        }
        let mut total: i128 = 0;
        while !rest.is_empty() {
            let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
            let (number, tail) = rest.split_at(unit_at);
            let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            rest = tail;
            let scale = i128::from(match unit {
                "ns" => 1,
                "us" | "\u{b5}s" | "\u{3bc}s" => MICROSECOND,
                "ms" => MILLISECOND,
                "s" => SECOND,
                "m" => MINUTE,
                "h" => HOUR,
                _ => return Err(invalid()),
            });
            let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
            if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
                return Err(invalid());
            }
            let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
            // more than 18 fractional digits are finer than a nanosecond in every unit
            let fraction = &fraction[..fraction.len().min(18)];
            let parts: i128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| invalid())? };
            let digits = u32::try_from(fraction.len()).map_err(|_| invalid())?;
            let value = whole.checked_mul(scale).ok_or_else(invalid)? + parts * scale / 10_i128.pow(digits);
            total = total.checked_add(value).ok_or_else(invalid)?;
        }
        let signed = if negative { -total } else { total };
        i64::try_from(signed).map(Self).map_err(|_| invalid())
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        if self.0 < 0 {
            f.write_str("-")?;
        }
        let nanos = self.0.unsigned_abs();
        let (second, minute, hour) = (SECOND.unsigned_abs(), MINUTE.unsigned_abs(), HOUR.unsigned_abs());
        if nanos < second {
            let (unit, name) = match nanos {
                0..1_000 => (1, "ns"),
                1_000..1_000_000 => (1_000, "\u{b5}s"),
                _ => (1_000_000, "ms"),
            };
            return write!(f, "{}{name}", decimal(nanos, unit));
        }
        if nanos >= hour {
            write!(f, "{}h", nanos / hour)?;
        }
        if nanos >= minute {
            write!(f, "{}m", nanos % hour / minute)?;
        }
        write!(f, "{}s", decimal(nanos % minute, second))
    }
}

/// `value / unit` with exactly the decimals that are not zero.
fn decimal(value: u64, unit: u64) -> String {
    let (whole, rest) = (value / unit, value % unit);
    if rest == 0 {
        return whole.to_string();
    }
    let width = unit.ilog10() as usize;
    let fraction = format!("{rest:0width$}");
    format!("{whole}.{}", fraction.trim_end_matches('0'))
}

impl fmt::Debug for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Accepts a number of nanoseconds as well as a string, as `logging.flushFrequency` does.
pub(super) fn string_or_nanos<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Nanos(i64),
        Text(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Nanos(nanos) => Ok(Duration::from_nanos(nanos)),
        Either::Text(text) => text.parse().map_err(de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_what_go_does() {
        for (text, nanos, canonical) in [
            ("0", 0, "0s"),
            ("0s", 0, "0s"),
            ("1m", MINUTE, "1m0s"),
            ("1m0s", MINUTE, "1m0s"),
            ("90s", 90 * SECOND, "1m30s"),
            ("4h", 4 * HOUR, "4h0m0s"),
            ("1.5h", HOUR + HOUR / 2, "1h30m0s"),
            ("100ms", 100 * MILLISECOND, "100ms"),
            ("1.5s", SECOND + SECOND / 2, "1.5s"),
            ("2us", 2 * MICROSECOND, "2\u{b5}s"),
            ("-10s", -10 * SECOND, "-10s"),
            ("+.5s", SECOND / 2, "500ms"),
            ("1h1ns", HOUR + 1, "1h0m0.000000001s"),
        ] {
            let duration: Duration = text.parse().unwrap();
            assert_eq!(duration.as_nanos(), nanos, "{text}");
            assert_eq!(duration.to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn refuses_what_go_refuses() {
        for text in ["", "3", "s", ".s", "1.2.3s", "1x", "1 s", "infh", "-", "99999999999999999999h", "1d", "--1s"] {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn round_trips(nanos in proptest::prelude::any::<i64>()) {
            let duration = Duration::from_nanos(nanos);
            if nanos != i64::MIN {
                proptest::prop_assert_eq!(duration.to_string().parse::<Duration>().unwrap(), duration);
            }
        }

        #[test]
        fn never_panics(text in "\\PC{0,30}") {
            let _ = text.parse::<Duration>();
        }
    }
}
