//! A bounded reader of tar streams: POSIX ustar, PAX and GNU (`tar(5)`, POSIX.1-2017 `pax`).
//!
//! Header fields are decoded by the `tar` crate. Its own iterator is not used because it reads a PAX or long-name
//! header of any announced size into memory and turns the holes of a sparse file into zeros; both let a small hostile
//! layer exhaust the node.

use std::io::{self, BufRead};

use tar::{EntryType, Header};

/// Size of a tar record.
const BLOCK: u64 = 512;
/// Largest PAX header or long name. Extended attributes are at most 64 KiB each.
const MAX_EXTENSION: u64 = 1 << 20;
/// Most data segments of one sparse file.
const MAX_SEGMENTS: usize = 1 << 16;
/// Largest logical size of a sparse file: its holes cost nothing on the wire, so only a limit bounds them.
const MAX_SPARSE: u64 = 1 << 40;

/// One member of an archive, without its data.
#[derive(Debug)]
pub struct Entry {
    /// Name as written, `..` and slashes included.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time: seconds since the epoch and nanoseconds.
    pub mtime: (i64, u32),
    /// `SCHILY.xattr.*` records: name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Logical size in bytes of a regular file.
    pub size: u64,
    /// Offset and length of the data segments of a sparse file; `None` if the whole file is data.
    pub segments: Option<Vec<(u64, u64)>>,
}

/// The kind of an [`Entry`].
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A hard link and the name of an earlier member.
    Hardlink(Vec<u8>),
    /// A character device: major and minor.
    Char(u32, u32),
    /// A block device: major and minor.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Iterates over a tar stream; see the module.
pub struct Archive<R> {
    reader: R,
    /// Bytes of the current member's data not read yet.
    remaining: u64,
    /// Zero bytes after them, up to the next record.
    padding: u64,
}

fn invalid(detail: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail.into())
}

impl<R: BufRead> Archive<R> {
    /// Reads from `reader`, which is at the first header.
    pub fn new(reader: R) -> Self {
        Self { reader, remaining: 0, padding: 0 }
    }

    /// The reader, wherever it stands.
    pub fn into_inner(self) -> R {
        self.reader
    }

