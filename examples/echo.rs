//! The smallest program: one request over a connection that the broker owns.
//!
//! ```text
//! poolbroker serve --runtime-dir /tmp/pb --upstream echo=tcp://127.0.0.1:7
//! cargo run -p poolbroker-examples --example echo -- /tmp/pb
//! ```
//!
//! Arguments: the runtime directory (without one, that of this user) and the name of a TCP or UDP
//! upstream that answers (`echo`). Prints the reply.

#![forbid(unsafe_code)]

use std::time::Duration;

use poolbroker_client::{Client, Error};

fn main() {
    if let Err(error) = echo() {
        eprintln!("echo: {error}");
        std::process::exit(1);
    }
}

fn echo() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let client = match args.next() {
        Some(runtime_dir) => Client::connect_in(runtime_dir)?,
        None => Client::connect()?,
    };
    let upstream = client.upstream(args.next().as_deref().unwrap_or("echo"))?;
    let reply = upstream.request(b"hello", Duration::from_secs(5))?;
    println!("{}", String::from_utf8_lossy(&reply));
    Ok(())
}
