//! The text protocol of memcached (`doc/protocol.txt` of its source).
//!
//! A request is one line, and behind the line of a command that stores, the data of the length
//! that it names. Which reply a request has shows in its first word, and `noreply` says that there
//! is none.
//!
//! memcached takes the data behind a line that it refuses for commands, and may answer a line
//! that it refuses although `noreply` stands there. So lines are read as strictly as memcached
//! reads them, and commands that are not known here are refused: whether data follows them is not
//! known either.

use super::resp::{Stop, append, line_break, line_end};
use super::scan::{Look, ReplyLook};
use super::{Expect, Verdict};
use crate::reason::Reason;

/// Bytes of a key.
const KEY_BYTES_MAX: usize = 250;
/// Bytes of a value: memcached counts it with its line break in 31 bits.
const DATA_BYTES_MAX: usize = i32::MAX as usize - 2;
/// Bytes of a line that does not get values: behind more memcached hangs up.
const LINE_BYTES_MAX: usize = 2046;
/// Words of a meta command (`MFLAG_MAX_OPT_LENGTH` of memcached).
const META_WORDS_MAX: usize = 19;
/// Bytes of an unknown command's name that are repeated.
const NAME_BYTES_MAX: usize = 32;

/// How far one message has been looked through.
#[derive(Debug, Clone, Default)]
pub(super) struct Scan {
    /// Where the line begins that is looked at.
    at: usize,
    /// Up to where no end of it was found.
    searched: usize,
    /// Where the data ends that is waited for.
    data_end: Option<usize>,
}

impl Scan {
    /// The request at the start of `bytes`.
    pub(super) fn next_request(&mut self, bytes: &[u8], bytes_max: usize) -> Look {
        // What is decided depends on no byte behind the limit, however many came at once.
        let seen = bytes.get(..bytes_max).unwrap_or(bytes);
        let look = match self.request(seen, bytes_max) {
            Ok(look) => look,
            Err(Stop::Incomplete) if bytes.len() < bytes_max => return Look::Incomplete,
            Err(Stop::Incomplete | Stop::TooLong) => Look::TooLong { bytes: None },
            Err(Stop::Malformed) => Look::Malformed,
        };
        *self = Scan::default();
        look
    }

    /// The reply at the start of `bytes`. memcached sends nothing unasked.
    pub(super) fn next_reply(
        &mut self,
        expect: Option<Expect>,
        bytes: &[u8],
        bytes_max: usize,
    ) -> ReplyLook {
        let seen = bytes.get(..bytes_max).unwrap_or(bytes);
        let found = match expect {
            _ if bytes.is_empty() => return ReplyLook::Incomplete,
            None => Err(Stop::Malformed),
            Some(expect) => self.reply(expect, seen, bytes_max),
        };
        let look = match found {
            Ok(bytes) => ReplyLook::Reply { bytes, closes: false },
            Err(Stop::Incomplete) if bytes.len() < bytes_max => return ReplyLook::Incomplete,
            Err(Stop::Incomplete | Stop::TooLong) => ReplyLook::TooLong,
            Err(Stop::Malformed) => ReplyLook::Malformed,
        };
        *self = Scan::default();
        look
    }

    fn request(&mut self, seen: &[u8], bytes_max: usize) -> Result<Look, Stop> {
        let data_end = match self.data_end {
            Some(data_end) => data_end,
            None => {
                let unsearched = seen.get(self.searched..).unwrap_or_default();
                let Some(found) = memchr::memchr(b'\n', unsearched) else {
                    self.searched = seen.len();
                    return Err(Stop::Incomplete);
                };
                let end = self.searched + found;
                let line = without_return(seen.get(..end).unwrap_or_default());
                let kind = Kind::of(words(line).next().unwrap_or_default());
                if !kind.ok_or(Stop::Malformed)?.has_data() {
                    // Whatever else is wrong with it concerns nothing but this line.
                    return Ok(Look::Message { body: 0..end + 1, consumed: end + 1 });
                }
                let data_bytes = read(line).map_err(|_| Stop::Malformed)?.data_bytes;
                let data_end = (end + 1).saturating_add(data_bytes.unwrap_or_default());
                let whole = data_end.saturating_add(2);
                if whole > bytes_max {
                    return Ok(Look::TooLong { bytes: Some(whole) });
                }
                *self.data_end.insert(data_end)
            }
        };
        let whole = line_break(seen, data_end)?;
        Ok(Look::Message { body: 0..whole, consumed: whole })
    }

    /// The bytes of the reply once it is complete.
    fn reply(&mut self, expect: Expect, seen: &[u8], bytes_max: usize) -> Result<usize, Stop> {
        loop {
            if let Some(data_end) = self.data_end {
                let behind = line_break(seen, data_end)?;
                if expect == Expect::Meta {
                    return Ok(behind);
                }
                *self = Scan { at: behind, searched: behind, data_end: None };
            }
            let end = line_end(seen, &mut self.searched)?;
            let line = seen.get(self.at..end).unwrap_or_default();
            let behind = end + 2;
            match meaning(expect, line, self.at == 0).ok_or(Stop::Malformed)? {
                Meaning::Last => return Ok(behind),
                Meaning::More => (self.at, self.searched) = (behind, behind),
                Meaning::Data(bytes) => {
                    let data_end = behind.saturating_add(bytes);
                    if data_end.saturating_add(2) > bytes_max {
                        return Err(Stop::TooLong);
                    }
                    self.data_end = Some(data_end);
                }
            }
        }
    }
}

