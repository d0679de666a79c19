//! The text protocol of memcached (`doc/protocol.txt` of its source), as of 1.6.
//!
//! A request is a line, and for those that store something a block of data behind it. Which reply
//! it has depends on the command, so unknown ones are refused. A request with `noreply` has none:
//! it is checked to the last field, since memcached answers one that it cannot read all the same,
//! and that would be taken for the next reply.

use super::scan::{Look, ReplyLook};
use super::{Expect, Verdict};
use crate::reason::Reason;

/// The longest key.
const KEY_BYTES_MAX: usize = 250;

/// Digits of a length: more than 64 MiB has.
const DIGITS_MAX: usize = 10;

/// What a command is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    /// One line comes back.
    Line,
    /// One line, unless the last field says `noreply`; the fields of a command that does.
    Quiet(&'static [Field]),
    /// The same, with a block of data behind the line, as long as field 4 says.
    Storage(&'static [Field]),
    /// Values up to `END`.
    Values,
    /// `STAT` lines up to `END`.
    Stats,
    /// A meta command; with data: of field 3.
    Meta { has_data: bool },
    /// It changes or occupies the connection.
    Stateful,
}

/// A field of a `noreply` command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Key,
    Number,
    /// A time may be negative.
    Signed,
}

use Field::{Key, Number, Signed};

const COMMANDS: [(&str, Sort); 32] = [
    ("get", Sort::Values),
    ("gets", Sort::Values),
    ("gat", Sort::Values),
    ("gats", Sort::Values),
    ("set", Sort::Storage(&[Key, Number, Signed, Number])),
    ("add", Sort::Storage(&[Key, Number, Signed, Number])),
    ("replace", Sort::Storage(&[Key, Number, Signed, Number])),
    ("append", Sort::Storage(&[Key, Number, Signed, Number])),
    ("prepend", Sort::Storage(&[Key, Number, Signed, Number])),
    ("cas", Sort::Storage(&[Key, Number, Signed, Number, Number])),
    ("delete", Sort::Quiet(&[Key])),
    ("incr", Sort::Quiet(&[Key, Number])),
    ("decr", Sort::Quiet(&[Key, Number])),
    ("touch", Sort::Quiet(&[Key, Signed])),
    ("flush_all", Sort::Quiet(&[Number])),
    ("verbosity", Sort::Quiet(&[Number])),
    ("mg", Sort::Meta { has_data: false }),
    ("ms", Sort::Meta { has_data: true }),
    ("md", Sort::Meta { has_data: false }),
    ("ma", Sort::Meta { has_data: false }),
    ("mn", Sort::Meta { has_data: false }),
    ("me", Sort::Meta { has_data: false }),
    ("stats", Sort::Stats),
    ("version", Sort::Line),
    ("cache_memlimit", Sort::Line),
    ("slabs", Sort::Line),
    ("lru", Sort::Line),
    ("lru_crawler", Sort::Line),
    ("watch", Sort::Stateful),
    ("quit", Sort::Stateful),
    ("shutdown", Sort::Stateful),
    ("refresh_certs", Sort::Line),
];

/// A line, as its command has it.
struct Line<'a> {
    name: &'static str,
    sort: Sort,
    /// The fields behind the name.
    fields: Vec<&'a [u8]>,
}

impl<'a> Line<'a> {
    fn of(line: &'a [u8]) -> Result<Self, String> {
        let mut words = line.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        let name = words.next().unwrap_or_default();
        let known = COMMANDS.iter().find(|(known, _)| known.as_bytes() == name);
        let Some((name, sort)) = known else {
            return Err(format!("unknown command {:?}", String::from_utf8_lossy(name)));
        };
        Ok(Line { name, sort: *sort, fields: words.collect() })
    }

