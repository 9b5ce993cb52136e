#!/usr/bin/env bash
# The torture test: a client that knows what it has written keeps a deep queue of reads, writes, flushes, discards and writes
# of zeroes on several rings while the target is killed (SIGKILL, one time in four SIGTERM) and started again, or its drive
# fails. See tests/README.md.
#
#   tests/torture.sh                     50 kills, split rings
#   tests/torture.sh --kills 5000        as many as you like
#   tests/torture.sh --ring packed       the other format
#   tests/torture.sh --fault FAULT       kill; or what befalls the drive: reset (it reports a fatal status), lost (completions
#                                        never come), removal (it is pulled out, and put back), power (it loses its power
#                                        with the target, and what was not flushed); or neighbour: a front-end of another
#                                        disk of the same drive and worker is hostile, another one each time; or namespace:
#                                        another namespace of the drive fails, which our client must not notice
#   tests/torture.sh --seed S            the requests and moments of an earlier run (the processes' own timing differs)
#   tests/torture.sh --json              kills, errors, lost, duplicates, pause_ms_median, pause_ms_worst and more
#   tests/torture.sh --pause-limit MS    the longest pause that is no failure (5000)
#
# VHOST_BLK and NVME_SIM name other builds of the target and the drive. Exit status: 0 nothing went wrong, 1 something did or
# a pause was too long, 2 the test could not be run.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -n "${VHOST_BLK:-}" ] || cargo build --quiet --locked --release --package vhost-blk >&2
cargo build --quiet --locked --package e2e --bin torture --package nvme-sim --bin nvme-sim >&2
exec "${CARGO_TARGET_DIR:-target}/debug/torture" "$@"
