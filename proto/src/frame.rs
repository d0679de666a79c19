//! Frames: what flows on the Unix stream between a client and the broker.
//!
//! A frame is a header of [`HEADER_BYTES`] bytes, little endian, followed by a body:
//!
//! ```text
//! 0      4    5    6        8             16           20         24
//! | body | k  | 0  | up-    | correlation | timeout_ms | reserved | body ...
//! | len  | ind|    | stream | id          |            | (0)      |
//! ```
//!
//! The first frame of a client is [`Kind::Hello`], whose body is written by hand so that every
//! version can read it. No other file does arithmetic on frame lengths. A length is checked
//! against the limit as soon as the header is complete, before any of the body is waited for.

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 24;

/// The same in words of 8 bytes.
pub(crate) const HEADER_WORDS: usize = HEADER_BYTES / 8;

/// The protocol version spoken by this crate. A broker refuses every other one.
pub const VERSION: u16 = 1;

/// Bytes of the body of a [`Kind::Hello`] frame: magic, version, reserved.
pub const HELLO_BYTES: usize = 8;

const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"PBRK");

/// The largest body of a control frame (hello, control, failure), in bytes.
pub const CONTROL_BYTES_MAX: usize = 64 * 1024;

/// What the body of a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The first frame of a session: magic and version.
    Hello = 1,
    /// A control message in bincode ([`crate::message`]).
    Control = 2,
    /// One one-way message for the upstream in the header.
    Send = 3,
    /// One request for the upstream in the header; answered by `Reply` or `Failure` with the same
    /// correlation id.
    Request = 4,
    /// The reply to a request.
    Reply = 5,
    /// The failure of a request or of a control message ([`crate::message::Failure`]).
    Failure = 6,
}

impl Kind {
    #[inline]
    fn from_wire(value: u8) -> Option<Kind> {
        Some(match value {
            1 => Kind::Hello,
            2 => Kind::Control,
            3 => Kind::Send,
            4 => Kind::Request,
            5 => Kind::Reply,
            6 => Kind::Failure,
            _ => return None,
        })
    }

    fn body_bytes_max(self, message_bytes_max: usize) -> usize {
        match self {
            Kind::Hello => HELLO_BYTES,
            Kind::Control | Kind::Failure => CONTROL_BYTES_MAX,
            Kind::Send | Kind::Request | Kind::Reply => message_bytes_max,
        }
    }
}

/// The fixed part of a frame, without the length of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: Kind,
    /// The handle of an opened upstream; 0 where none is meant.
    pub upstream: u16,
    /// Chosen by the client, unique among what it awaits; 0 where nothing is awaited.
    pub correlation: u64,
    /// How long a request may take in all, in milliseconds; 0 = the upstream's own limits.
    pub timeout_ms: u32,
}

