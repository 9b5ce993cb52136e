# shellcheck shell=bash
# Drives from the kernel to vfio-pci and back.

# Reasons against binding a drive, filled by examine: those that --force cannot overrule, what to do about each, and those
# that it can.
HARD=() REMEDIES=() SOFT=()

hard() {
    HARD+=("$1")
    REMEDIES+=("${2-}")
}

# Looks at everything that speaks against taking a drive. WORDS are the drives named together.
examine() {
    local address=$1 dir driver use
    HARD=() REMEDIES=() SOFT=()
    dir=$(device_dir "$address")
    if [[ ! -d $dir ]]; then
        hard 'there is no such PCI device' "setup.sh status lists this machine's NVMe drives"
        return
    fi
    if [[ $(first_line "$dir/class") != "$CLASS_NVME" ]]; then
        hard "it is no NVMe drive but a $(describe_class "$(first_line "$dir/class")")" "setup.sh status lists this machine's NVMe drives"
        return
    fi
    examine_group "$address"
    driver=$(driver_of "$address")
    if [[ $driver != vfio-pci ]]; then examine_serial "$address"; fi
    case $driver in
    vfio-pci) return ;;
    nvme)
        examine_use "$address"
        find_contents "$address"
        SOFT=("${CONTENTS[@]}")
        ;;
    '')
        # It was looked at before it was taken from its driver, if that was done here and cut short.
        recorded driver "$address" ||
            SOFT+=("no driver has it, so nobody knows what it holds (setup.sh unbind $address gives it to nvme, to look)")
        ;;
    *) hard "the driver '$driver' has it, and whether that is in use cannot be seen" "stop what uses it; echo $address > $dir/driver/unbind" ;;
    esac
    if [[ ! -d $SYS/bus/pci/drivers/vfio-pci ]] && ! modprobe -n -q vfio-pci 2>/dev/null; then
        hard 'this kernel has no vfio-pci' 'install a kernel with CONFIG_VFIO_PCI (Debian: linux-image-amd64)'
    fi
}

# Addresses change when cards are moved; serial numbers do not.
examine_serial() {
    local serial wanted=${SERIALS[$1]-}
    [[ -n $wanted ]] || return
    serial=$(serial_of "$1")
    if [[ -z $serial ]]; then
        hard "its serial number cannot be read, and $wanted is wanted" "setup.sh unbind $1 gives it to nvme, to look"
    elif [[ $serial != "$wanted" ]]; then
        hard "its serial number is $serial, and $wanted is wanted: this is another drive" 'setup.sh status shows where yours is'
    fi
}

examine_use() {
    local use
    # Those who only had a short look at a new or changed drive are waited for.
    [[ -S $RUN/udev/control ]] && udevadm settle --timeout=10 2>/dev/null
    find_uses "$1"
    hold_disks "$1" && release_disks
    for use in "${USES[@]}"; do hard "$use" 'stop using it; nothing overrules this'; done
}

examine_group() {
    local address=$1 group sibling class driver
    group=$(group_of "$address")
    if [[ -z $group ]]; then
        hard 'it is behind no IOMMU (it has no IOMMU group), so its DMA could reach all memory' "$(iommu_remedy)"
        return
    fi
    if [[ $(first_line "$(device_dir "$address")/iommu_group/name") == vfio-noiommu ]]; then
        hard "vfio has it in no-IOMMU mode, which does not confine its DMA" "$(iommu_remedy)"
        return
    fi
    while read -r sibling class driver; do
        spoils_group "$driver" || continue
        [[ " ${WORDS[*]} " == *" $sibling "* ]] && continue
        hard "it shares IOMMU group $group with $sibling, a $(describe_class "$class") that the kernel drives ($driver): no program could open it" \
            'name all drives of the group in one command, or put the drive into another slot'
    done < <(siblings_of "$address")
}

