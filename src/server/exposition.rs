//! Prometheus metrics: a writer for the text format, and the few instruments the server itself needs.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Content type of the text format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations in buckets.
    Histogram,
}

/// Text in the Prometheus exposition format, version 0.0.4.
#[derive(Debug, Default)]
pub struct Exposition(String);

impl Exposition {
    /// Begins a metric family. `help` carries the stability level as Kubernetes does: `[STABLE] ...`.
    pub fn family(&mut self, name: &str, help: &str, kind: Kind) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {}", Escaped(help, false));
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
    }

    /// One sample, optionally with the time it was taken, in milliseconds since the epoch.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64, timestamp_millis: Option<i64>) {
        self.0.push_str(name);
        if !labels.is_empty() {
            let mut separator = '{';
            for (label, text) in labels {
                let _ = write!(self.0, "{separator}{label}=\"{}\"", Escaped(text, true));
                separator = ',';
            }
            self.0.push('}');
        }
        let _ = if value.is_infinite() {
            write!(self.0, " {}Inf", if value > 0.0 { '+' } else { '-' })
        } else {
            write!(self.0, " {value}")
        };
        if let Some(millis) = timestamp_millis {
            let _ = write!(self.0, " {millis}");
        }
        self.0.push('\n');
    }

    /// The text.
    pub fn into_string(self) -> String {
        self.0
    }
}

/// Text with what would end it escaped.
struct Escaped<'a>(&'a str, bool);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '"' if self.1 => f.write_str("\\\"")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Values are whole numbers updated in one step: a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Values by label set. Callers see to it that label values come from a small set.
#[derive(Debug)]
pub struct Values<const N: usize> {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    labels: [&'static str; N],
    values: Mutex<BTreeMap<[String; N], f64>>,
}

impl<const N: usize> Values<N> {
    /// A family without samples.
    pub const fn new(name: &'static str, help: &'static str, kind: Kind, labels: [&'static str; N]) -> Self {
        Self { name, help, kind, labels, values: Mutex::new(BTreeMap::new()) }
    }

    /// Adds to a sample, which begins at 0.
    pub fn add(&self, labels: [&str; N], amount: f64) {
        *lock(&self.values).entry(labels.map(str::to_owned)).or_default() += amount;
    }

    /// Sets a sample.
    pub fn set(&self, labels: [&str; N], value: f64) {
        lock(&self.values).insert(labels.map(str::to_owned), value);
    }

    /// Writes the family.
    pub fn collect(&self, out: &mut Exposition) {
        out.family(self.name, self.help, self.kind);
        for (labels, value) in &*lock(&self.values) {
            let labels: [(&str, &str); N] = std::array::from_fn(|n| (self.labels[n], labels[n].as_str()));
            out.sample(self.name, &labels, *value, None);
        }
    }
}

/// Observations by label set, in the buckets that Kubernetes uses for durations in seconds.
#[derive(Debug)]
pub struct Durations<const N: usize> {
    name: &'static str,
    help: &'static str,
    labels: [&'static str; N],
    values: Mutex<BTreeMap<[String; N], Buckets>>,
}

/// Upper bounds, in seconds (client_golang's defaults).
const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

#[derive(Debug, Default)]
struct Buckets {
    counts: [u32; BOUNDS.len()],
    count: u32,
    sum: f64,
}

impl<const N: usize> Durations<N> {
    /// A family without samples.
    pub const fn new(name: &'static str, help: &'static str, labels: [&'static str; N]) -> Self {
        Self { name, help, labels, values: Mutex::new(BTreeMap::new()) }
    }

    /// Counts one duration, in seconds.
    pub fn observe(&self, labels: [&str; N], seconds: f64) {
        let mut values = lock(&self.values);
        let buckets = values.entry(labels.map(str::to_owned)).or_default();
        for (count, bound) in buckets.counts.iter_mut().zip(BOUNDS) {
            *count = count.wrapping_add(u32::from(seconds <= bound));
        }
        buckets.count = buckets.count.wrapping_add(1);
        buckets.sum += seconds;
    }

    /// Writes the family.
    pub fn collect(&self, out: &mut Exposition) {
        out.family(self.name, self.help, Kind::Histogram);
        let name = self.name;
        for (labels, buckets) in &*lock(&self.values) {
            let mut pairs: Vec<(&str, &str)> =
                self.labels.iter().copied().zip(labels.iter().map(String::as_str)).collect();
            for (bound, count) in
                BOUNDS.iter().chain(&[f64::INFINITY]).zip(buckets.counts.iter().chain(&[buckets.count]))
            {
                let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
                let with_bound = [&pairs[..], &[("le", bound.as_str())]].concat();
                out.sample(&format!("{name}_bucket"), &with_bound, f64::from(*count), None);
            }
            out.sample(&format!("{name}_sum"), &pairs, buckets.sum, None);
            out.sample(&format!("{name}_count"), &pairs, f64::from(buckets.count), None);
            pairs.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_format() {
        let values = Values::new("x_total", "[STABLE] Two\nlines", Kind::Counter, ["a"]);
        values.add(["q\"\\\n"], 1.0);
        values.add(["q\"\\\n"], 2.5);
        let mut out = Exposition::default();
        values.collect(&mut out);
        out.sample("y", &[], f64::INFINITY, Some(12));
        let expected =
            "# HELP x_total [STABLE] Two\\nlines\n# TYPE x_total counter\nx_total{a=\"q\\\"\\\\\\n\"} 3.5\ny +Inf 12\n";
        assert_eq!(out.into_string(), expected);
    }

    #[test]
    fn histogram_buckets_are_cumulative() {
        let durations = Durations::new("d", "h", ["m"]);
        durations.observe(["GET"], 0.02);
        durations.observe(["GET"], 60.0);
        let mut out = Exposition::default();
        durations.collect(&mut out);
        let text = out.into_string();
        assert!(text.contains("d_bucket{m=\"GET\",le=\"0.01\"} 0\n"));
        assert!(text.contains("d_bucket{m=\"GET\",le=\"0.025\"} 1\n"));
        assert!(text.contains("d_bucket{m=\"GET\",le=\"+Inf\"} 2\n"));
        assert!(text.contains("d_sum{m=\"GET\"} 60.02\n"));
    }
}