impl FrameHeader {
    /// A header that names only its kind.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        FrameHeader { kind, upstream: 0, correlation: 0, timeout_ms: 0 }
    }

    /// Writes the header for a body of `body_bytes`.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] when the length does not fit the header's 32 bits.
    pub fn encode(&self, body_bytes: usize) -> Result<[u8; HEADER_BYTES], FrameError> {
        let mut wire = [0u8; HEADER_BYTES];
        for (place, word) in wire.chunks_exact_mut(8).zip(self.words(body_bytes)?) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Ok(wire)
    }

    /// Appends the header and `body` to `out`.
    ///
    /// # Errors
    /// As [`FrameHeader::encode`]; `out` is then unchanged.
    #[inline]
    pub fn append(&self, body: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
        // Word by word into its place: a header assembled first and copied then would be read
        // back in other units than it was written in, which stalls the processor.
        let words = self.words(body.len())?;
        out.reserve(HEADER_BYTES + body.len());
        for word in words {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(body);
        Ok(())
    }

    /// The header as words.
    #[inline]
    pub(crate) fn words(&self, body_bytes: usize) -> Result<[u64; HEADER_WORDS], FrameError> {
        let length = u32::try_from(body_bytes).map_err(|_| FrameError::TooLong {
            bytes: body_bytes as u64,
            max: u32::MAX as usize,
        })?;
        let first =
            u64::from(length) | u64::from(self.kind as u8) << 32 | u64::from(self.upstream) << 48;
        Ok([first, self.correlation, u64::from(self.timeout_ms)])
    }

    /// The header that is written in words, and the length of its body.
    #[inline]
    pub(crate) fn from_words(words: [u64; HEADER_WORDS]) -> Result<(Self, usize), FrameError> {
        let [first, correlation, last] = words;
        let [l0, l1, l2, l3, kind, reserved, u0, u1] = first.to_le_bytes();
        let kind = Kind::from_wire(kind).ok_or(FrameError::UnknownKind(kind))?;
        let timeout_ms = u32::try_from(last).map_err(|_| FrameError::Reserved)?;
        if reserved != 0 {
            return Err(FrameError::Reserved);
        }
        let upstream = u16::from_le_bytes([u0, u1]);
        let body_bytes = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        Ok((FrameHeader { kind, upstream, correlation, timeout_ms }, body_bytes))
    }
}

/// One complete frame inside a receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The fixed part.
    pub header: FrameHeader,
    /// The body.
    pub body: &'a [u8],
    /// Bytes of the whole frame: what the reader drops from its buffer once it is done.
    pub frame_bytes: usize,
}

/// Why bytes are not a frame. The stream cannot be read further after any of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header announces more than the limit of its kind.
    #[error("a frame announces {bytes} bytes, the limit is {max}")]
    TooLong {
        /// The announced length of the body.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// The kind is none of [`Kind`].
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A reserved field is not zero.
    #[error("a reserved field of the frame header is not zero")]
    Reserved,
}

/// Cuts a receive buffer into frames, incrementally: it is shown the unread bytes again whenever
/// there are more, keeps nothing between calls and allocates nothing.
#[derive(Debug, Clone, Copy)]
pub struct Deframer {
    message_bytes_max: usize,
}

impl Deframer {
    /// A deframer that accepts messages of up to `message_bytes_max` bytes.
    #[must_use]
    pub fn new(message_bytes_max: usize) -> Self {
        Deframer { message_bytes_max }
    }

    /// The first frame of `bytes`, or `None` while it is incomplete.
    ///
    /// # Errors
    /// Any [`FrameError`]; it is reported as soon as the header shows it.
    pub fn next_frame<'a>(&self, bytes: &'a [u8]) -> Result<Option<Frame<'a>>, FrameError> {
        let Some((header, body_bytes)) = self.header(bytes)? else {
            return Ok(None);
        };
        let frame_bytes = HEADER_BYTES + body_bytes;
        let Some(body) = bytes.get(HEADER_BYTES..frame_bytes) else {
            return Ok(None);
        };
        Ok(Some(Frame { header, body, frame_bytes }))
    }

    /// How many bytes the incomplete frame at the start of `bytes` still lacks: what to read next.
    ///
    /// # Errors
    /// As [`Deframer::next_frame`].
    pub fn bytes_missing(&self, bytes: &[u8]) -> Result<usize, FrameError> {
        Ok(match self.header(bytes)? {
            None => HEADER_BYTES - bytes.len(),
            Some((_, body_bytes)) => (HEADER_BYTES + body_bytes).saturating_sub(bytes.len()),
        })
    }

    fn header(&self, bytes: &[u8]) -> Result<Option<(FrameHeader, usize)>, FrameError> {
        let Some(wire) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let (words, _) = wire.as_chunks::<8>();
        let words = [0, 1, 2].map(|index: usize| u64::from_le_bytes(words[index]));
        let (header, body_bytes) = FrameHeader::from_words(words)?;
        let max = header.kind.body_bytes_max(self.message_bytes_max);
        if body_bytes > max {
            return Err(FrameError::TooLong { bytes: body_bytes as u64, max });
        }
        Ok(Some((header, body_bytes)))
    }
}

