//! One process that owns the network connections of all local processes.

mod balance;
mod buffer;
mod cli;
mod closer;
mod coalesce;
mod config;
mod control;
mod credit;
mod ids;
mod inflight;
mod mailbox;
mod outbox;
mod poller;
mod pool;
mod quota;
mod separator;
mod session;
mod shard;
mod snapshot;
mod stats;
mod tagged;
mod timers;
mod transport;
mod upstream;
mod waiting;
mod window;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
