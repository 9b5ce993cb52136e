# shellcheck shell=bash
# What sysfs says about PCI functions and NVMe drives. Nothing here changes anything.
# shellcheck disable=SC2034 # WHY is read by the callers.

CLASS_NVME=0x010802

# 01:00.0 or 0000:01:00.0 in full.
full_address() {
    local address=${1,,}
    [[ $address =~ ^[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$ ]] && address=0000:$address
    [[ $address =~ ^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$ ]] || return 1
    printf '%s' "$address"
}

device_dir() { printf '%s' "$SYS/bus/pci/devices/$1"; }

# The name of the folder that a link leads to; nothing if there is no such link. Without a program: this is asked often.
link_name() { (cd -P -- "$1" 2>/dev/null && printf '%s' "${PWD##*/}"); }

# The first line of a file; nothing if there is none.
first_line() {
    local line=''
    { read -r line <"$1"; } 2>/dev/null
    printf '%s' "$line"
}

driver_of() { link_name "$(device_dir "$1")/driver"; }
group_of() { link_name "$(device_dir "$1")/iommu_group"; }

# What the device is to be bound to regardless of its kind; nothing if it was not set.
override_of() {
    local name
    name=$(first_line "$(device_dir "$1")/driver_override")
    [[ $name == '(null)' ]] || printf '%s' "$name"
}

# The NUMA node of a device; nothing where the kernel does not know.
node_of() {
    local node
    node=$(first_line "$(device_dir "$1")/numa_node")
    [[ $node =~ ^[0-9]+$ ]] && printf '%s' "$node"
}

# Whether a driver leaves user space alone with its device: such that vfio works with it in the group.
is_vfio() { [[ $1 == vfio-pci || $1 == *_vfio_pci || $1 == *-vfio-pci ]]; }

all_nvme_drives() {
    local dir
    for dir in "$SYS"/bus/pci/devices/*; do
        [[ $(first_line "$dir/class") == "$CLASS_NVME" ]] && printf '%s\n' "${dir##*/}"
    done
}

# The NVMe controllers (nvme0) of a function: one, while the kernel drives it.
controllers_of() {
    local dir
    for dir in "$(device_dir "$1")"/nvme/nvme*; do printf '%s\n' "$dir"; done
}

# The serial number of a drive that the kernel drives; nothing if it does not.
serial_of() {
    local controller
    # It is padded with blanks, which `read` takes away.
    while IFS= read -r controller; do first_line "$controller/serial"; done < <(controllers_of "$1")
}

# The sysfs folders of a drive's disks. With multipath, a namespace's disk belongs to the subsystem and the one below the
# controller is hidden (it has no number); the names' digits say nothing then.
disks_of() {
    local controller disk subsystem
    while IFS= read -r controller; do
        for disk in "$controller"/nvme*n*; do
            [[ -e $disk/dev && -e $disk/size ]] && printf '%s\n' "$disk"
        done
        for subsystem in "$SYS"/class/nvme-subsystem/*; do
            [[ -e $subsystem/${controller##*/} ]] || continue
            for disk in "$subsystem"/nvme*n*; do
                [[ -e $disk/dev && -e $disk/size ]] && printf '%s\n' "$disk"
            done
        done
    done < <(controllers_of "$1")
}

# A disk's folder and those of its partitions.
blocks_of() {
    local disk part
    while IFS= read -r disk; do
        printf '%s\n' "$disk"
        for part in "$disk"/*/partition; do printf '%s\n' "${part%/partition}"; done
    done < <(disks_of "$1")
}

# The character devices by which programs send commands to a drive: nvme0, ng0n1.
command_devices_of() {
    local controller subsystem device
    while IFS= read -r controller; do
        [[ -e $controller/dev ]] && printf '%s\n' "$controller"
        for device in "$controller"/ng*n*; do printf '%s\n' "$device"; done
        for subsystem in "$SYS"/class/nvme-subsystem/*; do
            [[ -e $subsystem/${controller##*/} ]] || continue
            for device in "$subsystem"/ng*n*; do printf '%s\n' "$device"; done
        done
    done < <(controllers_of "$1")
}

