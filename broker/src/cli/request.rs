//! `poolbroker request`: one request, one reply.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;

use clap::Args;
use poolbroker_client::{Client, Deadline, Error, Reason, Retry, Upstream};
use poolbroker_proto::runtime_dir::RuntimeDir;

use super::exit::{CommandError, Exit, print};
use super::{after_help, timeout, upstream_name};
use crate::config::{MESSAGE_BYTES_MAX, REQUEST_TIMEOUT};

/// Send one request and print its reply.
///
/// The reply is printed as it is; a newline is added if it does not end with one.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Request {
    /// The upstream, as configured
    #[arg(value_parser = upstream_name)]
    upstream: String,

    /// The request; - reads it from standard input, where a final newline is left out if the
    /// upstream's framing ends a message with one
    message: OsString,

    /// How long to wait for the reply
    #[arg(long, value_name = "DURATION", value_parser = timeout, default_value_t = REQUEST_TIMEOUT.into())]
    timeout: humantime::Duration,

    /// Print the reply byte for byte: add no newline
    #[arg(short, long)]
    no_newline: bool,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker request cache PING
  poolbroker request cache 'INCR page:1' --timeout 200ms
  poolbroker request -n images logo > logo.png
  printf 'PING' | poolbroker request cache -";

impl Request {
    /// Prints the reply.
    pub fn run(self, dir: &RuntimeDir) -> Result<Exit, CommandError> {
        let body = match self.message.as_encoded_bytes() {
            b"-" => read_body()?,
            _ => self.message.into_vec(),
        };
        let deadline = Deadline::after(*self.timeout);
        let client = Client::connect_in(dir.path())?;
        let mut reply = ask(&client.upstream(&self.upstream)?, &body, deadline)?;
        if !self.no_newline && !reply.ends_with(b"\n") {
            reply.push(b'\n');
        }
        print(&reply)?;
        Ok(Exit::Done)
    }
}

/// Sends `body`. A text framing ends each message with a newline of its own and refuses one that
/// contains it: then, and only then, the newline at the end of `body` is left out.
fn ask(upstream: &Upstream, body: &[u8], deadline: Deadline) -> Result<Vec<u8>, Error> {
    match (upstream.request(body, deadline), without_line_end(body)) {
        (Err(error), Some(line))
            if error.reason() == Some(Reason::Delimiter) && error.retry() == Retry::NotSent =>
        {
            upstream.request(line, deadline)
        }
        (result, _) => result,
    }
}

fn without_line_end(body: &[u8]) -> Option<&[u8]> {
    let line = body.strip_suffix(b"\n")?;
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

fn read_body() -> Result<Vec<u8>, CommandError> {
    let mut body = Vec::new();
    let most = MESSAGE_BYTES_MAX as u64;
    let mut input = io::stdin().lock().take(most + 1);
    let read = input.read_to_end(&mut body);
    read.map_err(|error| CommandError::failed(format!("standard input cannot be read: {error}")))?;
    if body.len() as u64 > most {
        return Err(CommandError::failed(format!(
            "the request on standard input is longer than {most} bytes, the most any upstream takes"
        )));
    }
    Ok(body)
}
