//! HPACK (RFC 7541), the decoding half.

use std::collections::VecDeque;

/// Largest dynamic table: the default of `SETTINGS_HEADER_TABLE_SIZE`, bytes.
const TABLE_SIZE: usize = 4096;
/// What an entry costs beside its texts, bytes.
const ENTRY: usize = 32;

/// A name and its value.
pub(super) type Field = (Vec<u8>, Vec<u8>);

/// The block breaks the format; the connection cannot go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid HPACK block: {0}")]
pub(super) struct InvalidBlock(&'static str);

/// One direction of a connection.
#[derive(Debug)]
pub(super) struct Decoder {
    /// The newest first.
    entries: VecDeque<Field>,
    size: usize,
    limit: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { entries: VecDeque::new(), size: 0, limit: TABLE_SIZE }
    }
}

impl Decoder {
    /// The fields of a block, which together have at most `most` bytes.
    pub fn decode(&mut self, mut block: &[u8], most: usize) -> Result<Vec<Field>, InvalidBlock> {
        let mut fields = Vec::new();
        let mut total = 0;
        while let Some(first) = block.first().copied() {
            let field = if first & 0x80 != 0 {
                let index = integer(&mut block, 7)?;
                self.field(index)?
            } else if first & 0xe0 == 0x20 {
                let limit = integer(&mut block, 5)?;
                if limit > TABLE_SIZE {
                    return Err(InvalidBlock("the table is larger than allowed"));
                }
                self.limit = limit;
                self.shrink();
                continue;
            } else {
                let is_kept = first & 0x40 != 0;
                let index = integer(&mut block, if is_kept { 6 } else { 4 })?;
                let name = if index == 0 { string(&mut block)? } else { self.field(index)?.0 };
                let field = (name, string(&mut block)?);
                if is_kept {
                    self.keep(field.clone());
                }
                field
            };
            total += cost(&field);
            if total > most {
                return Err(InvalidBlock("too many fields"));
            }
            fields.push(field);
        }
        Ok(fields)
    }

