#!/usr/bin/env bash
# The lab, for people: virtual machines with NVMe drives and an IOMMU, in which this project runs on a real kernel's VFIO.
#
#   tests/lab.sh vfio     proves everything but the whole path: VFIO, the driver, setup.sh, removal, errors
#   tests/lab.sh nested   proves the whole path: a drive bound, exported, and used by a guest inside the machine
#   tests/lab.sh all      both
#   tests/lab.sh shell    a shell in such a machine, on this machine's files (what is written there stays there)
#
#   --kernel FILE         run on this kernel only; its modules are in the folder modules beside it, or for a vmlinuz-VERSION
#                         in /lib/modules/VERSION, or it has everything built in
#   --json                print the proofs as a JSON array: name, kernel, result ("passed", "failed"), seconds
#
# Without --kernel every proof runs on Debian's kernel (VFIO by groups) and on the one with iommufd, if that is at hand.
# LAB_ACCEL=kvm uses KVM where that is found to work. Exit status: 0 all passed, 1 not all, 2 wrong usage.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '/^#   tests\/lab.sh vfio/,/^# LAB_ACCEL/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

command='' kernel='' json=no
while [ $# != 0 ]; do
    case $1 in
    vfio | nested | all | shell) [ -z "$command" ] || usage && command=$1 ;;
    --kernel) [ $# -ge 2 ] || usage && kernel=$(realpath "$2") && shift ;;
    --json) json=yes ;;
    *) usage ;;
    esac
    shift
done
[ -n "$command" ] || usage
if [ -n "$kernel" ] && [ ! -f "$kernel" ]; then
    echo "[lab] there is no kernel at $kernel" >&2
    exit 2
fi

say() { printf '[lab] %s\n' "$*" >&2; }

tests/prepare.sh >&2
target=${CARGO_TARGET_DIR:-target}
cargo build --quiet --locked --release --package vhost-blk --package blk-perf >&2

# `lab KERNEL` boots a machine: see tests/src/bin/lab.rs.
lab() { cargo run --quiet --locked --package e2e --bin lab -- "$@"; }

if [ "$command" = shell ]; then
    lab shell ${kernel:+"$kernel"}
    exit
fi

# ---- which kernels ----------------------------------------------------------------------------------------------

iommufd=${LAB_KERNEL_IOMMUFD:-}
for place in ../shared/lab/bzImage-iommufd "$target/guest/iommufd/bzImage"; do
    [ -n "$iommufd" ] || [ ! -e "$place" ] || iommufd=$(realpath "$place")
done
if [ -z "$kernel" ]; then
    ways=(group)
    if [ -n "$iommufd" ]; then
        ways+=(iommufd)
        export LAB_KERNEL_IOMMUFD=$iommufd
    else
        say 'NOT RUN on a kernel with iommufd, as none is at hand: tests/kernel/build.sh builds one'
    fi
else
    # A proof knows what to expect of each way, so the kernel is asked first.
    ways=("$(lab way "$kernel")")
    case ${ways[*]} in
    group) export LAB_KERNEL_GROUP=$kernel ;;
    iommufd) export LAB_KERNEL_IOMMUFD=$kernel ;;
    *) say "$kernel has no VFIO" && exit 1 ;;
    esac
fi

# ---- the proofs -------------------------------------------------------------------------------------------------

program=$(cargo test --quiet --locked --package e2e --test lab --no-run --message-format json |
    sed -n 's/.*"kind":\["test"\].*"name":"lab".*"executable":"\([^"]*\)".*/\1/p')
[ -x "$program" ] || { say 'the lab could not be built'; exit 1; }

# One after the other: two cores are enough for one machine, and the times mean something.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
rows=() failed=0 run=0
for way in "${ways[@]}"; do
    while read -r name; do
        case $command:$name in
        vfio:nested::*) continue ;;
        nested:nested::*) ;;
        nested:*) continue ;;
        esac
        began=$(date +%s%N)
        result=passed
        "$program" --exact "$name" </dev/null >"$log" 2>&1 || result=failed
        milliseconds=$((($(date +%s%N) - began) / 1000000))
        seconds=$((milliseconds / 1000)).$(printf '%03d' $((milliseconds % 1000)))
        run=$((run + 1))
        say "$result  ${name%::*}  ($way kernel, $seconds s)"
        if [ "$result" = failed ]; then
            failed=$((failed + 1))
            cat "$log" >&2
        fi
        rows+=("{\"name\":\"${name%::*}\",\"kernel\":\"$way\",\"result\":\"$result\",\"seconds\":$seconds}")
    done < <("$program" --list | sed -n "s/^\(.*::${way}_kernel\): test$/\1/p")
done

if [ "$json" = yes ]; then
    (IFS=, && printf '[%s]\n' "${rows[*]}")
fi
say "$((run - failed)) of $run proofs passed"
[ "$run" != 0 ] && [ "$failed" = 0 ]
