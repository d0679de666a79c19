//! HTTP/1.0 and 1.1 messages (RFC 9112; the meaning of methods and status codes: RFC 9110).
//!
//! The broker passes messages on as they are, so it and the peer must agree on where each ends; a
//! message on which two implementations may differ is refused (request smuggling). Hence stricter
//! than RFC 9112 asks of a recipient:
//!
//! * Lines end with CRLF, never with LF alone. An empty line in front of a message is malformed.
//! * A field line that continues the one before it, or has a space in front of its colon, is
//!   malformed, and so are control characters.
//! * `Content-Length` is one number; repeated in a reply, it is the same one. It never stands beside
//!   `Transfer-Encoding`, which is exactly `chunked`, stands once, and in HTTP/1.1 only. Neither
//!   stands in a trailer, or is written with `_`, which gateways take for `-`. `Host` stands once.
//! * The number of a request has no zero in front, which some read as octal.
//! * `head` and `Head` are malformed: whether a body follows the reply depends on who reads them.
//! * A request target holds visible ASCII characters alone; one space stands on either side of it.
//! * A chunk size is followed by CRLF or by `;`, nothing else.
//!
//! A status line without the space behind its code, which many servers write, is accepted.
//!
//! A request behind which the peer closes, or whose body it may leave unread (`Expect`), is the last
//! of its connection.
//!
//! Interim responses (status 1xx) belong to the final one behind them. A reply whose length nothing
//! shows ends with the connection.

use super::scan::{Look, ReplyLook};
use super::{Expect, Verdict};
use crate::reason::Reason;

/// How far one message has been looked through. Lines before `at` have been read, and are not
/// looked at again.
#[derive(Debug, Clone, Default)]
pub(super) struct Scan {
    stage: Stage,
    /// Where the line or chunk begins that is read next.
    at: usize,
    /// Up to here there is no further end of a line.
    searched: usize,
    head: Head,
}

/// What is read next.
#[derive(Debug, Clone, Copy, Default)]
enum Stage {
    /// The request line, or the status line.
    #[default]
    FirstLine,
    /// A field line of the header, or its end.
    Field,
    /// A body that ends there.
    Body { end: usize },
    /// The line in front of a chunk.
    ChunkSize,
    /// A chunk that ends there with its CRLF.
    Chunk { end: usize },
    /// A field line of the trailer, or its end.
    Trailer,
}

/// What the lines of a header said.
#[derive(Debug, Clone, Copy, Default)]
struct Head {
    start: Start,
    is_http_1_0: bool,
    content_length: Option<u64>,
    is_chunked: bool,
    /// `Connection: close`.
    closes: bool,
    /// `Connection: keep-alive`.
    keeps_alive: bool,
    has_upgrade: bool,
    has_expect: bool,
    has_host: bool,
}

/// The meaning of the first line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Start {
    #[default]
    Request,
    HeadRequest,
    ConnectRequest,
    Status(u16),
}

/// Which messages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Reply { is_header_only: bool },
}

/// Where a message ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    At(usize),
    Connection,
}

/// Why a message has no end yet, or never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Incomplete,
    TooLong { bytes: Option<usize> },
    Malformed(Fault),
}

/// What is wrong with a message.
type Fault = &'static str;

const UNTERMINATED: Fault = "a line that does not end with CRLF";
const BAD_REQUEST_LINE: Fault = "a request line that is not METHOD TARGET HTTP/1.x";
const BAD_STATUS_LINE: Fault = "a status line that is not HTTP/1.x CODE REASON";
const LAX_HEAD: Fault = "a method HEAD that is not in capitals";
const BAD_FIELD: Fault = "a field line that is not NAME: VALUE, or that continues another";
const CONTROL_CHARACTER: Fault = "a control character in a field line";
const BAD_LENGTH: Fault = "a Content-Length that is not one decimal number";
const TWO_LENGTHS: Fault = "more than one Content-Length";
const BAD_ENCODING: Fault = "a Transfer-Encoding that is not chunked alone, once, in HTTP/1.1";
const LENGTH_AND_ENCODING: Fault = "Content-Length beside Transfer-Encoding";
const TWO_HOSTS: Fault = "more than one Host";
const NO_HOST: Fault = "HTTP/1.1 without Host";
const BAD_TARGET: Fault = "a target that is neither /PATH nor a URL nor *";
const BAD_CHUNK: Fault = "a chunk that does not have the form SIZE CRLF DATA CRLF";
const BAD_TRAILER: Fault = "Content-Length or Transfer-Encoding in a trailer";
const NOT_WHOLE: Fault = "a request that is not complete";
const NOT_ALONE: Fault = "more than one request";
const NO_SUCH_LENGTH: Fault = "a length that nothing has";

impl Scan {
    /// The request at the start of `bytes`. Its body is all of it.
    pub(super) fn next_request(&mut self, bytes: &[u8], bytes_max: usize) -> Look {
        let look = match self.advance(Kind::Request, bytes, bytes_max) {
            Ok(End::At(end)) => Look::Message { body: 0..end, consumed: end },
            Err(Stop::Incomplete) => return Look::Incomplete,
            Err(Stop::TooLong { bytes }) => Look::TooLong { bytes },
            // A request without a length has no body.
            Err(Stop::Malformed(_)) | Ok(End::Connection) => Look::Malformed,
        };
        *self = Scan::default();
        look
    }

    /// The reply at the start of `bytes`, with the interim ones in front of it.
    pub(super) fn next_reply(
        &mut self,
        expect: Option<Expect>,
        bytes: &[u8],
        bytes_max: usize,
    ) -> ReplyLook {
        if bytes.is_empty() {
            return ReplyLook::Incomplete;
        }
        let Some(expect) = expect else {
            return ReplyLook::Malformed;
        };
        let kind = Kind::Reply { is_header_only: expect == Expect::HeaderOnly };
        let look = match self.advance(kind, bytes, bytes_max) {
            Ok(End::At(end)) => ReplyLook::Reply { bytes: end, closes: self.head.is_last() },
            Ok(End::Connection) if bytes.len() > bytes_max => ReplyLook::TooLong,
            Ok(End::Connection) => ReplyLook::UntilClose,
            Err(Stop::Incomplete) => return ReplyLook::Incomplete,
            Err(Stop::TooLong { .. }) => ReplyLook::TooLong,
            Err(Stop::Malformed(_)) => ReplyLook::Malformed,
        };
        *self = Scan::default();
        look
    }

