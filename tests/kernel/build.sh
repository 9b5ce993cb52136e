#!/usr/bin/env bash
# Builds the lab's kernel with iommufd and its device files, which no Debian kernel has:
#
#   tests/kernel/build.sh [FILE]     as target/guest/iommufd/bzImage, where the tests find it, or as FILE
#
# From Debian's own kernel source (package linux-source-6.12, of the backports on Debian 12) with iommufd.config. Needs 2 GiB
# of room and takes 8 to 11 minutes on two cores. As root, missing build tools are installed as packages.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=6.12
guest=${CARGO_TARGET_DIR:-target}/guest
fragment=$PWD/tests/kernel/iommufd.config
mkdir -p "$guest/iommufd"
guest=$(cd "$guest" && pwd)
image=$(realpath -m "${1:-$guest/iommufd/bzImage}")

say() { printf '[kernel] %s\n' "$*"; }
fail() {
    printf '[kernel] %s\n' "$*" >&2
    exit 1
}

# ---- tools and source -------------------------------------------------------------------------------------------

# The lists, and the backports suite among them, are prepare.sh's business.
tests/prepare.sh

missing=()
for pair in gcc:gcc make:make bc:bc flex:flex bison:bison lz4:lz4 perl:perl xz:xz-utils; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
# objtool, a part of the build, reads object files by it.
echo '#include <gelf.h>' | gcc -fsyntax-only -x c - 2>/dev/null || missing+=(libelf-dev)
if [ ${#missing[@]} != 0 ]; then
    [ "$(id -u)" = 0 ] || fail "missing: ${missing[*]}: run this as root once"
    say "installing ${missing[*]}"
    apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends "${missing[@]}" >/dev/null
fi

work=$(mktemp -d "$guest/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
say "fetching linux-source-$version"
# apt-get checks what it downloads against the signed lists; of several versions it takes the newest of its suite.
(cd "$work" && apt-get -q -o APT::Sandbox::User=root download "linux-source-$version" >/dev/null) ||
    fail "the package sources have no linux-source-$version: run tests/prepare.sh as root, which adds the backports"
dpkg-deb --fsys-tarfile "$work"/linux-source-*.deb | tar -x -C "$work" "./usr/src/linux-source-$version.tar.xz"
tar -x -C "$work" -f "$work/usr/src/linux-source-$version.tar.xz"
cd "$work/linux-source-$version"

# ---- configuration ----------------------------------------------------------------------------------------------

say "configuring"
make -s allnoconfig KCONFIG_ALLCONFIG="$fragment" >/dev/null
# What the fragment asks for and another option forbids is left out in silence: that must not go unnoticed.
refused=()
while read -r line; do
    case $line in
    CONFIG_*) grep -qxF "$line" .config || refused+=("$line") ;;
    '# CONFIG_'*' is not set')
        option=${line#'# '}
        ! grep -q "^${option%% *}=" .config || refused+=("$line")
        ;;
    esac
done <"$fragment"
[ ${#refused[@]} = 0 ] || fail "the kernel's configuration did not take: ${refused[*]}"

# ---- build ------------------------------------------------------------------------------------------------------

say "building Linux $(make -s kernelversion) with $(nproc) jobs"
began=$SECONDS
make -s -j "$(nproc)" bzImage >"$work/log" 2>&1 || {
    tail -n 40 "$work/log"
    fail "the kernel could not be built"
}
mkdir -p "$(dirname "$image")"
cp arch/x86/boot/bzImage "$image.new"
mv "$image.new" "$image"
say "built $image in $((SECONDS - began)) s; it needs no modules"