    /// Bytes of the block behind the line, without its end; none: there is no block.
    fn data_bytes(&self) -> Result<Option<usize>, String> {
        let place = match self.sort {
            Sort::Storage(_) => 3,
            Sort::Meta { has_data: true } => 1,
            Sort::Line
            | Sort::Quiet(_)
            | Sort::Values
            | Sort::Stats
            | Sort::Meta { has_data: false }
            | Sort::Stateful => return Ok(None),
        };
        let bytes = self.fields.get(place).and_then(|field| number(field));
        bytes.map(Some).ok_or_else(|| format!("{} without the length of its data", self.name))
    }

    fn is_noreply(&self) -> bool {
        match self.sort {
            Sort::Quiet(_) | Sort::Storage(_) => self.fields.last() == Some(&&b"noreply"[..]),
            Sort::Line | Sort::Values | Sort::Stats | Sort::Meta { .. } | Sort::Stateful => false,
        }
    }

    /// Whether memcached will understand a command that it must not answer.
    fn is_sound(&self) -> bool {
        let (Sort::Quiet(wanted) | Sort::Storage(wanted)) = self.sort else { return true };
        let fields = self.fields.get(..self.fields.len().saturating_sub(1)).unwrap_or_default();
        // The delay of flush_all and the level of verbosity may be left out.
        let is_short = fields.is_empty() && wanted == [Number];
        let fits = |(field, wanted): (&&[u8], &Field)| match wanted {
            Key => is_key(field),
            Number => number(field).is_some(),
            Signed => number(field.strip_prefix(b"-").unwrap_or(field)).is_some(),
        };
        is_short || (fields.len() == wanted.len() && fields.iter().zip(wanted).all(fits))
    }

    fn verdict(&self) -> Verdict {
        let stateful = |what: String| Verdict::Refused { reason: Reason::Stateful, what };
        match self.sort {
            Sort::Stateful => stateful(self.name.to_owned()),
            Sort::Line if self.fields.first() == Some(&&b"metadump"[..]) => {
                stateful(format!("{} metadump", self.name))
            }
            Sort::Line if self.fields.first() == Some(&&b"mgdump"[..]) => {
                stateful(format!("{} mgdump", self.name))
            }
            Sort::Quiet(_) | Sort::Storage(_) if self.is_noreply() => match self.is_sound() {
                true => Verdict::None,
                false => Verdict::Refused {
                    reason: Reason::Malformed,
                    what: format!("{} with noreply that memcached would answer", self.name),
                },
            },
            Sort::Line | Sort::Quiet(_) | Sort::Storage(_) => Verdict::One(Expect::Plain),
            Sort::Values => Verdict::One(Expect::Values),
            Sort::Stats => Verdict::One(Expect::Stats),
            Sort::Meta { has_data } => {
                // A flag stands behind the key, and behind the length of the data.
                let flags = self.fields.iter().skip(1 + usize::from(has_data));
                match flags.copied().any(|flag| flag.first() == Some(&b'q')) {
                    true => stateful(format!("{} with q, whose reply may not come", self.name)),
                    false => Verdict::One(Expect::Meta),
                }
            }
        }
    }
}

fn is_key(field: &[u8]) -> bool {
    field.len() <= KEY_BYTES_MAX && field.iter().all(|byte| *byte > b' ' && *byte != 0x7f)
}

fn number(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() || digits.len() > DIGITS_MAX {
        return None;
    }
    digits.iter().try_fold(0usize, |value, digit| {
        digit.is_ascii_digit().then(|| value * 10 + usize::from(digit - b'0'))
    })
}

/// How far one message has been looked through.
#[derive(Debug, Clone, Default)]
pub(super) struct Scan {
    /// Where the next line begins.
    at: usize,
    /// Up to here there is no end of a line.
    searched: usize,
}

/// Why a look goes no further.
enum Stop {
    Incomplete,
    TooLong,
    Malformed,
}

