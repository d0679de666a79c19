//! The URL of an upstream: `tcp://10.0.0.1:6379,cache.example:6379?framing=resp`,
//! `udp://10.0.0.1:53?id_offset=0&id_width=2`, `udp-write-only://[::1]:8125`.
//!
//! An upstream has one or several addresses, all of which give the same service. Behind `?` stand,
//! in any order, the framing with its options ([`Framing::parse`]), and where its messages carry
//! the id by which a reply is known ([`IdField`]): `id_offset`, `id_width`, and `reply_id_offset`
//! where it is elsewhere in replies.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::framing::{
    FIELD_OFFSET_MAX, FRAMING_NAMES, Framing, IdField, option, option_owner, parse_number,
    split_options,
};

/// The protocol type of an upstream: which of the three pools serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// One-way sends and requests over TCP connections.
    Tcp,
    /// One-way sends and requests over connected UDP sockets.
    Udp,
    /// One-way sends over UDP sockets that never hold a reply.
    UdpWriteOnly,
}

impl Protocol {
    /// The scheme of its URLs.
    #[must_use]
    pub const fn scheme(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::UdpWriteOnly => "udp-write-only",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.scheme())
    }
}

/// The host of a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A literal address.
    Ip(IpAddr),
    /// A name, to be resolved.
    Name(String),
}

/// One address of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// The host.
    pub host: Host,
    /// The port, never 0.
    pub port: u16,
}

/// Addresses of one upstream at most.
pub const HOSTS_MAX: usize = 64;

/// Where an upstream is and how its messages are framed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamUrl {
    /// Which pool.
    pub protocol: Protocol,
    /// Its addresses: 1 to [`HOSTS_MAX`], no two of them equal.
    pub hosts: Vec<HostPort>,
    /// How TCP messages are delimited; `lines` unless said. For `udp` it frames what a socketpair
    /// hands over; datagrams themselves need no marks.
    pub framing: Framing,
    /// Where messages carry an id, if that is known.
    pub id: Option<IdField>,
}

/// Why a text is not the URL of an upstream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is not the URL of an upstream: {problem}")]
pub struct UrlError {
    /// The text.
    pub url: String,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl FromStr for UpstreamUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        parse(url).map_err(|problem| UrlError { url: url.to_owned(), problem })
    }
}

const EXAMPLE: &str = "for example tcp://127.0.0.1:6379?framing=resp, or with two addresses \
    tcp://10.0.0.1:6379,10.0.0.2:6379?framing=resp";

fn parse(url: &str) -> Result<UpstreamUrl, String> {
    let (scheme, rest) =
        url.split_once("://").ok_or_else(|| format!("it has no scheme; {EXAMPLE}"))?;
    let protocol = match scheme {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "udp-write-only" => Protocol::UdpWriteOnly,
        _ => {
            return Err(format!("unknown scheme {scheme:?}; there are: tcp, udp, udp-write-only"));
        }
    };
    let (authority, query) = match rest.split_once('?') {
        Some((authority, query)) => (authority, Some(query)),
        None => (rest, None),
    };
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    if authority.contains(['/', '@', '#']) {
        return Err("only a host and a port may follow the scheme".into());
    }
    let hosts = parse_hosts(authority)?;
    let (framing, id) = parse_query(query.unwrap_or(""), protocol)?;
    Ok(UpstreamUrl { protocol, hosts, framing, id })
}

fn parse_hosts(authority: &str) -> Result<Vec<HostPort>, String> {
    let mut hosts: Vec<HostPort> = Vec::new();
    for text in authority.split(',') {
        let next = parse_host_port(text)?;
        if hosts.iter().any(|host| host.is_same(&next)) {
            return Err(format!("the address {next} is given twice"));
        }
        hosts.push(next);
        if hosts.len() > HOSTS_MAX {
            return Err(format!("it has more than {HOSTS_MAX} addresses"));
        }
    }
    Ok(hosts)
}

