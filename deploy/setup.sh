#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Sees to what building and testing Colo needs on this host. May be run any number of times; asks nothing; says what it
# installs, and for what it cannot install the one line that helps. What guest images need, deploy/guest/prepare.sh
# installs itself when it has to build one.
#
#   setup.sh [build]   a C and C++ toolchain with libclang, ip(8), etcd (installed by apt), Rust (checked)
#   setup.sh check     that, rustfmt and clippy (checked), cargo-deny (built into the cache)
#   setup.sh cache     only prints the cache directory: $COLO_CACHE, else colo/ in the user's cache directory, else
#                      target/cache where that cannot be written
set -euo pipefail
shopt -s inherit_errexit

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly clone
# For cache_root alone, so that there is one rule of where the cache is.
guest_dir=$clone/deploy/guest
# shellcheck source=guest/lib/common.sh
. "$guest_dir/lib/common.sh"

# The payloads and the build scripts of crates need a C compiler and linker; RocksDB is C++, and its bindings are made
# by libclang; make runs all of this. Tests and the demo build networks with ip(8).
readonly packages=(gcc g++ make libc6-dev clang libclang-dev iproute2)
readonly cargo_deny=0.20.2

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

main() {
    case ${1:-build} in
        build) c_toolchain; etcd_server; rust ;;
        check) c_toolchain; etcd_server; rust; rust_component rustfmt fmt; rust_component clippy clippy; deny ;;
        cache) cache_root '' ;;
        *) die "usage: setup.sh [build|check|cache]" ;;
    esac
}

c_toolchain() {
    if ! command -v apt-get >/dev/null; then
        command -v g++ >/dev/null && command -v make >/dev/null && command -v clang >/dev/null && return
        die "no apt-get here: install gcc, g++, make, clang, libclang and the C library's headers the way this system does it"
    fi
    local package missing=()
    for package in "${packages[@]}"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing by apt: ${missing[*]}"
    # The lists are fetched only if they turn out to be absent or too old.
    apt_get install -y --no-install-recommends "${missing[@]}" && return
    apt_get update && apt_get install -y --no-install-recommends "${missing[@]}" && return
    die "apt cannot install them; see its message above, then run: apt-get install ${missing[*]}"
}

# Tests and the demo of a cluster run etcd members of their own. Debian's package is for a service, which it starts at
# once and at every boot, so it is installed with that denied (policy-rc.d(8)) and then disabled. An etcd that is there
# already is somebody's: nothing of it is touched. Without one, those tests are skipped and say so.
etcd_server() {
    command -v etcd >/dev/null && return
    command -v apt-get >/dev/null || { say "no etcd here: tests that need it are skipped"; return 0; }
    local missing=(etcd-server)
    say "installing by apt: ${missing[*]}, without its service"
    # A shell of its own: not being root ends no more than this.
    (as_root bash -c "$install_etcd") </dev/null >&2 ||
        say "apt cannot install etcd-server: tests that need it are skipped"
}

# shellcheck disable=SC2016 # the variables are the inner shell's
readonly install_etcd='
set -euo pipefail
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap "rm -f $policy" EXIT
    printf "#!/bin/sh\nexit 101\n" >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
install=(apt-get -q install -y --no-install-recommends etcd-server)
"${install[@]}" || { apt-get -q update && "${install[@]}"; }
update-rc.d etcd disable || true
if command -v systemctl >/dev/null; then systemctl disable etcd.service || true; fi
# Where the policy of this host lets it start all the same.
if invoke-rc.d etcd status >/dev/null 2>&1; then invoke-rc.d etcd stop; fi
'

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q "$@" </dev/null >&2; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; return; fi
    # -n: a password prompt would be a question.
    sudo -n true 2>/dev/null || die "not root and no sudo without a password; run as root: apt-get install ${missing[*]}"
    sudo -n "$@"
}

rust() {
    local get='curl --proto =https --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y' wanted found
    export PATH=$PATH:${CARGO_HOME:-${HOME:-/nonexistent}/.cargo}/bin
    wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$clone/Cargo.toml")
    found=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || true
    [ -n "$found" ] || die "no cargo on PATH or in ~/.cargo/bin; Rust $wanted or newer is needed: $get"
    command -v rustc >/dev/null || die "no rustc beside cargo; reinstall Rust $wanted or newer: $get"
    if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
        die "Rust $found is too old, $wanted or newer is needed: $(rust_newer "$get")"
    fi
}

rust_newer() { if command -v rustup >/dev/null; then echo 'rustup update stable'; else echo "$1"; fi; }

# A component and the cargo command that it brings. rustup leaves a stub behind where one is not installed, so run it.
rust_component() {
    cargo "$2" --version >/dev/null 2>&1 || die "no $1: rustup component add $1"
}

# Built once and kept in the cache. Unoptimised: that takes 1 min 20 s of one core, and a check of the whole tree takes
# one second all the same.
deny() {
    local cache
    cache=$(cache_root '')
    [ "$("$cache/bin/cargo-deny" --version 2>/dev/null)" != "cargo-deny $cargo_deny" ] || return 0
    say "building cargo-deny $cargo_deny into $cache/bin (once)"
    local start=$SECONDS
    # In a directory away from the workspace, whose Cargo configuration is not meant for it.
    (cd "$cache" && CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_DEBUG=0 \
        cargo install cargo-deny --locked --quiet --force --version "$cargo_deny" --root "$cache" \
        --target-dir "$cache/build-cargo-deny" </dev/null >&2) ||
        die "cannot build cargo-deny; see cargo's message above (does it reach the crate registry?)"
    rm -rf "$cache/build-cargo-deny"
    say "built cargo-deny in $((SECONDS - start)) s"
}

main "$@"
