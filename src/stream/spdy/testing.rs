//! A SPDY client for tests, written against the frames and not against the server's code.

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    Decoder, Frame, Headers,
    frame::{self, Encoder},
};

pub(in crate::stream) struct Client<T> {
    pub(super) io: T,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Client<T> {
    pub(in crate::stream) fn new(io: T) -> Self {
        Self { io, encoder: Encoder::new(), decoder: Decoder::new(1 << 20), buffer: BytesMut::new() }
    }

    pub(in crate::stream) async fn open(&mut self, id: u32, headers: &[(&str, &str)]) {
        let mut out = BytesMut::new();
        self.encoder.syn_stream(id, &headers.iter().copied().collect::<Headers>(), false, &mut out);
        self.send(&out).await;
    }

    pub(in crate::stream) async fn data(&mut self, id: u32, payload: &[u8], fin: bool) {
        let mut out = BytesMut::new();
        frame::data(id, payload, fin, &mut out);
        self.send(&out).await;
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.expect("write");
        self.io.flush().await.expect("flush");
    }

    /// The next frame; `None` at the end of the connection.
    pub(in crate::stream) async fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.decode(&mut self.buffer).expect("frame") {
                return Some(frame);
            }
            if self.io.read_buf(&mut self.buffer).await.expect("read") == 0 {
                return None;
            }
        }
    }

    /// The payload of the next data frame, which must belong to `stream`; replies are passed over.
    pub(in crate::stream) async fn payload(&mut self, stream: u32) -> Vec<u8> {
        loop {
            match self.frame().await.expect("frame") {
                Frame::SynReply { .. } => {}
                Frame::Data { id, data, .. } if id == stream => return data.to_vec(),
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// Everything up to the end of the connection.
    pub(in crate::stream) async fn rest(&mut self) -> Frames {
        self.until(|_| false).await
    }

    /// Everything up to an end that `stop` recognises ("fin 3", "rst 3", "goaway").
    pub(in crate::stream) async fn until(&mut self, stop: impl Fn(&str) -> bool) -> Frames {
        let mut frames = Frames(Vec::new());
        while let Some(frame) = self.frame().await {
            let end = end_of(&frame);
            frames.0.push(frame);
            if end.is_some_and(|end| stop(&end)) {
                break;
            }
        }
        frames
    }

    /// Sends `payload` while reading, until the server finishes that stream.
    pub(in crate::stream) async fn exchange(&mut self, id: u32, payload: &[u8], fin: bool) -> Frames {
        let mut out = BytesMut::new();
        frame::data(id, payload, fin, &mut out);
        let mut frames = Frames(Vec::new());
        let mut sent = 0;
        let last = format!("fin {id}");
        loop {
            while let Some(frame) = self.decoder.decode(&mut self.buffer).expect("frame") {
                let done = end_of(&frame).is_some_and(|end| end == last);
                frames.0.push(frame);
                if done {
                    return frames;
                }
            }
            let (mut read, mut write) = tokio::io::split(&mut self.io);
            tokio::select! {
                count = read.read_buf(&mut self.buffer) => assert_ne!(count.expect("read"), 0, "connection ended"),
                count = write.write(&out[sent..]), if sent < out.len() => {
                    sent += count.expect("write");
                    write.flush().await.expect("flush");
                }
            }
        }
    }
}

/// What a server sent, in order.
pub(in crate::stream) struct Frames(Vec<Frame>);

impl Frames {
    /// Everything that came on one stream.
    pub(in crate::stream) fn payload(&self, stream: u32) -> Vec<u8> {
        let pieces = self.0.iter().filter_map(|frame| match frame {
            Frame::Data { id, data, .. } if *id == stream => Some(&data[..]),
            _ => None,
        });
        pieces.collect::<Vec<_>>().concat()
    }

    /// The ends of streams and of the connection, in order.
    pub(in crate::stream) fn ends(&self) -> Vec<String> {
        self.0.iter().filter_map(end_of).collect()
    }

    /// Where in the order an end stands.
    pub(in crate::stream) fn end_position(&self, end: &str) -> usize {
        self.0.iter().position(|frame| end_of(frame).is_some_and(|found| found == end)).expect("no such end")
    }

    /// Where in the order the first payload of a stream stands.
    pub(in crate::stream) fn payload_position(&self, stream: u32) -> usize {
        let is_payload =
            |frame: &Frame| matches!(frame, Frame::Data { id, data, .. } if *id == stream && !data.is_empty());
        self.0.iter().position(is_payload).expect("no payload")
    }
}

fn end_of(frame: &Frame) -> Option<String> {
    match frame {
        Frame::Data { id, fin: true, .. } => Some(format!("fin {id}")),
        Frame::RstStream { id, .. } => Some(format!("rst {id}")),
        Frame::GoAway { .. } => Some("goaway".into()),
        _ => None,
    }
}
