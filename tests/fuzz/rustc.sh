#!/bin/sh
# Compiles the crates of this workspace for fuzzing (RUSTC_WORKSPACE_WRAPPER of tests/fuzz.sh); others stay as they are.
#
# Coverage and comparisons: LLVM's own instrumentation, which libFuzzer reads. AddressSanitizer: only the option's name is
# unstable, which is what RUSTC_BOOTSTRAP is about; its run-time part is the C compiler's, as Debian's Rust has none. It has to
# be the first library of the program.
export RUSTC_BOOTSTRAP=1
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Zexternal-clangrt -Zpre-link-args=-Wl,--push-state,--no-as-needed,-lasan,--pop-state
