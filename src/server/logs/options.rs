//! `PodLogOptions`, as the kubelet takes them from a query.

use jiff::{SignedDuration, Timestamp};

/// Which of a container's streams are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streams {
    /// Both, as written.
    #[default]
    All,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What part of a log is wanted, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on with what is written until the container ends.
    pub follow: bool,
    /// The instance before the current one.
    pub previous: bool,
    /// Put its time before every line.
    pub timestamps: bool,
    /// Only lines of this time or later.
    pub since: Option<Timestamp>,
    /// Only so many lines from the end.
    pub tail_lines: Option<u64>,
    /// Only so many bytes.
    pub limit_bytes: Option<u64>,
    /// Only these streams.
    pub streams: Streams,
}

/// A query that cannot be served. Terminal: the client has to ask differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// 400: a value of the wrong type.
    #[error("{{\"message\": \"Unable to decode query.\"}} ({parameter}={value:?})")]
    Undecodable {
        /// Its name.
        parameter: &'static str,
        /// Its value.
        value: String,
    },
    /// 422: a value out of range, or values that exclude each other.
    #[error("{{\"message\": \"Invalid request.\"}} ({0})")]
    Invalid(&'static str),
}

impl LogOptions {
    /// Reads decoded query parameters; of repeated ones the first counts. `now` is the time `sinceSeconds` counts from.
    ///
    /// # Errors
    /// [`OptionsError`], by the rules of the kubelet's `ValidatePodLogOptions`.
    pub fn from_query<'a>(
        pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone,
        now: Timestamp,
    ) -> Result<Self, OptionsError> {
        let get = |name: &str| pairs.clone().find(|(key, _)| *key == name).map(|(_, value)| value);
        let integer = |parameter: &'static str| {
            get(parameter).map(|value| value.parse::<i64>().map_err(|_| undecodable(parameter, value))).transpose()
        };
        let flag = |parameter: &'static str| get(parameter).is_some_and(|value| !matches!(value, "" | "0" | "false"));
        let tail = match get("tail") {
            Some("all") => None,
            Some(value) if !value.is_empty() => Some(value.parse::<i64>().map_err(|_| undecodable("tail", value))?),
            _ => integer("tailLines")?,
        };
        let tail_lines = tail
            .map(u64::try_from)
            .transpose()
            .map_err(|_| OptionsError::Invalid("tailLines: must be greater than or equal to 0"))?;
        let limit = integer("limitBytes")?;
        let limit_bytes = limit.map(|limit| {
            u64::try_from(limit)
                .ok()
                .filter(|limit| *limit > 0)
                .ok_or(OptionsError::Invalid("limitBytes: must be greater than 0"))
        });
        let since_time = get("sinceTime")
            .filter(|value| !value.is_empty())
            .map(|value| value.parse::<Timestamp>().map_err(|_| undecodable("sinceTime", value)))
            .transpose()?;
        let since = match (integer("sinceSeconds")?, since_time) {
            (Some(_), Some(_)) => {
                return Err(OptionsError::Invalid("at most one of sinceTime or sinceSeconds may be specified"));
            }
            (Some(seconds), None) if seconds < 1 => {
                return Err(OptionsError::Invalid("sinceSeconds: must be greater than 0"));
            }
            // A time before the beginning of time excludes nothing.
            (Some(seconds), None) => now.checked_sub(SignedDuration::from_secs(seconds)).ok(),
            (None, time) => time,
        };
        let streams = match get("stream") {
            None | Some("" | "All") => Streams::All,
            Some("Stdout") => Streams::Stdout,
            Some("Stderr") => Streams::Stderr,
            Some(_) => return Err(OptionsError::Invalid("stream: must be one of All, Stdout, Stderr")),
        };
        if streams != Streams::All && tail_lines.is_some() {
            return Err(OptionsError::Invalid("tailLines and a specific stream are mutually exclusive for now"));
        }
        Ok(Self {
            follow: flag("follow"),
            previous: flag("previous"),
            timestamps: flag("timestamps"),
            since,
            tail_lines,
            limit_bytes: limit_bytes.transpose()?,
            streams,
        })
    }
}

fn undecodable(parameter: &'static str, value: &str) -> OptionsError {
    OptionsError::Undecodable { parameter, value: value.chars().take(64).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &[(&'static str, &'static str)]) -> Result<LogOptions, OptionsError> {
        LogOptions::from_query(query.iter().copied(), Timestamp::from_second(1_000_000).expect("time"))
    }

    #[test]
    fn everything() {
        let options = parse(&[
            ("follow", "true"),
            ("previous", "false"),
            ("timestamps", "1"),
            ("sinceSeconds", "10"),
            ("tailLines", "0"),
            ("limitBytes", "5"),
            ("stream", "All"),
        ]);
        let expected = LogOptions {
            follow: true,
            previous: false,
            timestamps: true,
            since: Timestamp::from_second(999_990).ok(),
            tail_lines: Some(0),
            limit_bytes: Some(5),
            streams: Streams::All,
        };
        assert_eq!(options, Ok(expected));
        assert_eq!(parse(&[]), Ok(LogOptions::default()));
        assert_eq!(parse(&[("tail", "all"), ("tailLines", "3")]).map(|options| options.tail_lines), Ok(None));
        assert_eq!(parse(&[("tail", "7"), ("tailLines", "3")]).map(|options| options.tail_lines), Ok(Some(7)));
        let since = parse(&[("sinceTime", "2024-01-01T00:00:00+01:00")]).expect("options").since.expect("since");
        assert_eq!(since.to_string(), "2023-12-31T23:00:00Z");
    }

    #[test]
    fn refused() {
        for query in [("tailLines", "-1"), ("limitBytes", "0"), ("sinceSeconds", "0"), ("stream", "stdout")] {
            assert!(matches!(parse(&[query]), Err(OptionsError::Invalid(_))), "{query:?}");
        }
        for query in [("tailLines", "x"), ("sinceTime", "yesterday"), ("limitBytes", "1.5")] {
            assert!(matches!(parse(&[query]), Err(OptionsError::Undecodable { .. })), "{query:?}");
        }
        assert!(parse(&[("sinceSeconds", "1"), ("sinceTime", "2024-01-01T00:00:00Z")]).is_err());
        assert!(parse(&[("stream", "Stdout"), ("tailLines", "1")]).is_err());
    }
}
