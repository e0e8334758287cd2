//! Header blocks: names and values with 32-bit lengths, compressed with one zlib stream per direction.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::{dictionary::DICTIONARY, frame::FrameError};

/// log2 of the compressor's window: the dictionary is 1423 bytes, and what we compress is smaller still.
const COMPRESSOR_WINDOW_BITS: u8 = 11;

/// The headers of a stream, in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of `name`, compared without regard to case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        value.split('\0').next()
    }

    /// How many headers there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Headers {
    fn from_iter<T: IntoIterator<Item = (N, V)>>(iter: T) -> Self {
        Self(iter.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// Inflates the header blocks of one direction. An error is final: the streams' contexts have come apart.
pub(super) struct HeaderDecoder {
    zlib: Decompress,
    max_inflated: usize,
}

impl HeaderDecoder {
    pub(super) fn new(max_inflated: usize) -> Self {
        Self { zlib: Decompress::new(true), max_inflated }
    }

    pub(super) fn decode(&mut self, block: &[u8]) -> Result<Headers, FrameError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, FrameError> {
        // One byte more than allowed, so that "exactly full" and "too much" differ.
        let mut output = vec![0; self.max_inflated + 1];
        let mut filled = 0;
        loop {
            let (before_in, before_out) = (self.zlib.total_in(), self.zlib.total_out());
            let outcome = self.zlib.decompress(input, &mut output[filled..], FlushDecompress::Sync);
            let consumed = usize::try_from(self.zlib.total_in() - before_in).map_err(|_| FrameError::Compression)?;
            let produced = usize::try_from(self.zlib.total_out() - before_out).map_err(|_| FrameError::Compression)?;
            input = input.get(consumed..).ok_or(FrameError::Compression)?;
            filled += produced;
            match outcome {
                Ok(Status::StreamEnd) => return Err(FrameError::Compression),
                Ok(Status::Ok | Status::BufError) if filled > self.max_inflated => {
                    return Err(FrameError::HeadersTooLarge { limit: self.max_inflated });
                }
                Ok(Status::Ok | Status::BufError) if consumed == 0 && produced == 0 => break,
                Ok(Status::Ok | Status::BufError) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(&DICTIONARY).map_err(|_| FrameError::Compression)?;
                }
                Err(_) => return Err(FrameError::Compression),
            }
        }
        if !input.is_empty() {
            return Err(FrameError::Compression);
        }
        output.truncate(filled);
        Ok(output)
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, FrameError> {
    let count = take_u32(&mut block)?;
    let mut headers = Vec::new();
    for _ in 0..count {
        let name = take_text(&mut block)?;
        let value = take_text(&mut block)?;
        if name.is_empty() || name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(FrameError::InvalidHeaders);
        }
        headers.push((name, value));
    }
    if block.is_empty() { Ok(Headers(headers)) } else { Err(FrameError::InvalidHeaders) }
}

fn take_u32(block: &mut &[u8]) -> Result<u32, FrameError> {
    let (bytes, rest) = block.split_first_chunk::<4>().ok_or(FrameError::InvalidHeaders)?;
    *block = rest;
    Ok(u32::from_be_bytes(*bytes))
}

fn take_text(block: &mut &[u8]) -> Result<String, FrameError> {
    let length = usize::try_from(take_u32(block)?).map_err(|_| FrameError::InvalidHeaders)?;
    let (text, rest) = block.split_at_checked(length).ok_or(FrameError::InvalidHeaders)?;
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Compresses the header blocks of one direction.
pub(super) struct HeaderEncoder {
    zlib: Compress,
}

impl HeaderEncoder {
    pub(super) fn new() -> Self {
        let mut zlib = Compress::new_with_window_bits(Compression::fast(), true, COMPRESSOR_WINDOW_BITS);
        // Cannot fail: the stream is fresh and wants its dictionary now.
        let _ = zlib.set_dictionary(&DICTIONARY);
        Self { zlib }
    }

    /// The compressed block, ending on a byte boundary so that it can be read without what follows.
    pub(super) fn encode(&mut self, headers: &Headers) -> Result<Vec<u8>, FrameError> {
        let mut plain = Vec::new();
        push_u32(&mut plain, headers.0.len())?;
        for (name, value) in &headers.0 {
            push_u32(&mut plain, name.len())?;
            plain.extend(name.to_ascii_lowercase().as_bytes());
            push_u32(&mut plain, value.len())?;
            plain.extend(value.as_bytes());
        }
        let mut input = &plain[..];
        let mut block = Vec::with_capacity(plain.len() + 64);
        loop {
            let before = self.zlib.total_in();
            self.zlib.compress_vec(input, &mut block, FlushCompress::Sync).map_err(|_| FrameError::Compression)?;
            let consumed = usize::try_from(self.zlib.total_in() - before).map_err(|_| FrameError::Compression)?;
            input = &input[consumed..];
            // Room left over means that the flush is complete.
            if input.is_empty() && block.len() < block.capacity() {
                return Ok(block);
            }
            block.reserve(256);
        }
    }
}

fn push_u32(block: &mut Vec<u8>, number: usize) -> Result<(), FrameError> {
    let number = u32::try_from(number).map_err(|_| FrameError::InvalidHeaders)?;
    block.extend(number.to_be_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_context_serves_many_blocks() {
        let (mut encoder, mut decoder) = (HeaderEncoder::new(), HeaderDecoder::new(4096));
        for kind in ["error", "stdin", "stdout", "stderr", "resize"] {
            let headers: Headers = [("streamType", kind), ("port", "80")].into_iter().collect();
            let block = encoder.encode(&headers).expect("encode");
            let decoded = decoder.decode(&block).expect("decode");
            assert_eq!(decoded.get("streamtype"), Some(kind));
            assert_eq!(decoded.get("StreamType"), Some(kind));
        }
    }

    #[test]
    fn inflation_is_bounded() {
        let (mut encoder, mut decoder) = (HeaderEncoder::new(), HeaderDecoder::new(1024));
        let bomb: Headers = [("a", "x".repeat(10 << 20))].into_iter().collect();
        let block = encoder.encode(&bomb).expect("encode");
        assert!(block.len() < 1 << 20, "{}", block.len());
        assert_eq!(decoder.decode(&block), Err(FrameError::HeadersTooLarge { limit: 1024 }));
    }

    #[test]
    fn another_dictionary_is_refused() {
        let mut zlib = Compress::new(Compression::default(), true);
        zlib.set_dictionary(b"not the one").expect("dictionary");
        let mut block = Vec::with_capacity(100);
        zlib.compress_vec(&[0, 0, 0, 0], &mut block, FlushCompress::Sync).expect("compress");
        assert_eq!(HeaderDecoder::new(1024).decode(&block), Err(FrameError::Compression));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(blocks in prop::collection::vec(
            prop::collection::vec(("[a-z-]{1,20}", "[ -~]{0,200}"), 0..8), 1..5)) {
            let (mut encoder, mut decoder) = (HeaderEncoder::new(), HeaderDecoder::new(64 << 10));
            for pairs in blocks {
                let headers: Headers = pairs.into_iter().collect();
                let block = encoder.encode(&headers).expect("encode");
                prop_assert_eq!(decoder.decode(&block).expect("decode"), headers);
            }
        }

        #[test]
        fn hostile_plain_blocks_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = parse(&bytes);
        }
    }
}
