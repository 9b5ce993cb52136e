#!/usr/bin/env bash
# Prepares the machine, builds, and runs every test of the workspace. See tests/README.md.
#
#   tests/run.sh                 everything
#   tests/run.sh files:: packed  only tests whose names contain one of these; each has to be part of some name
#
# The lab's tests run on Debian's kernel and on one with iommufd, which has to be at hand: see tests/README.md. Where it is
# not, half of them are left out, and the summary says so; with LAB_REQUIRE_IOMMUFD=1 that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${E2E_PEER:-vhost-blk} in
vhost-blk) ;;
*)
    echo "E2E_PEER=$E2E_PEER: what that target cannot do would count as passed; unset it, or run cargo test -p e2e --test guest" >&2
    exit 2
    ;;
esac

tests/prepare.sh

target=${CARGO_TARGET_DIR:-target}
retries=$target/e2e-retries.log
log=$target/tests.log
rm -f "$retries"

# The guests use the program as it is shipped; everything else uses the tests' own build.
cargo build --locked --release --package vhost-blk --package blk-perf
export VHOST_BLK="$PWD/$target/release/vhost-blk"
case $target in /*) VHOST_BLK=$target/release/vhost-blk ;; esac

# Where Kernel::iommufd (tests/src/initramfs.rs) looks.
iommufd_kernel() {
    local place
    if [ -n "${LAB_KERNEL_IOMMUFD:-}" ]; then
        echo "$LAB_KERNEL_IOMMUFD"
        return
    fi
    for place in ../shared/lab/bzImage-iommufd "$target/guest/iommufd/bzImage"; do
        if [ -e "$place" ]; then
            realpath "$place"
            return
        fi
    done
}

iommufd=$(iommufd_kernel)
left_out=()
if [ -n "$iommufd" ]; then
    export LAB_KERNEL_IOMMUFD=$iommufd
    # Emulation inside emulation, which takes minutes: once is enough here.
    left_out=(--skip nested::files_survive_a_guest_that_is_cut_off::group_kernel)
else
    left_out=(--skip ::iommufd_kernel)
fi

status=0
cargo test --locked --workspace --no-fail-fast -- "$@" "${left_out[@]}" 2>&1 | tee "$log" || status=$?

# The sum of cargo's closing lines, one per test program.
awk '/^test result:/ { passed += $4; failed += $6; ignored += $8; programs++ }
    END { printf "\n[tests] %d passed, %d failed, %d ignored, in %d programs\n", passed, failed, ignored, programs }' "$log"

# The release of a kernel, from its image (Documentation/arch/x86/boot.rst, kernel_version).
release_of() {
    local at
    at=$(od -An -tu2 -j $((0x20e)) -N 2 "$1")
    dd if="$1" bs=1 skip=$((at + 512)) count=80 status=none | tr '\0' ' ' | cut -d ' ' -f 1
}

# The lab: which kernels, and how many proofs on each.
lab_line() {
    local image=$1 name=$2 what=$3 count
    count=$(grep -cE "^test .*::$name \.\.\. ok" "$log" || true)
    printf '[tests] lab: %s proofs passed on %s, Linux %s\n' "$count" "$what" "$(release_of "$image")"
}
if grep -qE '^test .*::(group|iommufd)_kernel ' "$log"; then
    lab_line "${LAB_KERNEL_GROUP:-$target/guest/lab-stable/vmlinuz}" group_kernel 'the group kernel'
    if [ -n "$iommufd" ]; then
        lab_line "$iommufd" iommufd_kernel 'the iommufd kernel'
        printf '[tests] lab: the proof nested was not run on the group kernel here; tests/lab.sh nested does that\n'
    else
        echo '[tests] lab: NOT RUN on an iommufd kernel, as none is at hand: build one with tests/kernel/build.sh, or name one'
        echo '[tests]      in LAB_KERNEL_IOMMUFD. Nothing was shown about VFIO by iommufd.'
    fi
fi
if [ -z "$iommufd" ] && [ "${LAB_REQUIRE_IOMMUFD:-}" = 1 ]; then
    echo '[tests] LAB_REQUIRE_IOMMUFD=1, and there is no iommufd kernel'
    status=1
fi

# A name with a typing error must not look like success.
for name in "$@"; do
    if ! awk -v name="$name" '/^test .* \.\.\. / && index($2, name) { found = 1 } END { exit !found }' "$log"; then
        echo "[tests] no test has '$name' in its name"
        status=1
    fi
done

skipped=$(grep -E '^test .* \.\.\. ignored' "$log" || true)
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