report_siblings() {
    local address=$1 sibling class driver list=()
    while read -r sibling class driver; do list+=("$sibling ($(describe_class "$class"), driver $driver)"); done < <(siblings_of "$address")
    ((${#list[@]} == 0)) || step note "$address" "shares IOMMU group $(group_of "$address") with: ${list[*]}"
}

# Reports what examine has found; fails if the drive must not be taken.
judge() {
    local address=$1 i reason
    for i in "${!HARD[@]}"; do step refused "$address" "${HARD[i]}" "${REMEDIES[i]}"; done
    for reason in "${SOFT[@]}"; do
        if ((FORCE)); then
            step note "$address" "$reason (--force)"
        else
            step refused "$address" "$reason" "if nothing of it is needed, or guests' disks are on it: --force"
        fi
    done
    ((${#HARD[@]} == 0 && (FORCE || ${#SOFT[@]} == 0)))
}

bind_drives() {
    local address refused=0 status=0
    for address in "$@"; do
        examine "$address"
        [[ -d $(device_dir "$address") ]] && report_siblings "$address"
        if [[ $(driver_of "$address") != vfio-pci ]]; then
            judge "$address" || refused=1
        elif ((${#HARD[@]})); then
            step note "$address" "${HARD[*]}" "${REMEDIES[0]}"
        fi
    done
    if ((refused)); then
        (($# == 1)) || step note bind 'no drive was changed, since not all can be bound'
        return 1
    fi
    for address in "$@"; do
        bind_drive "$address" || status=1
    done
    ((status)) || [[ -z $USER_NAME ]] || give_drives "$@" || status=1
    return $status
}

bind_drive() {
    local address=$1 driver override why
    driver=$(driver_of "$address")
    override=$(override_of "$address")
    if [[ $driver == vfio-pci ]]; then
        step unchanged "$address" 'is bound to vfio-pci already'
        # Only the kernel's own driver shows it.
        [[ -z ${SERIALS[$address]-} ]] || step note "$address" "its serial number, ${SERIALS[$address]}, was not checked: it cannot be read while vfio-pci has the drive" \
            "to have it checked: setup.sh unbind $address, and bind again"
        return 0
    fi
    if ! load_modules || ! remember driver "$address" "$driver" "$override"; then
        step failed "$address" "$WHY"
        return 1
    fi
    if move_drive "$address" vfio-pci vfio-pci; then
        ((DRY_RUN)) || step changed "$address" "bound to vfio-pci (before: ${driver:-no driver})"
        return 0
    fi
    why=$WHY
    if move_drive "$address" "$driver" "$override" && forget driver "$address"; then
        step failed "$address" "$why; it is back with ${driver:-no driver}"
    else
        step failed "$address" "$why; and it could not be given back to ${driver:-no driver}: $WHY" 'setup.sh undo tries that again'
    fi
    return 1
}

has_container() { [[ -d $SYS/module/vfio_iommu_type1 || -e $DEV/iommu ]]; }

# vfio-pci, and the container of groups unless the kernel has iommufd. Each module brings others along, and unloading
# one leaves some of them: those that are not there before are recorded all, in the order of their needs.
load_modules() {
    local name
    if [[ -d $SYS/bus/pci/drivers/vfio-pci ]] && has_container; then return 0; fi
    for name in iommufd irqbypass vfio vfio_virqfd vfio_iommu_type1 vfio_pci_core; do
        [[ -d $SYS/module/$name ]] || remember module "$name" none || return 1
    done
    if [[ ! -d $SYS/bus/pci/drivers/vfio-pci ]]; then
        remember module vfio-pci none || return 1
        run_change module vfio-pci modprobe vfio-pci || return 1
        if ((!DRY_RUN)) && ! await 10 test -d "$SYS/bus/pci/drivers/vfio-pci"; then
            WHY='vfio-pci was loaded and did not appear'
            return 1
        fi
    fi
    if ! has_container; then
        run_change module vfio_iommu_type1 modprobe vfio_iommu_type1 ||
            step note vfio_iommu_type1 "$WHY; without it and without iommufd, no program can open the drive"
    fi
    return 0
}

has_driver() { [[ $(driver_of "$1") == "$2" ]]; }

# move_drive BDF DRIVER OVERRIDE: gives a drive to a driver (or none), with this override. Fails with WHY.
move_drive() {
    local address=$1 driver=$2 override=$3 dir current
    dir=$(device_dir "$address")
    current=$(driver_of "$address")
    if [[ $(override_of "$address") != "$override" ]]; then
        write_attribute driver "$address" "$dir/driver_override" "$override" || return 1
    fi
    [[ $current == "$driver" ]] && return 0
    case $current in
    '') ;;
    nvme) leave_kernel "$address" || return 1 ;;
    vfio-pci) leave_vfio "$address" || return 1 ;;
    *)
        WHY="the driver '$current' has it meanwhile, and whether that is in use cannot be seen"
        return 1
        ;;
    esac
    [[ -z $driver ]] || join "$address" "$driver"
}

# Looks again at the last moment, with the disks held so that nobody can begin to use them.
leave_kernel() {
    local address=$1 status
    if ((DRY_RUN)); then
        write_attribute driver "$address" "$(device_dir "$address")/driver/unbind" "$address"
        return
    fi
    find_uses "$address"
    hold_disks "$address"
    if ((${#USES[@]})); then
        release_disks
        WHY="it is in use by now: ${USES[*]}"
        return 1
    fi
    leave "$address"
    status=$?
    release_disks
    return $status
}

leave_vfio() {
    local users
    users=$(find_vfio_users "$1")
    if [[ -n $users ]]; then
        WHY="it is open in process ${users//$'\n'/, }: the kernel would wait for its end"
        return 1
    fi
    leave "$1"
}

leave() {
    local address=$1
    write_attribute driver "$address" "$(device_dir "$address")/driver/unbind" "$address" || return 1
    ((DRY_RUN)) && return 0
    await 30 has_driver "$address" '' && return 0
    WHY="it did not leave its driver $(driver_of "$address")$(kernel_says "$address")"
    return 1
}

join() {
    local address=$1 driver=$2
    if ((!DRY_RUN)) && [[ ! -d $SYS/bus/pci/drivers/$driver ]]; then
        run_change driver "$address" modprobe -- "$driver" || return 1
    fi
    if ! write_attribute driver "$address" "$SYS/bus/pci/drivers/$driver/bind" "$address"; then
        WHY+=$(kernel_says "$address")
        return 1
    fi
    ((DRY_RUN)) && return 0
    await 10 has_driver "$address" "$driver" && return 0
    WHY="the driver $driver did not take it: it has $(driver_of "$address" | grep . || echo 'no driver')$(kernel_says "$address")"
    return 1
}

unbind_drives() {
    local address refused=0 status=0
    for address in "$@"; do examine_for_unbind "$address" || refused=1; done
    if ((refused)); then
        (($# == 1)) || step note unbind 'no drive was changed, since not all can be given back'
        return 1
    fi
    for address in "$@"; do unbind_drive "$address" || status=1; done
    return $status
}

examine_for_unbind() {
    local address=$1 dir users driver
    dir=$(device_dir "$address")
    if [[ ! -d $dir ]]; then
        step refused "$address" 'there is no such PCI device' "setup.sh status lists this machine's NVMe drives"
        return 1
    fi
    if [[ $(first_line "$dir/class") != "$CLASS_NVME" ]]; then
        step refused "$address" "it is no NVMe drive but a $(describe_class "$(first_line "$dir/class")")"
        return 1
    fi
    driver=$(driver_of "$address")
    case $driver in
    nvme | '') ;;
    vfio-pci)
        users=$(find_vfio_users "$address")
        if [[ -n $users ]]; then
            step refused "$address" "it is in use: open in process ${users//$'\n'/, }" \
                'stop that program first; the kernel would wait for its end'
            return 1
        fi
        ;;
    *)
        step refused "$address" "the driver '$driver' has it, which is none of ours" "stop what uses it; echo $address > $dir/driver/unbind"
        return 1
        ;;
    esac
}

unbind_drive() {
    local address=$1 driver override known=0 target=nvme back=''
    driver=$(driver_of "$address")
    override=$(override_of "$address")
    if recorded driver "$address" && [[ ${FIELDS[2]} != vfio-pci ]]; then
        known=1 target=${FIELDS[2]} back=${FIELDS[3]}
    fi
    if [[ $driver == "$target" ]] && { ((!known)) || [[ $override == "$back" ]]; }; then
        step unchanged "$address" "is not with vfio-pci but with ${driver:-no driver}"
        ((!known)) || forget driver "$address"
        return 0
    fi
    if remember driver "$address" "$driver" "$override" && move_drive "$address" "$target" "$back"; then
        ((DRY_RUN)) && return 0
        ((!known)) || forget driver "$address"
        step changed "$address" "given back to ${target:-no driver}"
        return 0
    fi
    step failed "$address" "$WHY" 'setup.sh undo restores what is recorded'
    return 1
}