/// What a line of a reply means.
#[derive(Debug, Clone, Copy)]
enum Meaning {
    /// The reply ends with it.
    Last,
    /// Another line follows.
    More,
    /// So many bytes of data follow.
    Data(usize),
}

/// What `line` means in a reply of that kind; none: it cannot stand there.
fn meaning(expect: Expect, line: &[u8], is_first: bool) -> Option<Meaning> {
    let mut fields = line.split(|byte| *byte == b' ');
    let word = fields.next()?;
    let last = |is_last: bool| is_last.then_some(Meaning::Last);
    match expect {
        Expect::Plain | Expect::HeaderOnly => last(is_status(word, line)),
        Expect::Values => match word {
            b"VALUE" => {
                key(fields.next()).ok()?;
                number::<u64>(fields.next()).ok()?;
                let bytes = number(fields.next()).ok()?;
                if let Some(cas) = fields.next() {
                    number::<u64>(Some(cas)).ok()?;
                }
                fields.next().is_none().then_some(Meaning::Data(bytes))
            }
            _ => last(line == b"END" || is_first && is_error(word)),
        },
        Expect::Stats => match word {
            b"STAT" | b"ITEM" | b"PREFIX" => Some(Meaning::More),
            _ => last(line == b"END" || is_first && is_status(word, line)),
        },
        Expect::Meta => match word {
            b"VA" => number(fields.next()).ok().map(Meaning::Data),
            b"HD" | b"NS" | b"EX" | b"NF" | b"EN" | b"MN" | b"ME" | b"OK" => Some(Meaning::Last),
            _ => last(is_error(word)),
        },
    }
}

fn is_error(word: &[u8]) -> bool {
    matches!(word, b"ERROR" | b"CLIENT_ERROR" | b"SERVER_ERROR")
}

/// Whether `line`, which begins with `word`, is a whole reply.
fn is_status(word: &[u8], line: &[u8]) -> bool {
    match word {
        b"STORED" | b"NOT_STORED" | b"EXISTS" | b"NOT_FOUND" | b"DELETED" | b"TOUCHED" => true,
        b"OK" | b"RESET" | b"VERSION" => true,
        // Of `slabs` and `lru_crawler`.
        b"BUSY" | b"BADCLASS" | b"NOSPARE" | b"NOTFULL" | b"UNSAFE" | b"SAME" => true,
        b"NOTSTARTED" => true,
        // Of `cache_memlimit`.
        b"MEMLIMIT_TOO_SMALL" | b"MEMLIMIT_ADJUST_FAILED" => true,
        _ => is_error(word) || number::<u64>(Some(line)).is_ok(),
    }
}

/// Commands that have the same fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Get,
    GetAndTouch,
    Stats,
    Store,
    CompareAndStore,
    MetaStore,
    Meta,
    MetaNothing,
    Delete,
    Count,
    Touch,
    FlushAll,
    Verbosity,
    MemoryLimit,
    Version,
    /// Of many forms, with a reply of one line.
    Tuning,
    /// The connection ends, or serves nothing else from then on.
    Ending,
}

impl Kind {
    fn of(name: &[u8]) -> Option<Kind> {
        Some(match name {
            b"get" | b"gets" => Kind::Get,
            b"gat" | b"gats" => Kind::GetAndTouch,
            b"stats" => Kind::Stats,
            b"set" | b"add" | b"replace" | b"append" | b"prepend" => Kind::Store,
            b"cas" => Kind::CompareAndStore,
            b"ms" => Kind::MetaStore,
            b"mg" | b"md" | b"ma" | b"me" => Kind::Meta,
            b"mn" => Kind::MetaNothing,
            b"delete" => Kind::Delete,
            b"incr" | b"decr" => Kind::Count,
            b"touch" => Kind::Touch,
            b"flush_all" => Kind::FlushAll,
            b"verbosity" => Kind::Verbosity,
            b"cache_memlimit" => Kind::MemoryLimit,
            b"version" => Kind::Version,
            b"slabs" | b"lru" | b"lru_crawler" => Kind::Tuning,
            b"watch" | b"quit" | b"shutdown" => Kind::Ending,
            _ => return None,
        })
    }

    /// Whether a data block follows the line.
    fn has_data(self) -> bool {
        matches!(self, Kind::Store | Kind::CompareAndStore | Kind::MetaStore)
    }
}

/// What the line of a request says.
#[derive(Debug)]
struct Command {
    /// Its reply; or [`Reason::Stateful`].
    verdict: Verdict,
    /// Bytes of the data that follows the line.
    data_bytes: Option<usize>,
}

