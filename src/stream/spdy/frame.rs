//! SPDY version 3 frames: a decoder fed with bytes as they arrive, and an encoder.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::headers::{HeaderDecoder, HeaderEncoder, Headers};

const VERSION: u16 = 3;
const FRAME_HEADER: usize = 8;
const STREAM_ID_MASK: u32 = 0x7fff_ffff;
const FLAG_FIN: u8 = 0x01;
const FLAG_UNIDIRECTIONAL: u8 = 0x02;
/// Frame lengths have 24 bits.
const MAX_DATA: usize = 0x00ff_ffff;

mod kind {
    pub(super) const SYN_STREAM: u16 = 1;
    pub(super) const SYN_REPLY: u16 = 2;
    pub(super) const RST_STREAM: u16 = 3;
    pub(super) const SETTINGS: u16 = 4;
    pub(super) const PING: u16 = 6;
    pub(super) const GOAWAY: u16 = 7;
    pub(super) const HEADERS: u16 = 8;
    pub(super) const WINDOW_UPDATE: u16 = 9;
}

/// Status codes of `RST_STREAM` and `GOAWAY`.
pub(in crate::stream) mod status {
    /// A stream that breaks the protocol.
    pub(in crate::stream) const PROTOCOL_ERROR: u32 = 1;
    /// A stream that is refused before anything was done for it.
    pub(in crate::stream) const REFUSED_STREAM: u32 = 3;
    /// A stream that its owner does not want any more.
    pub(in crate::stream) const CANCEL: u32 = 5;
    /// `GOAWAY`: the peer broke the protocol.
    pub(in crate::stream) const GOAWAY_PROTOCOL_ERROR: u32 = 1;
}

/// Bytes that are not SPDY/3. Terminal for the connection: the position in the byte stream is lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A control frame of another SPDY version.
    #[error("SPDY version {0} is not supported, only 3 is")]
    Version(u16),
    /// A control frame of an unknown type.
    #[error("unknown control frame type {0}")]
    UnknownType(u16),
    /// A control frame whose length does not fit its type.
    #[error("control frame of type {kind} cannot have {length} bytes")]
    Length {
        /// Frame type.
        kind: u16,
        /// Length of its body, in bytes.
        length: usize,
    },
    /// A control frame larger than this connection accepts.
    #[error("control frame of {length} bytes is over the limit of {limit}")]
    TooLarge {
        /// Length of its body, in bytes.
        length: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// A header block that inflates to more than this connection accepts.
    #[error("header block inflates to more than {limit} bytes")]
    HeadersTooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// A header block that is not the next part of this connection's zlib stream.
    #[error("header block cannot be inflated")]
    Compression,
    /// A header block whose content is malformed.
    #[error("header block is malformed")]
    InvalidHeaders,
    /// Stream id 0, or ping id 0.
    #[error("id 0 is not allowed")]
    ZeroId,
}

/// What a peer said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A new stream.
    SynStream {
        /// Stream id.
        id: u32,
        /// What the stream is for.
        headers: Headers,
        /// Nothing follows from the sender.
        fin: bool,
        /// Nothing may be sent back.
        unidirectional: bool,
    },
    /// The peer accepts a stream.
    SynReply {
        /// Stream id.
        id: u32,
        /// Its headers.
        headers: Headers,
        /// Nothing follows from the sender.
        fin: bool,
    },
    /// The stream is abandoned.
    RstStream {
        /// Stream id.
        id: u32,
        /// Why.
        status: u32,
    },
    /// More headers of a stream.
    Headers {
        /// Stream id.
        id: u32,
        /// The headers.
        headers: Headers,
        /// Nothing follows from the sender.
        fin: bool,
    },
    /// To be answered with the same id if the peer began it.
    Ping(u32),
    /// The peer opens and accepts no more streams.
    GoAway {
        /// The last stream it saw.
        last_stream: u32,
        /// Why.
        status: u32,
    },
    /// `SETTINGS` or `WINDOW_UPDATE`: without meaning here.
    Ignored,
    /// Payload; a frame that has not arrived completely comes in several pieces.
    Data {
        /// Stream id.
        id: u32,
        /// The bytes that are there.
        data: Bytes,
        /// Nothing follows from the sender; only on the last piece of a frame.
        fin: bool,
        /// More pieces of this frame follow.
        more: bool,
    },
}

struct DataFrame {
    id: u32,
    remaining: usize,
    fin: bool,
}

/// Turns bytes into frames. Holds no more than one control frame; data is handed on as it comes.
pub struct Decoder {
    headers: HeaderDecoder,
    max_control: usize,
    data: Option<DataFrame>,
}

impl Decoder {
    /// A decoder at the start of a connection. `max_control` bounds both control frames and inflated headers.
    pub fn new(max_control: usize) -> Self {
        Self { headers: HeaderDecoder::new(max_control), max_control, data: None }
    }

