//! Columns, ages and sizes as `kubectl` prints them.

use std::fmt::Write;

/// Rows with columns as wide as their widest cell, three spaces apart.
pub(super) fn render(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // writing to a String cannot fail
            let _ = write!(line, "{cell:<width$}   ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A span of time, by its one or two largest units.
pub(super) fn age(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |large: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{large}{unit}") } else { format!("{large}{unit}{small}{small_unit}") }
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        _ => format!("{days}d"),
    }
}

/// Bytes with a decimal unit.
pub(super) fn size(bytes: u64) -> String {
    let mut rest = bytes;
    let mut tenths = 0;
    for unit in ["B", "kB", "MB", "GB"] {
        if rest < 1000 {
            return if unit == "B" { format!("{rest} B") } else { format!("{rest}.{tenths} {unit}") };
        }
        (rest, tenths) = (rest / 1000, rest % 1000 / 100);
    }
    format!("{rest}.{tenths} TB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_line_up() {
        let rows = [["NAME", "X"], ["a", "long"], ["longer", ""]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(render(&rows), "NAME     X\na        long\nlonger\n");
    }

    #[test]
    fn units_follow_size() {
        let ages = [-3, 119, 125, 600, 10_800, 10_860, 90_000, 180_000, 1_000_000].map(age);
        assert_eq!(ages, ["0s", "119s", "2m5s", "10m", "3h", "3h1m", "25h", "2d2h", "11d"]);
        assert_eq!([999, 1500, 4_240_000, 12_000_000_000].map(size), ["999 B", "1.5 kB", "4.2 MB", "12.0 GB"]);
    }
}
