#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Prepares what the tests and demos boot as a guest on this host: kernels, an initramfs with the workload, a disk with a
# real service, bare payloads. Everything goes to a cache outside git, in directories named by a hash of what determines
# their content. See README.md for what is built, from what, and how long it takes.
#
#   prepare.sh [--cache DIR] [up|smp|acpi|bzimage|initramfs|service|payloads|all ...]
#
# The last line on stdout is the path of manifest.json, which names every artefact that is ready; all else that is
# said goes to stderr. COLO_GUEST_KIND=small|stock overrides the choice of kernel.
set -euo pipefail
shopt -s inherit_errexit

guest_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly guest_dir
# shellcheck source=lib/common.sh
. "$guest_dir/lib/common.sh"
# shellcheck source=lib/small.sh
. "$guest_dir/lib/small.sh"
# shellcheck source=lib/stock.sh
. "$guest_dir/lib/stock.sh"
# shellcheck source=lib/initramfs.sh
. "$guest_dir/lib/initramfs.sh"
# shellcheck source=lib/service.sh
. "$guest_dir/lib/service.sh"
# shellcheck source=lib/manifest.sh
. "$guest_dir/lib/manifest.sh"

usage() {
    sed -n '/^#   prepare.sh/s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# With VMX or SVM, guest kernels run on the CPU itself and a distribution's kernel boots. Without them KVM emulates
# kernel mode, in which only the small kernel of linux/ gets through its boot.
guest_kind() {
    if [ -n "${COLO_GUEST_KIND:-}" ]; then
        echo "$COLO_GUEST_KIND"
    elif grep -qwE 'vmx|svm' /proc/cpuinfo; then
        echo stock
    else
        echo small
    fi
}

# One wanted artefact. On a stock host the three variants and the bzImage are one and the same kernel package.
prepare() {
    case "$kind-$1" in
        small-up | small-bzimage) small_kernel up ;;
        small-smp) small_kernel smp ;;
        small-acpi) small_kernel acpi ;;
        stock-up | stock-smp | stock-acpi | stock-bzimage) stock_kernel ;;
        *-initramfs) initramfs ;;
        *-service) service ;;
        *-payloads) payloads ;;
    esac
}

main() {
    local cache='' targets=()
    while [ $# -gt 0 ]; do
        case $1 in
            --cache) [ $# -ge 2 ] || usage; cache=$2; shift ;;
            all) targets+=(up initramfs service payloads smp acpi) ;;
            up | smp | acpi | bzimage | initramfs | service | payloads) targets+=("$1") ;;
            *) usage ;;
        esac
        shift
    done
    # In the order in which others wait for them: the kernel and workload of most tests first.
    [ ${#targets[@]} -gt 0 ] || targets=(up initramfs service payloads smp acpi)

    kind=$(guest_kind)
    case $kind in
        small) ;;
        stock) stock_find ;;
        *) die "COLO_GUEST_KIND is small or stock, not '$kind'" ;;
    esac
    images=$(cache_root "$cache")/guest
    mkdir -p "$images"

    local target
    for target in "${targets[@]}"; do
        built=
        prepare "$target"
        # As soon as something new is there: others wait for the first kernel, not for the last.
        [ -z "$built" ] || write_manifest
    done
    write_manifest
    small_source_drop
    echo "$images/manifest.json"
}

# On one line: bash reads a script as it goes, and this one may be replaced under a long build.
main "$@"; exit