fn parse_host_port(text: &str) -> Result<HostPort, String> {
    if text.is_empty() {
        return Err(format!("an address is missing; {EXAMPLE}"));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => return Err(format!("the port of {text:?} is missing; {EXAMPLE}")),
    };
    let port = parse_number("port", port, 1..=u16::MAX)?;
    Ok(HostPort { host: parse_host(host)?, port })
}

fn parse_host(host: &str) -> Result<Host, String> {
    if let Some(inside) = host.strip_prefix('[') {
        let address = inside.strip_suffix(']').and_then(|text| text.parse::<Ipv6Addr>().ok());
        return address
            .map(|address| Host::Ip(IpAddr::V6(address)))
            .ok_or_else(|| format!("{host:?} is not an IPv6 address in brackets"));
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return match address {
            IpAddr::V4(_) => Ok(Host::Ip(address)),
            IpAddr::V6(_) => Err(format!("an IPv6 address stands in brackets: [{host}]")),
        };
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    // A name of digits and dots that is no address is a mistyped address.
    let mistyped = name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if name.len() > 253 || mistyped || !name.split('.').all(is_label) {
        return Err(format!("{host:?} is neither an address nor a host name"));
    }
    Ok(Host::Name(host.to_owned()))
}

/// The parameters of an id field.
const ID_PARAMETERS: &[&str] = &["id_offset", "id_width", "reply_id_offset"];

fn parse_query(query: &str, protocol: Protocol) -> Result<(Framing, Option<IdField>), String> {
    let (mut name, mut options, mut ids) = (None, Vec::new(), Vec::new());
    for (key, value) in split_options(query)? {
        if key == "framing" {
            if name.replace(value).is_some() {
                return Err("framing is given twice".into());
            }
        } else if ID_PARAMETERS.contains(&key) {
            if option(&ids, key).is_some() {
                return Err(format!("{key} is given twice"));
            }
            ids.push((key, value));
        } else {
            options.push((key, value));
        }
    }
    let framing = match (name, options.first()) {
        (Some(_), _) if protocol == Protocol::UdpWriteOnly => {
            return Err("a write-only datagram is its own message and has no framing".into());
        }
        (Some(name), _) => Framing::parse(name, &options)?,
        (None, Some((key, _))) => return Err(stray_parameter(key)),
        (None, None) => Framing::Lines,
    };
    let id = parse_id(&ids)?;
    if let Some(id) = id {
        check_id(id, framing, protocol)?;
    }
    Ok((framing, id))
}

/// A parameter that belongs to no framing, since none is named.
fn stray_parameter(key: &str) -> String {
    match option_owner(key) {
        Some(owner) => {
            format!("{key} belongs to framing={owner}, and no framing is named: {FRAMING_NAMES}")
        }
        None => format!(
            "unknown parameter {key:?}; there are: framing with its options, {}",
            ID_PARAMETERS.join(", ")
        ),
    }
}

fn parse_id(ids: &[(&str, &str)]) -> Result<Option<IdField>, String> {
    let offset_of = |key| {
        option(ids, key).map(|value| parse_number(key, value, 0..=FIELD_OFFSET_MAX)).transpose()
    };
    let width = option(ids, "id_width").map(|value| parse_number("id_width", value, 1..=8_u8));
    match (offset_of("id_offset")?, width.transpose()?, offset_of("reply_id_offset")?) {
        (Some(offset), Some(width), reply_offset) => {
            let reply_offset = reply_offset.unwrap_or(offset);
            Ok(Some(IdField { offset, reply_offset, width }))
        }
        (None, None, None) => Ok(None),
        (None, _, _) | (_, None, _) => Err("an id field needs its place and its width: for \
             example id_offset=0&id_width=2, and reply_id_offset=24 if it is elsewhere in replies"
            .into()),
    }
}

/// Whether the broker may replace that field in messages of that framing.
fn check_id(id: IdField, framing: Framing, protocol: Protocol) -> Result<(), String> {
    let can_carry_ids = match (protocol, framing) {
        (Protocol::UdpWriteOnly, _) => {
            return Err("no reply of a write-only datagram is read, so an id has no use".into());
        }
        (Protocol::Udp, _) => true,
        (
            Protocol::Tcp,
            Framing::Length(_)
            | Framing::Fixed { .. }
            | Framing::Prefix { .. }
            | Framing::Netstring,
        ) => true,
        (
            Protocol::Tcp,
            Framing::Lines
            | Framing::Crlf
            | Framing::OctetCounted
            | Framing::Resp
            | Framing::Memcached
            | Framing::Http1
            | Framing::Raw,
        ) => false,
    };
    if !can_carry_ids {
        return Err(format!(
            "messages of framing={framing} carry no id at a fixed place; those of u16be, u16le, \
             u32be, u32le, fixed, length and netstring can"
        ));
    }
    let width = u64::from(id.width);
    for (key, offset) in [("id_offset", id.offset), ("reply_id_offset", id.reply_offset)] {
        let (start, end) = (u64::from(offset), u64::from(offset) + width);
        match framing {
            Framing::Fixed { size } if end > u64::from(size) => {
                return Err(format!(
                    "{key} {offset} and id_width {width} reach beyond a message of {size} bytes"
                ));
            }
            Framing::Length(field) if start < field.end() && end > u64::from(field.offset) => {
                return Err(format!(
                    "{key} {offset} and id_width {width} overlap the length in bytes {} to {}",
                    field.offset,
                    field.end() - 1
                ));
            }
            Framing::Fixed { .. }
            | Framing::Length(_)
            | Framing::Lines
            | Framing::Crlf
            | Framing::Prefix { .. }
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Resp
            | Framing::Memcached
            | Framing::Http1
            | Framing::Raw => {}
        }
    }
    Ok(())
}

impl HostPort {
    /// Whether both lead to the same place, as far as their texts show.
    fn is_same(&self, other: &HostPort) -> bool {
        let bare = |name: &str| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let is_same_host = match (&self.host, &other.host) {
            (Host::Ip(one), Host::Ip(other)) => one.to_canonical() == other.to_canonical(),
            (Host::Name(one), Host::Name(other)) => bare(one) == bare(other),
            (Host::Ip(_), Host::Name(_)) | (Host::Name(_), Host::Ip(_)) => false,
        };
        is_same_host && self.port == other.port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(address)) => write!(f, "[{address}]")?,
            Host::Ip(IpAddr::V4(address)) => write!(f, "{address}")?,
            Host::Name(name) => f.write_str(name)?,
        }
        write!(f, ":{}", self.port)
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.protocol)?;
        let mut mark = "//";
        for host in &self.hosts {
            write!(f, "{mark}{host}")?;
            mark = ",";
        }
        mark = "?";
        if self.framing != Framing::Lines {
            write!(f, "{mark}framing={}", self.framing)?;
            mark = "&";
        }
        if let Some(IdField { offset, reply_offset, width }) = self.id {
            write!(f, "{mark}id_offset={offset}&id_width={width}")?;
            if reply_offset != offset {
                write!(f, "&reply_id_offset={reply_offset}")?;
            }
        }
        Ok(())
    }
}