    /// Reads on from where the last look at the same message ended.
    fn advance(&mut self, kind: Kind, bytes: &[u8], bytes_max: usize) -> Result<End, Stop> {
        loop {
            match self.stage {
                Stage::FirstLine => {
                    let line = self.next_line(bytes, bytes_max)?;
                    self.head = match kind {
                        Kind::Request => read_request_line(line),
                        Kind::Reply { .. } => read_status_line(line),
                    }
                    .map_err(Stop::Malformed)?;
                    self.stage = Stage::Field;
                }
                Stage::Field => match self.next_line(bytes, bytes_max)? {
                    b"" => {
                        if let Some(end) = self.end_header(kind, bytes_max)? {
                            return Ok(end);
                        }
                    }
                    line => self.head.read_field(line).map_err(Stop::Malformed)?,
                },
                Stage::Body { end } if bytes.len() < end => return Err(Stop::Incomplete),
                Stage::Body { end } => return Ok(End::At(end)),
                Stage::ChunkSize => {
                    let line = self.next_line(bytes, bytes_max)?;
                    let size = read_chunk_size(line).ok_or(Stop::Malformed(BAD_CHUNK))?;
                    self.stage = if size == 0 {
                        Stage::Trailer
                    } else {
                        // The whole length of a message in chunks shows only at its end.
                        let end = self.behind(size.saturating_add(2));
                        let end = end.filter(|end| *end <= bytes_max);
                        Stage::Chunk { end: end.ok_or(Stop::TooLong { bytes: None })? }
                    };
                }
                Stage::Chunk { end } => {
                    let chunk = bytes.get(self.at..end).ok_or(Stop::Incomplete)?;
                    if !chunk.ends_with(b"\r\n") {
                        return Err(Stop::Malformed(BAD_CHUNK));
                    }
                    self.at = end;
                    self.searched = end;
                    self.stage = Stage::ChunkSize;
                }
                Stage::Trailer => match self.next_line(bytes, bytes_max)? {
                    b"" => return Ok(End::At(self.at)),
                    line => check_trailer(line).map_err(Stop::Malformed)?,
                },
            }
        }
    }

    /// The line that begins where the last one ended, without its CRLF.
    fn next_line<'a>(&mut self, bytes: &'a [u8], bytes_max: usize) -> Result<&'a [u8], Stop> {
        let unsearched = bytes.get(self.searched..).unwrap_or_default();
        let Some(found) = memchr::memchr(b'\n', unsearched) else {
            self.searched = bytes.len();
            // One more byte at least, the line's end, is still to come.
            return Err(if bytes.len() >= bytes_max {
                Stop::TooLong { bytes: None }
            } else {
                Stop::Incomplete
            });
        };
        let end = self.searched + found + 1;
        if end > bytes_max {
            return Err(Stop::TooLong { bytes: None });
        }
        let line = bytes.get(self.at..end).and_then(|line| line.strip_suffix(b"\r\n"));
        self.at = end;
        self.searched = end;
        line.ok_or(Stop::Malformed(UNTERMINATED))
    }

    /// The header is complete: where the message ends, if that is known without reading on (RFC
    /// 9112, section 6.3).
    fn end_header(&mut self, kind: Kind, bytes_max: usize) -> Result<Option<End>, Stop> {
        if self.head.is_chunked && self.head.content_length.is_some() {
            return Err(Stop::Malformed(LENGTH_AND_ENCODING));
        }
        if self.head.is_chunked && self.head.is_http_1_0 {
            return Err(Stop::Malformed(BAD_ENCODING));
        }
        match (kind, self.head.start) {
            (Kind::Reply { .. }, Start::Status(100..=199)) => {
                self.stage = Stage::FirstLine;
                return Ok(None);
            }
            (Kind::Reply { .. }, Start::Status(204 | 304))
            | (Kind::Reply { is_header_only: true }, _) => return Ok(Some(End::At(self.at))),
            (Kind::Request | Kind::Reply { .. }, _) => {}
        }
        if self.head.is_chunked {
            self.stage = Stage::ChunkSize;
            return Ok(None);
        }
        match (kind, self.head.content_length) {
            (Kind::Request, None) => Ok(Some(End::At(self.at))),
            (Kind::Reply { .. }, None) => Ok(Some(End::Connection)),
            (Kind::Request | Kind::Reply { .. }, Some(length)) => match self.behind(length) {
                Some(end) if end <= bytes_max => {
                    self.stage = Stage::Body { end };
                    Ok(None)
                }
                too_long => Err(Stop::TooLong { bytes: too_long }),
            },
        }
    }

    /// The place that many bytes further on.
    fn behind(&self, length: u64) -> Option<usize> {
        self.at.checked_add(usize::try_from(length).ok()?)
    }
}

impl Head {
    fn new(start: Start, is_http_1_0: bool) -> Self {
        Head { start, is_http_1_0, ..Head::default() }
    }

    /// Whether the peer closes the connection behind this message (RFC 9112, section 9.3).
    fn is_last(self) -> bool {
        self.closes || (self.is_http_1_0 && !self.keeps_alive)
    }

    fn lacks_host(self) -> bool {
        !self.has_host && !self.is_http_1_0 && self.refused().is_none()
    }

    fn is_request(self) -> bool {
        !matches!(self.start, Start::Status(_))
    }

