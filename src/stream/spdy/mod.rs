//! SPDY/3.1 as Kubernetes clients use it: version 3 frames, as `moby/spdystream` reads and writes them.
//!
//! There is no flow control (`WINDOW_UPDATE` and `SETTINGS` are read and ignored, as there): back-pressure is
//! TCP's. This is the server side only: clients open streams, with odd and growing ids.

mod connection;
mod dictionary;
mod frame;
mod headers;
#[cfg(test)]
pub(in crate::stream) mod testing;

pub(super) use self::{connection::connection, frame::status};
pub use self::{
    connection::{Accepted, Incoming},
    frame::{Decoder, Frame, FrameError},
    headers::Headers,
};

/// Decodes `bytes` as what a client might send, in one piece and byte by byte, and requires the same outcome.
/// For fuzzing: no input may panic, loop, or allocate more than the decoder's bound.
pub fn fuzz_decoder(bytes: &[u8]) {
    let whole = decode_all(bytes.chunks(usize::MAX));
    let single = decode_all(bytes.chunks(1));
    assert_eq!(whole, single, "decoding depends on how the bytes arrive");
}

/// What the frames of an input come to, with the pieces of a data frame joined.
fn decode_all<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<String>) {
    let mut decoder = Decoder::new(64 << 10);
    let mut buffer = bytes::BytesMut::new();
    let mut frames: Vec<Frame> = Vec::new();
    for chunk in chunks {
        buffer.extend_from_slice(chunk);
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(frame)) => join(&mut frames, frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error.to_string())),
            }
        }
    }
    (frames, None)
}

fn join(frames: &mut Vec<Frame>, frame: Frame) {
    if let (
        Some(Frame::Data { id, data, fin, more: more @ true }),
        Frame::Data { data: tail, fin: end, more: open, .. },
    ) = (frames.last_mut(), &frame)
    {
        let _ = id;
        *data = [&data[..], &tail[..]].concat().into();
        *fin = *end;
        *more = *open;
        return;
    }
    frames.push(frame);
}
