//! `poolbroker status`: what the broker holds, as tables or as JSON.

use std::time::Duration;

use clap::Args;
use poolbroker_proto::runtime_dir::RuntimeDir;

use super::after_help;
use super::exit::{CommandError, Exit, print};
use super::report::{Counts, Report, UpstreamReport, fetch};
use super::table::{Table, stdout_takes_colour};

/// Show upstreams, connections, listeners and sessions.
///
/// Every connection is shown with protocol type, role, addresses and file descriptor. The sums
/// below the upstreams say what became of every message and request.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Status {
    /// Print the broker's answer as it is: stable names, counters since start
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker status
  poolbroker status --json | jq '.upstreams[] | {name, sent, queued}'
  watch -n1 poolbroker status";

impl Status {
    /// Asks the broker and prints its answer.
    pub fn run(&self, dir: &RuntimeDir) -> Result<Exit, CommandError> {
        let mut json = fetch(dir)?;
        if self.json {
            if !json.ends_with(b"\n") {
                json.push(b'\n');
            }
            print(&json)?;
        } else {
            print(describe(&Report::parse(&json)?, stdout_takes_colour()).as_bytes())?;
        }
        Ok(Exit::Done)
    }
}

fn describe(report: &Report, colour: bool) -> String {
    let uptime = humantime::format_duration(Duration::from_secs(report.uptime_s));
    let mut text = format!(
        "poolbroker {}, pid {}, {}, up {uptime}, in {}\n",
        report.version, report.pid, report.state, report.runtime_dir
    );
    let tables = [
        one_way_table(report),
        request_table(report),
        lease_table(report),
        address_table(report),
        name_table(report),
        connection_table(report),
        listener_table(report),
        session_table(report),
    ];
    for table in tables.iter().filter(|table| !table.is_empty()) {
        text.push('\n');
        text.push_str(&table.render(colour));
    }
    text.push('\n');
    text.push_str(&sums(&report.upstreams));
    text
}

fn one_way_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        "UPSTREAM",
        "PROTOCOL",
        "ADDRESSES",
        "BREAKER",
        "ACCEPTED",
        "SENT",
        "DROPPED",
        "EXPIRED",
        "QUEUED",
        "IN DOUBT",
        "DISCARDED",
        "DISCARD BY",
    ]);
    for upstream in &report.upstreams {
        table.push(vec![
            upstream.name.clone(),
            upstream.protocol.clone(),
            upstream.addresses.join(" "),
            breaker(&upstream.breaker, upstream.last_failure.as_deref()),
            upstream.accepted.to_string(),
            upstream.sent.to_string(),
            counts(&upstream.dropped),
            upstream.expired.to_string(),
            upstream.queued.to_string(),
            upstream.in_doubt.to_string(),
            upstream.replies_discarded.to_string(),
            upstream.discard.clone(),
        ]);
    }
    table
}

fn request_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        "UPSTREAM",
        "REQUESTS",
        "REPLIED",
        "TIMED OUT",
        "REFUSED",
        "FAILED",
        "IN FLIGHT",
        "WAITERS",
        "MAXWAIT MS",
        "OPENED",
        "CLOSED",
    ]);
    for upstream in &report.upstreams {
        table.push(vec![
            upstream.name.clone(),
            upstream.requests.to_string(),
            upstream.replied.to_string(),
            upstream.timed_out.to_string(),
            counts(&upstream.refused),
            counts(&upstream.failed),
            upstream.in_flight.to_string(),
            upstream.waiters.to_string(),
            upstream.maxwait_ms.to_string(),
            upstream.connections_opened.to_string(),
            counts(&upstream.connections_closed),
        ]);
    }
    table
}

/// Of upstreams that were asked for leases.
fn lease_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        "UPSTREAM", "LEASES", "GRANTED", "RETURNED", "HELD", "WAITING", "REFUSED", "ENDED",
    ]);
    for upstream in report.upstreams.iter().filter(|upstream| upstream.leases.asked > 0) {
        let leases = &upstream.leases;
        table.push(vec![
            upstream.name.clone(),
            leases.asked.to_string(),
            leases.granted.to_string(),
            leases.returned.to_string(),
            leases.held.to_string(),
            leases.waiting.to_string(),
            counts(&leases.refused),
            counts(&leases.ended),
        ]);
    }
    table
}

/// Of upstreams that have several; what the only one does stands beside the upstream.
fn address_table(report: &Report) -> Table {
    let mut table =
        Table::new(&["UPSTREAM", "ADDRESS", "BREAKER", "FAILURES", "OUTSTANDING", "CONNECTIONS"]);
    for upstream in report.upstreams.iter().filter(|upstream| upstream.address_health.len() > 1) {
        for address in &upstream.address_health {
            table.push(vec![
                upstream.name.clone(),
                address.address.clone(),
                breaker(&address.breaker, address.last_failure.as_deref()),
                address.failures.to_string(),
                address.outstanding.to_string(),
                address.connections.to_string(),
            ]);
        }
    }
    table
}

