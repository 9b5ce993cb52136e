#!/usr/bin/env bash
# Prepares the machine, builds, and runs every test of the workspace. See tests/README.md.
#
#   tests/run.sh                 everything
#   tests/run.sh guest:: packed  only tests whose names contain one of these
set -euo pipefail
cd "$(dirname "$0")/.."

tests/prepare.sh

target=${CARGO_TARGET_DIR:-target}
retries=$target/e2e-retries.log
log=$target/tests.log
rm -f "$retries"

# The guests use the program as it is shipped; everything else uses the tests' own build.
cargo build --locked --release --package vhost-blk --package blk-perf
export VHOST_BLK="$PWD/$target/release/vhost-blk"
case $target in /*) VHOST_BLK=$target/release/vhost-blk ;; esac

status=0
cargo test --locked --workspace --no-fail-fast -- "$@" 2>&1 | tee "$log" || status=$?

# The sum of cargo's closing lines, one per test program.
awk '/^test result:/ { passed += $4; failed += $6; ignored += $8; programs++ }
    END { printf "\n[tests] %d passed, %d failed, %d ignored, in %d programs\n", passed, failed, ignored, programs }' "$log"

skipped=$(grep -E '^test .* \.\.\. ignored|^SKIP' "$log" || true)
if [ -n "$skipped" ]; then
    printf '[tests] skipped, and why:\n%s\n' "$skipped"
    # There is nothing here that a machine made ready by prepare.sh lacks.
    status=1
fi
if [ -s "$retries" ]; then
    printf '[tests] emulation failed and was tried once more:\n'
    cat "$retries"
fi
exit "$status"
