//! Which files belong to a container instance, in order, and where the last n lines begin.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufReader, Read},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use flate2::bufread::MultiGzDecoder;
use jiff::Timestamp;
use memchr::{memchr, memrchr};
use rustix::fs::{Mode, OFlags};

use super::record;

/// How often the files are listed anew because they changed under our hands.
const LIST_ATTEMPTS: usize = 10;
/// Block in which files are searched backwards, in bytes.
const BLOCK: usize = 64 << 10;
/// More than the longest head of a record, in bytes.
const HEAD: usize = 128;
/// Enough of a file's beginning to know it again, in bytes: it starts with a time in nanoseconds.
const FINGERPRINT: usize = 256;

/// One file of a log, open.
#[derive(Debug)]
pub struct LogFile {
    /// The file.
    pub file: File,
    /// It is compressed.
    pub gzip: bool,
    /// When it was rotated, as its name has it; `None` for the current file.
    pub rotated: Option<String>,
    /// Device and inode.
    pub identity: (u64, u64),
    /// Size at the time of opening, in bytes.
    pub size: u64,
    /// When it was last written.
    pub modified: Timestamp,
}

impl LogFile {
    fn open(path: &Path, gzip: bool, rotated: Option<String>) -> io::Result<Self> {
        // The files are the node's own. Whoever could put a link here must not choose what is read.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other(format!("{} is not a regular file", path.display())));
        }
        let modified = metadata.modified()?.try_into().unwrap_or(Timestamp::MAX);
        let identity = (metadata.dev(), metadata.ino());
        Ok(Self { file, gzip, rotated, identity, size: metadata.len(), modified })
    }

    /// The beginning of the file's content.
    pub fn fingerprint(&self) -> io::Result<Vec<u8>> {
        let mut beginning = vec![0; FINGERPRINT];
        let mut filled = 0;
        let mut decoder = self.gzip.then(|| self.inflated());
        while filled < beginning.len() {
            let rest = &mut beginning[filled..];
            let count = match &mut decoder {
                Some(decoder) => decoder.read(rest)?,
                None => self.file.read_at(rest, u64::try_from(filled).unwrap_or(u64::MAX))?,
            };
            if count == 0 {
                break;
            }
            filled += count;
        }
        beginning.truncate(filled);
        Ok(beginning)
    }

    fn inflated(&self) -> impl Read + '_ {
        MultiGzDecoder::new(BufReader::with_capacity(BLOCK, At { file: &self.file, offset: 0 }))
    }
}

/// Reads a file from an offset of its own, without moving the file's.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += u64::try_from(count).unwrap_or(0);
        Ok(count)
    }
}

/// Name of an instance's current file.
pub fn current_name(attempt: u32) -> String {
    format!("{attempt}.log")
}

/// Opens the files of an instance, oldest first; the current one, if it exists, is the last.
///
/// # Errors
/// I/O errors, or if rotation keeps changing the files.
pub fn open_all(directory: &Path, attempt: u32) -> io::Result<Vec<LogFile>> {
    for _ in 0..LIST_ATTEMPTS {
        if let Some(files) = try_open_all(directory, attempt)? {
            return Ok(files);
        }
    }
    Err(io::Error::other(format!("log files in {} keep changing", directory.display())))
}

fn try_open_all(directory: &Path, attempt: u32) -> io::Result<Option<Vec<LogFile>>> {
    let current = current_name(attempt);
    let path = directory.join(&current);
    let newest = absent(LogFile::open(&path, false, None))?;
    let mut names: Vec<(String, bool)> = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        let Some(stamp) = name.strip_prefix(&current).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let (stamp, gzip) = stamp.strip_suffix(".gz").map_or((stamp, false), |stamp| (stamp, true));
        // A file that is being compressed (`.tmp`) has its original beside it.
        if stamp.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') && !stamp.is_empty() {
            names.push((stamp.to_owned(), gzip));
        }
    }
    // If both exist, compression is complete but the original is not removed yet: the original comes first.
    names.sort_unstable();
    names.dedup_by(|next, kept| next.0 == kept.0);
    let mut files = Vec::with_capacity(names.len() + 1);
    for (stamp, gzip) in names {
        let suffix = if gzip { ".gz" } else { "" };
        let rotated = directory.join(format!("{current}.{stamp}{suffix}"));
        match absent(LogFile::open(&rotated, gzip, Some(stamp)))? {
            Some(file) => files.push(file),
            // Compressed or removed since it was listed.
            None => return Ok(None),
        }
    }
    let identity = newest.as_ref().map(|file| file.identity);
    let now = absent(LogFile::open(&path, false, None))?.map(|file| file.identity);
    if identity != now {
        return Ok(None);
    }
    files.extend(newest);
    Ok(Some(files))
}