impl Scan {
    pub(super) fn next_request(&mut self, bytes: &[u8], bytes_max: usize) -> Look {
        let look = match self.request_end(bytes, bytes_max) {
            Ok((body, consumed)) => Look::Message { body: 0..body, consumed },
            Err(Stop::Incomplete) => return Look::Incomplete,
            Err(Stop::TooLong) => Look::TooLong { bytes: None },
            Err(Stop::Malformed) => Look::Malformed,
        };
        *self = Scan::default();
        look
    }

    pub(super) fn next_reply(
        &mut self,
        expect: Option<Expect>,
        bytes: &[u8],
        bytes_max: usize,
    ) -> ReplyLook {
        let ended = match expect {
            None => Err(Stop::Malformed),
            Some(Expect::Plain | Expect::HeaderOnly) => self.line(bytes, bytes_max).map(drop),
            Some(Expect::Values) => self.values_end(bytes, bytes_max),
            Some(Expect::Stats) => self.stats_end(bytes, bytes_max),
            Some(Expect::Meta) => self.meta_end(bytes, bytes_max),
        };
        let look = match ended {
            Ok(()) => ReplyLook::Reply { bytes: self.at, closes: false },
            Err(Stop::Incomplete) => return ReplyLook::Incomplete,
            Err(Stop::TooLong) => ReplyLook::TooLong,
            Err(Stop::Malformed) => ReplyLook::Malformed,
        };
        *self = Scan::default();
        look
    }

    /// Where the body of a request ends, and where its last byte is. A line alone is a body without
    /// its end, which may be a line feed only.
    fn request_end(&mut self, bytes: &[u8], bytes_max: usize) -> Result<(usize, usize), Stop> {
        let feed = self.line_feed(bytes, bytes_max)?;
        let line = bytes.get(..feed).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let data = Line::of(line).and_then(|line| line.data_bytes());
        match data.map_err(|_| Stop::Malformed)? {
            None => Ok((line.len(), feed + 1)),
            Some(len) => {
                let end = block_end(bytes, feed + 1, len, bytes_max)?;
                Ok((end, end))
            }
        }
    }

    fn values_end(&mut self, bytes: &[u8], bytes_max: usize) -> Result<(), Stop> {
        loop {
            let begin = self.at;
            let line = self.line(bytes, bytes_max)?;
            let Some(value) = line.strip_prefix(b"VALUE ") else {
                let is_alone = begin == 0 && is_error(line);
                return if line == b"END" || is_alone { Ok(()) } else { Err(Stop::Malformed) };
            };
            let len = value.split(|byte| *byte == b' ').nth(2).and_then(number);
            let end = len.map(|len| block_end(bytes, self.at, len, bytes_max));
            self.block(begin, end.unwrap_or(Err(Stop::Malformed)))?;
        }
    }

    fn stats_end(&mut self, bytes: &[u8], bytes_max: usize) -> Result<(), Stop> {
        loop {
            let begin = self.at;
            let line = self.line(bytes, bytes_max)?;
            let is_part = [&b"STAT "[..], b"ITEM "].iter().any(|mark| line.starts_with(mark));
            if !is_part {
                return if line == b"END" || begin == 0 { Ok(()) } else { Err(Stop::Malformed) };
            }
        }
    }

    fn meta_end(&mut self, bytes: &[u8], bytes_max: usize) -> Result<(), Stop> {
        let begin = self.at;
        let line = self.line(bytes, bytes_max)?;
        match line.strip_prefix(b"VA ") {
            None => Ok(()),
            Some(value) => {
                let len = value.split(|byte| *byte == b' ').next().and_then(number);
                let end = len.map(|len| block_end(bytes, self.at, len, bytes_max));
                self.block(begin, end.unwrap_or(Err(Stop::Malformed)))
            }
        }
    }

    /// Steps over a block that ends at `end`; while it is incomplete the scan stands before its line.
    fn block(&mut self, begin: usize, end: Result<usize, Stop>) -> Result<(), Stop> {
        match end {
            Ok(end) => {
                (self.at, self.searched) = (end, end);
                Ok(())
            }
            Err(stop) => {
                (self.at, self.searched) = (begin, begin);
                Err(stop)
            }
        }
    }

