//! The URL of an upstream: `tcp://host:port?framing=lines`, `udp://...`,
//! `udp-write-only://[::1]:8125`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::framing::Framing;

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

/// Where an upstream is and how its messages are framed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamUrl {
    /// Which pool.
    pub protocol: Protocol,
    /// The host.
    pub host: Host,
    /// The port, never 0.
    pub port: u16,
    /// How TCP messages are delimited; `lines` unless said. For `udp` it frames what a socketpair
    /// hands over; datagrams themselves need no marks.
    pub framing: Framing,
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

fn parse(url: &str) -> Result<UpstreamUrl, String> {
    const EXAMPLE: &str = "for example tcp://127.0.0.1:6379?framing=crlf";
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
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => return Err(format!("the port is missing; {EXAMPLE}")),
    };
    let port = port
        .parse::<u16>()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("port {port:?} is not a number from 1 to 65535"))?;
    let framing = parse_query(query.unwrap_or(""), protocol)?;
    Ok(UpstreamUrl { protocol, host: parse_host(host)?, port, framing })
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

fn parse_query(query: &str, protocol: Protocol) -> Result<Framing, String> {
    let (mut framing, mut size) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "framing" => framing = Some(value),
            "size" => {
                let number = value.parse::<u32>();
                size = Some(number.map_err(|_| format!("size {value:?} is not a number"))?);
            }
            _ => {
                return Err(format!("unknown parameter {key:?}; there are: framing, size"));
            }
        }
    }
    match (framing, protocol) {
        (Some(_), Protocol::UdpWriteOnly) => {
            Err("a write-only datagram is its own message and has no framing".into())
        }
        (Some(name), _) => Framing::parse(name, size),
        (None, _) if size.is_some() => Err("size belongs to framing=fixed".into()),
        (None, _) => Ok(Framing::Lines),
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.protocol)?;
        match &self.host {
            Host::Ip(IpAddr::V6(address)) => write!(f, "[{address}]")?,
            Host::Ip(IpAddr::V4(address)) => write!(f, "{address}")?,
            Host::Name(name) => f.write_str(name)?,
        }
        write!(f, ":{}", self.port)?;
        match self.framing {
            Framing::Lines => Ok(()),
            framing => write!(f, "?framing={framing}"),
        }
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
        ] {
            assert_eq!(url.parse::<UpstreamUrl>().unwrap().to_string(), url);
        }
    }

    #[test]
    fn wrong_urls_say_what_is_wrong() {
        for (url, says) in [
            ("127.0.0.1:80", "no scheme"),
            ("http://x:80", "unknown scheme \"http\"; there are: tcp, udp, udp-write-only"),
            ("tcp://127.0.0.1", "port is missing"),
            ("tcp://[::1]", "port is missing"),
            ("tcp://x:0", "1 to 65535"),
            ("tcp://x:65536", "1 to 65535"),
            ("tcp://::1:80", "[::1]"),
            ("tcp://:80", "neither an address nor a host name"),
            ("tcp://300.1.1.1:80", "neither"),
            ("tcp://a b:80", "neither"),
            ("tcp://x:80/path", "only a host and a port"),
            ("tcp://x:80?framing=line", "lines, crlf"),
            ("tcp://x:80?frame=lines", "unknown parameter \"frame\""),
            ("udp-write-only://x:80?framing=lines", "no framing"),
        ] {
            let problem = url.parse::<UpstreamUrl>().unwrap_err().to_string();
            assert!(problem.contains(says), "{url}: {problem}");
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
        fn arbitrary_text_never_panics(text in ".{0,60}") {
            let _ = text.parse::<UpstreamUrl>();
            let _ = format!("tcp://{text}").parse::<UpstreamUrl>();
            let _ = check_upstream_name(&text);
        }
    }
}