    /// Takes from a field line what matters here.
    fn read_field(&mut self, line: &[u8]) -> Result<(), Fault> {
        let (name, value) = split_field(line)?;
        if is_name(name, b"content-length") {
            let has_zero = value.len() > 1 && value.starts_with(b"0");
            if name.contains(&b'_') || has_zero && self.is_request() {
                return Err(BAD_LENGTH);
            }
            let length = read_number(value, 10).ok_or(BAD_LENGTH)?;
            let is_other = |other| other != length || self.is_request();
            if self.content_length.is_some_and(is_other) {
                return Err(TWO_LENGTHS);
            }
            self.content_length = Some(length);
        } else if is_name(name, b"transfer-encoding") {
            let is_chunked = !name.contains(&b'_') && value.eq_ignore_ascii_case(b"chunked");
            if self.is_chunked || !is_chunked {
                return Err(BAD_ENCODING);
            }
            self.is_chunked = true;
        } else if name.eq_ignore_ascii_case(b"connection") {
            // Some servers look for the word anywhere.
            self.closes |= value.windows(5).any(|part| part.eq_ignore_ascii_case(b"close"));
            let mut options = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            self.keeps_alive |= options.any(|option| option.eq_ignore_ascii_case(b"keep-alive"));
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.has_upgrade = true;
        } else if name.eq_ignore_ascii_case(b"expect") {
            self.has_expect = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            if self.has_host && self.is_request() {
                return Err(TWO_HOSTS);
            }
            self.has_host = true;
        }
        Ok(())
    }

    /// What of this request a shared connection cannot carry.
    fn refused(self) -> Option<&'static str> {
        match self.start {
            Start::ConnectRequest => Some("CONNECT"),
            Start::Request | Start::HeadRequest | Start::Status(_) => {
                self.has_upgrade.then_some("Upgrade")
            }
        }
    }
}

/// `GET /index.html HTTP/1.1`
fn read_request_line(line: &[u8]) -> Result<Head, Fault> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(BAD_REQUEST_LINE);
    };
    let is_target = !target.is_empty() && target.iter().all(u8::is_ascii_graphic);
    let is_http_1_0 = read_version(version).ok_or(BAD_REQUEST_LINE)?;
    if !is_token(method) || !is_target {
        return Err(BAD_REQUEST_LINE);
    }
    let start = match method {
        b"HEAD" => Start::HeadRequest,
        // Methods have a case, but a server may be lax, and its reply would be taken for another's.
        method if method.eq_ignore_ascii_case(b"HEAD") => return Err(LAX_HEAD),
        // Likewise: a tunnel would be lost to all others.
        method if method.eq_ignore_ascii_case(b"CONNECT") => Start::ConnectRequest,
        _ => Start::Request,
    };
    let has_form = target.starts_with(b"/") || target.windows(3).any(|part| part == b"://");
    if !has_form && target != b"*" && start != Start::ConnectRequest {
        return Err(BAD_TARGET);
    }
    Ok(Head::new(start, is_http_1_0))
}

/// `HTTP/1.1 404 Not Found`
fn read_status_line(line: &[u8]) -> Result<Head, Fault> {
    let mut parts = line.splitn(3, |byte| *byte == b' ');
    let version = parts.next().and_then(read_version);
    let (Some(is_http_1_0), Some(code)) = (version, parts.next()) else {
        return Err(BAD_STATUS_LINE);
    };
    let status = read_number(code, 10).and_then(|code| u16::try_from(code).ok());
    match status.filter(|_| code.len() == 3 && parts.next().is_none_or(is_text)) {
        // Behind `101 Switching Protocols` comes no HTTP, and nobody asked for it.
        None | Some(0..=99 | 101) => Err(BAD_STATUS_LINE),
        Some(status) => Ok(Head::new(Start::Status(status), is_http_1_0)),
    }
}

/// Whether it is HTTP/1.0 rather than a later one; none: it is no HTTP/1.
fn read_version(version: &[u8]) -> Option<bool> {
    match version.strip_prefix(b"HTTP/1.")? {
        [minor] if minor.is_ascii_digit() => Some(*minor == b'0'),
        _ => None,
    }
}

/// Name and value of a field line.
fn split_field(line: &[u8]) -> Result<(&[u8], &[u8]), Fault> {
    let colon = memchr::memchr(b':', line).ok_or(BAD_FIELD)?;
    let (name, value) = line.split_at_checked(colon).ok_or(BAD_FIELD)?;
    let value = value.get(1..).ok_or(BAD_FIELD)?;
    if !is_token(name) {
        return Err(BAD_FIELD);
    }
    if !is_text(value) {
        return Err(CONTROL_CHARACTER);
    }
    Ok((name, value.trim_ascii()))
}

/// Whether `name` is this one, in lower case, for those too who take `_` for `-`.
fn is_name(name: &[u8], expected: &[u8]) -> bool {
    let plain = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == expected.len() && name.iter().map(plain).eq(expected.iter().copied())
}

/// A trailer must not say anything of the length, which a peer might merge into the header.
fn check_trailer(line: &[u8]) -> Result<(), Fault> {
    let (name, _) = split_field(line)?;
    if is_name(name, b"content-length") || is_name(name, b"transfer-encoding") {
        return Err(BAD_TRAILER);
    }
    Ok(())
}

/// `1a;name=value`: the size.
fn read_chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, extension) = line.split_at_checked(digits)?;
    let is_extension = extension.trim_ascii_start().first() == Some(&b';') && is_text(extension);
    if !extension.is_empty() && !is_extension {
        return None;
    }
    read_number(size, 16)
}

/// A number of digits alone. The largest one stands for all that are larger.
fn read_number(text: &[u8], radix: u32) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |number, digit| {
        let digit = char::from(*digit).to_digit(radix)?;
        Some(number.saturating_mul(u64::from(radix)).saturating_add(u64::from(digit)))
    })
}

fn is_token(text: &[u8]) -> bool {
    let is_mark = |byte: &u8| b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || is_mark(byte))
}

/// Whether it holds no control characters but tabs.
fn is_text(text: &[u8]) -> bool {
    text.iter().all(|byte| *byte == b'\t' || !byte.is_ascii_control())
}

