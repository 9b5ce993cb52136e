# shellcheck shell=bash
# Who uses a drive, and what is on it. Nothing here changes anything. What cannot be found out counts as in use.

# Reasons why a drive must not be taken, filled by find_uses and find_contents.
USES=() CONTENTS=()

# The process that keeps a drive's disks to itself, see hold_disks.
HOLDER='' HOLDER_SAYS=''

# Fills USES with everything that uses a drive which the kernel drives.
find_uses() {
    local address=$1 dir name number
    local -A names=() numbers=() commands=()
    USES=()
    while IFS= read -r dir; do
        name=${dir##*/}
        names[$name]=$dir
        number=$(first_line "$dir/dev")
        [[ -z $number ]] || numbers[$number]=$name
    done < <(blocks_of "$address")
    while IFS= read -r dir; do commands[${dir##*/}]=$(first_line "$dir/dev"); done < <(command_devices_of "$address")

    find_unready_controllers "$address"
    find_mounts
    find_swap
    find_holders
    find_members
    find_exports
    find_open_files
    find_virtual_functions "$address"
}

# A controller that is still starting does not show all of its namespaces yet.
find_unready_controllers() {
    local controller state
    while IFS= read -r controller; do
        state=$(first_line "$controller/state")
        case $state in
        live | dead | '') ;;
        *) USES+=("its controller ${controller##*/} is not ready to be looked at (it is '$state'): try again in a moment") ;;
        esac
    done < <(controllers_of "$1")
}

# The functions below read `names`, `numbers` and `commands` of find_uses.

is_block() { [[ -n $1 && -n ${names[$1]-} ]]; }
is_command_device() { [[ -n $1 && -n ${commands[$1]-} ]]; }

# Every mount of every mount namespace that can be seen, as "number place".
all_mounts() {
    printf '%s\0' "$PROC/self/mountinfo" "$PROC"/[0-9]*/mountinfo | xargs -0 cut -d' ' -f3,5 2>/dev/null | sort -u
}

find_mounts() {
    local number place name
    local -A places=() count=()
    [[ -n $(first_line "$PROC/self/mountinfo") ]] || USES+=("$PROC/self/mountinfo cannot be read, so nobody knows what is mounted")
    while read -r number place; do
        name=${numbers[$number]-}
        [[ -n $name ]] || continue
        count[$name]=$((${count[$name]-0} + 1))
        ((count[$name] > 3)) || places[$name]+=" $place"
        [[ $place == / ]] && places[$name]+=' (the root file system of this machine or of a container)'
    done < <(all_mounts)
    for name in "${!places[@]}"; do
        ((count[$name] <= 3)) || places[$name]+=" and $((count[$name] - 3)) more"
        USES+=("$name is mounted on${places[$name]}")
    done
}

# The name of a device file by whichever path: links are followed.
device_name() {
    local path
    path=$(readlink -f -- "$ROOT$1") || path=$1
    printf '%s' "${path##*/}"
}

find_swap() {
    local path rest name
    if [[ ! -e $PROC/swaps ]]; then return; fi
    while read -r path rest; do
        [[ $path == /* ]] || continue
        name=$(device_name "$path")
        is_block "$name" && USES+=("$name is used as swap (swapoff $path)")
    done <"$PROC/swaps"
}

find_holders() {
    local name holder label
    for name in "${!names[@]}"; do
        for holder in "${names[$name]}"/holders/*; do
            label=$(first_line "$holder/dm/name")
            case ${holder##*/} in
            dm-*) label="device mapper ${holder##*/}${label:+ ($label)}" ;;
            md*) label="RAID ${holder##*/}" ;;
            bcache*) label="cache ${holder##*/}" ;;
            *) label=${holder##*/} ;;
            esac
            USES+=("$name is part of $label")
        done
    done
}

# A mounted btrfs shows one of its devices only, or none by number; loop devices show a path.
find_members() {
    local entry name
    for entry in "$SYS"/fs/btrfs/*/devices/*; do
        name=${entry##*/}
        is_block "$name" && USES+=("$name belongs to a mounted btrfs")
    done
    for entry in "$SYS"/block/loop*/loop/backing_file; do
        name=$(device_name "$(first_line "$entry")")
        entry=${entry%/loop/backing_file}
        is_block "$name" && USES+=("$name is behind the loop device ${entry##*/}")
    done
}

