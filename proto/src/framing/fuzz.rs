//! Fuzzing: valid streams of each framing, changed at random, against what holds of any bytes.
//!
//! However a stream arrives, it is cut alike; what is cut out is cut alike again; what is encoded
//! is one message; and no more is held back than one message may have. What cuts differently from
//! all that came before is kept, and changed further.
//!
//! Ignored by `cargo test`: tests/fuzz.sh runs it. POOLBROKER_FUZZ_SECONDS says how long each framing
//! is fuzzed, POOLBROKER_FUZZ_SEED where chance begins.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::{Cut, Cutter, Expect, Framing, ReplyCut, ReplyCutter, Verdict};
use crate::reason::Reason;

/// Bytes of a message; small, so that limits are met.
const MAX: usize = 200;
/// What may be held beside a message: its marks, empty lines in front of it.
const MARKS_MAX: usize = 24;
const STREAM_BYTES_MAX: usize = 4 * MAX;
const KEPT_MAX: usize = 2_000;
const EXPECTS: [Expect; 5] =
    [Expect::Plain, Expect::HeaderOnly, Expect::Values, Expect::Stats, Expect::Meta];

/// Bytes with a meaning in some framing.
const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b",",
    b"0",
    b"-1",
    b"+5",
    b"05",
    b"0x5",
    b"9",
    b"2147483647",
    b"4294967296",
    b"18446744073709551615",
    b"18446744073709551616",
    b"ffffffffffffffff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x05",
    b"\x05\0\0\0",
    b"*1\r\n",
    b"*?\r\n",
    b"*-1\r\n",
    b"$?\r\n",
    b";1\r\na\r\n",
    b";0\r\n",
    b".\r\n",
    b"|1\r\n",
    b">1\r\n",
    b"%1\r\n",
    b"~2\r\n",
    b"$4\r\nPING\r\n",
    b"_\r\n",
    b"SUBSCRIBE",
    b"\"",
    b"'",
    b"\\x41",
    b"noreply",
    b"END\r\n",
    b"VALUE k 0 1\r\na\r\n",
    b"STAT a 1\r\n",
    b"VA 1\r\na\r\n",
    b"HD\r\n",
    b"set k 0 0 2\r\n",
    b"ms k 2 T0\r\n",
    b"get k\r\n",
    b" q",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b" 200 OK\r\n",
    b" 100 \r\n",
    b" 204 \r\n",
    b"GET / HTTP/1.1\r\n",
    b"HEAD ",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Upgrade: x\r\n",
    b"0\r\n\r\n",
    b"5\r\nabcde\r\n",
    b"5:hello,",
    b"5 hello",
];

