//! Messages of the tunnel, as rancher's remotedialer writes them: one in each binary WebSocket message.
//!
//! Source: remotedialer `message.go`. A message begins with three numbers (its own, the connection's, its kind) in Go's
//! variable length encoding of signed integers; data and connects have a fourth that nobody reads any more. The rest is
//! the payload.

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes of the longest number.
const MAX_VARINT: usize = 10;
/// What is written where the deadline in milliseconds was.
const LEGACY_DEADLINE: i64 = 15_000;
/// Longest `proto/address` of a connect.
const MAX_ADDRESS: usize = 266;
/// Longest error text.
const MAX_ERROR: usize = 100;
/// Most connections that one message may name.
const MAX_SYNCED: usize = 4096;

/// The text that means an orderly end.
pub(super) const EOF: &str = "EOF";

/// A message that cannot be understood. Terminal for the session: nobody knows what was meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It ends within a number.
    #[error("a message of the tunnel is cut short")]
    Short,
    /// A number has more than 64 bits.
    #[error("a message of the tunnel has a number of more than 64 bits")]
    Overflow,
    /// A connect without `/`, or one too long.
    #[error("a message of the tunnel asks for a connection to nowhere")]
    Address,
    /// A list of connections whose length is no multiple of eight, or too long.
    #[error("a message of the tunnel has a damaged list of connections")]
    List,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of a connection.
    Data(i64, Bytes),
    /// Open a connection.
    Connect {
        /// Its number, of the server's choice.
        connection: i64,
        /// `tcp`.
        protocol: String,
        /// `host:port`.
        address: String,
    },
    /// A connection is over; [`EOF`] is no error.
    Error(i64, String),
    /// Send no more data for now.
    Pause(i64),
    /// Send on.
    Resume(i64),
    /// These connections exist; others are over.
    Sync(Vec<i64>),
    /// Between servers, or of a later version: nothing for us.
    Other,
}

impl Frame {
    /// Reads a message.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn decode(mut message: Bytes) -> Result<Self, FrameError> {
        let _id = varint(&mut message)?;
        let connection = varint(&mut message)?;
        let kind = varint(&mut message)?;
        if matches!(kind, 1 | 2) {
            let _deadline = varint(&mut message)?;
        }
        Ok(match kind {
            1 => Self::Data(connection, message),
            2 => {
                if message.len() > MAX_ADDRESS {
                    return Err(FrameError::Address);
                }
                let text = String::from_utf8_lossy(&message);
                let (protocol, address) = text.split_once('/').ok_or(FrameError::Address)?;
                Self::Connect { connection, protocol: protocol.to_owned(), address: address.to_owned() }
            }
            3 => {
                let text = &message[..message.len().min(MAX_ERROR)];
                Self::Error(connection, String::from_utf8_lossy(text).into_owned())
            }
            6 => Self::Pause(connection),
            7 => Self::Resume(connection),
            8 => {
                let (ids, rest) = message.as_chunks::<8>();
                if !rest.is_empty() || ids.len() > MAX_SYNCED {
                    return Err(FrameError::List);
                }
                Self::Sync(ids.iter().map(|id| i64::from_le_bytes(*id)).collect())
            }
            _ => Self::Other,
        })
    }

    /// Writes a message with its own number.
    #[must_use]
    pub fn encode(&self, id: i64) -> Bytes {
        let (connection, kind, size) = match self {
            Self::Data(connection, payload) => (*connection, 1, payload.len()),
            Self::Connect { connection, protocol, address } => (*connection, 2, protocol.len() + address.len() + 1),
            Self::Error(connection, text) => (*connection, 3, text.len()),
            Self::Pause(connection) => (*connection, 6, 0),
            Self::Resume(connection) => (*connection, 7, 0),
            Self::Sync(ids) => (0, 8, ids.len() * 8),
            Self::Other => (0, 0, 0),
        };
        let mut out = BytesMut::with_capacity(4 * MAX_VARINT + size);
        for number in [id, connection, kind] {
            put_varint(&mut out, number);
        }
        match self {
            Self::Data(_, payload) => {
                put_varint(&mut out, LEGACY_DEADLINE);
                out.put_slice(payload);
            }
            Self::Connect { protocol, address, .. } => {
                put_varint(&mut out, LEGACY_DEADLINE);
                out.put_slice(format!("{protocol}/{address}").as_bytes());
            }
            Self::Error(_, text) => out.put_slice(text.as_bytes()),
            Self::Sync(ids) => ids.iter().for_each(|id| out.put_i64_le(*id)),
            Self::Pause(_) | Self::Resume(_) | Self::Other => {}
        }
        out.freeze()
    }
}

