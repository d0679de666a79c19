//! HTTP/1.0 and 1.1 messages (RFC 9112; the meaning of methods and status codes: RFC 9110).
//!
//! The broker passes messages on as they are, so it and the peer must agree on where each ends; a
//! message on which two implementations may differ is refused (request smuggling). Hence stricter
//! than RFC 9112 asks of a recipient:
//!
//! * Lines end with CRLF, never with LF alone. An empty line in front of a message is malformed.
//! * A field line that continues the one before it, or has a space in front of its colon, is
//!   malformed, and so are control characters.
//! * `Content-Length` is one number; repeated, it is the same one. It never stands beside
//!   `Transfer-Encoding`, which is exactly `chunked`, stands once, and in HTTP/1.1 only. Neither
//!   stands in a trailer.
//! * A request target holds visible ASCII characters alone; one space stands on either side of it.
//! * A chunk size is followed by CRLF or by `;`, nothing else.
//!
//! A status line without the space behind its code, which many servers write, is accepted.
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
    Malformed,
}

impl Scan {
    /// The request at the start of `bytes`. Its body is all of it.
    pub(super) fn next_request(&mut self, bytes: &[u8], bytes_max: usize) -> Look {
        let look = match self.advance(Kind::Request, bytes, bytes_max) {
            Ok(End::At(end)) => Look::Message { body: 0..end, consumed: end },
            Err(Stop::Incomplete) => return Look::Incomplete,
            Err(Stop::TooLong { bytes }) => Look::TooLong { bytes },
            // A request without a length has no body.
            Err(Stop::Malformed) | Ok(End::Connection) => Look::Malformed,
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
            Err(Stop::Malformed) => ReplyLook::Malformed,
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
                    .ok_or(Stop::Malformed)?;
                    self.stage = Stage::Field;
                }
                Stage::Field => match self.next_line(bytes, bytes_max)? {
                    b"" => {
                        if let Some(end) = self.end_header(kind, bytes_max)? {
                            return Ok(end);
                        }
                    }
                    line => self.head.read_field(line).ok_or(Stop::Malformed)?,
                },
                Stage::Body { end } if bytes.len() < end => return Err(Stop::Incomplete),
                Stage::Body { end } => return Ok(End::At(end)),
                Stage::ChunkSize => {
                    let line = self.next_line(bytes, bytes_max)?;
                    let size = read_chunk_size(line).ok_or(Stop::Malformed)?;
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
                        return Err(Stop::Malformed);
                    }
                    self.at = end;
                    self.searched = end;
                    self.stage = Stage::ChunkSize;
                }
                Stage::Trailer => match self.next_line(bytes, bytes_max)? {
                    b"" => return Ok(End::At(self.at)),
                    line => check_trailer(line).ok_or(Stop::Malformed)?,
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
        line.ok_or(Stop::Malformed)
    }

    /// The header is complete: where the message ends, if that is known without reading on (RFC
    /// 9112, section 6.3).
    fn end_header(&mut self, kind: Kind, bytes_max: usize) -> Result<Option<End>, Stop> {
        if self.head.is_chunked && (self.head.content_length.is_some() || self.head.is_http_1_0) {
            return Err(Stop::Malformed);
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

    /// Takes from a field line what matters here; none: it is malformed.
    fn read_field(&mut self, line: &[u8]) -> Option<()> {
        let (name, value) = split_field(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = read_number(value, 10)?;
            if self.content_length.is_some_and(|other| other != length) {
                return None;
            }
            self.content_length = Some(length);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return None;
            }
            self.is_chunked = true;
        } else if name.eq_ignore_ascii_case(b"connection") {
            for option in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                self.closes |= option.eq_ignore_ascii_case(b"close");
                self.keeps_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            }
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.has_upgrade = true;
        }
        Some(())
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
fn read_request_line(line: &[u8]) -> Option<Head> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (method, target, version) = (parts.next()?, parts.next()?, parts.next()?);
    let is_target = !target.is_empty() && target.iter().all(u8::is_ascii_graphic);
    if parts.next().is_some() || !is_token(method) || !is_target {
        return None;
    }
    let start = match method {
        b"HEAD" => Start::HeadRequest,
        // Methods have a case, but a server may be lax, and a tunnel would be lost to all others.
        method if method.eq_ignore_ascii_case(b"CONNECT") => Start::ConnectRequest,
        _ => Start::Request,
    };
    Some(Head::new(start, read_version(version)?))
}

/// `HTTP/1.1 404 Not Found`
fn read_status_line(line: &[u8]) -> Option<Head> {
    let mut parts = line.splitn(3, |byte| *byte == b' ');
    let is_http_1_0 = read_version(parts.next()?)?;
    let code = parts.next()?;
    if code.len() != 3 || !parts.next().is_none_or(is_text) {
        return None;
    }
    // Behind `101 Switching Protocols` comes no HTTP, and nobody asked for it.
    let status = u16::try_from(read_number(code, 10)?).ok()?;
    let is_http = status >= 100 && status != 101;
    is_http.then(|| Head::new(Start::Status(status), is_http_1_0))
}

/// Whether it is HTTP/1.0 rather than a later one; none: it is no HTTP/1.
fn read_version(version: &[u8]) -> Option<bool> {
    match version.strip_prefix(b"HTTP/1.")? {
        [minor] if minor.is_ascii_digit() => Some(*minor == b'0'),
        _ => None,
    }
}

/// Name and value of a field line; none: it is malformed.
fn split_field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = memchr::memchr(b':', line)?;
    let (name, value) = (line.get(..colon)?, line.get(colon + 1..)?);
    (is_token(name) && is_text(value)).then_some((name, value.trim_ascii()))
}

