# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: the small kernel for hosts whose KVM emulates kernel mode. Debian's linux-source-6.1, patched
# by linux/linux.patch, `make tinyconfig` plus the fragments of linux/.

readonly small_source_package=linux-source-6.1
readonly small_source_tar=/usr/src/linux-source-6.1.tar.xz

# The fragments that make a variant, base first.
small_fragments() {
    local dir=$guest_dir/linux
    case $1 in
        up) echo "$dir/linux.config" ;;
        smp) echo "$dir/linux.config" "$dir/linux-smp.config" ;;
        acpi) echo "$dir/linux.config" "$dir/linux-smp.config" "$dir/linux-acpi.config" ;;
    esac
}

# Source version, compiler, patch, fragments, and the functions that build; not their comments, which may be mended
# without four minutes of building.
small_name() {
    local key fragments
    read -ra fragments <<<"$(small_fragments "$1")"
    key=$({
        package_version "$small_source_package"
        version_of gcc --version
        hash_files "$guest_dir/linux/linux.patch" "${fragments[@]}"
        declare -f small_unpack small_build small_configure small_make
    } | short_hash)
    echo "$1-$key"
}

small_kernel() {
    # The key needs both: the source's version and the compiler's.
    need_packages "$small_source_package" gcc
    local name
    name=$(small_name "$1")
    publish "$name" small_build "$1"
}

# The patched source is unpacked once and shared by the variants, which build in directories of their own. It is an
# artefact like the others until small_source_drop.
small_source() {
    local key
    key=$({ package_version "$small_source_package"; cat "$guest_dir/linux/linux.patch"; } | short_hash)
    source_tree=$images/src-$key
    # Held shared by whoever builds from the tree, so that nobody drops it under a running make.
    exec {source_lock}>"$images/.use-src-$key"
    flock -s "$source_lock"
    publish "src-$key" small_unpack
}

small_unpack() {
    tar -xf "$small_source_tar" -C "$1" --strip-components=1
    patch -s -p1 -d "$1" <"$guest_dir/linux/linux.patch"
}

# Source trees are 1.4 GB that nothing needs once the kernels are there. One that another run builds from stays, and is
# dropped by that run. Renamed first, so that a killed removal leaves no half tree under the name of a whole one.
small_source_drop() {
    local tree lock
    if [ -n "${source_tree:-}" ]; then exec {source_lock}>&-; fi
    source_tree=
    for tree in "$images"/src-*; do
        [ -d "$tree" ] || continue
        exec {lock}>"$images/.use-${tree##*/}"
        if flock -n "$lock"; then
            mv -T "$tree" "$images/.building-dropped"
            rm -rf "$images/.building-dropped"
        fi
        exec {lock}>&-
    done
}

small_build() {
    local out=$1 variant=$2 tree fragments target=vmlinux
    need_packages "$small_source_package" gcc make flex bison bc libelf-dev libc6-dev patch xz-utils lz4
    [ -n "${source_tree:-}" ] || small_source
    tree=$out/build
    mkdir "$tree"
    read -ra fragments <<<"$(small_fragments "$variant")"
    small_configure "$tree" "${fragments[@]}"
    [ "$variant" != up ] || target=bzImage
    # Fixed stamps: the same key gives the same bytes.
    small_make "$tree" -j"$(nproc)" "$target" KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=colo KBUILD_BUILD_HOST=colo
    strip -o "$out/vmlinux" "$tree/vmlinux"
    [ "$variant" != up ] || cp "$tree/arch/x86/boot/bzImage" "$out/bzImage"
    cp "$tree/.config" "$out/config"
    cp "$tree/System.map" "$out/System.map"
    cp "$tree/include/config/kernel.release" "$out/release"
    rm -rf "$tree"
}

# tinyconfig, the fragments over it, and a check that Kconfig kept every line of them: a renamed or unmet option would
# otherwise vanish without a word.
small_configure() {
    local tree=$1 lost
    shift
    small_make "$tree" tinyconfig
    (cd "$tree" && "$source_tree/scripts/kconfig/merge_config.sh" -m -O . .config "$@" >merge.log 2>&1)
    small_make "$tree" olddefconfig
    # A later fragment may overrule an earlier one, so each option's last word counts.
    lost=$(sed -nE 's/^(CONFIG_[A-Z0-9_]+)=.*|^# (CONFIG_[A-Z0-9_]+) is not set$/\1\2 &/p' "$@" |
        awk '{ name = $1; sub(/^[^ ]+ /, ""); last[name] = $0 } END { for (name in last) print last[name] }' |
        small_lost "$tree/.config")
    [ -z "$lost" ] || die "the kernel configuration did not keep: $lost"
}

# Reads option lines and prints those that the configuration $1 does not have. "Not set" also holds when the option's
# dependencies hide it.
small_lost() {
    local line
    while read -r line; do
        case $line in
            '#'*) ! grep -q "^${line:2:-11}=" "$1" || echo "$line" ;;
            *) grep -qxF "$line" "$1" || echo "$line" ;;
        esac
    done
}

# make says nothing unless it fails; its log is then the message. Niced: a kernel build is never the urgent thing.
small_make() {
    local tree=$1
    shift
    nice make -C "$source_tree" O="$tree" "$@" >"$tree/make.log" 2>&1 || {
        tail -n 30 "$tree/make.log" >&2
        die "make $* failed"
    }
}