    /// The next line of a reply, without its end.
    fn line<'a>(&mut self, bytes: &'a [u8], bytes_max: usize) -> Result<&'a [u8], Stop> {
        let feed = self.line_feed(bytes, bytes_max)?;
        let line = bytes.get(self.at..feed).and_then(|line| line.strip_suffix(b"\r"));
        (self.at, self.searched) = (feed + 1, feed + 1);
        line.ok_or(Stop::Malformed)
    }

    fn line_feed(&mut self, bytes: &[u8], bytes_max: usize) -> Result<usize, Stop> {
        let from = self.searched.max(self.at);
        match memchr::memchr(b'\n', bytes.get(from..).unwrap_or_default()) {
            Some(at) if from + at > bytes_max + 1 => Err(Stop::TooLong),
            Some(at) => Ok(from + at),
            None if bytes.len() > bytes_max + 1 => Err(Stop::TooLong),
            None => {
                self.searched = bytes.len();
                Err(Stop::Incomplete)
            }
        }
    }
}

fn is_error(line: &[u8]) -> bool {
    line == b"ERROR" || line.starts_with(b"CLIENT_ERROR") || line.starts_with(b"SERVER_ERROR")
}

/// Where a block of `len` bytes ends with its line end.
fn block_end(bytes: &[u8], begin: usize, len: usize, bytes_max: usize) -> Result<usize, Stop> {
    let end = begin.saturating_add(len);
    if end.saturating_add(2) > bytes_max.saturating_add(2) {
        return Err(Stop::TooLong);
    }
    match bytes.get(end..end + 2) {
        Some(b"\r\n") => Ok(end + 2),
        Some(_) => Err(Stop::Malformed),
        None => Err(Stop::Incomplete),
    }
}

/// The line of the one request that `body` is; else what is wrong with it.
fn command(body: &[u8]) -> Result<Line<'_>, String> {
    let line_end = memchr::memchr(b'\n', body);
    let line = body.get(..line_end.unwrap_or(body.len())).unwrap_or_default();
    let line = Line::of(line.strip_suffix(b"\r").unwrap_or(line))?;
    let behind = line_end.map_or(body.len(), |feed| feed + 1);
    let end = match line.data_bytes()? {
        None => Some(behind),
        Some(len) => block_end(body, behind, len, body.len()).ok(),
    };
    match end {
        Some(end) if end == body.len() => Ok(line),
        Some(_) => Err("something stands behind the first command".to_owned()),
        None => Err(format!("the data of {} is not complete", line.name)),
    }
}

pub(super) fn classify(body: &[u8]) -> Verdict {
    match command(body) {
        Ok(line) => line.verdict(),
        Err(what) => Verdict::Refused { reason: Reason::Malformed, what },
    }
}

