# shellcheck shell=bash
# Hugepages and the file systems by which programs get at them.

# Bytes of 512M, 2G, 1T.
size_in_bytes() {
    [[ ${1^^} =~ ^([1-9][0-9]{0,6})([MGT])I?B?$ ]] || return 1
    case ${BASH_REMATCH[2]} in
    M) printf '%s' $((BASH_REMATCH[1] << 20)) ;;
    G) printf '%s' $((BASH_REMATCH[1] << 30)) ;;
    T) printf '%s' $((BASH_REMATCH[1] << 40)) ;;
    esac
}

# Kilobytes of 64K, 2M, 512M, 1G, if hugepages can be that large: which of them there are depends on the kernel.
page_in_kilobytes() {
    local kilobytes
    [[ ${1^^} =~ ^([1-9][0-9]{0,3})([KMG])B?$ ]] || return 1
    case ${BASH_REMATCH[2]} in
    K) kilobytes=${BASH_REMATCH[1]} ;;
    M) kilobytes=$((BASH_REMATCH[1] << 10)) ;;
    G) kilobytes=$((BASH_REMATCH[1] << 20)) ;;
    esac
    ((kilobytes >= 64 && (kilobytes & (kilobytes - 1)) == 0)) && printf '%s' "$kilobytes"
}

# 2M of 2048, 1G of 1048576, 1536K of 1536: kilobytes for people.
size_for_people() {
    if (($1 >= 1 << 20 && $1 % (1 << 20) == 0)); then
        printf '%sG' $(($1 >> 20))
    elif (($1 % 1024 == 0)); then
        printf '%sM' $(($1 >> 10))
    else
        printf '%sK' "$1"
    fi
}

numa_nodes() {
    local dir
    for dir in "$SYS"/devices/system/node/node[0-9]*; do printf '%s\n' "${dir##*node}"; done | sort -n
}

# The folder with the counters of pages of so many kilobytes, of a node or of the machine.
pages_dir() {
    local kilobytes=$1 node=$2
    if [[ -n $node ]]; then
        printf '%s' "$SYS/devices/system/node/node$node/hugepages/hugepages-${kilobytes}kB"
    else
        printf '%s' "$SYS/kernel/mm/hugepages/hugepages-${kilobytes}kB"
    fi
}

