# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: Debian's stock cloud kernel, for hosts with VMX or SVM. One package is all three variants.

readonly stock_meta_package=linux-image-cloud-amd64
# What a guest of ours needs and this kernel has as modules.
readonly stock_module_list=(virtio_mmio virtio_blk virtio_net virtio_console virtio_rng ext4 button evdev)

# The package and version that the meta package stands for today, as apt wants to be asked for it. Once a run: apt takes
# a third of a second for it.
stock_find() {
    stock_known=$(stock_depends)
    if [ -z "$stock_known" ]; then
        as_root apt-get update >&2 || true
        stock_known=$(stock_depends)
    fi
    [ -n "$stock_known" ] || die "apt knows no $stock_meta_package; run apt-get update as root, and see that Debian's main archive is in its sources"
}

stock_depends() {
    apt-cache show --no-all-versions "$stock_meta_package" 2>/dev/null |
        sed -nE 's/^Depends: (linux-image-[^ ]+) \(= ([^)]+)\).*/\1=\2/p' || true
}

stock_name() {
    local key
    key=$({ echo "$stock_known"; cat "$guest_dir/lib/stock.sh"; } | short_hash)
    echo "stock-$key"
}

stock_kernel() {
    local name
    name=$(stock_name)
    publish "$name" stock_build
}

stock_build() {
    local out=$1 work=$1/unpack release
    need_packages dpkg xz-utils kmod
    mkdir "$work"
    (cd "$work" && apt-get download -q -o APT::Sandbox::User=root "$stock_known" >&2) || die "cannot download $stock_known"
    dpkg-deb -x "$work"/*.deb "$work/root"
    release=$(basename "$work"/root/boot/vmlinuz-*)
    echo "${release#vmlinuz-}" >"$out/release"
    cp "$work"/root/boot/vmlinuz-* "$out/bzImage"
    cp "$work"/root/boot/config-* "$out/config"
    stock_extract "$out/bzImage" "$out/vmlinux"
    mkdir "$out/lib"
    mv "$work/root/lib/modules" "$out/lib/modules"
    depmod -b "$out" "${release#vmlinuz-}"
    rm -rf "$work"
}

# The ELF kernel inside a bzImage: the boot protocol's header says where the compressed payload lies and how long it is,
# its first bytes by what it was compressed. The last four bytes of the payload are the size of the result, which no
# decompressor wants.
stock_extract() {
    local image=$1 out=$2 start length format
    start=$((($(stock_field "$image" 0x1f1 1) + 1) * 512 + $(stock_field "$image" 0x248 4)))
    length=$(($(stock_field "$image" 0x24c 4) - 4))
    case $(stock_payload "$image" "$start" 6 | od -An -tx1 | tr -d ' \n') in
        02214c18*) format=lz4 ;;
        fd377a585a00) format=xz ;;
        28b52ffd*) format=zstd ;;
        1f8b08*) format=gzip ;;
        *) die "no compressed kernel that we know in $image" ;;
    esac
    need_packages lz4 xz-utils zstd gzip
    stock_payload "$image" "$start" "$length" | "$format" -dc >"$out"
    [ "$(head -c 4 "$out" | od -An -tx1 | tr -d ' \n')" = 7f454c46 ] || die "the payload of $image is no ELF kernel"
}

stock_payload() { tail -c "+$(($2 + 1))" "$1" | { head -c "$3"; cat >/dev/null; }; }

# A little-endian field of $3 bytes at $2.
stock_field() { od -An -j "$(($2))" -N "$3" -t "u$3" "$1" | tr -d ' '; }

# Copies the modules and what they depend on to the initramfs, and writes their order of loading for /init.
stock_modules() {
    local root=$1 dir release module
    dir=$images/$(stock_name)
    release=$(cat "$dir/release")
    mkdir -p "$root/lib/modules"
    for module in "${stock_module_list[@]}"; do
        # A module may be built in, which modprobe says as such.
        modprobe -d "$dir" -S "$release" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r module; do
        cp "$module" "$root/lib/modules/"
        echo "/lib/modules/${module##*/}"
    done >"$root/lib/modules.load"
}
