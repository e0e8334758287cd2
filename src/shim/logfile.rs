//! Container logs in the CRI format (kubelet's `pkg/kubelet/kuberuntime/logs`): `<time> <stream> <P|F> <text>`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::{Timestamp, tz::TimeZone};

use crate::sys::scratch::find_byte;

/// Longest text of one record in bytes, containerd's `max_container_log_line_size`; longer lines become several
/// records, all but the last marked `P`.
pub(super) const MAX_RECORD: usize = 16 << 10;

/// Which output a record came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// `<time> <stream> ` for all records of one read.
pub(super) fn record_prefix(now: Timestamp, stream: Stream) -> Vec<u8> {
    let stream = match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    };
    // All nine digits, always: then the text sorts as the time does.
    format!("{now:.9} {stream} ").into_bytes()
}

/// Takes a record: `F` (full) or `P` (partial), and its text in two parts.
pub(super) type Emit<'a> = dyn FnMut(u8, &[u8], &[u8]) + 'a;

/// Cuts a byte stream into records, keeping what has no newline yet.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Feeds bytes; calls `emit` for every record that is complete.
    pub(super) fn feed(&mut self, mut input: &[u8], emit: &mut Emit<'_>) {
        while !input.is_empty() {
            let newline = find_byte(b'\n', input);
            let (mut text, rest) = match newline {
                Some(at) => (&input[..at], &input[at + 1..]),
                None => (input, &[][..]),
            };
            while self.pending.len() + text.len() > MAX_RECORD {
                let (head, tail) = text.split_at(MAX_RECORD - self.pending.len());
                emit(b'P', &self.pending, head);
                self.pending.clear();
                text = tail;
            }
            if newline.is_some() {
                emit(b'F', &self.pending, text);
                self.pending.clear();
            } else {
                self.pending.extend_from_slice(text);
            }
            input = rest;
        }
        if self.pending.is_empty() {
            self.pending = Vec::new(); // most programs end their writes with a newline: keep no buffer for those
        }
    }

    /// What is left when the stream ends is a record as well: a partial one, for no newline followed it.
    pub(super) fn finish(&mut self, emit: &mut Emit<'_>) {
        if !self.pending.is_empty() {
            emit(b'P', &self.pending, &[]);
            self.pending = Vec::new();
        }
    }
}

/// A log file that is rotated by size.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    max_size: u64,
    max_files: usize,
}

