#!/usr/bin/env bash
# Runs what touches shared memory under AddressSanitizer: a byte read or written outside of an
# allocation or of a mapping ends the test. The stable compiler has the sanitizer behind
# RUSTC_BOOTSTRAP.
#
#     tests/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Other flags need another build of everything: a directory of its own keeps both. With --target,
# build scripts and procedural macros, which run inside the compiler, are not instrumented.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/sanitize"
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=address"
target="$(uname -m)-unknown-linux-gnu"

run() {
    cargo test --target "$target" "$@"
}

# One line per place where foreign bytes meet memory.
run -p poolbroker-proto --lib ring
cargo build --target "$target" -p poolbroker
POOLBROKER_BIN=$(realpath "$CARGO_TARGET_DIR/$target/debug/poolbroker") \
    run -p poolbroker-tests --test hostile --test hostile_rings --test rings
