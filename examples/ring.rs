//! Messages through shared memory: a hundred thousand sends without a system call each.
//!
//! ```text
//! poolbroker serve --runtime-dir /tmp/pb --upstream metrics=udp-write-only://127.0.0.1:8125
//! cargo run -p poolbroker-examples --example ring -- /tmp/pb
//! ```
//!
//! Arguments: the runtime directory (without one, that of this user) and the name of an upstream
//! (`metrics`). Prints what became of the messages. Kill the broker meanwhile and start it again:
//! the program waits for the next one, and nothing is lost.

#![forbid(unsafe_code)]

use std::time::Duration;

use poolbroker_client::{Client, Error, Transport};

fn main() {
    if let Err(error) = count_jobs() {
        eprintln!("ring: {error}");
        std::process::exit(1);
    }
}

fn count_jobs() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let client = match args.next() {
        Some(runtime_dir) => Client::connect_in_with(runtime_dir, Transport::RING)?,
        None => Client::connect_with(Transport::RING)?,
    };
    let upstream = client.upstream(args.next().as_deref().unwrap_or("metrics"))?;
    for _ in 0..100_000 {
        upstream.send(b"jobs.done:1|c")?;
    }
    let outcomes = upstream.flush(Duration::from_secs(30))?;
    println!("{} accepted, {} sent", outcomes.accepted, outcomes.sent);
    Ok(())
}