/// The header of `body`, if that is exactly one request.
fn inspect(body: &[u8]) -> Result<Head, Fault> {
    let mut scan = Scan::default();
    match scan.advance(Kind::Request, body, usize::MAX) {
        // A server answers that with an error and closes (RFC 9112, section 3.2).
        Ok(End::At(end)) if end == body.len() && scan.head.lacks_host() => Err(NO_HOST),
        Ok(End::At(end)) if end == body.len() => Ok(scan.head),
        Ok(End::At(_)) => Err(NOT_ALONE),
        Ok(End::Connection) | Err(Stop::Incomplete) => Err(NOT_WHOLE),
        Err(Stop::TooLong { .. }) => Err(NO_SUCH_LENGTH),
        Err(Stop::Malformed(fault)) => Err(fault),
    }
}

/// Appends `body`, which is exactly one request.
///
/// # Errors
/// [`Reason::Malformed`], [`Reason::Stateful`]; `out` is then unchanged.
pub(super) fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    let head = inspect(body).map_err(|_| Reason::Malformed)?;
    if head.refused().is_some() {
        return Err(Reason::Stateful);
    }
    out.extend_from_slice(body);
    Ok(())
}

/// What reply that request has.
pub(super) fn classify(body: &[u8]) -> Verdict {
    let refused = |reason, what: &str| Verdict::Refused { reason, what: what.to_owned() };
    let head = match inspect(body) {
        Ok(head) => head,
        Err(fault) => return refused(Reason::Malformed, fault),
    };
    if let Some(what) = head.refused() {
        return refused(Reason::Stateful, what);
    }
    let expect = match head.start {
        Start::HeadRequest => Expect::HeaderOnly,
        Start::Request | Start::ConnectRequest | Start::Status(_) => Expect::Plain,
    };
    // Whoever answers an expectation need not read the body, and may take it for a request.
    match head.is_last() || head.has_expect {
        true => Verdict::Last(expect),
        false => Verdict::One(expect),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cut, Cutter, Framing, ReplyCut, ReplyCutter};
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const MAX: usize = 4096;

    fn request_look(text: &str) -> Look {
        Scan::default().next_request(text.as_bytes(), MAX)
    }

    fn reply_look(expect: Expect, text: &str) -> ReplyLook {
        Scan::default().next_reply(Some(expect), text.as_bytes(), MAX)
    }

    fn whole(text: &str) -> Look {
        Look::Message { body: 0..text.len(), consumed: text.len() }
    }

    /// The requests in a stream that arrives in pieces, and whether it broke.
    fn cut(stream: &[u8], pieces: &[usize]) -> (Vec<Vec<u8>>, Vec<Reason>, bool) {
        let mut cutter = Cutter::new(Framing::Http1, MAX);
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
                    Cut::Skipped { consumed } => drop(buffer.drain(..consumed)),
                    Cut::Incomplete => break,
                    Cut::Broken => return (messages, refused, true),
                }
            }
        }
        (messages, refused, false)
    }

    /// The replies in a stream that arrives in pieces, whether each is the last one of its
    /// connection, and how the stream ended; the end of the connection follows.
    fn cut_replies(
        expected: &[Expect],
        stream: &[u8],
        pieces: &[usize],
    ) -> (Vec<(Vec<u8>, bool)>, Option<Reason>) {
        let mut cutter = ReplyCutter::new(Framing::Http1, MAX);
        let (mut buffer, mut replies, mut at) = (vec![], vec![], 0);
        let mut pieces = pieces.iter().cycle();
        while at < stream.len() {
            let end = (at + pieces.next().unwrap()).min(stream.len());
            buffer.extend_from_slice(&stream[at..end]);
            at = end;
            loop {
                match cutter.next_reply(expected.get(replies.len()).copied(), &buffer) {
                    ReplyCut::Reply { body, consumed, closes } => {
                        replies.push((buffer[body].to_vec(), closes));
                        buffer.drain(..consumed);
                    }
                    ReplyCut::Push { .. } => panic!("HTTP has none"),
                    ReplyCut::Incomplete => break,
                    ReplyCut::Broken(reason) => return (replies, Some(reason)),
                }
            }
        }
        if let Some(body) = cutter.finish(&buffer) {
            replies.push((buffer[body].to_vec(), true));
        }
        (replies, None)
    }

    // Random messages.

    #[derive(Debug, Clone)]
    enum Body {
        None,
        Counted(Vec<u8>),
        Chunked { chunks: Vec<(Vec<u8>, &'static str)>, trailer: bool, upper: bool },
    }

    impl Body {
        /// The rest of a message behind its first fields.
        fn write(&self, out: &mut Vec<u8>) {
            match self {
                Body::None => out.extend_from_slice(b"\r\n"),
                Body::Counted(body) => {
                    out.extend_from_slice(format!("content-LENGTH:{} \r\n", body.len()).as_bytes());
                    out.extend_from_slice(b"X-After: y\r\n\r\n");
                    out.extend_from_slice(body);
                }
                Body::Chunked { chunks, trailer, upper } => {
                    out.extend_from_slice(b"Transfer-Encoding: \tChunked\r\n\r\n");
                    for (chunk, extension) in chunks {
                        let size = chunk.len();
                        let size = if *upper { format!("{size:04X}") } else { format!("{size:x}") };
                        out.extend_from_slice(format!("{size}{extension}\r\n").as_bytes());
                        out.extend_from_slice(chunk);
                        out.extend_from_slice(b"\r\n");
                    }
                    out.extend_from_slice(b"0\r\n");
                    if *trailer {
                        out.extend_from_slice(b"Checksum: 1\r\nOther:\r\n");
                    }
                    out.extend_from_slice(b"\r\n");
                }
            }
        }
    }

    fn fields() -> impl Strategy<Value = String> {
        let field =
            "(X-[A-Za-z0-9!#$%&'*+.^_`|~-]{1,8}|Accept|Connection-Id):[ \t]?[ -~é]{0,20}\r\n";
        vec(field, 0..5).prop_map(|fields| fields.concat())
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            vec(any::<u8>(), 1..40),
            vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'0'), Just(b':')], 1..12),
            Just(b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ]
    }

    fn body() -> impl Strategy<Value = Body> {
        let extension = prop_oneof![Just(""), Just(";a"), Just(" ;a=\"b;\t\""), Just(";a=b;c")];
        let chunked = (vec((bytes(), extension), 0..6), any::<bool>(), any::<bool>());
        prop_oneof![
            Just(Body::None),
            Just(Body::Counted(vec![])),
            bytes().prop_map(Body::Counted),
            chunked.prop_map(|(chunks, trailer, upper)| Body::Chunked { chunks, trailer, upper }),
        ]
    }

    fn request() -> impl Strategy<Value = Vec<u8>> {
        let line = "(GET|HEAD|POST|M-SEARCH) (/[!-~]{0,9}|\\*|http://x/) HTTP/1\\.[12]\r\n";
        (line, fields(), body()).prop_map(|(line, fields, body)| {
            let mut out = line.into_bytes();
            out.extend_from_slice(b"Host: x\r\n");
            out.extend_from_slice(fields.as_bytes());
            body.write(&mut out);
            out
        })
    }

    fn reply() -> impl Strategy<Value = (Expect, Vec<u8>, bool)> {
        let interim = "(HTTP/1\\.1 10[023] Wait\r\n(Content-Length: 9\r\n)?\r\n){0,2}";
        let line = "HTTP/1\\.1 (200 OK|404 |500|204 No Content|304 Not Modified)\r\n";
        let closes = any::<bool>();
        let parts = (interim, line, fields(), body(), closes, any::<bool>());
        parts.prop_map(|(interim, line, fields, body, closes, is_head)| {
            let has_no_body = is_head || line.contains("204") || line.contains("304");
            let mut out = (interim + &line + &fields).into_bytes();
            if closes {
                out.extend_from_slice(b"Connection: x,\tClose\r\n");
            }
            match (has_no_body, &body) {
                (true, Body::None) => out.extend_from_slice(b"\r\n"),
                (true, _) => out.extend_from_slice(b"Content-Length: 77\r\n\r\n"),
                (false, Body::None) => Body::Counted(vec![]).write(&mut out),
                (false, body) => body.write(&mut out),
            }
            let expect = if is_head { Expect::HeaderOnly } else { Expect::Plain };
            (expect, out, closes)
        })
    }

    /// A valid stream with some of its bytes changed.
    fn damaged(stream: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
        let odd =
            prop_oneof![any::<u8>(), Just(b'\n'), Just(b'\r'), Just(b' '), Just(b':'), Just(b'9')];
        (stream, vec((any::<prop::sample::Index>(), odd), 0..4)).prop_map(
            |(mut stream, changes)| {
                for (at, byte) in changes {
                    if !stream.is_empty() {
                        let at = at.index(stream.len());
                        stream[at] = byte;
                    }
                }
                stream
            },
        )
    }

    proptest! {
        #[test]
        fn any_split_of_requests_gives_the_same_requests(
            requests in vec(request(), 1..6),
            pieces in vec(1usize..60, 1..20),
        ) {
            let stream = requests.concat();
            for pieces in [&pieces[..], &[1], &[usize::MAX / 2]] {
                prop_assert_eq!(cut(&stream, pieces), (requests.clone(), vec![], false));
            }
            for request in &requests {
                let mut out = b"before".to_vec();
                prop_assert_eq!(Framing::Http1.encode(request, &mut out), Ok(()));
                prop_assert_eq!(&out[6..], &request[..]);
                for end in 0..request.len() {
                    let look = Scan::default().next_request(&request[..end], MAX);
                    prop_assert_eq!(look, Look::Incomplete);
                    prop_assert!(Framing::Http1.encode(&request[..end], &mut out).is_err());
                }
                let expect = match request.starts_with(b"HEAD ") {
                    true => Expect::HeaderOnly,
                    false => Expect::Plain,
                };
                prop_assert_eq!(Framing::Http1.classify(request), Verdict::One(expect));
            }
        }

        #[test]
        fn any_split_of_replies_gives_the_same_replies(
            replies in vec(reply(), 1..6),
            pieces in vec(1usize..60, 1..20),
        ) {
            let expects: Vec<_> = replies.iter().map(|reply| reply.0).collect();
            let stream: Vec<u8> = replies.iter().flat_map(|reply| reply.1.clone()).collect();
            let expected: Vec<_> =
                replies.iter().map(|(_, bytes, closes)| (bytes.clone(), *closes)).collect();
            for pieces in [&pieces[..], &[1], &[usize::MAX / 2]] {
                let found = cut_replies(&expects, &stream, pieces);
                prop_assert_eq!(found, (expected.clone(), None));
            }
            let (expect, reply, _) = &replies[0];
            for end in 0..reply.len() {
                let look = Scan::default().next_reply(Some(*expect), &reply[..end], MAX);
                prop_assert_eq!(look, ReplyLook::Incomplete);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_do_not_depend_on_the_split(
            stream in prop_oneof![
                vec(any::<u8>(), 0..400),
                damaged(vec(request(), 1..5).prop_map(|all| all.concat())),
            ],
            replies in damaged(vec(reply(), 1..5).prop_map(|replies| {
                replies.into_iter().flat_map(|reply| reply.1).collect()
            })),
            heads in vec(any::<bool>(), 6),
            pieces in vec(1usize..60, 1..10),
        ) {
            let all_at_once = cut(&stream, &[usize::MAX / 2]);
            prop_assert_eq!(&all_at_once, &cut(&stream, &[1]));
            prop_assert_eq!(&all_at_once, &cut(&stream, &pieces));
            let expects: Vec<_> = heads
                .iter()
                .map(|is_head| if *is_head { Expect::HeaderOnly } else { Expect::Plain })
                .collect();
            for stream in [&stream, &replies] {
                let all_at_once = cut_replies(&expects, stream, &[usize::MAX / 2]);
                prop_assert_eq!(&all_at_once, &cut_replies(&expects, stream, &[1]));
                prop_assert_eq!(&all_at_once, &cut_replies(&expects, stream, &pieces));
                let _ = Framing::Http1.classify(stream);
            }
        }

        #[test]
        fn limits_do_not_depend_on_the_split(request in request(), bytes_max in 1usize..300) {
            let look = Scan::default().next_request(&request, bytes_max);
            let mut scan = Scan::default();
            let mut looks = (1..=request.len())
                .map(|end| scan.next_request(&request[..end], bytes_max));
            let one_by_one = looks.find(|look| *look != Look::Incomplete);
            prop_assert_eq!(one_by_one, Some(look.clone()));
            let is_message = matches!(look, Look::Message { .. });
            prop_assert_eq!(is_message, request.len() <= bytes_max);
        }
    }

    #[test]
    fn requests_on_whose_end_peers_may_differ_are_malformed() {
        let with = |fields: &str| format!("POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
        let chunked = |body: &str| with("Transfer-Encoding: chunked\r\n") + body;
        let five = |fields: &str| with(fields) + "12345";
        let coded = |fields: &str| with(fields) + "0\r\n\r\n";
        let line = |line: &str| format!("{line}\r\nHost: x\r\n\r\n");
        for (fault, requests) in [
            (
                LENGTH_AND_ENCODING,
                vec![
                    coded("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
                    coded("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
                    coded("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n"),
                ],
            ),
            (
                TWO_LENGTHS,
                vec![
                    five("Content-Length: 5\r\nContent-Length: 6\r\n") + "6",
                    five("Content-Length: 5\r\nContent-Length: 5\r\n"),
                    five("Content-Length: 5\r\nX: y\r\ncontent-length: 0\r\n"),
                ],
            ),
            (
                BAD_LENGTH,
                vec![
                    five("Content-Length: 5, 5\r\n"),
                    five("Content-Length: 5,6\r\n"),
                    five("Content-Length: +5\r\n"),
                    five("Content-Length: -5\r\n"),
                    five("Content-Length: 0x5\r\n"),
                    five("Content-Length: 05\r\n"),
                    five("Content-Length: 5 5\r\n"),
                    five("Content-Length: 5.0\r\n"),
                    five("Content-Length: 5e0\r\n"),
                    five("Content-Length: \"5\"\r\n"),
                    five("Content-Length: five\r\n"),
                    five("Content_Length: 5\r\n"),
                    with("Content-Length:\r\n"),
                    with("Content-Length: \t\r\n"),
                ],
            ),
            (
                BAD_ENCODING,
                vec![
                    coded("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
                    coded("Transfer-Encoding: gzip, chunked\r\n"),
                    coded("Transfer-Encoding: chunked, gzip\r\n"),
                    coded("Transfer-Encoding: chunked, identity\r\n"),
                    coded("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
                    with("Transfer-Encoding: identity\r\n"),
                    coded("Transfer-Encoding: xchunked\r\n"),
                    coded("Transfer-Encoding: \"chunked\"\r\n"),
                    coded("Transfer-Encoding: chunked;q=1\r\n"),
                    coded("Transfer-Encoding: ,chunked\r\n"),
                    coded("Transfer_Encoding: chunked\r\n"),
                    coded("Transfer-Encoding: \u{a0}chunked\r\n"),
                    with("Transfer-Encoding:\r\n"),
                    "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
                ],
            ),
            (
                BAD_FIELD,
                vec![
                    five("Content-Length : 5\r\n"),
                    five("Content-Length\t: 5\r\n"),
                    five(" Content-Length: 5\r\n"),
                    five("\0Content-Length: 5\r\n"),
                    five("X: y\r\n Content-Length: 5\r\n"),
                    with("X: y\r\n\tfolded\r\n"),
                    with("X: y\r\n \r\n"),
                    with("X\r\n"),
                    with(": y\r\n"),
                    with("X Y: z\r\n"),
                    coded("Transfer-Encoding : chunked\r\n"),
                    chunked("0\r\n folded\r\n\r\n"),
                ],
            ),
            (
                CONTROL_CHARACTER,
                vec![
                    five("X: y\rContent-Length: 5\r\n"),
                    five("Content-Length: 5\0\r\n"),
                    five("Content-Length: 5\r\r\n"),
                    with("X: \0\r\n"),
                    with("X: \x0b\r\n"),
                    coded("Transfer-Encoding: \x0bchunked\r\n"),
                    coded("Transfer-Encoding: chunked\r\r\n"),
                ],
            ),
            (TWO_HOSTS, vec![with("host: y\r\n"), with("Host: x\r\n")]),
            (BAD_TARGET, vec![line("GET x HTTP/1.1"), line("GET ** HTTP/1.1")]),
            (
                UNTERMINATED,
                vec![
                    five("X: y\nContent-Length: 5\r\n"),
                    chunked("1\na\r\n0\r\n\r\n"),
                    chunked("1;a\nb\r\na\r\n0\r\n\r\n"),
                    chunked("0\n\n"),
                    chunked("0\r\n\n"),
                    "GET / HTTP/1.1\nHost: x\n\n".to_owned(),
                    "GET / HTTP/1.1\r\nHost: x\r\n\n".to_owned(),
                ],
            ),
            (
                BAD_CHUNK,
                vec![
                    chunked("\r\n"),
                    chunked("0x1\r\na\r\n0\r\n\r\n"),
                    chunked("+1\r\na\r\n0\r\n\r\n"),
                    chunked("-1\r\na\r\n0\r\n\r\n"),
                    chunked(" 1\r\na\r\n0\r\n\r\n"),
                    chunked("1 \r\na\r\n0\r\n\r\n"),
                    chunked("1 1\r\na\r\n0\r\n\r\n"),
                    chunked("1_0\r\na\r\n0\r\n\r\n"),
                    chunked(";a\r\na\r\n0\r\n\r\n"),
                    chunked("1;a\rb\r\na\r\n0\r\n\r\n"),
                    chunked("1;a\0\r\na\r\n0\r\n\r\n"),
                    chunked("1\r\nabc\r\n0\r\n\r\n"),
                    chunked("1\r\na\n\n0\r\n\r\n"),
                    chunked("2\r\na\r\n0\r\n\r\n"),
                ],
            ),
            (
                BAD_TRAILER,
                vec![
                    chunked("0\r\nContent-Length: 5\r\n\r\n"),
                    chunked("0\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n"),
                ],
            ),
            (
                BAD_REQUEST_LINE,
                vec![
                    "\r\nGET / HTTP/1.1\r\n\r\n".to_owned(),
                    line(" GET / HTTP/1.1"),
                    line("GET  / HTTP/1.1"),
                    line("GET / HTTP/1.1 "),
                    line("GET /a b HTTP/1.1"),
                    line("GET\t/\tHTTP/1.1"),
                    line("GET /\r HTTP/1.1"),
                    line("GET /\0 HTTP/1.1"),
                    line("GET /"),
                    line("G(T / HTTP/1.1"),
                    line("GET / http/1.1"),
                    line("GET / HTTP/1.10"),
                    line("GET / HTTP/1."),
                    line("PRI * HTTP/2.0"),
                    line("HTTP/1.1 200 OK"),
                ],
            ),
            (LAX_HEAD, vec![line("head / HTTP/1.1"), line("Head / HTTP/1.1")]),
        ] {
            for request in requests {
                assert_eq!(request_look(&request), Look::Malformed, "{request:?}");
                let mut out = b"before".to_vec();
                assert_eq!(encode(request.as_bytes(), &mut out), Err(Reason::Malformed));
                assert_eq!(out, b"before");
                let (reason, what) = (Reason::Malformed, fault.to_owned());
                let expected = Verdict::Refused { reason, what };
                assert_eq!(classify(request.as_bytes()), expected, "{request:?}");
            }
        }
        let huge = five(&format!("Content-Length: {}\r\n", u64::MAX));
        for (fault, request) in [
            (NOT_WHOLE, with("Content-Length: 1\r\n")),
            (NOT_WHOLE, chunked("5\r\n12345\r\n")),
            (NOT_WHOLE, "GET / HTTP/1.1\r\n".to_owned()),
            (NOT_ALONE, with("Content-Length: 4\r\n") + "12345"),
            (NOT_ALONE, with("") + "GET /admin HTTP/1.1\r\n\r\n"),
            (NOT_ALONE, chunked("0\r\n\r\n\r\n")),
            (NO_SUCH_LENGTH, huge),
            (NO_SUCH_LENGTH, five("Content-Length: 18446744073709551621\r\n")),
            (NO_SUCH_LENGTH, chunked("ffffffffffffffff\r\n12345\r\n0\r\n\r\n")),
            (NO_SUCH_LENGTH, chunked("10000000000000005\r\n12345\r\n0\r\n\r\n")),
        ] {
            let (reason, what) = (Reason::Malformed, fault.to_owned());
            let expected = Verdict::Refused { reason, what };
            assert_eq!(classify(request.as_bytes()), expected, "{request:?}");
            assert_eq!(encode(request.as_bytes(), &mut vec![]), Err(Reason::Malformed));
        }
    }

    #[test]
    fn replies_that_follow_no_rule_are_malformed() {
        for reply in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;\n\r\na\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
            "HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX: a\nb\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n",
            "HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nXTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "HTTP/1.1 +20 OK\r\n\r\n",
            "HTTP/1.1  200 OK\r\n\r\n",
            "HTTP/1.1 200 O\x7f\r\n\r\n",
            "\r\nHTTP/1.1 200 OK\r\n\r\n",
            "SSH-2.0-OpenSSH\r\n",
        ] {
            assert_eq!(reply_look(Expect::Plain, reply), ReplyLook::Malformed, "{reply:?}");
        }
        let reply = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(Scan::default().next_reply(None, reply, MAX), ReplyLook::Malformed);
        assert_eq!(Scan::default().next_reply(None, b"H", MAX), ReplyLook::Malformed);
        let mut cutter = ReplyCutter::new(Framing::Http1, MAX);
        assert_eq!(cutter.next_reply(None, b"H"), ReplyCut::Broken(Reason::Unsolicited));
        assert_eq!(
            cutter.next_reply(Some(Expect::Plain), b"\n"),
            ReplyCut::Broken(Reason::BadReply)
        );
    }

    #[test]
    fn requests_that_occupy_the_connection_are_refused() {
        for (request, expected) in [
            ("Connect x:1 HTTP/1.1\r\n\r\n", Some("CONNECT")),
            ("CONNECT x:1 HTTP/1.1\r\n\r\n", Some("CONNECT")),
            ("connect x:1 HTTP/1.1\r\n\r\n", Some("CONNECT")),
            ("GET / HTTP/1.1\r\nConnection: Upgrade\r\nupgrade: h2c\r\n\r\n", Some("Upgrade")),
            ("GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\r\n", None),
        ] {
            assert_eq!(request_look(request), whole(request));
            let mut out = Vec::new();
            let encoded = encode(request.as_bytes(), &mut out);
            match expected {
                Some(what) => {
                    let (reason, what) = (Reason::Stateful, what.to_owned());
                    assert_eq!(encoded, Err(reason));
                    assert_eq!(classify(request.as_bytes()), Verdict::Refused { reason, what });
                    assert!(out.is_empty());
                }
                None => {
                    assert_eq!(encoded, Ok(()));
                    assert_eq!(classify(request.as_bytes()), Verdict::One(Expect::Plain));
                }
            }
        }
        let two = b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n";
        assert_eq!(encode(two, &mut vec![]), Err(Reason::Malformed));
        assert_eq!(encode(b"", &mut vec![]), Err(Reason::Malformed));
    }

    #[test]
    fn a_request_says_when_its_connection_ends() {
        let one = Verdict::One(Expect::Plain);
        let last = Verdict::Last(Expect::Plain);
        for (request, expected) in [
            ("GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n", &one),
            ("GET / HTTP/1.1\r\nHost: x\r\nConnection: x-closed\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nHost: x\r\nX-Connection: close\r\n\r\n", &one),
            ("GET / HTTP/1.1\r\nHost: x\r\nconnection: Close\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nHost: x\r\nConnection: TE,\tclose\r\nTE: trailers\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nHost: x\r\nConnection: TE\r\nConnection: close\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, close\r\n\r\n", &last),
            ("GET / HTTP/1.0\r\n\r\n", &last),
            (
                "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
                &last,
            ),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", &one),
            (
                "HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                &Verdict::Last(Expect::HeaderOnly),
            ),
        ] {
            assert_eq!(classify(request.as_bytes()), *expected, "{request:?}");
            assert_eq!(encode(request.as_bytes(), &mut vec![]), Ok(()));
        }
        // Without it a server ends the connection, too.
        let what = NO_HOST.to_owned();
        let refused = Verdict::Refused { reason: Reason::Malformed, what };
        assert_eq!(classify(b"GET / HTTP/1.1\r\nX-Host: x\r\n\r\n"), refused);
    }

    #[test]
    fn a_peer_says_when_it_closes() {
        for (reply, closes) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nconnection: CLOSE\r\n\r\n", true),
            ("HTTP/1.1 204 No\r\nConnection: a\r\nConnection: b , close\r\nX: y\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\nConnection: x-closed\r\nContent-Length: 0\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n\r\n", false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive, close\r\n\r\n", true),
            (
                "HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
                false,
            ),
        ] {
            let expected = ReplyLook::Reply { bytes: reply.len(), closes };
            assert_eq!(reply_look(Expect::Plain, reply), expected, "{reply:?}");
        }
    }

    #[test]
    fn a_body_without_a_length_ends_with_the_connection() {
        let reply = b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nsome\r\n\r\nbody";
        for pieces in [1, 7, 1000] {
            let (replies, problem) = cut_replies(&[Expect::Plain], reply, &[pieces]);
            assert_eq!((replies, problem), (vec![(reply.to_vec(), true)], None));
        }
        // Without its header it was cut off.
        let mut cutter = ReplyCutter::new(Framing::Http1, MAX);
        assert_eq!(cutter.next_reply(Some(Expect::Plain), &reply[..20]), ReplyCut::Incomplete);
        assert_eq!(cutter.finish(&reply[..20]), None);
        let mut cutter = ReplyCutter::new(Framing::Http1, MAX);
        for (end, is_until_close) in [(20, false), (26, true), (reply.len(), true)] {
            assert_eq!(cutter.next_reply(Some(Expect::Plain), &reply[..end]), ReplyCut::Incomplete);
            assert_eq!(cutter.is_until_close(), is_until_close);
        }
        // One that has a length is not completed by the end.
        let counted = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n1234";
        assert_eq!(cut_replies(&[Expect::Plain], counted, &[3]), (vec![], None));
        // No more than the limit, however it arrives.
        let mut long = reply.to_vec();
        long.resize(MAX + 1, b'x');
        for pieces in [1, 1000, MAX + 1] {
            let (replies, problem) = cut_replies(&[Expect::Plain], &long, &[pieces]);
            assert_eq!((replies, problem), (vec![], Some(Reason::ReplyTooLong)));
        }
        let (replies, problem) = cut_replies(&[Expect::Plain], &long[..MAX], &[100]);
        assert_eq!((replies.len(), problem), (1, None));
    }

    #[test]
    fn lengths_at_the_limits_neither_panic_nor_wrap() {
        let counted = |length: &str| {
            request_look(&format!("POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"))
        };
        assert_eq!(counted("4056"), Look::TooLong { bytes: Some(MAX + 1) });
        assert_eq!(counted("4055"), Look::Incomplete);
        for length in ["18446744073709551615", "18446744073709551616", "99999999999999999999999"] {
            assert_eq!(counted(length), Look::TooLong { bytes: None });
        }
        let chunked = |size: &str| {
            let header = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
            request_look(&format!("{header}{size}\r\n"))
        };
        for size in ["1000", "ffffffffffffffff", "FFFFFFFFFFFFFFFFF", "10000000000000000"] {
            assert_eq!(chunked(size), Look::TooLong { bytes: None });
        }
        assert_eq!(chunked("00000000000000000000005"), Look::Incomplete);
        let endless = format!("GET / HTTP/1.1\r\n{}", "X: y\r\n".repeat(MAX));
        assert_eq!(request_look(&endless), Look::TooLong { bytes: None });
        assert_eq!(request_look(&"x".repeat(MAX)), Look::TooLong { bytes: None });
        let endless = "HTTP/1.1 100 Continue\r\n\r\n".repeat(MAX);
        assert_eq!(reply_look(Expect::Plain, &endless), ReplyLook::TooLong);
    }

    #[test]
    fn a_message_that_is_too_long_is_skipped_and_the_next_one_found() {
        let mut stream = b"POST / HTTP/1.1\r\nContent-Length: 9999\r\n\r\n".to_vec();
        stream.extend_from_slice(&[b'x'; 9999]);
        stream.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
        for pieces in [1, 100, 100_000] {
            let (messages, refused, is_broken) = cut(&stream, &[pieces]);
            assert_eq!(messages, [b"GET / HTTP/1.1\r\n\r\n"]);
            assert_eq!((refused, is_broken), (vec![Reason::TooLong], false));
        }
    }

    #[test]
    fn no_byte_is_looked_at_again_when_more_arrive() {
        let mut stream = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        let header = stream.len();
        stream.extend_from_slice(&b"3\r\nabc\r\n".repeat(50));
        let mut scan = Scan::default();
        for end in 1..=stream.len() {
            assert_eq!(scan.next_request(&stream[..end], MAX), Look::Incomplete);
            let begun = if end < header { 0 } else { header + (end - header) / 8 * 8 };
            assert!(scan.at >= begun && scan.at <= end, "{end}: {}", scan.at);
            if end < header {
                assert_eq!(scan.searched, end);
            }
        }
    }
}