/// Streams of requests and replies to begin with.
fn seeds(framing: Framing) -> Vec<Vec<u8>> {
    let texts: &[&[u8]] = match framing {
        Framing::Resp => &[
            b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1\r\n$4\r\nPING\r\n",
            b"GET \"a b\" 'c'\r\n\r\nPING\r\n",
            b"+OK\r\n-ERR x\r\n:-1\r\n$3\r\nabc\r\n$-1\r\n*-1\r\n_\r\n#t\r\n,1.5\r\n(12\r\n",
            b"*2\r\n*1\r\n:1\r\n%1\r\n+a\r\n~1\r\n,inf\r\n!3\r\nERR\r\n=7\r\ntxt:abc\r\n",
            b"|1\r\n+ttl\r\n:3\r\n$?\r\n;2\r\nab\r\n;0\r\n>2\r\n+a\r\n+b\r\n*?\r\n:1\r\n.\r\n",
        ],
        Framing::Memcached => &[
            b"set k 0 0 2\r\nab\r\nget k\r\nmg k v\r\nms k 2 T0\r\nab\r\nmn\r\n",
            b"cas k 0 0 2 1 noreply\r\nab\r\ngats 1 k\nstats items\r\nincr k 1\r\n",
            b"VALUE k 0 2\r\nab\r\nEND\r\nSTORED\r\n12\r\nSTAT a 1\r\nEND\r\nVA 2 t1\r\nab\r\nHD\r\n",
            b"cache_memlimit 1\r\nMEMLIMIT_TOO_SMALL x\r\nERROR\r\nCLIENT_ERROR x\r\nRESET\r\n",
        ],
        Framing::Http1 => &[
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\nHEAD / HTTP/1.0\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
            b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 204 \r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nto the end",
        ],
        Framing::Lines
        | Framing::Crlf
        | Framing::Prefix { .. }
        | Framing::Length(_)
        | Framing::Fixed { .. }
        | Framing::Netstring
        | Framing::OctetCounted
        | Framing::Raw => &[b"", b"\n", b"\x05\0\0\0\x05hello", b"5:hello,5 hello"],
    };
    let mut streams: Vec<_> = texts.iter().map(|text| text.to_vec()).collect();
    let mut encoded = Vec::new();
    for length in [0, 1, 5, 12, 20, MAX, MAX + 1] {
        let mut body = vec![b'a'; length];
        // With its own length where framings look for it.
        if let [first, .., last] = body.as_mut_slice() {
            let low = u8::try_from(length).unwrap_or(u8::MAX);
            (*first, *last) = (low, low);
        }
        let _ = framing.encode(&body, &mut encoded);
    }
    streams.push(encoded);
    streams
}

/// A stream made of two that are known.
fn mutate(random: &mut Rng, known: &[Vec<u8>]) -> Vec<u8> {
    let mut stream = known[random.usize(..known.len())].clone();
    for _ in 0..=random.usize(..4) {
        let at = random.usize(..=stream.len());
        let end = at + random.usize(..=(stream.len() - at).min(16));
        match random.u8(..7) {
            0 if at < stream.len() => stream[at] = random.u8(..),
            1 if at < stream.len() => stream[at] ^= 1 << random.u8(..8),
            2 => drop(stream.drain(at..end)),
            3 => {
                let copy = stream[at..end].to_vec();
                let to = random.usize(..=stream.len());
                stream.splice(to..to, copy);
            }
            4 => {
                let other = &known[random.usize(..known.len())];
                let from = random.usize(..=other.len());
                stream.truncate(at);
                stream.extend_from_slice(&other[from..]);
            }
            5 => drop(stream.splice(at..end, WORDS[random.usize(..WORDS.len())].iter().copied())),
            _ => {
                let word = WORDS[random.usize(..WORDS.len())];
                stream.splice(at..at, word.iter().copied());
            }
        }
    }
    stream.truncate(STREAM_BYTES_MAX);
    stream
}

/// Feeds a stream in pieces of these lengths; `take` takes from its start what is complete.
fn feed(
    stream: &[u8],
    mut next_piece: impl FnMut() -> usize,
    mut take: impl FnMut(&[u8]) -> Option<usize>,
) -> Vec<u8> {
    let (mut start, mut end) = (0, 0);
    while end < stream.len() {
        end = (end + next_piece()).min(stream.len());
        while start < end {
            match take(&stream[start..end]) {
                None => return stream[start..end].to_vec(),
                Some(0) => break,
                Some(consumed) => start += consumed,
            }
        }
    }
    stream[start..].to_vec()
}

/// Nothing is taken yet, which must end before the memory does.
fn wait(bytes: &[u8]) -> Option<usize> {
    assert!(bytes.len() <= MAX + MARKS_MAX, "{} bytes are held", bytes.len());
    Some(0)
}

/// What a stream was cut into.
#[derive(Debug, PartialEq, Eq)]
struct Requests {
    /// Bodies, and bytes with their marks.
    messages: Vec<(Vec<u8>, usize)>,
    refused: Vec<Reason>,
    is_broken: bool,
}

