#!/usr/bin/env bash
# Makes a Debian 12 machine ready for the tests and benchmarks:
#   - installs the programs they use (as root; only those that are missing),
#   - fetches SPDK's JSON-RPC client from PyPI, under target/tools,
#   - unpacks Debian kernels under target/guest (nothing of them is installed): two for guests, two for the lab.
# Quick when everything is there. The only network it uses is the machine's own package sources and pip's; what is new in
# Debian's backports comes from the backports suite of the very source that the machine is configured with.
set -euo pipefail
cd "$(dirname "$0")/.."

guest=${CARGO_TARGET_DIR:-target}/guest

say() { printf '[prepare] %s\n' "$*"; }
fail() {
    printf '[prepare] %s\n' "$*" >&2
    exit 1
}

# ---- apt --------------------------------------------------------------------------------------------------------

# Runs apt-get, up to four times: a mirror may be busy, and another program may hold apt's lock.
apt_get() {
    local try
    for try in 1 2 3 4; do
        if DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 \
            -o APT::Sandbox::User=root "$@" >"$guest/apt.log" 2>&1; then
            return 0
        fi
        say "apt-get $1 failed (try $try of 4):"
        tail -n 20 "$guest/apt.log"
        sleep $((try * 5))
    done
    return 1
}

need_apt() {
    command -v apt-get >/dev/null || fail "$1, and there is no apt-get here: use Debian 12, or install it yourself"
    [ "$(id -u)" = 0 ] || fail "$1: run this as root once"
}

# Once: fetches the package lists, and adds the backports suite beside the release's own entry.
sources_ready=
ready_sources() {
    [ -z "$sources_ready" ] || return 0
    sources_ready=yes
    say "fetching the package lists"
    # A source that is out of order and that we do not need must not stop us: installing decides.
    apt_get update || say "going on with the lists that are there"
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    [ -n "$codename" ] || fail "/etc/os-release names no Debian release"
    if ! has_suite "$codename-backports"; then
        add_backports
        apt_get update || say "going on with the lists that are there"
    fi
    if has_suite "$codename-backports"; then
        newer=(-t "$codename-backports")
    else
        say "no backports suite to be had: the release's own versions are used"
        newer=()
    fi
}

# The configured sources with packages, one "CODENAME FILE" per line.
configured_suites() {
    # The words in $(…) are apt's, not the shell's.
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(CODENAME) $(SOURCESENTRY)' 'Created-By: Packages' | sed 's/:[0-9]*$//' | sort -u
}

has_suite() { configured_suites | grep -q "^$1 "; }

# Copies the entry of the release itself (with its options and keys), naming the backports suite instead.
add_backports() {
    local file to=/etc/apt/sources.list.d/$codename-backports
    file=$(configured_suites | awk -v suite="$codename" '$1 == suite { print $2; exit }')
    case $file in
    *.sources)
        awk -v RS= -v suite="$codename" '
            { found = 0; count = split($0, lines, "\n") }
            { for (i = 1; i <= count; i++) if (lines[i] ~ "^Suites:.*[ \t]" suite "([ \t]|$)") found = i }
            found {
                for (i = 1; i <= count; i++)
                    if (i == found) print "Suites: " suite "-backports"
                    else if (lines[i] !~ /^#/) print lines[i]
                exit
            }' "$file" >"$to.sources"
        say "added $to.sources"
        ;;
    ?*)
        sed -nE "s/^(deb[[:space:]].*[[:space:]])$codename([[:space:]].*)\$/\1$codename-backports\2/p" "$file" |
            head -n 1 >"$to.list"
        say "added $to.list"
        ;;
    *) say "no configured source has the suite $codename" ;;
    esac
}

# ---- programs ---------------------------------------------------------------------------------------------------

is_static_busybox() { [ -x /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1; }
have() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }

