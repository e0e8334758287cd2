//! One layer from compressed bytes to a directory: decompress, hash, unpack, all in one pass.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::sync::mpsc;

use super::digest::{Digest, Hasher};
use super::error::{ImageError, remedy};
use super::layout::{LayerUsage, Layout, Staging};
use super::unpack::{DIRECTORY, UnpackError, Unpacked, copy_directory_attributes, unpack_layer};
use crate::sys::openat2::openat2;

/// Reads ahead of the tar reader; also the size of the pieces in which files are written.
const BUFFER: usize = 256 << 10;
/// Largest zstd window, as a power of two: the most memory one layer may ask for (128 MiB; zstd's own default limit).
const ZSTD_WINDOW_LOG: u32 = 27;

/// A layer that is unpacked, but not yet in its place.
#[derive(Debug)]
pub(super) struct StagedLayer {
    pub staging: Staging,
    implied: Vec<Vec<u8>>,
}

/// Unpacks a compressed layer into a fresh directory of the store and checks its diff ID.
///
/// Blocking. Nothing stays on disk after an error.
pub(super) fn unpack_blob(
    layout: &Layout,
    reader: impl BufRead,
    diff_id: &Digest,
    name: &str,
    layer: &Digest,
) -> Result<StagedLayer, ImageError> {
    let failed = |detail: String| ImageError::Layer { name: name.to_owned(), layer: layer.to_string(), detail };
    let staging = layout.staging();
    let diff = staging.path.join("diff");
    fs::create_dir_all(&diff).map_err(ImageError::io("create", &diff))?;
    let root = File::open(&diff).map_err(ImageError::io("open", &diff))?;
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(ImageError::errno("chmod", &diff))?;
    let explain = |error: UnpackError| match error {
        // The node's trouble, not the layer's.
        error if error.is_transient() => {
            let (place, mend) = (staging.path.display(), error.os_error().map_or("", remedy));
            ImageError::Pull {
                name: name.to_owned(),
                detail: format!("failed to extract layer {layer} to {place}: {error}{mend}"),
                transient: true,
            }
        }
        error => failed(error.to_string()),
    };
    let decoder = Decoder::detect(reader).map_err(|error| explain(UnpackError::Read(error)))?;
    let mut hashed = Hashed { inner: decoder, hash: diff_id.hasher() };
    let Unpacked { bytes, inodes, implied } =
        unpack_layer(BufReader::with_capacity(BUFFER, &mut hashed), root.as_fd()).map_err(explain)?;
    let actual = hashed.hash.finish();
    if actual != *diff_id {
        return Err(failed(format!(
            "the uncompressed layer has digest {actual}, the image configuration says {diff_id}"
        )));
    }
    let usage = serde_json::to_vec(&LayerUsage { bytes, inodes }).map_err(|e| failed(e.to_string()))?;
    fs::write(staging.path.join("layer.json"), usage).map_err(ImageError::io("write", &staging.path))?;
    Ok(StagedLayer { staging, implied })
}

impl StagedLayer {
    /// Gives directories that the archive only implied the attributes they have in the layers below (`lower`, top first).
    ///
    /// Many build tools write `usr/bin/app` without `usr` and `usr/bin`. A fresh directory there would hide owner and mode of
    /// the one below: `/tmp` without its sticky bit, say.
    pub fn adopt_lower_attributes(&self, lower: &[PathBuf]) -> Result<(), ImageError> {
        if self.implied.is_empty() {
            return Ok(());
        }
        let diff = self.staging.path.join("diff");
        let open = |path: &Path| File::open(path).map_err(ImageError::io("open", path));
        let root = open(&diff)?;
        let lowers = lower.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        // Deepest first, so that setting a directory's times is not undone by its children.
        for path in self.implied.iter().rev() {
            let path = if path.is_empty() { b"." } else { path.as_slice() };
            let Ok(target) = openat2(&root, path, DIRECTORY, Mode::empty(), inside) else { continue };
            for lower in &lowers {
                match openat2(lower, path, DIRECTORY, Mode::empty(), inside) {
                    Ok(source) => {
                        copy_directory_attributes(source.as_fd(), target.as_fd())
                            .map_err(ImageError::io("copy attributes in", &diff))?;
                        break;
                    }
                    Err(rustix::io::Errno::NOENT) => {}
                    // A file or a link there: this layer hides it, and nothing is to be taken over.
                    Err(_) => break,
                }
            }
        }
        Ok(())
    }
}

struct Hashed<R> {
    inner: R,
    hash: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

/// The compressions of the image specification, told apart by their magic numbers: media types are often wrong.
pub(super) enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(zstd::Decoder<'static, R>),
}

impl<R: BufRead> Decoder<io::Chain<Cursor<Vec<u8>>, R>> {
    pub fn detect(mut reader: R) -> io::Result<Self> {
        let mut magic = Vec::with_capacity(4);
        reader.by_ref().take(4).read_to_end(&mut magic)?;
        let gzip = magic.starts_with(&[0x1f, 0x8b, 0x08]);
        let zstd = magic == [0x28, 0xb5, 0x2f, 0xfd]
            || (magic.len() == 4 && magic[0] & 0xf0 == 0x50 && magic[1..] == [0x2a, 0x4d, 0x18]);
        let reader = Cursor::new(magic).chain(reader);
        if gzip {
            return Ok(Self::Gzip(Box::new(MultiGzDecoder::new(reader))));
        }
        if zstd {
            let mut decoder = zstd::Decoder::with_buffer(reader)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            return Ok(Self::Zstd(decoder));
        }
        Ok(Self::Plain(reader))
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(reader) => reader.read(buffer),
            Self::Zstd(reader) => reader.read(buffer),
        }
    }
}

/// A piece of a download.
#[derive(Debug)]
pub(super) enum Piece {
    /// The next bytes.
    Data(Bytes),
    /// That was all, and its digest is right. A channel that closes without this is a failed download.
    End,
}

/// The blocking end of a download: hands the bytes on and writes a copy of them, the blob, on the way.
pub(super) struct PieceReader {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
    copy: File,
}

impl PieceReader {
    pub fn new(pieces: mpsc::Receiver<Piece>, copy: File) -> Self {
        Self { pieces, current: Bytes::new(), ended: false, copy }
    }
}

impl BufRead for PieceReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(bytes)) => {
                    self.copy.write_all(&bytes)?;
                    self.current = bytes;
                }
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the download stopped")),
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        bytes::Buf::advance(&mut self.current, amount);
    }
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill_buf()?;
        let take = piece.len().min(buffer.len());
        buffer[..take].copy_from_slice(&piece[..take]);
        self.consume(take);
        Ok(take)
    }
}

/// Reads a download to its end for the sake of the copy.
pub(super) fn drain(reader: &mut PieceReader) -> io::Result<()> {
    io::copy(reader, &mut io::sink()).map(drop)
}

/// Opens a blob of the store for reading.
pub(super) fn open_blob(path: &Path) -> Result<BufReader<File>, ImageError> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
        .map_err(ImageError::errno("open", path))?;
    Ok(BufReader::with_capacity(BUFFER, File::from(fd)))
}