fn cut(framing: Framing, stream: &[u8], next_piece: impl FnMut() -> usize) -> Requests {
    let mut cutter = Cutter::new(framing, MAX);
    let mut cuts = Requests { messages: vec![], refused: vec![], is_broken: false };
    feed(stream, next_piece, |bytes| match cutter.next_cut(bytes) {
        Cut::Message { body, consumed } => {
            assert!(consumed > 0 && consumed <= bytes.len());
            assert!(body.len() <= MAX, "longer than the limit");
            cuts.messages.push((bytes[body].to_vec(), consumed));
            Some(consumed)
        }
        Cut::Refused { reason, consumed } => {
            cuts.refused.push(reason);
            Some(consumed)
        }
        Cut::Skipped { consumed } => Some(consumed),
        Cut::Incomplete => wait(bytes),
        Cut::Broken => {
            cuts.is_broken = true;
            None
        }
    });
    cuts
}

/// A reply that was cut out, or a push, which was not awaited.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reply {
    body: Vec<u8>,
    bytes: usize,
    closes: bool,
    expect: Option<Expect>,
}

/// What a stream was cut into that came back.
#[derive(Debug, PartialEq, Eq)]
struct Replies {
    replies: Vec<Reply>,
    broken: Option<Reason>,
    /// What the end of the connection completed.
    last: Option<Vec<u8>>,
}

fn cut_replies(
    framing: Framing,
    expects: &[Expect],
    stream: &[u8],
    next_piece: impl FnMut() -> usize,
) -> Replies {
    let mut cutter = ReplyCutter::new(framing, MAX);
    let mut cuts = Replies { replies: vec![], broken: None, last: None };
    let mut expects = expects.iter().copied();
    let mut expect = expects.next();
    let rest = feed(stream, next_piece, |bytes| match cutter.next_reply(expect, bytes) {
        ReplyCut::Reply { body, consumed, closes } => {
            assert!(consumed > 0 && consumed <= bytes.len() && body.len() <= MAX);
            let body = bytes[body].to_vec();
            cuts.replies.push(Reply { body, bytes: consumed, closes, expect });
            expect = expects.next();
            Some(consumed)
        }
        ReplyCut::Push { consumed } => {
            assert!(consumed > 0 && consumed <= bytes.len());
            let body = bytes[..consumed].to_vec();
            cuts.replies.push(Reply { body, bytes: consumed, closes: false, expect: None });
            Some(consumed)
        }
        ReplyCut::Incomplete => wait(bytes),
        ReplyCut::Broken(reason) => {
            cuts.broken = Some(reason);
            None
        }
    });
    if cuts.broken.is_none() {
        cuts.last = cutter.finish(&rest).map(|body| rest[body].to_vec());
    }
    cuts
}

/// Checks everything that holds of `stream`: in which way it was cut.
fn check(framing: Framing, random: &mut Rng, stream: &[u8]) -> (Requests, Replies, bool) {
    let whole = || usize::MAX / 2;
    let expects: Vec<_> = (0..8).map(|_| EXPECTS[random.usize(..EXPECTS.len())]).collect();
    let requests = cut(framing, stream, whole);
    let replies = cut_replies(framing, &expects, stream, whole);
    // A stream without marks is cut as it comes.
    if framing != Framing::Raw {
        assert_eq!(cut(framing, stream, || 1), requests, "byte by byte");
        assert_eq!(cut_replies(framing, &expects, stream, || 1), replies, "byte by byte");
        let longest = 1 + random.usize(..40);
        let pieces = Rng::with_seed(random.u64(..));
        let mut of_requests = pieces.clone();
        let in_pieces = cut(framing, stream, || 1 + of_requests.usize(..longest));
        assert_eq!(in_pieces, requests, "in pieces");
        let mut of_replies = pieces;
        let next_piece = || 1 + of_replies.usize(..longest);
        assert_eq!(cut_replies(framing, &expects, stream, next_piece), replies, "in pieces");
    }
    let mut at = 0;
    for (body, bytes) in &requests.messages {
        if requests.refused.is_empty() {
            let alone = cut(framing, &stream[at..at + bytes], whole);
            assert_eq!(alone.messages, [(body.clone(), *bytes)], "alone");
            at += bytes;
        }
        check_encoded(framing, body);
    }
    let mut at = 0;
    for reply in &replies.replies {
        let alone = &stream[at..at + reply.bytes];
        let alone = cut_replies(framing, reply.expect.as_slice(), alone, whole);
        assert_eq!(alone.replies, std::slice::from_ref(reply), "alone");
        at += reply.bytes;
    }
    (requests, replies, check_encoded(framing, stream))
}