/// Reads the line of a request, without its end.
fn read(line: &[u8]) -> Result<Command, String> {
    if line.iter().any(u8::is_ascii_control) {
        return Err("a control character in the command line".into());
    }
    let mut fields = words(line);
    let name = fields.next().unwrap_or_default();
    let shown = name.get(..NAME_BYTES_MAX).unwrap_or(name).escape_ascii();
    let Some(kind) = Kind::of(name) else {
        return Err(format!("unknown command {shown}; a lease can carry it"));
    };
    // memcached looks for `get ` at the very start of such a line.
    if line.len() > LINE_BYTES_MAX && !(kind == Kind::Get && line.starts_with(b"get")) {
        return Err("a command line that is too long".into());
    }
    let stateful = |what| Verdict::Refused { reason: Reason::Stateful, what };
    let mut data_bytes = None;
    let verdict = match kind {
        Kind::Get | Kind::GetAndTouch => {
            if kind == Kind::GetAndTouch {
                number::<i32>(fields.next())?;
            }
            key(fields.next())?;
            fields.try_for_each(|field| key(Some(field)))?;
            Verdict::One(Expect::Values)
        }
        Kind::Stats => match fields.next() {
            // Their one line looks like the first of several, and no `END` follows it.
            Some(switch @ (b"sizes_enable" | b"sizes_disable")) => {
                stateful(format!("{shown} {}", switch.escape_ascii()))
            }
            _ => Verdict::One(Expect::Stats),
        },
        Kind::Store | Kind::CompareAndStore => {
            key(fields.next())?;
            number::<u32>(fields.next())?;
            number::<i32>(fields.next())?;
            data_bytes = Some(data(fields.next())?);
            if kind == Kind::CompareAndStore {
                number::<u64>(fields.next())?;
            }
            last_field(fields)?
        }
        Kind::MetaStore | Kind::Meta => {
            if fields.clone().count() >= META_WORDS_MAX {
                return Err("too many fields".into());
            }
            key(fields.next())?;
            if kind == Kind::MetaStore {
                data_bytes = Some(data(fields.next())?);
            }
            if fields.any(|flag| flag.starts_with(b"q")) {
                stateful(format!("{shown} with q"))
            } else {
                Verdict::One(Expect::Meta)
            }
        }
        Kind::MetaNothing => match fields.next() {
            None => Verdict::One(Expect::Meta),
            Some(_) => return Err("too many fields".into()),
        },
        Kind::Delete => {
            key(fields.next())?;
            // A time that is no longer supported.
            let mut behind = fields.clone();
            if behind.next() == Some(b"0") {
                fields = behind;
            }
            last_field(fields)?
        }
        Kind::Count => {
            key(fields.next())?;
            number::<u64>(fields.next())?;
            last_field(fields)?
        }
        Kind::Touch => {
            key(fields.next())?;
            number::<i32>(fields.next())?;
            last_field(fields)?
        }
        Kind::FlushAll => {
            let mut behind = fields.clone();
            if number::<i32>(behind.next()).is_ok() {
                fields = behind;
            }
            last_field(fields)?
        }
        Kind::Verbosity | Kind::MemoryLimit => {
            number::<u32>(fields.next())?;
            last_field(fields)?
        }
        Kind::Version => match fields.next() {
            None => Verdict::One(Expect::Plain),
            Some(_) => return Err("too many fields".into()),
        },
        Kind::Tuning => match fields.clone().next() {
            Some(dump @ (b"metadump" | b"mgdump")) => {
                stateful(format!("{shown} {}", dump.escape_ascii()))
            }
            // Only some of them and some releases know it.
            _ if fields.last() == Some(b"noreply") => {
                return Err(format!("noreply, which {shown} need not have"));
            }
            _ => Verdict::One(Expect::Plain),
        },
        Kind::Ending => stateful(shown.to_string()),
    };
    Ok(Command { verdict, data_bytes })
}

/// The words of a line. As memcached has it, any number of spaces stands between them.
fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    line.split(|byte| *byte == b' ').filter(|word| !word.is_empty())
}

fn without_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn key(field: Option<&[u8]>) -> Result<(), String> {
    match field {
        Some([]) | None => Err("a key is missing".into()),
        Some(key) if key.len() > KEY_BYTES_MAX => Err("a key that is too long".into()),
        Some(_) => Ok(()),
    }
}

fn number<T: std::str::FromStr>(field: Option<&[u8]>) -> Result<T, String> {
    field
        .filter(|digits| !digits.starts_with(b"+"))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
        .ok_or_else(|| "a number is missing or out of range".into())
}

fn data(field: Option<&[u8]>) -> Result<usize, String> {
    match number(field)? {
        bytes if bytes > DATA_BYTES_MAX => Err("a value that is too long".into()),
        bytes => Ok(bytes),
    }
}

/// The reply of a command whose fields end here, perhaps with `noreply`.
fn last_field<'a>(mut fields: impl Iterator<Item = &'a [u8]>) -> Result<Verdict, String> {
    match (fields.next(), fields.next()) {
        (None, _) => Ok(Verdict::One(Expect::Plain)),
        (Some(b"noreply"), None) => Ok(Verdict::None),
        (Some(_), _) => Err("too many fields".into()),
    }
}

