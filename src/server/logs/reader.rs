//! Bytes of log files to bytes for the client. Synchronous: it runs on threads for blocking work.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::PathBuf,
};

use flate2::bufread::MultiGzDecoder;
use memchr::memchr;

use super::{
    files::{self, LogFile},
    options::{LogOptions, Streams},
    record::{self, Head, Since},
};

/// What is read from files at a time, in bytes. Lines longer than this are passed on in pieces.
const BUFFER: usize = 256 << 10;
/// A call returns when it has so many bytes for the client.
const ENOUGH: usize = 512 << 10;

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to read now.
    More,
    /// Everything there is was read; more may be written.
    CaughtUp,
    /// There will be no more.
    Done,
}

/// Reads the log of one container instance.
pub struct LogReader {
    directory: PathBuf,
    attempt: u32,
    options: Filter,
    follow: bool,
    /// The file being read is the first.
    sources: VecDeque<Source>,
    /// Latest rotation that is known of.
    last_rotation: Option<String>,
    /// A newer file exists; the one being read gets no more.
    superseded: bool,
    buffer: Vec<u8>,
    filled: usize,
    long_line: Option<LongLine>,
}

/// A line that does not fit into the buffer, after its first piece.
#[derive(Clone, Copy)]
struct LongLine {
    wanted: bool,
    partial: bool,
}

struct Filter {
    streams: Streams,
    since: Option<Since>,
    timestamps: bool,
    /// Bytes that may still be given out.
    remaining: u64,
    /// What was given out last ended a line.
    at_line_start: bool,
}

struct Source {
    content: Content,
    identity: (u64, u64),
    /// Bytes to read; what is appended later is not wanted.
    left: Option<u64>,
}

enum Content {
    Plain(File),
    Gzip(Box<MultiGzDecoder<BufReader<File>>>),
}

impl Source {
    fn new(log: LogFile, offset: u64, bounded: bool) -> io::Result<Self> {
        let LogFile { mut file, gzip, identity, size, .. } = log;
        if gzip {
            let mut decoder = Box::new(MultiGzDecoder::new(BufReader::with_capacity(BUFFER, file)));
            io::copy(&mut decoder.by_ref().take(offset), &mut io::sink())?;
            return Ok(Self { content: Content::Gzip(decoder), identity, left: None });
        }
        file.seek(SeekFrom::Start(offset))?;
        let left = bounded.then(|| size.saturating_sub(offset));
        Ok(Self { content: Content::Plain(file), identity, left })
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = self.left.map_or(buffer.len(), |left| usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len()));
        let buffer = &mut buffer[..room];
        let count = match &mut self.content {
            Content::Plain(file) => file.read(buffer)?,
            Content::Gzip(decoder) => decoder.read(buffer)?,
        };
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        }
        Ok(count)
    }
}

impl LogReader {
    /// Opens the files and finds the place to start.
    ///
    /// # Errors
    /// I/O errors; a log that does not exist yet is empty, not an error.
    pub fn open(directory: PathBuf, attempt: u32, options: &LogOptions) -> io::Result<Self> {
        let mut all = files::open_all(&directory, attempt)?;
        let last_rotation = all.iter().filter_map(|file| file.rotated.clone()).max();
        if let Some(since) = options.since {
            // A file that was last written before then holds nothing of interest. The current one is kept in any case.
            all.retain(|file| file.rotated.is_none() || file.modified >= since);
        }
        let start = match options.tail_lines {
            Some(lines) => files::tail(&all, lines)?,
            None => files::Start::default(),
        };
        let mut sources = VecDeque::new();
        for (place, file) in all.into_iter().enumerate().skip(start.file) {
            let offset = if place == start.file { start.offset } else { 0 };
            // Without `follow` the end is where it is now: a busy writer must not keep us forever.
            sources.push_back(Source::new(file, offset, !options.follow)?);
        }
        Ok(Self {
            directory,
            attempt,
            options: Filter {
                streams: options.streams,
                since: options.since.map(Since::new),
                timestamps: options.timestamps,
                remaining: options.limit_bytes.unwrap_or(u64::MAX),
                at_line_start: true,
            },
            follow: options.follow,
            sources,
            last_rotation,
            superseded: false,
            buffer: vec![0; BUFFER],
            filled: 0,
            long_line: None,
        })
    }

