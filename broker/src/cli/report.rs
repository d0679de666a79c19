//! What a broker says about itself: the answer of its admin socket, as `status` and `demo` read
//! it.
//!
//! The names are those of `status --json`, which is append only: unknown ones are passed over,
//! so that a newer broker can be asked by an older command.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use poolbroker_proto::runtime_dir::RuntimeDir;
use serde::Deserialize;

use super::exit::{CommandError, Exit};
use crate::config::STATUS_TIMEOUT;

/// Counters by the name of their reason.
pub type Counts = BTreeMap<String, u64>;

/// The whole answer.
#[derive(Debug, Deserialize)]
pub struct Report {
    pub version: String,
    pub pid: u64,
    pub uptime_s: u64,
    pub runtime_dir: String,
    /// `running` or `draining`.
    #[serde(default)]
    pub state: String,
    pub upstreams: Vec<UpstreamReport>,
    pub listeners: Vec<ListenerReport>,
    pub sessions: Vec<SessionReport>,
}

/// One upstream: `accepted = sent + dropped + expired + queued` and
/// `requests = replied + timed_out + refused + failed + in_flight`.
#[derive(Debug, Deserialize)]
pub struct UpstreamReport {
    pub name: String,
    pub protocol: String,
    pub addresses: Vec<String>,
    #[serde(default)]
    pub address_health: Vec<AddressReport>,
    #[serde(default)]
    pub names: Vec<NameReport>,
    #[serde(default)]
    pub leases: LeaseReport,
    pub discard: String,
    pub replies_discarded: u64,
    pub breaker: String,
    /// Why the last connect failed, while none has succeeded since.
    pub last_failure: Option<String>,
    pub accepted: u64,
    pub sent: u64,
    pub dropped: Counts,
    pub expired: u64,
    pub queued: u64,
    pub in_doubt: u64,
    pub requests: u64,
    pub replied: u64,
    pub timed_out: u64,
    pub refused: Counts,
    pub failed: Counts,
    pub in_flight: u64,
    pub waiters: u64,
    pub maxwait_ms: u64,
    pub connections: Vec<ConnectionReport>,
    pub connections_opened: u64,
    pub connections_closed: Counts,
}

/// How one address fares.
#[derive(Debug, Deserialize)]
pub struct AddressReport {
    pub address: String,
    pub breaker: String,
    pub outstanding: u64,
    pub connections: u64,
    pub failures: u64,
    pub last_failure: Option<String>,
}

/// How one host name was resolved.
#[derive(Debug, Deserialize)]
pub struct NameReport {
    pub name: String,
    pub lookups: u64,
    pub failures: u64,
    pub lookup_ms: u64,
    pub age_s: u64,
    pub addresses: u64,
    pub error: Option<String>,
}

/// What became of leases: `asked = granted + refused + waiting` and
/// `granted = returned + ended + held`.
#[derive(Debug, Default, Deserialize)]
pub struct LeaseReport {
    pub asked: u64,
    pub granted: u64,
    pub returned: u64,
    pub held: u64,
    pub waiting: u64,
    pub refused: Counts,
    pub ended: Counts,
}

/// One connection.
#[derive(Debug, Deserialize)]
pub struct ConnectionReport {
    pub protocol: String,
    pub role: String,
    pub remote: String,
    pub local: Option<String>,
    pub fd: Option<i64>,
    pub state: String,
    pub age_s: u64,
    pub uses: u64,
    pub messages_out: u64,
    pub bytes_out: u64,
    pub messages_in: u64,
    pub bytes_in: u64,
    pub replies_discarded: u64,
    pub session: Option<u64>,
}

/// One local entrance.
#[derive(Debug, Deserialize)]
pub struct ListenerReport {
    pub kind: String,
    pub path: String,
    pub upstream: Option<String>,
    pub accepted: u64,
    pub refused: Counts,
}

/// One attached process.
#[derive(Debug, Deserialize)]
pub struct SessionReport {
    pub id: u64,
    pub pid: Option<i64>,
    pub uid: u64,
    pub transport: String,
    pub accepted: u64,
    pub refused: Counts,
    pub queued_bytes: u64,
    pub in_flight: u64,
}

impl Report {
    /// Reads the text of an answer.
    pub fn parse(json: &[u8]) -> Result<Self, CommandError> {
        serde_json::from_slice(json).map_err(|error| {
            CommandError::failed(format!(
                "the broker's answer cannot be read ({error}); `status --json` shows it as it is"
            ))
        })
    }
}

/// Asks the broker of that directory; returns its answer as it came.
pub fn fetch(dir: &RuntimeDir) -> Result<Vec<u8>, CommandError> {
    let path = dir.admin_socket();
    let mut socket = UnixStream::connect(&path).map_err(|error| not_connected(&path, &error))?;
    let mut json = Vec::new();
    let mut ask = || {
        socket.set_read_timeout(Some(STATUS_TIMEOUT))?;
        socket.set_write_timeout(Some(STATUS_TIMEOUT))?;
        socket.write_all(b"status\n")?;
        socket.read_to_end(&mut json)
    };
    ask().map_err(|error| {
        let exit = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Exit::TimedOut,
            _ => Exit::Failed,
        };
        let text = format!("the broker on {} does not answer: {error}", path.display());
        CommandError { exit, text }
    })?;
    Ok(json)
}

fn not_connected(path: &Path, error: &io::Error) -> CommandError {
    let (shown, dir) = (path.display(), path.parent().unwrap_or(path).display());
    let (exit, text) = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => (
            Exit::NoBroker,
            format!(
                "no broker listens on {shown}; start one with \
                 `poolbroker serve --runtime-dir {dir}`"
            ),
        ),
        io::ErrorKind::PermissionDenied => (
            Exit::Failed,
            format!("this user may not ask {shown}; only the broker's own user and root may"),
        ),
        _ => (Exit::Failed, format!("{shown} cannot be reached: {error}")),
    };
    CommandError { exit, text }
}
