#!/usr/bin/env bash
# Makes NVMe drives and memory ready for vhost-blk, and takes it back. Every rule of refusal: README.md beside this file.
set -uo pipefail
shopt -s nullglob
export LC_ALL=C

usage() {
    cat <<'END'
usage: setup.sh COMMAND [options]

  status                    the NVMe drives of this machine, hugepages, and what undo would take back
  check                     what is ready and what is missing, line by line, with the command that mends it
  bind BDF[=SERIAL]...      takes these drives from the kernel and gives them to vfio-pci; only those with these serial
                            numbers, where they are given
  unbind BDF...             gives these drives back to the driver they had before, or nvme
  hugepages SIZE [--node N] [--page 2M|1G|...]
                            makes sure that there are hugepages of SIZE (512M, 2G) in all, or on one NUMA node
  undo                      restores what was there before the first change

  --dry-run                 change nothing, say what would be changed
  --json                    machine-readable output
  --force                   bind: also drives with a file system or a partition table; never such that are in use
  --user NAME               let this user work with the drives (bind) and the hugepages; check for this user

Exit status: 0 done, or nothing to do; 1 refused, failed, or (check) something is missing; 2 wrong usage.
END
}

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=lib/output.sh
. "$here/lib/output.sh" || exit 1
# shellcheck source=lib/changes.sh
. "$here/lib/changes.sh" || exit 1
# shellcheck source=lib/drives.sh
. "$here/lib/drives.sh" || exit 1
# shellcheck source=lib/use.sh
. "$here/lib/use.sh" || exit 1
# shellcheck source=lib/binding.sh
. "$here/lib/binding.sh" || exit 1
# shellcheck source=lib/memory.sh
. "$here/lib/memory.sh" || exit 1
# shellcheck source=lib/access.sh
. "$here/lib/access.sh" || exit 1
# shellcheck source=lib/undo.sh
. "$here/lib/undo.sh" || exit 1
# shellcheck source=lib/report.sh
. "$here/lib/report.sh" || exit 1

# Another tree in place of the machine's own, for tests. Device files in it are ordinary files.
ROOT=${SETUP_ROOT-}
SYS=$ROOT/sys PROC=$ROOT/proc DEV=$ROOT/dev RUN=$ROOT/run ETC=$ROOT/etc
DRY_RUN=0 JSON=0 FORCE=0 USER_NAME='' NODE='' PAGE=''
COMMAND='' WORDS=()
# The serial numbers that were given, by address.
declare -A SERIALS=()

wrong_usage() {
    printf 'setup.sh: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

parse() {
    while (($#)); do
        case $1 in
        --dry-run) DRY_RUN=1 ;;
        --json) JSON=1 ;;
        --force) FORCE=1 ;;
        --user | --node | --page)
            [[ -n ${2-} ]] || wrong_usage "$1 needs a value"
            case $1 in
            --user) USER_NAME=$2 ;;
            --node) NODE=$2 ;;
            --page) PAGE=$2 ;;
            esac
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) wrong_usage "there is no option $1" ;;
        *) if [[ -z $COMMAND ]]; then COMMAND=$1; else WORDS+=("$1"); fi ;;
        esac
        shift
    done
}

# The words after bind and unbind, as addresses; each once.
parse_addresses() {
    local word address known=' ' addresses=()
    ((${#WORDS[@]})) || wrong_usage "$COMMAND needs the address of a drive, such as 0000:01:00.0 ('setup.sh status' lists them)"
    for word in "${WORDS[@]}"; do
        address=$(full_address "${word%%=*}") || wrong_usage "'$word' is no PCI address: it looks like 0000:01:00.0 or 01:00.0"
        if [[ $word == *=* ]]; then
            [[ $COMMAND == bind && -n ${word#*=} ]] || wrong_usage "'$word': a serial number is for bind"
            SERIALS[$address]=${word#*=}
        fi
        [[ $known == *" $address "* ]] || addresses+=("$address")
        known+="$address "
    done
    WORDS=("${addresses[@]}")
}

# An option that means nothing here may be a misunderstanding of what is about to happen.
only_for() {
    local option=$1 given=$2
    shift 2
    [[ -z $given || " $* " == *" $COMMAND "* ]] || wrong_usage "$option is for: $*"
}

main() {
    parse "$@"
    # Every list below is read that way: an empty one must not come of a shell that cannot do it.
    if [[ $({ cat < <(printf works); } 2>/dev/null) != works ]]; then
        step refused setup.sh 'bash cannot read from a command here' 'ln -s /proc/self/fd /dev/fd'
        finish 1
    fi
    only_for --node "$NODE" hugepages
    only_for --page "$PAGE" hugepages
    only_for --force "${FORCE#0}" bind
    only_for --user "$USER_NAME" bind hugepages check
    case $COMMAND in
    bind | unbind) parse_addresses ;;
    hugepages) ((${#WORDS[@]} == 1)) || wrong_usage 'hugepages needs one size, such as 2G' ;;
    status | check | undo) ((${#WORDS[@]} == 0)) || wrong_usage "$COMMAND takes no '${WORDS[0]}'" ;;
    '') wrong_usage 'a command is needed' ;;
    *) wrong_usage "there is no command '$COMMAND'" ;;
    esac
    if [[ -n $USER_NAME ]] && ! known_user "$USER_NAME"; then
        step refused "$USER_NAME" "$WHY"
        finish 1
    fi
    case $COMMAND in
    status) report_status ;;
    check) report_check ;;
    bind) locked bind_drives "${WORDS[@]}" ;;
    unbind) locked unbind_drives "${WORDS[@]}" ;;
    hugepages) locked provide_hugepages "${WORDS[0]}" ;;
    undo) locked undo_all ;;
    esac
    finish $?
}

# A closed pipe must not stop it half way.
trap '' PIPE
PATH=$PATH:/usr/sbin:/sbin
main "$@"