impl LogFile {
    /// Opens (or continues) the file. `max_size` 0 never rotates.
    pub(super) fn open(path: &Path, max_size: u64, max_files: u32) -> io::Result<LogFile> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let file = open(path)?;
        let size = file.metadata()?.len();
        // Fewer than two files would mean to throw the log away as it is written (kubelet refuses it as well).
        let max_files = usize::try_from(max_files).unwrap_or(usize::MAX).max(2);
        Ok(LogFile { path: path.to_owned(), file, size, max_size, max_files })
    }

    /// Appends whole records. Returns the rotated file if this made one. After an error nothing of `records` is
    /// left in the file: a record is never cut.
    pub(super) fn append(&mut self, records: &[u8]) -> io::Result<Option<PathBuf>> {
        let len = u64::try_from(records.len()).unwrap_or(u64::MAX);
        let mut rotated = None;
        if self.max_size > 0 && self.size > 0 && self.size.saturating_add(len) > self.max_size {
            rotated = Some(self.rotate()?);
        }
        if let Err(error) = self.file.write_all(records) {
            self.file.set_len(self.size)?;
            return Err(error);
        }
        self.size += len;
        Ok(rotated)
    }

    /// `<path>.<YYYYMMDD-hhmmss>`, as kubelet names them, with a counter if that second has one already.
    fn rotate(&mut self) -> io::Result<PathBuf> {
        let stamp = Timestamp::now().to_zoned(TimeZone::UTC).strftime("%Y%m%d-%H%M%S").to_string();
        let named = |suffix: &str| PathBuf::from(format!("{}.{suffix}", self.path.display()));
        let taken = |path: &Path| path.exists() || PathBuf::from(format!("{}.gz", path.display())).exists();
        let mut target = named(&stamp);
        let mut counter = 1u32;
        while taken(&target) {
            target = named(&format!("{stamp}-{counter:04}"));
            counter += 1;
        }
        fs::rename(&self.path, &target)?;
        self.file = open(&self.path)?;
        self.size = 0;
        self.remove_excess()?;
        Ok(target)
    }

    fn remove_excess(&self) -> io::Result<()> {
        let (Some(dir), Some(name)) = (self.path.parent(), self.path.file_name()) else { return Ok(()) };
        let prefix = format!("{}.", name.to_string_lossy());
        let mut rotated: Vec<String> = fs::read_dir(dir)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| {
                name.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            })
            // A temporary file of the compressor belongs to the compressor.
            .filter(|name| !name.ends_with(".tmp"))
            .collect();
        rotated.sort_unstable();
        let excess = rotated.len().saturating_sub(self.max_files - 1);
        for name in &rotated[..excess] {
            fs::remove_file(dir.join(name))?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let mut records = Vec::new();
        let mut splitter = Splitter::default();
        let mut emit = |tag, a: &[u8], b: &[u8]| records.push((tag, [a, b].concat()));
        for chunk in chunks {
            splitter.feed(chunk, &mut emit);
        }
        splitter.finish(&mut emit);
        records
    }

    #[test]
    fn long_lines_become_partial_records() {
        let line = vec![b'x'; 2 * MAX_RECORD + 3];
        let records = split(&[&line, b"\nshort\n", &vec![b'y'; MAX_RECORD], b"\nend"]);
        let shape: Vec<_> = records.iter().map(|(tag, text)| (char::from(*tag), text.len())).collect();
        assert_eq!(shape, [('P', MAX_RECORD), ('P', MAX_RECORD), ('F', 3), ('F', 5), ('F', MAX_RECORD), ('P', 3)]);
    }

    #[test]
    fn empty_lines_are_records() {
        assert_eq!(split(&[b"\n\na\n"]), [(b'F', vec![]), (b'F', vec![]), (b'F', b"a".to_vec())]);
    }

    #[test]
    fn prefix_has_nine_digits_always() -> Result<(), jiff::Error> {
        let whole: Timestamp = "2026-01-02T03:04:05Z".parse()?;
        assert_eq!(record_prefix(whole, Stream::Stderr), b"2026-01-02T03:04:05.000000000Z stderr ");
        Ok(())
    }

    proptest! {
        #[test]
        fn nothing_is_lost_however_it_is_read(
            lines in proptest::collection::vec(proptest::collection::vec(1u8..=255, 0..40), 0..20),
            cuts in proptest::collection::vec(0usize..400, 0..8),
        ) {
            let mut bytes = Vec::new();
            for line in &lines {
                bytes.extend(line.iter().filter(|b| **b != b'\n'));
                bytes.push(b'\n');
            }
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            let joined: Vec<u8> = split(&chunks).into_iter().flat_map(|(_, mut text)| { text.push(b'\n'); text }).collect();
            prop_assert_eq!(joined, bytes);
        }
    }

    #[test]
    fn rotation_keeps_records_whole_and_files_few() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("0.log");
        let mut log = LogFile::open(&path, 100, 3)?;
        let record = [b'r'; 39].iter().copied().chain([b'\n']).collect::<Vec<u8>>();
        let mut rotated = 0;
        for _ in 0..10 {
            rotated += usize::from(log.append(&record)?.is_some());
        }
        assert_eq!(rotated, 4, "two records fit in a file");
        let mut names: Vec<_> = fs::read_dir(dir.path())?.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>()?;
        names.sort();
        assert_eq!(names.len(), 3);
        for name in names {
            assert_eq!(fs::read(&name)?, record.repeat(2), "{}", name.display());
        }
        Ok(())
    }
}