install_programs() {
    local missing=() pair
    for pair in cc:gcc cc:libc6-dev g++:g++ depmod:kmod mkfs.ext4:e2fsprogs e2fsck:e2fsprogs blkdiscard:util-linux \
        setpriv:util-linux xz:xz-utils git:git valgrind:valgrind shellcheck:shellcheck fio:fio; do
        have "${pair%%:*}" || missing+=("${pair#*:}")
    done
    is_static_busybox || missing+=(busybox-static)
    if [ ${#missing[@]} != 0 ]; then
        need_apt "missing: ${missing[*]}"
        ready_sources
        say "installing ${missing[*]}"
        apt_get install --no-install-recommends "${missing[@]}" || fail "could not install ${missing[*]}"
    fi
    # QEMU's machine, and its storage daemon, beside which the target is measured.
    for pair in qemu-system-x86_64:qemu-system-x86 qemu-storage-daemon:qemu-utils; do
        have "${pair%%:*}" && continue
        need_apt "missing: ${pair#*:}"
        ready_sources
        say "installing ${pair#*:}"
        apt_get install --no-install-recommends "${newer[@]}" "${pair#*:}" ||
            apt_get install --no-install-recommends "${pair#*:}" || fail "could not install ${pair#*:}"
    done
    install_rust
}

# Where there is no Rust at all: the newest that Debian has for its own browsers, if that is new enough.
install_rust() {
    local packages=(rustc-web cargo-web rust-web-clippy rustfmt-web) wanted found
    ! have cargo || return 0
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    need_apt "missing: cargo (Rust $wanted)"
    ready_sources
    found=$(apt-cache policy rustc-web | awk '$1 == "Candidate:" { print $2 }')
    if [ -z "$found" ] || dpkg --compare-versions "$found" lt "$wanted"; then
        fail "cargo is missing, and Debian's packages have no Rust $wanted: install it (https://rustup.rs)"
    fi
    say "installing ${packages[*]}"
    apt_get install --no-install-recommends "${packages[@]}" || fail "could not install ${packages[*]}"
}

# ---- kernels ----------------------------------------------------------------------------------------------------

# What the lab's machines load, besides what these modules need. The whole of a kernel would be 400 MiB of modules.
lab_modules=(virtio_pci virtio_blk 9p 9pnet_virtio overlay loop nvme ext4 crc32c_generic vfio-pci vfio_iommu_type1
    pci-stub dm-mod raid1)

# kernel FOLDER PACKAGE [apt options]: the newest kernel that PACKAGE depends on, as target/guest/FOLDER/vmlinuz and
# .../modules (with modules.dep, uncompressed). Checked against the sums made when it was unpacked.
kernel() {
    local folder=$guest/$1 flavour=$2 package work version wanted=
    shift 2
    if [ "$flavour" = linux-image-amd64 ]; then wanted=${lab_modules[*]}; fi
    if [ "$wanted" = "$(cat "$folder/wanted" 2>/dev/null)" ] && (cd "$folder" 2>/dev/null && sha256sum --quiet --check sums >/dev/null 2>&1); then
        return 0
    fi
    need_apt "missing: a kernel for guests at $folder"
    ready_sources
    [ "$(dpkg --print-architecture)" = amd64 ] || fail "guests are x86-64 machines: their kernels come from an amd64 Debian"
    if [ "$*" = newer ]; then set -- "${newer[@]}"; fi
    package=$(apt-cache "$@" depends "$flavour" | awk '$1 == "Depends:" { print $2; exit }')
    [ -n "$package" ] || fail "the package sources have no $flavour"
    say "fetching $package"
    work=$(mktemp -d "$guest/unpack.XXXXXX")
    # apt-get checks what it downloads against the signed lists.
    (cd "$work" && apt_get download "$@" "$package") || fail "could not download $package"
    dpkg-deb -x "$work"/*.deb "$work/root"
    version=$(basename "$work"/root/lib/modules/*)
    if [ -n "$wanted" ]; then keep_modules "$work/root" "$version" "${lab_modules[@]}"; fi
    find "$work/root/lib/modules" -name '*.ko.xz' -print0 | xargs -0 -r -n 64 -P 2 xz -d
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$work/root" "$version"
    rm -rf "$folder"
    mkdir -p "$folder"
    mv "$work/root/boot/vmlinuz-$version" "$folder/vmlinuz"
    mv "$work/root/lib/modules/$version" "$folder/modules"
    rm -rf "$work"
    if [ -n "$wanted" ]; then printf '%s' "$wanted" >"$folder/wanted"; fi
    (cd "$folder" && find vmlinuz modules -type f -exec sha256sum {} + >sums.new && mv sums.new sums)
    say "unpacked $package to $folder"
}

# keep_modules ROOT VERSION NAME…: deletes the kernel's modules except these and what they need.
keep_modules() {
    local root=$1 version=$2 name
    local -A keep=()
    shift 2
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$root" "$version"
    for name in "$@"; do
        while read -r name; do keep[$name]=yes; done < <(
            # FILE: NEEDED…, all relative to the version's folder. Names of built-in ones do not occur.
            awk -v name="$name" -F '[: ]+' '
                { file = $1; sub(/.*\//, "", file); sub(/\.ko(\.xz)?$/, "", file) }
                file == name { for (i = 1; i <= NF; i++) if ($i != "") print $i }' "$root/lib/modules/$version/modules.dep"
        )
    done
    while read -r name; do
        [ -n "${keep[${name#"$root/lib/modules/$version/"}]:-}" ] || rm "$name"
    done < <(find "$root/lib/modules/$version" -name '*.ko' -o -name '*.ko.xz')
}

# SPDK's own client, which drives the control socket in a test: from PyPI, in a folder of its own.
install_spdk_client() {
    local version=26.9 folder
    folder=${CARGO_TARGET_DIR:-target}/tools/spdk-client-$version
    [ ! -e "$folder/complete" ] || return 0
    if ! python3 -m pip --version >/dev/null 2>&1; then
        need_apt "missing: python3-pip"
        ready_sources
        say "installing python3-pip"
        apt_get install --no-install-recommends python3-pip || fail "could not install python3-pip"
    fi
    say "fetching spdk $version"
    rm -rf "$folder"
    mkdir -p "$folder"
    printf 'spdk==%s --hash=sha256:%s\n' "$version" \
        42037d98845c82e9317bc8b3c7521af3eb785e44cb5baf13c40a103d5df04f49 >"$folder/requirements.txt"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
        --require-hashes --target "$folder" --requirement "$folder/requirements.txt" || fail "could not fetch spdk $version"
    touch "$folder/complete"
}

mkdir -p "$guest"
guest=$(cd "$guest" && pwd)
newer=()
install_programs
install_spdk_client
kernel stable linux-image-cloud-amd64
kernel backports linux-image-cloud-amd64 newer
# The lab's: 9p, with which they see the machine's files, is not in the kernels for clouds.
kernel lab-stable linux-image-amd64
kernel lab-backports linux-image-amd64 newer
say "ready: $(qemu-system-x86_64 --version | head -n 1); guest kernels under $guest"
