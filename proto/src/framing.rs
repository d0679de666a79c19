//! Framing: how a byte stream marks where one message ends and the next begins.
//!
//! [`Framing::encode`] turns a body into the bytes of one message and refuses a body that the
//! framing could not give back as one (M14: one message never becomes two). [`Framing::classify`]
//! says what reply a request has, if any, and [`ReplyCutter`] finds it. [`Cutter`] finds the
//! messages that clients write. Both are incremental: they are shown the unread bytes, again and
//! longer when more arrive, and name the next message in them. They copy nothing, and remember how
//! far they have searched, so one byte at a time costs no more than all at once.
//!
//! There are two kinds of framings. The plain ones put a mark around any body: a delimiter, a
//! length. The others are protocols whose messages show their own ends (`resp`, `memcached`,
//! `http1`, `length`): there the body is the whole message.
//!
//! A message that is too long is refused once and skipped up to its end; its tail is never taken
//! for a message (CVE-2018-15686 was that mistake).

mod cutter;
mod decimal;
#[cfg(test)]
mod fuzz;
mod http1;
mod length;
mod memcached;
mod reply;
mod resp;
mod scan;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::reason::Reason;

pub use cutter::{Cut, Cutter, Tail};
pub use length::{FIELD_OFFSET_MAX, IdField, LengthField};
pub use reply::{Expect, ReplyCut, ReplyCutter, Verdict};

/// How a byte stream marks the end of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Each message ends with `\n`.
    Lines,
    /// Each message ends with `\r\n`; a body may contain neither byte, since peers differ in what
    /// they take for an end.
    Crlf,
    /// A length in front: that many bytes follow.
    Prefix {
        /// Bytes of the length: 2 or 4.
        width: LengthWidth,
        /// Its byte order.
        order: ByteOrder,
    },
    /// A length inside of the message, which the client writes.
    Length(LengthField),
    /// Every message has the same size.
    Fixed {
        /// Bytes of each message, at least 1.
        size: u32,
    },
    /// `5:hello,` (<https://cr.yp.to/proto/netstrings.txt>).
    Netstring,
    /// `5 hello` (RFC 6587, section 3.4.1: syslog over TCP).
    OctetCounted,
    /// The protocol of Redis, versions 2 and 3.
    Resp,
    /// The text protocol of memcached.
    Memcached,
    /// HTTP/1.0 and 1.1 (RFC 9112), one exchange after the other.
    Http1,
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
pub const FRAMING_NAMES: &str = "lines, crlf, u16be, u16le, u32be, u32le, fixed&size=N, \
    length&offset=N&width=N&endian=big|little&adjust=N, netstring, octet-counted, resp, memcached, \
    http1, raw";

/// The options of `framing=fixed`.
const FIXED_OPTIONS: &[&str] = &["size"];

impl Framing {
    /// The framing of that name, with its options as they stand in a URL: `[("size", "12")]`.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what there is.
    pub fn parse(name: &str, options: &[(&str, &str)]) -> Result<Framing, String> {
        let prefix = |width, order| Framing::Prefix { width, order };
        let framing = match name {
            "fixed" => {
                check_options(name, FIXED_OPTIONS, options)?;
                let size = option(options, "size");
                let size =
                    size.ok_or("framing=fixed needs its size: for example framing=fixed&size=12")?;
                return Ok(Framing::Fixed { size: parse_number("size", size, 1..=u32::MAX)? });
            }
            "length" => return Ok(Framing::Length(LengthField::parse(options)?)),
            "lines" => Framing::Lines,
            "crlf" => Framing::Crlf,
            "u16be" => prefix(LengthWidth::Two, ByteOrder::Big),
            "u16le" => prefix(LengthWidth::Two, ByteOrder::Little),
            "u32be" => prefix(LengthWidth::Four, ByteOrder::Big),
            "u32le" => prefix(LengthWidth::Four, ByteOrder::Little),
            "netstring" => Framing::Netstring,
            "octet-counted" => Framing::OctetCounted,
            "resp" => Framing::Resp,
            "memcached" => Framing::Memcached,
            "http1" => Framing::Http1,
            "raw" => Framing::Raw,
            _ => {
                return Err(format!("unknown framing {name:?}; there are: {FRAMING_NAMES}"));
            }
        };
        check_options(name, &[], options)?;
        Ok(framing)
    }

