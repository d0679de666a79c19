//! `poolbroker check`: reads a configuration and prints the limits in force.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use ipnet::IpNet;

use super::after_help;
use super::exit::{CommandError, Exit, complain, print};
use super::table::{Table, stdout_takes_colour};
use crate::balance::Policy;
use crate::config::{
    BrokerLimits, Coalesce, Config, Dynamic, LimitRow, UpstreamConfig, UpstreamLimits,
};

/// Check a configuration file and print the limits in force.
///
/// Nothing is started, and no host name or group is looked up. Settings that have no effect are told
/// on standard error.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Check {
    /// The configuration file, as for `serve --config`
    file: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker check /etc/poolbroker.toml
  poolbroker check new.toml && mv new.toml /etc/poolbroker.toml";

impl Check {
    /// Prints the limits, or says what is wrong with the file.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let config = Config::load(&self.file);
        let config = config.map_err(|error| CommandError::usage(error.to_string()))?;
        for idle in &config.idle_settings {
            complain(&format!("warning: {idle}"));
        }
        print(describe(&config, stdout_takes_colour()).as_bytes())?;
        Ok(Exit::Done)
    }
}

fn describe(config: &Config, colour: bool) -> String {
    let mut text = String::new();
    for upstream in &config.upstreams {
        section(&mut text, &upstream_title(upstream));
        let values = upstream.limits.values();
        text.push_str(&limits(UpstreamLimits::TABLE, &values).render(colour));
        if let Some(coalesce) = &upstream.coalesce {
            let separator = coalesce.separator.bytes().escape_ascii();
            let title = format!("[upstream.{}.coalesce] separator \"{separator}\"", upstream.name);
            section(&mut text, &title);
            text.push_str(&limits(Coalesce::TABLE, &coalesce.values()).render(colour));
        }
    }
    let networks = match config.dynamic.allow.is_empty() {
        true => "none".into(),
        false => list(&config.dynamic.allow),
    };
    section(&mut text, &format!("[dynamic] networks: {networks}"));
    text.push_str(&limits(Dynamic::TABLE, &config.dynamic.values()).render(colour));
    let access = access(config.socket.mode, config.socket.group.as_deref());
    section(&mut text, &format!("[limits] client socket: {access}"));
    text.push_str(&limits(BrokerLimits::TABLE, &config.broker.values()).render(colour));
    text
}

fn section(text: &mut String, title: &str) {
    let gap = if text.is_empty() { "" } else { "\n" };
    writeln!(text, "{gap}{title}").expect("a String takes every write");
}

fn upstream_title(upstream: &UpstreamConfig) -> String {
    let fifo = match &upstream.fifo {
        Some(fifo) => format!("fifo {} {}", access(fifo.mode, fifo.group.as_deref()), fifo.framing),
        None => "no fifo".into(),
    };
    let mut title = format!(
        "[upstream.{}] {}, overflow {}, {fifo}",
        upstream.name, upstream.url, upstream.overflow
    );
    // Each only where it is not the default.
    if upstream.is_broadcast {
        title.push_str(", mode broadcast");
    }
    if upstream.balance != Policy::default() {
        write!(title, ", balance {}", upstream.balance).expect("a String takes every write");
    }
    if !upstream.resolve_allow.is_empty() {
        let networks = list(&upstream.resolve_allow);
        write!(title, ", names within {networks}").expect("a String takes every write");
    }
    if upstream.is_idempotent {
        title.push_str(", idempotent");
    }
    if upstream.lends {
        title.push_str(", leases");
    }
    if !upstream.on_connect.is_empty() {
        let steps = upstream.on_connect.len();
        write!(title, ", {steps} on connect").expect("a String takes every write");
    }
    title
}

fn list(networks: &[IpNet]) -> String {
    networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn access(mode: u32, group: Option<&str>) -> String {
    match group {
        Some(group) => format!("0{mode:o} group {group}"),
        None => format!("0{mode:o}"),
    }
}

fn limits(rows: &[LimitRow], values: &[String]) -> Table {
    let mut table = Table::new(&["  LIMIT", "VALUE", "UNIT", "DEFAULT"]);
    for (row, value) in rows.iter().zip(values) {
        let default = (row.default)();
        let default = if default == *value { "" } else { default.as_str() };
        table.push(vec![format!("  {}", row.name), value.clone(), row.unit.into(), default.into()]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_printed_and_changed_ones_with_their_default() {
        let text = "[upstream.cache]\nurl = \"tcp://127.0.0.1:6379\"\nconnections_max = 3\n\
                    [upstream.metrics]\nurl = \"udp://127.0.0.1:8125\"\ncoalesce = {}\n";
        let config = Config::parse(text, "pb.toml").unwrap();
        let shown = describe(&config, false);
        let tables = [UpstreamLimits::TABLE, Coalesce::TABLE, BrokerLimits::TABLE, Dynamic::TABLE];
        for rows in tables {
            for row in rows {
                assert!(shown.contains(row.name), "{}: {shown}", row.name);
            }
        }
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines: Vec<_> = shown.lines().map(words).collect();
        assert!(lines.contains(&"connections_max 3 connections 8".to_owned()), "{shown}");
        assert!(lines.contains(&"waiters_max 1024 requests".to_owned()), "{shown}");
        let coalesce = "[upstream.metrics.coalesce] separator \"\\n\"".to_owned();
        assert!(lines.contains(&coalesce), "{shown}");
        assert_eq!(
            lines[0],
            "[upstream.cache] tcp://127.0.0.1:6379, overflow block, fifo 0600 lines"
        );
    }

    #[test]
    fn what_is_not_the_default_is_named() {
        let text = "[upstream.it]\nurl = \"tcp://a.test:1,b.test:2?framing=resp\"\n\
                    balance = \"hash\"\nresolve_allow = [\"10.0.0.0/8\"]\nidempotent = true\n\
                    lease = true\non_connect = [{ send = \"PING\" }]\nfifo = false\n";
        let config = Config::parse(text, "pb.toml").unwrap();
        let shown = describe(&config, false);
        let expected = "[upstream.it] tcp://a.test:1,b.test:2?framing=resp, overflow block, no fifo, \
                        balance hash, names within 10.0.0.0/8, idempotent, leases, 1 on connect";
        assert_eq!(shown.lines().next(), Some(expected));
    }
}