# The other functions of a drive's IOMMU group: "BDF class driver", the driver "-" if there is none.
siblings_of() {
    local dir driver
    for dir in "$(device_dir "$1")"/iommu_group/devices/*; do
        [[ ${dir##*/} == "$1" ]] && continue
        driver=$(link_name "$dir/driver")
        printf '%s %s %s\n' "${dir##*/}" "$(first_line "$dir/class")" "${driver:--}"
    done
}

# Whether a driver of a sibling keeps VFIO from the group. Those of bridges do no DMA of their own.
spoils_group() {
    [[ $1 != - && $1 != pcieport && $1 != pci-stub ]] && ! is_vfio "$1"
}

describe_class() {
    case $1 in
    0x010802) printf 'NVMe drive' ;;
    0x0108*) printf 'memory controller of another programming interface' ;;
    0x01*) printf 'storage controller' ;;
    0x02*) printf 'network card' ;;
    0x03*) printf 'display' ;;
    0x04*) printf 'multimedia' ;;
    0x0604*) printf 'PCI bridge' ;;
    0x06*) printf 'bridge' ;;
    0x0c03*) printf 'USB controller' ;;
    *) printf 'device' ;;
    esac
    printf ' (class %s)' "$1"
}

# The device files by which a user reaches a drive that vfio-pci has, and the names of those that only it has.
# With iommufd that is the device's own file and /dev/iommu; otherwise the file of the group.
device_files_of() {
    local entry group
    for entry in "$(device_dir "$1")"/vfio-dev/vfio*; do
        if [[ -e $DEV/vfio/devices/${entry##*/} && -e $DEV/iommu ]]; then
            printf '%s\n' "$DEV/vfio/devices/${entry##*/}" "$DEV/iommu"
            return
        fi
    done
    group=$(group_of "$1")
    [[ -n $group && -e $DEV/vfio/$group ]] && printf '%s\n' "$DEV/vfio/$group"
}

# Every device file through which a drive on vfio-pci may be open.
own_files_of() {
    local entry group
    for entry in "$(device_dir "$1")"/vfio-dev/vfio*; do
        [[ -e $DEV/vfio/devices/${entry##*/} ]] && printf '%s\n' "$DEV/vfio/devices/${entry##*/}"
    done
    group=$(group_of "$1")
    [[ -n $group && -e $DEV/vfio/$group ]] && printf '%s\n' "$DEV/vfio/$group"
}

# What to do when there is no IOMMU group.
iommu_remedy() {
    local line cpu='' words
    words=" $(first_line "$PROC/cmdline") "
    while IFS= read -r line; do
        [[ $line == vendor_id* ]] && cpu=${line##* } && break
    done <"$PROC/cpuinfo"
    if [[ $cpu == GenuineIntel && $words != *" intel_iommu=on"* ]]; then
        printf '%s' 'add intel_iommu=on to the kernel command line (Debian: GRUB_CMDLINE_LINUX in /etc/default/grub, then update-grub), reboot; if that is not enough, switch VT-d on in the firmware (BIOS)'
    elif [[ $cpu == GenuineIntel ]]; then
        printf '%s' 'intel_iommu=on is on the kernel command line already: switch VT-d on in the firmware (BIOS) and reboot'
    elif [[ $cpu == AuthenticAMD || $cpu == HygonGenuine ]]; then
        printf '%s' 'switch the IOMMU (AMD-Vi) on in the firmware (BIOS), see that amd_iommu=off is not on the kernel command line, reboot'
    else
        printf '%s' 'switch the IOMMU on in the firmware and the kernel (Intel: VT-d and intel_iommu=on, AMD: AMD-Vi, arm64: SMMU), reboot'
    fi
}

# What the kernel last said about a device.
kernel_says() {
    local lines
    lines=$(dmesg 2>/dev/null | grep -F -- "$1" | tail -n 2 | tr '\n' ';')
    [[ -n $lines ]] && printf '; the kernel says: %s' "${lines%;}"
}
