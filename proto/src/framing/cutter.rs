//! Cutting a stream of messages: what clients write, and what comes back by one-way connections.

use std::ops::Range;

use super::scan::{Look, Scan};
use super::{ByteOrder, Framing, LengthWidth};
use crate::reason::Reason;

/// What stands at the start of the unread bytes. Positions are relative to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// A message: its body, and how many bytes the message takes with its marks.
    Message {
        /// Where the body is.
        body: Range<usize>,
        /// Bytes to drop once the body is used.
        consumed: usize,
    },
    /// A message that is refused, once; its bytes so far are to be dropped.
    Refused {
        /// Why.
        reason: Reason,
        /// Bytes to drop.
        consumed: usize,
    },
    /// More of a message that was refused before: to be dropped, not counted.
    Skipped {
        /// Bytes to drop.
        consumed: usize,
    },
    /// Nothing complete: more bytes are needed.
    Incomplete,
    /// What stands here is no message of the framing, and nothing shows where the next one begins:
    /// the stream cannot be cut further.
    Broken,
}

/// What the end of the stream leaves in the unread bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// Nothing, or the rest of a message refused before.
    Nothing,
    /// An unterminated message, which the framing lets stand: this is its body.
    Message(Range<usize>),
    /// A message that was cut off.
    Partial,
}

/// How the rest of a refused message is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Skip {
    UntilDelimiter,
    Bytes(usize),
}

/// Cuts a byte stream into messages. See the module's text.
#[derive(Debug, Clone)]
pub struct Cutter {
    framing: Framing,
    message_bytes_max: usize,
    /// Bytes at the start of the unread ones that are known to hold no delimiter.
    searched: usize,
    skip: Option<Skip>,
    scan: Scan,
}

impl Cutter {
    /// A cutter for bodies of up to `message_bytes_max` bytes.
    #[must_use]
    pub fn new(framing: Framing, message_bytes_max: usize) -> Self {
        Cutter { framing, message_bytes_max, searched: 0, skip: None, scan: Scan::new(framing) }
    }

    /// What stands at the start of `bytes`, which begins where the last cut ended.
    pub fn next_cut(&mut self, bytes: &[u8]) -> Cut {
        if let Some(skip) = self.skip {
            return self.continue_skip(skip, bytes);
        }
        match self.framing {
            Framing::Lines | Framing::Crlf => self.next_delimited(bytes),
            Framing::Prefix { width, order } => self.next_counted(bytes, width, order),
            Framing::Fixed { size } => {
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                if size > self.message_bytes_max {
                    self.skip_bytes(size, bytes)
                } else if bytes.len() < size {
                    Cut::Incomplete
                } else {
                    Cut::Message { body: 0..size, consumed: size }
                }
            }
            Framing::Length(_)
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Resp
            | Framing::Memcached
            | Framing::Http1 => match self.scan.next_request(bytes, self.message_bytes_max) {
                Look::Message { body, consumed } => Cut::Message { body, consumed },
                Look::Incomplete => Cut::Incomplete,
                Look::TooLong { bytes: Some(whole) } => self.skip_bytes(whole, bytes),
                Look::TooLong { bytes: None } | Look::Malformed => Cut::Broken,
            },
            Framing::Raw if bytes.is_empty() => Cut::Incomplete,
            Framing::Raw => {
                let taken = bytes.len().min(self.message_bytes_max);
                Cut::Message { body: 0..taken, consumed: taken }
            }
        }
    }

    /// What the end of the stream means for the unread `bytes`.
    pub fn finish(&mut self, bytes: &[u8]) -> Tail {
        if bytes.is_empty() || self.skip.is_some() {
            return Tail::Nothing;
        }
        match self.framing {
            Framing::Lines => Tail::Message(0..bytes.len()),
            Framing::Crlf => Tail::Message(0..bytes.strip_suffix(b"\r").unwrap_or(bytes).len()),
            Framing::Prefix { .. }
            | Framing::Length(_)
            | Framing::Fixed { .. }
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Resp
            | Framing::Memcached
            | Framing::Http1
            | Framing::Raw => Tail::Partial,
        }
    }

    /// The stream begins in the middle of a message: skips the rest of it.
    pub fn skip_begun(&mut self) {
        self.searched = 0;
        self.skip = Some(Skip::UntilDelimiter);
    }

    /// Forgets what was begun: the next byte starts a message.
    pub fn reset(&mut self) {
        self.searched = 0;
        self.skip = None;
        self.scan = Scan::new(self.framing);
    }

    /// Whether a refused message is still being skipped.
    #[must_use]
    pub fn is_skipping(&self) -> bool {
        self.skip.is_some()
    }

