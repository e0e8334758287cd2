//! Messages in a body: a flag, a length, the bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::HeaderMap;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::{MAX_MESSAGE, Status};

/// Flag and length before a message.
const PREFIX: usize = 5;

/// A message with what comes before it.
pub(super) fn encode(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + PREFIX);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// The first message of `buffer`, if it is there as a whole.
fn decode(buffer: &mut BytesMut) -> Result<Option<Bytes>, Status> {
    let Some((prefix, rest)) = buffer.split_first_chunk::<PREFIX>() else { return Ok(None) };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if prefix[0] != 0 {
        // no compression was offered
        return Err(Status::internal("a compressed message that nobody asked for"));
    }
    if length > MAX_MESSAGE {
        let message = format!("received message larger than max ({length} vs. {MAX_MESSAGE})");
        return Err(Status::new(Status::RESOURCE_EXHAUSTED, message));
    }
    if rest.len() < length {
        return Ok(None);
    }
    buffer.advance(PREFIX);
    Ok(Some(buffer.split_to(length).freeze()))
}

/// A body that is read message by message.
pub(super) struct Reader {
    body: Incoming,
    buffer: BytesMut,
    /// What came after the last message.
    pub(super) trailers: Option<HeaderMap>,
}

impl Reader {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body, buffer: BytesMut::new(), trailers: None }
    }

    /// The next message; `None` at the end. At most one message and one frame are kept.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if let Some(message) = decode(&mut self.buffer)? {
                return Ok(Some(message));
            }
            match self.body.frame().await {
                Some(Err(error)) => return Err(Status::unavailable(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => self.trailers = frame.into_trailers().ok(),
                },
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::internal("the body ends within a message")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in() {
        let mut buffer = BytesMut::from(&encode(b"ab")[..]);
        buffer.extend_from_slice(&encode(b""));
        buffer.extend_from_slice(&encode(b"rest")[..7]);
        assert_eq!(decode(&mut buffer).unwrap().unwrap().as_ref(), b"ab");
        assert_eq!(decode(&mut buffer).unwrap().unwrap().as_ref(), b"");
        assert_eq!(decode(&mut buffer).unwrap(), None);
        let mut compressed = BytesMut::from(&[1, 0, 0, 0, 0][..]);
        assert_eq!(decode(&mut compressed).unwrap_err().code, Status::INTERNAL);
        let mut endless = BytesMut::from(&[0, 255, 255, 255, 255][..]);
        assert_eq!(decode(&mut endless).unwrap_err().code, Status::RESOURCE_EXHAUSTED);
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer) {}
        }
    }
}
