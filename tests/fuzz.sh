#!/usr/bin/env bash
# Builds and runs the fuzz targets, guided by coverage. See tests/README.md.
#
#   tests/fuzz.sh                            all targets, 25 seconds each
#   tests/fuzz.sh rings --seconds 3600       one of them, for an hour
#   tests/fuzz.sh session --replay FILE…     these inputs, once
#   tests/fuzz.sh rings --seed 7             begins as another run, which has told its seed
set -euo pipefail
cd "$(dirname "$0")/.."

targets=() seconds=25 seed=$(date +%s) replay=
while [ $# -gt 0 ]; do
    case $1 in
    rings | session | completions) targets+=("$1") ;;
    --seconds) seconds=$2 && shift ;;
    --seed) seed=$2 && shift ;;
    --replay) replay=yes && shift && break ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
    shift
done
[ ${#targets[@]} != 0 ] || targets=(rings session completions)

target_dir=${CARGO_TARGET_DIR:-target}
case $target_dir in /*) ;; *) target_dir=$PWD/$target_dir ;; esac

# With debug assertions, as tests are built; all that is not of this workspace is what the tests use.
programs=()
for target in "${targets[@]}"; do programs+=(--bin "fuzz-$target"); done
RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/rustc.sh \
    cargo build --quiet --locked --workspace --features fuzz/libfuzzer "${programs[@]}"

# What a drive in a process that crashes or is stopped leaves behind.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export TMPDIR=$folder

# Descriptors are counted by the target, memory by libFuzzer (it must not grow); what lives as long as the process is no leak.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=0 RUST_BACKTRACE=1
status=0
for target in "${targets[@]}"; do
    program=$target_dir/debug/fuzz-$target
    if [ -n "$replay" ]; then
        "$program" "$@" || status=$?
        continue
    fi
    work=$target_dir/fuzz/$target
    mkdir -p "$work/corpus" "$work/crashes"
    log=$work/log
    printf '[fuzz] %s, %d seconds, seed %d\n' "$target" "$seconds" "$seed"
    # What is new goes to the first folder. A single run may take 10 seconds, on a busy machine, and no more.
    if "$program" -seed="$seed" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=2048 -len_control=20 \
        -print_final_stats=1 -artifact_prefix="$work/crashes/" "$work/corpus" "tests/fuzz/corpus/$target" >"$log" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        covered=$(grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -n 1)
        printf '[fuzz] %s: no crash, no hang in %s runs (%s)\n' "$target" "$runs" "$covered"
    else
        status=1
        tail -n 60 "$log"
        printf '[fuzz] %s FAILED; its input is in %s: repeat it with tests/fuzz.sh %s --replay FILE\n' "$target" \
            "$work/crashes" "$target"
    fi
done
exit "$status"
