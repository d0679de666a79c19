//! The command line: arguments, help and exit codes. No logic of the broker: `serve` starts it,
//! every other command is a user of the client library like any other program.

mod bench;
mod check;
mod child_broker;
mod delivery;
mod demo;
mod exit;
mod fifo;
mod input;
mod link;
#[cfg(test)]
mod man;
mod patient_pipe;
mod peers;
mod pipe;
mod report;
mod request;
mod ring_delivery;
mod send;
mod serve;
mod status;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use poolbroker_proto::address::check_upstream_name;
use poolbroker_proto::runtime_dir::RuntimeDir;

use crate::config::TIMEOUT_MAX;
use exit::{CommandError, Exit, complain};

/// One process that owns the network connections of all local processes.
///
/// Programs, cron jobs and shell scripts hand it messages over pipes, FIFOs and Unix sockets. It
/// sends them over pooled TCP and UDP connections, brings replies back to the process that asked,
/// and shows what it holds.
#[derive(Debug, Parser)]
#[command(name = "poolbroker", version, max_term_width = 100, after_help = after_help(EXAMPLES))]
#[command(arg_required_else_help = true)]
struct Arguments {
    /// Where the broker's sockets and FIFOs are [default: $XDG_RUNTIME_DIR/poolbroker, as root
    /// /run/poolbroker]
    #[arg(long, value_name = "DIR", global = true)]
    runtime_dir: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker demo
  poolbroker serve --upstream metrics=udp-write-only://127.0.0.1:8125
  poolbroker send metrics 'page.views:1|c'
  poolbroker status";

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Send(send::Send),
    Request(request::Request),
    Pipe(pipe::Pipe),
    Status(status::Status),
    Check(check::Check),
    Demo(demo::Demo),
    Bench(bench::Bench),
    #[command(hide = true)]
    BenchLoad(bench::BenchLoad),
    #[command(hide = true)]
    BenchSink(bench::BenchSink),
    #[command(hide = true)]
    BenchBare(bench::BenchBare),
    #[command(hide = true)]
    BenchEcho(bench::BenchEcho),
    #[command(hide = true)]
    BenchSessions(bench::BenchSessions),
    #[command(hide = true)]
    BenchPeer(bench::BenchPeer),
}

/// Runs the command that the arguments name.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return end_of_parsing(&error),
    };
    match arguments.run() {
        Ok(exit) => exit.into(),
        Err(error) => {
            complain(&error.text);
            error.exit.into()
        }
    }
}

impl Arguments {
    fn run(self) -> Result<Exit, CommandError> {
        let dir = || {
            let resolved = RuntimeDir::resolve(self.runtime_dir.as_deref());
            resolved.map_err(|error| CommandError::usage(error.to_string()))
        };
        match self.command {
            Command::Serve(serve) => serve.run(dir()?),
            Command::Send(send) => send.run(&dir()?),
            Command::Request(request) => request.run(&dir()?),
            Command::Pipe(pipe) => pipe.run(&dir()?),
            Command::Status(status) => status.run(&dir()?),
            Command::Check(check) => check.run(),
            Command::Demo(demo) => demo.run(),
            Command::Bench(bench) => bench.run(),
            Command::BenchLoad(load) => load.run(),
            Command::BenchSink(sink) => sink.run(),
            Command::BenchBare(bare) => bare.run(),
            Command::BenchEcho(echo) => echo.run(),
            Command::BenchSessions(sessions) => sessions.run(),
            Command::BenchPeer(peer) => peer.run(),
        }
    }
}

/// Help and version go to standard output; a wrong argument is told like every other error.
fn end_of_parsing(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        let text = error.render().to_string();
        complain(text.strip_prefix("error: ").unwrap_or(&text).trim_end());
        return Exit::Usage.into();
    }
    // A reader that has left is no error.
    let _ = error.print();
    Exit::Done.into()
}

/// The end of a help text: examples, then the exit codes.
fn after_help(examples: &str) -> String {
    format!("{examples}\n\n{}", exit::EXIT_CODES)
}

/// Reads the name of an upstream.
fn upstream_name(text: &str) -> Result<String, String> {
    check_upstream_name(text).map(|()| text.to_owned())
}

/// Reads a duration for `--timeout`.
fn timeout(text: &str) -> Result<humantime::Duration, String> {
    let duration = text.parse::<humantime::Duration>();
    let duration = duration.map_err(|_| "expected a duration like 500ms, 30s or 10m".to_owned())?;
    if duration.is_zero() || *duration > TIMEOUT_MAX {
        let most = humantime::Duration::from(TIMEOUT_MAX);
        return Err(format!("expected more than 0s and at most {most}"));
    }
    Ok(duration)
}