    fn field(&self, index: usize) -> Result<Field, InvalidBlock> {
        let index = index.checked_sub(1).ok_or(InvalidBlock("index 0"))?;
        if let Some((name, value)) = STATIC.get(index) {
            return Ok((name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        }
        self.entries.get(index - STATIC.len()).cloned().ok_or(InvalidBlock("an index that nothing has"))
    }

    fn keep(&mut self, field: Field) {
        self.size += cost(&field);
        self.entries.push_front(field);
        self.shrink();
    }

    fn shrink(&mut self) {
        while self.size > self.limit {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= cost(&oldest);
        }
    }
}

fn cost((name, value): &Field) -> usize {
    name.len() + value.len() + ENTRY
}

/// An integer that begins in the last `bits` bits of the first byte.
fn integer(block: &mut &[u8], bits: u32) -> Result<usize, InvalidBlock> {
    let mut next = || {
        let (first, rest) = block.split_first().ok_or(InvalidBlock("it ends within an integer"))?;
        *block = rest;
        Ok(usize::from(*first))
    };
    let mask = (1 << bits) - 1;
    let mut value = next()? & mask;
    if value < mask {
        return Ok(value);
    }
    for shift in [0, 7, 14] {
        let byte = next()?;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(InvalidBlock("an integer is too large"))
}

fn string(block: &mut &[u8]) -> Result<Vec<u8>, InvalidBlock> {
    let coded = block.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(InvalidBlock("it ends within a text"))?;
    *block = rest;
    if coded { huffman(text) } else { Ok(text.to_vec()) }
}

/// The code is canonical: codes of one length are numbers in a row, in the order of [`SYMBOLS`].
fn huffman(coded: &[u8]) -> Result<Vec<u8>, InvalidBlock> {
    let mut text = Vec::with_capacity(coded.len() * 2);
    let (mut code, mut first, mut index, mut length) = (0_usize, 0, 0, 0);
    let mut is_padding = true;
    for bit in coded.iter().flat_map(|byte| (0..8).rev().map(move |shift| usize::from(byte >> shift & 1))) {
        is_padding &= bit == 1;
        code |= bit;
        let count = *COUNTS.get(length).ok_or(InvalidBlock("a code that nothing has"))?;
        if code - first < count {
            text.push(*SYMBOLS.get(index + code - first).ok_or(InvalidBlock("an end within a text"))?);
            (code, first, index, length, is_padding) = (0, 0, 0, 0, true);
        } else {
            index += count;
            first = (first + count) << 1;
            code <<= 1;
            length += 1;
        }
    }
    if length < 8 && is_padding { Ok(text) } else { Err(InvalidBlock("a text ends within a code")) }
}

/// How many codes there are of 1, 2, … 30 bits. The last one ends a text, which is an error.
const COUNTS: [usize; 30] =
    [0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 4];

/// Bytes in the order of their codes.
const SYMBOLS: [u8; 256] = [
    48, 49, 50, 97, 99, 101, 105, 111, 115, 116, 32, 37, 45, 46, 47, 51, 52, 53, 54, 55, 56, 57, 61, 65, 95, 98, 100,
    102, 103, 104, 108, 109, 110, 112, 114, 117, 58, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81,
    82, 83, 84, 85, 86, 87, 89, 106, 107, 113, 118, 119, 120, 121, 122, 38, 42, 44, 59, 88, 90, 33, 34, 40, 41, 63, 39,
    43, 124, 35, 62, 0, 36, 64, 91, 93, 126, 94, 125, 60, 96, 123, 92, 195, 208, 128, 130, 131, 162, 184, 194, 224,
    226, 153, 161, 167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230, 129, 132, 133, 134, 136, 146, 154, 156, 160,
    163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233, 1, 135, 137, 138, 139, 140,
    141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180, 182, 183, 188, 191, 197, 231, 239,
    9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237, 199, 207, 234, 235, 192, 193, 200, 201, 202, 205, 210,
    213, 218, 219, 238, 240, 242, 243, 255, 203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250,
    251, 252, 253, 254, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 30,
    31, 127, 220, 249, 10, 13, 22,
];

/// The table that is always there (appendix A).
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(decoder: &mut Decoder, block: &str) -> Result<String, InvalidBlock> {
        let fields = decoder.decode(&hex::decode(block).unwrap(), 1 << 16)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{}={}", text(name), text(value))).collect();
        Ok(fields.join(" "))
    }

    /// Appendix C.3 and C.4 of the RFC.
    #[test]
    fn the_examples_of_the_standard_are_read() {
        let first = ":method=GET :scheme=http :path=/ :authority=www.example.com";
        let third = ":method=GET :scheme=https :path=/index.html :authority=www.example.com custom-key=custom-value";
        for blocks in [
            [
                "828684410f7777772e6578616d706c652e636f6d",
                "828684be58086e6f2d6361636865",
                "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
            ],
            [
                "828684418cf1e3c2e5f23a6ba0ab90f4ff",
                "828684be5886a8eb10649cbf",
                "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
            ],
        ] {
            let mut decoder = Decoder::default();
            assert_eq!(decoded(&mut decoder, blocks[0]).unwrap(), first);
            assert_eq!(decoded(&mut decoder, blocks[1]).unwrap(), format!("{first} cache-control=no-cache"));
            assert_eq!(decoded(&mut decoder, blocks[2]).unwrap(), third);
            assert_eq!(decoder.size, 164);
        }
    }

    #[test]
    fn every_byte_has_a_code() {
        let codes = COUNTS.iter().sum::<usize>();
        assert_eq!(codes, SYMBOLS.len() + 1);
        let mut seen = SYMBOLS;
        seen.sort_unstable();
        assert!(seen.iter().copied().eq(0..=255));
    }

    #[test]
    fn what_breaks_the_format_is_refused() {
        for block in ["80", "ff", "ffffffff7f", "00", "0003aa", "be", "3fe2ff01", "0081ff00", "00820000"] {
            assert!(decoded(&mut Decoder::default(), block).is_err(), "{block}");
        }
        let many = Decoder::default().decode(&[0x82; 100], 1000);
        assert_eq!(many, Err(InvalidBlock("too many fields")));
    }

    proptest::proptest! {
        #[test]
        fn hostile_blocks_never_panic(block in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let mut decoder = Decoder::default();
            let _ = decoder.decode(&block, 1 << 14);
            assert!(decoder.size <= TABLE_SIZE);
        }
    }
}
