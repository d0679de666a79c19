//! The protocol of Redis, versions 2 and 3
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).
//!
//! A request is one command: an array of bulk strings, or one line of words ("inline"). A reply is
//! one value of any type, with the attributes in front of it. A push is a value that the server
//! sends unasked, between replies.
//!
//! Lengths are read as strictly as Redis reads them: where broker and server disagreed about the
//! end of a command, one command would become two.

use std::borrow::Cow;

use super::scan::{Look, ReplyLook};
use super::{Expect, Verdict};
use crate::reason::Reason;

/// Digits of a length or count.
const DIGITS_MAX: usize = 10;
/// Words of a command; Redis takes no more before version 7.
const WORDS_MAX: usize = 1024 * 1024;
/// Bytes of one word (`proto-max-bulk-len` of Redis).
const WORD_BYTES_MAX: usize = 512 * 1024 * 1024;
/// Bytes of the shortest word in an array, `$0\r\n\r\n`.
const WORD_BYTES_MIN: usize = 6;
/// Bytes of an inline command (`PROTO_INLINE_MAX_SIZE` of Redis).
const INLINE_BYTES_MAX: usize = 64 * 1024;
/// Aggregates inside of each other.
const DEPTH_MAX: usize = 64;
/// Bytes of the shortest value, `_\r\n`.
const VALUE_BYTES_MIN: usize = 3;

/// How far one message has been looked through.
#[derive(Debug, Clone, Default)]
pub(super) struct Scan {
    request: Request,
    reply: Reply,
}

impl Scan {
    /// The command at the start of `bytes`. Empty lines in front of it, which Redis ignores, are
    /// consumed with it and count for its limit.
    pub(super) fn next_request(&mut self, bytes: &[u8], bytes_max: usize) -> Look {
        let look = match self.request.look(bytes, bytes_max) {
            Ok(look) => look,
            Err(Stop::Incomplete) => return Look::Incomplete,
            Err(Stop::TooLong) => Look::TooLong { bytes: None },
            Err(Stop::Malformed) => Look::Malformed,
        };
        self.request = Request::default();
        look
    }

    /// The reply or push at the start of `bytes`.
    pub(super) fn next_reply(
        &mut self,
        expect: Option<Expect>,
        bytes: &[u8],
        bytes_max: usize,
    ) -> ReplyLook {
        let is_push = match bytes.first() {
            None => return ReplyLook::Incomplete,
            Some(b'>') => true,
            Some(_) if expect.is_none() => return ReplyLook::Malformed,
            Some(_) => false,
        };
        // What is decided depends on no byte behind the limit, however many came at once.
        let seen = bytes.get(..bytes_max).unwrap_or(bytes);
        let look = match self.reply.walk(seen, bytes_max) {
            Ok(bytes) if is_push => ReplyLook::Push { bytes },
            Ok(bytes) => ReplyLook::Reply { bytes, closes: false },
            Err(Stop::Incomplete) if bytes.len() < bytes_max => return ReplyLook::Incomplete,
            Err(Stop::Incomplete | Stop::TooLong) => ReplyLook::TooLong,
            Err(Stop::Malformed) => ReplyLook::Malformed,
        };
        self.reply.reset();
        look
    }
}

/// Why a look ended without a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// More bytes are needed.
    Incomplete,
    /// The message is longer than the limit.
    TooLong,
    /// It is no message of the protocol.
    Malformed,
}

/// The place behind `\r\n`, which must stand at `at`.
pub(super) fn line_break(bytes: &[u8], at: usize) -> Result<usize, Stop> {
    literal(bytes, at, b"\r\n")
}

/// The place behind `expected`, which must stand at `at`.
fn literal(bytes: &[u8], at: usize, expected: &[u8]) -> Result<usize, Stop> {
    let rest = bytes.get(at..).unwrap_or_default();
    if rest.starts_with(expected) {
        Ok(at.saturating_add(expected.len()))
    } else if expected.starts_with(rest) {
        Err(Stop::Incomplete)
    } else {
        Err(Stop::Malformed)
    }
}

/// Where a line that ends with `\r\n` has its `\r`. It is searched from `searched` on, which is
/// moved to where the next search may begin.
pub(super) fn line_end(bytes: &[u8], searched: &mut usize) -> Result<usize, Stop> {
    let unsearched = bytes.get(*searched..).unwrap_or_default();
    let Some(found) = memchr::memchr2(b'\r', b'\n', unsearched) else {
        *searched = bytes.len();
        return Err(Stop::Incomplete);
    };
    *searched += found;
    line_break(bytes, *searched).map(|_| *searched)
}

/// The length that stands at `at` with its line break, and the place behind both. As Redis has it:
/// no sign, no zero in front.
fn length(bytes: &[u8], at: usize) -> Result<(usize, usize), Stop> {
    // Nearly every one has one digit or two.
    match bytes.get(at..).unwrap_or_default() {
        [one @ b'0'..=b'9', b'\r', b'\n', ..] => return Ok((usize::from(one - b'0'), at + 3)),
        [ten @ b'1'..=b'9', one @ b'0'..=b'9', b'\r', b'\n', ..] => {
            return Ok((usize::from(ten - b'0') * 10 + usize::from(one - b'0'), at + 4));
        }
        _ => {}
    }
    let mut value = 0u64;
    for (index, &byte) in bytes.get(at..).unwrap_or_default().iter().enumerate() {
        match byte {
            b'0'..=b'9' if index < DIGITS_MAX && (index == 0 || value > 0) => {
                value = value * 10 + u64::from(byte - b'0');
            }
            b'\r' if index > 0 => {
                let behind = line_break(bytes, at + index)?;
                return Ok((usize::try_from(value).map_err(|_| Stop::Malformed)?, behind));
            }
            _ => return Err(Stop::Malformed),
        }
    }
    Err(Stop::Incomplete)
}

/// How far a command has been looked through.
#[derive(Debug, Clone, Default)]
struct Request {
    /// Where the command begins: behind empty lines.
    start: usize,
    /// Where its next word begins or, in a line, up to where no end of it was found.
    at: usize,
    /// Words of an array that are still to come; none before its count was read.
    words_left: usize,
}