    fn next_delimited(&mut self, bytes: &[u8]) -> Cut {
        match self.delimiter_in(bytes, self.searched) {
            Some(end) => {
                self.searched = 0;
                let consumed = end + self.framing.overhead_bytes();
                if end > self.message_bytes_max {
                    return Cut::Refused { reason: Reason::TooLong, consumed };
                }
                Cut::Message { body: 0..end, consumed }
            }
            None if bytes.len() > self.message_bytes_max + self.framing.overhead_bytes() - 1 => {
                self.skip = Some(Skip::UntilDelimiter);
                let consumed = self.without_split_delimiter(bytes);
                self.searched = 0;
                Cut::Refused { reason: Reason::TooLong, consumed }
            }
            None => {
                self.searched = self.without_split_delimiter(bytes);
                Cut::Incomplete
            }
        }
    }

    fn next_counted(&mut self, bytes: &[u8], width: LengthWidth, order: ByteOrder) -> Cut {
        let field = match (width, order) {
            (LengthWidth::Two, ByteOrder::Big) => {
                bytes.first_chunk().map(|wire| u32::from(u16::from_be_bytes(*wire)))
            }
            (LengthWidth::Two, ByteOrder::Little) => {
                bytes.first_chunk().map(|wire| u32::from(u16::from_le_bytes(*wire)))
            }
            (LengthWidth::Four, ByteOrder::Big) => {
                bytes.first_chunk().map(|wire| u32::from_be_bytes(*wire))
            }
            (LengthWidth::Four, ByteOrder::Little) => {
                bytes.first_chunk().map(|wire| u32::from_le_bytes(*wire))
            }
        };
        let Some(length) = field else {
            return Cut::Incomplete;
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let whole = length.saturating_add(width.bytes());
        if length > self.message_bytes_max {
            self.skip_bytes(whole, bytes)
        } else if bytes.len() < whole {
            Cut::Incomplete
        } else {
            Cut::Message { body: width.bytes()..whole, consumed: whole }
        }
    }

    fn skip_bytes(&mut self, whole: usize, bytes: &[u8]) -> Cut {
        let consumed = whole.min(bytes.len());
        if whole > consumed {
            self.skip = Some(Skip::Bytes(whole - consumed));
        }
        Cut::Refused { reason: Reason::TooLong, consumed }
    }

    fn continue_skip(&mut self, skip: Skip, bytes: &[u8]) -> Cut {
        let consumed = match skip {
            Skip::UntilDelimiter => match self.delimiter_in(bytes, 0) {
                Some(end) => {
                    self.skip = None;
                    end + self.framing.overhead_bytes()
                }
                None => self.without_split_delimiter(bytes),
            },
            Skip::Bytes(left) => {
                let consumed = left.min(bytes.len());
                self.skip = (left > consumed).then_some(Skip::Bytes(left - consumed));
                consumed
            }
        };
        if consumed == 0 { Cut::Incomplete } else { Cut::Skipped { consumed } }
    }

    fn delimiter_in(&self, bytes: &[u8], from: usize) -> Option<usize> {
        let unsearched = bytes.get(from..)?;
        match self.framing {
            Framing::Crlf => memchr::memmem::find(unsearched, b"\r\n"),
            Framing::Lines
            | Framing::Prefix { .. }
            | Framing::Length(_)
            | Framing::Fixed { .. }
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Resp
            | Framing::Memcached
            | Framing::Http1
            | Framing::Raw => memchr::memchr(b'\n', unsearched),
        }
        .map(|at| at + from)
    }

    /// Bytes that cannot be part of a delimiter whose second half is still to come.
    fn without_split_delimiter(&self, bytes: &[u8]) -> usize {
        match self.framing {
            Framing::Crlf if bytes.last() == Some(&b'\r') => bytes.len() - 1,
            _ => bytes.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 64;

    fn all_framings() -> Vec<Framing> {
        [
            "lines",
            "crlf",
            "u16be",
            "u16le",
            "u32be",
            "u32le",
            "raw",
            "fixed&size=7",
            "length&offset=2&width=1&adjust=0",
            "netstring",
            "octet-counted",
        ]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect()
    }

    /// The stream cut as it arrives in pieces: messages and refusals.
    fn cut(framing: Framing, stream: &[u8], pieces: &[usize]) -> (Vec<Vec<u8>>, Vec<Reason>, Tail) {
        let mut cutter = Cutter::new(framing, MAX);
        let (mut buffer, mut messages, mut refused, mut at) = (vec![], vec![], vec![], 0);
        let mut pieces = pieces.iter().cycle();
        while at < stream.len() {
            let end = (at + pieces.next().unwrap()).min(stream.len());
            buffer.extend_from_slice(&stream[at..end]);
            at = end;
            loop {
                match cutter.next_cut(&buffer) {
                    Cut::Message { body, consumed } => {
                        messages.push(buffer[body].to_vec());
                        buffer.drain(..consumed);
                    }
                    Cut::Refused { reason, consumed } => {
                        refused.push(reason);
                        buffer.drain(..consumed);
                    }
                    Cut::Skipped { consumed } => {
                        assert!(consumed > 0);
                        buffer.drain(..consumed);
                    }
                    Cut::Incomplete => break,
                    Cut::Broken => return (messages, refused, Tail::Partial),
                }
            }
            assert!(buffer.len() <= MAX + 5, "an endless message must not fill the buffer");
        }
        let tail = cutter.finish(&buffer);
        (messages, refused, tail)
    }

    fn bodies() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let body = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..MAX + 20),
            proptest::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'a')], 0..12),
            proptest::collection::vec(any::<u8>(), 7..=7),
            // With its own length in its third byte.
            proptest::collection::vec(any::<u8>(), 3..MAX + 20).prop_map(|mut body| {
                body[2] = body.len() as u8;
                body
            }),
        ];
        proptest::collection::vec(body, 0..12)
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_messages(
            bodies in bodies(),
            pieces in proptest::collection::vec(1usize..20, 1..20),
        ) {
            for framing in all_framings() {
                let mut stream = Vec::new();
                let (mut expected, mut too_long) = (vec![], 0);
                for body in &bodies {
                    let before = stream.len();
                    match framing.encode(body, &mut stream) {
                        Ok(()) if body.len() > MAX => too_long += 1,
                        Ok(()) => expected.push(body.clone()),
                        Err(_) => prop_assert_eq!(stream.len(), before),
                    }
                }
                let (messages, refused, tail) = cut(framing, &stream, &pieces);
                if framing == Framing::Raw {
                    prop_assert_eq!(messages.concat(), stream);
                    continue;
                }
                prop_assert_eq!(&messages, &expected, "{}", framing);
                prop_assert_eq!(refused.len(), too_long, "{}", framing);
                prop_assert_eq!(tail, Tail::Nothing);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_do_not_depend_on_the_split(
            stream in proptest::collection::vec(any::<u8>(), 0..400),
            pieces in proptest::collection::vec(1usize..30, 1..10),
        ) {
            for framing in all_framings() {
                if framing == Framing::Raw { continue; }
                let (messages, refused, _) = cut(framing, &stream, &pieces);
                let (one_by_one, refused_one_by_one, _) = cut(framing, &stream, &[1]);
                prop_assert_eq!(messages, one_by_one);
                prop_assert_eq!(refused, refused_one_by_one);
            }
        }
    }

    #[test]
    fn a_record_that_is_too_long_is_dropped_up_to_its_delimiter_and_counted_once() {
        let mut stream = vec![b'A'; 1_000_000];
        stream.extend_from_slice(b"\nOK\n");
        let (messages, refused, _) = cut(Framing::Lines, &stream, &[MAX]);
        assert_eq!(messages, vec![b"OK".to_vec()]);
        assert_eq!(refused, vec![Reason::TooLong]);
    }

    #[test]
    fn lengths_at_the_limits_neither_panic_nor_wrap() {
        for (name, field) in [
            ("u32be", u32::MAX.to_be_bytes()),
            ("u32le", u32::MAX.to_le_bytes()),
            ("u32be", (1u32 << 31).to_be_bytes()),
            ("u32be", (MAX as u32 + 1).to_be_bytes()),
        ] {
            let mut cutter = Cutter::new(Framing::parse(name, &[]).unwrap(), MAX);
            let first = cutter.next_cut(&field);
            assert_eq!(first, Cut::Refused { reason: Reason::TooLong, consumed: 4 });
            assert!(cutter.is_skipping());
        }
        let mut cutter = Cutter::new(Framing::parse("u32be", &[]).unwrap(), MAX);
        assert_eq!(cutter.next_cut(&[0; 4]), Cut::Message { body: 4..4, consumed: 4 });
    }

    #[test]
    fn a_body_that_contains_its_delimiter_is_refused() {
        for body in [&b"a\nFORGED"[..], b"\n", b"x\r\ny"] {
            for framing in [Framing::Lines, Framing::Crlf] {
                let mut out = b"before".to_vec();
                assert_eq!(framing.encode(body, &mut out), Err(Reason::Delimiter));
                assert_eq!(out, b"before");
            }
        }
        let mut out = Vec::new();
        assert_eq!(Framing::Crlf.encode(b"a\rb", &mut out), Err(Reason::Delimiter));
    }

    #[test]
    fn an_unterminated_tail_is_a_message_only_where_the_framing_has_a_delimiter() {
        assert_eq!(cut(Framing::Lines, b"a\nb", &[1]).2, Tail::Message(0..1));
        assert_eq!(cut(Framing::Crlf, b"a\r\nb\r", &[1]).2, Tail::Message(0..1));
        let counted = Framing::parse("u16be", &[]).unwrap();
        assert_eq!(cut(counted, &[0, 2, b'x'], &[1]).2, Tail::Partial);
    }

    #[test]
    fn the_rest_of_a_message_that_was_begun_elsewhere_is_skipped() {
        let mut cutter = Cutter::new(Framing::Lines, MAX);
        cutter.skip_begun();
        assert_eq!(cutter.next_cut(b"rest\nwhole\n"), Cut::Skipped { consumed: 5 });
        assert_eq!(cutter.next_cut(b"whole\n"), Cut::Message { body: 0..5, consumed: 6 });
    }
}