fn name_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        "UPSTREAM",
        "NAME",
        "ADDRESSES",
        "LOOKUPS",
        "FAILURES",
        "TOOK MS",
        "AGE S",
        "LAST ERROR",
    ]);
    for upstream in &report.upstreams {
        for name in &upstream.names {
            table.push(vec![
                upstream.name.clone(),
                name.name.clone(),
                name.addresses.to_string(),
                name.lookups.to_string(),
                name.failures.to_string(),
                name.lookup_ms.to_string(),
                name.age_s.to_string(),
                name.error.clone().unwrap_or_else(none),
            ]);
        }
    }
    table
}

fn connection_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        "CONNECTION",
        "PROTOCOL",
        "ROLE",
        "REMOTE",
        "LOCAL",
        "FD",
        "STATE",
        "AGE S",
        "USES",
        "OUT",
        "BYTES OUT",
        "IN",
        "BYTES IN",
        "DISCARDED",
        "SESSION",
    ]);
    for upstream in &report.upstreams {
        for connection in &upstream.connections {
            table.push(vec![
                upstream.name.clone(),
                connection.protocol.clone(),
                connection.role.clone(),
                connection.remote.clone(),
                connection.local.clone().unwrap_or_else(none),
                connection.fd.map_or_else(none, |fd| fd.to_string()),
                connection.state.clone(),
                connection.age_s.to_string(),
                connection.uses.to_string(),
                connection.messages_out.to_string(),
                connection.bytes_out.to_string(),
                connection.messages_in.to_string(),
                connection.bytes_in.to_string(),
                connection.replies_discarded.to_string(),
                connection.session.map_or_else(none, |id| id.to_string()),
            ]);
        }
    }
    table
}

fn listener_table(report: &Report) -> Table {
    let mut table = Table::new(&["LISTENER", "UPSTREAM", "ACCEPTED", "REFUSED", "PATH"]);
    for listener in &report.listeners {
        table.push(vec![
            listener.kind.clone(),
            listener.upstream.clone().unwrap_or_else(none),
            listener.accepted.to_string(),
            counts(&listener.refused),
            listener.path.clone(),
        ]);
    }
    table
}

fn session_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        "SESSION",
        "PID",
        "UID",
        "TRANSPORT",
        "ACCEPTED",
        "REFUSED",
        "QUEUED BYTES",
        "IN FLIGHT",
    ]);
    for session in &report.sessions {
        table.push(vec![
            session.id.to_string(),
            session.pid.map_or_else(none, |pid| pid.to_string()),
            session.uid.to_string(),
            session.transport.clone(),
            session.accepted.to_string(),
            counts(&session.refused),
            session.queued_bytes.to_string(),
            session.in_flight.to_string(),
        ]);
    }
    table
}

/// "closed", or "open (connect_refused)".
fn breaker(stands: &str, last_failure: Option<&str>) -> String {
    match last_failure {
        Some(reason) => format!("{stands} ({reason})"),
        None => stands.to_owned(),
    }
}

fn none() -> String {
    "-".into()
}

/// "0", or the total with its reasons: "3 (queue_full 2, too_long 1)".
fn counts(counts: &Counts) -> String {
    let reasons: Vec<_> = counts
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    match reasons.is_empty() {
        true => "0".into(),
        false => format!("{} ({})", total(counts), reasons.join(", ")),
    }
}

fn total(counts: &Counts) -> u64 {
    counts.values().sum()
}

/// What became of every message and request, over all upstreams.
fn sums(upstreams: &[UpstreamReport]) -> String {
    let sum = |count: &dyn Fn(&UpstreamReport) -> u64| upstreams.iter().map(count).sum::<u64>();
    let messages = [
        ("sent", sum(&|upstream| upstream.sent)),
        ("dropped", sum(&|upstream| total(&upstream.dropped))),
        ("expired", sum(&|upstream| upstream.expired)),
        ("queued", sum(&|upstream| upstream.queued)),
    ];
    let requests = [
        ("replied", sum(&|upstream| upstream.replied)),
        ("timed out", sum(&|upstream| upstream.timed_out)),
        ("refused", sum(&|upstream| total(&upstream.refused))),
        ("failed", sum(&|upstream| total(&upstream.failed))),
        ("in flight", sum(&|upstream| upstream.in_flight)),
    ];
    equation("accepted", sum(&|upstream| upstream.accepted), &messages)
        + &equation("requests", sum(&|upstream| upstream.requests), &requests)
}