impl Request {
    fn look(&mut self, bytes: &[u8], bytes_max: usize) -> Result<Look, Stop> {
        loop {
            match bytes.get(self.start) {
                None if bytes.len() > bytes_max => return Err(Stop::TooLong),
                None => return Err(Stop::Incomplete),
                Some(b'*') => {
                    let seen = bytes.get(..bytes_max).unwrap_or(bytes);
                    return match self.array(seen, bytes_max) {
                        Err(Stop::Incomplete) if bytes.len() >= bytes_max => Err(Stop::TooLong),
                        look => look,
                    };
                }
                Some(_) => {
                    if let Some(look) = self.inline(bytes, bytes_max)? {
                        return Ok(look);
                    }
                }
            }
        }
    }

    fn array(&mut self, seen: &[u8], bytes_max: usize) -> Result<Look, Stop> {
        if self.words_left == 0 {
            let (words, behind) = length(seen, self.start + 1)?;
            // Redis has no reply to a command without words.
            if words == 0 || words > WORDS_MAX {
                return Err(Stop::Malformed);
            }
            if behind + words * WORD_BYTES_MIN > bytes_max {
                return Err(Stop::TooLong);
            }
            (self.at, self.words_left) = (behind, words);
        }
        while self.words_left > 0 {
            let (bytes, content) = length(seen, literal(seen, self.at, b"$")?)?;
            if bytes > WORD_BYTES_MAX {
                return Err(Stop::Malformed);
            }
            let end = content.saturating_add(bytes);
            let others = self.words_left - 1;
            let whole = end.saturating_add(2);
            if whole.saturating_add(others * WORD_BYTES_MIN) > bytes_max {
                return Ok(Look::TooLong { bytes: (others == 0).then_some(whole) });
            }
            self.at = line_break(seen, end)?;
            self.words_left = others;
        }
        Ok(Look::Message { body: self.start..self.at, consumed: self.at })
    }

    /// The command of one line; none: the line is empty and was skipped.
    fn inline(&mut self, bytes: &[u8], bytes_max: usize) -> Result<Option<Look>, Stop> {
        let end_max = bytes_max.min(self.start + INLINE_BYTES_MAX);
        let seen = bytes.get(..end_max.saturating_add(2)).unwrap_or(bytes);
        let unsearched = seen.get(self.at..).unwrap_or_default();
        let Some(found) = memchr::memchr(b'\n', unsearched) else {
            self.at = seen.len();
            let is_full = seen.len() >= end_max.saturating_add(2);
            return Err(if is_full { Stop::TooLong } else { Stop::Incomplete });
        };
        let line_break = self.at + found;
        let line = without_return(bytes.get(self.start..line_break).unwrap_or_default());
        let end = self.start + line.len();
        let consumed = line_break + 1;
        if line.iter().all(|byte| is_space(*byte)) {
            (self.start, self.at) = (consumed, consumed);
            Ok(None)
        } else if end > end_max {
            Err(Stop::TooLong)
        } else {
            Ok(Some(Look::Message { body: self.start..end, consumed }))
        }
    }
}

fn without_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// What C calls a space.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

/// An aggregate whose end has not come.
#[derive(Debug, Clone, Copy)]
enum Level {
    /// So many values are still to come; behind those of an attribute, the value it belongs to.
    Values { left: usize, is_attribute: bool },
    /// Values up to `.`.
    Streamed,
    /// Pairs up to `.`; whether the second value of one comes next.
    StreamedPairs { is_second: bool },
    /// Parts of a string up to `;0`.
    StreamedString,
}

/// How far a reply has been looked through.
#[derive(Debug, Clone, Default)]
struct Reply {
    /// Where the next value begins.
    at: usize,
    /// Up to where no end of the line at `at` was found.
    searched: usize,
    /// The aggregates around the next value.
    levels: Vec<Level>,
    /// An attribute stands right in front of the next value.
    is_attributed: bool,
}

impl Reply {
    fn reset(&mut self) {
        self.levels.clear();
        (self.at, self.searched, self.is_attributed) = (0, 0, false);
    }

    /// The bytes of the reply once it is complete.
    fn walk(&mut self, seen: &[u8], bytes_max: usize) -> Result<usize, Stop> {
        loop {
            if self.value(seen, bytes_max)? && self.close() {
                return Ok(self.at);
            }
        }
    }

    /// Goes over one value, or the first line of an aggregate; whether a value ended there.
    fn value(&mut self, seen: &[u8], bytes_max: usize) -> Result<bool, Stop> {
        let at = self.at;
        let Some(&kind) = seen.get(at) else {
            return Err(Stop::Incomplete);
        };
        if let Some(Level::StreamedString) = self.levels.last() {
            return self.part(seen, bytes_max);
        }
        let behind = match kind {
            b'+' | b'-' | b':' | b'#' | b',' | b'(' => {
                let mut searched = self.searched.max(at + 1);
                let end = line_end(seen, &mut searched);
                self.searched = searched;
                let end = end?;
                if !is_scalar(kind, seen.get(at + 1..end).unwrap_or_default()) {
                    return Err(Stop::Malformed);
                }
                end + 2
            }
            b'_' => line_break(seen, at + 1)?,
            b'$' | b'*' if seen.get(at + 1) == Some(&b'-') => literal(seen, at + 1, b"-1\r\n")?,
            b'$' | b'*' | b'%' | b'~' if seen.get(at + 1) == Some(&b'?') => {
                let behind = literal(seen, at + 1, b"?\r\n")?;
                self.open(match kind {
                    b'$' => Level::StreamedString,
                    b'%' => Level::StreamedPairs { is_second: false },
                    _ => Level::Streamed,
                })?;
                self.at = behind;
                return Ok(false);
            }
            b'$' | b'!' | b'=' => bulk(seen, at + 1, bytes_max)?,
            b'.' => {
                let behind = literal(seen, at, b".\r\n")?;
                let is_end = matches!(
                    self.levels.last(),
                    Some(Level::Streamed | Level::StreamedPairs { is_second: false })
                );
                if !is_end || self.is_attributed {
                    return Err(Stop::Malformed);
                }
                self.levels.pop();
                behind
            }
            b'*' | b'~' | b'%' | b'|' => return self.aggregate(kind, seen, bytes_max),
            b'>' if at == 0 => return self.aggregate(kind, seen, bytes_max),
            _ => return Err(Stop::Malformed),
        };
        self.at = behind;
        self.is_attributed = false;
        Ok(true)
    }

