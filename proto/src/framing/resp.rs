//! The protocol of Redis, versions 2 and 3
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).
//!
//! A request is an array of bulk strings, or an *inline command*: words on a line, for which a shell
//! is enough. A reply is one value, perhaps with attributes in front; its aggregates are counted,
//! not descended into by recursion. A push stands beside replies and belongs to none.

use super::scan::{Look, ReplyLook};
use super::{Expect, Verdict};
use crate::reason::Reason;

/// Aggregates inside of each other: `COMMAND DOCS` has seven.
const DEPTH_MAX: usize = 64;

/// Digits of a length or count: more than 64 MiB has.
const DIGITS_MAX: usize = 10;

/// The least that an element of an aggregate takes: `_\r\n`.
const ELEMENT_BYTES_MIN: usize = 3;

/// Commands that change the connection, occupy it, or have no single reply.
const STATEFUL: [&str; 34] = [
    "ASKING",
    "AUTH",
    "BLMOVE",
    "BLMPOP",
    "BLPOP",
    "BRPOP",
    "BRPOPLPUSH",
    "BZMPOP",
    "BZPOPMAX",
    "BZPOPMIN",
    "DISCARD",
    "EXEC",
    "HELLO",
    "MONITOR",
    "MULTI",
    "PSUBSCRIBE",
    "PSYNC",
    "PUNSUBSCRIBE",
    "QUIT",
    "READONLY",
    "READWRITE",
    "REPLCONF",
    "RESET",
    "SELECT",
    "SHUTDOWN",
    "SSUBSCRIBE",
    "SUBSCRIBE",
    "SUNSUBSCRIBE",
    "SYNC",
    "UNSUBSCRIBE",
    "UNWATCH",
    "WAIT",
    "WAITAOF",
    "WATCH",
];

/// Sub-commands that do, by command.
const STATEFUL_PARTS: [(&str, &str); 8] = [
    ("CLIENT", "CACHING"),
    ("CLIENT", "NO-EVICT"),
    ("CLIENT", "NO-TOUCH"),
    ("CLIENT", "REPLY"),
    ("CLIENT", "SETINFO"),
    ("CLIENT", "SETNAME"),
    ("CLIENT", "TRACKING"),
    ("DEBUG", "SLEEP"),
];

/// Commands that wait only when they are told to.
const BLOCKING_BY_OPTION: [&str; 2] = ["XREAD", "XREADGROUP"];

/// An aggregate that is not complete.
#[derive(Debug, Clone, Copy)]
enum Open {
    /// So many elements are still to come.
    Elements(usize),
    /// So many parts of an attribute, behind which its value comes.
    Attribute(usize),
    /// Elements up to a line `.`.
    Streamed,
    /// Chunks of a string up to an empty one.
    Chunks,
}

