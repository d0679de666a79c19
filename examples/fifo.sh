#!/bin/sh
# A message from the shell, without a client library: every upstream has a FIFO, and each line
# written to it is one message.
#
#     examples/fifo.sh
#
# Needs nothing but poolbroker in PATH (or its path in $POOLBROKER). Nothing has to listen on the
# port: a udp-write-only upstream expects no answer, so the datagram counts as sent.
set -eu

poolbroker=${POOLBROKER:-poolbroker}
dir=$(mktemp -d)
"$poolbroker" serve --runtime-dir "$dir" --upstream metrics=udp-write-only://127.0.0.1:9 &
broker=$!
trap 'kill "$broker" 2>/dev/null || true; wait "$broker" || true; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

wait_for() { # what `status` must say
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        "$poolbroker" status --json --runtime-dir "$dir" 2>/dev/null | grep -Eq "$1" && return
        kill -0 "$broker" 2>/dev/null || exit 1 # it has said why
        sleep 1
    done
    echo "fifo.sh: no $1 in the status of the broker" >&2
    exit 1
}

wait_for '"accepted"'
echo 'jobs.done:1|c' > "$dir/metrics.fifo"
wait_for '"sent": *1'
"$poolbroker" status --runtime-dir "$dir"