    /// Appends `body`, which came as a reply, as one message to `out`. Replies of a protocol are whole
    /// as they came, or nothing.
    ///
    /// # Errors
    /// As [`Framing::encode`], where the framing does not know the protocol.
    pub fn encode_reply(self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        match self {
            Framing::Resp | Framing::Memcached | Framing::Http1 => {
                out.extend_from_slice(body);
                Ok(())
            }
            framing => framing.encode(body, out),
        }
    }

    /// Appends `body` as one message to `out`.
    ///
    /// # Errors
    /// [`Reason::Delimiter`], [`Reason::TooLong`], [`Reason::WrongSize`], [`Reason::Empty`] or
    /// [`Reason::Malformed`] when the framing cannot carry this body as one message,
    /// [`Reason::Stateful`] when a shared connection cannot; `out` is then unchanged.
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
            Framing::Prefix { width: LengthWidth::Two, order } => {
                let length = u16::try_from(body.len()).map_err(|_| Reason::TooLong)?;
                out.extend_from_slice(&match order {
                    ByteOrder::Big => length.to_be_bytes(),
                    ByteOrder::Little => length.to_le_bytes(),
                });
                out.extend_from_slice(body);
            }
            Framing::Prefix { width: LengthWidth::Four, order } => {
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
            Framing::Length(field) => field.encode(body, out)?,
            Framing::Netstring => decimal::encode_netstring(body, out)?,
            Framing::OctetCounted => decimal::encode_octet_counted(body, out)?,
            Framing::Resp => resp::encode(body, out)?,
            Framing::Memcached => memcached::encode(body, out)?,
            Framing::Http1 => http1::encode(body, out)?,
            Framing::Raw => out.extend_from_slice(body),
        }
        Ok(())
    }

    /// Appends one message that consists of these words, also one that [`Framing::encode`] refuses
    /// as [`Reason::Stateful`]: for a connection that is not shared yet. `resp` carries words of
    /// any bytes; the others join them with a space.
    ///
    /// # Errors
    /// [`Reason::Empty`] without words; else as [`Framing::encode`].
    pub fn encode_words(self, words: &[Vec<u8>], out: &mut Vec<u8>) -> Result<(), Reason> {
        if words.is_empty() {
            return Err(Reason::Empty);
        }
        match self {
            Framing::Resp => {
                resp::encode_words(words, out);
                Ok(())
            }
            Framing::Memcached => memcached::encode_unchecked(&words.join(&b' '), out),
            Framing::Lines
            | Framing::Crlf
            | Framing::Prefix { .. }
            | Framing::Length(_)
            | Framing::Fixed { .. }
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Http1
            | Framing::Raw => self.encode(&words.join(&b' '), out),
        }
    }

    /// As [`Framing::encode`], for a body that [`Framing::classify`] did not refuse: it is not looked
    /// through again.
    ///
    /// # Errors
    /// As [`Framing::encode`].
    pub fn encode_classified(self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        match self {
            Framing::Resp | Framing::Memcached => resp::append(body, out),
            Framing::Http1 => out.extend_from_slice(body),
            framing => return framing.encode(body, out),
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

    /// Bytes that the framing adds to a body at most.
    #[must_use]
    pub fn overhead_bytes(self) -> usize {
        match self {
            Framing::Lines => 1,
            Framing::Crlf => 2,
            Framing::Prefix { width, .. } => width.bytes(),
            Framing::Netstring | Framing::OctetCounted => decimal::OVERHEAD_BYTES_MAX,
            // A command of one line may lack its end, which is added.
            Framing::Resp | Framing::Memcached => 2,
            Framing::Length(_) | Framing::Fixed { .. } | Framing::Http1 | Framing::Raw => 0,
        }
    }

    /// What reply `body`, one message as [`Framing::encode`] takes it, has on a connection that
    /// others share.
    #[must_use]
    pub fn classify(self, body: &[u8]) -> Verdict {
        match self {
            Framing::Resp => resp::classify(body),
            Framing::Memcached => memcached::classify(body),
            Framing::Http1 => http1::classify(body),
            Framing::Lines
            | Framing::Crlf
            | Framing::Prefix { .. }
            | Framing::Length(_)
            | Framing::Fixed { .. }
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Raw => Verdict::One(Expect::Plain),
        }
    }
}

impl fmt::Display for Framing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Framing::Lines => "lines",
            Framing::Crlf => "crlf",
            Framing::Prefix { width: LengthWidth::Two, order: ByteOrder::Big } => "u16be",
            Framing::Prefix { width: LengthWidth::Two, order: ByteOrder::Little } => "u16le",
            Framing::Prefix { width: LengthWidth::Four, order: ByteOrder::Big } => "u32be",
            Framing::Prefix { width: LengthWidth::Four, order: ByteOrder::Little } => "u32le",
            Framing::Fixed { size } => return write!(f, "fixed&size={size}"),
            Framing::Length(field) => return write!(f, "length{field}"),
            Framing::Netstring => "netstring",
            Framing::OctetCounted => "octet-counted",
            Framing::Resp => "resp",
            Framing::Memcached => "memcached",
            Framing::Http1 => "http1",
            Framing::Raw => "raw",
        })
    }
}