/// A trailer must not say anything of the length, which a peer might merge into the header.
fn check_trailer(line: &[u8]) -> Option<()> {
    let (name, _) = split_field(line)?;
    let is_length = name.eq_ignore_ascii_case(b"content-length")
        || name.eq_ignore_ascii_case(b"transfer-encoding");
    (!is_length).then_some(())
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
fn inspect(body: &[u8]) -> Option<Head> {
    let mut scan = Scan::default();
    let end = scan.advance(Kind::Request, body, usize::MAX);
    (end == Ok(End::At(body.len()))).then_some(scan.head)
}

/// Appends `body`, which is exactly one request.
///
/// # Errors
/// [`Reason::Malformed`], [`Reason::Stateful`]; `out` is then unchanged.
pub(super) fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    let head = inspect(body).ok_or(Reason::Malformed)?;
    if head.refused().is_some() {
        return Err(Reason::Stateful);
    }
    out.extend_from_slice(body);
    Ok(())
}

/// What reply that request has.
pub(super) fn classify(body: &[u8]) -> Verdict {
    let Some(head) = inspect(body) else {
        let what = "no complete HTTP/1.x request".to_owned();
        return Verdict::Refused { reason: Reason::Malformed, what };
    };
    if let Some(what) = head.refused() {
        return Verdict::Refused { reason: Reason::Stateful, what: what.to_owned() };
    }
    let expect = match head.start {
        Start::HeadRequest => Expect::HeaderOnly,
        Start::Request | Start::ConnectRequest | Start::Status(_) => Expect::Plain,
    };
    if head.is_last() { Verdict::Last(expect) } else { Verdict::One(expect) }
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
        for request in [
            with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n") + "0\r\n\r\n",
            with("Content-Length: 5\r\nContent-Length: 6\r\n") + "123456",
            with("Content-Length: 5, 5\r\n") + "12345",
            with("Content-Length: +5\r\n") + "12345",
            with("Content-Length: -5\r\n") + "12345",
            with("Content-Length: 0x5\r\n") + "12345",
            with("Content-Length: 5 5\r\n") + "12345",
            with("Content-Length:\r\n"),
            with("Content-Length : 5\r\n") + "12345",
            with("Content-Length\t: 5\r\n") + "12345",
            with(" Content-Length: 5\r\n") + "12345",
            with("X: y\r\n Content-Length: 5\r\n") + "12345",
            with("X: y\r\n\tfolded\r\n"),
            with("X: y\nContent-Length: 5\r\n") + "12345",
            with("X: y\rContent-Length: 5\r\n") + "12345",
            with("X: \0\r\n"),
            with("X: \x0b\r\n"),
            with("X\r\n"),
            with(": y\r\n"),
            with("X Y: z\r\n"),
            with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding: gzip, chunked\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding: chunked, identity\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding: identity\r\n"),
            with("Transfer-Encoding: xchunked\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding: \"chunked\"\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding: \x0bchunked\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding : chunked\r\n") + "0\r\n\r\n",
            with("Transfer-Encoding:\r\n"),
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
            chunked("\r\n"),
            chunked("0x1\r\na\r\n0\r\n\r\n"),
            chunked("+1\r\na\r\n0\r\n\r\n"),
            chunked("-1\r\na\r\n0\r\n\r\n"),
            chunked(" 1\r\na\r\n0\r\n\r\n"),
            chunked("1 \r\na\r\n0\r\n\r\n"),
            chunked("1 1\r\na\r\n0\r\n\r\n"),
            chunked("1\na\r\n0\r\n\r\n"),
            chunked("1;a\nb\r\na\r\n0\r\n\r\n"),
            chunked("1;a\rb\r\na\r\n0\r\n\r\n"),
            chunked("1\r\nabc\r\n0\r\n\r\n"),
            chunked("1\r\na\n\n0\r\n\r\n"),
            chunked("2\r\na\r\n0\r\n\r\n"),
            chunked("0\r\nContent-Length: 5\r\n\r\n"),
            chunked("0\r\nTransfer-Encoding: chunked\r\n\r\n"),
            chunked("0\r\n folded\r\n\r\n"),
            chunked("0\n\n"),
            "GET / HTTP/1.1\nHost: x\n\n".to_owned(),
            "\r\nGET / HTTP/1.1\r\n\r\n".to_owned(),
            " GET / HTTP/1.1\r\n\r\n".to_owned(),
            "GET  / HTTP/1.1\r\n\r\n".to_owned(),
            "GET / HTTP/1.1 \r\n\r\n".to_owned(),
            "GET /a b HTTP/1.1\r\n\r\n".to_owned(),
            "GET\t/\tHTTP/1.1\r\n\r\n".to_owned(),
            "GET /\r HTTP/1.1\r\n\r\n".to_owned(),
            "GET /\r\n\r\n".to_owned(),
            "G(T / HTTP/1.1\r\n\r\n".to_owned(),
            "GET / http/1.1\r\n\r\n".to_owned(),
            "GET / HTTP/1.10\r\n\r\n".to_owned(),
            "GET / HTTP/1.\r\n\r\n".to_owned(),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
            "HTTP/1.1 200 OK\r\n\r\n".to_owned(),
        ] {
            assert_eq!(request_look(&request), Look::Malformed, "{request:?}");
            let mut out = b"before".to_vec();
            assert_eq!(encode(request.as_bytes(), &mut out), Err(Reason::Malformed));
            assert_eq!(out, b"before");
            let verdict = classify(request.as_bytes());
            let is_refused = matches!(verdict, Verdict::Refused { reason: Reason::Malformed, .. });
            assert!(is_refused, "{request:?}");
        }
    }

    #[test]
    fn replies_that_follow_no_rule_are_malformed() {
        for reply in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
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
            ("GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", None),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 01\r\n\r\nx", None),
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
            ("GET / HTTP/1.1\r\nConnection: keep-alive\r\n\r\n", &one),
            ("GET / HTTP/1.1\r\nConnection: closed\r\n\r\n", &one),
            ("GET / HTTP/1.1\r\nX-Connection: close\r\n\r\n", &one),
            ("GET / HTTP/1.1\r\nconnection: Close\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nConnection: TE,\tclose\r\nTE: trailers\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nConnection: TE\r\nConnection: close\r\n\r\n", &last),
            ("GET / HTTP/1.1\r\nConnection: keep-alive, close\r\n\r\n", &last),
            ("GET / HTTP/1.0\r\n\r\n", &last),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", &one),
            ("HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n", &Verdict::Last(Expect::HeaderOnly)),
        ] {
            assert_eq!(classify(request.as_bytes()), *expected, "{request:?}");
            assert_eq!(encode(request.as_bytes(), &mut vec![]), Ok(()));
        }
    }

    #[test]
    fn a_peer_says_when_it_closes() {
        for (reply, closes) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nconnection: CLOSE\r\n\r\n", true),
            ("HTTP/1.1 204 No\r\nConnection: a\r\nConnection: b , close\r\nX: y\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\nConnection: closed\r\nContent-Length: 0\r\n\r\n", false),
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
