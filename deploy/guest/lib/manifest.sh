# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: manifest.json, which names every artefact of the current keys that is ready.

# A run that was asked for one artefact still names the others that are there, so their names are worked out for all.
write_manifest() {
    local lines=() variant dir release=''
    add() { lines+=("$(printf '  "%s": "%s"' "$1" "$2")"); }
    add kind "$kind"
    for variant in up smp acpi; do
        dir=$images/$("${kind}_name" "$variant")
        [ -f "$dir/vmlinux" ] || continue
        add "$variant" "$dir/vmlinux"
        [ "$variant" != up ] || add bzimage "$dir/bzImage"
        release=$(cat "$dir/release")
    done
    [ -z "$release" ] || add release "$release"
    dir=$images/$(initramfs_name)
    if [ -d "$dir" ]; then
        add initramfs "$dir/initramfs.cpio"
        add initramfs_workload "$dir/workload.cpio"
    fi
    service_find
    dir=$images/$(service_disk_name)
    [ ! -d "$dir" ] || add service_disk "$dir/service.img"
    dir=$images/$(service_init_name)
    [ ! -d "$dir" ] || add service_initramfs "$dir/service.cpio"
    dir=$images/$(payloads_name)
    [ ! -d "$dir" ] || add payloads "$dir"
    # Own name for each writer, then an atomic rename: a reader sees one whole manifest or another.
    local IFS=$'\n' temp=$images/.manifest.$$
    { echo '{'; sed '$!s/$/,/' <<<"${lines[*]}"; echo '}'; } >"$temp"
    mv "$temp" "$images/manifest.json"
}

# The bare payloads have a Makefile of their own, which builds into OUT.
payloads_name() {
    local key
    key=$({
        cd "$guest_dir/payloads" 2>/dev/null || { echo none; exit 0; }
        version_of gcc --version
        find . -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum
    } | short_hash)
    echo "payloads-$key"
}

payloads() {
    if [ ! -f "$guest_dir/payloads/Makefile" ]; then
        say "no payloads: $guest_dir/payloads has no Makefile"
        return
    fi
    local name
    name=$(payloads_name)
    publish "$name" payloads_build
}

payloads_build() {
    need_packages gcc make binutils
    make -s -C "$guest_dir/payloads" OUT="$1" >&2
}