/// Reads what stands behind `framing=`: `lines`, `fixed&size=12`.
impl FromStr for Framing {
    type Err = String;

    fn from_str(text: &str) -> Result<Framing, String> {
        let (name, rest) = text.split_once('&').unwrap_or((text, ""));
        Framing::parse(name, &split_options(rest)?)
    }
}

/// The keys and values of `offset=2&width=2`.
pub(crate) fn split_options(text: &str) -> Result<Vec<(&str, &str)>, String> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            pair.split_once('=')
                .ok_or_else(|| format!("{pair:?} has no value: for example size=12"))
        })
        .collect()
}

/// The value of that option.
pub(crate) fn option<'a>(options: &[(&str, &'a str)], key: &str) -> Option<&'a str> {
    options.iter().find(|option| option.0 == key).map(|option| option.1)
}

/// Whether each of `options` is one of those `known` of that framing, and stands there once.
fn check_options(name: &str, known: &[&str], options: &[(&str, &str)]) -> Result<(), String> {
    let mut options = options.iter();
    while let Some((key, _)) = options.next() {
        if !known.contains(key) {
            let there_are = match known {
                [] => "it takes no options".to_owned(),
                known => format!("it takes: {}", known.join(", ")),
            };
            let belongs = match option_owner(key) {
                Some(owner) => format!("; {key} belongs to framing={owner}"),
                None => String::new(),
            };
            return Err(format!("framing={name} has no option {key:?}, {there_are}{belongs}"));
        }
        if options.as_slice().iter().any(|other| other.0 == *key) {
            return Err(format!("{key} is given twice"));
        }
    }
    Ok(())
}

/// The framing that has this option, if there is one.
pub(crate) fn option_owner(key: &str) -> Option<&'static str> {
    if FIXED_OPTIONS.contains(&key) {
        Some("fixed")
    } else if LengthField::OPTIONS.contains(&key) {
        Some("length")
    } else {
        None
    }
}

