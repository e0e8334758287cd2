//! One line of the CRI log format: `<RFC 3339 time> <stdout|stderr> <tags> <content>`.

use jiff::Timestamp;

/// The head of a record. Its content is the rest of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head<'a> {
    /// The time as written.
    pub time: &'a [u8],
    /// Standard error, not standard output.
    pub stderr: bool,
    /// The line goes on in the next record of the same stream (tag `P`).
    pub partial: bool,
    /// Length of the head, in bytes, including the space before the content.
    pub length: usize,
}

/// Parses the head of a record; `None` if the line is not one.
#[inline]
pub fn head(line: &[u8]) -> Option<Head<'_>> {
    // What every head in a file of ours looks like, with a time of fixed width.
    const STREAM: usize = 31;
    if let Some(b" std") = line.get(30..34)
        && let Some((kind, b" ", tag, b" ")) =
            Some((line.get(STREAM..37)?, line.get(37..38)?, *line.get(38)?, line.get(39..40)?))
        && line[..30].iter().all(|byte| *byte != b' ')
    {
        let stderr = match kind {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        return Some(Head { time: &line[..30], stderr, partial: tag == b'P', length: 40 });
    }
    general_head(line)
}

fn general_head(line: &[u8]) -> Option<Head<'_>> {
    let first = memchr::memchr(b' ', line)?;
    let second = first + 1 + memchr::memchr(b' ', &line[first + 1..])?;
    let third = second + 1 + memchr::memchr(b' ', &line[second + 1..])?;
    let stderr = match &line[first + 1..second] {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    // Tags are separated by colons; the first one says whether the record is partial.
    let partial = line[second + 1..third].split(|byte| *byte == b':').next() == Some(b"P");
    (first >= 20).then_some(Head { time: &line[..first], stderr, partial, length: third + 1 })
}

/// A bound that record times are compared with.
#[derive(Clone, Debug)]
pub struct Since {
    time: Timestamp,
    /// The same in the form in which times are usually written: such times compare as text.
    text: String,
}

impl Since {
    /// Records of `time` or later pass.
    pub fn new(time: Timestamp) -> Self {
        Self { time, text: format!("{time:.9}") }
    }

    /// Whether a record of this time passes. Times that cannot be read do not.
    pub fn admits(&self, time: &[u8]) -> bool {
        if time.len() == self.text.len() && time.ends_with(b"Z") {
            return time >= self.text.as_bytes();
        }
        let parsed = std::str::from_utf8(time).ok().and_then(|text| text.parse::<Timestamp>().ok());
        parsed.is_some_and(|parsed| parsed >= self.time)
    }

    /// The bound itself.
    pub fn time(&self) -> Timestamp {
        self.time
    }
}

/// Appends a time as the kubelet prints it: with nine digits of fraction, in the zone in which it is written.
pub fn push_time(time: &[u8], out: &mut Vec<u8>) {
    let zone =
        time.iter().skip(19).position(|byte| matches!(byte, b'Z' | b'+' | b'-')).map_or(time.len(), |at| at + 19);
    let (local, zone) = time.split_at(zone);
    let (seconds, fraction) = local.split_at(local.len().min(19));
    let digits = fraction.strip_prefix(b".").unwrap_or(fraction);
    out.extend_from_slice(seconds);
    out.push(b'.');
    out.extend_from_slice(&digits[..digits.len().min(9)]);
    out.extend(std::iter::repeat_n(b'0', 9_usize.saturating_sub(digits.len())));
    out.extend_from_slice(zone);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads() {
        let line = b"2016-10-06T00:17:09.669794202Z stdout P log content 1";
        let found = head(line).expect("head");
        assert_eq!((found.time, found.stderr, found.partial), (&line[..30], false, true));
        assert_eq!(&line[found.length..], b"log content 1");
        let line = b"2016-10-06T00:17:09Z stderr F:x ";
        let found = head(line).expect("head");
        assert_eq!((found.stderr, found.partial, found.length), (true, false, line.len()));
        let odd: &[u8] = b"2016-10-06T02:17:09.669794202+02:00 stderr P:y text";
        assert!(head(odd).expect("head").partial);
        for bad in [
            &b""[..],
            b"stdout F x",
            b"2016-10-06T00:17:09.669794202Z stdlog F x",
            b"2016-10-06T00:17:09.669794202Z stdout F",
        ] {
            assert_eq!(head(bad), None, "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn times() {
        let printed = |time: &str| {
            let mut out = Vec::new();
            push_time(time.as_bytes(), &mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(printed("2016-10-06T00:17:09.669794202Z"), "2016-10-06T00:17:09.669794202Z");
        assert_eq!(printed("2016-10-06T00:17:09.6Z"), "2016-10-06T00:17:09.600000000Z");
        assert_eq!(printed("2016-10-06T00:17:09Z"), "2016-10-06T00:17:09.000000000Z");
        assert_eq!(printed("2016-10-06T00:17:09.5-07:00"), "2016-10-06T00:17:09.500000000-07:00");
        let since = Since::new("2016-10-06T00:17:09.5Z".parse().expect("time"));
        assert!(since.admits(b"2016-10-06T00:17:09.500000000Z"));
        assert!(!since.admits(b"2016-10-06T00:17:09.499999999Z"));
        assert!(since.admits(b"2016-10-06T02:17:09.500000000+02:00"));
        assert!(!since.admits(b"2016-10-06T01:17:09.5+02:00"));
        assert!(!since.admits(b"never"));
    }

    proptest! {
        #[test]
        fn hostile_lines_do_not_panic(line in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = head(&line);
            let since = Since::new(Timestamp::UNIX_EPOCH);
            since.admits(&line);
            push_time(&line, &mut Vec::new());
        }

        /// The quick way and the general one agree wherever both apply.
        #[test]
        fn quick_and_general_agree(noise in "[ -~]{0,60}", at in 0_usize..41) {
            let mut line = b"2016-10-06T00:17:09.669794202Z stdout F text".to_vec();
            let end = line.len().min(at + noise.len());
            line[at..end].copy_from_slice(&noise.as_bytes()[..end - at]);
            if let (Some(quick), Some(general)) = (head(&line), general_head(&line)) {
                prop_assert_eq!(quick, general);
            }
        }
    }
}