# What the kernel itself serves to other machines (nvmet) is held by no process and claimed by nobody.
find_exports() {
    local entry name
    for entry in "$SYS"/kernel/config/nvmet/subsystems/*/namespaces/*/device_path \
        "$SYS"/kernel/config/nvmet/subsystems/*/passthru/device_path; do
        name=$(device_name "$(first_line "$entry")")
        if is_block "$name" || is_command_device "$name"; then USES+=("$name is exported by the kernel's NVMe target ($entry)"); fi
    done
}

# Open files that may be device files, as "pid/fd/number<tab>path".
open_device_files() {
    (cd "$PROC" && find [0-9]*/fd -maxdepth 1 -type l \( -lname '/dev/*' -o -lname '*nvme*' -o -lname '*/ng*' \) \
        ! -lname /dev/null ! -lname '/dev/pts/*' ! -lname '/dev/tty*' ! -lname /dev/urandom -printf '%p\t%l\n' 2>/dev/null)
    # Processes end while they are looked at (1); that find itself could not run is another matter.
    (($? < 126))
}

# A process as "pid (name)".
process_name() { printf '%s (%s)' "$1" "$(first_line "$PROC/$1/comm")"; }

# Numbers as `stat` tells them: 103:1 for 259:1.
hexadecimal() { [[ $1 == *:* ]] && printf '%x:%x' "${1%:*}" "${1#*:}"; }

find_open_files() {
    local list file path name number kind
    local -A by_number=() seen=()
    for number in "${!numbers[@]}"; do by_number["block special file $(hexadecimal "$number")"]=${numbers[$number]}; done
    for name in "${!commands[@]}"; do
        number=$(hexadecimal "${commands[$name]}")
        by_number["character special file $number"]=$name
    done
    if ! list=$(open_device_files); then
        USES+=("the open files of this machine's processes cannot be looked at")
        return
    fi
    while IFS=$'\t' read -r file path; do
        name=${path##*/}
        if is_block "$name" || is_command_device "$name"; then seen["${file%%/*} $name"]=1; fi
    done <<<"$list"
    # The same device under another name, such as a container's.
    while IFS='|' read -r file kind number; do
        name=${by_number["$kind $number"]-}
        [[ -n $name ]] && seen["${file%%/*} $name"]=1
    done < <(cd "$PROC" && cut -f1 <<<"$list" | xargs -r -d '\n' stat -L -c '%n|%F|%t:%T' 2>/dev/null)
    for name in "${!seen[@]}"; do
        # Ours, or one that has ended meanwhile.
        [[ ${name%% *} == "$HOLDER" || ! -e $PROC/${name%% *} ]] && continue
        USES+=("${name#* } is open in process $(process_name "${name%% *}")")
    done
}

find_virtual_functions() {
    local count
    count=$(first_line "$(device_dir "$1")/sriov_numvfs")
    [[ ${count:-0} == 0 ]] || USES+=("it has $count virtual functions, which others may be using (echo 0 > $(device_dir "$1")/sriov_numvfs)")
}

# The device file of a disk, if it is there and leads to this disk and no other one.
device_file() {
    local dir=$1 path=$DEV/${1##*/}
    [[ -e $path ]] || return 1
    [[ -n $ROOT || $(stat -L -c '%F %t:%T' -- "$path") == "block special file $(hexadecimal "$(first_line "$dir/dev")")" ]] || return 1
    printf '%s' "$path"
}

# Opens a drive's disks such that the kernel lets nobody else claim them (mount, swap, md, dm, ZFS, file systems' journals,
# also in mount namespaces that nobody can see), until release_disks. Fails, with USES filled, if somebody has.
hold_disks() {
    local dir path paths=() answer=''
    while IFS= read -r dir; do
        # A namespace without capacity has nothing that could be used, and cannot be opened.
        [[ $(first_line "$dir/size") == 0 ]] && continue
        if ! path=$(device_file "$dir"); then
            USES+=("${dir##*/} has no device file $DEV/${dir##*/}, so nobody knows whether it is in use")
            return 1
        fi
        paths+=("$path")
    done < <(disks_of "$1")
    ((${#paths[@]})) || return 0
    if ! command -v perl >/dev/null; then
        USES+=('perl is missing, so the kernel cannot be asked whether it is in use (apt install perl-base)')
        return 1
    fi
    # shellcheck disable=SC2016 # It is perl's text. It ends with this program, however that ends.
    exec {HOLDER_SAYS}< <(exec perl -MFcntl -e '
        $| = 1;
        my $parent = getppid;
        for (@ARGV) {
            sysopen(my $file, $_, O_RDONLY | O_EXCL) or do { print "$_: $!\n"; exit 1 };
            push @files, $file;
        }
        print "held\n";
        select undef, undef, undef, 0.1 while getppid == $parent;' "${paths[@]}" 2>&1)
    HOLDER=$!
    read -r -t 60 answer <&"$HOLDER_SAYS"
    [[ $answer == held ]] && return 0
    release_disks
    case $answer in
    *busy*) USES+=("${answer%%:*} is in use inside the kernel (a mount that is not visible from here, a file system's journal, ZFS or the like)") ;;
    *) USES+=("it cannot be asked whether it is in use: ${answer:-no answer within 60 s}") ;;
    esac
    return 1
}

release_disks() {
    [[ -n $HOLDER ]] || return 0
    kill "$HOLDER" 2>/dev/null
    exec {HOLDER_SAYS}<&-
    wait "$HOLDER" 2>/dev/null
    HOLDER=''
}

# Fills CONTENTS with the partition tables and signatures on a drive.
find_contents() {
    local dir disks=0 parts part
    CONTENTS=()
    while IFS= read -r dir; do
        disks=$((disks + 1))
        parts=()
        for part in "$dir"/*/partition; do
            part=${part%/partition}
            parts+=("${part##*/}")
        done
        ((${#parts[@]} == 0)) || CONTENTS+=("${dir##*/} has partitions: ${parts[*]}")
    done < <(disks_of "$1")
    if ((disks == 0)); then
        CONTENTS+=("it shows no namespaces, so nobody knows what it holds")
        return
    fi
    while IFS= read -r dir; do find_signature "$dir"; done < <(blocks_of "$1")
}

find_signature() {
    local dir=$1 name=${1##*/} path text status line found='' label=''
    [[ $(first_line "$dir/size") == 0 ]] && return
    if ! path=$(device_file "$dir"); then
        CONTENTS+=("$name has no device file $DEV/$name, so nobody knows what it holds")
        return
    fi
    if ! timeout 60 dd if="$path" of=/dev/null bs=4096 count=256 status=none 2>/dev/null; then
        CONTENTS+=("$name cannot be read, so nobody knows what it holds")
        return
    fi
    text=$(timeout 60 blkid -p -o export -- "$path" 2>/dev/null)
    status=$?
    while IFS= read -r line; do
        case $line in
        TYPE=*) found+=", ${line#*=}" ;;
        PTTYPE=*) found+=", ${line#*=} partition table" ;;
        LABEL=*) label=" named '${line#*=}'" ;;
        esac
    done <<<"$text"
    case $status in
    0) CONTENTS+=("$name holds: ${found#, }$label") ;;
    2) ;;
    126 | 127)
        if holds_data "$path"; then CONTENTS+=("$name holds data (of what kind, blkid of util-linux would say: it is missing)"); fi
        ;;
    8) CONTENTS+=("$name holds several signatures (wipefs -n $path lists them)") ;;
    *) CONTENTS+=("$name cannot be looked at: blkid ended with $status") ;;
    esac
}

