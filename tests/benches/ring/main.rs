//! What the ring alone costs beside another ring, in one run. Beside what the kernel offers, between
//! two processes, `poolbroker bench ring` measures it.
//!
//! ```text
//! cargo bench -p poolbroker-tests --bench ring [-- [--json] [--rounds N] [NAME OF A CASE]]
//! ```
//!
//! Messages of 64 bytes go from a thread on processor 0 to one on processor 1, and back where it is a
//! round trip. Both sides poll: the ring beside `rtrb`, whose messages are of a fixed type and which
//! nobody can sleep on.

#![forbid(unsafe_code)]

mod measure;
mod threads;

use serde_json::json;

const MESSAGE_BYTES: usize = 64;

/// Bytes of each ring.
const CAPACITY: usize = 256 * 1024;

/// How many messages that is, with a header of 24 bytes each.
const RING_MESSAGES: usize = CAPACITY / (MESSAGE_BYTES + 24);

/// After how many messages a receiver gives back their room.
const RELEASED_AT_ONCE: usize = 64;

const ROUNDS: usize = 7;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut rounds, mut is_json, mut wanted) = (ROUNDS, false, String::new());
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse().ok()).expect("a number");
        match argument.as_str() {
            "--json" => is_json = true,
            "--rounds" => rounds = number(),
            // Of cargo, to every benchmark.
            "--bench" => {}
            name => wanted = name.to_owned(),
        }
    }
    if !is_json {
        println!("{MESSAGE_BYTES} bytes, {rounds} interleaved rounds, medians (min to max), in ns");
        let (sender, receiver) = ("CPU sends", "receives");
        println!("{:<45} {:<29} {sender:>9} {receiver:>9}   by the first", "case", "each");
    }
    let mut results = Vec::new();
    for case in threads::CASES.iter().filter(|case| case.name.contains(&wanted)) {
        for outcome in case.measure(rounds.max(1)) {
            match is_json {
                true => results.extend(outcome.results()),
                false => println!("{}", outcome.line()),
            }
        }
    }
    if is_json {
        let machine = measure::machine();
        let all =
            json!({ "bench": "ring", "rounds": rounds, "machine": machine, "results": results });
        println!("{all:#}");
    }
}

/// The message of that number.
fn body(number: u64) -> [u8; MESSAGE_BYTES] {
    let mut body = [0x5a; MESSAGE_BYTES];
    body[..8].copy_from_slice(&number.to_ne_bytes());
    body
}