    /// Takes the next frame, or piece of a data frame, from the front of `buffer`; `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the decoder must not be used afterwards.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if self.data.is_some() {
            return Ok(self.decode_data(buffer));
        }
        let Some(header) = buffer.first_chunk::<FRAME_HEADER>() else { return Ok(None) };
        let [a, b, c, d, flags, e, f, g] = *header;
        let word = u32::from_be_bytes([a, b, c, d]);
        let length = usize::from(e) << 16 | usize::from(f) << 8 | usize::from(g);
        if a & 0x80 == 0 {
            buffer.advance(FRAME_HEADER);
            if word == 0 {
                return Err(FrameError::ZeroId);
            }
            self.data = Some(DataFrame { id: word, remaining: length, fin: flags & FLAG_FIN != 0 });
            return Ok(self.decode_data(buffer));
        }
        let (version, kind) = (u16::from_be_bytes([a & 0x7f, b]), u16::from_be_bytes([c, d]));
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > self.max_control {
            return Err(FrameError::TooLarge { length, limit: self.max_control });
        }
        if buffer.len() < FRAME_HEADER + length {
            return Ok(None);
        }
        buffer.advance(FRAME_HEADER);
        let body = buffer.split_to(length);
        self.decode_control(kind, flags, &body).map(Some)
    }

    fn decode_data(&mut self, buffer: &mut BytesMut) -> Option<Frame> {
        let frame = self.data.as_mut()?;
        let available = buffer.len().min(frame.remaining);
        if available == 0 && frame.remaining > 0 {
            return None;
        }
        let data = buffer.split_to(available).freeze();
        frame.remaining -= available;
        let (id, more) = (frame.id, frame.remaining > 0);
        let fin = frame.fin && !more;
        if !more {
            self.data = None;
        }
        Some(Frame::Data { id, data, fin, more })
    }

    fn decode_control(&mut self, kind: u16, flags: u8, mut body: &[u8]) -> Result<Frame, FrameError> {
        let length = body.len();
        let bad_length = || FrameError::Length { kind, length };
        let fin = flags & FLAG_FIN != 0;
        match kind {
            kind::SYN_STREAM => {
                let id = take_id(&mut body).ok_or_else(bad_length)?;
                // Associated stream, priority and slot mean nothing here.
                let block = body.get(6..).ok_or_else(bad_length)?;
                let headers = self.headers.decode(block)?;
                let unidirectional = flags & FLAG_UNIDIRECTIONAL != 0;
                Ok(Frame::SynStream { id: nonzero(id)?, headers, fin, unidirectional })
            }
            kind::SYN_REPLY | kind::HEADERS => {
                let id = take_id(&mut body).ok_or_else(bad_length)?;
                let headers = self.headers.decode(body)?;
                let id = nonzero(id)?;
                if kind == kind::HEADERS {
                    Ok(Frame::Headers { id, headers, fin })
                } else {
                    Ok(Frame::SynReply { id, headers, fin })
                }
            }
            kind::RST_STREAM if length == 8 => {
                Ok(Frame::RstStream { id: nonzero(body.get_u32() & STREAM_ID_MASK)?, status: body.get_u32() })
            }
            kind::PING if length == 4 => Ok(Frame::Ping(nonzero(body.get_u32())?)),
            kind::GOAWAY if length == 8 => {
                Ok(Frame::GoAway { last_stream: body.get_u32() & STREAM_ID_MASK, status: body.get_u32() })
            }
            kind::WINDOW_UPDATE if length == 8 => Ok(Frame::Ignored),
            kind::SETTINGS if length >= 4 => Ok(Frame::Ignored),
            kind::RST_STREAM | kind::PING | kind::GOAWAY | kind::WINDOW_UPDATE | kind::SETTINGS => Err(bad_length()),
            other => Err(FrameError::UnknownType(other)),
        }
    }
}

fn take_id(body: &mut &[u8]) -> Option<u32> {
    let (bytes, rest) = body.split_first_chunk::<4>()?;
    *body = rest;
    Some(u32::from_be_bytes(*bytes) & STREAM_ID_MASK)
}

fn nonzero(id: u32) -> Result<u32, FrameError> {
    if id == 0 { Err(FrameError::ZeroId) } else { Ok(id) }
}

/// Writes frames into a buffer.
pub(super) struct Encoder {
    headers: HeaderEncoder,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self { headers: HeaderEncoder::new() }
    }

    pub(super) fn syn_reply(&mut self, id: u32, out: &mut BytesMut) -> Result<(), FrameError> {
        let block = self.headers.encode(&Headers::default())?;
        control(kind::SYN_REPLY, 0, 4 + block.len(), out);
        out.put_u32(id & STREAM_ID_MASK);
        out.put_slice(&block);
        Ok(())
    }

    /// Opens a stream; the server never does, its tests do.
    #[cfg(test)]
    pub(super) fn syn_stream(&mut self, id: u32, headers: &Headers, fin: bool, out: &mut BytesMut) {
        let block = self.headers.encode(headers).expect("encode");
        control(kind::SYN_STREAM, u8::from(fin), 10 + block.len(), out);
        out.put_u32(id & STREAM_ID_MASK);
        out.put_slice(&[0; 6]);
        out.put_slice(&block);
    }
}