    /// Appends to `out` what there is for the client. `complete` says that nothing was going to be written any more
    /// *before* this call.
    ///
    /// # Errors
    /// I/O errors; what is in `out` is valid all the same.
    pub fn fill(&mut self, out: &mut Vec<u8>, complete: bool) -> io::Result<Progress> {
        while self.options.remaining > 0 {
            if out.len() >= ENOUGH {
                return Ok(Progress::More);
            }
            let count = match self.sources.front_mut() {
                Some(source) => source.read(&mut self.buffer[self.filled..])?,
                None => 0,
            };
            if count > 0 {
                self.filled += count;
                self.process(out);
                continue;
            }
            // The end of this file, as it is now.
            if self.sources.len() > 1 || self.superseded {
                self.flush_unfinished(out);
                let finished = self.sources.pop_front();
                if self.sources.is_empty() {
                    self.superseded = false;
                    self.open_newer(finished)?;
                }
            } else if !self.follow {
                self.flush_unfinished(out);
                return Ok(Progress::Done);
            } else if files::is_superseded(&self.directory, self.attempt, self.identity())? {
                // Read once more: it may have been written to between our last read and its end.
                self.superseded = true;
            } else if complete {
                self.flush_unfinished(out);
                return Ok(Progress::Done);
            } else {
                return Ok(Progress::CaughtUp);
            }
        }
        Ok(Progress::Done)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.sources.front().map(|source| source.identity)
    }

    /// Opens what was written after `finished`, the file that was current until now.
    fn open_newer(&mut self, finished: Option<Source>) -> io::Result<()> {
        let mut all = files::open_all(&self.directory, self.attempt)?;
        let known = finished.as_ref().map(|source| source.identity);
        let newer = match all.iter().position(|file| Some(file.identity) == known) {
            Some(place) => place + 1,
            None => {
                let later = |file: &LogFile| file.rotated.is_none() || file.rotated > self.last_rotation;
                let mut place = all.iter().position(later).unwrap_or(all.len());
                // Ours may have been compressed meanwhile: then it is the first of them, under another identity.
                if let (Some(Source { content: Content::Plain(file), .. }), Some(candidate)) =
                    (finished, all.get(place))
                    && candidate.gzip
                    && candidate.fingerprint()? == fingerprint(file)?
                {
                    place += 1;
                }
                place
            }
        };
        self.last_rotation = all.iter().filter_map(|file| file.rotated.clone()).max();
        for file in all.drain(newer..) {
            self.sources.push_back(Source::new(file, 0, false)?);
        }
        Ok(())
    }

    /// Passes on the complete lines in the buffer and keeps the rest.
    fn process(&mut self, out: &mut Vec<u8>) {
        let mut start = 0;
        while let Some(length) = memchr(b'\n', &self.buffer[start..self.filled]) {
            let line = &self.buffer[start..=start + length];
            start += length + 1;
            if let Some(long) = self.long_line.take() {
                let content = if long.partial { &line[..length] } else { line };
                if long.wanted {
                    self.options.give(content, out);
                }
                continue;
            }
            // Lines that are not records are nobody's output; the kubelet drops them too.
            if let Some(head) = record::head(line) {
                let content = if head.partial { &line[head.length..length] } else { &line[head.length..] };
                if self.options.begin(&head, out) {
                    self.options.give(content, out);
                }
            }
            if self.options.remaining == 0 {
                return;
            }
        }
        if start == 0 && self.filled == self.buffer.len() {
            self.pass_piece(out);
            return;
        }
        self.buffer.copy_within(start..self.filled, 0);
        self.filled -= start;
    }

    /// The buffer is one piece of a line that does not fit.
    fn pass_piece(&mut self, out: &mut Vec<u8>) {
        let piece = &self.buffer[..self.filled];
        let long = match self.long_line {
            Some(long) => {
                if long.wanted {
                    self.options.give(piece, out);
                }
                long
            }
            None => match record::head(piece) {
                Some(head) => {
                    let wanted = self.options.begin(&head, out);
                    if wanted {
                        self.options.give(&piece[head.length..], out);
                    }
                    LongLine { wanted, partial: head.partial }
                }
                None => LongLine { wanted: false, partial: false },
            },
        };
        self.long_line = Some(long);
        self.filled = 0;
    }