/// How far one message has been looked through.
#[derive(Debug, Clone, Default)]
pub(super) struct Scan {
    /// Where the next element begins.
    at: usize,
    /// Up to here there is no end of a line.
    searched: usize,
    open: Vec<Open>,
    is_push: bool,
    /// Bulk strings of a request that are still to come.
    left: Option<usize>,
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
        self.begin();
        look
    }

    pub(super) fn next_reply(
        &mut self,
        expect: Option<Expect>,
        bytes: &[u8],
        bytes_max: usize,
    ) -> ReplyLook {
        if self.at == 0 && self.open.is_empty() {
            self.is_push = bytes.first() == Some(&b'>');
            if expect.is_none() && !self.is_push {
                return ReplyLook::Malformed;
            }
        }
        let look = match self.value_end(bytes, bytes_max) {
            Ok(()) if self.is_push => ReplyLook::Push { bytes: self.at },
            Ok(()) => ReplyLook::Reply { bytes: self.at, closes: false },
            Err(Stop::Incomplete) => return ReplyLook::Incomplete,
            Err(Stop::TooLong) => ReplyLook::TooLong,
            Err(Stop::Malformed) => ReplyLook::Malformed,
        };
        self.begin();
        look
    }

    fn begin(&mut self) {
        (self.at, self.searched, self.is_push, self.left) = (0, 0, false, None);
        self.open.clear();
    }

    /// Where the body of a request ends, and where its last byte is.
    fn request_end(&mut self, bytes: &[u8], bytes_max: usize) -> Result<(usize, usize), Stop> {
        let Some(first) = bytes.first() else { return Err(Stop::Incomplete) };
        if *first != b'*' {
            let end = self.line_feed(bytes, 0, bytes_max)?;
            let line = bytes.get(..end).unwrap_or_default();
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let is_empty = line.iter().all(u8::is_ascii_whitespace);
            return if is_empty { Err(Stop::Malformed) } else { Ok((line.len(), end + 1)) };
        }
        let mut left = match self.left {
            Some(left) => left,
            None => {
                let (line, behind) = self.line(bytes, bytes_max)?;
                let count = number(line.get(1..).unwrap_or_default()).ok_or(Stop::Malformed)?;
                if count == 0 {
                    return Err(Stop::Malformed);
                }
                check_room(count, behind, bytes_max)?;
                self.step(behind);
                count
            }
        };
        while left > 0 {
            self.left = Some(left);
            let (line, behind) = self.line(bytes, bytes_max)?;
            let Some((b'$', len)) = line.split_first() else { return Err(Stop::Malformed) };
            let len = number(len).ok_or(Stop::Malformed)?;
            let end = bulk_end(bytes, behind, len, bytes_max)?;
            self.step(end);
            left -= 1;
        }
        Ok((self.at, self.at))
    }

    /// Looks up to the end of one value.
    fn value_end(&mut self, bytes: &[u8], bytes_max: usize) -> Result<(), Stop> {
        loop {
            let (line, behind) = self.line(bytes, bytes_max)?;
            let Some((kind, rest)) = line.split_first() else { return Err(Stop::Malformed) };
            let is_inside = !self.open.is_empty() || self.at > 0;
            let is_chunk = matches!(self.open.last(), Some(Open::Chunks));
            if is_chunk != (*kind == b';') {
                return Err(Stop::Malformed);
            }
            match kind {
                b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => {
                    self.step(behind);
                    if self.close_element() {
                        return Ok(());
                    }
                }
                b'$' if rest == b"-1" => {
                    self.step(behind);
                    if self.close_element() {
                        return Ok(());
                    }
                }
                b'$' if rest == b"?" => self.descend(Open::Chunks, behind)?,
                b'$' | b'=' | b'!' => {
                    let len = number(rest).ok_or(Stop::Malformed)?;
                    self.step(bulk_end(bytes, behind, len, bytes_max)?);
                    if self.close_element() {
                        return Ok(());
                    }
                }
                b';' => {
                    let len = number(rest).ok_or(Stop::Malformed)?;
                    if len > 0 {
                        self.step(bulk_end(bytes, behind, len, bytes_max)?);
                        continue;
                    }
                    self.step(behind);
                    self.open.pop();
                    if self.close_element() {
                        return Ok(());
                    }
                }
                b'*' if rest == b"-1" => {
                    self.step(behind);
                    if self.close_element() {
                        return Ok(());
                    }
                }
                b'*' | b'~' | b'%' if rest == b"?" => self.descend(Open::Streamed, behind)?,
                b'>' if is_inside => return Err(Stop::Malformed),
                b'*' | b'~' | b'>' | b'%' | b'|' => {
                    let per_entry = if matches!(kind, b'%' | b'|') { 2 } else { 1 };
                    let count = number(rest).ok_or(Stop::Malformed)?.saturating_mul(per_entry);
                    check_room(count, behind, bytes_max)?;
                    match (kind, count) {
                        (b'|', 0) => self.step(behind),
                        (b'|', count) => self.descend(Open::Attribute(count), behind)?,
                        (_, 0) => {
                            self.step(behind);
                            if self.close_element() {
                                return Ok(());
                            }
                        }
                        (_, count) => self.descend(Open::Elements(count), behind)?,
                    }
                }
                b'.' if rest.is_empty() && matches!(self.open.last(), Some(Open::Streamed)) => {
                    self.step(behind);
                    self.open.pop();
                    if self.close_element() {
                        return Ok(());
                    }
                }
                _ => return Err(Stop::Malformed),
            }
        }
    }

    fn step(&mut self, to: usize) {
        self.at = to;
        self.searched = to;
    }

    fn descend(&mut self, open: Open, behind: usize) -> Result<(), Stop> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Stop::Malformed);
        }
        self.open.push(open);
        self.step(behind);
        Ok(())
    }

    /// An element is complete, and what it completes: whether that is the whole value.
    fn close_element(&mut self) -> bool {
        loop {
            match self.open.last_mut() {
                None => return true,
                Some(Open::Elements(left)) => {
                    *left -= 1;
                    if *left > 0 {
                        return false;
                    }
                    self.open.pop();
                }
                Some(Open::Attribute(left)) => {
                    *left -= 1;
                    if *left == 0 {
                        self.open.pop();
                    }
                    // Its value is still to come.
                    return false;
                }
                Some(Open::Streamed | Open::Chunks) => return false,
            }
        }
    }

    /// The line that begins where the scan is, without its end, and where the next one begins.
    fn line<'a>(&mut self, bytes: &'a [u8], bytes_max: usize) -> Result<(&'a [u8], usize), Stop> {
        let feed = self.line_feed(bytes, self.at, bytes_max)?;
        let line = bytes.get(self.at..feed).and_then(|line| line.strip_suffix(b"\r"));
        line.map(|line| (line, feed + 1)).ok_or(Stop::Malformed)
    }

    fn line_feed(&mut self, bytes: &[u8], from: usize, bytes_max: usize) -> Result<usize, Stop> {
        let from = from.max(self.searched);
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

/// A length or count.
fn number(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() || digits.len() > DIGITS_MAX {
        return None;
    }
    digits.iter().try_fold(0usize, |value, digit| {
        digit.is_ascii_digit().then(|| value * 10 + usize::from(digit - b'0'))
    })
}

/// Whether so many elements can follow within the limit.
fn check_room(count: usize, behind: usize, bytes_max: usize) -> Result<(), Stop> {
    let least = count.saturating_mul(ELEMENT_BYTES_MIN).saturating_add(behind);
    if least > bytes_max { Err(Stop::TooLong) } else { Ok(()) }
}

/// Where a bulk string of `len` bytes ends with its line end.
fn bulk_end(bytes: &[u8], begin: usize, len: usize, bytes_max: usize) -> Result<usize, Stop> {
    let end = begin.saturating_add(len);
    if end.saturating_add(2) > bytes_max {
        return Err(Stop::TooLong);
    }
    match bytes.get(end..end + 2) {
        Some(b"\r\n") => Ok(end + 2),
        Some(_) => Err(Stop::Malformed),
        None => Err(Stop::Incomplete),
    }
}

/// One request, in words.
enum Command<'a> {
    /// What stands behind the count.
    Array(&'a [u8]),
    /// The line.
    Inline(&'a [u8]),
}

impl<'a> Command<'a> {
    /// The one request that `body` is; else what is wrong with it.
    fn of(body: &'a [u8]) -> Result<Self, &'static str> {
        if body.first() != Some(&b'*') {
            let line = body.strip_suffix(b"\n").unwrap_or(body);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let is_empty = line.iter().all(u8::is_ascii_whitespace);
            return match memchr::memchr2(b'\n', b'\r', line) {
                Some(_) => Err("more than one line"),
                None if is_empty => Err("an empty line"),
                None => Ok(Command::Inline(line)),
            };
        }
        let mut scan = Scan::default();
        match scan.request_end(body, body.len()) {
            Ok((_, end)) if end == body.len() => {
                let behind = memchr::memchr(b'\n', body).map_or(body.len(), |feed| feed + 1);
                Ok(Command::Array(body.get(behind..).unwrap_or_default()))
            }
            Ok(_) => Err("something stands behind the first command"),
            Err(Stop::Incomplete | Stop::TooLong) => Err("the command is not complete"),
            Err(Stop::Malformed) => Err("not an array of bulk strings"),
        }
    }

    fn is_inline(&self) -> bool {
        matches!(self, Command::Inline(_))
    }

    fn next_word(&mut self) -> Option<&'a [u8]> {
        match self {
            Command::Array(rest) => {
                let feed = memchr::memchr(b'\n', rest)?;
                let len = number(rest.get(1..feed)?.strip_suffix(b"\r")?)?;
                let word = rest.get(feed + 1..feed + 1 + len)?;
                *rest = rest.get(feed + len + 3..)?;
                Some(word)
            }
            Command::Inline(rest) => {
                let begin = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
                let word = rest.get(begin..)?;
                let len = word.iter().position(u8::is_ascii_whitespace).unwrap_or(word.len());
                *rest = word.get(len..)?;
                word.get(..len)
            }
        }
    }
}

/// Which of `names` a word is, whatever its case.
fn find<'n>(names: &[&'n str], word: &[u8]) -> Option<&'n str> {
    names.iter().find(|name| word.eq_ignore_ascii_case(name.as_bytes())).copied()
}