pub(super) fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    if let Verdict::Refused { reason, .. } = classify(body) {
        return Err(reason);
    }
    out.extend_from_slice(body);
    if !body.ends_with(b"\n") {
        out.extend_from_slice(b"\r\n");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing::{Cut, Cutter, Framing, ReplyCut, ReplyCutter};
    use proptest::prelude::*;

    const MAX: usize = 4_096;

    fn block() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..30)
    }

    fn joined(line: &str, data: &[u8]) -> Vec<u8> {
        [line.as_bytes(), b"\r\n", data, b"\r\n"].concat()
    }

    fn exchange() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        prop_oneof![
            (proptest::collection::vec(block(), 0..4)).prop_map(|values| {
                let mut reply = Vec::new();
                for value in values {
                    reply.extend(joined(&format!("VALUE k 0 {} 7", value.len()), &value));
                }
                (b"gets k".to_vec(), [reply, b"END\r\n".to_vec()].concat())
            }),
            block().prop_map(|data| {
                (joined(&format!("set k 0 0 {}", data.len()), &data), b"STORED\r\n".to_vec())
            }),
            block().prop_map(|data| {
                let reply = joined(&format!("VA {} f30", data.len()), &data);
                (b"mg k v f".to_vec(), reply)
            }),
            block().prop_map(|data| {
                (joined(&format!("ms k {} T0", data.len()), &data), b"HD\r\n".to_vec())
            }),
            Just((b"stats".to_vec(), b"STAT pid 1\r\nSTAT up 2\r\nEND\r\n".to_vec())),
            Just((b"stats reset".to_vec(), b"RESET\r\n".to_vec())),
            Just((b"get k".to_vec(), b"SERVER_ERROR out of memory\r\n".to_vec())),
            Just((b"incr k 1\r\n".to_vec(), b"5\r\n".to_vec())),
            Just((b"mn".to_vec(), b"MN\r\n".to_vec())),
        ]
    }

    fn replies(expects: &[Expect], stream: &[u8], pieces: &[usize]) -> (Vec<ReplyCut>, usize) {
        let mut cutter = ReplyCutter::new(Framing::Memcached, MAX);
        let (mut buffer, mut seen, mut at) = (vec![], vec![], 0);
        let mut pieces = pieces.iter().cycle();
        while at < stream.len() {
            let end = (at + pieces.next().unwrap()).min(stream.len());
            buffer.extend_from_slice(&stream[at..end]);
            at = end;
            loop {
                match cutter.next_reply(expects.get(seen.len()).copied(), &buffer) {
                    ReplyCut::Incomplete => break,
                    ReplyCut::Reply { body, consumed, closes } => {
                        buffer.drain(..consumed);
                        seen.push(ReplyCut::Reply { body, consumed, closes });
                    }
                    other => {
                        seen.push(other);
                        return (seen, 0);
                    }
                }
            }
        }
        (seen, buffer.len())
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_replies_each_as_its_request_has_it(
            exchanges in proptest::collection::vec(exchange(), 1..6),
            pieces in proptest::collection::vec(1usize..30, 1..10),
        ) {
            let expects: Vec<_> = exchanges.iter().map(|(request, _)| {
                match classify(request) { Verdict::One(expect) => expect, other => panic!("{other:?}") }
            }).collect();
            let stream = exchanges.iter().flat_map(|(_, reply)| reply.clone()).collect::<Vec<_>>();
            let expected: Vec<_> = exchanges.iter().map(|(_, reply)| ReplyCut::Reply {
                body: 0..reply.len(), consumed: reply.len(), closes: false }).collect();
            prop_assert_eq!(replies(&expects, &stream, &pieces), (expected.clone(), 0));
            prop_assert_eq!(replies(&expects, &stream, &[1]), (expected.clone(), 0));
            let (seen, left) = replies(&expects, &stream[..stream.len() - 1], &pieces);
            prop_assert_eq!(&seen[..], &expected[..expected.len() - 1]);
            prop_assert!(left > 0);
        }

        #[test]
        fn requests_come_back_whole(
            exchanges in proptest::collection::vec(exchange(), 1..6),
            pieces in proptest::collection::vec(1usize..30, 1..10),
        ) {
            let mut stream = Vec::new();
            exchanges.iter().for_each(|(request, _)| encode(request, &mut stream).unwrap());
            for pieces in [&pieces[..], &[1]] {
                let mut cutter = Cutter::new(Framing::Memcached, MAX);
                let (mut buffer, mut count, mut at) = (vec![], 0, 0);
                let mut pieces = pieces.iter().cycle();
                while at < stream.len() {
                    let end = (at + pieces.next().unwrap()).min(stream.len());
                    buffer.extend_from_slice(&stream[at..end]);
                    at = end;
                    while let Cut::Message { body, consumed } = cutter.next_cut(&buffer) {
                        let mut wire = Vec::new();
                        encode(&buffer[body], &mut wire).unwrap();
                        prop_assert_eq!(&wire, &buffer[..consumed]);
                        buffer.drain(..consumed);
                        count += 1;
                    }
                }
                prop_assert_eq!((count, buffer.len()), (exchanges.len(), 0));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_do_not_depend_on_the_split(
            stream in proptest::collection::vec(
                prop_oneof![any::<u8>(), proptest::sample::select(&b"VALUE STATEND mgset 0123\r\n"[..])],
                0..200,
            ),
            pieces in proptest::collection::vec(1usize..30, 1..10),
        ) {
            for expect in [Expect::Plain, Expect::Values, Expect::Stats, Expect::Meta] {
                let expects = vec![expect; 300];
                prop_assert_eq!(replies(&expects, &stream, &pieces), replies(&expects, &stream, &[1]));
            }
            let _ = classify(&stream);
        }
    }

    #[test]
    fn each_command_has_its_reply_or_is_refused() {
        let one = Verdict::One;
        let refused = |reason, what: &str| Verdict::Refused { reason, what: what.to_owned() };
        for (request, verdict) in [
            ("get a b", one(Expect::Values)),
            ("set k 0 0 2\r\nab\r\n", one(Expect::Plain)),
            ("set k 0 -1 2 noreply\r\nab\r\n", Verdict::None),
            ("cas k 0 0 2 9 noreply\r\nab\r\n", Verdict::None),
            ("delete k noreply\r\n", Verdict::None),
            ("flush_all noreply", Verdict::None),
            ("flush_all 5 noreply", Verdict::None),
            ("version", one(Expect::Plain)),
            ("mg k v q", refused(Reason::Stateful, "mg with q, whose reply may not come")),
            ("quit", refused(Reason::Stateful, "quit")),
            ("lru_crawler metadump all", refused(Reason::Stateful, "lru_crawler metadump")),
            ("frobnicate x", refused(Reason::Malformed, "unknown command \"frobnicate\"")),
            (
                "get a\r\nget b",
                refused(Reason::Malformed, "something stands behind the first command"),
            ),
            (
                "set k 0 0 5\r\nab\r\n",
                refused(Reason::Malformed, "the data of set is not complete"),
            ),
            ("set k 0 0\r\n", refused(Reason::Malformed, "set without the length of its data")),
        ] {
            assert_eq!(classify(request.as_bytes()), verdict, "{request:?}");
        }
        let long = format!("delete {} noreply", "k".repeat(KEY_BYTES_MAX + 1));
        for request in [&long[..], "incr k -1 noreply", "incr k noreply", "delete k 0 0 noreply"] {
            let Verdict::Refused { reason: Reason::Malformed, .. } = classify(request.as_bytes())
            else {
                panic!("memcached would answer {request:?}")
            };
        }
    }

    #[test]
    fn what_is_too_long_or_no_reply_is_told() {
        let broken = |expect, reply: &[u8]| replies(&[expect], reply, &[1]).0.pop();
        let too_long = Some(ReplyCut::Broken(Reason::ReplyTooLong));
        assert_eq!(broken(Expect::Values, b"VALUE k 0 4096\r\n"), too_long);
        assert_eq!(broken(Expect::Meta, b"VA 9999999999\r\n"), too_long);
        let bad = Some(ReplyCut::Broken(Reason::BadReply));
        assert_eq!(broken(Expect::Values, b"VALUE k 0 x\r\n"), bad);
        assert_eq!(broken(Expect::Values, b"STORED\r\n"), bad);
        assert_eq!(broken(Expect::Values, b"VALUE k 0 1\r\nab\r\n"), bad);
        assert_eq!(broken(Expect::Plain, b"STORED\n"), bad);
        let unasked = replies(&[], b"STORED\r\n", &[8]).0.pop();
        assert_eq!(unasked, Some(ReplyCut::Broken(Reason::Unsolicited)));
    }
}