/// What is encoded is one message, and refused where it is classified so; whether it is encoded.
fn check_encoded(framing: Framing, body: &[u8]) -> bool {
    let mut out = b"before".to_vec();
    let encoded = framing.encode(body, &mut out);
    let verdict = framing.classify(body);
    let Ok(()) = encoded else {
        assert_eq!(out, b"before");
        if let Verdict::Refused { reason, what } = verdict {
            assert_eq!(encoded, Err(reason));
            assert!(!what.is_empty() && what.len() <= MAX, "{what}");
        }
        return false;
    };
    assert!(!matches!(verdict, Verdict::Refused { .. }), "{verdict:?}");
    let mut again = b"before".to_vec();
    assert_eq!(framing.encode_classified(body, &mut again), Ok(()));
    assert_eq!(again, out);
    let out = out.strip_prefix(b"before").expect("it is appended");
    assert!(out.len() <= body.len() + framing.overhead_bytes());
    if out.is_empty() || framing == Framing::Raw {
        return true;
    }
    let mut cutter = Cutter::new(framing, out.len());
    match cutter.next_cut(out) {
        Cut::Message { body: found, consumed } => {
            assert_eq!(consumed, out.len(), "one message");
            assert!(out[found].starts_with(body.trim_ascii_end()), "the same message");
        }
        other => panic!("{other:?} of what was encoded"),
    }
    true
}

/// Shows the stream that a check did not survive.
struct Shown<'a>(&'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the stream: b\"{}\"", self.0.escape_ascii());
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

fn fuzz(name: &str) {
    let framing: Framing = name.parse().expect("it is a framing");
    let end = Instant::now() + Duration::from_secs(number("POOLBROKER_FUZZ_SECONDS", 10));
    let seed = number("POOLBROKER_FUZZ_SEED", 1);
    let mut random = Rng::with_seed(seed);
    let (mut known, mut seen, mut streams) = (seeds(framing), HashSet::new(), 0_u64);
    while Instant::now() < end {
        for _ in 0..100 {
            let stream = mutate(&mut random, &known);
            let shown = Shown(&stream);
            let (requests, replies, is_encoded) = check(framing, &mut random, &stream);
            drop(shown);
            let kinds = |reply: &Reply| (reply.expect.is_some(), reply.closes);
            let way = (
                (requests.messages.len(), requests.refused.len(), requests.is_broken, is_encoded),
                replies.replies.iter().map(kinds).collect::<Vec<_>>(),
                (replies.broken, replies.last.is_some()),
            );
            if seen.insert(way) && known.len() < KEPT_MAX {
                known.push(stream);
            }
            streams += 1;
        }
    }
    eprintln!("{name}: {streams} streams, cut in {} ways, seed {seed}", seen.len());
}

macro_rules! framings {
    ($($test:ident $name:literal;)*) => {
        $(
            #[test]
            #[ignore = "takes its time: tests/fuzz.sh"]
            fn $test() {
                fuzz($name);
            }
        )*
    };
}

framings! {
    lines "lines";
    crlf "crlf";
    u16be "u16be";
    u16le "u16le";
    u32be "u32be";
    u32le "u32le";
    fixed "fixed&size=12";
    length "length";
    length_inside "length&offset=2&width=2&endian=little&adjust=6";
    length_of_eight_bytes "length&offset=1&width=8&adjust=-3";
    netstring "netstring";
    octet_counted "octet-counted";
    resp "resp";
    memcached "memcached";
    http1 "http1";
    raw "raw";
}