    /// The next member; skips what was not read of the one before. `None` at the end of the archive.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let (mut long_path, mut long_link, mut pax) = (None, None, None);
        loop {
            self.skip_data()?;
            let Some(header) = self.read_header()? else {
                if long_path.is_some() || long_link.is_some() || pax.is_some() {
                    return Err(invalid("the archive ends after an extension header"));
                }
                return Ok(None);
            };
            let size = or_zero(&header.as_old().size, header.entry_size())?;
            match header.entry_type() {
                EntryType::GNULongName => set_once(&mut long_path, self.read_extension(size)?)?,
                EntryType::GNULongLink => set_once(&mut long_link, self.read_extension(size)?)?,
                EntryType::XHeader => set_once(&mut pax, self.read_extension(size)?)?,
                // Defaults for all members (git writes a comment): container tools ignore it, as does Go.
                EntryType::XGlobalHeader => {
                    self.read_extension(size)?;
                }
                _ => return self.member(&header, size, long_path, long_link, pax).map(Some),
            }
        }
    }

    /// Passes `length` bytes of the current member's data to `sink` in pieces.
    pub fn read_data(&mut self, length: u64, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut left = length.min(self.remaining);
        if left < length {
            return Err(invalid("a segment is longer than the member"));
        }
        while left > 0 {
            let piece = self.reader.fill_buf()?;
            if piece.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends inside a member"));
            }
            let take = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            sink(&piece[..take])?;
            self.reader.consume(take);
            left -= take as u64;
            self.remaining -= take as u64;
        }
        Ok(())
    }

    fn skip_data(&mut self) -> io::Result<()> {
        self.remaining += std::mem::take(&mut self.padding);
        self.read_data(self.remaining, |_| Ok(()))
    }

    /// The next header; `None` at a zero record or a clean end of the stream.
    fn read_header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        if self.reader.fill_buf()?.is_empty() {
            return Ok(None);
        }
        self.reader.read_exact(header.as_mut_bytes())?;
        let bytes = header.as_bytes();
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum = bytes.iter().enumerate().fold(0u32, |sum, (at, byte)| {
            sum + if (148..156).contains(&at) { u32::from(b' ') } else { u32::from(*byte) }
        });
        if header.cksum()? != sum {
            return Err(invalid("wrong header checksum: this is not a tar archive, or it is damaged"));
        }
        Ok(Some(header))
    }

    fn begin_data(&mut self, size: u64) {
        self.remaining = size;
        self.padding = (BLOCK - size % BLOCK) % BLOCK;
    }

    fn read_extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(invalid(format!("extension header of {size} bytes; the limit is {MAX_EXTENSION}")));
        }
        self.begin_data(size);
        let mut bytes = Vec::new();
        self.read_data(size, |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }

    fn member(
        &mut self,
        header: &Header,
        header_size: u64,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        pax: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        let mut pax = Pax::parse(pax.as_deref().unwrap_or_default())?;
        let path = long_path.map(until_nul).or(pax.path.take()).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = long_link
            .map(until_nul)
            .or(pax.link.take())
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        if path.contains(&0) || link.contains(&0) {
            return Err(invalid("a name holds a NUL byte"));
        }
        let stored = pax.size.unwrap_or(header_size);
        let old = header.as_old();
        let device = || -> io::Result<(u32, u32)> {
            Ok((header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)))
        };
        let (mut size, mut segments) = (stored, None);
        let kind = match header.entry_type() {
            // Old archives mark directories only by a slash at the end.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(link),
            EntryType::Link => Kind::Hardlink(link),
            EntryType::Char => device().map(|(major, minor)| Kind::Char(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::Block(major, minor))?,
            EntryType::Fifo => Kind::Fifo,
            EntryType::GNUSparse => {
                let (real, map) = self.read_sparse_map(header, stored)?;
                (size, segments) = (real, Some(map));
                Kind::File
            }
            other => return Err(invalid(format!("member type {:?} is not supported", char::from(other.as_byte())))),
        };
        // Only files carry data. A size elsewhere is a leftover, which Go's reader ignores, too.
        let has_data = matches!(header.entry_type(), EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse);
        self.begin_data(if has_data { stored } else { 0 });
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => (or_zero(&old.mtime, header.mtime())?.cast_signed(), 0),
        };
        Ok(Entry {
            path,
            kind,
            mode: or_zero(&old.mode, header.mode())? & 0o7777,
            uid: pax.uid.map_or_else(|| or_zero(&old.uid, header.uid()), Ok)?,
            gid: pax.gid.map_or_else(|| or_zero(&old.gid, header.gid()), Ok)?,
            mtime,
            xattrs: pax.xattrs,
            size,
            segments,
        })
    }

    /// The old GNU sparse format: a map in the header and in extra records after it.
    fn read_sparse_map(&mut self, header: &Header, stored: u64) -> io::Result<(u64, Vec<(u64, u64)>)> {
        let gnu = header.as_gnu().ok_or_else(|| invalid("sparse member without a GNU header"))?;
        let real = gnu.real_size()?;
        let mut map = SparseMap { segments: Vec::new(), end: 0, stored: 0, real };
        for segment in gnu.sparse.iter().filter(|s| !s.is_empty()) {
            map.push(segment.offset()?, segment.length()?)?;
        }
        let mut more = gnu.is_extended();
        while more {
            let mut extra = tar::GnuExtSparseHeader::new();
            self.reader.read_exact(extra.as_mut_bytes())?;
            for segment in extra.sparse().iter().filter(|s| !s.is_empty()) {
                map.push(segment.offset()?, segment.length()?)?;
            }
            more = extra.is_extended();
        }
        if map.stored != stored {
            return Err(invalid("the map of a sparse file does not cover its data"));
        }
        Ok((real, map.segments))
    }
}

struct SparseMap {
    segments: Vec<(u64, u64)>,
    end: u64,
    stored: u64,
    real: u64,
}

impl SparseMap {
    fn push(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).filter(|end| *end <= self.real && *end <= MAX_SPARSE);
        match end {
            Some(end) if offset >= self.end && self.segments.len() < MAX_SEGMENTS => {
                self.end = end;
                self.stored += length;
                self.segments.push((offset, length));
                Ok(())
            }
            _ => Err(invalid(format!(
                "segment at {offset} of {length} bytes does not fit a sparse file of {}",
                self.real
            ))),
        }
    }
}

/// An empty numeric field is zero, as for Go and GNU tar; the `tar` crate refuses it.
fn or_zero<T: Default>(field: &[u8], parsed: io::Result<T>) -> io::Result<T> {
    match parsed {
        Err(_) if field.iter().all(|b| matches!(b, 0 | b' ')) => Ok(T::default()),
        result => result,
    }
}