/// Go's `binary.ReadVarint`: seven bits a byte, the lowest first; the lowest bit is the sign.
fn varint(bytes: &mut Bytes) -> Result<i64, FrameError> {
    let mut value = 0u64;
    for index in 0..MAX_VARINT {
        let byte = *bytes.get(index).ok_or(FrameError::Short)?;
        if index == MAX_VARINT - 1 && byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            let _ = bytes.split_to(index + 1);
            let magnitude = (value >> 1).cast_signed();
            return Ok(if value & 1 == 0 { magnitude } else { !magnitude });
        }
    }
    Err(FrameError::Overflow)
}

fn put_varint(out: &mut BytesMut, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)).cast_unsigned();
    loop {
        let low = u8::try_from(rest & 0x7f).unwrap_or(0);
        rest >>= 7;
        if rest == 0 {
            out.put_u8(low);
            return;
        }
        out.put_u8(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &'static [u8]) -> Result<Frame, FrameError> {
        Frame::decode(Bytes::from_static(bytes))
    }

    /// Bytes as Go's library writes them: id 1, connection 2, deadline 15000.
    #[test]
    fn as_go_writes_them() {
        let deadline = b"\xb0\xea\x01";
        let mut data = b"\x02\x04\x02".to_vec();
        data.extend(deadline);
        data.extend(b"abc");
        let frame = Frame::Data(2, Bytes::from_static(b"abc"));
        assert_eq!(frame.encode(1), data);
        assert_eq!(Frame::decode(data.into()).unwrap(), frame);
        assert_eq!(
            decode(b"\x02\x04\x04\xb0\xea\x01tcp/127.0.0.1:10250").unwrap(),
            Frame::Connect { connection: 2, protocol: "tcp".into(), address: "127.0.0.1:10250".into() }
        );
        assert_eq!(decode(b"\x02\x04\x06EOF").unwrap(), Frame::Error(2, "EOF".into()));
        assert_eq!(decode(b"\x02\x04\x0c").unwrap(), Frame::Pause(2));
        assert_eq!(decode(b"\x02\x04\x0e").unwrap(), Frame::Resume(2));
        let sync = Frame::Sync(vec![1, 258]);
        assert_eq!(sync.encode(1), &b"\x02\x00\x10\x01\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0"[..]);
        assert_eq!(decode(b"\x02\x04\x08x/1").unwrap(), Frame::Other, "a client of another server");
        assert_eq!(decode(b"\x02\x04\x7f").unwrap(), Frame::Other);
    }

    #[test]
    fn damaged_ones_are_refused() {
        for (bytes, error) in [
            (&b""[..], FrameError::Short),
            (b"\x02\x04", FrameError::Short),
            (b"\x02\x04\x02", FrameError::Short),
            (b"\x80\x80", FrameError::Short),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", FrameError::Overflow),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", FrameError::Overflow),
            (b"\x02\x04\x04\x00nowhere", FrameError::Address),
            (b"\x02\x04\x10\x01\x02", FrameError::List),
        ] {
            assert_eq!(decode(bytes).unwrap_err(), error, "{bytes:?}");
        }
        let mut long = b"\x02\x04\x04\x00tcp/".to_vec();
        long.resize(long.len() + MAX_ADDRESS, b'a');
        assert_eq!(Frame::decode(long.into()).unwrap_err(), FrameError::Address);
        let mut many = b"\x02\x04\x10".to_vec();
        many.resize(many.len() + 8 * (MAX_SYNCED + 1), 0);
        assert_eq!(Frame::decode(many.into()).unwrap_err(), FrameError::List);
        let Frame::Error(_, text) = Frame::decode([&b"\x02\x04\x06"[..], &[b'x'; 5000]].concat().into()).unwrap()
        else {
            panic!("no error")
        };
        assert_eq!(text.len(), MAX_ERROR);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Frame::decode(bytes.into());
        }

        #[test]
        fn hostile_payloads_never_panic(kind in 0u8..20, bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut message = vec![2, 4, kind << 1];
            message.extend(bytes);
            let length = message.len();
            if let Ok(Frame::Sync(ids)) = Frame::decode(message.into()) {
                prop_assert!(ids.len() * 8 < length, "no more memory than was sent");
            }
        }

        #[test]
        fn what_is_written_is_read(id in any::<i64>(), connection in any::<i64>(), payload in proptest::collection::vec(any::<u8>(), 0..300), ids in proptest::collection::vec(any::<i64>(), 0..50)) {
            for frame in [
                Frame::Data(connection, payload.clone().into()),
                Frame::Connect { connection, protocol: "tcp".into(), address: "[::1]:10250".into() },
                Frame::Error(connection, "EOF".into()),
                Frame::Pause(connection),
                Frame::Resume(connection),
                Frame::Sync(ids.clone()),
            ] {
                prop_assert_eq!(Frame::decode(frame.encode(id)).unwrap(), frame);
            }
        }
    }
}