    /// The file ends within a line: what is there of it belongs to the output.
    fn flush_unfinished(&mut self, out: &mut Vec<u8>) {
        if self.filled > 0 {
            self.pass_piece(out);
        }
        self.long_line = None;
    }
}

fn fingerprint(file: File) -> io::Result<Vec<u8>> {
    // Only the content matters to a fingerprint.
    let log = LogFile { file, gzip: false, rotated: None, identity: (0, 0), size: 0, modified: jiff::Timestamp::MIN };
    log.fingerprint()
}

impl Filter {
    /// Whether the record is wanted; writes its time if that is.
    fn begin(&mut self, head: &Head<'_>, out: &mut Vec<u8>) -> bool {
        let stream = match self.streams {
            Streams::All => true,
            Streams::Stdout => !head.stderr,
            Streams::Stderr => head.stderr,
        };
        let wanted = stream && self.since.as_ref().is_none_or(|since| since.admits(head.time));
        if wanted && self.timestamps && self.at_line_start {
            let before = out.len();
            record::push_time(head.time, out);
            out.push(b' ');
            let added = out.len() - before;
            let allowed = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(added);
            out.truncate(before + allowed);
            self.spend(allowed);
        }
        wanted
    }

    fn give(&mut self, content: &[u8], out: &mut Vec<u8>) {
        let allowed = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(content.len());
        out.extend_from_slice(&content[..allowed]);
        self.spend(allowed);
        self.at_line_start = content.last().is_none_or(|byte| *byte == b'\n');
    }