/// The body of the hello frame of this version.
#[must_use]
pub fn hello() -> [u8; HELLO_BYTES] {
    let mut body = [0u8; HELLO_BYTES];
    body[0..4].copy_from_slice(&HELLO_MAGIC.to_le_bytes());
    body[4..6].copy_from_slice(&VERSION.to_le_bytes());
    body
}

/// The version that a hello body offers, or `None` if it is not a hello of poolbroker.
#[must_use]
pub fn hello_version(body: &[u8]) -> Option<u16> {
    let [m0, m1, m2, m3, v0, v1, _, _] = *body else {
        return None;
    };
    (u32::from_le_bytes([m0, m1, m2, m3]) == HELLO_MAGIC).then(|| u16::from_le_bytes([v0, v1]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 1000;

    fn any_frame() -> impl Strategy<Value = (FrameHeader, Vec<u8>)> {
        let kind = prop_oneof![Just(Kind::Send), Just(Kind::Request), Just(Kind::Reply)];
        let body = proptest::collection::vec(any::<u8>(), 0..MAX);
        (kind, any::<u16>(), any::<u64>(), any::<u32>(), body).prop_map(
            |(kind, upstream, correlation, timeout_ms, body)| {
                (FrameHeader { kind, upstream, correlation, timeout_ms }, body)
            },
        )
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_frames(
            frames in proptest::collection::vec(any_frame(), 1..8),
            cuts in proptest::collection::vec(1usize..300, 1..40),
        ) {
            let mut stream = Vec::new();
            for (header, body) in &frames {
                header.append(body, &mut stream).unwrap();
            }
            let deframer = Deframer::new(MAX);
            let (mut buffer, mut seen, mut at) = (Vec::new(), Vec::new(), 0);
            let mut cuts = cuts.iter().cycle();
            while at < stream.len() {
                let end = (at + cuts.next().unwrap()).min(stream.len());
                buffer.extend_from_slice(&stream[at..end]);
                at = end;
                while let Some(frame) = deframer.next_frame(&buffer).unwrap() {
                    seen.push((frame.header, frame.body.to_vec()));
                    let done = frame.frame_bytes;
                    buffer.drain(..done);
                }
                prop_assert!(buffer.is_empty() || deframer.bytes_missing(&buffer).unwrap() > 0);
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Deframer::new(MAX).next_frame(&bytes);
            let _ = Deframer::new(MAX).bytes_missing(&bytes);
            let _ = hello_version(&bytes);
        }
    }

    #[test]
    fn announced_lengths_at_the_limits_are_judged_from_the_header_alone() {
        for (length, accepted) in [
            (0u32, true),
            (1, true),
            (MAX as u32, true),
            (MAX as u32 + 1, false),
            (1 << 31, false),
            (u32::MAX, false),
        ] {
            let mut wire = FrameHeader::new(Kind::Send).encode(0).unwrap();
            wire[0..4].copy_from_slice(&length.to_le_bytes());
            for split in 0..HEADER_BYTES {
                assert_eq!(Deframer::new(MAX).next_frame(&wire[..split]), Ok(None), "{split}");
            }
            let judged = Deframer::new(MAX).bytes_missing(&wire);
            assert_eq!(judged.is_ok(), accepted, "length {length}: {judged:?}");
        }
    }

    #[test]
    fn another_protocol_is_not_taken_for_a_frame() {
        let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
        assert!(Deframer::new(1 << 20).next_frame(http).is_err());
    }

    #[test]
    fn the_hello_carries_the_version() {
        assert_eq!(hello_version(&hello()), Some(VERSION));
        assert_eq!(hello_version(b"GET / HT"), None);
        assert_eq!(hello_version(b""), None);
    }
}
