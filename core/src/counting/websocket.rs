//! Detects whether the server has closed a WebSocket. Envoy cannot distinguish a closed connection from a broken one
//! better than TCP does, so this reads the frames (RFC 6455, 5.2 and 5.5.1).

/// Parses the frames of a server as they pass, until the close frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frames {
    /// The received part of the current frame's header: 2, 4 or 10 bytes in total.
    head: Vec<u8>,
    /// The remaining length of the last frame's payload.
    payload: u64,
    is_closed: bool,
}

impl Frames {
    const CLOSE: u8 = 8;

    /// Parses the next bytes of the stream.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !self.is_closed {
            let skipped = self.payload.min(bytes.len() as u64);
            self.payload -= skipped;
            bytes = bytes.get(skipped as usize..).unwrap_or_default();
            let Some((first, rest)) = bytes.split_first() else { return };
            bytes = rest;
            self.head.push(*first);
            if let Some(payload) = self.payload_of_head() {
                self.payload = payload;
                self.head.clear();
            }
        }
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// The length in the frame's header, once it is complete. (Frames of servers are not masked.)
    fn payload_of_head(&mut self) -> Option<u64> {
        let (first, rest) = self.head.split_first()?;
        self.is_closed |= first & 0xF == Self::CLOSE;
        match rest.split_first()? {
            (126, length) => length.first_chunk().map(|two| u64::from(u16::from_be_bytes(*two))),
            (127, length) => length.first_chunk().map(|eight| u64::from_be_bytes(*eight)),
            (length, _) => Some(u64::from(length & 0x7F)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// A frame from the server.
    fn frame(opcode: u8, length: usize) -> Vec<u8> {
        let mut frame = vec![0x80 | opcode];
        match length {
            0..126 => frame.push(length as u8),
            126..0x1_0000 => frame.extend([126, (length >> 8) as u8, length as u8]),
            _ => frame.extend([vec![127], (length as u64).to_be_bytes().to_vec()].concat()),
        }
        // A payload that looks like close frames.
        frame.extend(vec![0x88; length]);
        frame
    }

    #[test]
    fn only_a_closing_frame_closes_however_the_stream_is_cut() {
        let talk: Vec<u8> = [0, 1, 125, 126, 200, 65_535, 65_536, 70_000].map(|length| frame(2, length)).concat();
        let closed = [talk.clone(), frame(9, 5), frame(8, 2)].concat();
        for size in [1, 2, 3, 7, 1_000, 1 << 20] {
            let watch = |stream: &[u8]| {
                let mut frames = Frames::default();
                stream.chunks(size).for_each(|bytes| frames.pass(bytes));
                frames.is_closed()
            };
            assert!(!watch(&talk), "cut every {size}");
            assert!(watch(&closed), "cut every {size}");
        }
    }
}