/// What reply `body` has, which must be one request; a line without data may lack its end.
fn examine(body: &[u8]) -> Result<Verdict, String> {
    let (line, behind) =
        match memchr::memchr(b'\n', body).and_then(|end| body.split_at_checked(end)) {
            Some((line, behind)) => (without_return(line), behind.get(1..).unwrap_or_default()),
            None => (body, &b""[..]),
        };
    let Command { verdict, data_bytes } = read(line)?;
    match data_bytes {
        None if behind.is_empty() => Ok(verdict),
        None => Err("more than one command".into()),
        Some(bytes) if behind.len() == bytes.saturating_add(2) && behind.ends_with(b"\r\n") => {
            Ok(verdict)
        }
        Some(_) => Err("data that does not have the length which its line names".into()),
    }
}

/// What reply the request `body` has.
pub(super) fn classify(body: &[u8]) -> Verdict {
    examine(body).unwrap_or_else(|what| Verdict::Refused { reason: Reason::Malformed, what })
}

/// Appends the request `body`, unless it may not go onto a connection that others share.
pub(super) fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    match classify(body) {
        Verdict::Refused { reason, .. } => return Err(reason),
        Verdict::One(_) | Verdict::Last(_) | Verdict::None => append(body, out),
    }
    Ok(())
}

