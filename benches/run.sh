#!/bin/sh
# Benchmarks, described in benches/README.md.
#
#   benches/run.sh instructions [--json]   counts instructions per request; needs valgrind
#   benches/run.sh pause [--json]          how long a request waits after its drive has lost it
#   benches/run.sh compare [OPTION...]     this target beside data-plane, without a guest; needs qemu-storage-daemon
set -eu
cd "$(dirname "$0")/.."

usage() {
    echo "usage: benches/run.sh instructions [--json] | pause [--json] | compare [OPTION...]" >&2
    exit 2
}

[ $# -ge 1 ] || usage
what=$1
shift
case $what in
instructions)
    command -v valgrind >/dev/null || {
        echo "benches/run.sh: valgrind is missing; install it: apt-get install valgrind" >&2
        exit 1
    }
    cargo build --release --quiet --package benches --bin instructions
    exec "${CARGO_TARGET_DIR:-target}/release/instructions" "$@"
    ;;
pause)
    cargo build --release --quiet --package benches --bin pause
    exec "${CARGO_TARGET_DIR:-target}/release/pause" "$@"
    ;;
compare)
    cargo build --release --quiet --package vhost-blk --package compare
    exec "${CARGO_TARGET_DIR:-target}/release/compare" --frontend --null "$@"
    ;;
*) usage ;;
esac