/// What of a request cannot be let onto a connection that others share.
fn stateful(mut command: Command<'_>) -> Option<String> {
    let is_inline = command.is_inline();
    // Redis joins and unescapes quoted words, so that any name can hide in them.
    let hides = |word: &[u8]| is_inline && memchr::memchr3(b'"', b'\'', b'\\', word).is_some();
    let name = command.next_word()?;
    if hides(name) {
        return Some("a command name in quotes".to_owned());
    }
    if let Some(name) = find(&STATEFUL, name) {
        return Some(name.to_owned());
    }
    if let Some(name) = find(&BLOCKING_BY_OPTION, name) {
        while let Some(word) = command.next_word() {
            if word.eq_ignore_ascii_case(b"BLOCK") || hides(word) {
                return Some(format!("{name} BLOCK"));
            }
        }
        return None;
    }
    let parts = STATEFUL_PARTS.iter().filter(|(of, _)| name.eq_ignore_ascii_case(of.as_bytes()));
    let mut parts = parts.peekable();
    parts.peek()?;
    let part = command.next_word()?;
    if hides(part) {
        return Some("a sub-command in quotes".to_owned());
    }
    parts
        .find(|(_, known)| part.eq_ignore_ascii_case(known.as_bytes()))
        .map(|(of, known)| format!("{of} {known}"))
}