/// Data of any length, as one frame or several.
pub(super) fn data(id: u32, mut payload: &[u8], fin: bool, out: &mut BytesMut) {
    loop {
        let (piece, rest) = payload.split_at(payload.len().min(MAX_DATA));
        out.put_u32(id & STREAM_ID_MASK);
        out.put_u8(if fin && rest.is_empty() { FLAG_FIN } else { 0 });
        put_length(piece.len(), out);
        out.put_slice(piece);
        if rest.is_empty() {
            return;
        }
        payload = rest;
    }
}

pub(super) fn rst_stream(id: u32, status: u32, out: &mut BytesMut) {
    control(kind::RST_STREAM, 0, 8, out);
    out.put_u32(id & STREAM_ID_MASK);
    out.put_u32(status);
}

pub(super) fn ping(id: u32, out: &mut BytesMut) {
    control(kind::PING, 0, 4, out);
    out.put_u32(id);
}

pub(super) fn goaway(last_stream: u32, status: u32, out: &mut BytesMut) {
    control(kind::GOAWAY, 0, 8, out);
    out.put_u32(last_stream & STREAM_ID_MASK);
    out.put_u32(status);
}

fn control(kind: u16, flags: u8, length: usize, out: &mut BytesMut) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u8(flags);
    put_length(length, out);
}

fn put_length(length: usize, out: &mut BytesMut) {
    let [.., high, middle, low] = length.to_be_bytes();
    out.put_slice(&[high, middle, low]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::fuzz_decoder, *};

    /// Frames as spdystream puts them on the wire.
    #[test]
    fn exact_bytes() {
        let mut out = BytesMut::new();
        data(3, b"hi", true, &mut out);
        rst_stream(5, status::CANCEL, &mut out);
        ping(7, &mut out);
        goaway(9, 0, &mut out);
        let expected: &[u8] = &[
            0, 0, 0, 3, 1, 0, 0, 2, b'h', b'i', // DATA, FIN
            0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 5, // RST_STREAM, CANCEL
            0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 7, // PING
            0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 0, // GOAWAY
        ];
        assert_eq!(&out[..], expected);
    }

    #[test]
    fn data_comes_in_pieces() {
        let mut decoder = Decoder::new(1024);
        let mut buffer = BytesMut::from(&[0, 0, 0, 1, 1, 0, 0, 5, b'a', b'b'][..]);
        let piece = decoder.decode(&mut buffer).expect("frame");
        assert_eq!(piece, Some(Frame::Data { id: 1, data: Bytes::from_static(b"ab"), fin: false, more: true }));
        assert_eq!(decoder.decode(&mut buffer), Ok(None));
        buffer.extend_from_slice(b"cde");
        let piece = decoder.decode(&mut buffer).expect("frame");
        assert_eq!(piece, Some(Frame::Data { id: 1, data: Bytes::from_static(b"cde"), fin: true, more: false }));
    }

    #[test]
    fn limits_and_malformed_frames() {
        let cases: [(&[u8], FrameError); 5] = [
            (&[0x80, 2, 0, 6, 0, 0, 0, 4], FrameError::Version(2)),
            (&[0x80, 3, 0, 10, 0, 0, 0, 0], FrameError::UnknownType(10)),
            (&[0x80, 3, 0, 6, 0, 0, 0, 3, 0, 0, 1], FrameError::Length { kind: 6, length: 3 }),
            (&[0x80, 3, 0, 1, 0, 1, 0, 0], FrameError::TooLarge { length: 65536, limit: 1024 }),
            (&[0, 0, 0, 0, 0, 0, 0, 0], FrameError::ZeroId),
        ];
        for (bytes, expected) in cases {
            assert_eq!(Decoder::new(1024).decode(&mut BytesMut::from(bytes)), Err(expected));
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            fuzz_decoder(&bytes);
        }

        /// Valid openings with single bytes changed reach deeper than noise does.
        #[test]
        fn damaged_frames_do_not_panic(at in 0_usize..200, byte in any::<u8>(), fin in any::<bool>()) {
            let (mut encoder, mut out) = (Encoder::new(), BytesMut::new());
            for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout")] {
                let headers: Headers = [("streamtype", kind)].into_iter().collect();
                encoder.syn_stream(id, &headers, fin, &mut out);
                data(id, b"payload", fin, &mut out);
            }
            let at = at % out.len();
            out[at] ^= byte;
            fuzz_decoder(&out);
        }
    }
}