fn absent(outcome: io::Result<LogFile>) -> io::Result<Option<LogFile>> {
    match outcome {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the instance has a current file other than the one given.
pub fn is_superseded(directory: &Path, attempt: u32, identity: Option<(u64, u64)>) -> io::Result<bool> {
    match std::fs::symlink_metadata(directory.join(current_name(attempt))) {
        Ok(metadata) => Ok(identity != Some((metadata.dev(), metadata.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where reading starts: a file by its place in the list, and an offset into its (inflated) content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Place of the file.
    pub file: usize,
    /// Offset, in bytes.
    pub offset: u64,
}

/// Finds where the last `lines` lines begin. A line that was written in several records counts once, with its
/// first record found; an unfinished record at the very end does not count.
///
/// # Errors
/// I/O errors.
pub fn tail(files: &[LogFile], lines: u64) -> io::Result<Start> {
    let mut search = Search { wanted: lines, found: 0, any: false };
    for (place, file) in files.iter().enumerate().rev() {
        let offset = if file.gzip { search.forward(file)? } else { search.backward(file)? };
        if let Some(offset) = offset {
            return Ok(Start { file: place, offset });
        }
    }
    Ok(Start::default())
}

struct Search {
    wanted: u64,
    found: u64,
    /// A record was seen: only the last one of all can be the open end of a line.
    any: bool,
}

impl Search {
    /// Takes note of the record before those already seen; true if it is one too many.
    fn one_more(&mut self, head: &[u8]) -> bool {
        let last = !std::mem::replace(&mut self.any, true);
        let ends_line = last || record::head(head).is_none_or(|head| !head.partial);
        self.found += u64::from(ends_line);
        self.found > self.wanted
    }

    fn backward(&mut self, log: &LogFile) -> io::Result<Option<u64>> {
        let length = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let mut buffer = vec![0; BLOCK + HEAD];
        let mut right = log.size;
        // The start of the record seen last, which is the end of the next one.
        let mut start = log.size;
        let mut complete = false;
        while right > 0 {
            let left = right.saturating_sub(length(BLOCK));
            let block = usize::try_from(right - left).unwrap_or(BLOCK);
            let with_head = usize::try_from((log.size - left).min(length(block + HEAD))).unwrap_or(block);
            log.file.read_exact_at(&mut buffer[..with_head], left)?;
            let mut end = block;
            loop {
                let newline = memrchr(b'\n', &buffer[..end]);
                // Without a newline the record goes on to the left, unless the file begins here.
                if newline.is_none() && left > 0 {
                    break;
                }
                let begin = newline.map_or(0, |at| at + 1);
                let position = left + length(begin);
                if position < start {
                    let terminated = complete || start < log.size;
                    if terminated && self.one_more(&buffer[begin..with_head]) {
                        return Ok(Some(start));
                    }
                    start = position;
                }
                complete |= newline.is_some() && position == log.size;
                match newline {
                    Some(at) => end = at,
                    None => break,
                }
            }
            right = left;
        }
        Ok(None)
    }

    fn forward(&mut self, log: &LogFile) -> io::Result<Option<u64>> {
        let missing = usize::try_from(self.wanted - self.found).unwrap_or(usize::MAX);
        let mut ends: VecDeque<u64> = VecDeque::new();
        let mut total = 0_u64;
        let mut offset = 0_u64;
        let mut head: Vec<u8> = Vec::with_capacity(HEAD);
        let mut content = log.inflated();
        let mut buffer = vec![0; BLOCK];
        loop {
            let count = content.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let newline = memchr(b'\n', rest);
                let (line, after) = rest.split_at(newline.map_or(rest.len(), |at| at + 1));
                head.extend_from_slice(&line[..line.len().min(HEAD - head.len())]);
                offset += u64::try_from(line.len()).unwrap_or(0);
                rest = after;
                if newline.is_some() {
                    if record::head(&head).is_none_or(|head| !head.partial) {
                        total += 1;
                        ends.push_back(offset);
                        if ends.len() > missing.saturating_add(1) {
                            ends.pop_front();
                        }
                    }
                    head.clear();
                }
            }
        }
        self.any = true;
        self.found += total;
        Ok(if self.found > self.wanted { ends.front().copied() } else { None })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    use super::*;

    fn record(number: usize, tag: char, text: &str) -> String {
        format!("2024-01-01T00:00:00.{number:09}Z stdout {tag} {text}\n")
    }

    fn compress(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text.as_bytes()).expect("compress");
        encoder.finish().expect("compress")
    }

    #[test]
    fn files_of_one_instance_in_order() {
        let directory = tempfile::tempdir().expect("dir");
        let write = |name: &str, content: &[u8]| std::fs::write(directory.path().join(name), content).expect("write");
        write("1.log", b"new");
        write("1.log.20240102-000000", b"middle");
        write("1.log.20240101-000000.gz", &compress("old"));
        write("1.log.20240102-000000.gz", b"complete, but its original is still there");
        write("1.log.20240103-000000.tmp", b"being compressed");
        write("0.log", b"another instance");
        write("11.log", b"another instance");
        let files = open_all(directory.path(), 1).expect("files");
        let texts: Vec<_> = files.iter().map(|file| file.fingerprint().expect("read")).collect();
        assert_eq!(texts, [&b"old"[..], b"middle", b"new"]);
        assert!(open_all(directory.path(), 7).expect("files").is_empty());
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("5.log")).expect("symlink");
        assert!(open_all(directory.path(), 5).is_err(), "links are not followed");
    }

    #[test]
    fn an_unfinished_record_does_not_count() {
        let directory = tempfile::tempdir().expect("dir");
        let (first, second) = (record(1, 'F', "one"), record(2, 'F', "two"));
        std::fs::write(directory.path().join("0.log"), format!("{first}{second}2024-01-01T00")).expect("write");
        let files = open_all(directory.path(), 0).expect("files");
        assert_eq!(tail(&files, 1).expect("tail").offset, u64::try_from(first.len()).expect("length"));
        assert_eq!(tail(&files, 2).expect("tail").offset, 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Against counting in memory; records as long as blocks, and files of either kind.
        #[test]
        fn tail_counts_lines(
            records in prop::collection::vec((any::<bool>(), prop_oneof![4 => 0_usize..50, 1 => 0_usize..70_000]), 0..30),
            split in 0_usize..30, gzip: bool, wanted in 0_u64..20,
        ) {
            let directory = tempfile::tempdir().expect("dir");
            let all: Vec<String> = records.iter().enumerate()
                .map(|(n, (partial, length))| record(n, if *partial { 'P' } else { 'F' }, &"x".repeat(*length))).collect();
            let split = split.min(all.len());
            let (old, new) = (all[..split].concat(), all[split..].concat());
            std::fs::write(directory.path().join("0.log"), &new).expect("write");
            if gzip {
                std::fs::write(directory.path().join("0.log.20240101-000000.gz"), compress(&old)).expect("write");
            } else {
                std::fs::write(directory.path().join("0.log.20240101-000000"), &old).expect("write");
            }
            // Ends of lines: final records, and the very last record if it is in the current file or uncompressed.
            let mut lines = 0;
            let mut expected = 0;
            for n in (0..all.len()).rev() {
                let open_end = n + 1 == all.len() && (n >= split || !gzip);
                lines += u64::from(!records[n].0 || open_end);
                if lines > wanted {
                    expected = all[..=n].concat().len();
                    break;
                }
            }
            let files = open_all(directory.path(), 0).expect("files");
            let start = tail(&files, wanted).expect("tail");
            let before: usize = if start.file == 1 { old.len() } else { 0 };
            prop_assert_eq!(before + usize::try_from(start.offset).expect("offset"), expected);
        }
    }
}