# Whether the first or the last MiB has anything but zeroes.
holds_data() {
    local size
    size=$(stat -L -c %s -- "$1")
    [[ -b $1 ]] && size=$(($(first_line "$SYS/class/block/${1##*/}/size") * 512))
    [[ -n $({
        dd if="$1" bs=64K count=16 status=none
        dd if="$1" bs=64K iflag=skip_bytes skip="$((size > 1048576 ? size - 1048576 : 0))" status=none
    } 2>/dev/null | tr -d '\0' | head -c 1 | od -An -tx1) ]]
}

# The processes that have a drive open through VFIO, one per line.
find_vfio_users() {
    local file list path name
    local -A files=() seen=()
    while IFS= read -r file; do files[${file#"$ROOT"}]=1; done < <(own_files_of "$1")
    ((${#files[@]})) || return 0
    if ! list=$(open_device_files); then
        printf '%s\n' 'nobody knows which: the open files of processes cannot be looked at'
        return
    fi
    while IFS=$'\t' read -r file path; do
        [[ -n $path && -n ${files[${path#"$ROOT"}]-} ]] && seen[${file%%/*}]=1
    done <<<"$list"
    for name in "${!seen[@]}"; do process_name "$name" && printf '\n'; done
    ((${#seen[@]})) && return 0
    # A process may have closed the group and kept the device: the kernel then refuses to open the group again.
    file=$DEV/vfio/$(group_of "$1")
    if [[ -e $file ]] && ! (: <>"$file") 2>/dev/null && ((EUID == 0)); then
        printf '%s\n' "one that cannot be seen from here (fuser -v $file)"
    fi
}