    /// The first line of an aggregate with a count; whether it is empty, and ends there.
    fn aggregate(&mut self, kind: u8, seen: &[u8], bytes_max: usize) -> Result<bool, Stop> {
        let (count, behind) = length(seen, self.at + 1)?;
        let is_pairs = matches!(kind, b'%' | b'|');
        let values = if is_pairs { count.saturating_mul(2) } else { count };
        if values.saturating_mul(VALUE_BYTES_MIN).saturating_add(behind) > bytes_max {
            return Err(Stop::TooLong);
        }
        let is_attribute = kind == b'|';
        if values > 0 {
            self.open(Level::Values { left: values, is_attribute })?;
        }
        self.at = behind;
        self.is_attributed = is_attribute && values == 0;
        Ok(values == 0 && !is_attribute)
    }

    /// One part of a streamed string; whether it was the last.
    fn part(&mut self, seen: &[u8], bytes_max: usize) -> Result<bool, Stop> {
        let content = literal(seen, self.at, b";")?;
        if let (0, behind) = length(seen, content)? {
            self.levels.pop();
            self.at = behind;
            return Ok(true);
        }
        self.at = bulk(seen, content, bytes_max)?;
        Ok(false)
    }

    fn open(&mut self, level: Level) -> Result<(), Stop> {
        if self.levels.len() >= DEPTH_MAX {
            return Err(Stop::Malformed);
        }
        self.levels.push(level);
        self.is_attributed = false;
        Ok(())
    }

    /// A value has ended, and with it perhaps the aggregates around it; whether all have.
    fn close(&mut self) -> bool {
        loop {
            match self.levels.last_mut() {
                None => return true,
                Some(Level::Values { left, .. }) if *left > 1 => {
                    *left -= 1;
                    return false;
                }
                Some(Level::Values { is_attribute, .. }) => {
                    self.is_attributed = *is_attribute;
                    self.levels.pop();
                    if self.is_attributed {
                        return false;
                    }
                }
                Some(Level::StreamedPairs { is_second }) => {
                    *is_second = !*is_second;
                    return false;
                }
                Some(Level::Streamed | Level::StreamedString) => return false,
            }
        }
    }
}

/// The place behind the string whose length stands at `at`.
fn bulk(seen: &[u8], at: usize, bytes_max: usize) -> Result<usize, Stop> {
    let (bytes, content) = length(seen, at)?;
    let end = content.saturating_add(bytes);
    if end.saturating_add(2) > bytes_max {
        return Err(Stop::TooLong);
    }
    line_break(seen, end)
}

/// Whether `content`, which holds no line break, is a value of this kind.
fn is_scalar(kind: u8, content: &[u8]) -> bool {
    let unsigned = match content {
        [b'+' | b'-', rest @ ..] => rest,
        content => content,
    };
    let is_integer = || !unsigned.is_empty() && unsigned.iter().all(u8::is_ascii_digit);
    match kind {
        b':' => unsigned.len() <= 20 && is_integer(),
        b'(' => is_integer(),
        b'#' => matches!(content, b"t" | b"f"),
        b',' => {
            let in_number = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
            matches!(unsigned, b"inf" | b"nan")
                || unsigned.iter().any(u8::is_ascii_digit) && unsigned.iter().all(in_number)
        }
        _ => true,
    }
}

/// Appends the command `body`, unless it may not go onto a connection that others share.
pub(super) fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    let array = array_of(body).map_err(|_| Reason::Malformed)?;
    if stateful(&array).is_some() {
        return Err(Reason::Stateful);
    }
    append(body, out);
    Ok(())
}

/// Appends a command that was found fit to go onto a shared connection.
pub(super) fn append(body: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(body);
    // An array, and data of memcached, end with a line break, too.
    if body.last() != Some(&b'\n') {
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends the command that consists of these words, whatever bytes they hold.
pub(super) fn encode_words(words: &[Vec<u8>], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// What reply the command `body` has.
pub(super) fn classify(body: &[u8]) -> Verdict {
    let refused = |reason, what: &str| Verdict::Refused { reason, what: what.to_owned() };
    match array_of(body).map(|array| stateful(&array)) {
        Err(what) => refused(Reason::Malformed, what),
        Ok(Some(what)) => refused(Reason::Stateful, what),
        Ok(None) => Verdict::One(Expect::Plain),
    }
}

/// `body`, which must be one command, as an array. A line may lack its end.
fn array_of(body: &[u8]) -> Result<Cow<'_, [u8]>, &'static str> {
    if body.first() == Some(&b'*') {
        let whole = Look::Message { body: 0..body.len(), consumed: body.len() };
        if Scan::default().next_request(body, usize::MAX) != whole {
            return Err("not one complete array of bulk strings");
        }
        return Ok(Cow::Borrowed(body));
    }
    let line = body.strip_suffix(b"\n").map_or(body, without_return);
    if line.len() > INLINE_BYTES_MAX {
        return Err("an inline command that is too long");
    }
    // For Redis, a line ends with its first NUL, too.
    if memchr::memchr2(b'\n', b'\0', line).is_some() {
        return Err("an inline command of more than one line");
    }
    let words = inline_words(line)?;
    if words.is_empty() {
        return Err("an empty command");
    }
    let mut array = Vec::new();
    encode_words(&words, &mut array);
    Ok(Cow::Owned(array))
}

/// The words of an inline command, with quotes as `sdssplitargs` of Redis has them.
fn inline_words(line: &[u8]) -> Result<Vec<Vec<u8>>, &'static str> {
    const UNBALANCED: &str = "unbalanced quotes";
    let mut words = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.iter().position(|byte| !is_space(*byte)) {
        rest = rest.get(start..).unwrap_or_default();
        let (mut word, mut quote) = (Vec::new(), None);
        while let [byte, behind @ ..] = rest {
            rest = behind;
            match (quote, *byte) {
                (None, b' ' | b'\t' | b'\r') => break,
                (None, mark @ (b'"' | b'\'')) => quote = Some(mark),
                (Some(mark), byte) if byte == mark => {
                    if rest.first().is_some_and(|next| !is_space(*next)) {
                        return Err(UNBALANCED);
                    }
                    quote = None;
                    break;
                }
                (Some(b'"'), b'\\') => rest = unescape(rest, &mut word),
                (Some(_), b'\\') if rest.first() == Some(&b'\'') => {
                    word.push(b'\'');
                    rest = rest.get(1..).unwrap_or_default();
                }
                (_, byte) => word.push(byte),
            }
        }
        if quote.is_some() {
            return Err(UNBALANCED);
        }
        words.push(word);
    }
    Ok(words)
}

/// Appends what stands behind a backslash to `word`; what follows it.
fn unescape<'a>(rest: &'a [u8], word: &mut Vec<u8>) -> &'a [u8] {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let hex = |high, low| u8::try_from(digit(high)? * 16 + digit(low)?).ok();
    if let [b'x', high, low, behind @ ..] = rest
        && let Some(byte) = hex(high, low)
    {
        word.push(byte);
        return behind;
    }
    let Some((&byte, behind)) = rest.split_first() else {
        return rest;
    };
    word.push(match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        byte => byte,
    });
    behind
}