fn equation(name: &str, whole: u64, parts: &[(&str, u64)]) -> String {
    let equal = whole == parts.iter().map(|(_, count)| count).sum::<u64>();
    let parts: Vec<_> = parts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let sign = if equal { "=" } else { "IS NOT" };
    format!("{whole} {name} {sign} {}\n", parts.join(" + "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"{ "version": "0.1.0", "pid": 7, "uptime_s": 61, "runtime_dir": "/run/pb",
        "state": "running",
        "upstreams": [ { "name": "metrics", "protocol": "udp-write-only",
            "addresses": ["127.0.0.1:8125"],
            "address_health": [
                { "address": "127.0.0.1:8125", "breaker": "closed", "outstanding": 1,
                  "connections": 2, "failures": 0, "last_failure": null },
                { "address": "127.0.0.2:8125", "breaker": "open", "outstanding": 0,
                  "connections": 0, "failures": 3, "last_failure": "connect_refused" } ],
            "names": [ { "name": "metrics.test:8125", "lookups": 5, "failures": 1,
                "lookup_ms": 12, "age_s": 4, "addresses": 2, "error": "it has no address" } ],
            "leases": { "asked": 9, "granted": 7, "returned": 4, "held": 2, "waiting": 1,
                "refused": {"lease_timed_out": 1}, "ended": {"client_gone": 1} },
            "discard": "filter", "replies_discarded": 9,
            "breaker": "open", "last_failure": "no_ports", "accepted": 10, "sent": 6, "dropped": {"too_big": 1},
            "expired": 1, "queued": 2, "in_doubt": 0, "redelivered": 0, "requests": 1,
            "replied": 0, "timed_out": 0, "refused": {"write_only": 1}, "failed": {},
            "in_flight": 0, "waiters": 0, "maxwait_ms": 0,
            "connections": [ { "protocol": "udp-write-only", "role": "one_way",
                "remote": "127.0.0.1:8125", "local": "127.0.0.1:40000", "fd": 12,
                "state": "idle", "age_s": 3, "uses": 6, "messages_out": 6, "bytes_out": 60,
                "messages_in": 0, "bytes_in": 0, "replies_discarded": 9, "session": null } ],
            "connections_opened": 1, "connections_closed": {} } ],
        "listeners": [ { "kind": "fifo", "path": "/run/pb/metrics.fifo", "upstream": "metrics",
            "accepted": 10, "refused": {} } ],
        "sessions": [ { "id": 3, "pid": 99, "uid": 1000, "transport": "unix", "accepted": 0,
            "refused": {}, "queued_bytes": 0, "in_flight": 0 } ],
        "from_a_newer_broker": true }"#;

    fn words(text: &str) -> Vec<String> {
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        text.lines().map(words).collect()
    }

    #[test]
    fn every_table_and_both_sums_are_shown() {
        let shown = words(&describe(&Report::parse(ANSWER.as_bytes()).unwrap(), false));
        for line in [
            "poolbroker 0.1.0, pid 7, running, up 1m 1s, in /run/pb",
            "metrics udp-write-only 127.0.0.1:8125 open (no_ports) 10 6 1 (too_big 1) 1 2 0 9 filter",
            "metrics 1 0 0 1 (write_only 1) 0 0 0 0 1 0",
            "metrics udp-write-only one_way 127.0.0.1:8125 127.0.0.1:40000 12 idle 3 6 6 60 0 0 9 -",
            "metrics 9 7 4 2 1 1 (lease_timed_out 1) 1 (client_gone 1)",
            "metrics 127.0.0.1:8125 closed 0 1 2",
            "metrics 127.0.0.2:8125 open (connect_refused) 3 0 0",
            "metrics metrics.test:8125 2 5 1 12 4 it has no address",
            "fifo metrics 10 0 /run/pb/metrics.fifo",
            "3 99 1000 unix 0 0 0 0",
            "10 accepted = 6 sent + 1 dropped + 1 expired + 2 queued",
            "1 requests = 0 replied + 0 timed out + 1 refused + 0 failed + 0 in flight",
        ] {
            assert!(shown.contains(&line.to_owned()), "{line}\n{shown:#?}");
        }
    }

    #[test]
    fn a_sum_that_does_not_hold_is_called_out() {
        let wrong = ANSWER.replace("\"accepted\": 10, \"sent\"", "\"accepted\": 11, \"sent\"");
        let shown = describe(&Report::parse(wrong.as_bytes()).unwrap(), false);
        assert!(shown.contains("11 accepted IS NOT 6 sent"), "{shown}");
    }

    #[test]
    fn an_answer_that_is_no_report_is_an_error_not_a_panic() {
        for text in ["", "{}", "[1]", "{\"version\": 1}"] {
            assert_eq!(Report::parse(text.as_bytes()).unwrap_err().exit, Exit::Failed);
        }
    }
}
