//! `poolbroker bench one-way`, built for it.
//!
//! ```text
//! cargo bench -p poolbroker-tests --bench one_way
//! cargo bench -p poolbroker-tests --bench one_way -- --via ring --json
//! ```

#![forbid(unsafe_code)]

use std::process::{Command, ExitCode};

use poolbroker_tests::binary::poolbroker_binary;

fn main() -> ExitCode {
    // Cargo's own word to a benchmark.
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--bench");
    let status =
        Command::new(poolbroker_binary()).args(["bench", "one-way"]).args(arguments).status();
    let code = status.expect("the broker's executable starts").code();
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}
