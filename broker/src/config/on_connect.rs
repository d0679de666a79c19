//! What a fresh connection says before it is used: requests, the replies they must have, and the
//! secrets in them.

use std::fmt;
use std::path::PathBuf;

use poolbroker_proto::address::{Protocol, UpstreamUrl};
use poolbroker_proto::framing::Framing;
use toml::Spanned;
use toml::de::DeValue;

use super::entry::{Entry, expected};
use super::{ConfigError, ON_CONNECT_BYTES_MAX, ON_CONNECT_STEPS_MAX};

/// Where the secret goes.
const PLACE: &str = "{secret}";

/// One request of `on_connect`.
#[derive(Debug, Clone)]
pub struct Greeting {
    /// Its text, with `{secret}` for the secret.
    send: String,
    /// Where the secret is.
    secret: Option<SecretSource>,
    /// What its reply begins with; none: anything but an error (`resp` alone has a word for one).
    pub expect: Option<Vec<u8>>,
}

/// Where a secret is kept.
#[derive(Debug, Clone)]
enum SecretSource {
    Env(String),
    File(PathBuf),
}

/// A request of `on_connect` with its secret in it, which nothing prints.
#[derive(Clone)]
pub struct Spell {
    /// The bytes as they are written.
    pub bytes: Vec<u8>,
    /// As [`Greeting::expect`].
    pub expect: Option<Vec<u8>>,
}

impl fmt::Debug for Spell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spell").field("expect", &self.expect).finish_non_exhaustive()
    }
}

impl Greeting {
    /// Whether a secret goes into it.
    pub fn has_secret(&self) -> bool {
        self.secret.is_some()
    }

    /// The name of its command, where the framing knows commands: all of it that may be logged, as
    /// there are secrets written out.
    pub fn command(&self, framing: Framing) -> &str {
        let has_commands = matches!(framing, Framing::Resp | Framing::Memcached);
        let mut words = self.send.split_whitespace().filter(|_| has_commands);
        words.next().unwrap_or_default()
    }

    /// Reads the secret and writes the request as `framing` has it. What is wrong names where the
    /// secret should be, and never the secret.
    pub fn spell(&self, framing: Framing) -> Result<Spell, String> {
        let secret = self.secret.as_ref().map(SecretSource::read).transpose()?.unwrap_or_default();
        let filled = |text: &str| {
            let mut parts = text.split(PLACE);
            let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
            for part in parts {
                bytes.extend_from_slice(&secret);
                bytes.extend_from_slice(part.as_bytes());
            }
            bytes
        };
        // Cut into words before the secret is put in, which may contain anything.
        let words: Vec<_> = match framing {
            Framing::Resp => self.send.split_whitespace().map(filled).collect(),
            _ => vec![filled(&self.send)],
        };
        let mut bytes = Vec::new();
        framing
            .encode_words(&words, &mut bytes)
            .map_err(|reason| format!("cannot be sent: {reason}"))?;
        if bytes.len() > ON_CONNECT_BYTES_MAX {
            return Err(format!("has {} bytes, at most {ON_CONNECT_BYTES_MAX} go", bytes.len()));
        }
        Ok(Spell { bytes, expect: self.expect.clone() })
    }
}

impl SecretSource {
    fn read(&self) -> Result<Vec<u8>, String> {
        let (mut bytes, name) = match self {
            SecretSource::Env(name) => {
                let value = std::env::var_os(name)
                    .ok_or_else(|| format!("the environment has no variable {name}"))?;
                (std::os::unix::ffi::OsStringExt::into_vec(value), name.clone())
            }
            SecretSource::File(path) => {
                let bytes = std::fs::read(path)
                    .map_err(|cause| format!("{} cannot be read: {cause}", path.display()))?;
                (bytes, path.display().to_string())
            }
        };
        // An editor ends the line.
        if bytes.ends_with(b"\n") {
            bytes.pop();
        }
        if bytes.is_empty() {
            return Err(format!("the secret in {name} is empty"));
        }
        Ok(bytes)
    }
}

/// Reads `on_connect = [{ send = "...", expect = "...", secret = { env = "..." } }, ...]`.
pub(super) fn read(entry: &Entry<'_>, url: &UpstreamUrl) -> Result<Vec<Greeting>, ConfigError> {
    let form = "a list like [{ send = \"AUTH {secret}\", secret = { env = \"PASSWORD\" } }]";
    if url.protocol != Protocol::Tcp {
        return Err(entry.wrong(format!("{} has no connections to greet", url.protocol)));
    }
    if url.framing == Framing::Raw {
        return Err(entry.wrong("framing=raw marks no end of a reply: choose another framing"));
    }
    let value = entry.value.get_ref();
    let list = value.as_array().ok_or_else(|| entry.wrong(expected(form, value)))?;
    if list.len() > ON_CONNECT_STEPS_MAX {
        return Err(entry.wrong(format!("{} requests, at most {ON_CONNECT_STEPS_MAX}", list.len())));
    }
    list.iter().map(|item| read_one(entry, item, url.framing)).collect()
}

fn read_one(
    entry: &Entry<'_>,
    item: &Spanned<DeValue<'_>>,
    framing: Framing,
) -> Result<Greeting, ConfigError> {
    let at = item.span().start;
    let wrong = |problem: String| entry.error_at(at, entry.path(), problem);
    let form = "a table like { send = \"PING\", expect = \"+PONG\" }";
    let table = item.get_ref().as_table();
    let table = table.ok_or_else(|| wrong(expected(form, item.get_ref())))?;
    let mut greeting = Greeting { send: String::new(), secret: None, expect: None };
    for part in entry.source.entries(&entry.path(), table) {
        match part.key {
            "send" => greeting.send = part.text()?.to_owned(),
            "expect" => greeting.expect = Some(part.text()?.as_bytes().to_vec()),
            "secret" => greeting.secret = Some(read_secret(&part)?),
            _ => return Err(part.unknown(&["send", "expect", "secret"])),
        }
    }
    if greeting.send.is_empty() {
        return Err(wrong("send is missing; for example send = \"PING\"".to_owned()));
    }
    if greeting.expect.is_none() && framing != Framing::Resp {
        let problem = "expect is missing: what the reply begins with; \"\" takes any reply";
        return Err(wrong(problem.to_owned()));
    }
    match (greeting.send.contains(PLACE), &greeting.secret) {
        (true, None) => Err(wrong(format!(
            "{PLACE} has no secret; add secret = {{ env = \"NAME\" }} or {{ file = \"PATH\" }}"
        ))),
        (false, Some(_)) => Err(wrong(format!("the secret is not used: send has no {PLACE}"))),
        (true, Some(_)) | (false, None) => Ok(greeting),
    }
}

fn read_secret(entry: &Entry<'_>) -> Result<SecretSource, ConfigError> {
    let form = "a table like { env = \"NAME\" } or { file = \"/path\" }";
    let entries = entry.entries()?;
    let [part] = entries.as_slice() else {
        return Err(entry.wrong(expected(form, entry.value.get_ref())));
    };
    match part.key {
        "env" => Ok(SecretSource::Env(part.text()?.to_owned())),
        "file" => Ok(SecretSource::File(part.text()?.into())),
        _ => Err(part.unknown(&["env", "file"])),
    }
}
