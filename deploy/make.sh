#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What the Makefile's targets do; `make help` says what they are. Each prints its steps as it goes and ends with how
# long it took, also when it fails.
#
#   make.sh setup|guest|build|test|check|bench|clean
#   make.sh demo [ARGUMENT OF colo-demo ...]
#   make.sh demo-cluster [ARGUMENT OF colo-demo-cluster ...]
#   make.sh chaos [ARGUMENT OF colo-chaos ...]
set -euo pipefail
shopt -s inherit_errexit

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly clone
cd "$clone"
# A make inside (of the guest's kernel, of a crate) is not a part of the one outside. Nothing here reads the terminal.
unset MAKEFLAGS MFLAGS MAKELEVEL
exec </dev/null

readonly target=${1:-}
readonly own=(--release --workspace --locked)
declare -A took=()
order=()
at=''
since=0
bad=()
clone_id=''

main() {
    case $target in
        setup | guest | build | test | check | demo | demo-cluster | chaos | bench) trap 'finish $?' EXIT ;;
        clean) clean; return ;;
        *) usage ;;
    esac
    shift
    case $target in
        setup) step set-up deploy/setup.sh check ;;
        guest) step set-up set_up; step guest guest ;;
        build) step set-up set_up; build ;;
        test) step set-up set_up; step set-up guest_if_kvm; build; step tests run_tests ;;
        check) step set-up set_up check; step set-up claim; check ;;
        # What colo-demo boots: three kernels would be built before a first demo otherwise.
        demo) step set-up set_up; step set-up guest_if_kvm up initramfs service; build; step demo demo "$@" ;;
        demo-cluster) step set-up set_up; step set-up guest_if_kvm up service; build; step demo demo_cluster "$@" ;;
        chaos) step set-up set_up; step set-up guest_if_kvm up service; build; step chaos chaos "$@" ;;
        bench) step set-up set_up; step set-up guest_if_kvm; build; step bench bench ;;
    esac
}

