//! Framing: how a byte stream marks where one message ends and the next begins.
//!
//! [`Framing::encode`] turns a body into the bytes of one message and refuses a body that the
//! framing could not give back as one (M14: one message never becomes two). [`Cutter`] does the
//! reverse, incrementally: it is shown the unread bytes, again and longer when more arrive, and
//! names the next message in them. It copies and allocates nothing, and remembers how far it has
//! searched, so one byte at a time costs no more than all at once.
//!
//! A message that is too long is refused once and skipped up to its end; its tail is never taken
//! for a message (CVE-2018-15686 was that mistake).

use std::fmt;
use std::ops::Range;

use crate::reason::Reason;

/// How a byte stream marks the end of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Each message ends with `\n`.
    Lines,
    /// Each message ends with `\r\n`; a body may contain neither byte, since peers differ in what
    /// they take for an end.
    Crlf,
    /// A length in front: that many bytes follow.
    Length {
        /// Bytes of the length: 2 or 4.
        width: LengthWidth,
        /// Its byte order.
        order: ByteOrder,
    },
    /// Every message has the same size.
    Fixed {
        /// Bytes of each message, at least 1.
        size: u32,
    },
    /// No marks at all: bytes as they come. Replies have no end, so requests are refused.
    Raw,
}

/// Bytes of a length field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LengthWidth {
    /// 16 bits.
    Two,
    /// 32 bits.
    Four,
}

impl LengthWidth {
    fn bytes(self) -> usize {
        match self {
            LengthWidth::Two => 2,
            LengthWidth::Four => 4,
        }
    }
}

/// Byte order of a length field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// Most significant byte first (network order).
    Big,
    /// Least significant byte first.
    Little,
}

/// The names of the framings, for messages that list them.
pub const FRAMING_NAMES: &str = "lines, crlf, u16be, u16le, u32be, u32le, fixed&size=N, raw";

impl Framing {
    /// The framing of that name; `size` belongs to `fixed` alone.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what there is.
    pub fn parse(name: &str, size: Option<u32>) -> Result<Framing, String> {
        let length = |width, order| Framing::Length { width, order };
        let framing = match name {
            "lines" => Framing::Lines,
            "crlf" => Framing::Crlf,
            "u16be" => length(LengthWidth::Two, ByteOrder::Big),
            "u16le" => length(LengthWidth::Two, ByteOrder::Little),
            "u32be" => length(LengthWidth::Four, ByteOrder::Big),
            "u32le" => length(LengthWidth::Four, ByteOrder::Little),
            "fixed" => match size {
                Some(size) if size > 0 => return Ok(Framing::Fixed { size }),
                Some(_) => return Err("framing=fixed needs a size of at least 1 byte".into()),
                None => return Err("framing=fixed needs its size: framing=fixed&size=N".into()),
            },
            "raw" => Framing::Raw,
            _ => {
                return Err(format!("unknown framing {name:?}; there are: {FRAMING_NAMES}"));
            }
        };
        match size {
            None => Ok(framing),
            Some(_) => Err(format!("size belongs to framing=fixed, not to framing={name}")),
        }
    }

    /// Appends `body` as one message to `out`.
    ///
    /// # Errors
    /// [`Reason::Delimiter`], [`Reason::TooLong`] or [`Reason::WrongSize`] when the framing cannot
    /// carry this body as one message; `out` is then unchanged.
    pub fn encode(self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        match self {
            Framing::Lines => {
                // Before the copy: to search bytes that were just written would wait for them.
                if memchr::memchr(b'\n', body).is_some() {
                    return Err(Reason::Delimiter);
                }
                return self.encode_line(body, out);
            }
            Framing::Crlf => {
                if memchr::memchr2(b'\r', b'\n', body).is_some() {
                    return Err(Reason::Delimiter);
                }
                out.extend_from_slice(body);
                out.extend_from_slice(b"\r\n");
            }
            Framing::Length { width: LengthWidth::Two, order } => {
                let length = u16::try_from(body.len()).map_err(|_| Reason::TooLong)?;
                out.extend_from_slice(&match order {
                    ByteOrder::Big => length.to_be_bytes(),
                    ByteOrder::Little => length.to_le_bytes(),
                });
                out.extend_from_slice(body);
            }
            Framing::Length { width: LengthWidth::Four, order } => {
                let length = u32::try_from(body.len()).map_err(|_| Reason::TooLong)?;
                out.extend_from_slice(&match order {
                    ByteOrder::Big => length.to_be_bytes(),
                    ByteOrder::Little => length.to_le_bytes(),
                });
                out.extend_from_slice(body);
            }
            Framing::Fixed { size } => {
                if u32::try_from(body.len()) != Ok(size) {
                    return Err(Reason::WrongSize);
                }
                out.extend_from_slice(body);
            }
            Framing::Raw => out.extend_from_slice(body),
        }
        Ok(())
    }