    fn spend(&mut self, count: usize) {
        if self.remaining != u64::MAX {
            self.remaining = self.remaining.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fmt::Write as _, path::Path};

    use super::*;

    fn read(directory: &Path, options: &LogOptions) -> String {
        let mut reader = LogReader::open(directory.to_owned(), 0, options).expect("open");
        let (mut text, mut out) = (Vec::new(), Vec::new());
        loop {
            let progress = reader.fill(&mut out, true).expect("fill");
            text.append(&mut out);
            match progress {
                Progress::More => {}
                Progress::CaughtUp => panic!("nothing more is written"),
                Progress::Done => return String::from_utf8(text).expect("text"),
            }
        }
    }

    const LOG: &str = "\
2024-01-01T00:00:01.000000001Z stdout F one
2024-01-01T00:00:02Z stderr P tw
2024-01-01T00:00:02.5Z stderr F o
not a record
2024-01-01T00:00:03.000000003Z stdout F 
2024-01-01T00:00:04.000000004Z stdout F four
";

    #[test]
    fn options_apply() {
        let directory = tempfile::tempdir().expect("dir");
        std::fs::write(directory.path().join("0.log"), LOG).expect("write");
        let default = LogOptions::default();
        let path = directory.path();
        assert_eq!(read(path, &default), "one\ntwo\n\nfour\n");
        assert_eq!(read(path, &LogOptions { streams: Streams::Stderr, ..default.clone() }), "two\n");
        assert_eq!(read(path, &LogOptions { streams: Streams::Stdout, ..default.clone() }), "one\n\nfour\n");
        assert_eq!(read(path, &LogOptions { limit_bytes: Some(6), ..default.clone() }), "one\ntw");
        assert_eq!(read(path, &LogOptions { tail_lines: Some(2), ..default.clone() }), "\nfour\n");
        assert_eq!(read(path, &LogOptions { tail_lines: Some(0), ..default.clone() }), "");
        let since = "2024-01-01T00:00:03Z".parse().ok();
        assert_eq!(read(path, &LogOptions { since, ..default.clone() }), "\nfour\n");
        let timestamps = LogOptions { timestamps: true, ..default.clone() };
        let expected = "\
2024-01-01T00:00:01.000000001Z one
2024-01-01T00:00:02.000000000Z two
2024-01-01T00:00:03.000000003Z 
2024-01-01T00:00:04.000000004Z four
";
        assert_eq!(read(path, &timestamps), expected);
        assert_eq!(read(path, &LogOptions { limit_bytes: Some(12), ..timestamps }), "2024-01-01T0");
        assert_eq!(read(&path.join("."), &LogOptions { tail_lines: Some(100), ..default }), "one\ntwo\n\nfour\n");
    }

    #[test]
    fn long_lines_pass_in_pieces_and_the_last_may_be_unfinished() {
        let directory = tempfile::tempdir().expect("dir");
        let long = "x".repeat(3 * BUFFER + 17);
        let log = format!(
            "2024-01-01T00:00:01Z stdout P {long}\n2024-01-01T00:00:01Z stdout F {long}\n{long}\n2024-01-01T00:00:01Z stdout F end"
        );
        std::fs::write(directory.path().join("0.log"), log).expect("write");
        assert_eq!(read(directory.path(), &LogOptions::default()), format!("{long}{long}\nend"));
    }

    #[test]
    fn rotation_at_any_moment_loses_and_doubles_nothing() {
        let directory = tempfile::tempdir().expect("dir");
        let current = directory.path().join("0.log");
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let mut reader = LogReader::open(directory.path().to_owned(), 0, &options).expect("open");
        let (mut out, mut expected) = (Vec::new(), String::new());
        let mut number = 0;
        let mut write = |count: usize| {
            let mut text = String::new();
            for _ in 0..count {
                number += 1;
                writeln!(text, "2024-01-01T00:00:00.{number:09}Z stdout F line {number}").expect("write");
                writeln!(expected, "line {number}").expect("write");
            }
            let mut file = File::options().create(true).append(true).open(&current).expect("open");
            io::Write::write_all(&mut file, text.as_bytes()).expect("write");
        };
        let rotate = |stamp: u32| {
            let rotated = directory.path().join(format!("0.log.20240101-{stamp:06}"));
            std::fs::rename(&current, rotated).expect("rename");
        };
        let compress = |stamp: u32| {
            let rotated = directory.path().join(format!("0.log.20240101-{stamp:06}"));
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            io::Write::write_all(&mut encoder, &std::fs::read(&rotated).expect("read")).expect("compress");
            let name = format!("0.log.20240101-{stamp:06}.gz");
            std::fs::write(directory.path().join(name), encoder.finish().expect("compress")).expect("write");
            std::fs::remove_file(rotated).expect("remove");
        };
        assert_eq!(reader.fill(&mut out, false).expect("fill"), Progress::CaughtUp, "no file yet");
        write(3);
        assert_eq!(reader.fill(&mut out, false).expect("fill"), Progress::CaughtUp);
        rotate(1);
        assert_eq!(reader.fill(&mut out, false).expect("fill"), Progress::CaughtUp, "renamed, nothing new yet");
        write(2);
        rotate(2);
        write(2);
        rotate(3);
        write(2);
        // Two whole files were rotated away while nobody read, and the one being read was compressed.
        compress(1);
        compress(2);
        assert_eq!(reader.fill(&mut out, false).expect("fill"), Progress::CaughtUp);
        write(1);
        rotate(4);
        std::fs::remove_file(directory.path().join("0.log.20240101-000004")).expect("remove");
        write(1);
        assert_eq!(reader.fill(&mut out, true).expect("fill"), Progress::Done);
        assert_eq!(String::from_utf8(out).expect("text"), expected);
    }

    #[test]
    fn a_busy_writer_does_not_keep_a_reader_that_does_not_follow() {
        let directory = tempfile::tempdir().expect("dir");
        let path = directory.path().join("0.log");
        std::fs::write(&path, LOG).expect("write");
        let mut reader = LogReader::open(directory.path().to_owned(), 0, &LogOptions::default()).expect("open");
        std::fs::write(&path, LOG.repeat(2)).expect("write");
        let mut out = Vec::new();
        assert_eq!(reader.fill(&mut out, false).expect("fill"), Progress::Done);
        assert_eq!(out, b"one\ntwo\n\nfour\n");
    }
}