/// The words of an array that was found to be complete.
#[derive(Debug)]
struct Words<'a> {
    array: &'a [u8],
    /// Where the next word begins.
    at: usize,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (bytes, content) = length(self.array, self.at + 1).ok()?;
        self.at = content + bytes + 2;
        self.array.get(content..content + bytes)
    }
}

/// Commands that change the connection, occupy it or end it, by the bytes of their names. Redis
/// takes `POST` and `HOST:` for an attack by way of a browser, and hangs up.
const STATEFUL: [&[&str]; 13] = [
    &[],
    &[],
    &[],
    &[],
    &["AUTH", "EXEC", "POST", "QUIT", "SYNC", "WAIT"],
    &["BLPOP", "BRPOP", "HELLO", "HOST:", "MULTI", "PSYNC", "RESET", "WATCH"],
    &["ASKING", "BLMOVE", "BLMPOP", "BZMPOP", "SELECT"],
    &["DISCARD", "MONITOR", "UNWATCH", "WAITAOF"],
    &["BZPOPMAX", "BZPOPMIN", "READONLY", "REPLCONF", "SHUTDOWN"],
    &["READWRITE", "SUBSCRIBE"],
    &["BRPOPLPUSH", "PSUBSCRIBE", "SSUBSCRIBE"],
    &["UNSUBSCRIBE"],
    &["PUNSUBSCRIBE", "SUNSUBSCRIBE"],
];

/// The same of commands whose other subcommands are harmless.
const STATEFUL_SUBCOMMANDS: [&str; 19] = [
    "CLIENT CACHING",
    "CLIENT CAPA",
    "CLIENT IMPORT-SOURCE",
    "CLIENT KILL",
    "CLIENT NO-EVICT",
    "CLIENT NO-TOUCH",
    "CLIENT REPLY",
    "CLIENT SETINFO",
    "CLIENT SETNAME",
    "CLIENT TRACKING",
    "CLUSTER SYNCSLOTS",
    "DEBUG ASSERT",
    "DEBUG CRASH-AND-RECOVER",
    "DEBUG OOM",
    "DEBUG PANIC",
    "DEBUG RESTART",
    "DEBUG SEGFAULT",
    "DEBUG SLEEP",
    "SCRIPT DEBUG",
];

/// The command's name, where the command changes the connection, occupies it or ends it.
fn stateful(array: &[u8]) -> Option<&'static str> {
    let (_, at) = length(array, 1).ok()?;
    let mut words = Words { array, at };
    let name = words.next()?;
    let is = |name: &[u8], other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    if let Some(what) = STATEFUL.get(name.len())?.iter().find(|what| is(name, what)) {
        return Some(what);
    }
    if is(name, "XREAD") {
        return blocks(words).then_some("XREAD BLOCK");
    }
    if is(name, "XREADGROUP") {
        return blocks(words).then_some("XREADGROUP BLOCK");
    }
    if !["CLIENT", "CLUSTER", "DEBUG", "SCRIPT"].iter().any(|with| is(name, with)) {
        return None;
    }
    let full = [name, words.next()?].join(&b' ');
    STATEFUL_SUBCOMMANDS.into_iter().find(|what| is(&full, what))
}

