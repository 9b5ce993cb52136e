# shellcheck shell=bash
# What a normal user needs besides: device files, and memory that may be locked.
# shellcheck disable=SC2034 # WHY is read by the callers.

SERVICE=vhost-blk.service

known_user() {
    if [[ ! $1 =~ ^[A-Za-z_][A-Za-z0-9_.-]*$ ]] || ! id -u -- "$1" >/dev/null 2>&1; then
        WHY='there is no such user'
        return 1
    fi
    if [[ $(id -u -- "$1") == 0 ]]; then
        WHY='this user is root, who needs no permission: leave --user out'
        return 1
    fi
}

give_drives() {
    local address status=0
    for address in "$@"; do give_drive "$address" || status=1; done
    write_drop_in || status=1
    explain_memlock
    return $status
}

has_device_file() { [[ -n $(device_files_of "$1") ]]; }

give_drive() {
    local address=$1 file
    if ((DRY_RUN)) && ! has_device_file "$address"; then
        step would "$address" "give its file below $DEV/vfio to $USER_NAME"
        return 0
    fi
    if ! await 10 has_device_file "$address"; then
        step failed "$address" "there is neither $DEV/vfio/$(group_of "$address") nor $DEV/iommu with a file of its own in $DEV/vfio/devices" \
            'modprobe vfio_iommu_type1; see dmesg'
        return 1
    fi
    while IFS= read -r file; do
        give_file "$file" || return 1
    done < <(device_files_of "$address")
}

give_file() {
    local file=$1 uid owner
    uid=$(id -u -- "$USER_NAME")
    owner=$(stat -L -c %u -- "$file")
    if [[ $owner == "$uid" ]]; then
        step unchanged "$file" "belongs to $USER_NAME already"
        return 0
    fi
    # Every user of drives needs it, so it is not taken from another one.
    if [[ $file == "$DEV/iommu" && $owner != 0 ]]; then
        step failed "$file" "it belongs to $(stat -L -c %U -- "$file") already" \
            "use one user for all drives, or let both in by a group: chgrp GROUP $file; chmod g+rw $file"
        return 1
    fi
    if remember owner "$file" "$owner" && run_change owner "$file" chown -- "$uid" "$file"; then
        ((DRY_RUN)) || step changed "$file" "belongs to $USER_NAME now (until it is unbound, or a reboot)"
        return 0
    fi
    step failed "$file" "$WHY"
    return 1
}

# What systemd makes of the service's files; nothing if there are none.
service_setting() { systemctl show --property="$1" --value "$SERVICE" 2>/dev/null; }

drop_in() { printf '%s' "$RUN/systemd/system/$SERVICE.d/50-setup-user.conf"; }

# Lets the service run as the user, until the next boot.
write_drop_in() {
    local file text
    [[ -d $RUN/systemd/system ]] || return 0
    file=$(drop_in)
    if [[ $(service_setting User) == "$USER_NAME" && $(service_setting LimitMEMLOCK) == infinity ]]; then
        step unchanged "$SERVICE" "runs as $USER_NAME already"
        return 0
    fi
    printf -v text '# By setup.sh --user; gone after a reboot, or setup.sh undo.\n[Service]\nUser=%s\nLimitMEMLOCK=infinity\n' "$USER_NAME"
    if [[ -e $file && $(<"$file") == "${text%$'\n'}" ]]; then
        step unchanged "$SERVICE" "runs as $USER_NAME already"
        return 0
    fi
    if make_dir "${file%/*}" && remember file "$file" none && write_file file "$file" "$file" "$text" &&
        run_change file "$file" systemctl daemon-reload; then
        ((DRY_RUN)) || step changed "$SERVICE" "will run as $USER_NAME, and may lock memory, when it is started next ($file)"
        return 0
    fi
    step failed "$SERVICE" "$WHY"
    return 1
}

# The memory a login session of a user may lock, in KiB or "unlimited", as far as files tell; nothing if they do not.
session_memlock() {
    local domain type item value rest file best='' specific=0
    for file in "$ETC/security/limits.conf" "$ETC"/security/limits.d/*.conf; do
        [[ -r $file ]] || continue
        while read -r domain type item value rest; do
            [[ $item == memlock && ($type == hard || $type == -) ]] || continue
            if [[ $domain == "$1" ]]; then
                best=$value specific=1
            elif ((!specific)) && { [[ $domain == '*' ]] || in_group "$1" "$domain"; }; then
                best=$value
            fi
        done <"$file"
    done
    case $best in
    -1 | infinity) printf 'unlimited' ;;
    *) printf '%s' "$best" ;;
    esac
}

in_group() { [[ $2 == @* && " $(id -Gn -- "$1") " == *" ${2#@} "* ]]; }

# Whether a limit in KiB lets any guest's memory be locked.
enough_memlock() {
    [[ $1 == unlimited ]] || { [[ $1 =~ ^[0-9]+$ ]] && (($1 >= $(meminfo MemTotal))); }
}

memlock_remedy() {
    printf "echo '%s - memlock unlimited' > /etc/security/limits.d/vhost-blk.conf, and log in anew; or run it as a service (%s)" "$1" "$SERVICE"
}

# A drive locks the memory of all guests; that is no setting of the drive's.
explain_memlock() {
    local limit
    limit=$(session_memlock "$USER_NAME")
    enough_memlock "$limit" && return
    step note "$USER_NAME" "may lock ${limit:-8192} KiB of memory in a login session${limit:+ by limits.conf}, and all memory of all guests has to be locked" \
        "$(memlock_remedy "$USER_NAME")"
}
