//! Netlink attributes as nftables writes them: numbers in network byte order, nested lists.

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// A growing list of attributes.
#[derive(Debug, Default)]
pub struct Attributes {
    bytes: Vec<u8>,
}

impl Attributes {
    /// The encoded list.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A byte string.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |bytes| bytes.extend_from_slice(value));
    }

    /// A NUL-terminated string.
    pub fn string(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
    }

    /// A 32-bit number in network byte order.
    pub fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// A list inside the list.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.attribute(kind | NESTED, |bytes| {
            let mut inner = Self { bytes: std::mem::take(bytes) };
            fill(&mut inner);
            *bytes = inner.bytes;
        });
    }

    fn attribute(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(&mut self.bytes);
        // Callers bound what they nest (a message holds at most a few hundred elements); the kernel would refuse
        // a shortened attribute rather than misread it.
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_sized_padded_and_nested() {
        let mut list = Attributes::default();
        list.string(1, "abcd");
        list.nest(2, |inner| {
            inner.number(3, 0x0102_0304);
            inner.bytes(4, &[9]);
        });
        let half = u16::to_ne_bytes;
        let expected: Vec<u8> = [
            &half(9)[..],
            &half(1),
            b"abcd\0\0\0\0",
            &half(20),
            &half(2 | NESTED),
            &half(8),
            &half(3),
            &[1, 2, 3, 4],
            &half(5),
            &half(4),
            &[9, 0, 0, 0],
        ]
        .concat();
        assert_eq!(list.as_bytes(), expected);
    }
}