/// As [`encode`], for a connection that is not shared yet.
pub(super) fn encode_unchecked(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    examine(body).map_err(|_| Reason::Malformed)?;
    append(body, out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 4096;
    const KINDS: [Expect; 4] = [Expect::Plain, Expect::Values, Expect::Stats, Expect::Meta];

    /// The looks at a stream of requests that arrives in pieces: messages, and how it ended.
    fn requests(stream: &[u8], pieces: &[usize], max: usize) -> (Vec<Vec<u8>>, Look) {
        let (mut scan, mut start, mut end) = (Scan::default(), 0, 0);
        let (mut messages, mut pieces) = (vec![], pieces.iter().cycle());
        loop {
            match scan.next_request(&stream[start..end], max) {
                Look::Message { body, consumed } => {
                    assert_eq!(body, 0..consumed);
                    messages.push(stream[start..end][body].to_vec());
                    start += consumed;
                }
                Look::Incomplete if end < stream.len() => {
                    assert!(end - start < max.max(1), "a message must not fill the buffer");
                    end = (end + pieces.next().unwrap()).min(stream.len());
                }
                last => return (messages, last),
            }
        }
    }

    /// As [`requests`], with the replies of these kinds, one after the other.
    fn replies(
        kinds: &[Expect],
        stream: &[u8],
        pieces: &[usize],
        max: usize,
    ) -> (Vec<usize>, ReplyLook) {
        let (mut scan, mut start, mut end) = (Scan::default(), 0, 0);
        let (mut cuts, mut pieces) = (vec![], pieces.iter().cycle());
        loop {
            let expect = kinds.get(cuts.len()).copied();
            match scan.next_reply(expect, &stream[start..end], max) {
                ReplyLook::Reply { bytes, closes: false } => {
                    cuts.push(bytes);
                    start += bytes;
                }
                ReplyLook::Incomplete if end < stream.len() => {
                    assert!(end - start < max.max(1), "a reply must not fill the buffer");
                    end = (end + pieces.next().unwrap()).min(stream.len());
                }
                last => return (cuts, last),
            }
        }
    }

    fn reply(expect: Expect, bytes: &[u8]) -> ReplyLook {
        Scan::default().next_reply(Some(expect), bytes, MAX)
    }

    fn malformed(body: &str) -> String {
        match classify(body.as_bytes()) {
            Verdict::Refused { reason: Reason::Malformed, what } => what,
            verdict => panic!("{body:?}: {verdict:?}"),
        }
    }

    fn blob() -> impl Strategy<Value = Vec<u8>> {
        let any_bytes = proptest::collection::vec(any::<u8>(), 0..20);
        let marks = proptest::sample::select(vec!["", "\r\n", "END\r\n", "\r\nEND\r\n", "VALUE a"]);
        prop_oneof![any_bytes, marks.prop_map(|mark| mark.as_bytes().to_vec())]
    }

    /// A line, data behind it.
    fn with_data(line: &str, data: &[u8]) -> Vec<u8> {
        [line.as_bytes(), b"\r\n", data, b"\r\n"].concat()
    }

    /// A request.
    fn request() -> impl Strategy<Value = Vec<u8>> {
        let lines =
            vec!["get a\r\n", "gat 1 b c\n", "delete k noreply\r\n", "mg k v q\n", "mn\r\n"];
        prop_oneof![
            proptest::sample::select(lines).prop_map(|line| line.as_bytes().to_vec()),
            blob().prop_map(|data| with_data(&format!("set k 0 -1 {}", data.len()), &data)),
            blob().prop_map(|data| with_data(&format!("cas k 1 2 {} 3", data.len()), &data)),
            blob().prop_map(|data| with_data(&format!("ms k {} T0", data.len()), &data)),
        ]
    }

    /// A reply and its kind.
    fn any_reply() -> impl Strategy<Value = (Expect, Vec<u8>)> {
        let errors = vec!["ERROR\r\n", "CLIENT_ERROR bad\r\n", "SERVER_ERROR out of memory\r\n"];
        let lines = vec!["STORED\r\n", "12\r\n", "VERSION 1.6.38\r\n", "OK\r\n", "NOT_FOUND\r\n"];
        let metas = vec!["HD\r\n", "EN\r\n", "NF\r\n", "MN\r\n", "HD c1 kab\r\n", "ME k cls=1\r\n"];
        let values = proptest::collection::vec((blob(), any::<Option<u64>>()), 0..4);
        let stats = proptest::collection::vec("(STAT|ITEM) [a-z]{1,8} [ -~]{0,8}\r\n", 0..4);
        let values = values.prop_map(|values| {
            let value = |(data, cas): &(Vec<u8>, Option<u64>)| {
                let cas = cas.map(|cas| format!(" {cas}")).unwrap_or_default();
                with_data(&format!("VALUE key 7 {}{cas}", data.len()), data)
            };
            [values.iter().map(value).collect::<Vec<_>>().concat(), b"END\r\n".to_vec()].concat()
        });
        prop_oneof![
            (proptest::sample::select(&KINDS[..]), proptest::sample::select(errors))
                .prop_map(|(kind, line)| (kind, line.as_bytes().to_vec())),
            proptest::sample::select(lines)
                .prop_map(|line| (Expect::Plain, line.as_bytes().to_vec())),
            proptest::sample::select(metas).prop_map(|line| (Expect::Meta, line.into())),
            blob().prop_map(|data| {
                (Expect::Meta, with_data(&format!("VA {} f0 s2", data.len()), &data))
            }),
            values.prop_map(|bytes| (Expect::Values, bytes)),
            stats.prop_map(|lines| (Expect::Stats, (lines.concat() + "END\r\n").into_bytes())),
        ]
    }

    /// Bytes that often look like the protocol.
    fn noise() -> impl Strategy<Value = Vec<u8>> {
        let pieces =
            "get set ms mg END VALUE STAT VA HD OK ERROR noreply \r\n \r\n \r\n \n \r 0 1 2 \
            12 a VALUE\ta\t0\t1\r\n set\tk\t0\t0\t2\r\n VA\t1\r\n 99999999999 q -1 \0"
                .split(' ')
                .map(|piece| piece.replace('\t', " "))
                .chain(std::iter::repeat_n(" ".to_owned(), 10));
        let piece = prop_oneof![
            9 => proptest::sample::select(pieces.collect::<Vec<_>>()).prop_map(String::into_bytes),
            1 => any::<u8>().prop_map(|byte| vec![byte]),
        ];
        proptest::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn replies_are_cut_alike_however_they_arrive(
            stream in proptest::collection::vec(any_reply(), 1..6),
            pieces in proptest::collection::vec(1usize..20, 1..20),
        ) {
            let kinds: Vec<_> = stream.iter().map(|(kind, _)| *kind).collect();
            let expected: Vec<_> = stream.iter().map(|(_, bytes)| bytes.len()).collect();
            let bytes: Vec<u8> = stream.into_iter().flat_map(|(_, bytes)| bytes).collect();
            for pieces in [&pieces[..], &[1], &[bytes.len()]] {
                let (cuts, last) = replies(&kinds, &bytes, pieces, MAX);
                prop_assert_eq!(&cuts, &expected);
                prop_assert_eq!(last, ReplyLook::Incomplete);
            }
        }

        #[test]
        fn a_truncated_reply_is_incomplete((kind, bytes) in any_reply()) {
            for end in 0..bytes.len() {
                prop_assert_eq!(reply(kind, &bytes[..end]), ReplyLook::Incomplete, "{}", end);
            }
            let look = |max| Scan::default().next_reply(Some(kind), &bytes, max);
            prop_assert_eq!(look(bytes.len() - 1), ReplyLook::TooLong);
            prop_assert_eq!(look(bytes.len()), reply(kind, &bytes));
        }

        #[test]
        fn requests_are_cut_alike_however_they_arrive(
            expected in proptest::collection::vec(request(), 0..8),
            pieces in proptest::collection::vec(1usize..20, 1..20),
        ) {
            let stream = expected.concat();
            for pieces in [&pieces[..], &[1], &[stream.len().max(1)]] {
                let (messages, last) = requests(&stream, pieces, MAX);
                prop_assert_eq!(&messages, &expected);
                prop_assert_eq!(last, Look::Incomplete);
            }
        }

        #[test]
        fn noise_does_not_panic_and_does_not_depend_on_the_split(
            stream in prop_oneof![noise(), proptest::collection::vec(any::<u8>(), 0..200)],
            pieces in proptest::collection::vec(1usize..20, 1..20),
            kinds in proptest::collection::vec(proptest::sample::select(&KINDS[..]), 0..4),
            max in prop_oneof![0usize..40, Just(MAX)],
        ) {
            let all = stream.len().max(1);
            let asked = requests(&stream, &[1], max);
            let answered = replies(&kinds, &stream, &[1], max);
            for pieces in [&pieces[..], &[all]] {
                prop_assert_eq!(&requests(&stream, pieces, max), &asked);
                prop_assert_eq!(&replies(&kinds, &stream, pieces, max), &answered);
            }
            let mut out = Vec::new();
            match (encode(&stream, &mut out), classify(&stream)) {
                (Ok(()), Verdict::One(_) | Verdict::None) => {
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
        fn two_requests_are_never_encoded(first in request(), second in request()) {
            for body in [
                [&first[..], &second].concat(),
                [&first[..], b"\r\n"].concat(),
                [&first[..], b"x"].concat(),
                [b"version\r\n", &first[..]].concat(),
            ] {
                let mut out = b"before".to_vec();
                prop_assert_eq!(encode(&body, &mut out), Err(Reason::Malformed));
                prop_assert_eq!(encode_unchecked(&body, &mut out), Err(Reason::Malformed));
                prop_assert_eq!(&out, b"before");
            }
        }
    }

    #[test]
    fn each_kind_of_reply_has_its_own_lines() {
        let (plain, values, stats, meta) = (0b1, 0b10, 0b100, 0b1000);
        for (line, kinds) in [
            ("STORED", plain | stats),
            ("NOT_STORED", plain | stats),
            ("EXISTS", plain | stats),
            ("NOT_FOUND", plain | stats),
            ("DELETED", plain | stats),
            ("TOUCHED", plain | stats),
            ("RESET", plain | stats),
            ("VERSION 1.6", plain | stats),
            ("BUSY currently processing", plain | stats),
            ("BADCLASS invalid class id", plain | stats),
            ("NOSPARE source class has no spare pages", plain | stats),
            ("SAME src and dst class are identical", plain | stats),
            ("MEMLIMIT_TOO_SMALL cannot set maxbytes to less than 8m", plain | stats),
            ("MEMLIMIT_ADJUST_FAILED input value is megabytes not bytes", plain | stats),
            ("18446744073709551615", plain | stats),
            ("OK", plain | stats | meta),
            ("ERROR", plain | values | stats | meta),
            ("CLIENT_ERROR bad data chunk", plain | values | stats | meta),
            ("SERVER_ERROR", plain | values | stats | meta),
            ("END", values | stats),
            ("HD t1", meta),
            ("EN", meta),
            ("NS", meta),
            ("EX", meta),
            ("NF", meta),
            ("MN", meta),
            ("ME k exp=-1", meta),
            ("END ", 0),
            ("", 0),
            ("STORE", 0),
            ("12a", 0),
            ("-1", 0),
            ("ERROR\r", 0),
            ("VALUE a 0", 0),
            ("VALUE a 0 x", 0),
            ("VALUE a 0 1 2 3", 0),
            ("VALUE a -1 1", 0),
            ("VALUE  0 1", 0),
            ("VALUE a 0 -1", 0),
            ("VA", 0),
            ("VA -1", 0),
            ("VA x", 0),
        ] {
            for (bit, kind) in KINDS.into_iter().enumerate() {
                let expected = if kinds & (1 << bit) == 0 {
                    ReplyLook::Malformed
                } else {
                    ReplyLook::Reply { bytes: line.len() + 2, closes: false }
                };
                let stream = format!("{line}\r\nSTORED\r\n");
                assert_eq!(reply(kind, stream.as_bytes()), expected, "{line:?} {kind:?}");
            }
        }
    }

    #[test]
    fn what_stands_at_the_wrong_place_is_malformed() {
        for (kind, wrong) in [
            (Expect::Plain, "OK\n"),
            (Expect::Values, "VALUE a 0 1\r\nab"),
            (Expect::Values, "VALUE a 0 1\r\na\r\nSERVER_ERROR\r\n"),
            (Expect::Values, "VALUE a 0 1\r\na\r\nSTORED\r\n"),
            (Expect::Values, "VALUE a 0 1\r\na\r\n\r\n"),
            (Expect::Stats, "STAT a 1\r\nOK\r\n"),
            (Expect::Stats, "VALUE a 0 0\r\n"),
            (Expect::Meta, "VA 1\r\nab"),
            (Expect::Meta, "VALUE a 0 0\r\n"),
        ] {
            assert_eq!(reply(kind, wrong.as_bytes()), ReplyLook::Malformed, "{wrong:?}");
        }
        // Nothing comes unasked.
        let look = |bytes: &[u8]| Scan::default().next_reply(None, bytes, MAX);
        assert_eq!((look(b""), look(b"O")), (ReplyLook::Incomplete, ReplyLook::Malformed));
    }

    #[test]
    fn a_message_is_refused_as_soon_as_its_length_shows() {
        for (kind, bytes, start) in [
            (Expect::Values, 19, "VALUE a 0 4\r\n"),
            (Expect::Values, 19, "VALUE a 0 1\r\na\r\nVA"),
            (Expect::Meta, 12, "VA 4\r\n"),
            (Expect::Plain, 6, "ERROR"),
        ] {
            let look = |max| Scan::default().next_reply(Some(kind), start.as_bytes(), max);
            assert_eq!(look(bytes - 1), ReplyLook::TooLong, "{start:?}");
            assert_eq!(look(bytes), ReplyLook::Incomplete, "{start:?}");
        }
        let huge = format!("VA {}\r\n", usize::MAX);
        assert_eq!(reply(Expect::Meta, huge.as_bytes()), ReplyLook::TooLong);
        let look = |bytes: &str, max| Scan::default().next_request(bytes.as_bytes(), max);
        assert_eq!(look("set k 0 0 4\r\n", 19), Look::Incomplete);
        assert_eq!(look("set k 0 0 4\r\n", 18), Look::TooLong { bytes: Some(19) });
        assert_eq!(look("get k\r\n", 6), Look::TooLong { bytes: None });
        assert_eq!(look("get k\r\n", 7), Look::Message { body: 0..7, consumed: 7 });
        assert_eq!(look("get kk", 6), Look::TooLong { bytes: None });
        let longest = format!("set k 0 0 {DATA_BYTES_MAX}\r\n");
        assert!(matches!(look(&longest, MAX), Look::TooLong { bytes: Some(_) }));
        for wrong in [
            "set k 0 0 2147483646\r\n",
            "set k 0 0 -1\r\n",
            "set k 0 0\r\n",
            "set k 0 0 1 x\r\n",
            "ms k\r\n",
            "set k 0 0 1\r\nab",
            "foo k 1\r\n",
            "\r\n",
            "GET a\r\n",
            "ms k x\r\n",
            "set k 0 0 +1\r\n",
        ] {
            assert_eq!(look(wrong, MAX), Look::Malformed, "{wrong:?}");
        }
    }

    #[test]
    fn what_was_looked_through_is_not_looked_through_again() {
        let mut scan = Scan::default();
        let bytes = b"VALUE a 0 2\r\nab\r\nVALUE b 0 5\r\nab";
        assert_eq!(scan.next_reply(Some(Expect::Values), bytes, MAX), ReplyLook::Incomplete);
        assert_eq!((scan.at, scan.data_end), (17, Some(35)));
        let mut scan = Scan::default();
        assert_eq!(scan.next_request(b"set k 0 0 9\r\nab", MAX), Look::Incomplete);
        assert_eq!(scan.data_end, Some(22));
        let mut scan = Scan::default();
        assert_eq!(scan.next_request(b"get abc", MAX), Look::Incomplete);
        assert_eq!(scan.searched, 7);
    }

    #[test]
    fn requests_have_the_replies_of_their_commands() {
        let one = |kind| Verdict::One(kind);
        let key = "k".repeat(KEY_BYTES_MAX);
        let many = format!("get {}", "key ".repeat(LINE_BYTES_MAX));
        for (body, expected) in [
            ("get a", one(Expect::Values)),
            ("gets a  b ", one(Expect::Values)),
            ("gat -1 a b", one(Expect::Values)),
            ("gats 10 a", one(Expect::Values)),
            (&many, one(Expect::Values)),
            (&format!("get {key}"), one(Expect::Values)),
            ("get noreply", one(Expect::Values)),
            ("stats", one(Expect::Stats)),
            ("stats detail on", one(Expect::Stats)),
            ("set k 0 0 1\r\na\r\n", one(Expect::Plain)),
            ("add k 4294967295 -1 0 noreply\r\n\r\n", Verdict::None),
            ("replace k 0 0 2 noreply\n\r\n\r\n", Verdict::None),
            ("append k 0 0 1\r\na\r\n", one(Expect::Plain)),
            ("prepend k 0 0 1\r\na\r\n", one(Expect::Plain)),
            ("cas k 0 0 1 18446744073709551615\r\na\r\n", one(Expect::Plain)),
            ("cas k 0 0 1 7 noreply\r\na\r\n", Verdict::None),
            ("delete k", one(Expect::Plain)),
            ("delete k 0", one(Expect::Plain)),
            ("delete k noreply\r\n", Verdict::None),
            ("delete k 0 noreply", Verdict::None),
            ("delete noreply", one(Expect::Plain)),
            ("incr k 1", one(Expect::Plain)),
            ("decr k 18446744073709551615 noreply", Verdict::None),
            ("touch k 0", one(Expect::Plain)),
            ("touch k -5 noreply", Verdict::None),
            ("flush_all", one(Expect::Plain)),
            ("flush_all 10", one(Expect::Plain)),
            ("flush_all noreply", Verdict::None),
            ("flush_all 10 noreply", Verdict::None),
            ("verbosity 1", one(Expect::Plain)),
            ("verbosity 1 noreply", Verdict::None),
            ("cache_memlimit 64", one(Expect::Plain)),
            ("version\r\n", one(Expect::Plain)),
            ("slabs automove 1", one(Expect::Plain)),
            ("lru mode flat", one(Expect::Plain)),
            ("lru_crawler crawl all", one(Expect::Plain)),
            ("mg k v t Oq", one(Expect::Meta)),
            ("ms k 2 T0\r\nab\r\n", one(Expect::Meta)),
            ("md q", one(Expect::Meta)),
            ("ma k N0", one(Expect::Meta)),
            ("me k", one(Expect::Meta)),
            ("mn", one(Expect::Meta)),
        ] {
            assert_eq!(classify(body.as_bytes()), expected, "{body:?}");
        }
        for (body, expected) in [
            ("mg k v q", "mg with q"),
            ("md k q", "md with q"),
            ("ma k qx", "ma with q"),
            ("ms k 1 T0 q\r\na\r\n", "ms with q"),
            ("watch fetchers", "watch"),
            ("quit\r\n", "quit"),
            ("shutdown graceful", "shutdown"),
            ("lru_crawler metadump all", "lru_crawler metadump"),
            ("lru_crawler  mgdump all", "lru_crawler mgdump"),
            (" stats  sizes_enable", "stats sizes_enable"),
            ("stats sizes_disable now", "stats sizes_disable"),
        ] {
            let expected = Verdict::Refused { reason: Reason::Stateful, what: expected.into() };
            assert_eq!(classify(body.as_bytes()), expected, "{body:?}");
            let mut out = Vec::new();
            assert_eq!(encode(body.as_bytes(), &mut out), Err(Reason::Stateful));
            assert_eq!(
                (encode_unchecked(body.as_bytes(), &mut out), out.is_empty()),
                (Ok(()), false)
            );
        }
    }

    #[test]
    fn what_memcached_would_refuse_is_refused_before() {
        let key = "k".repeat(KEY_BYTES_MAX + 1);
        let flags = "f ".repeat(META_WORDS_MAX - 1);
        let long = format!("get {}", "key ".repeat(LINE_BYTES_MAX));
        assert_eq!(malformed("foo k 1"), "unknown command foo; a lease can carry it");
        assert_eq!(malformed("GET k"), "unknown command GET; a lease can carry it");
        assert!(malformed(&"x".repeat(99)).len() < 90);
        for body in [
            "",
            " ",
            "\r\n",
            "get",
            "get \r\n",
            "get a\tb",
            "get a\0",
            "get a\rb",
            "version\r",
            "version 1",
            "gat a",
            "gat x a",
            "gat 1",
            "set k 0 0 1",
            "set k 0 0 1\r\n",
            "set k 0 0 1\r\nab\r\n",
            "set k 0 0 1\r\na\n",
            "set k 0 0 1\r\na\r\n\r\n",
            "set k -1 0 1 noreply\r\na\r\n",
            "set k 4294967296 0 1\r\na\r\n",
            "set k 0 2147483648 1\r\na\r\n",
            "set k 0 0 1 nope\r\na\r\n",
            "set k 0 0 1 noreply x\r\na\r\n",
            "set k 0 x 1 noreply\r\na\r\n",
            "cas k 0 0 1\r\na\r\n",
            "cas k 0 0 1 x noreply\r\na\r\n",
            "cas k 0 0 1 noreply\r\na\r\n",
            "incr k",
            "incr k -1 noreply",
            "incr k noreply",
            "incr k 18446744073709551616 noreply",
            "incr k 1 2",
            "touch k noreply",
            "touch k 2147483648 noreply",
            "touch noreply",
            "delete",
            "delete k 1 noreply",
            "delete k 0 0",
            "flush_all x noreply",
            "flush_all 1 2",
            "verbosity noreply",
            "verbosity",
            "cache_memlimit x",
            "slabs automove 1 noreply",
            "lru tune noreply",
            "lru_crawler noreply",
            &format!(" {long}"),
            "mn q",
            "mg",
            "ms k",
            "ms k 1\r\na",
            "get a\r\nget b\r\n",
            "get a\r\nget b",
            "get a\n\n",
            &format!("get a {key}"),
            &format!("set {key} 0 0 1 noreply\r\na\r\n"),
            &format!("mg k {flags}"),
            &format!("md k {}", "f".repeat(LINE_BYTES_MAX)),
        ] {
            malformed(body);
            assert_eq!(encode(body.as_bytes(), &mut Vec::new()), Err(Reason::Malformed));
        }
    }

    #[test]
    fn a_line_gets_its_end() {
        for (body, expected) in [
            ("get a", "get a\r\n"),
            ("get a\n", "get a\n"),
            ("get a\r\n", "get a\r\n"),
            ("set k 0 0 1\r\na\r\n", "set k 0 0 1\r\na\r\n"),
        ] {
            let mut out = b"+".to_vec();
            assert_eq!(encode(body.as_bytes(), &mut out), Ok(()));
            assert_eq!(out, format!("+{expected}").into_bytes());
        }
        let mut out = Vec::new();
        let words = ["incr", "k", "1"].map(|word| word.as_bytes().to_vec());
        let framing = super::super::Framing::Memcached;
        assert_eq!(framing.encode_words(&words, &mut out), Ok(()));
        assert_eq!(out, b"incr k 1\r\n");
        assert_eq!(framing.encode_words(&[b"a\r\nb".to_vec()], &mut out), Err(Reason::Malformed));
    }
}