    /// As [`Framing::encode`], for a body that a [`Cutter`] cut from lines: it holds no `\n`, and
    /// is not searched for one again.
    ///
    /// # Errors
    /// As [`Framing::encode`].
    pub fn encode_line(self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        if self == Framing::Crlf {
            // A line whose writer ended it with CR LF has the CR left.
            return self.encode(body.strip_suffix(b"\r").unwrap_or(body), out);
        }
        if self == Framing::Lines {
            out.reserve(body.len() + 1);
            out.extend_from_slice(body);
            out.push(b'\n');
            return Ok(());
        }
        self.encode(body, out)
    }

    /// Bytes that the framing adds to each body.
    #[must_use]
    pub fn overhead_bytes(self) -> usize {
        match self {
            Framing::Lines => 1,
            Framing::Crlf => 2,
            Framing::Length { width, .. } => width.bytes(),
            Framing::Fixed { .. } | Framing::Raw => 0,
        }
    }
}

impl fmt::Display for Framing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Framing::Lines => "lines",
            Framing::Crlf => "crlf",
            Framing::Length { width: LengthWidth::Two, order: ByteOrder::Big } => "u16be",
            Framing::Length { width: LengthWidth::Two, order: ByteOrder::Little } => "u16le",
            Framing::Length { width: LengthWidth::Four, order: ByteOrder::Big } => "u32be",
            Framing::Length { width: LengthWidth::Four, order: ByteOrder::Little } => "u32le",
            Framing::Fixed { size } => return write!(f, "fixed&size={size}"),
            Framing::Raw => "raw",
        })
    }
}

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
}

impl Cutter {
    /// A cutter for bodies of up to `message_bytes_max` bytes.
    #[must_use]
    pub fn new(framing: Framing, message_bytes_max: usize) -> Self {
        Cutter { framing, message_bytes_max, searched: 0, skip: None }
    }

    /// What stands at the start of `bytes`, which begins where the last cut ended.
    pub fn next_cut(&mut self, bytes: &[u8]) -> Cut {
        if let Some(skip) = self.skip {
            return self.continue_skip(skip, bytes);
        }
        match self.framing {
            Framing::Lines | Framing::Crlf => self.next_delimited(bytes),
            Framing::Length { width, order } => self.next_counted(bytes, width, order),
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
            Framing::Length { .. } | Framing::Fixed { .. } | Framing::Raw => Tail::Partial,
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
            Framing::Lines | Framing::Length { .. } | Framing::Fixed { .. } | Framing::Raw => {
                memchr::memchr(b'\n', unsearched)
            }
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
        let mut framings: Vec<_> = ["lines", "crlf", "u16be", "u16le", "u32be", "u32le", "raw"]
            .iter()
            .map(|name| Framing::parse(name, None).unwrap())
            .collect();
        framings.push(Framing::parse("fixed", Some(7)).unwrap());
        framings
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
            let mut cutter = Cutter::new(Framing::parse(name, None).unwrap(), MAX);
            let first = cutter.next_cut(&field);
            assert_eq!(first, Cut::Refused { reason: Reason::TooLong, consumed: 4 });
            assert!(cutter.is_skipping());
        }
        let mut cutter = Cutter::new(Framing::parse("u32be", None).unwrap(), MAX);
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
        let counted = Framing::parse("u16be", None).unwrap();
        assert_eq!(cut(counted, &[0, 2, b'x'], &[1]).2, Tail::Partial);
    }

    #[test]
    fn the_rest_of_a_message_that_was_begun_elsewhere_is_skipped() {
        let mut cutter = Cutter::new(Framing::Lines, MAX);
        cutter.skip_begun();
        assert_eq!(cutter.next_cut(b"rest\nwhole\n"), Cut::Skipped { consumed: 5 });
        assert_eq!(cutter.next_cut(b"whole\n"), Cut::Message { body: 0..5, consumed: 6 });
    }

    #[test]
    fn names_parse_back_and_wrong_ones_teach() {
        for framing in all_framings() {
            let text = framing.to_string();
            let (name, size) = match text.split_once("&size=") {
                Some((name, size)) => (name, Some(size.parse().unwrap())),
                None => (text.as_str(), None),
            };
            assert_eq!(Framing::parse(name, size), Ok(framing));
        }
        assert!(Framing::parse("line", None).unwrap_err().contains("lines, crlf"));
        assert!(Framing::parse("fixed", None).unwrap_err().contains("size=N"));
        assert!(Framing::parse("lines", Some(3)).is_err());
    }
}
