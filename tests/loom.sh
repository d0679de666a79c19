#!/usr/bin/env bash
# Proves the ring: loom runs the models of proto/src/ring/model.rs under every interleaving and
# every order of memory that the language allows, within the bounds they name. Seconds, not minutes.
#
#     tests/loom.sh [NAME OF A MODEL]
set -euo pipefail
cd "$(dirname "$0")/.."

# Other flags need another build of everything: a directory of its own keeps both.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
export RUSTFLAGS="--cfg loom"
cargo test --release -p poolbroker-proto --lib "ring::model::${1:-}"
