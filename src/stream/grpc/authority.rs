//! Requests whose authority is none.
//!
//! grpc-go, given the path of a Unix socket, sends the path (or what percent encoding makes of it) as `:authority`; its
//! own server does not look at it. The HTTP/2 library here refuses such a request before anybody is asked. So headers
//! are read on their way in, and an authority that is none becomes `localhost`; everything else passes as it is.

use std::io;

use http::uri::Authority;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

use super::hpack::{Decoder, Field};

/// What a client says first.
const PREFACE: usize = 24;
/// Length, type, flags, stream.
const HEAD: usize = 9;
/// Largest frame that a client may send: the default of `SETTINGS_MAX_FRAME_SIZE`, which is not raised.
const MAX_FRAME: usize = 16 << 10;
/// Frame types.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
/// Flags of [`HEADERS`].
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;
/// Bytes that are between the two ends.
const BUFFER: usize = 32 << 10;

/// The other end of a connection with lenient eyes.
pub(super) fn lenient<S>(io: S) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (near, far) = tokio::io::duplex(BUFFER);
    tokio::spawn(async move {
        let (read, mut write) = tokio::io::split(io);
        let (mut answers, mut questions) = tokio::io::split(far);
        let back = async {
            let _ = tokio::io::copy(&mut answers, &mut write).await;
            let _ = write.shutdown().await;
        };
        let forth = async {
            if let Err(error) = forward(read, &mut questions).await {
                tracing::debug!(%error, "a gRPC connection ended");
            }
            // however it ended: the other end would wait for more
            let _ = questions.shutdown().await;
        };
        // what was asked before the end may still be answered
        tokio::join!(back, forth);
    });
    near
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: [u8; 4],
    payload: Vec<u8>,
}

impl Frame {
    /// The next frame; `None` at the end.
    async fn read(read: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut head = [0; HEAD];
        match read.read_exact(&mut head).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        };
        let [a, b, c, kind, flags, stream @ ..] = head;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if length > MAX_FRAME {
            return Err(wrong("a frame is too large"));
        }
        let mut payload = vec![0; length];
        read.read_exact(&mut payload).await?;
        Ok(Some(Self { kind, flags, stream, payload }))
    }

    async fn write(&self, write: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX).to_be_bytes();
        let [a, b, c, d] = self.stream;
        write.write_all(&[length[1], length[2], length[3], self.kind, self.flags, a, b, c, d]).await?;
        write.write_all(&self.payload).await
    }

    /// The header block in it, without padding and priority.
    fn block(&self) -> io::Result<&[u8]> {
        let mut block = self.payload.as_slice();
        let short = || wrong("a frame is too short");
        if self.flags & PADDED != 0 {
            let (padding, rest) = block.split_first().ok_or_else(short)?;
            let length = rest.len().checked_sub(usize::from(*padding)).ok_or_else(short)?;
            block = &rest[..length];
        }
        if self.flags & PRIORITY != 0 { block.get(5..).ok_or_else(short) } else { Ok(block) }
    }
}

fn wrong(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

async fn forward(mut read: impl AsyncRead + Unpin, write: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut preface = [0; PREFACE];
    read.read_exact(&mut preface).await?;
    write.write_all(&preface).await?;
    let mut decoder = Decoder::default();
    while let Some(mut frame) = Frame::read(&mut read).await? {
        if frame.kind == HEADERS {
            let mut block = frame.block()?.to_vec();
            let mut ended = frame.flags & END_HEADERS != 0;
            while !ended {
                let more = Frame::read(&mut read).await?.ok_or_else(|| wrong("it ends within headers"))?;
                if more.kind != CONTINUATION || more.stream != frame.stream || block.len() > MAX_FRAME {
                    return Err(wrong("headers do not end"));
                }
                block.extend(&more.payload);
                ended = more.flags & END_HEADERS != 0;
            }
            frame.payload = encode(decoder.decode(&block, MAX_FRAME).map_err(wrong)?);
            frame.flags = frame.flags & END_STREAM | END_HEADERS;
        }
        frame.write(write).await?;
    }
    Ok(())
}

/// A block that refers to nothing: it is right whatever the reader's table has.
fn encode(fields: Vec<Field>) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        let is_none = name == b":authority" && Authority::try_from(value.as_slice()).is_err();
        // a literal that is not kept
        block.push(0);
        put(&mut block, &name);
        put(&mut block, if is_none { b"localhost" } else { &value });
    }
    block
}