# The sizes of hugepages the kernel has, in kilobytes.
page_sizes() {
    local dir size
    for dir in "$SYS"/kernel/mm/hugepages/hugepages-*kB; do
        size=${dir##*-}
        printf '%s\n' "${size%kB}"
    done | sort -n
}

# A number of /proc/meminfo, in kilobytes.
meminfo() {
    local key value rest
    while read -r key value rest; do
        [[ $key == "$1:" ]] && printf '%s' "$value" && return
    done <"$PROC/meminfo"
}

# The pages of every node, as node0=5,node1=0; of the machine where the kernel knows no nodes: all=5.
pages_everywhere() {
    local kilobytes=$1 node list=''
    while IFS= read -r node; do
        [[ -d $(pages_dir "$kilobytes" "$node") ]] && list+=",node$node=$(first_line "$(pages_dir "$kilobytes" "$node")/nr_hugepages")"
    done < <(numa_nodes)
    [[ -n $list ]] || list=",all=$(first_line "$(pages_dir "$kilobytes" '')/nr_hugepages")"
    printf '%s' "${list#,}"
}

provide_hugepages() {
    local size=$1 bytes kilobytes dir where
    bytes=$(size_in_bytes "$size") || wrong_usage "'$size' is no size: it looks like 512M or 2G"
    kilobytes=$(page_in_kilobytes "${PAGE:-2M}") || wrong_usage "--page is the size of a hugepage such as 2M, 512M or 1G, not '$PAGE'"
    [[ -z $NODE || $NODE =~ ^(0|[1-9][0-9]*)$ ]] || wrong_usage "--node is a number, not '$NODE'"
    where="hugepages of $(size_for_people "$kilobytes")${NODE:+ on node $NODE}"
    dir=$(pages_dir "$kilobytes" "$NODE")
    if [[ -n $NODE && ! -d $SYS/devices/system/node/node$NODE ]]; then
        step refused "$where" "this machine has no NUMA node $NODE" "its nodes are: $(numa_nodes | tr '\n' ' ')"
        return 1
    fi
    if [[ ! -e $dir/nr_hugepages ]]; then
        step refused "$where" 'this kernel, or this CPU, has no pages of that size' \
            "there are: $(page_sizes | while read -r size; do size_for_people "$size"; printf ' '; done)(kilobytes in $SYS/kernel/mm/hugepages)"
        return 1
    fi
    raise_pages "$where" "$kilobytes" "$dir/nr_hugepages" $(((bytes / 1024 + kilobytes - 1) / kilobytes)) || return 1
    provide_mount "$kilobytes"
}

raise_pages() {
    local where=$1 kilobytes=$2 file=$3 wanted=$4 have free got available reserve
    have=$(first_line "$file")
    free=$(first_line "${file%/*}/free_hugepages")
    if ((have >= wanted)); then
        step unchanged "$where" "there are $have already ($((have * kilobytes / 1024)) MiB), $free of them free; $wanted are wanted"
        return 0
    fi
    # The kernel would give all it can find, and leave the machine without memory.
    available=$(meminfo MemAvailable)
    reserve=$(($(meminfo MemTotal) / 20))
    if (((wanted - have) * kilobytes > available - reserve)); then
        step refused "$where" "$(((wanted - have) * kilobytes / 1024)) MiB more are wanted, and only $((available / 1024)) MiB of memory are available, $((reserve / 1024)) MiB of which the machine itself needs" \
            'ask for less, or stop what uses the memory'
        return 1
    fi
    if ! remember pages "${kilobytes}kB" "$(pages_everywhere "$kilobytes")" || ! write_attribute pages "${kilobytes}kB" "$file" "$wanted"; then
        step failed "$where" "$WHY"
        return 1
    fi
    ((DRY_RUN)) && return 0
    got=$(cat -- "$file")
    if ((got < wanted)); then
        step failed "$where" "the kernel gave $((got - have)) of $((wanted - have)) pages, there are $got now: its memory is too fragmented, or used up" \
            "run it again after stopping something big, or reserve them when the machine boots, by the kernel command line: $(boot_words "$kilobytes" "$wanted")"
        return 1
    fi
    step changed "$where" "there are $got now ($((got * kilobytes / 1024)) MiB; before: $have)"
}

boot_words() {
    local size
    size=$(size_for_people "$1")
    if [[ -n $NODE ]]; then
        printf 'hugepagesz=%s hugepages=%s:%s' "$size" "$NODE" "$2"
    else
        printf 'hugepagesz=%s hugepages=%s' "$size" "$2"
    fi
}

# Where hugetlbfs with pages of so many kilobytes is mounted, one per line.
hugepage_mounts() {
    local size fields line rest
    size=$(size_for_people "$1")
    while IFS= read -r line; do
        [[ $line == *' - hugetlbfs '* && ",${line##* }," == *",pagesize=$size,"* ]] || continue
        read -r -a fields <<<"$line"
        printf '%s\n' "${fields[4]}"
    done <"$PROC/self/mountinfo"
}

is_mounted() {
    local place
    while read -r place; do [[ $place == "$1" ]] && return 0; done < <(cut -d' ' -f5 "$PROC/self/mountinfo")
    return 1
}

# A file system for programs that take hugepages by files, as QEMU does; one of the user's own for a user.
provide_mount() {
    local size place options mounts
    size=$(size_for_people "$1")
    options=pagesize=$size
    mapfile -t mounts < <(hugepage_mounts "$1")
    if [[ -n $USER_NAME ]]; then
        place=$(user_mount "$size")
        options+=",uid=$(id -u -- "$USER_NAME"),gid=$(id -g -- "$USER_NAME"),mode=0700"
    elif ((${#mounts[@]})); then
        step unchanged "hugepages of $size" "are reached by ${mounts[0]}"
        return 0
    else
        place=$DEV/hugepages
        ! is_mounted "${place#"$ROOT"}" || place=$DEV/hugepages-$size
    fi
    if is_mounted "${place#"$ROOT"}"; then
        step unchanged "${place#"$ROOT"}" 'is mounted already'
        return 0
    fi
    if make_dir "$place" && remember mount "$place" none &&
        run_change mount "$place" mount -t hugetlbfs -o "$options" vhost-blk "$place"; then
        ((DRY_RUN)) || step changed "${place#"$ROOT"}" "hugepages of $size are mounted here${USER_NAME:+ for $USER_NAME}"
        [[ -z $USER_NAME ]] || explain_memlock
        return 0
    fi
    step failed "$place" "$WHY"
    return 1
}

user_mount() { printf '%s' "$RUN/hugepages/$USER_NAME-$1"; }

# A folder, with those above it; each is recorded.
make_dir() {
    [[ -d $1 ]] && return 0
    make_dir "${1%/*}" && remember dir "$1" none && run_change dir "$1" mkdir -m 0755 -- "$1"
}
