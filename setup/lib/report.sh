# shellcheck shell=bash
# status and check: what there is, and what is missing. Nothing here changes anything.

# What a drive is called: its model, or the numbers of its maker.
model_of() {
    local controller dir model=''
    dir=$(device_dir "$1")
    while IFS= read -r controller; do model=$(first_line "$controller/model"); done < <(controllers_of "$1")
    printf '%s' "${model:-$(first_line "$dir/vendor"):$(first_line "$dir/device")}"
}

# A drive's disks with their sizes: nvme0n1 (931G).
namespaces_of() {
    local dir size list=()
    while IFS= read -r dir; do
        size=$(first_line "$dir/size")
        list+=("${dir##*/} ($(((size + 0) / 2048)) MiB)")
    done < <(disks_of "$1")
    ((${#list[@]})) && printf '%s\n' "${list[@]}"
}

# Whether a drive could be bound, as the lists HARD and SOFT of examine; and who has it open, as the list OPEN_IN.
look_at() {
    # shellcheck disable=SC2034 # examine reads them.
    local WORDS=("$1") REMEDIES=()
    HARD=() SOFT=() OPEN_IN=()
    if [[ $(driver_of "$1") == vfio-pci ]]; then
        mapfile -t OPEN_IN < <(find_vfio_users "$1")
        examine_group "$1"
    elif ((EUID == 0)); then
        examine "$1"
    else
        HARD=('whether it is in use, only root can see')
    fi
}

report_status() {
    local drives address page node list=() memory=() rows=() lines=()
    mapfile -t drives < <(all_nvme_drives)
    if ((JSON)); then
        for address in "${drives[@]}"; do list+=("$(status_json "$address")"); done
        while read -r page node; do memory+=("$(pages_json "$page" "$node")"); done < <(page_pools)
        [[ ! -e $(record_file) ]] || mapfile -t lines <"$(record_file)"
        printf '{"drives":%s,"hugepages":%s,"record":%s}\n' "$(json_array "${list[@]}")" "$(json_array "${memory[@]}")" "$(json_strings "${lines[@]}")"
        return 0
    fi
    printf '%-14s %-10s %-6s %-5s %s\n' ADDRESS DRIVER GROUP NODE MODEL
    for address in "${drives[@]}"; do status_lines "$address"; done
    ((${#drives[@]})) || printf 'This machine has no NVMe drive.\n'
    printf '\n'
    while read -r page node; do
        printf 'hugepages of %s%s: %s, %s free\n' "$(size_for_people "$page")" "${node:+ on node $node}" \
            "$(first_line "$(pages_dir "$page" "$node")/nr_hugepages")" "$(first_line "$(pages_dir "$page" "$node")/free_hugepages")"
    done < <(page_pools)
    if [[ -s $(record_file) ]]; then
        mapfile -t rows <"$(record_file)"
        printf '\nsetup.sh undo would take back:\n'
        for address in "${rows[@]}"; do
            split_fields "$address"
            printf '    %s %s (before: %s)\n' "${FIELDS[0]}" "${FIELDS[1]}" "${FIELDS[2]:-none}"
        done
    fi
}

status_lines() {
    local address=$1 driver line sibling class
    driver=$(driver_of "$address")
    printf '%-14s %-10s %-6s %-5s %s\n' "$address" "${driver:--}" "$(group_of "$address" | grep . || echo -)" "$(node_of "$address" | grep . || echo -)" "$(model_of "$address")"
    line=$(serial_of "$address")
    [[ -z $line ]] || printf '    serial number: %s\n' "$line"
    while IFS= read -r line; do printf '    disk: %s\n' "$line"; done < <(namespaces_of "$address")
    while read -r sibling class driver; do
        printf '    same IOMMU group: %s, %s, driver %s\n' "$sibling" "$(describe_class "$class")" "$driver"
    done < <(siblings_of "$address")
    look_at "$address"
    for line in "${OPEN_IN[@]}"; do printf '    open in process %s\n' "$line"; done
    for line in "${HARD[@]}"; do printf '    not to be bound: %s\n' "$line"; done
    for line in "${SOFT[@]}"; do printf '    not to be bound without --force: %s\n' "$line"; done
}

status_json() {
    local address=$1 sibling class driver list=() names text
    text=$(link_name "$(device_dir "$address")/driver")
    mapfile -t names < <(namespaces_of "$address")
    while read -r sibling class driver; do
        list+=("{\"address\":$(json_string "$sibling"),\"class\":$(json_string "$class"),\"driver\":$(json_string "${driver#-}")}")
    done < <(siblings_of "$address")
    look_at "$address"
    printf '{"address":%s,"model":%s,"serial":%s,"driver":%s,"iommu_group":%s,"numa_node":%s,"namespaces":%s,"siblings":%s,"open_in":%s,"refused":%s,"refused_without_force":%s}' \
        "$(json_string "$address")" "$(json_string "$(model_of "$address")")" "$(json_string "$(serial_of "$address")")" "$(json_string "$text")" \
        "$(json_number "$(group_of "$address")")" "$(json_number "$(node_of "$address")")" "$(json_strings "${names[@]}")" \
        "$(json_array "${list[@]}")" "$(json_strings "${OPEN_IN[@]}")" "$(json_strings "${HARD[@]}")" "$(json_strings "${SOFT[@]}")"
}

# Every pool of hugepages, as "kilobytes node"; without a node where the kernel knows none.
page_pools() {
    local kilobytes node found
    while IFS= read -r kilobytes; do
        found=0
        while IFS= read -r node; do
            [[ -d $(pages_dir "$kilobytes" "$node") ]] || continue
            printf '%s %s\n' "$kilobytes" "$node"
            found=1
        done < <(numa_nodes)
        ((found)) || printf '%s\n' "$kilobytes"
    done < <(page_sizes)
}

pages_json() {
    local dir
    dir=$(pages_dir "$1" "$2")
    printf '{"page_kib":%s,"node":%s,"total":%s,"free":%s}' "$1" "$(json_number "$2")" \
        "$(json_number "$(first_line "$dir/nr_hugepages")")" "$(json_number "$(first_line "$dir/free_hugepages")")"
}

CHECKS=() MISSING=0

# line STATE NAME TEXT [COMMAND]: the state is ready, missing or note.
line() {
    local state=$1 name=$2 text=$3 mend=${4-} object
    [[ $state == missing ]] && MISSING=1
    if ((JSON)); then
        object="{\"state\":$(json_string "$state"),\"name\":$(json_string "$name"),\"text\":$(json_string "$text")"
        [[ -z $mend ]] || object+=",\"mend\":$(json_string "$mend")"
        CHECKS+=("$object}")
        return 0
    fi
    [[ $state == missing ]] && state=MISSING
    printf '%-8s %s: %s\n' "$state" "$name" "$text"
    [[ -z $mend ]] || printf '         mend it: %s\n' "$mend"
}

report_check() {
    local ready=true drives=() address bound=()
    mapfile -t drives < <(all_nvme_drives)
    for address in "${drives[@]}"; do has_driver "$address" vfio-pci && bound+=("$address"); done
    check_iommu
    check_interrupts
    check_modules
    check_drives
    check_hugepages
    check_memlock
    check_cpus "${bound[@]}"
    ((MISSING)) && ready=false
    ((!JSON)) || printf '{"command":"check","ready":%s,"checks":%s}\n' "$ready" "$(json_array "${CHECKS[@]}")"
    return "$MISSING"
}

check_iommu() {
    local groups=("$SYS"/kernel/iommu_groups/*)
    if ((${#groups[@]})); then
        line ready IOMMU "on, ${#groups[@]} groups"
    else
        line missing IOMMU 'off: there are no IOMMU groups' "$(iommu_remedy)"
    fi
}

# The kernel names interrupts that the IOMMU checks: IR-PCI-MSI on x86, ITS-MSI on arm64.
check_interrupts() {
    if grep -q -E 'IR-|ITS-' "$PROC/interrupts" 2>/dev/null; then
        line ready 'interrupt remapping' on
    elif [[ $(first_line "$SYS/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") == Y ]]; then
        line note 'interrupt remapping' 'off, and allow_unsafe_interrupts permits that: a drive could send any interrupt'
    else
        line missing 'interrupt remapping' 'off: VFIO refuses drives without it' \
            'switch VT-d/AMD-Vi and x2APIC on in the firmware, see that intremap=off is not on the kernel command line, reboot'
    fi
}

check_modules() {
    if [[ -d $SYS/bus/pci/drivers/vfio-pci ]]; then
        line ready vfio-pci 'in the kernel'
    elif modprobe -n -q vfio-pci 2>/dev/null; then
        line ready vfio-pci 'can be loaded; setup.sh bind does it'
    else
        line missing vfio-pci 'this kernel has none' 'apt install linux-image-amd64 (the kernel needs CONFIG_VFIO_PCI), reboot'
    fi
    if [[ -e $DEV/iommu ]]; then
        line ready 'VFIO files' "$DEV/iommu: drives are opened by iommufd"
    elif [[ -e $DEV/vfio/vfio ]]; then
        line ready 'VFIO files' "$DEV/vfio/vfio: drives are opened by their IOMMU group"
        [[ -d $SYS/module/vfio_iommu_type1 ]] || line missing vfio_iommu_type1 'is not loaded' 'modprobe vfio_iommu_type1'
    elif modprobe -n -q vfio_iommu_type1 2>/dev/null; then
        line note 'VFIO files' 'not there until vfio-pci is loaded; setup.sh bind does it'
    else
        line missing 'VFIO files' "there is neither $DEV/iommu nor $DEV/vfio/vfio" 'modprobe vfio_iommu_type1'
    fi
}

check_drives() {
    local address driver group count=0 free=() file reason
    # `drives` and `bound` are those of report_check.
    for address in "${drives[@]}"; do
        driver=$(driver_of "$address")
        if [[ $driver != vfio-pci ]]; then
            look_at "$address"
            if ((${#HARD[@]})); then
                line note "drive $address" "with ${driver:-no driver}, not to be bound: ${HARD[0]}"
            else
                line note "drive $address" "with ${driver:-no driver}, could be bound${SOFT[0]:+ by --force: ${SOFT[0]}}"
                free+=("$address")
            fi
            continue
        fi
        count=$((count + 1))
        group=$(group_of "$address")
        look_at "$address"
        if ((${#HARD[@]})); then
            for reason in "${HARD[@]}"; do line missing "drive $address" "$reason" "setup.sh unbind $address, and see setup.sh status"; done
        elif ! has_device_file "$address"; then
            line missing "drive $address" "bound to vfio-pci, but there is no $DEV/vfio/$group and no file of its own" 'modprobe vfio_iommu_type1'
        elif [[ -n $USER_NAME ]]; then
            while IFS= read -r file; do check_owner "$address" "$file"; done < <(device_files_of "$address")
        else
            line ready "drive $address" "bound to vfio-pci, IOMMU group $group"
        fi
    done
    ((count)) || line missing drives 'none is bound to vfio-pci' "setup.sh bind ${free[0]:-BDF (setup.sh status lists the drives)}"
}

check_owner() {
    local address=$1 file=$2
    if [[ $(stat -L -c %u -- "$file") == "$(id -u -- "$USER_NAME")" ]]; then
        line ready "drive $address" "bound to vfio-pci, $file belongs to $USER_NAME"
    else
        line missing "drive $address" "$file belongs to $(stat -L -c %U -- "$file"), not to $USER_NAME" "setup.sh bind $address --user $USER_NAME"
    fi
}

# Per NUMA node: memory of another node is slower for a drive.
check_hugepages() {
    local kilobytes node total free text any mounts
    while IFS= read -r node; do
        text='' any=0
        while IFS= read -r kilobytes; do
            total=$(first_line "$(pages_dir "$kilobytes" "$node")/nr_hugepages")
            free=$(first_line "$(pages_dir "$kilobytes" "$node")/free_hugepages")
            ((total > 0)) && any=1
            text+=", ${total:-0} of $(size_for_people "$kilobytes") (${free:-0} free)"
        done < <(page_sizes)
        if ((any)); then
            line ready "hugepages${node:+ of node $node}" "${text#, }"
        else
            line missing "hugepages${node:+ of node $node}" 'there are none' "setup.sh hugepages 1G${node:+ --node $node}"
        fi
    done < <(numa_nodes | grep . || echo '')
    [[ -n $USER_NAME ]] || return 0
    mounts=("$RUN/hugepages/$USER_NAME-"*)
    if ((${#mounts[@]})) && is_mounted "${mounts[0]#"$ROOT"}"; then
        line ready 'hugepages of the user' "${mounts[0]#"$ROOT"}"
    else
        line missing 'hugepages of the user' "no hugetlbfs is mounted for $USER_NAME" "setup.sh hugepages 1G --user $USER_NAME"
    fi
}

check_memlock() {
    local limit who=$USER_NAME
    if [[ -n $who ]]; then
        limit=$(session_memlock "$who")
        if [[ -e $(drop_in) && $(<"$(drop_in)") == *"User=$who"* ]]; then
            line ready memlock "$SERVICE may lock all memory, as $who"
        elif enough_memlock "$limit"; then
            line ready memlock "$limit KiB for login sessions of $who"
        else
            line missing memlock "a login session of $who may lock ${limit:-the default of 8192} KiB, and all memory of all guests has to be locked" "$(memlock_remedy "$who")"
        fi
    elif ((EUID == 0)); then
        line ready memlock 'root may lock all memory; check --user NAME looks for another user'
    else
        limit=$(ulimit -H -l)
        if enough_memlock "$limit"; then
            line ready memlock "$limit"
        else
            line missing memlock "you may lock $limit KiB, and all memory of all guests has to be locked" "$(memlock_remedy "$(id -un)")"
        fi
    fi
}

# Whether a CPU is in a list such as 0-3,8.
cpu_in() {
    local range ranges
    IFS=, read -r -a ranges <<<"$2"
    for range in "${ranges[@]}"; do
        [[ $range =~ ^[0-9]+(-[0-9]+)?$ ]] || continue
        (($1 >= ${range%-*} && $1 <= ${range#*-})) && return 0
    done
    return 1
}

# Whether two lists of CPUs have one in common: if so, one of them has the first CPU of a range of the other.
cpus_meet() {
    local range ranges
    IFS=, read -r -a ranges <<<"$1"
    for range in "${ranges[@]}"; do cpu_in "${range%-*}" "$2" && return 0; done
    IFS=, read -r -a ranges <<<"$2"
    for range in "${ranges[@]}"; do cpu_in "${range%-*}" "$1" && return 0; done
    return 1
}

# The drives' NUMA nodes against the CPUs of the workers, as the service has them.
check_cpus() {
    local address node near workers='' text config=$ETC/vhost-blk.toml
    while IFS= read -r text; do
        [[ $text =~ ^[[:space:]]*cpus[[:space:]]*=[[:space:]]*\"([0-9,-]+)\" ]] && workers=${BASH_REMATCH[1]}
    done < <(cat -- "$config" 2>/dev/null)
    for address in "$@"; do
        node=$(node_of "$address")
        near=$(first_line "$SYS/devices/system/node/node$node/cpulist")
        if [[ -z $node || -z $near ]]; then
            line ready "CPUs for $address" 'this machine tells no NUMA node of it: all CPUs are alike'
        elif [[ -z $workers ]]; then
            line note "CPUs for $address" "it is on NUMA node $node, with the CPUs $near; the workers are not pinned (cpus = \"…\" in /etc/vhost-blk.toml)"
        elif cpus_meet "$workers" "$near"; then
            line ready "CPUs for $address" "workers on $workers, of which some are on its NUMA node $node ($near)"
        else
            line missing "CPUs for $address" "the workers are on $workers, and it is on NUMA node $node with the CPUs $near" \
                "write cpus = \"…\" with some of $near to /etc/vhost-blk.toml, and restart the service"
        fi
    done
}