fn put(block: &mut Vec<u8>, text: &[u8]) {
    let byte = |value: usize| u8::try_from(value).unwrap_or(0);
    if text.len() < 0x7f {
        block.push(byte(text.len()));
    } else {
        block.push(0x7f);
        let mut rest = text.len() - 0x7f;
        while rest >= 0x80 {
            block.push(byte(rest & 0x7f) | 0x80);
            rest >>= 7;
        }
        block.push(byte(rest));
    }
    block.extend_from_slice(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let fields = |authority: &str| -> Vec<Field> {
            let field = |name: &str, value: String| (name.as_bytes().to_vec(), value.into_bytes());
            [
                (":authority", authority.to_owned()),
                (":path", "/x".to_owned()),
                ("long", "x".repeat(300)),
                ("e", String::new()),
            ]
            .map(|(name, value)| field(name, value))
            .into()
        };
        let read = |block: &[u8]| Decoder::default().decode(block, MAX_FRAME).unwrap();
        assert_eq!(read(&encode(fields("host:1"))), fields("host:1"));
        for none in ["/var/lib/kubelet/device-plugins/kubelet.sock", "%2Fvar%2Flib%2Fkubelet.sock", ""] {
            assert_eq!(read(&encode(fields(none))), fields("localhost"), "{none:?}");
        }
    }

    /// Frames of a client, one after the other.
    fn frames(list: &[(u8, u8, &[u8])]) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        for (kind, flags, payload) in list {
            bytes.extend([0, 0, u8::try_from(payload.len()).unwrap(), *kind, *flags, 0, 0, 0, 1]);
            bytes.extend(*payload);
        }
        bytes
    }

    async fn forwarded(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        forward(bytes, &mut out).await?;
        Ok(out)
    }

    #[tokio::test]
    async fn headers_in_pieces_become_one_frame() {
        let block = encode(vec![(b":authority".to_vec(), b"a".to_vec())]);
        let (first, last) = block.split_at(4);
        let mut padded = vec![2, 0, 0, 0, 0, 9];
        padded.extend(first);
        padded.extend([0, 0]);
        let split = frames(&[
            (4, 0, b""),
            (HEADERS, PADDED | PRIORITY | END_STREAM, &padded),
            (CONTINUATION, END_HEADERS, last),
            (0, 1, b"data"),
        ]);
        let whole = frames(&[(4, 0, b""), (HEADERS, END_STREAM | END_HEADERS, &block), (0, 1, b"data")]);
        assert_eq!(forwarded(&split).await.unwrap(), whole);
        assert!(forwarded(&frames(&[(HEADERS, 0, first), (0, 1, b"data")])).await.is_err());
        assert!(forwarded(&frames(&[(HEADERS, END_HEADERS | PADDED, &[9, 1])])).await.is_err());
        assert!(forwarded(&frames(&[(HEADERS, END_HEADERS | PRIORITY, &[9, 1])])).await.is_err());
    }

    #[tokio::test]
    async fn a_connection_that_breaks_ends() {
        for bytes in [frames(&[(HEADERS, 0, b"x"), (0, 1, b"data")]), b"GET / HTTP/1.1\r\n".to_vec()] {
            let (mut client, server) = tokio::net::UnixStream::pair().unwrap();
            let mut end = lenient(server);
            client.write_all(&bytes).await.unwrap();
            if bytes.starts_with(b"GET") {
                client.shutdown().await.unwrap();
            }
            let limit = std::time::Duration::from_secs(10);
            let read = tokio::time::timeout(limit, end.read_to_end(&mut Vec::new())).await;
            assert!(read.is_ok(), "it waits for more");
        }
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut all = frames(&[]);
            all.extend(bytes);
            let _ = runtime.block_on(forwarded(&all));
        }
    }
}