/// The number that stands behind `key=`.
pub(crate) fn parse_number<T: FromStr + PartialOrd + fmt::Display>(
    key: &str,
    value: &str,
    range: RangeInclusive<T>,
) -> Result<T, String> {
    let number = if value.starts_with('+') { None } else { value.parse().ok() };
    number.filter(|number| range.contains(number)).ok_or_else(|| {
        format!("{key} {value:?} is no number from {} to {}", range.start(), range.end())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_displayed_is_read_again() {
        for text in [
            "lines",
            "crlf",
            "u16be",
            "u16le",
            "u32be",
            "u32le",
            "fixed&size=12",
            "length",
            "length&offset=2&width=2&endian=little&adjust=6",
            "length&offset=65535&width=8&adjust=-7",
            "netstring",
            "octet-counted",
            "resp",
            "memcached",
            "http1",
            "raw",
        ] {
            let framing = text.parse::<Framing>().unwrap();
            assert_eq!(framing.to_string(), text);
            let name = text.split('&').next().unwrap();
            assert!(FRAMING_NAMES.contains(name), "{name}");
        }
        let spelled_out = "length&adjust=4&endian=big&width=4&offset=0".parse::<Framing>();
        assert_eq!(spelled_out, "length".parse());
        let field = LengthField { offset: 2, width: 2, order: ByteOrder::Little, adjust: 4 };
        let text = "length&offset=2&width=2&endian=little&adjust=4";
        assert_eq!(text.parse(), Ok(Framing::Length(field)));
        assert_eq!(Framing::Length(field).to_string(), "length&offset=2&width=2&endian=little");
    }

    #[test]
    fn wrong_framings_teach() {
        for (text, says) in [
            ("line", "unknown framing \"line\"; there are: lines, crlf"),
            ("", "unknown framing \"\""),
            ("fixed", "framing=fixed needs its size: for example framing=fixed&size=12"),
            ("fixed&size", "\"size\" has no value: for example size=12"),
            ("fixed&size=0", "size \"0\" is no number from 1 to 4294967295"),
            ("fixed&size=+1", "is no number"),
            ("fixed&size=4294967296", "is no number"),
            ("fixed&size=1&size=2", "size is given twice"),
            ("fixed&sized=1", "framing=fixed has no option \"sized\", it takes: size"),
            (
                "lines&size=3",
                "framing=lines has no option \"size\", it takes no options; \
                 size belongs to framing=fixed",
            ),
            ("fixed&width=3", "belongs to framing=length"),
            (
                "length&size=3",
                "framing=length has no option \"size\", it takes: offset, width, \
                 endian, adjust; size belongs to framing=fixed",
            ),
            ("length&width=5", "width \"5\" is none of 1, 2, 3, 4, 8"),
            ("length&endian=middle", "neither big nor little"),
            ("length&offset=65536", "offset \"65536\" is no number from 0 to 65535"),
            ("length&adjust=x", "adjust \"x\" is no number"),
            ("length&width=1&adjust=-255", "adjust -255 lets no message"),
        ] {
            let problem = text.parse::<Framing>().unwrap_err();
            assert!(problem.contains(says), "{text}: {problem}");
        }
        assert!("length&width=1&adjust=-254".parse::<Framing>().is_ok());
    }

    #[test]
    fn bodies_take_no_more_than_the_overhead_says() {
        for text in ["lines", "crlf", "u16be", "u32le", "netstring", "octet-counted", "raw"] {
            let framing = text.parse::<Framing>().unwrap();
            let mut out = Vec::new();
            framing.encode(&[b'a'; 12_345], &mut out).unwrap();
            assert!(out.len() - 12_345 <= framing.overhead_bytes(), "{text}");
        }
        // The longest length and both marks of a netstring.
        assert_eq!(Framing::Netstring.overhead_bytes(), "999999999:,".len());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics_and_what_is_read_prints_back(
            text in prop_oneof![
                "(length|fixed)(&(size|offset|width|endian|adjust)=(little|-?[0-9]{0,11})){0,4}",
                "(length|fixed&size=[1-9]|lines)(&(offset|width|adjust)=[1-4]){0,2}",
                ".{0,40}",
            ],
        ) {
            if let Ok(framing) = text.parse::<Framing>() {
                prop_assert_eq!(framing.to_string().parse::<Framing>(), Ok(framing));
            }
        }
    }
}
