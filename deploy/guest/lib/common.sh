# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: messages, packages, keys, and the one way in which an artefact enters the cache.

say() { echo "guest: $*" >&2; }
die() { say "$*"; exit 1; }

# The cache outlives checkouts, so that a second clone need not build a kernel again; the target directory is the
# fallback where the home cannot be written.
cache_root() {
    local root=${1:-${COLO_CACHE:-}} home
    if [ -z "$root" ]; then
        home=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
        if mkdir -p "$home/colo" 2>/dev/null && [ -w "$home/colo" ]; then
            root=$home/colo
        else
            root=$guest_dir/../../target/cache
        fi
    fi
    mkdir -p "$root"
    (cd "$root" && pwd)
}

# Installs the Debian packages of the list that are missing. Asked for only when something is really built, so a
# filled cache needs none of them.
need_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "installing by apt: ${missing[*]}"
    as_root apt-get install -y --no-install-recommends "${missing[@]}" >&2 ||
        { as_root apt-get update >&2 && as_root apt-get install -y --no-install-recommends "${missing[@]}" >&2; } ||
        die "cannot install them; see apt's message above, then run as root: apt-get install ${missing[*]}"
}

as_root() {
    local how=(env DEBIAN_FRONTEND=noninteractive "$@")
    # -n: a password prompt would be a question. By env: sudo may refuse a variable that is set for itself.
    if [ "$(id -u)" -ne 0 ]; then how=(sudo -n "${how[@]}"); fi
    "${how[@]}"
}

# The first line of what a command says of its version. A tool that is not there gives a key that no artefact has: a
# run that was not asked for what needs it is not the place to fail.
version_of() { "$@" 2>/dev/null | sed -n 1p || echo absent; }

# shellcheck disable=SC2016 # the format is dpkg's
package_version() { version_of dpkg-query -W -f='${Version}' "$1"; }

# Twelve hex digits over what is read: enough to tell the builds of one cache apart.
short_hash() { sha256sum | cut -c1-12; }

# Names and contents of files, independent of where the checkout lies.
hash_files() {
    local file
    for file in "$@"; do
        echo "== ${file##*/}"
        cat "$file"
    done
}

# publish NAME-KEY FUNCTION [ARG...]: unless images/NAME-KEY exists, runs FUNCTION with a fresh directory to fill and
# gives that directory its name when it is done. A finished name is therefore a finished artefact, whenever a run is
# killed. The lock makes a concurrent run wait and then find the result; children inherit it, so a make that outlives
# its killed script cannot be overtaken in its own directory.
publish() {
    local name=$1 build=$2 work
    shift 2
    [ -d "$images/$name" ] && return
    local lock
    exec {lock}>"$images/.lock-$name"
    flock "$lock"
    if [ ! -d "$images/$name" ]; then
        sweep
        work=$images/.building-$name
        rm -rf "$work"
        mkdir "$work"
        local start=$SECONDS
        say "building $name"
        "$build" "$work" "$@"
        sync -f "$work"
        mv -T "$work" "$images/$name"
        # shellcheck disable=SC2034 # read by prepare.sh
        built=yes
        say "built $name in $((SECONDS - start)) s"
    fi
    exec {lock}>&-
}

# What killed runs left behind: a build directory whose lock nobody holds.
sweep() {
    local dir lock
    for dir in "$images"/.building-*; do
        [ -d "$dir" ] || continue
        exec {lock}>"$images/.lock-${dir##*/.building-}"
        if flock -n "$lock"; then rm -rf "$dir"; fi
        exec {lock}>&-
    done
}
