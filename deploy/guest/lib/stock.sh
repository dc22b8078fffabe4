# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154 # guest_dir, images and kind are set by prepare.sh
#
# Sourced by prepare.sh: Debian's stock cloud kernel, for hosts with VMX or SVM. One package is all three variants.

readonly stock_meta_package=linux-image-cloud-amd64
# What a guest of ours needs and this kernel has as modules.
readonly stock_module_list=(virtio_mmio virtio_blk virtio_net virtio_console virtio_rng ext4)

# The package that the meta package stands for today, as name=version.
stock_package() {
    local package version
    package=$(apt-cache depends "$stock_meta_package" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    if [ -z "$package" ]; then
        as_root apt-get update >&2
        package=$(apt-cache depends "$stock_meta_package" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    fi
    [ -n "$package" ] || die "apt knows no $stock_meta_package"
    version=$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')
    echo "$package=$version"
}

stock_name() {
    # Asked once a run: apt takes half a second for it.
    [ -n "${stock_known:-}" ] || stock_known=$(stock_package)
    local key
    key=$({ echo "$stock_known"; cat "$guest_dir/lib/stock.sh"; } | short_hash)
    echo "stock-$key"
}

stock_kernel() {
    local name
    stock_name >/dev/null
    name=$(stock_name)
    publish "$name" stock_build
}

stock_build() {
    local out=$1 work=$1/unpack release
    need_packages dpkg xz-utils kmod
    mkdir "$work"
    (cd "$work" && apt-get download -q "$stock_known" >&2) || die "cannot download $stock_known"
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

# The ELF kernel inside a bzImage, by the method of the kernel's scripts/extract-vmlinux: find the magic number of a
# compressed stream, try to unpack what follows. The header of the image says where its payload lies, but only the
# decompressor knows whether it is whole; trailing bytes make it complain, hence the check of the result instead.
stock_extract() {
    local image=$1 out=$2 start
    need_packages xz-utils zstd
    while read -r format start; do
        tail -c "+$((start + 1))" "$image" | "$format" -dc >"$out" 2>/dev/null || true
        if [ "$(head -c 4 "$out")" = $'\x7fELF' ]; then return; fi
    done < <(stock_magic "$image")
    die "no compressed kernel found in $image"
}

stock_magic() {
    LC_ALL=C grep -aboP '\xfd7zXZ\x00' "$1" | sed 's/:.*//; s/^/xz /' || true
    LC_ALL=C grep -aboP '\x28\xb5\x2f\xfd' "$1" | sed 's/:.*//; s/^/zstd /' || true
    LC_ALL=C grep -aboP '\x1f\x8b\x08' "$1" | sed 's/:.*//; s/^/gzip /' || true
}

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
