# shellcheck shell=bash
# Back to what was there, line by line of the record, the last one first.

undo_all() {
    local file lines i status=0
    file=$(record_file)
    if [[ ! -s $file ]]; then
        step unchanged undo 'nothing is recorded: there is nothing to take back'
        return 0
    fi
    mapfile -t lines <"$file"
    for ((i = ${#lines[@]} - 1; i >= 0; i--)); do
        split_fields "${lines[i]}"
        if ! undo_one "${FIELDS[@]}"; then
            step failed "${FIELDS_SHOWN:-record}" "$WHY" 'setup.sh undo tries it again: it is still recorded'
            status=1
        fi
    done
    return $status
}

undo_one() {
    local kind=$1 object=${2-}
    FIELDS_SHOWN=$object
    case $kind in
    driver) undo_driver "$object" "${3-}" "${4-}" ;;
    pages) undo_pages "$object" "${3-}" ;;
    owner) undo_owner "$object" "${3-}" ;;
    mount) undo_mount "$object" ;;
    dir) undo_dir "$object" ;;
    file) undo_file "$object" ;;
    module) undo_module "$object" ;;
    *)
        WHY="the record has a line that is not understood: $kind $object"
        return 1
        ;;
    esac && forget "$kind" "$object"
}

undone() { ((DRY_RUN)) || step changed "$1" "$2"; }

undo_driver() {
    local address=$1 driver=$2 override=$3 dir
    dir=$(device_dir "$address")
    if [[ ! -d $dir ]]; then
        step note "$address" 'is no longer there'
        return 0
    fi
    if [[ $(driver_of "$address") == "$driver" && $(override_of "$address") == "$override" ]]; then
        step unchanged "$address" "is with ${driver:-no driver}, as before"
        return 0
    fi
    move_drive "$address" "$driver" "$override" || return 1
    undone "$address" "given back to ${driver:-no driver}"
}

undo_pages() {
    local kilobytes=${1%kB} entry entries node file value left
    IFS=, read -r -a entries <<<"$2"
    for entry in "${entries[@]}"; do
        node=${entry%%=*} value=${entry#*=}
        [[ $node == all ]] && node=''
        file=$(pages_dir "$kilobytes" "${node#node}")/nr_hugepages
        [[ $(first_line "$file") == "$value" ]] && continue
        write_attribute pages "$1" "$file" "$value" || return 1
        ((DRY_RUN)) && continue
        left=$(cat -- "$file")
        if [[ $left != "$value" ]]; then
            WHY="$left hugepages are left instead of $value: the others are in use (stop the guests and the target)"
            return 1
        fi
    done
    undone "hugepages of $(size_for_people "$kilobytes")" "as before: $2"
}

undo_owner() {
    local file=$1 owner=$2
    # It went with the driver, or belongs to somebody again.
    [[ -e $file && $(stat -L -c %u -- "$file") != "$owner" ]] || return 0
    run_change owner "$file" chown -- "$owner" "$file" || return 1
    undone "$file" "belongs to user $owner again"
}

undo_mount() {
    local place=$1
    is_mounted "${place#"$ROOT"}" || return 0
    run_change mount "$place" umount -- "$place" || return 1
    undone "$place" 'unmounted'
}

undo_dir() {
    local path=$1 rest
    [[ -d $path ]] || return 0
    rest=("$path"/* "$path"/.[!.]*)
    if ((${#rest[@]} && !DRY_RUN)); then
        step note "$path" 'is left, since others have put something in'
        return 0
    fi
    run_change dir "$path" rmdir -- "$path"
}

undo_file() {
    local file=$1
    if [[ -e $file ]]; then run_change file "$file" rm -f -- "$file" || return 1; fi
    run_change file "$file" systemctl daemon-reload || return 1
    undone "$file" 'removed'
}

# Unloading a driver would take it from all of its devices.
undo_module() {
    local name=$1 dir=$SYS/module/${1//-/_} devices=()
    [[ -d $dir ]] || return 0
    [[ $name != vfio-pci ]] || devices=("$SYS"/bus/pci/drivers/vfio-pci/*:*)
    if ((${#devices[@]} && !DRY_RUN)) || [[ $(first_line "$dir/refcnt") =~ ^[1-9] ]]; then
        if grep -q '^driver' "$(record_file)"; then
            WHY='it is still in use by a drive that could not be given back'
            return 1
        fi
        step note "$name" 'stays loaded, since it is in use'
        return 0
    fi
    run_change module "$name" modprobe -r -- "$name" || return 1
    undone "$name" 'unloaded'
}
