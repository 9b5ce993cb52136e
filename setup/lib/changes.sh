# shellcheck shell=bash
# Everything that changes the machine goes through here: nothing is changed in a dry run, and nothing that is not in the record.
#
# The record is a file of lines KIND<tab>OBJECT<tab>what was there before. There is one line for an object, of its state
# before the first change; it is written before that change. /run loses it at a reboot, together with the changes.
# shellcheck disable=SC2034 # WHY is read by the callers.

record_dir() { printf '%s' "$RUN/vhost-blk-setup"; }
record_file() { printf '%s' "$RUN/vhost-blk-setup/record"; }

# Runs a command while no other setup.sh changes anything.
locked() {
    local lock dir
    if ((DRY_RUN)); then
        "$@"
        return
    fi
    if ((EUID != 0)); then
        step refused "$COMMAND" 'only root may change this' 'run it with sudo'
        return 1
    fi
    dir=$(record_dir)
    if ! mkdir -p -- "$dir" || ! exec {lock}>>"$dir/lock"; then
        step failed "$COMMAND" "$dir cannot be written, so nothing could be taken back later: nothing was changed"
        return 1
    fi
    if ! flock -w 60 "$lock"; then
        step failed "$COMMAND" 'another setup.sh is at work' "wait for it (fuser -v $dir/lock shows it)"
        return 1
    fi
    trap 'step failed "$COMMAND" "interrupted; what was done so far is recorded" "setup.sh undo"; finish 130' INT TERM HUP
    "$@"
}

# The line of an object in the record as the array FIELDS: kind, object, what was there.
recorded() {
    local line file
    file=$(record_file)
    FIELDS=()
    [[ -e $file ]] || return 1
    while IFS= read -r line; do
        [[ $line$'\t' == "$1"$'\t'"$2"$'\t'* ]] || continue
        split_fields "$line"
        return 0
    done <"$file"
    return 1
}

# Tabs in a row enclose empty fields, which `read` would swallow.
split_fields() {
    local rest=$1
    FIELDS=()
    while [[ $rest == *$'\t'* ]]; do
        FIELDS+=("${rest%%$'\t'*}")
        rest=${rest#*$'\t'}
    done
    FIELDS+=("$rest")
}

# remember KIND OBJECT PREVIOUS...: notes the state before the first change.
remember() {
    local IFS=$'\t'
    ((DRY_RUN)) && return 0
    recorded "$1" "$2" && return 0
    if [[ $* == *$'\n'* ]] || ! printf '%s\n' "$*" >>"$(record_file)"; then
        WHY="it cannot be recorded in $(record_file), so it was not changed"
        return 1
    fi
}

# forget KIND OBJECT: it is as it was.
forget() {
    local line file
    ((DRY_RUN)) && return 0
    file=$(record_file)
    recorded "$1" "$2" || return 0
    while IFS= read -r line; do
        [[ $line$'\t' == "$1"$'\t'"$2"$'\t'* ]] || printf '%s\n' "$line"
    done <"$file" >"$file.new" && mv -f -- "$file.new" "$file" || return 1
    [[ -s $file ]] || rm -f -- "$file"
}

# Stops a change whose undoing was forgotten by whoever wrote the caller.
must_be_recorded() {
    recorded "$1" "$2" && return 0
    WHY="setup.sh has an error: $1 $2 is not in the record; nothing was changed"
    return 1
}

# write_attribute KIND OBJECT FILE VALUE: the only place that writes to sysfs.
write_attribute() {
    local kind=$1 object=$2 file=$3 value=$4 problem
    if ((DRY_RUN)); then
        step would "$object" "write '$value' to $file"
        return 0
    fi
    must_be_recorded "$kind" "$object" || return 1
    if [[ ! -e $file ]]; then
        WHY="there is no $file"
        return 1
    fi
    if ! problem=$({ printf '%s\n' "$value" >"$file"; } 2>&1); then
        WHY="the kernel refused '$value' for $file: ${problem##*: }"
        return 1
    fi
}

# write_file KIND OBJECT FILE TEXT: an ordinary file of ours.
write_file() {
    local kind=$1 object=$2 file=$3 text=$4
    if ((DRY_RUN)); then
        step would "$object" "write $file"
        return 0
    fi
    must_be_recorded "$kind" "$object" || return 1
    mkdir -p -- "${file%/*}" && printf '%s' "$text" >"$file" && return 0
    WHY="$file cannot be written"
    return 1
}

# run_change KIND OBJECT COMMAND...: any other change.
run_change() {
    local kind=$1 object=$2 problem
    shift 2
    if ((DRY_RUN)); then
        step would "$object" "run $*"
        return 0
    fi
    must_be_recorded "$kind" "$object" || return 1
    problem=$("$@" 2>&1) && return 0
    WHY="'$*' failed: ${problem:-no reason was given}"
    return 1
}

# await SECONDS COMMAND...: whether the command succeeds within that time.
await() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.02
    done
}