usage() {
    sed -n 's/^#   \(make.sh .*\)/\1/p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# step NAME COMMAND [ARGUMENT ...]: steps of one name are timed as one; a failure ends the run.
step() {
    begin "$@"
    "${@:2}"
    end
}

# The same, but the run goes on and remembers the failure in `bad`.
try() {
    begin "$@"
    "${@:2}" || bad+=("$1")
    end
}

begin() {
    at=$1
    since=$EPOCHSECONDS
    if [ -z "${took[$at]:-}" ]; then order+=("$at"); took[$at]=0; fi
    echo "== make $target: ${*:2}"
}

end() {
    took[$at]=$((took[$at] + EPOCHSECONDS - since))
    at=''
}

# The last line, whatever led here.
finish() {
    local what='' parts='' total=0 name
    if [ "$1" -ne 0 ]; then what="failed${at:+ in $at} after "; fi
    [ -z "$at" ] || end
    for name in "${order[@]}"; do
        total=$((total + took[$name]))
        parts+="${parts:+, }$name $(clock "${took[$name]}")"
    done
    echo "make $target: $what$((total / 60)) min $((total % 60)) s${parts:+ ($parts)}"
}

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# What the host lacks, where the cache is, and where cargo builds: in the cache too, where another clone finds the
# dependencies again, unless CARGO_TARGET_DIR says otherwise or the cache is in the clone.
set_up() {
    deploy/setup.sh "${1:-build}"
    locate
}

locate() {
    COLO_CACHE=$(deploy/setup.sh cache)
    case ${CARGO_TARGET_DIR:-} in
        /*) ;;
        ?*) CARGO_TARGET_DIR=$clone/$CARGO_TARGET_DIR ;;
        *)
            CARGO_TARGET_DIR=$COLO_CACHE/target
            case $COLO_CACHE in "$clone"/target/*) CARGO_TARGET_DIR=$clone/target ;; esac
            ;;
    esac
    export COLO_CACHE CARGO_TARGET_DIR PATH=$PATH:${CARGO_HOME:-${HOME:-/nonexistent}/.cargo}/bin
}

# Prepares all images, or only those named.
guest() {
    COLO_GUEST_MANIFEST=$(deploy/guest/prepare.sh "$@" | tail -n 1)
    export COLO_GUEST_MANIFEST
    echo "guest images: $COLO_GUEST_MANIFEST"
}

# Without KVM nothing boots, and what needs it says so itself: no reason to build kernels first.
guest_if_kvm() {
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then guest "$@"; return; fi
    unset COLO_GUEST_MANIFEST
    echo "/dev/kvm cannot be opened: no guest images are prepared, tests that boot a guest are skipped"
}

build() {
    step build claim
    step build cargo fetch --locked
    step dependencies dependencies
    step build cargo build "${own[@]}" --all-targets
}

# Takes the build directory for this clone until the script ends. cargo takes the crates of two clones of one workspace
# for the same (rust-lang/cargo#12516) and their times of change for the whole difference: it would call the other
# clone's binaries fresh. So when the clone has changed, what was built from the workspace is removed, and the
# dependencies stay. A clone is its path and its directory's inode and birth: a path may be used again.
claim() {
    mkdir -p "$CARGO_TARGET_DIR"
    exec {lock}>"$CARGO_TARGET_DIR/.colo-lock"
    flock -n "$lock" || { echo "waiting for another run in $CARGO_TARGET_DIR"; flock "$lock"; }
    clone_id="$clone $(stat -c '%d %i %W' "$clone")"
    if [ "$clone_id" != "$(cat "$CARGO_TARGET_DIR/.colo-clone" 2>/dev/null)" ]; then
        cargo clean --release --workspace
        echo "$clone_id" >"$CARGO_TARGET_DIR/.colo-clone"
    fi
}

# Builds all dependencies and nothing of ours, so that a log tells the two apart. cargo cannot be asked for that (`cargo
# build -p` of packages outside the workspace panics in 1.95, and would choose other features), so it builds the unit
# tests of a copy of the workspace whose sources are all empty: same manifests and lock file, hence the same packages
# with the same features. What it made of the copy's own crates goes by the names of the real ones and must not be
# taken for them: it is removed, and until then the build directory belongs to no clone.
dependencies() {
    local key kept=$CARGO_TARGET_DIR/release/.colo-dependencies copy=$clone/target/dependencies
    key=$({ rustc -vV; echo "${RUSTFLAGS:-}"; cat Cargo.lock; manifests | xargs cat; } | sha256sum)
    if [ "$key" = "$(cat "$kept" 2>/dev/null)" ]; then echo "unchanged since they were built"; return; fi
    rm -f "$CARGO_TARGET_DIR/.colo-clone"
    empty_copy "$copy"
    (cd "$copy"; cargo test "${own[@]}" --lib --no-run; cargo clean --release --workspace)
    rm -rf "$copy"
    echo "$clone_id" >"$CARGO_TARGET_DIR/.colo-clone"
    echo "$key" >"$kept"
}

manifests() { find . \( -path ./target -o -path ./.git \) -prune -o -name Cargo.toml -print | sort; }

# A manifest may name any of its sources, so each gets its empty one, and every crate gets a library.
empty_copy() {
    local file
    rm -rf "$1"
    while read -r file; do
        mkdir -p "$1/${file%/*}/src"
        cp "$file" "$1/$file"
        empty_source "$1/${file%/*}/src/lib.rs"
    done < <(manifests)
    cp Cargo.lock "$1/Cargo.lock"
    while read -r file; do
        mkdir -p "$1/${file%/*}"
        empty_source "$1/$file"
    done < <(find . \( -path ./target -o -path ./.git \) -prune -o -name '*.rs' -print)
}

empty_source() { echo '#![allow(missing_docs, dead_code)] fn main() {}' >"$1"; }

# Unit and documentation tests run side by side; integration tests boot guests, which crawl when they share a core, so
# they run one at a time. A test that cannot run on this host prints one line "skipped: why" and returns; cargo counts
# it as passed, the count here does not.
run_tests() {
    local log=$clone/target/test/log.txt status=0
    mkdir -p "${log%/*}"
    : >"$log"
    cargo_test --lib --bins -- --show-output || status=1
    cargo_test --doc || status=1
    if compgen -G '*/tests/*.rs' >/dev/null || compgen -G '*/*/tests/*.rs' >/dev/null; then
        cargo_test --test '*' -- --test-threads=1 --show-output || status=1
    fi
    count "$log" "$status"
}

cargo_test() { cargo test "${own[@]}" --no-fail-fast "$@" 2>&1 | tee -a "$log"; }

# Prints the count of a log and fails unless every test that ran passed and at least one did. A test binary that dies
# without a result line counts as one failure.
count() {
    local passed failed skipped
    read -r passed failed skipped < <(awk '
        /^test result: / { passed += $4; failed += $6; ignored += $8; if ($3 == "FAILED.") named++ }
        /error: (test|doctest) failed, to rerun/ { ended++ }
        /^skipped: / { skipped++ }
        END {
            if (ended > named) failed += ended - named
            print passed - skipped, failed + 0, skipped + ignored
        }' "$1")
    if [ "$2" -ne 0 ] && [ "$failed" -eq 0 ]; then
        echo "cargo failed outside of any test; see its message in $1"
        failed=1
    fi
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ] || return 1
    [ "$((passed + skipped))" -gt 0 ] || { echo "no test was found"; return 1; }
}

# All parts run, whichever fails.
check() {
    local kinds=(licenses bans sources)
    if [ "${COLO_ADVISORIES:-}" = 1 ]; then kinds+=(advisories); fi
    try format cargo fmt --all --check
    try clippy cargo clippy "${own[@]}" --all-targets -- -D warnings
    try deny "$COLO_CACHE/bin/cargo-deny" --locked check --hide-inclusion-graph "${kinds[@]}"
    [ "${COLO_ADVISORIES:-}" = 1 ] || echo "advisories are not checked: that needs the network and COLO_ADVISORIES=1"
    [ ${#bad[@]} -eq 0 ] || { echo "failed: ${bad[*]}"; return 1; }
}

demo() {
    mkdir -p target/demo
    "$CARGO_TARGET_DIR/release/colo-demo" --summary "$clone/target/demo/summary.json" "$@"
}

demo_cluster() {
    "$CARGO_TARGET_DIR/release/colo-demo-cluster" --summary "$clone/target/demo-cluster/summary.json" "$@"
}

chaos() {
    "$CARGO_TARGET_DIR/release/colo-chaos" --summary "$clone/target/chaos/summary.json" "$@"
}

bench() {
    compgen -G '*/benches/*.rs' >/dev/null || { echo "there is no benchmark yet"; return; }
    echo "Figures are of this machine in this run, with assertions on; compare only within one run, on an idle machine."
    cargo bench --workspace --locked --bench '*'
}

# Not the guest images, which take long to build and are named by what they are made of.
clean() {
    locate
    claim
    cargo clean --release
    rm -rf target/dependencies target/demo target/demo-cluster target/chaos target/test
    echo "removed what was built in $CARGO_TARGET_DIR; guest images stay in $COLO_CACHE/guest"
}

main "$@"
