//! `poolbroker serve`: builds the configuration and runs the broker.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use poolbroker_proto::runtime_dir::RuntimeDir;
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};

use super::after_help;
use super::exit::{CommandError, Exit, complain, messages};
use super::table::{stderr_takes_colour, wrap};
use crate::config::{Config, LIMIT_SECTIONS, LOG_LINES_MAX};
use crate::control::{self, Ending, Signals};

/// Run the broker in the foreground until SIGTERM, SIGINT or SIGHUP; there is no reload.
///
/// At the signal it takes no new sessions, reads what its FIFOs, pipes and sockets still hold,
/// sends everything and ends; a second signal, not right behind the first, ends it at once.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES), after_long_help = after_long_help())]
pub struct Serve {
    /// The configuration file; see poolbroker.toml(5)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// An upstream with default limits, beside those of the file; may be repeated
    #[arg(long, value_name = "NAME=URL")]
    upstream: Vec<String>,

    /// How much to log to standard error
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = Level::Info)]
    log: Level,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker serve --upstream metrics=udp-write-only://127.0.0.1:8125
  poolbroker serve --upstream cache=tcp://127.0.0.1:6379?framing=resp --log debug
  poolbroker serve --config /etc/poolbroker.toml --runtime-dir /run/poolbroker";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Serve {
    /// Runs the broker to its end.
    pub fn run(self, runtime_dir: RuntimeDir) -> Result<Exit, CommandError> {
        let config = self.configuration()?;
        let started = Signals::block().and_then(|signals| {
            let _log = start_log(self.log);
            config.idle_settings.iter().for_each(|idle| tracing::warn!("{idle}"));
            control::run(config, runtime_dir, signals)
        });
        match started {
            Ok(Ending::Clean) => Ok(Exit::Done),
            Ok(Ending::Undelivered { messages: count }) => {
                complain(&format!("{} could not be sent before the end", messages(count)));
                Ok(Exit::Failed)
            }
            Err(error) => Err(CommandError::failed(error.to_string())),
        }
    }

    fn configuration(&self) -> Result<Config, CommandError> {
        let wrong = |error: crate::config::ConfigError| CommandError::usage(error.to_string());
        let mut config = match &self.config {
            Some(file) => Config::load(file).map_err(wrong)?,
            None => Config::default(),
        };
        for upstream in &self.upstream {
            config.add_upstream(upstream).map_err(wrong)?;
        }
        if config.upstreams.is_empty() && config.dynamic.allow.is_empty() {
            return Err(CommandError::usage(
                "no upstream is configured, so there is nothing to serve; add one, for example \
                 --upstream metrics=udp-write-only://127.0.0.1:8125, or name a file with --config",
            ));
        }
        let name = self.config.as_ref().map_or_else(String::new, |file| file.display().to_string());
        config.load_secrets(&name).map_err(wrong)?;
        Ok(config)
    }
}

/// Logs to standard error through a thread of its own: a terminal or pipe that takes nothing
/// costs lines, which are dropped once [`LOG_LINES_MAX`] wait, and never holds up the broker. What
/// waits is written when the guard is dropped.
fn start_log(level: Level) -> WorkerGuard {
    let level = match level {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LOG_LINES_MAX)
        .thread_name("log")
        .finish(std::io::stderr());
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(stderr_takes_colour())
        .with_writer(writer)
        .init();
    guard
}

fn after_long_help() -> String {
    let mut text = format!("{}\n\nLimits, by section of the file:\n", after_help(EXAMPLES));
    for section in LIMIT_SECTIONS {
        writeln!(text, "\n  {}", section.header).expect("a String takes every write");
        for row in section.rows {
            let (assignment, range) = (row.assignment(), row.range_text());
            let reason = wrap(row.reason, 78, 6);
            writeln!(text, "    {assignment}  ({range})\n{reason}")
                .expect("a String takes every write");
        }
    }
    text.truncate(text.trim_end().len());
    text
}