pub(super) fn classify(body: &[u8]) -> Verdict {
    match Command::of(body) {
        Err(what) => Verdict::Refused { reason: Reason::Malformed, what: what.to_owned() },
        Ok(command) => match stateful(command) {
            Some(what) => Verdict::Refused { reason: Reason::Stateful, what },
            None => Verdict::One(Expect::Plain),
        },
    }
}

pub(super) fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    let command = Command::of(body).map_err(|_| Reason::Malformed)?;
    let is_inline = command.is_inline();
    if stateful(command).is_some() {
        return Err(Reason::Stateful);
    }
    out.extend_from_slice(body);
    if is_inline && !body.ends_with(b"\n") {
        out.extend_from_slice(b"\r\n");
    }
    Ok(())
}

/// Appends a command of these words, whatever it does to the connection.
pub(super) fn encode_words(words: &[Vec<u8>], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing::{Cut, Cutter, Framing, ReplyCut, ReplyCutter};
    use proptest::prelude::*;

    const MAX: usize = 4_096;

    fn leaf() -> impl Strategy<Value = Vec<u8>> {
        let text = proptest::collection::vec(any::<u8>(), 0..20);
        prop_oneof![
            "[-+,(:][a-zA-Z0-9 .]{0,12}\r\n".prop_map(String::into_bytes),
            prop_oneof![Just("_\r\n"), Just("$-1\r\n"), Just("*-1\r\n"), Just("#t\r\n")]
                .prop_map(|text| text.as_bytes().to_vec()),
            (prop_oneof![Just('$'), Just('='), Just('!')], text.clone()).prop_map(
                |(kind, text)| {
                    [format!("{kind}{}\r\n", text.len()).as_bytes(), &text, b"\r\n"].concat()
                }
            ),
            proptest::collection::vec(text, 0..3).prop_map(|chunks| {
                let mut bytes = b"$?\r\n".to_vec();
                for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
                    bytes.extend(format!(";{}\r\n", chunk.len()).bytes());
                    bytes.extend_from_slice(chunk);
                    bytes.extend_from_slice(b"\r\n");
                }
                bytes.extend_from_slice(b";0\r\n");
                bytes
            }),
        ]
    }

    /// Any value of any version, perhaps nested and streamed.
    fn value() -> impl Strategy<Value = Vec<u8>> {
        leaf().prop_recursive(5, 30, 4, |inner| {
            let parts = proptest::collection::vec(inner.clone(), 0..4);
            prop_oneof![
                (prop_oneof![Just('*'), Just('~')], parts.clone(), any::<bool>()).prop_map(
                    |(kind, parts, streams)| match streams {
                        true =>
                            [format!("{kind}?\r\n").as_bytes(), &parts.concat(), b".\r\n"].concat(),
                        false => {
                            [format!("{kind}{}\r\n", parts.len()).as_bytes(), &parts.concat()]
                                .concat()
                        }
                    }
                ),
                (prop_oneof![Just('%'), Just('|')], parts, inner).prop_map(
                    |(kind, parts, behind)| {
                        let pairs: Vec<u8> = parts
                            .iter()
                            .flat_map(|part| [&part[..], b":1\r\n"])
                            .flatten()
                            .copied()
                            .collect();
                        let value =
                            [format!("{kind}{}\r\n", parts.len()).as_bytes(), &pairs].concat();
                        // An attribute belongs to the value behind it.
                        if kind == '|' { [value, behind].concat() } else { value }
                    }
                ),
            ]
        })
    }

    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Seen {
        Reply(Vec<u8>),
        Push(Vec<u8>),
        Broken(Reason),
    }

    fn cut(stream: &[u8], pieces: &[usize]) -> (Vec<Seen>, usize) {
        let mut cutter = ReplyCutter::new(Framing::Resp, MAX);
        let (mut buffer, mut seen, mut at) = (vec![], vec![], 0);
        let mut pieces = pieces.iter().cycle();
        while at < stream.len() {
            let end = (at + pieces.next().unwrap()).min(stream.len());
            buffer.extend_from_slice(&stream[at..end]);
            at = end;
            loop {
                match cutter.next_reply(Some(Expect::Plain), &buffer) {
                    ReplyCut::Reply { body, consumed, closes } => {
                        assert!(!closes && body == (0..consumed));
                        seen.push(Seen::Reply(buffer.drain(..consumed).collect()));
                    }
                    ReplyCut::Push { consumed } => {
                        seen.push(Seen::Push(buffer.drain(..consumed).collect()));
                    }
                    ReplyCut::Incomplete => break,
                    ReplyCut::Broken(reason) => {
                        seen.push(Seen::Broken(reason));
                        return (seen, 0);
                    }
                }
            }
        }
        (seen, buffer.len())
    }

    proptest! {
        #[test]
        fn any_split_of_any_values_gives_them_back(
            values in proptest::collection::vec((value(), any::<bool>()), 1..6),
            pieces in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (value, is_push) in &values {
                if *is_push {
                    let push = [&b">2\r\n+message\r\n"[..], value].concat();
                    stream.extend_from_slice(&push);
                    expected.push(Seen::Push(push));
                } else {
                    stream.extend_from_slice(value);
                    expected.push(Seen::Reply(value.clone()));
                }
            }
            prop_assert_eq!(cut(&stream, &pieces), (expected.clone(), 0));
            prop_assert_eq!(cut(&stream, &[1]), (expected.clone(), 0));
            // A value that is cut off is never taken for one.
            let (seen, left) = cut(&stream[..stream.len() - 1], &pieces);
            prop_assert_eq!(&seen[..], &expected[..expected.len() - 1]);
            prop_assert!(left > 0);
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_do_not_depend_on_the_split(
            stream in proptest::collection::vec(
                prop_oneof![any::<u8>(), proptest::sample::select(&b"*$%|>~;.?+-:0123459\r\n"[..])],
                0..200,
            ),
            pieces in proptest::collection::vec(1usize..30, 1..10),
        ) {
            prop_assert_eq!(cut(&stream, &pieces), cut(&stream, &[1]));
            let _ = classify(&stream);
            let mut out = b"before".to_vec();
            if encode(&stream, &mut out).is_err() {
                prop_assert_eq!(out, b"before");
            }
        }

        #[test]
        fn requests_come_back_whole(
            requests in proptest::collection::vec(
                proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..5), 1..6),
            pieces in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for words in &requests {
                let mut request = Vec::new();
                encode_words(words, &mut request);
                stream.extend_from_slice(&request);
                expected.push(request);
                stream.extend_from_slice(b"GET k\r\n");
                expected.push(b"GET k".to_vec());
            }
            for pieces in [&pieces[..], &[1]] {
                let mut cutter = Cutter::new(Framing::Resp, MAX);
                let (mut buffer, mut seen, mut at) = (vec![], vec![], 0);
                let mut pieces = pieces.iter().cycle();
                while at < stream.len() {
                    let end = (at + pieces.next().unwrap()).min(stream.len());
                    buffer.extend_from_slice(&stream[at..end]);
                    at = end;
                    while let Cut::Message { body, consumed } = cutter.next_cut(&buffer) {
                        seen.push(buffer[body].to_vec());
                        buffer.drain(..consumed);
                    }
                }
                prop_assert_eq!(&seen, &expected);
                prop_assert!(buffer.is_empty());
            }
        }
    }

    fn refused(body: &str) -> Option<(Reason, String)> {
        match classify(body.as_bytes()) {
            Verdict::Refused { reason, what } => Some((reason, what)),
            Verdict::One(Expect::Plain) => None,
            other => panic!("{other:?}"),
        }
    }

    fn array(words: &[&str]) -> String {
        let words: Vec<_> = words.iter().map(|word| word.as_bytes().to_vec()).collect();
        let mut bytes = Vec::new();
        encode_words(&words, &mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_changes_or_occupies_the_connection_is_refused_by_name() {
        for (words, what) in [
            (&["subscribe", "x"][..], "SUBSCRIBE"),
            (&["BLPOP", "x", "0"], "BLPOP"),
            (&["client", "reply", "off"], "CLIENT REPLY"),
            (&["CLIENT", "TRACKING", "ON"], "CLIENT TRACKING"),
            (&["XREAD", "count", "2", "block", "0", "STREAMS", "s", "$"], "XREAD BLOCK"),
            (&["DEBUG", "SLEEP", "1"], "DEBUG SLEEP"),
            (&["SELECT", "1"], "SELECT"),
        ] {
            let expected = Some((Reason::Stateful, what.to_owned()));
            assert_eq!(refused(&array(words)), expected);
            assert_eq!(refused(&words.join(" ")), expected);
            assert_eq!(encode(array(words).as_bytes(), &mut Vec::new()), Err(Reason::Stateful));
        }
        for words in [
            &["GET", "subscribe"][..],
            &["CLIENT", "LIST"],
            &["XREAD", "STREAMS", "s", "0"],
            &["SUBSCRIBER"],
            &["set", "k", "v \"quoted\" \\x"],
        ] {
            assert_eq!(refused(&array(words)), None, "{words:?}");
        }
    }

    #[test]
    fn no_name_hides_in_the_quotes_of_an_inline_command() {
        for line in
            ["\"\\x53UBSCRIBE\" x", "SUB\"SCRIBE\" x", "CLIENT \"reply\" off", "XREAD 'BLOCK' 0"]
        {
            assert_eq!(refused(line).map(|(reason, _)| reason), Some(Reason::Stateful), "{line}");
        }
        assert_eq!(refused("SET k \"a b\""), None);
    }

    #[test]
    fn one_message_is_exactly_one_command() {
        let two = array(&["GET", "a"]).repeat(2);
        for body in
            [&two[..], "GET a\r\nGET b", "*1\r\n$3\r\nGE", "*0\r\n", "*1\r\n+OK\r\n", " ", "\n"]
        {
            assert_eq!(
                refused(body).map(|(reason, _)| reason),
                Some(Reason::Malformed),
                "{body:?}"
            );
            let mut out = b"before".to_vec();
            assert_eq!(encode(body.as_bytes(), &mut out), Err(Reason::Malformed));
            assert_eq!(out, b"before");
        }
        for line in ["GET a", "GET a\n", "GET a\r\n"] {
            let mut out = Vec::new();
            encode(line.as_bytes(), &mut out).unwrap();
            assert!(out.starts_with(b"GET a") && out.ends_with(b"\n"));
        }
    }

    #[test]
    fn limits_hold_and_nothing_is_allocated_for_an_announcement() {
        for (reply, reason) in [
            (&b"$4096\r\n"[..], Reason::ReplyTooLong),
            (b"*2000\r\n", Reason::ReplyTooLong),
            (b"*9999999999\r\n", Reason::ReplyTooLong),
            (b"$99999999999\r\n", Reason::BadReply),
            (b"$-2\r\n", Reason::BadReply),
            (b"*x\r\n", Reason::BadReply),
            (b"$3\r\nabcd\r\n", Reason::BadReply),
            (b"HTTP/1.1 400 Bad Request\r\n", Reason::BadReply),
            (b"+OK\n", Reason::BadReply),
            (b".\r\n", Reason::BadReply),
            (b"*1\r\n>1\r\n", Reason::BadReply),
        ] {
            assert_eq!(cut(reply, &[1]).0, [Seen::Broken(reason)], "{}", reply.escape_ascii());
        }
        let deep = b"*1\r\n".repeat(DEPTH_MAX + 1);
        assert_eq!(cut(&deep, &[7]).0, [Seen::Broken(Reason::BadReply)]);
        let endless = vec![b'+'; MAX + 2];
        assert_eq!(cut(&endless, &[100]).0, [Seen::Broken(Reason::ReplyTooLong)]);
    }

    #[test]
    fn nothing_but_a_push_may_come_unasked() {
        let mut cutter = ReplyCutter::new(Framing::Resp, MAX);
        let push = b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n";
        assert_eq!(cutter.next_reply(None, &push[..5]), ReplyCut::Incomplete);
        assert_eq!(cutter.next_reply(None, push), ReplyCut::Push { consumed: push.len() });
        assert_eq!(cutter.next_reply(None, b"+OK\r\n"), ReplyCut::Broken(Reason::Unsolicited));
    }
}