/// Whether `name` can name an upstream: `[a-z0-9][a-z0-9_-]{0,31}`, and neither `broker` nor
/// `admin`, which are the broker's own sockets.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn check_upstream_name(name: &str) -> Result<(), String> {
    let first = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let other = |byte: u8| first(byte) || byte == b'_' || byte == b'-';
    let bytes = name.as_bytes();
    if !bytes.first().is_some_and(|byte| first(*byte)) || !bytes.iter().all(|byte| other(*byte)) {
        return Err(format!(
            "upstream name {name:?}: lower-case letters, digits, _ and - only, \
             beginning with a letter or digit"
        ));
    }
    if bytes.len() > 32 {
        return Err(format!("upstream name {name:?} has {} bytes, at most 32 go", bytes.len()));
    }
    if name == "broker" || name == "admin" {
        return Err(format!("upstream name {name:?} is the broker's own: choose another"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_parse_and_print_back() {
        for url in [
            "tcp://127.0.0.1:6379?framing=crlf",
            "tcp://[::1]:7000?framing=fixed&size=12",
            "udp://ntp.example.org:123",
            "udp-write-only://[fe80::1]:8125",
            "tcp://redis_1:6379",
            "tcp://10.0.0.1:6379,10.0.0.2:6379,cache.example:6379?framing=resp",
            "tcp://[::1]:1,[::1]:2,x:1?framing=length&offset=2&width=2&endian=little",
            "tcp://x:1?framing=length&id_offset=4&id_width=4",
            "tcp://x:1?framing=fixed&size=12&id_offset=8&id_width=4&reply_id_offset=0",
            "tcp://x:53?framing=u16be&id_offset=0&id_width=2",
            "tcp://x:1?framing=netstring&id_offset=65535&id_width=8",
            "udp://x:53?id_offset=0&id_width=2",
            "udp://x:123?id_offset=40&id_width=8&reply_id_offset=24",
            "udp://x:123?framing=raw&id_offset=0&id_width=1",
        ] {
            assert_eq!(url.parse::<UpstreamUrl>().unwrap().to_string(), url);
        }
    }

    #[test]
    fn parameters_stand_in_any_order() {
        let url = "tcp://x:1/?id_width=2&size=4&reply_id_offset=2&framing=fixed&id_offset=0";
        let url = url.parse::<UpstreamUrl>().unwrap();
        assert_eq!(url.hosts, [HostPort { host: Host::Name("x".into()), port: 1 }]);
        assert_eq!(url.framing, Framing::Fixed { size: 4 });
        assert_eq!(url.id, Some(IdField { offset: 0, reply_offset: 2, width: 2 }));
    }

    #[test]
    fn an_upstream_has_up_to_64_addresses() {
        let url = |count: usize| {
            let hosts: Vec<_> = (1..=count).map(|port| format!("10.0.0.1:{port}")).collect();
            format!("tcp://{}", hosts.join(","))
        };
        assert_eq!(url(64).parse::<UpstreamUrl>().unwrap().hosts.len(), 64);
        assert_eq!(url(64).parse::<UpstreamUrl>().unwrap().to_string(), url(64));
        assert!(url(65).parse::<UpstreamUrl>().unwrap_err().problem.contains("more than 64"));
    }

    #[test]
    fn wrong_urls_say_what_is_wrong() {
        for (url, says) in [
            ("127.0.0.1:80", "no scheme"),
            ("http://x:80", "unknown scheme \"http\"; there are: tcp, udp, udp-write-only"),
            ("tcp://127.0.0.1", "port of \"127.0.0.1\" is missing; for example tcp://"),
            ("tcp://[::1]", "port of \"[::1]\" is missing"),
            ("tcp://", "an address is missing"),
            ("tcp://x:1,", "an address is missing"),
            ("tcp://x:1,,y:1", "an address is missing"),
            ("tcp://x,y:1", "port of \"x\" is missing"),
            ("tcp://x:1, y:1", "neither"),
            ("tcp://x:1,y:1,x:1", "the address x:1 is given twice"),
            ("tcp://x.:1,X:1", "the address X:1 is given twice"),
            ("tcp://10.0.0.1:1,[::ffff:10.0.0.1]:1", "is given twice"),
            ("tcp://x:+80", "port \"+80\" is no number from 1 to 65535"),
            ("tcp://x:0", "1 to 65535"),
            ("tcp://x:65536", "1 to 65535"),
            ("tcp://::1:80", "[::1]"),
            ("tcp://:80", "neither an address nor a host name"),
            ("tcp://300.1.1.1:80", "neither"),
            ("tcp://a b:80", "neither"),
            ("tcp://x:80/path", "only a host and a port"),
            ("tcp://x:80?framing=line", "lines, crlf"),
            ("tcp://x:80?frame=lines", "unknown parameter \"frame\""),
            ("tcp://x:80?framing", "\"framing\" has no value"),
            ("tcp://x:80?framing=lines&framing=lines", "framing is given twice"),
            ("tcp://x:80?framing=lines&width=2", "framing=lines has no option \"width\""),
            ("tcp://x:80?framing=fixed", "for example framing=fixed&size=12"),
            ("tcp://x:80?size=3", "size belongs to framing=fixed, and no framing is named"),
            ("tcp://x:80?id_offset=0", "for example id_offset=0&id_width=2"),
            ("tcp://x:80?id_width=2", "for example id_offset=0&id_width=2"),
            ("tcp://x:80?reply_id_offset=2", "for example id_offset=0&id_width=2"),
            ("udp://x:1?id_width=2&reply_id_offset=2", "for example id_offset=0&id_width=2"),
            ("udp://x:1?id_offset=0&id_width=9", "id_width \"9\" is no number from 1 to 8"),
            ("udp://x:1?id_offset=0&id_width=0", "id_width \"0\" is no number from 1 to 8"),
            ("udp://x:1?id_offset=65536&id_width=1", "is no number from 0 to 65535"),
            ("udp://x:1?id_offset=0&id_width=1&id_width=1", "id_width is given twice"),
            (
                "tcp://x:1?framing=fixed&size=4&id_offset=3&id_width=2",
                "beyond a message of 4 bytes",
            ),
            (
                "tcp://x:1?framing=fixed&size=4&id_offset=0&id_width=2&reply_id_offset=3",
                "reply_id_offset 3 and id_width 2 reach beyond a message of 4 bytes",
            ),
            (
                "tcp://x:1?framing=length&offset=2&id_offset=5&id_width=2",
                "id_offset 5 and id_width 2 overlap the length in bytes 2 to 5",
            ),
            ("tcp://x:1?framing=length&offset=2&id_offset=0&id_width=3", "overlap the length"),
            ("udp-write-only://x:80?framing=lines", "no framing"),
            ("udp-write-only://x:80?id_offset=0&id_width=2", "an id has no use"),
            ("udp-write-only://x:80?size=2", "size belongs to framing=fixed"),
        ] {
            let problem = url.parse::<UpstreamUrl>().unwrap_err().to_string();
            assert!(problem.contains(says), "{url}: {problem}");
        }
    }

    #[test]
    fn ids_go_with_framings_that_keep_their_place() {
        let url = |framing| format!("tcp://x:1?framing={framing}&id_offset=20&id_width=2");
        for framing in ["u16be", "u16le", "u32be", "u32le", "fixed&size=22", "length", "netstring"]
        {
            assert!(url(framing).parse::<UpstreamUrl>().is_ok(), "{framing}");
        }
        for framing in ["lines", "crlf", "octet-counted", "resp", "memcached", "http1", "raw"] {
            let problem = url(framing).parse::<UpstreamUrl>().unwrap_err().problem;
            assert!(problem.contains(&format!("framing={framing} carry no id")), "{problem}");
            assert!(problem.contains("u32le, fixed, length and netstring can"), "{problem}");
            assert!(url(framing).replace("tcp", "udp").parse::<UpstreamUrl>().is_ok(), "{framing}");
        }
    }

    #[test]
    fn names_are_checked() {
        for name in ["metrics", "a", "0-x_y", &"x".repeat(32)] {
            assert_eq!(check_upstream_name(name), Ok(()));
        }
        for name in ["", "Metrics", "-a", "a/b", "..", "broker", "admin", &"x".repeat(33)] {
            assert!(check_upstream_name(name).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_prints_back(
            address in "(10\\.0\\.0\\.[0-9]|\\[::[0-9a-f]\\]|[a-z]{1,3}\\.?):[1-9]",
            more in "(,[a-z][a-z0-9-]{0,3}:[1-9]){0,3}",
            scheme in "tcp|udp|udp-write-only",
            framing in "(framing=(lines|resp|u16be|length|length&offset=8|fixed&size=[1-9]|raw))?",
            ids in "(&id_offset=[0-9]&id_width=[0-9](&reply_id_offset=[0-9])?)?",
        ) {
            let url = format!("{scheme}://{address}{more}?{framing}{ids}");
            if let Ok(url) = url.parse::<UpstreamUrl>() {
                prop_assert_eq!(url.to_string().parse::<UpstreamUrl>(), Ok(url));
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,60}") {
            let _ = text.parse::<UpstreamUrl>();
            let _ = format!("tcp://{text}").parse::<UpstreamUrl>();
            let _ = check_upstream_name(&text);
        }
    }
}
