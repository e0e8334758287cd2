//! Kubernetes quantities (`100m`, `64Mi`, `1e3`) as exact integers.
//!
//! Source: `apimachinery/pkg/api/resource/quantity.go`. Values are kept in billionths, the finest unit (`n`).

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A quantity that is not one: terminal, the manifest is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a quantity: write a number with an optional suffix, for example 500m, 2, 64Mi or 1G")]
pub struct InvalidQuantity(pub String);

const NANOS: i128 = 1_000_000_000;

/// Parses a quantity into billionths of its unit, rounding finer fractions up, away from zero.
pub fn nanos(text: &str) -> Result<i128, InvalidQuantity> {
    let invalid = || InvalidQuantity(text.to_owned());
    let (negative, rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let digits_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return Err(invalid());
    }
    let (multiplier, exponent) = scale(suffix).ok_or_else(invalid)?;
    // value = mantissa * 10^(exponent - len(fraction)) * multiplier; 38 digits fit an i128, more saturate
    let mut value: i128 = 0;
    for digit in whole.bytes().chain(fraction.bytes()) {
        value = value.saturating_mul(10).saturating_add(i128::from(digit - b'0'));
    }
    value = value.saturating_mul(multiplier);
    let power = exponent + 9 - i32::try_from(fraction.len()).map_err(|_| invalid())?;
    for _ in 0..power.clamp(0, 60) {
        value = value.saturating_mul(10);
    }
    if power < 0 {
        let divisor = 10_i128.checked_pow(power.unsigned_abs()).unwrap_or(i128::MAX);
        value = value / divisor + i128::from(value % divisor != 0);
    }
    Ok(if negative { -value } else { value })
}

fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E'])?;
            let power: i32 = digits.parse().ok()?;
            (1, power.clamp(-60, 60))
        }
    })
}

fn ceil_div(value: i128, unit: i128) -> i64 {
    let quotient = value.div_euclid(unit) + i128::from(value.rem_euclid(unit) != 0);
    i64::try_from(quotient).unwrap_or(if quotient < 0 { i64::MIN } else { i64::MAX })
}

/// The quantity in whole units (bytes, cores, counts), rounded up, as Go's `Quantity.Value()`.
pub fn value(quantity: &Quantity) -> Result<i64, InvalidQuantity> {
    Ok(ceil_div(nanos(&quantity.0)?, NANOS))
}

/// The quantity in thousandths (milli-CPU), rounded up, as Go's `Quantity.MilliValue()`.
pub fn milli_value(quantity: &Quantity) -> Result<i64, InvalidQuantity> {
    Ok(ceil_div(nanos(&quantity.0)?, NANOS / 1000))
}

/// A quantity of thousandths, written as Kubernetes does: `1500` becomes `1500m`, `2000` becomes `2`.
#[must_use]
pub fn from_milli(milli: i64) -> Quantity {
    Quantity(if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") })
}

/// A quantity of bytes, written with the largest binary suffix that loses nothing.
#[must_use]
pub fn from_bytes(bytes: i64) -> Quantity {
    let mut value = bytes;
    let mut suffix = "";
    for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
        if value == 0 || value % 1024 != 0 {
            break;
        }
        value /= 1024;
        suffix = next;
    }
    Quantity(format!("{value}{suffix}"))
}

/// How a quantity is written; sums keep the form of what they are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `500m`, `2`, `1M`.
    #[default]
    Decimal,
    /// `64Mi`.
    Binary,
}

impl Format {
    /// The form in which `quantity` is written.
    #[must_use]
    pub fn of(quantity: &Quantity) -> Self {
        if quantity.0.ends_with('i') { Self::Binary } else { Self::Decimal }
    }
}

/// A quantity of billionths in its canonical form: no fraction, the largest suffix that loses nothing.
#[must_use]
pub fn from_nanos(nanos: i128, format: Format) -> Quantity {
    // small numbers and fractions have no binary form
    if format == Format::Binary
        && nanos % NANOS == 0
        && nanos.abs() >= 1024 * NANOS
        && let Ok(bytes) = i64::try_from(nanos / NANOS)
    {
        return from_bytes(bytes);
    }
    let (mut value, mut power) = (nanos, 0);
    while value != 0 && value % 1000 == 0 && power < DECIMAL_SUFFIXES.len() - 1 {
        (value, power) = (value / 1000, power + 1);
    }
    let suffix = if value == 0 { "" } else { DECIMAL_SUFFIXES[power] };
    Quantity(format!("{value}{suffix}"))
}

/// From billionths upwards, a thousand apart.
const DECIMAL_SUFFIXES: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];

#[cfg(test)]
mod tests {
    use super::*;

    fn q(text: &str) -> Quantity {
        Quantity(text.to_owned())
    }

    #[test]
    fn reads_what_kubernetes_writes() {
        for (text, milli) in [
            ("0", 0),
            ("1", 1000),
            ("100m", 100),
            ("0.1", 100),
            (".5", 500),
            ("2.", 2000),
            ("1k", 1_000_000),
            ("1e3", 1_000_000),
            ("1E-1", 100),
            ("1Ki", 1_024_000),
            ("1n", 1),
            ("1.5Gi", 1_610_612_736_000),
            ("-1", -1000),
        ] {
            assert_eq!(milli_value(&q(text)), Ok(milli), "{text}");
        }
        assert_eq!(value(&q("100m")), Ok(1));
        assert_eq!(value(&q("64Mi")), Ok(64 << 20));
    }

    #[test]
    fn refuses_what_is_no_quantity() {
        for text in ["", "m", "1.2.3", "12 Mi", "1mi", "Ki", "1e", "0x10", "--1"] {
            assert!(nanos(text).is_err(), "{text}");
        }
    }

    #[test]
    fn writes_canonical_forms() {
        assert_eq!(from_milli(1500).0, "1500m");
        assert_eq!(from_milli(2000).0, "2");
        assert_eq!(from_bytes(64 << 20).0, "64Mi");
        assert_eq!(from_bytes(1_000_000).0, "1000000");
        for (nanos, format, text) in [
            (0, Format::Binary, "0"),
            (5 * NANOS, Format::Binary, "5"),
            (64 * 1024 * NANOS, Format::Binary, "64Ki"),
            (NANOS / 2, Format::Binary, "500m"),
            (1_500_000_000, Format::Decimal, "1500m"),
            (100_000_000 * NANOS, Format::Decimal, "100M"),
            (7, Format::Decimal, "7n"),
        ] {
            assert_eq!(from_nanos(nanos, format).0, text);
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "[-+]?[0-9.]{0,50}[a-zA-Z]{0,3}[0-9-]{0,4}") {
            let _ = nanos(&text);
        }

        #[test]
        fn what_is_written_can_be_read(nanos in 0_i128..1 << 80, binary in proptest::bool::ANY) {
            let format = if binary { Format::Binary } else { Format::Decimal };
            let text = from_nanos(nanos, format);
            proptest::prop_assert_eq!(super::nanos(&text.0), Ok(nanos), "{}", text.0);
        }

        #[test]
        fn bytes_round_trip(bytes in 0_i64..=i64::MAX / 2) {
            proptest::prop_assert_eq!(value(&from_bytes(bytes)).unwrap(), bytes);
        }
    }
}