/// Whether the options of `XREAD` or `XREADGROUP` hold `BLOCK`. Groups and keys may have any name.
fn blocks(mut options: Words<'_>) -> bool {
    while let Some(option) = options.next() {
        match option.to_ascii_uppercase().as_slice() {
            b"BLOCK" => return true,
            b"STREAMS" => return false,
            b"GROUP" => options.by_ref().take(2).for_each(drop),
            b"COUNT" => options.by_ref().take(1).for_each(drop),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 4096;
    const AWAITED: Option<Expect> = Some(Expect::Plain);

    /// The looks at a stream of requests that arrives in pieces: messages, and how it ended.
    fn requests(stream: &[u8], pieces: &[usize], max: usize) -> (Vec<Vec<u8>>, Look) {
        let (mut scan, mut start, mut end) = (Scan::default(), 0, 0);
        let (mut messages, mut pieces) = (vec![], pieces.iter().cycle());
        loop {
            match scan.next_request(&stream[start..end], max) {
                Look::Message { body, consumed } => {
                    messages.push(stream[start..end][body].to_vec());
                    start += consumed;
                }
                Look::Incomplete if end < stream.len() => {
                    assert!(end - start <= max + 2, "an endless message must not fill the buffer");
                    end = (end + pieces.next().unwrap()).min(stream.len());
                }
                last => return (messages, last),
            }
        }
    }

    /// As [`requests`], with replies, which are all awaited; whether each is a push.
    fn replies(stream: &[u8], pieces: &[usize], max: usize) -> (Vec<(bool, usize)>, ReplyLook) {
        let (mut scan, mut start, mut end) = (Scan::default(), 0, 0);
        let (mut cuts, mut pieces) = (vec![], pieces.iter().cycle());
        loop {
            match scan.next_reply(AWAITED, &stream[start..end], max) {
                ReplyLook::Reply { bytes, closes: false } => {
                    cuts.push((false, bytes));
                    start += bytes;
                }
                ReplyLook::Push { bytes } => {
                    cuts.push((true, bytes));
                    start += bytes;
                }
                ReplyLook::Incomplete if end < stream.len() => {
                    assert!(end - start < max.max(1), "an endless reply must not fill the buffer");
                    end = (end + pieces.next().unwrap()).min(stream.len());
                }
                last => return (cuts, last),
            }
        }
    }

    fn reply(bytes: &[u8]) -> ReplyLook {
        Scan::default().next_reply(AWAITED, bytes, MAX)
    }

    fn array(words: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        encode_words(words, &mut out);
        out
    }

    fn words(line: &str) -> Vec<Vec<u8>> {
        line.split(' ').map(|word| word.as_bytes().to_vec()).collect()
    }

    fn what(body: &[u8]) -> Option<(Reason, String)> {
        match classify(body) {
            Verdict::Refused { reason, what } => Some((reason, what)),
            Verdict::One(Expect::Plain) => None,
            verdict => panic!("{verdict:?}"),
        }
    }

    fn blob() -> impl Strategy<Value = Vec<u8>> {
        let any_bytes = proptest::collection::vec(any::<u8>(), 0..20);
        let marks = proptest::collection::vec(proptest::sample::select(&b"\r\n$*>;.1"[..]), 0..8);
        prop_oneof![any_bytes, marks]
    }

    fn prefixed(kind: char, blob: &[u8]) -> Vec<u8> {
        let mut out = format!("{kind}{}\r\n", blob.len()).into_bytes();
        out.extend_from_slice(blob);
        out.extend_from_slice(b"\r\n");
        out
    }

    /// A rendered value of any type.
    fn value() -> impl Strategy<Value = Vec<u8>> {
        let fixed =
            "$-1\r\n *-1\r\n _\r\n #t\r\n #f\r\n ,inf\r\n ,-inf\r\n ,nan\r\n ,1.5e-7\r\n *0\r\n \
            %0\r\n ~0\r\n +\r\n $0\r\n\r\n (-123456789012345678901\r\n"
                .split(' ');
        let leaf = prop_oneof![
            proptest::sample::select(fixed.collect::<Vec<_>>())
                .prop_map(|fixed| fixed.as_bytes().to_vec()),
            "[ -~]{0,20}".prop_map(|text| format!("+{text}\r\n").into_bytes()),
            "[ -~]{0,20}".prop_map(|text| format!("-ERR {text}\r\n").into_bytes()),
            any::<i64>().prop_map(|number| format!(":{number}\r\n").into_bytes()),
            any::<f64>().prop_map(|number| format!(",{number:e}\r\n").to_lowercase().into_bytes()),
            blob().prop_map(|blob| prefixed('$', &blob)),
            blob().prop_map(|blob| prefixed('!', &blob)),
            blob().prop_map(|blob| prefixed('=', &[b"txt:".to_vec(), blob].concat())),
            proptest::collection::vec(blob(), 0..4).prop_map(|parts| {
                let parts = parts.iter().filter(|part| !part.is_empty());
                let parts: Vec<_> = parts.map(|part| prefixed(';', part)).collect();
                [b"$?\r\n".to_vec(), parts.concat(), b";0\r\n".to_vec()].concat()
            }),
        ];
        leaf.prop_recursive(5, 40, 6, |inner| {
            let kinds = proptest::sample::select(&['*', '~', '%', '|'][..]);
            let values = proptest::collection::vec(inner.clone(), 0..6);
            (kinds, values, inner, any::<bool>()).prop_map(|(kind, mut values, last, streamed)| {
                let mut count = values.len();
                if kind == '%' || kind == '|' {
                    values.truncate(count / 2 * 2);
                    count /= 2;
                }
                let values = values.concat();
                if kind == '|' {
                    [format!("|{count}\r\n").into_bytes(), values, last].concat()
                } else if streamed {
                    [format!("{kind}?\r\n").into_bytes(), values, b".\r\n".to_vec()].concat()
                } else {
                    [format!("{kind}{count}\r\n").into_bytes(), values].concat()
                }
            })
        })
    }

    /// A stream's parts: each a value or a push.
    fn stream() -> impl Strategy<Value = Vec<(bool, Vec<u8>)>> {
        let push = proptest::collection::vec(value(), 0..3).prop_map(|values| {
            (true, [format!(">{}\r\n", values.len()).into_bytes(), values.concat()].concat())
        });
        proptest::collection::vec(prop_oneof![value().prop_map(|value| (false, value)), push], 1..6)
    }

    /// Bytes that often look like the protocol.
    fn noise() -> impl Strategy<Value = Vec<u8>> {
        let pieces =
            "* $ % ~ | > + - : ; _ #t . ? \r\n \r\n \r\n \n \r 0 1 2 3 -1 12 a \t $1\r\na\r\n \
            *2\r\n .\r\n"
                .split(' ');
        let piece = prop_oneof![
            9 => proptest::sample::select(pieces.collect::<Vec<_>>())
                .prop_map(|piece| piece.as_bytes().to_vec()),
            1 => any::<u8>().prop_map(|byte| vec![byte]),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn replies_are_cut_alike_however_they_arrive(
            stream in stream(),
            pieces in proptest::collection::vec(1usize..20, 1..20),
        ) {
            let cut = |(is_push, bytes): &(bool, Vec<u8>)| (*is_push, bytes.len());
            let expected: Vec<_> = stream.iter().map(cut).collect();
            let bytes: Vec<u8> = stream.into_iter().flat_map(|(_, bytes)| bytes).collect();
            for pieces in [&pieces[..], &[1], &[bytes.len()]] {
                let (cuts, last) = replies(&bytes, pieces, 1 << 20);
                prop_assert_eq!(&cuts, &expected);
                prop_assert_eq!(last, ReplyLook::Incomplete);
            }
        }

        #[test]
        fn a_truncated_reply_is_incomplete(value in value()) {
            for end in 0..value.len() {
                prop_assert_eq!(reply(&value[..end]), ReplyLook::Incomplete, "{}", end);
            }
            // Of a limit that is too small, the whole is refused, and is not before it must be.
            let mut scan = Scan::default();
            let limited = scan.next_reply(AWAITED, &value, value.len() - 1);
            prop_assert_eq!(limited, ReplyLook::TooLong);
            let whole = ReplyLook::Reply { bytes: value.len(), closes: false };
            prop_assert_eq!(scan.next_reply(AWAITED, &value, value.len()), whole);
        }

        #[test]
        fn noise_does_not_panic_and_does_not_depend_on_the_split(
            stream in prop_oneof![noise(), proptest::collection::vec(any::<u8>(), 0..200)],
            pieces in proptest::collection::vec(1usize..20, 1..20),
            max in prop_oneof![0usize..40, Just(MAX)],
        ) {
            let all = stream.len().max(1);
            let expected = (requests(&stream, &[1], max), replies(&stream, &[1], max));
            for pieces in [&pieces[..], &[all]] {
                prop_assert_eq!(&requests(&stream, pieces, max), &expected.0);
                prop_assert_eq!(&replies(&stream, pieces, max), &expected.1);
            }
            let mut out = Vec::new();
            match (encode(&stream, &mut out), classify(&stream)) {
                (Ok(()), Verdict::One(Expect::Plain)) => {
                    // What goes out is one command, whoever reads it.
                    let (messages, last) = requests(&out, &[all], MAX);
                    prop_assert_eq!((messages.len(), last), (1, Look::Incomplete));
                }
                (Err(reason), Verdict::Refused { reason: same, .. }) => {
                    prop_assert_eq!((reason, out.len()), (same, 0));
                }
                disagree => prop_assert!(false, "{disagree:?}"),
            }
        }

        #[test]
        fn commands_are_cut_alike_however_they_arrive(
            commands in proptest::collection::vec(proptest::collection::vec(blob(), 1..5), 0..6),
            pieces in proptest::collection::vec(1usize..20, 1..20),
        ) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for command in &commands {
                let command = array(command);
                stream.extend_from_slice(&command);
                stream.extend_from_slice(b"\r\n\nGET a\r\nPING\n");
                expected.extend([command, b"GET a".to_vec(), b"PING".to_vec()]);
            }
            for pieces in [&pieces[..], &[1], &[stream.len().max(1)]] {
                let (messages, last) = requests(&stream, pieces, MAX);
                prop_assert_eq!(&messages, &expected);
                prop_assert_eq!(last, Look::Incomplete);
            }
        }

        #[test]
        fn two_commands_are_never_encoded(first in blob(), second in blob()) {
            let (first, second) = (array(&[first]), array(&[second]));
            for body in [
                [&first[..], &second].concat(),
                [&first[..], b"PING"].concat(),
                [&first[..], b"\r\n"].concat(),
                [b"PING\r\n", &second[..]].concat(),
                first[..first.len() - 1].to_vec(),
            ] {
                let mut out = b"before".to_vec();
                prop_assert_eq!(encode(&body, &mut out), Err(Reason::Malformed));
                prop_assert_eq!(&out, b"before");
            }
        }
    }

    #[test]
    fn every_type_of_reply_is_cut() {
        for whole in [
            "+OK\r\n",
            "-ERR no\r\n",
            ":-12\r\n",
            "$5\r\nhe\r\no\r\n",
            "$-1\r\n",
            "*-1\r\n",
            "_\r\n",
            "#t\r\n",
            ",3.25\r\n",
            "(123\r\n",
            "!3\r\nERR\r\n",
            "=7\r\ntxt:abc\r\n",
            "*2\r\n*1\r\n:1\r\n$1\r\na\r\n",
            "%1\r\n+a\r\n*0\r\n",
            "~2\r\n_\r\n#f\r\n",
            "|1\r\n+ttl\r\n:3\r\n+value\r\n",
            "*2\r\n|1\r\n+a\r\n+b\r\n:1\r\n:2\r\n",
            "|0\r\n|1\r\n+a\r\n+b\r\n+c\r\n",
            "$?\r\n;4\r\nHell\r\n;1\r\no\r\n;0\r\n",
            "$?\r\n;0\r\n",
            "*?\r\n:1\r\n*?\r\n.\r\n%?\r\n+a\r\n$?\r\n;0\r\n.\r\n.\r\n",
            "~?\r\n.\r\n",
        ] {
            let bytes = whole.len();
            let stream = format!("{whole}+NEXT\r\n");
            let expected = ReplyLook::Reply { bytes, closes: false };
            assert_eq!(reply(stream.as_bytes()), expected, "{whole:?}");
        }
    }

    #[test]
    fn what_is_no_reply_is_malformed() {
        for wrong in
            "x \r\n +a\n +a\rb :\r\n :1a\r\n :123456789012345678901\r\n #x\r\n #\r\n _x ,\r\n \
            ,1x\r\n ,e\r\n (1.5\r\n $-2\r\n $-10\r\n $01\r\n $+1\r\n $a\r\n $\r\n $1\n \
            $12345678901\r\n $1\r\nab *-2\r\n %-1\r\n ~-1\r\n !-1\r\n !?\r\n |?\r\n >?\r\n \
            >-1\r\n .\r\n ;1\r\n *1\r\n.\r\n *1\r\n>1\r\n |1\r\n+a\r\n+b\r\n>1\r\n \
            *?\r\n|0\r\n.\r\n *?\r\n|1\r\n+a\r\n+b\r\n.\r\n %?\r\n+a\r\n.\r\n $?\r\n+a\r\n \
            $?\r\n;-1\r\n |1\r\n.\r\n"
                .split(' ')
        {
            assert_eq!(reply(wrong.as_bytes()), ReplyLook::Malformed, "{wrong:?}");
        }
    }

    #[test]
    fn aggregates_nest_up_to_a_limit() {
        for open in ["*1\r\n", "*?\r\n", "~1\r\n", "%?\r\n", "|1\r\n"] {
            assert_eq!(reply(open.repeat(DEPTH_MAX).as_bytes()), ReplyLook::Incomplete);
            assert_eq!(reply(open.repeat(DEPTH_MAX + 1).as_bytes()), ReplyLook::Malformed);
        }
        let deepest = format!("{}:1\r\n", "*1\r\n".repeat(DEPTH_MAX));
        let whole = ReplyLook::Reply { bytes: deepest.len(), closes: false };
        assert_eq!(reply(deepest.as_bytes()), whole);
    }

    #[test]
    fn a_reply_is_refused_as_soon_as_its_length_shows() {
        // Each is the start of a reply of at least so many bytes.
        for (bytes, start) in [
            (12, "$6\r\n"),
            (13, "*3\r\n"),
            (22, "%3\r\n"),
            (22, "|3\r\n"),
            (16, ">4\r\n"),
            (11, "$?\r\n;1\r\n"),
            (14, "*2\r\n$4\r\n"),
            (5, "+abc"),
        ] {
            let look = |max| Scan::default().next_reply(AWAITED, start.as_bytes(), max);
            assert_eq!(look(bytes - 1), ReplyLook::TooLong, "{start:?}");
            assert_eq!(look(bytes), ReplyLook::Incomplete, "{start:?}");
        }
        for start in ["$9999999999\r\n", "*9999999999\r\n", "%9999999999\r\n", "~9999999999\r\n"] {
            assert_eq!(reply(start.as_bytes()), ReplyLook::TooLong);
        }
    }

    #[test]
    fn only_a_push_may_come_unasked() {
        let look = |bytes: &[u8]| Scan::default().next_reply(None, bytes, MAX);
        assert_eq!(look(b""), ReplyLook::Incomplete);
        assert_eq!(look(b">"), ReplyLook::Incomplete);
        assert_eq!(look(b">2\r\n+a\r\n"), ReplyLook::Incomplete);
        assert_eq!(look(b">2\r\n+a\r\n*1\r\n:1\r\n+OK"), ReplyLook::Push { bytes: 16 });
        for other in ["+", "*", "|", "x", "\r"] {
            assert_eq!(look(other.as_bytes()), ReplyLook::Malformed);
        }
        // One that was begun unasked is the same when a reply is awaited meanwhile.
        let mut scan = Scan::default();
        assert_eq!(scan.next_reply(None, b">2\r\n+a\r\n", MAX), ReplyLook::Incomplete);
        let whole = b">2\r\n+a\r\n+b\r\n";
        assert_eq!(scan.next_reply(AWAITED, whole, MAX), ReplyLook::Push { bytes: 12 });
    }

    #[test]
    fn what_was_looked_through_is_not_looked_through_again() {
        let mut scan = Scan::default();
        let bytes = format!("*4\r\n$3\r\nabc\r\n*?\r\n:1\r\n+{}", "x".repeat(50));
        assert_eq!(scan.next_reply(AWAITED, bytes.as_bytes(), MAX), ReplyLook::Incomplete);
        assert_eq!((scan.reply.at, scan.reply.searched), (bytes.len() - 51, bytes.len()));
        assert_eq!(scan.reply.levels.len(), 2);
        let mut scan = Scan::default();
        assert_eq!(scan.next_request(b"\r\n*3\r\n$1\r\na\r\n$2\r\nb", MAX), Look::Incomplete);
        assert_eq!((scan.request.start, scan.request.at, scan.request.words_left), (2, 13, 2));
        let mut scan = Scan::default();
        assert_eq!(scan.next_request(b"GET a", MAX), Look::Incomplete);
        assert_eq!(scan.request.at, 5);
        // Scalars and strings take no memory.
        assert_eq!(scan.next_reply(AWAITED, b"$3\r\nabc\r\n", MAX), reply(b"+abcdef\r\n"));
        assert_eq!(scan.reply.levels.capacity(), 0);
    }

    #[test]
    fn the_limits_of_requests() {
        let look = |bytes: &str, max| Scan::default().next_request(bytes.as_bytes(), max);
        let message = |body, consumed| Look::Message { body, consumed };
        assert_eq!(look("PING\r\n", 4), message(0..4, 6));
        assert_eq!(look("PING\n*", 4), message(0..4, 5));
        assert_eq!(look("PING\n", 3), Look::TooLong { bytes: None });
        assert_eq!(look("\r\n \t\r\nPING\n", MAX), message(6..10, 11));
        assert_eq!(look(&"\r\n".repeat(9), 16), Look::TooLong { bytes: None });
        assert_eq!(look("*1\r\n$4\r\nPING\r\n", 14), message(0..14, 14));
        assert_eq!(look("*1\r\n$4\r\nPI", 13), Look::TooLong { bytes: Some(14) });
        assert_eq!(look("*2\r\n$4\r\n", 19), Look::TooLong { bytes: None });
        assert_eq!(look("*2\r\n$4\r\n", 20), Look::Incomplete);
        assert_eq!(look("*9\r\n", 50), Look::TooLong { bytes: None });
        assert_eq!(look(&"a".repeat(INLINE_BYTES_MAX + 1), 1 << 20), Look::Incomplete);
        let longest = "a".repeat(INLINE_BYTES_MAX);
        assert_eq!(look(&format!("{longest}aa"), 1 << 20), Look::TooLong { bytes: None });
        assert_eq!(look(&format!("{longest}a\n"), 1 << 20), Look::TooLong { bytes: None });
        assert!(matches!(look(&format!("{longest}\r\n"), 1 << 20), Look::Message { .. }));
        for wrong in
            "*0\r\n *-1\r\n *x *01\r\n *1\n *1048577\r\n *99999999999\r\n *1\r\n+a *1\r\n$-1\r\n \
            *1\r\n$536870913\r\n *1\r\n$01\r\n *1\r\n$1\r\nab *?\r\n"
                .split(' ')
        {
            assert_eq!(look(wrong, MAX), Look::Malformed, "{wrong:?}");
        }
    }

    #[test]
    fn commands_that_change_or_occupy_the_connection_are_refused() {
        let names = "AUTH EXEC POST QUIT SYNC WAIT BLPOP BRPOP HELLO HOST: MULTI PSYNC RESET WATCH \
            ASKING BLMOVE BLMPOP BZMPOP SELECT DISCARD MONITOR UNWATCH WAITAOF BZPOPMAX BZPOPMIN \
            READONLY REPLCONF SHUTDOWN READWRITE SUBSCRIBE BRPOPLPUSH PSUBSCRIBE SSUBSCRIBE \
            UNSUBSCRIBE PUNSUBSCRIBE SUNSUBSCRIBE";
        let mut refused: Vec<_> = names.split_whitespace().map(|name| (name, name)).collect();
        refused.extend([
            ("CLIENT REPLY", "client reply off"),
            ("CLIENT KILL", "client kill skipme no"),
            ("CLIENT SETNAME", "CLIENT SETNAME a"),
            ("CLIENT SETINFO", "client setinfo lib-name x"),
            ("CLIENT TRACKING", "CLIENT tracking on"),
            ("CLIENT CACHING", "CLIENT CACHING yes"),
            ("CLIENT NO-EVICT", "CLIENT no-evict on"),
            ("CLIENT NO-TOUCH", "CLIENT no-touch on"),
            ("CLIENT CAPA", "client capa redirect"),
            ("CLIENT IMPORT-SOURCE", "CLIENT import-source on"),
            ("CLUSTER SYNCSLOTS", "cluster syncslots establish"),
            ("DEBUG SLEEP", "debug sleep 1"),
            ("DEBUG RESTART", "DEBUG restart 1"),
            ("DEBUG CRASH-AND-RECOVER", "DEBUG crash-and-recover"),
            ("DEBUG SEGFAULT", "debug SEGFAULT"),
            ("DEBUG PANIC", "debug PANIC"),
            ("DEBUG ASSERT", "debug ASSERT"),
            ("DEBUG OOM", "debug OOM"),
            ("SCRIPT DEBUG", "script debug yes"),
            ("XREAD BLOCK", "xread count 1 block 0 streams k $"),
            ("XREADGROUP BLOCK", "XREADGROUP GROUP STREAMS streams BLOCK 0 NOACK STREAMS k >"),
        ]);
        for (expected, line) in refused {
            let lower = line.to_lowercase();
            for body in [line.as_bytes(), lower.as_bytes(), &array(&words(line))] {
                let expected = Some((Reason::Stateful, expected.to_owned()));
                assert_eq!(what(body), expected, "{line}");
                assert_eq!(encode(body, &mut Vec::new()), Err(Reason::Stateful));
            }
        }
        for line in [
            "GET SUBSCRIBE",
            "PING",
            "CLIENT",
            "CLIENT LIST",
            "CLIENT PAUSE 1",
            "CLUSTER SLOTS",
            "FAILOVER ABORT",
            "CLIENT TRACKINGINFO",
            "DEBUG OBJECT k",
            "XREAD COUNT 2 STREAMS BLOCK 0",
            "XREAD STREAMS block $",
            "XREAD",
            "XREADGROUP GROUP BLOCK BLOCK STREAMS k >",
            "SELECTED",
            "SUBSCRIBE_AND_MORE_THAN_THAT",
            "EVAL x 0",
            "LPOP k",
            "SCRIPT LOAD x",
        ] {
            for body in [line.as_bytes(), &array(&words(line))] {
                assert_eq!(what(body), None, "{line}");
            }
        }
    }

    #[test]
    fn quotes_are_read_as_redis_reads_them() {
        for line in [
            r#""SUBSCRIBE" a"#,
            r"'subscribe' a",
            r#""\x53UBSCRIBE""#,
            r#"SUB"SCRIBE" a"#,
            " \tSUBSCRIBE\ta",
            "SUBSCRIBE\ra",
            "\x0bSUBSCRIBE a",
            r#"client "reply" off"#,
            r#"xread bl'ock' "0" streams k $"#,
        ] {
            assert_eq!(what(line.as_bytes()).map(|what| what.0), Some(Reason::Stateful), "{line}");
        }
        for line in [
            r#"GET "a"#,
            "GET 'a",
            r#"GET "a"b"#,
            r"GET 'a'b",
            r#"GET "a\""#,
            r"GET 'a\'",
            r#"GET "a\"#,
            "GET a\0",
            "GET a\nGET b",
            " ",
            "",
            "\r\n",
            "\r\nPING",
            "PING\r\n\r\n",
        ] {
            assert_eq!(what(line.as_bytes()).map(|what| what.0), Some(Reason::Malformed), "{line}");
        }
        for line in [r#"GET "a b\"\x4g""#, r"GET 'it\'s\n'", r#"GET """#, r"GET a\", "GET a\rb"] {
            assert_eq!(what(line.as_bytes()), None, "{line}");
        }
        let line = br#" a"b c"  'it\'s' "\x4a\xZ\n\"" "" d\"#;
        let expected = [&b"ab c"[..], b"it's", b"JxZ\n\"", b"", b"d\\"].map(<[u8]>::to_vec);
        assert_eq!(inline_words(line), Ok(expected.to_vec()));
    }

    #[test]
    fn a_line_gets_its_end() {
        for (body, expected) in [
            ("PING", "PING\r\n"),
            ("PING\r", "PING\r\r\n"),
            ("PING\n", "PING\n"),
            ("PING\r\n", "PING\r\n"),
            ("*1\r\n$4\r\nPING\r\n", "*1\r\n$4\r\nPING\r\n"),
        ] {
            let mut out = b"+".to_vec();
            assert_eq!(encode(body.as_bytes(), &mut out), Ok(()));
            assert_eq!(out, format!("+{expected}").into_bytes());
        }
    }

    #[test]
    fn words_become_one_command() {
        let mut out = Vec::new();
        let secret = b"p\r\n w".to_vec();
        let words = [b"AUTH".to_vec(), secret];
        assert_eq!(super::super::Framing::Resp.encode_words(&words, &mut out), Ok(()));
        assert_eq!(out, b"*2\r\n$4\r\nAUTH\r\n$5\r\np\r\n w\r\n");
        assert_eq!(super::super::Framing::Resp.encode_words(&[], &mut out), Err(Reason::Empty));
    }
}