fn set_once(slot: &mut Option<Vec<u8>>, bytes: Vec<u8>) -> io::Result<()> {
    match slot.replace(bytes) {
        None => Ok(()),
        Some(_) => Err(invalid("two extension headers of one kind for one member")),
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// The PAX records that matter to an image layer.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Pax {
    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let mut pax = Self::default();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (key, value);
            (key, value, rest) = record(rest).ok_or_else(|| invalid("a PAX record is malformed"))?;
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"linkpath" => pax.link = Some(value.to_vec()),
                b"size" => pax.size = Some(number(key, value)?),
                b"uid" => pax.uid = Some(number(key, value)?),
                b"gid" => pax.gid = Some(number(key, value)?),
                b"mtime" => pax.mtime = Some(time(value)?),
                _ if key.starts_with(b"GNU.sparse.") => {
                    return Err(invalid(
                        "PAX sparse files (GNU.sparse.*) are not supported: build the layer without --sparse",
                    ));
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        pax.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(pax)
    }
}

/// Splits the first `<length> <key>=<value>\n` off. Only the length delimits it: extended attributes are binary and may hold
/// line breaks, at which the `tar` crate would split.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(8).position(|b| *b == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let (record, rest) = bytes.split_at_checked(length)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    Some((&record[..equals], &record[equals + 1..], rest))
}

fn number(key: &[u8], value: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| invalid(format!("PAX record {} is not a number", String::from_utf8_lossy(key))))
}

/// Seconds with an optional fraction, possibly before the epoch.
fn time(value: &[u8]) -> io::Result<(i64, u32)> {
    let bad = || invalid("PAX record mtime is not a time");
    let text = std::str::from_utf8(value).map_err(|_| bad())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| bad())?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let nanos: u32 = format!("{fraction:0<9}")[..9].parse().map_err(|_| bad())?;
    if whole.starts_with('-') && nanos > 0 {
        return Ok((seconds.checked_sub(1).ok_or_else(bad)?, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(bytes: &[u8]) -> io::Result<Vec<Entry>> {
        let mut archive = Archive::new(bytes);
        let mut all = Vec::new();
        while let Some(entry) = archive.next_entry()? {
            all.push(entry);
        }
        Ok(all)
    }

    #[test]
    fn reads_long_names_and_pax() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("{}/file", "d".repeat(180));
        let mut header = Header::new_gnu();
        header.set_size(3);
        header.set_mode(0o4755);
        header.set_cksum();
        builder.append_data(&mut header, &long, &b"abc"[..]).unwrap();
        builder
            .append_pax_extensions([("mtime", &b"-1.25"[..]), ("SCHILY.xattr.user.a", b"v\n="), ("uid", b"70000")])
            .unwrap();
        let mut header = Header::new_ustar();
        header.set_path("b").unwrap();
        header.set_size(0);
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
        let all = entries(&builder.into_inner().unwrap()).unwrap();
        assert_eq!(all[0].path, long.as_bytes());
        assert_eq!((all[0].mode, all[0].size), (0o4755, 3));
        assert_eq!(all[1].mtime, (-2, 750_000_000));
        assert_eq!(all[1].uid, 70000);
        assert_eq!(all[1].xattrs, [(b"user.a".to_vec(), b"v\n=".to_vec())]);
    }

    #[test]
    fn refuses_an_extension_header_that_would_fill_memory() {
        let mut header = Header::new_ustar();
        header.set_path("x").unwrap();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(1 << 33);
        header.set_cksum();
        assert!(entries(header.as_bytes()).unwrap_err().to_string().contains("limit"));
    }

    #[test]
    fn truncated_archives_are_errors() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(1000);
        header.set_cksum();
        builder.append_data(&mut header, "a", &[7u8; 1000][..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        for end in [100, 512, 900, 1511] {
            assert!(entries(&bytes[..end]).is_err(), "{end}");
        }
        assert_eq!(entries(&bytes).unwrap().len(), 1);
    }

    proptest! {
        #[test]
        fn pax_parses_what_it_should(bytes in proptest::collection::vec(any::<u8>(), 0..64), value in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Pax::parse(&bytes);
            let mut builder = tar::Builder::new(Vec::new());
            builder.append_pax_extensions([("SCHILY.xattr.user.x", value.as_slice()), ("path", &b"p"[..])]).unwrap();
            let archive = builder.into_inner().unwrap();
            let length = usize::try_from(Header::from_byte_slice(&archive[..512]).entry_size().unwrap()).unwrap();
            let pax = Pax::parse(&archive[512..512 + length]).unwrap();
            prop_assert_eq!(pax.xattrs, [(b"user.x".to_vec(), value)]);
            prop_assert_eq!(pax.path, Some(b"p".to_vec()));
        }

        #[test]
        fn never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), kind in any::<u8>()) {
            let _ = entries(&bytes);
            // The same with a valid checksum, so that the fields behind it are reached.
            if bytes.len() >= 512 {
                bytes[156] = kind;
                let mut header = Header::new_old();
                header.as_mut_bytes().copy_from_slice(&bytes[..512]);
                header.set_cksum();
                bytes[..512].copy_from_slice(header.as_bytes());
                let _ = entries(&bytes);
            }
        }
    }
}
