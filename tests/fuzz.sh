#!/usr/bin/env bash
# Fuzzes the framings: streams of each one, changed at random, must be cut alike however they arrive
# (proto/src/framing/fuzz.rs). Chance begins where POOLBROKER_FUZZ_SEED says, 1 by default.
#
#     tests/fuzz.sh [SECONDS PER FRAMING, 10 BY DEFAULT] [FRAMING]
set -euo pipefail
cd "$(dirname "$0")/.."

export POOLBROKER_FUZZ_SECONDS="${1:-10}"
cargo test --release -p poolbroker-proto --lib "framing::fuzz::${2:-}" -- --ignored --nocapture
